"""Byte-level BPE: train with GPT-2's split pattern; encode with that, SmolLM's or Llama 3's; save and load, in NumPy.

First the definition, in plain Python: `plain_split`, `plain_train` and `plain_encode`. The tests hold the rest to it.

Then the fast way to the same merges and ids. Text is bytes throughout, in three steps over whole arrays at once:

1. Split. Where a word begins follows from the class of a byte (letter, number, white space, other) and of its
   neighbours, so a handful of comparisons over an array of bytes replaces the regular expression (`word_starts`).
2. Look up. Words are few and repeat: each is found in a hash table that holds all words met before (`HashTable`).
   Training counts them there; encoding keeps their ids there.
3. Merge. Only words never met before go through the merges, many at a time (`merge_words`).

Files are read in pieces cut between words (`borders`), so pieces are independent: they stream, and spread over
processes, and the result is the same for any number of them. Words that are long and don't repeat, as in scripts
without blanks, are looked up in parts that no token can stand across (`Joints`). A word longer than can be held is
encoded a block at a time (`encode_endless`). Training holds each different word; it can't do with less.
"""

import codecs
import contextlib
import heapq
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import unicodedata
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
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
FRONT_BYTES = 1 << 14  # of a word without end, merged at once
MOST_TOKEN_BYTES = 256  # with a longer token a word without end is held whole: to find its borders would take too long
PIECE_BYTES = 1 << 18  # of a chunk, split at once: enough for arrays to pay, and few enough to stay in a core's cache

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

def word_starts(text, special_spans=(), digits_alone=False):
    """Where words begin, as `plain_split` cuts them. text: bytes of UTF-8, special_spans (n, 2) → int64 (words).

    A word begins where the class changes, with three amendments. The last character of a run of white space stands
    apart from the run when something visible follows, and a blank there belongs to the word that follows. A special
    token, or with `digits_alone` a number's digit, begins and ends a text of its own. A contraction ('s, 'll …) ends
    early, after its letters.
    """
    if not text:
        return np.empty(0, np.int64)
    data = np.frombuffer(text, np.uint8)
    classes = byte_classes(text, special_spans)
    if digits_alone:
        digits = (classes == NUMBER) & (data & 0xC0 != 0x80)  # their first bytes
        classes = np.where(classes == NUMBER, SPECIAL, classes)
    starts = np.empty(len(text), bool)
    starts[0] = True
    np.not_equal(classes[1:], classes[:-1], out=starts[1:])

    last_space = (classes[:-1] == SPACE) & (classes[1:] < SPACE)  # the last byte before something visible
    starts[1:] &= ~(last_space & (data[:-1] == ord(" ")))
    wide = np.flatnonzero(last_space & (data[:-1] >= 0x80))  # beyond ASCII, it's the first byte that begins a word
    last_space[wide] = False
    starts[:-1] |= last_space
    starts[wide - np.where(data[wide - 1] >= 0xC0, 1, 2)] = True  # such characters have two or three bytes

    for start, end in special_spans:
        starts[start] = True
        starts[end:end + 1] = True
    if digits_alone:
        starts |= digits

    quotes = np.flatnonzero(data[:-1] == ord("'"))
    quotes = quotes[starts[quotes] & (classes[quotes + 1] == LETTER)]  # a special token may begin with such letters too
    second = np.minimum(quotes + 2, len(text) - 1)  # where text ends after one letter, that letter is no pair either
    length = contraction_lengths()[data[quotes + 1], np.where(classes[second] == LETTER, data[second], 0)]
    length[quotes + length > len(text)] = 0
    quotes, length = quotes[length > 0], length[length > 0]
    starts[quotes + 1] = False
    ends = quotes + length
    starts[ends[ends < len(text)]] = True
    return np.flatnonzero(starts)

def word_starts_llama3(text, special_spans=()):
    """`word_starts` by the pattern of Llama 3.

    A word begins where the class changes, with these amendments. Numbers are cut in threes. New lines belong to a sign
    just before them; in other white space a word ends behind the last new line. What is left of it gives its last
    character to letters that follow, or, if that is a blank, to signs; before numbers it stands alone. A sign alone
    belongs to the letters that follow it, unless it has a blank already; with an apostrophe that may be a contraction,
    in small letters or capitals, which ends early.
    """
    if not text:
        return np.empty(0, np.int64)
    data, size = np.frombuffer(text, np.uint8), len(text)
    classes = byte_classes(text, special_spans)
    changes = np.append(True, classes[1:] != classes[:-1])
    starts = changes.copy()
    for start, end in special_spans:
        starts[start] = True
        starts[end:end + 1] = True

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
    last_in_row = np.flatnonzero(np.append(np.diff(newlines) > 1, True))  # of new lines without a gap
    place = last_in_row[np.searchsorted(last_in_row, np.searchsorted(newlines, begin[of_sign]))]
    rest[of_sign] = newlines[place] + 1 if len(of_sign) else 0
    starts[begin[of_sign]] = False
    starts[rest[rest < end]] = True
    # … and without all up to the last new line.
    place = np.searchsorted(newlines, end) - 1
    last = newlines[place] if len(newlines) else np.full(len(end), -1)
    rest = np.where((place >= 0) & (last >= rest), last + 1, rest)
    starts[rest[rest < end]] = True
    left = (rest < end) & (end < size) & (np.append(classes, SPECIAL)[end] < SPACE)
    end = end[left]
    final = end - 1 - np.where(data[end - 1] < 0x80, 0, np.where(data[end - 2] >= 0xC0, 1, 2))  # the last character
    starts[final] = True
    starts[end[(classes[end] == LETTER) | (classes[end] == OTHER) & (data[end - 1] == ord(" "))]] = False

    signs = np.flatnonzero((classes == OTHER) & changes & starts)
    width = np.array([1, 2, 3, 4])[(data[signs] >= 0xC0).astype(int) + (data[signs] >= 0xE0) + (data[signs] >= 0xF0)]
    before_letters = np.append(classes, SPECIAL)[np.minimum(signs + width, size)] == LETTER
    signs, width = signs[before_letters], width[before_letters]
    starts[signs + width] = False
    quotes = signs[data[signs] == ord("'")]
    small = np.append(np.where((data >= ord("A")) & (data <= ord("Z")), data + 32, data), 0)
    second = np.minimum(quotes + 2, size)
    is_letter = np.append(classes, SPECIAL)[second] == LETTER
    length = contraction_lengths(long_s=True)[small[quotes + 1], np.where(is_letter, small[second], 0)]
    ends = (quotes + length)[length > 0]
    starts[ends[ends < size]] = True
    return np.flatnonzero(starts)

WORD_STARTS = {"gpt2": word_starts, "digits": partial(word_starts, digits_alone=True), "llama3": word_starts_llama3}

# ---- Words met before ----

FILLER = 0xFF  # a byte that UTF-8 never has
# What to set in as many bytes that begin at a word, by the length of the word; a longer word's are all set.
FILLS = {size: np.array([[0] * n + [FILLER] * (size - n) for n in range(size)] + [[FILLER] * size],
                        np.uint8).view(np.uint64) for size in (16, 32)}

def word_keys(text, starts, lengths, size=16):
    """The exact key of each word: its bytes, filled up to `size`, if they are fewer. → uint64 (words, size / 8)."""
    windows = np.ndarray((len(text),), f"V{size}", text + bytes(size), 0, (1,))  # the bytes from each position on
    keys = windows[starts].view(np.uint64).reshape(-1, size // 8)
    return np.bitwise_or(keys, FILLS[size].take(lengths, 0, mode="clip"), out=keys)

class HashTable:
    """A growing map from the keys of words, and one for all that are too long, to 0, 1, 2 … in the order of addition.

    Open addressing with linear probing, for whole arrays of keys (n, key_size / 8) at once.
    """

    def __init__(self, key_size=16):
        self.key_size, self.keys = key_size, np.empty((0, key_size // 8), np.uint64)
        self.rehash(1 << 14)

    def __len__(self):
        return len(self.keys)

    def rehash(self, size):
        """Make room: place the keys anew in `size` slots, a power of two."""
        self.slot_keys = np.zeros((size, self.key_size // 8), np.uint64)  # zeros: empty
        self.slot_number = np.full(size, -1, np.int32)
        self.slot_number[self.place(self.keys)] = np.arange(len(self))

    def first_slot(self, keys):
        mixed = keys[:, -1] * np.uint64(0x9E3779B97F4A7C15)
        for column in keys.T[-2::-1]:
            mixed ^= column
            mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed >>= np.uint64(64 - (len(self.slot_keys).bit_length() - 1))
        return mixed.view(np.int64)

    def differ(self, slots, keys):
        """Which slots hold another key than these, or none. → bool (keys)."""
        unequal = self.slot_keys.take(slots, 0) != keys  # (keys, 2 or 4)
        return unequal.view(f"u{unequal.shape[1]}").ravel() != 0  # a row of bools is read as one number

    def place(self, keys):
        """The slot of each key, which takes an empty one where it is new."""
        slots = self.first_slot(keys)
        pending = np.arange(len(keys))
        while len(pending):
            at = slots[pending]
            empty = self.slot_keys[at, -1] == 0  # the last byte of a key is never 0
            # Where several keys want one empty slot the last one written has it, so the first of them, which is met
            # most often, is written last. All look again at who has it.
            self.slot_keys[at[empty][::-1]] = keys[pending[empty]][::-1]
            pending = pending[self.differ(at, keys[pending])]
            slots[pending] = (slots[pending] + 1) % len(self.slot_keys)
        return slots

    def find(self, keys):
        """The number of each key, or -1. → int32 (keys)."""
        slots = self.first_slot(keys)
        numbers = self.slot_number.take(slots)
        pending = np.flatnonzero(self.differ(slots, keys) & (numbers >= 0))
        slots, keys = slots[pending], keys[pending]
        while len(pending):
            slots = (slots + 1) % len(self.slot_keys)
            stored = numbers[pending] = self.slot_number[slots]
            going = np.flatnonzero(self.differ(slots, keys) & (stored >= 0))
            pending, slots, keys = pending[going], slots[going], keys[going]
        return numbers

    def add(self, keys):
        """Add keys that are not in the table; a key may stand more than once."""
        while 3 * (len(self) + len(keys)) > len(self.slot_keys):
            self.rehash(2 * len(self.slot_keys))
        slots = self.place(keys)
        first = np.sort(np.unique(slots, return_index=True)[1])
        self.slot_number[slots[first]] = np.arange(len(self), len(self) + len(first))
        self.keys = np.concatenate((self.keys, keys[first]))

    def find_or_add(self, keys):
        """The number of each key, new ones added. → int32 (keys)."""
        numbers = self.find(keys)
        new = np.flatnonzero(numbers < 0)
        while len(new):  # a part at a time: what is frequent comes early, and the table need not grow for the rest
            self.add(keys[new[:len(self.slot_keys) // 8]])
            numbers[new] = self.find(keys[new])
            new = new[numbers[new] < 0]
        return numbers

    def words(self, first=0):
        """The keys from number `first` on as bytes, filled up, and lengths. → uint8 (keys, size - 1), int64 (keys).

        The key of words that are too long has length 0.
        """
        raw = self.keys[first:].view(np.uint8)
        return raw[:, :-1], (raw != FILLER).sum(1)

def split_words(text, special_spans, split="gpt2"):
    """Cut text into words. → int64: starts (words), lengths (words)."""
    return with_lengths(text, WORD_STARTS[split](text, special_spans))

def with_lengths(text, starts):
    """Words that begin at `starts`, as `split_words` gives them."""
    return starts, np.append(starts[1:], len(text)) - starts

def cut_words(text, starts, lengths, which=...):
    """The bytes of some words."""
    begins = starts[which]
    return [text[begin:end] for begin, end in zip(begins.tolist(), (begins + lengths[which]).tolist())]

# ---- The tokenizer ----

@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What tokenizer.json says. `tokens`: the bytes of each id. `special_tokens`: {text: id}, never split.

    `merges`: int64 (merges, 3), the ids of left, right and what they make, the merge to do first in the first row.
    `split`: how text is split into words, a name in SPLIT_PATTERNS. `whole_words`: a word that is a token needs no
    merges.
    """

    tokens: list
    special_tokens: dict
    merges: np.ndarray
    split: str = "gpt2"
    whole_words: bool = False

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

def compile_special_pattern(special_tokens):
    """The pattern of special tokens in bytes, of the longest where several begin; None where there are none."""
    longest_first = sorted((token.encode() for token in special_tokens), key=len, reverse=True)
    return re.compile(b"|".join(map(re.escape, longest_first))) if longest_first else None

def find_spans(special_pattern, text):
    """Where special tokens stand. → [(start, end)]"""
    return [match.span() for match in special_pattern.finditer(text)] if special_pattern else []

class Joints:
    """Where no token can stand across two bytes of a word, so that its merges on either side are independent.

    A token that does has two bytes or more on both sides, or just one before, behind, or both: four cases, in each of
    which the two to four bytes around the place are in a table. A table may say yes wrongly, by a hash, but never no.
    """

    CASES = np.array([[0xFFFFFFFF, 0x00FFFFFF], [0xFFFFFF00, 0x00FFFF00]], np.uint32)  # [one byte before][… behind]

    def __init__(self, tokens):
        lengths = np.array([len(token) for token in tokens])
        size, ends = lengths.sum(), np.cumsum(lengths)
        before = np.arange(size) - np.repeat(ends - lengths, lengths)  # how many bytes of the token are, at each place
        inside = before > 0
        behind = (np.repeat(lengths, lengths) - before)[inside]
        self.is_inside = np.zeros((2, 2, 1 << 20), bool)
        around = self.around(b"".join(tokens), np.flatnonzero(inside))
        one_before, one_behind = (before[inside] == 1).astype(int), (behind == 1).astype(int)
        self.is_inside[one_before, one_behind, self.hashed(around & self.CASES[one_before, one_behind])] = True

    @staticmethod
    def around(text, places):
        """The two bytes before and behind each place, as a number; 0 beyond the text. → uint32 (places)."""
        padded = b"\0\0" + text + b"\0\0"
        return np.ndarray((len(text) + 1,), "<u4", padded, 0, (1,))[places]

    @staticmethod
    def hashed(around):
        return (around * np.uint32(0x9E3779B1)) >> np.uint32(12)

    def find(self, text, places):
        """Those of the places, with a byte before and behind, where no token can stand across."""
        around = self.around(text, places)
        spanned = np.zeros(len(places), bool)
        for case, table in zip(self.CASES.ravel(), self.is_inside.reshape(4, -1)):
            spanned |= table[self.hashed(around & case)]
        return places[~spanned]

class Ranks:
    """Which merge joins a pair of ids: a hash table, a quarter full at most, with linear probing.

    Its keys are single numbers, and none is added, so that new words are encoded in 0.85 to 0.98 of the time that a
    HashTable takes.
    """

    EMPTY = np.uint64(2**64 - 1)  # the key of ids -1 and -1, which no merge joins

    def __init__(self, left, right):
        size = 1 << (4 * len(left) + 1).bit_length()
        self.keys, self.ranks = np.full(size, self.EMPTY), np.full(size, NO_MERGE, np.int32)
        keys, pending = self.keys_of(left, right), np.arange(len(left))
        slots = self.first_slot(keys)
        while len(pending):
            at, key = slots[pending], keys[pending]
            is_free = self.keys[at] == self.EMPTY
            self.keys[at[is_free]] = key[is_free]  # where several want a slot one has it, and the others go on
            pending = pending[self.keys[at] != key]
            slots[pending] = (slots[pending] + 1) % size
        self.ranks[slots] = np.arange(len(left))

    @staticmethod
    def keys_of(left, right):
        return left.astype(np.uint64) << np.uint64(32) | right.view(np.uint32)

    def first_slot(self, keys):
        return (keys * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(65 - len(self.keys).bit_length())).view(np.int64)

    def find(self, left, right):
        """The rank of the merge of each pair; NO_MERGE where none. int32 (pairs) twice → int32 (pairs)."""
        keys = self.keys_of(left, right)
        slots = self.first_slot(keys)
        ranks, stored = self.ranks.take(slots), self.keys.take(slots)
        pending = np.flatnonzero((stored != keys) & (stored != self.EMPTY))
        while len(pending):
            slots[pending] = at = (slots[pending] + 1) % len(self.keys)
            ranks[pending], stored = self.ranks[at], self.keys[at]
            pending = pending[(stored != keys[pending]) & (stored != self.EMPTY)]
        return ranks

class Encoder:
    """A tokenizer at work: the ids of every word it has met, and how to make those of one it has not.

    `first` and `count` say where in `ids` the tokens of each word of `table` stand, `long_words` the same of words too
    long for its keys; `only_id` is the id of a word of one token, and -1 for others. Keys of 16 bytes do for English;
    where letters take two bytes or three and many words have more, longer keys are twice as fast.
    """

    BATCH = 1 << 17  # bytes of words merged at once
    MOST_IDS = 1 << 19  # what is remembered is dropped beyond this, so that memory has a bound

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special_pattern = compile_special_pattern(tokenizer.special_tokens)
        id_of = {token: i for i, token in enumerate(tokenizer.tokens) if len(token) == 1}
        self.byte_ids = np.array([id_of.get(bytes([b]), -1) for b in range(256)], np.int32)  # -1: there is none
        self.id_of_word = {token: i for i, token in enumerate(tokenizer.tokens)} if tokenizer.whole_words else {}
        left, right, self.made = tokenizer.merges.T.astype(np.int32, order="C")
        self.ranks = Ranks(left, right)
        self.byte_ranks = self.ranks.find(self.byte_ids.repeat(256), np.tile(self.byte_ids, 256)).reshape(256, 256)
        self.joints = Joints(tokenizer.tokens)
        self.lengths = np.array([len(token) for token in tokenizer.tokens])
        self.margin = max(map(len, map(str.encode, tokenizer.special_tokens)), default=0) + 8
        self.merge_front = lru_cache(maxsize=4)(self.merge_front)  # a word without end may be one thing again and again
        self.key_size = 16
        self.forget()

    def forget(self):
        """Start with no words but the special tokens."""
        self.table, self.long_words = HashTable(self.key_size), {}
        self.table.add(FILLS[self.key_size][-1:])
        self.ids, self.first, self.count = np.empty(0, np.int32), np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.only_id = np.full(1, -1, np.int32)
        for text, token_id in self.tokenizer.special_tokens.items():
            word = text.encode()
            if len(word) < self.key_size:
                self.table.add(word_keys(word, np.zeros(1, np.int64), np.array([len(word)]), self.key_size))
                self.remember(np.array([token_id]), np.ones(1, np.int64))
            else:
                self.long_words[word] = self.keep(np.array([token_id]))

    def keep(self, ids):
        """Store ids; returns where."""
        self.ids = np.concatenate((self.ids, ids), dtype=np.int32)
        return len(self.ids) - len(ids), len(ids)

    def remember(self, ids, counts):
        """Store the ids of the words last added to the table, `counts` of them each."""
        first, _ = self.keep(ids)
        self.first = np.concatenate((self.first, first + np.cumsum(counts) - counts))
        self.count = np.concatenate((self.count, counts))
        self.only_id = np.where(self.count == 1, self.ids.take(self.first, mode="clip"), -1)

    def merge_words(self, words, lengths):
        """Apply the merges to many words. words uint8 (W, L), lengths (W) → ids of all in a row, counts (W)."""
        size = max(1, self.BATCH // words.shape[1])
        batches = [slice(first, first + size) for first in range(0, len(words), size)]
        ids, counts = zip(*(self.merge_batch(words[batch, :lengths[batch].max()], lengths[batch]) for batch in batches))
        return np.concatenate(ids), np.concatenate(counts)

    def merge_batch(self, words, lengths):
        """`merge_words`, for few enough words to stay in a core's cache.

        In each round, each word makes its next merge: the pair of the lowest rank, of equals the leftmost. A word has a
        row of places, the last of which stays empty, id -1; so does the place of a token that was joined to the one
        before it, and `following` and `preceding` pass it by. A rank is that of the pair that begins at a place.
        """
        is_byte = np.arange(words.shape[1]) < lengths[:, None]
        ids = np.full((len(words), words.shape[1] + 1), -1, np.int32)
        ids[:, :-1] = np.where(is_byte, self.byte_ids[words], -1)
        self.check_bytes(words[is_byte & (ids[:, :-1] < 0)])
        ranks = np.full(ids.shape, NO_MERGE, np.int32)
        ranks[:, :-2] = np.where(is_byte[:, 1:], self.byte_ranks[words[:, :-1], words[:, 1:]], NO_MERGE)
        begins = np.arange(len(ids)) * ids.shape[1]  # of the rows in the arrays that now are flat
        ids = ids.ravel()
        following, preceding = np.arange(1, len(ids) + 1), np.arange(-1, len(ids) - 1)
        while len(begins):
            best = ranks.argmin(1)
            rank = ranks[np.arange(len(ranks)), best]
            rows = np.flatnonzero(rank < NO_MERGE)
            if 4 * len(rows) < 3 * len(begins):  # drop words that have no merge left
                begins, ranks, best, rank = begins[rows], ranks[rows], best[rows], rank[rows]
                rows = np.arange(len(rows))
            begin, made = begins[rows], self.made[rank[rows]]
            place = begin + best[rows]
            before, second = preceding[place], following[place]
            after = following[second]
            ids[place], ids[second] = made, -1
            following[place], preceding[after] = after, place
            found = self.ranks.find(np.concatenate((ids[before], made)), np.concatenate((made, ids[after])))
            ranks[rows, second - begin] = NO_MERGE
            ranks[rows, place - begin] = found[len(rows):]
            ranks[rows, before - begin] = found[:len(rows)]  # before the first place, -1, is the last, of no pair
        ids = ids.reshape(len(words), -1)
        return ids[ids >= 0], (ids >= 0).sum(1)

    def check_bytes(self, missing):
        """Raise InputError where some bytes have no token."""
        if len(missing):
            raise InputError(f"the text has the byte {missing[0]:#04x}, for which this tokenizer has no token; remove "
                             "it, or use another tokenizer")

    def ids_of_words(self, words, lengths):
        """`merge_words`, but where the tokenizer says so a word that is a token stays whole."""
        ids, counts = self.merge_words(words, lengths)
        if not self.id_of_word:
            return ids, counts
        whole = np.array([self.id_of_word.get(bytes(word[:length]), -1) for word, length in zip(words, lengths)])
        first = np.cumsum(counts) - counts
        keep = np.repeat(whole < 0, counts)
        keep[first[whole >= 0]] = True
        ids[first[whole >= 0]] = whole[whole >= 0]
        return ids[keep], np.where(whole >= 0, 1, counts)

    @cached_property
    def merge_of_pair(self):
        """{(left id, right id): (rank, made id)} for the words that are merged one by one."""
        return {(left, right): (rank, made) for rank, (left, right, made) in enumerate(self.tokenizer.merges.tolist())}

    def merge_long(self, word, goes_on=False):
        """Apply the merges to one word of any length, in O(n log n) → ids, and the number of bytes they stand for.

        If the word `goes_on`, there is more of it behind, and its last ids stay open.
        """
        found, done, size = [np.empty(0, np.int64)], 0, FRONT_BYTES
        while len(word) - done > size and self.lengths.max() <= MOST_TOKEN_BYTES:
            ids, length = self.merge_front(word[done:done + size])
            size = FRONT_BYTES if length else 2 * size
            found.append(ids)
            done += length
        if not goes_on:
            found.append(self.merge_heap(word[done:]))
            done = len(word)
        return np.concatenate(found), done

    def merge_front(self, text):
        """The ids that a word begins with however it goes on behind this text, and the number of their bytes.

        Where a token of a word ends, what is before and behind it are merged on their own. And what is merged on its
        own is merged so side by side, if this is true of the two tokens that meet. The word has a token that ends among
        the last bytes of the text, as many as the longest token has. So a border is sure if it is right for all texts
        that end there.
        """
        longest, ids = self.lengths.max(), self.merge_heap(text)
        ends = np.cumsum(self.lengths[ids])
        data = np.frombuffer(text, np.uint8)
        for last in np.flatnonzero((ends < len(text) - 2 * longest) & (data[ends - len(text)] & 0xC0 != 0x80))[:-9:-1]:
            tail = data[ends[last]:]
            tails, counts = self.merge_words(np.tile(tail, (longest, 1)), len(tail) - np.arange(longest))
            pairs = [(ids[last], follower) for follower in np.unique(tails[np.cumsum(counts) - counts])]
            if all(np.array_equal(self.merge_heap(b"".join(map(self.tokenizer.tokens.__getitem__, pair))), pair)
                   for pair in pairs):
                return ids[:last + 1], int(ends[last])
        return ids[:0], 0

    def merge_heap(self, word):
        """`merge_long` for what can be held: a heap of merges over a linked list of ids."""
        ids = self.byte_ids[np.frombuffer(word, np.uint8)].tolist() + [-1]
        self.check_bytes([byte for byte, i in zip(word, ids) if i < 0])
        following, preceding = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        merge_of_pair = self.merge_of_pair
        heap = [(merge_of_pair[pair][0], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in merge_of_pair]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            if ids[i] < 0:
                continue
            j = following[i]
            merge = merge_of_pair.get((ids[i], ids[j]))
            if merge is None or merge[0] != rank:
                continue  # one of the two has been merged otherwise since
            ids[i], ids[j] = merge[1], -2
            following[i] = after = following[j]
            preceding[after] = i
            for k in (preceding[i], i):
                merge = merge_of_pair.get((ids[k], ids[following[k]])) if k >= 0 else None
                if merge:
                    heapq.heappush(heap, (merge[0], k))
        return np.array([i for i in ids if i >= 0], np.int64)

    def learn_long(self, words):
        """Make and keep the ids of long words not met before."""
        of_width = {}
        for word in words:
            of_width.setdefault(1 << (len(word) - 1).bit_length(), []).append(word)
        for width, batch in of_width.items():
            if width <= 512 and len(batch) > 8:  # longer ones, or fewer, go faster one by one
                matrix = np.frombuffer(b"".join(word.ljust(width, b"\0") for word in batch), np.uint8)
                ids, counts = self.ids_of_words(matrix.reshape(-1, width), np.array(list(map(len, batch))))
            else:
                found = [np.array([self.id_of_word[word]]) if word in self.id_of_word else self.merge_long(word)[0]
                         for word in batch]
                ids, counts = np.concatenate(found), np.array(list(map(len, found)))
            self.remember_long(batch, ids, counts)

    def remember_long(self, words, ids, counts):
        """Store the ids of long words, `counts` of them each."""
        first, _ = self.keep(ids)
        self.long_words.update(zip(words, zip((first + np.cumsum(counts) - counts).tolist(), counts.tolist())))

    @cached_property
    def whole(self):
        """The tokens that their own merges don't make, though a word like them stays whole."""
        return {token for token, i in self.id_of_word.items()
                if -1 not in self.byte_ids[list(token)] and self.merge_heap(token).tolist() != [i]}

    def cut_parts(self, text, starts, which):
        """Cut some of the words that begin at `starts` into parts that no token can stand across. → starts of all."""
        inside = (np.append(starts[1:], len(text)) - starts)[which] - 1
        first = starts[which] + 1 - (np.cumsum(inside) - inside)
        joints = self.joints.find(text, np.arange(inside.sum()) + np.repeat(first, inside))
        parts = np.sort(np.concatenate((starts, joints)))
        if not self.whole:
            return parts
        # What stays whole as a word must not be a part: it is left with what is before it, or else behind it.
        stays = np.array([part in self.whole for part in cut_words(text, parts, np.diff(parts, append=len(text)))])
        is_joint = np.isin(parts, joints)
        is_left = stays & is_joint
        is_left[1:] |= (stays & ~is_joint)[:-1] & is_joint[1:]
        return parts[~is_left]

    def split_words(self, piece):
        """`split_words`, with the parts of long ones as words of their own, if these are many or very long."""
        special_spans = find_spans(self.special_pattern, piece)
        starts, lengths = split_words(piece, special_spans, self.tokenizer.split)
        which_long = np.flatnonzero(lengths >= self.table.key_size)
        long = lengths[which_long]
        if long.max(initial=0) <= 64 and 16 * long.sum() < len(piece):
            return starts, lengths  # few enough to be remembered whole
        if self.key_size < 32 and 16 * long[long < 32].sum() > len(piece):
            words = cut_words(piece, starts, lengths, which_long[long < 32])
            if len(set(words)) < 0.8 * len(words):  # else they would not be met again
                self.key_size = 32
        to_cut = which_long[~np.isin(starts[which_long], [start for start, _ in special_spans])]
        return with_lengths(piece, self.cut_parts(piece, starts, to_cut) if len(to_cut) else starts)

    def encode(self, text):
        """The ids of a text. bytes of UTF-8 → tokenizer.dtype (tokens)."""
        pieces = cut_text(text, PIECE_BYTES, self.tokenizer.special_tokens, self.tokenizer.split)
        ids = [np.empty(0, self.tokenizer.dtype)]
        while some := list(itertools.islice(pieces, 8)):  # so that the length of keys suits all but the first of them
            ids.append(self.encode_words((piece, self.split_words(piece)) for piece in some))
        return np.concatenate(ids)

    def encode_words(self, pieces):
        """The ids of pieces of text, each with its words as `split_words` gives them. → tokenizer.dtype (tokens)."""
        if len(self.ids) > self.MOST_IDS or self.table.key_size < self.key_size:
            self.forget()
        known, found = len(self.table), []
        try:
            for piece, (starts, lengths) in pieces:
                numbers = self.table.find_or_add(word_keys(piece, starts, lengths, self.table.key_size))
                which_long = np.flatnonzero(lengths >= self.table.key_size)
                found.append((numbers, cut_words(piece, starts, lengths, which_long)))
            if len(self.table) > known:
                self.remember(*self.ids_of_words(*self.table.words(known)))
            self.learn_long({word: None for _, words in found for word in words if word not in self.long_words})
        except BaseException:  # Ctrl-C too
            self.forget()  # the table may have words by now whose ids it will not get
            raise
        return np.concatenate([np.empty(0, self.tokenizer.dtype), *(self.spell(*piece) for piece in found)])

    def encode_endless(self, blocks):
        """The ids of a text in blocks cut between characters, with words longer than can be held; yields arrays."""
        rest, is_inside, enough = b"", False, 0  # `is_inside`: the ids of the first word's beginning have been given
        for block in blocks:
            rest += block
            if len(rest) < enough:
                continue
            starts, lengths = split_words(rest, find_spans(self.special_pattern, rest), self.tokenizer.split)
            # What follows may still change the last two words, unless one goes on for long; white space behind always.
            is_space = rest[-4:].decode(errors="ignore")[-1:].isspace()  # its last character
            goes_on = lengths[-1] > FRONT_BYTES + self.margin and not is_space
            cut, before = starts[-1], len(rest)
            if not goes_on:
                cut = starts[:-1][starts[:-1] <= len(rest) - self.margin].max(initial=0)
            if cut:
                yield self.encode_rest(rest, starts, cut, is_inside)
                rest, is_inside = rest[cut:], False
            if goes_on:
                ids, done = self.encode_front(rest[:-self.margin])
                yield ids
                rest, is_inside = rest[done:], is_inside or done > 0
            enough = 2 * len(rest) if len(rest) == before else 0
        starts, _ = split_words(rest, find_spans(self.special_pattern, rest), self.tokenizer.split)
        yield self.encode_rest(rest, starts, len(rest), is_inside)

    def encode_front(self, text):
        """The ids that a word begins with however it goes on behind this text, and the number of their bytes."""
        parts = self.cut_parts(text, np.zeros(1, np.int64), np.zeros(1, np.int64))
        # Two characters or more stay, so that what is left of the word is split as the whole word would be.
        is_end = (np.frombuffer(text, np.uint8)[parts] & 0xC0 != 0x80) & (parts < len(text) - 8)
        last = np.flatnonzero(is_end)[-1]
        if not last:
            ids, done = self.merge_long(text, goes_on=True)
            return ids.astype(self.tokenizer.dtype), done
        done = text[:parts[last]]
        return self.encode_words([(done, with_lengths(done, parts[:last]))]), parts[last]

    def encode_rest(self, text, starts, cut, is_inside):
        """The ids of the words that begin at `starts` before `cut`; the first may have begun before the text."""
        begin = np.append(starts, len(text))[int(is_inside)]
        parts, _ = self.split_words(text)
        first = self.merge_long(text[:begin])[0].astype(self.tokenizer.dtype)
        here, parts = text[begin:cut], parts[(parts >= begin) & (parts < cut)] - begin
        return np.concatenate((first, self.encode_words([(here, with_lengths(here, parts))])))

    def spell(self, numbers, long_words):
        """The ids of words: their numbers in the table, and those too long for it, in order. → dtype (tokens)."""
        heads = self.only_id.take(numbers)  # right for words of one token, which nearly all are
        several = np.flatnonzero(heads < 0)
        if not len(several):
            return heads.astype(self.tokenizer.dtype)
        first, count = self.first[numbers[several]], self.count[numbers[several]]
        if long_words:
            is_long = numbers[several] == 0
            first[is_long], count[is_long] = np.array([self.long_words[word] for word in long_words]).T
        before = np.cumsum(count) - count
        step = np.arange(count.sum()) - np.repeat(before, count)  # 0, 1 … in each word
        places = np.repeat(several - np.arange(len(several)) + before, count) + step
        ids = np.empty(len(heads) - len(several) + len(step), self.tokenizer.dtype)
        others = np.ones(len(ids), bool)
        others[places] = False
        ids[others] = heads[heads >= 0]
        ids[places] = self.ids.take(np.repeat(first, count) + step)
        return ids

encoder = lru_cache(maxsize=4)(Encoder)  # a tokenizer keeps what it has met from call to call

def as_bytes(text):
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text has half a surrogate pair at character {error.start}, which UTF-8 can't hold; "
                         "remove it") from None

def encode(tokenizer, text):
    """The ids of a text. str → tokenizer.dtype (tokens). Raises InputError for lone surrogates."""
    text, found = as_bytes(text), [np.empty(0, tokenizer.dtype)]
    for chunk in cut_text(text, CHUNK_BYTES, tokenizer.special_tokens, tokenizer.split):
        if len(chunk) <= MOST_BYTES:
            found.append(encoder(tokenizer).encode(chunk))
        else:
            read = lambda start, end: chunk[start:end]
            found += encoder(tokenizer).encode_endless(read(*block) for block in cut_blocks(read, 0, len(chunk)))
    return np.concatenate(found)

def decode(tokenizer, ids):
    """The text of ids; what isn't valid UTF-8 becomes U+FFFD. Raises InputError for an id beyond the vocabulary."""
    return b"".join(token_bytes(tokenizer, ids)).decode("utf-8", "replace")

def token_bytes(tokenizer, ids):
    """The bytes of each id, as a list."""
    ids = np.asarray(ids, np.int64).tolist()
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise InputError(f"ids go from {min(ids)} to {max(ids)}; expected 0 to {tokenizer.vocab_size - 1}")
    return [tokenizer.tokens[i] for i in ids]

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
        places = sorted({*borders(text, split), *(begin for begin, _ in find_spans(pattern, text))})
        for place in places:
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
        file.seek(start)
        text = file.read(end - start)
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
    total = sum(end - start for _, start, end in spans)
    workers = min(workers or num_cores(), len(spans))
    if multiprocessing.current_process().daemon:  # which may have none of its own
        workers = 1
    progress = Progress(label, total)
    done = 0
    results = over_processes(make, arguments, spans, workers) if workers > 1 else (
        work(span) for work in [make(*arguments)] for span in spans)
    try:
        for (_, start, end), result in zip(spans, results):
            done += end - start
            progress.update(done)
            yield result
    finally:
        progress.close()
        results.close()

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
                raise InputError("a process that read the text was ended, by what it printed or as where memory runs "
                                 "out; give data/prepare.py a smaller --workers") from None
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
    is_free = sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None
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
        numbers, long_words = [np.empty(0, np.int32)], Counter()
        for piece in cut_text(read_span(span, errors), PIECE_BYTES, special_tokens, "gpt2"):
            starts, lengths = split_words(piece, find_spans(special_pattern, piece))
            numbers.append(table.find_or_add(word_keys(piece, starts, lengths)))
            long_words.update(cut_words(piece, starts, lengths, lengths >= table.key_size))
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
        counts = np.pad(counts, (0, len(table) - len(counts)))
        counts[numbers] += key_counts
        long_words.update(long_word_counts)
    matrix, lengths = table.words()
    words = [row[:length] for row, length in zip(map(bytes, matrix), lengths.tolist())] + list(long_words)
    counts = np.concatenate((counts, np.fromiter(long_words.values(), np.int64, len(long_words))))
    not_words = {token.encode() for token in special_tokens} | {b""}  # what the key of long words spells
    keep = np.array([len(word) > 1 and word not in not_words for word in words], bool)
    return [word for word, kept in zip(words, keep.tolist()) if kept], counts[keep]

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
    sums = np.add.reduceat(weights[order], begins).tolist() if len(begins) else []
    ends = [*begins[1:].tolist(), len(pairs)]
    return pairs[begins].tolist(), sums, [places[begin:end] for begin, end in zip(begins.tolist(), ends)]

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
        places = np.arange(len(self.ids) - 1, dtype=np.int32)
        return sum_by_pair(self.ids[:-1], self.ids[1:], self.weight[:-1], places)

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
    small for the bytes and the special tokens, and for special tokens that are empty or stand twice.
    """
    special_tokens = list(special_tokens)
    if len(set(special_tokens)) < len(special_tokens) or any(len(token.encode()) < 2 for token in special_tokens):
        raise InputError(f"special tokens {special_tokens}: expected different ones of two bytes or more")
    if vocab_size < 256 + len(special_tokens):
        raise InputError(f"vocab_size is {vocab_size}; expected at least {256 + len(special_tokens)}: "
                         f"the 256 bytes and {len(special_tokens)} special token(s)")
    tokens = [bytes([b]) for b in range(256)] + [token.encode() for token in special_tokens]
    num_merges = vocab_size - len(tokens)
    merges = []
    if num_merges:
        merges = train_merges(*count_corpus(paths, special_tokens, workers, errors), tokens, num_merges)
    first_made = 256 + len(special_tokens)
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
                          "normalized": False, "special": True} for text, i in tokenizer.special_tokens.items()],
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
        description = json.loads(path.read_text(encoding="utf-8"))
        return from_description(description)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; put the tokenizer.json there that belongs to the model or data") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise InputError(f"{path} can't be used ({reason}); expected a byte-level BPE tokenizer.json") from None

def from_description(description):
    """The tokenizer that a parsed tokenizer.json describes. Raises ValueError or the like where it can't be."""
    model, steps = description["model"], description.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}")
    if model.get("byte_fallback"):
        raise ValueError("it is a SentencePiece tokenizer")
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
    return Tokenizer(tokens, special, np.array(merges, np.int64).reshape(-1, 3), split, whole_words)

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
            raise ValueError(f"ids {(*begin, *ends, *empty)} of {tokenizer.vocab_size} tokens")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: how texts begin and end is damaged ({type(error).__name__}: {error})") from None
    return begin, ends, empty
