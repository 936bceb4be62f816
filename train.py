"""Train a model: python train.py --help. From Python: train.train(data="stories", num_steps=100)."""

import ctypes
import datetime
import fcntl
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import init_device_mesh

import tinylm
from data import bpe, cli, plot, prepare
from data.cli import InputError
from tinylm import Config

DEFAULTS = {
    "data": "stories", "context_length": 256, "rope_theta": 10000.0, "norm_eps": 1e-5, "tie_embeddings": False,
    "grad_accum_steps": 1, "remat": False, "shard": False,
    "optimizer": "adamw", "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "clip_grad": 1.0,
    "log_interval": 10, "keep_checkpoints": 2, "sample_tokens": 64, "seed": 0, "use_wandb": False, "wandb_project": "tinylm",
    "wandb_artifacts": False, "wandb_histograms": False,
}
# What a device makes sensible: a CPU finishes within minutes, a GPU is kept busy.
DEVICE_DEFAULTS = {
    "cpu": {"d_model": 128, "num_layers": 4, "batch_size": 4, "num_steps": 2500, "eval_interval": 500,
            "eval_tokens": 1 << 17, "dtype": "float32", "compile": False},
    "cuda": {"d_model": 512, "num_layers": 8, "batch_size": 128, "num_steps": 5000, "eval_interval": 500,
             "eval_tokens": 1 << 22, "dtype": "bfloat16", "compile": True},
}
# What a resumed run may change: it alters how the run is watched and where it computes, not what it computes.
CHANGEABLE = {"num_steps", "log_interval", "eval_interval", "eval_tokens", "checkpoint_interval", "keep_checkpoints",
              "device", "shard", "sample_tokens",
              "use_wandb", "wandb_project", "wandb_artifacts", "wandb_histograms"}
# What data sheets promise in bfloat16 without sparsity: FLOP/s by a part of the device's name, the first that fits.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "A10G": 70e12,
              "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
MODEL_FLAGS = ("context_length", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "rope_theta", "norm_eps",
               "tie_embeddings")
PATIENCE = 5  # steps in a row whose numbers are not finite, before a run gives up
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Diverged(RuntimeError):
    """Training whose loss or gradients are no numbers any more."""

    exit_code = 3


class Finished(InputError):
    """A run that a scheduler starts again though it has done all its steps."""

    exit_code = 0


# ---- Settings ----


def choose_device(device):
    """The device asked for, or the best there is: "cuda", "cuda:1", "cpu". Raises InputError where it isn't there."""
    if not device:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind == "cuda" and (not number or number.isdigit()):
        if int(number or 0) >= torch.cuda.device_count():
            raise InputError(f"--device={device}: this machine has {torch.cuda.device_count()} CUDA device(s); "
                             "use --device=cpu, or leave the flag out")
    elif device != "cpu":
        raise InputError(f"--device={device}: expected cpu, cuda or cuda:NUMBER")
    return device


def default_num_heads(d_model):
    """Heads of at least 32 features (64 from d_model 768 on), as many as divide d_model into an even number each."""
    most = max(1, d_model // (64 if d_model >= 768 else 32))
    return next((heads for heads in range(most, 0, -1) if d_model % (2 * heads) == 0), 1)


def complete(given):
    """All settings of a new run: those given, and the defaults for the rest."""
    device = choose_device(given.get("device"))
    settings = DEFAULTS | DEVICE_DEFAULTS[device.split(":")[0]] | given | {"device": device}
    width = max(1, settings["d_model"])
    derived = {
        "num_heads": default_num_heads(width), "num_kv_heads": 0, "d_ff": 0, "vocab_size": 0,
        "checkpoint_interval": settings["eval_interval"],
        "warmup_steps": min(100, settings["num_steps"] // 10),
        # Wider models need smaller steps; 1/√d_model is a safe middle between constant and the 1/d_model of theory.
        "lr_max": 4e-3 * (128 / width) ** 0.5,
    }
    settings = derived | settings
    settings.setdefault("lr_min", settings["lr_max"] / 100)
    check(settings)
    return settings


def check(settings):
    """Raise InputError where a setting of the run (not of the model; Config checks those) can't be."""
    whole = ("num_steps", "batch_size", "grad_accum_steps", "eval_interval", "eval_tokens", "checkpoint_interval",
             "log_interval", "keep_checkpoints", "context_length")
    limits = {name: (1, math.inf) for name in whole} | {
        "warmup_steps": (0, math.inf), "lr_max": (0, math.inf), "lr_min": (0, settings["lr_max"]),
        "weight_decay": (0, math.inf), "beta1": (0, 0.9999999), "beta2": (0, 0.9999999), "eps": (0, math.inf),
        "clip_grad": (1e-9, math.inf), "sample_tokens": (0, math.inf), "seed": (-(2**63), 2**63 - 1)}
    for name, (low, high) in limits.items():
        if not (low <= settings[name] <= high and settings[name] < math.inf):
            between = f"from {low:g} to {high:g}" if high < math.inf else f"of {low:g} or more"
            raise InputError(f"--{name}={settings[name]}: expected a number {between}")
    for name, choices in (("dtype", DTYPES), ("optimizer", tinylm.OPTIMIZERS)):
        if settings[name] not in choices:
            raise InputError(f"--{name}={settings[name]}: expected {' or '.join(choices)}")
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if settings["batch_size"] % num_ranks:
        raise InputError(f"--batch_size={settings['batch_size']} can't be split over {num_ranks} ranks; expected a "
                         "multiple of that")
    if is_compiled(settings):
        check_compiler(settings["device"])
    if settings["shard"] and not dist.is_initialized():
        raise InputError("--shard splits a model over the ranks that torchrun starts; start it as "
                         "torchrun --nproc_per_node=DEVICES train.py --shard …, or give --shard=False")


def check_compiler(device):
    """Raise InputError where what torch.compile needs beside torch, a compiler and Python's headers, is not there."""
    if device == "cpu":
        compilers = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    else:
        compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    for needed, is_there in ((" or ".join(compilers), any(map(shutil.which, compilers))), (header, header.is_file())):
        if not is_there:
            raise InputError(f"--compile needs {needed}, which is not there; install a C++ compiler and Python's headers "
                             "(g++ and python3-dev on Debian), or give --compile=False")


# ---- Ranks: the processes that torchrun starts, each with a device of its own ----


def join_ranks(device):
    """Join the other ranks, where torchrun started this process. → (device of this rank, its number, how many)."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return device, 0, 1
    kind = device.split(":")[0]
    if kind == "cuda":
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    # The first rank may prepare data for hours before the others hear of it. One that dies is noticed by torchrun.
    timeout = datetime.timedelta(hours=12)
    store, rank, num_ranks = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun keeps its store when it starts ranks again; they must not find the addresses of those that died.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # only the first rank speaks
    return device, rank, num_ranks


def mesh_of_ranks(device):
    """All ranks in a row, for tensors to be split over."""
    return init_device_mesh(device.split(":")[0], (dist.get_world_size(),))


def from_first_rank(value, device):
    """What the first rank has, as JSON can say it, on every rank."""
    message = torch.frombuffer(bytearray(json.dumps(value, default=str).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([len(message)], device=device)
    dist.broadcast(size, 0)
    message = message if dist.get_rank() == 0 else torch.empty(size.item(), dtype=torch.uint8, device=device)
    dist.broadcast(message, 0)
    return json.loads(bytes(message.cpu().tolist()))


def total(values, device):
    """Sums over all ranks of a few numbers."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def find_data(name):
    """The data folder that --data means. A known corpus that is missing is prepared first."""
    folder = next((folder for folder in (Path(name), prepare.DATA / name) if (folder / "meta.json").is_file()), None)
    if folder is None and name in prepare.VOCAB_SIZES:
        prepare.prepare(dataset=name)
        folder = prepare.DATA / name
    if folder is None:
        raise InputError(f"--data={name}: no such data folder; make one with data/prepare.py --input=YOUR_TEXT, or use "
                         f"one of {', '.join(prepare.VOCAB_SIZES)}")
    return folder


def model_config(settings, data_vocab_size):
    """The model's Config. The vocabulary is that of the data, or a larger one."""
    vocab_size = settings["vocab_size"] or data_vocab_size
    if vocab_size < data_vocab_size:
        raise InputError(f"--vocab_size={vocab_size}: the data has {data_vocab_size} tokens; expected that or more "
                         "(data/prepare.py --vocab_size chooses it)")
    return Config(vocab_size, **{name: settings[name] for name in MODEL_FLAGS})


def new_folder(settings):
    """The folder of a new run: the one named, or runs/NAME with a number behind it where NAME is taken."""
    name = settings.get("run_name") or Path(settings["data"]).name
    folder = Path(settings.get("output_dir") or Path("runs") / name)
    number = 1
    while "output_dir" not in settings and folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output_dir={folder} is not empty; go on with --resume={folder}, or choose another")
    return folder


def checkpoint_bytes(config):
    """The size of a checkpoint: parameters and two moments, of 4 bytes each."""
    return 3 * 4 * tinylm.num_params(config)


def check_room(folder, needed, purpose):
    """Raise InputError where the disk below `folder` has less than `needed` bytes free."""
    parent = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{parent} has {free / 1e6:,.0f} MB free; {purpose} {needed / 1e6:,.0f} MB; make room or "
                         "choose another --output_dir")


# ---- A run ----


def lock(folder):
    """Claim a run's folder for this process until it closes the file returned, or ends in whatever way."""
    file = open(folder / "lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise InputError(f"{folder} is in use by another run (process {file.read().strip()}); wait for it or stop "
                         "it") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    for left in folder.glob(".*.partial"):  # by a run that was killed
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return file


def start_run(given, init_from, folder):
    """A new run: settings chosen, data and room checked, the folder claimed. → what `load_state` goes on from."""
    settings = complete(given)
    if init_from:
        _, config = tinylm.load_checkpoint(init_from)
        sizes = {name: getattr(config, name) for name in MODEL_FLAGS} | {"vocab_size": config.vocab_size}
        for flag, value in sizes.items():
            if given.get(flag, value) != value:
                raise InputError(f"--{flag}={given[flag]}: the model of --init_from={init_from} has {flag} {value}; "
                                 "leave the flag out")
        settings |= sizes
    model_config(settings, 257)  # raises where sizes don't fit, before any work
    folder = folder or new_folder(settings)
    data = find_data(settings["data"])
    meta, ids = prepare.open_data(data)
    config = model_config(settings, meta["vocab_size"])
    tinylm.get_batch(ids["train"], 1, config.context_length, 0, 0)  # raises where the text is too short
    check_room(folder, checkpoint_bytes(config) * (settings["keep_checkpoints"] + 2), "the checkpoints of this run need")
    folder.mkdir(parents=True, exist_ok=True)
    locked = lock(folder)
    return {"settings": settings, "folder": folder, "lock": locked, "data": data, "meta": meta, "ids": ids,
            "source": init_from, "step": 0, "seconds": 0.0, "best": math.inf, "wandb_id": None}


def load_state(run):
    """Add to a run its model: parameters and optimiser, drawn or loaded, on the device, split over ranks where asked."""
    settings = run["settings"]
    init_optimizer, _ = tinylm.OPTIMIZERS[settings["optimizer"]]
    if run["source"]:
        params, config = tinylm.load_checkpoint(run["source"])
    else:
        config = model_config(settings, run["meta"]["vocab_size"])
        params = tinylm.init_params(config, torch.Generator().manual_seed(settings["seed"]))
    optimizer = tinylm.load_optimizer(run["source"], init_optimizer(params)) if run["step"] else init_optimizer(params)
    for name, tree in (("params", params), ("optimizer", optimizer)):
        tree = tinylm.tree_map(lambda tensor: tensor.to(settings["device"]), tree)
        run[name] = tinylm.shard(tree, mesh_of_ranks(settings["device"])) if settings["shard"] else tree
    run["config"] = config


def resume_run(folder, given, done=InputError):
    """A run as its latest checkpoint has it. Raises InputError for flags that would make it another run, and `done`
    where it has done all its steps."""
    checkpoint = folder / "latest"
    if not checkpoint.is_dir():
        of_a_run = (folder / "train_state.json").is_file()
        advice = f"give the run's folder, --resume={folder.parent}" if of_a_run else "expected a folder that train.py wrote"
        raise InputError(f"--resume={folder}: no checkpoint there; {advice}")
    locked = lock(folder)
    state = tinylm.read_json(checkpoint / "train_state.json")
    try:
        settings, step, seconds = DEFAULTS | state["settings"], state["step"], state["seconds"]
        for flag, value in given.items():
            if flag not in CHANGEABLE and value != settings.get(flag):
                raise InputError(f"--{flag}={value}: the run has {flag} {settings.get(flag)}, which can't change on "
                                 "resuming; start a new run for that")
        settings = settings | given
        settings["device"] = choose_device(settings["device"])
        check(settings)
        best, wandb_id, tokenizer = state["best"], state["wandb_id"], state["tokenizer_sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{checkpoint}/train_state.json is damaged ({type(error).__name__}: {error}); take another "
                         "checkpoint") from None
    if step >= settings["num_steps"]:
        raise done(f"--resume={folder}: the run has done its {step} steps; give a larger --num_steps to extend it")
    data = find_data(settings["data"])
    meta, ids = prepare.open_data(data)
    if meta["tokenizer_sha256"] != tokenizer:
        raise InputError(f"{data} has another tokenizer than the run began with; prepare the data as it was")
    return {"settings": settings, "folder": folder, "lock": locked, "data": data, "meta": meta, "ids": ids,
            "source": str(checkpoint.resolve()), "step": step, "seconds": seconds,
            "best": math.inf if best is None else best, "wandb_id": wandb_id}


def keep_metrics(path, last_step):
    """Drop from a run's metrics what it measured after `last_step`, a line cut short by its death included."""
    kept = [f"{json.dumps(line)}\n" for line in cli.json_lines(path) if line["step"] <= last_step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def open_run(resume, init_from, given):
    """The run that the flags mean, on all ranks: the first one finds or starts it, the others hear of it."""
    device, rank, num_ranks = join_ranks(choose_device(given.get("device")))
    run = find_run(resume, init_from, given) if rank == 0 else None
    if num_ranks > 1:
        names = ("settings", "folder", "data", "source", "step", "seconds", "best", "wandb_id")
        news = from_first_rank(run and {name: run[name] for name in names}, device)
        run = run or news | {"folder": Path(news["folder"]), "data": Path(news["data"]), "lock": None}
        run["settings"] |= {"device": device} | ({"use_wandb": False} if rank else {})
    if rank:
        run["meta"], run["ids"] = prepare.open_data(run["data"])
    load_state(run)
    run["tokenizer"] = bpe.load(run["data"] / "tokenizer.json")
    if rank == 0:
        keep_metrics(run["folder"] / "metrics.jsonl", run["step"])
    return run | {"rank": rank, "num_ranks": num_ranks}


def find_run(resume, init_from, given):
    """A new run, one to go on with, or (--resume=auto) whichever there is."""
    if resume and init_from:
        raise InputError(f"--resume={resume} and --init_from={init_from}: give one of the two")
    if resume == "auto":
        name = given.get("run_name") or Path(given.get("data", DEFAULTS["data"])).name
        folder = Path(given.get("output_dir") or Path("runs") / name)
        return resume_run(folder, given, Finished) if (folder / "latest").is_dir() else start_run(given, init_from, folder)
    return resume_run(Path(resume), given) if resume else start_run(given, init_from, None)


def save(run, step, params, optimizer, seconds, val_loss):
    """Write the checkpoint of a step and say which one is the latest and which the best; drop those no longer needed."""
    folder, checkpoint = run["folder"], run["folder"] / f"step-{step:07d}"
    try:
        check_room(folder, checkpoint_bytes(run["config"]), "a checkpoint needs")
    except InputError:
        tinylm.take_part_in_saving(params, optimizer)
        raise
    best = min(run["best"], val_loss)
    state = {"step": step, "settings": run["settings"], "seconds": seconds, "wandb_id": run["wandb_id"],
             "best": best if best < math.inf else None, "tokenizer_sha256": run["meta"]["tokenizer_sha256"]}
    end_token = bpe.END_OF_TEXT, run["meta"]["end_of_text_id"]
    tinylm.save_checkpoint(checkpoint, params, run["config"], run["data"] / "tokenizer.json", end_token, optimizer, state)
    for name in ["latest"] + ["best"] * (val_loss < run["best"]):
        link = folder / f".{name}.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        os.replace(link, folder / name)
    tinylm.flush_folder(folder)
    run["best"] = best
    keep = {link.resolve().name for link in (folder / "latest", folder / "best")}
    for old in sorted(folder.glob("step-*"))[:-run["settings"]["keep_checkpoints"]]:
        if old.name not in keep:
            shutil.rmtree(old)


def try_to_save(run, step, *args):
    """`save`, or say why not: a disk that is full now must not end a run that has room later. Returns whether it could."""
    if run["rank"]:
        tinylm.take_part_in_saving(*args[:2])
        return True
    try:
        save(run, step, *args)
        return True
    except (OSError, InputError) as error:
        good = (run["folder"] / "latest").resolve().name if (run["folder"] / "latest").exists() else "none"
        cli.fail(f"the checkpoint of step {step} could not be saved ({error}); the last good one is {good}")
        return False


# ---- The parts of a step ----


def keep_freed_memory():
    """Ask glibc to keep memory that tensors free for the next ones.

    By default it returns large blocks to the system, and each step waits for them to be mapped and zeroed again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for parameter, value in ((-3, 1 << 30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(parameter, value)


def set_numerics(device):
    """On a CPU, the same numbers from run to run; on CUDA, TF32 in matrix products of float32."""
    # Compiled code would otherwise add up the gradients of the embedding in whatever order its threads come.
    torch.use_deterministic_algorithms(device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # no result here depends on it
    torch.set_float32_matmul_precision("highest" if device == "cpu" else "high")


def step_functions(config, settings):
    """The three things a step does, compiled where asked: gradients of a batch, the update, losses for evaluation."""
    dtype, optimizer_update = DTYPES[settings["dtype"]], tinylm.OPTIMIZERS[settings["optimizer"]][1]

    def loss(params, inputs, targets):
        return tinylm.loss_fn(params, inputs, targets, config, dtype, settings["remat"])

    def update(params, grads, optimizer, lr):
        grads, norm = tinylm.clip_gradients(grads, settings["clip_grad"])
        decay = (settings[name] for name in ("beta1", "beta2", "eps", "weight_decay"))
        return *optimizer_update(params, grads, optimizer, lr, *decay), norm

    def losses(params, inputs, targets):
        return tinylm.token_losses(tinylm.forward(params, inputs, config, dtype), targets)

    if is_compiled(settings):
        # On a CPU the calls of small kernels take so long that they too are compiled; on CUDA they go on while kernels run.
        options = {"cpp_wrapper": settings["device"] == "cpu"}
        loss, update, losses = (torch.compile(function, fullgraph=True, options=options) for function in (loss, update, losses))
    return partial(tinylm.value_and_grad, loss), torch.no_grad()(update), torch.no_grad()(losses)


def is_compiled(settings):
    return settings["compile"] and not settings["shard"]


def accumulate_gradients(gradients, params, ids, settings, step, rank=0, num_ranks=1):
    """The loss here and the gradients of a step: their means over its grad_accum_steps batches, and over the ranks.

    Of each batch a rank computes its part. Gradients travel once, as the last backward pass makes them; those of a
    sharded model are averaged where they are made.
    """
    prepare.check_unchanged(ids)
    count, total_loss, so_far, on_gradient = settings["grad_accum_steps"], 0.0, {}, None
    averager = tinylm.Averager() if num_ranks > 1 and not settings["shard"] else None
    for micro_step in range(step * count, (step + 1) * count):
        batch = tinylm.get_batch(ids, settings["batch_size"] // num_ranks, settings["context_length"], settings["seed"],
                                 micro_step, rank, num_ranks)
        if averager and micro_step == (step + 1) * count - 1:
            on_gradient = lambda path, g: averager.add(path, so_far[path] + g if so_far else g)
        batch = (tokens.to(settings["device"], non_blocking=True) for tokens in batch)
        loss, grads = gradients(params, *batch, on_gradient=on_gradient)
        total_loss = total_loss + loss
        if not on_gradient:
            so_far = {path: so_far[path] + g if so_far else g for path, g in tinylm.tree_leaves(grads)}
    grads = averager.averages() if averager else so_far
    paths = [path for path, _ in tinylm.tree_leaves(params)]
    return total_loss / count, tinylm.tree_build(paths, [grads[path] / count if count > 1 else grads[path] for path in paths])


def evaluate(losses, params, ids, settings, rank=0, num_ranks=1):
    """Mean loss, in nats per token, over the first eval_tokens tokens of the validation split, the same each time.

    Of each batch a rank computes its rows, so that all ranks run the model equally often.
    """
    prepare.check_unchanged(ids)
    loss_sum, count, rows = 0.0, 0, settings["batch_size"] // num_ranks
    here, size = slice(rank * rows, (rank + 1) * rows), rows * settings["context_length"]
    ids = ids[:settings["eval_tokens"] + 1]
    for inputs, targets, real in tinylm.eval_batches(ids, settings["batch_size"], settings["context_length"]):
        batch = losses(params, inputs[here].to(settings["device"]), targets[here].to(settings["device"]))
        real = min(max(real - rank * size, 0), size)
        loss_sum, count = loss_sum + batch.flatten()[:real].double().sum().item(), count + real
    loss_sum, count = total([loss_sum, count], settings["device"])
    return loss_sum / count


def write_sample(run, params):
    """What the model writes from the start of a document, by a fixed seed: text of sample_tokens tokens, or less."""
    settings, end = run["settings"], run["meta"]["end_of_text_id"]
    if not settings["sample_tokens"] or (run["rank"] and not settings["shard"]):  # where split, all ranks must take part
        return ""
    device = settings["device"]
    tokens = [token.item() for token in tinylm.generate(
        params, torch.tensor([[end]], device=device), run["config"], settings["sample_tokens"], 0.8, 0, 0.95, end,
        torch.Generator(device).manual_seed(0), DTYPES[settings["dtype"]])]
    known = [token for token in tokens if token != end and token < run["tokenizer"].vocab_size]
    return bpe.decode(run["tokenizer"], known)


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise InputError("--use_wandb needs the package wandb; pip install wandb, or leave the flag out") from None
    return wandb


def describe(run):
    """What a run is, for W&B: its flags, the model's size, the device, versions and the commit of this code."""
    device = run["settings"]["device"]
    git = shutil.which("git")  # without it, or outside a repository, the commit stays empty
    commit = git and subprocess.run([git, "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    return run["settings"] | {
        "num_params": tinylm.num_params(run["config"]), "num_ranks": run["num_ranks"], "git_commit": (commit or "").strip(),
        "device_name": torch.cuda.get_device_name(device) if device != "cpu" else platform.processor() or platform.machine(),
        "python_version": platform.python_version(), "torch_version": torch.__version__}


def peak_memory(device):
    """The most memory this process had so far, in bytes: on the device, or on a CPU all of it."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def flops_per_token(config):
    """Floating-point operations to train on a token: 6 · parameters + 12 · layers · d_model · context."""
    return 6 * tinylm.num_params(config) + 12 * config.num_layers * config.d_model * config.context_length


def peak_flops(run):
    """What the devices of all ranks promise together, in FLOP/s, or None for those not known."""
    device = run["settings"]["device"]
    name = torch.cuda.get_device_name(device) if device != "cpu" else ""
    return next((run["num_ranks"] * flops for part, flops in PEAK_FLOPS.items() if part in name), None)


class Log:
    """Where what was measured goes: the terminal, metrics.jsonl, and W&B where asked."""

    def __init__(self, run):
        settings = run["settings"]
        self.device, self.num_steps, self.tokens_per_step = settings["device"], settings["num_steps"], tokens_per_step(settings)
        self.flops, self.peak_flops = flops_per_token(run["config"]), peak_flops(run)
        path = os.devnull if run["rank"] else run["folder"] / "metrics.jsonl"
        self.samples = [[line["step"], line["sample"]] for line in cli.json_lines(path) if "sample" in line]
        self.file = open(path, "a", buffering=1, encoding="utf-8")
        self.screen = cli.Progress("training", stream=sys.stdout)
        self.begin, self.first_step, self.before = time.perf_counter(), run["step"], run["seconds"]
        self.mark, self.marked_step = self.begin, run["step"]
        self.wandb = import_wandb() if settings["use_wandb"] else None
        self.sends_artifacts = self.wandb and settings["wandb_artifacts"]
        self.sends_histograms = self.wandb and settings["wandb_histograms"]
        if self.wandb:
            self.run = self.wandb.init(project=settings["wandb_project"], name=run["folder"].name, id=run["wandb_id"],
                                       resume="allow", dir=run["folder"], config=describe(run))
            run["wandb_id"] = self.run.id

    @property
    def seconds(self):
        return self.before + time.perf_counter() - self.begin

    def pause(self, step):
        """Leave out of tokens_per_second what happened since the last call of `training`."""
        self.mark, self.marked_step = time.perf_counter(), step

    def write(self, step, **measured):
        """Keep measurements of a step."""
        measured = {"step": step, "tokens": step * self.tokens_per_step, "seconds": round(self.seconds, 3)} | measured
        self.file.write(json.dumps(measured) + "\n")
        if self.wandb:
            if "sample" in measured:
                self.samples.append([step, measured.pop("sample")])
                measured["samples"] = self.wandb.Table(["step", "text"], self.samples)
            self.run.log(measured, step=step)

    def training(self, step, loss, norm, lr):
        """Keep and show the state of training."""
        now = time.perf_counter()
        rate = (step - self.marked_step) * self.tokens_per_step / max(1e-9, now - self.mark)
        self.mark, self.marked_step = now, step
        left = (self.num_steps - step) * (now - self.begin) / (step - self.first_step)
        share = {"flops_share": round(rate * self.flops / self.peak_flops, 4)} if self.peak_flops else {}
        self.write(step, train_loss=loss.item(), lr=lr, grad_norm=norm.item(), tokens_per_second=round(rate, 1),
                   peak_memory=peak_memory(self.device), **share)
        self.screen.write(f"step {step}/{self.num_steps}  loss {loss.item():.4f}  lr {lr:.2e}  norm {norm.item():.2f}  "
                          f"{rate:,.0f} tokens/s  {cli.duration(left)} left")

    def evaluation(self, step, val_loss, split, sample):
        """Keep and show the state of the model; `split` has the tokens and bytes of the validation text."""
        bits_per_byte = val_loss / math.log(2) * split["tokens"] / split["bytes"]
        self.write(step, val_loss=val_loss, val_perplexity=math.exp(min(val_loss, 700)), val_bits_per_byte=bits_per_byte,
                   **{"sample": sample} if sample else {})
        self.screen.close()
        print(f"step {step}  validation loss {val_loss:.4f}  {bits_per_byte:.4f} bits per byte  "
              f"after {cli.duration(self.seconds)}")
        if sample:
            print(f"  it writes: {' '.join(sample.split())}", flush=True)
        self.pause(step)

    def histograms(self, step, **trees):
        """Where asked, send the distribution of each tensor to W&B, by tree and path; of a split one, this rank's rows."""
        if self.sends_histograms:
            local = lambda tensor: tensor.to_local() if isinstance(tensor, tinylm.DTensor) else tensor
            self.run.log({f"{name}/{path}": self.wandb.Histogram(local(tensor).float().cpu().numpy())
                          for name, tree in trees.items() for path, tensor in tinylm.tree_leaves(tree)}, step=step)

    def checkpoint(self, folder, step):
        """Where asked, send a run's latest checkpoint to W&B."""
        if self.sends_artifacts:
            latest, best = (folder / "latest").resolve(), (folder / "best").resolve()
            artifact = self.wandb.Artifact(f"{self.run.id}-checkpoint", "model", metadata={"step": step})
            artifact.add_dir(str(latest))
            self.run.log_artifact(artifact, aliases=["latest"] + ["best"] * (latest == best))

    def skipped(self, run, step, loss, norm, lr, bad_steps):
        """Keep and show a step that was not applied, as its numbers are not finite. Raises Diverged after several."""
        numbers = f"loss {loss.item()}, gradient norm {norm.item()}, learning rate {lr:.2e}"
        self.write(step, skipped=numbers)
        self.screen.close()
        print(f"step {step} is not applied: {numbers}", flush=True)
        if bad_steps == PATIENCE:
            good = run["folder"] / "latest"
            begin = f"go on from {good.resolve().name} with --resume={run['folder']}, or " if good.exists() else ""
            raise Diverged(f"{PATIENCE} steps in a row were not finite, the last at step {step}: {numbers}; {begin}"
                           "start anew with a smaller --lr_max, a longer --warmup_steps or --dtype=float32")

    def close(self):
        self.screen.close()
        self.file.close()
        if self.wandb:
            self.run.finish()


def tokens_per_step(settings):
    return settings["batch_size"] * settings["grad_accum_steps"] * settings["context_length"]


def introduce(run):
    """Say what is about to run."""
    settings, config, ids = run["settings"], run["config"], run["ids"]
    compiled = ", compiled" if is_compiled(settings) else ""
    ranks = f", {run['num_ranks']} ranks{', sharded' if settings['shard'] else ''}" if dist.is_initialized() else ""
    held_out = min(len(ids["val"]) - 1, settings["eval_tokens"])
    of_all = f"the first {held_out:,} of" if held_out < len(ids["val"]) - 1 else "all"
    print(f"model       {tinylm.num_params(config):,} parameters: d_model {config.d_model}, {config.num_layers} layers, "
          f"{config.num_heads} heads, d_ff {config.d_ff}, context {config.context_length}, vocabulary {config.vocab_size}")
    print(f"device      {settings['device']}, {settings['dtype']}{compiled}{ranks}")
    print(f"data        {run['data']}: {len(ids['train']):,} tokens; validation on {of_all} {len(ids['val']) - 1:,}")
    print(f"step        {tokens_per_step(settings):,} tokens; {run['step']} of {settings['num_steps']} steps done; "
          f"learning rate {settings['lr_max']:.2e} to {settings['lr_min']:.2e}")
    print(f"writes to   {run['folder']}", flush=True)


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into `asked`, so that the step ends and is saved; a second one ends all."""

    def __init__(self):
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            self.old = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        else:
            self.old = {}

    def note(self, *_):
        self.asked = True
        self.restore()

    def restore(self):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def together(loss, asked, run):
    """The mean loss of all ranks, and whether any was asked to stop, so that all do the same."""
    if run["num_ranks"] == 1:
        return loss, asked
    loss_sum, asked = total([loss.item(), asked], run["settings"]["device"])
    return torch.tensor(loss_sum / run["num_ranks"]), asked > 0


def close(run):
    """Give up the run's folder, and leave the other ranks."""
    if run["lock"]:
        run["lock"].close()
    if dist.is_initialized():
        dist.destroy_process_group()


def conclude(run, step, saved):
    """Say how to go on. Raises InputError where the last checkpoint could not be saved."""
    if not saved:
        raise InputError(f"{run['folder']}: the run ended without its last checkpoint; make room and run it again with "
                         "--resume")
    if step < run["settings"]["num_steps"]:
        print(f"stopped after step {step}; go on with: python train.py --resume={run['folder']}")
    else:
        print(f"done; write with: python sample.py --checkpoint={run['folder']}")


# ---- Evaluating only ----


def open_text(name, tokenizer, digest, split):
    """Ids to evaluate on, and the bytes of their text: a split of a data folder, or a text file, encoded here."""
    if Path(name).is_file():
        ids = np.concatenate([[tokenizer.special_tokens[bpe.END_OF_TEXT]],
                              *(ids for _, ids in bpe.encode_pieces(tokenizer, [Path(name)]))]).astype(tokenizer.dtype)
        return ids, Path(name).stat().st_size
    meta, ids = prepare.open_data(find_data(name))
    if meta["tokenizer_sha256"] != digest:
        raise InputError(f"--data={name} was prepared with another tokenizer than the model's; give a text file, or prepare "
                         "it with --tokenizer")
    return ids[split], meta[split]["bytes"]


def evaluate_only(resume, init_from, given):
    """Print the loss of a run's latest checkpoint, or of any Llama folder, on a split or a text; nothing is written."""
    if bool(resume) == bool(init_from):
        raise InputError("--eval_only needs a model: give --resume=RUN, or --init_from=LLAMA_FOLDER")
    folder = Path(resume) / "latest" if resume else Path(init_from)
    params, config = tinylm.load_checkpoint(folder)
    state = folder / "train_state.json"
    kept = tinylm.read_json(state)["settings"] if state.is_file() else {}
    settings = complete(kept | {"device": ""} | given | {"shard": False, "compile": False})
    settings["context_length"] = config.context_length
    tokenizer = prepare.load_tokenizer(folder)
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    split = settings.get("split", "val")
    if split not in ("train", "val"):
        raise InputError(f"--split={split}: expected train or val")
    ids, num_bytes = open_text(settings["data"], tokenizer, digest, split)
    if len(ids) < 2:
        raise InputError(f"--data={settings['data']} has no text to evaluate on")
    count = settings["eval_tokens"] = min(len(ids) - 1, given.get("eval_tokens", len(ids) - 1))
    num_bytes *= count / (len(ids) - 1)
    begin = time.perf_counter()
    params = tinylm.tree_map(lambda p: p.to(settings["device"]), params)
    loss = evaluate(step_functions(config, settings)[2], params, ids, settings)
    print(f"loss {loss:.4f} nats per token  perplexity {math.exp(min(loss, 700)):.3f}  "
          f"{loss * count / math.log(2) / num_bytes:.4f} bits per byte  {count:,} tokens  "
          f"{time.perf_counter() - begin:.1f} seconds")


# ---- The command ----


def train(*, data: str | None = None, context_length: int | None = None, batch_size: int | None = None,
          grad_accum_steps: int | None = None, d_model: int | None = None, num_layers: int | None = None,
          num_heads: int | None = None, num_kv_heads: int | None = None, d_ff: int | None = None,
          vocab_size: int | None = None, tie_embeddings: bool | None = None, rope_theta: float | None = None,
          norm_eps: float | None = None, num_steps: int | None = None, lr_max: float | None = None,
          lr_min: float | None = None, warmup_steps: int | None = None, optimizer: str | None = None, weight_decay: float | None = None,
          beta1: float | None = None, beta2: float | None = None, eps: float | None = None,
          clip_grad: float | None = None, seed: int | None = None, device: str | None = None, dtype: str | None = None,
          compile: bool | None = None, remat: bool | None = None, shard: bool | None = None, output_dir: str | None = None, run_name: str | None = None,
          resume: str | None = None, init_from: str | None = None, keep_checkpoints: int | None = None,
          log_interval: int | None = None, eval_interval: int | None = None,
          eval_tokens: int | None = None, checkpoint_interval: int | None = None, sample_tokens: int | None = None,
          use_wandb: bool | None = None, wandb_project: str | None = None, wandb_artifacts: bool | None = None,
          wandb_histograms: bool | None = None, eval_only: bool = False, split: str | None = None):
    """Train a language model; checkpoints and metrics go to runs/NAME. Each flag has a default that suits the device.

    Data:
    data: a name below data/, or a folder that data/prepare.py wrote; known corpora prepare themselves [stories]
    context_length: tokens the model sees at once [256]
    batch_size: sequences in a batch [CPU 4, CUDA 128]
    grad_accum_steps: batches in a step [1]

    Model:
    d_model: features of a token [CPU 128, CUDA 512]
    num_layers: blocks [CPU 4, CUDA 8]
    num_heads: attention heads [of 32 features or more; 64 from d_model 768 on]
    num_kv_heads: heads of keys and values, shared by groups of the others [num_heads]
    d_ff: features inside the feed-forward layers [8/3 d_model, rounded up to a multiple of 64]
    vocab_size: tokens, if more than the data has [the data's]
    tie_embeddings: one matrix for the embedding and the output [False]
    rope_theta: base of the rotary angles [10000]
    norm_eps: epsilon of RMSNorm [1e-5]

    Learning:
    num_steps: steps in all [CPU 2500, CUDA 5000]
    lr_max: learning rate after the warm-up [4e-3 · √(128 / d_model)]
    lr_min: learning rate at the end [lr_max / 100]
    warmup_steps: steps of linear warm-up [100, at most a tenth of num_steps]
    optimizer: adamw, or muon for the matrices of the blocks (AdamW for the rest) [adamw]
    weight_decay: decoupled decay of the matrices [0.1]
    beta1: decay of AdamW's first moment [0.8]
    beta2: decay of AdamW's second moment [0.95]
    eps: epsilon of AdamW [1e-8]
    clip_grad: highest norm of all gradients together [1.0]
    seed: chooses the first parameters and the batches [0]

    Machine:
    device: cpu, cuda or cuda:NUMBER [cuda where there is one]
    dtype: what to compute in, float32 or bfloat16; parameters stay float32 [CPU float32, CUDA bfloat16]
    compile: compile the step with torch.compile [CPU False, CUDA True]
    shard: under torchrun, split the model and the optimiser over the ranks; then nothing is compiled [False]
    remat: compute each block again in the backward pass, which takes time and saves memory [False]

    Run:
    output_dir: folder to write to [runs/RUN_NAME]
    run_name: name of the run [that of the data]
    resume: folder of a run to go on with, its flags kept; or auto, to go on where there is one and else start it
    init_from: Llama folder to take the model from, its sizes kept
    log_interval: steps between lines of the log [10]
    eval_interval: steps between evaluations [CPU 500, CUDA 500]
    eval_tokens: tokens of the validation split to evaluate on at most [CPU 131072, CUDA 4194304]
    checkpoint_interval: steps between checkpoints [eval_interval]
    keep_checkpoints: the newest ones kept, beside the best [2]
    sample_tokens: tokens that the model writes at each evaluation, to see it learn [64]
    use_wandb: log to Weights & Biases too [False]
    wandb_project: project there [tinylm]
    wandb_artifacts: send checkpoints there too [False]
    wandb_histograms: and at evaluations the distribution of each parameter and gradient [False]

    Instead of training:
    eval_only: print the loss of --resume or --init_from on --data (a data folder, or a text file) and end
    split: part of a data folder to evaluate on then, val or train [val]
    """
    given = {flag: value for flag, value in locals().items() if value is not None and flag != "eval_only"}
    models = given.pop("resume", None), given.pop("init_from", None)
    if eval_only:
        return evaluate_only(*models, given)
    if split:
        raise InputError(f"--split={split} belongs to --eval_only; leave it out, or evaluate with --eval_only --split={split}")
    run = open_run(*models, given)
    settings, params, optimizer = run["settings"], run["params"], run["optimizer"]
    gradients, update, losses = step_functions(run["config"], settings)
    keep_freed_memory()
    set_numerics(settings["device"])
    introduce(run)
    log, interrupt, bad_steps = Log(run), Interrupt(), 0
    place = run["rank"], run["num_ranks"]
    due = lambda step, name: step % settings[name] == 0 or step == settings["num_steps"]

    for step in range(run["step"], settings["num_steps"]):
        lr = tinylm.cosine_lr(step, *(settings[name] for name in ("lr_max", "lr_min", "warmup_steps", "num_steps")))
        loss, grads = accumulate_gradients(gradients, params, run["ids"]["train"], settings, step, *place)
        loss, asked = together(loss, interrupt.asked, run)
        new_params, new_optimizer, norm = update(params, grads, optimizer, torch.tensor(lr))
        done, val_loss, saved = step + 1, math.inf, True

        if not math.isfinite(loss.item() + norm.item()):
            bad_steps += 1
            log.skipped(run, done, loss, norm, lr, bad_steps)
        else:
            params, optimizer, bad_steps = new_params, new_optimizer, 0
            if due(done, "log_interval"):
                log.training(done, loss, norm, lr)
        if due(done, "eval_interval"):
            val_loss = evaluate(losses, params, run["ids"]["val"], settings, *place)
            log.evaluation(done, val_loss, run["meta"]["val"], write_sample(run, params))
            log.histograms(done, params=params, grads=grads)
        if (due(done, "checkpoint_interval") or asked) and not bad_steps:
            saved = try_to_save(run, done, params, optimizer, log.seconds, val_loss)
            if saved:
                log.checkpoint(run["folder"], done)
            log.pause(done)
        if asked:
            break

    interrupt.restore()
    log.close()
    close(run)
    conclude(run, done, saved)


if __name__ == "__main__":
    if sys.argv[1:2] == ["plot"]:
        cli.run(plot.plot, sys.argv[2:])
    else:
        cli.run(train)
