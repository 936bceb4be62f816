"""A run on disk: its folder, who holds it, its checkpoints, what is newest and best."""

import errno
import json
import math
import os
import re
import socket
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import tinylm
from data import bpe, checkpoint, cli, files, machine, prepare
from data.checkpoint import MASTER
from data.cli import InputError

@dataclass(repr=False)
class Run:
    """A run, as one rank has it."""

    settings: Any
    folder: Path
    data: Path
    source: str | None = None  # the checkpoint that its model comes from
    step: int = 0  # steps done
    seconds: float = 0.0  # that those before this start took, with evaluations and checkpoints
    lowest: float = math.inf  # validation loss
    best_step: int | None = None  # and when it was
    wandb_id: str | None = None
    saved: str = "none"  # the name of its newest checkpoint
    stopped_by: int = 0  # the signal that ended it before its time
    given: dict | None = None  # flags that its checkpoints of before may not have
    meta: dict | None = None  # meta.json of the data
    # What each rank has of its own.
    rank: int = 0
    num_ranks: int = 1
    ids: dict | None = None  # {"train": memmap, "val": memmap}
    tokenizer: bpe.Tokenizer | None = None
    config: tinylm.Config | None = None
    params: dict | None = None
    optimizer: dict | None = None
    # What the first rank has alone.
    claims: ExitStack | None = None  # what it gives back in the end
    lock: Any = None  # the open file by which it holds its folder
    tokenizer_json: dict | None = None  # of the data, which may be prepared anew meanwhile
    others: dict | None = None  # what other tools read of a model that it came from: {name of a file: bytes}

    exit_code = property(lambda self: 128 + self.stopped_by if self.stopped_by else 0)  # as shells say it

    def flags_to_resume(self, **others):
        """What goes on with it from any of its checkpoints, with other flags."""
        flags = {"resume": self.folder} | (self.given or {}) | others
        return " ".join(f"--{name}={cli.quoted(value)}" for name, value in flags.items())

    def __repr__(self):
        return f"Run({str(self.folder)!r}, step={self.step}, lowest={self.lowest:.4f})"

# Of a run, what the first rank finds out and tells the others.
SHARED = ("folder", "data", "source", "step", "seconds", "lowest", "best_step", "wandb_id", "meta")

class Finished(InputError):
    """A run that a scheduler starts again though it has done all its steps."""

    exit_code = 0

# ---- What is newest and best ----

def checkpoints(folder):
    """{step: path} of a run's checkpoints, the newest last."""
    names, steps = [], {}
    try:
        names = os.listdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # it may be there, only not to be seen now
            raise
    for name in sorted(names):
        path, is_copy = Path(folder) / name, name in ("best", "latest")  # of links, made folders
        is_named = re.fullmatch("step-[0-9]+", name) or is_copy and not path.is_symlink()
        if is_named and (path / "training/train_state.json").is_file():
            with suppress(ValueError):  # a copy that is damaged
                steps[step_and_best(path)[0] if is_copy else int(name[5:])] = path
    return dict(sorted(steps.items()))

def newest(folder):
    """The newest checkpoint of a run, or None, as where nobody may see what a folder has."""
    with suppress(PermissionError):
        return next(reversed(checkpoints(folder).values()), None)

def step_and_best(path):
    """The step of a checkpoint, and that with the lowest validation loss until then, or None."""
    with state_of(path) as state:
        step, best_step = state["step"], state["best_step"]
        if type(step) is not int or type(best_step) not in (int, type(None)):
            raise TypeError(f"step {step!r}, best_step {best_step!r}")
    return step, best_step

def best(folder):
    """The checkpoint of a run with the lowest validation loss, or the newest where none was evaluated; None without."""
    latest = newest(folder)
    return latest and checkpoints(folder).get(step_and_best(latest)[1], latest)

def find_checkpoint(name, flag="checkpoint"):
    """The checkpoint folder that a flag or argument means: one itself, a run's best, or that of the newest in runs/."""
    if name:
        folder = Path(name)
        if not folder.is_dir():
            of_run = {"latest": newest, "best": best}.get(folder.name)  # they are links only where the disk has some
            if of_run and (found := of_run(folder.parent)):
                return found
            given = f"--{flag}={name}" if flag else name
            problem = "is a file" if folder.exists() else "is not there"
            raise InputError(f"{given} {problem}; expected a run of train.py or a Llama folder")
        return best(folder) or folder
    written = max(Path("runs").glob("*/step-*/config.json"), key=lambda path: path.stat().st_mtime, default=None)
    if not written:
        raise InputError("there is no checkpoint below runs/ yet; train a model with python train.py, or give "
                         f"{f'--{flag}' if flag else 'MODEL'}")
    return best(written.parents[1]) or written.parent

def update_link(folder, name, target):
    """Let a link in a run's folder point at a checkpoint, for other tools. Where there are no links nothing is lost."""
    link, place = folder / f".{name}.partial", folder / name
    with suppress(OSError):
        for step, path in checkpoints(folder).items():
            if path == place:  # a copy of an older checkpoint, by what does not know links, and all there is of it
                os.replace(place, folder / f"step-{step:07d}")
        if not place.is_symlink():
            files.remove(place)
        files.remove(link)
        link.symlink_to(target)
        os.replace(link, place)

def update_links(folder):
    """Let links in a run's folder say which checkpoint is the newest and which the best."""
    for name, target in (("latest", newest(folder)), ("best", best(folder))):
        if target and target.name.startswith("step-"):  # else it is a copy of a link
            update_link(folder, name, target.name)
    files.flush_folder(folder)

# ---- Start and resume ----

@contextmanager
def open_run(resume, init_from, given, table, check):
    """The run that the flags mean, on all ranks: the first one finds or starts it, the others hear of it.

    `table` is the class of its settings; check(config, settings) raises InputError where it should not begin. What a
    run claims, the process, its folder and the ranks, it gives back in the end, and closes its files.
    """
    with machine.alone(), ExitStack() as claims:
        device, rank, num_ranks = claims.enter_context(machine.ranks(machine.choose_device(given.get("device"))))
        run = mistake = None
        if rank == 0:
            try:
                run = find_run(resume, init_from, given, table, check, claims)
                kind = lambda device: device.split(":")[0]
                if cli.has_ranks() and kind(run.settings.device) != kind(device):  # as it began elsewhere
                    raise InputError(f"the run is one on {kind(run.settings.device)}, and its ranks would be on "
                                     f"{kind(device)}; give --device=cpu or --device=cuda")
                load_state(run)
            except (InputError, OSError) as error:  # told to the other ranks first, so that all end alike
                run, mistake = None, error
        if num_ranks > 1:
            run = tell_ranks(run, mistake, table, device, rank, num_ranks)
        elif mistake:
            raise mistake
        run.settings.train_tokens = run.meta["train"]["tokens"]
        place_state(run)
        if rank == 0:
            keep_metrics(run.folder / "metrics.jsonl", run.step or -1)  # of a new one nothing that one before it left
        for ids in run.ids.values():
            claims.callback(ids.file.close)
        yield run
    run.ids = run.claims = run.lock = None

def tell_ranks(run, mistake, table, device, rank, num_ranks):
    """The run of the first rank, or its mistake raised, on every rank."""
    news = {"mistake": str(mistake), "is_finished": isinstance(mistake, Finished)}
    if run:
        news = {name: getattr(run, name) for name in SHARED}
        news |= {"settings": cli.kept(run.settings), "config": vars(run.config)}
    news = machine.from_rank(news, device)
    if "mistake" in news:
        raise mistake or (Finished if news["is_finished"] else InputError)(news["mistake"])
    given = news.pop("settings") | {"device": device} | ({"use_wandb": False} if rank else {})
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in news["config"].items()}
    news |= {"folder": Path(news["folder"]), "data": Path(news["data"]), "config": tinylm.Config(**sizes)}
    run, mistake = run or Run(None, **news), None
    run.rank, run.num_ranks = rank, num_ranks
    try:
        run.settings = table.complete(given)
        if rank:
            await_state(run)
    except (InputError, OSError) as error:
        mistake = f"rank {rank}, on {socket.gethostname()}: {error}"
    mistake = machine.first_of_ranks(mistake, device)
    if mistake:
        raise InputError(mistake)
    return run

def find_run(resume, init_from, given, table, check, claims):
    """A new run, one to go on with, or (--resume=auto) whichever there is."""
    if resume and resume != "auto" and init_from:
        raise InputError(f"--resume={resume} and --init_from={init_from}: give one of the two")
    is_auto = resume == "auto"
    folder = folder_named(table.complete(given)) if is_auto else Path(resume) if resume else None
    if resume and (not is_auto or newest(folder)):
        return resume_run(folder, given, table, check, claims, Finished if is_auto else InputError)
    return start_run(given, init_from, folder, table, check, claims)

def folder_named(settings):
    """The folder that the flags name: runs/NAME, NAME that of the data unless given."""
    data = Path(settings.data)
    is_folder = data.is_dir() or (prepare.DATA / data).is_dir() or newest(Path("runs") / data.name)
    is_text = prepare.is_text(settings.data) or not is_folder  # which may be gone since
    name = settings.run_name or (data.stem if is_text else Path(os.path.abspath(data)).name)  # of "." too
    return Path(settings.output_dir or Path("runs") / name)

def new_folder(settings):
    """The folder of a new run: the one named, or runs/NAME with a number behind it where NAME is taken."""
    folder = first = folder_named(settings)
    number = 1
    while not settings.output_dir and os.path.lexists(folder):
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder

def make_folder(settings, folder):
    """Make the folder of a new run: `folder`, or by its settings; where another run makes that first, the next one."""
    is_named = bool(folder or settings.output_dir)
    while True:
        path = folder or new_folder(settings)
        try:
            path.mkdir(parents=True, exist_ok=is_named)
            return path
        except FileExistsError:
            if is_named or not os.path.lexists(path):
                raise
        except OSError as error:
            raise InputError(f"{path} can't be made ({error.strerror}); give another --output_dir") from None

def check_new(folder):
    """Raise InputError where a folder can't be, or has other things than a run leaves before its first checkpoint."""
    place = next(filter(os.path.lexists, (folder.absolute(), *folder.absolute().parents)))
    if not place.is_dir():
        raise InputError(f"{place} is no folder, but a file, or a link to what is not there; see to that, or give "
                         "another --output_dir")
    left = {"lock", "lock.held", "metrics.jsonl", "loss.svg", "wandb"}
    if folder.exists() and any(path.name not in left and path.suffix != ".partial" for path in folder.iterdir()):
        advice = f"go on with --resume={cli.quoted(folder)}, or choose" if newest(folder) else "choose"
        raise InputError(f"{folder} is not empty; {advice} another --output_dir")

def start_run(given, init_from, folder, table, check, claims):
    """A new run: settings chosen, data and room checked, the folder claimed."""
    sizes, known, has_tokenizer = {}, {"is_pretrained": bool(init_from)}, False
    if init_from:
        init_from = find_checkpoint(init_from, "init_from")
        config = checkpoint.load_config(init_from)
        has_tokenizer = any((init_from / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        if has_tokenizer:
            checkpoint.check_vocabulary(init_from, bpe.load(init_from), config)
        known["weights_dtype"] = checkpoint.weights_dtype(init_from)
        sizes = {name: value for name, value in vars(config).items() if name in cli.flags_of(table)}
        for flag, value in sizes.items():
            if given.get(flag, value) != value and not (flag == "context_length" and given[flag] < value):
                raise InputError(f"--{flag}={given[flag]}: the model of --init_from={init_from} has {flag} {value}; "
                                 "leave the flag out" + ", or give a smaller one" * (flag == "context_length"))
    settings = table.complete(sizes | given, **known)
    config = model_config(settings, 1, init_from)  # raises where sizes don't fit, before any work
    checkpoint.check_can_be_saved(config)
    check_new(folder or new_folder(settings))
    if init_from and not has_tokenizer and (settings.data in prepare.CORPORA or prepare.is_text(settings.data)):
        raise InputError(f"--init_from={init_from} has no tokenizer.json to read {settings.data} by; put the model's "
                         "there, or give --data=FOLDER of data that was prepared with it")
    data = prepare.find_data(settings.data, init_from if has_tokenizer else None)
    meta, ids = prepare.open_data(data)
    settings = table.complete(sizes | given, **known, train_tokens=meta["train"]["tokens"])
    if has_tokenizer:
        prepare.check_tokenizer(data, init_from)
    elif init_from:
        cli.say(f"{init_from} has no tokenizer.json to compare with that of {data}; they must be the same")
    config = model_config(settings, meta["vocab_size"], init_from)
    with cli.as_input_error():
        tinylm.get_batch(ids["train"], 1, config.context_length, 0, 0)  # raises where the text is too short
    # Beside those that are kept, the best and the one being written; no more than are ever written.
    most = min(settings.keep_checkpoints + 2, math.ceil(settings.num_steps / settings.checkpoint_interval))
    files.check_room(folder or new_folder(settings), checkpoint_bytes(config) * most,
                     "the checkpoints of this run need", "choose another --output_dir")
    check(config, settings)
    folder = make_folder(settings, folder)
    lock = claims.enter_context(hold(folder))
    if newest(folder):  # while the data was prepared
        raise InputError(f"{folder} has got a checkpoint of another run meanwhile; start again, with "
                         f"--resume={cli.quoted(folder)} or --resume=auto, to go on from it")
    source = str(init_from) if init_from else None
    return Run(settings, folder, data.absolute(), source=source, meta=meta, ids=ids, claims=claims, lock=lock)

def resume_run(folder, given, table, check, claims, error_if_done):
    """A run as its latest checkpoint has it. Raises InputError for flags that would make it another run, and
    `error_if_done` where it has done all its steps."""
    latest = newest(folder)
    if not latest:
        advice, parent = "expected a folder that train.py wrote", files.real(folder).parent
        if newest(parent):  # of a checkpoint in it, or of a link to one that is gone
            advice = f"give the run's folder, --resume={cli.quoted(parent)}"
        elif (folder / "training/train_state.json").is_file():
            advice = "it is one itself: put it, named step-NUMBER, into a folder of its own, and give that"
        raise InputError(f"--resume={folder}: no checkpoint there; {advice}")
    lock = claims.enter_context(hold(folder))
    latest = newest(folder)  # another run may have ended since
    for name in ("config.json", "tokenizer.json"):
        files.read_json(latest / name, checkpoint.ANOTHER)
    config = checkpoint.load_config(latest)
    with state_of(latest) as state:
        kept, step, seconds = (state[name] for name in ("settings", "step", "seconds"))
        if not (step >= 0 and checkpoints(folder).get(step) == latest and isinstance(seconds, (int, float))
                and isinstance(state["best"], (int, float, type(None)))):
            raise TypeError(f"step {step!r} in {latest.name}, seconds {seconds!r}, best {state['best']!r}")
        names = {"output_dir": given.get("output_dir"), "run_name": "run_name" in given and f"runs/{given['run_name']}"}
        is_its_own = lambda path: path and files.real(path) == files.real(folder)  # the run may have moved
        given = {flag: value for flag, value in given.items() if not is_its_own(names.get(flag))}
        text = given.get("data", "")
        versions = [prepare.made_of(text, model).name for model in (None, latest)] if prepare.is_text(text) else []
        is_same_text = Path(state["data_folder"]).name in versions
        if is_same_text:  # however its path is written
            given["data"] = kept["data"]
        if kept.get("shard") and "shard" not in given and not cli.has_ranks():
            cli.say("the run was split over ranks; here it goes on in one process, whole")
            kept["shard"] = False
        if cli.has_ranks():  # each of which has a device of its own
            kept["device"] = kept["device"].partition(":")[0]
        for name in kept.keys() - cli.flags_of(table):
            raise InputError(f"{latest} was written with a setting {name}, which this code has not; go on with the "
                             "code that began the run")
        for flag, value in given.items():
            metadata = cli.flags_of(table)[flag].metadata
            before = kept.get(flag, metadata["default"])  # for a run of before it was a flag
            before = before(table(**kept)) if callable(before) else before
            chosen = before or getattr(config, flag, before)  # where 0 lets Config choose
            if not metadata["may_change"] and value not in (before, chosen):
                has = f"no {flag}" if chosen is None else f"{flag} {chosen}"
                raise InputError(f"--{flag}={value}: the run has {has}, which can't change on resuming; start a new "
                                 "run for that")
        given_again = {flag: value for flag, value in given.items() if value != kept.get(flag)}
        if given.get("lr_max", kept["lr_max"]) != kept["lr_max"] and "lr_min" not in given:  # in proportion
            given["lr_min"] = kept["lr_min"] * given["lr_max"] / (kept["lr_max"] or 1)
    settings = table.complete(kept | given)  # outside, as a mistake in the code is no damage
    with state_of(latest) as state:
        lowest, best_step = math.inf if state["best"] is None else state["best"], step_and_best(latest)[1]
        is_moved = given.get("data", kept["data"]) != kept["data"]
        data = prepare.find_data(given["data"], latest) if is_moved else data_of(state, latest)
        if versions and not is_same_text and not is_moved:
            cli.say(f"{text} has another size or time than when the run began, which goes on with what it was, in "
                    f"{data}; for a new text begin a new run")
        run = Run(settings, folder, data.absolute(), str(latest), step, seconds, lowest, best_step, state["wandb_id"],
                  latest.name, given=given_again | {"num_steps": settings.num_steps}, claims=claims, lock=lock)
        run.meta, run.ids = prepare.open_data(run.data)
        check_same_data(run, state["data"], latest)
        evaluated = {min(of["eval_tokens"], len(run.ids["val"]) - 1) for of in (kept, kept | given)}
        if best_step not in checkpoints(folder) or len(evaluated) > 1:
            run.lowest, run.best_step = math.inf, None  # it was removed; or is the best of another part of the text
        update_links(folder)  # as where the run was killed before it had
        if step >= settings.num_steps:
            raise error_if_done(f"--resume={folder}: the run has done its {step} steps; give a larger --num_steps to "
                                "extend it")
    check(model_config(settings, run.meta["vocab_size"], latest), settings)
    return run

def state_of(folder):
    """`reading_json` of a checkpoint's train_state.json."""
    return files.reading_json(folder / "training/train_state.json", checkpoint.ANOTHER)

def data_of(state, latest):
    """The data folder of a run with this state: where it was, or, in a copy of the project, of the same name."""
    name = state["settings"]["data"]
    folder = Path(state["data_folder"])
    if prepare.is_data(folder):
        return folder
    try:
        return prepare.find_data(name, latest)
    except InputError:
        raise InputError(f"the run's data is not at {folder} any more; say where it, or its text, is, "
                         f"with --resume={cli.quoted(latest.parent)} --data=PLACE") from None

def check_same_data(run, before, latest):
    """Raise InputError where a run's data is not what it was in its `latest` checkpoint, in which `before` says it."""
    prepare.check_tokenizer(run.data, latest)
    advice = (f"give that, with --resume={cli.quoted(latest.parent)} --data=FOLDER, or begin a new run from the model "
              f"with --init_from={cli.quoted(latest)}")
    for split in before:
        then, now = before[split], run.meta[split]
        if then != now:
            change = f"{now['tokens']:,} tokens, not {then['tokens']:,}" if now["tokens"] != then["tokens"] else (
                "as many tokens, but others")
            raise InputError(f"{run.data} has other data than the run began with: {split}.bin has {change}; {advice}")

def model_config(settings, data_vocab_size, source=None):
    """The model's Config: sizes by the settings, the rest by the model to go on from; no fewer tokens than the data."""
    vocab_size = settings.vocab_size or data_vocab_size
    if vocab_size < data_vocab_size:
        raise InputError(f"--vocab_size={vocab_size}: the data has {data_vocab_size} tokens; expected that or more "
                         "(data/prepare.py --vocab_size chooses it)")
    given = {"vocab_size": vocab_size} | {
        field.name: getattr(settings, field.name) for field in fields(tinylm.Config)
        if hasattr(settings, field.name) and field.name != "vocab_size"}
    with cli.as_input_error():
        return replace(checkpoint.load_config(source), **given) if source else tinylm.Config(**given)

def load_state(run):
    """Add to a run its tokenizer and its model: parameters and optimiser, drawn or loaded."""
    settings, config = run.settings, model_config(run.settings, run.meta["vocab_size"], run.source)
    init_optimizer, _ = tinylm.OPTIMIZERS[settings.optimizer]
    if run.source:
        params, saved = checkpoint.load_checkpoint(run.source, name=MASTER if run.step else "model.safetensors")
        if replace(saved, context_length=config.context_length) != config:  # it may begin from that of a longer one
            raise InputError(f"{run.source} holds another model, {saved}, than the settings of the run say, {config}; "
                             "go on with the code that began the run")
        for (name, w), (_, shape) in zip(tinylm.tree_leaves(params), tinylm.tree_leaves(tinylm.param_shapes(config))):
            if w.shape != shape:  # as of positions that are learned, with a smaller context
                raise InputError(f"{run.source}: {name} is {tuple(w.shape)}, and a model of these flags has {shape}; "
                                 "leave out --context_length")
    else:
        params = tinylm.init_params(config, torch.Generator().manual_seed(settings.seed))
    optimizer = init_optimizer(params)
    if run.step:  # a fresh state tells the shapes alone, and is freed before the one that was saved is read
        optimizer = tinylm.tree_map(lambda tensor: tensor.to("meta"), optimizer)
        optimizer = checkpoint.load_optimizer(run.source, optimizer)
    run.config, run.params, run.optimizer = config, params, optimizer
    run.tokenizer = bpe.load(run.data / "tokenizer.json")
    run.tokenizer_json = files.read_json(run.data / "tokenizer.json")
    run.others = checkpoint.files_for_others(Path(run.source)) if run.source else {}
    run.others = checkpoint.ending_as_learned(run.others, run.tokenizer.special_tokens.values(),
                                              run.meta["begin_ids"][0], run.meta["end_of_text_id"])

def await_state(run):
    """Add to another rank's run the data, which must be that of the first rank, and tensors for what that will send.

    So a machine needs no checkpoint of its own, and can't have another one.
    """
    try:
        meta, run.ids = prepare.open_data(run.data)
    except InputError as error:
        raise InputError(f"{error}; or copy it from the machine of the first rank, to the same path") from None
    for what in ("tokenizer_sha256", *run.ids):
        if meta[what] != run.meta[what]:
            raise InputError(f"{run.data} is not the same there as where the first rank is "
                             f"({what.removesuffix('_sha256')}); copy that one to all machines")
    run.tokenizer = bpe.load(run.data / "tokenizer.json")
    run.params = tinylm.tree_map(torch.empty, tinylm.param_shapes(run.config))
    run.optimizer = tinylm.OPTIMIZERS[run.settings.optimizer][0](run.params)

def place_state(run):
    """Put the first rank's parameters and optimiser on the device of each rank, split over the ranks if asked."""
    mesh = machine.mesh_of_ranks(run.settings.device) if run.settings.shard else None

    def place(tensor):
        # No two in one place, and none with gaps, for updates that write over them.
        tensor = tensor.to(run.settings.device, copy=True, memory_format=torch.contiguous_format)
        tensor = machine.of_first_rank(tensor)
        return tinylm.shard(tensor, mesh) if mesh else tensor

    def moved(tree):  # which is emptied, so that each tensor is freed where it was
        return {key: moved(tree.pop(key)) for key in [*tree]} if isinstance(tree, dict) else place(tree)

    # One tensor after the other: a device may have no room for the whole model where it keeps a part, a CPU none for it
    # twice.
    for name in ("params", "optimizer"):
        tree = tinylm.tree_map(lambda tensor: tensor, getattr(run, name))  # dicts of its own
        setattr(run, name, None)
        setattr(run, name, moved(tree))

def keep_metrics(path, last_step):
    """Drop from a run's metrics what it measured after `last_step`, a line cut short by its death included."""
    with files.beside(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in files.json_lines(path) if line["step"] <= last_step)
        files.flush(file)

@contextmanager
def hold(folder):
    """Hold a run's folder for this process. Raises InputError where another one does."""
    try:
        with files.lock(folder / "lock") as lock:
            for name in ("step-*", "metrics.jsonl", "best", "latest"):
                for left in folder.glob(f".{name}.partial"):  # by a run that was killed
                    files.remove(left)
            yield lock
    except files.Held as holder:
        raise InputError(f"{folder} is in use by another run ({holder}); wait for it or stop it") from None

def own_folder(run):
    """The folder of a run, found again where it was renamed, made again where it was removed.

    Raises InputError where another run has taken its place.
    """
    path = run.folder / "lock"
    if not files.path_is(path, run.lock):
        moved = files.path_of(run.lock)
        if moved:
            cli.say(f"{run.folder} is now {moved.parent}, where the run goes on")
            run.folder = moved.parent
        elif path.exists() and path.read_text(encoding="utf-8").strip() != str(os.getpid()):
            raise InputError(f"{run.folder} is another run's now, as it was removed while this run was at work")
        else:  # gone; or a copy, on another disk and behind a link
            cli.say(f"{run.folder} was removed or replaced while the run was at work; it goes on there")
            run.folder.mkdir(parents=True, exist_ok=True)
            run.saved = "none"
            run.lock = run.claims.enter_context(hold(run.folder))
    return run.folder

# ---- Save ----

def checkpoint_bytes(config):
    """The most a checkpoint takes: parameters and two moments, of 4 bytes each, and the model in 16 bits."""
    return (3 * 4 + 2) * tinylm.num_params(config)

def save(run, step, seconds, val_loss):
    """Write the checkpoint of a step, and tidy up the run's folder."""
    try:
        folder = own_folder(run)
        files.check_room(folder, checkpoint_bytes(run.config), "a checkpoint needs",
                         "move the folder of the run to another disk")
        with suppress(OSError), open(folder / "metrics.jsonl", "ab") as file:  # what is in its way costs no checkpoint
            files.flush(file)  # so that what led to the checkpoint is on the disk before it
        if run.best_step not in checkpoints(folder):  # removed by hand
            run.lowest, run.best_step = math.inf, None
        lowest, best_step = (val_loss, step) if val_loss < run.lowest else (run.lowest, run.best_step)
        state = {"step": step, "settings": cli.kept(run.settings), "seconds": seconds, "wandb_id": run.wandb_id,
                 "best": lowest if lowest < math.inf else None, "best_step": best_step,
                 "data_folder": str(files.real(run.data)), "data": {split: run.meta[split] for split in run.ids}}
    except (OSError, InputError):
        checkpoint.take_part_in_saving(run.params, run.optimizer)  # the other ranks are gathering already
        raise
    target = folder / f"step-{step:07d}"
    *begin, end = ((run.tokenizer.tokens[i].decode(), i) for i in (*run.meta["begin_ids"], run.meta["end_of_text_id"]))
    checkpoint.save_checkpoint(target, run.params, run.config, run.tokenizer_json, end, run.optimizer, state,
                               run.others, machine.DTYPES_OF_FILES[run.settings.save_dtype], begin)
    run.lowest, run.best_step, run.saved = lowest, best_step, target.name
    try:
        tidy(run, folder)
    except (OSError, InputError) as error:  # the checkpoint is there
        cli.say(f"{folder} can't be tidied up ({error}); it is tried again at the next checkpoint")

def tidy(run, folder):
    """Say in a run's folder which checkpoint is the latest and which the best; drop those not needed."""
    update_links(folder)
    for old_step, old in list(checkpoints(folder).items())[:-run.settings.keep_checkpoints]:
        is_protected = not os.access(old, os.W_OK)  # by its owner
        if old_step != run.best_step and old.name.startswith("step-") and not is_protected:
            going = folder / f".step-{old_step:07d}.partial"  # which `hold` removes where this is killed halfway
            try:
                os.replace(old, going)
                files.remove(going)
            except OSError as error:  # as on Windows, where it is read
                cli.say(f"{old} can't be removed ({error.strerror}); it is tried again at the next checkpoint")

def try_to_save(run, step, seconds, val_loss):
    """`save`, or say why not: a disk that is full now must not end a run that has room later. → why not, or None."""
    if run.rank:
        checkpoint.take_part_in_saving(run.params, run.optimizer)
        if val_loss < run.lowest:  # as the first rank finds, but where it can't save
            run.lowest, run.best_step = val_loss, step
        return None
    try:
        save(run, step, seconds, val_loss)
    except (OSError, InputError) as error:
        cli.fail(f"the checkpoint of step {step} could not be saved ({error}); the last good one is {run.saved}")
        return str(error)

def conclude(run, step, problem):
    """Say how to go on. Raises InputError where there was a problem with saving the last checkpoint."""
    if problem:
        then = "run it again"
        if run.saved != "none":
            then = f"go on from {run.saved} with {run.flags_to_resume()}"
        raise InputError(f"{run.folder}: the run ended without its last checkpoint ({problem}); see to that, and "
                         f"{then}")
    if run.rank:
        return
    if step < run.settings.num_steps:
        command = "python" if run.num_ranks == 1 else f"torchrun --standalone --nproc_per_node={run.num_ranks}"
        cli.say(f"stopped after step {step}; go on with: {command} {cli.script('train.py')} "
                f"--resume={cli.quoted(run.folder)}")
    else:
        cli.say(f"done; write with: python {cli.script('sample.py')} --checkpoint={cli.quoted(run.folder)}")
        if run.best_step not in (None, step):
            cli.say(f"  that takes step {run.best_step}, whose validation loss, {run.lowest:.4f}, is the lowest saved; "
                    f"--checkpoint={cli.quoted(run.folder / 'latest')} is the last one")
