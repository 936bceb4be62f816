"""Files and folders that are there whole, or not at all, and belong to one process at a time."""

import errno
import json
import os
import re
import shutil
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from data import cli
from data.cli import InputError

def flush(file):
    """Make sure a file's bytes are on the disk, where it can do that, before anything is renamed over an older one."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # as of some network drives
            error.filename = file.name
            raise

def flush_folder(folder):
    """Make sure the names in a folder are on the disk, where a system lets folders be opened and flushed."""
    with suppress(OSError):  # Windows; some network drives
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        flush(file)

def read_text(path):
    """All of a text file. Raises ValueError for what else may stand in its place, and may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("no plain file")
    return Path(path).read_text(encoding="utf-8")

def read_json(path, advice=""):
    """Read a JSON file. Raises InputError where it is missing or damaged, with what to do about it."""
    then = f"; {advice}" if advice else ""
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise InputError(f"{path} is missing{then}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}){then}") from None

@contextmanager
def reading_json(path, advice=""):
    """`read_json`, and InputError also where what is done with it within shows that the file is damaged."""
    try:
        yield read_json(path, advice)
    except (KeyError, TypeError, AttributeError) as error:
        then = f"; {advice}" if advice else ""
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}){then}") from None

def json_lines(path):
    """The objects of a file of metrics, a line of JSON each, without lines cut short or of others; none where it is not
    there. Yields them one by one, as a long run has many.
    """
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                one = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(one, dict) and type(one.get("step")) is int and 0 <= one["step"] < 2**63 and all(
                    isinstance(one.get(name), (int, float, type(None))) for name in ("train_loss", "val_loss")):
                yield one

def last_step(folder):
    """The folder step-NUMBER in a run's with the highest number, or None."""
    steps = [path for path in Path(folder).glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return max(steps, key=lambda path: int(path.name[5:]), default=None)

@contextmanager
def beside(path):
    """A path to write to, which then takes the place of `path`, or after an error is removed."""
    partial = path.with_name(f".{path.name}.partial")
    if partial.is_symlink():  # by which the bytes would go to another file
        partial.unlink()
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # as of a disk that is full
        raise
    finally:
        if not partial.is_dir():  # of somebody else's
            remove(partial)

def check_output(path, beginning):
    """Raise InputError where a file that begins with these bytes can't be written at a path, or would replace one of
    another kind, before what would go into it is made.
    """
    if path.is_dir() or not path.parent.is_dir():
        problem = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"--output={path}: {problem}; give the name of a file in a folder that is there")
    if path.exists() and not path.is_file():
        raise InputError(f"--output={path} is a device or the like; give the name of a file")
    if path.is_file():
        with open(path, "rb") as file:
            is_another = file.read(len(beginning)) not in (b"", beginning)
        if is_another:
            raise InputError(f"--output={path} is there and is another kind of file; give another name, or remove it")

def check_room(folder, needed, purpose, instead):
    """Raise InputError where the disk that a folder is or will be on has less than `needed` bytes free."""
    parent = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        free = shutil.disk_usage(parent).free
    except OSError:  # of a system that does not say
        return
    if free < needed:
        raise InputError(f"{parent} has {free / 1e6:,.1f} MB free; {purpose} {needed / 1e6:,.1f} MB; make room, or "
                         f"{instead}")

def real(path):
    """A path without links in it; Path.resolve raises RuntimeError for a link that leads to itself."""
    return Path(os.path.realpath(path))

def remove(path):
    """Remove a file, a link or a whole folder, if it is there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

class Held(Exception):
    """Another process holds a lock; the text says which."""

@contextmanager
def lock(path):
    """Hold a lock file, which is yielded open, for this process, until it leaves or ends in whatever way.

    Raises Held where another does, InputError for a link, by which another file would be written to.
    """
    if os.path.islink(path):
        raise InputError(f"{path} is a link, where a lock would be; remove it")
    with open(path, "a+", encoding="utf-8") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Held(f"process {file.read().strip()}") from None
        except (ImportError, OSError):  # Windows; network drives whose locks are off
            with lock_by_name(Path(f"{path}.held")):
                yield file
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        if not path_is(path, file):  # it was removed, with its folder, while this process waited for it
            raise Held("another process")
        yield file

def path_is(path, file):
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False

def path_of(file):
    """Where an open file is now, as after its folder was renamed; None where it is gone, or a system does not say."""
    try:
        path = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    except OSError:
        return None
    return path if path_is(path, file) else None

HELD_BY_NAME = set()  # by this process, whose number another had before it, as in containers

@contextmanager
def lock_by_name(path):
    """`lock` where a system has no locks: by a file that names host and process. One that died on this host is over."""
    path, mine = real(path), f"{os.getpid()} on {socket.gethostname()}"
    is_over = lambda process: not is_alive(process) or process == os.getpid() and path not in HELD_BY_NAME
    while True:
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(mine)
            break
        except FileExistsError:
            try:
                process, _, host = path.read_text(encoding="utf-8").partition(" on ")
            except FileNotFoundError:  # its process has just left
                continue
            if host == socket.gethostname() and process.isdigit() and is_over(int(process)):
                path.unlink(missing_ok=True)
                continue
            raise Held(f"process {process} on {host}; if that has ended, remove {path}") from None
    HELD_BY_NAME.add(path)
    try:
        yield
    finally:
        HELD_BY_NAME.discard(path)
        path.unlink(missing_ok=True)

def is_alive(process):
    """Whether a process of this machine may still run."""
    if os.name == "nt":  # where to ask would be to interrupt it
        return True
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # else it is another user's
    return True

@contextmanager
def wait_for_lock(path, what, seconds=0.2):
    """`lock`, that waits for the process which holds it, and says once `what` it does. → whether it had to wait."""
    said = False
    with ExitStack() as claims:
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)  # again where the holder has removed it
            try:
                claims.enter_context(lock(path))
                break
            except Held as error:
                if not said:
                    cli.say(f"{what} by {error}; waiting for it")
                said = True
                time.sleep(seconds)
        yield said
