"""Whether faster forms follow their definitions, seen on a small model before a run begins."""

from dataclasses import replace
from functools import partial

import torch

import tinylm
from data import checkpoint, cli
from data.cli import InputError
from data.machine import DTYPES

# How to drop the forms of what reads split parameters: all but the one over ranks, which follows the definition then.
DROPPED_OVER_RANKS = {
    "linear": "linear.forms[:] = [(lambda x, w: is_split(w), lambda x, w: linear(x, gathered(w)))]",
    "embedding": "del embedding.forms[1:]", "rmsnorm": "del rmsnorm.forms[1:]"}

def check_forms(config, settings):
    """Raise InputError where faster forms give other numbers than the definitions, as where one was changed.

    A small model, of at most two blocks, is compared: on the device its loss, gradients and hidden states, read in
    pieces as to write, in float64, which no mode of products rounds, and roughly in the dtype of training, some tokens
    that it writes, and scores and a nucleus of what writes several texts; on the CPU clipping and two updates. To be
    split, all blocks are read too. Where a model can't be small, that is said.
    """
    axes = {path: len(shape) for path, shape in tinylm.tree_leaves(tinylm.param_shapes(config))}
    if settings.shard and 0 in axes.values():
        raise InputError(f"--shard splits along the first axis, and {min(axes, key=axes.get)} has none; give it the "
                         "shape (1,)")
    lost = [name for name in DROPPED_OVER_RANKS if settings.shard and not tinylm.OPERATIONS[name].forms]
    if lost:
        raise InputError(f"--shard needs a form over ranks of {lost[0]}, which {lost[0]}.forms.clear() drops too; in "
                         f"its place write {DROPPED_OVER_RANKS[lost[0]]}")
    most = {"num_layers": 2, "d_model": 64, "d_ff": 128, "vocab_size": 256, "num_kv_heads": 2}
    small = {name: min(size, getattr(config, name)) for name, size in most.items()}
    small["num_heads"] = min(2, config.num_heads // config.num_kv_heads) * small["num_kv_heads"]
    try:
        read, write, losses, step, update = small_run(replace(config, **small), settings)
        if settings.shard:
            read_deep, *_ = small_run(replace(config, **small | {"num_layers": config.num_layers}), settings)
        with tinylm.definitions_alone():
            step(torch.float64), update(), write()
    except InputError:
        raise
    except Exception as error:
        return cli.say("whether faster forms follow their definitions is not known, as a small model fails: "
                       f"{type(error).__name__}: {error}")
    forms = tinylm.transformer_blocks.forms
    over_ranks = [(tinylm.always, tinylm.one_block_at_a_time)] if settings.shard and forms else []
    forms[:0] = over_ranks
    try:
        differing = (tinylm.forms_that_differ(partial(step, torch.float64)) or tinylm.forms_that_differ(update)
                     or tinylm.forms_that_differ(write))
        if not differing and over_ranks:  # which ask for definitions that don't look beyond a block
            differing = tinylm.forms_that_differ(lambda: {"read": read_deep(False)})
        if not differing and (settings.device, settings.dtype) != ("cpu", "float32"):  # where other forms serve
            differing = tinylm.forms_that_differ(partial(step, DTYPES[settings.dtype]), 0.1)
    finally:
        del forms[:len(over_ranks)]
    if differing:
        drop = lambda name: settings.shard and DROPPED_OVER_RANKS.get(name) or f"{name}.forms.clear()"
        names, advice = ", ".join(differing), "; ".join(map(drop, differing))
        raise InputError(f"{names}: by faster forms not what it is by the definitions in tinylm.py; let these follow, "
                         f"or drop them there by {advice}")
    dtype = read(False, DTYPES[settings.dtype]).dtype
    if dtype != DTYPES[settings.dtype]:
        cli.say(f"--dtype={settings.dtype}: hidden states become {str(dtype)[6:]}, which is slow, where a parameter of "
                "that dtype is added to x or multiplied; let it be p.to(x.dtype)")
    whole, again, pieces, (learned, evaluated) = read(False), read(False, seed=1), read(True), losses()
    if not whole.equal(again):  # it draws numbers
        return
    if (pieces - whole).norm() > 1e-4 * whole.norm():
        cli.say("what the model writes is not what it learns: its numbers depend on how many positions are read at "
                "once, as where cached_attention does not follow, or the cache of init_cache lacks what a position "
                "needs of earlier ones")
    if abs(learned - evaluated) > 1e-4 * abs(learned):
        cli.say(f"training lowers another loss, {learned:.4f} of a small model, than evaluations give, "
                f"{evaluated:.4f}: right where loss_fn adds a term; what evaluations and sampling should have too "
                "belongs in to_logits")

def small_run(config, settings):
    """What `check_forms` compares of a model: read(in_pieces), the final hidden states of some positions read at once
    or in pieces; write(), some tokens, and scores and nuclei with weights laid out for several texts; losses(), of
    training and of evaluation; step(dtype), the loss and its gradients, and what is read in pieces and last of all;
    update(), clipping and two updates.
    """
    draw, own = torch.Generator().manual_seed(0), settings.of_optimizer
    init, optimizer_update = tinylm.OPTIMIZERS[settings.optimizer]
    T, last, far = (min(size, config.context_length) for size in (256, 64, 8192))
    params = tinylm.tree_map(lambda p: p + 0.02 * torch.randn(p.shape, generator=draw),  # zeros and ones hide much
                             tinylm.init_params(config, draw))
    doubles = tinylm.tree_map(lambda p: p.to(settings.device, torch.float64), params)
    tokens = torch.arange(2 * T + 2, device=settings.device).view(2, -1) % config.vocab_size
    batch = tokens[:, :-1], tokens[:, 1:]
    cache = tinylm.init_cache(config, 1, far, torch.float32, "cpu")
    past = torch.randn(cache["k"].shape, generator=draw)
    update_once = lambda params, grads, state: optimizer_update(params, grads, state, torch.tensor(1e-2), **own)
    with tinylm.definitions_alone():  # what is wrong in a form is told as such
        checkpoint.check_goes_on(params, init(params), update_once)

    @torch.no_grad()
    def read(in_pieces, dtype=torch.float64, seed=0):
        borders, xs = sorted({0, T // 2, T - 1, T}) if in_pieces else (0, T), []  # the last piece is one token
        cache = tinylm.init_cache(config, 2, T, dtype, tokens.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for start, end in zip(borders, borders[1:]):
                if end == start + 1 and tokens.is_cuda:
                    cache = cache | {"filled": tokens.new_tensor([start])}  # as where a step is recorded
                x, cache = tinylm.hidden_states(doubles, tokens[:, start:end], config, dtype, cache)
                xs.append(x)
        return torch.cat(xs, 1)

    @torch.no_grad()
    def write():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            written = torch.cat(list(tinylm.generate(doubles, tokens[:, :1], config, 5, 0, dtype=torch.float64)))
            dtype = torch.float32 if settings.device == "cpu" else torch.float64  # in which a CPU lays weights out
            weights = tinylm.weights_for_generation(tinylm.tree_map(lambda p: p.to(dtype), doubles), dtype, 9)
            scores = tinylm.to_logits(weights, tinylm.hidden_states(weights, tokens[:, :T], config, dtype)[0][:, -1])
            return {"written": written, "scores": scores, "nucleus": tinylm.nucleus_floor(tinylm.softmax(scores), 0.9)}

    @torch.no_grad()
    def read_last(dtype):  # of positions that look back far, on keys and values that are drawn
        cache = tinylm.init_cache(config, 1, far, dtype, tokens.device)
        for name in ("k", "v"):
            cache[name].copy_(past)
        cache = cache | {"filled": far - last}
        return tinylm.hidden_states(doubles, tokens[:1, :last], config, dtype, cache)[0]

    @torch.no_grad()
    def losses():
        with torch.random.fork_rng(devices=[]):
            evaluated = tinylm.token_losses_in_pieces(doubles, *batch, config, torch.float64).mean()
            return tinylm.loss_fn(doubles, *batch, config, torch.float64), evaluated

    def step(dtype):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss, grads = tinylm.value_and_grad(tinylm.loss_fn, doubles, *batch, config, dtype)
            return {"loss": loss, "gradients": grads, "read": read(True, dtype), "last": read_last(dtype)}

    def update():
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
        state = tinylm.tree_map(lambda _, now: now, init(params), state)  # fails where a form forgets a part
        results = {"clipped": clipped, "update": tinylm.tree_map(torch.sub, new, params), "state": state}
        return {what: tree for what, tree in results.items() if tree}  # an optimiser may have no state

    return read, write, losses, step, update
