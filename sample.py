"""Write text with a trained model: python sample.py --prompt "Once upon" (python sample.py --help lists the flags)."""

import codecs
import math
import sys
import time
from pathlib import Path

import torch

import tinylm
from data import bpe, cli
from data.cli import InputError
from train import DTYPES, choose_device, keep_freed_memory


def find_checkpoint(name):
    """The checkpoint folder that --checkpoint means: one itself, a run's latest, or that of the newest run below runs/."""
    if name:
        folder = Path(name)
        if not folder.is_dir():
            raise InputError(f"--checkpoint={name} is not there; expected a run of train.py or a checkpoint folder")
        return folder / "latest" if (folder / "latest").is_dir() else folder
    latest = sorted(Path("runs").glob("*/latest/config.json"), key=lambda path: path.stat().st_mtime)
    if not latest:
        raise InputError("there is no checkpoint below runs/ yet; train a model with python train.py, or give --checkpoint")
    return latest[-1].parent


def check(max_new_tokens, temperature, top_k, top_p, num_samples, dtype):
    """Raise InputError where a flag is out of its range."""
    for name, value, fits, expected in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
            ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0, "1 or more, or 0 for all tokens"),
            ("top_p", top_p, 0 < top_p <= 1, "a number above 0, up to 1"),
            ("num_samples", num_samples, num_samples >= 1, "1 or more"),
            ("dtype", dtype, dtype in DTYPES, " or ".join(DTYPES))):
        if not fits:
            raise InputError(f"--{name}={value}: expected {expected}")


class Writer:
    """Prints a text token by token, whole characters only."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.write(prompt)

    def write(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()

    def token(self, token):
        # A vocabulary padded beyond the tokenizer's has ids that stand for nothing.
        data = self.tokenizer.tokens[token] if token < self.tokenizer.vocab_size else b""
        self.write(self.decoder.decode(data))

    def end(self):
        self.write(self.decoder.decode(b"", final=True) + "\n")


def sample(*, prompt: str = "", checkpoint: str = "", max_new_tokens: int = 500, temperature: float = 0.8, top_k: int = 0,
           top_p: float = 0.95, num_samples: int = 1, seed: int = 0, device: str = "", dtype: str = "float32"):
    """Continue a prompt, and print it as it is written; it ends at <|endoftext|>, or after max_new_tokens.

    What to write:
    prompt: the text to continue; empty begins a new document
    max_new_tokens: tokens to write at most
    num_samples: texts to write, all at once
    seed: chooses among the likely tokens; the same one writes the same text

    How to choose each token:
    temperature: above 1 bolder, below 1 safer, 0 always the likeliest
    top_k: draw among this many likeliest tokens; 0 among all
    top_p: and among the likeliest that together have this probability, above 0, up to 1

    Which model, and where:
    checkpoint: a run, or a checkpoint folder, of train.py or a Llama folder from elsewhere [newest run]
    device: cpu, cuda or cuda:NUMBER [cuda where there is one]
    dtype: what to compute in, float32 or bfloat16
    """
    check(max_new_tokens, temperature, top_k, top_p, num_samples, dtype)
    device, folder = choose_device(device), find_checkpoint(checkpoint)
    keep_freed_memory()
    params, config = tinylm.load_checkpoint(folder)
    tokenizer = bpe.load(folder / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its model {config.vocab_size}; "
                         "they do not belong together")
    stop = tokenizer.special_tokens.get(bpe.END_OF_TEXT)
    # In training every document but the first follows the end of another.
    start = [] if stop is None else [stop]
    ids = start + bpe.encode(tokenizer, prompt).tolist()
    if not ids:
        raise InputError(f"this tokenizer has no {bpe.END_OF_TEXT} to begin from; give a --prompt")
    params = tinylm.tree_map(lambda p: p.to(device, DTYPES[dtype] if p.ndim == 2 else None), params)
    generator = torch.Generator(device).manual_seed(seed)
    tokens = tinylm.generate(params, torch.tensor([ids] * num_samples, device=device), config, max_new_tokens, temperature,
                             top_k, top_p, stop, generator, DTYPES[dtype])

    begin, rows, writer = time.perf_counter(), [], Writer(tokenizer, prompt)
    for row in tokens:  # the first text is written as it comes, the others when all are done
        rows.append(row.tolist())
        if rows[-1][0] != stop:
            writer.token(rows[-1][0])
    writer.end()
    seconds = time.perf_counter() - begin
    texts = [list(column) for column in zip(*rows)]
    texts = [text[:text.index(stop) + 1] if stop in text else text for text in texts]
    for text in texts[1:]:
        print("---")
        writer = Writer(tokenizer, prompt)
        for token in text:
            if token != stop:
                writer.token(token)
        writer.end()
    count = sum(map(len, texts))
    print(f"{count} tokens, {count / seconds:,.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    cli.run(sample)
