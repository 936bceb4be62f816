"""Write text with a trained model: python sample.py --prompt "Once upon" (python sample.py --help lists the flags)."""

import codecs
import signal
import sys
import time
from dataclasses import dataclass

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported Ctrl-C ends this without a word

import data  # before torch, for what it sets

import torch

import tinylm
from data import bpe, cli, gguf, machine
from data.checkpoint import check_vocabulary, load_checkpoint, load_config
from data.cli import InputError, flag
from data.forms import check_reading
from data.run import find_checkpoint

@dataclass
class Settings:
    # What to write
    prompt: str = flag("", "the text to continue; empty begins a new document")
    max_new_tokens: int = flag(500, "tokens to write at most", "[1, inf)")
    num_samples: int = flag(1, "texts to write, all at once", "[1, 1000000000]")
    seed: int = flag(0, "chooses among the likely tokens; the same one writes the same text",
                     "[-9223372036854775808, 9223372036854775807]")
    # How to choose each token
    temperature: float = flag(0.8, "above 1 bolder, below 1 safer, 0 always the likeliest", "[0, inf)")
    top_k: int = flag(0, "draw among this many likeliest tokens; 0 among all", "[0, inf)")
    top_p: float = flag(0.95, "and among the likeliest that together have this probability, above 0, up to 1", "(0, 1]")
    # Which model, and where
    checkpoint: str = flag(None, "a run of train.py, of which it takes the checkpoint with the lowest validation loss; "
                           "a checkpoint, such as RUN/latest; or a Llama folder from elsewhere", stated="newest run")
    device: str = flag(None, "cpu, cuda or cuda:NUMBER", stated="cuda where there is one")
    dtype: str = flag(None, "what to compute in, float32 or bfloat16; or int8, on a CPU: weights, in large products "
                      "activations too, rounded to 8 bits", choices=[*machine.DTYPES, "int8"],
                      stated="bfloat16 where the weights are, else float32")

def check_prompt(prompt):
    """Raise InputError where the bytes on the command line were no text, for which Python puts lone surrogates."""
    wrong = next((i for i, character in enumerate(prompt) if "\udc80" <= character <= "\udcff"), None)
    if wrong is not None:
        raise InputError(f"--prompt: its byte {ord(prompt[wrong]) & 0xFF:#04x} at character {wrong} is no text in "
                         f"{sys.getfilesystemencoding()}, the encoding of the command line; give it in that one")

def write(text):
    error = cli.put(text)
    if isinstance(error, BrokenPipeError):
        raise cli.ReaderGone
    if error:
        raise error

def write_line(pieces):
    """Print a text whose bytes come piece by piece, whole characters only."""
    for text in codecs.iterdecode(pieces, "utf-8", "replace"):
        write(text)
    write("\n")

@cli.command(Settings)
@machine.within_memory("give a smaller --num_samples or --max_new_tokens, --dtype=bfloat16 or --device=cpu")
@machine.modes_of_its_own()
def sample(given):
    """Continue a prompt, and print it as it is written, until the model ends it, or for max_new_tokens.
    To Python it returns the texts.

    `python sample.py export --help` is about writing a model as one file for llama.cpp.
    """
    settings = cli.complete(Settings, given)
    device, folder = machine.choose_device(settings.device), find_checkpoint(settings.checkpoint)
    prompt, dtype = settings.prompt, machine.dtype_to_write_in(settings.dtype, device)
    config, tokenizer = load_config(folder), bpe.load(folder)
    check_vocabulary(folder, tokenizer, config)
    begin_ids, ends, empty = bpe.special_ids(folder, tokenizer)
    check_prompt(prompt)
    ids = bpe.encode(tokenizer, prompt).tolist()
    ids = ids if begin_ids and ids[:len(begin_ids)] == begin_ids else begin_ids + ids or empty  # not twice
    if not ids:
        raise InputError("this model has no token to begin a text from; give a --prompt")
    params, _ = load_checkpoint(folder, dtype)
    dtype = dtype or params["embedding"].dtype
    machine.check_compiler(device, dtype)
    check_reading(config, device)
    params = tinylm.tree_map(lambda p: p.to(device), params)
    if settings.dtype == "int8":
        params = tinylm.quantize(params)
        if not any(isinstance(w, tinylm.Int8Matrix) for _, w in tinylm.tree_leaves(params)):
            raise InputError(f"--dtype=int8 needs sizes that are multiples of 32, and {folder} has d_model "
                             f"{config.d_model} and d_ff {config.d_ff}; leave it out")
    generator = torch.Generator(device).manual_seed(settings.seed)
    prompts = torch.tensor(ids[-config.context_length:], device=device).expand(settings.num_samples, -1)
    tokens = tinylm.generate(params, prompts, config, settings.max_new_tokens, settings.temperature, settings.top_k,
                             settings.top_p, ends, generator, dtype)

    begin, rows = time.perf_counter(), []
    is_text = lambda token: token not in ends and token < tokenizer.vocab_size  # beyond it ids stand for nothing

    def first_text():  # which is written as it comes, the others when all are done
        for row in tokens:
            rows.append(row.tolist())
            if is_text(rows[-1][0]):
                yield tokenizer.tokens[rows[-1][0]]

    write(prompt)
    write_line(first_text())
    seconds = time.perf_counter() - begin
    texts = [text[:next((i + 1 for i, token in enumerate(text) if token in ends), None)] for text in zip(*rows)]
    count = sum(map(len, texts))
    texts = [prompt + bpe.decode(tokenizer, list(filter(is_text, text))) for text in texts]
    for text in texts[1:]:
        write(f"---\n{text}\n")
    cli.put(f"{count} tokens, {count / seconds:,.1f} tokens/s, by {folder}\n", sys.stderr)
    return texts

if __name__ == "__main__":
    if sys.argv[1:2] == ["export"]:
        cli.run(gguf.export, sys.argv[2:])
    else:
        cli.run(sample)
