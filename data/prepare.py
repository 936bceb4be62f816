"""A corpus → data/NAME/: tokenizer.json, train.bin, val.bin and meta.json. See `Settings` for the flags."""

import codecs
import contextlib
import hashlib
import http.client
import itertools
import json
import math
import multiprocessing
import os
import reprlib
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from data import bpe, cli, files, stories
from data.cli import InputError, RankError, flag

DATA = Path(__file__).resolve().parent
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
# The files to download: address and size in bytes, for training and, where the corpus has one, for validation.
DOWNLOADS = {"tinystories": [(TINYSTORIES + "train.txt", 2_227_753_162), (TINYSTORIES + "valid.txt", 22_502_601)],
             "shakespeare": [(SHAKESPEARE, 1_115_394)]}
CORPORA = {"stories": 2048, "tinystories": 10000, "shakespeare": 1024}  # {name: tokens in the vocabulary}
NUM_STORIES = {"train.txt": 30_000, "val.txt": 1_000}

@dataclass
class Settings:
    # Where the text comes from
    dataset: str = flag(None, "stories (built in, no download; the default), tinystories (2.2 GB) or shakespeare "
                        "(1 MB), downloaded once", choices=CORPORA)
    input: str = flag(None, "a text file, or a folder of them, of your own instead; <|endoftext|> in it ends a "
                      "document, as the end of a file does; in a .jsonl file each line's \"text\" is one")
    val_input: str = flag(None, "text to validate on")
    val_fraction: float = flag(None, "or the part of the text to keep for validation, its end, between 0 and 1",
                               "(0, 1)", stated="0.1")
    errors: str = flag("strict", "strict, or replace to put U+FFFD where a file is not valid UTF-8",
                       choices=("strict", "replace"))
    # What is made of it
    vocab_size: int = flag(None, "tokens in the vocabulary, from 257 (the 256 bytes and <|endoftext|>) on",
                           "[257, inf)", stated="2048, fewer for less than 64 KB; tinystories 10000, shakespeare 1024")
    tokenizer: str = flag(None, "use this tokenizer.json, or the one in this folder, instead of learning one")
    output: str = flag(None, "the folder to write", stated="data/ and the name of the dataset or input")
    workers: int = flag(None, "processes to use", "[1, inf)", stated="one a core")

# ---- Where text comes from ----

def download(url, path, size, attempts=8, pause=1):
    """Fetch a file of a known size into `path`, going on where an earlier try stopped; once there, it stays.

    A try that brings nothing is repeated after a pause, in seconds, that doubles. Raises InputError where it can't be
    had, saying how far it came.
    """
    path = Path(path)
    is_whole = lambda: path.is_file() and path.stat().st_size == size
    if not is_whole():
        with files.wait_for_lock(path.with_name(f".{path.name}.lock"), f"{path} is being downloaded"):
            if not is_whole():  # by the one that was waited for
                fetch(url, path, size, attempts, pause)
    return path

def fetch(url, path, size, attempts, pause):
    """`download`, by the one process that does it."""
    partial = path.with_name(path.name + ".part")
    have = lambda: partial.stat().st_size if partial.exists() else 0
    for attempt in range(attempts):
        if have() > size:
            partial.unlink()
        begin = have()
        if begin == size:
            break
        files.check_room(path.parent, size - begin, f"what is left of {url} needs", "give the text with --input")
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
            with urllib.request.urlopen(request, timeout=30) as response:
                receive(response, partial, begin if response.status == 206 else 0, size, path.name)
            error = "the connection closed early"
        except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError,
                TimeoutError) as problem:
            error = problem
            if isinstance(problem, urllib.error.HTTPError) and 400 <= problem.code < 500 and (
                    problem.code not in (408, 429)):  # too slow, too many at once
                break
        if begin == have() < size and attempt + 1 < attempts:
            wait = min(pause * 2**attempt, 30)
            cli.say(f"{url}: {error}; it is tried again in {wait:g} s")
            time.sleep(wait)
    if have() != size:
        raise InputError(f"{url} stopped at {have():,} of {size:,} bytes ({error}); run the command again to go "
                         "on, or give the text with --input")
    os.replace(partial, path)

def receive(response, partial, begin, size, label):
    """Write what a response sends behind the first `begin` bytes of `partial`, no more than `size` bytes in all."""
    done, progress = begin, cli.Progress(f"downloading {label}", size)
    with contextlib.closing(progress), open(partial, "r+b" if begin else "wb") as file:
        file.seek(begin)
        while done < size and (block := response.read(min(1 << 20, size - done))):
            file.write(block)
            done += len(block)
            progress.update(done, begin)
        files.flush(file)

def write_stories(folder):
    """Write the built-in corpus into a folder; returns the paths for training and validation."""
    numbers = itertools.count()
    with contextlib.closing(cli.Progress("writing stories", sum(NUM_STORIES.values()), "stories", 1)) as progress:
        for name, count in NUM_STORIES.items():
            with open(folder / name, "w", encoding="utf-8", newline="") as file:
                for number in itertools.islice(numbers, count):
                    file.write(stories.story(0, number) + bpe.END_OF_TEXT)
                    progress.update(number)
    return [folder / name for name in NUM_STORIES]

def is_text(name):
    """Whether what --data names is a text file; corpora of this project go before."""
    return Path(name).is_file() and name not in CORPORA

def text_files(source, output):
    """The file that a user named, or all files below the folder in order of name, without hidden ones and `output`.

    Links to folders are followed, each folder once. Pictures and the like are left out, which is said. Raises
    InputError where nothing is there, or no text, and OSError for what can't be read.
    """
    def refuse(error):
        raise error

    source = Path(source)
    if source.is_file():
        check_is_text(source)
        return [source]
    if not source.is_dir():
        raise InputError(f"{source} is not there; expected a text file, or a folder of them")
    if is_no_text(source):
        raise InputError(f"{source} has prepared data or a model in it; expected a text file, or a folder of them")
    paths, seen = [], {files.real(output)}
    for folder, folders, names in os.walk(source, onerror=refuse, followlinks=True):
        here = files.real(folder)
        if is_no_text(here) and here not in seen:
            cli.say(f"left out, as prepared data or a model is in it: {folder}")
            seen.add(here)
        folders[:] = [] if here in seen else sorted(name for name in folders if not name.startswith("."))
        paths += [] if here in seen else [Path(folder, name) for name in names if not name.startswith(".")]
        seen.add(here)
    binary, texts = [], []
    for path in sorted(path for path in paths if path.is_file()):
        (binary if is_binary(path) else texts).append(path)
    for why, left_out in (("a zero byte in it says that it is no text", binary),
                          ("the link leads to nothing", [path for path in paths if not path.exists()])):
        if left_out:
            more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
            cli.say(f"left out, as {why}: {', '.join(map(str, left_out[:3]))}{more}")
    if not texts:
        raise InputError(f"{source} has no texts in it; expected a text file, or a folder of them")
    return texts

def is_no_text(folder):
    """Whether what is in a folder is data that was prepared, or a model."""
    has = lambda name: any(folder.glob(name))
    return has("meta.json") and has("train.bin") or has("config.json") and has("*.safetensors")

def check_is_text(path):
    """Raise InputError where a file that was named is no text."""
    bpe.as_span(path)  # raises for UTF-16 that says so
    if is_binary(path):
        raise InputError(f"{path} has a zero byte near its start, so it seems to be no text in UTF-8; unpack it, save "
                         "it as UTF-8, or remove the zero bytes")

def is_binary(path):
    """Whether a file is no text, as git and grep judge: by a zero byte near its start."""
    with open(path, "rb") as file:
        return b"\0" in file.read(8000)

def as_text(path, copy, errors="strict"):
    """The path of a text: the file itself, or for a .jsonl file a `copy` where each line's "text" is a document.

    Raises InputError for a line without one.
    """
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return path
    progress, done = cli.Progress(f"reading {path.name}", path.stat().st_size), 0
    # The copy has a byte order mark, as what a text begins with is not to be taken for one.
    with (contextlib.closing(progress), open(path, "rb") as lines,
          open(copy, "w", encoding="utf-8-sig", newline="") as file):
        for number, line in enumerate(lines, 1):
            try:
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    one = json.loads(line.decode("utf-8", errors))
                    text = one["text"].removesuffix(bpe.END_OF_TEXT)
                    # In JSON a character may be two numbers, of which one may be missing.
                    text = text.encode("utf-16", "surrogatepass").decode("utf-16", errors)
                    file.write(text + bpe.END_OF_TEXT)
            except UnicodeError as error:
                raise InputError(f"{path}, line {number:,} is not valid Unicode ({error.reason}); mend it, or let "
                                 "data/prepare.py --errors=replace put U+FFFD there") from None
            except KeyError:
                raise InputError(f'{path}, line {number:,} has {reprlib.repr([*one])}; join what is to be learned into '
                                 'one text, "text"') from None
            except (ValueError, TypeError, AttributeError, RecursionError):
                raise InputError(f'{path}, line {number:,}: expected a JSON object with a text as "text"') from None
            done += len(line)
            progress.update(done)
    return copy

def whole_spans(paths, sources):
    """Files made of `sources` as spans (path, start, end), without the empty ones. Raises InputError where no text is
    left."""
    spans = [(path, start, end) for path, start, end in map(bpe.as_span, paths) if end > start]
    if not spans:
        raise InputError(f"{', '.join(map(str, sources[:3]))}: no text in it; expected some")
    return spans

def split_spans(spans, val_fraction):
    """Cut spans into those for training and those for validation, the last `val_fraction` of all bytes.

    The cut is moved on to the next end of a document, or of a line, or of a character, whichever there is.
    """
    to_go = int(sum(end - start for _, start, end in spans) * (1 - val_fraction))
    train, val = [], []
    for path, start, end in spans:
        cut = end if end - start <= to_go else cut_point(path, start, start + to_go, end) if to_go > 0 else start
        to_go -= end - start
        train += [(path, start, cut)] if cut > start else []
        val += [(path, cut, end)] if end > cut else []
    return train, val

def cut_point(path, start, target, end):
    """The first good place from `target` on to cut a file in two."""
    mark = bpe.END_OF_TEXT.encode()
    before = min(len(mark) - 1, target - start)  # as `target` may lie within a mark
    with open(path, "rb") as file:
        file.seek(target - before)
        text = file.read(before + min(end - target, 1 << 22))
    for border, begin in ((mark, 0), (b"\n", before)):
        place = text.find(border, begin, before + (end - target) // 2)  # so that much is left behind it
        if place >= 0:
            return target - before + place + len(border)
    around = text.find(mark, 0, before + len(mark) - 1)
    if around >= 0:  # with little behind it
        return target - before + around
    text = text[before:]
    return target + len(text) - len(text.lstrip(bytes(range(0x80, 0xC0))))  # which begin no character

def default_vocab_size(num_bytes):
    """A token for every 32 bytes of a text, 2,048 at most; where that makes few, bytes alone (see data/README.md)."""
    return min(2048, num_bytes // 32) if num_bytes // 32 >= 512 else 257

# ---- What is written ----

def text_sizes(tokenizer, begin, end):
    """How many bytes of text each id stands for; special tokens, as those that begin or end a document, are no text."""
    no_text = {i for token, i in tokenizer.special_tokens.items()
               if token not in tokenizer.text_tokens or i in (*begin, end)}
    return np.array([0 if i in no_text else len(token) for i, token in enumerate(tokenizer.tokens)])

def with_end(tokenizer, end):
    """The tokenizer, <|endoftext|> in a text read as the id that ends one."""
    return replace(tokenizer, special_tokens={bpe.END_OF_TEXT: end} | tokenizer.special_tokens)

def with_begin_ids(ids, is_start, begin, end):
    """`ids` of texts that each `end`, with the ids `begin` in front of each text that has none; is_start says whether
    they start with one."""
    if not begin:
        return ids
    starts = np.append(is_start, ids[:-1] == end)[:len(ids)] & (ids != end) & (ids != begin[0])
    places = np.flatnonzero(starts)
    return np.insert(ids, places.repeat(len(begin)), np.tile(begin, len(places)).astype(ids.dtype))

def write_ids(tokenizer, begin, end, spans, path, settings):
    """Encode spans into a file of ids; returns what is in it.

    Each file's text is ended by the id `end`, and texts begin with the ids `begin`, where the model has such.
    """
    sizes, counts, digest = text_sizes(tokenizer, begin, end), {"tokens": 0, "bytes": 0}, hashlib.sha256()
    tokenizer, end = with_end(tokenizer, end), np.array([end], tokenizer.dtype)
    before, last = None, end
    with open(path, "wb") as file:

        def write(ids):
            file.write(ids.data)
            digest.update(ids.data)
            counts["tokens"] += len(ids)
            counts["bytes"] += int(sizes[ids].sum())

        for source, ids in bpe.encode_pieces(tokenizer, spans, settings.workers, settings.errors):
            if source != before and last[-1:] != end:
                write(end)
                last = end
            write(with_begin_ids(ids, last[-1:] == end, begin, end))
            before, last = source, ids if len(ids) else last
        if last[-1:] != end:
            write(end)
        files.flush(file)
    return counts | {"sha256": digest.hexdigest()}

@cli.command(Settings)
def prepare(given):
    """Turn a corpus into tokens: a folder data/NAME/ that train.py trains on."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # begun by `bpe.spread`, it would wait for it
        raise InputError('where processes are not forked, a script has to call this below if __name__ == "__main__":')
    settings = cli.complete(Settings, given)
    dataset, source, val_input = settings.dataset, settings.input, settings.val_input
    if dataset and source:
        raise InputError(f"--dataset={dataset} and --input={source}: give one of the two")
    if val_input and (settings.val_fraction is not None or not source):
        raise InputError(f"--val_input={val_input} goes with --input, and without --val_fraction")
    dataset = dataset or ("" if source else "stories")
    if settings.val_fraction is not None and (dataset == "stories" or len(DOWNLOADS.get(dataset, ())) == 2):
        raise InputError(f"--val_fraction={settings.val_fraction}: {dataset} has a text of its own to validate on; "
                         "leave it out")
    if settings.tokenizer and settings.vocab_size:
        raise InputError(f"--tokenizer={settings.tokenizer} has its own vocabulary; leave out --vocab_size")
    tokenizer, begin, end = load_tokenizer(settings.tokenizer) if settings.tokenizer else (None, [], None)
    name = dataset or (files.real(source).stem if Path(source).is_file() else files.real(source).name)
    output = Path(settings.output or DATA / name)
    is_new, was_there = not output.exists(), is_data(output)
    own = {".lock", ".lock.held", ".partial"}  # what a killed process of this command may have left
    if is_data(output / ".partial"):  # while it moved that into place
        own |= {"tokenizer.json", *(f"{split}.{kind}" for split in ("train", "val") for kind in ("bin", "txt"))}
    if output.exists() and not is_of_this_command(output) and (
            not output.is_dir() or any(path.name not in own for path in output.iterdir())):
        raise InputError(f"{output} is there, and was not written by this command or is damaged; choose another "
                         "--output")
    if source and not settings.output and output.name in CORPORA:
        raise InputError(f"--input={source} would replace data/{output.name}, a corpus of this project; add --output")
    sources = [text_files(path, output) for path in (source, val_input) if path]
    if val_input:  # which may be a part of the folder
        held_out = {files.real(path) for path in sources[1]}
        sources[0] = [path for path in sources[0] if files.real(path) not in held_out]
        if not sources[0]:
            raise InputError(f"--val_input={val_input} is all of --input={source}; give other text to validate on, or "
                             "leave it out")
    for path in (source, val_input):
        if path and Path(path).is_file() and files.real(output) in files.real(path).parents:
            raise InputError(f"{path} lies in {output}, which is to be written; choose another --output")
    num_bytes = sum(end - start for paths in sources for _, start, end in whole_spans(paths, paths))
    if any(len(paths) > 1 for paths in sources):
        cli.say(f"{sum(map(len, sources)):,} files with {num_bytes:,} bytes")
    default = CORPORA.get(dataset) or default_vocab_size(num_bytes)
    vocab_size = tokenizer.vocab_size if tokenizer else settings.vocab_size or default

    asked = cli.kept(settings) | {"dataset": dataset, "workers": None, "output": None}
    asked["of"] = digest_of(itertools.chain(*sources), tokenizer and (tokenizer, begin, end))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output} can't be made ({error.strerror}); give data/prepare.py another --output, and that "
                         "to train.py as --data") from None
    with files.wait_for_lock(output / ".lock", f"{output} is being prepared") as waited:
        if not is_data(output) and is_data(output / ".partial"):  # one was killed while it moved that into place
            put_in_place(output / ".partial", output)
        is_just_made = is_data(output) and (waited or not was_there)  # by another process
        if not (is_just_made and files.read_json(output / "meta.json").get("asked") == asked):
            try:
                write_beside(output / ".partial", sources, settings, tokenizer, begin, end, vocab_size, asked)
            except BaseException as error:
                if isinstance(error, OSError) and error.errno in cli.NO_ROOM and not error.filename:
                    error.filename = str(output)
                files.remove(output / ".partial")
                if is_new and not is_data(output):
                    files.remove(output)
                if isinstance(error, MemoryError):
                    raise InputError(f"too little memory to prepare {name}; give data/prepare.py fewer --workers, less "
                                     "text or a --tokenizer that is there") from None
                raise
            put_in_place(output / ".partial", output)
    report(output, vocab_size)

def write_beside(partial, sources, settings, tokenizer, begin, end, vocab_size, asked):
    """Write all that a data folder has into `partial`. `asked` is what meta.json has to say of the flags."""
    files.remove(partial)
    partial.mkdir()
    dataset = asked["dataset"]
    name = dataset or settings.input
    if dataset == "stories":
        sources = [[path] for path in write_stories(partial)]
    elif dataset:
        kept = DATA / "downloads"
        sources = [[download(url, kept / f"{dataset}-{url.split('/')[-1]}", size)] for url, size in DOWNLOADS[dataset]]
    stamps = {path: stamp(path) for paths in sources for path in paths}
    copies = (partial / f"{number}-copy.txt" for number in itertools.count())
    spans = [whole_spans([as_text(path, next(copies), settings.errors) for path in paths], paths) for paths in sources]
    val_fraction = settings.val_fraction or 0.1
    train, val = spans if len(spans) == 2 else split_spans(spans[0], val_fraction)
    if not train or not val:
        raise InputError(f"{name}: too little text to keep {val_fraction} of it for validation; "
                         "use more text, or data/prepare.py with another --val_fraction")
    # Ids of 2 or 4 bytes: one for a byte of text or, where bytes are merged, for two or more.
    ids = sum(end - start for _, start, end in train + val) / (1 if vocab_size < 512 else 2)
    files.check_room(partial, ids * (2 if vocab_size <= 1 << 16 else 4), "the data may need", "choose another --output")
    tokenizer = tokenizer or bpe.train(train, vocab_size, workers=settings.workers, errors=settings.errors)
    end = tokenizer.special_tokens[bpe.END_OF_TEXT] if end is None else end
    bpe.save(tokenizer, partial / "tokenizer.json")
    meta = {"source": name, "asked": asked, "vocab_size": tokenizer.vocab_size, "dtype": tokenizer.dtype.name,
            "begin_ids": begin or [end], "end_of_text_id": end,
            "tokenizer_sha256": hashlib.sha256((partial / "tokenizer.json").read_bytes()).hexdigest()}
    for split, of_split in (("train", train), ("val", val)):
        meta[split] = write_ids(tokenizer, begin, end, of_split, partial / f"{split}.bin", settings)
        if not meta[split]["bytes"]:
            raise InputError(f"{name}: the part for {split}.bin has nothing but special tokens; expected text "
                             "(data/prepare.py has --val_input and --val_fraction to choose it)")
    for path in stamps:
        if stamp(path) != stamps[path]:
            raise InputError(f"{path} was changed while it was read; wait until it is whole, and start again")
    for path in partial.glob("*-copy.txt"):
        path.unlink()
    with files.beside(partial / "meta.json") as path:  # which says that all else is there
        files.write_json(path, meta)

def put_in_place(partial, output):
    """Move new data over old. The folder itself stays, as it may be a mount point; without meta.json it is no data."""
    if is_data(output):  # else new files may be here that a process moved before it was killed
        with contextlib.suppress(InputError, KeyError, TypeError):  # of a file that is damaged
            asked = files.read_json(output / "meta.json")["asked"]
            for name in NUM_STORIES if asked["dataset"] == "stories" else ():  # which has its text beside it
                (output / name).unlink(missing_ok=True)
        (output / "meta.json").unlink()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "meta.json"):  # that one last
        os.replace(path, output / path.name)
    files.flush_folder(output)
    files.remove(partial)

def is_data(folder):
    return (folder / "meta.json").is_file()

def is_of_this_command(folder):
    """Whether a folder has data that this command wrote."""
    try:
        return is_data(folder) and "tokenizer_sha256" in files.read_json(folder / "meta.json")
    except (InputError, TypeError):  # no JSON object
        return False

def find_data(name, model=None):
    """The data folder of this path, or of this name below data/, or one made of this text file.

    A known corpus or text that was not prepared yet is, with the tokenizer of the `model` that training goes on from,
    if there is one. A text has a folder for each of its versions and tokenizers, so that no run loses its data.
    """
    fits = lambda folder: is_data(folder) and not (model and name in CORPORA and not bpe.are_same(
        bpe.load(model), bpe.load(folder)))
    folder = None if is_text(name) else next(filter(fits, (Path(name), DATA / name)), None)
    if folder is None and (is_text(name) or name in CORPORA):
        folder, flags = made_of(name, model), {"input": str(name)} if is_text(name) else {"dataset": name}
        if not is_data(folder):
            named = DATA / Path(name).stem
            if is_text(name) and is_data(named):
                cli.say(f"the text is prepared by default flags; --data={named.name} takes what is in {named}")
            prepare(**flags | ({"tokenizer": str(model)} if model else {}), output=str(folder))
    if folder:
        return folder
    for begun in (Path(name), DATA / name):
        if (begun / ".lock").exists():
            raise InputError(f"--data={name}: data/prepare.py has not ended in {begun}; wait for it, or if it was cut "
                             "short give the same command again")
    if (Path(name) / "train.bin").is_file():
        raise InputError(f"--data={name} has no meta.json, so data/prepare.py did not write it; prepare the text that "
                         "its ids stand for")
    text = cli.quoted(name) if Path(name).is_dir() else "YOUR_TEXT"
    by = f" --tokenizer={cli.quoted(model)} --output=NEW" if model else ""
    raise InputError(f"--data={name}: no such data folder or text file; make one with data/prepare.py --input={text}"
                     f"{by}, or use one of {', '.join(CORPORA)}")

def made_of(name, model=None):
    """The data folder of a known corpus, or of this version of a text, with its own tokenizer or that of a model."""
    texts = [name] if is_text(name) else []
    digest = digest_of(texts, model and load_tokenizer(model))
    return DATA / (f"{Path(name).stem[:50]}-{digest[:8]}" if texts or model else name)  # names of files are bounded

def digest_of(paths, loaded=None):
    """What tells data apart: a digest of the versions of texts, and of what `load_tokenizer` gives."""
    told_apart = [what for path in paths for what in (str(files.real(path)), *stamp(path))]
    if loaded:
        tokenizer, begin, end = loaded
        told_apart += [tokenizer.split, [token.hex() for token in tokenizer.tokens], tokenizer.merges.tolist()]
        told_apart += [begin, end]
        more = sorted(tokenizer.special_tokens.items()), sorted(tokenizer.text_tokens), tokenizer.whole_words
        told_apart += more if more != ([(bpe.END_OF_TEXT, end)], [], False) else []  # which older folders do not tell
    return hashlib.sha256(json.dumps(told_apart).encode()).hexdigest()

def load_tokenizer(path):
    """The tokenizer in a file or a model's folder, the ids that begin a document, if it is not enough that the one
    before has ended, and the id that ends one, as <|endoftext|> does in texts.

    Raises InputError where it has none that ends one.
    """
    path = Path(path)
    if not (path / "tokenizer.json").exists():  # of a run all checkpoints have the same
        path = next(path.glob("step-*/tokenizer.json"), path)
    tokenizer = bpe.load(path)
    begin, ends, _ = bpe.special_ids(path, tokenizer)
    end = tokenizer.special_tokens.get(bpe.END_OF_TEXT, next(iter(ends), None))  # or a family's of another name
    if end is None:
        raise InputError(f"{path} has no special token {bpe.END_OF_TEXT} to end documents with, and no config.json "
                         "beside it names another; use a tokenizer that has")
    return tokenizer, [] if begin == [end] else begin, end

def report(folder, most_tokens):
    """Say what a data folder holds."""
    meta = files.read_json(folder / "meta.json")
    if meta["vocab_size"] < most_tokens:
        cli.say(f"the text has no more pairs to merge: a vocabulary of {meta['vocab_size']}, not {most_tokens}")
    cli.say(f"{folder}: a vocabulary of {meta['vocab_size']} tokens")
    for split in ("train", "val"):
        tokens, size = meta[split]["tokens"], meta[split]["bytes"]
        cli.say(f"  {split}.bin: {tokens:,} tokens for {size:,} bytes, {size / tokens:.2f} bytes a token")

# ---- Reading it back ----

def open_data(folder, splits=("train", "val")):
    """Open a data folder → (meta, {"train": ids, "val": ids} as np.memmap), or some of its splits. Checks them first.

    Raises InputError where a file is missing, is not what was written, or has no text, or where the tokenizer is not
    the one the ids were made with.
    """
    folder = Path(folder)
    again = f"remove {folder}, and prepare the data again"
    if not is_data(folder):
        raise InputError(f"{folder} has no meta.json; expected a folder that data/prepare.py wrote")
    try:
        meta = files.read_json(folder / "meta.json")
        begin, vocab_size = meta["begin_ids"], meta["vocab_size"]
        counts = [meta[split][what] for split in ("train", "val") for what in ("tokens", "bytes")]
        if meta["dtype"] not in ("uint16", "uint32") or {*map(type, (vocab_size, *begin, *counts))} != {int}:
            raise TypeError(f"dtype {meta['dtype']!r}, vocab_size {vocab_size!r}, begin_ids {begin!r}, counts {counts}")
        if not begin or not all(0 <= i < vocab_size for i in begin):
            raise TypeError(f"begin_ids {begin}")
        digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
        if digest != meta["tokenizer_sha256"]:
            raise InputError(f"{folder}/tokenizer.json is not the tokenizer that made train.bin and val.bin; {again}")
        ids = {}
        for split in splits:
            path, count = folder / f"{split}.bin", meta[split]["tokens"]
            dtype, size = np.dtype(meta["dtype"]).newbyteorder("<"), path.stat().st_size
            if size != count * dtype.itemsize or not count:
                raise InputError(f"{path} has {size:,} bytes; expected {count * dtype.itemsize:,}; {again}")
            if not meta[split]["bytes"] > 0:
                raise InputError(f"{path} has no text; {again} on more")
            file = open(path, "rb")  # stays open, and what it names there, also when the path names another
            ids[split] = np.memmap(file, dtype, "r")
            ids[split].file, ids[split].stamp = file, stamp(file.fileno())
            highest, digest = summary(file, dtype)
            if highest >= vocab_size:
                raise InputError(f"{path} holds the id {highest}, beyond the vocabulary of {vocab_size}; {again}")
            if meta[split]["sha256"] != digest:
                raise InputError(f"{path} is not what was written, though as long; {again}")
            ids[split].digest = digest
            if int(ids[split][-1]) != meta["end_of_text_id"]:
                raise InputError(f"{path} does not end with the end of a text; {again}")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is missing; expected a folder that data/prepare.py wrote") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}/meta.json is damaged ({type(error).__name__}: {error}); {again}") from None
    return meta, ids

def summary(file, dtype):
    """The highest id in a file, and the SHA-256 of all. It is read, as what is mapped counts as this process' memory.
    """
    highest, digest = 0, hashlib.sha256()
    progress = cli.Progress(f"checking {Path(file.name).name}", os.fstat(file.fileno()).st_size)
    file.seek(0)
    while len(piece := np.fromfile(file, dtype, 1 << 22)):
        highest = max(highest, int(piece.max()))
        digest.update(piece.data)
        progress.update(file.tell())
    progress.close()
    return highest, digest.hexdigest()

def ids_of(name, folder, split, most=math.inf):
    """Ids to evaluate the model in `folder` on, and the bytes of their text: a split of data, or a text file, of which
    no more is read than makes `most` tokens and some.

    Raises InputError where there is no text, or it was prepared with another tokenizer than the model's.
    """
    tokenizer, begin, end = load_tokenizer(folder)
    if is_text(name):
        check_is_text(name)
        with tempfile.TemporaryDirectory() as scratch:
            text, pieces, count = as_text(Path(name), Path(scratch) / "text"), [], 0
            for _, ids in bpe.encode_pieces(with_end(tokenizer, end), [text]):
                pieces.append(ids)
                count += len(ids)
                if count > most:
                    break
        sizes = text_sizes(tokenizer, begin, end)
        num_bytes = sum(int(sizes[ids].sum()) for ids in pieces)
        ids = np.concatenate([np.array([] if begin else [end], tokenizer.dtype), *pieces])
        ids = with_begin_ids(ids, True, begin, end)
    else:
        data = find_data(name, folder)
        meta, opened = open_data(data, [split])
        check_tokenizer(data, folder)
        ids, num_bytes = opened[split], meta[split]["bytes"]
    if not num_bytes:
        raise InputError(f"--data={name} has no text to evaluate on")
    return ids, num_bytes

def check_tokenizer(data, model):
    """Raise InputError where the data in a folder was prepared with another tokenizer than that of a model's folder."""
    if not bpe.are_same(*(bpe.load(folder / "tokenizer.json") for folder in (data, model))):
        raise InputError(f"{data} was prepared with another tokenizer than that of the model in {model}; prepare its "
                         f"text with data/prepare.py --input=YOUR_TEXT --tokenizer={cli.quoted(model)} --output=NEW")

def stamp(file):
    """What tells a version of a file, given by its path or number, from an older one: its size and time."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns

def check_unchanged(ids):
    """Raise InputError where others have written into the file of these ids: reading on could crash."""
    if not hasattr(ids, "stamp") or stamp(ids.file.fileno()) == ids.stamp:  # not from `open_data`, or as it was
        return
    if stamp(ids.file.fileno())[0] != ids.nbytes or summary(ids.file, ids.dtype)[1] != ids.digest:
        raise RankError(  # others may not have looked yet
            f"{ids.filename} has changed while it was in use; prepare the data again and resume the run")
    ids.stamp = stamp(ids.file.fileno())  # it was but touched

if __name__ == "__main__":
    cli.run(prepare)
