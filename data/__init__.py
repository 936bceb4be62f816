"""What is read from or written to disk, network and terminal.

Text and tokens:            bpe.py (the tokenizer), prepare.py (a corpus → tokens), stories.py (the built-in corpus)
A model, as others open it: checkpoint.py (a Llama folder: safetensors and JSON)
A run:                      run.py (its folder, from start to resumption), log.py (what it measured),
                            plot.py (an SVG of that)
The machine:                machine.py (devices, a compiler, signals, the ranks of torchrun)
The command line:           cli.py (settings, flags, help, errors in one line, progress)

bpe, prepare, stories and cli import no torch.
"""
