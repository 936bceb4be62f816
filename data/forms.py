"""Whether faster forms follow their definitions, seen on a small model before the work begins."""

import threading
from collections.abc import Hashable
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch

import tinylm
from data import checkpoint, cli
from data.checkpoint import dtype_name
from data.cli import InputError
from data.machine import DTYPES

# How to drop the forms of what reads split parameters: all but the one over ranks, which follows the definition then.
DROPPED_OVER_RANKS = {
    "linear": "linear.forms[:] = [(lambda x, w: is_split(w), lambda x, w: linear(x, gathered(w)))]",
    "embedding": "del embedding.forms[1:]", "rmsnorm": "del rmsnorm.forms[1:]"}

UNKNOWN = ("whether faster forms follow their definitions is not known, as a small model fails: {}: {} (d_model is 64 "
           "at most there, and 8 for all ids)")

def check_forms(config, settings, loss):
    """Raise InputError where faster forms give other numbers than the definitions, as where one was changed.

    A small model is compared: on the device its `loss`, train.py's, gradients and what is read, in float64 and
    roughly in the dtype of training, what it writes, and losses of many ids; on the CPU clipping and three updates. To
    be split, all blocks are read too. Where a model can't be small, that is said.
    """
    loss = partial(loss, settings=settings)
    axes = {path: len(shape) for path, shape in tinylm.tree_leaves(tinylm.param_shapes(config))}
    if settings.shard and 0 in axes.values():
        raise InputError(f"--shard splits along the first axis, and {min(axes, key=axes.get)} has none; give it the "
                         "shape (1,)")
    lost = [name for name in DROPPED_OVER_RANKS if settings.shard and not tinylm.OPERATIONS[name].forms]
    if lost:
        raise InputError(f"--shard needs a form over ranks of {lost[0]}, which {lost[0]}.forms.clear() drops too; in "
                         f"its place write {DROPPED_OVER_RANKS[lost[0]]}")
    try:
        model = small_model(config, settings.device)
        check_optimizer(model, settings)
        if settings.shard:
            deep = small_model(config, settings.device, num_layers=config.num_layers)
        with tinylm.definitions_alone():
            exact = learning(model, loss, torch.float64)
            check_finite(exact["loss"]), updates(model, settings), writing(model)
            narrow = narrow_model(config, settings.device)
            loss_and_gradients(narrow, loss)
    except InputError:
        raise
    except Exception as error:
        return cli.say(UNKNOWN.format(type(error).__name__, cli.one_line(error)))
    forms = tinylm.transformer_blocks.forms
    over_ranks = [(tinylm.always, tinylm.one_block_at_a_time)] if settings.shard and forms else []
    forms[:0] = over_ranks
    try:
        differing = (tinylm.forms_that_differ(partial(learning, model, loss, torch.float64))
                     or tinylm.forms_that_differ(partial(updates, model, settings))
                     or tinylm.forms_that_differ(partial(writing, model))
                     or tinylm.forms_that_differ(partial(loss_and_gradients, narrow, loss))
                     or tinylm.forms_that_differ(partial(evaluated_of_ids, narrow))
                     or tinylm.forms_that_differ(partial(drawn_of_ids, narrow)))
        if not differing and over_ranks:  # which ask for definitions that don't look beyond a block
            differing = tinylm.forms_that_differ(lambda: {"read": read(deep, False)})
        if not differing and (settings.device, settings.dtype) != ("cpu", "float32"):  # where other forms serve
            compute = partial(learning, model, loss, DTYPES[settings.dtype])
            differing = tinylm.forms_that_differ(compute, 0.1) and tinylm.forms_that_differ(
                compute, max(0.1, 2 * rounding(exact, compute)))
    finally:
        del forms[:len(over_ranks)]
    refuse(differing, settings.shard)
    singles = model._replace(doubles=tinylm.tree_map(torch.Tensor.float, model.doubles))  # as a run has them
    dtype = read(singles, False, DTYPES[settings.dtype]).dtype
    if dtype != DTYPES[settings.dtype]:
        cli.say(f"--dtype={settings.dtype}: hidden states become {dtype_name(dtype)}, which is slow, where a parameter "
                "of that dtype is added to x or multiplied; let it be p.to(x.dtype)")
    learned, evaluated = loss_by(loss, model), loss_by(tinylm.token_losses_in_pieces, model)
    if is_same_each_time(model, cli.say) and abs(learned - evaluated) > 1e-6 * abs(learned):
        cli.say(f"training lowers another loss, {learned:.6f} of a small model, than evaluations give, "
                f"{evaluated:.6f}: right where a term is added; what evaluations and sampling should have too "
                "belongs in to_logits, and in token_losses_in_pieces where that calls it in another way")

def check_reading(config, device):
    """`check_forms` for what reads a model and changes nothing of it, to evaluate or to write: in float64 alone, which
    sees a changed definition. Not beside other threads, as it switches forms off for all.
    """
    if threading.active_count() == 1:
        functions = [*vars(tinylm).values(), *(form for op in tinylm.OPERATIONS.values() for _, form in op.forms)]
        compare_reading(config, device, tuple(f for f in functions if callable(f) and isinstance(f, Hashable)))

@lru_cache(maxsize=8)  # of a process that writes many texts: anew where a function is another
def compare_reading(config, device, functions):
    try:
        model = small_model(config, device)
        with tinylm.definitions_alone():
            check_finite(reading(model)["loss"]), writing(model)
            narrow = narrow_model(config, device)
            evaluated_of_ids(narrow)
    except Exception as error:
        return cli.fail(UNKNOWN.format(type(error).__name__, cli.one_line(error)))
    refuse(tinylm.forms_that_differ(partial(reading, model)) or tinylm.forms_that_differ(partial(writing, model))
           or tinylm.forms_that_differ(partial(evaluated_of_ids, narrow))
           or tinylm.forms_that_differ(partial(drawn_of_ids, narrow)))
    is_same_each_time(model, cli.fail)  # as what is written may be all that stdout is for

def check_finite(loss):
    if not loss.isfinite():
        raise FloatingPointError("its loss is not finite")

def rounding(exact, compute):
    """How far from exact numbers the definitions are in another dtype, in which a choice may fall otherwise."""
    with tinylm.definitions_alone():
        rounded = compute()
    distance = lambda what: tinylm.global_norm(tinylm.tree_map(torch.sub, rounded[what], exact[what]))
    return max((distance(what) / tinylm.global_norm(exact[what])).item() for what in exact)

def refuse(differing, is_split=False):
    """Raise InputError where operations, by name, differ."""
    if is_split and "transformer_blocks" in differing:
        raise InputError("--shard gathers one block at a time, which gives other numbers than transformer_blocks by "
                         "its definition in tinylm.py; let one_block_at_a_time and transformer_blocks_over_ranks "
                         "both follow there (only the first is compared), or leave --shard out")
    if differing:
        drop = lambda name: is_split and DROPPED_OVER_RANKS.get(name) or f"{name}.forms.clear()"
        names, advice = ", ".join(differing), "; ".join(map(drop, differing))
        raise InputError(f"{names}: by faster forms not what it is by the definitions in tinylm.py; let these follow, "
                         f"or drop them there by {advice}")

def is_same_each_time(model, say):
    """Whether a model's numbers are the same each time it is read. What is wrong with how it is read is said."""
    whole, again, pieces = read(model, False), read(model, False, seed=1), read(model, True)
    if not whole.equal(again):
        say("the model draws numbers in evaluations and in sampling too; dropout, which is for training alone, takes "
            "training=torch.is_grad_enabled()")
        return False
    if (pieces - whole).norm() > 1e-5 * whole.norm():  # a part may be computed in float32
        say("what the model writes is not what it learns: its numbers depend on how many positions are read at once, "
            "as where cached_attention does not follow, or the cache of init_cache lacks what a position needs of "
            "earlier ones")
    return True

# ---- A small model ----

class Small(NamedTuple):
    """A model of at most two blocks, and what it reads."""

    config: tinylm.Config
    params: dict  # in float32, on the CPU
    doubles: dict  # in float64, which no mode of products rounds, on the device
    tokens: torch.Tensor  # (2, T + 1)
    past: torch.Tensor  # keys, or values, of more positions

def small_model(config, device, **sizes):
    most = {"num_layers": 2, "d_model": 64, "d_ff": 128, "vocab_size": 512, "num_kv_heads": 2,
            "context_length": 8192} | sizes
    small = {name: min(size, getattr(config, name)) for name, size in most.items()}
    small["num_heads"] = min(2, config.num_heads // config.num_kv_heads) * small["num_kv_heads"]
    config, draw = replace(config, **small), torch.Generator().manual_seed(0)
    T, far = min(256, config.context_length), config.context_length
    params = tinylm.tree_map(lambda p: p + 0.02 * torch.randn(p.shape, generator=draw),  # zeros and ones hide much
                             tinylm.init_params(config, draw))
    doubles = tinylm.tree_map(lambda p: p.to(device, torch.float64), params)
    tokens = torch.arange(2 * T + 2, device=device).view(2, -1) % config.vocab_size
    cache = tinylm.init_cache(config, 1, far, torch.float32, "cpu")
    return Small(config, params, doubles, tokens, torch.randn(cache["k"].shape, generator=draw))

def narrow_model(config, device):
    """A small model with all the vocabulary. Its tokens are all ids, as a formula may name one, or of many the first
    and the last ones, as many as are little work.
    """
    model = small_model(config, device, num_layers=1, d_model=8, d_ff=8, vocab_size=config.vocab_size, num_kv_heads=1)
    T, V = min(4, config.context_length), config.vocab_size
    count = min(V, max(64, (1 << 22) // V))
    ids = torch.cat((torch.arange(count - count // 4), torch.arange(V - count // 4, V)))
    rows = torch.arange(-(-len(ids) // T))[:, None] * T + torch.arange(T + 1)  # each token is a target once
    return model._replace(tokens=ids[rows % len(ids)].to(device))

@contextmanager
def drawn_from(seed):
    """Within it what is drawn, as for dropout, is the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

@torch.no_grad()
def read(model, in_pieces, dtype=torch.float64, seed=0):
    """The final hidden states of positions read at once, as to learn, or in pieces, as to write. → (2, T, d_model)."""
    config, _, doubles, tokens, _ = model
    T, xs = tokens.shape[1] - 1, []
    borders = sorted({0, T // 2, T - 1, T}) if in_pieces else (0, T)  # the last piece is one token
    cache = tinylm.init_cache(config, 2, T, dtype, tokens.device) if in_pieces else None
    with drawn_from(seed):
        if in_pieces:  # as where a text has outgrown the context
            _, cache, *_ = tinylm.hidden_states(doubles, tokens[:, -1:], config, dtype, cache)
            cache = cache | {"filled": 0}
        for start, end in zip(borders, borders[1:]):
            if in_pieces and end == start + 1 and tokens.is_cuda:
                cache = cache | {"filled": tokens.new_tensor([start])}  # as where a step is recorded
            x, cache, *_ = tinylm.hidden_states(doubles, tokens[:, start:end], config, dtype, cache)  # forks have more
            xs.append(x)
    return torch.cat(xs, 1)

@torch.no_grad()
@drawn_from(0)
def read_last(model, dtype):
    """The hidden states of positions that look back far, on keys and values that are drawn."""
    config, _, doubles, tokens, past = model
    far = past.shape[-2]
    last, cache = min(64, far), tinylm.init_cache(config, 1, far, dtype, tokens.device)
    for name in ("k", "v"):
        cache[name].copy_(past)
    return tinylm.hidden_states(doubles, tokens[:1, :last], config, dtype, cache | {"filled": far - last})[0]

@torch.no_grad()
def loss_by(function, model):
    """The mean loss by a function of the model and a batch: that of training, or what evaluations call."""
    config, _, doubles, tokens, _ = model
    with drawn_from(0):
        return function(doubles, tokens[:, :-1], tokens[:, 1:], config, torch.float64).mean()

def reading(model):
    """What is compared of a model that is read: in pieces, last of all, and the loss of an evaluation."""
    return {"read": read(model, True), "last": read_last(model, torch.float64),
            "loss": loss_by(tinylm.token_losses_in_pieces, model)}

@drawn_from(0)
def loss_and_gradients(model, loss, dtype=torch.float64):
    """A loss of all tokens of a model, and its gradients."""
    inputs, targets = model.tokens[:, :-1], model.tokens[:, 1:]
    value, grads = tinylm.value_and_grad(loss, model.doubles, inputs, targets, model.config, dtype)
    return {"loss": value, "gradients": grads}

def evaluated_of_ids(model):
    """The loss that an evaluation gives of a narrow model."""
    return {"evaluated": loss_by(tinylm.token_losses_in_pieces, model)}

def drawn_of_ids(model):
    """Which ids `sample_token` draws, of all alike, where a single one's mass moves the others; and at several
    temperatures, of scores that fall and are equal in pairs: some from the first to the last, and the last ones.
    """
    V, device = model.config.vocab_size, model.tokens.device
    ids = torch.arange(0.5, 8, dtype=torch.float64, device=device).mul(V / 8).long()  # (8)
    in_id = torch.tensor([0.75, 0.25], dtype=torch.float64, device=device).repeat(4)  # where half a mass moves it out
    chance, last = 1 - (ids + in_id)[:, None] / V, torch.full((1, 1), 1e-9, dtype=torch.float64, device=device)
    scores = -0.2 * (torch.arange(V, device=device) // 2)
    draw = lambda scores, chance, *how: tinylm.sample_token(scores.repeat(len(chance), 1), chance, *how)
    drawn = [draw(scores, chance, 0.7, 0, 0.99), draw(scores, chance, 1.0, 20, 0.8)]
    drawn += [draw(scores, last, *how) for how in ((0.5, 51, 1.0), (2.0, 0, 0.99), (0.25, 0, 0.9), (1.5, 21, 0.8))]
    return {"moved": draw(0 * scores, chance, 1.0, 0, 0.9) - ids, "drawn": torch.cat(drawn)}

@torch.no_grad()
def writing(model):
    """Some tokens that a model writes, and scores with weights laid out for several texts."""
    config, _, doubles, tokens, _ = model
    with drawn_from(0):
        written = torch.cat(list(tinylm.generate(doubles, tokens[:, :1], config, 5, 0, dtype=torch.float64)))
        dtype = torch.float32 if tokens.is_cpu else torch.float64  # in which a CPU lays weights out
        weights = tinylm.weights_for_generation(tinylm.tree_map(lambda p: p.to(dtype), doubles), dtype, 9)
        scores = tinylm.forward(weights, tokens[:, :-1], config, dtype)[:, -1]
        return {"written": written, "scores": scores}

def learning(model, loss, dtype):
    """The loss, its gradients, and what is read in pieces and last of all."""
    return loss_and_gradients(model, loss, dtype) | {"read": read(model, True, dtype), "last": read_last(model, dtype)}

def check_optimizer(model, settings):
    """Raise InputError where no run could go on with what an optimiser's update makes."""
    for path, p in tinylm.tree_leaves(model.params):
        if p.dtype != torch.float32:
            raise InputError(f"init_params makes {path} of {dtype_name(p.dtype)}, expected float32, which checkpoints "
                             "keep; another dtype to compute in goes into DTYPES of data/machine.py, for --dtype")
    init, update = tinylm.OPTIMIZERS[settings.optimizer]
    with tinylm.definitions_alone():  # what is wrong in a form is told as such
        state, before = init(model.params), torch.get_rng_state()
        checkpoint.check_goes_on(model.params, state, lambda *trees: update(
            *trees, torch.tensor(1e-2), **settings.of_optimizer))
    if cli.has_ranks() and not torch.get_rng_state().equal(before):
        raise InputError("the optimiser's update draws numbers, of which each rank would draw others, so that their "
                         "models differ; let it draw by a torch.Generator that is seeded with a count of its steps")

@drawn_from(0)
def updates(model, settings):
    """Clipped gradients, and parameters and state behind three updates."""
    params, own = model.params, settings.of_optimizer
    init, optimizer_update = tinylm.OPTIMIZERS[settings.optimizer]
    update_once = lambda params, grads, state: optimizer_update(params, grads, state, torch.tensor(1e-2), **own)
    norm = tinylm.global_norm(params)
    clipped = {str(share): tinylm.clip_gradients(params, norm, share * norm) for share in (0.5, 2)}
    in_order = partial(tinylm.tree_map, partial(torch.clone, memory_format=torch.contiguous_format))  # as in a run
    new, state = in_order(params), in_order(init(params))
    if tinylm.has_adamw_in_place(optimizer_update, settings.device):
        tinylm.adamw_in_place(new, params, state, 1e-2, **own)
    elif settings.compile and tinylm.is_separable(optimizer_update):
        tinylm.block_by_block(tinylm.in_place(update_once))(new, params, state)
    else:
        with torch.set_grad_enabled(settings.device != "cpu"):  # as in a step, for which AdamW has another form
            new, state = update_once(new, params, state)
    others = tinylm.tree_map(lambda p: p.flip(-1) if p.ndim else -p, params)  # a first step has no past
    new, state = update_once(new, others, state)
    later = tinylm.tree_build((path, x + 10_000 if path.split(".")[-1] == "step" else x)
                              for path, x in tinylm.tree_leaves(state))
    new, state = update_once(new, params, later)
    state = tinylm.tree_map(lambda _, now: now, init(params), state)  # fails where a form forgets a part
    results = {"clipped": clipped, "update": tinylm.tree_map(torch.sub, new, params), "state": state}
    return {what: tree for what, tree in results.items() if tree}  # an optimiser may have no state
