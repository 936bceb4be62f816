"""Train a model: python train.py --help. From Python: run = train.train(data="stories", num_steps=100)."""

import inspect
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported Ctrl-C ends this without a word

import data  # before torch, for what it sets

import numpy as np
import torch

import tinylm
from data import bpe, checkpoint, cli, files, machine, plot, prepare
from data.cli import InputError, flag
from data.forms import check_forms, check_reading
from data.log import Log, check_wandb
from data.machine import DTYPES, DTYPES_OF_FILES
from data.run import conclude, data_of, find_checkpoint, newest, open_run, state_of, try_to_save

# ---- Settings ----

def default_num_layers(settings):
    """A block for every 64 features, as in the smallest GPT-2, and no fewer than 4."""
    return max(4, round(settings.d_model / 64))

def default_num_heads(settings):
    """One, or heads of at least 32 features (64 from d_model 768 on), as many as divide d_model into even numbers."""
    most = max(1, settings.d_model // (64 if settings.d_model >= 768 else 32))
    return next((heads for heads in range(most, 0, -1) if settings.d_model % (2 * heads) == 0), 1)

def default_context_length(settings):
    """256, or for a text of under 2,048 tokens the largest power of two that goes into it 8 times, 2 at least."""
    return 256 if settings.train_tokens >= 2048 else 2 ** max(1, int(math.log2(max(1, settings.train_tokens / 8))))

def default_batch_size(settings):
    """On CUDA 64 · d_model tokens, at most a 25th of the text, in 4 sequences or more that ranks can share."""
    tokens, unit = min(64 * settings.d_model, settings.train_tokens / 25), math.lcm(4, machine.num_ranks())
    return max(unit, round(tokens / settings.context_length / unit) * unit)

def default_num_steps(settings, most):
    """`most`, or as many as read the text 16 times, 800 at least; where a model was trained before 3 times, or 100."""
    least, epochs = (100, 3) if settings.is_pretrained else (800, 16)
    return round(min(most, max(least, epochs * settings.train_tokens / settings.tokens_per_step)))

def default_lr_max(settings):
    """Wider models need smaller steps; 1/√d_model is a safe middle between constant and the 1/d_model of theory.

    A model that was trained before gets a twentieth, so that it keeps what it knows.
    """
    return 4e-3 * (128 / settings.d_model) ** 0.5 / (20 if settings.is_pretrained else 1)

def default_weight_decay(settings):
    """The optimiser's own, and more where a text is read so often that the model would learn it by heart.

    AdamW forgets in 1/(lr · decay) steps, best said in readings of the text (Wang and Aitchison 2024). From 10 readings
    on this makes it one reading, and with fewer more, but never less than 25 steps.
    """
    own = hyperparameters(settings.optimizer).get("weight_decay")
    if not own or settings.is_pretrained or not settings.lr_max:
        return own
    steps_per_epoch = settings.train_tokens / settings.tokens_per_step
    share = min(1, settings.epochs / 10) / max(25, steps_per_epoch)  # of a weight that a step takes, at the top rate
    return max(own, float(f"{share / settings.lr_max:.2g}"))

def default_dtype(settings):
    """bfloat16, where the device has instructions for it."""
    return "bfloat16" if machine.has_bfloat16(settings.device) else "float32"

def own_parameters(optimizer):
    """The parameters of an optimiser's update behind params, grads, state and lr."""
    _, update = tinylm.OPTIMIZERS[optimizer]
    return list(inspect.signature(update).parameters.values())[4:]

def hyperparameters(optimizer):
    """{name: default} of an optimiser's own hyperparameters, None where it has no default."""
    return {p.name: None if p.default is p.empty else p.default for p in own_parameters(optimizer)}

def own_flag(name, meaning, within):
    """A hyperparameter, whose default is the optimiser's own."""
    defaults = {optimizer: hyperparameters(optimizer).get(name) for optimizer in tinylm.OPTIMIZERS}
    stated = ", ".join(f"{optimizer} {default}" for optimizer, default in defaults.items() if default is not None)
    return flag(lambda settings: hyperparameters(settings.optimizer).get(name), meaning, within, stated=stated)

@dataclass
class Settings:
    # Data
    data: str = flag("stories", "a name below data/, a folder that data/prepare.py wrote, or a text file; corpora and "
                     "texts are prepared first, with --init_from by its model's tokenizer; on resuming, where the same "
                     "data is now", may_change=True)
    context_length: int = flag(default_context_length, "tokens the model sees at once", "[1, inf)",
                               stated="256, less for a text of under 2,048 tokens")
    # Model
    d_model: int = flag({"cpu": 128, "cuda": 512}, "features of a token", "[1, inf)")
    num_layers: int = flag(default_num_layers, "blocks", "[1, 10000]", stated="d_model / 64, 4 or more")
    num_heads: int = flag(default_num_heads, "attention heads", stated="of 32 features or more; 64 from d_model 768 on")
    num_kv_heads: int = flag(0, "heads of keys and values, shared by groups of the others", stated="num_heads")
    d_ff: int = flag(0, "features inside the feed-forward layers", stated="8/3 d_model, rounded up to a multiple of 64")
    vocab_size: int = flag(0, "tokens, if more than the data has", "[0, inf)", stated="the data's")
    tie_embeddings: bool = flag(False, "one matrix for the embedding and the output")
    rope_theta: float = flag(10000.0, "base of the rotary angles")
    norm_eps: float = flag(1e-5, "epsilon of RMSNorm")
    # Learning
    batch_size: int = flag({"cpu": 4, "cuda": default_batch_size}, "sequences in a batch", "[1, 1000000000]",
                           stated="CPU 4, CUDA 64 d_model tokens, at most a 25th of the text, 4 or more")
    grad_accum_steps: int = flag(1, "batches in a step", "[1, 1000000000]")
    num_steps: int = flag({"cpu": partial(default_num_steps, most=2500), "cuda": partial(default_num_steps, most=5000)},
                          "steps in all", "[1, inf)", may_change=True,
                          stated="16 readings of the text, 800 to 2500 (CUDA 5000); --init_from: 3, from 100 on")
    schedule: str = flag("cosine", f"course of the learning rate, {' or '.join(tinylm.SCHEDULES)}",
                         choices=tinylm.SCHEDULES)
    lr_max: float = flag(default_lr_max, "learning rate after the warm-up", "[0, inf)",
                         stated="4e-3 · √(128 / d_model); a twentieth with --init_from", may_change=True)
    lr_min: float = flag(lambda settings: settings.lr_max / 100, "learning rate at the end", "[0, inf)",
                         stated="lr_max / 100", may_change=True)
    warmup_steps: int = flag(lambda settings: min(100, settings.num_steps // 10), "steps of linear warm-up", "[0, inf)",
                             stated="100, at most a tenth of num_steps")
    optimizer: str = flag("adamw", "adamw, or muon for the matrices of the blocks (AdamW for the rest)",
                          choices=tinylm.OPTIMIZERS)
    weight_decay: float = flag(default_weight_decay, "decoupled decay of the matrices", "[0, inf)",
                               stated="0.1, more for a text that is read often, the more the lower lr_max")
    beta1: float = own_flag("beta1", "decay of AdamW's first moment", "[0, 1)")
    beta2: float = own_flag("beta2", "decay of AdamW's second moment", "[0, 1)")
    momentum: float = own_flag("momentum", "decay of Muon's momentum", "[0, 1)")
    eps: float = own_flag("eps", "epsilon of AdamW", "(0, inf)")
    clip_grad: float = flag(1.0, "highest norm of all gradients together", "(0, inf)")
    seed: int = flag(0, "chooses the first parameters and the batches", "[-9223372036854775808, 9223372036854775807]")
    # Machine
    device: str = flag(None, "cpu, cuda or cuda:NUMBER", stated="cuda where there is one", may_change=True)
    dtype: str = flag(default_dtype, "what to compute in, float32 or bfloat16; parameters stay float32",
                      choices=DTYPES, stated="bfloat16 where a CPU has AVX512_BF16, or CUDA compute capability 8.0, "
                      "else float32")
    compile: bool = flag({"cpu": False, "cuda": True}, "compile the step with torch.compile", may_change=True)
    shard: bool = flag(False, "under torchrun, split the model and the optimiser over the ranks", may_change=True)
    remat: bool = flag(False, "compute each block again in the backward pass, which takes time and saves memory",
                       may_change=True)
    # Run
    output_dir: str = flag(None, "folder to write to", stated="runs/RUN_NAME, with a number where that is taken")
    run_name: str = flag(None, "name of the run", stated="that of the data")
    resume: str = flag(None, "folder of a run to go on with, its flags kept; or auto, to go on where there is one and "
                       "else start it")
    init_from: str = flag(None, "run (its best checkpoint) or Llama folder to take the model from, its sizes kept")
    log_interval: int = flag(10, "steps between lines of the log", "[1, inf)", may_change=True)
    eval_interval: int = flag(lambda settings: min(500, max(1, settings.num_steps // 5)), "steps between evaluations",
                              "[1, inf)", stated="500, at most a fifth of num_steps", may_change=True)
    eval_tokens: int = flag({"cpu": 131072, "cuda": 4194304}, "tokens of the validation split to evaluate on at most",
                            "[1, inf)", stated="CPU 131072, CUDA 4194304; with --eval_only all", may_change=True)
    checkpoint_interval: int = flag(lambda settings: settings.eval_interval, "steps between checkpoints", "[1, inf)",
                                    stated="eval_interval", may_change=True)
    save_dtype: str = flag(lambda settings: settings.weights_dtype, "dtype of a checkpoint's model, float32, bfloat16 "
                           "or float16; with 16 bits training/ has float32 too, to go on from",
                           choices=DTYPES_OF_FILES, stated="float32; with --init_from what that has", may_change=True)
    keep_checkpoints: int = flag(2, "the newest ones kept, beside the best", "[1, inf)", may_change=True)
    sample_tokens: int = flag(64, "tokens that the model writes at each evaluation, to see it learn", "[0, inf)",
                              may_change=True)
    use_wandb: bool = flag(False, "log to Weights & Biases too", may_change=True)
    wandb_project: str = flag("tinylm", "with --use_wandb: the project there", may_change=True)
    wandb_artifacts: bool = flag(False, "with --use_wandb: send checkpoints too", may_change=True)
    wandb_histograms: bool = flag(False, "with --use_wandb: at evaluations the distribution of each parameter and "
                                  "gradient", may_change=True)
    # Instead of training
    eval_only: bool = flag(None, "print the loss of --resume (its latest checkpoint) or --init_from (of a run its "
                           "best) on --data (a data folder, or a text file) and end")
    split: str = flag(None, "part of a data folder that --eval_only takes, val or train", choices=("val", "train"),
                      stated="val")

    @classmethod
    def complete(cls, given, **known):
        """All settings: those given, and defaults that suit the device, what is known, and each other for the rest."""
        device = machine.choose_device(given.get("device"))
        settings = cli.complete(cls, given | {"device": device}, device, **known)
        for name, value in given.items():
            default = cli.flags_of(cls)[name].metadata["default"]
            if callable(default) and default(settings) is None and name not in settings.of_optimizer:  # but others have
                raise InputError(f"--{name}={value}: {settings.optimizer} has no {name}; leave the flag out")
        for p in own_parameters(settings.optimizer):
            if p.default is p.empty and getattr(settings, p.name, None) is None:
                raise InputError(f"--optimizer={settings.optimizer} needs {p.name}; give --{p.name}, or that a line in "
                                 "Settings of train.py")
        if settings.lr_min > settings.lr_max:
            raise InputError(f"--lr_min={settings.lr_min}: expected a number from 0 up to lr_max, {settings.lr_max:g}")
        if settings.run_name and (Path(settings.run_name).name != settings.run_name or settings.run_name == ".."):
            raise InputError(f"--run_name={settings.run_name}: expected a name for a folder below runs/; for another "
                             "place give --output_dir")
        if settings.warmup_steps > settings.num_steps:
            raise InputError(f"--num_steps={settings.num_steps}: expected warmup_steps, {settings.warmup_steps}, or "
                             "more; give more, or, to a new run, a smaller --warmup_steps")
        if settings.batch_size % machine.num_ranks():
            raise InputError(f"--batch_size={settings.batch_size} can't be split over {machine.num_ranks()} ranks; "
                             "start a number of ranks that divides it, or give a new run a multiple of theirs")
        schedule(settings)  # raises where the schedule needs what is no setting
        machine.check_dtype(settings.dtype, device)
        machine.check_compiler(device, DTYPES[settings.dtype], settings.compile)
        if settings.use_wandb:
            check_wandb()
        if settings.shard and not torch.distributed.is_initialized():
            raise InputError("--shard splits a model over the ranks that torchrun starts; start it as "
                             "torchrun --nproc_per_node=DEVICES train.py --shard …, or give --shard=False")
        return settings

    @property
    def of_optimizer(self):
        """{name: value} of the hyperparameters of the optimiser's update."""
        return {name: getattr(self, name) for name in hyperparameters(self.optimizer) if hasattr(self, name)}

    tokens_per_step = property(lambda self: self.batch_size * self.grad_accum_steps * self.context_length)
    train_tokens, is_pretrained, weights_dtype = math.inf, False, "float32"  # defaults depend on them, once known
    epochs = property(lambda self: self.num_steps * self.tokens_per_step / self.train_tokens)

# ---- The loop ----

@cli.command(Settings)
@machine.within_memory("give --remat, or begin anew with a smaller --batch_size (half of it with --grad_accum_steps=2 "
                       "learns the same), --context_length or --d_model; checkpoints that were saved are whole")
@machine.modes_of_its_own()
def train(given):
    """Train a language model; checkpoints and metrics go to runs/NAME. Each flag has a default that fits."""
    resume, init_from, eval_only = (given.pop(name, None) for name in ("resume", "init_from", "eval_only"))
    if eval_only:
        return evaluate_only(resume, init_from, given)
    if "split" in given:
        raise InputError(f"--split={given['split']} belongs to --eval_only; leave it out, or add --eval_only")
    if torch.get_default_dtype() != torch.float32:
        raise InputError(f"torch's default dtype is {checkpoint.dtype_name(torch.get_default_dtype())}, expected "
                         "float32; call torch.set_default_dtype(torch.float32) before")
    check = lambda config, settings: check_forms(config, settings, training_loss)
    interrupt = machine.Interrupt()  # made before data is prepared, as it notices when torchrun dies from here on
    with (open_run(resume, init_from, given, Settings, check) as run, interrupt,
          machine.numerics(run.settings.device), Log(run) as log):
        settings = run.settings
        train_ids, val_ids, ranks = run.ids["train"], run.ids["val"], (run.rank, run.num_ranks)
        gradients, update, losses = step_functions(run.config, settings)
        learning_rate = schedule(settings)
        is_due = lambda step, interval: step % getattr(settings, interval) == 0 or step == settings.num_steps

        if run.source and not run.step:  # what the model of --init_from does before any step
            log.evaluation(0, evaluate(losses, run.params, val_ids, settings, *ranks), sample_text(run))
        for step in range(run.step + 1, settings.num_steps + 1):
            lr = float(learning_rate(step - 1))
            val_loss, problem = math.inf, None  # where nothing is evaluated, nothing saved
            loss, grads = accumulate_gradients(gradients, run.params, train_ids, settings, step - 1, *ranks)
            loss, num_asked = machine.agree(loss, interrupt.asked)
            rate = torch.full_like(loss, lr).float()  # a tensor, which a CUDA graph reads anew
            run.params, run.optimizer, norm = update(run.params, grads, run.optimizer, rate, loss)  # may be in place
            # The host may run a step ahead of the device, except where something is to be said of this very step.
            at_once = is_due(step, "eval_interval") or is_due(step, "checkpoint_interval")
            # Whether to stop is known where the numbers are, as all ranks must stop behind the same step.
            asked = log.step(step, lr, machine.to_host(torch.stack((loss, norm, num_asked))), at_once)

            if is_due(step, "eval_interval"):
                val_loss = evaluate(losses, run.params, val_ids, settings, *ranks)
                log.evaluation(step, val_loss, sample_text(run))
                log.histograms(step, params=run.params, grads=grads)
            is_last = asked or step == settings.num_steps
            # Numbers that are not finite end a run soon; but what was done before a last bad step must not be lost.
            if is_last or is_due(step, "checkpoint_interval") and not log.bad_steps:
                problem = try_to_save(run, step, log.seconds, val_loss)
                if not problem:
                    log.checkpoint(step)
                log.pause(step)
            grads = None  # whose memory serves the next step
            if asked:
                break

    run.step = step
    if step < settings.num_steps and not cli.has_ranks():  # torchrun would take it for a failure
        run.stopped_by = interrupt.number
    conclude(run, step, problem)
    return run

# ---- The parts of a step ----

def schedule(settings):
    """The learning rate as a function of the step; a schedule's other arguments are settings of these names."""
    function = tinylm.SCHEDULES[settings.schedule]
    own = list(inspect.signature(function).parameters.values())[1:]
    for parameter in own:
        if parameter.default is parameter.empty and not hasattr(settings, parameter.name):
            raise InputError(f"--schedule={settings.schedule} needs {parameter.name}, which is no setting; give it a "
                             "line in Settings of train.py")
    return partial(function, **{p.name: getattr(settings, p.name) for p in own if hasattr(settings, p.name)})

def training_loss(params, inputs, targets, config, dtype, settings):
    """The mean loss that a step lowers. Here a fork passes on what its `loss_fn` needs of the settings."""
    return tinylm.loss_fn(params, inputs, targets, config, dtype, settings.remat)

def step_functions(config, settings):
    """What a step computes, compiled where asked: the gradients of a batch, the update, the losses of each token.

    An update that is compiled, or AdamW's on a CPU, writes over the parameters and state that it gets, but not where
    ranks need more than their own parts. What is one CUDA graph returns what its next call overwrites.
    """
    dtype, (_, optimizer_update) = DTYPES[settings.dtype], tinylm.OPTIMIZERS[settings.optimizer]
    own, is_separable = settings.of_optimizer, tinylm.is_separable(optimizer_update)

    def loss(params, inputs, targets):
        return training_loss(params, inputs, targets, config, dtype, settings)

    def gradients(params, inputs, targets, on_gradient=None):
        function = tinylm.watched(loss, on_gradient) if on_gradient else loss
        return tinylm.value_and_grad(function, params, inputs, targets)

    def updated_if_finite(params, grads, optimizer, lr, norm, loss):  # else a step changes nothing
        grads = tinylm.clip_gradients(grads, norm, settings.clip_grad)
        new = optimizer_update(params, grads, optimizer, lr, **own)
        return [tinylm.if_finite(loss + norm, *trees) for trees in zip(new, (params, optimizer))]

    def write_if_finite(params, grads, optimizer, lr, norm, loss):  # on a CPU, where a look at a number costs nothing
        if (loss + norm).isfinite():
            grads = tinylm.clip_gradients(grads, norm, settings.clip_grad)
            tinylm.adamw_in_place(params, grads, optimizer, lr, **own)

    def update(params, grads, optimizer, lr, loss):
        norm = tinylm.global_norm(grads)
        if write:
            write(params, grads, optimizer, lr, norm, loss)
        else:
            params, optimizer = updated_if_finite(params, grads, optimizer, lr, norm, loss)
        return params, optimizer, norm.double()

    def losses(params, inputs, targets):
        return tinylm.token_losses_in_pieces(params, inputs, targets, config, dtype)

    write = write_if_finite if tinylm.has_adamw_in_place(optimizer_update, settings.device) else None
    if settings.compile:
        torch.compiler.reset()  # of the runs before in this process: sizes that differ would be taken to vary
        # Else the first step on a CPU would try for six seconds whether the C++ compiler knows its instructions: one
        # that builds PyTorch's headers does. On CUDA kernels that don't wait for each other become one.
        option = "cpp.vec_isa_ok" if settings.device == "cpu" else "combo_kernels"
        # PyTorch keeps compiled headers, for half the time, by a hash of theirs that it has the program openssl take.
        options = {option: True, "cpp_cache_precompile_headers": shutil.which("openssl") is not None}
        compiled = partial(torch.compile, fullgraph=True, options=options)
        by_layer = partial(tinylm.layer_by_layer, compiled=compiled)
        if settings.shard or machine.num_ranks() > 1:
            gradients = by_layer(gradients)
        else:
            loss = compiled(loss)  # which `gradients` calls by this name
        if settings.device != "cpu":  # where this takes 8 seconds, which an evaluation doesn't
            losses = (by_layer if settings.shard else compiled)(losses)
        if not write:
            write = compiled(tinylm.in_place(updated_if_finite))
            write = tinylm.block_by_block(write) if is_separable else write
        # With accumulation the results of two calls are needed at once; with ranks messages leave in between.
        if settings.device != "cpu" and not settings.shard and settings.grad_accum_steps == machine.num_ranks() == 1:
            gradients, update = tinylm.in_graph(gradients, 1), tinylm.in_graph(update, 3)
    if write and settings.shard:
        write = tinylm.on_own_parts(write) if is_separable else None  # others need more than their own parts
    return gradients, torch.no_grad()(update), torch.no_grad()(losses)

def accumulate_gradients(gradients, params, ids, settings, step, rank=0, num_ranks=1):
    """The loss on this rank and the mean gradients of a step, over its grad_accum_steps batches and all ranks.

    Of each batch a rank computes its part. Gradients travel once, as the last backward pass makes them; those of a
    sharded model are averaged where they are made.
    """
    prepare.check_unchanged(ids)
    count, total_loss, total = settings.grad_accum_steps, 0.0, None
    averager = tinylm.GradientAverager() if num_ranks > 1 and not settings.shard else None
    for micro_step in range(step * count, (step + 1) * count):
        batch = tinylm.get_batch(ids, settings.batch_size // num_ranks, settings.context_length, settings.seed,
                                 micro_step, rank, num_ranks)
        batch = machine.on_device(*batch, settings.device)
        torch.manual_seed(((settings.seed * 1_000_003 + micro_step) * num_ranks + rank) % 2**63)  # as for dropout
        is_last = micro_step == (step + 1) * count - 1
        if averager and is_last:
            so_far = dict(tinylm.tree_leaves(total)) if total else {}
            on_gradient = lambda path, g: averager.add(path, so_far[path] + g if so_far else g)
            loss, grads = gradients(params, *batch, on_gradient)
            with cli.as_input_error():  # of a parameter that the loss does not use
                total = averager.averages(grads)
        else:
            loss, grads = gradients(params, *batch)
            total = tinylm.tree_map(torch.add, total, grads) if total else grads
        total_loss = total_loss + loss
    return total_loss / count, tinylm.tree_map(lambda g: g / count, total) if count > 1 else total

# ---- Evaluation ----

def eval_batches(tokens, batch_size, context_length):
    """Cut tokens (N) into batches in which each token but the first is a target once, for evaluation.

    Yields inputs and targets (batch_size, context_length) of int64, and how many targets are real: the last batch is
    filled up with zeros, so that all have one shape.
    """
    size = batch_size * context_length
    for start in range(0, len(tokens) - 1, size):
        piece = np.asarray(tokens[start:start + size + 1]).astype(np.int64)
        padded = torch.from_numpy(np.pad(piece, (0, size + 1 - len(piece))))
        yield padded[:-1].view(batch_size, -1), padded[1:].view(batch_size, -1), len(piece) - 1

def evaluate(losses, params, ids, settings, rank=0, num_ranks=1):
    """Mean loss, in nats per token, over the first eval_tokens targets of `ids`, the same each time.

    Of each batch a rank computes its rows, so that all ranks run the model equally often.
    """
    prepare.check_unchanged(ids)
    rows, loss_sum = settings.batch_size // num_ranks, torch.zeros((), dtype=torch.float64, device=settings.device)
    here, size = slice(rank * rows, (rank + 1) * rows), rows * settings.context_length
    ids = ids[:settings.eval_tokens + 1]
    for inputs, targets, real in eval_batches(ids, settings.batch_size, settings.context_length):
        batch = losses(params, *machine.on_device(inputs[here], targets[here], settings.device))
        own = batch.flatten()[:max(real - rank * size, 0)]  # of what is real
        loss_sum = loss_sum + own.double().sum()  # no number is read before all batches are begun
    return machine.sum_over_ranks(loss_sum).item() / (len(ids) - 1)

def sample_text(run):
    """What the model writes from the start of a document, by a fixed seed: text of sample_tokens tokens, or less."""
    settings, end = run.settings, run.meta["end_of_text_id"]
    if not settings.sample_tokens or (run.rank and not settings.shard):  # where split, all ranks must take part
        return ""
    device = settings.device
    prompt, randomness = torch.tensor([run.meta["begin_ids"]], device=device), torch.Generator(device).manual_seed(0)
    try:
        tokens = [token.item() for token in tinylm.generate(
            run.params, prompt, run.config, settings.sample_tokens, temperature=0.8, top_p=0.95, stop_tokens=(end,),
            generator=randomness, dtype=DTYPES[settings.dtype])]
        return bpe.decode(run.tokenizer, [t for t in tokens if t != end and t < run.tokenizer.vocab_size])
    except Exception as error:  # of a changed model
        if settings.shard or device != "cpu":  # others would wait for this rank; what a GPU has begun is not known
            raise
        cli.fail(f"the model could not write a sample ({type(error).__name__}: {cli.one_line(error)}); the run goes on")
        return ""

@machine.within_memory("give a smaller --batch_size or --context_length, --dtype=bfloat16 or --device=cpu")
def evaluate_only(resume, init_from, given):
    """Print, and return, the loss of a run's latest checkpoint, or of any Llama folder, on a split or a text."""
    if bool(resume) == bool(init_from) or resume == "auto":
        raise InputError("--eval_only needs one model: give --resume=RUN, or --init_from=LLAMA_FOLDER")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("--eval_only is the work of one process; give it without torchrun")
    for name in given.keys() - {"data", "split", "eval_tokens", "batch_size", "context_length", "device", "dtype"}:
        raise InputError(f"--{name}={given[name]}: --eval_only does not use it; leave it out")
    folder = newest(resume) or Path(resume) if resume else find_checkpoint(init_from, "init_from")
    has_state = (folder / "training/train_state.json").is_file()
    if resume and not has_state:
        advice, parent = "expected a folder that train.py wrote", files.real(folder).parent
        if (folder / "config.json").is_file():
            advice = f"give the model as --init_from={resume}"
        elif newest(parent):  # of a link to a checkpoint that is gone
            advice = f"give the run's folder, --resume={cli.quoted(parent)}"
        raise InputError(f"--resume={resume}: no checkpoint of a run there; {advice}")
    params, config = checkpoint.load_checkpoint(folder)
    checkpoint.check_vocabulary(folder, bpe.load(folder), config)
    kept = {}
    if has_state:
        with state_of(folder) as state:
            kept = {name: state["settings"][name] for name in ("batch_size", "dtype")}
            kept["data"] = given.get("data") or str(data_of(state, folder))
    settings = Settings.complete(kept | {"context_length": config.context_length} | given | {"compile": False})
    if settings.context_length > config.context_length:
        raise InputError(f"--context_length={settings.context_length}: the model takes {config.context_length}; leave "
                         "the flag out, or give a smaller one")
    if settings.split and prepare.is_text(settings.data):
        raise InputError(f"--split={settings.split}: {settings.data} is a text, which has no parts; leave it out")
    most = given.get("eval_tokens", math.inf)
    ids, num_bytes = prepare.ids_of(settings.data, folder, settings.split or "val", most)
    count = settings.eval_tokens = min(len(ids) - 1, most)
    num_bytes *= count / (len(ids) - 1)
    settings.context_length = min(settings.context_length, count)  # nothing is computed that is not asked for
    settings.batch_size = min(settings.batch_size, -(-count // settings.context_length))
    begin = time.perf_counter()
    check_reading(config, settings.device)
    params = tinylm.tree_map(lambda p: p.to(settings.device), params)
    with machine.numerics(settings.device):
        loss = evaluate(step_functions(config, settings)[2], params, ids, settings)
    cli.say(f"loss {loss:.4f} nats per token  perplexity {math.exp(min(loss, 700)):.3f}  "
            f"{loss * count / math.log(2) / num_bytes:.4f} bits per byte  {count:,} tokens  "
            f"{time.perf_counter() - begin:.1f} seconds")
    return loss

if __name__ == "__main__":
    if sys.argv[1:2] == ["plot"]:
        cli.run(plot.plot, sys.argv[2:])
    else:
        with machine.leaving_gloo():
            cli.run(train)
