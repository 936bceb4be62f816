"""What is read from or written to disk, network and terminal, and the machine that does it.

Text and tokens   bpe.py         the tokenizer
                  prepare.py     a corpus → tokens
                  stories.py     the built-in corpus
A model           checkpoint.py  as the folder that other tools open: safetensors and JSON
                  gguf.py        as one file, for llama.cpp
                  forms.py       whether faster forms follow their definitions, before the work begins
A run             run.py         its folder, from start to resumption; what is newest and best
                  log.py         what it measured
                  plot.py        an SVG of that
The machine       machine.py     devices, a compiler, signals, the ranks of torchrun
                  files.py       files that are there whole, or not, and belong to one process
The command line  cli.py         settings, flags, help, errors in one line, progress

bpe, prepare, stories, files, plot and cli import no torch. This is imported before torch is, for what it sets.
"""

import ctypes
import os
import sys

# GNU's OpenMP, which torch for Linux uses, reads this when it is loaded: how often a thread looks whether others are
# done before it sleeps. By default it looks for so long that beside a busy process a step takes 20 times as long.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"

def keep_freed_memory():
    """Ask glibc to keep memory that arrays and tensors free for the next ones.

    By default it returns large blocks to the system, and whoever asks next waits for them to be mapped and zeroed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; older versions allow 32 MB at most
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

keep_freed_memory()
