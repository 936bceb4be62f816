"""The command line: a table of settings gives flags, help and checks; a user's mistake in one line; a progress line."""

import dataclasses
import difflib
import errno
import inspect
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from functools import partial, wraps

class InputError(ValueError):
    """A mistake in what was given: one line saying what was given, what was expected and what to do."""

    exit_code = 2  # of a command that ends with it

class RankError(InputError):
    """A mistake that one rank alone knows, so that it must say it."""

# ---- Settings: a dataclass whose fields are flags; a comment in it is a heading of --help ----

def flag(default, meaning, within=None, choices=None, stated=None, may_change=False):
    """A setting, for a dataclass of them.

    default: a value, a dict of one by kind of device, or a function of the settings that stand before it
    within: the interval of a number, such as "[1, inf)" or "(0, 1]"; choices: the names that a text may be
    stated: how --help says the default, where that is no plain value; may_change: whether a resumed run may change it
    """
    return dataclasses.field(default=None, metadata=dict(
        default=default, meaning=meaning, within=within, choices=choices, stated=stated, may_change=may_change))

def flags_of(table):
    """{name: field} of a table of settings."""
    return {field.name: field for field in dataclasses.fields(table)}

def convert(name, kind, value):
    """What was given for a flag, on the command line or from Python, as an int, float, bool or str.

    Raises InputError where it is none. None, or "None" where no text is expected, means that nothing was given.
    """
    if value is None or isinstance(value, str) and value == "None" and kind is not str:
        return None
    try:
        if kind is str:
            if hasattr(value, "__iter__") and not isinstance(value, str):
                raise TypeError
            return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if isinstance(value, bool):
            raise ValueError
        is_whole = kind is not float and re.fullmatch(r"[+-]?[\d_]+", str(value))
        number = int(value) if is_whole else float(value)
        if kind is int and (number != int(number) or abs(number) >= 2**64):
            raise ValueError
        return kind(number)
    except (ValueError, KeyError, OverflowError, TypeError):
        expected = {int: "a whole number of at most 64 bits", float: "a number", bool: "True or False",
                    str: "a text or a path"}[kind]
        given = value if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"  # all of it may be long
        raise InputError(f"--{name}={given}: expected {expected}") from None

# What nanoGPT, llama2.c, transformers and others call a flag.
OTHER_NAMES = {
    "context_length": "block_size seq_len max_seq_len max_seq_length", "d_model": "n_embd dim hidden_size",
    "d_ff": "hidden_dim intermediate_size", "num_layers": "n_layer", "num_heads": "n_head",
    "num_steps": "max_iters steps max_steps epochs n_epochs num_epochs num_train_epochs",
    "batch_size": "per_device_train_batch_size device_batch_size", "grad_accum_steps": "gradient_accumulation_steps",
    "lr_max": "learning_rate", "lr_min": "min_lr", "warmup_steps": "warmup_iters warmup_ratio",
    "clip_grad": "grad_clip max_grad_norm", "remat": "gradient_checkpointing", "dtype": "bf16 fp16",
    "eval_interval": "eval_steps", "eval_tokens": "eval_iters", "log_interval": "logging_steps",
    "checkpoint_interval": "save_steps save_interval", "output_dir": "out_dir save_dir",
    "init_from": "model model_name_or_path checkpoint ckpt", "checkpoint": "model model_name_or_path ckpt out_dir",
    "data": "dataset train_file", "val_fraction": "val_split", "use_wandb": "wandb wandb_log",
    "max_new_tokens": "max_tokens", "prompt": "start", "top_k": "top_n"}

def unknown(name, names):
    """The error for a flag that is none of `names`."""
    near = ([ours for ours, others in OTHER_NAMES.items() if ours in names and name in others.split()]
            or [one for one in names if name and one.startswith(name)]
            or difflib.get_close_matches(name, names, 1, 0.75))
    meant = " or ".join(f"--{one}" for one in near)
    return InputError(f"unknown flag --{name}; " + (f"did you mean {meant}?" if near else "--help lists the names"))

def read(table, given):
    """The flags that were given, {name: value of its type}. Raises InputError for one that the table has not."""
    fields = flags_of(table)
    for name in given:
        if name not in fields:
            raise unknown(name, fields)
    values = {name: convert(name, fields[name].type, value) for name, value in given.items()}
    for name, value in values.items():
        if value == "" != fields[name].metadata["default"]:  # as of a shell's variable that is not set
            raise InputError(f"--{name} is empty; give it a value, or leave it out")
    return {name: value for name, value in values.items() if value is not None}

def complete(table, given, device="cpu", **known):
    """All settings: those given, and the defaults for the rest, which may depend on what else is `known`.

    Raises InputError for one out of its range.
    """
    settings = table(**read(table, given))
    vars(settings).update(known)
    for name, field in flags_of(table).items():
        if getattr(settings, name) is None:
            default = field.metadata["default"]
            default = default[device.split(":")[0]] if isinstance(default, dict) else default
            setattr(settings, name, default(settings) if callable(default) else default)
        check(name, getattr(settings, name), field.metadata["within"], field.metadata["choices"])
    return settings

def check(name, value, within, choices):
    """Raise InputError where a setting is out of its interval, or none of its choices."""
    if value is None:
        return
    if choices and value not in choices:
        one_of = " or ".join(choices) if len(choices) < 3 else f"one of {', '.join(choices)}"
        raise InputError(f"--{name}={value}: expected {one_of}")
    if within:
        low, high = (float(bound) if "inf" in bound else int(bound) for bound in within[1:-1].split(","))
        above, below = within[0] == "(", within[-1] == ")"
        if not (low < value or value == low and not above) or not (value < high or value == high and not below):
            if high == math.inf:
                expected = f"above {low}" if above else f"of {low} or more"
            elif above and below:
                expected = f"between {low} and {high}"
            else:
                expected = f"{'above' if above else 'from'} {low} {'to below' if below else 'up to'} {high}"
            finite = "" if abs(value) < math.inf else "finite "
            raise InputError(f"--{name}={value}: expected a {finite}number {expected}")

def kept(settings):
    """What a run keeps of its settings, for JSON."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}

@contextmanager
def as_input_error():
    """A ValueError of a pure function, which knows nothing of users, becomes an InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None

def command(table):
    """Make function(given) a function of the flags of a table, for Fire and for Python; `given` has those not None."""
    def decorate(function):
        @wraps(function)
        def call(**flags):
            return function(read(table, flags))

        keyword_only = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, keyword_only, default=None, annotation=field.type | None)
                      for name, field in flags_of(table).items()]
        call.__signature__ = inspect.Signature(parameters)
        call.__doc__ = "\n".join([inspect.getdoc(function) or "", *described(table)])
        return call
    return decorate

def described(table):
    """The lines of help that a table makes: 'heading:' and 'name: meaning [default]'."""
    fields, lines = flags_of(table), []
    for line in inspect.getsource(table).splitlines():
        heading, name = re.fullmatch(r"    # (.*)", line), re.match(r"    (\w+):", line)
        if heading:
            lines += ["", f"{heading[1]}:"]
        elif name and name[1] in fields:
            field = fields[name[1]]
            choices = [choice for choice in field.metadata["choices"] or () if choice not in field.metadata["meaning"]]
            or_another = f"; or {', '.join(choices)}" if choices else ""
            on_resuming = "; may change on resuming" if field.metadata["may_change"] else ""
            lines.append(f"{field.name}: {field.metadata['meaning']}{or_another}{on_resuming}{stated_default(field)}")
    return lines

def stated_default(field):
    """A flag's default as --help says it, in brackets; nothing where it has none."""
    default, stated = field.metadata["default"], field.metadata["stated"]
    if stated is None and isinstance(default, dict):
        stated = ", ".join(f"{device.upper()} {value}" for device, value in default.items())
    if stated is None and default not in (None, "") and not callable(default):
        stated = default
    return "" if stated is None else f" [{stated}]"

# ---- Arguments of a command ----

def read_arguments(parameters, arguments):
    """Turn ['--a=1', '--b', '2', '--no-c'] into {'a': '1', 'b': '2', 'c': 'False'}, and refuse all that is no flag.

    Fire would run the function before it rejects an unknown flag, and shorten names; so nothing is left to it to judge.
    """
    flags, arguments = {}, list(arguments)
    is_bool = lambda name: name in parameters and kind_of(parameters[name]) is bool
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise InputError(f"{argument!r} is not a flag; write --name=value (--help lists the names)")
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name not in parameters and not equals and is_bool(positive := re.sub("^no_?", "", name)):
            name, equals, value = positive, "=", "False"
        if name not in parameters:
            raise unknown(name, parameters)
        if name in flags:
            raise InputError(f"--{name} is given twice; give it once")
        if not equals:
            follows = arguments and not arguments[0].startswith("--")
            if not follows and not is_bool(name):
                raise InputError(f"--{name} has no value; write --{name}=value")
            value = arguments.pop(0) if follows else "True"
        flags[name] = value
    return flags

def kind_of(parameter):
    """The type that a parameter's annotation names: `int`, or that of `int | None`."""
    return getattr(parameter.annotation, "__args__", [parameter.annotation])[0]

def help_text(function):
    """The function's docstring as help: each line 'name: meaning' gets the flag's default from the signature."""
    parameters = inspect.signature(function).parameters
    width = min(100, shutil.get_terminal_size().columns)
    lines = []
    for line in (inspect.getdoc(function) or "").splitlines():  # python -OO has none
        name, colon, meaning = line.strip().partition(": ")
        if colon and name in parameters:
            default = parameters[name].default
            if default not in (inspect.Parameter.empty, None, ""):
                meaning += f" [{default}]"
            line = textwrap.fill(f"  --{name:<20} {meaning}", width, subsequent_indent=" " * 25)
        elif line.strip():
            line = textwrap.fill(line, width)
        lines.append(line)
    return "\n".join(lines)

def replace_closed_streams():
    """Put the null device where a process began without stdin, stdout or stderr, as by >&-, in whose place a file that
    it opens would be.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))

# What to do where a disk or a quota, which Windows has not, is full, or a file may not grow.
NO_ROOM = dict.fromkeys((errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)), "; make room and start again") | {
    errno.EFBIG: "; raise the limit that ulimit -f shows, and start again"}

def run(function, arguments=None):
    """Call `function` with the flags on the command line, or those given, through Fire. What stands before them are
    names, where the function takes any.

    An error that has an `exit_code`, as a user's mistakes do, ends in one line and that code; what the file system
    refuses in one line and code 2. A result may have one too.
    """
    program, arguments = os.path.basename(sys.argv[0]), sys.argv[1:] if arguments is None else arguments
    replace_closed_streams()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as it was while torch was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if any(argument in ("--help", "-h") for argument in arguments):
        return say(help_text(function)) if speaks() else None
    try:
        kinds = inspect.signature(function).parameters.values()
        parameters = {parameter.name: parameter for parameter in kinds if parameter.kind == parameter.KEYWORD_ONLY}
        takes_names = len(parameters) < len(kinds)
        names = list(itertools.takewhile(lambda argument: takes_names and not argument.startswith("-"), arguments))
        flags = read_arguments(parameters, arguments[len(names):])
        parsers = {name: partial(convert, name, kind_of(parameter)) for name, parameter in parameters.items()}
        import fire
        function = fire.decorators.SetParseFn(str)(function)  # a name such as 1e3 is no number
        with exits_by_signals():
            result = fire.Fire(fire.decorators.SetParseFns(**parsers)(function),
                               command=names + [f"--{name}={text}" for name, text in flags.items()], name=program,
                               serialize=lambda result: None)  # which is for callers from Python
        if code := getattr(result, "exit_code", 0):
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # as one may come twice, while Python ends
            sys.exit(code)
    except ReaderGone:
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        advice = NO_ROOM.get(error.errno, "")
        sys.exit(fail(f"{program}: {where}{error.strerror or error}{advice}"))
    except KeyboardInterrupt:
        fail(f"\n{program}: interrupted")
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        if speaks() or isinstance(error, RankError):
            fail(f"{program}: {error}")
        elif error.exit_code:
            time.sleep(5)  # torchrun ends all ranks when one has failed: let that be the one that speaks
        sys.exit(error.exit_code)

# Of Ctrl-C, a scheduler, a terminal that closes, one that warns, as Slurm may, and a limit of CPU time.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
                if hasattr(signal, name)]

@contextmanager
def exits_by_signals():
    """Within it STOP_SIGNALS, but not Ctrl-C, raise SystemExit, so that what is half written is removed."""
    def leave(number, _):
        sys.exit(128 + number)

    # Other ranks wait for the first one inside of C, where no Python handler runs; and they write nothing.
    waits = has_ranks() and os.environ["RANK"] != "0"
    if waits or threading.current_thread() is not threading.main_thread():  # others can't have signals
        yield
        return
    old = {number: signal.signal(number, leave) for number in STOP_SIGNALS
           if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

# ---- What people read ----

def has_ranks():
    """Whether torchrun started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()

def speaks():
    """Whether this process tells people something: of those that torchrun starts on a machine one does."""
    return not has_ranks() or os.environ["LOCAL_RANK"] == "0"

def put(text, stream=None):
    """Write a text for a person, with "?" for what a terminal can't show. Returns the error in its way, or None.

    A reader who is gone, as behind a closed pipe, or a full disk must not end the work that is told of.
    """
    stream = stream or sys.stdout
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode(stream.encoding, "replace").decode(stream.encoding))
        stream.flush()
    except BrokenPipeError as error:
        # What is still in the stream's buffer would fail again, and loudly, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    except (OSError, ValueError) as error:  # a full disk; a closed stream
        return error

def visible(text):
    """A text whose control characters, as of a file's names, are spelled: none of them moves a terminal's cursor."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)

def say(line):
    """Print a line on stdout, as `put` does."""
    put(f"{visible(line)}\n")

def one_line(text):
    """A text, such as that of an error, in one line."""
    return " ".join(str(text).split())

def quoted(path):
    """A path as a shell takes it, for a command to be pasted: one that `say` spells, as a shell spells it."""
    text = str(path)
    if visible(text) != text:
        return "$'" + visible(text.replace("\\", r"\\").replace("'", r"\'")) + "'"
    return shlex.quote(text)

def script(name):
    """A script of this project, as a shell in the folder of this process finds it."""
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), name)
    return name if os.path.isfile(name) and os.path.samefile(name, path) else quoted(path)

def fail(line):
    """Print a line on stderr; returns 2, the exit code of a user's mistake."""
    put(f"{visible(line)}\n", sys.stderr)
    return 2

class ReaderGone(Exception):
    """Nobody reads what a command is there to write; it ends quietly."""

def duration(seconds):
    """Seconds as people read them: 42s, 3m05s, 2h07m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds // 60 % 60:02d}m"

class Progress:
    """Progress of long work on stderr: one refreshing line on a terminal, plain lines now and then in a log.

    Quiet for the first two seconds, so that short work leaves no trace, and on ranks that don't speak.
    """

    def __init__(self, label, total=None, unit="MB", scale=1e6, stream=None):
        self.label, self.total, self.unit, self.scale = label, total, unit, scale
        self.stream = stream or sys.stderr
        self.terminal = getattr(self.stream, "isatty", bool)()  # which a notebook's may lack
        self.interval = 0.2 if self.terminal else 10
        self.begin = time.monotonic()
        self.next = self.begin + 2
        self.shown = False

    def update(self, done, first=0):
        """Say that `done` of the total is done; `first` of it was done before this work began."""
        now = time.monotonic()
        if now >= self.next:
            self.next = now + self.interval
            self.show(done, first, now)

    def show(self, done, first, now):
        rate = (done - first) / max(1e-9, now - self.begin)
        number = lambda count: f"{count / self.scale:,.{0 if self.scale == 1 else 1}f}"  # counts have no decimals
        of_total = f" of {number(self.total)}" if self.total else ""
        left = f", {duration((self.total - done) / rate)} left" if self.total and rate else ""
        self.write(f"{self.label}: {number(done)}{of_total} {self.unit}, {number(rate)} {self.unit}/s{left}")

    def write(self, text):
        if not speaks():
            return
        put(f"\r\033[K{text}" if self.terminal else f"{text}\n", self.stream)
        self.shown = True

    def close(self):
        if self.shown and self.terminal:
            put("\r\033[K", self.stream)
