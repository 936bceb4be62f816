"""A model ↔ the folder that any Llama tool opens: safetensors and JSON, no pickle; and the optimiser beside it."""

import itertools
import json
import math
import os
import reprlib
import struct
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

import tinylm
from data import files
from data.cli import InputError
from tinylm import Config, tree_build, tree_leaves

# What to do about a checkpoint that can't be used, be it of a run or from elsewhere.
ANOTHER = "take another checkpoint (a run goes on from the one before, where the folder of this one is moved away)"

# ---- safetensors ----

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}

def dtype_name(dtype):
    """torch.bfloat16 → "bfloat16"."""
    return str(dtype).removeprefix("torch.")

def write_safetensors(path, tensors, contents=None):
    """Write {name: tensor} in the safetensors layout: the header's length in 8 bytes, a JSON header, the raw bytes.

    `contents` yields the tensors to write one by one, where `tensors` tell only their shapes and dtypes.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers are aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor, _ in zip(tensors.values() if contents is None else contents, tensors, strict=True):
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        files.flush(file)

def read_header(path):
    """The header of a safetensors file: {name: (start, end, dtype, shape)}, in its order, and where the bytes begin.

    Raises InputError where it can't be that of this file.
    """
    path = Path(path)
    size = path.stat().st_size

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in the header")
        return dict(pairs)

    def entry(name, dtype, shape, data_offsets):
        start, end = data_offsets
        are_sizes = all(type(number) is int and 0 <= number <= size for number in (*shape, start, end))
        if not isinstance(shape, list) or len(shape) > 8 or not are_sizes:
            raise ValueError(f"{name}: sizes that can't be")
        if dtype not in SAFETENSORS_DTYPES:
            raise InputError(f"{path}: {name} is of {dtype}; expected one of {', '.join(SAFETENSORS_DTYPES)}")
        if math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize != end - start:
            raise ValueError(f"{name}: {end - start} bytes for shape {shape} of {dtype}")
        return start, end, SAFETENSORS_DTYPES[dtype], shape

    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        entries, position = {name: entry(name, **header[name]) for name in header}, 0
        for name, (start, end, _, _) in sorted(entries.items(), key=lambda item: item[1][:2]):
            if start != position:
                raise ValueError(f"{name}: its bytes overlap others or leave a gap")
            position = end
        if position != size - 8 - length:
            raise ValueError(f"it has {size - 8 - length} bytes of numbers, its header speaks of {position}")
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); {ANOTHER}") from None
    return entries, 8 + length

def read_tensors(path):
    """Read a safetensors file: yields (name, tensor). Raises InputError where it is damaged; never runs code from it.
    """
    entries, begin = read_header(path)
    with open(path, "rb") as file:
        for name, (start, end, dtype, shape) in entries.items():
            file.seek(begin + start)
            data = np.fromfile(file, dtype=np.uint8, count=end - start)
            if len(data) < end - start:
                raise InputError(f"{path} became shorter while it was read; {ANOTHER}")
            tensor = torch.from_numpy(data).view(dtype) if len(data) else torch.empty(0, dtype=dtype)
            yield name, tensor.view(shape)

# ---- Names and layout, ours ↔ Hugging Face's ----

# Of a parameter, with its layer as {}.
HF_NAMES = {
    "embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight",
    "blocks.{}.attention_norm": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attention.wq": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.wk": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.wv": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.wo": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.mlp.w_gate": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.mlp.w_up": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.mlp.w_down": "model.layers.{}.mlp.down_proj.weight",
}
# Of a field of Config, its name in a Llama's config.json; see `hf_sizes` for others.
HF_SIZES = {
    "vocab_size": "vocab_size", "context_length": "max_position_embeddings", "d_model": "hidden_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings", "head_dim": "head_dim",
}
# What a Llama may ask for and this model has not, with the value that asks for nothing.
HF_PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None,
            "quantization_config": None}
NOT_HERE = "which this model has not; take a Llama model without it"

def layer_of(path):
    """A parameter's layer and its name with {} for that: blocks.0.mlp.w_up → ("0", "blocks.{}.mlp.w_up")."""
    parts = path.split(".")
    return (parts[1], ".".join(["blocks", "{}", *parts[2:]])) if parts[0] == "blocks" else ("", path)

def hf_name(path):
    """Hugging Face's name of a parameter: blocks.0.attention.wq → model.layers.0.self_attn.q_proj.weight."""
    layer, general = layer_of(path)
    if general not in HF_NAMES:
        raise InputError(f"the parameter {general} would be lost in a checkpoint; give it a name in HF_NAMES of "
                         "data/checkpoint.py")
    return HF_NAMES[general].format(layer)

def pairs_to_halves(w, head_dim):
    """Reorder the rows of each head from (2i, 2i+1) pairs to two halves, as Hugging Face's rotary layout has them."""
    return w.view(-1, head_dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

def halves_to_pairs(w, head_dim):
    """The inverse of `pairs_to_halves`."""
    return w.view(-1, 2, head_dim // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

def is_rotated(path):
    """Whether a parameter makes what RoPE turns."""
    return path.endswith((".wq", ".wk"))

def is_finite(tensor):
    """Whether all numbers are finite: in pieces, for less memory, and by their sum, which is faster, where that is."""
    pieces = tensor.flatten().split(1 << 20)
    return all(piece.sum(dtype=torch.float32).isfinite() or piece.isfinite().all() for piece in pieces)

def from_hf(tensors, config, source, dtype):
    """The tree of parameters from Hugging Face's names and layout, which are used up. `source` is named in errors."""
    shapes = tree_leaves(tinylm.param_shapes(config))
    expected = {hf_name(path) for path, _ in shapes}
    # Old files carry the rotary frequencies, which say nothing new, and a tied model's may carry the output matrix.
    extra = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")} - expected
    extra -= {"lm_head.weight"} if config.tie_embeddings else set()
    for problem, names in (("lacks", expected - tensors.keys()), ("has unknown", extra)):
        if names:
            raise InputError(f"{source} {problem} {', '.join(sorted(names)[:3])}; expected the tensors that its "
                             "config.json speaks of")
    table, head = (tensors.get(f"{name}.weight") for name in ("model.embed_tokens", "lm_head"))
    if config.tie_embeddings and head is not None and not (head.shape == table.shape and head.to(table).equal(table)):
        raise InputError(f"{source} has an lm_head.weight that is not its embedding; set tie_word_embeddings to false "
                         "in its config.json")
    params = []
    for path, shape in shapes:
        tensor = tensors.pop(hf_name(path))
        if tensor.shape != shape or not tensor.is_floating_point():
            raise InputError(f"{source}: {hf_name(path)} is {tensor.dtype} {tuple(tensor.shape)}; "
                             f"expected floating-point {shape}")
        if not is_finite(tensor):
            raise InputError(f"{source}: {hf_name(path)} has numbers that are not finite; {ANOTHER}")
        tensor = tensor.to(dtype or (torch.float32 if tensor.dtype == torch.float16 else tensor.dtype))
        params.append((path, halves_to_pairs(tensor, config.head_dim) if is_rotated(path) else tensor))
    return tree_build(params)

def hf_sizes():
    """{field of Config: its name in config.json}, of a field that no Llama has one which code without it refuses."""
    names = [field.name for field in fields(Config) if field.name != "rope_scaling"]  # which is no number
    return {name: HF_SIZES.get(name, f"tinylm_{name}") for name in names}

def config_to_hf(config, bos_token_id, eos_token_id):
    """config.json of a LlamaForCausalLM with these sizes. Raises InputError for a size that it can't say."""
    hf = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
          "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "bos_token_id": bos_token_id,
          "eos_token_id": eos_token_id, "rope_scaling": scaling_to_hf(config.rope_scaling)}
    for name, theirs in hf_sizes().items():
        value = getattr(config, name)
        asks_for_nothing = not value and value == Config.__dataclass_fields__[name].default
        if not (theirs.startswith("tinylm_") and asks_for_nothing):
            hf[theirs] = value
    block = config.d_model * (2 + 2 * (config.num_heads + config.num_kv_heads) * config.head_dim + 3 * config.d_ff)
    table = config.vocab_size * config.d_model
    size = table + config.num_layers * block + config.d_model + (0 if config.tie_embeddings else table)  # of a Llama
    if tinylm.num_params(config) != size or any(name.startswith("tinylm_") for name in hf):
        hf["model_type"] = "tinylm"  # which other tools refuse, where they would take it for a Llama
    read_back = config_from_hf(json.loads(json.dumps(hf, default=str)), "config.json")
    for field in fields(Config):
        value, read = getattr(config, field.name), getattr(read_back, field.name)
        if read != value:
            raise InputError(f"{field.name} {value!r} would come back from config.json as {read!r}; leave it at that, "
                             "or let it be a number, a text, True or False")
    return hf

def check_can_be_saved(config):
    """Raise InputError where a checkpoint can't hold all of a model, before any work goes into it."""
    config_to_hf(config, 0, 0)
    for path, _ in tree_leaves(tinylm.param_shapes(config)):
        hf_name(path)

def check_goes_on(params, state, update):
    """Raise InputError where an optimiser's update(params, grads, state) writes into what it is given, so that no bad
    step could be dropped, or gives other kinds of tensors, with which no run could go on.
    """
    def kinds(tree):
        leaves = tree_leaves(tree)
        for path, leaf in leaves:
            if not isinstance(leaf, torch.Tensor) or leaf.dtype not in SAFETENSORS_DTYPES.values():
                raise InputError(f"the optimiser has {path} {leaf!r}, which a checkpoint can't hold; expected a tensor "
                                 "of numbers")
        return [f"{path} {tuple(leaf.shape)} of {dtype_name(leaf.dtype)}" for path, leaf in leaves]

    shape = partial(tinylm.tree_map, lambda leaf: None)
    if shape(tree_build(tree_leaves(state))) != shape(state):
        raise InputError("the optimiser's state would be lost in a checkpoint; expected a dict of tensors, or of such "
                         "dicts, whose keys are names without points and of which none is empty")
    old = {"params": params, "state": state}
    before, copies = kinds(old), [leaf.clone() for _, leaf in tree_leaves(old)]
    after = kinds(dict(zip(old, update(params, params, state))))
    for was, now in itertools.zip_longest(before, after, fillvalue="nothing"):
        if was != now:
            raise InputError(f"the optimiser's update makes {now} of {was}; let it keep what its init gives, in the "
                             "same order")
    if not all(leaf.equal(copy) for (_, leaf), copy in zip(tree_leaves(old), copies)):
        raise InputError("the optimiser's update writes into what it is given; let it return new tensors")

def config_from_hf(hf, source):
    """The Config of a Llama config.json. Raises InputError that names an option which this model has not."""
    if not isinstance(hf, dict) or hf.get("model_type") not in ("llama", "tinylm"):
        kind = repr(hf.get("model_type")) if isinstance(hf, dict) else "not there"
        raise InputError(f"{source} is not the config of a Llama model (model_type is {kind}, expected 'llama'); take "
                         "a Llama model")
    for option in hf.keys() - hf_sizes().values():
        if option.startswith("tinylm_"):
            raise InputError(f"{source} has {option}, as of a changed tinylm: read it with the code that wrote it")
    for option, value in HF_PLAIN.items():
        if hf.get(option, value) not in (value, None):
            raise InputError(f"{source} asks for {option} {reprlib.repr(hf[option])}, {NOT_HERE}")
    try:
        both = [hf[name] for name in ("rope_parameters", "rope_scaling") if hf.get(name)]
        if len({scaling_from_hf(rope, source) for rope in both}) > 1:
            raise ValueError("its rope_parameters and rope_scaling differ; say all in rope_parameters")
        rope = both[0] if both else {}
        hf = {"num_key_value_heads": hf["num_attention_heads"]} | {
            name: value for name, value in (hf | {"rope_theta": rope.get("rope_theta", hf.get("rope_theta"))}).items()
            if value is not None}
        for needed in ("intermediate_size", "rms_norm_eps"):
            hf[needed]  # what Config has by default would be wrong here
        for name, theirs in hf_sizes().items():
            if Config.__dataclass_fields__[name].type is bool and type(hf.get(theirs, False)) is not bool:
                raise ValueError(f"{theirs} is {reprlib.repr(hf[theirs])}; expected true or false")
        return Config(**{name: hf[theirs] for name, theirs in hf_sizes().items() if theirs in hf},
                      rope_scaling=scaling_from_hf(rope, source))
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source} is damaged, incomplete or of another model ({error}); {ANOTHER}") from None

NO_SCALING = Config.rope_scaling
LLAMA3_SCALING = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"

def scaling_from_hf(rope, source):
    """Config.rope_scaling of what a config.json says of RoPE. Raises InputError for a kind that this model has not."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return NO_SCALING
    if kind == "linear":
        scaling = rope["factor"], *NO_SCALING[1:]
    elif kind == "llama3":
        scaling = tuple(rope[name] for name in LLAMA3_SCALING)
    else:
        raise InputError(f"{source} asks for rope_type {kind!r}, {NOT_HERE}")
    factor, low, high, context = scaling
    are_numbers = all(type(number) in (int, float) for number in scaling)
    if not (are_numbers and 1 <= factor < 2**31 and 0 < low < high < 2**31 and 0 <= context < 2**31):
        raise ValueError(f"rope_type {kind!r} has factors {reprlib.repr(scaling)}")
    return scaling

def scaling_to_hf(scaling):
    """What config.json says of a Config.rope_scaling."""
    factor, _, _, context = scaling
    if scaling == NO_SCALING:
        return None
    if not context:
        return {"rope_type": "linear", "factor": factor}
    return {"rope_type": "llama3"} | dict(zip(LLAMA3_SCALING, scaling))

# ---- Checkpoints ----

MASTER = "training/model.safetensors"  # the parameters in float32, where model.safetensors has them in 16 bits

def save_checkpoint(folder, params, config, tokenizer, end_token, optimizer=None, train_state=None, others=None,
                    dtype=torch.float32, begin_tokens=None):
    """Write a checkpoint folder: beside its place, flushed to disk, then renamed, so that readers see all or nothing.

    `tokenizer` is what tokenizer.json of the data says; `end_token` is its (text, id) that ends a document,
    `begin_tokens` are those that begin one, by default the same. `optimizer` (a tree of tensors) and `train_state`
    (JSON) are what a run needs to go on, `others` the `files_for_others` of the model it came from.
    Tensors that are split over ranks are gathered one by one, for which the other ranks call `take_part_in_saving`.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.partial")
    leaves = tree_leaves(params) + tree_leaves(optimizer or {})
    gathered = map(tinylm.all_gather, [leaf for _, leaf in leaves])
    finite = (check_finite(path, tensor) for (path, _), tensor in zip(leaves, gathered))
    try:
        files.remove(beside)
        write_checkpoint(beside, params, config, tokenizer, begin_tokens or [end_token], end_token, optimizer,
                         train_state, others or {}, dtype, finite)
        files.remove(folder)
        os.replace(beside, folder)
        files.flush_folder(folder.parent)
    except BaseException:  # as on a full disk, where the part that was written would be in the way
        files.remove(beside)
        raise
    finally:
        for _ in gathered:  # what was not written, as the other ranks take part in all
            pass

def check_finite(path, tensor):
    """The tensor. Raises InputError where it has numbers that are not finite: training could not go on from them."""
    if not is_finite(tensor):
        raise InputError(f"{path} has numbers that are not finite in {dtype_name(tensor.dtype)}; a smaller "
                         "--lr_max may help" + ", or --save_dtype=bfloat16" * (tensor.dtype == torch.float16))
    return tensor

def take_part_in_saving(params, optimizer):
    """What the other ranks do while the first one saves, or can't."""
    for _, leaf in tree_leaves(params) + tree_leaves(optimizer):
        tinylm.all_gather(leaf)

def tokenizer_for_others(tokenizer, begin_tokens):
    """A tokenizer.json, for tools that should begin a text as training did: with these tokens, (text, id) each."""
    begin = [{"SpecialToken": {"id": text, "type_id": 0}} for text, _ in begin_tokens]
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    template = {"type": "TemplateProcessing", "single": [*begin, first], "pair": [*begin, first, second],
                "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in begin_tokens}}
    return tokenizer | {"post_processor": template}

def write_checkpoint(folder, params, config, tokenizer, begin_tokens, end_token, optimizer, train_state, others,
                     dtype, gathered):
    """Write the files of a checkpoint into a new folder, and flush them. `gathered` yields its tensors, none split."""
    (folder / "training").mkdir(parents=True)
    (text, end_id), (begin_text, begin_id) = end_token, begin_tokens[0]
    leaves = tree_leaves(params)
    is_half = dtype != torch.float32
    write_safetensors(folder / (MASTER if is_half else "model.safetensors"), {hf_name(path): w for path, w in leaves},
                      (pairs_to_halves(w, config.head_dim) if is_rotated(path) else w
                       for (path, _), w in zip(leaves, gathered)))
    if is_half:
        shapes = {hf_name(path): torch.empty(w.shape, dtype=dtype, device="meta") for path, w in leaves}
        write_safetensors(folder / "model.safetensors", shapes, (
            check_finite(name, w.to(dtype)) for name, w in read_tensors(folder / MASTER)))
    theirs = json.loads(others.get("config.json", "{}"))
    ids = {name: theirs[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in theirs}
    files.write_json(folder / "config.json",
                     config_to_hf(config, begin_id, end_id) | {"torch_dtype": dtype_name(dtype)} | ids)
    files.write_json(folder / "generation_config.json", {
        "bos_token_id": begin_id, "eos_token_id": end_id, "pad_token_id": end_id})
    files.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin_text, "eos_token": text, "pad_token": text,
        "padding_side": "left", "add_bos_token": True, "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.context_length, "clean_up_tokenization_spaces": False})
    files.write_json(folder / "tokenizer.json", tokenizer_for_others(tokenizer, begin_tokens))
    for name in others.keys() - {"config.json"}:
        (folder / name).parent.mkdir(exist_ok=True)
        with open(folder / name, "wb") as file:
            file.write(others[name])
            files.flush(file)
    if optimizer is None:
        files.remove(folder / "training")
    else:  # in a folder of its own, for tools that read all safetensors beside config.json
        write_safetensors(folder / "training/optimizer.safetensors", dict(tree_leaves(optimizer)), gathered)
        files.write_json(folder / "training/train_state.json", train_state)
        files.flush_folder(folder / "training")
    files.flush_folder(folder)

def files_for_others(folder):
    """What other tools read of a model beside its weights: {name: bytes}. Raises InputError for damaged JSON."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt")
    templates = [f"additional_chat_templates/{path.name}" for path in folder.glob("additional_chat_templates/*.jinja")]
    there = [name for name in (*names, *templates) if (folder / name).is_file()]
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        # These are read again: a damaged one would be in each checkpoint.
        if name in there and not isinstance(files.read_json(folder / name, ANOTHER), dict):
            raise InputError(f"{folder / name} is damaged (expected an object); {ANOTHER}")
    return {name: (folder / name).read_bytes() for name in there}

def ending_as_learned(others, special_ids, begin_id, end_id):
    """`others` of a model whose texts end otherwise than those that it learns from: what it writes ends at both.

    Of the ids that it names those of `special_ids` stay, as the default of a config.json may name an ordinary token.
    """
    said = {name: json.loads(others[name]) for name in ("config.json", "generation_config.json") if name in others}
    ends = list(said.values())[-1].get("eos_token_id") if said else end_id  # of the last, by which other tools go
    ends = ends if isinstance(ends, list) else [ends]
    if end_id in ends:
        return others
    kept = [i for i in ends if i in special_ids]
    ids = {"bos_token_id": begin_id, "eos_token_id": [end_id, *kept] if kept else end_id}
    return others | {name: json.dumps(said[name] | ids, indent=2).encode() for name in said}

def weights_dtype(folder):
    """The name of the dtype of most numbers in a Llama folder: float32, bfloat16 or float16."""
    sizes = Counter()
    for name in weights_files(Path(folder)):
        for _, _, dtype, shape in read_header(Path(folder) / name)[0].values():
            sizes[dtype] += math.prod(shape)
    dtype = sizes.most_common(1)[0][0] if sizes else torch.float32
    return {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype, "float32")

def load_config(folder):
    """The Config of a Llama folder. Raises InputError where it is none, or asks for what this model has not."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        latest = files.last_step(folder)
        advice = f"give {latest}" if latest else "expected a run of train.py or a Llama folder"
        if (folder / "adapter_config.json").is_file():
            advice = "an adapter is merged into its model by merge_and_unload() of peft; save that, and give it"
        raise InputError(f"{folder} is not a checkpoint (no config.json in it); {advice}")
    return config_from_hf(files.read_json(folder / "config.json", ANOTHER), folder / "config.json")

def check_vocabulary(folder, tokenizer, config):
    """Raise InputError where the model in a folder has fewer tokens than its tokenizer."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its model {config.vocab_size}; "
                         "remove those that were added, or let resize_token_embeddings of transformers make room")

def load_checkpoint(folder, dtype=torch.float32, name="model.safetensors"):
    """Read (params, config) from a Llama folder, of ours or of `transformers`, in one file or sharded.

    Parameters are in `dtype`, or with None as they were saved, but float32 in place of float16. Raises InputError where
    the folder is no such, is damaged, or asks for what this model has not. `name` is the file, where that is there.
    """
    folder, config, tensors = Path(folder), load_config(folder), {}
    for file in [name] if (folder / name).is_file() else weights_files(folder):
        tensors.update(read_tensors(folder / file))
    if config.num_layers > len(tensors):  # before anything is made for each layer
        raise InputError(f"{folder}/config.json speaks of {config.num_layers} layers; its tensors are {len(tensors)}")
    return from_hf(tensors, config, folder, dtype), config

def weights_files(folder):
    """The names of the files with the weights of a Llama folder. Raises InputError where they are not all there."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if not index.is_file() and not (folder / names[0]).is_file() and any(folder.glob("pytorch_model*.bin")):
        raise InputError(f"{folder} has its weights as pickles, pytorch_model.bin, which can run code; convert it by "
                         f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(…) of transformers")
    if index.is_file() and not (folder / names[0]).is_file():
        with files.reading_json(index) as said:
            names = sorted(map(Path, set(said["weight_map"].values())))
    for name in names:
        if Path(name).name != str(name) or not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}; {ANOTHER}")
    return names

def load_optimizer(folder, like):
    """Read the optimiser state from a checkpoint folder of ours. `like`: a fresh state, whose shapes it must have."""
    path = Path(folder) / "training/optimizer.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is missing, without which training can't go on from here; {ANOTHER}")
    tensors = dict(read_tensors(path))
    expected = [(name, t.shape, t.dtype) for name, t in tree_leaves(like)]
    if [(name, t.shape, t.dtype) for name, t in tensors.items()] != expected:
        raise InputError(f"{path} does not belong to this model; {ANOTHER}")
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(f"{path}: {name} has numbers that are not finite; {ANOTHER}")
    return tree_build(tensors.items())
