"""A model → one GGUF file, for llama.cpp and what is built on it: python sample.py export RUN [--dtype=q8_0]."""

import json
import math
import struct
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from data import bpe, checkpoint, files
from data.cli import InputError, Progress, say
from data.run import find_checkpoint
from tinylm import rope_angles, tree_leaves

# Of a parameter, with its layer as {}. The layout is ours: llama.cpp rotates pairs of neighbours too.
GGUF_NAMES = {
    "embedding": "token_embd.weight", "final_norm": "output_norm.weight", "lm_head": "output.weight",
    "blocks.{}.attention_norm": "blk.{}.attn_norm.weight", "blocks.{}.mlp_norm": "blk.{}.ffn_norm.weight",
    "blocks.{}.attention.wq": "blk.{}.attn_q.weight", "blocks.{}.attention.wk": "blk.{}.attn_k.weight",
    "blocks.{}.attention.wv": "blk.{}.attn_v.weight", "blocks.{}.attention.wo": "blk.{}.attn_output.weight",
    "blocks.{}.mlp.w_gate": "blk.{}.ffn_gate.weight", "blocks.{}.mlp.w_up": "blk.{}.ffn_up.weight",
    "blocks.{}.mlp.w_down": "blk.{}.ffn_down.weight",
}
# Of Config, what the file says, in keys or by its tensors.
GGUF_SIZES = {"vocab_size", "context_length", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff",
              "rope_theta", "norm_eps", "tie_embeddings", "head_dim", "rope_scaling"}
# Of a dtype: its number for a tensor, its number for a file, and how many bytes so many values take.
DTYPES = {"f32": (0, 0, (1, 4)), "f16": (1, 1, (1, 2)), "bf16": (30, 32, (1, 2)), "q8_0": (8, 7, (32, 34))}
PRE_TOKENIZERS = {"gpt2": "gpt-2", "digits": "smollm", "llama3": "llama-bpe"}  # llama.cpp's names
ALIGNMENT = 32  # bytes, of every tensor
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens

# ---- Bytes ----

def string(text):
    data = text.encode(errors="replace")  # of a folder's name, which may be no text
    return struct.pack("<Q", len(data)) + data

def value(data):
    """A value with its type before it: bool, int as uint32, float as float32, str, and lists of int32 or str."""
    if isinstance(data, bool):
        return struct.pack("<I?", 7, data)
    if isinstance(data, int):
        return struct.pack("<II", 4, data)
    if isinstance(data, float):
        return struct.pack("<If", 6, data)
    if isinstance(data, str):
        return struct.pack("<I", 8) + string(data)
    if isinstance(data[0], str):
        return struct.pack("<IIQ", 9, 8, len(data)) + b"".join(map(string, data))
    return struct.pack("<IIQ", 9, 5, len(data)) + np.array(data, "<i4").tobytes()

def quantize(w):
    """Blocks of 32 values as int8 with one float16 scale: value ≈ scale · int8. (..., 32n) → uint8 (blocks, 34)."""
    blocks = w.float().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    steps = blocks * torch.where(scale > 0, 1 / scale, 0)  # as llama.cpp does it: halves are rounded away from 0
    steps = (steps.sign() * (steps.abs() + 0.5).floor()).to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), steps.view(torch.uint8)], 1)

def as_bytes(w, dtype):
    """The bytes of a tensor in one of DTYPES."""
    if dtype == "q8_0":
        return quantize(w).numpy().tobytes()
    w = w.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]).contiguous()
    return w.view(-1).view(torch.uint8).numpy().tobytes()

def padding(size):
    return b"\0" * (-size % ALIGNMENT)

# ---- A model ----

def gguf_name(path):
    """llama.cpp's name of a parameter: blocks.0.attention.wq → blk.0.attn_q.weight."""
    layer, general = checkpoint.layer_of(path)
    if general not in GGUF_NAMES:
        raise InputError(f"the parameter {general} has no name in a GGUF file of a Llama model; use the checkpoint's "
                         "folder")
    return GGUF_NAMES[general].format(layer)

def check_is_llama(params, config):
    """Raise InputError for what a file of a Llama model would lose, or lack."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in GGUF_SIZES and value != field.default:
            name, none = checkpoint.hf_sizes()[field.name], json.dumps(field.default)
            raise InputError(f"{field.name} {value!r} would be lost in a GGUF file of a Llama model; use the "
                             "checkpoint's folder, or, where it is for training alone, as dropout, write there in "
                             f'config.json "{name}": {none} and "model_type": "llama"')
    for name in GGUF_NAMES.keys() - {"lm_head"} - {checkpoint.layer_of(path)[1] for path, _ in tree_leaves(params)}:
        raise InputError(f"the model has no {name}, which a GGUF file of a Llama model needs; use the "
                         "checkpoint's folder")

def check_words(tokenizer, folder):
    """Raise InputError where llama.cpp would give other ids: with the split of Llama 3, and no other, it takes words
    that are tokens as such, whatever merges make of them.
    """
    theirs = replace(tokenizer, whole_words=tokenizer.split == "llama3")
    text = "\n".join(token.decode(errors="ignore") for token in tokenizer.tokens)
    if not np.array_equal(bpe.encode(tokenizer, text), bpe.encode(theirs, text)):
        has, needed = (str(it.whole_words).lower() for it in (tokenizer, theirs))
        raise InputError(f"{folder}/tokenizer.json has ignore_merges {has}; llama.cpp knows its split only with "
                         f"{needed}, and would give other ids")

def chat_template(folder):
    """{key: template} by which a model is spoken to, where its folder has one."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return {"tokenizer.chat_template": file.read_text(encoding="utf-8", errors="replace")}
    if not config.is_file():
        return {}
    with files.reading_json(config) as said:
        template = said.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {named["name"]: named["template"] for named in template}.get("default")
        return {"tokenizer.chat_template": str(template)} if template else {}

def dtype_of(shape, dtype):
    """A parameter's dtype in a file of a given dtype: norms stay float32, rows that are no whole blocks float16."""
    if len(shape) == 1:
        return "f32"
    return "f16" if shape[1] % DTYPES[dtype][2][0] else dtype

def description(config, tokenizer, dtype, name, begin, ends, empty):
    """What the file says of a model: {key: value}. `begin`, `ends` and `empty` are its `special_ids`."""
    kinds = {i: USER_DEFINED if text in tokenizer.text_tokens else CONTROL
             for text, i in tokenizer.special_tokens.items()}
    unused = range(tokenizer.vocab_size, config.vocab_size)
    tokens = bpe.spelled_tokens(tokenizer)
    merges = [f"{tokens[left]} {tokens[right]}" for left, right, _ in tokenizer.merges.tolist()]
    ids = {"bos": begin or empty, "eos": ends, "padding": ends, "eot": ends[1:], "eom": ends[2:]}
    return {
        "general.architecture": "llama", "general.name": name, "general.alignment": ALIGNMENT,
        "general.file_type": DTYPES[dtype][1], "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.context_length, "llama.embedding_length": config.d_model,
        "llama.block_count": config.num_layers, "llama.feed_forward_length": config.d_ff,
        "llama.attention.head_count": config.num_heads, "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.attention.key_length": config.head_dim, "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim, "llama.rope.freq_base": float(config.rope_theta),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": PRE_TOKENIZERS[tokenizer.split],
        "tokenizer.ggml.tokens": tokens + [f"[unused {i}]" for i in unused],
        "tokenizer.ggml.token_type": [kinds.get(i, NORMAL) for i in range(len(tokens))]
        + [UNUSED] * len(unused),
        # llama.cpp wants a merge; this one is of a byte that no text has.
        "tokenizer.ggml.merges": merges or [" ".join(tokens[tokenizer.tokens.index(b"\xff")] * 2)],
        "tokenizer.ggml.add_bos_token": bool(begin),
        **{f"tokenizer.ggml.{use}_token_id": ids[use][0] for use in ids if ids[use]}}

def write_gguf(path, params, config, dtype, said):
    """Write a model as GGUF, version 3: a header, what it says of itself, the tensors' places, their bytes."""
    leaves = [(gguf_name(leaf_path), w, dtype_of(w.shape, dtype)) for leaf_path, w in tree_leaves(params)]
    if config.rope_scaling != checkpoint.NO_SCALING:
        plain, scaled = (rope_angles.definition(2, config.head_dim, config.rope_theta, scaling, "cpu")
                         for scaling in (checkpoint.NO_SCALING, config.rope_scaling))
        leaves.append(("rope_freqs.weight", torch.atan2(*plain[::-1])[1] / torch.atan2(*scaled[::-1])[1], "f32"))
    header = [b"GGUF", struct.pack("<IQQ", 3, len(leaves), len(said))]
    header += [string(key) + value(data) for key, data in said.items()]
    offset = 0
    for tensor_name, w, kind in leaves:
        number, _, (values, size) = DTYPES[kind]
        header += [string(tensor_name), struct.pack("<I", w.ndim), struct.pack(f"<{w.ndim}Q", *w.shape[::-1]),
                   struct.pack("<IQ", number, offset)]
        offset += w.numel() // values * size
        offset += len(padding(offset))
    header = b"".join(header)
    done = 0
    with (closing(Progress(f"writing {path.name}", offset)) as progress, files.beside(path) as partial,
          open(partial, "wb") as file):
        file.write(header + padding(len(header)))
        for _, w, kind in leaves:
            data = as_bytes(w, kind)
            file.write(data + padding(len(data)))
            progress.update(done := done + len(data))
        files.flush(file)

def export(*model, output: str = "model.gguf", dtype: str = "f16"):
    """Write a model as one GGUF file, for llama.cpp: python sample.py export MODEL [flags].

    MODEL is a run of train.py, a checkpoint, or a Llama folder from elsewhere; without it the newest run.

    output: the file to write
    dtype: of its matrices, f32, f16, bf16 or q8_0, which takes 8.5 bits a number
    """
    if len(model) > 1:
        raise InputError(f"{len(model)} models given, expected one; write python sample.py export runs/NAME")
    if dtype not in DTYPES:
        raise InputError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)}")
    if "" in model:  # as of a shell's variable that is not set
        raise InputError("MODEL is empty; give a run, or leave it out for the newest one")
    folder, path = find_checkpoint(str(model[0]) if model else "", None), Path(output)
    files.check_output(path, b"GGUF")
    config, tokenizer = checkpoint.load_config(folder), bpe.load(folder)
    checkpoint.check_vocabulary(folder, tokenizer, config)
    begin, ends, empty = bpe.special_ids(folder, tokenizer)
    params, _ = checkpoint.load_checkpoint(folder, None)
    check_is_llama(params, config)
    check_words(tokenizer, folder)
    most = {"f16": torch.finfo(torch.float16).max, "q8_0": 127 * torch.finfo(torch.float16).max}
    if any(w.abs().max() > most.get(dtype_of(w.shape, dtype), math.inf) for _, w in tree_leaves(params)):
        raise InputError(f"{folder} has numbers that float16, which --dtype={dtype} stores, can't hold; give "
                         "--dtype=bf16")
    place = files.real(folder)
    name = place.parent.name if place.name.startswith("step-") else place.name
    if len(ends) > 3:
        say(f"of the {len(ends)} tokens that end a text the file names three, {', '.join(map(str, ends[:3]))}")
    if len(begin) > 1:
        say(f"of the {len(begin)} tokens that begin a text the file names one, {begin[0]}")
    if not ends:
        say("the model names no token that ends a text, and llama.cpp may take token 11 for one")
    said = description(config, tokenizer, dtype, name, begin, ends, empty) | chat_template(folder)
    write_gguf(path, params, config, dtype, said)
    say(f"wrote {path}, {path.stat().st_size / 1e6:,.2f} MB, of {folder}")
