"""What the three commands share: strict flags and help around Fire, the user's mistakes, the progress line."""

import difflib
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
import time


class InputError(ValueError):
    """A mistake in what was given: one line saying what was given, what was expected and what to do."""

    exit_code = 2


def parse(name, annotation, text):
    """The value of one flag, by its annotation (`int`, `float`, `bool` or `str`, each perhaps `| None`)."""
    kind = str(annotation.__name__ if isinstance(annotation, type) else annotation).split(" | ")[0]
    if kind == "str":
        return text
    if text == "None" and "None" in str(annotation):
        return None
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        number = float(text.replace("_", ""))
        if kind == "int" and number != int(number):
            raise ValueError
        return int(number) if kind == "int" else number
    except (ValueError, KeyError, OverflowError):
        expected = {"int": "a whole number", "float": "a number", "bool": "True or False"}[kind]
        raise InputError(f"--{name}={text}: expected {expected}") from None


def read_flags(parameters, arguments):
    """Turn ['--a=1', '--b', '2', '--no-c'] into {'a': '1', 'b': '2', 'c': 'False'}, and refuse all that is no flag.

    Fire would run the function before it rejects an unknown flag, and shorten names; so nothing is left to it to judge.
    """
    flags, arguments = {}, list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise InputError(f"{argument!r} is not a flag; write --name=value (--help lists the names)")
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        is_bool = lambda name: name in parameters and "bool" in str(parameters[name].annotation)
        if name not in parameters and not equals and re.sub("^no_?", "", name) in filter(is_bool, parameters):
            name, equals, value = re.sub("^no_?", "", name), "=", "False"
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, 1, 0.5)
            advice = f"did you mean --{near[0]}?" if near else "--help lists the names"
            raise InputError(f"unknown flag --{name}; {advice}")
        if name in flags:
            raise InputError(f"--{name} is given twice; give it once")
        if not equals:
            follows = arguments and not arguments[0].startswith("--")
            if not follows and not is_bool(name):
                raise InputError(f"--{name} has no value; write --{name}=value")
            value = arguments.pop(0) if follows else "True"
        flags[name] = value
    return flags


def help_text(function):
    """The function's docstring as help: each line 'name: meaning' gets the flag's default from the signature."""
    parameters = inspect.signature(function).parameters
    width = min(100, shutil.get_terminal_size().columns)
    lines = []
    for line in inspect.getdoc(function).splitlines():
        name, colon, meaning = line.strip().partition(": ")
        if colon and name in parameters:
            default = parameters[name].default
            if default is not inspect.Parameter.empty and default is not None and default != "":
                meaning += f" [{default}]"
            line = textwrap.fill(f"  --{name:<20} {meaning}", width, subsequent_indent=" " * 25)
        elif line.strip():
            line = textwrap.fill(line, width)
        lines.append(line)
    return "\n".join(lines)


def run(function, arguments=None):
    """Call `function` with the flags on the command line, or those given, through Fire. What stands before them are names,
    where the function takes any.

    An error that has an `exit_code`, as a user's mistakes do, ends in one line and that code; what the file system
    refuses in one line and code 2.
    """
    program, arguments = os.path.basename(sys.argv[0]), sys.argv[1:] if arguments is None else arguments
    if any(argument in ("--help", "-h") for argument in arguments):
        print(help_text(function))
        return
    try:
        kinds = inspect.signature(function).parameters.values()
        parameters = {parameter.name: parameter for parameter in kinds if parameter.kind == parameter.KEYWORD_ONLY}
        takes_names = len(parameters) < len(kinds)
        names = list(itertools.takewhile(lambda argument: takes_names and not argument.startswith("-"), arguments))
        flags = read_flags(parameters, arguments[len(names):])
        for name, text in flags.items():
            parse(name, parameters[name].annotation, text)
        import fire
        parsers = {name: (lambda text, name=name: parse(name, parameters[name].annotation, text)) for name in parameters}
        fire.Fire(fire.decorators.SetParseFns(**parsers)(function),
                  command=names + [f"--{name}={text}" for name, text in flags.items()], name=program)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(fail(f"{program}: {where}{error.strerror or error}"))
    except KeyboardInterrupt:
        fail(f"\n{program}: interrupted")
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts one speaks
            fail(f"{program}: {error}")
        sys.exit(error.exit_code)


def fail(line):
    """Print one line on stderr; returns 2, the exit code of a user's mistake."""
    print(line, file=sys.stderr, flush=True)
    return 2


def json_lines(path):
    """The objects in a file of one JSON object a line, without lines cut short; none where there is no such file."""
    objects = []
    for line in path.read_text(encoding="utf-8").splitlines() if os.path.isfile(path) else []:
        try:
            objects.append(json.loads(line))
        except ValueError:
            pass
    return objects


def duration(seconds):
    """Seconds as people read them: 42s, 3m05s, 2h07m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds // 60 % 60:02d}m"


class Progress:
    """Progress of long work on stderr: one refreshing line on a terminal, plain lines now and then in a log.

    Quiet for the first two seconds, so that short work leaves no trace.
    """

    def __init__(self, label, total=None, unit="MB", scale=1e6, interval=None, stream=None):
        self.label, self.total, self.unit, self.scale = label, total, unit, scale
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.interval = interval or (0.2 if self.terminal else 10)
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
        text = f"{self.label}: {done / self.scale:,.1f}"
        if self.total:
            text += f" of {self.total / self.scale:,.1f} {self.unit}, {rate / self.scale:,.1f} {self.unit}/s"
            text += f", {duration((self.total - done) / rate)} left" if rate else ""
        else:
            text += f" {self.unit}, {rate / self.scale:,.1f} {self.unit}/s"
        self.write(text)

    def write(self, text):
        self.stream.write(f"\r\033[K{text}" if self.terminal else f"{text}\n")
        self.stream.flush()
        self.shown = True

    def close(self):
        if self.shown and self.terminal:
            self.stream.write("\r\033[K")
            self.stream.flush()
