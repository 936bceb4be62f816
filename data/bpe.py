"""Byte-level BPE: train with GPT-2's split pattern; encode with that, SmolLM's or Llama 3's; save and load, in NumPy.

First the definition, in plain Python: `plain_split`, `plain_train` and `plain_encode`. The tests hold the rest to it.

Then the fast way to the same merges and ids. Text is bytes throughout, in three steps over whole arrays at once:

1. Split. Where a word begins follows from the class of a byte (letter, number, white space, other) and of its
   neighbours, so a handful of comparisons over an array of bytes replaces the regular expression (`word_starts`).
2. Look up. Words are few and repeat: each is found in a hash table of words met before, where training counts them
   (`HashTable`) and encoding has their ids (`Encoder`).
3. Merge. Only words never met before go through the merges. Each asks for one merge after another, but most of these
   are sure long before their turn, by the two neighbours of a pair alone (`Merger.find_sure`). So all merges that are
   sure are made at once, in whatever words and places: most text takes five to ten such rounds.

Files are read in pieces cut between words (`borders`), so pieces are independent: they stream, and spread over
processes, and the result is the same for any number of them. A word longer than can be held is encoded a block at a
time (`encode_endless`). Training holds each different word; it can't do with less.
"""

import bisect
import codecs
import contextlib
import heapq
import itertools
import json
import multiprocessing
import os
import re
import reprlib
import signal
import sys
import threading
import unicodedata
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection
from multiprocessing.pool import ExceptionWithTraceback
from pathlib import Path

import numpy as np

from data import files
from data.cli import InputError, Progress

# How text is split into words, as tiktoken and tokenizers write it: \p{L} is a letter, \p{N} a number.
SPLIT_PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # SmolLM's: each digit is a text of its own.
    "digits": r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+",
}

# ---- Byte-level BPE, as it is defined ----

def ascii_of_same_class(character):
    """The character itself if it is ASCII, else an ASCII one of its class: letter, number, white space or other."""
    if character.isascii():
        return character
    if character.isspace():
        return "\t"
    if character == "ſ":  # whose capital is S
        return "S"
    return {"L": "a", "N": "0"}.get(unicodedata.category(character)[0], "!")

def ascii_pattern(pattern):
    """A split pattern for ASCII alone, as Python's `re` knows neither \\p{L} nor \\p{N}."""
    pattern = pattern.replace(r"\p{N}]", "0-9]").replace(r"\p{L}0-9]", "A-Za-z0-9]")  # inside of brackets
    return pattern.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")

def plain_split(text, special_tokens=(), split="gpt2"):
    """Cut text into words: the special tokens, and what a split pattern finds between them; yields str."""
    pattern = ascii_pattern(SPLIT_PATTERNS[split])
    longest_first = sorted(special_tokens, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if special_tokens else [text]
    for part in parts:
        if part in special_tokens:
            yield part
        else:
            for match in re.finditer(pattern, "".join(map(ascii_of_same_class, part)), re.ASCII):
                yield part[match.start():match.end()]

def plain_train(text, num_merges, special_tokens=()):
    """Learn merges: from bytes, join the most frequent pair in all words, of equals the greatest. → [(left, right)]"""
    words = [[bytes([byte]) for byte in word.encode()]
             for word in plain_split(text, special_tokens) if word not in special_tokens]
    merges = []
    while len(merges) < num_merges and (counts := Counter(pair for word in words for pair in zip(word, word[1:]))):
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append((left, right))
        for word in words:
            for i in range(len(word) - 1):
                if word[i:i + 2] == [left, right]:
                    word[i:i + 2] = [left + right]
    return merges

def plain_encode(tokenizer, text):
    """Encode: from bytes, join the pair learned first in each word, of equals the leftmost, again and again. → [id]"""
    merges = {(left, right): (rank, made) for rank, (left, right, made) in enumerate(tokenizer.merges.tolist())}
    ids = []
    for word in plain_split(text, tokenizer.special_tokens, tokenizer.split):
        if word in tokenizer.special_tokens or tokenizer.whole_words and word.encode() in tokenizer.tokens:
            ids.append(tokenizer.tokens.index(word.encode()))
            continue
        word = [tokenizer.tokens.index(bytes([byte])) for byte in word.encode()]
        while joinable := [(merges[pair], i) for i, pair in enumerate(zip(word, word[1:])) if pair in merges]:
            (_, made), i = min(joinable)  # by rank, then by place
            word[i:i + 2] = [made]
        ids += word
    return ids

# ---- Bounds, so that text of any size and kind streams ----

CHUNK_BYTES = 1 << 20  # of a file, read and worked on at once
MOST_RESULTS = 4  # that wait, for each process, while one that comes before them takes long
MOST_WORDS = 1 << 18  # a process remembers; it begins anew beyond this, so that memory has a bound
MOST_BYTES = 2 * CHUNK_BYTES  # a chunk is longer only if it ends with a word without end
MOST_PAIRS = 1 << 24  # of parts of tokens that merges bring together; those of GPT-2's size have some 100,000
LONG_WORD = 1 << 14  # bytes from which on a word is encoded before its end is known
PIECE_BYTES = 1 << 18  # of a chunk, split at once: enough for arrays to pay, and few enough to stay in a core's cache
# How processes start where nobody has chosen: a lock, as tqdm makes, settles on Python's default, which from 3.14 on is
# no copy of the caller. (Nor can it be told from a caller's choice of the same.)
UNCHOSEN = None, multiprocessing.get_all_start_methods()[0]

# ---- Splitting text into words ----

LETTER, NUMBER, OTHER, SPACE, SPECIAL = range(5)  # classes; those below SPACE are visible

# Unicode's White_Space property. (str.isspace() differs: it has U+001C to U+001F too.)
WHITE_SPACE = [*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F,
               0x3000]

@lru_cache(maxsize=1)
def class_of_code_points():
    """The class of every Unicode code point, from Python's own Unicode tables. → uint8 (0x110000)."""
    classes = np.full(0x110000, OTHER, np.uint8)
    characters = np.arange(0x40000, dtype=np.uint32).view("U1")  # there are no letters or numbers beyond
    classes[:len(characters)][np.strings.isalpha(characters)] = LETTER
    for c in np.flatnonzero(np.strings.isnumeric(characters) & (classes[:len(characters)] != LETTER)).tolist():
        if unicodedata.category(chr(c))[0] == "N":
            classes[c] = NUMBER
    classes[WHITE_SPACE] = SPACE
    return classes

ASCII_CLASSES = bytes(
    SPACE if c in WHITE_SPACE else LETTER if chr(c).isalpha() else NUMBER if chr(c).isdigit() else OTHER
    for c in range(128)) + bytes(128)

def byte_classes(text, special_spans):
    """The class of the character each byte belongs to. text: valid UTF-8, special_spans (n, 2) → uint8 (len(text))."""
    data = np.frombuffer(text, np.uint8)
    classes = np.frombuffer(text.translate(ASCII_CLASSES), np.uint8)
    if text.isascii() and not special_spans:
        return classes
    classes = classes.copy()
    places = np.flatnonzero(data >= 0x80)  # of the bytes of characters beyond ASCII
    characters = np.frombuffer(data[places].tobytes().decode().encode("utf-32-le"), "<u4")
    classes[places] = class_of_code_points()[characters].repeat(2 + (characters >= 0x800) + (characters >= 0x10000))
    for start, end in special_spans:
        classes[start:end] = SPECIAL
    return classes

@lru_cache(maxsize=2)
def contraction_lengths(long_s=False):
    """The length of the contraction that begins with an apostrophe and these two bytes, or 0. → int64 (256, 256)."""
    lengths = np.zeros((256, 256), np.int64)
    lengths[tuple("ſ".encode())] = 3 * long_s
    for first, second in (b"ll", b"ve", b"re"):
        lengths[first, second] = 3
    lengths[list(b"sdmt")] = 2
    return lengths

def word_starts(text, special_spans=(), split="gpt2"):
    """Where words begin, as `plain_split` cuts them. text: bytes of UTF-8, special_spans (n, 2) → int64 (words).

    A word begins where the class changes, and a special token begins and ends a text of its own; that is amended for
    each split pattern.
    """
    if not text:
        return np.empty(0, np.int64)
    data, classes = np.frombuffer(text, np.uint8), byte_classes(text, special_spans)
    starts = np.empty(len(text), bool)
    starts[0] = True
    np.not_equal(classes[1:], classes[:-1], out=starts[1:])
    for start, end in special_spans:
        starts[start] = True
        starts[end:end + 1] = True
    if split == "llama3":
        amend_llama3(data, classes, starts)
    else:
        amend_gpt2(data, classes, starts, split == "digits")
    return np.flatnonzero(starts)

def amend_gpt2(data, classes, starts, digits_alone):
    """Amend where words begin, bool (bytes), by the pattern of GPT-2, or with `digits_alone` that of SmolLM.

    The last character of a run of white space stands apart from the run when something visible follows, and a blank
    there belongs to the word that follows; but with `digits_alone` a digit begins and ends a text of its own. A
    contraction ('s, 'll …) ends early, after its letters.
    """
    if digits_alone:
        starts |= (classes == NUMBER) & (data & 0xC0 != 0x80)  # their first bytes
        classes = np.where(classes == NUMBER, SPECIAL, classes)
    last_space = (classes[:-1] == SPACE) & (classes[1:] < SPACE)  # the last byte before something visible
    starts[1:] &= ~(last_space & (data[:-1] == ord(" ")))
    wide = np.flatnonzero(last_space & (data[:-1] >= 0x80))  # beyond ASCII, it's the first byte that begins a word
    last_space[wide] = False
    starts[:-1] |= last_space
    starts[wide - np.where(data[wide - 1] >= 0xC0, 1, 2)] = True  # such characters have two or three bytes

    quotes = np.flatnonzero(data[:-1] == ord("'"))
    # A special token may be such a quote, or begin with such letters.
    quotes = quotes[starts[quotes] & (classes[quotes] != SPECIAL) & (classes[quotes + 1] == LETTER)]
    second = np.minimum(quotes + 2, len(data) - 1)  # where text ends after one letter, that letter is no pair either
    length = contraction_lengths()[data[quotes + 1], np.where(classes[second] == LETTER, data[second], 0)]
    length[quotes + length > len(data)] = 0
    quotes, length = quotes[length > 0], length[length > 0]
    starts[quotes + 1] = False
    ends = quotes + length
    starts[ends[ends < len(data)]] = True

def amend_llama3(data, classes, starts):
    """Amend where words begin, bool (bytes), by the pattern of Llama 3.

    Numbers are cut in threes. New lines belong to a sign just before them; in other white space a word ends behind the
    last new line. What is left of it gives its last character to letters that follow, or, if that is a blank, to signs;
    before numbers it stands alone. A sign alone belongs to the letters that follow it, unless it has a blank already;
    with an apostrophe that may be a contraction, in small letters or capitals, which ends early.
    """
    size, changes = len(data), starts.copy()
    digits = np.flatnonzero((classes == NUMBER) & (data & 0xC0 != 0x80))  # their first bytes
    place = np.arange(len(digits))
    starts[digits] = (place - np.maximum.accumulate(np.where(changes[digits], place, 0))) % 3 == 0

    is_space = classes == SPACE
    is_newline = ((data == ord("\n")) | (data == ord("\r"))) & is_space
    newlines = np.flatnonzero(is_newline)
    begin = np.flatnonzero(is_space & changes)
    end = np.flatnonzero(np.append(is_space[:-1] & changes[1:], is_space[-1])) + 1
    # The rest of each run of white space without the new lines of a sign before it …
    rest = begin.copy()
    of_sign = np.flatnonzero((classes[begin - 1] == OTHER) & (begin > 0) & is_newline[begin])
    last_in_row = newlines[np.diff(newlines, append=size + 1) > 1]  # of new lines without a gap
    rest[of_sign] = last_in_row[np.searchsorted(last_in_row, begin[of_sign])] + 1
    starts[begin[of_sign]] = False
    starts[rest[rest < end]] = True
    # … and without all up to the last new line.
    rest = np.maximum(rest, np.append(-1, newlines)[np.searchsorted(newlines, end)] + 1)
    starts[rest[rest < end]] = True
    end = end[(rest < end) & (np.append(classes, SPECIAL)[end] < SPACE)]
    final = end - 1 - np.where(data[end - 1] < 0x80, 0, np.where(data[end - 2] >= 0xC0, 1, 2))  # the last character
    starts[final] = True
    starts[end[(classes[end] == LETTER) | (classes[end] == OTHER) & (data[end - 1] == ord(" "))]] = False

    signs = np.flatnonzero((classes == OTHER) & changes & starts)
    width = 1 + (data[signs] >= 0xC0) + (data[signs] >= 0xE0) + (data[signs] >= 0xF0)
    before_letters = np.append(classes, SPECIAL)[signs + width] == LETTER
    signs, width = signs[before_letters], width[before_letters]
    starts[signs + width] = False
    quotes = signs[data[signs] == ord("'")]
    small = np.frombuffer(data.tobytes().lower() + b"\0", np.uint8)
    is_letter = np.append(classes, SPECIAL)[quotes + 2] == LETTER
    length = contraction_lengths(long_s=True)[small[quotes + 1], np.where(is_letter, small[quotes + 2], 0)]
    ends = (quotes + length)[length > 0]
    starts[ends[ends < size]] = True

# ---- Words met before ----

FILLER = 0xFF  # a byte that UTF-8 never has
# By the length of a word: what to OR into its first `size` bytes, FILLER behind its end; all FILLER if it is longer.
FILLS = {size: np.array([[0] * n + [FILLER] * (size - n) for n in range(size)] + [[FILLER] * size],
                        np.uint8).view(np.uint64) for size in (16, 32)}

def word_keys(text, starts, lengths, size=16):
    """The exact key of each word: its bytes, filled up to `size`, if they are fewer. → uint64 (words, size / 8)."""
    windows = np.ndarray((len(text),), f"V{size}", text + bytes(size), 0, (1,))  # the bytes from each position on
    keys = windows[starts].view(np.uint64).reshape(-1, size // 8)
    return np.bitwise_or(keys, FILLS[size].take(lengths, 0, mode="clip"), out=keys)

def hash_slots(keys, bits):
    """Where to look for keys among 2^bits slots. uint64 (keys, key_size / 8) → int64 (keys)."""
    mixed = keys[:, -1] * np.uint64(0x9E3779B97F4A7C15)
    for column in keys.T[-2::-1]:
        mixed ^= column
        mixed *= np.uint64(0xD6E8FEB86659FD93)
    mixed >>= np.uint64(64 - bits)
    return mixed.view(np.int64)

def differ(some, others):
    """Which keys are not those of the same row. → bool (keys)."""
    unequal = some != others  # (keys, 2 or 4)
    return unequal.view(f"u{unequal.shape[1]}").ravel() != 0  # a row of bools is read as one number

def ranges(begins, counts):
    """begin, begin + 1 … for each of them, as many as its count, in a row. int64 (n) twice, counts from 1 → int64."""
    steps, ends = np.ones(counts.sum(), np.int64), np.cumsum(counts)
    steps[:1] = begins[:1]
    steps[ends[:-1]] += begins[1:] - begins[:-1] - counts[:-1]
    return np.cumsum(steps, out=steps)

class HashTable:
    """A growing map from the keys of words, and one for all that are too long, to 0, 1, 2 … in the order of addition.

    Open addressing with linear probing, for whole arrays of keys (n, 2) at once.
    """

    KEY_SIZE = 16  # bytes

    def __init__(self):
        self.parts, self.count = [np.empty((0, self.KEY_SIZE // 8), np.uint64)], 0  # of `keys`
        self.rehash(1 << 14)

    def __len__(self):
        return self.count

    @property
    def keys(self):
        """All keys in the order of addition, joined when they are asked for, as that copies all."""
        self.parts = [np.concatenate(self.parts)]
        return self.parts[0]

    def rehash(self, size):
        """Make room: place the keys anew in `size` slots, a power of two."""
        self.slot_keys = np.zeros((size, self.KEY_SIZE // 8), np.uint64)  # zeros: empty
        self.slot_number = np.full(size, -1, np.int32)
        self.slot_number[self.place(self.keys)] = np.arange(len(self))

    def first_slot(self, keys):
        return hash_slots(keys, len(self.slot_keys).bit_length() - 1)

    def differ(self, slots, keys):
        """Which slots hold another key than these, or none. → bool (keys)."""
        return differ(self.slot_keys.take(slots, 0), keys)

    def place(self, keys):
        """The slot of each key, which takes an empty one where it is new."""
        slots = self.first_slot(keys)
        pending = np.arange(len(keys))
        while len(pending):
            at = slots.take(pending)
            empty = np.flatnonzero(self.slot_keys[at, -1] == 0)[::-1]  # the last byte of a key is never 0
            # Where several keys want one empty slot the last one written has it, so the first of them, which is met
            # most often, is written last. All look again at who has it.
            self.slot_keys[at.take(empty)] = keys.take(pending.take(empty), 0)
            pending = pending.compress(self.differ(at, keys.take(pending, 0)))
            slots[pending] = (slots.take(pending) + 1) % len(self.slot_keys)
        return slots

    def find(self, keys):
        """The number of each key, or -1. → int32 (keys)."""
        slots = self.first_slot(keys)
        numbers = self.slot_number.take(slots)
        pending = np.flatnonzero(self.differ(slots, keys) & (numbers >= 0))
        slots, keys = slots.take(pending), keys.take(pending, 0)
        while len(pending):
            slots = (slots + 1) % len(self.slot_keys)
            stored = numbers[pending] = self.slot_number.take(slots)
            going = np.flatnonzero(self.differ(slots, keys) & (stored >= 0))
            pending, slots, keys = pending.take(going), slots.take(going), keys.take(going, 0)
        return numbers

    def add(self, keys):
        """Add keys that are not in the table; a key may stand more than once."""
        while 3 * (len(self) + len(keys)) > len(self.slot_keys):
            self.rehash(2 * len(self.slot_keys))
        slots = self.place(keys)
        first = np.sort(np.unique(slots, return_index=True)[1])
        self.slot_number[slots[first]] = np.arange(len(self), len(self) + len(first))
        self.parts.append(keys[first])
        self.count += len(first)

    def find_or_add(self, keys):
        """The number of each key, new ones added. → int32 (keys)."""
        numbers = self.find(keys)
        new = np.flatnonzero(numbers < 0)
        while len(new):  # a part at a time: what is frequent comes early, and the table need not grow for the rest
            self.add(keys[new[:len(self.slot_keys) // 8]])
            numbers[new] = self.find(keys[new])
            new = new[numbers[new] < 0]
        return numbers

    def words(self):
        """The words in the order of their numbers. → list of bytes; in place of those that are too long b""."""
        raw = self.keys.view(np.uint8)
        is_word = raw != FILLER
        is_word[:, 1:] |= is_word[:, :-1]  # and the first FILLER behind
        is_word[:, 0] = True
        return raw[is_word].tobytes().split(bytes([FILLER]))[:-1]

def with_fillers(words):
    """Words as one text, with FILLER before each and behind the last. list of bytes → uint8 (text)."""
    return np.frombuffer(bytes([FILLER]).join([b"", *words, b""]), np.uint8)

def join_words(text, starts, lengths):
    """Some words of a text as `with_fillers` joins them. → uint8 (text)"""
    joined = np.frombuffer(text, np.uint8).take(ranges(starts - 1, lengths + 1), mode="clip")
    joined[np.cumsum(lengths + 1) - lengths - 1] = FILLER
    return np.append(joined, np.uint8(FILLER))

def cut_words(text, starts, lengths, which):
    """The bytes of some words. → list"""
    begins = starts[which]
    return [text[begin:end] for begin, end in zip(begins.tolist(), (begins + lengths[which]).tolist())]

# ---- The tokenizer ----

@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What tokenizer.json says. `tokens`: the bytes of each id. `special_tokens`: {text: id}, never split; those of
    `text_tokens` are text all the same, as runs of blanks may be.

    `merges`: int64 (merges, 3), the ids of left, right and what they make, the merge to do first in the first row.
    `split`: how text is split into words, a name in SPLIT_PATTERNS. `whole_words`: a word that is a token needs no
    merges.
    """

    tokens: list
    special_tokens: dict
    merges: np.ndarray
    split: str = "gpt2"
    whole_words: bool = False
    text_tokens: frozenset = frozenset()

    @property
    def vocab_size(self):
        return len(self.tokens)

    @property
    def dtype(self):
        """The smallest type that holds every id: uint16 or uint32, little-endian."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

END_OF_TEXT = "<|endoftext|>"
NO_MERGE = np.iinfo(np.int32).max

def are_same(a, b):
    """Whether two tokenizers mean the same, in whatever words their files say it."""
    same = lambda name: getattr(a, name) == getattr(b, name)
    return np.array_equal(a.merges, b.merges) and all(map(same, ("tokens", "special_tokens", "split", "whole_words")))

def alternatives(longest_first, depth=4):
    """The pattern of one of these byte strings: by its first bytes, as `re` tries one alternative after the other."""
    if depth == 0 or len(longest_first) < 8:
        return b"|".join(map(re.escape, longest_first))
    groups = {}
    for token in longest_first:
        groups.setdefault(token[:1], []).append(token[1:])
    # The empty one last, as it is the shortest.
    return b"|".join(re.escape(first) + b"(?:" + alternatives(rest, depth - 1) + b")"
                     for first, rest in sorted(groups.items(), reverse=True))

def compile_special_pattern(special_tokens):
    """The pattern of special tokens in bytes, of the longest where several begin; None where there are none."""
    longest_first = sorted((token.encode() for token in special_tokens), key=len, reverse=True)
    return re.compile(alternatives(longest_first)) if longest_first else None

def find_spans(special_pattern, text):
    """Where special tokens stand. → [(start, end)]"""
    return [match.span() for match in special_pattern.finditer(text)] if special_pattern else []

def sorted_set(numbers):
    """`np.unique`, which in NumPy 2.4 hashes: 3 to 130 times as fast for 1,000 to a million numbers."""
    numbers = np.sort(numbers)
    return numbers[np.append(True, numbers[1:] != numbers[:-1])[:len(numbers)]]

def matches(values, keys):
    """All (i, j) with values[i] == keys[j], for sorted keys, in the order of i. → int64 (matches), int64 (matches)."""
    begins, ends = np.searchsorted(keys, values), np.searchsorted(keys, values, "right")
    counts = ends - begins
    if counts.sum() > MOST_PAIRS:
        raise InputError(f"the merges of this tokenizer have {counts.sum():,} pairs of parts; expected {MOST_PAIRS:,} "
                         "at most, more than any has that was trained on text; use another tokenizer")
    i = np.repeat(np.arange(len(values)), counts)
    return i, np.arange(len(i)) + (ends - np.cumsum(counts))[i]

def parts_of(made, part, vocab_size):
    """What each token begins with, or ends with: itself, that part of it, that part of the part, and so on.

    made, part: int64 (merges), the token that each makes and the part of it on that side
    → token, part int64 (pairs), sorted by token
    """
    order = np.argsort(made)
    made, part = made[order], part[order]
    found = [np.arange(vocab_size) << 32 | np.arange(vocab_size)]  # a token and its part as one number
    while len(found[-1]):
        i, j = matches(found[-1] & 0xFFFFFFFF, made)
        found.append(sorted_set(found[-1][i] >> 32 << 32 | part[j]))
    found = sorted_set(np.concatenate(found))
    return found >> 32, found & 0xFFFFFFFF

class Pairs:
    """What can become of two ids that stand side by side: pairs that a token can stand across have a number.

    If a merge joins the two, that is its rank. Behind the ranks come pairs that only longer tokens can be joined
    across: a merge joins X, which ends with the first id, and Y, which begins with the second (`parts_of`). The number
    of all other pairs is `none`: what stands on their two sides is merged on its own. Of an id and one that is not
    known yet it is `open`, and `gone` is what a place has whose id was joined to the one before.

    By number, `from_left` is the lowest rank of all merges that could take the second id away to the left, (X, second),
    and `from_right` of those that could take the first to the right, (first, Y).

    Numbers are found in a hash table with linear probing, a quarter full at most.
    """

    EMPTY = np.uint64(2**64 - 1)  # the key of ids -1 and -1, which nothing joins

    def __init__(self, merges, vocab_size):
        first, second, made = merges.T
        (ending, end), (beginning, begin) = parts_of(made, second, vocab_size), parts_of(made, first, vocab_size)
        rank, j = matches(first, ending)
        i, k = matches(second[rank], beginning)
        rank, left, right = rank[i], end[j[i]], begin[k]
        joined = self.keys_of(first, second)
        across = sorted_set(self.keys_of(left, right))
        keys = np.concatenate((joined, np.setdiff1d(across, joined, assume_unique=True)))
        self.none, self.open, self.gone = len(keys) + np.arange(3, dtype=np.int32)
        self.fill(keys)

        number = self.find(left, right)
        self.from_left, self.from_right = np.full((2, len(keys) + 2), NO_MERGE, np.int32)
        for lowest, is_whole in (self.from_left, right == second[rank]), (self.from_right, left == first[rank]):
            np.minimum.at(lowest, number[is_whole], rank[is_whole])
        last_made = np.full(vocab_size, -1)
        np.maximum.at(last_made, made, np.arange(len(merges)))
        if not (np.maximum(last_made[first], last_made[second]) < np.arange(len(merges))).all():
            # Some merge comes before one that makes a part of it, as in no tokenizer that was trained: order is all.
            self.from_left[:] = -1
        self.from_left[self.open] = self.from_right[self.open] = -1

    def fill(self, keys):
        """Make the table, in which each key has its place among `keys` as its number."""
        size = 1 << (4 * len(keys) + 1).bit_length()
        self.keys, self.numbers = np.full(size, self.EMPTY), np.full(size, self.none, np.int32)
        pending, slots = np.arange(len(keys)), self.first_slot(keys)
        while len(pending):
            at, key = slots[pending], keys[pending]
            is_free = self.keys[at] == self.EMPTY
            self.keys[at[is_free]] = key[is_free]  # where several want a slot one has it, and the others go on
            pending = pending[self.keys[at] != key]
            slots[pending] = slots[pending] + 1 & size - 1
        self.numbers[slots] = np.arange(len(keys))
        self.key_view, self.number_view = memoryview(self.keys), memoryview(self.numbers)  # read faster one by one

    @staticmethod
    def keys_of(left, right):
        return left.astype(np.uint64) << np.uint64(32) | right.astype(np.uint32)

    def first_slot(self, keys):
        return (keys * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(65 - len(self.keys).bit_length())).view(np.int64)

    def find(self, left, right):
        """The number of each pair. ids (pairs) twice → int32 (pairs)."""
        keys = self.keys_of(left, right)
        slots = self.first_slot(keys)
        numbers, stored = self.numbers.take(slots), self.keys.take(slots)
        pending = np.flatnonzero((stored != keys) & (stored != self.EMPTY))
        while len(pending):
            slots[pending] = at = slots[pending] + 1 & len(self.keys) - 1
            numbers[pending], stored = self.numbers[at], self.keys[at]
            pending = pending[(stored != keys[pending]) & (stored != self.EMPTY)]
        return numbers

    def find_one(self, left, right):
        """`find` for one pair of ids."""
        key = left << 32 | right & 0xFFFFFFFF
        slot = (key * 0x9E3779B97F4A7C15 & 2**64 - 1) >> 65 - len(self.keys).bit_length()
        while (stored := self.key_view[slot]) != key:
            if stored == 2**64 - 1:
                return self.none
            slot = slot + 1 & len(self.keys) - 1
        return self.number_view[slot]

class Merger:
    """A tokenizer's merges, applied to many words at once.

    Words are joined to one text, with FILLER, whose id is -1, before each of them and behind the last.
    """

    BATCH = 1 << 17  # bytes of words merged at once
    FEW = 64  # merges that are not worth a pass over all of a batch: they are made one by one

    def __init__(self, tokenizer):
        id_of = {token: i for i, token in enumerate(tokenizer.tokens) if len(token) == 1}
        self.byte_ids = np.array([id_of.get(bytes([b]), -1) for b in range(256)], np.int32)  # -1: there is none
        self.byte_ids[FILLER] = -1
        self.made = tokenizer.merges[:, 2].astype(np.int32)
        self.lengths = np.array([len(token) for token in tokenizer.tokens])
        self.longest = self.lengths.max()
        self.pairs = Pairs(tokenizer.merges, tokenizer.vocab_size)
        self.byte_pairs = self.pairs.find(self.byte_ids.repeat(256), np.tile(self.byte_ids, 256))

    def merge_words(self, text):
        """Apply the merges to words. uint8 (text) → ids of all in a row, int64 (words) how many each has.

        Raises InputError for a byte that has no token.
        """
        fillers = np.flatnonzero(text == FILLER)
        block = fillers // self.BATCH
        begins = (np.diff(block[:-1], prepend=-1) > 0) | (np.diff(block) > 1)  # a word over several blocks is alone
        cuts = np.append(fillers[:-1].compress(begins), fillers[-1])
        ids = np.concatenate([self.merge_part(text[begin:end + 1]) for begin, end in itertools.pairwise(cuts)] + [[-1]])
        return ids.take(np.flatnonzero(ids >= 0)), np.diff(np.flatnonzero(ids < 0)) - 1

    def merge_part(self, text):
        """Apply the merges to words that fit in a batch, or to one that does not. uint8 (text) → ids, -1 before each
        word's."""
        if len(text) > 2 * self.BATCH:
            return np.append(np.int32(-1), self.merge_long(text[1:-1].tobytes()))
        return self.merge_rest(*self.merge_sure(text, self.pairs.none))[:-1]

    def merge_front(self, word):
        """The ids that a word begins with however it goes on, and the number of their bytes. word: its first bytes."""
        ids, numbers = self.merge_sure(np.frombuffer(bytes([FILLER]) + word, np.uint8), self.pairs.open)
        ids, numbers = ids[1:], numbers[1:]
        ends = np.flatnonzero(numbers == self.pairs.none) + 1
        places = np.cumsum(self.lengths.take(ids)).take(ends - 1)
        is_between = np.frombuffer(word, np.uint8).take(places) & 0xC0 != 0x80  # and not inside a character
        last = np.flatnonzero(is_between)[-1:]
        end, place = int(ends[last].sum()), int(places[last].sum())  # 0 if there is none
        return self.merge_rest(ids[:end], numbers[:end]), place

    def merge_long(self, word):
        """Apply the merges to one word of any length, with no more memory than for a part of it. bytes → ids."""
        found, size = [], PIECE_BYTES
        while len(word) > size:
            ids, done = self.merge_front(word[:size])
            size = PIECE_BYTES if done else 2 * size
            found.append(ids)
            word = word[done:]
        return np.concatenate((*found, self.merge_rest(*self.merge_sure(with_fillers([word]), self.pairs.none))[1:-1]))

    def merge_sure(self, text, last):
        """Make the merges that are sure in a text, in rounds of all that there are, until these are few.

        text: uint8; last: what is known of the pair that its last byte begins, `none` or `open`
        → ids int32 (ids), and of each the number of the pair that it begins, int32 (ids)
        """
        ids = self.byte_ids.take(text)
        if len(missing := text[(ids < 0) & (text != FILLER)]):
            raise InputError(f"the text has the byte {missing[0]:#04x}, for which this tokenizer has no token; remove "
                             "it, or use another tokenizer")
        numbers = np.append(self.byte_pairs.take(text[:-1].astype(np.intp) << 8 | text[1:]), last)
        following, preceding = np.arange(1, len(ids) + 1), np.arange(-1, len(ids) - 1)
        while True:
            places = np.flatnonzero(numbers < len(self.made))
            place = self.find_sure(places, numbers, following, preceding)
            if 16 * len(place) < len(places):
                place = max(place, self.find_lowest(places, numbers), key=len)
            if len(place) < self.FEW:
                left = np.flatnonzero(numbers != self.pairs.gone)
                return ids.take(left), numbers.take(left)
            made, second = self.made.take(numbers.take(place)), following.take(place)
            after = following.take(second)
            ids[place], numbers[second] = made, self.pairs.gone
            following[place], preceding[after] = after, place
            before = preceding.take(place)
            numbers[before] = self.pairs.find(ids.take(before), made)
            numbers[place] = self.pairs.find(made, ids.take(after))

    def find_sure(self, places, numbers, following, preceding):
        """Those of the places where pairs stand that are joined whatever else is, by what is next to them.

        As long as a pair waits, only merges of lower ranks are made, or of the same rank further left. One of these may
        take away one of its two ids: may join the first to an X, which ends with the id that now stands before it, or
        the second to a Y, which begins with the one behind. If all that do so have higher ranks, the pair can as well
        be joined now, as what needs the token that it makes has a higher rank too.
        """
        rank, before = numbers.take(places), numbers.take(preceding.take(places))
        from_left = rank < self.pairs.from_left.take(before)
        from_right = rank <= self.pairs.from_right.take(numbers.take(following.take(places)))
        starts = before != rank
        if not starts.all():  # in x x x x every other pair is joined; what is behind changes a token's length at most
            rows = np.flatnonzero(~starts | ~np.append(starts[1:], True))
            begins, order = np.flatnonzero(starts.take(rows)), np.arange(len(rows))
            counts = np.diff(begins, append=len(rows))
            first = np.repeat(begins, counts)
            from_left[rows] = from_left.take(rows.take(first)) & (order - first & 1 == 0)
            from_right[rows] |= np.repeat(begins + counts, counts) - order > self.longest
        return places.compress(from_left & from_right)

    def find_lowest(self, places, numbers):
        """The place of the pair to join first, in each row of ids that is merged on its own and whose end is known."""
        ends = np.flatnonzero(numbers == self.pairs.none)
        places = places[places < ends[-1]]
        begins = np.flatnonzero(np.diff(np.searchsorted(ends, places), prepend=-1))
        ranked = numbers.take(places).astype(np.int64) * len(numbers) + places
        return np.minimum.reduceat(ranked, begins) % len(numbers)

    def merge_rest(self, ids, numbers):
        """Make the merges that `merge_sure` left, in each row of ids that has some. → ids"""
        ends = np.flatnonzero(numbers == self.pairs.none) + 1
        which = sorted_set(np.searchsorted(ends, np.flatnonzero(numbers < len(self.made)), "right"))
        for begin, end in zip(np.append(0, ends)[which].tolist(), ends[which].tolist()):
            merged = self.merge_one_by_one(ids[begin:end].tolist())
            ids[begin:end] = merged + [-2] * (end - begin - len(merged))
        return ids.take(np.flatnonzero(ids > -2))

    def merge_one_by_one(self, ids):
        """Apply the merges to a row of ids, in O(n log n): a heap of merges over a linked list of ids. list → list."""
        ids, find, num_merges = ids + [-1], self.pairs.find_one, len(self.made)
        following, preceding = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        heap = [(rank, i) for i in range(len(ids) - 1) if (rank := find(ids[i], ids[i + 1])) < num_merges]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            if ids[i] < 0 or find(ids[i], ids[following[i]]) != rank:
                continue  # one of the two has been merged otherwise since
            second = following[i]
            ids[i], ids[second] = int(self.made[rank]), -2
            following[i] = after = following[second]
            preceding[after] = i
            for k in (preceding[i], i):
                if k >= 0 and (rank := find(ids[k], ids[following[k]])) < num_merges:
                    heapq.heappush(heap, (rank, k))
        return [i for i in ids if i >= 0]

class Encoder:
    """A tokenizer at work. It remembers the ids of words, until there are too many.

    A word that is shorter than a key has a slot in a table, one of some side by side; a longer one is in `long_words`.
    Behind the numbers of the slots come those of long words, and of words that found no slot. By number, `first` and
    `count` say where in `ids` the tokens of a word stand; `only_id` is the id of a word of one token, -1 for others.
    Keys of 16 bytes do for English; where letters take two bytes or three and many words have more, longer keys are up
    to twice as fast.

    On a core of an AMD EPYC (Zen 4) a byte of English with known words takes 7.5 ns. These are passes that NumPy makes
    one after another: 2.4 to split (0.5 to class bytes, 0.4 to list where words begin), 1.5 for keys (1.1 to copy 16
    bytes from wherever a word begins), 1.3 to find them, 1.3 to spell, the rest to cut and join.
    """

    LEAST_BITS, MOST_BITS = 12, 18  # of the number of a slot
    WAYS = 8  # slots in which a word may stand
    MOST_IDS = 1 << 19  # what is remembered is dropped beyond this, so that memory has a bound

    def __init__(self, tokenizer):
        self.tokenizer, self.merger = tokenizer, Merger(tokenizer)
        self.special_pattern = compile_special_pattern(tokenizer.special_tokens)
        self.id_of_word = {token.encode(): i for token, i in tokenizer.special_tokens.items()}
        if tokenizer.whole_words:
            self.id_of_word |= {token: i for i, token in enumerate(tokenizer.tokens)}
        self.may_be_whole = np.bincount([word[0] for word in self.id_of_word], minlength=256) > 0  # by its first byte
        self.margin = max(map(len, map(str.encode, tokenizer.special_tokens)), default=0) + 8
        self.forget(16, self.LEAST_BITS)

    def forget(self, key_size, bits):
        """Start with no words, with keys of some bytes and 2^bits slots."""
        keys, ids = np.zeros((1 << bits, key_size // 8), np.uint64), np.empty(0, np.int32)  # zeros: empty
        only_id, first, count = np.zeros((3, 1 << bits), np.int32)
        self.key_size, self.bits, self.num_words, self.long_words = key_size, bits, 0, {}
        self.keys, self.ids, self.only_id, self.first, self.count = keys, ids, only_id, first, count

    def make_room(self, num_bytes):
        """Start anew where there are too many words to be remembered, or to come, for the slots or for memory."""
        wanted = (max(4 * self.num_words, num_bytes // 16) - 1).bit_length()
        if wanted > self.bits < self.MOST_BITS or 2 * self.num_words > len(self.keys) or len(self.ids) > self.MOST_IDS:
            self.forget(self.key_size, min(max(wanted, self.bits), self.MOST_BITS))

    def find(self, keys):
        """The slot of each key, or, of those that are not found, the one to take; and which these are. → int64 twice"""
        slots, missing = hash_slots(keys, self.bits), []
        pending = np.flatnonzero(differ(self.keys.take(slots, 0), keys))
        for _ in range(self.WAYS - 1):
            is_empty = self.keys[slots.take(pending), -1] == 0  # the last byte of a key is never 0
            missing.append(pending.compress(is_empty))
            pending = pending.compress(~is_empty)
            slots[pending] = slots.take(pending) + 1 & len(self.keys) - 1
            pending = pending.compress(differ(self.keys.take(slots.take(pending), 0), keys.take(pending, 0)))
        return slots, np.concatenate((*missing, pending))

    def ids_of_words(self, text, starts, lengths):
        """The ids of some words of a text in a row, and of each how many. Special tokens, and if the tokenizer says so
        all words that are tokens, stay whole."""
        whole = np.full(len(starts), -1)
        asked = np.flatnonzero(self.may_be_whole.take(np.frombuffer(text, np.uint8).take(starts)))
        whole[asked] = [self.id_of_word.get(word, -1) for word in cut_words(text, starts, lengths, asked)]
        others = np.flatnonzero(whole < 0)
        ids, counts = self.merger.merge_words(join_words(text, starts.take(others), lengths.take(others)))
        if len(others) == len(whole):
            return ids, counts
        all_counts = np.ones(len(whole), np.int64)
        all_counts[others] = counts
        is_whole = np.repeat(whole >= 0, all_counts)
        all_ids = np.empty(len(is_whole), np.int32)
        all_ids[is_whole], all_ids[~is_whole] = whole[whole >= 0], ids
        return all_ids, all_counts

    def encode(self, text):
        """The ids of a text. bytes of UTF-8 → tokenizer.dtype (tokens)."""
        self.make_room(len(text))
        pieces = cut_text(text, PIECE_BYTES, self.tokenizer.special_tokens, self.tokenizer.split)
        ids = [np.empty(0, self.tokenizer.dtype)]
        while some := list(itertools.islice(pieces, 8 if self.num_words else 1)):
            ids.append(self.encode_words((piece, self.word_starts(piece)) for piece in some))
        return np.concatenate(ids)

    def word_starts(self, text):
        """`word_starts`, with this tokenizer's special tokens and pattern."""
        return word_starts(text, find_spans(self.special_pattern, text), self.tokenizer.split)

    def encode_words(self, pieces):
        """The ids of pieces of text, each with where its words begin. → tokenizer.dtype (tokens)."""
        text, found, unknown, num_longer = b"", [], [], 0
        for piece, starts in pieces:
            lengths = np.diff(starts, append=len(piece))
            keys = word_keys(piece, starts, lengths, self.key_size)
            numbers, missing = self.find(keys)
            long = np.flatnonzero(lengths >= self.key_size)
            num_longer += lengths.take(long).sum(where=lengths.take(long) < 32)
            if len(long) and self.long_words:
                numbers[long] = [self.long_words.get(word, -1) for word in cut_words(piece, starts, lengths, long)]
                missing = np.setdiff1d(missing, long[numbers[long] >= 0], assume_unique=True)
            found.append((numbers, missing))
            unknown.append((numbers.take(missing), keys.take(missing, 0), starts.take(missing) + len(text),
                            lengths.take(missing)))
            text += piece
        learned = self.learn(text, *map(np.concatenate, zip(*unknown)))
        ids, begin = [], 0
        for numbers, missing in found:
            numbers[missing] = learned[begin:begin + len(missing)]
            begin += len(missing)
            ids.append(self.spell(numbers))
        if 16 * num_longer > len(text):
            self.forget(32, self.bits)
        return np.concatenate(ids)

    def learn(self, text, slots, keys, starts, lengths):
        """Make the ids of words that were not found, and remember them by their numbers: the slots that they want, or
        where that is taken, or the word is long, one behind. → numbers (words)"""
        if not len(slots):
            return slots
        order, owner = np.arange(len(slots)), np.empty(len(self.keys), np.int32)
        owner[slots[::-1]] = order[::-1]  # of words that want the same slot the first has it, which is met most often
        owner = owner.take(slots)
        is_long, is_free = lengths >= self.key_size, self.keys[slots, -1] == 0
        is_owned = is_free & ~is_long & ~differ(keys, keys.take(owner, 0))  # by this word, here or further left
        owners, others = np.flatnonzero(is_owned & (owner == order)), np.flatnonzero(~is_owned)
        slots[others] = len(self.first) + np.arange(len(others))
        made = np.concatenate((owners, others))
        self.remember(slots.take(made), *self.ids_of_words(text, starts.take(made), lengths.take(made)))
        # Only now can they be found, so that Ctrl-C may come at any time.
        self.keys[slots.take(owners)] = keys.take(owners, 0)
        self.num_words += len(owners)
        long = np.flatnonzero(is_long)
        if 8 * lengths.take(long).sum() < len(text):  # where more of a text is long words, few of them repeat
            self.long_words.update(zip(cut_words(text, starts, lengths, long), slots.take(long).tolist()))
        return slots

    def remember(self, numbers, ids, counts):
        """Store the ids of words, `counts` of them each."""
        if (more := numbers.max() + 1 - len(self.first)) > 0:
            self.only_id, self.first, self.count = np.pad((self.only_id, self.first, self.count), ((0, 0), (0, more)))
        first = np.cumsum(counts) - counts
        self.only_id[numbers] = np.where(counts == 1, ids.take(first), -1)
        self.first[numbers], self.count[numbers] = len(self.ids) + first, counts
        self.ids = np.concatenate((self.ids, ids), dtype=np.int32)

    def spell(self, numbers):
        """The ids of words, by their numbers. → tokenizer.dtype (tokens)."""
        heads = self.only_id.take(numbers)  # right for words of one token, which nearly all are
        several = np.flatnonzero(heads < 0)
        if not len(several):
            return heads.astype(self.tokenizer.dtype)
        numbers = numbers.take(several)
        first, count = self.first.take(numbers), self.count.take(numbers)
        ends = np.ones(len(heads), np.int64)
        ends[several] = count
        np.cumsum(ends, out=ends)
        ids = np.empty(ends[-1], self.tokenizer.dtype)
        ids[ends - 1] = heads.astype(ids.dtype)
        ids[ranges(ends.take(several) - count, count)] = self.ids.take(ranges(first, count))
        return ids

    def encode_endless(self, blocks):
        """The ids of a text in blocks cut between characters, with words longer than can be held; yields arrays."""
        rest, is_inside, enough = b"", False, 0  # `is_inside`: the ids of the first word's beginning have been given
        for block in blocks:
            rest += block
            if len(rest) < enough:
                continue
            starts = self.word_starts(rest)
            # What follows may still change the last two words, unless one goes on for long, and white space at the end
            # however long it is.
            is_space = rest[-4:].decode(errors="ignore")[-1:].isspace()  # its last character
            goes_on = len(rest) - starts[-1] > LONG_WORD + self.margin and not is_space
            cut, before = starts[-1], len(rest)
            if not goes_on:
                cut = starts[:-1][starts[:-1] <= len(rest) - self.margin].max(initial=0)
            if cut:
                yield self.encode_rest(rest, starts, cut, is_inside)
                rest, is_inside = rest[cut:], False
            if goes_on:
                # Two characters or more stay, so that what is left of the word is split as all of it would be.
                ids, done = self.merger.merge_front(rest[:-self.margin])
                yield ids.astype(self.tokenizer.dtype)
                rest, is_inside = rest[done:], is_inside or done > 0
            enough = 2 * len(rest) if len(rest) == before else 0
        yield self.encode_rest(rest, self.word_starts(rest), len(rest), is_inside)

    def encode_rest(self, text, starts, cut, is_inside):
        """The ids of the words that begin at `starts` before `cut`; the first may have begun before the text."""
        begin = np.append(starts, len(text))[int(is_inside)]
        first = self.merger.merge_long(text[:begin]).astype(self.tokenizer.dtype)
        here, starts = text[begin:cut], starts[(starts >= begin) & (starts < cut)] - begin
        self.make_room(len(here))
        return np.concatenate((first, self.encode_words([(here, starts)])))

OF_THREAD = threading.local()

def encoder(tokenizer):
    """A tokenizer's Encoder, which keeps what it has met from call to call; each thread has its own, as they change."""
    if not hasattr(OF_THREAD, "encoder"):
        OF_THREAD.encoder = lru_cache(maxsize=4)(Encoder)
    return OF_THREAD.encoder(tokenizer)

def encode(tokenizer, text):
    """The ids of a text. str → tokenizer.dtype (tokens). Raises InputError for lone surrogates."""
    try:
        text, found = text.encode(), [np.empty(0, tokenizer.dtype)]
    except UnicodeEncodeError as error:
        raise InputError(f"the text has half a surrogate pair at character {error.start}, which UTF-8 can't hold; "
                         "remove it") from None
    for chunk in cut_text(text, CHUNK_BYTES, tokenizer.special_tokens, tokenizer.split):
        if len(chunk) <= MOST_BYTES:
            found.append(encoder(tokenizer).encode(chunk))
        else:
            read = lambda start, end: chunk[start:end]
            found += encoder(tokenizer).encode_endless(read(*block) for block in cut_blocks(read, 0, len(chunk)))
    return np.concatenate(found)

def decode(tokenizer, ids):
    """The text of ids; what isn't valid UTF-8 becomes U+FFFD. Raises InputError for an id beyond the vocabulary."""
    ids = np.asarray(ids, np.int64).tolist()
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise InputError(f"ids go from {min(ids)} to {max(ids)}; expected 0 to {tokenizer.vocab_size - 1}")
    return b"".join(tokenizer.tokens[i] for i in ids).decode("utf-8", "replace")

# ---- Files, in pieces, over processes ----

def borders(text, split):
    """Where a split pattern ends a word, whatever stands around it; yields places in a window of text.

    It does behind letters and behind numbers, before white space that is no new line, and behind one that is alone.
    text: bytes that may begin and end within a character; places are wrong then among the first 8 and the last 4.
    """
    characters = text.decode(errors="surrogateescape")  # what isn't UTF-8 has the class of U+FFFD, which replaces it
    code_points = np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), "<u4")
    classes = class_of_code_points()[code_points]
    before, after = classes[:-1], classes[1:]
    is_newline = (code_points == ord("\n")) | (code_points == ord("\r"))
    ends = (before <= NUMBER) & ((before != after) | ((before == NUMBER) & (split == "digits")))
    ends |= (before < SPACE) & (after == SPACE) & ~is_newline[1:]
    ends[1:] |= (before[:-1] < SPACE) & is_newline[1:-1] & (after[1:] < SPACE)
    for i in np.flatnonzero(ends).tolist():
        yield len(characters[:i + 1].encode(errors="surrogateescape"))

def find_cut(read, target, end, special_tokens, split):
    """The first place from `target` on where text can be cut without changing its words, or `end`.

    read(start, end): bytes of the text, or fewer at its end.
    """
    special = list(map(str.encode, special_tokens))
    pattern, margin, window = compile_special_pattern(special_tokens), max(map(len, special), default=0) + 8, 64
    while target < end:
        start, stop = max(0, target - margin), min(target + window, end)
        text = read(start, min(stop + margin, end))
        for place in sorted({*borders(text, split), *(begin for begin, _ in find_spans(pattern, text))}):
            is_inside = lambda token: token in text[max(0, place - len(token) + 1):place + len(token) - 1]
            if target <= start + place < stop and not any(map(is_inside, special)):
                return start + place
        target, window = stop, min(4 * window, 1 << 16)
    return end

def cut_text(text, size, special_tokens, split):
    """Cut text into pieces of about `size` bytes, between words; yields bytes."""
    position = 0
    while position < len(text):
        cut = find_cut(lambda start, end: text[start:end], position + size, len(text), special_tokens, split)
        yield text[position:cut]
        position = cut

def cut_blocks(read, start, end):
    """Cut text into blocks of about PIECE_BYTES between characters, for words without end; yields (start, end)."""
    while start < end:
        stop = min(start + PIECE_BYTES, end)
        if stop < end:
            stop -= next((i for i, byte in enumerate(read(stop - 3, stop + 1)[::-1]) if byte & 0xC0 != 0x80), 0)
        yield start, stop
        start = stop

def as_span(path):
    """(path, start, end): a part of a file, in bytes. A path alone is the whole file, behind its byte order mark."""
    if isinstance(path, tuple):
        return path
    try:
        with open(path, "rb") as file:
            mark = file.read(len(codecs.BOM_UTF8))
        size = os.path.getsize(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a text file") from None
    if mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Windows calls "Unicode"
        raise InputError(f"{path} is UTF-16; save it as UTF-8")
    return str(path), len(mark) if mark == codecs.BOM_UTF8 else 0, size

def reader(file):
    """read(start, end) of an open file."""
    def read(start, end):
        file.seek(start)
        return file.read(end - start)
    return read

def cut_spans(paths, special_tokens, split):
    """Cut files, or parts of them, into pieces of about CHUNK_BYTES, between words; yields (path, start, end)."""
    for path, start, end in map(as_span, paths):
        with open(path, "rb") as file:
            while start < end:
                cut = find_cut(reader(file), start + CHUNK_BYTES, end, special_tokens, split)
                yield path, start, cut
                start = cut

def read_span(span, errors="strict"):
    """The bytes of a span, valid UTF-8. Raises InputError with file and offset where they are not, or replaces them."""
    path, start, end = span
    with open(path, "rb") as file:
        text = reader(file)(start, end)
    if len(text) < end - start:
        raise InputError(f"{path} became shorter while it was read; wait until it is whole, and start again")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if errors == "replace":
            return text.decode(errors="replace").encode()
        raise InputError(f"{path} is not valid UTF-8 at byte {start + error.start:,}; convert it to UTF-8, or let "
                         "data/prepare.py --errors=replace put U+FFFD there") from None
    return text

def num_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

def spread(make, arguments, spans, workers, label):
    """Yield make(*arguments)(span) for each span, in order, over `workers` processes (None: all cores), with progress.

    Each process makes that function once. Little text, or one worker, starts no process.
    """
    workers, done = min(workers or num_cores(), len(spans)), 0
    progress = Progress(label, sum(end - start for _, start, end in spans))
    if workers > 1 and not multiprocessing.current_process().daemon:  # which may have none of its own
        results = over_processes(make, arguments, spans, workers)
    else:
        results = (work(span) for work in [make(*arguments)] for span in spans)
    with contextlib.closing(results), contextlib.closing(progress):
        for (_, start, end), result in zip(spans, results):
            done += end - start
            progress.update(done)
            yield result

def over_processes(make, arguments, spans, workers):
    """`spread` over processes. Raises InputError where one of them dies.

    Each has a pipe of its own and nothing is shared: what a lock or a thread of a Pool waits for when a process dies,
    or when Ctrl-C comes while processes are made, may never come.
    """
    processes, pipes, results, num_sent = [], [], {}, 0
    try:
        for _ in range(workers):
            start_process(processes, pipes, make, arguments)
        idle = pipes[:]
        for number in range(len(spans)):
            try:
                while True:
                    while idle and num_sent < min(len(spans), number + MOST_RESULTS * workers):
                        idle.pop().send((num_sent, spans[num_sent]))
                        num_sent += 1
                    if number in results:
                        break
                    for pipe in connection.wait(pipes):
                        finished, results[finished] = pipe.recv()
                        idle.append(pipe)
            except (EOFError, ConnectionError):
                raise InputError("a process that read the text has died: it printed why, or memory ran out, and then "
                                 "data/prepare.py needs fewer --workers") from None
            if isinstance(results[number], Exception):
                raise results[number]
            yield results.pop(number)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

def start_process(processes, pipes, make, arguments):
    """Start one more process for `over_processes`, and add it and the pipe to it."""
    # A process that is not a copy runs the user's script again, up to its if __name__ == "__main__": if it has one.
    is_free = sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) in UNCHOSEN
    context = multiprocessing.get_context("fork" if is_free else None)
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, ours, make, arguments), daemon=True)
    # Ctrl-C reaches each process of a terminal. One that begins with it blocked never shows it.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        process.start()
        processes.append(process)
        pipes.append(ours)
    except OSError as error:  # the system allows no more
        raise InputError(f"no more than {len(processes)} processes can begin ({error.strerror}); give data/prepare.py "
                         f"--workers={max(1, len(processes) // 2)}") from None
    finally:
        theirs.close()  # so that a process that dies leaves no end open, and reading ours fails
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

def serve(pipe, end_of_caller, make, arguments):
    """What a process of `spread` does with each (number, span) of its pipe, until its caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where nothing can be blocked; the caller ends this process
    end_of_caller.close()
    work = make(*arguments)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number, span = pipe.recv()
            try:
                result = work(span)
            except Exception as error:
                result = ExceptionWithTraceback(error, error.__traceback__)
            pipe.send((number, result))

def word_counter(special_tokens, errors):
    """A function that counts the words of a span → keys (words, 2), int64 (words), {long word: count}."""
    table, special_pattern = HashTable(), compile_special_pattern(special_tokens)

    def count_words(span):
        nonlocal table
        if len(table) > MOST_WORDS:
            table = HashTable()
        numbers, long_words = [], Counter()
        for piece in cut_text(read_span(span, errors), PIECE_BYTES, special_tokens, "gpt2"):
            starts = word_starts(piece, find_spans(special_pattern, piece))
            lengths = np.diff(starts, append=len(piece))
            numbers.append(table.find_or_add(word_keys(piece, starts, lengths)))
            long_words.update(cut_words(piece, starts, lengths, lengths >= table.KEY_SIZE))
        counts = np.bincount(np.concatenate(numbers))
        met = np.flatnonzero(counts)
        return table.keys[met], counts[met], long_words

    return count_words

def span_encoder(tokenizer, errors):
    """A function that gives the ids of a span, or None if it is too long to be held, or to be sent to the caller."""
    encode = encoder(tokenizer).encode
    return lambda span: encode(read_span(span, errors)) if span[2] - span[1] <= MOST_BYTES else None

def encode_long_span(tokenizer, span, errors):
    """The ids of a span with a word without end; yields arrays."""
    path, start, end = span
    with open(path, "rb") as file:
        blocks = cut_blocks(reader(file), start, end)
        yield from encoder(tokenizer).encode_endless(read_span((path, *block), errors) for block in blocks)

def encode_pieces(tokenizer, paths, workers=None, errors="strict"):
    """Encode files, or spans (path, start, end) of them; yields (path, ids) piece by piece, in order."""
    spans = list(cut_spans(paths, tokenizer.special_tokens, tokenizer.split))
    for span, ids in zip(spans, spread(span_encoder, (tokenizer, errors), spans, workers, "encoding")):
        for piece in [ids] if ids is not None else encode_long_span(tokenizer, span, errors):
            yield span[0], piece

# ---- Training ----

def count_corpus(paths, special_tokens, workers, errors):
    """Count the words of files, special tokens left out. → [word], int64 (words)."""
    spans = list(cut_spans(paths, special_tokens, "gpt2"))
    table, counts, long_words = HashTable(), np.zeros(0, np.int64), Counter()
    counted = spread(word_counter, (special_tokens, errors), spans, workers, "counting words")
    for keys, key_counts, long_word_counts in counted:
        numbers = table.find_or_add(keys)
        if len(table) > len(counts):
            counts = np.pad(counts, (0, len(table)))  # twice as many as need be, so that they are seldom copied
        counts[numbers] += key_counts
        long_words.update(long_word_counts)
    words = table.words() + list(long_words)
    counts = np.concatenate((counts[:len(table)], np.fromiter(long_words.values(), np.int64, len(long_words))))
    not_words = {token.encode() for token in special_tokens} | {b""}  # what the key of long words spells
    keep = [len(word) > 1 and word not in not_words for word in words]
    return list(itertools.compress(words, keep)), counts[np.array(keep, bool)]

def sort_key(token):
    """A string that sorts the other way round than `token`: the greatest first, the longer before its beginning."""
    return token.translate(bytes(range(255, -1, -1))).decode("latin-1") + "\u0100"

def sum_by_pair(left, right, weights, places):
    """Sum weights by pair of ids. → lists: pairs of tokens (ids < 0 are none), their sums, their places in order."""
    pairs = left.astype(np.int64) << 32 | right
    order = np.argsort(pairs, kind="stable")
    order = order[np.minimum(left, right)[order] >= 0]
    pairs, places = pairs[order], places[order]
    begins = np.flatnonzero(np.diff(pairs, prepend=-1))
    sums = np.add.reduceat(weights[order], begins)
    ends = [*begins[1:].tolist(), len(pairs)]
    return pairs[begins].tolist(), sums.tolist(), [places[begin:end] for begin, end in zip(begins.tolist(), ends)]

def unpack(pair):
    """The two ids of a pair, which is one number, left · 2³² + right: hundreds of thousands are kept."""
    return pair >> 32, pair & 0xFFFFFFFF

class LinkedWords:
    """Words as they are merged: the ids of all in one array, -1 between words and -2 where a token was joined to the
    one before it; `following` and `preceding` are the places of the neighbours, `weight` the count of the word.
    """

    MANY = 64  # places from which on whole arrays beat going from one to the next

    def __init__(self, words, counts):
        lengths = np.array([len(word) for word in words], np.int64)
        if lengths.sum() + len(words) >= 1 << 31:  # as places are int32
            raise InputError(f"the text has {len(words):,} different words of {lengths.sum():,} bytes, and 2 GB can be "
                             "learned from; prepare a part of it, and then all with --tokenizer=data/PART")
        inside = np.arange(lengths.sum()) + np.repeat(np.arange(1, len(words) + 1), lengths)  # a -1 before each word
        self.ids = np.full(lengths.sum() + len(words) + 1, -1, np.int32)
        self.weight = np.zeros(len(self.ids), np.int64)
        self.ids[inside] = np.frombuffer(b"".join(words), np.uint8)
        self.weight[inside] = np.repeat(counts, lengths)
        self.following = np.arange(1, len(self.ids) + 1, dtype=np.int32)
        self.preceding = np.arange(-1, len(self.ids) - 1, dtype=np.int32)
        # Single numbers are read and written faster through a memoryview than in an array.
        self.views = tuple(map(memoryview, (self.ids, self.weight, self.following, self.preceding)))

    def pairs(self):
        """All pairs of neighbours, their counts, their places."""
        return sum_by_pair(self.ids[:-1], self.ids[1:], self.weight[:-1], np.arange(len(self.ids) - 1, dtype=np.int32))

    def join(self, pair, made, places):
        """Make `made` of a pair wherever it still stands in `places`. → lists: pairs lost and their counts, and pairs
        found, their counts, their places."""
        return (self.join_many if len(places) >= self.MANY else self.join_few)(*unpack(pair), made, places)

    def join_few(self, left, right, made, places):
        ids, weight, following, preceding = self.views
        lost, lost_counts, found, joined = [], [], {}, []
        for place in places.tolist():
            second = following[place]
            if ids[place] != left or ids[second] != right:
                continue  # one of the two has been joined otherwise since
            after = following[second]
            lost += ids[preceding[place]] << 32 | left, right << 32 | ids[after]
            lost_counts += weight[place], weight[place]
            ids[place], ids[second] = made, -2
            following[place], preceding[after] = after, place
            joined.append(place)
        for place in joined:
            before, after = preceding[place], following[place]
            if ids[before] >= 0:
                found.setdefault(ids[before] << 32 | made, []).append(before)
            if ids[after] >= 0 and ids[after] != made:  # of two made side by side the second finds their pair
                found.setdefault(made << 32 | ids[after], []).append(place)
        counts = [sum([weight[place] for place in at]) for at in found.values()]
        return lost, lost_counts, list(found), counts, [array("i", at) for at in found.values()]

    def join_many(self, left, right, made, places):
        ids, weight, following, preceding = self.ids, self.weight, self.following, self.preceding
        at = places[(ids[places] == left) & (ids[following[places]] == right)]
        if left == right:  # of overlapping pairs, as in aaaa, every other one is joined
            overlaps = np.concatenate(([False], following[at[:-1]] == at[1:]))
            index = np.arange(len(at))
            at = at[(index - np.maximum.accumulate(np.where(overlaps, 0, index))) % 2 == 0]
        second, weights = following[at], weight[at]
        after = following[second]
        old = ids[preceding[at]], ids[after]
        ids[at], ids[second] = made, -2
        following[at], preceding[after] = after, at
        before = preceding[at]
        alone = ids[after] != made  # of two made side by side the second loses and finds the pair between them
        weights, places = np.concatenate((weights, weights[alone])), np.concatenate((before, at[alone]))
        lost_left, lost_right = np.full((2, len(places)), ((right,), (left,)), np.int32)
        lost_left[:len(at)], lost_right[len(at):] = old[0], old[1][alone]
        found_left, found_right = np.full((2, len(places)), made, np.int32)
        found_left[:len(at)], found_right[len(at):] = ids[before], ids[after[alone]]
        lost, lost_counts, _ = sum_by_pair(lost_left, lost_right, weights, places)
        return lost, lost_counts, *sum_by_pair(found_left, found_right, weights, places)

def train_merges(words, counts, tokens, num_merges):
    """Learn merges: join the pair with the highest count, of equals the greatest pair of byte strings, again and again.

    Each pair knows the places it was seen at: all of them are found when the later of its two tokens is made, and later
    merges can only take some away; so a merge touches just its own places and their neighbours.
    words: [bytes], counts (words), tokens: [bytes] of the first ids, the 256 bytes leading → [(left id, right id)].
    `tokens` grows by what each merge makes.
    """
    linked = LinkedWords(words, counts)
    count_of, places_of, heap, merges = {}, {}, [], []
    keys = [sort_key(token) for token in tokens]

    def push(pair, count):
        left, right = unpack(pair)
        heapq.heappush(heap, (-count, keys[left], keys[right], pair))

    def add(pair, count, places):
        count_of[pair], places_of[pair] = count, places if len(places) > 1 else places[0]
        push(pair, count)

    for pair, count, places in zip(*linked.pairs()):
        add(pair, count, places)
    progress = Progress("merging", num_merges, "merges", 1)
    while len(merges) < num_merges and heap:
        count, _, _, pair = heapq.heappop(heap)
        now = count_of[pair]
        if now != -count:  # merges since have taken some of its places
            if now > 0:
                push(pair, now)
            continue
        (left, right), made = unpack(pair), len(tokens)
        tokens.append(tokens[left] + tokens[right])
        keys.append(sort_key(tokens[made]))
        merges.append((left, right))
        lost, lost_counts, *found = linked.join(pair, made, np.atleast_1d(places_of.pop(pair)))
        for other, count in zip(lost, lost_counts):
            if other in count_of:
                count_of[other] -= count
        del count_of[pair]
        for other, count, places in zip(*found):
            add(other, count, places)
        progress.update(len(merges))
    progress.close()
    return merges

def train(paths, vocab_size, special_tokens=(END_OF_TEXT,), workers=None, errors="strict"):
    """Learn a tokenizer from text files, or spans (path, start, end) of them: the 256 bytes, special tokens, merges.

    The vocabulary stays smaller where the text has no more pairs to merge. Raises InputError for a vocabulary too
    small for the bytes and the special tokens, for special tokens of less than two bytes or that stand twice, and for
    files that are missing or not UTF-8.
    """
    special_tokens = list(special_tokens)
    if len(set(special_tokens)) < len(special_tokens) or any(len(token.encode()) < 2 for token in special_tokens):
        raise InputError(f"special tokens {special_tokens}: expected different ones of two bytes or more")
    first_made = 256 + len(special_tokens)
    if vocab_size < first_made:
        raise InputError(f"vocab_size is {vocab_size}; expected at least {first_made}: the 256 bytes and "
                         f"{len(special_tokens)} special token(s)")
    tokens = [bytes([b]) for b in range(256)] + [token.encode() for token in special_tokens]
    merges = []
    if vocab_size > first_made:
        merges = train_merges(*count_corpus(paths, special_tokens, workers, errors), tokens, vocab_size - first_made)
    merges = np.array([(*pair, first_made + i) for i, pair in enumerate(merges)], np.int64).reshape(-1, 3)
    return Tokenizer(tokens, {token: 256 + i for i, token in enumerate(special_tokens)}, merges)

# ---- tokenizer.json, as Hugging Face's tokenizers has it ----

def byte_alphabet():
    """GPT-2's printable character for each byte, in which tokenizer.json writes tokens. → 256 characters."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]

def spelled_tokens(tokenizer):
    """Each token as others write it: in the alphabet of bytes, a special one as it is."""
    alphabet, special = byte_alphabet(), {i: text for text, i in tokenizer.special_tokens.items()}
    return [special.get(i) or "".join(alphabet[b] for b in token) for i, token in enumerate(tokenizer.tokens)]

def save(tokenizer, path):
    """Write tokenizer.json."""
    spelled = spelled_tokens(tokenizer)
    if len(set(spelled)) < len(spelled):
        raise InputError("a special token is spelled like another token in tokenizer.json; rename the special token")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pattern = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERNS[tokenizer.split]}, "behavior": "Isolated",
               "invert": False}
    pre_tokenizer = byte_level if tokenizer.split == "gpt2" else {
        "type": "Sequence", "pretokenizers": [pattern, byte_level | {"use_regex": False}]}
    description = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": text not in tokenizer.text_tokens}
                         for text, i in tokenizer.special_tokens.items()],
        "normalizer": None, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": tokenizer.whole_words,
                  "vocab": {token: i for i, token in enumerate(spelled)},
                  "merges": [[spelled[left], spelled[right]] for left, right, _ in tokenizer.merges.tolist()]},
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(description, file, ensure_ascii=False, indent=1)
        files.flush(file)

def load(path):
    """Read a tokenizer.json of a byte-level BPE with one of our split patterns.

    `path`: the file, or the folder of a model. Raises InputError where it is missing, damaged, or of a kind this
    tokenizer is not, named.
    """
    path = Path(path)
    if path.is_dir() and not (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file():
        raise InputError(f"{path} has a SentencePiece tokenizer, tokenizer.model; expected a byte-level BPE in "
                         "tokenizer.json")
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        return from_description(json.loads(files.read_text(path)))
    except FileNotFoundError:
        latest = files.last_step(path.parent)
        advice = f"give {latest}" if latest else "put the tokenizer.json there that belongs to the model or data"
        raise InputError(f"{path} is missing; {advice}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise InputError(f"{path} can't be used ({reason}); expected a byte-level BPE tokenizer.json") from None

def from_description(description):
    """The tokenizer that a parsed tokenizer.json describes. Raises ValueError or the like where it can't be."""
    model, steps = description["model"], description.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kind = model.get("type", "BPE")
    if kind == "Unigram" or model.get("byte_fallback") or any(step.get("type") == "Metaspace" for step in steps):
        raise ValueError("it is a SentencePiece tokenizer")
    if kind != "BPE":
        raise ValueError(f"its model is {kind}")
    split = split_of(steps)
    options = {"normalizer": description.get("normalizer"), "add_prefix_space": steps[-1].get("add_prefix_space"),
               "dropout": model.get("dropout"), "continuing_subword_prefix": model.get("continuing_subword_prefix"),
               "end_of_word_suffix": model.get("end_of_word_suffix")}
    for option, value in options.items():
        if value:
            raise ValueError(f"it asks for {option}, which this tokenizer has not")
    added = description.get("added_tokens", [])
    for option in ("lstrip", "rstrip", "single_word"):
        for token in added:
            if token.get(option):
                raise ValueError(f"its token {token['content']} asks for {option}, which this tokenizer has not")
    special = {token["content"]: token["id"] for token in added}
    first = sorted(token["content"] for token in added if not token.get("normalized"))
    sizes, is_first = set(map(len, first)), set(first).__contains__
    for text in special.keys() - set(first):
        for i in range(len(text)):
            rest, next_one = text[i:], bisect.bisect_left(first, text[i:])  # that begins with the rest, if any does
            others = [rest[:size] for size in sizes if is_first(rest[:size])]
            others += [other for other in first[next_one:next_one + 1] if i and other.startswith(rest)]
            if others:
                raise ValueError(f"its token {text} overlaps with {others[0]}, which, as it is not normalized, goes "
                                 "before wherever it stands")
    vocab = model["vocab"] | special
    size = len(vocab)
    if sorted(vocab.values()) != list(range(size)):
        raise ValueError("its ids are not 0, 1, 2 …")
    byte_of = {char: b for b, char in enumerate(byte_alphabet())}
    tokens = [b""] * size
    for text, i in vocab.items():
        tokens[i] = text.encode() if text in special else bytes(byte_of[char] for char in text)
    if not all(tokens):
        raise ValueError("it has an empty token")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [(vocab[left], vocab[right], vocab[left + right]) for left, right in pairs]
    if len({(left, right) for left, right, _ in merges}) < len(merges):
        raise ValueError("a merge stands twice")
    made = {merge[2] for merge in merges} | set(special.values()) | {vocab[char] for char in byte_of if char in vocab}
    whole_words = bool(model.get("ignore_merges"))
    if len(made) < size and not whole_words:
        raise ValueError(f"merges are missing: nothing makes {size - len(made)} of its tokens")
    text_tokens = frozenset(token["content"] for token in added if not token.get("special"))
    return Tokenizer(tokens, special, np.array(merges, np.int64).reshape(-1, 3), split, whole_words, text_tokens)

def split_of(steps):
    """The name of the split pattern that the steps of a pre-tokenizer come to. Raises ValueError where it is none."""
    spelled = {pattern: name for name, pattern in SPLIT_PATTERNS.items()} | {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2"}
    kinds, last = [step.get("type") for step in steps], steps[-1]
    if last.get("type") == "ByteLevel" and last.get("use_regex", True):
        if len(steps) == 1:
            return "gpt2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "digits"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern, is_plain = steps[0].get("pattern", {}).get("Regex"), steps[0].get("behavior") == "Isolated"
        if pattern in spelled and is_plain and not steps[0].get("invert"):
            return spelled[pattern]
    raise ValueError(f"its split pattern is none of {', '.join(SPLIT_PATTERNS)}")

def special_ids(path, tokenizer):
    """How a model begins and ends texts: ids put before a prompt, ids that end a text, ids to begin an empty one with.
    path: the model's folder, or its tokenizer's file.

    Prompts begin as tokenizer.json says, which other tools follow.
    """
    path = Path(path)
    folder, file = (path, "tokenizer.json") if path.is_dir() else (path.parent, path.name)
    read = lambda name: files.read_json(folder / name) if (folder / name).is_file() else {}
    generation, config, processor = read("generation_config.json"), read("config.json"), read(file)
    try:
        processor = processor.get("post_processor") or {}
        templates = [step for step in processor.get("processors", [processor]) if "single" in step]
        begin, template = [], templates[0] if templates else {"single": []}
        for step in itertools.takewhile(lambda step: "SpecialToken" in step, template["single"]):
            begin += template["special_tokens"][step["SpecialToken"]["id"]]["ids"]
        end = tokenizer.special_tokens.get(END_OF_TEXT)
        ends = generation.get("eos_token_id", config.get("eos_token_id", end))
        ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
        first = generation.get("bos_token_id", config.get("bos_token_id", end))
        empty = [] if first is None else [first]
        if not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in (*begin, *ends, *empty)):
            raise ValueError(f"ids {reprlib.repr([*begin, *ends, *empty])} of {tokenizer.vocab_size} tokens")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: how texts begin and end is damaged ({type(error).__name__}: {error})") from None
    return begin, ends, empty
