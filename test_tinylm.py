"""The tests: every part against something independent. pytest test_tinylm.py

Run as a script it measures, beside the ready-made libraries: python test_tinylm.py NAME --help.
"""

import concurrent.futures
import contextlib
import copy
import ctypes
import errno
import functools
import gc
import glob
import hashlib
import http.client
import http.server
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import operator
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import ssl
import string
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unittest.mock
import urllib.error
import warnings
import weakref
from dataclasses import dataclass, fields, replace
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import data  # before torch, for what it sets

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

import sample
import tinylm
import train
from data import bpe, checkpoint, cli, files, forms, gguf, log, machine, plot, prepare, run, stories

ROOT = Path(__file__).resolve().parent
END = bpe.END_OF_TEXT
NO_SCALING = (1.0, 1.0, 2.0, 0)
settings.register_profile("tinylm", deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
settings.load_profile("tinylm")

if __name__ != "__main__":  # what a test computes is so little that a second thread makes it slower
    torch.set_num_threads(1)

def generator(seed=0):
    return torch.Generator().manual_seed(seed)

def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed + sum(shape)), dtype=dtype)

def many_stories(count, seed=0, end=""):
    return "".join(stories.story(seed, i) + end for i in range(count))

def leaf(*shape, seed=0):
    return randn(*shape, seed=seed).requires_grad_()

def same(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

def same_with_gradients(ours, theirs, *inputs, tolerance=1e-9):
    """Values and gradients of two functions agree, for a random weighting of the output."""
    actual, expected = ours(*inputs), theirs(*inputs)
    same(actual, expected, tolerance)
    weights = randn(*expected.shape, seed=7)
    gradients = (torch.autograd.grad((y * weights).sum(), inputs) for y in (actual, expected))
    for a, e in zip(*gradients):
        same(a, e, tolerance)

leading = st.lists(st.integers(1, 3), max_size=3).map(tuple)

def variables_of_rank(rank=0, num_ranks=2, address="x", port=1):
    """What torchrun tells a process."""
    return dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR=address,
                MASTER_PORT=str(port))

STORES = []  # where ranks meet

def variables_of_ranks(num_ranks):
    """Of each rank: they meet in a store that this process keeps, as torchrun has one."""
    STORES.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    return [variables_of_rank(rank, num_ranks, "127.0.0.1", STORES[-1].port) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
            for rank in range(num_ranks)]

@pytest.fixture
def as_rank(monkeypatch):
    """A function that makes this process one of ranks."""
    return lambda *args, **given: [monkeypatch.setenv(*one) for one in variables_of_rank(*args, **given).items()]

# ---- Operations ----

@given(leading, st.integers(1, 9), st.integers(1, 9))
def test_linear(lead, d_in, d_out):
    same_with_gradients(tinylm.linear, F.linear, leaf(*lead, d_in), leaf(d_out, d_in, seed=1))

@given(leading, st.integers(1, 9), st.integers(1, 9))
def test_embedding(lead, vocab_size, d_model):
    tokens = torch.randint(vocab_size, lead, generator=generator())
    same_with_gradients(lambda w: tinylm.embedding(tokens, w), lambda w: F.embedding(tokens, w),
                        leaf(vocab_size, d_model))

@given(leading, st.integers(1, 33), st.sampled_from([1e-5, 1e-2]))
def test_rmsnorm(lead, d, eps):
    same_with_gradients(lambda x, g: tinylm.rmsnorm(x, g, eps), lambda x, g: F.rms_norm(x, (d,), g, eps),
                        leaf(*lead, d), leaf(d, seed=1))

@pytest.mark.parametrize("gain", [1.0, torch.ones(8, dtype=torch.bfloat16, requires_grad=True)])
def test_rmsnorm_with_a_gain_of_another_kind(gain):
    x = leaf(3, 8)
    for out in (tinylm.rmsnorm(x, gain, 1e-5), tinylm.rmsnorm(x.detach(), gain, 1e-5)):
        same(out, F.rms_norm(x, (8,), None, 1e-5), 1e-6)
    tinylm.rmsnorm(x, gain, 1e-5).sum().backward()
    assert x.grad is not None

def test_rmsnorm_with_a_gain_for_each_head():
    same_with_gradients(lambda x, gain: tinylm.rmsnorm(x, gain, 1e-5),
                        lambda x, gain: F.rms_norm(x, (8,), None, 1e-5) * gain, leaf(3, 2, 8), leaf(2, 8, seed=1))

@torch.inference_mode()
def test_rmsnorm_in_inference():
    """Of one row it goes through Python's numbers."""
    for dtype in TOLERANCES:
        for example in EXAMPLES["rmsnorm"](dtype):
            actual, expected = tinylm.rmsnorm(*example), tinylm.rmsnorm.definition(*example)
            assert actual.dtype == dtype
            same(actual.double(), expected.double(), TOLERANCES[dtype])

def test_rmsnorm_takes_the_mean_in_float32():
    x = torch.full((4096,), 256.0, dtype=torch.bfloat16)
    same(tinylm.rmsnorm(x, torch.ones(4096), 1e-5).float(), torch.ones(4096), 1e-3)

@given(leading, st.integers(1, 7), st.integers(1, 5))
def test_softmax(lead, n, dim_from_end):
    x = leaf(*lead, n, 2)
    dim = -min(dim_from_end, x.ndim)
    same_with_gradients(lambda x: tinylm.softmax(x, dim), lambda x: F.softmax(x, dim), x)

def test_softmax_does_not_overflow():
    same(tinylm.softmax(torch.tensor([1e4, 1e4, -1e4])), torch.tensor([0.5, 0.5, 0.0]))

@given(leading, st.integers(1, 9))
def test_silu(lead, n):
    same_with_gradients(tinylm.silu, F.silu, leaf(*lead, n))

@given(leading, st.integers(1, 9), st.integers(1, 9))
def test_swiglu(lead, d, d_ff):
    theirs = lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    same_with_gradients(tinylm.swiglu, theirs, leaf(*lead, d), leaf(d_ff, d, seed=1), leaf(d_ff, d, seed=2),
                        leaf(d, d_ff, seed=3))

@given(leading, st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 5), st.integers(1, 5))
def test_attention(lead, kv_heads, group, T, before, D):
    q, k, v = (leaf(*lead, kv_heads * group, T, D), leaf(*lead, kv_heads, before + T, D, seed=1),
               leaf(*lead, kv_heads, before + T, D, seed=2))
    mask = torch.ones(T, before + T, dtype=torch.bool).tril(before)
    theirs = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    same_with_gradients(tinylm.attention, theirs, q, k, v)

@given(st.integers(1, 3), st.integers(1, 2), st.integers(2, 40), st.integers(0, 9), st.integers(1, 7),
       st.integers(1, 2000))
def test_tiles_of_attention_make_the_whole(lead, group, T, before, block, tile):
    q, k, v = leaf(lead, 2 * group, T, 4), leaf(lead, 2, before + T, 4, seed=1), leaf(lead, 2, before + T, 4, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinylm, "TILE_QUERIES", block)
        patch.setattr(tinylm, "TILE_SCORES", {"cpu": tile})
        same_with_gradients(tinylm.attention, tinylm.attention.definition, q, k, v)

@pytest.mark.parametrize("N, T, S", [(16, 512, 512), (40, 129, 205), (8, 200, 1025), (64, 64, 200), (63, 130, 130),
                                     (64, 128, 128)])
def test_tiles_of_attention_in_float32(N, T, S):
    """With many keys a tile has fewer queries, the last of them any number."""
    q, k, v = (randn(N, length, 4, seed=seed).float().requires_grad_() for seed, length in enumerate((T, S, S)))
    (_, queries, _), *_ = tinylm.tiles(q[:, :, None], k)
    assert queries.stop == min(T, 64 if N * S >= 1 << 13 and S > 128 else 128)
    assert tinylm.tiles(q[:, :, None].bfloat16(), k.bfloat16())[0][1].stop == min(T, 128)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    theirs = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    actual, upstream = tinylm.attention(q, k, v), randn(N, T, 4, seed=3)
    same(actual, theirs.float(), 1e-5)
    ours, expected = (torch.autograd.grad(y, (q, k, v), upstream.to(y.dtype)) for y in (actual, theirs))
    same(ours, expected, 1e-4)

def test_scores_of_attention_are_kept_of_few_keys_alone():
    """Else memory would grow with the square of a text's length."""
    for T, kept in ((128, 1), (129, 0)):
        q, k = randn(1, T, 1, 4), randn(1, T, 4)
        assert len(tinylm.attention_in_tiles(q, k, k)) == 2 + kept
        halves = tinylm.attention_in_tiles(*(x.bfloat16() for x in (q, k, k)))
        assert [x.dtype for x in halves] == [torch.bfloat16, torch.float32, torch.float32][:len(halves)]

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("lead", [(), (1, 1), (3, 2), (16, 1), (32,), (33,), (5, 50)])
@pytest.mark.parametrize("d_out", [4096, 4099])
@pytest.mark.parametrize("intel", [False, True])
def test_linear_of_few_vectors(lead, d_out, intel, dtype, tolerance, two_threads, monkeypatch):
    """As in decoding: for 1 to 32 vectors a large matrix is read in other ways, and packed ones are for any number."""
    monkeypatch.setattr(tinylm, "IS_INTEL", intel)
    x, w = randn(*lead, 24).to(dtype), randn(d_out, 24, seed=1).to(dtype)
    expected = x.double() @ w.double().T
    packed = tinylm.pack(w)
    assert packed.is_mkldnn or dtype == torch.bfloat16 or not tinylm.HAS_ONEDNN, "not every CPU packs bfloat16"
    for w in (w, packed):
        actual = tinylm.linear(x, w)
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert (actual - expected).norm() <= tolerance * expected.norm()
    exact = tinylm.linear(x.double(), packed)  # as where a fork computes in another dtype than weights are laid out in
    assert exact.dtype == torch.float64 and (exact - expected).norm() <= 1e-6 * expected.norm()
    assert torch.backends.mkldnn.enabled

@pytest.mark.parametrize("compiled, intel", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("d_in, d_out", [(64, 4000), (4000, 64), (256, 260), (32, 64), (31, 64)])
def test_linear_of_large_matrices(d_in, d_out, compiled, intel, monkeypatch):
    """Values and gradients, the gradients the same bits each time; that of the result comes transposed. Large products
    are oneDNN's, but on Intel's CPUs, and one has its operation for the gradient of the matrix.
    """
    monkeypatch.setattr(tinylm, "IS_INTEL", intel)
    torch._dynamo.reset()
    shapes = (3, 700, d_in), (d_out, d_in)
    x, w = (randn(*shape, seed=seed).float().requires_grad_() for seed, shape in enumerate(shapes))
    upstream = randn(d_out, 3, 700, seed=2).float().permute(1, 2, 0)
    function = torch.compile(tinylm.linear) if compiled else tinylm.linear
    actual = (y := function(x, w)), *torch.autograd.grad(y, (x, w), upstream)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        again = torch.autograd.grad(function(x, w), (x, w), upstream)
    is_large = d_in * d_out > 32 * 64 or d_in == 32 and tinylm.HAS_AVX512
    products = [event for event in profile.events() if event.name in ("aten::mm", "mkldnn::_linear_pointwise",
                                                                     "aten::mkldnn_linear_backward_weights")]
    by_onednn = [event.name != "aten::mm" for event in products]
    assert by_onednn == [tinylm.HAS_ONEDNN and is_large and not intel] * 3
    has_own = any(event.name.endswith("backward_weights") for event in products)
    assert has_own == (by_onednn[0] and d_in == 256)
    y = F.linear(x.double(), w.double())
    for a, e in zip(actual, (y, *torch.autograd.grad(y, (x, w), upstream.double()))):
        assert a.shape == e.shape and a.is_contiguous() and (a - e).norm() <= 1e-5 * e.norm()
    assert all(map(torch.equal, actual[1:], again))

def test_compiled_linear_of_two_dtypes(monkeypatch):
    """A matrix is cast to x's dtype, as the definition does, also where the product is oneDNN's."""
    monkeypatch.setattr(tinylm, "IS_INTEL", False)
    torch._dynamo.reset()
    x, w = randn(64, 768).float(), randn(1024, 768, seed=1).bfloat16()
    actual, expected = torch.compile(tinylm.linear, fullgraph=True)(x, w), F.linear(x.double(), w.double())
    assert actual.dtype == torch.float32 and (actual - expected).norm() < 1e-5 * expected.norm()

@pytest.fixture(scope="module")
def interpreted_kernels():
    """A process that is at work while kernels are built for GPUs, which takes as long and one core."""
    program = """if True:
        import math, types, numpy as np, torch, tinylm
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def numbers(x):  # bfloat16 is kept as the integers of its bits, and those it would multiply
            return (x.data.astype(np.uint32) << 16).view("f4") if x.data.dtype == np.uint16 else x.data.astype("f4")

        def dot(self, a, b, c, *_):
            return TensorHandle(numbers(a) @ numbers(b) + c.data, c.dtype.scalar)

        def load(self, *arguments, plain_load=InterpreterBuilder.create_masked_load):
            loaded = plain_load(self, *arguments)
            assert np.isfinite(numbers(loaded)).all(), "read behind a tensor"
            return loaded

        InterpreterBuilder.create_dot, InterpreterBuilder.create_masked_load = dot, load
        torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(L2_cache_size=40_000)
        torch.set_float32_matmul_precision("high")
        tinylm.is_h100_or_b200 = lambda x: True
        tinylm.has_triton, tinylm.attention_in_tiles = lambda x: True, None
        tinylm.has_small_kernels = lambda x: not torch.is_grad_enabled()  # also on a CPU
        tinylm.KERNEL_BLOCKS = dict.fromkeys(tinylm.KERNEL_BLOCKS, ((32, 16, 4, 3),) * 4)
        tinylm.KERNEL_BLOCKS["keys_backward_kernel"] = ((16, 32, 4, 3),) * 4
        run_kernel, generator, ran = tinylm.run_kernel, torch.Generator().manual_seed(0), set()
        tinylm.run_kernel = lambda name, *args, **options: [ran.add(name), run_kernel(name, *args, **options)]

        def random(*shape, dtype):
            x = torch.full((math.prod(shape) + 100_000,), torch.nan, dtype=dtype)[:math.prod(shape)]
            return x.view(shape).normal_(generator=generator)

        def compare(actual, expected, dtype, most={torch.bfloat16: 0.01, torch.float16: 1e-3, torch.float32: 1e-6}):
            error = (actual.double() - expected).norm() / expected.norm()
            assert actual.dtype == dtype, actual.dtype
            assert error < most[dtype], error

        for dtype, kv_heads, group, T, before, D, as_operations in (
                (torch.bfloat16, 1, 1, 64, 0, 16, True), (torch.float16, 2, 3, 35, 0, 24, False),
                (torch.bfloat16, 1, 2, 20, 41, 40, False), (torch.float16, 1, 4, 5, 4, 8, True),
                (torch.bfloat16, 3, 1, 2, 70, 80, False), (torch.float16, 1, 1, 50, 0, 128, True),
                (torch.float32, 1, 2, 60, 13, 24, False)):
            tinylm.is_compiled = lambda: as_operations  # in compiled code each pass is an operation
            sizes = (kv_heads * group, T), (kv_heads, before + T), (kv_heads, before + T), (kv_heads * group, T)
            lead = (1, 2)[as_operations]  # of one text heads stand apart, as a model gives them
            *inputs, upstream = (random(lead, T, H * D, dtype=dtype).unflatten(-1, (H, D)).transpose(1, 2)
                                 for H, T in sizes)
            results = []
            for function, kind in ((tinylm.attention.definition, torch.float64), (tinylm.attention, dtype)):
                leaves = [x.to(kind).requires_grad_() for x in inputs]
                out = function(*leaves)
                results.append((out, *torch.autograd.grad(out, leaves, upstream.to(kind))))
            for expected, actual in zip(*results):
                compare(actual, expected, dtype, {torch.bfloat16: 0.01, torch.float16: 1e-3, torch.float32: 6e-4})
                assert (actual.double() - expected).norm() > 5e-5 * expected.norm(), "not rounded"
        q, k, v = (random(1, 1, 5, 16, dtype=torch.float32) for _ in "qkv")
        v.view(torch.int32)[..., 3, :] = 0x7FFFFFFF  # NaN of CUDA
        InterpreterBuilder.create_masked_load = load.__kwdefaults__["plain_load"]
        assert tinylm.attention(q, k, v).isnan().all()
        InterpreterBuilder.create_masked_load = load

        torch.set_grad_enabled(False)
        for dtype, B, H, H_kv, D, position in ((torch.float32, 2, 4, 2, 16, 600), (torch.bfloat16, 1, 3, 3, 40, 0),
                                               (torch.float16, 3, 4, 1, 128, 64)):
            heads = lambda H, T: random(B, T, H * D, dtype=dtype).unflatten(-1, (-1, D)).transpose(1, 2)
            q, k, v = heads(H, 1), heads(H_kv, 1), heads(H_kv, 1)
            cache = {name: random(2, B, H_kv, position + 9, D, dtype=dtype)[1] for name in ("k", "v")}
            for x in cache.values():
                x[:, :, position:] = torch.nan
            doubles = {name: x.double() for name, x in cache.items()}
            out = tinylm.cached_attention(q, k, v, cache | {"filled": torch.tensor([position])})
            q, k, v = (x.double() for x in (q, k, v))
            compare(out, tinylm.cached_attention.definition(q, k, v, doubles | {"filled": position}), dtype)
            for name, x in cache.items():
                assert torch.equal(x.nan_to_num(), doubles[name].nan_to_num().to(dtype))
            angles = [random(6, D // 2, dtype=torch.float32) for _ in "cs"]
            for name, *inputs in (
                    ("rope", heads(H, 6), *angles), ("rope", heads(H, 1), *(x[:1] for x in angles)),
                    ("gated_silu", random(3, 501, dtype=dtype), random(3, 501, dtype=dtype)),
                    *(("linear", random(1, 1, size, dtype=dtype), random(rows, size, dtype=dtype))
                      for rows, size in ((7, 60 * D), (7, 3 * D), (8200 if D == 16 else 8, D))),
                    *(("rmsnorm", random(B, 7, 3 * D, dtype=dtype), random(3 * D, dtype=torch.float64).to(kind), 1e-2)
                      for kind in (torch.float32, torch.float64, dtype))):
                in_double = (x.double() if torch.is_tensor(x) else x for x in inputs)
                compare(tinylm.OPERATIONS[name](*inputs), tinylm.OPERATIONS[name].definition(*in_double), dtype)
        assert ran == {kernel.__name__ for kernel in tinylm.KERNELS if kernel.__name__.endswith("_kernel")}, ran
        """
    # Triton asks for the variable when it is imported, so this takes a process of its own.
    with subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT,
                          stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

def needs_kernels():
    """Skip where there is no Triton, or what it builds kernels by."""
    pytest.importorskip("triton")
    missing = tinylm.missing_to_build(tinylm.c_compilers())
    if missing:
        pytest.skip(f"Triton needs {missing}")

@pytest.mark.parametrize("name, capability, D, group, dtype", [
    ("attention_kernel", 90, 64, 1, "fp32"), ("keys_backward_kernel", 90, 64, 3, "fp32"),
    ("queries_backward_kernel", 90, 64, 1, "fp32"), ("queries_backward_kernel", 100, 32, 3, "fp32"),
    ("attention_kernel", 80, 80, 1, "bf16"), ("attention_kernel", 86, 128, 4, "bf16"),
    ("attention_kernel", 90, 128, 1, "fp16"), ("attention_kernel", 100, 64, 1, "bf16"),
    ("attention_kernel", 120, 128, 1, "bf16"), ("attention_kernel", 80, 8, 1, "bf16"),
    ("keys_backward_kernel", 80, 128, 3, "bf16"),
    ("keys_backward_kernel", 86, 80, 1, "bf16"), ("keys_backward_kernel", 89, 64, 1, "fp16"),
    ("keys_backward_kernel", 90, 128, 4, "bf16"), ("keys_backward_kernel", 120, 16, 1, "bf16"),
    ("queries_backward_kernel", 80, 64, 1, "bf16"), ("queries_backward_kernel", 86, 128, 4, "fp16"),
    ("queries_backward_kernel", 90, 128, 1, "bf16"), ("queries_backward_kernel", 120, 80, 1, "bf16")])
def test_kernels_of_attention_fit_gpus(name, capability, D, group, dtype, interpreted_kernels, monkeypatch, tmp_path,
                                       capsys):
    needs_kernels()
    options = tinylm.kernel_options(name, D, KINDS[dtype], capability in (90, 100))
    types = dict.fromkeys(("R", "S", "before"), "i32") | dict.fromkeys(("log_sum", "row_sum"), "*fp32")
    types = {k: types.get(k, f"*{dtype}") for k in tinylm.triton_kernels()[name].arg_names}
    multiples = ("R", "S", "before") if group == 1 else ()  # of 16, as most lengths are
    fits_gpu(name, capability, types, {"group": group} | options, multiples, monkeypatch, tmp_path, capsys)

@pytest.mark.parametrize("capability, dtype, D, group", [(80, torch.float32, 64, 1), (90, torch.bfloat16, 128, 4)])
def test_small_kernels_fit_gpus(capability, dtype, D, group, monkeypatch, tmp_path, capsys):
    """As they are launched for one token. Tensors are pretended."""
    needs_kernels()
    for name in ("has_triton", "has_small_kernels"):
        monkeypatch.setattr(tinylm, name, lambda x: True)
    launched = []
    monkeypatch.setattr(tinylm, "run_kernel", lambda *args, **options: launched.append((args, options)))
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(2, heads, 1, D, dtype=dtype) for heads in (2 * group, 2, 2))
        cache = {name: torch.empty(3, 2, 2, 99, D, dtype=dtype)[1] for name in ("k", "v")}
        tinylm.cached_attention(q, k, v, cache | {"filled": torch.zeros(1, dtype=torch.int64)})
        tinylm.rope(q, torch.empty(1, D // 2), torch.empty(1, D // 2))
        tinylm.rmsnorm(torch.empty(2, 1, 4096, dtype=dtype), torch.empty(4096), 1e-5)
        tinylm.gated_silu(torch.empty(2, 1, 700, dtype=dtype), torch.empty(2, 1, 700, dtype=dtype))
        for rows in (700, 8200):
            tinylm.linear(torch.empty(1, 1, 700, dtype=dtype), torch.empty(rows, 700, dtype=dtype))
    assert len(launched) == 6
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    for (name, _, *args), options in launched:
        args = dict(zip(tinylm.triton_kernels()[name].arg_names, args))
        types = {k: pointers[x.dtype] if torch.is_tensor(x) else "fp32" if isinstance(x, float) else "i32"
                 for k, x in args.items()}
        constexprs = {param.name for param in tinylm.triton_kernels()[name].params if param.is_constexpr}
        constants = {k: x for k, x in args.items() if k in constexprs or isinstance(x, int) and x == 1}
        multiples = [k for k, x in args.items() if isinstance(x, int) and x % 16 == 0]
        known = {"num_warps": 4} | constants | options
        fits_gpu(name, capability, types, known, multiples, monkeypatch, tmp_path, capsys)

def test_kernels_compute_the_definitions(interpreted_kernels):
    """In Triton's interpreter, attention in blocks so small that few queries fill several: values and gradients beside
    those of the definition in float64. Behind a tensor lies what is not a number, and none of that may be read."""
    needs_kernels()
    _, errors = interpreted_kernels.communicate()
    assert interpreted_kernels.returncode == 0, errors[-3000:]

def fits_gpu(name, capability, types, options, multiples, monkeypatch, tmp_path, capsys):
    """Assert that machine code, to build which needs no GPU, keeps no register in memory, and that a block has the
    registers and the shared memory that it takes. As a launch does it, it knows addresses and some numbers to be
    `multiples` of 16."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    kernel = tinylm.triton_kernels()[name]
    constants = {k: v for k, v in options.items() if k in kernel.arg_names}
    signature = types | dict.fromkeys(constants, "constexpr")
    place = {k: (i,) for i, k in enumerate(kernel.arg_names)}
    aligned = {place[k]: [["tt.divisibility", 16]] for k, kind in signature.items()
               if kind.startswith("*") or k in multiples and k not in constants}
    source = ASTSource(kernel, signature, {place[k]: v for k, v in constants.items()}, aligned)
    built = compile(source, GPUTarget("cuda", capability, 32), {k: v for k, v in options.items() if k not in constants})
    log = capsys.readouterr().out  # of NVIDIA's assembler
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    assert int(re.search(r"Used (\d+) registers", log)[1]) * 32 * options["num_warps"] <= 1 << 16
    assert built.metadata.shared <= {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[capability] << 10

def test_gpus_that_run_kernels(monkeypatch):
    monkeypatch.setattr(tinylm, "triton_kernels", dict)
    for capability, dtype, has in (((7, 5), torch.float16, False), ((8, 0), torch.float16, True),
                                   ((8, 0), torch.float64, False), ((12, 0), torch.bfloat16, True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert tinylm.has_triton(types.SimpleNamespace(is_cuda=True, device=0, dtype=dtype)) == has

def test_small_kernels_get_what_they_can_read(monkeypatch):
    """Tensors without gaps, but rope's heads; else another form serves."""
    monkeypatch.setattr(tinylm, "has_small_kernels", lambda x: True)
    x, angles, launched = randn(1, 16).float(), [randn(9, 8).float()] * 2, []
    monkeypatch.setattr(tinylm, "run_kernel", lambda name, grid, *args: launched.append((name, args)))
    turned = lambda *shape: randn(*shape).float().mT
    for name, *args in (("rope", turned(2, 3, 16, 9), *angles), ("rope", randn(9, 16).float(), *angles),
                        ("linear", x, turned(16, 5)), ("linear", randn(2, 16).float(), randn(5, 16).float()),
                        ("linear", randn(1, 8200).float(), randn(5, 8200).float()),
                        ("rmsnorm", x, 1.0, 1e-5), ("rmsnorm", randn(2, 16).float(), randn(2, 16).float(), 1e-5)):
        tinylm.OPERATIONS[name](*args)
        assert not launched, (name, launched)
    for name, *args in (("rope", randn(2, 9, 3, 16).float().transpose(1, 2), *angles), ("linear", x, randn(5, 16)),
                        ("gated_silu", randn(2, 3).float(), turned(3, 2)), ("gated_silu", turned(3, 2), randn(2, 3)),
                        ("rmsnorm", turned(16, 2), torch.ones(()).expand(16), 1e-5)):
        tinylm.OPERATIONS[name](*args)
        kernel, given = launched.pop()
        assert kernel == f"{name}_kernel"
        assert all(x.is_contiguous() for x in given[name == "rope":] if torch.is_tensor(x)), name

def test_attention_that_kernels_take(monkeypatch):
    """Of heads that fit; in float32 where TF32 is wanted."""
    monkeypatch.setattr(tinylm, "has_triton", lambda x: True)
    monkeypatch.setattr(tinylm, "is_h100_or_b200", lambda x: True)
    for precision, D, dtype, has in (("ieee", 64, torch.float32, False), ("tf32", 64, torch.float32, True),
                                     ("tf32", 80, torch.float32, False), ("ieee", 128, torch.bfloat16, True),
                                     ("ieee", 144, torch.bfloat16, False)):
        monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(fp32_precision=precision))
        assert tinylm.has_kernels(torch.empty(1, D, dtype=dtype)) == has, (precision, D)

@given(st.integers(1, 500), st.integers(1, 1 << 24), st.integers(1, 1 << 26))
def test_heads_side_by_side(N, bytes_of_one, l2_size):
    """As many as divide N and half of the L2 cache holds."""
    together = tinylm.side_by_side(N, N * bytes_of_one, l2_size)
    fitting = [n for n in range(1, N + 1) if N % n == 0 and n * bytes_of_one <= l2_size // 2]
    assert together == max(fitting, default=1)

@pytest.mark.parametrize("T, dtype, device, is_one", [
    (64, torch.bfloat16, "cuda", True), (64, torch.float32, "cuda", False), (64, torch.bfloat16, "cpu", False),
    (1, torch.bfloat16, "cuda", False), (200, torch.float32, "cpu", True)])
def test_compiled_attention_of_few_keys(T, dtype, device, is_one):
    """Where kernels may serve it is one operation, that writes no scores; else it is fused. Tensors are pretended."""
    graphs, backend = [], lambda graph, _: graphs.append(graph) or graph
    torch._dynamo.reset()
    with torch._subclasses.FakeTensorMode():
        q, k, v = (torch.empty(1, 2, n, 16, dtype=dtype, device=device) for n in (T, max(T, 64), max(T, 64)))
        torch.compile(tinylm.attention, backend=backend, fullgraph=True)(q, k, v)
    assert ("attention_forward" in graphs[0].code) == is_one

def test_products_in_float32_on_cuda_have_gradients(monkeypatch):
    """Which those that round to float32 alone have not."""
    asked, a = [], types.SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    monkeypatch.setattr(torch, "bmm", lambda a, b, **options: asked.append(options) or b)
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            assert tinylm.product_in_float32(a, torch.ones(1).bfloat16()).dtype in (torch.float32, torch.bfloat16)
    assert asked == [{}, {"out_dtype": torch.float32}]

@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtypes", [*itertools.permutations((torch.float64, torch.float32, torch.bfloat16), 2)])
def test_attention_to_keys_of_another_dtype(T, dtypes):
    """As where a cache has keys and values of another dtype: by forms as by the definition, in that of the queries."""
    q, k, v = attention_example(torch.float64, (2,), 2, 3, T, 7, 8)
    q, k, v = q.to(dtypes[0]), k.to(dtypes[1]), v.to(dtypes[1])
    actual, expected = tinylm.attention(q, k, v), tinylm.attention.definition(q, k, v)
    assert actual.dtype == dtypes[0]
    same(actual, expected, TOLERANCES[dtypes[0]])

@given(leading, st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_rope_is_a_rotation_by_the_position(lead, T, half, start):
    """As complex numbers, each pair is multiplied by exp(i · position · theta^(-2i/D))."""
    x = leaf(*lead, T, 2 * half)
    cos, sin = (table[start:] for table in tinylm.rope_angles(start + T, 2 * half, 100.0, NO_SCALING, "cpu"))
    angles = torch.arange(start, start + T).double()[:, None] * 100.0 ** (-torch.arange(half).double() / half)

    def theirs(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    same_with_gradients(lambda x: tinylm.rope(x, cos, sin), theirs, x, tolerance=2e-3 if start > 100 else 1e-4)

@given(leading, st.integers(1, 30))
def test_cross_entropy(lead, vocab_size):
    targets = torch.randint(vocab_size, lead, generator=generator())
    theirs = lambda x: F.cross_entropy(x.view(-1, vocab_size), targets.view(-1))
    same_with_gradients(lambda x: tinylm.cross_entropy(x, targets), theirs, leaf(*lead, vocab_size))
    same(tinylm.token_losses(randn(*lead, vocab_size), targets),
         F.cross_entropy(randn(*lead, vocab_size).view(-1, vocab_size), targets.view(-1), reduction="none").view(lead))

def test_rope_as_in_llama_3():
    """What turns more than 4 times in 8,192 positions is kept, what turns less than once takes 8 times as long."""
    plain = 5e5 ** -(torch.arange(64).double() / 64)
    turns = plain * 8192 / (2 * math.pi)
    _, sines = tinylm.rope_angles.definition(2, 128, 5e5, (8.0, 1.0, 4.0, 8192), "cpu")
    same(sines[1][turns > 4].double(), plain[turns > 4].sin(), 1e-6)
    same(sines[1][turns < 1].double(), (plain[turns < 1] / 8).sin(), 1e-6)

def test_cross_entropy_of_large_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    same(tinylm.cross_entropy(logits, torch.tensor([2])), torch.tensor(1e4))

@pytest.mark.parametrize("shape", [(), (7,), (3, 1024), (1, 3073)])
def test_gradient_of_an_embedding(shape):
    """As on CUDA; the mode of the process stays what it was."""
    tokens, d_out = torch.randint(50, shape, generator=generator()), randn(*shape, 6)
    w = leaf(50, 6)
    for mode in (0, 2):
        torch.set_deterministic_debug_mode(mode)
        with torch.profiler.profile(record_shapes=True) as profile:
            actual = tinylm.embedding_gradient(d_out, tokens, 50)
        (rows, _), *_ = next(event.input_shapes for event in profile.events() if "embedding_dense" in event.name)
        assert rows == max(3073, tokens.numel()) and torch.get_deterministic_debug_mode() == mode
    torch.set_deterministic_debug_mode(0)
    gaps = (torch.cat((x, x), 1)[:, :x.shape[1]] if len(shape) > 1 else x for x in (d_out, tokens))
    same(tinylm.embedding_gradient(*gaps, 50), actual)
    same(actual, torch.autograd.grad(F.embedding(tokens, w), w, d_out)[0])

@pytest.mark.parametrize("at_once", [1, 350, 1 << 27])
def test_every_form_of_the_loss(at_once, monkeypatch):
    """In pieces; and the losses of an evaluation, which come from what `forward` gives."""
    monkeypatch.setattr(tinylm, "LOGITS_AT_ONCE", at_once)
    targets = torch.randint(50, (11,), generator=generator())
    same_with_gradients(lambda x, w: tinylm.LossInPieces.apply(x, w, targets),
                        lambda x, w: F.cross_entropy(x @ w.T, targets), leaf(11, 6), leaf(50, 6, seed=1))
    x, w, targets_of_one = torch.ones(600, 4).bfloat16(), torch.zeros(3, 4).requires_grad_(), torch.zeros(600).long()
    dw, = torch.autograd.grad(tinylm.LossInPieces.apply(x, w, targets_of_one), w)  # of as many sums as there are pieces
    same(dw, torch.tensor([-2.0, 1.0, 1.0])[:, None].expand(3, 4) / 3, 0.01)
    with monkeypatch.context() as patch:  # compiled, each piece waits for the one before
        waited = []
        patch.setattr(tinylm, "is_compiled", lambda: True)
        patch.setattr(tinylm, "computed", lambda x, after: [waited.append(len(after)), x][1])
        tinylm.LossInPieces.apply(leaf(11, 6), leaf(50, 6, seed=1), targets)
    assert waited == [3] * {1: 10, 350: 1}.get(at_once, 0)
    config = small_config()
    params, (inputs, targets) = random_params(config), random_tokens(config, 2, 3, 9)
    expected = F.cross_entropy(tinylm.forward(params, inputs, config).mT, targets, reduction="none")
    pieces, to_logits = [], tinylm.to_logits
    monkeypatch.setattr(tinylm, "to_logits", lambda params, x, *more: [
        pieces.append(x[..., 0].numel()), to_logits(params, x, *more)][1])
    same(tinylm.token_losses_in_pieces(params, inputs, targets, config, torch.float32), expected, 1e-5)
    assert sum(pieces) == 27 and max(pieces) * 300 <= max(at_once, 300), "however long a text is"
    assert at_once < 9 * 300 or all(size % 9 == 0 for size in pieces), "whole rows, where they fit"
    for tie_embeddings, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        config = small_config(tie_embeddings=tie_embeddings)
        args = random_params(config), inputs, targets, config, dtype
        (loss, grads), (plain_loss, plain_grads) = (tinylm.value_and_grad(function, *args) for function in (
            tinylm.loss_in_pieces, tinylm.loss_fn.definition))
        tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
        assert loss.item() == pytest.approx(plain_loss.item(), rel=tolerance)
        for (path, g), (_, plain) in zip(tinylm.tree_leaves(grads), tinylm.tree_leaves(plain_grads)):
            assert (g - plain).norm() <= tolerance * plain.norm(), path

@pytest.mark.parametrize("tied", [False, True])
def test_an_evaluation_in_pieces_casts_and_gathers_the_output_matrix_once(tied, monkeypatch, mesh_of_one):
    monkeypatch.setattr(tinylm, "LOGITS_AT_ONCE", 900)  # three positions
    config, begin, casts, sent = small_config(tie_embeddings=tied), tinylm.begin_gather, [], []
    params, batch = random_params(config), random_tokens(config, 2, 3, 9)
    output = params.get("lm_head", params["embedding"])

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            is_cast = function is torch.ops.aten._to_copy.default and args[0].shape == output.shape
            casts.extend([function] if is_cast and args[0].dtype == torch.float32 else [])
            return function(*args, **kwargs or {})

    with torch.no_grad(), Casts():
        whole = tinylm.token_losses_in_pieces(params, *batch, config, torch.bfloat16)
    assert len(casts) == 1
    monkeypatch.setattr(tinylm, "begin_gather", lambda ws, dtypes: [sent.extend(ws), begin(ws, dtypes)][1])
    split = tinylm.shard(params, mesh_of_one)
    with torch.no_grad():
        same(tinylm.token_losses_in_pieces(split, *batch, config, torch.bfloat16), whole, 0.02)
    assert sum(w.shape == output.shape for w in sent) <= 2  # to look tokens up, and here

# ---- Learning ----

def random_tree(seed=0):
    return {"a": randn(4, 3, seed=seed), "b": {"c": randn(5, seed=seed + 1), "d": {"e": randn(2, 6, seed=seed + 2)}}}

def test_trees():
    tree = random_tree()
    paths, leaves = zip(*tinylm.tree_leaves(tree))
    assert paths == ("a", "b.c", "b.d.e")
    again = tinylm.tree_build(zip(paths, leaves))
    same(again, tree)
    same(tinylm.tree_map(torch.add, tree, tree), tinylm.tree_map(lambda x: 2 * x, tree))

def test_derivatives_of_adamw_are_not_wrong():
    """They are those of the definition, or there are none."""
    params = {"a": torch.ones(2, 3, requires_grad=True)}
    with pytest.raises(RuntimeError):
        new, _ = tinylm.adamw_update(params, tinylm.tree_map(lambda p: p * 2, params), tinylm.adamw_init(params), 0.1)
        new["a"].sum().backward()

def test_stacks_of_matrices(monkeypatch):
    """More than fit one, or each larger than one; and no direction of zeros."""
    matrices = tree_of((8, 5), (8, 5), (8, 5))
    for most in (80, 30):  # two at once, then one; each alone
        monkeypatch.setattr(tinylm, "STACKED_AT_MOST", {"cpu": most})
        same(tinylm.orthogonalize_all(matrices), tinylm.orthogonalize_all.definition(matrices), 1e-4)
    for function in (tinylm.orthogonalize, tinylm.orthogonalize.definition):
        assert not function(torch.zeros(2, 3, 5)).any()

ADAMW = {  # ways to compute it: each → the new params and state
    "as defined": lambda *args: tinylm.adamw_update.definition(*args),
    "few passes": lambda *args: tinylm.adamw_update_in_few_passes(*args),
    "with gradients": lambda *args: torch.enable_grad()(tinylm.adamw_update)(*args),
    "on a CPU": lambda *args: torch.no_grad()(tinylm.adamw_update)(*args),
}

@pytest.mark.parametrize("way", ADAMW)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_over_50_steps(weight_decay, way):
    """PyTorch's AdamW, with decay for matrices only, whatever gaps are in memory; the arguments stay as they were."""
    turned = lambda w: w.float().T.contiguous().T if w.ndim == 2 else w.float()
    tree = tinylm.tree_map(turned, random_tree())
    theirs = [t.clone().requires_grad_() for _, t in tinylm.tree_leaves(tree)]
    groups = [{"params": [t for t in theirs if t.ndim == 2], "weight_decay": weight_decay},
              {"params": [t for t in theirs if t.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    state, copy = tinylm.adamw_init(tree), tinylm.tree_map(torch.clone, tree)
    params = tree
    for step in range(50):
        grads = tinylm.tree_map(turned if step % 2 else torch.Tensor.float, random_tree(100 + step))
        for t, (_, g) in zip(theirs, tinylm.tree_leaves(grads)):
            t.grad = g.contiguous()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr = 0.01 * (step + 1)
        optimizer.step()
        params, state = ADAMW[way](params, grads, state, lr, 0.8, 0.95, 1e-6, weight_decay)
    same([t for _, t in tinylm.tree_leaves(params)], [t.detach() for t in theirs], 1e-5)
    same(tree, copy, 0)

@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_orthogonalize_keeps_directions_and_evens_out_singular_values(m, n, size):
    """The singular vectors stay, singular values that were not tiny come near 1; each matrix is on its own."""
    matrices = randn(3, m, n) * size * torch.tensor([1.0, 1e-2, 1e2]).view(3, 1, 1)
    for g, result in zip(matrices, tinylm.orthogonalize(matrices)):
        u, values, vt = torch.linalg.svd(g, full_matrices=False)
        core = u.T @ result @ vt.T
        new = core.diagonal()[values > 1e-3 * values.norm()]
        assert (new > 0.84).all() and (new < 1.15).all()
        same(core, torch.diag(core.diagonal()), 1e-6)

def test_muon_is_that_of_torch(monkeypatch):
    """PyTorch's Muon for the matrices of the blocks, its AdamW for the rest, over 20 steps; orthogonalised as there."""
    as_there = lambda g: torch.optim._muon._zeropower_via_newtonschulz(g, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    monkeypatch.setattr(tinylm, "orthogonalize", lambda matrices: torch.stack([*map(as_there, matrices)]))
    config = small_config()
    params = tinylm.init_params(config, generator())
    initial = dict(tinylm.tree_leaves(params))
    theirs = {path: p.clone().requires_grad_() for path, p in initial.items()}
    matrices = [p for path, p in theirs.items() if path.startswith("blocks.") and p.ndim == 2]
    rest = [p for path, p in theirs.items() if not (path.startswith("blocks.") and p.ndim == 2)]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.2},
                               {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}],
                              lr=0.01, betas=(0.8, 0.95))
    state = tinylm.muon_init(params)
    for step in range(20):
        grads = tinylm.tree_map(lambda p: randn(*p.shape, seed=step, dtype=torch.float32), params)
        for path, g in tinylm.tree_leaves(grads):
            theirs[path].grad = g.clone()
        muon.step()
        adamw.step()
        params, state = tinylm.muon_update(params, grads, state, 0.01, 0.8, 0.95, weight_decay=0.2)
    for path, p in tinylm.tree_leaves(params):
        assert (p - theirs[path]).norm() < (0.01 if path.startswith("blocks.") else 1e-5) * (p - initial[path]).norm()

def test_muon_serves_devices_that_no_form_knows():
    """As Apple's and Intel's; here that of shapes alone."""
    params = tinylm.tree_map(lambda w: w.to("meta"), random_params(small_config()))
    updated, _ = tinylm.muon_update(params, params, tinylm.muon_init(params), 0.01)
    assert [w.shape for _, w in tinylm.tree_leaves(updated)] == [w.shape for _, w in tinylm.tree_leaves(params)]

def test_defaults_by_size(monkeypatch):
    complete = lambda tokens=math.inf, **given: train.Settings.complete({"device": "cpu"} | given, train_tokens=tokens)
    assert [complete(d_model=d).num_heads for d in (32, 64, 66, 128, 704, 768, 1024)] == [1, 2, 1, 4, 22, 12, 16]
    assert [complete(d_model=d).num_layers for d in (128, 320, 480, 768)] == [4, 5, 8, 12]
    assert [complete(tokens).context_length for tokens in (10, 1000, 2047, 2048)] == [2, 64, 128, 256]
    assert [complete(num_steps=n).warmup_steps for n in (5, 100, 5000)] == [0, 10, 100]
    assert complete(num_steps=5, warmup_steps=5).warmup_steps == 5
    assert [complete(num_steps=n).eval_interval for n in (1, 100, 5000)] == [1, 20, 500]
    assert [prepare.default_vocab_size(n) for n in (16_383, 16_384, 40_000, 10**6)] == [257, 512, 1250, 2048]
    with pytest.raises(cli.InputError, match="--lr_min=1.*: expected a number from 0 up to lr_max, 0.1"):
        complete(lr_max=0.1, lr_min=1)
    monkeypatch.setattr(machine, "choose_device", lambda device: device or "cuda")
    for name in ("has_bfloat16", "check_compiler", "check_dtype"):
        monkeypatch.setattr(machine, name, lambda *_: True)
    batch_size = lambda tokens: train.Settings.complete({}, train_tokens=tokens).batch_size
    assert [batch_size(tokens) for tokens in (math.inf, 160_000, 9)] == [128, 24, 4]
    assert train.Settings.complete({"device": "cuda:1"}, train_tokens=9).d_model == 512
    monkeypatch.setattr(machine, "num_ranks", lambda: 3)
    assert batch_size(math.inf) == 132
    with pytest.raises(cli.InputError, match="--batch_size=4 can't be split over 3 ranks"):
        complete(batch_size=4)

def test_defaults_follow_from_the_text_and_the_width(tmp_path, capsys):
    """A text that is read often gets fewer steps and more decay, never too much; what is given stays."""
    complete = lambda tokens=math.inf, **given: train.Settings.complete({"device": "cpu"} | given, train_tokens=tokens)
    assert (complete(10**7).num_steps, complete(10**7).weight_decay, complete().weight_decay) == (2500, 0.1, 0.1)
    decays = [complete(tokens).weight_decay for tokens in (300_000, 80_000, 30_000, 1000, 10)]
    assert decays == sorted(decays) and decays[1] == 3.2  # 1 / (4e-3 · 80,000 / 1,024)
    for tokens, optimizer in itertools.product((10, 1000, 30_000), tinylm.OPTIMIZERS):
        for given in ({}, {"num_steps": 100_000}, {"lr_max": 1.0}, {"lr_max": 0}):
            chosen = complete(tokens, optimizer=optimizer, **given)
            assert chosen.lr_max * chosen.weight_decay <= max(0.041, 0.1 * chosen.lr_max)
            assert chosen.context_length < tokens
            assert "num_steps" in given or chosen.num_steps == 800
    assert complete(80_000).num_steps == round(16 * 80_000 / 1024)
    assert complete(1000, weight_decay=0.5).weight_decay == 0.5 and complete(1000, num_steps=7).num_steps == 7
    pretrained = train.Settings.complete({"device": "cpu"}, train_tokens=80_000, is_pretrained=True)
    assert (pretrained.num_steps, pretrained.weight_decay, pretrained.lr_max) == (234, 0.1, complete().lr_max / 20)
    layers = [complete(d_model=d).num_layers for d in (64, 128, 256, 512, 768, 1024)]
    assert layers == [4, 4, 4, 8, 12, 16]
    data, flags = prepared(tmp_path, many_stories(10)), TINY | dict(num_steps=50)
    train.train(data=data, output_dir=tmp_path / "run", **flags)
    chosen = complete(len(prepare.open_data(data)[1]["train"]), **flags)
    assert chosen.weight_decay > 0.1
    said = f"reads       the text {chosen.epochs:.2g} times in all; weight decay {chosen.weight_decay:.2g}"
    assert said in capsys.readouterr().out

def test_epochs_and_seeds_have_windows_of_their_own():
    """And the last token is learned too."""
    tokens = np.arange(1001, dtype=np.uint16)
    windows = lambda seed, epoch: tinylm.get_batch(tokens, 99, 10, seed, epoch)
    orders = [windows(seed, epoch)[0][:, 0] for seed in range(3) for epoch in range(3)]
    assert len({tuple(((order - order.min()) // 10).tolist()) for order in orders}) == 9
    assert len({order.min().item() for order in orders}) > 2
    assert max(windows(0, epoch)[1].max().item() for epoch in range(100)) == 1000

def test_remat_computes_each_block_again(monkeypatch):
    calls, swiglu = [], tinylm.swiglu
    monkeypatch.setattr(tinylm, "swiglu", lambda *args, **weights: [calls.append(1), swiglu(*args, **weights)][1])
    tokens = random_tokens(small_config(), 2, 9)
    for remat, count, forms in ((False, 2, []), (True, 4, []), (True, 4, [(tinylm.always, tinylm.loss_in_pieces)])):
        settings = train.Settings.complete(dict(device="cpu", remat=remat))
        monkeypatch.setattr(tinylm.loss_fn, "forms", forms)  # that of CUDA too
        calls.clear()
        train.step_functions(small_config(), settings)[0](random_params(small_config()), tokens, tokens)
        assert len(calls) == count

def test_remat_changes_nothing():
    config = small_config()
    params, tokens = tinylm.init_params(config, generator()), random_tokens(config, 2, 21)
    args = params, tokens[:, :-1], tokens[:, 1:], config, torch.float32
    results = [tinylm.value_and_grad(tinylm.loss_fn, *args, remat) for remat in (False, True)]
    same(results[0], results[1], 0)

@given(st.floats(1e-3, 100))
def test_clip_gradients(max_norm):
    tree = random_tree()
    theirs = [t.clone().requires_grad_() for _, t in tinylm.tree_leaves(tree)]
    for t in theirs:
        t.grad = t.detach().clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    norm = tinylm.global_norm(tree)
    clipped = tinylm.clip_gradients(tree, norm, max_norm)
    same(norm.double(), expected, 1e-5)
    same([t for _, t in tinylm.tree_leaves(clipped)], [t.grad for t in theirs], 1e-5)

def test_the_norm_of_many_numbers():
    """Of 2^21 added one after another float32 loses 3e-5."""
    tree = {"a": randn(2048, 1024).float() + 3, "b": {"c": torch.ones(3), "d": torch.tensor(2.0)}}
    exact = torch.cat([leaf.double().flatten() for _, leaf in tinylm.tree_leaves(tree)]).norm()
    same(tinylm.global_norm(tree).double(), exact, 1e-6)
    split = {"a": {str(i): part for i, part in enumerate(tree["a"].chunk(8))}, "b": tree["b"]}  # as ranks have them
    same(tinylm.global_norm(split).double(), exact, 1e-6)

def test_the_norm_in_few_launches_is_that_of_float32():
    tree = {"a": torch.full((40, 50), 300.0).half(), "b": {"c": torch.ones(3)}}  # half's numbers end at 65,504
    same(tinylm.global_norm_in_few_launches(tree), tinylm.global_norm.definition(tree), 1e-5)
    large = {"a": torch.full((1024, 1024), 3000.0).half()}  # of which a row's norm is beyond them
    assert tinylm.global_norm(large).item() == pytest.approx(3000 * 1024, rel=1e-5)

def test_hyperparameters_reach_the_update():
    """Decay, of a gradient of zero; and the norm to clip at, which is told as it was before."""
    params, size = random_params(small_config()), lambda tree: math.sqrt(
        sum(p.square().sum().item() for _, p in tinylm.tree_leaves(tree)))

    def updated(grads, **given):
        settings = train.Settings.complete(dict(device="cpu", d_model=32, num_layers=2) | given)
        _, update, _ = train.step_functions(small_config(), settings)
        own = tinylm.tree_map(torch.clone, params)  # which are donated
        return update(own, grads, tinylm.adamw_init(params), torch.tensor(0.1), torch.tensor(1.0))

    new, _, _ = updated(tinylm.tree_map(torch.zeros_like, params), weight_decay=2.0)
    same(new["lm_head"], params["lm_head"] * 0.8, 1e-5)
    _, state, norm = updated(params, clip_grad=0.5, beta1=0.7)
    assert norm.item() == pytest.approx(size(params)) and size(state["m"]) == pytest.approx(0.5 * 0.3, rel=1e-4)
    settings = train.Settings.complete(dict(device="cpu", optimizer="muon", momentum=0.5))
    assert settings.of_optimizer["momentum"] == 0.5 and settings.of_optimizer["eps"] == 1e-8

def test_cosine_lr():
    lr = lambda step: tinylm.cosine_lr(step, 1.0, 0.1, 10, 110)
    assert [lr(0), lr(9), lr(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert lr(60) == pytest.approx(0.55) and lr(110) == pytest.approx(0.1) and lr(1000) == pytest.approx(0.1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, 0.1)
    for step in range(10, 110):
        assert lr(step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()

@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_shuffled_index_visits_everything_once(length, key):
    assert sorted(tinylm.shuffled_index(np.arange(length), length, key).tolist()) == list(range(length))

@given(st.integers(10, 400), st.integers(1, 9), st.integers(1, 7), st.integers(0, 2**62))
def test_get_batch(num_tokens, context_length, batch_size, seed):
    """Batches are windows of the text; an epoch visits each of its windows once; ranks share out the step's batch."""
    tokens = np.arange(num_tokens, dtype=np.uint16)
    num_windows = max(1, (num_tokens - 1) // context_length - 1)
    starts = []
    for step in range(-(-num_windows // batch_size)):
        inputs, targets = tinylm.get_batch(tokens, batch_size, context_length, seed, step)
        assert inputs.shape == (batch_size, context_length) and inputs.dtype == torch.int64
        same(inputs[:, 1:], inputs[:, :-1] + 1)
        same(targets, inputs + 1)
        starts += inputs[:, 0].tolist()
    assert len(set(starts[:num_windows])) == num_windows
    assert len({start % context_length for start in starts[:num_windows]}) == 1
    whole = tinylm.get_batch(tokens, 2 * batch_size, context_length, seed, 3)
    parts = [tinylm.get_batch(tokens, batch_size, context_length, seed, 3, rank, 2) for rank in range(2)]
    same(torch.cat([part[0] for part in parts]), whole[0])

def test_tokens_without_one_behind_them_are_no_window():
    assert tinylm.get_batch(np.arange(9), 1, 8, 0, 0)[1].tolist() == [[*range(1, 9)]]
    with pytest.raises(ValueError, match="8 tokens can't fill one window of context_length 8 and the token after it"):
        tinylm.get_batch(np.arange(8), 1, 8, 0, 0)

@given(st.integers(2, 200), st.integers(1, 9), st.integers(1, 5))
def test_eval_batches_cover_each_token_once(num_tokens, context_length, batch_size):
    targets = []
    for inputs, following, real in train.eval_batches(np.arange(num_tokens), batch_size, context_length):
        assert inputs.shape == following.shape == (batch_size, context_length)
        targets += following.flatten()[:real].tolist()
        same(inputs.flatten()[:real] + 1, following.flatten()[:real])
    assert targets == list(range(1, num_tokens))

# ---- Model ----

SIZES = [dict(), dict(tie_embeddings=True), dict(num_heads=4, num_kv_heads=2),
         dict(num_heads=4, num_kv_heads=1, d_ff=40),
         dict(head_dim=16, rope_scaling=(8.0, 1.0, 4.0, 16)), dict(rope_scaling=(4.0, 1.0, 2.0, 0), num_kv_heads=2)]

def small_config(**changes):
    return tinylm.Config(**dict(vocab_size=300, context_length=32, d_model=32, num_layers=2, num_heads=4) | changes)

def random_params(config, seed=0):
    """Parameters far enough from the start that every part of the model matters, gains included."""
    noise = generator(seed + 1)
    initial = tinylm.init_params(config, generator(seed))
    return tinylm.tree_map(lambda p: p + 0.2 * torch.randn(p.shape, generator=noise), initial)

def forward_cached(params, tokens, config, cache, dtype=torch.float32):
    """`forward`, that sees what is in a cache; and the cache behind it."""
    x, cache = tinylm.hidden_states(params, tokens, config, dtype, cache)
    return tinylm.to_logits(params, x), cache

def random_tokens(config, *shape, seed=0):
    return torch.randint(config.vocab_size, shape, generator=generator(seed))

def hf_model(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()

@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(many_stories(100, end=END))
    bpe.save(bpe.train([folder / "text.txt"], 300), folder / "tokenizer.json")
    return folder / "tokenizer.json"

@pytest.fixture
def saved(tmp_path, tokenizer_file):
    """A function that saves a model with a tokenizer → its folder."""
    def save(params=None, config=small_config(), name="m", **options):
        checkpoint.save_checkpoint(tmp_path / name, params or tinylm.init_params(config, generator()), config,
                                   files.read_json(tokenizer_file), (END, 256), **options)
        return tmp_path / name

    return save

@pytest.mark.parametrize("sizes", SIZES)
def test_model_is_transformers_llama(sizes, tokenizer_file, saved):
    config = small_config(**sizes)
    params = random_params(config)
    folder = saved(params, config)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokens = random_tokens(config, 3, 20)
    with torch.no_grad():
        same(tinylm.forward(params, tokens, config), model.eval()(tokens).logits, 1e-4)
    greedy = torch.stack(list(tinylm.generate(params, tokens[:, :5], config, 12, temperature=0)), 1)
    theirs = model.generate(tokens[:, :5], attention_mask=torch.ones(3, 5), max_new_tokens=12, min_new_tokens=12,
                            do_sample=False, eos_token_id=None, pad_token_id=0)
    same(greedy, theirs[:, 5:])
    text = "Once upon a time, there was a naïve 🦊.<|endoftext|>"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = bpe.encode(bpe.load(tokenizer_file), text).tolist()
    assert theirs(text, add_special_tokens=False).input_ids == ids and theirs(text).input_ids == [256] + ids
    assert theirs.eos_token == END

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("d_model, vocab_size", [(64, 257), (128, 2048), (512, 10000), (768, 50304)])
def test_first_loss_is_that_of_a_uniform_guess(tied, d_model, vocab_size):
    config = tinylm.Config(vocab_size, 32, d_model, 2, d_model // 32, tie_embeddings=tied)
    params, tokens = tinylm.init_params(config, generator()), random_tokens(config, 4, 33)
    loss = tinylm.loss_fn(params, tokens[:, :-1], tokens[:, 1:], config).item()
    assert math.log(vocab_size) - 0.1 < loss < math.log(vocab_size) + (2.5 if tied else 0.1)
    assert sum(p.numel() for _, p in tinylm.tree_leaves(params)) == tinylm.num_params(config)

@pytest.mark.parametrize("sizes", SIZES)
def test_cache_gives_the_same_logits(sizes):
    config = small_config(**sizes)
    params, tokens = random_params(config), random_tokens(config, 2, 24)
    whole = tinylm.forward(params, tokens, config)
    cache, pieces, start = tinylm.init_cache(config, 2, 32, torch.float32, "cpu"), [], 0
    for size in (7, 1, 1, 10, 5):
        logits, cache = forward_cached(params, tokens[:, start:start + size], config, cache)
        pieces.append(logits)
        start += size
    same(torch.cat(pieces, 1), whole, 1e-5)

@pytest.mark.parametrize("tied", [False, True])
def test_deviations_of_first_parameters(tied):
    """Those that `init_params` tells of."""
    config = tinylm.Config(2000, 8, 128, 8, 4, d_ff=512, tie_embeddings=tied)
    stream, into = 128**-0.5, 16**-0.5 / (5 if tied else 1)
    expected = {"embedding": stream if tied else 1.0, "lm_head": stream / 3, "wo": into * stream,
                "w_down": into * 512**-0.5}
    for path, w in tinylm.tree_leaves(tinylm.init_params(config, generator())):
        if w.ndim == 2:
            assert w.std().item() == pytest.approx(expected.get(path.split(".")[-1], stream), rel=0.03), path

def test_positions_beyond_the_context():
    with pytest.raises(ValueError, match="33 positions, 0 of them cached; expected 32 at most"):
        tinylm.forward(random_params(small_config()), random_tokens(small_config(), 1, 33), small_config())

def test_of_a_long_prompt_the_end_is_read():
    config, prompt = small_config(context_length=8), random_tokens(small_config(), 2, 13)
    params = random_params(config)
    first = next(tinylm.generate(params, prompt, config, 1, temperature=0))
    assert first.equal(tinylm.forward(params, prompt[:, -8:], config)[:, -1].argmax(-1))

def test_bfloat16_is_close_to_float32():
    config = small_config()
    params, tokens = tinylm.init_params(config, generator()), random_tokens(config, 2, 24)
    args = tokens[:, :-1], tokens[:, 1:], config
    loss, grads = tinylm.value_and_grad(tinylm.loss_fn, params, *args)
    half, half_grads = tinylm.value_and_grad(tinylm.loss_fn, params, *args, torch.bfloat16)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=1e-2)
    for (_, g), (path, h) in zip(tinylm.tree_leaves(grads), tinylm.tree_leaves(half_grads)):
        assert h.dtype == torch.float32 and (g - h).norm() < 0.05 * g.norm(), path

def draw(logits, temperature, top_k, top_p, seed):
    chance = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator(seed))
    return tinylm.sample_token(logits, chance, temperature, top_k, top_p)

@given(st.integers(0, 5), st.floats(0.1, 3), st.integers(0, 15), st.floats(0.01, 1))
def test_sample_token_draws_from_the_nucleus(seed, temperature, top_k, top_p):
    logits = randn(12, seed=seed).expand(500, -1)
    chances = (torch.arange(500, dtype=torch.float64)[:, None] + 0.5) / 500  # all alike, so that no luck is in it
    drawn = torch.bincount(tinylm.sample_token(logits, chances, temperature, top_k, top_p), minlength=12) / 500
    p = F.softmax(logits[0] / temperature, 0)
    ranked = sorted(range(12), key=lambda i: -p[i])[:top_k or 12]
    kept, mass = [], 0.0
    for i in ranked:
        if mass >= top_p - 1e-6:
            break
        kept.append(i)
        mass += p[i].item() / p[ranked].sum().item()
    expected = torch.zeros(12, dtype=torch.float64)
    expected[kept] = p[kept] / p[kept].sum()
    assert (drawn.double() - expected).abs().max() < 0.005

def test_the_coldest_samples_are_the_best():
    """Also where logits over the temperature are beyond what float32 has."""
    logits = torch.tensor([[-1.0, -5.0, -6.0, -7.0], [3e3, 2e3, -1e30, 0.0]])
    for most in ((0, 1.0), (3, 1.0), (0, 0.9)):  # each by a way of its own
        for temperature, seed in itertools.product((1e-46, 1e-40, 1e-30, 1e-10), range(20)):
            assert draw(logits, temperature, *most, seed).tolist() == [0, 0]
        assert draw(torch.ones(20, 5), 0, *most, 0).tolist() == 20 * [0], "of ties it is the first"

def test_sample_token_of_logits_with_gradients():
    logits = leaf(2, 50)
    for most in ((0, 1.0), (3, 1.0), (0, 0.9)):
        same(draw(logits, 1.0, *most, 0), draw(logits.detach(), 1.0, *most, 0))

def test_sample_token_draws_from_a_large_vocabulary():
    """The nucleus of a flat distribution and of a peaked one, of each row its own."""
    logits = torch.stack((randn(5000) * 0.1, randn(5000, seed=1) * 4)).float()
    drawn = torch.stack([draw(logits, 1.0, 0, 0.5, seed) for seed in range(500)], 1)
    for row, p in zip(drawn, F.softmax(logits.double(), -1)):
        best = p.sort(descending=True)
        nucleus = best.indices[:1 + (best.values.cumsum(0) < 0.5).sum()]
        expected = (p[nucleus] / p[nucleus].sum() * p[nucleus].log()).sum()
        assert torch.isin(row, nucleus).all() and (p[row].log().mean() - expected).abs() < 0.3

@pytest.mark.parametrize("scale", [0, 4, 30, 1e4])
def test_a_nucleus_of_almost_all(scale):
    """Also where the shares of a large vocabulary, as they are rounded, never add up to top_p."""
    logits = randn(3, 40_000).float() * scale
    p = F.softmax(logits.double(), -1)
    for chance in (0.0, 0.5, 1 - 2**-53):
        chances = torch.full((3, 1), chance, dtype=torch.float64)
        best = tinylm.sample_token(logits, chances, 1.0, 0, 1e-46)
        assert logits.gather(1, best[:, None]).equal(logits.amax(1, keepdim=True))
        for top_p in (1 - 1e-9, 1 - 1e-16):
            drawn = tinylm.sample_token(logits, chances, 1.0, 0, top_p)[:, None]
            reached, mass = p.cumsum(1).gather(1, drawn), p.gather(1, drawn)
            assert mass.gt(0).all() and (reached - mass - 1e-5 < 1 - chances).all()
            assert (1 - chances < reached + 1e-5).all()

@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_sample_token_of_numbers_that_are_not_finite(number):
    """A model that has diverged draws a token of the vocabulary too; on CUDA another index would kill the process."""
    for logits in (torch.full((2, 50), number), randn(2, 50).masked_fill(randn(2, 50, seed=1) > 0, number)):
        for options in ((1.0, 0, 1.0), (0.01, 0, 0.9), (0.5, 5, 0.9), (0, 0, 1.0)):
            token = draw(logits, *options, 0)
            assert token.shape == (2,) and 0 <= token.min() and token.max() < 50
            assert draw(logits[:0], *options, 0).dtype == torch.int64

@pytest.mark.parametrize("tied", [False, True])
def test_generate_many_rows_is_generate_each(tied):
    # Matrices large enough to be read in other ways for few rows.
    config = small_config(vocab_size=2048, d_model=64, tie_embeddings=tied)
    params, prompt = random_params(config), random_tokens(config, 17, 5)
    together, alone = (torch.cat([torch.stack(list(tinylm.generate(params, part, config, 9, temperature=0)), 1)
                                  for part in prompt.split(size)]) for size in (17, 1))
    assert together.equal(alone)

@pytest.mark.parametrize("rows", [1, 3, 17])
def test_decoding_in_bfloat16_is_near_float32(rows):
    """Token by token, from a cache in float32 as on a CPU; as near as one pass in bfloat16 over the whole is."""
    config = small_config(vocab_size=2048, d_model=64)
    params, tokens = random_params(config), random_tokens(config, rows, 12)
    exact, cache = tinylm.forward(params, tokens, config), tinylm.init_cache(config, rows, 12, torch.bfloat16, "cpu")
    with torch.inference_mode():
        at_once = tinylm.forward(params, tokens, config, torch.bfloat16)
        if rows > 1:
            params = tinylm.weights_for_generation(params, torch.bfloat16, rows)
        parts = []
        for part in tokens.split((5, 2, 1, 1, 1, 1, 1), 1):
            logits, cache = forward_cached(params, part, config, cache, torch.bfloat16)
            parts.append(logits)
    parts = torch.cat(parts, 1)
    assert parts.dtype == torch.bfloat16
    assert (parts - exact).norm() < 1.5 * (at_once - exact).norm() < 0.05 * exact.norm()

def test_generate_in_float64():
    config = small_config()
    params, tokens = tinylm.tree_map(torch.Tensor.double, random_params(config)), random_tokens(config, 2, 5)
    before = torch.get_rng_state()
    for token in tinylm.generate(params, tokens, config, 9, temperature=0, dtype=torch.float64):
        assert tinylm.forward(params, tokens, config, torch.float64)[:, -1].argmax(-1).equal(token)
        tokens = torch.cat((tokens, token[:, None]), 1)
    assert torch.get_rng_state().equal(before)

def test_generate_slides_and_stops():
    """Beyond the context the older half goes: the next token is that of a fresh pass over the newer half."""
    config = small_config(context_length=8)
    params, prompt = random_params(config), random_tokens(config, 2, 5)
    written = [row[:, None] for row in tinylm.generate(params, prompt, config, 20, temperature=0)]
    tokens = torch.cat([prompt] + written, 1)
    window = prompt
    for i in range(5, 25):
        if window.shape[1] > 8:
            window = window[:, -4:]
        assert tinylm.forward(params, window, config)[:, -1].argmax(-1).equal(tokens[:, i])
        window = torch.cat((window, tokens[:, i:i + 1]), 1)
    stop = tokens[0, 8].item()
    stopping = tinylm.generate(params, prompt[:1], config, 20, temperature=0, stop_tokens=(-1, stop))
    row = torch.stack(list(stopping), 1)[0].tolist()
    assert row == tokens[0, 5:5 + len(row)].tolist() and row.index(stop) == len(row) - 1

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_write_the_same(dtype, monkeypatch):
    """As on CUDA, but for the record itself: steps of fixed shapes, for 4, 8, 16 and 21 keys, of a window that slides.
    Every one is recorded once."""
    recorded = []
    monkeypatch.setattr(tinylm, "KEYS_AT_LEAST", 4)
    monkeypatch.setattr(tinylm, "record", lambda function: recorded.append(function) or record_on_cpu(function))
    config = small_config(context_length=21, num_kv_heads=2)
    params, prompt = random_params(config), random_tokens(config, 3, 2)
    for temperature, stops_at in ((0, None), (1, None), (1, 30)):
        stops = expected[:2, stops_at].tolist() if stops_at else ()
        write = lambda: torch.stack(list(tinylm.generate(params, prompt, config, 60, temperature, 0, 0.9, stops,
                                                         generator(1), dtype)), 1)
        expected = write()
        with monkeypatch.context() as patch:
            one_token = lambda params, tokens, *_: tokens.shape[1] == 1
            patch.setattr(tinylm.next_token, "forms", [(one_token, tinylm.next_token_in_graph)])
            assert write().equal(expected)
    assert len(recorded) == 3 * 4 and (expected[0, 30:] == stops[0]).all()

def test_recorded_steps_follow_parameters_and_caches(monkeypatch):
    """Those of a cache with which other parameters begin anew, or another model, dtype or temperature, and of one whose
    texts were put in another order. They keep what they read of what is computed once."""
    config, tokens = small_config(), random_tokens(small_config(), 2, 2)
    chance, stopped, written = torch.tensor([[0.2], [0.8]]).double(), torch.zeros(2, dtype=torch.bool), []
    for forms in ([], [(tinylm.always, tinylm.next_token_in_graph)]):
        monkeypatch.setattr(tinylm, "record", record_on_cpu)
        monkeypatch.setattr(tinylm.next_token, "forms", forms)
        cache = tinylm.init_cache(config, 2, 12, torch.float32, "cpu")
        with torch.no_grad():
            for params in (random_params(config, 1), random_params(config, 2)):
                cache = cache | {"filled": 0}
                for i in range(12):
                    if i == 3:
                        cache = cache | {name: cache[name][:, [1, 0]] for name in ("k", "v")}
                    changed = replace(config, norm_eps=0.5) if 5 < i else config
                    dtype, temperature = torch.bfloat16 if 7 < i else torch.float32, 0 if 9 < i else 1.0
                    token, cache, _ = tinylm.next_token(params, tokens[:, :1], changed, dtype, cache, chance, stopped,
                                                        temperature, 0, 1.0, ())
                    written.append((token, *(cache[name].clone() for name in ("k", "v"))))
    torch.testing.assert_close(written[24:], written[:24])
    drawn = []
    for top_k, top_p, stops in ((0, 1.0, ()), (1, 1.0, ()), (0, 1e-3, ()), (0, 1.0, (5,))):  # by one cache too
        cache["filled"] = 3
        for _ in range(3):
            now = tinylm.next_token(params, tokens[:, :1], config, torch.float32, cache, chance, ~stopped, 9.0, top_k,
                                    top_p, stops)
        drawn.append(now[0].tolist())
    assert drawn[1] == drawn[2] != drawn[0] and drawn[3] == [5, 5]
    with pytest.raises(ValueError, match="33 positions, 32 of them cached; expected 32 at most"):
        tinylm.next_token(params, tokens[:, :1], config, torch.float32, cache | {"filled": 32}, chance, stopped, 0, 0,
                          1.0, ())
    table = weakref.ref(tinylm.all_angles(config, torch.device("cpu"))[0])
    for length in range(40, 50):
        tinylm.rope_angles(length, 8, 1e4, NO_SCALING, "cpu")
    assert table() is not None

@pytest.mark.parametrize("optimizer, writes", [("adamw", 3), ("muon", 1)])
@pytest.mark.parametrize("count", [1, 2])
def test_steps_in_graphs_train_the_same(optimizer, writes, count, monkeypatch):
    """As on CUDA, but for the record and the compiler: the same bits as on a CPU, a step that is not applied included.
    Recorded from the second step on, once, and once more for other parameters; with accumulation not at all."""
    recorded, calls = [], []
    monkeypatch.setattr(tinylm.adamw_update, "forms", [(tinylm.always, tinylm.adamw_update_in_few_passes)])
    monkeypatch.setattr(tinylm, "record", lambda function: recorded.append(function) or record_on_cpu(function))
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: (
        calls.append(function.__qualname__), function(*args))[1])
    settings = train.Settings.complete(dict(device="cpu", d_model=32, num_layers=2, context_length=8, batch_size=2,
                                            optimizer=optimizer, grad_accum_steps=count))
    config, ids, histories = run.model_config(settings, 50), np.arange(400) % 50, []
    for changes in ({}, dict(device="cuda", compile=True)):
        if changes:  # then the device decides whether a step is applied
            monkeypatch.setattr(tinylm, "is_eager", lambda *_, **__: False)
        gradients, update, _ = train.step_functions(config, replace(settings, **changes))
        histories.append([])
        for seed in (0, 1):
            params = random_params(config, seed)
            state = tinylm.OPTIMIZERS[optimizer][0](params)
            for step in range(4):
                loss, grads = train.accumulate_gradients(gradients, params, ids, settings, step)
                loss, lr = loss * (math.nan if step == 2 else 1), torch.tensor(1e-3 * (step + 1))
                params, state, norm = update(params, grads, state, lr, loss)
                histories[-1] += [loss, norm.clone(), *(w.clone() for _, w in tinylm.tree_leaves(params | state))]
                assert not recorded or step or seed
    assert len(recorded) == (4 if count == 1 else 0)
    assert len([name for name in calls if name.startswith("in_place")]) == 8 * writes
    for actual, expected in zip(*histories, strict=True):
        assert actual.allclose(expected, rtol=0, atol=0, equal_nan=True)

def test_gradients_that_travel_are_no_graph(monkeypatch):
    """As to record them would be to record messages; nor those of split models, or of several batches."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(tinylm, "in_graph", lambda function, num_kept: made.append(num_kept) or function)
    settings = train.Settings.complete(dict(device="cpu", d_model=16, num_layers=1))
    for ranks, changes, expected in ((1, {}, [1, 3]), (2, {}, []), (1, dict(shard=True), []),
                                     (1, dict(grad_accum_steps=2), []), (1, dict(compile=False), [])):
        made.clear()
        monkeypatch.setattr(machine, "num_ranks", lambda: ranks)
        train.step_functions(run.model_config(settings, 50), replace(settings, **dict(
            device="cuda", compile=True) | changes))
        assert made == expected, (ranks, changes)

def test_what_is_separable(monkeypatch):
    """AdamW, as long as it has forms; scalars of a state beside the count of steps are kept too."""
    assert tinylm.is_separable(tinylm.adamw_update) and not tinylm.is_separable(tinylm.muon_update)
    params = {"blocks": {str(i): tree_of((2, 3), seed=i) for i in range(2)}, "norm": torch.ones(3)}
    ones = tinylm.tree_map(torch.ones_like, params)
    state = {"step": torch.tensor(0), "scale": torch.tensor(1.0), "m": tinylm.tree_map(torch.zeros_like, params)}

    def update(params, grads, state):
        new = tinylm.tree_map(lambda p, g, m: p + g + m, params, grads, state["m"])
        return new, {"step": state["step"] + 1, "scale": state["scale"] * 2, "m": grads}

    expected = update(params, ones, state)
    tinylm.block_by_block(tinylm.in_place(update))(params, ones, state)
    trees = params | state, expected[0] | expected[1]
    for (path, actual), (_, e) in zip(*map(tinylm.tree_leaves, trees), strict=True):
        assert actual.equal(e), path
    forms = [(tinylm.always, update), *tinylm.adamw_update.forms]
    for kept in (forms, [form for form in forms if form[1] is not tinylm.adamw_update_over_ranks], []):
        monkeypatch.setattr(tinylm.adamw_update, "forms", kept)
        assert not tinylm.has_adamw_in_place(tinylm.adamw_update, "cpu")
    assert not tinylm.is_separable(tinylm.adamw_update)

@pytest.mark.parametrize("optimizer, compiled", [("adamw", False), ("adamw", True), ("muon", False)])
def test_an_update_on_a_cpu(optimizer, compiled, monkeypatch):
    """AdamW writes over what it is given, by nothing that has to be compiled, and not where a number is not finite;
    without its form, and for Muon, there are new tensors, but in compiled code. Either is what the operation gives."""
    settings = train.Settings.complete(dict(device="cpu", d_model=32, num_layers=2, optimizer=optimizer,
                                            clip_grad=0.5))
    config, calls = small_config(), []
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: calls.append(1) or function(*args))
    for has_form in (True, False):
        init, update = tinylm.OPTIMIZERS[optimizer]
        params, grads = (random_params(config, seed) for seed in (0, 1))
        state = init(params)
        before, old = tinylm.tree_map(torch.clone, params), tinylm.tree_map(torch.clone, state)
        clipped = tinylm.clip_gradients(grads, tinylm.global_norm(grads), 0.5)
        expected = update(before, clipped, state, torch.tensor(1e-2), **settings.of_optimizer)
        step = train.step_functions(config, replace(settings, compile=compiled))[1]
        unchanged = step(params, grads, state, torch.tensor(1e-2), torch.tensor(math.nan))
        same(unchanged[:2], (before, old), 0)
        overflowed = grads | {"final_norm": grads["final_norm"] * math.inf}
        unchanged = step(params, overflowed, state, torch.tensor(1e-2), torch.tensor(1.0))
        same(unchanged[:2], (before, old), 0)
        new = step(params, grads, state, torch.tensor(1e-2), torch.tensor(1.0))
        same(new[:2], expected, 1e-5)
        assert (new[0]["embedding"] is params["embedding"]) == (has_form and optimizer == "adamw" or compiled)
        assert bool(calls) == (compiled and not has_form)
        monkeypatch.setattr(tinylm.adamw_update, "forms", [])

@pytest.mark.parametrize("flags", [{}, dict(remat=True, tie_embeddings=True, num_kv_heads=1)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_of_ranks_arrive_block_by_block(flags, device, monkeypatch):
    """Compiled, those of a block are given when attention has gone backward in it and in those above alone; and they
    are those of code that is not compiled. On CUDA the loss in pieces is compiled too."""
    compiler, backward, done, compiled = torch.compile, tinylm.attention_in_tiles_backward, [], []
    monkeypatch.setattr(tinylm, "attention_in_tiles_backward", lambda *args: done.append(1) or backward(*args))
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function.__name__) or compiler(
        function, fullgraph=True, backend="aot_eager"))
    monkeypatch.setattr(machine, "num_ranks", lambda: 2)
    settings = train.Settings.complete(dict(device="cpu", dtype="float32", d_model=16, num_layers=3, context_length=130,
                                            batch_size=2, num_heads=2, **flags))
    config, tokens = run.model_config(settings, 50), torch.randint(50, (2, 131), generator=generator())
    params, arrivals = random_params(config), {}
    if device == "cuda":
        monkeypatch.setattr(tinylm.loss_fn, "forms", [(tinylm.always, tinylm.loss_in_pieces)])
    forms = [target.forms[:] for target in (tinylm.transformer_block, tinylm.mean_loss)]
    _, expected = train.step_functions(config, settings)[0](params, tokens[:, :-1], tokens[:, 1:])
    done.clear()
    gradients = train.step_functions(config, replace(settings, compile=True))[0]
    _, grads = gradients(params, tokens[:, :-1], tokens[:, 1:], lambda path, _: arrivals.update({path: len(done)}))
    for (path, actual), (_, e) in zip(*map(tinylm.tree_leaves, (grads, expected)), strict=True):
        same(actual, e, 1e-5)
        layer = int(path.split(".")[1]) if path.startswith("blocks") else 0 if path == "embedding" else 3
        assert arrivals[path] == 3 - layer, path
    assert {"transformer_block", "mean_loss"} <= {*compiled}
    assert forms == [target.forms for target in (tinylm.transformer_block, tinylm.mean_loss)]

def test_graphs_of_other_shapes(monkeypatch):
    """Each shape of inputs begins anew, and nothing is broadcast. What is recorded was called with addresses that are
    as even, for which Triton has compiled by then."""
    def total(tree, x):
        addresses.append(x.data_ptr() % 16)
        return (tree["w"] * x).sum()

    recorded = []
    monkeypatch.setattr(tinylm, "record", lambda function: recorded.append(function) or record_on_cpu(function))
    graph, addresses = tinylm.in_graph(total, 1), []
    tree = {"w": torch.ones(3)}
    for shape in ((2, 3), (2, 3), (2, 3), (1, 3), (1, 3), (3,), (3,), (2, 3), (2, 3)):
        x = randn(1 + math.prod(shape))[1:].view(shape)
        assert x.data_ptr() % 16 and graph(tree, x) == x.sum()
    before, tree["w"] = len(recorded), 2 * tree["w"]
    assert graph(tree, x) == 2 * x.sum() and len(recorded) == before + 1, "another tensor in the same dict"
    assert graph(tree, x.float()).dtype == torch.float32, "another dtype too"
    assert addresses == [0] * len(addresses)

def test_compiled_runs_of_one_process(monkeypatch):
    """Of other sizes each time, of which none may be taken to vary, by the update that is compiled on a GPU too."""
    monkeypatch.setattr(tinylm.adamw_update, "forms", [(tinylm.always, tinylm.adamw_update_in_few_passes)])
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function, fullgraph=True, backend="aot_eager"))
    for d_model, context_length in ((16, 8), (32, 12)):
        settings = train.Settings.complete(dict(device="cpu", compile=True, d_model=d_model, num_layers=1, batch_size=2,
                                                context_length=context_length, num_heads=2))
        config, tokens = run.model_config(settings, 50), torch.ones(2, context_length, dtype=torch.int64)
        gradients, update, _ = train.step_functions(config, settings)
        params = random_params(config)
        loss, grads = gradients(params, tokens, tokens)
        update(params, grads, tinylm.adamw_init(params), torch.tensor(1e-3), loss)

def test_what_is_recorded(monkeypatch):
    """One token; not in compiled code, as the compiler can't take a recording apart, nor without the form of attention
    that the record has."""
    def is_recorded(tokens=1, compiling=False, cache={"filled": 3}):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        x = types.SimpleNamespace(is_cuda=True, shape=(1, tokens))
        with torch.no_grad():
            return any(fits({"w": x}, x, None, None, cache) for fits, _ in tinylm.next_token.forms)

    assert is_recorded() and not is_recorded(tokens=2) and not is_recorded(compiling=True)
    assert not is_recorded(cache=None)
    for operation in (tinylm.attention, tinylm.cached_attention, tinylm.angles_at):
        with monkeypatch.context() as patch:
            patch.setattr(operation, "forms", [])
            assert not is_recorded()

def test_graphs_are_recorded_each_on_a_stream_of_the_device(monkeypatch):
    """By PyTorch's own class, on devices that only count: on its own stream it would record for the first one alone."""
    device, current, recorded_on = [0], [], []

    class Stream:
        def __init__(self):
            self.device = device[0]

    @contextlib.contextmanager
    def stream(chosen):
        current.append(chosen)
        yield
        current.pop()

    graph = types.SimpleNamespace(capture_begin=lambda **_: recorded_on.append(current[-1]), capture_end=lambda: None)
    names = dict(Stream=Stream, stream=stream, CUDAGraph=lambda: graph, synchronize=lambda: None)
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    mask = functools.partial(tinylm.future_mask, 2, 1, torch.float32, "cpu")
    masks = [mask()]
    for device[0] in (0, 0, 1):
        assert tinylm.record(lambda: masks.append(mask()) or 7) == (graph, 7)
        masks.append(mask())
    assert [one.device for one in recorded_on] == [0, 0, 1] and len(set(recorded_on)) == 3
    assert len(set(map(id, masks))) == 7  # a graph's are its own, and no one else's

def test_kernels_and_graphs_are_of_the_device_of_their_tensors(monkeypatch):
    """Not of the current one."""
    within, seen, x = [None], [], torch.ones(2)

    @contextlib.contextmanager
    def device_of(x):
        within.append(x)
        yield
        within.pop()

    note = lambda *args: seen.append(within[-1])
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(tinylm, "triton_kernels", lambda: {"kernel": {(1,): note}})
    tinylm.run_kernel("kernel", (1,), x)
    monkeypatch.setattr(tinylm, "record", lambda function: [note(), record_on_cpu(function)][1])
    graph = tinylm.in_graph(lambda tree, y: tree["w"] + y, 1)
    for _ in range(2):
        graph({"w": x}, torch.ones(2))
    assert len(seen) == 2 and all(one is x for one in seen)

@pytest.mark.parametrize("changes", [dict(d_model=30), dict(d_model=12), dict(num_kv_heads=3), dict(vocab_size=0),
                                     dict(num_layers=-1), dict(d_model=2.5), dict(rope_theta=0.0),
                                     dict(norm_eps=math.nan), dict(context_length=2**31), dict(rope_theta=1e-300),
                                     dict(norm_eps=1e308)])
def test_config_refuses_what_cannot_be(changes):
    with pytest.raises(ValueError):
        small_config(**changes)

# ---- Forms: each computes its operation's definition ----

def tree_of(*shapes, dtype=torch.float32, seed=0):
    return {f"w{i}": randn(*shape, seed=seed + i).to(dtype) for i, shape in enumerate(shapes)}

def attention_example(dtype, lead, kv_heads, group, T, S, D):
    k, v = (randn(*lead, kv_heads, S, D, seed=i).to(dtype) for i in (1, 2))
    return randn(*lead, kv_heads * group, T, D).to(dtype), k, v

def adamw_example(step):
    v = tinylm.tree_map(torch.square, tree_of((3, 4), (5,), seed=7))
    state = {"step": torch.tensor(step), "m": tree_of((3, 4), (5,), seed=5), "v": v}
    return tree_of((3, 4), (5,)), tree_of((3, 4), (5,), seed=3), state, torch.tensor(0.01), 0.8, 0.95, 1e-6, 0.3

def cache_example(dtype, filled):
    shapes = (6, 1), (2, 1), (2, 1), (2, 9), (2, 9)  # of q, k, v, and of keys and values in the cache
    tensors = (randn(2, *shape, 4, seed=i).to(dtype) for i, shape in enumerate(shapes))
    return *(next(tensors) for _ in range(3)), {"k": next(tensors), "v": next(tensors), "filled": filled}

def blocks_example(filled):
    config, cache = small_config(), {name: randn(2, 3, 4, 600, 8).float() for name in ("k", "v")}
    angles = (table[filled:filled + 1] for table in tinylm.rope_angles(600, 8, 1e4, NO_SCALING, "cpu"))
    return random_params(config)["blocks"], randn(3, 1, 32).float(), *angles, cache | {"filled": filled}, config

def token_example(filled, *settings):
    config, cache = small_config(context_length=600), {name: randn(2, 3, 4, 600, 8).float() for name in ("k", "v")}
    chance, stopped = torch.tensor([[0.1], [0.7], [0.9]]).double(), torch.tensor([False, True, False])
    return (random_params(config), random_tokens(config, 3, 1), config, torch.float32, cache | {"filled": filled},
            chance, stopped, *settings)

# Of each operation that has forms: arguments of several shapes, made of a dtype. The sizes reach the ways inside a
# form.
EXAMPLES = {
    "linear": lambda dtype: [
        (randn(*lead, d_in).to(dtype), randn(d_out, d_in, seed=1).to(dtype)) for lead, d_in, d_out in (
            ((3, 5), 8, 6), ((1, 1), 64, 1100), ((2, 3), 64, 1100), ((40,), 64, 1100), ((2, 1100), 64, 4000),
            ((0,), 64, 1100))],
    "linears": lambda dtype: [(randn(*lead, 64).to(dtype), *(randn(rows, 64, seed=rows).to(dtype) for rows in sizes))
                              for lead, sizes in (((3, 5), (8, 6, 2)), ((1, 1), (1100, 40)), ((2, 1), (32, 32)))],
    "embedding": lambda dtype: [(random_tokens(small_config(), *shape), randn(300, 8).to(dtype))
                                for shape in ((), (7,), (2, 9))],
    "rmsnorm": lambda dtype: [(randn(*shape).to(dtype), tinylm.at_least_float32(randn(shape[-1]).to(dtype)), 1e-5)
                              for shape in ((16,), (1, 1, 33), (3, 16), (2, 5, 33))] + [
        (randn(1, 16).to(dtype), 1.0, 0.1)],
    "rope_angles": lambda dtype: [(30, 16, 1e4, NO_SCALING, "cpu"), (7, 2, 100.0, (8.0, 1.0, 4.0, 20), "cpu")],
    "rope": lambda dtype: [(x.to(dtype), *tinylm.rope_angles.definition(9, 16, 1e4, NO_SCALING, "cpu"))
                           for x in (randn(9, 16), randn(2, 3, 9, 16), randn(2, 9, 3, 16).transpose(1, 2),
                                     randn(2, 16, 9).mT, randn(9, 33)[:, 1:17], randn(9, 17)[:, :16],
                                     randn(9, 34)[:, 1:17])],
    "attention": lambda dtype: [attention_example(dtype, *sizes) for sizes in (
        ((2,), 2, 1, 9, 9, 8), ((), 1, 3, 5, 12, 4), ((2,), 2, 2, 1, 7, 8), ((1, 2), 2, 2, 200, 200, 16),
        ((3,), 1, 1, 130, 300, 6))] + [
        (randn(2, 1, 8).to(dtype) * 1e3, *attention_example(dtype, (), 2, 1, 1, 9, 8)[1:])],
    "cached_attention": lambda dtype: [cache_example(dtype, torch.tensor([filled])) for filled in (0, 4, 8)],
    "angles_at": lambda dtype: [(start, T, small_config(context_length=600), "cpu") for start, T in (
        (torch.tensor([0]), 1), (torch.tensor([599]), 1), (0, 600), (0, 7), (255, 1), (255, 2))],
    "next_token": lambda dtype: [token_example(*sizes) for sizes in (
        (0, 1.0, 0, 1.0, ()), (255, 0, 0, 1.0, (7, 9)), (256, 0.8, 5, 0.9, [7]), (599, 1.0, 0, 0.5, ()))],
    "transformer_blocks": lambda dtype: [blocks_example(5)],
    "gated_silu": lambda dtype: [(randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype))
                                 for shape in ((7,), (2, 3, 5))],
    "token_losses": lambda dtype: [((randn(*shape, V) * 5).to(dtype), torch.randint(V, shape, generator=generator()))
                                   for shape, V in (((), 3), ((5,), 300), ((2, 3), 50))],
    "init_cache": lambda dtype: [(small_config(), 2, 5, dtype, "cpu")],
    "global_norm": lambda dtype: [(tree_of((3, 4), (5,), dtype=dtype),), (tree_of((1100, 1000), (5,), dtype=dtype),)],
    "clip_gradients": lambda dtype: [(tree_of((3, 4), (5,)), torch.tensor(4.0), most) for most in (0.1, 100.0)],
    "adamw_update": lambda dtype: [adamw_example(step) for step in (0, 1000)],
    "orthogonalize": lambda dtype: [(randn(*shape).float(),) for shape in ((2, 8, 5), (1, 5, 8), (3, 6, 6))],
    "orthogonalize_all": lambda dtype: [({"blocks": {"0": tree_of((8, 5), (5, 8)), "1": tree_of((8, 5), (5, 8))}},)],
    "sample_token": lambda dtype: [
        ((randn(3, V) * scale).to(dtype), torch.tensor([[0.1], [0.7], [0.9]]).double(), temperature, top_k, top_p)
        for V, scale in ((5, 3), (400, 3), (40_000, 3), (40_000, 0), (40_000, 30))
        for temperature, top_k, top_p in ((1.0, 0, 0.1), (0.8, 0, 0.95), (1e6, 2, 1.0), (0.8, 50, 0.9))],
    "mean_loss": lambda dtype: [(randn(7, 16).to(dtype), randn(30, 16).float(), torch.arange(7))],
    "loss_fn": lambda dtype: [(random_params(config), *random_tokens(config, 2, 3, 9), config) for config in (
        small_config(), small_config(num_kv_heads=2, d_ff=24, rope_theta=99.0, norm_eps=0.1, tie_embeddings=True,
                                     head_dim=6, rope_scaling=(8.0, 1.0, 4.0, 20)))],
    "weights_for_generation": lambda dtype: [(random_params(small_config()), dtype, num_texts) for num_texts in (1, 8)],
}
DIFFERENTIABLE = {"linear", "linears", "embedding", "rmsnorm", "rope", "attention", "gated_silu", "token_losses",
                  "mean_loss"}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.03}  # of an error beside the norm

def joined(ws):
    """Matrices as parts of one."""
    whole, sizes = torch.cat(ws), tuple(map(len, ws))
    return [tinylm.MatrixPart(whole, sizes, i) for i in range(len(ws))]

def is_floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()

def tensors_in(value):
    """All tensors in a value of tuples and dicts, in order; packed and split ones as plain ones."""
    if isinstance(value, torch.Tensor):
        return [value.to_local() if tinylm.is_split(value) else value.to_dense() if value.is_mkldnn else value]
    if isinstance(value, tinylm.MatrixPart):
        return [tensors_in(value.whole)[0].split(value.sizes)[value.number]]
    parts = value if isinstance(value, (tuple, list)) else ()
    if isinstance(value, dict):
        parts = [part for key, part in value.items() if key != "graphs"]  # of a cache, whose tensors are there already
    return [tensor for part in parts for tensor in tensors_in(part)]

def results(function, arguments, differentiable):
    """The tensors that a function returns and, where asked, its gradients for a random weighting."""
    if not differentiable:
        with torch.no_grad():
            return tensors_in(function(*arguments))
    arguments = [x.detach().requires_grad_() if is_floating(x) else x for x in arguments]
    out = tensors_in(function(*arguments))
    weighted = sum((x * randn(*x.shape, seed=7 + i).to(x.dtype)).sum() for i, x in enumerate(out))
    return out + tensors_in(torch.autograd.grad(weighted, list(filter(is_floating, arguments))))

def record_on_cpu(function):
    """What `tinylm.record` gives, from operations that run one by one, first while they are recorded."""
    out, launches = function(), itertools.count()

    def replay():
        if next(launches):
            for old, new in zip(tensors_in(out), tensors_in(function()), strict=True):
                old.copy_(new)

    return types.SimpleNamespace(replay=replay), out

def in_a_room(room, operation, arguments, differentiable, monkeypatch, mesh):
    """(The form that serves there, arguments as they are there), or (None, …)."""
    asked = arguments
    with monkeypatch.context() as patch:
        if room == "compiled":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        if "ranks" in room:
            all_tensors = lambda x: isinstance(x, dict) and all(torch.is_tensor(w) for _, w in tinylm.tree_leaves(x))
            is_weight = lambda i, x: all_tensors(x) or i == 1 and is_floating(x) and operation is not blocks
            blocks = tinylm.transformer_blocks
            asked = arguments = [tinylm.shard(x, mesh) if is_weight(i, x) else x for i, x in enumerate(arguments)]
        if "GPU" in room:  # what conditions ask, as a tensor there would answer
            split = lambda x: {"device_mesh": mesh} if tinylm.is_split(x) else {}
            asks = ("ndim", "shape", "dtype", "stride", "storage_offset")
            same = lambda x: {name: getattr(x, name) for name in asks}
            there = lambda x: types.SimpleNamespace(is_cuda=True, is_cpu=False, **same(x), **split(x))
            asked = [there(x) if is_floating(x) else {"": there(tinylm.first_leaf(x))} | x if isinstance(x, dict) else x
                     for x in arguments]
        with torch.set_grad_enabled(differentiable):
            return next((form for fits, form in operation.forms if fits(*asked)), None), arguments

@pytest.fixture
def mesh_of_one():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()

@pytest.mark.parametrize("name", [name for name, operation in tinylm.OPERATIONS.items() if operation.forms])
def test_every_form_computes_its_definition(name, monkeypatch, mesh_of_one):
    """Values and gradients, in every room: on a CPU, compiled, over ranks, and as on a GPU. No form is left out."""
    operation, reached = tinylm.OPERATIONS[name], set()
    monkeypatch.setattr(tinylm, "has_triton", lambda x: False)  # kernels have a test of their own
    monkeypatch.setattr(tinylm, "record", record_on_cpu)
    monkeypatch.setattr(tinylm, "IS_INTEL", False)  # where x @ w.T serves
    is_learned_by = name in DIFFERENTIABLE
    rooms = [(dtype, "CPU", is_learned_by) for dtype in TOLERANCES]
    rooms += [(torch.float32, room, is_learned_by) for room in ("compiled", "ranks", "GPU", "ranks of GPUs")]
    rooms += [(dtype, "CPU", False) for dtype in TOLERANCES if is_learned_by]
    rooms += [(torch.float32, room, False) for room in ("int8", "joined") if name in ("linear", "linears")]
    for dtype, room, differentiable in rooms:
        for example in EXAMPLES[name](dtype):
            example = [example[0], *map(tinylm.to_int8, example[1:])] if room == "int8" else example
            example = [example[0], *joined(example[1:])] if room == "joined" else example
            form, arguments = in_a_room(room, operation, example, differentiable, monkeypatch, mesh_of_one)
            if form is None or "ranks" in room and not form.__name__.endswith("over_ranks"):
                continue
            reached.add(form)
            torch._dynamo.reset()
            run_form = torch.compile(form, backend="aot_eager", fullgraph=True) if room == "compiled" else form
            with tinylm.definitions_alone():
                expected = results(operation.definition, example, differentiable)
            for a, e in zip(results(run_form, arguments, differentiable), expected, strict=True):
                assert a.shape == e.shape and (a.dtype == e.dtype or name == "init_cache")
                tolerance = max(TOLERANCES[dtype], TOLERANCES.get(e.dtype, 0))
                looser = {tinylm.orthogonalize_on_cuda: 0.1, tinylm.linear_of_int8_weights: 0.01,
                          tinylm.linear_in_int8: 0.015}  # which compute in less precision
                tolerance = looser.get(form, tolerance)
                error = (a.double() - e.double()).norm()
                assert error <= tolerance * e.double().norm(), (form.__name__, room, dtype, e.shape)
    rest = {form.__name__ for _, form in operation.forms if form not in reached}
    rest -= set() if tinylm.has_int8_products() else {"linear_in_int8"}
    if not (tinylm.attention.forms and tinylm.cached_attention.forms):  # then it asks for nothing
        rest -= {"next_token_in_graph"}
    assert all(name.endswith("_in_kernel") for name in rest), f"no example reaches {rest}"

def test_every_form_is_asked_for_every_option():
    """Of Config, so that a form that forgets one is found; and it takes what its definition takes."""
    for operation in tinylm.OPERATIONS.values():
        for _, form in operation.forms:
            assert [*inspect.signature(form).parameters] == [*inspect.signature(operation.definition).parameters], form
    configs = [example[-1] for example in EXAMPLES["loss_fn"](torch.float32)]
    for field in fields(tinylm.Config):
        assert {getattr(config, field.name) for config in configs} - {field.default}, (
            f"give {field.name} a value that asks for something in EXAMPLES, of loss_fn")

def test_int8_weights_lose_little(trained, capsys):
    """The loss stays within half a percent, with an output matrix of its own or tied; rows are within half a step."""
    folder = trained / "runs/tiny/latest"
    params, config = checkpoint.load_checkpoint(folder)
    w = randn(50, 64).float()
    rounded = tinylm.to_int8(w)
    assert ((rounded.to(torch.float32) - w).abs() <= 0.51 * w.abs().amax(1, keepdim=True) / 127).all()
    x = randn(2, 64, 64).float()
    with torch.no_grad():  # many rows of a small matrix are not rounded
        torch.testing.assert_close(tinylm.linear(x, rounded), x @ rounded.to(torch.float32).T, rtol=1e-5, atol=1e-5)
    x = leaf(3, 64)
    same(torch.autograd.grad(tinylm.linear(x, rounded).sum(), x)[0], rounded.to(torch.float64).sum(0).expand(3, -1))
    tokens = torch.from_numpy(prepare.open_data(trained / "data")[1]["val"][:513].astype(np.int64))
    batch = tokens[:-1].view(-1, config.context_length), tokens[1:].view(-1, config.context_length)
    tied = {name: w for name, w in params.items() if name != "lm_head"}
    with torch.no_grad():
        for params in (params, tied):
            loss, rounded_loss = (tinylm.loss_fn(p, *batch, config).item() for p in (params, tinylm.quantize(params)))
            assert rounded_loss == pytest.approx(loss, rel=5e-3) and rounded_loss != loss
    sample.sample(checkpoint=folder, dtype="int8", max_new_tokens=5, num_samples=2, device="cpu")
    assert "10 tokens" in capsys.readouterr().err

def in_16_bits(a, b):
    """A product of int8 by instructions that add up pairs in 16 bits, as oneDNN's without VNNI."""
    pairs = (a.int()[:, None] + 128) * b.T.int()  # (rows, d_out, d_in)
    return pairs.unflatten(-1, (-1, 2)).sum(-1).clamp(-2**15, 2**15 - 1).sum(-1) - 128 * b.int().sum(0)

@pytest.mark.parametrize("lead, d_out, rounds_x", [
    ((1, 1), 65536, True), ((4, 4), 8192, True), ((1000,), 160, True), ((1, 1), 32768, False), ((2, 4), 65536, False),
    ((16,), 4096, False)])
def test_large_int8_products_round_both_factors(lead, d_out, rounds_x):
    """Where they are faster, and the CPU multiplies int8 without overflow; each row of x by a scale of its own."""
    w, x = tinylm.to_int8(randn(d_out, 32).float()), randn(*lead, 32).float() * 10 ** randn(*lead, 1).float()
    x.view(-1, 32)[1:2, 3:] = 0
    scale = x.abs().amax(-1, keepdim=True) / 127
    expected = lambda x: x.double() @ w.to(torch.float64).T
    x8 = (x / scale).round() * scale if rounds_x and tinylm.has_int8_products() else x.bfloat16()
    with torch.no_grad():
        ours = tinylm.linear(x, w)
        assert ours.dtype == torch.float32
        assert (ours - expected(x8)).norm(dim=-1).le(3e-3 * expected(x8).norm(dim=-1)).all()
        assert tinylm.linear(torch.zeros_like(x), w).eq(0).all()
        assert tinylm.linear(torch.full_like(x, math.nan), w).isnan().all()
        same(tinylm.linear(x.mT.contiguous().mT if x.ndim > 1 else x, w), ours, 1e-5)
        assert (tinylm.linear(x.double(), w) - ours).norm() <= 1e-3 * ours.norm()
        y = tinylm.linear(x.bfloat16(), w)
        assert y.dtype == torch.bfloat16 and (y - expected(x8)).norm() <= 0.02 * expected(x8).norm()

def test_int8_products_are_taken_where_they_are_right(monkeypatch):
    find = tinylm.has_int8_products.__wrapped__
    is_hidden = "ONEDNN_MAX_CPU_ISA" in os.environ or not (tinylm.HAS_AVX512 and tinylm.HAS_ONEDNN)
    assert find() or is_hidden or not torch.cpu._is_vnni_supported()
    monkeypatch.setattr(torch, "_int_mm", in_16_bits)
    assert not find()

def test_matrices_that_no_product_reads_stay_as_they_are():
    """Such as a gain for each head, which a fork may add."""
    params = random_params(small_config())
    params["blocks"]["0"]["attention"]["gains"] = gains = randn(2, 32).float()
    params["blocks"]["0"]["attention"]["w_table"] = table = randn(300, 32).float()
    for laid_out in (tinylm.quantize(params), tinylm.weights_for_generation(params, torch.float32, 9)):
        ours = laid_out["blocks"]["0"]["attention"]
        assert ours["w_table"] is table and ours["gains"] is gains
        assert ours["wq"] is not params["blocks"]["0"]["attention"]["wq"]
        assert laid_out["lm_head"] is not params["lm_head"] and laid_out["embedding"] is params["embedding"]

@pytest.mark.parametrize("intel", [False, True])
def test_large_matrices_are_packed_for_one_text_in_bfloat16(intel, monkeypatch):
    """Not on Intel's CPUs, nor in models that wait for memory, where that would cost more."""
    monkeypatch.setattr(tinylm, "IS_INTEL", intel)
    params = random_params(small_config(vocab_size=1 << 13, d_ff=1 << 12))  # w_down has 2^17 numbers, lm_head 2^18
    packed = lambda dtype, texts: [w.is_mkldnn for w in (
        tinylm.weights_for_generation(params, dtype, texts)[name] for name in ("lm_head", "embedding"))]
    params["embedding"] = torch.empty(1).expand(24 << 10, 1 << 10)  # as one of 24 million
    can = (again := tinylm.pack(params["lm_head"].bfloat16())).is_mkldnn
    assert tinylm.pack(again) is again
    assert packed(torch.bfloat16, 1) == [can and tinylm.HAS_AVX512 and not intel, False]
    assert packed(torch.bfloat16, 2) == [can, False]
    assert packed(torch.float32, 7) == packed(torch.float64, 1) == [False, False]
    assert packed(torch.float32, 8) == [tinylm.HAS_ONEDNN, False]
    written = tinylm.weights_for_generation(params, torch.bfloat16, 1)["blocks"]["0"]
    assert not written["mlp"]["w_down"].is_mkldnn and not written["attention"]["wq"].whole.is_mkldnn
    params["embedding"] = torch.empty(1).expand(1 << 15, 1 << 10)
    assert packed(torch.bfloat16, 1) == [False, False]

def test_joined_matrices_are_read_at_once_and_alone(monkeypatch, mesh_of_one):
    """By one product, all or some, in any order; large ones are not joined, nor split ones, nor those of different
    widths."""
    ws, x, products = [randn(rows, 64, seed=rows).float() for rows in (8, 6, 2)], randn(2, 3, 64).float(), []
    monkeypatch.setattr(tinylm.linear, "forms", [(lambda x, w: products.append(w), None), *tinylm.linear.forms])
    parts = joined(ws)
    for picked in ((0, 1, 2), (0, 1), (1, 2), (2, 1, 0), (0, 0, 0), (1,)):
        products.clear()
        for y, i in zip(tinylm.linears(x, *(parts[i] for i in picked)), picked, strict=True):
            same(y, x @ ws[i].T, 1e-5)
        assert products == [parts[0].whole]
    others = joined([-w for w in ws])
    same(tinylm.linears(x, parts[0], others[1]), (x @ ws[0].T, -x @ ws[1].T), 1e-5)
    same(tinylm.linears(x, parts[0], others[1], ws[2])[1:], (-x @ ws[1].T, x @ ws[2].T), 1e-5)
    packed = tinylm.MatrixPart(tinylm.pack(parts[0].whole), parts[0].sizes, 1)
    same(tinylm.linear(x, packed), x @ ws[1].T, 1e-5)
    same(parts[1].to(torch.float64), ws[1].double())
    assert (parts[1].shape, packed.shape, packed.dtype) == (ws[1].shape, ws[1].shape, torch.float32)
    split = [tinylm.shard(w, mesh_of_one) for w in ws]
    assert tinylm.pack(split[0]) is split[0] and tinylm.join(split) is None
    params = random_params(small_config())
    for most, is_joined in ((1 << 21, True), (3 * 32 * 32 - 1, False)):
        monkeypatch.setattr(tinylm, "JOINED_AT_MOST", most)
        written = tinylm.weights_for_generation(params, torch.float32, 1)["blocks"]["1"]["attention"]
        assert [isinstance(w, tinylm.MatrixPart) for w in written.values()] == [is_joined] * 3 + [False]
        assert is_joined or written["wq"] is params["blocks"]["1"]["attention"]["wq"]
    monkeypatch.undo()
    params["blocks"]["0"]["attention"]["wv"] = narrow = randn(32, 16).float()
    params["blocks"]["0"]["mlp"]["w_up"] = {"a": narrow, "b": narrow}
    del params["blocks"]["1"]["mlp"]["w_gate"]
    blocks = tinylm.weights_for_generation(params, torch.float32, 1)["blocks"]
    assert blocks["0"]["attention"]["wv"] is narrow and "w_gate" not in blocks["1"]["mlp"]
    assert blocks["0"]["mlp"]["w_up"]["b"] is narrow
    rounded = tinylm.weights_for_generation(tinylm.quantize(random_params(small_config())), torch.float32, 9)["blocks"]
    assert isinstance(rounded["0"]["mlp"]["w_up"].whole, tinylm.Int8Matrix)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_with_forms_and_without(dtype, compiled):
    config = small_config(context_length=160, num_kv_heads=2)
    params, tokens = random_params(config), random_tokens(config, 2, 161)
    torch._dynamo.reset()
    loss_fn = torch.compile(tinylm.loss_fn, backend="aot_eager", fullgraph=True) if compiled else tinylm.loss_fn
    args = params, tokens[:, :-1], tokens[:, 1:], config, dtype
    loss, grads = tinylm.value_and_grad(loss_fn, *args)
    written = torch.stack(list(tinylm.generate(params, tokens[:, :5], config, 20, temperature=0)))
    forms = {name: operation.forms[:] for name, operation in tinylm.OPERATIONS.items()}
    with tinylm.definitions_alone():
        assert not any(operation.forms for operation in tinylm.OPERATIONS.values())
        plain_loss, plain_grads = tinylm.value_and_grad(tinylm.loss_fn, *args)
        assert torch.stack(list(tinylm.generate(params, tokens[:, :5], config, 20, temperature=0))).equal(written)
    assert any(forms.values()) and forms == {name: operation.forms for name, operation in tinylm.OPERATIONS.items()}
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert loss.item() == pytest.approx(plain_loss.item(), rel=tolerance)
    for (path, g), (_, plain) in zip(tinylm.tree_leaves(grads), tinylm.tree_leaves(plain_grads)):
        assert (g - plain).norm() <= tolerance * plain.norm(), path

def test_a_compiled_model_takes_any_length():
    config = small_config(context_length=100, num_layers=1)
    params = random_params(config)
    compiled = torch.compile(lambda params, tokens: tinylm.forward(params, tokens, config), backend="aot_eager",
                             fullgraph=True)
    for T in (10, 20):
        tokens = random_tokens(config, 1, T)
        same(compiled(params, tokens), tinylm.forward(params, tokens, config), 1e-5)

def test_long_contexts_cost_what_is_read_of_them(monkeypatch):
    lengths, angles = [], tinylm.rope_angles.definition
    monkeypatch.setattr(tinylm.rope_angles, "definition", lambda length, *args: [
        lengths.append(length), angles(length, *args)][1])
    tinylm.rope_table.cache_clear()
    short, config = small_config(context_length=600), small_config(context_length=2**31 - 1)
    prompt, params = random_tokens(short, 1, 250), random_params(short)
    for one in (config, short):
        written = torch.stack(list(tinylm.generate(params, prompt, one, 10, temperature=0)))
    assert lengths == [256, 512], "each table serves for many positions"
    assert written.equal(torch.stack(list(tinylm.generate(params, prompt, config, 10, temperature=0))))

def test_part_one_is_a_whole_program():
    """Executed alone it trains, to the losses of all three parts, and writes the same text; and it is plain."""
    source = (ROOT / "tinylm.py").read_text(encoding="utf-8")
    headings = ["# ==== I. The language model ====", "# ==== II. Faster ====", "# ==== III. Split over ranks ===="]
    assert re.findall(r"^# ====.*$", source, re.M) == headings
    part_one = source[:source.index(headings[1])]
    assert not re.search(r"is_cuda|is_cpu|device\.type|is_compiling|mkldnn|triton|DTensor|custom_op|"
                         r"autograd\.Function|backends", part_one)
    alone = types.ModuleType("alone")
    exec(part_one, vars(alone))
    assert not any(operation.forms for operation in alone.OPERATIONS.values())
    ids = np.frombuffer(many_stories(20).encode(), np.uint8)

    def train_and_write(module):
        config = module.Config(vocab_size=256, context_length=48, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2)
        params, losses = module.init_params(config, generator()), []
        state = module.adamw_init(params)
        for step in range(20):
            inputs, targets = module.get_batch(ids, 4, 48, 0, step)
            loss, grads = module.value_and_grad(module.loss_fn, params, inputs, targets, config)
            grads = module.clip_gradients(grads, module.global_norm(grads), 1.0)
            params, state = module.adamw_update(params, grads, state, module.cosine_lr(step, 4e-3, 4e-5, 2, 20))
            losses.append(loss.item())
        tokens = module.generate(params, inputs[:2, :9], config, 60, temperature=0)
        return losses, torch.stack(list(tokens)).tolist()

    (losses, text), (expected_losses, expected_text) = train_and_write(alone), train_and_write(tinylm)
    assert losses == pytest.approx(expected_losses, abs=1e-5) and losses[-1] < losses[0] - 1
    assert text == expected_text

def test_part_one_is_as_short_as_the_readme_says():
    part_one, _ = (ROOT / "tinylm.py").read_text(encoding="utf-8").split("# ==== II. Faster ====")
    assert part_one.count("\n") <= int(re.search(r"first (\d+) lines", (ROOT / "README.md").read_text())[1])

def test_what_is_imported(tmp_path):
    """torch only where it computes; DTensor, Triton and the compiler, which take seconds, only where they are used."""
    flags = TINY | dict(data=str(prepared(tmp_path)), output_dir=str(tmp_path / "run"))
    programs = [  # one after the other, in a process each, and what is not imported until then
        {"from data import bpe, cli, files, plot, prepare, stories": ["torch", "fire", "wandb"]},
        {"import tinylm": ["torch.distributed.tensor", "triton", "fire", "wandb", "data"],
         "import sample": ["train", "fire", "wandb", "triton"],
         f"import train; train.train(**{flags}); sample.sample(checkpoint={flags['output_dir']!r}, max_new_tokens=5)": [
             "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "triton", "wandb"]}]
    for codes in programs:
        shown = "; print('imported', [name for name in {} if name in sys.modules])\n"
        program = "import sys\n" + "".join(code + shown.format(names) for code, names in codes.items())
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert re.findall("^imported (.*)$", done.stdout, re.M) == ["[]"] * len(codes)

@pytest.mark.parametrize("module", ["train", "sample"])
@pytest.mark.parametrize("given, expected", [({}, "10000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"),
                                             ({"OMP_WAIT_POLICY": "active"}, "None active")])
def test_threads_do_not_wait_for_each_other_for_long(module, given, expected):
    """What OpenMP reads when torch loads it is set before, unless the user has."""
    program = f"""if True:
        import builtins, os, sys
        genuine = builtins.__import__
        def watch(name, *rest):
            if name == "torch" and name not in sys.modules:
                print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
                sys.exit()
            return genuine(name, *rest)
        builtins.__import__ = watch
        import {module}
        """
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=env | given)
    assert done.stdout.strip() == expected, done.stderr

# ---- Checkpoints ----

@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__" and s.isprintable()),
                       st.tuples(st.sampled_from(list(checkpoint.SAFETENSORS_DTYPES.values())),
                                 st.lists(st.integers(0, 4), max_size=3)),
                       max_size=4))
def test_safetensors_files_are_those_of_the_library(tmp_path_factory, kinds):
    folder = tmp_path_factory.mktemp("safetensors")
    tensors = {name: (randn(*shape) * 9).to(dtype) for name, (dtype, shape) in kinds.items()}
    checkpoint.write_safetensors(folder / "ours", tensors)
    save_file(tensors, folder / "theirs")
    for read in (load_file(folder / "ours"), dict(checkpoint.read_tensors(folder / "theirs")),
                 dict(checkpoint.read_tensors(folder / "ours"))):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied, shard", [(False, "1GB"), (True, "1GB"), (False, "40KB")])
def test_llama_folders_of_transformers_open(tmp_path, dtype, tied, shard):
    llama = transformers.LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
                                     rope_theta=500.0)
    model = transformers.LlamaForCausalLM(llama).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(glob.glob(f"{tmp_path}/*.safetensors")) > 1) == (shard == "40KB")
    params, config = checkpoint.load_checkpoint(tmp_path)
    tokens = random_tokens(config, 2, 20)
    with torch.no_grad():
        same(tinylm.forward(params, tokens, config), model.float()(tokens).logits, 1e-4)
    if tied:  # an output matrix beside the embedding has to say the same
        table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
        refused = pytest.raises(cli.InputError, match="set tie_word_embeddings to false")
        for head, told in ((table.clone(), contextlib.nullcontext()), (table.double(), contextlib.nullcontext()),
                           (table + 1, refused)):
            tensors = load_file(tmp_path / "model.safetensors") | {"lm_head.weight": head}
            save_file(tensors, tmp_path / "model.safetensors")
            with told:
                checkpoint.load_checkpoint(tmp_path)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_folders(tmp_path, dtype, saved):
    """A folder says what it has. Old ones have the rotary frequencies too; what a model has beyond ours is refused."""
    saved(dtype=dtype)
    assert checkpoint.weights_dtype(tmp_path / "m") == str(dtype)[6:]
    (tmp_path / "some").mkdir()  # of which most numbers have this dtype, and most tensors another one
    mixed = {"large": torch.zeros(99, dtype=dtype)} | {name: torch.zeros(2, dtype=torch.float64) for name in "abc"}
    checkpoint.write_safetensors(tmp_path / "some/model.safetensors", mixed)
    assert checkpoint.weights_dtype(tmp_path / "some") == str(dtype)[6:]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").dtype == dtype
    params, _ = checkpoint.load_checkpoint(tmp_path / "m", None)
    assert params["embedding"].dtype == (torch.float32 if dtype == torch.float16 else dtype)
    tensors, prefix = load_file(tmp_path / "m/model.safetensors"), "model.layers.0.self_attn"
    save_file(tensors | {f"{prefix}.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "m/model.safetensors")
    checkpoint.load_checkpoint(tmp_path / "m")
    save_file(tensors | {f"{prefix}.q_proj.bias": torch.ones(32)}, tmp_path / "m/model.safetensors")
    with pytest.raises(cli.InputError, match="has unknown .*q_proj.bias"):
        checkpoint.load_checkpoint(tmp_path / "m")

@pytest.mark.parametrize("change, said", [
    (dict(b=dict(dtype="F32", shape=[1], data_offsets=[0, 4])), "overlap"),
    (dict(b=dict(dtype="F32", shape=[1], data_offsets=[8, 12])), "gap"), ({}, "its header speaks of 4"),
    (dict(b=dict(dtype="F32", shape=[99] * 99 + [0], data_offsets=[4, 4])), "sizes that can't be")])
def test_headers_of_safetensors(tmp_path, change, said):
    header = json.dumps({"a": dict(dtype="F32", shape=[1], data_offsets=[0, 4])} | change).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12 if change else 8))
    with pytest.raises(cli.InputError, match=f"is damaged .*{said}"):
        checkpoint.read_header(tmp_path / "x")
    header = b"{%s, %s}" % ((b'"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}',) * 2)
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(cli.InputError, match="a name stands twice"):
        checkpoint.read_header(tmp_path / "x")
    for name in ("a", "ab", "abc"):
        checkpoint.write_safetensors(tmp_path / "x", {name: torch.ones(2)})
        assert checkpoint.read_header(tmp_path / "x")[1] % 8 == 0

def test_an_optimizer_of_another_model(tmp_path):
    state, other = (tinylm.adamw_init(random_params(small_config(d_ff=d_ff))) for d_ff in (32, 64))
    (tmp_path / "training").mkdir()
    checkpoint.write_safetensors(tmp_path / "training/optimizer.safetensors", dict(tinylm.tree_leaves(state)))
    checkpoint.load_optimizer(tmp_path, state)
    with pytest.raises(cli.InputError, match="does not belong to this model"):
        checkpoint.load_optimizer(tmp_path, other)

def test_old_and_new_ways_to_say_rope_theta(saved):
    folder = saved()
    description = files.read_json(folder / "config.json")
    del description["rope_theta"]
    for change, theta in (({"rope_theta": 500.0}, 500.0),
                          ({"rope_parameters": {"rope_theta": 600.0, "rope_type": "default"}}, 600.0),
                          ({}, 10000.0), ({"rope_theta": 500.0, "rope_scaling": None}, 500.0),
                          ({"rope_parameters": {"rope_theta": 700.0}, "rope_scaling": {"type": "default"}}, 700.0)):
        (folder / "config.json").write_text(json.dumps(description | change))
        assert checkpoint.load_checkpoint(folder)[1].rope_theta == theta

@pytest.mark.parametrize("change", [
    {"attention_bias": True}, {"hidden_act": "gelu"}, {"model_type": "gpt2"},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    {"head_dim": 64}, {"head_dim": "x"},
    {"rope_parameters": {"rope_type": "yarn"}}, {"rope_scaling": {"type": "dynamic"}}, {"hidden_size": "x"},
    {"rope_scaling": {"rope_type": "linear"}}, {"rope_scaling": {"rope_type": "linear", "factor": 0.25}},
    {"sliding_window": 4096}, {"quantization_config": {"bits": list(range(999))}}, {"mlp_bias": True},
    {"intermediate_size": None}, {"rms_norm_eps": None}, {"rope_scaling": {"rope_type": "linear", "factor": 10**30}},
    {"rope_scaling": {"rope_type": "linear", "factor": True}}, {"tie_word_embeddings": []},
    {"tie_word_embeddings": "false"}])
def test_other_models_are_refused_by_name(saved, change):
    path = saved() / "config.json"
    path.write_text(json.dumps(files.read_json(path) | change))
    named = {"rope_parameters": "rope_type", "hidden_size": "d_model", "rope_scaling": "rope_type|factor|differ; say",
             "model_type": "model_type is 'gpt2', expected 'llama'", "head_dim": "q_proj.weight is|head_dim"}
    match = f"({named.get(*[next(iter(change))] * 2)}).*(; take |expected float)"
    with pytest.raises(cli.InputError, match=match) as error:
        checkpoint.load_checkpoint(path.parent)
    assert len(str(error.value)) < len(str(path)) + 300

@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_numbers_that_float16_cannot_hold_are_not_exported(tmp_path, saved, dtype):
    """By q8_0 too: rows that are no whole blocks become float16, and blocks have a scale of that."""
    config = small_config(d_model=32, d_ff=40)
    for name, number, is_refused in (("w_down", 1e5, True), ("w_up", 1e5, dtype == "f16"), ("w_up", 1e7, True)):
        params = tinylm.init_params(config, generator())
        params["blocks"]["0"]["mlp"][name][3, 5] = number
        folder = saved(params, config, f"{name}{number}")
        with pytest.raises(cli.InputError, match="float16, which --dtype") if is_refused else contextlib.nullcontext():
            gguf.export(str(folder), output=str(tmp_path / "m.gguf"), dtype=dtype)

@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(saved, number):
    folder = saved()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = number
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(cli.InputError, match="layers.1.self_attn.q_proj.weight has numbers that are not finite"):
        checkpoint.load_checkpoint(folder)

def test_numbers_of_large_tensors_are_looked_at():
    """All of them; and those whose sum alone is too much for float32 are finite."""
    numbers = torch.zeros((1 << 20) + 1)
    assert checkpoint.is_finite(numbers) and checkpoint.is_finite(torch.full((2,), 3e38))
    numbers[-1] = math.nan
    assert not checkpoint.is_finite(numbers)

def said_in(path):
    """{name: value} of a GGUF file, by the package gguf."""
    from gguf import GGUFReader
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}

@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("sizes", [dict(d_model=64, d_ff=96), dict(tie_embeddings=True, num_kv_heads=2, d_ff=80)])
def test_gguf_files_are_those_of_the_package(tmp_path, tokenizer_file, saved, dtype, sizes):
    """Names, shapes and values by the reader of the package gguf, and its own quantisation, bit for bit."""
    from gguf import GGUFReader, dequantize, quants
    config = small_config(vocab_size=600, **sizes)
    params = random_params(config)
    gguf.export(str(saved(params, config)), output=str(tmp_path / "m.gguf"), dtype=dtype)
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    leaves = dict(tinylm.tree_leaves(params))
    assert tensors.keys() == {gguf.gguf_name(path) for path in leaves}
    for path, w in leaves.items():
        tensor = tensors[gguf.gguf_name(path)]
        kind = gguf.dtype_of(w.shape, dtype)
        assert tensor.tensor_type.name.lower() == kind and tensor.data_offset % 32 == 0
        assert kind == dtype or w.ndim == 1 or (dtype == "q8_0" and w.shape[1] == 80 and kind == "f16")
        assert tuple(tensor.shape) == tuple(w.shape)[::-1]
        assert np.array_equal(tensor.data, quants.quantize(w.numpy(), tensor.tensor_type))
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        step = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 240}[kind] * w.abs().max()
        assert (values.view(w.shape) - w).abs().max() <= step
    said = said_in(tmp_path / "m.gguf")
    tokenizer = bpe.load(tokenizer_file)
    assert said["general.architecture"] == "llama" and said["llama.attention.head_count_kv"] == config.num_kv_heads
    assert said["llama.rope.freq_base"] == config.rope_theta and said["llama.context_length"] == 32
    assert said["tokenizer.ggml.bos_token_id"] == 256 and said["tokenizer.ggml.add_bos_token"] is True
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    description = json.loads(Path(tokenizer_file).read_text())
    assert tokens[:tokenizer.vocab_size] == list(description["model"]["vocab"]) and len(set(tokens)) == 600
    unused = 600 - tokenizer.vocab_size
    assert kinds == [3 if token == END else 1 for token in tokens[:tokenizer.vocab_size]] + [5] * unused
    assert [merge.split(" ") for merge in said["tokenizer.ggml.merges"]] == description["model"]["merges"]

def test_gguf_files_say_all_sizes(tmp_path, saved, other_families):
    """Those that llama.cpp reads, and the divisors of frequencies, by which `transformers` has the same angles."""
    from gguf import GGUFReader
    config = small_config(num_kv_heads=2, head_dim=16, d_ff=96, norm_eps=1e-3, num_layers=3,
                          rope_scaling=(8.0, 1.0, 4.0, 16))
    folder = saved(random_params(config), config, "name/step-0000001")
    gguf.export(str(folder), output=str(tmp_path / "m.gguf"))
    reader = GGUFReader(tmp_path / "m.gguf")
    said = said_in(tmp_path / "m.gguf")
    expected = {"general.name": "name", "llama.vocab_size": 300, "llama.context_length": 32,
                "llama.embedding_length": 32, "llama.block_count": 3, "llama.feed_forward_length": 96,
                "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16,
                "llama.attention.value_length": 16, "llama.rope.dimension_count": 16,
                "llama.rope.freq_base": 10000.0, "tokenizer.ggml.pre": "gpt-2", "general.file_type": 1}
    assert {name: said[name] for name in expected} == expected
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-3)
    hf = transformers.LlamaConfig(**checkpoint.config_to_hf(config, 0, 0))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf)
    divisors, = (torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    same(10000.0 ** (-torch.arange(8) / 8) / divisors, rotary.inv_freq, 1e-4)
    for kind, name in (("smollm", "smollm"), ("llama3", "llama-bpe")):
        assert gguf.description(config, other_families[kind][1], "f16", "m", [], (), [])["tokenizer.ggml.pre"] == name

def test_gguf_files_of_bytes(tmp_path):
    """They have a merge, as llama.cpp wants one."""
    bpe.save(bpe.train([], 257), tmp_path / "tokenizer.json")
    config, tokenizer = small_config(vocab_size=257), files.read_json(tmp_path / "tokenizer.json")
    checkpoint.save_checkpoint(tmp_path / "m", random_params(config), config, tokenizer, (END, 256))
    gguf.export(str(tmp_path / "m"), output=str(tmp_path / "m.gguf"))
    assert said_in(tmp_path / "m.gguf")["tokenizer.ggml.merges"] == ["ÿ ÿ"]

def test_names_that_are_no_text_in_gguf_files():
    """As of a folder whose name is not UTF-8."""
    assert gguf.string(os.fsdecode(b"run-\xff")) == b"\5\0\0\0\0\0\0\0run-?"

def test_gguf_files_say_how_a_model_is_spoken_to(trained, tmp_path, capsys):
    """Up to three tokens that end a text, and the template of a chat, from either file that may have it."""
    def said():
        gguf.export(str(tmp_path / "m"), output=str(tmp_path / "m.gguf"))
        return said_in(tmp_path / "m.gguf")

    shutil.copytree(trained / "runs/tiny/latest", tmp_path / "m")
    assert not said().keys() & {"tokenizer.chat_template", "tokenizer.ggml.eot_token_id"}
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [256, 5, 6, 7]}))
    config = files.read_json(tmp_path / "m/tokenizer_config.json")
    templates = [{"name": "tools", "template": "{{ 1 }}"}, {"name": "default", "template": "{{ 2 }}"}]
    for kept, template in (("{{ 0 }}", "{{ 0 }}"), (templates, "{{ 2 }}")):
        (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(config | {"chat_template": kept}))
        capsys.readouterr()
        assert said()["tokenizer.chat_template"] == template
        assert "of the 4 tokens that end a text the file names three, 256, 5, 6\n" in capsys.readouterr().out
    (tmp_path / "m/chat_template.jinja").write_text("{{ 3 }}")
    now = said()
    assert now["tokenizer.chat_template"] == "{{ 3 }}"
    assert [now[f"tokenizer.ggml.{use}_token_id"] for use in ("eos", "eot", "eom")] == [256, 5, 6]
    (tmp_path / "m/chat_template.jinja").unlink()
    (tmp_path / "m/tokenizer_config.json").write_text('{"chat_template": [1]}')
    with pytest.raises(cli.InputError, match="tokenizer_config.json is damaged"):
        said()

@pytest.mark.parametrize("kind", ["smollm", "llama3"])
def test_gguf_files_that_llama_cpp_would_read_otherwise(other_families, kind):
    """It has names for splits, of which each goes with or without words that are tokens as such."""
    _, ours = other_families[kind]
    gguf.check_words(ours, "m")
    unmade = dict(tokens=[*ours.tokens, b"whole"]) if kind == "smollm" else {}  # by no merge
    words = replace(ours, **unmade)
    turned = replace(words, whole_words=not words.whole_words)
    with pytest.raises(cli.InputError, match=f"^m/tokenizer.json has ignore_merges {str(turned.whole_words).lower()}"):
        gguf.check_words(turned, "m")

def test_export_as_a_command(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    output = f"--output={tmp_path}/m.gguf"
    assert call(monkeypatch, capsys, gguf.export, "runs/tiny", output, "--dtype=q8_0")[0] == 0
    assert os.listdir(tmp_path) == ["m.gguf"]
    os.mkfifo(tmp_path / "fifo")
    for arguments, message in (([output, "--dtype=q4"], "expected one of f32, f16"), (["a", "b"], "2 models given"),
                               (["runs/tiny", "--output=no/x"], "there is no folder no"),
                               (["runs/tiny", f"--output={tmp_path}"], "is a folder"),
                               (["runs/tiny", f"--output={tmp_path}/fifo"], "is a device"),
                               (["runs/tiny", "--output=data/meta.json"], "another kind of file; give another name"),
                               ([""], "MODEL is empty"), (["runs/tiny", "--output="], "is a folder"),
                               (["nowhere"], "is not there"), (["runs/tiny", "--out=x"], "did you mean --output")):
        code, error = call(monkeypatch, capsys, gguf.export, *arguments)
        assert code == 2 and message in error and error.count("\n") == 1, error
    code, out, error = script(monkeypatch, capsys, "sample.py", "export", "--help")
    assert (code, error) == (0, "") and "--dtype" in out and "--prompt" not in out

# ---- Tokenizer ----

def words_by_regex(text, special_tokens, split="gpt2"):
    """What `plain_split` gives, by the regex module: cut at special tokens, then at the split pattern."""
    import regex
    longest_first = sorted(special_tokens, reverse=True)
    parts = regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text) if special_tokens else [text]
    return [word for i, part in enumerate(parts)
            for word in ([part] if i % 2 else regex.findall(bpe.SPLIT_PATTERNS[split], part))]

def spelled_merges(tokenizer):
    return [(tokenizer.tokens[left], tokenizer.tokens[right]) for left, right, _ in tokenizer.merges.tolist()]

def train_on(text, folder, vocab_size, special_tokens=(END,), **options):
    path = Path(folder) / "text.txt"
    path.write_bytes(text.encode())
    return bpe.train([path], vocab_size, special_tokens, **options)

# Characters that Python's Unicode tables don't know yet may be letters to newer tables, those of tiktoken and
# tokenizers.
known = st.characters(exclude_categories=["Cs", "Cn"])
nasty = st.lists(st.one_of(
    st.text(known, max_size=6), st.text("aab 'sltver\n", max_size=12), st.sampled_from(
        ["'s", "'ll", "'re", "'", " '", "'S", "'LL", "'ſ", "!\n\n", " !a", "\t!é", "12345",
         "  ", "\r\n", "\t", "\u00a0", "\u3000", "\u2003 ", "\x1c", "\x85",
         "١٢", "½", "Ⅷ", "e\u0301", "👩‍👩‍👧", "🇫🇷", "你好，", "Привет", "ß", "ﬁ",
         END, END[:5], "<|end" + END, "a" * 40, " " * 20, "ab" * 50, "\0", "\U0010fffd", "𝒳"])),
    max_size=12).map("".join)

@pytest.mark.parametrize("split", bpe.SPLIT_PATTERNS)
@pytest.mark.parametrize("special_tokens", [[], [END], [END, END + "x"], [END, "'", " '"]], ids=str)
@given(text=nasty)
@example(text="it's 'll 7's")
@example(text=f"it's {END}xx{END}  {END}'s ' {END}x\u00a0{END}é\n{END}\n!{END}\n\na")
@example(text="we'l")
def test_splits_are_those_of_regex(special_tokens, split, text):
    expected, data = words_by_regex(text, special_tokens, split), text.encode()
    assert list(bpe.plain_split(text, special_tokens, split)) == expected
    spans = bpe.find_spans(bpe.compile_special_pattern(special_tokens), data)
    starts = bpe.word_starts(data, spans, split).tolist()
    assert [data[begin:end].decode() for begin, end in zip(starts, starts[1:] + [len(data)])] == expected

@given(st.lists(st.text("|b.é", min_size=1, max_size=7), min_size=1, max_size=60, unique=True), st.text("|b.é"))
def test_many_special_tokens_are_found_as_few_are(tokens, text):
    """Of those that begin at a place the longest."""
    longest_first = sorted((token.encode() for token in tokens), key=len, reverse=True)
    expected = [match.span() for match in re.finditer(b"|".join(map(re.escape, longest_first)), text.encode())]
    assert bpe.find_spans(bpe.compile_special_pattern(tokens), text.encode()) == expected

@given(st.lists(st.text("☃★", min_size=1, max_size=5), min_size=2, max_size=4, unique=True))
def test_added_tokens_that_overlap(tokenizer_file, tokens):
    """Refused is one that the first, not normalized, stands in, or that may end as the first begins."""
    description, (first, *later) = files.read_json(tokenizer_file), tokens
    size = len(description["model"]["vocab"] | {token["content"]: 0 for token in description["added_tokens"]})
    description["added_tokens"] += [{"id": size + i, "content": token, "special": False, "normalized": token != first}
                                    for i, token in enumerate(tokens)]
    overlap = any(first in text or any(first.startswith(text[i:]) for i in range(1, len(text))) for text in later)
    with pytest.raises(ValueError, match="overlaps with") if overlap else contextlib.nullcontext():
        bpe.from_description(description)

MISSING = [0xC0, 0xC1, *range(0xF1, 0x100), 0x00, 0x01, 0x02, 0x03]  # 21 bytes, as many as SmolLM lacks

def tokenizer_like(kind, folder):
    """A tokenizer of the kind of another family's, by the library: theirs and, read from its file, ours."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    steps = {"smollm": [pre_tokenizers.Digits(individual_digits=True),
                        pre_tokenizers.ByteLevel(add_prefix_space=False)],
             "llama3": [pre_tokenizers.Split(tokenizers.Regex(bpe.SPLIT_PATTERNS["llama3"]), "isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]}[kind]
    theirs = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    special = {"smollm": [END, "<|im_start|>", "<|im_end|>"], "llama3": ["<|begin_of_text|>", "<|eot_id|>", END]}[kind]
    characters = [c for b, c in enumerate(bpe.byte_alphabet()) if kind == "llama3" or b not in MISSING]
    text = many_stories(100, 3) + "12345 I'LL We'RE 你好 naïve!\n\n" * 20
    theirs.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=characters, show_progress=False))
    if kind == "llama3":
        theirs.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]} $B", special_tokens=[(special[0], 0)])
    theirs.save(str(folder / "tokenizer.json"))
    description = json.loads((folder / "tokenizer.json").read_text())
    if kind == "llama3":  # a word that is a token, but that no merges lead to
        description["model"]["merges"] = [pair for pair in description["model"]["merges"] if pair != ["Ġt", "he"]]
        (folder / "tokenizer.json").write_text(json.dumps(description))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), bpe.load(folder / "tokenizer.json")

@pytest.fixture(scope="module")
def other_families(tmp_path_factory):
    return {kind: tokenizer_like(kind, tmp_path_factory.mktemp(kind)) for kind in ("smollm", "llama3")}

@pytest.mark.parametrize("kind", ["smollm", "llama3"])
@settings(max_examples=200)
@given(text=nasty)
def test_ids_of_other_families_are_those_of_tokenizers(other_families, kind, text):
    theirs, ours = other_families[kind]
    if kind == "smollm" and set(text.encode()) & set(MISSING) - set(END.encode()):
        with pytest.raises(cli.InputError, match="the text has the byte 0x"):
            bpe.encode(ours, text)
        return
    ids = bpe.encode(ours, text)
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids == bpe.plain_encode(ours, text)
    assert bpe.decode(ours, ids) == text

def test_other_families_in_files_and_again(other_families, tmp_path, monkeypatch):
    """In pieces too; and written by us they are the same."""
    text = "".join(stories.story(5, i) + random.Random(i).choice(["\n", "12", "!\n", "'LL é", END]) for i in range(200))
    (tmp_path / "text.txt").write_text(text + "x" * 100 + "the" * 30)
    monkeypatch.setattr(bpe, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(bpe, "PIECE_BYTES", 3_000)
    for theirs, ours in other_families.values():
        expected = theirs.encode((tmp_path / "text.txt").read_text(), add_special_tokens=False).ids
        for workers in (1, 2):
            pieces = bpe.encode_pieces(ours, [tmp_path / "text.txt"], workers)
            assert np.concatenate([ids for _, ids in pieces]).tolist() == expected
        bpe.save(ours, tmp_path / "again.json")
        again = tokenizers.Tokenizer.from_file(str(tmp_path / "again.json"))
        assert bpe.are_same(ours, bpe.load(tmp_path / "again.json"))
        assert again.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids

def test_threads_encode_by_one_tokenizer(tokenizer_file, monkeypatch, request):
    tokenizer = bpe.load(tokenizer_file)
    monkeypatch.setattr(bpe, "OF_THREAD", threading.local())
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)
    texts = [many_stories(300, i) for i in range(4)]
    expected = [bpe.Encoder(tokenizer).encode(text.encode()).tolist() for text in texts]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            assert [ids.tolist() for ids in threads.map(functools.partial(bpe.encode, tokenizer), texts)] == expected

def test_threads_leave_onednn_as_it_is():
    w, x = randn(300, 256).bfloat16(), randn(1, 256).bfloat16()
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: tinylm.linear_of_one(x, w), range(2000)))
    assert torch.backends.mkldnn.enabled

@pytest.mark.parametrize("many", [1, 4, 1000])
@given(text=nasty)
def test_training_is_the_definition(tmp_path_factory, many, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe.LinkedWords, "MANY", many)
        tokenizer = train_on(text, tmp_path_factory.mktemp("bpe"), 300)
    assert spelled_merges(tokenizer) == bpe.plain_train(text, 300 - 257, [END])
    assert len(set(tokenizer.tokens)) == len(tokenizer.tokens)

def test_more_words_than_can_be_learned_from():
    with pytest.raises(cli.InputError, match="2 different words of 2,147,483,648 bytes, and 2 GB can be .*; prepare a"):
        bpe.LinkedWords([range(1 << 30)] * 2, np.ones(2, np.int64))

@pytest.mark.parametrize("many", [1, 64])
def test_training_is_the_definition_on_stories(tmp_path, monkeypatch, many):
    monkeypatch.setattr(bpe.LinkedWords, "MANY", many)
    text = many_stories(20, 3, END)
    assert spelled_merges(train_on(text, tmp_path, 400)) == bpe.plain_train(text, 400 - 257, [END])

@pytest.fixture(scope="module")
def three_tokenizers(tmp_path_factory):
    """Ours, and tokenizers' and tiktoken's made from ours, with two special tokens of which one begins the other."""
    folder = tmp_path_factory.mktemp("bpe")
    mixed = "aaa aaaa abab ababab 你好，你好 Привет, мир! naïve café ½ 123 1234 'll don't they're\r\n\r\n\t👩‍👩‍👧 " * 30
    text = many_stories(200, 3) + mixed
    tokenizer = train_on(text, folder, 900, [END, END + "x"])
    bpe.save(tokenizer, folder / "tokenizer.json")
    return bpe.load(folder / "tokenizer.json"), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), \
        same_for_tiktoken(tokenizer)

@given(nasty, nasty)
@example("ababa aaaaa aaaaaaa " + "a" * 40 + "bb " + "xyxyx" * 9, "")
def test_encoding_is_the_definition(tmp_path_factory, three_tokenizers, text, more):
    """Also with a special token too long for the hash table, and with merges in an order that training never has."""
    mixed = three_tokenizers[0]
    small = train_on(text + more, tmp_path_factory.mktemp("bpe"), 300, [END, "a" * 40])
    backwards = bpe.Tokenizer(mixed.tokens, mixed.special_tokens, mixed.merges[::-1])
    for tokenizer in (mixed, small, backwards):
        assert bpe.encode(tokenizer, text).tolist() == bpe.plain_encode(tokenizer, text)

def test_long_words_get_longer_keys(three_tokenizers):
    """From the second of such texts on; with runs of NUL, which look like an empty slot, and special tokens."""
    tokenizer, _, theirs = three_tokenizers
    encoder, draw = bpe.Encoder(tokenizer), random.Random(0)
    words = ["".join(draw.choices(draw.choice(("абвгдежзик", "ab", "\0")), k=draw.randint(1, 40))) for _ in range(4000)]
    for key_size in (16, 32, 32):
        assert encoder.key_size == key_size
        text = END.join(" ".join(draw.choices(words, k=2000)) for _ in range(3))
        assert encoder.encode(text.encode()).tolist() == theirs.encode(text, allowed_special="all")

def test_long_words_that_are_new_beside_others_that_are_known(three_tokenizers):
    tokenizer, known, new = three_tokenizers[0], ["a" * 40, "b" * 50], ["c" * 40, "d" * 50]
    encoder, text = bpe.Encoder(tokenizer), "Once upon a time there was a cat. " * 100
    for words in (known, known + new):
        ids = encoder.encode((text + " ".join(words)).encode())
        assert bpe.decode(tokenizer, ids) == text + " ".join(words)

def tokenizer_of_merges(pairs, **options):
    """A tokenizer of all bytes and what some merges make, each given by the bytes of what it joins."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += dict.fromkeys(left + right for left, right in pairs if left + right not in tokens)
    merges = [(tokens.index(left), tokens.index(right), tokens.index(left + right)) for left, right in pairs]
    return bpe.Tokenizer(tokens, {}, np.array(merges, np.int64).reshape(-1, 3), **options)

@st.composite
def any_merges(draw):
    """Merges of few letters, so that most can come before some other, in an order of training's or any; some make a
    token that another makes too."""
    made, pairs = [b"a", b"b", b"c", b"d"], {}
    for left, right in draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=30)):
        pair = made[left % len(made)], made[right % len(made)]
        if len(b"".join(pair)) <= 12:
            pairs[pair] = None
            made += {b"".join(pair)} - {*made}
    return draw(st.permutations(list(pairs))) if draw(st.booleans()) else list(pairs)

@settings(max_examples=500)
@example([(b"ab", b"c"), (b"c", b"d"), (b"a", b"b")], ["abcd"], 1)  # what the last merge makes comes before it
@example([(b"d", b"e"), (b"de", b"a"), (b"a", b"b"), (b"ab", b"ab")], ["eababab"], 1)  # the first ab is made last
@example([(b"a", b"b"), (b"a", b"ab"), (b"a", b"a")], ["a" * 40, "a" * 40 + "b", "b" + "a" * 41], 1)
@given(any_merges(), st.lists(st.text("abcd", min_size=1, max_size=24).map(
    lambda text: text * (1 + 40 // len(text) ** 2)), min_size=1, max_size=6), st.sampled_from([1, 4, 1000]))
def test_merges_that_are_made_at_once_are_those_of_the_definition(pairs, words, few):
    """In words, and in the front of one of which no more is known."""
    tokenizer = tokenizer_of_merges(pairs)
    merger, expected = bpe.Merger(tokenizer), [bpe.plain_encode(tokenizer, word) for word in words]
    merger.FEW, merger.BATCH = few, 10
    ids, counts = merger.merge_words(bpe.with_fillers([word.encode() for word in words]))
    assert ids.tolist() == sum(expected, []) and counts.tolist() == list(map(len, expected))
    ids, done = merger.merge_front(words[0].encode())
    assert bpe.decode(tokenizer, ids) == words[0][:done]
    for behind in ("", "a", "ab", "b", "bca", "c", "cc", "d", words[-1]):
        assert bpe.plain_encode(tokenizer, words[0] + behind)[:len(ids)] == ids.tolist()

def test_what_is_remembered_has_a_bound(three_tokenizers, monkeypatch):
    for name, value in dict(MOST_IDS=3000, LEAST_BITS=8, MOST_BITS=8).items():
        monkeypatch.setattr(bpe.Encoder, name, value)
    encoder, draw, count = bpe.Encoder(three_tokenizers[0]), random.Random(0), 0
    for i in range(40):  # first words that fit into a key, then longer ones
        words = ["".join(draw.choices("abcdefgh", k=draw.randint(*((1, 12) if i < 20 else (16, 30)))))
                 for _ in range(80)]
        ids = encoder.encode(" ".join(words).encode())
        count += len(ids)
        assert len(encoder.ids) <= 3000 + len(ids) and encoder.num_words <= 128 + 80
    assert count > 20_000
    words = ("".join(draw.choices("abcdefgh", k=20)).encode() for _ in range(500))
    for ids in encoder.encode_endless(b"!" + word for word in words):  # nor where words are not to be cut between
        assert len(encoder.ids) <= 3000 + 100

def test_ids_are_right_after_ctrl_c(three_tokenizers, monkeypatch):
    """In a notebook the tokenizer goes on after it, with what it remembers; it may come at any line."""
    tokenizer, _, theirs = three_tokenizers
    for name, value in dict(LEAST_BITS=4, MOST_IDS=30).items():
        monkeypatch.setattr(bpe.Encoder, name, value)
    texts = [stories.story(3, i)[:100] + f" {'x' * 20}{i} день ночь день ночь" for i in range(3)]
    expected = [theirs.encode(text) for text in texts]
    methods = {method.__code__ for method in vars(bpe.Encoder).values() if inspect.isfunction(method)}
    for stop in itertools.count():
        left, encoder = stop, bpe.Encoder(tokenizer)

        def trace(frame, event, _):
            nonlocal left
            if frame.f_code not in methods:
                return None
            left -= event == "line"
            if left == -1:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            for text in texts[:2]:
                encoder.encode(text.encode())
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert [encoder.encode(text.encode()).tolist() for text in texts] == expected, stop
        if left >= 0:
            break
    assert stop > 100

@settings(max_examples=400)
@given(nasty)
def test_ids_are_those_of_tokenizers_and_tiktoken(three_tokenizers, text):
    ours, hugging_face, tik = three_tokenizers
    ids = bpe.encode(ours, text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == tik.encode(text, allowed_special="all")
    assert ids.tolist() == hugging_face.encode(text).ids
    assert bpe.decode(ours, ids) == text

def test_ids_of_long_texts_in_pieces_and_processes(three_tokenizers, tmp_path, monkeypatch):
    """Pieces, processes and what is remembered don't change ids, nor does a file differ from its text."""
    ours, _, tik = three_tokenizers
    text = ("".join(stories.story(5, i) + random.Random(i).choice([END, "\n", "", "é ", "'"]) for i in range(300)) +
            "x" * 3000 + "ab " * 100 + "".join(map(chr, random.Random(0).choices(range(0x20, 0x2000), k=20000))))
    expected = tik.encode(text, allowed_special="all")
    monkeypatch.setattr(bpe, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(bpe, "PIECE_BYTES", 3_000)
    for name, value in dict(MOST_IDS=3000, LEAST_BITS=7, MOST_BITS=8, WAYS=2).items():
        monkeypatch.setattr(bpe.Encoder, name, value)
    assert bpe.encode(ours, text).tolist() == expected
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    for workers in (1, 2):
        assert np.concatenate([ids for _, ids in bpe.encode_pieces(ours, [path], workers)]).tolist() == expected
    monkeypatch.setattr(bpe, "multiprocessing", multiprocessing.get_context("spawn"))
    assert np.concatenate([ids for _, ids in bpe.encode_pieces(ours, [path], workers=2)]).tolist() == expected
    again = [bpe.train([path], 500, workers=workers) for workers in (1, 2)]
    other = train_on(text, tmp_path, 500, workers=1)
    assert spelled_merges(again[0]) == spelled_merges(again[1]) == spelled_merges(other)

@pytest.fixture(scope="module")
def each_split(three_tokenizers, other_families, tmp_path_factory):
    """For each split pattern, a tokenizer of ours and the library's; that of Llama 3 has a word no merges lead to."""
    ours, theirs, _ = three_tokenizers
    path = tmp_path_factory.mktemp("split") / "tokenizer.json"
    bpe.save(replace(ours, split="digits"), path)
    return {"gpt2": (ours, theirs), "digits": (bpe.load(path), tokenizers.Tokenizer.from_file(str(path))),
            "llama3": other_families["llama3"][::-1]}

ALPHABETS = {"English": many_stories(20, 7), "Hindi": "नमस्ते दुनिया। आज मौसम अच्छा है। ",
             "Russian": "Привет, мир! Как дела — хорошо?\n", "Chinese": "你好，世界。今天天气很好、我们去公园。",
             "Thai": "สวัสดีชาวโลก วันนี้อากาศดี", "Arabic": "مرحبا بالعالم، كيف حالك؟ ",
             "numbers": "3.1415 -2718\n161803 1,234\n", "hex": "3fa9c0de71b5e8",
             "code": 'function(a,b){return a&&b||!0};var x="s"+1;', "signs and lines": "---\n===\n***\n"}
pieces_of_text = st.one_of(
    nasty, st.builds(lambda text, i: text[i:i + 60], st.sampled_from(list(ALPHABETS.values())), st.integers(0, 40)),
    st.builds(lambda text, times: text * times, st.sampled_from(
        ["a", "ab", "the", "7", "12½", "!", "!?", " ", "\n", " \n", "\u3000", "你", "你好", "🦊", "'", "\r\n "]),
        st.integers(1, 300)))

@pytest.mark.parametrize("split", bpe.SPLIT_PATTERNS)
@settings(max_examples=40)
@given(text=st.lists(pieces_of_text, max_size=6).map("".join), chunk=st.integers(12, 200))
@example(text="!?" * 99 + "'s" + "12" * 99 + "\n" * 99 + "x" + " \n" * 99 + "!" + "theب" * 99 + " the" * 40, chunk=40)
def test_ids_are_the_same_wherever_text_of_any_alphabet_is_cut(each_split, split, text, chunk):
    """In the smallest pieces, words without end among them."""
    ours, theirs = each_split[split]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(CHUNK_BYTES=chunk, MOST_BYTES=chunk, PIECE_BYTES=chunk // 3, LONG_WORD=8).items():
            patch.setattr(bpe, name, value)
        assert bpe.encode(ours, text).tolist() == theirs.encode(text, add_special_tokens=False).ids

@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_text_of_every_alphabet_is_cut_into_short_pieces(alphabet):
    text = (ALPHABETS[alphabet] * (20_000 // len(ALPHABETS[alphabet]))).encode()
    for split in bpe.SPLIT_PATTERNS:
        pieces = list(bpe.cut_text(text, 500, [END], split))
        assert b"".join(pieces) == text and max(map(len, pieces)) < 600

@pytest.mark.parametrize("letters", ["a", "abcdefghij", "你好世界", "12"])
def test_a_word_without_end_is_encoded_a_block_at_a_time(each_split, tmp_path, monkeypatch, letters):
    """So that neither what is held nor the time for a byte grows with it."""
    word = "".join(random.Random(0).choices(letters, k=40_000 // len(letters.encode()[:3])))
    for name, value in dict(CHUNK_BYTES=2000, MOST_BYTES=4000, PIECE_BYTES=1000, LONG_WORD=500).items():
        monkeypatch.setattr(bpe, name, value)
    monkeypatch.setattr(bpe.Merger, "BATCH", 500)
    word += " ab " + word[:1000]  # and one that can be held, but is not merged at once
    (tmp_path / "text.txt").write_text(word)
    longest, merge_sure = 0, bpe.Merger.merge_sure

    def watched(self, text, last):
        nonlocal longest
        longest = max(longest, len(text))
        return merge_sure(self, text, last)

    monkeypatch.setattr(bpe.Merger, "merge_sure", watched)
    for split, (ours, theirs) in each_split.items():
        pieces = [ids for _, ids in bpe.encode_pieces(ours, [tmp_path / "text.txt"], workers=1)]
        assert np.concatenate(pieces).tolist() == theirs.encode(word, add_special_tokens=False).ids
        assert max(map(len, pieces)) <= 4000 and longest <= 2000

LETTERS = "abcdefghijklmnopqrstuvwxyz"

@pytest.mark.parametrize("pairs, whole, split, text", [
    # y decides by twos, from behind, how all letters before it are joined
    ([*zip(LETTERS, LETTERS[1:25])][::-1] + [("y", "a")], [], "gpt2", LETTERS[:25] * 8),
    # white space is one word up to its last new line
    ([("\n", " ")], [], "llama3", "x\n" + " " * 300 + "\ny"),
    ([("\n", " ")], [], "llama3", "!" + "\n" * 300 + " \ny"),
    # what stays whole where it is a word does not where it is a part, or the end, of one
    ([("x", "x")], ["abc"], "gpt2", "abc." + ".".join("x" * n + "abc" for n in range(70, 90)) + ".abc" + "x" * 15),
    ([("x", "x")], [LETTERS[:20]], "gpt2", ".".join("x" * n + LETTERS[:20] for n in range(70, 90))),
], ids=["chain", "white space", "white space behind a sign", "parts", "ends"])
def test_words_without_end_by_other_merges(monkeypatch, pairs, whole, split, text):
    for name, value in dict(CHUNK_BYTES=60, MOST_BYTES=60, PIECE_BYTES=20, LONG_WORD=8).items():
        monkeypatch.setattr(bpe, name, value)
    tokenizer = tokenizer_of_merges([(left.encode(), right.encode()) for left, right in pairs], split=split)
    tokens = tokenizer.tokens + [token.encode() for token in whole]
    tokenizer = replace(tokenizer, tokens=tokens, whole_words=bool(whole))
    assert bpe.encode(tokenizer, text).tolist() == bpe.plain_encode(tokenizer, text)

def test_absurd_merges_are_refused():
    longer = lambda letter: [(letter, letter * n) for n in range(1, 400)]
    ends = [(many, one) for one, many in longer(b"a")]  # aaa … is made from the left, bbb … from the right
    across = [(b"b" * n, b"a" * m) for n in range(380, 400) for m in range(380, 400)]
    tokenizer = tokenizer_of_merges([*ends, *longer(b"b"), *across])
    with pytest.raises(cli.InputError, match="pairs of parts; expected 16,777,216 at most"):
        bpe.encode(tokenizer, "a")

def test_blocks_end_between_characters(monkeypatch):
    for text in ("a" * 3 + "😀" * 20, "é你😀" * 9):
        for size in range(4, 12):
            monkeypatch.setattr(bpe, "PIECE_BYTES", size)
            data = text.encode()
            blocks = [data[a:b] for a, b in bpe.cut_blocks(lambda start, end: data[start:end], 0, len(data))]
            assert "".join(block.decode() for block in blocks) == text and max(map(len, blocks)) <= size

def test_a_word_without_end_of_long_tokens(tmp_path):
    tokenizer = train_on("=" * 40_000 + " a", tmp_path, 270)
    assert max(map(len, tokenizer.tokens)) > 1000
    bpe.save(tokenizer, tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for length in (16_385, 70_003):
        assert bpe.encode(tokenizer, "=" * length + "a").tolist() == theirs.encode("=" * length + "a").ids

def test_mistakes_are_told(tmp_path, monkeypatch, tokenizer_file):
    for special in ([END, END], ["x"]):
        with pytest.raises(cli.InputError, match="expected different ones of two bytes or more"):
            train_on("some text", tmp_path, 300, special)
    with pytest.raises(cli.InputError, match="spelled like another token"):
        bpe.save(train_on("some text", tmp_path, 258, [END, bpe.byte_alphabet()[32]]), tmp_path / "t.json")
    with pytest.raises(cli.InputError, match="half a surrogate pair at character 2"):
        bpe.encode(bpe.load(tokenizer_file), "ab\ud800")
    monkeypatch.setattr(bpe, "CHUNK_BYTES", 100)
    (tmp_path / "bad.txt").write_bytes(b"some words " * 30 + b"\xff")
    with pytest.raises(cli.InputError, match="at byte 330;"):
        bpe.train([tmp_path / "bad.txt"], 300)

def test_decoding_replaces_what_is_not_utf8(three_tokenizers):
    ours = three_tokenizers[0]
    assert bpe.decode(ours, [0xF0, 0x9F, ord("a")]) == b"\xf0\x9fa".decode(errors="replace")
    with pytest.raises(cli.InputError, match="0 to 899"):
        bpe.decode(ours, [900])

def test_invalid_utf8_is_reported_or_replaced(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes("é".encode() * 10 + b"\xff ok")
    with pytest.raises(cli.InputError, match="bad.txt is not valid UTF-8 at byte 20"):
        bpe.train([path], 300)
    tokenizer = bpe.train([path], 300, errors="replace")
    (_, ids), = bpe.encode_pieces(tokenizer, [path], errors="replace")
    assert bpe.decode(tokenizer, ids) == path.read_bytes().decode(errors="replace")
    path.write_bytes(many_stories(20, end=END).encode() + b"\xff")
    prepare.prepare(input=path, output=tmp_path / "data", vocab_size=300, errors="replace")
    ids = prepare.open_data(tmp_path / "data")[1]["val"]
    assert bpe.decode(bpe.load(tmp_path / "data"), ids[:].tolist()).count("\ufffd") == 1

# ---- Corpora ----

def test_stories():
    texts = [stories.story(0, i) for i in range(20_000)]
    assert len(set(texts)) == 20_000
    assert texts[:50] == [stories.story(0, i) for i in range(50)] and texts[0] != stories.story(1, 0)
    assert len(stories.PLOTS) >= 40
    assert len({word for text in texts for word in re.findall("[a-z]+", text.lower())}) >= 1500
    for text in texts[:2000]:
        assert not set(text) & set("{}[]|~") and text.count("\n\n") == 2 and text.isascii()
        assert not re.search(r"\ba ([aeiou]|hon|hour)|\ban (?!hon|hour)[^aeiou\W]|  | [.,]|[.!?] [a-z]", text), text
        for met in re.finditer(r"named ([A-Z]\w+)", text):
            assert not re.search(rf"\b{met[1]}\b", text[:met.start()]), text  # who is met was not there before
        bow = re.search(r"From that day on, \w+ and (\w+)", text)
        assert not bow or text[:bow.start()].count(bow[1]) > ("best friend was" in text), text
    for cast in (stories.draw_cast(random.Random(i)) for i in range(3000)):
        assert cast["friend"] != cast["hero"] and cast["color2"] != cast["color"] and cast["home"] != cast["place"]
    nouns = "fox mouse pony monkey walrus ostrich deer peach fig".split()
    assert list(map(stories.plural, nouns)) == "foxes mice ponies monkeys walruses ostriches deer peaches figs".split()

def prepared(tmp_path, text="", **flags):
    """A data folder of some stories, or of `text`."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "corpus.txt").write_text(text or many_stories(150, end=END), newline="")
    prepare.prepare(input=str(tmp_path / "corpus.txt"), output=str(tmp_path / "data"), **dict(vocab_size=400) | flags)
    return tmp_path / "data"

def test_stories_to_validate_on_are_others(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "NUM_STORIES", {"train.txt": 3, "val.txt": 2})
    texts = [path.read_text() for path in prepare.write_stories(tmp_path)]
    assert texts == ["".join(stories.story(0, i) + END for i in numbers) for numbers in (range(3), range(3, 5))]

@pytest.mark.parametrize("before", range(14))
def test_no_mark_is_cut(tmp_path, before):
    """Where the tenth for validation begins within one."""
    size = 900 - before  # of the text in front of the mark
    (tmp_path / "text.txt").write_text("A" * size + END + "B" * (1000 - size - len(END)))
    train, val = prepare.split_spans([(tmp_path / "text.txt", 0, 1000)], 0.1)
    assert train[0][2] == val[0][1] == size + len(END)

@pytest.mark.parametrize("behind", range(5))
def test_no_last_mark_is_cut(tmp_path, behind):
    """Where too little stands behind it: the cut is before it."""
    text = "A" * 980 + END + "B" * behind
    (tmp_path / "text.txt").write_text(text)
    train, val = prepare.split_spans([(tmp_path / "text.txt", 0, len(text))], 10 / len(text))
    assert train[0][2] == val[0][1] == 980

def test_a_run_on_the_data_in_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(prepared(tmp_path))
    assert train.train(data=".", **TINY | dict(num_steps=1)).folder == Path("runs/data")

def test_prepare_keeps_every_byte(tmp_path):
    data = prepared(tmp_path)
    meta, ids = prepare.open_data(data)
    tokenizer = bpe.load(data / "tokenizer.json")
    text = (tmp_path / "corpus.txt").read_text()
    assert bpe.decode(tokenizer, ids["train"]) + bpe.decode(tokenizer, ids["val"]) == text
    assert ids["train"][-1] == ids["val"][-1] == meta["end_of_text_id"] == 256
    for split in ("train", "val"):
        assert meta[split]["tokens"] == len(ids[split])
        assert meta[split]["bytes"] == len(bpe.decode(tokenizer, ids[split]).replace(END, ""))
    assert 0.08 < meta["val"]["bytes"] / (meta["train"]["bytes"] + meta["val"]["bytes"]) < 0.12

def test_texts_begin_with_their_ids():
    """Not twice, and not where there is no text between two ends."""
    ids = np.array([5, 9, 9, 6, 7, 9, 1, 8], np.uint16)
    assert prepare.with_begin_ids(ids, True, [1, 2], 9).tolist() == [1, 2, 5, 9, 9, 1, 2, 6, 7, 9, 1, 8]
    assert prepare.with_begin_ids(ids, False, [1], 9).tolist() == [5, 9, 9, 1, 6, 7, 9, 1, 8]
    assert prepare.with_begin_ids(ids, True, [], 9) is ids

def test_prepare_a_folder_with_its_own_validation(tmp_path):
    for folder in ("sub", ".git"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("sub/c.txt", "third"), (".hidden", "no"),
                       (".git/d.txt", "no"), ("empty", "")):
        (tmp_path / "in" / name).write_text(text)
    (tmp_path / "val.txt").write_text("validation")
    prepare.prepare(input=str(tmp_path / "in"), val_input=str(tmp_path / "val.txt"), output=str(tmp_path / "out"),
                    vocab_size=257)
    meta, ids = prepare.open_data(tmp_path / "out")
    tokenizer = bpe.load(tmp_path / "out/tokenizer.json")
    assert bpe.decode(tokenizer, ids["train"]) == f"first{END}second{END}third{END}"
    assert bpe.decode(tokenizer, ids["val"]) == f"validation{END}"

def test_prepare_leaves_the_old_data_when_it_fails(tmp_path):
    data = prepared(tmp_path)
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    (tmp_path / "bad.txt").write_bytes(b"good text\n" * 99 + b"\xff")
    with pytest.raises(cli.InputError, match="UTF-8"):
        prepare.prepare(input=str(tmp_path / "bad.txt"), output=str(data))
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "corpus.txt", "data"]

class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; breaks each connection after `limit` bytes; knows ranges or not."""

    content, limit, ranges, requests = b"", None, True, []

    def do_GET(self):
        asked = self.headers["Range"]
        self.requests.append(asked)
        if self.path == "/missing" or self.path == "/busy" and len(self.requests) < 3:
            return self.send_error(404 if self.path == "/missing" else 429)
        begin = int(asked[6:-1]) if asked and self.ranges else 0
        body = self.content[begin:]
        self.send_response(206 if asked and self.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:self.limit])

    def log_message(self, *_):
        pass

@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"requests": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()

def test_download_resumes(server, tmp_path):
    handler, url = server
    handler.content, handler.limit = bytes(range(256)) * 400, 40_000
    path = prepare.download(f"{url}/file", tmp_path / "file", len(handler.content), pause=0)
    assert path.read_bytes() == handler.content
    assert handler.requests == [None, "bytes=40000-", "bytes=80000-"]
    prepare.download(f"{url}/file", tmp_path / "file", len(handler.content))
    assert len(handler.requests) == 3, "a whole file is not fetched again"

@pytest.mark.parametrize("ranges, size", [(False, 5000), (True, 20_000)], ids=["without ranges", "too long a part"])
def test_download_over_what_is_no_part(server, tmp_path, ranges, size):
    handler, url = server
    handler.content, handler.ranges = bytes(range(256)) * 40, ranges
    (tmp_path / "file.part").write_bytes(b"x" * size)
    path = prepare.download(f"{url}/file", tmp_path / "file", len(handler.content), pause=0)
    assert path.read_bytes() == handler.content

def test_download_says_how_far_it_came(server, tmp_path):
    handler, url = server
    handler.content = b"short"
    with pytest.raises(cli.InputError, match="stopped at 5 of 10 bytes.*run the command again"):
        prepare.download(f"{url}/file", tmp_path / "file", 10, attempts=2, pause=0)
    with pytest.raises(cli.InputError, match="404"):
        prepare.download(f"{url}/missing", tmp_path / "other", 10)
    handler.requests.clear()
    assert prepare.download(f"{url}/busy", tmp_path / "busy", 5, pause=0).read_bytes() == b"short"
    assert len(handler.requests) == 3
    assert not (tmp_path / "file").exists()

def test_a_server_that_does_not_answer_is_asked_less_and_less(tmp_path, monkeypatch):
    problems = [ConnectionError, TimeoutError, ssl.SSLError, urllib.error.URLError, http.client.IncompleteRead]
    waits, refuse = [], unittest.mock.Mock(side_effect=[kind(b"refused") for kind in [*problems, *problems[:3]]])
    monkeypatch.setattr(prepare.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(prepare.time, "sleep", waits.append)
    with pytest.raises(cli.InputError, match="stopped at 0 of 5 bytes .*refused"):
        prepare.download("http://127.0.0.1/file", tmp_path / "file", 5)
    assert waits == [1, 2, 4, 8, 16, 30, 30] and refuse.call_count == 8

def test_a_known_corpus_whose_download_was_interrupted(server, tmp_path, monkeypatch):
    def interrupted(*args):
        try:
            genuine(*args)
        finally:
            raise KeyboardInterrupt

    (handler, url), genuine = server, prepare.receive
    handler.content, handler.limit = "".join(stories.story(0, i) + END for i in range(50)).encode(), 9000
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    monkeypatch.setitem(prepare.DOWNLOADS, "shakespeare", [(f"{url}/input.txt", len(handler.content))])
    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(prepare, "receive", interrupted)
        prepare.find_data("shakespeare")
    prepare.find_data("shakespeare")
    assert handler.requests[:2] == [None, "bytes=9000-"]

@pytest.mark.parametrize("name", ["tinystories", "shakespeare"])
def test_known_corpora_download_and_prepare(server, tmp_path, monkeypatch, name):
    handler, url = server
    handler.content = many_stories(100, end=f"\n{END}\n").encode()
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    files = [(f"{url}/{file.split('/')[-1]}", len(handler.content)) for file, _ in prepare.DOWNLOADS[name]]
    monkeypatch.setitem(prepare.DOWNLOADS, name, files)
    folder = prepare.find_data(name)
    meta, ids = prepare.open_data(folder)
    whole = meta["train"]["bytes"] + (meta["val"]["bytes"] if name == "shakespeare" else 0)
    assert whole == len(handler.content.replace(END.encode(), b""))

# ---- Training and sampling ----

TINY = dict(d_model=32, num_layers=1, num_heads=2, context_length=32, batch_size=4, num_steps=6, log_interval=1,
            eval_interval=3, eval_tokens=1000, sample_tokens=8, device="cpu", dtype="float32")

def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]

def without_time(lines):
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second", "peak_memory")}
            for line in lines]

def test_thirty_steps_lower_the_loss(tmp_path, capsys):
    data = prepared(tmp_path)
    train.train(data=str(data), output_dir=str(tmp_path / "run"),
                **TINY | dict(num_steps=30, d_model=64, eval_interval=15))
    lines = metrics(tmp_path / "run")
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert len(losses) == 30 and losses[0] == pytest.approx(math.log(400), abs=0.1) and losses[-1] < losses[0] - 0.8
    last = lines[-1]
    assert last["step"] == 30 and last["tokens"] == 30 * 4 * 32 and last["val_loss"] < losses[0] - 0.8
    meta = json.loads((data / "meta.json").read_text())["val"]
    bits = last["val_loss"] * (meta["tokens"] - 1) / math.log(2)  # the first token is no target
    assert last["val_bits_per_byte"] == pytest.approx(bits / meta["bytes"])
    out = capsys.readouterr().out
    for word in ("parameters", "cpu, float32", "128 tokens", str(tmp_path / "run"), "tokens/s", "left",
                 "bits per byte"):
        assert word in out

def test_evaluation_is_the_mean_over_the_whole_split(tmp_path):
    data = prepared(tmp_path)
    train.train(data=str(data), output_dir=str(tmp_path / "run"), **TINY | dict(eval_tokens=10_000))
    model = hf_model(tmp_path / "run/latest")
    val = torch.from_numpy(prepare.open_data(data)[1]["val"].astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(val) - 1, 32):
            targets = val[i + 1:i + 33]
            logits = model(val[i:i + 32][None, :len(targets)]).logits[0]
            total += F.cross_entropy(logits, targets, reduction="sum").item()
    assert metrics(tmp_path / "run")[-1]["val_loss"] == pytest.approx(total / (len(val) - 1), abs=1e-4)

@pytest.mark.parametrize("count", [1, 5, 9, 16, 17])
def test_ranks_evaluate_each_target_once(count):
    """Some have none of the last batch, which is filled up."""
    settings = train.Settings.complete(dict(device="cpu", batch_size=4, context_length=2))
    losses = lambda params, inputs, targets: torch.ones(inputs.shape)
    parts = [train.evaluate(losses, None, np.arange(count + 1), settings, rank, 4) for rank in range(4)]
    assert sum(parts) == pytest.approx(1), parts

def test_seeds_begin_with_other_parameters(trained):
    models = []
    for seed in (0, 0, 1):
        settings = train.Settings.complete(dict(device="cpu", d_model=16, num_layers=1, seed=seed))
        one = run.Run(settings, trained, trained / "data", meta=files.read_json(trained / "data/meta.json"))
        run.load_state(one)
        models.append(one.params["embedding"])
    assert models[0].equal(models[1]) and not models[0].equal(models[2])

def test_each_part_of_a_step_draws_numbers_of_its_own():
    """As for dropout: by seed, step, batch of a step and rank."""
    def gradients(params, inputs, targets):
        drawn.append(torch.rand(()).item())
        return torch.zeros(()), params

    drawn = []
    for seed, step, rank in itertools.product((0, 1), repeat=3):
        settings = train.Settings.complete(dict(device="cpu", batch_size=2, context_length=4, grad_accum_steps=2,
                                                seed=seed))
        settings.shard = True  # so that nothing travels
        train.accumulate_gradients(gradients, {"w": torch.zeros(1)}, np.arange(40), settings, step, rank, 2)
    assert len(set(drawn)) == 16

def test_gradient_accumulation_is_one_large_batch(tmp_path):
    data = prepared(tmp_path)
    for name, batch_size, count in (("whole", 8, 1), ("parts", 2, 4)):
        train.train(data=str(data), output_dir=str(tmp_path / name),
                    **TINY | dict(batch_size=batch_size, grad_accum_steps=count))
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts")):
        assert a.get("train_loss", 0) == pytest.approx(b.get("train_loss", 0), abs=1e-4)

FALLING_THEN_RISING = 5.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0

def evaluations_give(losses, monkeypatch):
    losses = iter(losses)
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))

def meanwhile(step, monkeypatch, action):
    """Do something to a run as it begins to compute a step."""
    genuine = train.accumulate_gradients

    def gradients(*args):
        if args[4] == step - 1:
            monkeypatch.setattr(train, "accumulate_gradients", genuine)  # of runs that the action begins too
            action()
        return genuine(*args)

    monkeypatch.setattr(train, "accumulate_gradients", gradients)

def stop_after(step, monkeypatch):
    """Make a run end with KeyboardInterrupt right after the checkpoint of a step."""
    saving = run.save

    def save(*args):
        saving(*args)
        if args[1] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "save", save)

@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)

@pytest.mark.parametrize("flags", [{}, {"grad_accum_steps": 3}, {"optimizer": "muon", "remat": True},
                                   {"dtype": "bfloat16"}], ids=["plain", "accumulating", "muon", "bfloat16"])
def test_resuming_gives_the_uninterrupted_run(tmp_path, two_threads, flags):
    """Compiled too: that is in `measure_kills`."""
    data = prepared(tmp_path)
    flags = TINY | dict(checkpoint_interval=1, data=str(data)) | flags
    train.train(output_dir=str(tmp_path / "whole"), **flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(4, patch)
        train.train(output_dir=str(tmp_path / "parts"), **flags)
    train.train(resume=str(tmp_path / "parts"))
    assert without_time(metrics(tmp_path / "whole")) == without_time(metrics(tmp_path / "parts"))
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        digests = {hashlib.sha256((tmp_path / run / "latest" / name).read_bytes()).hexdigest()
                   for run in ("whole", "parts")}
        assert len(digests) == 1

def test_resuming_refuses_what_would_make_another_run(tmp_path):
    train.train(data=str(prepared(tmp_path)), output_dir=str(tmp_path / "run"), **TINY)
    for flags, message in ((dict(resume="run"), "larger --num_steps"),
                           (dict(resume="run", d_model=64), "--d_model=64.*start a new run"),
                           (dict(resume="run/latest"), "--resume=.*/run$"),
                           (dict(resume="data"), "folder that train.py wrote")):
        with pytest.raises(cli.InputError, match=message):
            train.train(**flags | dict(resume=str(tmp_path / flags["resume"])))
    with pytest.raises(run.Finished, match="has done its 6 steps"):
        train.train(resume="auto", data=str(tmp_path / "data"), output_dir=str(tmp_path / "run"))
    prepare.prepare(input=tmp_path / "corpus.txt", output=tmp_path / "other", vocab_size=300)
    with pytest.raises(cli.InputError, match="other has other data|another tokenizer"):
        train.train(resume="auto", data=str(tmp_path / "other"), output_dir=str(tmp_path / "run"))
    train.train(data=tmp_path / "data", output_dir=tmp_path / "muon", optimizer="muon", **TINY)
    damage(tmp_path / "muon/latest/training", "train_state.json",  # a run of before that was a flag
           lambda content: re.sub(rb'"momentum": [\d.]+,', b"", content))
    with pytest.raises(cli.InputError, match="--resume=.*/run and --init_from=model: give one of the two"):
        train.train(resume=tmp_path / "run", init_from="model")
    still = train.train(data=tmp_path / "data", output_dir=tmp_path / "still", lr_max=0, **TINY)
    assert train.train(resume=still.folder, lr_max=1e-3, num_steps=7).step == 7
    for momentum, message in ((0.5, "the run has momentum 0.95"), (0.95, "larger --num_steps")):
        with pytest.raises(cli.InputError, match=message):
            train.train(resume=tmp_path / "muon", momentum=momentum)

def test_a_run_goes_on_where_it_was_moved(tmp_path):
    """Also with bytes in its metrics that are no text, as a failing disk leaves them."""
    data = str(prepared(tmp_path))
    train.train(data=data, output_dir=str(tmp_path / "run"), **TINY)
    (tmp_path / "run").rename(tmp_path / "moved")
    with open(tmp_path / "moved/metrics.jsonl", "ab") as file:
        file.write(b"\xff\x92")
    train.train(resume="auto", data=data, output_dir=str(tmp_path / "moved"), num_steps=7)
    assert metrics(tmp_path / "moved")[-1]["step"] == 7

@pytest.mark.parametrize("tile", [tinylm.TILE_QUERIES, 5], ids=["plain attention", "tiled attention"])
def test_compiled_training_is_the_same(tmp_path, two_threads, monkeypatch, tile):
    monkeypatch.setattr(tinylm, "TILE_QUERIES", tile)
    torch._dynamo.reset()  # what was compiled before would be taken again
    data = prepared(tmp_path)
    for name, compiled in (("eager", False), ("compiled", True)):
        train.train(data=str(data), output_dir=str(tmp_path / name), compile=compiled, **TINY)
    for a, b in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled")):
        assert a.get("train_loss", 0) == pytest.approx(b.get("train_loss", 0), abs=1e-3)

def read_wandb(path):
    """The history rows and the config in a .wandb file: records in LevelDB's log format, of W&B's own protobufs."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2
    deadline, records = time.monotonic() + 60, []
    # W&B's own process may still be writing when the run has ended.
    while not any(record.WhichOneof("record_type") == "exit" for record in records) and time.monotonic() < deadline:
        time.sleep(0.05)
        content, position, whole, records = Path(path).read_bytes(), 7, b"", []
        while position + 7 <= len(content):
            if -position % 32768 < 7:  # a header is never split between blocks
                position += -position % 32768
            length, kind = int.from_bytes(content[position + 4:position + 6], "little"), content[position + 6]
            whole += content[position + 7:position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # the whole record, or its last part
                with contextlib.suppress(DecodeError):  # a part of it only
                    records.append(wandb_internal_pb2.Record.FromString(whole))
                whole = b""
    row = lambda history: {item.key or item.nested_key[0]: json.loads(item.value_json) for item in history.item}
    rows = [row(record.history) for record in records if record.WhichOneof("record_type") == "history"]
    updates = [update for record in records for update in record.run.config.update]
    return rows, {update.key: json.loads(update.value_json) for update in updates}

def test_wandb_offline_has_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    data = prepared(tmp_path)
    flags = TINY | dict(sample_tokens=5, use_wandb=True, wandb_artifacts=True, wandb_histograms=True)
    train.train(data=str(data), output_dir=str(tmp_path / "run"), **flags)
    rows, config = read_wandb(glob.glob(f"{tmp_path}/run/wandb/*/*.wandb")[0])
    assert config["d_model"] == 32 and config["lr_max"] > 0 and config["torch_version"] == torch.__version__
    assert config["num_params"] == sum(t.numel() for t in load_file(tmp_path / "run/latest/model.safetensors").values())
    assert config.keys() >= {"git_commit", "device_name", "python_version", "num_ranks"}
    tables = glob.glob(f"{tmp_path}/run/wandb/offline-run-*/files/media/table/samples*")
    assert len(tables) == 2, "a table at each evaluation"
    losses = lambda lines: [line["train_loss"] for line in lines if "train_loss" in line]
    assert losses(rows) == losses(metrics(tmp_path / "run"))
    for key in ("lr", "grad_norm", "tokens_per_second", "tokens", "peak_memory", "val_loss", "val_perplexity",
                "val_bits_per_byte", "seconds", "samples", "params/blocks.0.mlp.w_up", "grads/embedding"):
        assert any(key in row for row in rows), key
    train.train(resume=str(tmp_path / "run"), num_steps=9)
    files = [Path(file) for file in glob.glob(f"{tmp_path}/run/wandb/offline-run-*/*.wandb")]
    assert len({file.name for file in files}) == 1 and len(files) == 2, "both parts belong to one run"
    # A second part begun within the same second has its folder's name with -1 behind it.
    steps = [row["_step"] for file in sorted(files, key=lambda file: file.parent.name) for row in read_wandb(file)[0]]
    assert steps == sorted(steps) and steps[-1] == 9

def test_wandb_gets_checkpoints_by_their_aliases(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb
    monkeypatch.setattr(wandb.Run, "log_artifact",
                        lambda self, artifact, aliases=(): logged.append((artifact, aliases)))
    evaluations_give([5.0, 6.0], monkeypatch)
    train.train(data=str(prepared(tmp_path)), output_dir=str(tmp_path / "run"), use_wandb=True, wandb_artifacts=True,
                **TINY)
    # W&B keeps tables as other artifacts.
    logged = [(artifact, aliases) for artifact, aliases in logged if artifact.type == "model"]
    assert [aliases for _, aliases in logged] == [["latest", "best"], ["latest"]]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= logged[0][0].manifest.entries.keys()

def test_share_of_peak_flops(monkeypatch):
    """Those that torch counts of matrices, forward and backward, and 4 more for the gains of norms; attention whole."""
    for tied in (False, True):
        config = small_config(tie_embeddings=tied)
        params, tokens = random_params(config), random_tokens(config, 1, config.context_length + 1)
        with FlopCounterMode(display=False) as counter, tinylm.definitions_alone():
            tinylm.value_and_grad(tinylm.loss_fn, params, tokens[:, :-1], tokens[:, 1:], config)
        gains = (2 * config.num_layers + 1) * config.d_model
        expected = counter.get_total_flops() / config.context_length + 6 * gains
        assert log.flops_per_token(config) == expected, (tied, log.flops_per_token(config), expected)
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12),
                       ("NVIDIA L40S", 362e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert machine.peak_flops("cuda:0") == peak
    for name in ("GPU of tomorrow", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100 NVL", "RTX 4090 Laptop GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert machine.peak_flops("cuda:0") is None

def test_what_is_measured(tmp_path, monkeypatch):
    """Perplexity, and of two GPUs the share of both."""
    monkeypatch.setattr(machine, "peak_flops", lambda device: 1e9)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    lines, config = metrics(tmp_path / "run"), checkpoint.load_config(tmp_path / "run/latest")
    assert lines[-1]["val_perplexity"] == pytest.approx(math.exp(lines[-1]["val_loss"]))
    size = TINY["batch_size"] * TINY["context_length"]
    assert all(line["tokens"] == line["step"] * size for line in lines)
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    top = train.Settings.complete(TINY).lr_max
    assert rates == {step + 1: pytest.approx(tinylm.cosine_lr(step, top, top / 100, 0, 6)) for step in range(6)}
    share = lines[4]["tokens_per_second"] * log.flops_per_token(config) / 1e9
    assert lines[4]["flops_share"] == pytest.approx(share, abs=1e-4)
    monkeypatch.setattr(log, "introduce", lambda run: None)
    settings = types.SimpleNamespace(device="cuda", use_wandb=False)
    assert log.Log(run.Run(settings, tmp_path, tmp_path, rank=1, num_ranks=2, config=config)).peak_flops == 2e9

def test_a_loss_whose_perplexity_no_float_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: 1000.0)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    assert metrics(tmp_path / "run")[-1]["val_perplexity"] == math.exp(700)

def test_samples_show_the_model_learning(tmp_path, capsys):
    """The sample at an evaluation is what generate writes with the checkpoint of that step."""
    data = prepared(tmp_path)
    train.train(data=str(data), output_dir=str(tmp_path / "run"), **TINY)
    samples = [line["sample"] for line in metrics(tmp_path / "run") if "sample" in line]
    assert len(samples) == 2 and samples[0] != samples[1]
    assert cli.visible(" ".join(samples[1].split())) in capsys.readouterr().out
    params, config = checkpoint.load_checkpoint(tmp_path / "run/latest")
    tokenizer = bpe.load(data / "tokenizer.json")
    written = tinylm.generate(params, torch.tensor([[256]]), config, 8, 0.8, 0, 0.95, (256,), generator(0))
    tokens = [t.item() for t in written]
    assert samples[1] == bpe.decode(tokenizer, [t for t in tokens if t != 256])

@pytest.mark.parametrize("split", ["val", "train"])
def test_eval_only_gives_the_loss_of_transformers(trained, split, capsys):
    train.train(eval_only=True, resume=str(trained / "runs/tiny"), split=split, eval_tokens=500, batch_size=3)
    out = capsys.readouterr().out
    ids = torch.from_numpy(prepare.open_data(trained / "data")[1][split][:501].astype(np.int64))
    model = hf_model(trained / "runs/tiny/latest")
    with torch.no_grad():
        losses = [F.cross_entropy(model(ids[None, i:i + 32][:, :500 - i]).logits[0], ids[i + 1:i + 33],
                                  reduction="sum").item() for i in range(0, 500, 32)]
    loss = float(re.search(r"loss ([\d.]+) nats", out)[1])
    assert loss == pytest.approx(sum(losses) / 500, abs=1e-4)
    assert float(re.search(r"perplexity ([\d.]+)", out)[1]) == pytest.approx(math.exp(loss), rel=1e-3)
    assert " 500 tokens" in out

def test_bits_per_byte_of_a_part_of_a_split(trained, capsys):
    loss = train.train(eval_only=True, resume=str(trained / "runs/tiny"), eval_tokens=500)
    meta = files.read_json(trained / "data/meta.json")["val"]
    bits = float(re.search(r"([\d.]+) bits per byte", capsys.readouterr().out)[1])
    assert bits == pytest.approx(loss / math.log(2) * (meta["tokens"] - 1) / meta["bytes"], abs=1e-4)

def test_eval_only_of_a_text(trained, tmp_path, monkeypatch, capsys):
    """A text file is encoded with the model's tokenizer, as far as it is asked for; bits per byte count its bytes."""
    text = "Once upon a time, there was a cat. " * 5
    (tmp_path / "text.txt").write_text(text)
    train.train(eval_only=True, init_from=str(trained / "runs/tiny/latest"), data=str(tmp_path / "text.txt"))
    out = capsys.readouterr().out
    tokens = len(bpe.encode(bpe.load(trained / "data/tokenizer.json"), text))
    loss, bits = float(re.search(r"loss ([\d.]+)", out)[1]), float(re.search(r"([\d.]+) bits per byte", out)[1])
    assert f" {tokens:,} tokens" in out and bits == pytest.approx(loss * tokens / math.log(2) / len(text), rel=1e-3)
    (tmp_path / "text.txt").write_text(text * 40)
    losses, pieces, encode_pieces = [], [], bpe.encode_pieces
    monkeypatch.setattr(bpe, "encode_pieces", lambda *args: (pieces.append(1) or one for one in encode_pieces(*args)))
    for chunk_bytes in (1 << 20, 100):
        monkeypatch.setattr(bpe, "CHUNK_BYTES", chunk_bytes)
        losses.append(train.train(eval_only=True, init_from=str(trained / "runs/tiny/latest"), eval_tokens=70,
                                  data=str(tmp_path / "text.txt")))
    assert losses[0] == losses[1] and 2 < len(pieces) < 20

def test_eval_only_takes_the_latest_checkpoint(tmp_path, monkeypatch):
    evaluations_give([3.0, 4.0, 5.0, 5.0], monkeypatch)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    loaded, load = [], checkpoint.load_checkpoint
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda folder: [loaded.append(folder.name), load(folder)][1])
    for flags in (dict(resume=tmp_path / "run"), dict(init_from=tmp_path / "run", data=tmp_path / "data")):
        train.train(eval_only=True, **flags)
    assert loaded == ["step-0000006", "step-0000003"]

def test_plot_draws_what_was_measured(tmp_path, trained, monkeypatch, capsys):
    import xml.etree.ElementTree as xml
    code, error = call(monkeypatch, capsys, plot.plot, str(trained / "runs/tiny"), f"--output={tmp_path}/loss.svg")
    assert code == 0, error
    root = xml.parse(tmp_path / "loss.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"step", "loss, nats per token", "learning rate"} <= set(texts)
    lines = [[tuple(map(float, point.split(","))) for point in element.get("points").split()]
             for element in root.iter("{http://www.w3.org/2000/svg}polyline")]
    dashes = [line.get("stroke-dasharray") for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert dashes == ["1 2", "", ""], "dots are the training loss, as the legend says"
    losses = [line["train_loss"] for line in metrics(trained / "runs/tiny") if "train_loss" in line]
    assert [len(line) for line in lines] == [len(losses), 1, len(losses)]
    heights = np.array([y for _, y in lines[0]])
    assert np.corrcoef(heights, losses)[0, 1] < -0.999, "height falls as the loss rises, for y points down"
    mark, = root.iter("{http://www.w3.org/2000/svg}circle")
    assert (float(mark.get("cx")), float(mark.get("cy"))) == lines[1][0] and f"at {len(losses)}" in " ".join(texts)
    plot.plot(trained / "runs/tiny", output=tmp_path / "loss.svg")
    for arguments, message in (([], "no run given"), ([str(tmp_path)], "no metrics.jsonl"),
                               (["no/run"], "no/run has no metrics.jsonl"),
                               ([str(trained / "runs/tiny"), "--output="], "is a folder"),
                               ([str(trained / "runs/tiny"), "--output=no/x.svg"], "there is no folder no")):
        code, error = call(monkeypatch, capsys, plot.plot, *arguments)
        assert code == 2 and message in error
    odd = [{"step": 0, "val_loss": 2.0}, {"step": 0, "val_loss": 1e308}, {"step": 0, "lr": int("9" * 401)},
           {"step": -1, "val_loss": 3.0}, {"step": int("9" * 401), "val_loss": 3.0}]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/metrics.jsonl").write_text("\n".join([*map(json.dumps, odd), "[" * 200_000]))
    assert call(monkeypatch, capsys, plot.plot, str(tmp_path / "odd")) == (0, "")

def test_plots_of_names_that_no_xml_has():
    import xml.etree.ElementTree as xml
    lines = [{"step": 1, "train_loss": 1.0, "lr": 0.1}]
    root = xml.fromstring(plot.svg_of({"a\x01\x1b\ufffeb<&": lines}))
    assert "a???b<&: validation" in "".join(root.itertext())

def test_plots_of_runs_without_losses(tmp_path, trained, monkeypatch, capsys):
    """Beside others they are named; alone it is said why."""
    skipped = '{"step": 1, "skipped": "loss nan"}\n'
    for name, line in (("begun", ""), ("none", skipped + '{"step": 1, "val_loss": null}\n'), ("ruined", skipped)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(line)
        code, error = call(monkeypatch, capsys, plot.plot, str(tmp_path / name))
        assert code == 2 and ("wait for the first" if name == "begun" else "a smaller --lr_max") in error
    plot.plot(tmp_path / "ruined", trained / "runs/tiny", tmp_path / "begun")
    drawn = (tmp_path / "ruined/loss.svg").read_text()
    assert drawn.count("no losses") == 2 and drawn.count("validation (line)") == 1

def test_plots_of_many_runs():
    """Each has its lowest evaluation marked; a learning rate that grows evenly is a line up; ticks are round."""
    import xml.etree.ElementTree as xml
    lines = [{"step": step, "train_loss": 5.0 - step, "lr": step / 4, "grad_norm": 9.0} for step in range(5)]
    lines += [{"step": step, "val_loss": loss} for step, loss in ((1, 5.0), (2, 3.0), (4, 4.0))]
    root = xml.fromstring(plot.svg_of({f"run {i}": lines for i in range(40)}))
    texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
    assert [element.text for element in texts].count("3 at 2") == 40
    legend = [element for element in texts if element.text.startswith("run ")]
    _, *panels = root.iter("{http://www.w3.org/2000/svg}rect")
    (top, below), (rates, end) = [(y, y + float(panel.get("height"))) for panel in panels
                                  for y in [float(panel.get("y"))]]
    lines_of_legend = [float(element.get("y")) for element in legend]
    assert top < lines_of_legend[0] and np.diff(lines_of_legend).min() >= 12 and lines_of_legend[-1] < below
    assert below + 36 <= rates < end - 100 and end + 36 <= float(root.get("viewBox").split()[3])  # steps stand there
    assert len({element.get("fill") for element in legend}) == 40
    *_, last = root.iter("{http://www.w3.org/2000/svg}polyline")
    y = np.array([float(point.split(",")[1]) for point in last.get("points").split()])
    assert np.allclose(np.diff(y), np.diff(y)[0], atol=0.2) and y[0] > y[-1]
    assert plot.ticks(0, 4, 8) == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4] and plot.ticks(0.3, 9.8) == [2, 4, 6, 8]

def test_a_curve_of_many_points():
    """Only as many as can be seen are drawn, the extremes among them, in the order of steps."""
    points = [(step, math.sin(step / 50)) for step in range(100_000)]
    points[777], points[55_555] = (777, 9.0), (55_555, -9.0)
    seen = plot.visible(points, 100_000)
    assert len(seen) <= 2 * plot.WIDTH and seen == sorted(seen) and {points[777], points[55_555]} < set(seen)
    assert plot.visible(points[:9], 8) == points[:9]

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = prepared(folder)
    train.train(data=str(data), output_dir=str(folder / "runs/tiny"), **TINY | dict(num_steps=40, eval_interval=40))
    return folder

def test_the_python_that_data_readme_shows(trained, tmp_path, monkeypatch, capsys):
    """Runs: a loop over runs, which stops with one and goes on when it is started again; and a model's own losses."""
    monkeypatch.chdir(tmp_path)
    loop, reading = re.findall("```python\n(.*?)```", (ROOT / "data/README.md").read_text(encoding="utf-8"), re.DOTALL)
    given, train_once = TINY | dict(data=prepared(tmp_path), num_steps=2), train.train
    for signal_number, count in ((2, 1), (0, 2), (0, 2)):
        monkeypatch.setattr(train, "train", lambda **flags: replace(
            train_once(**flags | given), stopped_by=signal_number))
        exec(loop, {})
        assert len(list(Path("runs").glob("*/step-0000002"))) == count
    shown = {}
    exec(reading.replace("runs/stories", str(trained / "runs/tiny")), shown)
    params, config, ids = (shown[name] for name in ("params", "config", "ids"))
    expected = F.cross_entropy(tinylm.forward(params, ids, config)[:, :-1].mT, ids[:, 1:], reduction="none")
    same(shown["losses"], expected, 1e-5)
    assert 1 <= len(shown["tokens"]) <= 20 and "tensor" in capsys.readouterr().out

@pytest.mark.parametrize("links", [True, False])
def test_the_best_model_writes(tmp_path, monkeypatch, capsys, links):
    """That of the lowest validation loss, which is kept beside the newest, with or without links; RUN/latest is the
    last one."""
    if not links:
        monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    evaluations_give(FALLING_THEN_RISING, monkeypatch)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | dict(eval_interval=1))
    assert "that takes step 2, whose validation loss, 3.0000, is the lowest" in capsys.readouterr().out
    assert sorted(path.name[-1] for path in (tmp_path / "run").glob("step-*")) == ["2", "5", "6"]
    for name, step in (("run", 2), ("run/latest", 6), ("run/best", 2), ("run/step-0000005", 5)):
        sample.sample(checkpoint=tmp_path / name, max_new_tokens=2)
        assert run.find_checkpoint(tmp_path / name).resolve().name == f"step-000000{step}"
        told = capsys.readouterr().err
        assert told.endswith(f"{tmp_path / name}\n" if links and "/" in name else f"step-000000{step}\n")

def test_checkpoints_that_their_owner_keeps(tmp_path, monkeypatch):
    """A copy under another name is none of the run's; one that nobody may write to is not dropped."""
    names, access = ("step-0000001_9", "step--7", "step-0000001 (1)"), os.access
    keep = lambda: [shutil.copytree(tmp_path / "run/step-0000002", tmp_path / "run" / name) for name in names]
    meanwhile(3, monkeypatch, keep)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "step-0000003" and access(path, mode))
    flags = TINY | dict(eval_interval=6, checkpoint_interval=1, keep_checkpoints=1)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **flags)
    train.train(resume=tmp_path / "run", num_steps=7)
    there = {path.name for path in (tmp_path / "run").glob("*step-*")}
    assert there == {"step-0000003", "step-0000007", *names}, "theirs, and the newest, which is the best"

def test_a_run_that_learns_by_heart_says_so_once(tmp_path, monkeypatch, capsys):
    evaluations_give(FALLING_THEN_RISING, monkeypatch)
    training = iter([5.0, 4.0, 3.0, 2.0, 1.0, 0.9, 0.8, 0.7, 0.6])
    genuine = machine.agree
    agree = lambda loss, asked: (loss.new_tensor(next(training), dtype=torch.float64), genuine(loss, asked)[1])
    monkeypatch.setattr(machine, "agree", agree)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | dict(eval_interval=1))
    train.train(resume=tmp_path / "run", num_steps=9)
    out = capsys.readouterr().out.splitlines()
    where = [i for i, line in enumerate(out) if "learns this text by heart" in line]
    assert len(where) == 1 and "--weight_decay" in out[where[0]]
    assert any(line.startswith("step 5  validation loss 7.0") for line in out[where[0] - 2:where[0]])

def test_a_run_whose_training_does_not_fall_is_not_accused():
    overfitting = log.Overfitting()
    assert not any(overfitting.begins({"train_loss": loss, "val_loss": loss + 1}) for loss in range(10))

def test_one_rise_is_no_rule():
    overfitting = log.Overfitting()
    measured = [{"train_loss": 5.0 - i, "val_loss": 5.0 + i} for i in range(5)]
    assert [overfitting.begins(line) for line in measured] == [False] * 3 + [True, False]

def test_what_sample_asks_of_generate(monkeypatch, capsys, tokenizer_file, saved):
    """All flags, and the dtype of the weights. The end of a text and ids beyond the tokenizer's print nothing."""
    asked, config = [], small_config(d_model=24, d_ff=40)
    written = [torch.tensor([token]) for token in (65, 450, 256)]
    monkeypatch.setattr(tinylm, "generate", lambda params, prompts, config, *args: [
        asked.append(args), iter(written)][1])
    for dtype in (torch.float32, torch.bfloat16):
        folder = saved(None, config, str(dtype), dtype=dtype)
        texts = sample.sample(checkpoint=folder, prompt="It", max_new_tokens=7, temperature=0.5,
                              top_k=9, top_p=0.6, device="cpu")
        assert texts == ["ItA"] and capsys.readouterr().out == "ItA\n"
        *flags, ends, _, computed_in = asked.pop()
        assert (flags, ends, computed_in) == ([7, 0.5, 9, 0.6], (256,), dtype)
    with pytest.raises(cli.InputError, match="int8 needs sizes that are multiples of 32.* d_model 24 and d_ff 40"):
        sample.sample(checkpoint=folder, dtype="int8", device="cpu")
    monkeypatch.setattr(tinylm, "generate", lambda *_, **__: iter(written))
    settings = types.SimpleNamespace(sample_tokens=3, device="cpu", dtype="float32", shard=False)
    meta = {"begin_ids": [256], "end_of_text_id": 256}
    assert train.sample_text(run.Run(settings, None, None, meta=meta, tokenizer=bpe.load(tokenizer_file))) == "A"

def test_a_text_is_written_as_it_comes(trained, monkeypatch, capsys):
    """Each token before the next is computed."""
    written = []

    def generate(*_):
        for token in b"ABC":
            written.append(capsys.readouterr().out)
            yield torch.tensor([token])

    monkeypatch.setattr(tinylm, "generate", generate)
    sample.sample(checkpoint=trained / "runs/tiny", prompt="It", device="cpu")
    assert written == ["It", "A", "B"]

def test_samples_of_a_long_prompt(trained, monkeypatch):
    """Only what the model sees of it goes into each."""
    prompts, generate = [], tinylm.generate
    monkeypatch.setattr(tinylm, "generate", lambda params, prompt, *args: [
        prompts.append(prompt), generate(params, prompt, *args)][1])
    texts = sample.sample(checkpoint=trained / "runs/tiny", prompt="Once upon a time. " * 100, num_samples=3,
                          max_new_tokens=4, device="cpu")
    ids = bpe.encode(bpe.load(trained / "data"), "Once upon a time. " * 100).tolist()
    assert prompts[0].tolist() == 3 * [ids[-TINY["context_length"]:]] and len(texts) == 3
    assert all(text.startswith("Once upon a time. " * 100) for text in texts)

def test_the_newest_run_is_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, when in (("a", 3), ("b", 9), ("c", 6)):
        Path(f"runs/{name}/step-0000001").mkdir(parents=True)
        Path(f"runs/{name}/step-0000001/config.json").touch()
        os.utime(f"runs/{name}/step-0000001/config.json", (when, when))
    assert run.find_checkpoint("") == Path("runs/b/step-0000001")

def test_sample_is_repeatable_and_whole(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)

    def write(**flags):
        sample.sample(**dict(max_new_tokens=30) | flags)
        return capsys.readouterr()

    first = write(prompt="Once upon")
    assert first.out.startswith("Once upon") and first.out == write(prompt="Once upon").out
    assert first.out != write(prompt="Once upon", seed=1).out
    assert re.search(r"\d+ tokens, [\d.,]+ tokens/s", first.err)
    greedy = write(prompt="123, 456", temperature=0).out
    assert greedy == write(prompt="123, 456", temperature=0, seed=3, checkpoint="runs/tiny").out
    assert write(num_samples=3).out.count("---\n") == 2
    counts = [int(write(max_new_tokens=100, seed=seed).err.split()[0]) for seed in range(5)]
    assert max(counts) > 32, "beyond the context"

def test_sample_prints_whole_characters_only(monkeypatch):
    written = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    sample.write_line(bytes([byte]) for byte in "aé🦊".encode() + b"\xf0\x9f")
    assert written == ["a", "é", "🦊", "\ufffd", "\n"]

# ---- The command line ----

def exit_code(monkeypatch, arguments, begin):
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        begin()
    except SystemExit as exit:
        return exit.code
    return 0

def call(monkeypatch, capsys, function, *arguments):
    """Run a command in this process → (exit code, what it wrote on stderr)."""
    return exit_code(monkeypatch, ["command.py", *arguments], lambda: cli.run(function)), capsys.readouterr().err

def script(monkeypatch, capsys, name, *arguments):
    """Run a script in this process, which has torch → (exit code, what it wrote on stdout, and on stderr)."""
    code = exit_code(monkeypatch, [name, *arguments], lambda: runpy.run_path(str(ROOT / name), run_name="__main__"))
    return code, *capsys.readouterr()

def damage(data, name, change):
    content = (data / name).read_bytes()
    (data / name).write_bytes(change(content))

WRONG_TRAIN = [
    (["--d_modle=64"], "did you mean --d_model?"),
    (["--=64"], "unknown flag --; --help lists the names"),
    (["--lr=1e-3"], "did you mean --lr_max or --lr_min?"),
    (["--block_size=64"], "did you mean --context_length?"),
    (["--n_embd=64"], "did you mean --d_model?"),
    (["--epochs=3"], "did you mean --num_steps?"),
    (["--model=x"], "did you mean --init_from?"),
    (["--stop=3"], "unknown flag --stop; --help lists the names"),
    (["--batch_size=1e30"], "expected"),
    ([f"--d_model={'9' * 401}"], "expected a whole number of at most 64 bits"),
    (["--num_layers=1e30"], "expected"),
    ([f"--seed={2**63}"], "expected a number from -9223372036854775808 up to 9223372036854775807\n"),
    (["--shard"], "--shard splits a model over the ranks that torchrun starts"),
    (["512"], "not a flag"),
    (["--d_model=abc"], "whole number"),
    (["--d_model"], "has no value"),
    (["--lr_max=-1"], "--lr_max=-1"),
    (["--d_model=64", "--num_heads=3"], "num_heads to divide d_model"),
    (["--d_model=12", "--num_heads=4"], "even"),
    (["--d_model=64", "--num_heads=4", "--num_kv_heads=3"], "no multiple of num_kv_heads"),
    (["--vocab_size=300"], "the data has 400 tokens"),
    (["--data=nowhere"], "no such data folder"),
    (["--data=full"], "data/prepare.py --input=full"),
    (["--context_length=100000"], "context_length 100000"),
    (["--num_steps=5", "--warmup_steps=6"], "--num_steps=5: expected warmup_steps, 6, or more"),
    (["--run_name=../a"], "--run_name=../a: expected a name"),
    (["--run_name=.."], "--run_name=..: expected a name"),
    (["--device=tpu"], "expected cpu"),
    (["--device=cuda:99"], "CUDA device"),
    (["--dtype=float8"], "float32 or bfloat16"),
    (["--num_steps=0"], "--num_steps=0"),
    (["--beta1=1.5"], "--beta1=1.5"),
    (["--resume=nowhere"], "no checkpoint there"),
    (["--output_dir=full"], "is not empty"),
    (["--compile=maybe"], "True or False"),
    (["--init_from="], "--init_from is empty; give it a value"),
    (["--device", ""], "--device is empty"),
    (["--seed=1", "--seed=2"], "--seed is given twice; give it once"),
    (["--split=val"], "belongs to --eval_only; leave it out"),
    (["--eval_only"], "needs one model: give --resume=RUN"),
    (["--eval_only", "--resume=auto"], "needs one model: give --resume=RUN"),
    (["--eval_only", "--resume=runs/tiny", "--init_from=runs/tiny"], "needs one model: give --resume=RUN"),
    (["--eval_only", "--init_from=runs/tiny", "--d_model=64"], "--d_model=64: --eval_only does not use it"),
    (["--data=corpus.txt", "--eval_only", "--init_from=runs/tiny", "--split=val"], "is a text, which has no parts"),
]

@pytest.mark.parametrize("arguments, message", WRONG_TRAIN, ids=lambda value: str(value)[:40])
def test_wrong_flags_of_train(trained, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(trained)
    Path("full").mkdir(exist_ok=True)
    Path("full/file").touch()
    before = sorted(Path(".").rglob("*"))
    data = [] if arguments[0].startswith(("--data", "--resume")) else ["--data=data"]
    code, error = call(monkeypatch, capsys, train.train, *data, *arguments)
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert sorted(Path(".").rglob("*")) == before

@pytest.mark.parametrize("compiler, headers, message", [("no-such-g++", None, "needs no-such-g++"),
                                                        ("python3", "/nowhere", "Python.h")])
def test_nothing_to_compile_with(trained, monkeypatch, capsys, compiler, headers, message):
    monkeypatch.chdir(trained)
    monkeypatch.setenv("CXX", compiler)
    if headers:
        monkeypatch.setattr(tinylm.sysconfig, "get_path", lambda name: headers)
    before = sorted(Path(".").rglob("*"))
    code, error = call(monkeypatch, capsys, train.train, "--data=data", "--device=cpu", "--compile")
    assert code == 2 and message in error and "--compile=False" in error and error.count("\n") == 1, error
    assert sorted(Path(".").rglob("*")) == before
    monkeypatch.setenv("CC", compiler)
    for compiles, advice in ((False, "--dtype=float32"), (True, "--compile=False --dtype=float32")):
        with pytest.raises(cli.InputError, match=f"or give {advice} .to go on with a run in bfloat16, .*.$"):
            machine.check_compiler("cuda:0", torch.bfloat16, compiles)  # kernels of attention need it too
    machine.check_compiler("cuda:0", torch.float32)
    machine.check_compiler("cpu", torch.bfloat16)

WRONG_DATA = [
    ("train.bin", lambda content: content[:-2], "bytes; expected"),
    ("train.bin", lambda content: content[:-2] + b"\xff\xff", "beyond the vocabulary"),
    ("val.bin", lambda content: b"", "bytes; expected"),
    ("tokenizer.json", lambda content: content.replace(b'"ids"', b'"x"') + b" ", "not the tokenizer"),
    ("meta.json", lambda content: content[:-20], "damaged"),
    ("meta.json", lambda content: b"{}", "damaged"),
    ("meta.json", lambda content: content.replace(b'"begin_ids": [', b'"begin_ids": [9999, '), "damaged"),
    ("meta.json", lambda content: content.replace(b'"begin_ids"', b'"no_ids"'), "damaged"),
    ("meta.json", lambda content: content.replace(b'"tokens": ', b'"tokens": "x", "then": '), "damaged"),
]

@pytest.mark.parametrize("name, change, message", WRONG_DATA)
def test_damaged_data(tmp_path, monkeypatch, capsys, name, change, message):
    data = prepared(tmp_path)
    damage(data, name, change)
    monkeypatch.chdir(tmp_path)
    code, error = call(monkeypatch, capsys, train.train, f"--data={data}")
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert not (tmp_path / "runs").exists()

WRONG_PREPARE = [
    (["--vocab_siz=300"], "did you mean --vocab_size"),
    (["--vocab_size=200"], "257"),
    (["--dataset=books"], "expected one of"),
    (["--input=nowhere.txt"], "is not there"),
    (["--input=empty.txt"], "no text"),
    (["--input=emptyfolder"], "no texts"),
    (["--input=one.txt"], "too little text"),
    (["--input=utf16.txt"], "utf16.txt is UTF-16; save it as UTF-8"),
    (["--input=text.txt", "--val_fraction=1.5"], "between 0 and 1"),
    (["--input=text.txt", "--val_input=nowhere"], "is not there"),
    (["--input=text.txt", "--dataset=stories"], "one of the two"),
    (["--input=text.txt", "--errors=ignore"], "strict or replace"),
    (["--input=text.txt", "--output=mine"], "was not written by this command"),
    (["--input=text.txt", "--workers=0"], "1 or more"),
    (["--input=text.txt", "--tokenizer=nowhere.json"], "nowhere.json is missing"),
    (["--input="], "--input is empty"),
    (["--input=text.txt", "--tokenizer=nowhere.json", "--vocab_size=300"], "leave out --vocab_size"),
    (["--val_input=text.txt"], "goes with --input"),
    (["--input=text.txt", "--val_input=text.txt", "--val_fraction=0.2"], "without --val_fraction"),
]

def test_data_that_does_not_end(tmp_path):
    data = prepared(tmp_path)
    digest = lambda: hashlib.sha256((data / "val.bin").read_bytes()).hexdigest().encode()
    before = digest()
    damage(data, "val.bin", lambda content: content[:-2] + b"a\0")
    damage(data, "meta.json", lambda content: content.replace(before, digest()))
    with pytest.raises(cli.InputError, match="val.bin does not end with the end of a text"):
        prepare.open_data(data)
    prepare.open_data(data, ["train"])

@pytest.mark.parametrize("arguments, message", WRONG_PREPARE, ids=lambda value: str(value)[:40])
def test_wrong_flags_of_prepare(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    for name, text in (("empty.txt", ""), ("one.txt", "x"), ("text.txt", "some text\n" * 50), ("mine/keep", "")):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("utf16.txt").write_text("some text\n" * 50, encoding="utf-16")
    Path("emptyfolder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, error = call(monkeypatch, capsys, prepare.prepare, *arguments)
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before

WRONG_SAMPLE = [
    (["--promt=x"], "did you mean --prompt"),
    (["--temperature=-1"], "--temperature=-1"),
    (["--top_p=0"], "--top_p=0"),
    (["--top_p=1.1"], "--top_p=1.1"),
    (["--max_new_tokens=0"], "1 or more"),
    (["--num_samples=1000000000000000000"], "from 1 up to 1000000000"),
    (["--checkpoint=nowhere"], "is not there"),
    (["--checkpoint=corpus.txt"], "corpus.txt is a file; expected a run"),
    (["--checkpoint=data"], "not a checkpoint"),
    (["--checkpoint="], "--checkpoint is empty"),
    (["--device=cuda:99"], "CUDA device"),
    (["--prompt=\udcff"], "0xff at character 0 is no text in utf-8"),
    (["--prompt=\ud83d"], "has half a surrogate pair at character 0"),
]

@pytest.mark.parametrize("arguments, message", WRONG_SAMPLE, ids=lambda value: ascii(value)[:40])
def test_wrong_flags_of_sample(trained, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(trained)
    code, error = call(monkeypatch, capsys, sample.sample, *arguments)
    assert code == 2 and message in error and error.count("\n") == 1, error

def test_compiling_without_openssl(monkeypatch):
    """By which PyTorch takes a hash: where it is not there, what needs that is left out."""
    settings, chosen = train.Settings.complete(dict(device="cpu")), []
    settings.compile = True
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph, options: chosen.append(options) or function)
    for program in ("/usr/bin/openssl", None):
        monkeypatch.setattr(train.shutil, "which", lambda name: program)
        train.step_functions(run.model_config(settings, 300), settings)
        assert chosen.pop()["cpp_cache_precompile_headers"] == bool(program)
    assert hasattr(importlib.import_module("torch._inductor.config"), "cpp_cache_precompile_headers")

def test_a_disk_with_no_room_to_compile_in_is_named(tmp_path, monkeypatch):
    """With how to go on, whatever the compiler makes of that."""
    def compile_nothing(*_, **__):
        raise RuntimeError("OSError: [Errno 28] No space left on device\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr(tinylm, "value_and_grad", compile_nothing)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/no/room")
    with pytest.raises(cli.InputError, match="^no space is left in /no/room, where.*or give --compile=False$"):
        train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)

def test_a_stream_that_is_closed_ends_no_work():
    stream = io.StringIO()
    stream.close()
    assert isinstance(cli.put("step 1", stream), ValueError)

def test_a_full_disk_is_named(monkeypatch, capsys):
    def write():
        raise OSError(errno.ENOSPC, "No space left on device", "model.gguf")

    code, error = call(monkeypatch, capsys, write)
    assert code == 2 and error == "command.py: model.gguf: No space left on device; make room and start again\n"

def test_room_is_asked_for(tmp_path, monkeypatch):
    """To the byte; and for data of bytes at least what they take."""
    needs = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "check_room", lambda folder, needed, *_: needs.append(needed))
        data = prepared(tmp_path, vocab_size=257)
    assert needs[-1] >= sum(path.stat().st_size for path in data.glob("*.bin")) - 4  # of two ends
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    files.check_room(tmp_path / "not yet", 1000, "this needs", "that")
    with pytest.raises(cli.InputError, match="MB free; this needs .* MB; make room, or that"):
        files.check_room(tmp_path / "not yet", 1001, "this needs", "that")

def test_no_checkpoint_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, error = call(monkeypatch, capsys, sample.sample)
    assert code == 2 and "train a model" in error

def test_values_are_read_by_type():
    """A prompt is a text whatever it looks like; Fire alone would make it a number or a list."""
    parameters = inspect.signature(sample.sample).parameters
    flags = cli.read_arguments(parameters, ["--prompt", "[1, 2]", "--top-k=5"])
    assert flags == {"prompt": "[1, 2]", "top_k": "5"}
    parameters = inspect.signature(train.train).parameters
    flags = cli.read_arguments(parameters, ["--compile", "--nouse_wandb", "--seed", "-3"])
    assert flags == {"compile": "True", "use_wandb": "False", "seed": "-3"}
    assert cli.convert("num_steps", int, "1e3") == 1000
    assert cli.read(sample.Settings, {"prompt": ""}) == {"prompt": ""}

@pytest.mark.parametrize("function", [train.train, sample.sample, prepare.prepare])
def test_help_names_every_flag(function):
    text = cli.help_text(function)
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^  --{name} ", text, re.M), name
    assert all(len(line) <= 100 for line in text.splitlines())
    assert not re.search(r"^\S.*:(?!\n  --)$", text, re.M), "a heading over no flags"

@pytest.mark.parametrize("command, table", [(train.train, train.Settings), (sample.sample, sample.Settings),
                                            (prepare.prepare, prepare.Settings)])
def test_help_tells_the_real_defaults(command, table):
    """What --help states as a plain default is what a command run without the flag takes."""
    settings, told = cli.complete(table, {"device": "cpu"} if "device" in cli.flags_of(table) else {}), 0
    for name in cli.flags_of(table):
        stated = re.search(rf"^{name}: .*\[(.*)\]$", command.__doc__, re.M)
        stated = stated and re.sub(r"^CPU |, CUDA.*$|^adamw |, muon.*$", "", stated[1])
        if stated and getattr(settings, name) is not None and re.fullmatch(r"[-+.e\d]+|True|False|strict", stated):
            told += 1
            assert str(getattr(settings, name)) == stated or float(stated) == getattr(settings, name), name
    assert told >= 1

def test_the_commands_run(trained, tmp_path, monkeypatch, capsys):
    """The three scripts, as a user starts them; text of any kind as a prompt through Fire."""
    run = lambda *command: subprocess.run([sys.executable, *command], cwd=trained, capture_output=True, text=True,
                                          timeout=120)
    result = run(ROOT / "data/prepare.py", "--input=corpus.txt", f"--output={tmp_path}/data", "--vocab_size=300")
    assert result.returncode == 0 and "val.bin" in result.stdout, result.stderr
    result = run(ROOT / "sample.py", "--prompt", "[1, 2]", "--max_new_tokens=5")
    assert result.returncode == 0 and result.stdout.startswith("[1, 2]"), result.stderr
    code, _, error = script(monkeypatch, capsys, "train.py", "plot", "1e3")
    assert code == 2 and error.startswith("train.py: 1e3 has no metrics.jsonl"), error
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable]
    result = subprocess.run([*closed, ROOT / "train.py", f"--data={tmp_path}/data", f"--output_dir={tmp_path}/closed",
                             *tiny_flags()])
    assert result.returncode == 0 and len(metrics(tmp_path / "closed")) == 8
    code, _, error = script(monkeypatch, capsys, "train.py", "--num_step=3")
    assert code == 2 and error == "train.py: unknown flag --num_step; did you mean --num_steps?\n"

# ---- Runs that end badly ----

def poisoned(monkeypatch, steps):
    """Make the gradients of these steps infinite."""
    genuine = train.accumulate_gradients

    def accumulate(gradients, params, ids, settings, step, *ranks):
        loss, grads = genuine(gradients, params, ids, settings, step, *ranks)
        if step not in steps:
            return loss, grads
        return (loss * math.nan, grads) if step == 4 else (loss, tinylm.tree_map(lambda g: g * math.inf, grads))

    monkeypatch.setattr(train, "accumulate_gradients", accumulate)

@pytest.mark.parametrize("is_behind", [False, True], ids=["looked at at once", "a step later"])
def test_a_step_that_is_not_finite_is_not_applied(tmp_path, monkeypatch, capsys, is_behind):
    data = prepared(tmp_path)
    poisoned(monkeypatch, {2, 4})
    monkeypatch.setattr(log.Log, "is_behind", is_behind)
    train.train(data=str(data), output_dir=str(tmp_path / "run"), **TINY)
    assert "step 3 is not applied" in capsys.readouterr().out
    lines = [(line["step"], *line.keys() & {"skipped", "train_loss", "val_loss"}) for line in metrics(tmp_path / "run")]
    assert lines == [(1, "train_loss"), (2, "train_loss"), (3, "skipped"), (3, "val_loss"), (4, "train_loss"),
                     (5, "skipped"), (6, "train_loss"), (6, "val_loss")]
    params, _ = checkpoint.load_checkpoint(tmp_path / "run/latest")
    assert all(p.isfinite().all() for _, p in tinylm.tree_leaves(params))
    assert checkpoint.load_optimizer(tmp_path / "run/latest", tinylm.adamw_init(params))["step"] == 4

@pytest.mark.parametrize("is_behind", [False, True], ids=["noticed at once", "a step later"])
def test_a_stop_loses_no_step(tmp_path, monkeypatch, is_behind):
    meanwhile(3, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(log.Log, "is_behind", is_behind)
    rare = dict.fromkeys(("num_steps", "eval_interval", "checkpoint_interval"), 50)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | rare)
    last = metrics(tmp_path / "run")[-1]["step"]
    assert last == 3 + is_behind and run.newest(tmp_path / "run").name == f"step-{last:07d}"

@pytest.mark.parametrize("is_behind, interval", [(False, 3), (True, 1)], ids=["looked at at once", "a step later"])
def test_the_pace_is_that_of_steps_that_compile_nothing(tmp_path, monkeypatch, is_behind, interval, capsys):
    """Nor is it that of numbers that are looked at together."""
    genuine, clock = train.accumulate_gradients, [0.0]
    monkeypatch.setattr(log, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow(gradients, params, ids, settings, step, *ranks):
        clock[0] += 0.1 if step else 1.5
        return genuine(gradients, params, ids, settings, step, *ranks)

    monkeypatch.setattr(train, "accumulate_gradients", slow)
    monkeypatch.setattr(log.Log, "is_behind", is_behind)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | dict(log_interval=interval))
    rates = [line["tokens_per_second"] for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert rates[interval == 1:] == pytest.approx([1280] * (5 if interval == 1 else 2), abs=0.1), rates
    left = re.findall(r"(\d)s left", capsys.readouterr().out)
    assert all(int(seconds) <= 1 for seconds in left[interval == 1:]), left

def test_the_time_left_of_a_run_that_was_resumed(tmp_path, monkeypatch, capsys):
    genuine, clock = train.accumulate_gradients, [0.0]
    monkeypatch.setattr(log, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow(gradients, params, ids, settings, step, *ranks):
        clock[0] += 600 if step == 6 else 60
        return genuine(gradients, params, ids, settings, step, *ranks)

    monkeypatch.setattr(train, "accumulate_gradients", slow)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    capsys.readouterr()
    train.train(resume=tmp_path / "run", num_steps=12)
    left = re.findall(r"(\w+) left", capsys.readouterr().out)
    assert left == ["50m00s", "4m00s", "3m00s", "2m00s", "1m00s", "0s"]

def test_how_to_go_on_says_how_it_was_started(tmp_path, capsys):
    """One rank says it, and what to do once all is done."""
    settings = types.SimpleNamespace(num_steps=9)
    for num_ranks, command in ((1, "python train.py"), (4, "torchrun --standalone --nproc_per_node=4 train.py")):
        run.conclude(run.Run(settings, tmp_path, None, num_ranks=num_ranks), 5, None)
        assert f"go on with: {command} --resume={tmp_path}\n" in capsys.readouterr().out
    for rank in (0, 1):
        run.conclude(run.Run(settings, tmp_path, None, rank=rank, num_ranks=2), 9, None)
    assert capsys.readouterr().out.count("done; write with") == 1

def test_bad_steps_that_do_not_follow_each_other_end_no_run(tmp_path, monkeypatch):
    poisoned(monkeypatch, range(0, 12, 2))
    assert train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | dict(num_steps=12)).step == 12

def test_a_last_step_that_is_not_finite_is_saved(tmp_path, monkeypatch):
    poisoned(monkeypatch, {5})
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    assert run.newest(tmp_path / "run").name == "step-0000006"

def test_a_signal_in_the_last_step_stops_nothing(tmp_path, monkeypatch):
    genuine = train.accumulate_gradients
    monkeypatch.setattr(train, "accumulate_gradients", lambda *args: [
        genuine(*args), args[4] == 5 and os.kill(os.getpid(), signal.SIGINT)][0])
    assert train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY).exit_code == 0

def test_the_pace_leaves_out_evaluations_and_checkpoints(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(log, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def takes(seconds, function):
        def call(*args):
            clock[0] += seconds
            return function(*args)
        return call

    for name, seconds in dict(accumulate_gradients=0.1, evaluate=7, try_to_save=9).items():
        monkeypatch.setattr(train, name, takes(seconds, getattr(train, name)))
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run",
                **TINY | dict(eval_interval=2, checkpoint_interval=3))
    rates = [line["tokens_per_second"] for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert rates == pytest.approx([1280] * 6, abs=0.1), rates

def test_a_run_that_diverges_gives_up_and_keeps_its_checkpoint(tmp_path, monkeypatch, capsys):
    """From which it goes on by what it advises."""
    data = prepared(tmp_path)
    with monkeypatch.context() as patch:
        poisoned(patch, range(4, 20))
        code, error = call(monkeypatch, capsys, train.train, f"--data={data}", f"--output_dir={tmp_path}/run",
                           *tiny_flags(num_steps=20))
    assert code == 3 and error.count("\n") == 1
    for word in ("step 9", "loss", "gradient norm", "learning rate", "smaller --lr_max", "step-0000003"):
        assert word in error
    assert (tmp_path / "run/latest").resolve().name == "step-0000003"
    folder, lr_max = re.search(r"--resume=(\S+) --lr_max=(\S+),", error).groups()
    assert float(lr_max) < train.Settings.complete(TINY).lr_max
    assert train.train(resume=folder, lr_max=float(lr_max), num_steps=6).settings.lr_max == float(lr_max)
    poisoned(monkeypatch, range(6, 20))
    advice = f"go on from step-0000003 with --resume={folder} --num_steps=20 --save_dtype=float16 --lr_max=0.00"
    with pytest.raises(log.Diverged, match=advice):
        train.train(resume=folder, num_steps=20, save_dtype="float16", lr_max=0.01)

def test_room_for_the_checkpoints_of_a_run(tmp_path, monkeypatch):
    """For no more than it writes, however many it may keep."""
    asked = []
    monkeypatch.setattr(files, "check_room", lambda folder, size, *_: asked.append(size))
    for keep, number in ((1, 3), (2, 3), (1000, 3)):
        folder = tmp_path / str(keep)
        train.train(data=prepared(tmp_path), output_dir=folder, **TINY | dict(num_steps=5, checkpoint_interval=2,
                                                                              keep_checkpoints=keep))
        sizes = [size for size in asked if size % run.checkpoint_bytes(checkpoint.load_config(folder / "latest")) == 0]
        assert sizes[0] == number * sizes[1]
        assert len(list(folder.glob("step-*"))) <= number
        asked.clear()

def test_a_checkpoint_that_cannot_be_saved(tmp_path, monkeypatch, capsys):
    """A disk that is full for a while costs nothing but that checkpoint; at the end it is an error."""
    data = prepared(tmp_path)
    genuine, steps = files.check_room, []

    def full_at_step_4_and_6(*args):
        steps.append(1)
        if len(steps) in (3, 4):
            raise cli.InputError("0 MB free")
        genuine(*args)

    monkeypatch.setattr(files, "check_room", full_at_step_4_and_6)
    with pytest.raises(cli.InputError, match="0 MB free.; see to that, and go on from step-0000002"):
        train.train(data=str(data), output_dir=str(tmp_path / "run"), **TINY | dict(checkpoint_interval=2))
    assert "step 4 could not be saved (0 MB free); the last good one is step-0000002" in capsys.readouterr().err
    monkeypatch.setattr(files, "check_room", genuine)
    train.train(resume=str(tmp_path / "run"))
    assert metrics(tmp_path / "run")[-1]["step"] == 6 and (tmp_path / "run/latest").resolve().name == "step-0000006"

def test_a_best_checkpoint_that_could_not_be_saved_is_none(tmp_path, monkeypatch):
    save = checkpoint.save_checkpoint

    def full_at_step_4(folder, *args):
        if folder.name == "step-0000004":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, *args)

    evaluations_give([5.0, 3.0, 4.0], monkeypatch)
    monkeypatch.setattr(checkpoint, "save_checkpoint", full_at_step_4)
    one = train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | dict(eval_interval=2))
    assert (one.lowest, one.best_step) == (4.0, 6) and run.best(tmp_path / "run").name == "step-0000006"

def test_ranks_that_wait_for_a_checkpoint_that_cannot_be_saved(tmp_path, monkeypatch):
    """Are not left alone, whatever the first one meets."""
    def fail(_):
        raise PermissionError(13, "Permission denied")

    took_part, model = [], run.Run(None, tmp_path, tmp_path)
    monkeypatch.setattr(run, "own_folder", fail)
    monkeypatch.setattr(checkpoint, "take_part_in_saving", lambda *args: took_part.append(args))
    assert "Permission denied" in run.try_to_save(model, 3, 0.0, math.inf) and took_part
    gathered, params = [], random_params(small_config())
    monkeypatch.setattr(tinylm, "all_gather", lambda w: [gathered.append(w), w][1])
    monkeypatch.setattr(checkpoint, "write_safetensors", lambda *_: fail(None))
    with pytest.raises(PermissionError):
        checkpoint.save_checkpoint(tmp_path / "step", params, small_config(), {}, (END, 256))
    assert len(gathered) == len(tinylm.tree_leaves(params)), "the others take part in all"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(files, "remove", fail)  # as of a disk that has become read-only
        checkpoint.save_checkpoint(tmp_path / "step", params, small_config(), {}, (END, 256))
    assert len(gathered) == 2 * len(tinylm.tree_leaves(params))
    monkeypatch.setattr(run, "own_folder", lambda _: tmp_path)
    monkeypatch.setattr(cli, "kept", fail)
    model.config = small_config()
    assert "Permission denied" in run.try_to_save(model, 3, 0.0, math.inf) and len(took_part) == 2

def test_what_is_half_written_goes_with_ctrl_c(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_safetensors", unittest.mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path / "step", random_params(small_config()), small_config(), {}, (END, 256))
    assert not list(tmp_path.iterdir())

def test_a_run_that_was_killed_before_its_links(tmp_path):
    """Gets them when it is started again, also where all its steps are done."""
    folder, flags = tmp_path / "run", TINY | dict(eval_interval=1, checkpoint_interval=1)
    data = prepared(tmp_path)
    train.train(data=data, output_dir=folder, **flags)
    names = lambda: {name: os.readlink(folder / name) for name in ("latest", "best")}
    expected, kept = names(), sorted(run.checkpoints(folder))
    shutil.copytree(folder / "step-0000005", folder / "step-0000004")
    damage(folder, "step-0000004/training/train_state.json", lambda text: text.replace(b'"step": 5', b'"step": 4'))
    for name in expected:
        run.update_link(folder, name, "step-0000004")
    with pytest.raises(run.Finished):
        train.train(data=data, output_dir=folder, resume="auto", **flags)
    assert names() == expected and sorted(run.checkpoints(folder)) == [4, *kept], "nothing goes before more is saved"

def test_a_best_checkpoint_that_was_removed(tmp_path, monkeypatch):
    """Is none to beat any more, be the run at work or not."""
    evaluations_give([3.0, 5.0, 4.0, 6.0, 4.5, 7.0], monkeypatch)
    folder, flags = tmp_path / "run", TINY | dict(eval_interval=1, checkpoint_interval=1)
    meanwhile(3, monkeypatch, lambda: shutil.rmtree(folder / "step-0000001"))
    done = train.train(data=prepared(tmp_path), output_dir=folder, **flags | dict(num_steps=4))
    assert (done.best_step, done.lowest) == (3, 4.0)
    shutil.rmtree(folder / "step-0000003")
    done = train.train(resume=folder, num_steps=6)
    assert (done.best_step, done.lowest) == (5, 4.5) and os.readlink(folder / "best") == "step-0000005"

def test_a_state_in_the_folder_of_another_step(tmp_path):
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    (tmp_path / "run/step-0000006").rename(tmp_path / "run/step-0000009")
    with pytest.raises(cli.InputError, match="step-0000009/training/train_state.json is damaged .TypeError: step 6"):
        train.train(resume=tmp_path / "run", num_steps=12)

def test_what_is_left_of_a_checkpoint_is_replaced(tmp_path):
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    (tmp_path / "run/step-0000006/training/train_state.json").unlink()
    train.train(resume=tmp_path / "run")
    assert run.newest(tmp_path / "run").name == "step-0000006"

def test_metrics_that_are_cut_meanwhile(tmp_path, monkeypatch):
    """By others, in the midst of a line: the next one is whole."""
    path = tmp_path / "run/metrics.jsonl"
    meanwhile(4, monkeypatch, lambda: os.truncate(path, path.stat().st_size - 9))
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    assert [line["step"] for line in files.json_lines(path) if "train_loss" in line] == [1, 2, 3, 4, 5, 6]

def test_a_folder_that_cannot_be_looked_at_for_a_while(tmp_path, monkeypatch, capsys):
    """As on a network's drive. It costs the checkpoints of that time, and the best one is known afterwards."""
    data, scandir, listdir = prepared(tmp_path), os.scandir, os.listdir
    evaluations_give([1.0, 2.0, 3.0], monkeypatch)

    def hidden(function):
        def look(path="."):
            if str(path).startswith(str(tmp_path / "run")):
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return function(path)
        return look

    def go_away():
        monkeypatch.setattr(os, "scandir", hidden(scandir)), monkeypatch.setattr(os, "listdir", hidden(listdir))
        meanwhile(5, monkeypatch, come_back)

    def come_back():
        monkeypatch.setattr(os, "scandir", scandir), monkeypatch.setattr(os, "listdir", listdir)

    meanwhile(3, monkeypatch, go_away)
    done = train.train(data=data, output_dir=tmp_path / "run", **TINY | dict(eval_interval=2))
    error = capsys.readouterr().err
    assert "checkpoint of step 4 could not be saved" in error and "last good one is step-0000002" in error
    assert (done.lowest, done.best_step) == (1.0, 2)
    assert [*run.checkpoints(tmp_path / "run")] == [2, 6] and (tmp_path / "run/best").resolve().name == "step-0000002"
    full = unittest.mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    evaluations_give([4.0], monkeypatch)
    with pytest.raises(cli.InputError, match="go on from step-0000006 with --resume=.*/run --num_steps=8$"):
        train.train(resume=tmp_path / "run", num_steps=8)

def test_a_checkpoint_is_there_whatever_happens_to_links(tmp_path, monkeypatch, capsys):
    def fails(folder):
        raise OSError(errno.ESTALE, "Stale file handle", str(folder))

    run.update_links(tmp_path / "gone")
    monkeypatch.setattr(run, "update_links", fails)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    out, error = capsys.readouterr()
    assert out.count("can't be tidied up ([Errno") == 2 and "could not be saved" not in error

def test_places_that_cannot_be_made(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def refuses(path, *args, **options):
        if path == tmp_path / "run":
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(path, *args, **options)

    data = prepared(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuses)
    with pytest.raises(cli.InputError, match="run can't be made .Read-only .*; give another --output_dir"):
        train.train(data=data, output_dir=tmp_path / "run", **TINY)

def test_metrics_in_whose_place_is_a_folder(tmp_path, monkeypatch, capsys):
    """Cost lines, and no checkpoint."""
    path = tmp_path / "run/metrics.jsonl"
    meanwhile(2, monkeypatch, lambda: [path.unlink(), path.mkdir()])
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    assert run.newest(tmp_path / "run").name == "step-0000006"
    assert capsys.readouterr().err.count("metrics.jsonl could not be written") == 1

def test_the_death_of_torchrun_before_the_first_step(tmp_path, monkeypatch):
    """As while data is prepared: it ends the run as soon as it can be saved."""
    parent, begin = [5], train.open_run
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "getppid", lambda: parent[0])
    monkeypatch.setattr(train, "open_run", lambda *args: [begin(*args), parent.insert(0, 1)][0])
    assert train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY).step == 1

def test_a_disk_that_fills_while_saving(tmp_path, monkeypatch, capsys):
    """What was written of the checkpoint goes, the last good one stays."""
    data, writing = prepared(tmp_path), checkpoint.write_safetensors

    def write_in_part(path, *args):
        writing(path, *args)
        if "0000003" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", write_in_part)
    train.train(data=str(data), output_dir=str(tmp_path / "run"), **TINY | dict(checkpoint_interval=1))
    assert "step 3 could not be saved ([Errno 28]" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob(".*partial"))
    train.train(resume=str(tmp_path / "run"), num_steps=7)

def test_one_folder_one_run(tmp_path):
    data = prepared(tmp_path)
    train.train(data=str(data), output_dir=str(tmp_path / "run"), **TINY)
    with run.hold(tmp_path / "run"):
        with pytest.raises(cli.InputError, match=f"in use by another run .process {os.getpid()}."):
            train.train(resume=str(tmp_path / "run"), num_steps=9)
    (tmp_path / "run/.step-0000012.partial").mkdir()
    train.train(resume=str(tmp_path / "run"), num_steps=9)
    assert not list((tmp_path / "run").glob(".*partial"))

FORKED_WITH = ["train", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.tensor"]

def fork(code, env={}, threads=1, **names):
    """Run code in a process of its own, forked from one that has imported all it needs but computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(FORKED_WITH)
    code = ("import os, sys; sys.stdout = open(os.devnull, 'w'); os.environ.update(env); import torch, train; "
            "torch.set_num_threads(threads)\n" + code)
    names |= dict(env=env, threads=threads)
    process = context.Process(target=exec, args=(code, names), daemon=True)  # a test that fails leaves none
    process.start()
    return process

def start(data, folder, **flags):
    """Training in a process of its own."""
    flags = TINY | dict(checkpoint_interval=3, eval_interval=50, resume="auto", data=str(data),
                        output_dir=str(folder)) | flags
    # Compiled, it takes code that other tests have compiled, for as many threads.
    return fork("train.train(**flags)", threads=2 if flags.get("compile") else 1, flags=flags)

def wait_for_step(folder, step, process):
    """Wait until the metrics of a run reach a step, or its process ends."""
    path = Path(folder) / "metrics.jsonl"
    while process.is_alive() and not (path.exists() and re.findall(rf'"step": {step}\b', path.read_text())):
        time.sleep(0.01)

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(tmp_path, number):
    data = prepared(tmp_path)
    process = start(data, tmp_path / "run", num_steps=100_000)
    wait_for_step(tmp_path / "run", 5, process)
    os.kill(process.pid, number)
    process.join(180)
    assert process.exitcode == 0  # from Python
    last = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run/latest").resolve().name == f"step-{last:07d}" and last < 100_000

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_command_that_is_stopped(tmp_path, number):
    """Ends with the code of the signal, which schedulers tell from that of one that is done, though it comes twice."""
    prepared(tmp_path)
    process = command(tmp_path, "train.py", "--data=data", "--output_dir=run", *tiny_flags(num_steps=100_000))
    path = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (path.exists() and '"step": 5' in path.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    assert any("stopped after step" in line for line in process.stdout)
    time.sleep(0.1)  # Python ends
    process.send_signal(number)
    _, error = process.communicate(timeout=180)
    assert process.returncode == 128 + number and "Traceback" not in error, error

def test_signals_that_end_what_is_no_training(tmp_path, monkeypatch, capsys):
    """Leave nothing in part, as Ctrl-C does; and a rank whose torchrun has died is asked to end."""
    data = prepared(tmp_path)
    monkeypatch.setattr(bpe, "train", lambda *args, **flags: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(9)])
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code, _ = call(monkeypatch, capsys, prepare.prepare, f"--input={tmp_path}/corpus.txt", f"--output={data}")
    assert code == 143 and not (data / ".partial").exists() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with machine.Interrupt() as interrupt:
        assert not interrupt.asked
        monkeypatch.setattr(os, "getppid", lambda: -1)
        assert interrupt.asked

def test_what_machines_lack_in_one_line(tmp_path, monkeypatch, capsys, as_rank):
    """A disk that is not there, a project that is read only, numbers that are none, streams, docstrings."""
    monkeypatch.chdir(tmp_path)
    data = prepared(tmp_path)
    os.mkdir("b")
    for link, folder in (("runs", "runs"), ("out", "out/run"), ("b/run", "b/run")):
        os.symlink("/not/mounted", link)
        flags = {} if link == "runs" else {"output_dir": folder}
        with pytest.raises(cli.InputError, match="is no folder, but a file, or a link to what is not there; see to"):
            train.train(data=data, **TINY, **flags)
    monkeypatch.setattr(prepare, "DATA", tmp_path / "out/data")
    with pytest.raises(cli.InputError, match="can't be made .*; give data/prepare.py another --output, and that to"):
        train.train(data=tmp_path / "corpus.txt", output_dir="fine", **TINY)
    fail = unittest.mock.Mock(side_effect=ValueError("m"))
    monkeypatch.setattr(log, "import_wandb", lambda: types.SimpleNamespace(setup=fail))
    with pytest.raises(cli.InputError, match=r"W&B can't be used \(m\)"):
        log.check_wandb()
    as_rank(1)
    monkeypatch.delenv("RANK")  # without which there are no ranks
    assert call(monkeypatch, capsys, sample.sample, "--checkpoint=none")[1].count("is not there") == 1
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(cli.InputError, match="RANK, WORLD_SIZE or MASTER_PORT is no number .*; leave them to torchrun"):
        machine.join_ranks("cpu")
    program = "import os; from data import cli; cli.run(lambda: print(os.open('x', os.O_CREAT)))"
    done = subprocess.run(f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} <&- 2>&-", shell=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) > 2
    monkeypatch.delenv("RANK")
    done = subprocess.run([sys.executable, "-OO", ROOT / "data/prepare.py", "--help"], capture_output=True, text=True)
    assert "--vocab_size" in done.stdout, done.stderr

def test_locks_by_name_of_a_process_before(tmp_path):
    """Which had the same number, as in containers; one that holds it has it still."""
    path = tmp_path / "lock.held"
    path.write_text(f"{os.getpid()} on {socket.gethostname()}")
    (tmp_path / "link").symlink_to(tmp_path)
    with files.lock_by_name(path):
        for again in (path, tmp_path / "link/lock.held"):
            with pytest.raises(files.Held, match=f"process {os.getpid()} on"), files.lock_by_name(again):
                pass
    assert not path.exists()

def test_a_signal_is_answered_at_once(capfd, monkeypatch, as_rank):
    """By the first rank. What this process was started with, as by nohup, must not count."""
    given = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for rank, lines in ((0, 2), (1, 0)):
        as_rank(rank)
        monkeypatch.setenv("RANK", "2")  # on this machine it is the first one that counts
        with machine.Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)  # as torchrun sends it on
            assert interrupt.asked
        assert capfd.readouterr().err.count("\n") == lines
    monkeypatch.setattr(machine.time, "monotonic", lambda clock=itertools.count(step=3): next(clock))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), machine.Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    with machine.Interrupt() as interrupt:
        for _ in range(3):  # as a system does that has set a limit of time
            os.kill(os.getpid(), signal.SIGXCPU)
        assert interrupt.asked
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with machine.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.asked
    assert signal.getsignal(signal.SIGINT) == before
    for number, handler in given.items():
        signal.signal(number, handler)

def test_a_run_that_ends_while_the_next_prepares(tmp_path, monkeypatch):
    """As of jobs that a scheduler restarts: nothing of the first is replaced, and started again it goes on."""
    data, find_data = prepared(tmp_path), prepare.find_data
    flags = TINY | dict(data=str(data), output_dir=str(tmp_path / "run"), resume="auto")

    def train_meanwhile(*args):
        monkeypatch.setattr(prepare, "find_data", find_data)
        train.train(**flags | dict(num_steps=3))
        return find_data(*args)

    monkeypatch.setattr(machine, "alone", contextlib.nullcontext)  # as in two processes
    monkeypatch.setattr(prepare, "find_data", train_meanwhile)
    with pytest.raises(cli.InputError, match="has got a checkpoint of another run meanwhile; start again, with --resu"):
        train.train(**flags)
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"note": "lr lowered here"}\n5\nnull\n{"step": "x"}\n')
    (tmp_path / "run/.thesis.partial").write_text("mine")
    train.train(**flags)
    assert [line["step"] for line in metrics(tmp_path / "run") if "train_loss" in line] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run/.thesis.partial").is_file()

def kill_and_resume(folder, kills, start):
    """SIGKILL a run at random moments, while starting, training or saving; → whether its end is that of one left alone.

    start(folder) begins or resumes the run and returns its processes.
    """
    def finish(folder):
        for process in start(folder):
            process.join()
            assert process.exitcode == 0

    step = lambda: int(run.newest(folder / "killed").name[5:]) if run.newest(folder / "killed") else None
    finish(folder / "whole")
    rng, before = random.Random(0), None
    for kill in range(kills):
        processes = start(folder / "killed")
        if kill % 4:  # once it trains, from a checkpoint or behind its first, of step 3; else at any time
            wait_for_step(folder / "killed", (before or 3) + 2, processes[0])
        time.sleep(rng.random() * (0.1 if kill % 4 else 0.4))
        assert all(process.is_alive() for process in processes), "it was to be killed before its end"
        for process in rng.sample(processes, len(processes)):
            process.kill()
            process.join()
        assert before is None or step() >= before, "no work is lost"
        before = step()
    finish(folder / "killed")
    content = lambda which, name: (folder / which / "latest" / name).read_bytes()
    same_bytes = lambda name: content("whole", name) == content("killed", name)
    return (without_time(metrics(folder / "whole")) == without_time(metrics(folder / "killed"))
            and same_bytes("model.safetensors") and same_bytes("training/optimizer.safetensors"))

KILLED = {  # how many steps to each time that a run is killed, on how many ranks, other flags
    "plain": (60, 1, {}), "compiled": (25, 1, {"compile": True}),
    "accumulating in bfloat16": (40, 1, {"grad_accum_steps": 3, "dtype": "bfloat16"}),
    "two ranks": (30, 2, {})}

def killed(kind, data, folder, kills):
    """`kill_and_resume` of a kind of run."""
    steps, num_ranks, flags = KILLED[kind]
    flags = flags | dict(num_steps=steps * kills)
    if num_ranks == 1:
        return kill_and_resume(folder, kills, lambda folder: [start(data, folder, **flags)])
    flags |= dict(data=str(data), checkpoint_interval=3, eval_interval=50, resume="auto")
    return kill_and_resume(folder, kills, lambda folder: start_ranks(num_ranks, output_dir=str(folder), **flags))

# ---- CUDA, on a device that is only pretended: no kernel runs, and all that is asked of it is seen ----

PRETENDED_DEVICE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {  // one device, one stream
  c10::Device exchangeDevice(c10::Device) const override { return {type(), 0}; }
  c10::Device getDevice() const override { return {type(), 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, {type(), 0}); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
struct CUDAHooks : CUDAHooksInterface {  // what autograd asks, and finds by this name
  CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""

ASKING = torch.ops.aten._local_scalar_dense, torch.ops.aten.item, torch.ops.aten.is_nonzero
IN_NO_ORDER = torch.ops.aten.index_add, torch.ops.aten.index_add_, torch.ops.aten.index_put_

class Host(TorchDispatchMode):
    """Within it fake tensors answer 0, or token 1, where the host asks for a number; it notes where that stops it."""

    def __init__(self):
        super().__init__()
        self.stops, self.launches, self.records = [], 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        asks = function.overloadpacket in ASKING
        assert function.overloadpacket not in IN_NO_ORDER or not args[0].is_cuda, f"{function} adds in no fixed order"
        out = {torch.bool: False, torch.int64: 1}.get(args[0].dtype, 0.0) if asks else function(*args, **kwargs or {})
        comes_back = isinstance(out, torch.Tensor) and out.is_cpu and not (kwargs or {}).get("non_blocking")
        self.launches += function is not torch.ops.prim.device.default
        goes_there = isinstance(out, torch.Tensor) and out.is_cuda and any(map(torch.is_tensor, args)) and not any(
            isinstance(x, torch.Tensor) and x.is_cuda for x in args)
        assert not (self.records and goes_there), "a copy to the device while it records"
        if (asks or comes_back) and any(isinstance(x, torch.Tensor) and x.is_cuda for x in args):
            self.stop()
        return out

    def stop(self):
        assert not self.records, "a stop while the device records"
        names = [frame.name for frame in traceback.extract_stack() if Path(frame.filename).parent == ROOT]
        places = "sample_text", "generate", "evaluate", "train"
        self.stops.append(next(name for name in places if name in names))

    def current_stream(self, device):
        return self

    @contextlib.contextmanager
    def record(self, *args, **options):
        inspect.signature(torch.cuda.graphs.graph).bind(*args, **options)
        self.records = True
        yield
        self.records = False

    def record_event(self):
        """An event, to wait for which is a stop unless the device has got more to do since."""
        launches = self.launches
        return types.SimpleNamespace(synchronize=lambda: self.launches - launches < 10 and self.stop())

def pretend():
    """Let this process have one device of CUDA, whose kernels take no time and give nothing."""
    import torch._dynamo
    make, compiler, generator = torch.tensor, torch.compile, torch.Generator

    class AnyGenerator(generator):
        def __new__(cls, device=None):
            return super().__new__(cls)

    def compile(function, fullgraph, options):
        compiled, seen = compiler(function, fullgraph=fullgraph, backend="aot_eager"), set()

        def call(*args, **options):
            paths = tuple(path for path, _ in tinylm.tree_leaves(args[0]))
            torch._dynamo.config.error_on_recompile = paths in seen
            seen.add(paths)
            host = _pop_mode()  # the compiler takes nothing apart within a mode like this
            try:
                return compiled(*args, **options)
            finally:
                _push_mode(host)
        return call

    torch.compile, torch.Generator = compile, AnyGenerator
    torch.tensor = lambda values, dtype=None, device="cpu": make(values, dtype=dtype).to(device)
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.Tensor.tolist = lambda tensor: [number.item() for number in tensor.unbind()]
    torch._subclasses.fake_tensor.CONSTANT_NUMEL_LIMIT = -1  # else a number on the device would be computed
    torch.cuda.get_device_capability, torch.cuda.get_arch_list = lambda device: (9, 0), lambda: ["sm_90"]
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(major=9, minor=0, L2_cache_size=50_000_000)
    torch.cuda.device_count, torch.cuda.max_memory_allocated = lambda: 1, lambda device: 0
    torch.cuda.get_device_name, torch.cuda.device_of = lambda device: "none", lambda tensor: contextlib.nullcontext()
    torch.cuda.Stream = Host
    torch.cuda.CUDAGraph = lambda: types.SimpleNamespace(replay=lambda: None)
    machine.count_devices, machine.check_compiler = lambda: (1, None), lambda *args: None

def on_device(tree):
    """Assert that all of a tree is on the device, and in float32 but for the count of steps."""
    for path, tensor in tinylm.tree_leaves(tree):
        assert tensor.device.type == "cuda", f"{path} on {tensor.device}"
        assert tensor.dtype == (torch.int64 if path.endswith("step") else torch.float32), f"{path} of {tensor.dtype}"

def pretend_ranks(num_ranks):
    """Let this process be the first of several whose messages nobody gets."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    mesh = machine.mesh_of_ranks("cuda")
    machine.mesh_of_ranks = lambda device: mesh
    machine.join_ranks = lambda device: (device, 0, num_ranks)
    machine.from_rank = lambda value, device: json.loads(json.dumps(value, default=str))
    machine.first_of_ranks = lambda value, device: value

def train_and_write_on_device(data, folder, flags):
    """A whole run and texts from its model: all results on the device, few stops, nothing compiled twice."""
    def launch(*args, **options):
        assert all(x.is_cuda for x in args if torch.is_tensor(x)), "a kernel gets a tensor on the cpu"
        host.launches += 1

    runs, kernels = [], unittest.mock.MagicMock()
    kernels.__getitem__.return_value.__getitem__.return_value = launch
    has_triton = flags.pop("triton", True)
    tinylm.triton_kernels = lambda: kernels if has_triton else None
    tinylm.KEYS_AT_LEAST = 128
    train.try_to_save = lambda run, *args: runs.append(run)
    tinylm.forms_that_differ = lambda compute, *rest: [compute(), []][1]  # as there are no numbers to compare
    tinylm.definitions_alone = contextlib.nullcontext  # some of which add in no fixed order
    log.Log.histograms = lambda self, step, params, grads: on_device({"params": params, "grads": grads})
    if "ranks" in flags:
        pretend_ranks(flags.pop("ranks"))
    is_eager, is_split = not flags.get("compile", True), flags.get("shard", False)
    tokens = 8 * (is_eager and not is_split)  # writing is never compiled, and after the run there are no ranks
    flags = dict(device="cuda", d_model=32, num_layers=1, num_heads=2, context_length=160, batch_size=4, num_steps=4,
                 log_interval=1, eval_interval=2, eval_tokens=1280, sample_tokens=2 * is_eager, data=data,
                 output_dir=folder) | flags
    with FakeTensorMode(allow_non_fake_inputs=True), Host() as host:
        torch.cuda.current_stream, torch.cuda.graph = host.current_stream, host.record
        tinylm.rope_table(256, 16, 1e4, NO_SCALING, torch.device("cuda", 0))  # no part of a graph
        tinylm.rope_table(flags["context_length"], 16, 1e4, NO_SCALING, torch.device("cuda", 0))  # no part of a graph
        train.train(**flags)
        config, params, dtype = runs[-1].config, runs[-1].params, machine.DTYPES[runs[-1].settings.dtype]
        on_device({"params": params, "optimizer": runs[-1].optimizer})
        prompts, launches = torch.ones(2, config.context_length - 4, dtype=torch.int64, device="cuda"), []
        for token in tinylm.generate(params, prompts, config, tokens, 0.8, 5, 0.9, (7, 9), None, dtype):  # it slides
            assert token.device.type == "cuda" and token.dtype == torch.int64
            launches.append(host.launches)
        assert min(np.diff(launches), default=0) <= 16, f"{np.diff(launches)} operations a token"
        first = max(np.diff(launches)[:2], default=0)  # not recorded yet
        assert first <= (113 if has_triton else 172), f"{np.diff(launches)} operations a token"
    stops = {place: host.stops.count(place) for place in set(host.stops)}
    most = dict.fromkeys(("train", "evaluate"), flags["num_steps"] // 2) | {"sample_text": 8, "generate": tokens}
    assert all(count <= most[place] for place, count in stops.items()), f"stops: {stops}, at most {most}"

PATHS = {
    "eager": dict(compile=False),
    "float32, no Triton": dict(compile=False, dtype="float32", num_kv_heads=1, remat=True, triton=False),
    "ranks": dict(compile=False, ranks=2, grad_accum_steps=2, optimizer="muon", tie_embeddings=True),
    "sharded": dict(compile=False, shard=True, ranks=2, optimizer="muon", remat=True),
    "compiled": dict(num_layers=2),
    "compiled float32": dict(dtype="float32"),
    "compiled ranks": dict(ranks=2, grad_accum_steps=2),
    "compiled, sharded": dict(shard=True, ranks=2, tie_embeddings=True),
    "compiled, Muon": dict(optimizer="muon", tie_embeddings=True, num_kv_heads=1, context_length=64, eval_tokens=512),
}
# Of each a flag with which it shows, the text that is changed, and a part of what then is said.
FAULTS = {
    "a look at the norm": ({}, "norm.is_cpu and is_eager()", "is_eager()", "'train': 3"),
    "angles on the CPU": ({}, "torch.arange(length, device=device)", "torch.arange(length)", "cpu"),
    "a mask on the CPU": (dict(dtype="float32", triton=False), ", dtype=dtype, device=device).triu_",
                          ", dtype=dtype).triu_", "cpu"),
    "a cache on the CPU": ({}, "dtype=dtype, device=device) for name in", "dtype=dtype) for name in", "cpu"),
    "a missing key": (dict(dtype="float32", triton=False), ', "cuda": 1 << 27', "", "KeyError: 'cuda'"),
    "an assert": ({}, "    reached = pro", "    assert probabilities.isfinite().all() or 1\n    reached = pro",
                  "a stop while the device"),
    "no order": ({}, "w.is_cuda and torch.is_grad_enabled()", "False", "adds in no fixed order"),
    "no kernels": ({}, "return x.is_cuda and is_eager() and not", "return False and not", "operations a token"),
    "no record": ({}, "w.is_cuda and not is_split(w) and tokens", "False and tokens", "operations a token"),
    "a copy in a record": (dict(triton=False), "[2], device=q.device) >", "[2]).to(q.device) >",
                           "a copy to the device while"),
    "a stop in a record": (dict(triton=False), '> cache["filled"]  #', '> cache["filled"].item()  #',
                           "a stop while the device"),
}

def report_on_device(data, folder):
    """Print a line of JSON for each path and each fault: its name, and what was wrong. A process of its own each."""
    pretend()
    checks = {name: (flags, "", "") for name, flags in PATHS.items()}
    for name, (flags, old, new, _) in FAULTS.items():
        checks[name] = {"compile": False, "num_steps": 2} | flags, old, new
    for number, (name, (flags, old, new)) in enumerate(checks.items()):
        if number >= 2:  # at the same time
            os.wait()
        if not os.fork():
            error = None
            try:
                if old:
                    source = (ROOT / "tinylm.py").read_text(encoding="utf-8")
                    assert old in source
                    exec(compile(source.replace(old, new), ROOT / "tinylm.py", "exec"), vars(tinylm))
                if old or "compiled" in name:
                    train.check_forms = lambda *args: None  # is never compiled, and takes long where nothing is wrong
                with contextlib.redirect_stdout(io.StringIO()):
                    train_and_write_on_device(data, f"{folder}/{name}", flags)
            except BaseException as problem:
                error = "".join(traceback.format_exception(problem))[-2000:]  # a line is written at once up to 4,096
            os.write(1, (json.dumps([name, error, time.process_time()]) + "\n").encode())
            os._exit(0)  # autograd's thread for the device would end badly
    os.wait(), os.wait()
    os._exit(0)

@pytest.fixture(scope="module")
def on_pretended_device(tmp_path_factory):
    """A function that calls one of these in a process that has the device → what it printed of JSON, and its errors."""
    if torch.version.cuda:
        pytest.skip("only a CPU build of torch has room for a pretended device")
    compiler, torch_folder = shutil.which(os.environ.get("CXX", "g++")), Path(torch.__file__).parent
    if not compiler:
        pytest.skip("no C++ compiler")
    source, library = (tmp_path_factory.mktemp("device") / f"pretended.{ending}" for ending in ("cpp", "so"))
    source.write_text(PRETENDED_DEVICE)
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", source, "-o", library,
                    f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"], check=True)

    def call(function, *arguments):
        program = ("import ctypes, sys; ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)\n"  # before torch asks for it
                   f"import test_tinylm; test_tinylm.{function.__name__}(*sys.argv[2:])")
        done = subprocess.run([sys.executable, "-c", program, library, *arguments], cwd=ROOT, capture_output=True,
                              text=True)
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr[-3000:]
    return call

def test_the_cuda_path_on_a_pretended_device(tmp_path, on_pretended_device):
    """Training, evaluation and writing in all their ways, and faults that must be seen."""
    reports, errors = on_pretended_device(report_on_device, prepared(tmp_path), tmp_path)
    reports = {name: error for name, error, _ in reports}
    assert reports.keys() == PATHS.keys() | FAULTS.keys(), errors
    for name, error in reports.items():
        assert error is None if name in PATHS else error and FAULTS[name][-1] in error, f"{name}: {error}"

# What compiled code launches at most, of one layer and of Muon's update of two: kernels that Triton makes, products,
# operations of our own; how often it adds in no fixed order; and, of a loss in two pieces, how often it has to do with
# the first one's logits when it reads the second one's.
LAUNCHES = {"loss": (14, 13, 2, 0, 0), "gradients": (14, 14, 2, 0, 0), "AdamW": (3, 0, 1, 0, 0),
            "Muon": (19, 45, 1, 0, 0)}

def report_launches():
    """Print the launches of each, as Inductor writes them for an H100 that is not there."""
    class Written(Exception):
        """The code is there, and nothing could run it."""

    def note(lowering):
        code, _ = lowering.codegen()
        written.append(getattr(code, "value", code))
        return types.SimpleNamespace(call=stop, __file__=os.devnull)

    def stop(*args):
        raise Written

    for name in ("_exchange_device", "_maybe_exchange_device"):
        setattr(torch.cuda, name, lambda *args: 0)
    torch._C._cuda_getDevice = lambda: 0
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        name="H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=1 << 16, warp_size=32,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, shared_memory_per_block_optin=227 << 10,
        total_memory=80 << 30, L2_cache_size=50 << 20, gcnArchName="")
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    torch.cuda.device_count, torch.cuda.default_generators = lambda: 1, (generator(),)
    torch.cuda.get_arch_list, torch.cuda.is_bf16_supported = lambda: ["sm_90"], lambda **options: True
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor import graph
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    fuse_attention._sfdp_init = misc_patterns._misc_patterns_init = pad_mm._pad_mm_init = lambda *args: None
    functorch.force_non_lazy_backward_lowering = True
    inductor.compile_threads, inductor.fx_graph_cache, inductor.joint_graph_constant_folding = 1, False, False
    graph.GraphLowering._compile_to_module = note
    tinylm.LOGITS_AT_ONCE = 1 << 20
    machine.choose_device, machine.has_bfloat16, machine.check_compiler = str, lambda device: True, lambda *args: None
    for optimizer, num_layers, names in (("adamw", 1, ("loss", "gradients", "AdamW")), ("muon", 2, ("Muon",))):
        if os.fork():  # both at the same time
            continue
        settings = train.Settings.complete(dict(device="cuda", d_model=64, num_layers=num_layers, optimizer=optimizer))
        config, written = run.model_config(settings, 2048), []
        gradients, update, _ = train.step_functions(config, settings)
        with FakeTensorMode(allow_non_fake_inputs=True):
            params = tinylm.tree_map(lambda p: p.to("cuda"), tinylm.init_params(config, generator()))
            grads, state = tinylm.tree_map(torch.zeros_like, params), tinylm.OPTIMIZERS[optimizer][0](params)
            tokens, loss = torch.zeros(4, 256, dtype=torch.int64).to("cuda"), torch.zeros(()).double().to("cuda")
            tinylm.rope_table(256, config.head_dim, 1e4, NO_SCALING, tokens.device)  # no part of a graph
            with contextlib.suppress(Written):
                if optimizer == "adamw":
                    gradients(params, tokens, tokens)
            with contextlib.suppress(Written):
                update(params, grads, state, torch.full_like(loss, 1e-3).float(), loss)
        for name, code in zip(names, written, strict=True):
            kinds = r"\btriton_\w+\.run\(", r"\bextern_kernels\.\w+\(", r"= torch\.ops\.tinylm\.", r"\batomic_add\b"
            counts = [len(re.findall(kind, code)) for kind in kinds]
            logits = list(re.finditer(r"triton_\w*softmax\w*\.run\((\w+)", code))
            assert len(logits) == 2 * (name == "loss"), "the pieces are one"
            counts.append(len(re.findall(rf"\b{logits[0][1]}\b", code[logits[1].start():])) if logits else 0)
            os.write(1, (json.dumps([name, counts]) + "\n").encode())
        os._exit(0)
    os.wait(), os.wait()
    os._exit(0)

def test_launches_of_compiled_steps(on_pretended_device):
    needs_kernels()
    reports, errors = on_pretended_device(report_launches)
    assert {name for name, _ in reports} == LAUNCHES.keys(), errors
    for name, launches in reports:
        assert all(map(operator.le, launches, LAUNCHES[name])) and launches[0] and launches[2], (name, launches)

# ---- Many ranks ----

def start_ranks(count, program="train.train(**flags)", **flags):
    """Training on `count` ranks, as torchrun would start them."""
    of_first = ("from data import checkpoint\n"  # which reads for all
                "checkpoint.load_checkpoint = checkpoint.load_checkpoint if env['RANK'] == '0' else None\n")
    flags = TINY | dict(batch_size=8, vocab_size=401, sample_tokens=2) | flags
    return [fork(of_first + program, env, flags=flags) for env in variables_of_ranks(count)]

def run_on_ranks(count, program, **flags):
    for process in start_ranks(count, program, **flags):
        process.join(300)
        assert process.exitcode == 0

def train_on_ranks(count, **flags):
    """A whole run; what is to be compiled is traced, but not built, which would take long."""
    program = ("compiler = torch.compile\n"
               "torch.compile = lambda f, **_: compiler(f, fullgraph=True, backend='aot_eager')\n"
               "assert train.train(**flags).best_step, 'which all ranks know'")
    run_on_ranks(count, program, **flags)

def same_run(a, b, tolerance=1e-5):
    """Two runs logged the same losses and norms, and ended with the same parameters and moments."""
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x["step"] == y["step"] and x["tokens"] == y["tokens"]
        for key in ("train_loss", "grad_norm", "val_loss", "lr"):
            assert x.get(key) == pytest.approx(y.get(key), abs=tolerance), (x, y)
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        same(load_file(a / "latest" / name), load_file(b / "latest" / name), tolerance)

@pytest.mark.parametrize("flags", [{}, {"optimizer": "muon", "grad_accum_steps": 2, "batch_size": 4, "num_steps": 20}],
                         ids=["adamw", "muon"])
def test_ranks_do_what_one_process_does(tmp_path, flags):
    """2 and 4 ranks, data parallel and sharded, compiled too: losses, norms, parameters and moments of one process,
    over 50 steps with AdamW. The vocabulary has a prime number of rows, so that they can't be split evenly."""
    is_muon = "optimizer" in flags
    flags = dict(data=str(prepared(tmp_path)), num_steps=50, eval_interval=25, log_interval=5, lr_max=1e-3) | flags
    train_on_ranks(1, output_dir=str(tmp_path / "one"), **flags)
    ways = [(2, False, False), (4, True, False), (2, True, True)] + [(4, False, False)] * (not is_muon)
    for count, shard, compiled in ways:
        folder = tmp_path / f"{count}{shard}{compiled}"
        train_on_ranks(count, output_dir=str(folder), shard=shard, compile=compiled, **flags)
        same_run(tmp_path / "one", folder)

def test_a_run_that_begins_holds_one_model(tmp_path, monkeypatch):
    """And its moments: of the state by which it reads these only the shapes are left, and what is put on a device is
    freed where it was."""
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    alive, most = weakref.WeakSet(), []
    load, to_all = checkpoint.load_optimizer, machine.of_first_rank

    def load_seen(folder, like):
        assert all(leaf.is_meta for _, leaf in tinylm.tree_leaves(like))
        state = load(folder, like)
        alive.update(leaf for _, leaf in tinylm.tree_leaves(state))
        return state

    def placed(tensor):
        most.append(len(alive))
        return to_all(tensor)

    monkeypatch.setattr(checkpoint, "load_optimizer", load_seen)
    monkeypatch.setattr(machine, "of_first_rank", placed)
    train.train(resume=tmp_path / "run", num_steps=7)
    count = len(most)
    assert most == [min(count // 3 * 2 + 1, count - i) for i in range(count)], most

def test_a_run_resumes_on_other_ranks(tmp_path):
    """4 ranks sharded, then 2 data parallel, then 1 sharded, then no ranks at all: the run of one process."""
    flags = dict(data=str(prepared(tmp_path)), num_steps=8, lr_max=1e-3, lr_min=1e-3, warmup_steps=0, eval_interval=8)
    train_on_ranks(1, output_dir=str(tmp_path / "one"), **flags)
    changing = dict(output_dir=str(tmp_path / "many"), checkpoint_interval=2, resume="auto", **flags)
    for steps, count, shard in ((2, 4, True), (4, 2, False), (6, 1, True)):
        train_on_ranks(count, **changing | dict(num_steps=steps, shard=shard, eval_interval=8))
    train.train(resume=str(tmp_path / "many"), num_steps=8, shard=False)
    lines = [line for line in metrics(tmp_path / "many") if "val_loss" not in line or line["step"] == 8]
    (tmp_path / "many/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    same_run(tmp_path / "one", tmp_path / "many")

def test_scripts_are_named_as_a_shell_finds_them(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.script("sample.py") == "sample.py"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample.py").touch()
    assert cli.script("sample.py") == shlex.quote(str(ROOT / "sample.py"))

def test_a_signal_to_one_rank_ends_all_after_the_same_step(tmp_path):
    processes = start_ranks(2, "sys.exit(train.train(**flags).exit_code)", data=str(prepared(tmp_path)),
                            output_dir=str(tmp_path / "run"), num_steps=100_000, eval_interval=100_000)
    wait_for_step(tmp_path / "run", 5, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(180)
        assert process.exitcode == 0
    assert (tmp_path / "run/latest").resolve().name == f"step-{metrics(tmp_path / 'run')[-1]['step']:07d}"

def test_a_rank_that_dies_is_shown_and_the_job_goes_on(tmp_path):
    """With torchrun, that starts all ranks again; the second one dies once, in step 8."""
    (tmp_path / "dies.py").write_text("""if True:
        import os, runpy, signal, sys
        sys.path.insert(0, os.getcwd())
        from data import log
        genuine, dies = log.Log.step, (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0")
        log.Log.step = lambda self, step, *args: [
            step == 8 and dies and os.kill(os.getpid(), signal.SIGKILL), genuine(self, step, *args)][1]
        sys.argv[0] = "train.py"
        runpy.run_path("train.py", run_name="__main__")
        """)
    flags = tiny_flags(batch_size=8, num_steps=12, checkpoint_interval=5, eval_interval=12, resume="auto",
                       data=prepared(tmp_path), output_dir=tmp_path / "run")
    job = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                          "--max-restarts=1", tmp_path / "dies.py", *flags],
                         cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180)
    assert job.returncode == 0, job.stdout
    assert "SIGKILL" in job.stdout or "exitcode: -9" in job.stdout
    assert [line["step"] for line in metrics(tmp_path / "run") if "train_loss" in line] == list(range(1, 13))

def test_a_mistake_of_a_later_rank_ends_all(tmp_path):
    """In one line of each, which names the rank."""
    program = """if True:
        import data.prepare
        if env["RANK"] == "1":
            def open_data(folder):
                raise data.prepare.InputError("no such data here")
            data.prepare.open_data = open_data
        try:
            train.train(**flags)
        except data.prepare.InputError as error:
            with open(flags["data"] + "/../" + env["RANK"], "w") as file:
                file.write(str(error))
    """
    run_on_ranks(2, program, data=str(prepared(tmp_path)), output_dir=str(tmp_path / "run"))
    for rank in "01":
        assert re.fullmatch("rank 1, on .*: no such data here; or copy it from .*", (tmp_path / rank).read_text())

def test_runs_of_ranks_one_after_the_other(tmp_path):
    """In the same processes; the script's own output is there again behind each."""
    program = """if True:
        out = sys.stdout
        for shard in (False, True):
            done = train.train(**flags, shard=shard, output_dir=f"{flags['data']}/../{shard}")
            assert done.step == 6 and sys.stdout is out
    """
    run_on_ranks(2, program, data=str(prepared(tmp_path)))
    same_run(tmp_path / "False", tmp_path / "True")

def test_a_rank_that_is_gone_is_one_line_to_others(monkeypatch):
    monkeypatch.setattr(machine, "join_ranks", lambda device: (device, 1, 2))
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    for said in ("pair.cc:534] Connection closed by peer", "buffer.cc:81]\nRead error: Connection reset by peer"):
        with pytest.raises(cli.RankError, match="^rank 1: another rank is gone"), machine.ranks("cpu"):
            raise RuntimeError(f"[/pytorch/third_party/gloo/gloo/transport/tcp/{said}")
        assert slept.pop() == 5
    with pytest.raises(RuntimeError, match="^a mistake in the code"), machine.ranks("cpu"):
        raise RuntimeError("a mistake in the code")

def test_each_run_of_ranks_has_addresses_of_its_own(monkeypatch, as_rank):
    """In the store that torchrun keeps; a connection that breaks while they meet is one line."""
    as_rank()
    names, meet, store = [], unittest.mock.Mock(), unittest.mock.Mock()
    monkeypatch.setattr(machine.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(machine.dist, "PrefixStore", lambda name, store: names.append(name))
    monkeypatch.setattr(machine.dist, "init_process_group", meet)
    for _ in range(2):
        machine.join_ranks("cpu")
    assert len(set(names)) == 2
    assert store.set_timeout.call_args[0][0] >= machine.datetime.timedelta(hours=12)
    meet.side_effect = machine.dist.DistNetworkError("Connection reset by peer")
    with pytest.raises(cli.InputError, match="no connection to x:1, where ranks meet"):
        machine.join_ranks("cpu")

def test_ranks_that_do_not_speak_let_the_one_that_does_end_first(monkeypatch, capsys, as_rank):
    """Of a mistake that all make torchrun would else hide what is said; help is printed once."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    as_rank(1)
    for rank, flag in (("1", "--foo=1"), ("0", "--foo=1"), ("1", "--help")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with contextlib.suppress(SystemExit):
            cli.run(train.train, [flag])
    out, err = capsys.readouterr()
    assert waited == [5] and err.count("unknown flag --foo") == 1 and not out

def test_a_mistake_that_one_rank_alone_knows_is_said_by_it(monkeypatch, capsys, as_rank):
    as_rank(1)
    monkeypatch.setattr(time, "sleep", pytest.fail)

    def fails():
        raise cli.RankError("no memory; give less")

    code, error = call(monkeypatch, capsys, fails)
    assert code == 2 and "no memory; give less" in error

@pytest.fixture
def few_objects():
    """Garbage collection sees no object that was there before, of which there are hundreds of thousands."""
    gc.freeze()
    yield
    gc.unfreeze()

@pytest.mark.parametrize("alone_from, remat, compiled", [
    (0, False, False), (1 << 20, False, False), (0, True, False), (1 << 20, True, False), (1 << 20, False, True)])
def test_blocks_of_ranks_are_gathered_ahead_and_freed(alone_from, remat, compiled, monkeypatch, mesh_of_one,
                                                      few_objects):
    """And gathered once more to go backward, whether their tensors travel together or alone: each block's are sent just
    before the block in front of it is computed, or its gradients. These are those of whole tensors. What is compiled
    has the loss of ranks on CUDA.
    """
    monkeypatch.setattr(tinylm, "ALONE_FROM", {"cpu": alone_from})
    config, events, layers, before, averaged_at = small_config(num_layers=4, d_ff=96), [], {}, 0, []
    params, (inputs, targets) = random_params(config), random_tokens(config, 2, 3, 9)
    _, expected = tinylm.value_and_grad(tinylm.loss_fn, params, inputs, targets, config)
    compiler = lambda function: function
    if compiled:
        compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
        monkeypatch.setattr(tinylm.loss_fn, "forms", [(tinylm.always, tinylm.loss_in_pieces)])
    here = lambda: sum(type(x) is torch.Tensor and x.shape == (96, config.d_model) for x in gc.get_objects())

    def watch(owner, name, event, layer_of):
        function = getattr(owner, name)
        def call(*args, **options):
            events.extend(f"{event} {layer}" for layer in layer_of(*args))
            if event == "average" and of_block(args[1]):
                averaged_at.append(here() - before)
            if event == "compute":
                averaged = sum("average" in event for event in events)  # whose gradients are there
                assert here() - before == 2 * (1 + averaged), "gate and up of this block alone"
            return function(*args, **options)
        monkeypatch.setattr(owner, name, call)

    of_block = lambda ws: {layers[id(w)] for w in ws if id(w) in layers}
    watch(tinylm, "begin_gather", "send", lambda ws, dtypes: of_block(ws))
    watch(tinylm, "scatter_together", "average", lambda wholes, ws: of_block(ws))
    watch(tinylm.transformer_blocks, "definition", "compute", lambda blocks, *_: blocks)

    def loss_fn(params):
        nonlocal before
        layers.update((id(w), layer) for layer, block in params["blocks"].items() for _, w in tinylm.tree_leaves(block))
        before = here()
        loss = tinylm.loss_fn(params, inputs, targets, config, torch.float32, remat)
        assert here() <= before
        events.append("loss")
        return loss

    _, grads = tinylm.layer_by_layer(tinylm.value_and_grad, compiler)(loss_fn, tinylm.shard(params, mesh_of_one))
    again = ["compute 3", "compute 2", "compute 1", "compute 0"] if remat else [""] * 4
    assert events == [event for event in (
        "send 0", "send 1", "compute 0", "send 2", "compute 1", "send 3", "compute 2", "compute 3", "loss",
        "send 3", "send 2", again[0], "average 3", "send 1", again[1], "average 2", "send 0", again[2], "average 1",
        again[3], "average 0") if event]
    assert compiled or averaged_at == [2, 4, 6, 8], "gradients alone"
    same(dict(tinylm.tree_leaves(tinylm.own_parts(grads))), dict(tinylm.tree_leaves(expected)), 1e-6)

def test_blocks_of_ranks_are_computed_in_the_dtype_that_they_get(monkeypatch, mesh_of_one):
    """As those of a stream that becomes float32: nothing is rounded on the way that one process does not round."""
    block = tinylm.transformer_block
    monkeypatch.setattr(tinylm, "transformer_block", lambda *args, **options: block(*args, **options).float())
    config, batch = small_config(num_layers=3), random_tokens(small_config(), 2, 2, 9)
    whole = random_params(config)
    results = [tinylm.value_and_grad(tinylm.loss_fn, params, *batch, config, torch.bfloat16)
               for params in (whole, tinylm.shard(whole, mesh_of_one))]
    (expected, grads), (loss, split_grads) = results
    assert loss.equal(expected)
    same(dict(tinylm.tree_leaves(tinylm.own_parts(split_grads))), dict(tinylm.tree_leaves(grads)), 1e-6)

def test_what_ranks_keep_is_a_copy(mesh_of_one):
    """So that the whole can be freed, and updates in place change nothing of the caller's."""
    w = torch.ones(4, 3)
    tinylm.own_parts(tinylm.shard({"w": w}, mesh_of_one))["w"].zero_()
    assert w.all()

def test_products_of_ranks_in_half_precision(mesh_of_one):
    """The matrix travels in x's dtype, and its gradient comes back in its own."""
    x, w, out = randn(2, 8).bfloat16().requires_grad_(), randn(5, 8, seed=1).float(), randn(2, 5).bfloat16()
    split = tinylm.shard({"w": w}, mesh_of_one)["w"].requires_grad_()
    (dx, dw), (e_dx, e_dw) = (torch.autograd.grad(tinylm.linear(x, w), (x, w), out) for w in (
        split, w.requires_grad_()))
    assert tinylm.linear(x, split).dtype == torch.bfloat16 and dw.dtype == torch.float32
    same((dx, tinylm.own_parts(dw)), (e_dx, e_dw), 0.02)

def test_memory_of_ranks_does_not_grow(mesh_of_one):
    """From step to step of a split model, be it with the backward pass or without."""
    config = small_config(d_model=256, vocab_size=512)
    params, (inputs, targets) = tinylm.shard(random_params(config), mesh_of_one), random_tokens(config, 2, 1, 9)
    size, before = tinylm.num_params(config) * 4, None
    for step in range(90):
        if step == 30:
            gc.collect()
            before = resident("VmRSS")
        if step % 3:
            tinylm.value_and_grad(tinylm.loss_fn, params, inputs, targets, config)
        else:
            learned = tinylm.tree_map(lambda p: p.detach().requires_grad_(), params)
            tinylm.loss_fn(learned, inputs, targets, config)
    assert resident("VmRSS") - before < 6 * size, (resident("VmRSS") - before, size)

def test_gradients_of_several_buckets(monkeypatch, mesh_of_one):
    monkeypatch.setattr(tinylm.GradientAverager, "BUCKET_BYTES", 100)
    grads, averager = random_tree(), tinylm.GradientAverager()
    for path, gradient in tinylm.tree_leaves(grads):
        averager.add(path, gradient)
    assert len(averager.sent) == 1 and averager.waiting
    same(averager.averages(grads), grads, 0)

def test_rows_and_norms_of_ranks():
    """Also of a rank with less than one row; and of what every rank has whole, as a fork's gradients may be."""
    program = """if True:
        import tinylm
        from data import machine
        from torch.distributed.tensor import DTensor, Replicate
        with machine.ranks("cpu"):
            w, mesh = torch.ones(1, 3) + machine.dist.get_rank(), machine.mesh_of_ranks("cpu")
            split = tinylm.shard(torch.ones(1, 3), mesh)
            assert tinylm.all_gather(split).equal(torch.ones(1, 3))
            assert tinylm.all_gather(tinylm.scatter_together([w], [split])[0]).equal(torch.full((1, 3), 1.5))
            for w in (torch.ones(()).expand(4), torch.arange(6.0).view(3, 2).T):  # such as that of a sum
                split_alike = tinylm.shard(torch.zeros(w.shape), mesh)
                assert tinylm.all_gather(tinylm.scatter_together([w], [split_alike])[0]).equal(w)
            whole, = tinylm.gather_together([split], [torch.float32])
            assert whole.equal(torch.ones(1, 3))
            w = torch.arange(10.0).view(5, 2)
            tree = {"split": tinylm.shard(w, mesh), "whole": DTensor.from_local(w, mesh, [Replicate()])}
            assert abs(tinylm.global_norm(tree) - (2 * w.square().sum()).sqrt()) < 1e-4, tinylm.global_norm(tree)
    """
    run_on_ranks(2, program)

def test_data_of_another_machine_is_compared(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    texts = [many_stories(50, seed, END) for seed in (0, 1)]
    for data, text in zip((here, there), texts):
        prepared(data, text, vocab_size=257)
    meta, _ = prepare.open_data(there / "data")
    with pytest.raises(cli.InputError, match="here/data is not the same there as where the first rank is .train."):
        run.await_state(run.Run(None, tmp_path / "run", here / "data", meta=meta))

def test_what_ranks_hear_of_the_first(monkeypatch):
    """That a run has done its steps, which is no failure; W&B hears of a run from the first alone."""
    news = {"mistake": "done", "is_finished": True}
    monkeypatch.setattr(machine, "from_rank", lambda *_: news.copy())
    monkeypatch.setattr(machine, "first_of_ranks", lambda mistake, device: mistake)
    monkeypatch.setattr(run, "await_state", lambda run: None)
    with pytest.raises(run.Finished, match="done"):
        run.tell_ranks(None, None, train.Settings, "cpu", 1, 2)
    news = dict.fromkeys(run.SHARED, "x") | {"settings": {"use_wandb": True}, "config": vars(small_config())}
    table = types.SimpleNamespace(complete=dict)
    assert run.tell_ranks(None, None, table, "cpu", 1, 2).settings == {"use_wandb": False, "device": "cpu"}

# ---- Nothing is lost, whatever the place ----

def hear_ctrl_c():
    """In a new process, as the tests may have been started by a script that goes on meanwhile, which no Ctrl-C ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

def command(folder, *arguments, **environment):
    """A command of the project in a process of its own, as a user starts it in some folder."""
    return subprocess.Popen([sys.executable, ROOT / arguments[0], *map(str, arguments[1:])], cwd=folder, text=True,
                            env=os.environ | environment, errors="replace", stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)

def tiny_flags(**changes):
    return [f"--{name}={value}" for name, value in (TINY | changes).items()]

def test_two_processes_prepare_one_corpus_once(tmp_path):
    """Both end well, with all of the corpus: one prepares it, the other waits."""
    program = f"""if True:
        from data import prepare
        from pathlib import Path
        prepare.DATA, prepare.NUM_STORIES = Path({str(tmp_path)!r}), {{"train.txt": 3000, "val.txt": 100}}
        write = prepare.write_beside
        prepare.write_beside = lambda *args: [write(*args), print("wrote it")]
        meta, ids = prepare.open_data(prepare.find_data("stories"))
        print(len(ids["train"]))
        """
    start = lambda: subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    both = [start(), start()]
    outs = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outs[0][-1] == outs[1][-1] == str(len(prepare.open_data(tmp_path / "stories")[1]["train"]))
    assert sum("waiting for it" in line for out in outs for line in out) <= 1
    assert sum("wrote it" in line for out in outs for line in out) == 1

def test_a_data_folder_that_is_being_prepared_is_waited_for(tmp_path, monkeypatch, capsys):
    data = prepared(tmp_path)
    released = []

    def hold():
        with files.lock(data / ".lock"):
            held.set()
            assert told.wait(60)
            released.append(1)

    held, told, say = threading.Event(), threading.Event(), cli.say
    monkeypatch.setattr(cli, "say", lambda text: [say(text), "waiting for it" in text and told.set()])
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    prepared(tmp_path)
    assert released
    assert f"is being prepared by process {os.getpid()}; waiting for it" in capsys.readouterr().out
    with files.lock(data / ".lock"):
        monkeypatch.setattr(cli, "say", lambda text: shutil.rmtree(data))  # as one does that is interrupted
        with files.wait_for_lock(data / ".lock", "it is held", 0.01) as waited:
            assert waited and (data / ".lock").is_file()
    thread.join()

def test_data_that_another_process_made_just_before(tmp_path, monkeypatch):
    """Between a look and the lock: is not made again, below one that trains on it."""
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat. " * 100)
    prepare_it = functools.partial(prepare.prepare, input=tmp_path / "text.txt", output=tmp_path / "data")
    wait_for_lock, write, written = files.wait_for_lock, prepare.write_beside, []

    def wait_late(*args):
        monkeypatch.setattr(files, "wait_for_lock", wait_for_lock)
        prepare_it()
        return wait_for_lock(*args)

    monkeypatch.setattr(prepare, "write_beside", lambda *args: [written.append(1), write(*args)])
    monkeypatch.setattr(files, "wait_for_lock", wait_late)
    prepare_it()
    assert written == [1]
    prepare_it()
    assert written == [1, 1], "asked for again it is made anew"

@pytest.mark.parametrize("without", ["fcntl", "working locks"])
def test_locks_where_there_are_none(tmp_path, monkeypatch, without):
    """By a file that names host and process: it keeps others out, and a dead process's is no obstacle."""
    if without == "fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        def refuse(*_):
            raise OSError(37, "No locks available")
        monkeypatch.setattr("fcntl.flock", refuse)
    with files.lock(tmp_path / "lock"):
        with pytest.raises(files.Held, match=f"process {os.getpid()} on .*remove .*lock.held"):
            with files.lock(tmp_path / "lock"):
                raise AssertionError
    assert not (tmp_path / "lock.held").exists()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "lock.held").write_text(f"{dead.pid} on {socket.gethostname()}")
    with files.lock(tmp_path / "lock"):
        pass

def test_prepare_writes_into_the_folder_that_is_there(tmp_path, monkeypatch):
    """It may be a mount point or a link; the folder itself is never moved or replaced."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    for vocab_size in (300, 350):
        data = prepared(tmp_path, vocab_size=vocab_size)
        assert data.is_symlink() and prepare.open_data(tmp_path / "disk")[0]["vocab_size"] == vocab_size
        inode = os.stat(tmp_path / "disk").st_ino if vocab_size == 300 else inode
    assert os.stat(tmp_path / "disk").st_ino == inode
    assert not list((tmp_path / "disk").glob(".partial"))
    monkeypatch.setattr(prepare, "NUM_STORIES", {"train.txt": 9, "val.txt": 3})
    prepare.prepare(dataset="stories", output=tmp_path / "data", vocab_size=300)
    names = lambda: {path.name for path in (tmp_path / "disk").iterdir()} - {".lock"}
    assert {"train.txt", "val.txt"} < names()
    prepared(tmp_path)
    assert names() == {"tokenizer.json", "train.bin", "val.bin", "meta.json"}, "no text of what was there before"
    (tmp_path / "disk/train.txt").write_text("mine")
    prepared(tmp_path, vocab_size=300)
    assert (tmp_path / "disk/train.txt").read_text() == "mine"

def test_a_run_without_links(tmp_path, monkeypatch, capsys):
    """What is newest and best does not depend on links: saved, pruned, resumed and sampled without a word."""
    def refuse(*_):
        raise OSError("links are not supported here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    evaluations_give(FALLING_THEN_RISING, monkeypatch)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | dict(eval_interval=1))
    assert capsys.readouterr().err == ""
    assert sorted(run.checkpoints(tmp_path / "run")) == [2, 5, 6] and not (tmp_path / "run/latest").exists()
    train.train(resume=tmp_path / "run", num_steps=7)
    assert sorted(run.checkpoints(tmp_path / "run")) == [2, 6, 7]
    sample.sample(checkpoint=tmp_path / "run", max_new_tokens=2)

    monkeypatch.undo()
    shutil.copytree(tmp_path / "run/step-0000007", tmp_path / "run/latest")  # as by a copy that followed links
    monkeypatch.setattr(Path, "symlink_to", refuse)
    train.train(resume=tmp_path / "run", num_steps=8)
    assert not (tmp_path / "run/latest").exists()

def test_what_was_prepared_meanwhile_by_other_flags(tmp_path, monkeypatch):
    """It serves only who asked for the same."""
    monkeypatch.setattr(files, "wait_for_lock", lambda *_: contextlib.nullcontext(True))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/b.txt").write_text("the second text\n" * 20)
    output = tmp_path / "out"

    def bytes_after(**flags):
        prepare.prepare(**dict(input=tmp_path / "texts", output=output, vocab_size=257) | flags)
        when.append((output / "meta.json").stat().st_mtime_ns)
        return sum(meta["bytes"] for meta in prepare.open_data(output)[0].values() if isinstance(meta, dict)
                   and "bytes" in meta)

    when = []
    assert bytes_after() == bytes_after() == 320 and when[0] == when[1]
    (tmp_path / "texts/a.txt").write_text("the first\n" * 20)  # as while the other was waited for
    assert bytes_after() == 520 and when[1] != when[2]
    monkeypatch.chdir(tmp_path / "texts")
    assert bytes_after(input="a.txt") == 200
    (tmp_path / "a.txt").write_text("of the same name\n" * 20)
    monkeypatch.chdir(tmp_path)
    assert bytes_after(input="a.txt") == 340
    assert prepare.open_data(prepared(tmp_path, vocab_size=300))[0]["vocab_size"] == 300
    assert prepare.open_data(prepared(tmp_path, vocab_size=290))[0]["vocab_size"] == 290

def test_prepare_removes_nothing_of_others(tmp_path):
    """A folder with a meta.json of another kind, a text in the folder to be written, files named as a corpus' are."""
    text, other = tmp_path / "stories", tmp_path / "other"
    text.write_text("a line of text\n" * 50)
    for content in ('{"my": "notes"}', "[1]", "no JSON"):
        other.mkdir(exist_ok=True)
        (other / "meta.json").write_text(content)
        with pytest.raises(cli.InputError, match="was not written by this command or is damaged"):
            prepare.prepare(input=text, output=other, vocab_size=257)
        assert [path.name for path in other.iterdir()] == ["meta.json"]
    output = tmp_path / "out"
    prepare.prepare(input=text, output=output, vocab_size=257)
    (output / "train.txt").write_text("my own text\n" * 50)
    prepare.prepare(input=text, output=output, vocab_size=258)
    for flags in (dict(input=output / "train.txt"), dict(input=text, val_input=output / "train.txt")):
        with pytest.raises(cli.InputError, match="train.txt lies in .*, which is to be written"):
            prepare.prepare(**flags, output=output, vocab_size=259)
    assert (output / "train.txt").read_text() == "my own text\n" * 50

def test_meta_json_is_the_last_of_data(tmp_path, monkeypatch):
    """So that a folder which has it has all, and nothing else, wherever the process is killed."""
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n' * 20)
    write, there = files.write_json, []
    monkeypatch.setattr(files, "write_json", lambda path, value: [
        there.extend(one.name for one in path.parent.iterdir()), write(path, value)])
    prepare.prepare(input=tmp_path / "text.jsonl", output=tmp_path / "out", vocab_size=257)
    assert sorted(there) == ["tokenizer.json", "train.bin", "val.bin"]

def test_a_text_to_validate_on_within_the_folder(tmp_path, monkeypatch):
    """Is no text to learn from too, however its path is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text(f"text of {name}")
    for folder, text in (("in", "in/a.txt"), ("in", tmp_path / "in/a.txt"), (tmp_path / "in", "in/a.txt")):
        prepare.prepare(input=folder, val_input=text, output=tmp_path / "out", vocab_size=257)
        _, ids = prepare.open_data(tmp_path / "out")
        tokenizer = bpe.load(tmp_path / "out")
        assert [bpe.decode(tokenizer, ids[split]) for split in ids] == [f"text of b.txt{END}", f"text of a.txt{END}"]
    with pytest.raises(cli.InputError, match="is all of --input"):
        prepare.prepare(input=tmp_path / "in", val_input=tmp_path / "in", output=tmp_path / "o2", vocab_size=257)

def test_lines_of_jsonl_as_they_are(tmp_path):
    """A text that begins with U+FEFF, also in the first line, keeps it; one that ends with the mark has ended."""
    lines = ["\ufeffHello", f"one{END}", "\ufefftwo"] + ["x"] * 20
    texts = "".join(json.dumps({"text": text}) + "\n" for text in lines)
    (tmp_path / "a.jsonl").write_text(texts, encoding="utf-8-sig")
    prepare.prepare(input=tmp_path / "a.jsonl", output=tmp_path / "out", vocab_size=257)
    _, ids = prepare.open_data(tmp_path / "out")
    read = "".join(bpe.decode(bpe.load(tmp_path / "out"), ids[split]) for split in ids)
    assert read == "".join(text.removesuffix(END) + END for text in lines)

def test_what_is_in_the_way_of_data_has_a_name(tmp_path, monkeypatch):
    """A link that leads to itself, a disk that is full."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert run.newest(tmp_path / "file") is None
    with pytest.raises(cli.InputError, match="loop is not there"):
        prepare.prepare(input=tmp_path / "loop", output=tmp_path / "out")
    for flags, message in ((dict(resume=tmp_path / "loop"), "no checkpoint"),
                           (dict(output_dir=tmp_path / "loop", data=prepared(tmp_path)), "is no folder")):
        with pytest.raises(cli.InputError, match=message):
            train.train(**flags)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(prepare, "write_ids", unittest.mock.Mock(side_effect=full))
    with pytest.raises(OSError) as caught:
        prepare.prepare(input=tmp_path / "corpus.txt", output=tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out")
    (tmp_path / ".y.json.partial").mkdir()  # somebody else's
    with pytest.raises(OSError), files.beside(tmp_path / "y.json") as partial:
        partial.write_text("")
    assert partial.is_dir()
    with pytest.raises(OSError) as caught, files.beside(tmp_path / "x.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x.json")

def test_processes_of_other_users_are_alive(monkeypatch):
    monkeypatch.setattr(os, "kill", unittest.mock.Mock(side_effect=PermissionError))
    assert files.is_alive(1)

def test_a_folder_that_is_renamed_or_removed_under_its_run(tmp_path, monkeypatch, capsys):
    """A run of the same name may begin there; both keep what is theirs. The run of a removed folder makes it again."""
    flags = dict(data=prepared(tmp_path), output_dir=tmp_path / "run") | TINY | dict(checkpoint_interval=2)
    other = lambda: train.train(**flags | dict(seed=1, checkpoint_interval=6))
    monkeypatch.setattr(machine, "alone", contextlib.nullcontext)  # as in two processes

    def rename():
        os.rename(tmp_path / "run", tmp_path / "renamed")
        other()

    meanwhile(4, monkeypatch, rename)
    train.train(**flags)
    assert f"{tmp_path / 'run'} is now {tmp_path / 'renamed'}, where the run goes on" in capsys.readouterr().out
    for folder, steps in (("run", [3, 6]), ("renamed", [3, 4, 6])):  # of which step 3 has the lowest loss
        lines = metrics(tmp_path / folder)
        assert [line["step"] for line in lines if "train_loss" in line] == [1, 2, 3, 4, 5, 6]
        assert list(run.checkpoints(tmp_path / folder))[-1] == 6

    def replace_it():
        shutil.rmtree(tmp_path / "run")
        other()
        (tmp_path / "run/lock").write_text("1\n")  # as of another process
        theirs.extend(metrics(tmp_path / "run"))

    def copy_it():
        shutil.copytree(tmp_path / "run", tmp_path / "disk")
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").symlink_to(tmp_path / "disk")

    shutil.rmtree(tmp_path / "run")
    theirs = []
    meanwhile(4, monkeypatch, replace_it)
    with pytest.raises(cli.InputError, match="without its last checkpoint .*run is another run's now, as it was rem"):
        train.train(**flags)
    assert metrics(tmp_path / "run") == theirs and len(theirs) == 8
    assert files.read_json(run.newest(tmp_path / "run") / "training/train_state.json")["settings"]["seed"] == 1

    shutil.rmtree(tmp_path / "run")
    meanwhile(4, monkeypatch, lambda: shutil.rmtree(tmp_path / "run"))
    train.train(**flags)
    assert list(run.checkpoints(tmp_path / "run")) == [4, 6]

    shutil.rmtree(tmp_path / "run")
    evaluations_give(itertools.cycle([5.0, 7.0, 9.0]), monkeypatch)
    meanwhile(4, monkeypatch, copy_it)
    train.train(**flags | dict(eval_interval=2))
    assert list(run.checkpoints(tmp_path / "disk")) == [2, 4, 6] and run.best(tmp_path / "disk").name == "step-0000002"
    assert len(metrics(tmp_path / "disk")) == 9
    os.unlink(tmp_path / "run")
    meanwhile(4, monkeypatch, lambda: shutil.rmtree(tmp_path / "run"))
    assert train.train(**flags | dict(eval_interval=2)).best_step == 4
    with pytest.raises(cli.InputError, match="the run has done its 6 steps"):
        train.train(resume=tmp_path / "run")

def test_runs_that_begin_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    """Also one that is left where another had it, and is found by its new name; and whatever folder is the current."""
    prepared(tmp_path)
    monkeypatch.chdir(tmp_path)
    find_data = prepare.find_data
    monkeypatch.setattr(prepare, "find_data", lambda *args: [os.makedirs("runs/data"), find_data(*args)][1])
    (tmp_path / "elsewhere").mkdir()
    meanwhile(4, monkeypatch, lambda: os.chdir("elsewhere"))
    train.train(data="data", **TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run.newest("runs/data-2").name == "step-0000006"
    shutil.copytree("runs/data-2", "runs/copy", symlinks=True)
    os.rename("runs/data-2", "runs/renamed")
    for name in ("renamed", "copy"):
        done = train.train(resume="auto", run_name=name, data="data", **TINY | dict(num_steps=7))
        assert (done.folder.name, done.step) == (name, 7)

def test_metrics_that_are_edited_under_a_run(tmp_path, monkeypatch):
    def edit():
        path = tmp_path / "run/metrics.jsonl"
        (tmp_path / "edited").write_text("".join(path.read_text().splitlines(True)[1:]))
        os.replace(tmp_path / "edited", path)

    meanwhile(4, monkeypatch, edit)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    assert [line["step"] for line in metrics(tmp_path / "run") if "train_loss" in line] == [2, 3, 4, 5, 6]

def test_a_checkpoint_that_was_moved_to_another_disk(tmp_path):
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    os.rename(tmp_path / "run/step-0000006", tmp_path / "elsewhere")
    (tmp_path / "run/step-0000006").symlink_to(tmp_path / "elsewhere")
    assert run.newest(tmp_path / "run").name == "step-0000006"
    train.train(resume=tmp_path / "run", num_steps=8, keep_checkpoints=1)
    assert (tmp_path / "elsewhere/config.json").is_file()

def test_resuming_after_a_plot(tmp_path, monkeypatch):
    """Of a run that has no checkpoint yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/metrics.jsonl").write_text('{"step": 1, "train_loss": 5.0}\n{"step": 2, "train_loss": 4.0}\n')
    plot.plot("runs/a")
    assert (tmp_path / "runs/a/loss.svg").exists()
    train.train(data=prepared(tmp_path), run_name="a", resume="auto", **TINY)

def test_advice_about_data_that_was_moved_names_the_run(tmp_path, monkeypatch):
    """As its folder has the name of the data: with another --data alone --resume=auto would begin a new one."""
    monkeypatch.chdir(tmp_path)
    os.rename(prepared(tmp_path), "one.v1")
    train.train(data="one.v1", resume="auto", **TINY)
    os.rename("one.v1", "two")
    with pytest.raises(cli.InputError, match="say where it, or its text, is, with --resume=runs/one.v1 --data=PLACE$"):
        train.train(data="one.v1", resume="auto", **TINY | dict(num_steps=7))
    assert train.train(data="two", resume="runs/one.v1", num_steps=7).step == 7

def test_a_run_goes_on_without_its_text(tmp_path, monkeypatch, capsys):
    """Which was prepared; and is not prepared again where its path is written in another way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    (tmp_path / "my.text.txt").write_text("Once upon a time there was a cat, and it ran. " * 200)
    flags = TINY | dict(resume="auto", data="my.text.txt")
    assert train.train(**flags).folder == Path("runs/my.text")
    capsys.readouterr()
    assert train.train(resume="runs/my.text", data=tmp_path / "my.text.txt", num_steps=7).step == 7
    assert "another size or time" not in capsys.readouterr().out and len(list((tmp_path / "data").iterdir())) == 1
    os.remove("my.text.txt")
    assert train.train(**flags | dict(num_steps=8)).folder == Path("runs/my.text")

def test_a_text_that_was_prepared_by_hand_too(tmp_path, monkeypatch, capsys):
    """By other flags: what --data=TEXT takes is said, once."""
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    (tmp_path / "my.txt").write_text("Once upon a time there was a cat, and it ran. " * 200)
    prepare.prepare(input=str(tmp_path / "my.txt"), vocab_size=257)
    for said in (1, 0):
        capsys.readouterr()
        assert prepare.find_data(tmp_path / "my.txt") != tmp_path / "my" == prepare.find_data("my")
        assert capsys.readouterr().out.count(f"--data=my takes what is in {tmp_path}/my\n") == said

def test_sizes_that_a_run_has_may_be_given_again(tmp_path):
    """Also where Config chose them; and a rate, which leaves the lower one as it is."""
    data = prepared(tmp_path)
    first = train.train(data=data, output_dir=tmp_path / "run", lr_max=3e-3, **TINY)
    again = train.train(resume=tmp_path / "run", num_steps=7, d_ff=128, num_kv_heads=2, vocab_size=400, lr_max=3e-3)
    assert again.settings.lr_min == first.settings.lr_min == 3e-3 / 100
    with pytest.raises(cli.InputError, match="--d_ff=64: the run has d_ff 128, which can't change"):
        train.train(resume=tmp_path / "run", num_steps=8, d_ff=64)
    train.train(data=data, output_dir=tmp_path / "next", d_ff=0, **TINY)
    train.train(resume=tmp_path / "next", num_steps=7, d_ff=0)

def test_optimizers_with_numbers_that_are_not_finite(tmp_path):
    """Are refused: the first step would put it into the parameters."""
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    path = tmp_path / "run/latest/training/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + np.float32(math.nan).tobytes())
    with pytest.raises(cli.InputError, match="optimizer.safetensors: .* has numbers that are not finite; take an"):
        train.train(resume=tmp_path / "run", num_steps=7)

@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_damage_is_not_handed_on(tmp_path, name):
    """By a run that goes on, to all of its later checkpoints."""
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    for damaged in ('{"eos', "[]"):
        (tmp_path / "run/latest" / name).write_text(damaged)
        with pytest.raises(cli.InputError, match=f"{name} is damaged .*; take another checkpoint"):
            train.train(resume=tmp_path / "run", num_steps=7)

def test_texts_end_where_they_were_learned_to_end(trained, tmp_path):
    """Where the model says otherwise, as by the defaults of another tool, which name ordinary tokens here."""
    shutil.copytree(trained / "runs/tiny/latest", tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "model" / name).read_text()) | {"bos_token_id": 1, "eos_token_id": 2}
        (tmp_path / "model" / name).write_text(json.dumps(said))
    train.train(init_from=tmp_path / "model", data=trained / "data", output_dir=tmp_path / "run", num_steps=1,
                device="cpu")
    new = tmp_path / "run/latest"
    assert bpe.special_ids(new, bpe.load(new))[1:] == ((256,), [256])
    assert transformers.GenerationConfig.from_pretrained(new).eos_token_id == 256
    assert transformers.AutoConfig.from_pretrained(new).eos_token_id == 256
    for ends, kept in (([5, 300], [256, 300]), (300, [256, 300]), ([300, 256], [300, 256]), (256, 256), (None, 256),
                       ({"a": 1}, 256), ([[1]], 256)):
        others = {"generation_config.json": json.dumps({"eos_token_id": ends, "top_k": 5}).encode()}
        others = checkpoint.ending_as_learned(others, [256, 300], 256, 256)
        said = json.loads(others["generation_config.json"])
        assert said["eos_token_id"] == kept and said["top_k"] == 5
    assert checkpoint.ending_as_learned({}, {256}, 256, 256) == {}
    others = {"config.json": b'{"eos_token_id": 256}', "generation_config.json": b"{}"}  # by which others never end
    others = checkpoint.ending_as_learned(others, [256, 300], 256, 256)
    assert json.loads(others["generation_config.json"])["eos_token_id"] == 256

def test_a_prompt_that_has_its_beginning(trained, monkeypatch):
    """As a chat template makes it, begins once."""
    prompts, generate = [], tinylm.generate
    monkeypatch.setattr(tinylm, "generate", lambda params, prompt, *rest: [
        prompts.append(prompt), generate(params, prompt, *rest)][1])
    for prompt in ("It was", f"{END}It was", END):
        sample.sample(checkpoint=trained / "runs/tiny", prompt=prompt, max_new_tokens=1, device="cpu")
    assert prompts[0].equal(prompts[1]) and prompts[0][0, 0] == 256 and prompts[2].tolist() == [[256]]
    monkeypatch.setattr(bpe, "special_ids", lambda *_: ([256, 65], (256,), [256]))
    for prompt in (END, f"{END}A"):
        sample.sample(checkpoint=trained / "runs/tiny", prompt=prompt, max_new_tokens=1, device="cpu")
    assert [prompt.tolist() for prompt in prompts[3:]] == [[[256, 65, 256]], [[256, 65]]]
    sample.sample(checkpoint=trained / "runs/tiny", prompt=" It \n", max_new_tokens=1, device="cpu")
    assert bpe.decode(bpe.load(trained / "data"), prompts[-1][0].tolist()) == f"{END}A It \n"

def test_tokens_that_end_a_text_are_not_printed(trained, monkeypatch, capsys):
    monkeypatch.setattr(bpe, "special_ids", lambda *_: ([], (256, 65), [256]))
    monkeypatch.setattr(tinylm, "generate", lambda *args: stops.append(args[7]) or map(
        torch.tensor, ([66], [beyond], [65])))
    stops = []
    beyond = bpe.load(trained / "data").vocab_size
    assert sample.sample(checkpoint=trained / "runs/tiny", prompt="It", device="cpu") == ["ItB"]
    assert capsys.readouterr().out == "ItB\n" and stops == [(256, 65)]

def test_a_tokenizer_with_more_tokens_than_its_model(trained, monkeypatch):
    tokenizer = bpe.load(trained / "data")
    monkeypatch.setattr(bpe, "load", lambda path: replace(tokenizer, tokens=[*tokenizer.tokens, b"new"]))
    with pytest.raises(cli.InputError, match="its tokenizer has .* tokens, its model"):
        sample.sample(checkpoint=trained / "runs/tiny", device="cpu")

def test_an_id_of_0_is_kept(tmp_path):
    config = small_config()
    checkpoint.save_checkpoint(tmp_path / "model", random_params(config), config, {}, (END, 1),
                               others={"config.json": b'{"pad_token_id": 0, "eos_token_id": 0}'})
    said = json.loads((tmp_path / "model/config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"]) == (1, 0, 0)

def test_a_run_names_a_tokenizer(trained):
    """Without links too."""
    tokenizer, *ids = prepare.load_tokenizer(trained / "runs/tiny")
    assert bpe.are_same(tokenizer, bpe.load(trained / "runs/tiny/latest")) and ids == [[], 256]
    with pytest.raises(cli.InputError, match=f"{trained}/tokenizer.json is missing"):
        prepare.load_tokenizer(trained)

def test_a_folder_of_texts_for_a_model(trained, tmp_path, monkeypatch, capsys):
    """Is prepared with the model's tokenizer by the command that is told."""
    monkeypatch.setattr(prepare, "DATA", tmp_path / "prepared")
    (tmp_path / "two texts").mkdir()
    for name in "ab":
        (tmp_path / "two texts" / name).write_text(many_stories(20, 1, END))
    (tmp_path / "two texts/c").symlink_to("nothing")
    flags = dict(init_from=trained / "runs/tiny", output_dir=tmp_path / "run", num_steps=1, device="cpu")
    with pytest.raises(cli.InputError, match="make one with data/prepare.py") as refused:
        train.train(data=tmp_path / "two texts", **flags)
    told = shlex.split(re.search(r"data/prepare.py (.*), or use", str(refused.value))[1])
    given = dict(word.removeprefix("--").split("=", 1) for word in told)
    assert given.pop("output") == "NEW"
    prepare.prepare(**given, output=tmp_path / "new")
    assert f"left out, as the link leads to nothing: {tmp_path}/two texts/c" in capsys.readouterr().out
    train.train(data=tmp_path / "new", **flags)

@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_ctrl_c_while_torch_is_imported(trained, program):
    """Ends a command without a traceback, whenever it comes."""
    processes = [command(trained, program, "--help") for _ in range(2)]
    for process, delay in zip(processes, (0.5, 0.3)):
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
    for process in processes:
        _, error = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in error, error

def test_a_run_on_a_cpu_is_not_moved_by_torchrun(trained, tmp_path, monkeypatch, as_rank):
    shutil.copytree(trained / "runs/tiny", tmp_path / "run", symlinks=True)
    as_rank()
    monkeypatch.setattr(machine, "choose_device", lambda device: device or "cuda")
    monkeypatch.setattr(machine, "ranks", lambda device: contextlib.nullcontext((device, 0, 1)))
    with pytest.raises(cli.InputError, match="is one on cpu, and its ranks would be on cuda; give --device=cpu or"):
        train.train(resume=tmp_path / "run", num_steps=50)

def test_advice_about_a_damaged_checkpoint(tmp_path):
    """Is the same, and works, whichever file it is."""
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    resume = lambda: train.train(resume=tmp_path / "run", num_steps=7)
    for file in ("config.json", "tokenizer.json", "training/optimizer.safetensors"):
        path = tmp_path / "run/step-0000006" / file
        content = path.read_bytes()
        for damage in (path.unlink, lambda: path.write_text("x")):
            damage()
            with pytest.raises(cli.InputError, match="goes on from the one before, where the folder of this one is"):
                resume()
            if path.exists() and file == "config.json":
                with pytest.raises(cli.InputError, match="is damaged .*; take another checkpoint"):
                    sample.sample(checkpoint=tmp_path / "run/latest")
        path.write_bytes(content)
    os.rename(tmp_path / "run/step-0000006", tmp_path / "away")
    assert resume().step == 7

@pytest.mark.parametrize("use, said", [(lambda value: value["b"], "KeyError: 'b'"),
                                       (lambda value: value["a"].items(), "AttributeError: .*"),
                                       (lambda value: value["a"] + "x", "TypeError: .*")])
def test_advice_about_json_of_another_kind(tmp_path, use, said):
    (tmp_path / "x.json").write_text('{"a": 1}')
    message = rf"x.json is damaged \({said}\); prepare it again$"
    with pytest.raises(cli.InputError, match=message), files.reading_json(tmp_path / "x.json", "prepare it again") as x:
        use(x)

def test_checkpoints_that_are_no_run(tmp_path, monkeypatch):
    """Advice about one in a run, and about one alone, works."""
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    shutil.copytree(tmp_path / "run/step-0000006", tmp_path / "alone/copy")
    monkeypatch.chdir(tmp_path / "run/step-0000006")
    with pytest.raises(cli.InputError, match=f"give the run's folder, --resume={tmp_path}/run$"):
        train.train(resume=".", num_steps=7)
    (tmp_path / "run/latest").unlink(), (tmp_path / "run/latest").symlink_to("gone")
    for flags in (dict(num_steps=7), dict(eval_only=True)):
        with pytest.raises(cli.InputError, match=f"give the run's folder, --resume={tmp_path}/run$"):
            train.train(resume=tmp_path / "run/latest", **flags)
    with pytest.raises(cli.InputError, match="it is one itself: put it, named step-NUMBER, into a folder of its own"):
        train.train(resume=tmp_path / "alone/copy", num_steps=7)
    os.rename(tmp_path / "alone/copy", tmp_path / "alone/step-0000006")
    assert train.train(resume=tmp_path / "alone", num_steps=7).step == 7

def test_the_best_is_always_there(tmp_path, monkeypatch):
    """Where nothing was evaluated yet it is the latest, also once another part of the text is to be measured."""
    def save(*args):
        problem = genuine(*args)
        links.append([(tmp_path / "run" / name).resolve().name for name in ("latest", "best")])
        assert all((tmp_path / "run" / name / "config.json").exists() for name in ("latest", "best"))
        return problem

    links, genuine = [], train.try_to_save
    monkeypatch.setattr(train, "try_to_save", save)
    flags = dict(checkpoint_interval=2, eval_interval=100)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | flags)
    train.train(resume=tmp_path / "run", num_steps=12, eval_tokens=64)
    assert len(links) == 6 and all(latest == best for latest, best in links)

def test_a_run_is_told_apart_from_its_checkpoints(tmp_path):
    """The last of them is advised by its number, and where a tokenizer is asked for one that has it."""
    for step in ("9999999", "10000000", "9999998-mine", "10000000.partial"):
        (tmp_path / f"run/step-{step}").mkdir(parents=True)
    with pytest.raises(cli.InputError, match=r"run is not a checkpoint .*; give .*/run/step-10000000$"):
        checkpoint.load_checkpoint(tmp_path / "run")
    with pytest.raises(cli.InputError, match=r"tokenizer.json is missing; give .*/run/step-10000000$"):
        bpe.load(tmp_path / "run")
    for name, advice in (("nothing", "expected a folder that"), ("config.json", "give the model as --init_from=")):
        (tmp_path / "run" / name).write_text("{}")
        with pytest.raises(cli.InputError, match=f"no checkpoint of a run there; {advice}"):
            train.train(eval_only=True, resume=tmp_path / "run")

def test_the_best_outlives_an_eval_tokens_that_changes_nothing(tmp_path):
    """As the validation split ends before."""
    flags = dict(data=prepared(tmp_path), output_dir=tmp_path / "run", eval_interval=2, lr_max=0.0)
    whole = len(prepare.open_data(flags["data"])[1]["val"]) - 1  # targets
    train.train(**TINY | flags | dict(eval_tokens=whole))
    assert train.train(resume=tmp_path / "run", num_steps=8, eval_tokens=whole + 1).best_step == 2
    assert train.train(resume=tmp_path / "run", num_steps=10, eval_tokens=100).best_step == 10

@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_metrics_are_json_of_ruined_models_too(tmp_path, monkeypatch, number):
    """NaN is no JSON, nor is Infinity."""
    monkeypatch.setattr(train, "evaluate", lambda *_: number)
    ruined = train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    lines = (ruined.folder / "metrics.jsonl").read_text().splitlines()
    measured = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [line["val_bits_per_byte"] for line in measured if "val_loss" in line] == [None, None]
    lines += ['{"step": 6, "train_loss": null}']  # as of a fork
    (ruined.folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    monkeypatch.undo()
    train.train(resume=ruined.folder, num_steps=7)
    assert (ruined.folder / "metrics.jsonl").read_text().splitlines()[:len(lines)] == lines
    plot.plot(ruined.folder)

def test_old_checkpoints_are_put_aside_before_they_are_removed(tmp_path, monkeypatch):
    """So that one of which a kill has left a part is removed by the next process."""
    removed, genuine = [], files.remove
    monkeypatch.setattr(files, "remove", lambda path: (removed.append(path.exists() and path.name), genuine(path)))
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run",
                **TINY | dict(keep_checkpoints=1, checkpoint_interval=1, eval_interval=6))
    assert ".step-0000004.partial" in removed and not [name for name in removed if str(name).startswith("step-")]

def test_old_checkpoints_that_cannot_be_removed(tmp_path, monkeypatch, capsys):
    """As where they are read on Windows, or have names of the user's, cost no new one."""
    def replace(source, target):
        if Path(target).name.startswith(".step-") and tries.pop():
            raise PermissionError(13, "in use")
        genuine(source, target)

    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    os.rename(tmp_path / "run/step-0000006", tmp_path / "run/step-6")
    genuine, tries = os.replace, [False] * 9 + [True]
    flags = dict(keep_checkpoints=1, checkpoint_interval=1, eval_interval=100)
    monkeypatch.setattr(os, "replace", replace)
    train.train(resume=tmp_path / "run", num_steps=10, eval_tokens=64, **flags)
    assert "step-0000003 can't be removed (in use); it is tried again at" in capsys.readouterr().out
    assert len(tries) < 9 and [*run.checkpoints(tmp_path / "run")] == [10]

def test_what_replaces_a_file_is_on_the_disk_first(tmp_path, monkeypatch):
    """Metrics, and what is downloaded."""
    events, flush, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("flush"), flush(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), rename(*paths)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    run.keep_metrics(tmp_path / "metrics.jsonl", 1)
    assert events == ["flush", "replace"] and (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'

    class Response(io.BytesIO):
        status = 200

        def read(self, size):
            if not tried.pop():
                raise ssl.SSLEOFError("EOF occurred in violation of protocol")
            return super().read(size)

    tried = [True, True, False]  # of the first attempt nothing comes
    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda *_, **__: Response(b"text"))
    prepare.download("https://none", tmp_path / "kept/t.txt", 4, pause=0)
    assert events[-2:] == ["flush", "replace"] and (tmp_path / "kept/t.txt").read_bytes() == b"text"

@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no names of open files")
def test_all_that_is_kept_is_flushed(tmp_path, monkeypatch):
    """Before it has its name; and the names too."""
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: [flushed.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)])
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | dict(num_steps=1))
    gguf.export(str(tmp_path / "run"), output=str(tmp_path / "m.gguf"))
    flushed = {str(Path(path).relative_to(tmp_path)) for path in flushed}
    expected = {"data", "run", ".m.gguf.partial"}
    expected |= {f"data/.partial/{name}" for name in ("train.bin", "val.bin", "tokenizer.json", ".meta.json.partial")}
    expected |= {f"run/.step-0000001.partial/{path.relative_to(tmp_path / 'run/latest')}"
                 for path in (tmp_path / "run/latest").rglob("*")}
    assert expected <= flushed, expected - flushed

def test_disks_that_lack_a_function(tmp_path, monkeypatch):
    """They may not flush, or not say what is free; what a disk that can flush refuses names the file."""
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(shutil, "disk_usage", fail)
    for number in (errno.EINVAL, errno.ENOSYS):
        files.write_json(tmp_path / "a.json", 1)
        files.check_room(tmp_path, 1e30, "this needs", "that")
    number = errno.EIO
    with pytest.raises(OSError) as error:
        files.write_json(tmp_path / "a.json", 1)
    assert error.value.filename == str(tmp_path / "a.json")

def test_a_wandb_that_is_broken_is_told(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "wandb":
                raise AttributeError("module 'numpy' has no attribute\n'float_'")

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(cli.InputError, match="^--use_wandb: wandb can't be imported .*'float_'.*install it anew"):
        log.import_wandb()

def test_advice_about_wandb_is_not_what_was_followed(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert "set WANDB_MODE=offline" in str(log.wandb_error(OSError("no")))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "leave out --use_wandb" in str(log.wandb_error(OSError("no")))

@pytest.mark.parametrize("is_rank, written", [(True, "now\n"), (False, "now\nlater\n")])
def test_ranks_end_at_once(is_rank, written):
    """So that no thread of gloo is there as Python ends, with the code and all output that they would have."""
    program = """if True:
        import atexit
        import sys
        from data import machine
        atexit.register(print, "later")
        with machine.leaving_gloo():
            print("now")
            sys.exit(5)
        """
    environment = os.environ | (variables_of_rank() if is_rank else {})
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.stdout, done.returncode) == (written, 5), done.stderr

def test_stories_are_the_same_on_windows(tmp_path, monkeypatch):
    import _pyio
    monkeypatch.setattr(os, "linesep", "\r\n")
    monkeypatch.setattr(prepare, "open", _pyio.open, raising=False)
    monkeypatch.setattr(prepare, "NUM_STORIES", {"train.txt": 2, "val.txt": 1})
    for path in prepare.write_stories(tmp_path):
        assert b"\n" in path.read_bytes() and b"\r" not in path.read_bytes()

def test_mistakes_in_code_are_no_damage(tmp_path, monkeypatch):
    """To resume does not hide them. And files of data are closed whatever ends a run."""
    def fail(*_, **__):
        raise KeyError("oops")

    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    opened, genuine = [], prepare.open_data

    def open_data(folder):
        opened.append(genuine(folder))
        return opened[-1]

    monkeypatch.setattr(prepare, "open_data", open_data)
    for broken in ("check_forms", "accumulate_gradients"):
        with monkeypatch.context() as patch, pytest.raises(KeyError, match="oops"):
            patch.setattr(train, broken, fail)
            train.train(resume=tmp_path / "run", num_steps=7)
    assert all(ids.file.closed for ids in opened[-1][1].values())

def test_a_run_begun_again(tmp_path):
    """What one left before its first checkpoint is in no way, and none of its numbers stay. Its time counts on."""
    (tmp_path / "run/wandb").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0, "val_loss": 5.0}\n{"step": 1, "train_loss": 5.0}\n')
    (tmp_path / "run/.metrics.jsonl.partial").touch()
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 3, 4, 5, 6, 6]
    again = train.train(resume=tmp_path / "run", num_steps=7, lr_max=1e-3, lr_min=1e-4)
    assert again.settings.lr_min == 1e-4
    path = tmp_path / "run/latest/training/train_state.json"
    path.write_text(re.sub(r'"seconds": [\d.]+', '"seconds": 1000.0', path.read_text()))
    train.train(resume=tmp_path / "run", num_steps=8)
    assert metrics(tmp_path / "run")[-1]["seconds"] >= 1000

def test_a_link_left_in_part(tmp_path):
    """Of a run that was killed as it renamed it."""
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    (tmp_path / "run/.latest.partial").symlink_to("step-0000006")
    train.train(resume=tmp_path / "run", num_steps=7)
    assert (tmp_path / "run/latest").resolve().name == "step-0000007"
    assert (tmp_path / "run/step-0000006").is_dir() and not (tmp_path / "run/.latest.partial").is_symlink()

def test_a_folder_of_other_things_is_no_run(tmp_path, capsys):
    """And one of a run is named as a shell takes it."""
    (tmp_path / "run/best").mkdir(parents=True)
    with pytest.raises(cli.InputError, match="run is not empty; choose another --output_dir"):
        train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", resume="auto", **TINY)
    train.train(data=tmp_path / "data", output_dir=tmp_path / "my run", **TINY)
    assert f"--checkpoint='{tmp_path}/my run'" in capsys.readouterr().out
    with pytest.raises(cli.InputError, match=f"go on with --resume='{tmp_path}/my run', or choose another"):
        train.train(data=tmp_path / "data", output_dir=tmp_path / "my run", **TINY)

def test_auto_begins_where_it_looks_again(tmp_path, monkeypatch):
    """Also where a run has left its folder without a checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("runs/data").mkdir(parents=True)
    assert train.train(data=prepared(tmp_path), resume="auto", **TINY).folder == Path("runs/data")

def test_a_run_whose_links_were_followed_by_a_copy(tmp_path):
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert (tmp_path / "copy/latest").is_dir() and not (tmp_path / "copy/latest").is_symlink()
    train.train(resume=tmp_path / "copy", num_steps=9)
    assert run.newest(tmp_path / "copy").name == "step-0000009" == (tmp_path / "copy/latest").resolve().name
    shutil.copytree(tmp_path / "run/latest", tmp_path / "alone/latest")
    train.train(resume=tmp_path / "alone", num_steps=8)
    assert run.newest(tmp_path / "alone").name == "step-0000008"

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_metrics_on_a_full_disk(tmp_path, monkeypatch, capsys):
    full = lambda path, mode, buffering: open("/dev/full", mode, buffering=buffering)
    monkeypatch.setattr(log, "open", full, raising=False)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "metrics.jsonl could not be written" in error and "No space left" in error
    assert run.newest(tmp_path / "run").name == "step-0000006"

def test_lines_behind_one_that_was_cut(tmp_path, monkeypatch):
    """By a full disk; they are whole."""
    one = log.Log.__new__(log.Log)
    one.run, one.cut = types.SimpleNamespace(folder=tmp_path), True
    monkeypatch.setattr(log, "own_folder", lambda run: tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tr')
    one.keep('{"step": 2}'), one.keep('{"step": 3}')
    assert list(files.json_lines(tmp_path / "metrics.jsonl")) == [{"step": 2}, {"step": 3}]

def test_a_terminal_that_is_not_utf8(trained, tmp_path):
    """What it can't show is replaced, and nothing ends for it."""
    (tmp_path / "naïve 🦊.txt").write_text("some text 🦊, and more\n" * 50, encoding="utf-8")
    commands = {"it writes:": ["train.py", "--data=data", f"--output_dir={tmp_path}/run", *tiny_flags()],
                "na": ["sample.py", "--prompt=naïve 🦊", "--max_new_tokens=3"], "4e-3": ["train.py", "--help"],
                "val.bin": ["data/prepare.py", f"--input={tmp_path}/naïve 🦊.txt", f"--output={tmp_path}/é🦊"]}
    processes = [command(trained, *arguments, PYTHONIOENCODING="ascii") for arguments in commands.values()]
    processes.append(command(trained, *commands["na"], PYTHONIOENCODING="cp1252"))
    for shown, process in zip([*commands, "na"], processes, strict=True):
        out, error = process.communicate(timeout=180)
        assert process.returncode == 0 and shown in out and "Traceback" not in error, error
    assert run.newest(tmp_path / "run").name == "step-0000006"

@pytest.mark.parametrize("arguments", [["train.py", "--data=data", *tiny_flags(num_steps=40, eval_interval=20)],
                                       ["sample.py", "--max_new_tokens=300", "--top_p=1"],
                                       ["data/prepare.py", "--help"]], ids=["train", "sample", "help"])
def test_a_reader_that_is_gone(trained, tmp_path, arguments):
    """As behind `| head -1`: a run goes on to its end and saves, a writer stops, and nobody complains."""
    output = [f"--output_dir={tmp_path}/run"] if "--data=data" in arguments else []
    process = command(trained, *arguments, *output)
    if "--help" not in arguments:  # which is written at once
        process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 0 and "Traceback" not in error and "Broken pipe" not in error, error
    assert not output or run.newest(tmp_path / "run").name == "step-0000040"

def test_files_that_are_locked_are_no_data(tmp_path):
    """A folder whose preparing was killed, at any moment, is no data and no obstacle."""
    data = prepared(tmp_path)
    (data / "meta.json").unlink()
    (data / ".partial").mkdir()
    with pytest.raises(cli.InputError, match="has not ended in .*data; wait for it, or if it was cut short give"):
        train.train(data=data, output_dir=tmp_path / "run", **TINY)

def test_a_run_goes_on_with_its_own_data_wherever_that_is(tmp_path, monkeypatch, capsys):
    """Not with other data of the same vocabulary; and the folder of the right data may be another than it was."""
    monkeypatch.chdir(tmp_path)
    text = many_stories(40, end=END)
    prepared(tmp_path / "a", text, vocab_size=257)
    train.train(data="a/data", output_dir="run", **TINY)
    for other, change in ((text.replace("the", "eht"), "as many tokens, but others"),
                          (text * 2, "tokens, not")):
        prepared(tmp_path / "b", other, vocab_size=257)
        with pytest.raises(cli.InputError, match=f"b/data has other .*: train.bin has .*{change}.*--init_from=run"):
            train.train(resume="run", data="b/data", num_steps=9)
    monkeypatch.chdir(tmp_path / "b")
    train.train(resume="../run", num_steps=9)
    train.train(resume="../run", eval_only=True)
    os.rename(tmp_path / "a", tmp_path / "c")
    for flags in (dict(eval_only=True), dict(num_steps=12)):
        message = "a/data any more; say where it, or its text, is, with --resume=.* --data=PLACE"
        with pytest.raises(cli.InputError, match=message):
            train.train(resume="../run", **flags)
        train.train(resume="../run", data="../c/data", **flags)
    train.train(resume="../run", num_steps=15)  # it is known from then on
    capsys.readouterr()
    damage(tmp_path / "c/data", "train.bin", lambda content: content[2:4] + content[:2] + content[4:])
    with pytest.raises(cli.InputError, match="train.bin is not what was written"):
        train.train(resume="../run", num_steps=18)

def test_bits_per_byte_of_a_file_are_those_of_a_split(tmp_path, capsys):
    """Special tokens are no text in either."""
    text = "".join(f"{word}.{END}" for word in ["yes", "no", "who", "why", "here"] * 300)
    data = prepared(tmp_path, text)
    train.train(data=data, output_dir=tmp_path / "run", **TINY)
    (tmp_path / "val.txt").write_text(text[int(len(text) * 0.9):].partition(END)[2])
    bits = []
    for name in ("data", "val.txt"):
        capsys.readouterr()
        train.train(eval_only=True, resume=tmp_path / "run", data=tmp_path / name)
        bits.append(float(re.search(r"([\d.]+) bits per byte", capsys.readouterr().out)[1]))
    assert bits[0] == pytest.approx(bits[1], rel=0.01)

def test_tokenizers_are_compared_by_what_they_mean(tmp_path):
    """A model and data of two vocabularies of one size are refused; one that another tool has written again is not."""
    data = prepared(tmp_path / "a"), prepared(tmp_path / "b", "".join(stories.story(9, i)[::-1] for i in range(150)))
    train.train(data=data[0], output_dir=tmp_path / "run", **TINY)
    model = tmp_path / "model"
    transformers.AutoTokenizer.from_pretrained(tmp_path / "run/latest").save_pretrained(model)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/latest").save_pretrained(model)
    assert (model / "tokenizer.json").read_bytes() != (data[0] / "tokenizer.json").read_bytes()
    train.train(eval_only=True, init_from=model, data=data[0])
    flags = dict(num_steps=2, device="cpu", output_dir=tmp_path / "next")
    for mistaken in (dict(flags), dict(eval_only=True)):
        with pytest.raises(cli.InputError, match=f"another tokenizer .*--tokenizer={model}"):
            train.train(init_from=model, data=data[1], **mistaken)
    assert not (tmp_path / "next").exists()
    prepare.prepare(input=str(tmp_path / "b/corpus.txt"), output=str(tmp_path / "d"), tokenizer=str(model))
    train.train(init_from=model, data=tmp_path / "d", **flags)

def test_added_tokens_that_are_text(tokenizer_file, tmp_path):
    """Runs of blanks, as other tokenizers have them: their bytes count, and what is decoded keeps them."""
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    theirs.add_tokens([tokenizers.AddedToken("    ", special=False, normalized=False), "<think>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    text = "def f(x):\n    <think>\n        return x\n" * 40 + END
    data = prepared(tmp_path, text * 4, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=None, val_fraction=0.5)
    meta, ids = prepare.open_data(data)
    assert sum(meta[split]["bytes"] for split in ids) == 4 * len(text.removesuffix(END))
    assert prepare.text_sizes(replace(bpe.load(data), text_tokens={END, "<think>"}), [], 256)[256] == 0
    train.train(data=data, output_dir=tmp_path / "run", **TINY)
    for file in (data / "tokenizer.json", tmp_path / "run/latest/tokenizer.json"):
        again = tokenizers.Tokenizer.from_file(str(file))
        assert again.decode(again.encode(text).ids, skip_special_tokens=True) == text.removesuffix(END)
    gguf.export(str(tmp_path / "run"), output=str(tmp_path / "m.gguf"))
    said = said_in(tmp_path / "m.gguf")
    kind = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]))
    assert (kind["    "], kind["<think>"], kind[END], kind["a"]) == (4, 4, 3, 1)

def test_what_is_no_plain_file_is_not_read(saved):
    """As a device, which may never end."""
    folder = saved()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(os.devnull)
    for read in (bpe.load, lambda folder: files.read_json(folder / "tokenizer.json")):
        with pytest.raises(cli.InputError, match="no plain file"):
            read(folder)

def test_no_link_is_written_through(tmp_path, trained):
    """Of those that a folder from elsewhere may have where a lock or a file half written will be."""
    (tmp_path / "precious").write_text("precious")
    run_folder, data = tmp_path / "run", prepared(tmp_path)
    shutil.copytree(trained / "runs/tiny", run_folder, symlinks=True)
    for link in (run_folder / ".loss.svg.partial", run_folder / "lock", data / ".lock"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "precious")
    plot.plot(run_folder)
    assert (run_folder / "loss.svg").read_text().startswith("<svg") and not (run_folder / "loss.svg").is_symlink()
    for command in (lambda: train.train(resume=run_folder, num_steps=99), lambda: prepared(tmp_path)):
        with pytest.raises(cli.InputError, match="lock is a link"):
            command()
    assert (tmp_path / "precious").read_text() == "precious"

def test_adapters_alone_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(cli.InputError, match="no config.json in it.; an adapter is merged"):
        checkpoint.load_checkpoint(tmp_path)

def test_control_characters_of_names(capsys):
    """Are spelled for a terminal, and in a command to be pasted as a shell spells them."""
    name = "a\x1b[2J'\\b\x01\x7f\x9b"
    cli.say(name), cli.fail(name)
    spelled = "a\\u001b[2J'\\b\\u0001\\u007f\\u009b\n"
    assert tuple(capsys.readouterr()) == (spelled, spelled)
    command = f"printf %s {cli.visible(cli.quoted(name))}"
    said = subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ | dict(LC_ALL="C.UTF-8")).stdout
    assert said.decode() == name and cli.quoted("it's") == shlex.quote("it's")

def test_added_tokens_that_others_look_for_first(tokenizer_file, tmp_path):
    """Those that are not normalized, before others that overlap with them; where none do, ids are the same."""
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    theirs.add_tokens([tokenizers.AddedToken("<arg>", normalized=False)])
    theirs.add_tokens([tokenizers.AddedToken(text, normalized=True) for text in ("<a>", "<a")])
    theirs.save(str(tmp_path / "tokenizer.json"))
    text = "x<a><arg>y<arg<a>"
    assert bpe.encode(bpe.load(tmp_path), text).tolist() == theirs.encode(text, add_special_tokens=False).ids
    for overlapping in ("<call><arg>", "x<a"):
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        theirs.add_tokens([tokenizers.AddedToken(overlapping, normalized=True)])
        theirs.save(str(tmp_path / "other.json"))
        with pytest.raises(cli.InputError, match=f"its token {overlapping} overlaps with <arg>"):
            bpe.load(tmp_path / "other.json")

def test_tokenizers_that_differ_have_data_of_their_own(tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    (tmp_path / "t.txt").write_text("a text")
    description, names = json.loads(Path(tokenizer_file).read_text()), set()
    for change in ({}, {"ignore_merges": True}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(description | {"model": description["model"] | change}))
        names.add(prepare.made_of(tmp_path / "t.txt", tmp_path / "tokenizer.json"))
    description["added_tokens"] += [{"id": description["model"]["vocab"]["a"], "content": "a", "special": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    assert len(names | {prepare.made_of(tmp_path / "t.txt", tmp_path / "tokenizer.json")}) == 3

def test_what_is_no_text(trained, tmp_path, capsys):
    """Prepared data and models in a folder of texts, or instead of one, and files with zero bytes."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("Once upon a time.\n" * 100)
    (tmp_path / "texts/meta.json").write_text("{}")  # of others
    plain = prepare.text_files(tmp_path / "texts", tmp_path / "out")
    shutil.copytree(trained / "data", tmp_path / "texts/data")
    shutil.copytree(trained / "runs/tiny/latest", tmp_path / "texts/model")
    capsys.readouterr()
    assert prepare.text_files(tmp_path / "texts", tmp_path / "out") == plain
    assert plain == [tmp_path / "texts/a.txt", tmp_path / "texts/meta.json"]
    said = capsys.readouterr().out
    assert said.count("left out, as prepared data or a model is in it:") == 2 and f"{tmp_path}/texts/model\n" in said
    for folder in ("data", "model"):
        with pytest.raises(cli.InputError, match=f"texts/{folder} has prepared data or a model in it; expected a text"):
            prepare.prepare(input=str(tmp_path / "texts" / folder), output=str(tmp_path / "out"))
    (tmp_path / "wide.txt").write_bytes("Once upon a time.\n".encode("utf-16-le") * 100)
    with pytest.raises(cli.InputError, match="wide.txt has a zero byte near its start.*save it as UTF-8"):
        prepare.prepare(input=str(tmp_path / "wide.txt"), output=str(tmp_path / "out"))
    with pytest.raises(cli.InputError, match="wide.txt has a zero byte near its start.*save it as UTF-8"):
        train.train(eval_only=True, resume=trained / "runs/tiny", data=tmp_path / "wide.txt")
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
def test_special_tokens_with_options_are_refused(tokenizer_file, tmp_path, option):
    description = json.loads(Path(tokenizer_file).read_text())
    description["added_tokens"][0][option] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(cli.InputError, match=f"endoftext.* asks for {option}"):
        bpe.load(tmp_path / "tokenizer.json")

def test_a_validation_text_without_text(tmp_path):
    (tmp_path / "val.txt").write_text(END * 20)
    with pytest.raises(cli.InputError, match="the part for val.bin has nothing but special tokens"):
        prepared(tmp_path, val_input=str(tmp_path / "val.txt"))
    assert not (tmp_path / "data").exists()
    data = prepared(tmp_path)
    damage(data, "meta.json", lambda content: re.sub(rb'("val": {[^}]*"bytes": )\d+', rb"\g<1>0", content))
    with pytest.raises(cli.InputError, match="val.bin has no text"):
        train.train(data=data, output_dir=tmp_path / "run", **TINY)

def test_init_from_takes_a_smaller_context(tmp_path):
    """As the advice about a text that is too short says."""
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | dict(context_length=64))
    flags = dict(init_from=tmp_path / "run/latest", output_dir=tmp_path / "next", num_steps=2, device="cpu")
    tokenizer = dict(tokenizer=str(tmp_path / "run/latest"), vocab_size=None, val_fraction=0.5)
    data = prepared(tmp_path, "Once upon a time there was a cat. " * 6, **tokenizer)
    with pytest.raises(cli.InputError, match="smaller context_length"):
        train.train(data=data, **flags)
    with pytest.raises(cli.InputError, match="--context_length=128.* has context_length 64.*or give a smaller one"):
        train.train(data=data, context_length=128, **flags)
    train.train(data=data, context_length=16, **flags)
    assert checkpoint.load_checkpoint(tmp_path / "next/latest")[1].context_length == 16

def test_a_learning_rate_far_below_goes_on_too(tmp_path):
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    train.train(resume=tmp_path / "run", lr_max=1e-5, num_steps=8)
    assert metrics(tmp_path / "run")[-2]["lr"] <= 1e-5

def test_float16_that_cannot_hold_a_model(saved):
    params = tinylm.init_params(small_config(), generator())
    params["final_norm"] *= 1e5
    with pytest.raises(cli.InputError, match="not finite in float16; .*--save_dtype=bfloat16"):
        saved(params, dtype=torch.float16)

@pytest.mark.parametrize("interval, older", [(3, "step-0000003"), (6, None)])
def test_a_checkpoint_after_which_no_step_is_finite_is_not_advised(tmp_path, monkeypatch, interval, older):
    poisoned(monkeypatch, range(6, 20))
    with pytest.raises(log.Diverged) as error:
        train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", checkpoint_interval=interval,
                    **TINY | dict(num_steps=20))
    advice = re.search(r"; (?:remove (\S+), after .*, and go on from (\S+) with .*, or )?start anew", str(error.value))
    assert advice.groups() == (str(tmp_path / "run/step-0000006") if older else None, older)

def test_numbers_that_are_not_finite_are_never_saved(tmp_path, capsys):
    """A step may take finite gradients to parameters that are none."""
    flags = TINY | dict(checkpoint_interval=1, num_steps=20, lr_max=1e39, lr_min=1.0)
    with pytest.raises(log.Diverged):
        train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **flags)
    error = capsys.readouterr().err
    assert "checkpoint of step 1 could not be saved" in error and "numbers that are not finite" in error
    assert run.newest(tmp_path / "run") is None and not list((tmp_path / "run").glob("*.partial"))
    train.train(data=tmp_path / "data", output_dir=tmp_path / "run", **TINY)  # nothing is there to be lost

def test_wandb_that_cannot_be_used_is_said_before_the_work(tmp_path):
    """Without a key; and the advice works. No file is made."""
    prepared(tmp_path)
    arguments = ["train.py", "--data=data", "--use_wandb", *tiny_flags()]
    unknown = dict(HOME=str(tmp_path), WANDB_API_KEY="", WANDB_MODE="online", NETRC=str(tmp_path / "none"))
    process = command(tmp_path, *arguments, **unknown)
    out, error = process.communicate(timeout=180)
    assert process.returncode == 2 and "WANDB_MODE=offline" in error and "Traceback" not in error, error
    assert len(error.splitlines()) == 1 and not (tmp_path / "runs").exists()
    process = command(tmp_path, *arguments, **unknown | dict(WANDB_MODE="offline"))
    out, error = process.communicate(timeout=180)
    assert process.returncode == 0 and list((tmp_path / "runs/data/wandb").glob("offline-run-*")), error

def test_wandb_gets_the_last_samples(tmp_path, monkeypatch):
    """Of the runs before too, but no more than some, as its table is sent whole each time."""
    tables, one = [], train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY | dict(sample_tokens=2))
    monkeypatch.setattr(log, "SAMPLES", 3)
    monkeypatch.setattr(log, "introduce", lambda run: None)
    monkeypatch.setattr(log, "own_folder", lambda run: run.folder)
    again = log.Log(one)
    again.wandb = types.SimpleNamespace(Table=lambda columns, rows: tables.append([step for step, _ in rows]))
    again.wandb_run = types.SimpleNamespace(log=lambda *_, **__: None)
    for step in (7, 8):
        again.write(step, val_loss=1.0, sample="text")
    assert tables == [[3, 6, 7], [6, 7, 8]]

def test_wandb_hears_how_a_run_ended():
    codes, one = [], log.Log.__new__(log.Log)
    one.screen, one.wandb = cli.Progress("x"), True
    one.wandb_run = types.SimpleNamespace(finish=lambda exit_code: codes.append(exit_code))
    one.__exit__(None), one.__exit__(KeyError)
    assert codes == [0, 1]

def test_wandb_goes_on_with_the_run_that_it_has(tmp_path, monkeypatch):
    """Which it would begin anew by its id alone."""
    asked, one = [], train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    one.settings.use_wandb, one.wandb_id = True, "abc"
    monkeypatch.setattr(log, "introduce", lambda run: None)
    monkeypatch.setattr(log, "import_wandb", lambda: types.SimpleNamespace(
        init=lambda **flags: asked.append(flags) or types.SimpleNamespace(id="abc")))
    log.Log(one)
    assert asked[0]["id"] == "abc" and asked[0]["resume"] == "allow"

def test_wandb_histograms_of_a_step_that_is_not_applied():
    """Have no numbers that W&B could count; it is not given up for that."""
    sent, one = [], log.Log.__new__(log.Log)
    one.wandb, one.settings = log.import_wandb(), types.SimpleNamespace(wandb_histograms=True)
    one.wandb_run = types.SimpleNamespace(log=lambda values, step: sent.append(step))
    for step, (one.bad_steps, number) in enumerate([(0, 1.0), (1, math.nan), (0, 2.0)]):
        one.histograms(step, grads={"w": torch.tensor([1.0, number])})
    assert one.wandb and sent == [0, 2]

def test_wandb_that_is_lost_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb, genuine = log.import_wandb(), log.Log.evaluation

    def lose(self, *arguments):
        def fail(*_, **__):
            raise ConnectionError("the network is gone")
        monkeypatch.setattr(self.wandb_run, "log", fail)
        genuine(self, *arguments)

    monkeypatch.setattr(log.Log, "evaluation", lose)
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", use_wandb=True, **TINY)
    wandb.finish()
    assert capsys.readouterr().err.count("W&B has failed (the network is gone); the run goes on") == 1
    assert run.newest(tmp_path / "run").name == "step-0000006"

WITHOUT_POSIX = """if True:
    import builtins, os, sys
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None
    for name in ("sched_getaffinity", "O_DIRECTORY", "O_NOFOLLOW", "fork", "mkfifo", "getuid"):
        delattr(os, name)
    genuine_open, genuine_replace = os.open, os.replace
    def open_no_folder(path, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return genuine_open(path, *arguments, **options)
    def replace_nothing_open(source, target):
        here = os.path.realpath(target)
        if any(os.path.realpath(f"/proc/self/fd/{fd}") == here for fd in os.listdir("/proc/self/fd")):
            raise PermissionError(13, "it is open", str(target))
        genuine_replace(source, target)
    def no_links(*arguments, **options):
        raise OSError(1314, "A required privilege is not held by the client")
    os.open, os.symlink, os.replace = open_no_folder, no_links, replace_nothing_open
    import multiprocessing
    multiprocessing.set_start_method("spawn")
    sys.argv = sys.argv[1:]
    import runpy
    if __name__ == "__main__":
        runpy.run_path(sys.argv[0], run_name="__main__")
    """

def test_without_what_other_systems_lack(tmp_path):
    """As on Windows: no POSIX modules, no links, no folder that can be opened, nothing open replaced, cp1252."""
    (tmp_path / "text.txt").write_text("naïve 🦊, and more\n" * 500, encoding="utf-8")
    (tmp_path / "without.py").write_text(WITHOUT_POSIX)
    prepare_again = "data/prepare.py --input=text.txt --output=data --vocab_size=300"
    begin = " ".join(["train.py --data=data --output_dir=run", *tiny_flags()])
    for commands in ([f"{prepare_again} --workers=2"], [begin], ["train.py --resume=run --num_steps=9"],
                     ["train.py --resume=run --eval_only --device=cpu", "train.py plot run --output=loss.svg",
                      "sample.py --checkpoint=run --max_new_tokens=5 --device=cpu"], [prepare_again]):
        processes = [subprocess.Popen(
            [sys.executable, "-X", "warn_default_encoding", tmp_path / "without.py", ROOT / line.split()[0],
             *line.split()[1:]], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="cp1252",
            env=os.environ | dict(PYTHONUTF8="0", PYTHONIOENCODING="cp1252", LC_ALL="C", PYTHONPATH=str(ROOT)))
            for line in commands]  # at the same time
        for process in processes:
            _, error = process.communicate(timeout=180)
            assert process.returncode == 0 and "Traceback" not in error, error
            assert not [line for line in error.splitlines() if "EncodingWarning" in line and str(ROOT) in line]
    assert run.newest(tmp_path / "run").name == "step-0000009"

def test_older_versions_of_glibc_keep_freed_memory(monkeypatch):
    """They refuse a limit of over 32 MB, and by the other setting stop raising it themselves."""
    taken = {}
    mallopt = lambda name, value: [taken.update({name: value}), 1][-1] if name == -1 or value <= 1 << 25 else 0
    monkeypatch.setattr(data.ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(sys, "platform", "linux")
    data.keep_freed_memory()
    assert taken == {-3: 1 << 25, -1: 2**31 - 1}

def test_gpus_that_cannot_be_used_are_named(monkeypatch, as_rank):
    """An old driver, of which torch only warns; a GPU that this build of torch has no code for."""
    def old_driver():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old\n(found version 11040).")
        return False

    machine.count_devices.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    for device in ("", "cuda"):
        with pytest.raises(cli.InputError, match=r"driver on your system is too old \(found .*--device=cpu"):
            machine.choose_device(device)
    assert machine.choose_device("cpu") == "cpu"
    machine.count_devices.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_100", "compute_120"])
    for capability, fits in (((7, 0), False), ((7, 5), True), ((8, 9), True), ((9, 0), True), ((10, 3), True),
                             ((11, 0), False), ((12, 1), True), ((13, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
        if fits:
            assert machine.choose_device("") == "cuda"
        else:
            with pytest.raises(cli.InputError, match="Tesla V100 has compute capability .* no code .*--device=cpu"):
                machine.choose_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for number, speaks in ((1, True), (2, False)):
        as_rank(number, 3, "::1")
        message = "3 ranks on this machine, .* of which it has 1; .*--nproc_per_node=1$"
        with pytest.raises(cli.InputError, match=message) as mistake:
            machine.join_ranks("cuda")
        assert isinstance(mistake.value, cli.RankError) == speaks
    monkeypatch.setenv("LOCAL_RANK", "0")  # every rank's with torchrun --virtual-local-rank, which shows it one device
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(machine.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(machine.dist, "rendezvous", lambda *_, **__: iter([]))
    with pytest.raises(StopIteration):  # it goes on to meet the others
        machine.join_ranks("cuda")
    assert current == ["cuda:0"]
    machine.count_devices.cache_clear()

@pytest.mark.parametrize("backend, error, left", [("nccl", KeyError, 0), ("gloo", KeyError, 1), ("nccl", None, 1)])
def test_a_rank_that_fails_waits_for_no_other(backend, error, left, monkeypatch):
    """To leave the others NCCL waits for them, and the error would not be seen."""
    group = unittest.mock.Mock(is_initialized=lambda: True, get_backend=lambda: backend)
    monkeypatch.setattr(machine, "dist", group)
    monkeypatch.setattr(machine, "join_ranks", lambda device: (device, 0, 2))
    with contextlib.suppress(KeyError), machine.ranks("cuda"):
        if error:
            raise error
    assert group.destroy_process_group.call_count == left

def test_a_gpu_that_nothing_compiles_for(monkeypatch):
    monkeypatch.setattr(tinylm.shutil, "which", lambda name: name)
    monkeypatch.setattr(tinylm, "Path", unittest.mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P4")
    for capability in ((6, 1), (7, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        machine.check_compiler("cuda:0", torch.float32)
        expected = pytest.raises(cli.InputError, match="7.0, which Tesla P4 has not; give --compile=False")
        with expected if capability < (7, 0) else contextlib.nullcontext():
            machine.check_compiler("cuda:0", torch.float32, True)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cli.InputError, match="needs the package triton.* give --compile=False$"):
        machine.check_compiler("cuda:0", torch.float32, True)

def test_devices_that_are_not_there(monkeypatch, as_rank):
    """The advice works for a flag, and for what a resumed run was begun on."""
    for count, device, instead in ((0, "cuda", "cpu"), (1, "cuda:1", "cuda")):
        monkeypatch.setattr(machine, "count_devices", lambda: (count, None))
        with pytest.raises(cli.InputError, match=rf"has {count} CUDA device\(s\); give --device={instead}$"):
            machine.choose_device(device)
    as_rank(num_ranks=1)
    monkeypatch.setattr(machine, "check_architecture", lambda number: None)
    monkeypatch.setattr(machine.dist, "is_nccl_available", lambda: False)
    with pytest.raises(cli.InputError, match="need NCCL, which this torch has not; give --device=cpu"):
        machine.join_ranks("cuda")

def test_gpus_without_bfloat16_get_float32(monkeypatch):
    monkeypatch.setattr(machine, "choose_device", lambda device: "cuda")
    monkeypatch.setattr(machine, "check_compiler", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, dtype, to_write_in in (((7, 5), "float32", torch.float32), ((8, 0), "bfloat16", None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert train.Settings.complete({}).dtype == dtype and train.Settings.complete({}).compile
        assert machine.dtype_to_write_in(None, "cuda") == to_write_in
        assert machine.dtype_to_write_in("float32", "cuda") == torch.float32
    assert machine.dtype_to_write_in("bfloat16", "cuda") == torch.bfloat16
    with pytest.raises(cli.InputError, match="--dtype=int8 is for CPUs; leave it out, or add --device=cpu"):
        machine.dtype_to_write_in("int8", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for ask in (lambda: train.Settings.complete({"dtype": "bfloat16"}),
                lambda: machine.dtype_to_write_in("bfloat16", "cuda")):
        with pytest.raises(cli.InputError, match="Tesla T4 has compute capability 7.5, .* give --dtype=float32"):
            ask()

@pytest.mark.parametrize("capabilities, dtype", [({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")])
def test_cpus_with_instructions_for_bfloat16_train_in_it(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert train.Settings.complete({"device": "cpu"}).dtype == (dtype if tinylm.HAS_ONEDNN else "float32")
    assert train.Settings.complete({"device": "cpu", "dtype": "bfloat16"}).dtype == "bfloat16"  # if slowly
    assert machine.dtype_to_write_in(None, "cpu") is None

def test_a_device_without_enough_memory(tmp_path, monkeypatch, capsys):
    """One line, and a run that goes on from what it had saved."""
    data = prepared(tmp_path)
    for error, said in (
            (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might …"), "CUDA error: out of memory; give"),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "CUBLAS_STATUS_ALLOC_FAILED"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a capacity of 8 GiB."),
             "allocate 9 GiB; give --remat, or begin anew with a smaller --batch_size")):
        meanwhile(5, monkeypatch, unittest.mock.Mock(side_effect=error))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        code, line = call(monkeypatch, capsys, train.train, f"--data={data}", f"--output_dir={tmp_path}/run",
                          *tiny_flags())
        assert code == 2 and line.count("\n") == 1 and said in line, line
    train.train(resume=tmp_path / "run", remat=True)
    assert [line["step"] for line in metrics(tmp_path / "run") if "val_loss" in line] == [3, 6]
    no_memory = unittest.mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(train, "evaluate", no_memory)
    code, error = call(monkeypatch, capsys, train.train, f"--resume={tmp_path}/run", "--eval_only")
    assert code == 2 and error == "command.py: CUDA out of memory; give a smaller --batch_size or --context_length, " \
                                  "--dtype=bfloat16 or --device=cpu\n"
    monkeypatch.setattr(sample, "check_reading", lambda *_: None)  # for a small model there is enough
    monkeypatch.setattr(tinylm, "init_cache", no_memory)
    code, error = call(monkeypatch, capsys, sample.sample, f"--checkpoint={tmp_path}/run")
    assert code == 2 and error.count("\n") == 1 and "out of memory; give a smaller --num_samples" in error, error
    monkeypatch.setattr(tinylm, "init_cache", lambda *_: torch.empty(2**60))
    code, error = call(monkeypatch, capsys, sample.sample, f"--checkpoint={tmp_path}/run")
    assert code == 2 and error.count("\n") == 1 and "allocate memory" in error and "; give a smaller" in error, error
    with pytest.raises(cli.RankError, match="give less"), machine.within_memory("give less"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    code, error = call(monkeypatch, capsys, machine.within_memory("give less")(lambda: [0] * 2**60))
    assert code == 2 and error == "command.py: out of memory; give less\n"

def test_a_byte_order_mark_is_no_text(tmp_path):
    text = "Once upon a time there was a cat. " * 50
    plain = prepared(tmp_path, text)
    (tmp_path / "marked.txt").write_text(text, encoding="utf-8-sig")
    prepare.prepare(input=str(tmp_path / "marked.txt"), output=str(tmp_path / "marked"), vocab_size=400)
    assert (tmp_path / "marked/train.bin").read_bytes() == (plain / "train.bin").read_bytes()
    metas = [prepare.open_data(folder)[0] for folder in (plain, tmp_path / "marked")]
    same_keys = metas[0].keys() - {"source", "asked"}
    assert {key: metas[0][key] for key in same_keys} == {key: metas[1][key] for key in same_keys}

def wait_for(holds, seconds=60):
    """Wait until something holds; fail if it does not within these seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)

def children_of(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

def end_this_process(span):
    """Work that ends as one that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)

def test_a_process_of_prepare_that_dies_is_noticed():
    with pytest.raises(cli.InputError, match="has died: .* or memory ran out, and then data/prepare.py needs f"):
        list(bpe.spread(lambda: end_this_process, (), [("a", 0, 1), ("b", 0, 1)], 2, "reading"))
    assert list(bpe.spread(lambda: str, (), [("a", 0, 1), ("b", 0, 1)], 2, "reading")) == [
        "('a', 0, 1)", "('b', 0, 1)"]

def test_ctrl_c_does_not_reach_processes_that_begin(tmp_path):
    (tmp_path / "work.py").write_text(f"""if True:
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from data import bpe
        os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))
        print(*bpe.spread(lambda: len, (), [("a", 0, 1)] * 9, 3, "reading"))
        """)
    done = subprocess.run([sys.executable, tmp_path / "work.py"], capture_output=True, text=True, timeout=180,
                          preexec_fn=hear_ctrl_c)
    assert done.stdout.split() == ["3"] * 9 and not done.stderr

def test_a_script_without_a_guard(tmp_path):
    """Where processes begin by running it again it gets a line, and where they are forked it just works.

    So it does where a lock, such as tqdm's, has settled on Python's default, which forks nothing from 3.14 on.
    """
    (tmp_path / "text.txt").write_text("some words, and more of them " * 90_000)
    for method, code, said in (("spawn", 1, 'below if __name__ == "__main__":'), (None, 0, "tokens")):
        (tmp_path / "work.py").write_text(f"""if True:
            import multiprocessing, sys
            sys.path.insert(0, {str(ROOT)!r})
            multiprocessing.set_start_method({method!r}, force=True)
            multiprocessing.Lock()
            from data import prepare
            prepare.prepare(input="text.txt", output="data", vocab_size=260, workers=2)
            """)
        done = subprocess.run([sys.executable, "work.py"], cwd=tmp_path, capture_output=True, text=True, timeout=180)
        assert done.returncode == code and said in done.stderr + done.stdout, done.stderr

def test_a_lock_whose_holder_leaves_while_it_is_looked_at(tmp_path, monkeypatch):
    read_text, path = Path.read_text, tmp_path / "lock.held"
    path.write_text("1 on nowhere")
    monkeypatch.setattr(Path, "read_text", lambda path, **options: [path.unlink(), read_text(path, **options)])
    with files.lock_by_name(path):
        assert str(os.getpid()) in read_text(path)

@pytest.mark.parametrize("device", ["cuda:²", "cuda:", "cuda:-1", "gpu", "cpu:0"])
def test_names_of_devices(device):
    with pytest.raises(cli.InputError, match=f"^--device={device}: expected cpu, cuda or cuda:NUMBER$"):
        machine.choose_device(device)

def test_ranks_that_find_no_first_one(monkeypatch, as_rank):
    """As orphans of a torchrun that was killed: they don't wait for hours, and say where they looked."""
    asked = []

    def rendezvous(url, timeout):
        asked.append(timeout)
        raise torch.distributed.DistNetworkError("connect() timed out")

    as_rank(1, address="nowhere")
    monkeypatch.setattr(torch.distributed, "rendezvous", rendezvous)
    with pytest.raises(cli.InputError, match="^no connection to nowhere:1, where ranks meet; see that torchrun runs"):
        machine.join_ranks("cpu")
    assert asked[0].total_seconds() <= 600
    with pytest.raises(cli.InputError, match="--eval_only is the work of one process; give it without torchrun"):
        train.train(eval_only=True, init_from="runs/none")

def test_work_spread_over_processes(monkeypatch):
    """An error is that of the work; little waits for what comes first; and where no process can begin, that is said."""
    def fail(span):
        raise ConnectionResetError("of a network drive")

    def slow_at_first(span):
        time.sleep(0 if span[1] else 0.5)
        return open(counter, "a").write(".")

    spans = [("a", i, i + 1) for i in range(40)]
    with pytest.raises(ConnectionResetError, match="of a network drive"):
        list(bpe.spread(lambda: fail, (), spans, 2, "reading"))
    with tempfile.TemporaryDirectory() as folder:
        counter = Path(folder) / "done"
        work = bpe.spread(lambda: slow_at_first, (), spans, 2, "reading")
        assert next(work) == 1 and len(counter.read_text()) <= 2 * bpe.MOST_RESULTS + 1
        work.close()
    monkeypatch.setattr(multiprocessing.process.current_process(), "_config", {"daemon": True})
    assert list(bpe.spread(lambda: len, (), spans, 2, "reading")) == [3] * 40
    monkeypatch.undo()
    monkeypatch.setattr(os, "fork", lambda: os.open("/dev/null/none", os.O_RDONLY))  # an OSError
    with pytest.raises(cli.InputError, match="no more than 0 processes can begin .*; give data/prepare.py --workers=1"):
        list(bpe.spread(lambda: len, (), spans, 2, "reading"))

def test_two_texts_encoded_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "CHUNK_BYTES", 1000)
    path = tmp_path / "text.txt"
    path.write_text(many_stories(20))
    tokenizers_ = train_on(path.read_text(), tmp_path, 300), train_on(path.read_text(), tmp_path, 400)
    pieces = zip(*(bpe.encode_pieces(tokenizer, [path], workers=1) for tokenizer in tokenizers_))
    for tokenizer, own in zip(tokenizers_, zip(*pieces)):
        assert bpe.decode(tokenizer, np.concatenate([ids for _, ids in own])) == path.read_text()

def test_folders_of_texts(tmp_path, monkeypatch, capsys):
    """Links to folders are followed, once each; folders whose names have points are told apart; what is no text is left
    out, which is said, and what can't be read is not."""
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    for name, text in (("far/a", "There. "), ("c.v1/b", "Here. "), ("c.v2/b", "Other. ")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text * 200)
    (tmp_path / "c.v1/link").symlink_to("../far")
    (tmp_path / "far/back").symlink_to("../c.v1")
    (tmp_path / "c.v1/picture").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff")
    for name in ("c.v1", "c.v2"):
        prepare.prepare(input=tmp_path / name, vocab_size=257)
    out = capsys.readouterr().out
    assert "2 files with 2,600 bytes" in out and out.count("no text: ") == out.count("c.v1/picture\n") == 1
    sizes = [sum(prepare.open_data(tmp_path / f"data/{name}")[0][split]["bytes"] for split in ("train", "val"))
             for name in ("c.v1", "c.v2")]
    assert sizes == [2600, 1400]
    for number in range(9):
        (tmp_path / f"c.v2/{number}.jsonl").write_text('{"text": "More."}')
    looks, iterdir = [], Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: [looks.append(path), iterdir(path)][1])
    prepare.prepare(input=tmp_path / "c.v2", vocab_size=257)
    meta, _ = prepare.open_data(tmp_path / "data/c.v2")
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 1445 and len(looks) < 9, "no look at all for each"
    walk = lambda top, onerror, followlinks: onerror(PermissionError(13, "Permission denied", "far"))
    monkeypatch.setattr(os, "walk", walk)
    code, error = call(monkeypatch, capsys, prepare.prepare, f"--input={tmp_path}/c.v1")
    assert code == 2 and error.endswith("far: Permission denied\n")

def test_a_text_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """Is not taken for whole, whether it is shorter then or only another."""
    text, count = tmp_path / "corpus.txt", bpe.count_corpus
    for change, said in ((lambda: os.truncate(text, 50_000), "became shorter while it was read"),
                         (lambda: text.write_text(text.read_text()[::-1]), "was changed while it was read")):
        monkeypatch.setattr(bpe, "count_corpus", lambda *args: [count(*args), change()][0])
        with pytest.raises(cli.InputError, match=f"corpus.txt {said}; wait until it is whole"):
            prepared(tmp_path)
        assert not (tmp_path / "data").exists()

    def count_without_memory(*args):
        raise MemoryError
    monkeypatch.setattr(bpe, "count_corpus", count_without_memory)
    with pytest.raises(cli.InputError, match="too little memory to prepare corpus; give data/prepare.py fewer"):
        prepared(tmp_path)

def test_what_the_caller_has_switched_on(tmp_path):
    """Changes nothing of a run or an evaluation, or is refused; and the run that comes back says how far it is."""
    flags, losses, evaluated = TINY | dict(data=prepared(tmp_path)), [], []
    for number, switch in enumerate((contextlib.nullcontext, torch.no_grad, torch.inference_mode,
                                     lambda: torch.autocast("cpu", torch.bfloat16))):
        with switch():
            done = train.train(output_dir=tmp_path / f"{number}", **flags)
            evaluated.append(train.train(resume=tmp_path / "0", eval_only=True, dtype="float32"))
        losses.append(done.lowest)
        assert done.step == TINY["num_steps"]
    assert len(set(losses)) == 1 == len(set(evaluated))
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(cli.InputError, match="default dtype is float64, expected float32; call torch.set_default"):
            train.train(output_dir=tmp_path / "double", **flags)
    finally:
        torch.set_default_dtype(torch.float32)

def test_a_model_that_takes_long_windows(tmp_path, monkeypatch, capsys):
    """Is evaluated on a short text in the time of the text, by shorter windows on request; and training says what its
    steps read."""
    data = prepared(tmp_path)
    train.train(data=data, output_dir=tmp_path / "run", **TINY | dict(context_length=2048, batch_size=1, num_steps=1))
    text, seen, config = tmp_path / "short.txt", [], checkpoint.load_config(tmp_path / "run/latest")
    text.write_text(many_stories(2, 9))
    losses = tinylm.token_losses_in_pieces
    monkeypatch.setattr(train, "check_reading", lambda *_: None)  # which evaluates a small model
    monkeypatch.setattr(tinylm, "token_losses_in_pieces", lambda params, inputs, *rest: [
        seen.append(inputs.shape), losses(params, inputs, *rest)][1])
    params, _ = checkpoint.load_checkpoint(tmp_path / "run/latest")
    ids, _ = prepare.ids_of(text, tmp_path / "run/latest", "val")
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    expected = F.cross_entropy(tinylm.forward(params, tokens[:, :-1], config)[0], tokens[0, 1:]).item()
    loss = train.train(eval_only=True, init_from=tmp_path / "run/latest", data=text, batch_size=8)
    assert loss == pytest.approx(expected, abs=1e-4) and seen == [(1, len(ids) - 1)]
    seen.clear()
    train.train(eval_only=True, init_from=tmp_path / "run/latest", data=text, context_length=64, batch_size=2)
    assert {*seen} == {(2, 64)}
    with pytest.raises(cli.InputError, match="--context_length=4096: the model takes 2048; leave the flag out"):
        train.train(eval_only=True, init_from=tmp_path / "run/latest", data=text, context_length=4096)
    capsys.readouterr()
    log.introduce(types.SimpleNamespace(
        settings=types.SimpleNamespace(epochs=340, batch_size=4, shard=False, compile=False, eval_tokens=9,
                                       device="", dtype="", tokens_per_step=1, num_steps=1, lr_max=1, lr_min=1,
                                       weight_decay=None),
        config=config, ids={"train": ids, "val": ids}, source="it", data="", step=0, folder="", num_ranks=1))
    assert "a step reads 4 windows of 2,048 tokens" in capsys.readouterr().out

def test_a_split_run_goes_on_in_one_process(tmp_path, capsys):
    flags = dict(data=str(prepared(tmp_path)), output_dir=str(tmp_path / "run"), num_steps=4, checkpoint_interval=4)
    train_on_ranks(2, shard=True, **flags)
    assert train.train(resume=tmp_path / "run", num_steps=6).step == 6
    assert "was split over ranks; here it goes on in one process" in capsys.readouterr().out

def test_what_belongs_to_a_tokenizer(trained, tmp_path):
    """Is kept in fine-tuning, chat templates in a folder too; one with more tokens than the model is refused first."""
    shutil.copytree(trained / "runs/tiny/latest", tmp_path / "model")
    (tmp_path / "model/additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (tmp_path / "model" / name).write_text(f"{{# {name} #}}")
    train.train(init_from=tmp_path / "model", data=trained / "data", num_steps=1, output_dir=tmp_path / "run")
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "run/latest" / name).read_text() == f"{{# {name} #}}"
    tokenizer = json.loads((tmp_path / "model/tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"])
    more = [tokenizer["added_tokens"][0] | {"id": size, "content": "<pad>"}]
    tokenizer["added_tokens"] += more
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    said = f"its tokenizer has {size + 1} tokens, its model {size}; remove those that were added, or let resize_token"
    with pytest.raises(cli.InputError, match=said):
        train.train(init_from=tmp_path / "model", data=trained / "data", num_steps=1, output_dir=tmp_path / "other")
    for use in (functools.partial(train.train, eval_only=True, init_from=tmp_path / "model", data="README.md"),
                functools.partial(sample.sample, checkpoint=tmp_path / "model"),
                functools.partial(gguf.export, tmp_path / "model", output=f"{tmp_path}/m.gguf")):
        with pytest.raises(cli.InputError, match=said):
            use()

def test_metrics_that_others_wrote(tmp_path):
    """Lines that are no measurements, or whose losses are no numbers, don't keep a run from going on."""
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('5\nnull\n["step"]\n"step"\n')
        file.write('{"step": 5, "train_loss": "x"}\n{"step": 6, "val_loss": null}\n{"step": 6, "val_loss": 1.0}\n')
    assert train.train(resume=tmp_path / "run", num_steps=TINY["num_steps"] + 2).step == TINY["num_steps"] + 2

def test_a_run_without_what_training_needs(trained, tmp_path, monkeypatch, capsys):
    """Is written from as before; and a flag that it never had is refused by name."""
    shutil.copytree(trained / "runs/tiny", tmp_path / "runs/tiny", symlinks=True)
    monkeypatch.chdir(tmp_path)
    state = Path("runs/tiny/latest/training/train_state.json")
    description = json.loads(state.read_text())
    del description["settings"]["beta1"]
    state.write_text(json.dumps(description))
    with pytest.raises(cli.InputError, match="--beta1=0.7: the run has beta1 0.8, which can't change on resuming"):
        train.train(resume="runs/tiny", beta1=0.7, num_steps=99)
    for path in Path("runs/tiny").glob("step-*/training"):
        shutil.rmtree(path)
    sample.sample(max_new_tokens=5, device="cpu")
    assert "5 tokens" in capsys.readouterr().err

def test_names_of_data(tmp_path, monkeypatch):
    """A text is the text as it is now, whatever data has its name; what was cut short is not taken for no data."""
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for text in ("One. ", "Two, three. "):
        Path("notes").write_text(text * 400)
        folder = prepare.find_data("notes")
        assert sum(prepare.open_data(folder)[0][split]["bytes"] for split in ("train", "val")) == 400 * len(text)
        prepare.prepare(input="notes", vocab_size=257)
    Path("cut").mkdir()
    Path("cut/.lock").touch()
    with pytest.raises(cli.InputError, match="has not ended in cut; wait for it, or if it was cut short give the same"):
        prepare.find_data("cut")
    with pytest.raises(cli.InputError, match="--val_fraction=0.5: stories has a text of its own to validate on"):
        prepare.prepare(dataset="stories", val_fraction=0.5)

def test_processes_of_prepare_end_with_it(tmp_path):
    """Even where it is killed and can end none of them itself."""
    (tmp_path / "work.py").write_text(f"""if True:
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from data import bpe
        for _ in bpe.spread(lambda: len, (), [("a", 0, 1)] * 9, 3, "reading"):
            time.sleep(60)
        """)
    process = subprocess.Popen([sys.executable, tmp_path / "work.py"], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(children_of(process)) == 3)
    numbers = children_of(process)
    process.kill()
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{number}/task").exists() for number in numbers), 10)

def test_interrupting_prepare_is_one_line(tmp_path):
    (tmp_path / "long.txt").write_text(many_stories(3000) * 60)
    process = subprocess.Popen([sys.executable, ROOT / "data/prepare.py", f"--input={tmp_path}/long.txt",
                                f"--output={tmp_path}/data", "--workers=2"], stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, start_new_session=True,
                               preexec_fn=hear_ctrl_c)
    wait_for(lambda: len(children_of(process)) == 2)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=180)
    assert process.returncode == 130 and error.split() == ["prepare.py:", "interrupted"]
    assert not (tmp_path / "data").exists()

def test_times_and_what_is_left(capsys, as_rank):
    assert [cli.duration(seconds) for seconds in (42.9, 185, 7620, 90_000)] == ["42s", "3m05s", "2h07m", "25h00m"]
    progress = cli.Progress("learning", 40, "merges", 1)
    progress.show(20, 10, progress.begin + 10)
    assert "20 of 40 merges, 1 merges/s, 20s left" in capsys.readouterr().err
    whole = cli.Progress("learning", 31743, "merges", 1)
    whole.show(15244, 0, whole.begin + 10)
    assert "15,244 of 31,743 merges, 1,524 merges/s" in capsys.readouterr().err, "no decimals"
    as_rank(1)
    progress.show(20, 10, progress.begin + 10)
    assert not capsys.readouterr().err, "one of the ranks tells"

@pytest.mark.parametrize("special", ["<|a b|>", "a a", "a " * 200 + "b"], ids=len)
def test_special_tokens_with_blanks_are_whole_wherever_text_is_cut(tmp_path, monkeypatch, special):
    monkeypatch.setattr(bpe, "CHUNK_BYTES", 500)
    monkeypatch.setattr(bpe, "PIECE_BYTES", 100)
    rng = random.Random(special)
    tokenizer = train_on("some words, and more of them " * 30, tmp_path, 300, [END, special])
    bpe.save(tokenizer, tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for stretch in (0, 66_000, 66_031, 66_034):  # about as long as what is read at first to find a cut in
        parts = [special, special[:-1], "some words ", "a a a ", "b " * 30, END, "\n"]
        text = "1" * stretch + special + "".join(rng.choices(parts, k=1500 if len(special) < 10 else 300))
        (tmp_path / "text.txt").write_text(text)
        expected = theirs.encode(text).ids
        assert bpe.encode(tokenizer, text).tolist() == expected
        pieces = [ids for _, ids in bpe.encode_pieces(tokenizer, [tmp_path / "text.txt"], workers=1)]
        assert np.concatenate(pieces).tolist() == expected and (stretch or len(pieces) > 1)

def test_lines_of_json_are_documents(tmp_path, trained, capsys):
    texts = ["One é.\nTwo.", "", " Three\u2028", "four 🦊"] * 30
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("".join(text + END for text in texts), newline="")
    lines.write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in texts) + "\n\n")
    for path in (plain, lines):
        prepare.prepare(input=path, output=tmp_path / path.stem, vocab_size=270)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in (tmp_path / "b").iterdir()}
    for name in ("tokenizer.json", "train.bin", "val.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    losses = [train.train(eval_only=True, resume=trained / "runs/tiny", data=path) for path in (plain, lines)]
    assert losses[0] == losses[1] and f"loss {losses[0]:.4f} nats per token" in capsys.readouterr().out
    for line in ('{"said": []}', "5", '"text"', '{"text": 5}', "no JSON", '{"text": "\\ud800"}', '{"text": "\xff"}'):
        lines.write_text('{"text": "fine"}\n' + line, encoding="latin-1")
        said = "b.jsonl, line 2(: expected a JSON object with a text| is not valid Unicode| has .'said'.; join)"
        with pytest.raises(cli.InputError, match=said):
            prepare.prepare(input=lines, output=tmp_path / "c")
    lines.write_text("\n\n")
    with pytest.raises(cli.InputError, match="/b.jsonl: no text in it"):
        prepare.prepare(input=lines, output=tmp_path / "c")
    assert not (tmp_path / "c").exists()
    lines.write_bytes(b'{"text": "caf\xe9 \\ud83d\\ude00 \\ud83d."}\n' * 99)
    prepare.prepare(input=lines, output=tmp_path / "c", errors="replace", vocab_size=257)
    ids = prepare.open_data(tmp_path / "c")[1]["val"]
    assert bpe.decode(bpe.load(tmp_path / "c"), ids).startswith("caf\ufffd 😀 \ufffd." + END)
    assert prepare.as_text(lines.rename(tmp_path / "e.ndjson"), tmp_path / "copy", "replace") == tmp_path / "copy"
    marked = lines.with_name("D.JSONL")
    marked.write_text('{"text": "fine"}\n' * 30, encoding="utf-8-sig")
    prepare.prepare(input=marked, output=tmp_path / "d", vocab_size=257)
    assert prepare.open_data(tmp_path / "d")[0]["train"]["bytes"] == 28 * 4

def test_a_text_that_changed_is_not_resumed_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    text = tmp_path / "my.txt"
    text.write_text(many_stories(60))
    train.train(data=text, output_dir=tmp_path / "run", **TINY)
    monkeypatch.chdir(tmp_path)
    Path("stories").write_text("a file of that name")
    assert prepare.made_of("stories") == tmp_path / "data/stories"
    train.train(resume=tmp_path / "run", data=text, num_steps=8)
    text.write_text(text.read_text() + "More.")
    assert "another size or time" not in capsys.readouterr().out
    train.train(resume=tmp_path / "run", data=text, num_steps=9)
    assert f"{text} has another size or time than when the run began, which goes on with" in capsys.readouterr().out
    with pytest.raises(cli.InputError, match="has other data than the run began with"):
        train.train(resume=tmp_path / "run", data="./my.txt", num_steps=10)

def test_a_folder_of_texts_with_data_in_it(tmp_path):
    """What an earlier call wrote there is no text."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("Once upon a time there was a cat. " * 50)
    for _ in range(2):
        prepare.prepare(input=tmp_path / "in", output=tmp_path / "in/tokens", vocab_size=257)
        assert prepare.open_data(tmp_path / "in/tokens")[0]["train"]["bytes"] < 1700

def test_a_text_does_not_replace_a_corpus_of_the_project(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    (tmp_path / "stories.txt").write_text("mine " * 999)
    with pytest.raises(cli.InputError, match="stories.txt would replace data/stories, .*; add --output"):
        prepare.prepare(input=tmp_path / "stories.txt")
    prepare.prepare(input=tmp_path / "stories.txt", output=tmp_path / "mine", vocab_size=257)

@pytest.mark.parametrize("text", ["word " * 2000 + END + "A short last document.", "word " * 2000 + "\nshort\n",
                                  f"one document of many words{END}" * 300, "a line of many words\n" * 300,
                                  "a" + "你" * 2000])
def test_validation_is_a_tenth_wherever_documents_end(tmp_path, text):
    meta, _ = prepare.open_data(prepared(tmp_path, text, vocab_size=257))
    sizes = [meta[split]["bytes"] for split in ("train", "val")]
    assert 0.05 < sizes[1] / sum(sizes) < 0.11

def test_prepare_into_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("Once upon a time there was a cat. " * 50)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    prepare.prepare(input="../corpus.txt", output=".", vocab_size=300)
    prepare.open_data(".")

# ---- Forks: what a researcher adds is kept, or refused before the work ----

FORK = {
    "tinylm.py": [
        ("    tie_embeddings: bool = False\n", "    tie_embeddings: bool = False\n    window: int = 0\n"),
        ('    block = {"attention_norm": (d,),', '    block = {"query_gain": (d,), "attention_norm": (d,),'),
        ("    x = x + multi_head_attention(", "    x = x * query_gain\n    x = x + multi_head_attention("),
        ("cache, config, attention_norm, attention, mlp_norm, mlp):",
         "cache, config, query_gain, attention_norm, attention, mlp_norm, mlp):"),
        ("# An optimiser is its first state",
         "def lion_init(params):\n    return {\"m\": tree_map(torch.zeros_like, params)}\n\n"
         "def lion_update(params, grads, state, lr, beta1=0.9, beta2=0.99, weight_decay=0.3, sharpness=1.0):\n"
         "    assert (beta1, beta2, weight_decay, sharpness) == (0.9, 0.98, 0.3, 2.0)\n"
         "    move = lambda p, g, m: p - lr * (torch.sign(torch.lerp(g, m, beta1)) + weight_decay * p)\n"
         "    return tree_map(move, params, grads, state[\"m\"]), "
         "{\"m\": tree_map(lambda m, g: torch.lerp(g, m, beta2), state[\"m\"], grads)}\n\n"
         "# An optimiser is its first state"),
        ('"muon": (muon_init, muon_update)}', '"muon": (muon_init, muon_update), "lion": (lion_init, lion_update)}'),
        ('SCHEDULES = {"cosine": cosine_lr}',
         "def warmup_stable_decay(step, lr_max, warmup_steps, num_steps, decay_steps):\n"
         "    return lr_max * min((step + 1) / max(1, warmup_steps), 1, (num_steps - step) / decay_steps)\n\n"
         'SCHEDULES = {"cosine": cosine_lr, "wsd": warmup_stable_decay}'),
    ],
    "train.py": [
        ("    rope_theta: float = flag(",
         '    window: int = flag(0, "keys a query sees")\n    rope_theta: float = flag('),
        ("    clip_grad: float = flag(", '    sharpness: float = own_flag("sharpness", "of Lion", "[0, inf)")\n'
         '    decay_steps: int = flag(2, "steps of decay", "[1, inf)")\n    clip_grad: float = flag('),
    ],
}

def compare_forms(vocab_size=300, shard=False, **flags):
    settings = train.Settings.complete(dict(device="cpu", context_length=64) | flags)
    settings.shard = shard  # which only ranks may ask for
    forms.check_forms(run.model_config(settings, vocab_size), settings, train.training_loss)

def told_of(name):
    said = rf"^{name}: by faster forms not what it is by .* by {name}\.forms\.clear\(\)$"
    return pytest.raises(cli.InputError, match=said)

@pytest.mark.parametrize("name, form", [
    ("gated_silu", lambda gate, up: torch.relu(gate).square() * up),
    ("rmsnorm", lambda x, gain, eps: F.rms_norm(x, gain.shape, gain, 1.0)),
    ("rope", lambda x, cos, sin: x * math.nan),
    ("attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1)),
    ("adamw_update", lambda params, grads, state, lr, **_: (
        tinylm.tree_map(lambda p, g: p - lr * g, params, grads), state))])
def test_a_form_that_does_not_follow_its_definition(tmp_path, monkeypatch, name, form):
    """Is named before the work, also with dropout; where what is computed differs each time nothing can be said."""
    flags = TINY | dict(data=prepared(tmp_path), output_dir=tmp_path / "run")
    monkeypatch.setattr(tinylm.OPERATIONS[name], "forms", [(tinylm.always, form)])
    swiglu = tinylm.swiglu
    monkeypatch.setattr(tinylm, "swiglu", lambda x, **weights: F.dropout(swiglu(x, **weights), 0.5))
    with told_of(name):
        train.train(**flags)
    assert not (tmp_path / "run").exists()
    if name in ("rope", "adamw_update"):  # which is the same each time
        return
    odd = random.Random(0)
    monkeypatch.setattr(tinylm, "swiglu", lambda x, **weights: swiglu(x, **weights) * odd.random())
    train.train(**flags)

@pytest.mark.parametrize("name, form", [
    ("loss_fn", lambda params, *rest: tinylm.loss_fn.definition(params, *rest) / 0),
    ("rmsnorm", lambda x, gain: x), ("attention", lambda q, k, v: tinylm.attention.definition(q, k[..., -48:, :], v[
        ..., -48:, :]) if k.shape[-2] > 48 else tinylm.attention.definition(q, k, v)),
    ("attention", lambda q, k, v: tinylm.attention.definition(q * 1.1 if q.shape[-2] == 1 else q, k, v)),
    ("attention", lambda q, k, v: tinylm.attention.definition(q, k.roll(1, -3), v.roll(1, -3))),
    ("attention", lambda q, k, v: tinylm.attention.definition(q, *(x.repeat(1, q.shape[1] // k.shape[1], 1, 1)
                                                                   for x in (k, v)))),
    ("transformer_blocks", lambda blocks, *rest, **options: tinylm.transformer_blocks.definition(
        dict.fromkeys(blocks, blocks["0"]), *rest, **options)),
    ("attention", lambda q, k, v: tinylm.attention.definition(q, k, v) * (2 if q.dtype == torch.bfloat16 else 1)),
    ("gated_silu", lambda gate, up: tinylm.gated_silu.definition(gate[:1].expand_as(gate), up)),
    ("adamw_update", lambda params, grads, state, lr, **own: tinylm.adamw_update.definition(
        params, tinylm.tree_map(lambda g, m: g * (m * g >= 0), grads, state["m"]), state, lr, **own)),
    ("adamw_update", lambda params, grads, state, lr, **own: tinylm.adamw_update.definition(
        params, grads, state, lr, **own | {"weight_decay": own["weight_decay"] * (state["step"] < 6)})),
    *[("sample_token", lambda logits, *rest, most=most: tinylm.sample_token.definition(
        logits.masked_fill(logits < logits.amax(-1, keepdim=True) - most, -math.inf), *rest)) for most in (3, 4.5)],
    *[("sample_token", lambda logits, chance, T, *rest, changed=changed: tinylm.sample_token.definition(
        logits, chance, changed(T), *rest)) for changed in (lambda T: max(T, 0.3), lambda T: min(T, 1), math.sqrt)],
    ("sample_token", lambda logits, chance, temperature, top_k, top_p: tinylm.sample_token.definition(
        logits, chance, temperature, min(top_k, 50), top_p)),
    ("sample_token", lambda logits, *rest: tinylm.sample_token.definition(logits - 1e-6 * torch.arange(300), *rest)),
    *[("sample_token", lambda logits, *rest, id=id: tinylm.sample_token.definition(
        logits.index_fill(-1, torch.tensor([id]), -math.inf), *rest)) for id in (0, 77, 149, 299)],
    ("clip_gradients", lambda grads, norm, most: tinylm.tree_map(lambda g: g * (most / norm), grads)),
    ("clip_gradients", lambda grads, norm, most: tinylm.tree_map(lambda g: g / 2, grads))], ids=lambda x: str(x)[:15])
def test_forms_that_fail_or_differ_only_somewhere(monkeypatch, name, form):
    """Far back, for one token, for several heads of keys, in half precision, in a second sequence, in a second step or
    late, or in what no step asks for."""
    monkeypatch.setattr(tinylm.OPERATIONS[name], "forms", [(tinylm.always, form)])
    with told_of(name):
        compare_forms(num_heads=4, num_kv_heads=2, context_length=100, dtype="bfloat16")

def test_a_form_without_gains_is_told_where_a_model_is_read(monkeypatch):
    form = lambda x, gain, eps: tinylm.rmsnorm.definition(x, torch.ones_like(gain), eps)
    monkeypatch.setattr(tinylm.rmsnorm, "forms", [(tinylm.always, form)])
    with pytest.raises(cli.InputError, match="^rmsnorm: by faster forms not what it is by the def"):
        forms.compare_reading.__wrapped__(small_config(), "cpu", ())

def test_a_term_that_train_adds_is_compared(monkeypatch, capsys):
    """The form that serves on CUDA has no argument for it, or passes it over."""
    def loss_fn(params, inputs, targets, config, dtype, remat=False, share=0.0):
        logits = tinylm.forward(params, inputs, config, dtype, remat)
        return tinylm.cross_entropy(logits, targets) + share * logits.logsumexp(-1).square().mean()

    monkeypatch.setitem(tinylm.OPERATIONS, "loss_fn", tinylm.loss_fn)  # so that it is put back
    monkeypatch.setattr(tinylm, "loss_fn", tinylm.operation(loss_fn))
    monkeypatch.setattr(train, "training_loss", lambda *args, settings: tinylm.loss_fn(*args, settings.remat, 0.1))
    for form in (tinylm.loss_in_pieces, lambda *args: tinylm.loss_in_pieces(*args[:6])):
        tinylm.loss_fn.forms[:] = [(tinylm.always, form)]
        with told_of("loss_fn"):
            compare_forms()
    tinylm.loss_fn.forms.clear()
    compare_forms()
    assert "training lowers another loss" in capsys.readouterr().out

def test_hidden_states_that_return_more_are_compared(monkeypatch, capsys):
    """Such as what experts' shares add to the loss."""
    genuine = tinylm.hidden_states
    of_caller = lambda *args, **options: genuine(*args, **options) + (
        (torch.zeros(()),) if sys._getframe(1).f_globals["__name__"] == "data.forms" else ())
    monkeypatch.setattr(tinylm, "hidden_states", of_caller)
    compare_forms()
    assert not capsys.readouterr().out

def test_what_is_drawn_to_compare_is_drawn_on_the_device():
    """Elsewhere it would fail by forms and definitions alike, which is no difference."""
    model = types.SimpleNamespace(config=small_config(), tokens=torch.empty(1, dtype=torch.int64, device="meta"))
    assert all(ids.is_meta for ids in forms.drawn_of_ids(model).values())

def test_a_form_of_the_loss_that_differs_in_bfloat16_alone(monkeypatch):
    monkeypatch.setattr(tinylm.loss_fn, "forms", [(
        lambda params, inputs, targets, config, dtype, *_: dtype == torch.bfloat16,
        lambda *args: 2 * tinylm.loss_in_pieces(*args))])
    with told_of("loss_fn"):
        compare_forms(dtype="bfloat16")

def test_training_lowers_and_compares_its_own_loss(tmp_path, monkeypatch):
    """Also where that is no longer `loss_fn`."""
    genuine, compared = train.training_loss, []
    monkeypatch.setattr(train, "training_loss", lambda *args, **given: 0 * genuine(*args, **given))
    monkeypatch.setattr(train, "check_forms", lambda config, settings, loss: compared.append(loss))
    done = train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    assert {line.get("train_loss", 0) for line in metrics(done.folder)} == {0}
    assert compared == [train.training_loss]

def test_a_sampler_of_another_kind_hides_no_other_form(monkeypatch):
    """Such as one that takes what was written so far, too."""
    genuine = tinylm.sample_token
    monkeypatch.setattr(tinylm, "sample_token", lambda logits, chance, temperature, *rest: genuine(
        logits, chance, temperature, *rest[:2 - bool(temperature)]))
    forms.compare_reading.__wrapped__(small_config(), "cpu", ())
    monkeypatch.setattr(tinylm.token_losses, "forms", [(tinylm.always, lambda logits, targets: logits.logsumexp(-1))])
    with told_of("token_losses"):
        forms.compare_reading.__wrapped__(small_config(), "cpu", ())

def test_forms_that_differ_beyond_the_small_model(monkeypatch):
    """In a window of attention that is longer than what is learned from, by whichever operations it takes."""
    plain = tinylm.attention.definition
    monkeypatch.setattr(tinylm.attention, "forms", [(tinylm.always, lambda q, k, v: plain(
        q, k[..., -400:, :], v[..., -400:, :]))])
    with told_of("attention"):
        compare_forms(context_length=700)
    both = tinylm.attention, tinylm.linear
    compute = lambda: {"x": {"y": torch.ones(()) * bool(both[0].forms or both[1].forms)}}
    assert tinylm.forms_that_differ(compute) == ["linear", "attention"]

@pytest.mark.parametrize("i, vocab_size", [(46, 300), (256, 300), (1500, 2048), (256, 10000),
                                           (9999, 10000)])
def test_a_loss_that_names_an_id_is_told(monkeypatch, i, vocab_size):
    """As of a token that ends a document, also where a context is short; to train and to evaluate."""
    plain, config = tinylm.token_losses.definition, tinylm.Config(vocab_size, 16, 128, 4, 4)
    form = lambda logits, targets: plain(logits, targets) * (targets != i)
    monkeypatch.setattr(tinylm.token_losses, "forms", [(tinylm.always, form)])
    with told_of("token_losses"):
        compare_forms(vocab_size, context_length=16)
    with told_of("token_losses"):
        forms.compare_reading.__wrapped__(config, "cpu", ())
    if vocab_size == 300:  # as one size shows it
        monkeypatch.setattr(tinylm.token_losses, "forms", [(lambda *_: torch.is_grad_enabled(), form)])
        with told_of("token_losses"):
            compare_forms(vocab_size, context_length=16)

def test_a_loss_of_longer_texts_is_not_compared_by_ids(monkeypatch, capsys):
    """Which is said; nor are states of an optimiser that never occur."""
    loss_fn = tinylm.loss_fn

    def ring(params, grads, state, lr):
        torch.zeros(10)[state["at"]]
        return tinylm.tree_map(lambda p, g: p - lr * g, params, grads), {"at": (state["at"] + 1) % 10}

    monkeypatch.setitem(tinylm.OPTIMIZERS, "ring", (lambda params: {"at": torch.zeros((), dtype=torch.int64)}, ring))
    compare_forms(optimizer="ring")
    assert not capsys.readouterr().out

    def of_long_texts(params, inputs, *args, **options):
        assert inputs.shape[1] >= 8, "too short"
        return loss_fn(params, inputs, *args, **options)

    monkeypatch.setattr(tinylm, "loss_fn", of_long_texts)
    compare_forms()
    assert "is not known, as a small model fails: AssertionError: too short" in capsys.readouterr().out

def test_a_model_that_cannot_write_is_trained(tmp_path, monkeypatch, capsys):
    """What a sample fails by is said, and its checkpoints are saved."""
    monkeypatch.setattr(tinylm, "generate", unittest.mock.Mock(side_effect=KeyError("raw")))
    monkeypatch.setattr(train, "check_forms", lambda *_: None)
    done = train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
    assert done.step == 6 and run.newest(tmp_path / "run").name == "step-0000006"
    assert "the model could not write a sample (KeyError: 'raw'); the run goes on" in capsys.readouterr().err

def test_an_output_that_asks_whether_it_is_tied(monkeypatch):
    """Weights laid out for several texts have an lm_head too; not for one, nor without their form."""
    plain = tinylm.to_logits
    monkeypatch.setattr(tinylm, "to_logits", lambda params, x: plain(params, x) * (1 + ("lm_head" in params)))
    params = random_params(small_config(tie_embeddings=True))
    assert "lm_head" not in tinylm.weights_for_generation(params, torch.float32, 1)
    with pytest.raises(cli.InputError, match="weights_for_generation.forms.clear"):
        compare_forms(tie_embeddings=True)
    monkeypatch.setattr(tinylm.weights_for_generation, "forms", [])
    compare_forms(tie_embeddings=True)

@pytest.mark.parametrize("dtype, texts", [(torch.float32, 1), (torch.float32, 9), (torch.bfloat16, 2)])
def test_a_linear_of_another_formula_without_forms(dtype, texts, monkeypatch):
    """It sees each matrix alone, as a tensor, in writing too."""
    def by_mean(x, w):
        w = w.to(x.dtype)
        return x @ (w / w.abs().mean()).T

    config = small_config()
    params, prompt = random_params(config), random_tokens(config, texts, 5)
    monkeypatch.setattr(tinylm, "linear", tinylm.operation(by_mean))
    monkeypatch.delitem(tinylm.OPERATIONS, "by_mean")
    weights = tinylm.weights_for_generation(params, dtype, texts)
    scores = tinylm.forward(weights, prompt, config, dtype)
    with tinylm.definitions_alone():
        expected = tinylm.forward(params, prompt, config, dtype)
    assert (scores - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.03) * expected.norm()

@pytest.mark.parametrize("name", ["linear", "embedding", "rmsnorm"])
def test_forms_that_are_dropped_but_over_ranks(name, monkeypatch, mesh_of_one):
    """The advice, followed, has split parameters read by the definition."""
    operation, config, check = tinylm.OPERATIONS[name], small_config(), functools.partial(compare_forms, shard=True)
    kept = operation.forms[:]
    monkeypatch.setattr(operation, "forms", [(tinylm.always, lambda *args: 2 * operation.definition(*args)), *kept])
    with pytest.raises(cli.InputError, match=f"^{name}: by faster forms not what") as differs:
        check()
    monkeypatch.setattr(operation, "forms", [])
    compare_forms()
    with pytest.raises(cli.InputError, match=f"--shard needs a form over ranks of {name}, which {name}.form") as told:
        check()
    advice = str(told.value).partition("in its place write ")[2]
    assert str(differs.value).endswith(f"or drop them there by {advice}")
    monkeypatch.setattr(operation, "forms", kept[:])
    exec(advice, vars(tinylm))
    check()
    assert len(operation.forms) == 1 and not operation.forms[0][0](*EXAMPLES[name](torch.float32)[0])
    params, batch = random_params(config), random_tokens(config, 2, 2, 9)
    ours = tinylm.value_and_grad(tinylm.loss_fn, tinylm.shard(params, mesh_of_one), *batch, config)
    loss, grads = tinylm.value_and_grad(tinylm.loss_fn, params, *batch, config)
    same(ours[0], loss, 1e-5)
    same(tinylm.own_parts(ours[1]), grads, 1e-5)

def test_what_backward_passes_by_hand_refuse():
    """A loss' second pass; second derivatives, which would be wrong, and by definitions are finite differences'."""
    logits, targets = randn(3, 7).requires_grad_(), torch.arange(3)
    again = lambda loss: torch.autograd.grad(loss, logits, retain_graph=True) + torch.autograd.grad(loss, logits)
    with pytest.raises(NotImplementedError, match=r"second passes: .* within tinylm.definitions_alone\(\)"):
        again(tinylm.cross_entropy(logits, targets))
    with torch.autograd.graph.save_on_cpu(), pytest.raises(NotImplementedError, match="second passes"):
        again(tinylm.cross_entropy(logits, targets))
    recomputed = torch.utils.checkpoint.checkpoint(tinylm.cross_entropy, logits, targets, use_reentrant=False)
    assert torch.equal(*again(recomputed))
    with tinylm.definitions_alone():
        assert torch.equal(*again(tinylm.cross_entropy(logits, targets)))
    config = small_config(num_layers=1)
    params = tinylm.tree_map(torch.Tensor.double, random_params(config))
    inputs, targets = random_tokens(config, 2, 2, 9)
    direction = tinylm.tree_map(lambda p: randn(*p.shape, seed=5), params)

    def slope(params):
        params = tinylm.tree_map(lambda p: p.detach().requires_grad_(), params)
        loss, leaves = tinylm.loss_fn(params, inputs, targets, config, torch.float64), tinylm.tree_leaves(params)
        grads = torch.autograd.grad(loss, [leaf for _, leaf in leaves], create_graph=True)
        along = sum((g * d).sum() for g, (_, d) in zip(grads, tinylm.tree_leaves(direction)))
        return along, torch.autograd.grad(along, [leaf for _, leaf in leaves])

    for name in ("rmsnorm", "gated_silu", "attention", "token_losses"):
        with tinylm.definitions_alone([other for other in tinylm.OPERATIONS if other != name]):
            with pytest.raises(NotImplementedError, match=r"within tinylm.definitions_alone\(\)"):
                slope(params)
    with tinylm.definitions_alone():
        _, product = slope(params)
        shifted = [slope(tinylm.tree_map(lambda p, d: p + h * d, params, direction))[0] for h in (1e-5, -1e-5)]
    curvature = sum((h * d).sum() for h, (_, d) in zip(product, tinylm.tree_leaves(direction)))
    assert curvature.item() == pytest.approx((shifted[0] - shifted[1]).item() / 2e-5, rel=1e-5)

def test_parameters_that_a_loss_does_not_use():
    """Have a gradient of 0; ranks, whose messages have to match, need one that is computed."""
    params = {"used": torch.ones(2), "other": torch.ones(3)}
    _, grads = tinylm.value_and_grad(lambda params: params["used"].sum(), params)
    same(grads, {"used": torch.ones(2), "other": torch.zeros(3)}, 0)

    def gradients(params, inputs, targets, on_gradient):
        on_gradient("used", grads["used"])
        return torch.zeros(()), grads

    settings = train.Settings.complete(dict(device="cpu", batch_size=2, context_length=4))
    with pytest.raises(cli.InputError, match="the loss does not use other.*; add 0 times its sum"):
        train.accumulate_gradients(gradients, params, np.zeros(40, np.uint16), settings, 0, 0, 2)

@pytest.mark.parametrize("state, said", [
    (lambda p: torch.zeros_like(p, dtype=torch.bfloat16), r"makes state.m.* of float32 of state.m.* of bfloat16"),
    (lambda p: 0, "has state.m.*0, which a checkpoint can't hold; expected a tensor"),
    (lambda p: {0: torch.zeros_like(p)}, "would be lost in a checkpoint; expected a dict"),
    (lambda p: {"a.b": torch.zeros_like(p)}, "would be lost in a checkpoint; expected a dict"),
    (lambda p: {}, "would be lost in a checkpoint; expected a dict"),
    (None, "writes into what it is given; let it return")])
def test_an_optimizer_that_a_run_could_not_go_on_with(tmp_path, monkeypatch, state, said):
    """Is refused before the work: a state that changes its dtype, that is no tensor, an update in place."""
    def update(params, grads, state, lr):
        moved = tinylm.tree_map(lambda p, g: p.sub_(g * lr) if in_place else p - g * lr, params, grads)
        return moved, {"m": tinylm.tree_map(lambda m, g: m + g, state["m"], grads)}

    in_place = state is None
    init = lambda params: {"m": tinylm.tree_map(state or torch.zeros_like, params)}
    monkeypatch.setitem(tinylm.OPTIMIZERS, "own", (init, update))
    with pytest.raises(cli.InputError, match=said):
        train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", optimizer="own", **TINY)
    assert not (tmp_path / "run").exists()

def test_runs_from_python(tmp_path, monkeypatch, capsys):
    """One at a time in a process, to which it leaves no file open; ids of others and a text for a notebook."""
    data = prepared(tmp_path)
    gc.collect()  # or files that tests before have left would be closed meanwhile
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    monkeypatch.setitem(tinylm.SCHEDULES, "cosine", lambda step, lr_max: np.float32(lr_max))
    done = train.train(data=data, output_dir=tmp_path / "run", **TINY)
    assert not before or len(os.listdir("/proc/self/fd")) <= before
    same(copy.deepcopy(done).params, done.params, 0)  # as a process pool sends it
    with machine.alone():
        with pytest.raises(cli.InputError, match="another run is at work in this process; start this one in a process"):
            train.train(data=data, **TINY)
    ids = prepare.open_data(data)[1]["val"]
    for others in (ids[:99], np.memmap(data / "val.bin", "<u2", "r"), np.array(ids)):
        prepare.check_unchanged(others)
    capsys.readouterr()
    texts = sample.sample(checkpoint=tmp_path / "run", prompt="Tom", max_new_tokens=9, num_samples=2, device="cpu")
    assert capsys.readouterr().out == "\n---\n".join(texts) + "\n" and len(texts) == 2
    assert repr(done) == f"Run('{tmp_path}/run', step=6, lowest={done.lowest:.4f})"
    for wrong, said in ((np.arange(9), "a ndarray: expected a text or a path$"), (b"x", "a bytes: expected a text"),
                        (done, "Run.*: no such data folder")):
        with pytest.raises(cli.InputError, match=f"--data={said}"):
            train.train(data=wrong)
    assert cli.convert("device", str, torch.device("cpu")) == "cpu" and cli.convert("x", str, np.int64(3)) == "3"
    monkeypatch.setitem(tinylm.OPTIMIZERS, "own", (None, lambda params, grads, state, lr, beta1, weight_decay: None))
    given = dict(optimizer="own", device="cpu", weight_decay=0.1)
    assert train.Settings.complete(given | dict(beta1=0.5)).beta1 == 0.5
    with pytest.raises(cli.InputError, match="--optimizer=own needs beta1; give --beta1"):
        train.Settings.complete(given)
    os.remove(data / "meta.json"), os.remove(data / ".lock")  # a folder as nanoGPT's
    with pytest.raises(cli.InputError, match="has no meta.json, so data/prepare.py did not write it; prepare the text"):
        train.train(data=data)
    assert not cli.Progress("x", stream=types.SimpleNamespace(write=None)).terminal

@pytest.mark.parametrize("remembers", [False, True])
def test_a_sampler_with_a_memory_is_not_recorded(remembers, monkeypatch):
    """What it keeps in the cache a record would lose, as on CUDA; it is told before a run."""
    def next_token(params, tokens, config, dtype, cache, *rest):
        token, new, stopped = plain(params, tokens, config, dtype, cache, *rest)
        seen = cache.get("seen", torch.zeros(len(token), config.vocab_size))
        return token, new | ({"seen": seen.scatter(1, token[:, None], 1.0)} if remembers else {}), stopped

    plain, genuine = tinylm.next_token.definition, tinylm.next_token
    monkeypatch.setattr(tinylm, "record", record_on_cpu)
    monkeypatch.setitem(tinylm.OPERATIONS, "next_token", genuine)  # so that it is put back
    monkeypatch.setattr(tinylm, "next_token", tinylm.operation(next_token))
    tinylm.next_token.forms.append((lambda params, tokens, *_: tokens.shape[1] == 1, tinylm.next_token_in_graph))
    with told_of("next_token") if remembers else contextlib.nullcontext():
        compare_forms()
    tokens = tinylm.generate(random_params(small_config()), torch.ones(1, 1, dtype=torch.int64), small_config(), 5, 0)
    refused = pytest.raises(NotImplementedError, match="of k, v, filled, seen in a cache")
    with refused if remembers else contextlib.nullcontext():
        assert len(list(tokens)) == 5

def test_small_models_that_forms_are_compared_by(monkeypatch, capsys):
    """Of one or two positions too; ranks, which compute block by block; and models that can't be small."""
    assert forms.small_model(small_config(context_length=2**31 - 1), "cpu").config.context_length == 8192
    for length in (1, 2):
        compare_forms(context_length=length, num_layers=3)
    check = functools.partial(compare_forms, context_length=2, num_layers=3)
    plain, genuine = tinylm.transformer_blocks.definition, tinylm.transformer_blocks

    def fork(transformer_blocks):
        monkeypatch.setitem(tinylm.OPERATIONS, "transformer_blocks", genuine)  # so that it is put back
        transformer_blocks.__name__ = "transformer_blocks"
        monkeypatch.setattr(tinylm, "transformer_blocks", tinylm.operation(transformer_blocks))
        tinylm.transformer_blocks.forms.append((lambda *args, **options: False, None))

    fork(lambda blocks, x, *rest, **options: x + plain(blocks, x, *rest, **options))
    check()
    with pytest.raises(cli.InputError, match="^--shard gathers one block at a time, which gives other"):
        check(shard=True)

    def shared(blocks, *rest, **options):  # the third block is the first again
        return plain(blocks | {"2": blocks["0"]} if "2" in blocks and "0" in blocks else blocks, *rest, **options)

    fork(shared)
    with pytest.raises(cli.InputError, match="^--shard gathers one block at a time, which gives other"):
        check(shard=True)
    check()
    assert not capsys.readouterr().out

    def of_three(blocks, *rest, **options):
        first, second, third = blocks
    fork(of_three)
    check()
    assert "is not known, as a small model fails: ValueError: not enough values to unpack" in capsys.readouterr().out
    fork(plain)
    monkeypatch.setattr(tinylm, "sample_token", lambda logits, *_: logits.nonesuch)  # which would end a run, only later
    check()
    assert "is not known, as a small model fails: AttributeError: 'Tensor' object has no" in capsys.readouterr().out

def test_updates_that_look_beyond_a_block(monkeypatch):
    """Such as a rate by layer, in the update's form too: compiled code, which has it block by block, can't know."""
    @functools.wraps(tinylm.adamw_update)
    def update(params, grads, state, lr, **own):
        new, state = genuine(params, grads, state, lr, **own)
        rate = lambda path: 0.5 if path.startswith("blocks.0.") else 1.0
        rates = tinylm.tree_build((path, rate(path)) for path, _ in tinylm.tree_leaves(params))
        return tinylm.tree_map(lambda rate, new, p: p + rate * (new - p), rates, new, params), state

    genuine = tinylm.adamw_update
    monkeypatch.setitem(tinylm.OPERATIONS, "adamw_update", genuine)  # so that it is put back
    monkeypatch.setattr(tinylm, "adamw_update", tinylm.operation(update))
    monkeypatch.setitem(tinylm.OPTIMIZERS, "adamw", (tinylm.adamw_init, tinylm.adamw_update))
    tinylm.adamw_update.forms.append((tinylm.always, update))
    for compiled in (False, True):
        with told_of("adamw_update") if compiled else contextlib.nullcontext():
            compare_forms(compile=compiled)

@pytest.mark.parametrize("flags", [{}, dict(compile=True), dict(optimizer="muon", compile=True)])
def test_each_form_of_adamw_is_compared(flags, monkeypatch):
    """What a CPU computes in place, where it serves, and what compiled code and a GPU do; their new state too."""
    genuine, in_place, few_passes = tinylm.adamw_update, tinylm.adamw_in_place, tinylm.adamw_update_in_few_passes

    def with_old_moments(params, grads, state, *own, **named):
        new, now = few_passes(params, grads, state, *own, **named)
        return new, now | {"v": state["v"]}

    changes = [(tinylm, "adamw_in_place", lambda params, grads, state, lr, *own, **named: in_place(
        params, grads, state, lr / 2, *own, **named))]
    changes += [(genuine, "forms", genuine.forms[:-1] + [(tinylm.always, form)]) for form in (
        with_old_moments, lambda params, grads, state, lr, *own, **named: few_passes(
            params, grads, state, lr / 2, *own, **named))]
    for change in changes[1:] if "optimizer" in flags else changes:
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            with told_of("adamw_update"):
                compare_forms(**flags)

def test_adamw_finds_gradients_by_name():
    """Of more tensors than there are parameters, in another order; and not of another shape, beyond which it'd read."""
    params, grads = tree_of((3, 4), (5,), (3, 4)), tree_of((3, 4), (5,), (3, 4), seed=3)
    del params["w1"]
    state, grads = tinylm.adamw_init(params), dict(reversed(grads.items()))
    expected = tinylm.adamw_update.definition(params, grads, state, 0.1)
    with torch.no_grad():
        same(tinylm.adamw_update(params, grads, state, 0.1), expected, 1e-5)
        with pytest.raises(ValueError, match="have different shapes; expected m and v as adamw_init has them"):
            tinylm.adamw_update(params, grads | {"w0": torch.ones(1)}, state, 0.1)
        halves = tinylm.tree_map(torch.Tensor.bfloat16, grads)  # which the kernel does not take
        expected = tinylm.adamw_update.definition(params, halves, state, 0.1)
        same(tinylm.adamw_update(params, halves, state, 0.1), expected, 1e-5)

@pytest.mark.parametrize("way", ["definition", "wrapper", "form"])
def test_adamw_that_is_another(way, tmp_path, monkeypatch):
    """A changed definition is told; a wrapper, and a form asked before that of a CPU, are asked in each step."""
    genuine, calls = tinylm.adamw_update, []
    forms = genuine.forms[:]

    @functools.wraps(genuine)  # and so it has the same forms
    def changed(params, grads, state, lr, *own, **named):
        calls.append(1)
        return genuine.definition(params, grads, state, lr / 2, *own, **named)

    monkeypatch.setitem(tinylm.OPERATIONS, "adamw_update", genuine)  # so that it is put back
    monkeypatch.setattr(genuine, "forms", [(tinylm.always, changed), *forms] if way == "form" else forms)
    if way == "definition":  # which begins with no form
        changed = tinylm.operation(changed)
        changed.forms[:] = forms
    if way != "form":
        monkeypatch.setattr(tinylm, "adamw_update", changed)
        monkeypatch.setitem(tinylm.OPTIMIZERS, "adamw", (tinylm.adamw_init, changed))
    if way == "definition":
        with told_of("adamw_update"):
            compare_forms()
    else:
        monkeypatch.setattr(train, "check_forms", lambda *_: calls.clear())  # as where the first steps are the same
        train.train(data=prepared(tmp_path), output_dir=tmp_path / "run", **TINY)
        assert len(calls) == TINY["num_steps"]

def test_parameters_with_gaps(tmp_path, monkeypatch):
    """As drawn by transposes: they are put in order before updates write over them."""
    flags, init_params = TINY | dict(data=prepared(tmp_path)), tinylm.init_params
    expected = train.train(output_dir=tmp_path / "plain", **flags).params
    turned = lambda p: p.T.contiguous().T if p.ndim == 2 else p
    monkeypatch.setattr(tinylm, "init_params", lambda *args: tinylm.tree_map(turned, init_params(*args)))
    same(train.train(output_dir=tmp_path / "turned", **flags).params, expected, 1e-5)

def test_hidden_states_that_become_float32(monkeypatch, capsys):
    """Are slow, and said, where they were to be bfloat16."""
    scale, swiglu = torch.ones(1), tinylm.swiglu
    monkeypatch.setattr(tinylm, "swiglu", lambda x, **weights: swiglu(x, **weights) * scale.to(weights["w_up"].dtype))
    for dtype in ("bfloat16", "float32"):
        compare_forms(dtype=dtype)
        said = capsys.readouterr().out
        assert ("--dtype=bfloat16: hidden states become float32," in said) == (dtype == "bfloat16"), said

@pytest.mark.parametrize("T", [1, 3])
def test_a_cache_that_is_full(T):
    """Takes no more, where a slice would hold fewer positions than came, and one broadcasts into none."""
    config = small_config()
    cache = tinylm.init_cache(config, 2, 4, torch.float32, "cpu") | {"filled": 4 - T + 1}
    for context in (contextlib.nullcontext(), tinylm.definitions_alone()):
        with context, pytest.raises(ValueError, match="5 positions in a cache of 4; let init_cache make a longer one"):
            tinylm.hidden_states(random_params(config), random_tokens(config, 2, T), config, cache=cache)
    with pytest.raises(ValueError, match="5 positions in a cache of 4; let init_cache make a longer one"):  # on CUDA
        tinylm.next_token_in_graph(random_params(config), random_tokens(config, 2, 1), config, torch.float32,
                                   cache | {"filled": 4}, torch.rand(2, 1), torch.zeros(2) > 0, 1.0, 0, 1.0, ())

def test_targets_of_another_shape(monkeypatch):
    """Serve every row, as they stand, or are refused, where gather would take them for the first rows."""
    monkeypatch.setattr(tinylm, "LOGITS_AT_ONCE", 200)  # pieces
    config = small_config()
    params, inputs = random_params(config), random_tokens(config, 3, 5)
    functions = (tinylm.loss_fn, tinylm.loss_fn.definition, tinylm.loss_in_pieces, lambda *args: (
        tinylm.token_losses_in_pieces(*args, torch.float32)), lambda params, inputs, targets, config: (
        tinylm.token_losses.definition(tinylm.forward(params, inputs, config), targets)))
    one = random_tokens(config, 1, 5, seed=1)
    for function in functions:
        same(function(params, inputs, one, config), function(params, inputs, one.repeat(3, 1), config), 1e-6)
        with pytest.raises(RuntimeError, match="expanded size"):
            function(params, inputs, random_tokens(config, 2, 5), config)
    with pytest.raises(RuntimeError, match="expanded size"):
        tinylm.mean_loss(randn(6, 8), randn(20, 8), torch.arange(4))

def test_one_number_draws_a_token_of_each_row():
    """By the form as by the definition."""
    logits, chance = randn(4, 50), torch.full((1, 1), 0.3, dtype=torch.float64)
    drawn = tinylm.sample_token(logits, chance, 1.0, 0, 0.9)
    assert drawn.equal(tinylm.sample_token.definition(logits, chance, 1.0, 0, 0.9)) and len(drawn) == 4

def test_definitions_alone_in_two_threads():
    """One that ends after the other leaves the forms that the first has put back."""
    forms = {name: operation.forms[:] for name, operation in tinylm.OPERATIONS.items()}
    first, second = tinylm.definitions_alone(), tinylm.definitions_alone(["linear"])
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None), second.__exit__(None, None, None)
    assert forms == {name: operation.forms for name, operation in tinylm.OPERATIONS.items()}

@torch.no_grad()
def test_tangents_of_a_single_row():
    """Are those of the definition, as numbers of Python's, which have none, serve in inference alone."""
    x, gain, tangent = (randn(1, 8, seed=seed).float() for seed in range(3))
    actual, expected = (torch.func.jvp(lambda x: norm(x, gain[0], 1e-5), (x,), (tangent,))[1]
                        for norm in (tinylm.rmsnorm, tinylm.rmsnorm.definition))
    same(actual, expected, 1e-5)

def test_definitions_alone_within_compiled_code():
    """Is compiled whole; and a name that is none leaves all as it is."""
    @functools.partial(torch.compile, fullgraph=True, backend="eager")
    def norm(x, gain):
        with tinylm.definitions_alone():
            return tinylm.rmsnorm(x, gain, 1e-5)

    forms, x, gain = tinylm.linear.forms[:], randn(3, 8), randn(8, seed=1)
    same(norm(x, gain), tinylm.rmsnorm(x, gain, 1e-5), 1e-6)
    with pytest.raises(KeyError), tinylm.definitions_alone(["linear", "silu"]):
        pass
    assert tinylm.linear.forms == forms

def test_a_cache_of_more_than_keys_and_values(monkeypatch):
    """Keeps the dtype that its definition gives it, but for these."""
    definition = tinylm.init_cache.definition
    monkeypatch.setattr(tinylm.init_cache, "definition", lambda config, batch_size, length, dtype, device: definition(
        config, batch_size, length, dtype, device) | {"last": torch.zeros(batch_size, 1, dtype=dtype)})
    cache = tinylm.init_cache(small_config(), 2, 5, torch.bfloat16, "cpu")
    assert [cache[name].dtype for name in ("k", "v", "last")] == [torch.float32, torch.float32, torch.bfloat16]
    monkeypatch.setattr(tinylm.init_cache, "definition", lambda *_: {"latent": torch.zeros(2, dtype=torch.bfloat16)})
    assert tinylm.init_cache(small_config(), 2, 5, torch.bfloat16, "cpu")["latent"].dtype == torch.bfloat16

@pytest.mark.parametrize("name, form", [
    ("attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1, scale=0.1)),
    ("token_losses", lambda logits, targets: logits.logsumexp(-1)),
    ("sample_token", lambda logits, *_: logits.argmax(-1))])
def test_what_is_evaluated_or_written_by_other_forms(trained, name, form, monkeypatch):
    """Is refused as training is: a changed definition would be passed over without a word."""
    data.forms.compare_reading.cache_clear()
    monkeypatch.setattr(data.forms.threading, "active_count", lambda: 1)  # other tests may have left some
    monkeypatch.setattr(tinylm.OPERATIONS[name], "forms", [(tinylm.always, form)])
    with told_of(name):
        train.train(eval_only=True, resume=trained / "runs/tiny", eval_tokens=100)
    with told_of(name):
        sample.sample(checkpoint=trained / "runs/tiny", max_new_tokens=2)

def test_a_definition_that_is_changed_in_a_process_that_wrote(trained, monkeypatch):
    """As in a notebook: what was compared before it is compared again."""
    monkeypatch.setattr(data.forms.threading, "active_count", lambda: 1)  # other tests may have left some
    sample.sample(checkpoint=trained / "runs/tiny", max_new_tokens=2)
    monkeypatch.setattr(tinylm, "silu", torch.relu)
    with told_of("gated_silu"):
        sample.sample(checkpoint=trained / "runs/tiny", max_new_tokens=2)
    monkeypatch.undo()
    monkeypatch.setattr(data.forms.threading, "active_count", lambda: 1)
    sample.sample(checkpoint=trained / "runs/tiny", max_new_tokens=2)
    monkeypatch.setattr(tinylm.gated_silu, "forms", [(tinylm.always, torch.mul)])
    with told_of("gated_silu"):
        sample.sample(checkpoint=trained / "runs/tiny", max_new_tokens=2)

def test_texts_written_beside_other_threads(trained, monkeypatch):
    """Leave the forms of these on, which compute by them; and a process compares once."""
    forms, seen = {name: target.forms[:] for name, target in tinylm.OPERATIONS.items()}, []
    monkeypatch.setattr(data.forms, "writing", lambda model: seen.append(1))
    write = lambda _: sample.sample(checkpoint=trained / "runs/tiny", max_new_tokens=2, device="cpu")
    data.forms.compare_reading.cache_clear()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(write, range(4)))) == 4
    assert not seen and forms == {name: target.forms for name, target in tinylm.OPERATIONS.items()}

def test_a_cache_that_does_not_follow(trained, monkeypatch, capsys):
    """Is told, before training and by what writes: training has no cache."""
    plain = tinylm.cached_attention.definition
    monkeypatch.setattr(tinylm, "cached_attention", lambda q, k, v, cache: plain(1.5 * q, k, v, cache))
    compare_forms()
    assert "what the model writes is not what it learns" in capsys.readouterr().out
    data.forms.compare_reading.cache_clear()
    monkeypatch.setattr(data.forms.threading, "active_count", lambda: 1)  # other tests may have left some
    sample.sample(checkpoint=trained / "runs/tiny", prompt="It", max_new_tokens=2)
    told = capsys.readouterr()
    assert "what the model writes is not what it learns" in told.err and told.out.startswith("It")

@pytest.mark.parametrize("is_stale", [False, True])
def test_a_cache_that_keeps_what_was_before(is_stale, monkeypatch, capsys):
    """Where it is emptied by a count of 0, as generate does beyond the context."""
    def hidden_states(params, tokens, config, dtype=torch.float32, cache=None, remat=False):
        x, new = plain(params, tokens, config, dtype, cache, remat)
        is_kept = cache and "last" in cache and (cache["filled"] or is_stale)
        last = cache["last"] if is_kept else torch.zeros_like(x[:, 0])
        return x + torch.cat((last[:, None], x[:, :-1]), 1), new and new | {"last": x[:, -1]}

    plain = tinylm.hidden_states
    monkeypatch.setattr(tinylm, "hidden_states", hidden_states)
    compare_forms()
    assert ("not what it learns" in capsys.readouterr().out) == is_stale

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forks_that_round(dtype, monkeypatch, capsys):
    """Are no other model: parts in float32, and choices that fall otherwise in bfloat16."""
    cross_entropy, swiglu = tinylm.cross_entropy, tinylm.swiglu
    part = {"float32": lambda x, **weights: swiglu(x.float(), **weights).to(x.dtype),
            "bfloat16": lambda x, **weights: swiglu(x, **weights) + (12 * x).sin()}[dtype]
    monkeypatch.setattr(tinylm, "cross_entropy", lambda logits, targets: cross_entropy(logits.float(), targets))
    monkeypatch.setattr(tinylm, "swiglu", part)
    compare_forms(dtype=dtype)
    assert not capsys.readouterr().out

def test_a_model_without_numbers(monkeypatch, capsys):
    swiglu = tinylm.swiglu
    monkeypatch.setattr(tinylm, "swiglu", lambda x, **weights: swiglu(x, **weights) * math.nan)
    compare_forms()
    assert capsys.readouterr().out.count("as a small model fails: FloatingPointError: its loss is not finite") == 1

def test_dropout_in_evaluations_is_told(monkeypatch, capsys):
    swiglu = tinylm.swiglu
    for training, count in ((lambda: True, 1), (torch.is_grad_enabled, 0)):
        monkeypatch.setattr(tinylm, "swiglu", lambda x, **weights: F.dropout(swiglu(x, **weights), 0.5, training()))
        compare_forms()
        assert capsys.readouterr().out.count("draws numbers in evaluations and in sampling too") == count

def test_evaluations_that_fail_do_so_before_a_run(monkeypatch):
    """As where all that calls a changed definition was changed in part I alone."""
    def forward(params, tokens, config, dtype=torch.float32, remat=False):
        return tinylm.to_logits(params, tinylm.hidden_states(params, tokens, config, dtype)[0], config)

    def next_token(params, tokens, config, dtype, cache, chance, stopped, *_):
        x, cache = tinylm.hidden_states(params, tokens, config, dtype, cache)
        return tinylm.to_logits(params, x[:, -1], config).argmax(-1), cache, stopped

    plain = tinylm.to_logits
    monkeypatch.setattr(tinylm, "to_logits", lambda params, x, config: plain(params, x))
    monkeypatch.setattr(tinylm, "forward", forward)
    monkeypatch.setattr(tinylm, "next_token", next_token)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'config'"):
        compare_forms()

def test_parameters_of_another_dtype(monkeypatch):
    """Are refused before a run that could not be resumed; an update of them has the definition's numbers."""
    init_params = tinylm.init_params
    monkeypatch.setattr(tinylm, "init_params", lambda *args: tinylm.tree_map(torch.Tensor.double, init_params(*args)))
    with pytest.raises(cli.InputError, match="init_params makes embedding of float64, expected float32"):
        compare_forms()
    for kinds in itertools.product((torch.float64, torch.bfloat16, torch.float32), repeat=2):
        params, grads = (tree_of((3, 4), (5,), seed=i, dtype=kind) for i, kind in enumerate(kinds))
        expected = tinylm.adamw_update.definition(params, grads, tinylm.adamw_init(params), 0.1)
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                same(tinylm.adamw_update(params, grads, tinylm.adamw_init(params), 0.1), expected, 1e-5)

def test_adamw_keeps_the_dtype_of_scalars():
    """Whose moments, over corrections in float64, would be float64."""
    params = {"scale": torch.ones(()), "w": torch.ones(2, 2)}
    with tinylm.definitions_alone():
        updated = tinylm.adamw_update(params, params, tinylm.adamw_init(params), torch.tensor(1e-2))
    leaves = [leaf for tree in updated for leaf in tinylm.tree_leaves(tree)]
    assert {path for path, p in leaves if p.dtype != torch.float32} == {"step"}

def test_an_update_that_draws_numbers(monkeypatch, as_rank):
    """Of which ranks would draw others; one process may, and its forms are compared all the same."""
    init, update = tinylm.OPTIMIZERS["adamw"]

    @functools.wraps(update)
    def noisy(params, grads, *args, **own):
        return update(params, tinylm.tree_map(lambda g: g + torch.randn_like(g), grads), *args, **own)

    monkeypatch.setitem(tinylm.OPTIMIZERS, "adamw", (init, noisy))
    compare_forms()
    with monkeypatch.context() as patch, told_of("clip_gradients"):
        patch.setattr(tinylm.clip_gradients, "forms", [(tinylm.always, lambda grads, *_: grads)])
        compare_forms()
    as_rank(1, 2)
    with pytest.raises(cli.InputError, match="draws numbers, .* by a torch.Generator that is seeded"):
        compare_forms()

@pytest.mark.parametrize("way", ADAMW)
def test_corrections_of_adamw_do_not_cancel(way):
    """Even with betas so near 1 that float32 has few digits of what they lack: the first step is lr · sign(g)."""
    params = {"w": torch.zeros(2, 2)}
    new, _ = ADAMW[way](params, {"w": torch.ones(2, 2)}, tinylm.adamw_init(params), 1e-2, 0.9999, 1 - 1e-6)
    same(new["w"], torch.full((2, 2), -1e-2), 1e-5)

def test_scalars_cannot_be_split(monkeypatch):
    shapes = tinylm.param_shapes
    monkeypatch.setattr(tinylm, "param_shapes", lambda config: shapes(config) | {"scale": ()})
    with pytest.raises(cli.InputError, match="--shard splits along the first axis, and scale has none; give it the sh"):
        compare_forms(shard=True)
    compare_forms()

def test_comparing_forms_leaves_them_as_they_are():
    before = [*tinylm.transformer_blocks.forms]
    compare_forms(shard=True)
    assert tinylm.transformer_blocks.forms == before

def test_a_loss_that_is_not_evaluated(monkeypatch, capsys):
    """Is told of: scores that are capped where only training reads them."""
    compare_forms()
    assert not capsys.readouterr().out
    forward = tinylm.forward
    for cap in (1, 30):
        monkeypatch.setattr(tinylm, "forward", lambda *args, **options: cap * (forward(*args, **options) / cap).tanh())
        compare_forms()
        assert "training lowers another loss" in capsys.readouterr().out

def test_states_that_share_memory(tmp_path, monkeypatch):
    """As of an optimiser that begins with the parameters themselves. Updates in place are those of eager code."""
    def heavy_ball(params, grads, state, lr, momentum=0.5):
        step = lambda p, g, before: p - lr * g + momentum * (p - before)
        return tinylm.tree_map(step, params, grads, state["previous"]), {"previous": params}

    monkeypatch.setitem(tinylm.OPTIMIZERS, "heavy_ball", (lambda params: {"previous": params}, heavy_ball))
    compiler, data = torch.compile, prepared(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function, fullgraph=True, backend="aot_eager"))
    for compiled in (False, True):
        train.train(**TINY | dict(data=data, output_dir=tmp_path / str(compiled), optimizer="heavy_ball", lr_max=0.1,
                                  compile=compiled))
    same_run(tmp_path / "False", tmp_path / "True")

def test_signals_while_a_compiler_is_at_work():
    """Which they end too: this is no error of the compiler."""
    failed = type("InductorError", (Exception,), {"__module__": "torch._inductor.exc"})
    for asked, error, seen in ((signal.SIGINT, failed, KeyboardInterrupt), (None, failed, failed),
                               (signal.SIGINT, OSError, OSError), (signal.SIGTERM, failed, SystemExit)):
        with pytest.raises(seen) as ended, machine.Interrupt():
            if asked:
                signal.raise_signal(asked)
            raise error
    assert ended.value.code == 143

def test_a_model_that_writes_as_it_does_not_learn(tmp_path, monkeypatch, capsys):
    """Is told of: here one whose positions see their neighbour, but not across what the cache has."""
    flags = TINY | dict(data=prepared(tmp_path), output_dir=tmp_path / "run")
    train.train(**flags)
    said = "what the model writes is not what it learns"
    assert said not in capsys.readouterr().out
    swiglu = tinylm.swiglu
    monkeypatch.setattr(tinylm, "swiglu", lambda x, **weights: swiglu(x + F.pad(x, (0, 0, 1, 0))[:, :-1], **weights))
    train.train(**flags | dict(output_dir=tmp_path / "other"))
    assert capsys.readouterr().out.count(said) == 1

@pytest.mark.parametrize("remat", [False, True])
def test_dropout_of_a_fork_resumes_bit_for_bit(tmp_path, monkeypatch, capsys, remat):
    """What a step draws depends on the seed and the step alone; the caller's own numbers go on as before."""
    data, swiglu = prepared(tmp_path), tinylm.swiglu
    monkeypatch.setattr(tinylm, "swiglu", lambda x, **weights: F.dropout(swiglu(x, **weights), 0.5))
    before = torch.get_rng_state()
    train.train(data=data, output_dir=tmp_path / "whole", **TINY)
    train.train(data=data, output_dir=tmp_path / "two", remat=remat, **TINY | dict(checkpoint_interval=3))
    assert torch.get_rng_state().equal(before) and "not what it learns" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "two/step-0000006")
    train.train(resume=tmp_path / "two", remat=not remat)
    names = "model.safetensors", "training/optimizer.safetensors"
    contents = [[(tmp_path / folder / "latest" / name).read_bytes() for name in names] for folder in ("whole", "two")]
    assert contents[0] == contents[1]

def test_a_new_parameter_makes_another_model(monkeypatch):
    """Which other tools refuse, where they would compute without it."""
    assert checkpoint.config_to_hf(small_config(tie_embeddings=True, num_kv_heads=1), 0, 0)["model_type"] == "llama"
    shapes = tinylm.param_shapes
    monkeypatch.setattr(tinylm, "param_shapes", lambda config: shapes(config) | {"positions": (9, 9)})
    assert checkpoint.config_to_hf(small_config(), 0, 0)["model_type"] == "tinylm"

def test_a_field_that_a_config_json_changes_is_refused(monkeypatch):
    """One of its own that is nothing leaves a Llama what it is; by a name of a Llama's one is saved as that."""
    @dataclass(frozen=True)
    class Other(tinylm.Config):
        windows: tuple = ()
        word: str = None

    monkeypatch.setattr(checkpoint, "Config", Other)
    assert checkpoint.config_to_hf(Other(257, 16, 8, 1, 1), 0, 0)["model_type"] == "llama"
    hf = checkpoint.config_to_hf(Other(257, 16, 8, 1, 1, word="relu"), 0, 0)
    assert (hf["model_type"], hf["tinylm_word"]) == ("tinylm", "relu") and "tinylm_windows" not in hf
    monkeypatch.setitem(checkpoint.HF_SIZES, "word", "tinylm_w")  # as forks did before
    assert checkpoint.config_to_hf(Other(257, 16, 8, 1, 1), 0, 0)["model_type"] == "llama"
    with pytest.raises(cli.InputError, match=r"windows \(1, 2\) would come back from config.json as \[1, 2\]"):
        checkpoint.config_to_hf(Other(257, 16, 8, 1, 1, windows=(1, 2)), 0, 0)

def test_a_fork_loses_nothing(tmp_path):
    """A field, a parameter, an optimiser and a schedule, added to a copy of the code as a forker would."""
    prepared(tmp_path)
    for name in ("tinylm.py", "train.py", "sample.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for old, new in FORK.get(name, []):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / name).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "data", tmp_path / "code",
                    ignore=lambda folder, names: [n for n in names if not n.endswith(".py")])
    (tmp_path / "prepared").mkdir()
    (tmp_path / "data").rename(tmp_path / "prepared/text")
    (tmp_path / "code").rename(tmp_path / "data")
    flags = TINY | dict(data=str(tmp_path / "prepared/text"), output_dir="run", optimizer="lion", schedule="wsd",
                        window=8, beta2=0.98, sharpness=2.0)
    program = f"""if True:
        import json, os, shutil, tinylm, train
        from data import checkpoint, gguf
        from data.cli import InputError
        flags = {flags!r}

        def refused(*words, command=train.train, **changes):
            try:
                command(**flags | changes)
            except InputError as error:
                assert all(word in str(error) for word in words) and "\\n" not in str(error), error
                return
            raise AssertionError(words)

        for window in (0, 8):  # the first, the default, asks for nothing
            config = tinylm.Config(257, 16, 8, 1, 1, window=window)
            hf = checkpoint.config_to_hf(config, 0, 0)
            assert ("tinylm_window" in hf) == bool(window) and checkpoint.config_from_hf(hf, "it") == config, hf
        refused("blocks.{{}}.query_gain would be lost in a checkpoint", "HF_NAMES")
        checkpoint.HF_NAMES["blocks.{{}}.query_gain"] = "model.layers.{{}}.query_gain.weight"
        refused("lion has no eps", eps=1e-6)
        tinylm.SCHEDULES["odd"] = lambda step, lr_max, twist: lr_max
        refused("--schedule=odd needs twist", schedule="odd")
        assert not os.path.exists("run")
        train.train(**flags)
        params, config = checkpoint.load_checkpoint("run/latest")
        assert config.window == 8 and "query_gain" in params["blocks"]["0"]
        assert json.load(open("run/latest/config.json"))["model_type"] == "tinylm"
        plain = lambda params, grads, state, lr: (tinylm.tree_map(lambda p, g: p - lr * g, params, grads), state)
        tinylm.OPTIMIZERS["sgd"] = lambda params: {{}}, plain
        own = {{name: flags[name] for name in flags.keys() - {{"beta2", "sharpness"}}}}
        train.train(**own | dict(optimizer="sgd", output_dir="sgd"))
        train.train(resume="sgd", num_steps=8)
        rates = [json.loads(line)["lr"] for line in open("run/metrics.jsonl") if "train_loss" in line]
        assert rates == [4e-3 * (128 / 32) ** 0.5 * share for share in (1, 1, 1, 1, 1, 0.5)], rates
        train.train(resume="run", num_steps=8)
        assert checkpoint.load_checkpoint("run/latest")[1].window == 8
        import sample
        sample.sample(checkpoint="run", max_new_tokens=3)
        refused("window 8 would be lost in a GGUF file", command=lambda **_: gguf.export("run"))
        changed = json.load(open(shutil.copytree("run/latest", "changed") + "/config.json"))
        as_advised = changed | {{"tinylm_window": 0, "model_type": "llama"}}
        json.dump(as_advised, open("changed/config.json", "w"))
        refused("query_gain has no name in a GGUF", command=lambda **_: gguf.export("changed"))
        del params["blocks"]["0"]["mlp"]["w_gate"]
        plain = tinylm.Config(50, 8, 8, 2, 2)
        refused("has no blocks.{{}}.mlp.w_gate", command=lambda **_: gguf.check_is_llama(params, plain))
        state = json.load(open("run/latest/training/train_state.json"))
        state["settings"]["window"] = 4
        json.dump(state, open("run/latest/training/train_state.json", "w"))
        try:
            train.train(resume="run", num_steps=9)
        except InputError as error:
            assert "window=8" in str(error) and "window=4" in str(error), error
        else:
            raise AssertionError("another model")
        state["settings"]["depth_scale"] = 4
        json.dump(state, open("run/latest/training/train_state.json", "w"))
        try:
            train.train(resume="run", num_steps=9)
        except InputError as error:
            assert "depth_scale" in str(error), error
        else:
            raise AssertionError("a setting that this code has not")
        """
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.raises(cli.InputError, match="has tinylm_window.*the code that wrote it"):  # as this one knows of none
        checkpoint.load_config(tmp_path / "run/latest")
    with pytest.raises(ValueError, match="model type `tinylm`"):
        transformers.AutoConfig.from_pretrained(tmp_path / "run/latest")

@pytest.mark.parametrize("flags", [
    {"num_steps": np.int64(2), "lr_max": np.float32(0.01), "batch_size": "4", "log_interval": 1e0,
     "compile": np.bool_(False)},
    {"num_steps": 2.0, "lr_max": "1e-2", "batch_size": 4, "eval_interval": "1_0", "compile": "False",
     "seed": "9007199254740993"}])
def test_values_from_python(tmp_path, flags):
    """Paths, NumPy's numbers and texts that are numbers are what they mean; a name that is none gets the nearest."""
    data = prepared(tmp_path)
    train.train(data=data, output_dir=tmp_path / "run", **TINY | flags)
    state = json.loads((tmp_path / "run/latest/training/train_state.json").read_text())["settings"]
    assert state["data"] == str(data) and state["num_steps"] == 2
    assert state["batch_size"] == 4 and state["compile"] is False
    assert state["lr_max"] == pytest.approx(0.01) and state["seed"] == int(flags.get("seed", 0))
    for wrong, message in ((dict(d_modle=3), "did you mean --d_model"), (dict(num_steps=2.5), "whole number"),
                           (dict(num_steps=True), "whole number"), (dict(lr_max=math.nan), "of 0 or more"),
                           (dict(beta1=1), "below 1")):
        with pytest.raises(cli.InputError, match=message):
            train.train(data=data, output_dir=tmp_path / "other", **TINY | wrong)
    assert not (tmp_path / "other").exists()

def test_settings_are_given_back(tmp_path):
    """After a run, and after one that failed, torch and signals are as the caller had them, and the folder is free."""
    names = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    now = lambda: (*map(signal.getsignal, names), torch.are_deterministic_algorithms_enabled(),
                   torch.get_float32_matmul_precision(), torch.utils.deterministic.fill_uninitialized_memory)
    torch.set_float32_matmul_precision("high")
    try:
        data, before = prepared(tmp_path), now()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(log.Diverged):
            poisoned(patch, range(1, 20))
            train.train(data=data, output_dir=tmp_path / "run", **TINY | dict(num_steps=20, checkpoint_interval=1))
        assert now() == before
        train.train(resume=tmp_path / "run", num_steps=3)
        assert now() == before
    finally:
        torch.set_float32_matmul_precision("highest")

def test_precisions_by_their_newer_names():
    """Are no obstacle, where the older one can't be read then; and are as they were afterwards."""
    program = """if True:
        import os, torch
        from data import machine
        places = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        now = lambda: [place.fp32_precision for place in places]
        for place in places:
            if os.fork():  # as none goes back to what it was
                assert os.wait()[1] == 0
                continue
            place.fp32_precision = "tf32"
            before = now()
            for device, expected in (("cpu", "highest"), ("cuda", "high")):
                with machine.numerics(device):
                    assert torch.get_float32_matmul_precision() == expected
                assert now() == before
            break
        """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

# ---- Starting from an existing model ----

def test_init_from_goes_on_with_the_model(tmp_path, monkeypatch):
    """A model of transformers is trained on, with its own sizes, on data in its own vocabulary."""
    data = prepared(tmp_path)
    llama = transformers.LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(llama).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    flags = dict(num_steps=2, log_interval=1, lr_max=0.0, device="cpu", data=str(data))
    train.train(init_from=str(tmp_path / "llama"), output_dir=str(tmp_path / "run"), **flags)
    before, config = checkpoint.load_checkpoint(tmp_path / "llama")
    after, same_config = checkpoint.load_checkpoint(tmp_path / "run/latest")
    assert config == same_config
    same(after, before, 0)
    with pytest.raises(cli.InputError, match="--d_model=64.*has d_model 32"):
        train.train(init_from=str(tmp_path / "llama"), d_model=64, **flags)
    losses = {line["step"]: line["val_loss"] for line in metrics(tmp_path / "run") if "val_loss" in line}
    assert list(losses) == [0, 1, 2] and losses[0] == losses[2]  # a rate of 0 has changed nothing
    text = tmp_path / "corpus.txt"
    with pytest.raises(cli.InputError, match="llama has no tokenizer.json to read .*corpus.txt by; put the model's th"):
        train.train(init_from=tmp_path / "llama", **flags | dict(data=text))
    evaluations_give(FALLING_THEN_RISING, monkeypatch)
    train.train(data=str(data), output_dir=str(tmp_path / "own"), **TINY | dict(eval_interval=1, keep_checkpoints=9))
    train.train(init_from=str(tmp_path / "own"), output_dir=str(tmp_path / "next"), **flags)
    best, newest = run.best(tmp_path / "own"), run.newest(tmp_path / "own")
    same(checkpoint.load_checkpoint(tmp_path / "next/latest")[0], checkpoint.load_checkpoint(best)[0], 0)
    assert best != newest
    with pytest.raises(cli.InputError, match="--init_from=.*/nowhere is not there; expected a run"):
        train.train(init_from=str(tmp_path / "nowhere"), **flags)
    prepare.prepare(input=str(tmp_path / "corpus.txt"), output=str(tmp_path / "again"),
                    tokenizer=str(tmp_path / "run/latest"))
    assert (tmp_path / "again/train.bin").read_bytes() == (data / "train.bin").read_bytes()

def other_model(kind, folder):
    """A random model of transformers, with the shape of another family's and its tokenizer, as their folders are."""
    theirs, ours = tokenizer_like(kind, folder)
    special = list(ours.special_tokens)
    shape = dict(vocab_size=ours.vocab_size, hidden_size=36, intermediate_size=96, num_hidden_layers=3,
                 num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=64, tie_word_embeddings=True,
                 rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0)
    if kind == "llama3":
        rope = dict(rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=16)
        shape |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, eos_token_id=[1, 2],
                      rope_parameters=rope)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, initializer_range=0.2)).bfloat16()
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=theirs, bos_token=special[0], eos_token=special[0 if kind == "smollm" else 1],
        chat_template="{{ messages }}").save_pretrained(folder)
    return folder

def transformers_text(folder, prompt, count=20):
    """What generate writes greedily after a plain prompt, in float32, special tokens left out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, inputs.input_ids.shape[1]:]
    return tokenizer.decode(tokens, skip_special_tokens=True)

@pytest.mark.parametrize("kind", ["smollm", "llama3"])
def test_models_of_other_families(tmp_path, monkeypatch, capsys, kind):
    """They open, write what transformers writes, are fine-tuned on a text file, saved as they were, and open there."""
    (tmp_path / "theirs").mkdir()
    folder = other_model(kind, tmp_path / "theirs")
    params, config = checkpoint.load_checkpoint(folder)
    tokens = random_tokens(config, 2, 60)
    model = hf_model(folder).float()
    with torch.no_grad():
        same(tinylm.forward(params, tokens, config), model(tokens).logits, 1e-4)
    prompt = "Once upon 12 time, I'LL"
    sample.sample(checkpoint=folder, prompt=prompt, temperature=0, max_new_tokens=20, dtype="float32")
    assert capsys.readouterr().out == prompt + transformers_text(folder, prompt) + "\n"

    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    text = tmp_path / "book.txt"
    text.write_text(many_stories(40, end=END))
    train.train(init_from=folder, data=text, output_dir=tmp_path / "run", num_steps=5, eval_interval=5, device="cpu",
                context_length=32)
    new = tmp_path / "run/latest"
    prepared_folder, = (tmp_path / "data").iterdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (new / name).read_bytes() == (folder / name).read_bytes()
    ids = json.loads((new / "config.json").read_text())
    assert all(ids[name] == getattr(model.config, name) for name in ("bos_token_id", "eos_token_id"))
    assert {t.dtype for t in load_file(new / "model.safetensors").values()} == {torch.bfloat16}
    before, after = checkpoint.load_checkpoint(folder), checkpoint.load_checkpoint(new)
    assert before[1] == tinylm.Config(**vars(after[1]) | {"context_length": 64})
    assert not before[0]["embedding"].equal(after[0]["embedding"])
    sample.sample(checkpoint=tmp_path / "run", prompt=prompt, temperature=0, max_new_tokens=20, dtype="float32")
    assert capsys.readouterr().out.endswith(prompt + transformers_text(new, prompt) + "\n")
    meta, ids = prepare.open_data(prepared_folder)
    theirs, end = transformers.AutoTokenizer.from_pretrained(folder), meta["end_of_text_id"]
    expected = [i for n in range(40) for i in theirs(stories.story(0, n)).input_ids + [end]]  # each begins as a prompt
    assert len(ids["train"]) >= 0.85 * len(expected) and ids["train"].tolist() == expected[:len(ids["train"])]
    train.train(eval_only=True, init_from=tmp_path / "run", data=text)
    tokens = f"{len(expected) - (kind == 'llama3'):,} tokens"  # the first has nothing before it, or one more end
    assert tokens in capsys.readouterr().out

    train.train(data=prepared_folder, output_dir=tmp_path / "new", d_model=32, num_steps=2, device="cpu")
    assert bpe.special_ids(tmp_path / "new/latest", bpe.load(prepared_folder))[0] == meta["begin_ids"]
    capsys.readouterr()
    sample.sample(checkpoint=tmp_path / "new", prompt=prompt, temperature=0, max_new_tokens=20)
    out = capsys.readouterr().out.replace("<|begin_of_text|>", "")  # special tokens are shown here, and not there
    assert out == prompt + transformers_text(tmp_path / "new/latest", prompt) + "\n"

def test_a_plain_prompt_is_continued_alike_elsewhere(trained, capsys, caplog, recwarn):
    """In transformers by generate, by its pipeline, and in a batch of unequal prompts; without a warning."""
    folder, prompts = trained / "runs/tiny/latest", ["Once upon a time", "It was", "There was a small fox and"]
    for prompt in prompts:
        sample.sample(checkpoint=folder, prompt=prompt, temperature=0, max_new_tokens=20, device="cpu")
    ours = capsys.readouterr().out
    recwarn.clear()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    flags = dict(max_new_tokens=20, do_sample=False)
    texts = lambda rows: "".join(tokenizer.decode(row, skip_special_tokens=True) + "\n" for row in rows)
    assert texts(model.generate(**tokenizer(prompt, return_tensors="pt"), **flags)[0] for prompt in prompts) == ours
    assert texts(model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **flags)) == ours
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    assert "".join(pipe(prompt, **flags)[0]["generated_text"] + "\n" for prompt in prompts) == ours
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert not [w for w in recwarn if "torch" not in str(w.filename)]

def test_sixteen_bits_resume_exactly(tmp_path):
    """The model is saved in bfloat16, and training goes on from float32."""
    flags = TINY | dict(data=prepared(tmp_path), save_dtype="bfloat16")
    train.train(output_dir=tmp_path / "whole", **flags)
    train.train(output_dir=tmp_path / "stopped", **flags)
    shutil.rmtree(tmp_path / "stopped/step-0000006")
    train.train(resume=tmp_path / "stopped")
    for name in ("model.safetensors", checkpoint.MASTER, "training/optimizer.safetensors"):
        whole = (tmp_path / "whole/step-0000006" / name).read_bytes()
        assert whole == (tmp_path / "stopped/step-0000006" / name).read_bytes()
    master, model = (load_file(tmp_path / "whole/latest" / name) for name in (checkpoint.MASTER, "model.safetensors"))
    assert all(model[name].equal(master[name].bfloat16()) for name in master)
    size = sum(path.stat().st_size for path in (tmp_path / "whole/step-0000006").rglob("*.safetensors"))
    assert json.loads((tmp_path / "whole/latest/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert 1 <= size / run.checkpoint_bytes(checkpoint.load_config(tmp_path / "whole/latest")) < 1.1  # with headers

def test_each_version_of_a_text_has_its_own_data(tmp_path, monkeypatch):
    """So a run whose text has changed, or whose text has the name of a corpus or of another text, loses nothing."""
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    (tmp_path / "a").mkdir()
    text, namesake, corpus = tmp_path / "book.txt", tmp_path / "a/book.txt", tmp_path / "stories.txt"
    for path in (text, namesake, corpus):
        path.write_text("Once upon a time there was a cat. " * 100)
    flags = dict(data=text, output_dir=tmp_path / "run", resume="auto") | TINY
    train.train(**flags | dict(num_steps=3))
    first = prepare.find_data(str(text))
    assert prepare.find_data(str(text)) == first and len(list((tmp_path / "data").iterdir())) == 1
    text.write_text("There was a fox. " * 300)
    folders = {first, *(prepare.find_data(str(path)) for path in (text, namesake, corpus))}
    assert len(folders) == 4 and tmp_path / "data/stories" not in folders
    train.train(**flags)  # on the first version
    other = prepare.find_data(str(text), tmp_path / "run/latest")
    assert bpe.are_same(bpe.load(other), bpe.load(first)) and other not in folders

def test_a_fine_tuning_restarts(tmp_path, monkeypatch):
    """As a scheduler does it, with the same flags; and a corpus is prepared with the model's tokenizer."""
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    monkeypatch.setattr(prepare, "NUM_STORIES", {"train.txt": 60, "val.txt": 10})
    train.train(data=prepared(tmp_path), output_dir=tmp_path / "base", **TINY)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/book.txt").write_text("Once upon a time there was a cat. " * 100)
    for data in (tmp_path / "text/book.txt", "stories"):
        flags = dict(init_from=tmp_path / "base/latest", data=data, resume="auto", device="cpu", eval_interval=3)
        output = tmp_path / f"run of {Path(data).name}"
        train.train(output_dir=output, num_steps=3, **flags)
        train.train(output_dir=output, num_steps=6, **flags)
        assert run.newest(output).name == "step-0000006"

def test_two_processes_want_one_text(tmp_path):
    (tmp_path / "book.txt").write_text(many_stories(2000))
    program = f"""if True:
        from data import prepare
        from pathlib import Path
        prepare.DATA = Path({str(tmp_path)!r}) / "data"
        meta, ids = prepare.open_data(prepare.find_data({str(tmp_path / "book.txt")!r}))
        prepare.check_unchanged(ids["train"]), __import__("time").sleep(1), prepare.check_unchanged(ids["train"])
        """
    start = lambda: subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, text=True)
    both = [start(), start()]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in both] == [("", 0), ("", 0)]

def test_what_is_refused_is_named(tmp_path, tokenizer_file, saved):
    """Before weights are read."""
    folder = saved()
    os.rename(folder / "tokenizer.json", folder / "tokenizer.model")
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    for function, flag in ((sample.sample, "checkpoint"), (train.train, "init_from")):
        with pytest.raises(cli.InputError, match="SentencePiece"):
            function(**{flag: folder})
    os.rename(folder / "pytorch_model.bin", folder / "model.safetensors")
    description = json.loads(Path(tokenizer_file).read_text())
    description["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(cli.InputError, match="it is a SentencePiece tokenizer"):
        sample.sample(checkpoint=folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "eight.safetensors")
    with pytest.raises(cli.InputError, match="eight.safetensors: lm_head.weight is of F8_E4M3; expected one of F64"):
        checkpoint.load_checkpoint(folder, name="eight.safetensors")
    header = b'{"lm_head.weight": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}'
    (folder / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(cli.InputError, match="odd.safetensors is damaged"):
        checkpoint.load_checkpoint(folder, name="odd.safetensors")
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 5}}')
    with pytest.raises(cli.InputError, match="model.safetensors.index.json is damaged"):
        checkpoint.load_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../x.safetensors"}}')
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(cli.InputError, match="lacks ../x.safetensors"):
        checkpoint.load_checkpoint(folder)
    os.remove(folder / "model.safetensors.index.json")
    with pytest.raises(cli.InputError, match="pickles, pytorch_model.bin.*save_pretrained"):
        sample.sample(checkpoint=folder)

# ---- Files that are damaged or hostile ----

@pytest.fixture(scope="module")
def valid_checkpoint(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("valid") / "model"
    config = small_config(vocab_size=300, d_model=8, num_heads=2, num_layers=1, d_ff=8)
    params, tokenizer = tinylm.init_params(config, generator()), files.read_json(tokenizer_file)
    checkpoint.save_checkpoint(folder, params, config, tokenizer, (END, 256))
    return folder

def mutate(content, rng):
    """Damage bytes the way disks, editors and attackers do."""
    content = bytearray(content)
    kind, at = rng.randrange(7), rng.randrange(len(content))
    if kind == 0:
        return bytes(content[:at])
    if kind == 1:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del content[at:at + rng.randrange(1, 20)]
    elif kind == 3:
        content[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif kind == 4:  # another number where one stands
        numbers = list(re.finditer(rb"\d+", content[:20_000]))
        number = rng.choice(numbers) if numbers else None
        if number:
            content[number.start():number.end()] = rng.choice(
                [b"-1", b"0", b"99999999999999999999", b"1e99", b"null", b"[]", b"{}", b"7"])
    elif kind == 5:  # a piece twice
        content[at:at] = content[at:at + 200]
    else:
        content[:8] = rng.choice([b"\xff" * 8, (1 << 40).to_bytes(8, "little"), bytes(8), rng.randbytes(8)])
    return bytes(content)

def open_model(folder):
    params, config = checkpoint.load_checkpoint(folder / "run/step-0000001")
    shapes = [(path, p.shape) for path, p in tinylm.tree_leaves(params)]
    assert shapes == tinylm.tree_leaves(tinylm.param_shapes(config))

def open_tokenizer(folder):
    tokenizer = bpe.load(folder / "run/step-0000001/tokenizer.json")
    ids = bpe.encode(tokenizer, "Once upon a time é")
    assert ids.max() < tokenizer.vocab_size and bpe.decode(tokenizer, ids) == "Once upon a time é"

def open_data(folder):
    meta, ids = prepare.open_data(folder / "data")
    assert all(len(ids[split]) == meta[split]["tokens"] for split in ids)

def open_state(folder):
    with contextlib.ExitStack() as claims:
        resumed = run.resume_run(folder / "run", {"data": str(folder / "data")}, train.Settings, lambda *_: None,
                                 claims, cli.InputError)
        run.load_state(resumed)

DAMAGED = {"run/step-0000001/model.safetensors": open_model, "run/step-0000001/config.json": open_model,
           "run/step-0000001/tokenizer.json": open_tokenizer,
           "run/step-0000001/training/optimizer.safetensors": open_state,
           "run/step-0000001/training/train_state.json": open_state,
           "data/train.bin": open_data, "data/val.bin": open_data,
           "data/tokenizer.json": open_data, "data/meta.json": open_data}

def resident(kind):
    """This process's memory in bytes as the operating system counts it: VmRSS, or VmHWM, the most so far."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

def damaged(folder, name, count):
    """Open what a file belongs to, each time with another damage to it: our own error in one line, or all whole.

    → how many were refused, the longest time in seconds, the most memory in times the file (or a MB, if it has less).
    """
    original, rng = (folder / name).read_bytes(), random.Random(name)
    refused = longest = memory = 0
    DAMAGED[name](folder)
    for _ in range(count):
        (folder / name).write_bytes(mutate(original, rng))
        is_refused, seconds, most = opened(folder, name, max(len(original), 1_000_000))
        if seconds > longest or most > memory:  # once more, as it may not have been the file's fault
            _, *again = opened(folder, name, max(len(original), 1_000_000))
            seconds, most = map(min, zip((seconds, most), again))
        refused, longest, memory = refused + is_refused, max(longest, seconds), max(memory, most)
    (folder / name).write_bytes(original)
    return refused, longest, memory

def opened(folder, name, size):
    """Open what a file belongs to → whether it was refused, the seconds, the most memory in times a size."""
    ctypes.CDLL(None).malloc_trim(0)  # so that memory from before does not serve this time
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, begin, is_refused = resident("VmRSS"), time.process_time(), False
    try:
        DAMAGED[name](folder)
    except cli.InputError as error:
        assert "\n" not in str(error), error
        is_refused = True
    return is_refused, time.process_time() - begin, (resident("VmHWM") - before) / size

def whole_folder(folder):
    """A folder with data and a run that has not come to its end."""
    train.train(data=prepared(folder), output_dir=folder / "run",
                **TINY | dict(d_model=128, checkpoint_interval=1, num_steps=2))
    files.remove(folder / "run/step-0000002")
    return folder

@pytest.fixture(scope="module")
def to_be_damaged(tmp_path_factory):
    return whole_folder(tmp_path_factory.mktemp("damaged"))

@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_or_load_whole(to_be_damaged, name):
    """None takes a second, or ten times its size in memory."""
    refused, longest, memory = damaged(to_be_damaged, name, 200)
    assert refused > 60 and longest < 1 and memory < 10

@pytest.mark.parametrize("change, message", [
    ({"model": {"type": "WordPiece", "vocab": {}}}, "its model is WordPiece"),
    ({"model": {"type": "Unigram", "vocab": []}}, "it is a SentencePiece tokenizer"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "it is a SentencePiece tokenizer"),
    ({"pre_tokenizer": None}, "split pattern"),
    ({"normalizer": {"type": "NFC"}}, "asks for normalizer"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}},
     "split pattern"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False}, {"type": "ByteLevel", "use_regex": True}]}}, "split pattern")])
def test_other_tokenizers_are_refused_by_name(tokenizer_file, tmp_path, change, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(Path(tokenizer_file).read_text()) | change))
    with pytest.raises(cli.InputError, match=message):
        bpe.load(tmp_path / "tokenizer.json")

@pytest.mark.parametrize("change, message", [
    (lambda model: model["merges"].append(model["merges"][0]), "a merge stands twice"),
    (lambda model: model["vocab"].update(zz=9999), "its ids are not 0, 1, 2"),
    (lambda model: model["merges"].pop(), "merges are missing: nothing makes 1 of its tokens"),
    (lambda model: model.update(dropout=0.1), "asks for dropout"),
    (lambda model: model["vocab"].update({"": len(model["vocab"])}), "it has an empty token")])
def test_mistakes_in_a_tokenizer_file(tokenizer_file, tmp_path, change, message):
    description = json.loads(Path(tokenizer_file).read_text())
    change(description["model"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(cli.InputError, match=message):
        bpe.load(tmp_path)

@pytest.mark.parametrize("option, value", [
    ("num_hidden_layers", 10**18), ("hidden_size", 10**18), ("vocab_size", 10**18), ("rope_theta", 1e308),
    ("max_position_embeddings", 10**40), ("max_position_embeddings", 2**40), ("rms_norm_eps", 1e-300)])
def test_absurd_sizes_are_refused(valid_checkpoint, tmp_path, option, value):
    shutil.copytree(valid_checkpoint, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text()) | {option: value}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(cli.InputError, match="model/config.json"):
        checkpoint.load_checkpoint(tmp_path / "model")

def test_data_that_changes_under_a_run(tmp_path):
    data = prepared(tmp_path)
    ids = prepare.open_data(data)[1]["val"]
    prepare.check_unchanged(ids)
    damage(data, "val.bin", lambda content: content[:10])
    with pytest.raises(cli.RankError, match="val.bin has changed"):
        prepare.check_unchanged(ids)
    ids = prepare.open_data(prepared(tmp_path))[1]["val"]
    first = ids[0]
    os.utime(data / "val.bin")
    prepare.check_unchanged(ids)
    prepared(tmp_path, vocab_size=300)  # a file of its own, in the place of the one that is open
    prepare.check_unchanged(ids)
    shutil.rmtree(data)
    prepare.check_unchanged(ids)
    assert ids[0] == first
    ids = prepare.open_data(prepared(tmp_path))[1]["val"]
    damage(data, "val.bin", lambda content: content[:-4] + b"\x01\x01" + content[-2:])
    with pytest.raises(cli.InputError, match="val.bin has changed"):
        prepare.check_unchanged(ids)

def test_data_that_is_prepared_anew_under_a_run(tmp_path, monkeypatch):
    """The run goes on with what it has, and its checkpoint has the tokenizer of that."""
    data = prepared(tmp_path)
    before = bpe.load(data)
    meanwhile(3, monkeypatch, lambda: prepared(tmp_path, vocab_size=300))
    train.train(data=data, output_dir=tmp_path / "run", **TINY)
    assert bpe.are_same(bpe.load(tmp_path / "run/latest"), before)
    with pytest.raises(cli.InputError, match="prepared with another tokenizer than"):
        train.train(resume=tmp_path / "run", num_steps=7)

def test_prepare_after_one_was_killed_while_it_moved_data_into_place(tmp_path, monkeypatch):
    data, replacing = prepared(tmp_path), os.replace

    def die(old, new):
        if Path(new).name == "train.bin":
            raise KeyboardInterrupt
        replacing(old, new)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, vocab_size=300)
    monkeypatch.undo()
    assert not prepare.is_data(data)
    monkeypatch.setattr(bpe, "train", die)  # and one more, as it begins
    with pytest.raises(TypeError):
        prepared(tmp_path, vocab_size=310)
    monkeypatch.undo()
    assert prepare.open_data(data)[0]["vocab_size"] == 300, "what was being moved is there"
    assert prepare.open_data(prepared(tmp_path, vocab_size=300))[0]["vocab_size"] == 300

# ---- Measurements: python test_tinylm.py NAME … ----

def timed(function, *args):
    """→ (seconds that a call takes, with what it leaves a GPU to do, what it returns)."""
    finish = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    finish()
    begin = time.perf_counter()
    result = function(*args)
    finish()
    return time.perf_counter() - begin, result

def in_new_processes(function, *calls):
    """What a function returns for each tuple of arguments, each in a new process, all at the same time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # else each process would import all this anew
    with concurrent.futures.ProcessPoolExecutor(len(calls), context) as pool:
        return [future.result() for future in [pool.submit(function, *call) for call in calls]]

def their_model(config):
    """The same model of transformers, with PyTorch's fused attention and random weights of its own."""
    options = checkpoint.config_to_hf(config, 0, 0) | {"torch_dtype": None, "attn_implementation": "sdpa"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    assert model.num_parameters() == tinylm.num_params(config)
    return model

def our_training(config, settings):
    """Takes a step as train.py does (data, forward, backward, clipping, AdamW) for each loss asked for."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 1 << 20).astype(np.uint16)
    params = tinylm.tree_map(lambda w: w.to(settings.device), tinylm.init_params(config, generator()))
    optimizer, (gradients, update, _) = tinylm.adamw_init(params), train.step_functions(config, settings)
    for number in itertools.count():
        loss, grads = train.accumulate_gradients(gradients, params, ids, settings, number)
        params, optimizer, _ = update(params, grads, optimizer, torch.full_like(loss, 1e-3).float(), loss)
        yield loss

def their_training(config, settings):
    """Takes a step with transformers and PyTorch's fused AdamW for each loss asked for."""
    model, kind = their_model(config).to(settings.device), settings.device.split(":")[0]
    x = torch.randint(config.vocab_size, (settings.batch_size, config.context_length), device=settings.device)
    forward = torch.compile(model) if settings.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    while True:
        with torch.autocast(kind, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            loss = forward(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()

def measure_step(*, d_model: int = 128, num_layers: int = 4, num_heads: int = 4, context_length: int = 64,
                 batch_size: int = 12, vocab_size: int = 256, compile: bool = False, dtype: str = "float32",
                 device: str = "cpu", seconds: float = 60.0):
    """A training step, in turn with one of the same model of transformers.

    d_model: features of a token
    num_layers: blocks
    num_heads: attention heads
    context_length: tokens the model sees at once
    batch_size: sequences in a batch
    vocab_size: tokens
    compile: compile both with torch.compile
    dtype: what both compute in, float32 or bfloat16
    device: cpu or cuda
    seconds: how long to measure
    """
    settings = train.Settings.complete(dict(
        device=device, d_model=d_model, num_layers=num_layers, num_heads=num_heads, context_length=context_length,
        batch_size=batch_size, compile=compile, dtype=dtype))
    config, on_cpu = run.model_config(settings, vocab_size), device == "cpu"
    trainings = our_training(config, settings), their_training(config, settings)
    steps = lambda training, count: [next(training) for _ in range(count)][-1].item()
    first, memory, turns = [], [], []
    with machine.numerics(device):
        for training in trainings:
            before = 0 if on_cpu else torch.cuda.memory_allocated(device)
            first.append(timed(steps, training, 1))
            steps(training, 3)
            memory.append(machine.peak_memory(device).get("peak_memory", 0) - before)
            None if on_cpu else torch.cuda.reset_peak_memory_stats(device)
        count = 3 if on_cpu else 20
        turn = lambda: [timed(steps, training, count)[0] / count for training in trainings]
        turn()  # not counted
        begin = time.perf_counter()
        while not turns or time.perf_counter() - begin < seconds:
            turns.append(turn())
    ours, theirs = np.array(turns).T
    rates = settings.tokens_per_step / np.median(turns, 0)
    peak = {} if on_cpu else {"most memory, GB": np.array(memory) / 1e9}
    if machine.peak_flops(device):  # of devices that are known
        peak["share of peak bfloat16 FLOP/s"] = rates * log.flops_per_token(config) / machine.peak_flops(device)
    return {"first losses, ours and that of transformers": [loss for _, loss in first],
            "first steps, s": [seconds for seconds, _ in first], "a step, ms": np.median(ours) * 1e3,
            "tokens/s": rates,
            "times as fast as transformers, median and quartiles": np.quantile(theirs / ours, (0.5, 0.25, 0.75))} | peak

def measure_memory(*, context_length: int = 4096, remat: bool = False):
    """Most memory of three forward and backward passes over one sequence, beyond Python, torch and the parameters.

    context_length: tokens of the sequence
    remat: compute each block again in the backward pass
    """
    config = tinylm.Config(vocab_size=2048, context_length=context_length, d_model=512, num_layers=4, num_heads=8)
    params, x = tinylm.init_params(config, generator()), torch.randint(2048, (1, context_length + 1))
    # getrusage would begin with the peak of the process that started this one.
    before, begin = resident("VmHWM"), time.perf_counter()
    for _ in range(3):  # the gradients of one pass are still there in the next, as in training
        result = tinylm.value_and_grad(tinylm.loss_fn, params, x[:, :-1], x[:, 1:], config, torch.float32, remat)
    return {"memory, MB": (resident("VmHWM") - before) / 1e6, "a pass, s": (time.perf_counter() - begin) / 3}

def measure_attention(*, num_heads: int = 12, head_dim: int = 64, tokens: int = 32768, longest: int = 16384,
                      dtype: str = "bfloat16", device: str = "cuda", rounds: int = 20):
    """Attention's forward pass, and forward and backward, in turn with PyTorch's scaled_dot_product_attention, for
    1,024 tokens at once and twice as many each time.

    num_heads: attention heads
    head_dim: features of a head
    tokens: in a batch, of sequences of each length
    longest: the last length
    dtype: float32 or bfloat16
    device: cpu or cuda
    rounds: turns that are counted
    """
    figures, theirs = {}, functools.partial(F.scaled_dot_product_attention, is_causal=True)
    with machine.numerics(device):
        for length in (1 << i for i in range(10, longest.bit_length())):
            shape = -(-tokens // length), num_heads, length, head_dim
            inputs = [torch.randn(shape, dtype=machine.DTYPES[dtype], device=device) for _ in range(3)]
            for name, passes, trains in (("forward", 1, False), ("both passes", 3.5, True)):
                calls = [forward_and_backward(way, inputs, trains) for way in (tinylm.attention, theirs)]
                count = 1 if device == "cpu" else 10
                turn = lambda: [timed(lambda: [call() for _ in range(count)])[0] / count for call in calls]
                turn()  # not counted
                ours, others = np.array([turn() for _ in range(rounds)]).T
                flops = passes * 2 * math.prod(shape) * length  # half of two products, which the mask leaves
                figures[f"{length:,} tokens, {name}: ms, TFLOP/s, times as fast with quartiles"] = (
                    np.median(ours) * 1e3, flops / np.median(ours) / 1e12,
                    *np.quantile(others / ours, (0.5, 0.25, 0.75)))
    return figures

def bytes_per_second(device):
    """What a device's memory gives: of an array copied, read and written."""
    source = torch.ones(1 << 28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(target.copy_, source)[0] for _ in range(9))

def measure_write(*, d_model: int = 288, num_layers: int = 6, num_heads: int = 6, vocab_size: int = 32000,
                  prompt_tokens: int = 1, max_new_tokens: int = 250, rounds: int = 5, device: str = "cpu"):
    """Greedy writing, in turn with transformers: tokens/s, and how many times those of the first line. On CUDA also
    without graphs, and what share of the memory's rate it is to read the weights once a token.

    d_model: features of a token
    num_layers: blocks
    num_heads: attention heads
    vocab_size: tokens
    prompt_tokens: length of the prompt, which is read first
    max_new_tokens: length of each text
    rounds: turns that are counted, after one that is not
    device: cpu or cuda
    """
    config = tinylm.Config(vocab_size, prompt_tokens + max_new_tokens, d_model, num_layers, num_heads)
    params = tinylm.tree_map(lambda w: w.to(device), tinylm.init_params(config, generator()))
    model, rounded = their_model(config).eval().to(device), tinylm.quantize(params) if device == "cpu" else None

    def ours(start, dtype):
        weights, dtype = (rounded, "float32") if dtype == "int8" else (params, dtype)
        return torch.stack(list(tinylm.generate(weights, start, config, max_new_tokens, temperature=0,
                                                dtype=getattr(torch, dtype))), 1)

    def without_graphs(start, dtype):
        with unittest.mock.patch.object(tinylm.next_token, "forms", []):
            return ours(start, dtype)

    def theirs(start, dtype):
        return model.to(getattr(torch, dtype)).generate(
            start, attention_mask=torch.ones_like(start), pad_token_id=0, do_sample=False,
            min_new_tokens=max_new_tokens, max_new_tokens=max_new_tokens)[:, prompt_tokens:]

    def rate(dtype, texts, who):
        start = torch.ones(texts, prompt_tokens, dtype=torch.int64, device=device)
        seconds, written = timed(who, start, dtype)
        assert written.shape == (texts, max_new_tokens)
        return written.numel() / seconds

    whose = (ours, theirs) if device == "cpu" else (ours, without_graphs, theirs)
    ways = [*itertools.product(("float32", "bfloat16"), (1, 16), whose)]
    ways += [("int8", 1, ours), ("int8", 16, ours)] if device == "cpu" else []
    with machine.numerics(device):
        rates = np.array([[rate(*way) for way in ways] for _ in range(rounds + 1)])[1:]  # (rounds, ways)
    figures = {f"{who.__name__}, texts {texts}, {dtype}": figures for (dtype, texts, who), *figures in
               zip(ways, np.median(rates, 0), np.median(rates / rates[:, :1], 0))}
    if device != "cpu":
        read = tinylm.num_params(config) - params["embedding"].numel()
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            most = bytes_per_second(device) / (read * size)
            figures[f"share of the memory's rate, one text, {dtype}"] = figures[f"ours, texts 1, {dtype}"][0] / most
    return figures

def same_for_tiktoken(tokenizer):
    """A tokenizer of our own as one of tiktoken."""
    special = tokenizer.special_tokens
    ranks = {token: i for i, token in enumerate(tokenizer.tokens) if i not in special.values()}
    return tiktoken.Encoding("same", pat_str=bpe.SPLIT_PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens=special)

def measure_tokenizer(*, file: str = "", vocab_size: int = 10000):
    """Learning beside tokenizers, and encoding beside tiktoken on the same merges, whose ids must be equal.

    file: UTF-8 text to learn from and to encode
    vocab_size: tokens to learn
    """
    if not file:
        raise cli.InputError("--file is missing; give a text, --file=TEXT")
    our_seconds, ours = timed(bpe.train, [file], vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "true")  # on all cores, as ours
        their_seconds, _ = timed(tokenizers.ByteLevelBPETokenizer().train, [file], vocab_size, 0, False, [END])
    text, theirs = Path(file).read_bytes().decode(), same_for_tiktoken(ours)
    assert bpe.encode(ours, text).tolist() == theirs.encode(text, allowed_special="all")
    ratios = [timed(theirs.encode_ordinary, text)[0] / timed(bpe.encode, ours, text)[0] for _ in range(9)]
    return {f"learn {len(ours.tokens):,} tokens, times as fast as tokenizers": their_seconds / our_seconds,
            "encode, times as fast as tiktoken, median and range": np.quantile(ratios, (0.5, 0, 1))}

def state_of_rank(config, shard, num_ranks, env):
    """Compute a step's gradients as one of the ranks → MB that this rank holds, and that each sends."""
    os.environ |= env
    _, rank, _ = machine.join_ranks("cpu")
    settings = train.Settings.complete(dict(device="cpu", dtype="float32", batch_size=num_ranks, context_length=64,
                                            shard=shard))
    gradients, _, _ = train.step_functions(config, settings)
    params = tinylm.init_params(config, generator())
    moments = tinylm.adamw_init(params)
    if shard:
        params, moments = (tinylm.shard(tree, machine.mesh_of_ranks("cpu")) for tree in (params, moments))
    sent_by_all = lambda: int(re.search(r"lo:(?: *\d+){8} +(\d+)", Path("/proc/net/dev").read_text())[1])
    torch.distributed.barrier()
    before = sent_by_all()
    torch.distributed.barrier()  # none begins before all have looked
    _, grads = train.accumulate_gradients(gradients, params, np.arange(8192), settings, 0, rank, num_ranks)
    torch.distributed.barrier()
    sent = sent_by_all() - before
    torch.distributed.destroy_process_group()
    rows = lambda w: w.to_local() if tinylm.is_split(w) else w
    held = {name: sum(rows(w).nbytes for _, w in tinylm.tree_leaves(tree)) / 1e6 for name, tree in
            {"parameters, MB": params, "gradients, MB": grads, "moments, MB": moments}.items()}
    return held | {"sent by a rank, MB": sent / num_ranks / 1e6}

SCRIPTS = {  # the first and the last letter, and what stands between words
    "Latin": "az ", "Russian": "ая ", "Arabic": "اي ", "Hindi": "अह ", "Chinese": "一妷", "Thai": "กฮ", "digits": "09 "}
RANDOM = {  # letters, and how many of them to a line; where it is none all are one line
    "numbers of nine digits": (string.digits, 9), "hexadecimal": (string.hexdigits[:16], None),
    "base64": (string.ascii_letters + string.digits + "+/", None), "random Chinese": ("".join(map(chr, range(
        0x4e00, 0x9fa6))), None), "one letter": ("a", None), "random letters": (string.ascii_lowercase, None),
    "random digits": (string.digits, None)}

def text_of(name, size):
    """Text of `size` MB: random letters, or of a script clauses of eight words each, out of 30,000, of which the n-th
    is met once for n times the first; of 2 to 9 letters, or 1 to 4 where nothing stands between them."""
    draw = np.random.default_rng(0)
    if name in RANDOM:
        letters, line = RANDOM[name]
        drawn = "".join(draw.choice(list(letters), size * 1_000_000 // len(letters[0].encode())))
        return "\n".join(drawn[i:i + line] for i in range(0, len(drawn), line)) if line else drawn
    first, last, *between = SCRIPTS[name]
    letters = np.array([chr(c) for c in range(ord(first), ord(last) + 1)])
    counts = draw.integers(*((2, 10) if between else (1, 5)), 30_000)
    words = ["".join(draw.choice(letters, count)) for count in counts]
    share = 1 / np.arange(1, len(words) + 1)
    drawn = draw.choice(len(words), size * 400_000, p=share / share.sum()).tolist()
    clauses = ("".join(between).join(words[i] for i in drawn[first:first + 8]) for first in range(0, len(drawn), 8))
    return ", ".join(clauses).encode()[:size * 1_000_000].decode(errors="ignore")

def measure_alphabets(*, size: int = 10, vocab_size: int = 10000):
    """Encoding texts of many scripts and kinds, each as a file in a process of its own that has not met its words
    before: MB a second of its CPU time, and its most memory in MB; and how many times as fast as tiktoken the first MB
    is, on the same merges.

    size: MB of each
    vocab_size: tokens, learned from a mixture of all
    """
    program = ("import re, sys, time; from data import bpe; tokenizer = bpe.load(sys.argv[1]);"
               "begin = time.process_time(); [None for _ in bpe.encode_pieces(tokenizer, sys.argv[2:], workers=1)];"
               "seconds = time.process_time() - begin; status = open('/proc/self/status').read();"
               "print(seconds, re.search(r'VmHWM:\\s*(\\d+)', status)[1])")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SCRIPTS | RANDOM:
            Path(folder, name).write_text(text_of(name, size), encoding="utf-8")
        # Of one letter all tokens would be of powers of two.
        mixture = [(f"{folder}/{name}", 0, 300_000) for name in SCRIPTS | RANDOM if name != "one letter"]
        ours = bpe.train(mixture, vocab_size, errors="replace")
        theirs = same_for_tiktoken(ours)
        bpe.save(ours, f"{folder}/tokenizer.json")
        for name in SCRIPTS | RANDOM:
            seconds, memory = map(float, subprocess.run(
                [sys.executable, "-c", program, f"{folder}/tokenizer.json", f"{folder}/{name}"], cwd=ROOT, check=True,
                capture_output=True, text=True).stdout.split())
            text = Path(folder, name).read_bytes()[:1_000_000].decode(errors="ignore")
            our_seconds, ids = timed(bpe.Encoder(ours).encode, text.encode())
            their_seconds, their_ids = timed(theirs.encode_ordinary, text)
            assert ids.tolist() == their_ids
            figures[name] = size / seconds, memory / 1e3, their_seconds / our_seconds
    return figures

def measure_ranks(*, num_ranks: int = 2, shard: bool = False):
    """What a rank holds, and sends in a step over the loopback device, for 21.2 million parameters in float32.

    num_ranks: processes that train together on this machine
    shard: split the model and the optimiser over the ranks
    """
    config = tinylm.Config(vocab_size=8192, context_length=64, d_model=512, num_layers=4, num_heads=8)
    calls = ((config, shard, num_ranks, env) for env in variables_of_ranks(num_ranks))
    return in_new_processes(state_of_rank, *calls)[0]

def measure_kills(*, kills: int = 100):
    """SIGKILL runs of four kinds at random moments, and resume them: whether the end is that of a run left alone.

    Takes about 2 minutes on 2 cores.

    kills: how many in all
    """
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a disk would take most of the time, to flush
    each = kills // len(KILLED)
    with (tempfile.TemporaryDirectory(dir=in_memory) as folder, contextlib.redirect_stdout(io.StringIO()),
          concurrent.futures.ThreadPoolExecutor(2) as pool):  # at the same time, as most of it is one core's work
        data = prepared(Path(folder))
        results = pool.map(lambda kind: killed(kind, data, Path(folder) / kind, each), KILLED)
        return {f"{kind}: killed {each} times, same bits": result for kind, result in zip(KILLED, results)}

def measure_damage(*, count: int = 10_000):
    """Damage the files of checkpoints and data at random, and open them: refused in one line, or all there.

    count: how many times in all
    """
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            whole_folder(Path(folder))
        for name in DAMAGED:
            figures[f"{name}: opened, refused, seconds and times its size at most"] = (
                -(-count // len(DAMAGED)), *damaged(Path(folder), name, -(-count // len(DAMAGED))))
    return figures

def sizes_of_forms(device):
    """Of each operation that has forms: a label, whether gradients are taken, and arguments as the default run has."""
    f32 = lambda *shape, seed=0: randn(*shape, seed=seed).float()
    moments = lambda tree: {"step": torch.tensor(9), "m": tree, "v": tinylm.tree_map(torch.square, tree)}
    block = tree_of(*[(128, 128)] * 4, (384, 128), (384, 128), (128, 384))
    many = tree_of(*[(384, 128)] * 28)
    table = tinylm.rope_angles.definition(256, 32, 1e4, NO_SCALING, device)
    yield "linear", "one vector", False, (f32(1, 1, 288), f32(2048, 288))
    yield "linear", "8 vectors", False, (f32(8, 1, 288), f32(2048, 288))
    yield "linear", "2,048 vectors", True, (f32(2048, 512), f32(2048, 512, seed=1))
    yield "rmsnorm", "", True, (f32(4, 256, 128), torch.ones(128), 1e-5)
    yield "rope_angles", "", False, (256, 32, 1e4, NO_SCALING, device)
    yield "rope", "", True, (f32(4, 256, 4, 32).transpose(1, 2), *table)
    for T, S in ((256, 256), (64, 64), (1, 256)):
        yield "attention", f"{T} queries, {S} keys", T > 1, attention_example(torch.float32, (4,), 4, 1, T, S, 32)
    yield "gated_silu", "", True, (f32(4, 256, 384), f32(4, 256, 384, seed=1))
    yield "token_losses", "", True, (f32(4, 256, 2048), torch.randint(2048, (4, 256)))
    yield "global_norm", "", False, (many,)
    yield "clip_gradients", "", False, (many, torch.tensor(1.0), 1e9)
    yield "adamw_update", "", False, (many, many, moments(many), torch.tensor(1e-3))
    yield "orthogonalize", "", False, (f32(3, 128, 384),)
    yield "orthogonalize_all", "", False, (block,)
    for rows, what, most in ((1, "nucleus, 1 text", (0, 0.95)), (16, "nucleus, 16 texts", (0, 0.95)),
                             (1, "top 50, 1 text", (50, 1.0))):
        yield "sample_token", what, False, (f32(rows, 2048) * 3, torch.full((rows, 1), 0.3).double(), 1.0, *most)

def forward_and_backward(function, arguments, trains):
    """A call without arguments that computes a function and, where asked, its gradients."""
    if not trains:
        return torch.inference_mode()(lambda: function(*arguments))
    arguments = [x.detach().requires_grad_() if is_floating(x) else x for x in arguments]
    upstream = [torch.randn_like(x) for x in tensors_in(function(*arguments))]
    inputs = [x for x in arguments[:2] if is_floating(x)]
    return lambda: torch.autograd.grad(tensors_in(function(*arguments)), inputs, upstream, allow_unused=True)

def measure_forms(*, seconds: float = 2.0, compile: bool = False, device: str = "cpu"):
    """How many times as fast as its definition each form is, in turn: median and quartiles.

    seconds: how long to measure each
    compile: compile both with torch.compile
    device: cpu or cuda
    """
    there = lambda x: tinylm.tree_map(lambda w: w.to(device), x) if isinstance(x, dict | torch.Tensor) else x
    figures = {}
    with machine.numerics(device):
        for name, label, trains, arguments in sizes_of_forms(device):
            arguments = [there(x) for x in arguments]
            operation = tinylm.OPERATIONS[name]
            ways = (lambda *args: operation(*args)), (lambda *args: operation.definition(*args))
            if compile:
                torch._dynamo.reset()
                ways = [torch.compile(way) for way in ways]
            ours, plain = (forward_and_backward(way, arguments, trains) for way in ways)
            timed(plain), timed(ours)  # compiles, where asked
            count = 1 + int(0.005 / timed(plain)[0])  # calls in a turn
            many = lambda call: timed(lambda: [call() for _ in range(count)])[0]
            ratios, begin = [], time.perf_counter()
            while len(ratios) < 3 or time.perf_counter() - begin < seconds:
                ratios.append(many(plain) / many(ours))
            figures[f"{name} {label}".strip()] = np.quantile(ratios[1:], (0.5, 0.25, 0.75))
    return figures

MEASUREMENTS = {"step": measure_step, "memory": measure_memory, "attention": measure_attention, "write": measure_write,
                "tokenizer": measure_tokenizer, "alphabets": measure_alphabets, "ranks": measure_ranks,
                "forms": measure_forms, "kills": measure_kills, "damage": measure_damage}

def measure(name="", *arguments):
    """The command: take a measurement by its name and flags, and print its figures."""
    if name not in MEASUREMENTS:
        sys.exit(cli.fail(f"test_tinylm.py: {name or 'no name'}: expected one of {', '.join(MEASUREMENTS)}; "
                          "NAME --help lists its flags"))

    @functools.wraps(MEASUREMENTS[name])
    def command(**flags):
        for flag, value in flags.items():
            if type(value) is int and value < 1:
                raise cli.InputError(f"--{flag}={value}: expected 1 or more")
        device = inspect.signature(MEASUREMENTS[name]).parameters.get("device")
        machine.choose_device(flags.get("device", device.default if device else "cpu"))  # raises where it isn't there
        for figure, numbers in MEASUREMENTS[name](**flags).items():
            print(f"{figure}:", *(f"{number:,.2f}" for number in np.ravel(numbers)))

    cli.run(command, arguments)

SMALL = dict(d_model=32, num_layers=1, num_heads=2, vocab_size=257)
SMALL_MEASUREMENTS = {  # flags, and figures with what they must lie between; all must be above 0
    "step": (SMALL | dict(context_length=8, batch_size=2, seconds=0.2), {
        "first losses, ours and that of transformers": (5.2, 6.0)}),  # log 257 = 5.55, that of a uniform guess
    "memory": (dict(context_length=64), {"memory, MB": (110, 400)}),  # above the gradients of two passes, 60 MB each
    "attention": (dict(tokens=1024, longest=1024, num_heads=1, head_dim=8, dtype="float32", device="cpu", rounds=1),
                  {}),
    "write": (SMALL | dict(max_new_tokens=8, rounds=2), {"theirs, texts 16, bfloat16": (0, math.inf)}),
    "tokenizer": (dict(file=str(ROOT / "README.md"), vocab_size=400), {
        "learn 400 tokens, times as fast as tokenizers": (0, math.inf)}),
    "alphabets": (dict(size=1, vocab_size=400), {}),
    "forms": (dict(seconds=0.01), {}),
    "kills": (dict(kills=8), {f"{kind}: killed 2 times, same bits": (1, 1) for kind in KILLED}),
    "damage": (dict(count=90), {}),
    "ranks": (dict(shard=True), {  # halves of 85.0, 85.0 and 169.9 MB; 161.5 MB to send, and the headers of messages
        "parameters, MB": (42.4, 42.6), "gradients, MB": (42.4, 42.6), "moments, MB": (84.9, 85.1),
        "sent by a rank, MB": (161.5, 170)}),
}

@pytest.mark.parametrize("name", MEASUREMENTS)
def test_small_measurements(name, monkeypatch):
    flags, limits = SMALL_MEASUREMENTS[name]
    for kinds in (SCRIPTS, RANDOM):  # some are enough here
        monkeypatch.setitem(globals(), "SCRIPTS" if kinds is SCRIPTS else "RANDOM", dict([*kinds.items()][1:3]))
    measurement = functools.partial(MEASUREMENTS[name], **flags)
    # The most memory that this process had may lie behind it.
    figures = in_new_processes(measurement, ())[0] if name == "memory" else measurement()
    assert all(np.min(numbers) > 0 for numbers in figures.values()), figures
    for figure, (low, high) in limits.items():
        assert low <= np.min(figures[figure]) and np.max(figures[figure]) <= high, figures
    for flag in inspect.signature(MEASUREMENTS[name]).parameters:
        assert f"  --{flag} " in cli.help_text(MEASUREMENTS[name])

def test_measurements_are_commands(monkeypatch, capsys):
    measure("tokenizer", f"--file={ROOT}/README.md", "--vocab_size=270")
    assert re.fullmatch(r"learn 270 tokens.*: [\d.]+\nencode.*:( [\d.]+){3}\n", capsys.readouterr().out)
    for arguments, message in (("", "memory, attention"), ("pace", "pace: expected"), ("tokenizer", "--file=TEXT"),
                               ("write --rounds=0", "1 or more"), ("ranks --share", "did you mean --shard"),
                               ("write --device=cuda:99", "CUDA device"), ("forms --device=tpu", "expected cpu")):
        monkeypatch.setattr(sys, "argv", ["test_tinylm.py", *arguments.split()])
        with pytest.raises(SystemExit, match="^2$"):
            runpy.run_path(__file__, run_name="__main__")
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

if __name__ == "__main__":
    measure(*sys.argv[1:])
