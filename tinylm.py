"""tinylm: a Llama-style language model and everything done to it, as pure functions over tensors.

Read from top to bottom: trees, tensors split over ranks, operations, model, learning, data, generation, checkpoints.

Parameters are a nested dict of tensors whose keys are the argument names of the functions that use them, so a block
runs as `transformer_block(x, **block)`. Functions take values and return new ones and change nothing of the caller's;
the one exception, the decoding cache, is stated where it is made. Randomness comes only from a seed or a
`torch.Generator` passed in. The scripts choose device and compilation from outside; where
a fast form depends on them (few vectors, RMSNorm, RoPE, attention, clipping) it asks at that one place.

Axis names in shapes: B batch, T query positions, S key positions, V vocabulary, D features of a head;
`...` stands for any leading dimensions.
"""

import json
import math
import os
import shutil
import struct
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch for CUDA, and serves nothing else
    triton, tl = None, SimpleNamespace(constexpr=float)


class InputError(ValueError):
    """A mistake in what was given: one line saying what was given, what was expected and what to do."""

    exit_code = 2  # of a command that ends with it


# ---- Trees: nested dicts whose leaves are tensors ----


def tree_map(function, tree, *others):
    """Apply `function` to every leaf (and the leaves at the same place in `others`); returns a new tree."""
    if isinstance(tree, dict):
        return {key: tree_map(function, tree[key], *(other[key] for other in others)) for key in tree}
    return function(tree, *others)


def tree_leaves(tree, prefix=""):
    """List the leaves as (dotted path, leaf), in the tree's own order."""
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [leaf for key in tree for leaf in tree_leaves(tree[key], f"{prefix}.{key}" if prefix else key)]


def tree_build(paths, leaves):
    """The inverse of `tree_leaves`: a nested dict with `leaves` at their dotted `paths`."""
    tree = {}
    for path, leaf in zip(paths, leaves, strict=True):
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


# ---- Tensors split over ranks: DTensors of which each rank, a process with a device, has some rows ----


def shard(tree, mesh):
    """Split every tensor of a tree by rows over the ranks of a mesh. Each rank gives the whole and keeps its part."""

    def split(tensor):
        if not tensor.ndim:
            return tensor
        part = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
        local = part.to_local().clone()  # so that the whole can be freed
        return DTensor.from_local(local, mesh, part.placements, shape=part.shape, stride=part.stride())

    return tree_map(split, tree)


def whole(w):
    """All rows of a tensor that is split, gathered from the ranks; another tensor as it is. All ranks must take part."""
    return w.redistribute(placements=[Replicate()]).to_local() if isinstance(w, DTensor) else w


def split_like(w, sharded):
    """This rank's rows of a tensor that every rank has whole, where `sharded` is split; else the tensor as it is."""
    if not isinstance(sharded, DTensor):
        return w
    return DTensor.from_local(w, sharded.device_mesh, [Replicate()]).redistribute(placements=sharded.placements)


def average_and_split(w, sharded):
    """The mean of what the ranks have each of a whole tensor, split like `sharded`: one reduce-scatter."""
    total = DTensor.from_local(w, sharded.device_mesh, [Partial()]).redistribute(placements=sharded.placements)
    return total / sharded.device_mesh.size()


class Gather(torch.autograd.Function):
    """`whole`, whose gradient is averaged over the ranks and split again."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return whole(w)

    @staticmethod
    def backward(ctx, d_out):
        return average_and_split(d_out, *ctx.saved_tensors)


def gather(w):
    """All rows of a parameter, which may be split. Use it at once: what is gathered should not stay in memory."""
    return Gather.apply(w) if isinstance(w, DTensor) else w


class ShardedLinear(torch.autograd.Function):
    """`linear` with rows of w on every rank: they are gathered before use, freed, and gathered again to go backward."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ whole(w).T

    @staticmethod
    def backward(ctx, d_out):
        x, w = ctx.saved_tensors
        dw = d_out.flatten(0, -2).T @ x.flatten(0, -2)
        return d_out @ whole(w), average_and_split(dw, w)


class Averager:
    """Averages gradients over ranks, in few large messages that travel while the backward pass goes on."""

    MESSAGE_BYTES = 25 << 20

    def __init__(self):
        self.waiting, self.size, self.sent = [], 0, []

    def add(self, path, gradient):
        """Take a gradient; all ranks must give the same ones in the same order."""
        self.waiting.append((path, gradient))
        self.size += gradient.numel() * gradient.element_size()
        if self.size >= self.MESSAGE_BYTES:
            self.send()

    def send(self):
        message = torch.cat([gradient.flatten() for _, gradient in self.waiting])
        self.sent.append((self.waiting, message, dist.all_reduce(message, async_op=True)))
        self.waiting, self.size = [], 0

    def averages(self):
        """Wait for all messages → {path: mean over the ranks}."""
        if self.waiting:
            self.send()
        result = {}
        for gradients, message, work in self.sent:
            work.wait()
            parts = (message / dist.get_world_size()).split([gradient.numel() for _, gradient in gradients])
            result |= {path: part.view_as(gradient) for (path, gradient), part in zip(gradients, parts)}
        return result


# ---- Operations ----


def at_least_float32(x):
    """Raise half precision to float32, where sums are taken; float32 and float64 stay as they are."""
    return x if x.dtype == torch.float64 else x.float()


def linear(x, w):
    """Matrix product x @ w.T. x (..., d_in), w (d_out, d_in) of one dtype → (..., d_out). w may be split over
    ranks, or come from `pack`.
    """
    if isinstance(w, DTensor):
        return ShardedLinear.apply(x, w)
    return linear_on_cpu(x, w) if w.device.type == "cpu" else x @ w.T


HAS_ONEDNN = torch.backends.mkldnn.is_available()


def linear_on_cpu(x, w):
    """`linear` in the way that is fastest for the sizes: MKL, which computes PyTorch's products, is not for all."""
    rows = x.numel() // x.shape[-1]
    if w.is_mkldnn:  # by `pack`
        return onednn_product(x, w)
    if rows > 32 and rows * w.numel() >= 1 << 29 and x.dtype == torch.float32 and HAS_ONEDNN:
        return LargeLinear.apply(x, w)
    if torch.compiler.is_compiling() or w.numel() < 1 << 16:
        return x @ w.T
    if rows == 1 and x.dtype in (torch.float32, torch.bfloat16):
        return linear_of_one(x, w)
    if rows <= 32 and x.dtype == torch.float32:
        return (w @ x.reshape(rows, -1).T).T.view(*x.shape[:-1], -1)  # MKL copies the second matrix: let that not be w
    return x @ w.T


def onednn_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b.T by oneDNN, through the operation that PyTorch's compiler has for it. b (n, k) may come from `pack`."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


# The compiler knows that operation for constant b alone; an operation of our own it leaves as it is.
opaque_product = torch.library.custom_op("tinylm::onednn_product", onednn_product, mutates_args=())


@opaque_product.register_fake
def _(a, b):
    return a.new_empty(*a.shape[:-1], len(b))


class LargeLinear(torch.autograd.Function):
    """x @ w.T in float32 by oneDNN, which multiplies large matrices faster than MKL does. dx = d_out w,  dw = d_outᵀ x."""

    @staticmethod
    def product(a, b):
        return opaque_product(a, b) if torch.compiler.is_compiling() else onednn_product(a, b)

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return LargeLinear.product(x, w)

    @staticmethod
    def backward(ctx, d_out):
        x, w = ctx.saved_tensors
        dx = LargeLinear.product(d_out, w.T)
        x, d_out = x.flatten(0, -2), d_out.flatten(0, -2)  # (rows, d_in), (rows, d_out)
        if len(w) <= w.shape[1]:  # oneDNN would copy d_outᵀ, the larger of the two
            return dx, d_out.T @ x
        return dx, LargeLinear.product(x.T, d_out.T).T.contiguous()


def pack(w):
    """A copy of a matrix (d_out, d_in), for `linear` alone, laid out as oneDNN multiplies vectors by it fastest.

    Where there is no such layout, for the device or the dtype, it is w itself.
    """
    if w.device.type != "cpu" or not HAS_ONEDNN:
        return w
    if w.dtype == torch.float32 or w.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.ops.mkldnn._reorder_linear_weight(w, 16)  # the layout for any number of vectors but 1
    return w


def linears(x, *ws):
    """`linear` of one x and several matrices. Compiled code joins them: one larger product reads x once."""
    if torch.compiler.is_compiling():
        return linear(x, torch.cat(ws)).split([len(w) for w in ws], -1)
    return tuple(linear(x, w) for w in ws)


def linear_of_one(x, w):
    """`linear` of one vector on a CPU, as in decoding, where all the time goes into reading w.

    In bfloat16 it switches oneDNN off, for the whole process, until the product is there.
    """
    if x.dtype == torch.bfloat16:  # oneDNN would take longer to prepare the product than PyTorch's own code to compute it
        enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        try:
            return (w @ x.flatten()).view(*x.shape[:-1], -1)
        finally:
            torch.backends.mkldnn.enabled = enabled
    # MKL shares the rows of w among the cores only where they come as several matrices, and x as a row transposed.
    pieces = w.view(math.gcd(len(w), 8), -1, w.shape[1])  # (pieces, d_out / pieces, d_in)
    return torch.bmm(pieces, x.reshape(1, -1).T.expand(len(pieces), -1, -1)).view(*x.shape[:-1], -1)


def embedding(tokens, w):
    """Look up rows of a table. tokens (...) of int64, w (vocab_size, d_model) → (..., d_model)."""
    return gather(w).index_select(0, tokens.flatten()).view(*tokens.shape, w.shape[1])


def plain_rmsnorm(x, gain, eps):
    """x / √(mean(x²) + eps) ⊙ gain, as it is defined; `rmsnorm` computes the same."""
    x32 = at_least_float32(x)
    inverse_rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)  # (..., 1)
    return (x32 * inverse_rms * gain).to(x.dtype)


class RMSNorm(torch.autograd.Function):
    """`plain_rmsnorm` with its own backward pass, of fewer passes over memory. With r = 1 / √(mean(x²) + eps):
    d gain = sum of d out ⊙ x · r,  dx = r · d out ⊙ gain - x · r³ / d_model · sum(d out ⊙ x ⊙ gain).
    """

    @staticmethod
    def forward(ctx, x, gain, eps):
        x32 = at_least_float32(x)
        mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square() / x.shape[-1]  # (..., 1)
        inverse_rms = torch.rsqrt(mean_square + eps)
        ctx.save_for_backward(x, gain, inverse_rms)
        return (x32 * inverse_rms).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx, d_out):
        x, gain, inverse_rms = ctx.saved_tensors
        x32, d_out = at_least_float32(x), at_least_float32(d_out)
        products = (d_out * x32).reshape(-1, x.shape[-1])  # (rows, d_model)
        d_gain = inverse_rms.flatten() @ products
        along_x = (products @ gain).view(inverse_rms.shape) * inverse_rms**3
        dx = (d_out * gain).mul_(inverse_rms).addcmul_(x32, along_x, value=-1 / x.shape[-1])
        return dx.to(x.dtype), d_gain, None


def rmsnorm(x, gain, eps):
    """Divide by the root mean square of the features, times a gain (Zhang and Sennrich 2019, eq. 4).

    x (..., d_model), gain (d_model) → (..., d_model) in x's dtype; the mean is taken in float32, with eps in the root.
    """
    # In decoding, the call of an autograd function would take longer than the norm of one token.
    form = RMSNorm.apply if torch.is_grad_enabled() and not torch.compiler.is_compiling() else plain_rmsnorm
    return form(x, gather(gain), eps)


def rope_angles(positions, head_dim, theta):
    """Cosines and sines of the rotary angles, position · theta^(-2i/head_dim) (Su et al. 2021, eq. 15).

    positions (T) → two tensors (T, head_dim/2) of float32.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[:, None] * frequencies  # (T, head_dim/2)
    return angles.cos(), angles.sin()


@lru_cache(maxsize=4)
def rope_table(length, head_dim, theta, device):
    """`rope_angles` of the positions below `length`, computed once."""
    with torch.inference_mode(False):  # so that what generation has computed can serve training too
        return rope_angles(torch.arange(length, device=device), head_dim, theta)


@torch.compiler.assume_constant_result  # else compiled code takes the sines again for each head and each layer
def angles_of(start, length, config, device):
    """Cosines and sines of the `length` positions from `start` on, (length, D/2) each."""
    table = rope_table(config.context_length, config.head_dim, config.rope_theta, device)
    return tuple(angles[start:start + length] for angles in table)


def plain_rope(x, cos, sin):
    """Rotate each pair (2i, 2i+1) by its angle, as it is defined; `rope` computes the same."""
    even, odd = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)  # (..., T, D/2) each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def rope(x, cos, sin):
    """Rotate each pair of neighbouring features (2i, 2i+1) by its angle (Su et al. 2021, eq. 34).

    x (..., T, D), cos and sin (T, D/2) → (..., T, D) in x's dtype; rotated in float32.
    """
    if torch.compiler.is_compiling():
        return plain_rope(x, cos, sin)
    # A pair is a complex number and its rotation a product: one pass over x, where the plain form makes six.
    x32 = at_least_float32(x if x.stride(-1) == 1 else x.contiguous())
    pairs = torch.view_as_complex(x32.unflatten(-1, (-1, 2)))  # (..., T, D/2)
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def softmax(x, dim=-1):
    """exp(x) over its sum along `dim`, in float32 at least; the maximum is subtracted so that exp can't overflow."""
    x = at_least_float32(x)
    weights = torch.exp(x - x.detach().amax(dim, keepdim=True))
    return weights / weights.sum(dim, keepdim=True)


def plain_attention(q, k, v):
    """Causal scaled dot-product attention, softmax(q kᵀ / √D) v, as it is defined; `attention` computes the same."""
    T, S, D, group = q.shape[-2], k.shape[-2], q.shape[-1], q.shape[-3] // k.shape[-3]
    q = q.unflatten(-3, (-1, group))  # (..., H_kv, group, T, D)
    k, v = k.unsqueeze(-3), v.unsqueeze(-3)  # (..., H_kv, 1, S, D)
    scores = at_least_float32((q * D**-0.5) @ k.mT)  # (..., H_kv, group, T, S)
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    return (softmax(scores.masked_fill(future, -math.inf)).to(v.dtype) @ v).flatten(-4, -3)  # (..., H, T, D)


TILE_QUERIES = 128  # in a tile; fewer skip more of the future, more need fewer calls
TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 27}  # in a tile; on a CPU they stay in its cache


def tiles(q, k):
    """Of each tile of attention its slice of N, that of the queries, and that of the keys they see."""
    (N, T, group, _), S = q.shape, k.shape[1]
    block = min(T, TILE_QUERIES)
    rows = max(1, TILE_SCORES[q.device.type] // (group * block * S))
    return [(slice(i, i + rows), slice(a, min(T, a + block)), slice(S - T + min(T, a + block)))
            for a in range(0, T, block) for i in range(0, N, rows)]


@lru_cache(maxsize=1)  # tiles that differ in N alone follow each other
def future_mask(t, s, group, dtype, device):
    """-∞ where a key lies in the future of a query, else 0, for the last t of s positions: (t·group, s)."""
    return torch.full((t, s), -math.inf, dtype=dtype, device=device).triu_(s - t + 1).repeat_interleave(group, 0)


def tile_scores(q, k):
    """Scaled scores of a tile to base 2, -∞ for keys in the future. q (n, t, group, D), k (n, s, D) → (n, t·group, s)."""
    (_, t, group, D), s = q.shape, k.shape[1]
    mask = future_mask(t, s, group, q.dtype, q.device)
    return at_least_float32(torch.baddbmm(mask, q.flatten(1, 2), k.mT, alpha=D**-0.5 / math.log(2)))


def add_product(target, a, b, scale=1.0):
    """Add scale · a @ b to a batch of matrices, in place. MKL does both at once, but only where they are contiguous."""
    if target.is_contiguous():
        target.baddbmm_(a, b, alpha=scale)
    else:
        target.add_(torch.bmm(a, b).view(target.shape), alpha=scale)


def attend_in_tiles(q, k, v):
    """Attention in tiles of queries, none of which sees keys that lie in its future; see `TiledAttention`."""
    out = torch.zeros(q.shape, dtype=v.dtype, device=q.device)
    log_sum = torch.empty(*q.shape[:-1], 1, dtype=at_least_float32(q[:0]).dtype, device=q.device)
    kept = []
    for n, t, seen in tiles(q, k):
        p, rows = tile_scores(q[n, t], k[n, seen]), out[n, t].flatten(1, 2)  # (n, t·group, s), (n, t·group, D)
        highest = p.amax(-1, keepdim=True)
        p = p.sub_(highest).exp2_()
        total = p.sum(-1, keepdim=True)  # (n, t·group, 1)
        add_product(rows, p.to(v.dtype), v[n, seen])
        rows.div_(total)
        log_sum[n, t] = total.log2().add_(highest).view(log_sum[n, t].shape)
        if k.shape[1] <= TILE_QUERIES:
            kept.append(p.div_(total))
    return out, log_sum, *kept


def attend_in_tiles_backward(d_out, q, k, v, log_sum, row_sum, *kept):
    """The gradients of `attend_in_tiles`."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    scale = q.shape[-1]**-0.5
    for i, (n, t, seen) in enumerate(tiles(q, k)):
        q_rows, dq_rows, d_rows, logs, sums = (x[n, t].flatten(1, 2) for x in (q, dq, d_out, log_sum, row_sum))
        p = kept[i] if kept else tile_scores(q[n, t], k[n, seen]).sub_(logs).exp2_()  # (n, t·group, s)
        ds = at_least_float32(torch.bmm(d_rows, v[n, seen].mT)).sub_(sums).mul_(p).to(q.dtype)  # (n, t·group, s)
        add_product(dq_rows, ds, k[n, seen], scale)
        add_product(dk[n, seen], ds.mT, q_rows, scale)
        add_product(dv[n, seen], p.to(v.dtype).mT, d_rows)
    return dq, dk, dv


LOG2_E = tl.constexpr(1 / math.log(2))  # scores are taken to base 2


def kernel(function):
    """A function that Triton compiles for the GPU, where it is installed."""
    return triton.jit(function) if triton else function


@kernel
def load_rows(matrix, rows, length, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a matrix (length, D) → (rows, WIDTH), with zeros where it has none."""
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < length) & (columns[None, :] < D)
    return tl.load(matrix + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)


@kernel
def store_rows(matrix, rows, length, values, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write rows (rows, WIDTH) into a matrix (length, D), where it has them."""
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < length) & (columns[None, :] < D)
    tl.store(matrix + rows[:, None] * D + columns[None, :], values.to(matrix.dtype.element_ty), mask=inside)


@kernel
def keys_seen(start, S, before, group, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Of a block of rows: up to which key all rows see all keys, a multiple of KEYS, and from which key none sees any."""
    return (before + start // group + 1) // KEYS * KEYS, tl.minimum(S, before + (start + ROWS - 1) // group + 1)


@kernel
def attend_kernel(q, k, v, out, log_sum, R, S, before, group, scale, D: tl.constexpr, WIDTH: tl.constexpr,
                  ROWS: tl.constexpr, KEYS: tl.constexpr):
    """A block of rows of attention: keys are met in blocks, and sums so far shrink as higher scores are met.

    A row is a query of one head, of R = T · group in each of N; it sees the keys up to before + row // group.
    """
    n = tl.program_id(0).to(tl.int64)
    q, out, log_sum, k, v = q + n * R * D, out + n * R * D, log_sum + n * R, k + n * S * D, v + n * S * D
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # the rows that see most begin first
    rows = start + tl.arange(0, ROWS)
    q_rows, last_seen = load_rows(q, rows, R, D, WIDTH), before + rows // group
    highest, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    seen_by_all, seen = keys_seen(start, S, before, group, ROWS, KEYS)
    for masked in tl.static_range(2):
        for key in range(seen_by_all if masked else 0, seen if masked else seen_by_all, KEYS):
            keys = key + tl.arange(0, KEYS)
            scores = tl.dot(q_rows, tl.trans(load_rows(k, keys, S, D, WIDTH))) * (scale * LOG2_E)
            if masked:
                scores = tl.where(keys[None, :] <= last_seen[:, None], scores, -float("inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            p = tl.exp2(scores - higher[:, None])  # (ROWS, KEYS)
            shrink = tl.exp2(highest - higher)
            v_rows = load_rows(v, keys, S, D, WIDTH)
            sums = sums * shrink[:, None] + tl.dot(p.to(v_rows.dtype), v_rows)
            total = total * shrink + tl.sum(p, 1)
            highest = higher
    store_rows(out, rows, R, sums / total[:, None], D, WIDTH)
    tl.store(log_sum + rows, highest + tl.log2(total), mask=rows < R)


@kernel
def keys_backward_kernel(q, k, v, d_out, log_sum, row_sum, dk, dv, R, S, before, group, scale,
                         D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The gradients of a block of keys and values, from the rows that see them. Matrices are (KEYS, ROWS)."""
    n = tl.program_id(0).to(tl.int64)
    q, d_out, log_sum, row_sum = q + n * R * D, d_out + n * R * D, log_sum + n * R, row_sum + n * R
    k, v, dk, dv = k + n * S * D, v + n * S * D, dk + n * S * D, dv + n * S * D
    start = tl.program_id(1) * KEYS
    keys = start + tl.arange(0, KEYS)
    k_rows, v_rows = load_rows(k, keys, S, D, WIDTH), load_rows(v, keys, S, D, WIDTH)
    dk_sums, dv_sums = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
    first = tl.maximum(0, start - before) * group // ROWS * ROWS  # rows from here on see some of the keys
    all_seen = tl.minimum(R, (tl.maximum(0, start + KEYS - 1 - before) * group + ROWS - 1) // ROWS * ROWS)  # and here all
    for masked in tl.static_range(2):
        for row in range(first if masked else all_seen, all_seen if masked else R, ROWS):
            rows = row + tl.arange(0, ROWS)
            q_rows, d_rows = load_rows(q, rows, R, D, WIDTH), load_rows(d_out, rows, R, D, WIDTH)
            logs = tl.load(log_sum + rows, mask=rows < R, other=0.0)
            sums = tl.load(row_sum + rows, mask=rows < R, other=0.0)
            p = tl.exp2(tl.dot(k_rows, tl.trans(q_rows)) * (scale * LOG2_E) - logs[None, :])
            if masked:
                p = tl.where(keys[:, None] <= (before + rows // group)[None, :], p, 0.0)
            dv_sums += tl.dot(p.to(d_rows.dtype), d_rows)
            ds = p * (tl.dot(v_rows, tl.trans(d_rows)) - sums[None, :])
            dk_sums += tl.dot(ds.to(q_rows.dtype), q_rows)
    store_rows(dk, keys, S, dk_sums * scale, D, WIDTH)
    store_rows(dv, keys, S, dv_sums, D, WIDTH)


@kernel
def queries_backward_kernel(q, k, v, d_out, log_sum, row_sum, dq, R, S, before, group, scale,
                            D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The gradients of a block of queries, from the keys that they see."""
    n = tl.program_id(0).to(tl.int64)
    q, d_out, log_sum, row_sum = q + n * R * D, d_out + n * R * D, log_sum + n * R, row_sum + n * R
    k, v, dq = k + n * S * D, v + n * S * D, dq + n * R * D
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    rows = start + tl.arange(0, ROWS)
    q_rows, d_rows, last_seen = load_rows(q, rows, R, D, WIDTH), load_rows(d_out, rows, R, D, WIDTH), before + rows // group
    logs, sums = tl.load(log_sum + rows, mask=rows < R, other=0.0), tl.load(row_sum + rows, mask=rows < R, other=0.0)
    dq_sums = tl.zeros([ROWS, WIDTH], tl.float32)
    seen_by_all, seen = keys_seen(start, S, before, group, ROWS, KEYS)
    for masked in tl.static_range(2):
        for key in range(seen_by_all if masked else 0, seen if masked else seen_by_all, KEYS):
            keys = key + tl.arange(0, KEYS)
            k_rows, v_rows = load_rows(k, keys, S, D, WIDTH), load_rows(v, keys, S, D, WIDTH)
            p = tl.exp2(tl.dot(q_rows, tl.trans(k_rows)) * (scale * LOG2_E) - logs[:, None])
            if masked:
                p = tl.where(keys[None, :] <= last_seen[:, None], p, 0.0)
            ds = p * (tl.dot(d_rows, tl.trans(v_rows)) - sums[:, None])
            dq_sums += tl.dot(ds.to(k_rows.dtype), k_rows)
    store_rows(dq, rows, R, dq_sums * scale, D, WIDTH)


def has_kernels(q):
    """Whether attention of these queries runs as Triton kernels: in half precision, and not on GPUs older than Ampere."""
    return (triton is not None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 128
            and torch.cuda.get_device_capability(q.device) >= (8, 0))


# Of each kernel ROWS, KEYS and warps. They fit, for heads of 128 features, the registers and the 99 KB of an RTX 3090.
KERNEL_BLOCKS = {"attend_kernel": (128, 64, 8), "keys_backward_kernel": (32, 64, 4), "queries_backward_kernel": (128, 32, 8)}


def launch(kernel, blocks_of_keys, q, k, *tensors):
    """Run a kernel for each of N and each block of keys, or of rows, with the sizes that kernels take behind `tensors`."""
    (N, T, group, D), S = q.shape, k.shape[1]
    rows, keys, num_warps = KERNEL_BLOCKS[kernel.__name__]
    blocks = triton.cdiv(S, keys) if blocks_of_keys else triton.cdiv(T * group, rows)
    with torch.cuda.device_of(q):  # Triton would take the current device
        kernel[N, blocks](q, k, *tensors, T * group, S, S - T, group, D**-0.5, D=D, WIDTH=max(16, triton.next_power_of_2(D)),
                          ROWS=rows, KEYS=keys, num_warps=num_warps)


def attend_in_kernels(q, k, v):
    """Attention in one Triton kernel, which never writes scores to memory; see `TiledAttention`."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, log_sum = torch.empty_like(q), q.new_empty(*q.shape[:-1], 1, dtype=torch.float32)
    launch(attend_kernel, False, q, k, v, out, log_sum)
    return out, log_sum


def attend_in_kernels_backward(d_out, q, k, v, log_sum, row_sum):
    """The gradients of `attend_in_kernels`, in two kernels, so that each sum is taken in one place."""
    d_out, q, k, v = (x.contiguous() for x in (d_out, q, k, v))
    dq, dk, dv = map(torch.empty_like, (q, k, v))
    launch(keys_backward_kernel, True, q, k, v, d_out, log_sum, row_sum, dk, dv)
    launch(queries_backward_kernel, False, q, k, v, d_out, log_sum, row_sum, dq)
    return dq, dk, dv


# To torch.compile each of the two is one operation: it would lay out the loops, for minutes, and gain nothing.


@torch.library.custom_op("tinylm::attend", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`TiledAttention`'s forward pass → out (N, T, group, D), the base-2 logarithm of each row's sum (N, T, group, 1)."""
    return (attend_in_kernels if has_kernels(q) else attend_in_tiles)(q, k, v)[:2]


@torch.library.custom_op("tinylm::attend_backward", mutates_args=())
def attend_backward(d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_sum: torch.Tensor,
                    row_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`TiledAttention`'s backward pass; row_sum (N, T, group, 1) is that of d out ⊙ out → d q, d k, d v."""
    form = attend_in_kernels_backward if has_kernels(q) else attend_in_tiles_backward
    return form(d_out, q, k, v, log_sum, row_sum)


@attend.register_fake
def _(q, k, v):
    return q.new_empty(q.shape), at_least_float32(q.new_empty(*q.shape[:-1], 1))


@attend_backward.register_fake
def _(d_out, q, k, v, log_sum, row_sum):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class TiledAttention(torch.autograd.Function):
    """Attention in tiles, whose scores stay in fast memory, with its own backward pass.

    The scores P of a tile exist only while it is computed, and are computed again from the logarithm of their sum L in
    the backward pass (Dao et al. 2022, alg. 1 and 4), so memory grows with T and not with T². On a CPU P is kept of at
    most TILE_QUERIES keys, as it is no larger than what else is. With O = P V:
    dV = Pᵀ dO,  dS = P ⊙ (dO Vᵀ - rowsum(dO ⊙ O)),  dQ = dS K / √D,  dK = dSᵀ Q / √D.
    q (N, T, group, D), k and v (N, S, D) → (N, T, group, D). Scores and their logarithms are taken to base 2, as exp2
    is several times as fast as exp on a CPU. baddbmm saves passes over memory: it adds and scales as it multiplies.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        form = attend if torch.compiler.is_compiling() or has_kernels(q) else attend_in_tiles
        out, log_sum, *kept = form(q, k, v)
        ctx.save_for_backward(q, k, v, out, log_sum, *kept)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, log_sum, *kept = ctx.saved_tensors
        row_sum = at_least_float32(d_out * out).sum(-1, keepdim=True)  # (N, T, group, 1)
        form = attend_backward if torch.compiler.is_compiling() or has_kernels(q) else attend_in_tiles_backward
        return form(d_out, q, k, v, log_sum, row_sum, *kept)


def attention_of_one(q, k, v):
    """`attention` of a single query, the last position, which sees every key; in base 2, as `TiledAttention` has it."""
    D, group = q.shape[-1], q.shape[-3] // k.shape[-3]
    rows, k, v = q.reshape(-1, group, D), k.flatten(0, -3), v.flatten(0, -3)  # (N, group, D), (N, S, D)
    if not q.is_cuda:  # oneDNN takes longer to prepare small products of bfloat16 than others take to compute them
        rows, k, v = map(at_least_float32, (rows, k, v))
    scores = at_least_float32(k @ (rows * (D**-0.5 / math.log(2))).mT)  # (N, S, group)
    weights = torch.exp2(scores - scores.detach().amax(1, keepdim=True))
    out = (weights.to(v.dtype).mT @ v) / weights.sum(1, keepdim=True).mT  # (N, group, D)
    return out.to(q.dtype).view(q.shape)


def attention(q, k, v):
    """Causal scaled dot-product attention, softmax(q kᵀ / √D) v, with grouped-query heads (Ainslie et al. 2023).

    q (..., H, T, D), k and v (..., H_kv, S, D), H a multiple of H_kv, S ≥ T → (..., H, T, D) in v's dtype.
    Head h reads key head h // (H / H_kv). The T queries are the last of the S positions; none sees a later key.
    """
    if q.shape[-2] == 1:
        return attention_of_one(q, k, v)
    k, v = k.to(q.dtype), v.to(q.dtype)  # a cache may be of another
    if torch.compiler.is_compiling() and k.shape[-2] <= TILE_QUERIES:  # short passes over scores are fused then
        return plain_attention(q, k, v)
    (S, D), H_kv = k.shape[-2:], k.shape[-3]
    grouped = q.unflatten(-3, (H_kv, -1)).transpose(-3, -2)  # (..., H_kv, T, group, D)
    tiled = TiledAttention.apply(grouped.flatten(0, -4), k.reshape(-1, S, D), v.reshape(-1, S, D))  # (N, T, group, D)
    return tiled.view(grouped.shape).transpose(-3, -2).flatten(-4, -3)  # (..., H, T, D)


def silu(x):
    """x · sigmoid(x), feature by feature (Elfwing et al. 2017). Any shape."""
    return x * torch.sigmoid(x)


class GatedSiLU(torch.autograd.Function):
    """silu(gate) ⊙ up with its own backward pass, which makes fewer arrays. With σ = sigmoid(gate):
    d gate = d out ⊙ up ⊙ (σ + silu(gate) ⊙ (1 - σ)),  d up = d out ⊙ silu(gate).
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        sigma = torch.sigmoid(gate)
        activated = gate * sigma
        d_gate = torch.lerp(sigma, sigma.new_ones(()), activated).mul_(up).mul_(d_out)  # lerp(a, b, w) is a + w (b - a)
        return d_gate, activated.mul_(d_out)


def gated_silu(gate, up):
    """silu(gate) ⊙ up. Both of one shape."""
    return GatedSiLU.apply(gate, up) if torch.is_grad_enabled() else silu(gate).mul_(up)


def swiglu(x, w_gate, w_up, w_down):
    """Gated feed-forward layer, (silu(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ (Shazeer 2020, eq. 6).

    x (..., d_model), w_gate and w_up (d_ff, d_model), w_down (d_model, d_ff) → (..., d_model).
    """
    return linear(gated_silu(*linears(x, w_gate, w_up)), w_down)


def plain_token_losses(logits, targets):
    """-log softmax(logits)[target], as it is defined; `token_losses` computes the same."""
    logits = at_least_float32(logits)
    highest = logits.detach().amax(-1, keepdim=True)  # (..., 1); subtracted so that exp can't overflow
    log_sum = torch.log(torch.exp(logits - highest).sum(-1)) + highest.squeeze(-1)  # (...)
    return log_sum - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


class TokenLosses(torch.autograd.Function):
    """`plain_token_losses` with its own backward pass, d logits = (softmax(logits) - onehot(target)) · d loss.

    It keeps exp(logits) and turns it into the gradient where it lies: with a large vocabulary each pass over an array of
    this size, and each new one, is dear.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.dtype, targets = logits.dtype, targets.unsqueeze(-1)
        logits = at_least_float32(logits)
        highest = logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, targets)
        exps = torch.add(-highest / math.log(2), logits, alpha=1 / math.log(2)).exp2_()  # exp2 is faster than exp on a CPU
        total = exps.sum(-1, keepdim=True)
        ctx.save_for_backward(exps, total, targets)
        return (total.log() + highest - chosen).squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_losses):
        exps, total, targets = ctx.saved_tensors
        d_losses = d_losses.unsqueeze(-1)
        d_logits = exps.mul_(d_losses / total).scatter_add_(-1, targets, -d_losses)
        return d_logits.to(ctx.dtype), None


def token_losses(logits, targets):
    """-log softmax(logits)[target] of each token, in nats, taken in float32 at least.

    logits (..., V), targets (...) of int64 → (...).
    """
    return TokenLosses.apply(logits, targets)


def cross_entropy(logits, targets):
    """The mean of `token_losses`: logits (..., V), targets (...) of int64 → a scalar, in nats per token."""
    return token_losses(logits, targets).mean()


# ---- Model ----


@dataclass(frozen=True)
class Config:
    """The sizes of a model. Raises InputError where they can't go together.

    `num_kv_heads` 0 means as many as `num_heads`; `d_ff` 0 means 8/3·d_model rounded up to a multiple of 64, which
    gives the three matrices of SwiGLU as many parameters as the usual two of 4·d_model.
    """

    vocab_size: int
    context_length: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    d_ff: int = 0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self):
        # A frozen dataclass is filled in through object.__setattr__; no one can change it afterwards.
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        object.__setattr__(self, "d_ff", self.d_ff or -(-8 * self.d_model // (3 * 64)) * 64)
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int if field.type is int else (int, float)) and not isinstance(value, bool)
            if field.type is not bool and not (number and 0 < value < math.inf):
                kind = "whole number" if field.type is int else "number"
                raise InputError(f"{field.name} is {value!r}; expected a {kind} above 0")
        if self.d_model % self.num_heads:
            raise InputError(f"d_model {self.d_model} can't be split over {self.num_heads} heads; "
                             "choose num_heads to divide d_model")
        if self.head_dim % 2:
            raise InputError(f"d_model {self.d_model} over {self.num_heads} heads makes heads of {self.head_dim} "
                             "features; RoPE turns pairs, so choose d_model / num_heads even")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                             "choose num_kv_heads to divide num_heads")

    @property
    def head_dim(self):
        return self.d_model // self.num_heads


def param_shapes(config):
    """The tree of parameter shapes, in the order of the forward pass."""
    d, d_kv = config.d_model, config.num_kv_heads * config.head_dim
    block = {
        "attention_norm": (d,),
        "attention": {"wq": (d, d), "wk": (d_kv, d), "wv": (d_kv, d), "wo": (d, d)},
        "mlp_norm": (d,),
        "mlp": {"w_gate": (config.d_ff, d), "w_up": (config.d_ff, d), "w_down": (d, config.d_ff)},
    }
    shapes = {"embedding": (config.vocab_size, d)}
    shapes["blocks"] = {str(layer): block for layer in range(config.num_layers)}
    shapes["final_norm"] = (d,)
    return shapes if config.tie_embeddings else shapes | {"lm_head": (config.vocab_size, d)}


def init_params(config, generator, device="cpu"):
    """Random parameters in float32, drawn on the generator's device in the order of `param_shapes`.

    Matrices have variance 1/d_in, so that activations keep their size. The two that write to the residual stream are
    divided by √(2·num_layers), so that the stream does not grow with depth (Radford et al. 2019, §2.3). The output
    matrix has a third of the deviation of others: the first loss is then near ln(vocab_size), and learning faster than
    from almost nothing (the README has what was tried). Tied, it is the embedding too: 2/d_model keeps both ends sound,
    as a token's logit for itself starts at 2.
    """
    deviations = {"embedding": 2 / config.d_model if config.tie_embeddings else 1.0,
                  "lm_head": config.d_model ** -0.5 / 3,
                  "wo": (2 * config.num_layers * config.d_model) ** -0.5,
                  "w_down": (2 * config.num_layers * config.d_ff) ** -0.5}

    def initial(path, shape):
        if len(shape) == 1:
            return torch.ones(shape, device=device)
        deviation = deviations.get(path.split(".")[-1], shape[-1] ** -0.5)
        return (torch.randn(shape, generator=generator, device=generator.device) * deviation).to(device)

    shapes = tree_leaves(param_shapes(config))
    return tree_build([path for path, _ in shapes], [initial(path, shape) for path, shape in shapes])


def num_params(config):
    """How many numbers the parameters of a model of this `config` hold."""
    return sum(math.prod(shape) for _, shape in tree_leaves(param_shapes(config)))


def init_cache(config, batch_size, length, dtype=torch.float32, device="cpu"):
    """An empty cache for `length` positions: keys and values (num_layers, B, H_kv, length, D) and the count filled."""
    shape = (config.num_layers, batch_size, config.num_kv_heads, length, config.head_dim)
    return {"k": torch.zeros(shape, dtype=dtype, device=device),
            "v": torch.zeros(shape, dtype=dtype, device=device), "filled": 0}


def extend_cache(cache, k, v):
    """Write new keys and values behind those of one layer; returns all of them. k and v (B, H_kv, T, D) → (…, S, D).

    The cache is donated: its memory is written in place, since copying it for every token would cost more than reading
    the weights. Use what is returned, and no longer what was given.
    """
    end = cache["filled"] + k.shape[-2]
    cache["k"][..., cache["filled"]:end, :] = k
    cache["v"][..., cache["filled"]:end, :] = v
    return cache["k"][..., :end, :], cache["v"][..., :end, :]


def multi_head_attention(x, cos, sin, head_dim, cache, wq, wk, wv, wo):
    """Project to heads, rotate queries and keys, attend, and mix the heads (Vaswani et al. 2017, §3.2.2).

    x (B, T, d_model), cos and sin (T, D/2), wq and wo (d_model, d_model), wk and wv (H_kv·D, d_model)
    → (B, T, d_model). `cache` is one layer's, with the keys and values before these, or None.
    """
    q, k, v = (y.unflatten(-1, (-1, head_dim)).transpose(-3, -2) for y in linears(x, wq, wk, wv))  # (B, heads, T, D)
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    if cache is not None:
        k, v = extend_cache(cache, k, v)  # (B, H_kv, S, D)
    heads = attention(q, k, v)  # (B, H, T, D)
    return linear(heads.transpose(-3, -2).flatten(-2), wo)  # (B, T, d_model)


def transformer_block(x, cos, sin, *, config, cache, attention_norm, attention, mlp_norm, mlp):
    """One pre-norm block: x + attention(rmsnorm(x)), then x + swiglu(rmsnorm(x)). x (B, T, d_model) → the same."""
    attention, mlp = (tree_map(lambda w: w.to(x.dtype), weights) for weights in (attention, mlp))
    h = rmsnorm(x, attention_norm, config.norm_eps)
    x = x + multi_head_attention(h, cos, sin, config.head_dim, cache, **attention)
    return x + swiglu(rmsnorm(x, mlp_norm, config.norm_eps), **mlp)


def features(params, tokens, config, dtype=torch.float32, cache=None, remat=False):
    """The last hidden states, normed: what the output matrix reads. tokens (B, T) of int64 → (B, T, d_model) of dtype.

    Computes in `dtype` from float32 parameters. With a cache, `tokens` stand behind those it holds; it is donated (see
    `extend_cache`) and the result is (hidden states, new cache). With `remat` a block keeps only its input for the
    backward pass, which computes the rest again (Chen et al. 2016).
    """
    start = cache["filled"] if cache else 0
    cos, sin = angles_of(start, tokens.shape[-1], config, tokens.device)  # (T, D/2) each
    x = embedding(tokens, params["embedding"]).to(dtype)  # (B, T, d_model)
    for layer, block in params["blocks"].items():
        layer_cache = cache and {"k": cache["k"][int(layer)], "v": cache["v"][int(layer)], "filled": start}
        run = partial(transformer_block, config=config, cache=layer_cache, **block)
        x = checkpoint(run, x, cos, sin, use_reentrant=False) if remat else run(x, cos, sin)
    x = rmsnorm(x, params["final_norm"], config.norm_eps)
    return (x, cache | {"filled": start + tokens.shape[-1]}) if cache else x


def to_logits(params, x):
    """Scores of every token of the vocabulary. x (..., d_model) → (..., V) in x's dtype."""
    return linear(x, params.get("lm_head", params["embedding"]).to(x.dtype))


def forward(params, tokens, config, dtype=torch.float32, cache=None, remat=False):
    """Scores of the token that follows each position. tokens (B, T) of int64 → (B, T, V); with a cache (logits, cache).

    T may be at most context_length, the cached positions included, for the model has learned no others.
    """
    if cache is None:
        return to_logits(params, features(params, tokens, config, dtype, remat=remat))
    x, cache = features(params, tokens, config, dtype, cache)
    return to_logits(params, x), cache


# ---- Learning ----


def loss_fn(params, inputs, targets, config, dtype=torch.float32, remat=False):
    """Mean cross-entropy of `targets` after `inputs`, in nats per token. Both (B, T) of int64 → a scalar."""
    return cross_entropy(forward(params, inputs, config, dtype, remat=remat), targets)


def value_and_grad(function, params, *args, on_gradient=None):
    """The value of function(params, *args), a scalar, and its gradient as a tree like `params`.

    on_gradient(path, gradient) is called for each leaf as soon as its gradient is there.
    """
    params = tree_map(lambda p: p.detach().requires_grad_(), params)
    paths, leaves = zip(*tree_leaves(params))
    for path, leaf in zip(paths, leaves) if on_gradient else ():
        leaf.register_hook(partial(on_gradient, path))
    value = function(params, *args)
    return value.detach(), tree_build(paths, torch.autograd.grad(value, leaves))


def global_norm(tree):
    """The Euclidean norm of all leaves taken as one vector, a scalar of float32."""
    leaves = [leaf for _, leaf in tree_leaves(tree)]
    split = isinstance(leaves[0], DTensor)
    norms = [torch.linalg.vector_norm((leaf.to_local() if split else leaf).float()) for leaf in leaves]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if split:  # of the rows here; one message adds up those of all ranks
        norm = norm.square()
        dist.all_reduce(norm)
        norm = norm.sqrt()
    return norm


def clip_gradients(grads, max_norm):
    """Scale all gradients so that their global norm is at most `max_norm` (Pascanu et al. 2013, alg. 1).

    Returns (the new tree, the norm before clipping, a scalar tensor).
    """
    norm = global_norm(grads)
    if not (norm.is_cuda or torch.compiler.is_compiling()) and norm <= max_norm:  # a look at it would stop a GPU
        return grads, norm
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return tree_map(lambda g: g * scale, grads), norm


def adamw_init(params):
    """The state AdamW starts from: zero moments m and v like `params`, in float32, and the count of steps."""
    zeros = lambda: tree_map(lambda p: torch.zeros_like(p, dtype=torch.float32), params)
    return {"step": torch.zeros((), dtype=torch.int64, device=tree_leaves(params)[0][1].device), "m": zeros(), "v": zeros()}


@torch.library.custom_op("tinylm::bias_corrections", mutates_args=())  # compiled code would compute them for each number
def bias_corrections(step: torch.Tensor, lr: torch.Tensor, beta1: float, beta2: float,
                     eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What AdamW adds to √v, eps · √(1 - beta2^step), and what it multiplies that sum by: scalars of float32."""
    # In float64, as 1 - beta2 ** step is a small difference of two near numbers in the first steps.
    correction1, correction2 = 1 - beta1 ** step.double(), (1 - beta2 ** step.double()).sqrt()
    return (eps * correction2).float(), (correction1 / (lr * correction2)).float()


@bias_corrections.register_fake
def _(step, lr, beta1, beta2, eps):
    return tuple(step.new_empty((), dtype=torch.float32) for _ in range(2))


def adamw_update(params, grads, state, lr, beta1=0.8, beta2=0.95, eps=1e-8, weight_decay=0.1):
    """One step of AdamW with bias correction (Loshchilov and Hutter 2019, alg. 2); returns (params, state), both new.

    Decay is decoupled, lr · weight_decay · p, and applies to matrices only: a norm's gain has no reason to be near 0.
    lr is a number or a scalar tensor.
    """
    step = state["step"] + 1
    floor, scale = bias_corrections(step, torch.as_tensor(lr), beta1, beta2, eps)
    keep = 1 - lr * weight_decay

    def update(p, g, m, v):
        m = torch.lerp(m, g, 1 - beta1)
        v = (v * beta2).addcmul_(g, g, value=1 - beta2)
        decayed = p * keep if p.ndim >= 2 else p.clone()
        # lr · m̂ / (√v̂ + eps), with the two corrections and lr moved to where they cost one pass over memory
        return decayed.addcdiv_(m, v.sqrt().add_(floor).mul_(scale), value=-1), m, v

    updated = tree_map(update, params, grads, state["m"], state["v"])
    params, m, v = (tree_map(lambda _, new: new[i], params, updated) for i in range(3))
    return params, {"step": step, "m": m, "v": v}


def orthogonalize(g, steps=5):
    """Bring the singular values of matrices near 1 by a Newton-Schulz iteration (Jordan et al. 2024, Muon).

    Each step is X ← aX + (bA + cA²)X with A = XXᵀ; the quintic is tuned to be fast, and ends between 0.7 and 1.2.
    g (N, m, n) → (N, m, n) in g's dtype; computed in bfloat16 on CUDA, where that is faster and enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.to(torch.bfloat16) if g.is_cuda else g
    x = x.mT if tall else x  # so that A is the smaller of the two products
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(steps):
        A = torch.bmm(x, x.mT)  # (N, m, m)
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


def orthogonalize_block(matrices):
    """`orthogonalize` of each matrix of a block (a tree). Those of one shape go together, as fewer and larger products."""
    groups = {}
    for path, w in tree_leaves(matrices):
        groups.setdefault(w.shape, {})[path] = w
    done = {}
    for group in groups.values():
        done |= zip(group, orthogonalize(torch.stack(tuple(group.values()))))
    paths = [path for path, _ in tree_leaves(matrices)]
    return tree_build(paths, [done[path] for path in paths])


def muon_split(tree):
    """Two trees: the matrices of the blocks, which Muon updates, and the rest, which AdamW does."""
    leaves = tree_leaves(tree)
    parts = ([(path, leaf) for path, leaf in leaves if (path.startswith("blocks.") and leaf.ndim == 2) == of_muon]
             for of_muon in (True, False))
    return [tree_build(*zip(*part)) for part in parts]


def muon_init(params):
    """The state Muon starts from: the momentum of the matrices of the blocks, zero, and AdamW's state of the rest."""
    matrices, rest = muon_split(params)
    return {"momentum": tree_map(lambda p: torch.zeros_like(p, dtype=torch.float32), matrices), "adamw": adamw_init(rest)}


def muon_update(params, grads, state, lr, beta1=0.8, beta2=0.95, eps=1e-8, weight_decay=0.1, momentum=0.95):
    """One step of Muon (Jordan et al. 2024) for the matrices of the blocks and of AdamW for the rest; → (params, state).

    A matrix moves along its orthogonalised Nesterov momentum. The factor 0.2·√max(m, n) gives that the root mean square
    of an AdamW step, so that one learning rate and one decay serve both (Liu et al. 2025, §2.2).
    """
    matrices, rest = muon_split(params)
    matrix_grads, rest_grads = muon_split(grads)
    rest, adamw = adamw_update(rest, rest_grads, state["adamw"], lr, beta1, beta2, eps, weight_decay)
    averages = tree_map(lambda m, g: torch.lerp(m, g, 1 - momentum), state["momentum"], matrix_grads)

    def update(p, direction):
        return p * (1 - lr * weight_decay) - lr * split_like(direction * (0.2 * max(p.shape) ** 0.5), p)

    def update_block(p, m, g):
        directions = orthogonalize_block(tree_map(lambda m, g: whole(torch.lerp(g, m, momentum)), m, g))
        return tree_map(update, p, directions)

    blocks = {layer: update_block(*(tree["blocks"][layer] for tree in (matrices, averages, matrix_grads)))
              for layer in matrices["blocks"]}
    updated = dict(tree_leaves({"blocks": blocks}) + tree_leaves(rest))
    paths = [path for path, _ in tree_leaves(params)]
    return tree_build(paths, [updated[path] for path in paths]), {"momentum": averages, "adamw": adamw}


OPTIMIZERS = {"adamw": (adamw_init, adamw_update), "muon": (muon_init, muon_update)}


def cosine_lr(step, lr_max, lr_min, warmup_steps, num_steps):
    """Learning rate of a step counted from 0: linear warm-up to lr_max, half a cosine to lr_min at num_steps, then flat.

    Loshchilov and Hutter 2017, eq. 5, without restarts.
    """
    if step < warmup_steps:
        return lr_max * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return lr_min + 0.5 * (lr_max - lr_min) * (1 + math.cos(math.pi * progress))


# ---- Data ----


def mix(x):
    """Scramble 64-bit integers, one to one (the finaliser of SplitMix64; Steele et al. 2014). uint64 (...) → (...)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index, length, key):
    """Where `index` lands in a permutation of range(length) that `key` chooses; nothing of that length is stored.

    A Feistel network of four rounds permutes the next power of four (Luby and Rackoff 1988); what falls outside is sent
    through again until it falls inside. index (...) of int64 below length → (...) of int64.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    index = np.array(index, dtype=np.uint64)
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():
        left, right = index[outside] >> half, index[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (mix(right + np.uint64((key * 4 + turn + 1) * 0x9E3779B97F4A7C15 % 2**64)) & mask)
        index[outside] = left << half | right
        outside = index >= length
    return index.astype(np.int64)


def get_batch(tokens, batch_size, context_length, seed, step, rank=0, num_ranks=1):
    """The batch of a step: a function of its arguments alone, so that any step's can be had at any time.

    An epoch cuts the tokens into windows of context_length, from a start of its own, and visits each once, in an order
    of its own. Of the step's num_ranks · batch_size windows, rank r gets the r-th part.
    tokens (N) → inputs and targets (batch_size, context_length) of int64, targets one token on.
    Raises InputError where N is not above context_length.
    """
    if len(tokens) <= context_length:
        raise InputError(f"{len(tokens)} tokens can't fill one window of context_length {context_length} and the token "
                         "after it; use more text or a smaller context_length")
    # One window less than would fit leaves the room that lets each epoch start elsewhere.
    num_windows = max(1, (len(tokens) - 1) // context_length - 1)
    room = len(tokens) - num_windows * context_length
    numbers = (step * num_ranks + rank) * batch_size + np.arange(batch_size)
    starts = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(numbers // num_windows).tolist():
        here = numbers // num_windows == epoch
        key = int(mix(np.array([seed % 2**64], dtype=np.uint64))[0]) + epoch
        offset = int(mix(np.array([key % 2**64], dtype=np.uint64))[0]) % room
        starts[here] = offset + context_length * permute(numbers[here] % num_windows, num_windows, key)
    windows = np.stack([tokens[start:start + context_length + 1] for start in starts]).astype(np.int64)
    windows = torch.from_numpy(windows)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def eval_batches(tokens, batch_size, context_length):
    """Cut tokens (N) into batches in which each token but the first is a target once, for evaluation.

    Yields inputs and targets (batch_size, context_length) of int64 and the count of targets that are real: all batches
    have one shape, so the last is filled up with zeros behind its real targets.
    """
    size = batch_size * context_length
    for start in range(0, len(tokens) - 1, size):
        piece = np.asarray(tokens[start:start + size + 1]).astype(np.int64)
        padded = torch.from_numpy(np.pad(piece, (0, size + 1 - len(piece))))
        yield padded[:-1].view(batch_size, -1), padded[1:].view(batch_size, -1), len(piece) - 1


# ---- Generation ----


def sample_token(logits, temperature, top_k, top_p, generator):
    """Draw the next token: softmax at a temperature over the top_k best, then the nucleus of mass top_p among them.

    Temperature 0 takes the best token. top_k 0 keeps all. The nucleus is the smallest set of the likeliest tokens whose
    probabilities reach top_p (Holtzman et al. 2020, eq. 2); tokens as likely as its last one are in it too.
    logits (B, V) → (B) of int64.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < lowest, -math.inf)
    probabilities = softmax(logits / temperature)
    if top_p < 1:
        # All tokens below this floor together have less than half of the mass that may be left out.
        best_first = descending(probabilities, (1 - top_p) / (2 * logits.shape[-1]))  # (B, N)
        before = best_first.cumsum(-1) - best_first  # the mass of all better tokens
        lowest = best_first.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)  # (B, 1), of the nucleus
        probabilities = probabilities.masked_fill(probabilities < lowest.minimum(best_first[:, :1]), 0.0)
    return draw(probabilities, generator)


def descending(x, floor):
    """The values of each row, highest first; those below `floor` may be left out or be zeros. (B, V) → (B, N)."""
    if x.is_cuda:
        return x.sort(-1, descending=True).values
    rows = [-np.sort(-row[row >= floor]) for row in x.numpy()]  # much faster than torch's sort on a CPU
    return torch.from_numpy(np.stack([np.pad(row, (0, max(map(len, rows)) - len(row))) for row in rows]))


def draw(probabilities, generator):
    """The index at which the running sum of a row's weights reaches a random share of their total. (B, N) → (B)."""
    reached = probabilities.double().cumsum(-1)
    share = 1 - torch.rand(len(reached), 1, dtype=torch.float64, device=reached.device, generator=generator)  # in (0, 1]
    return torch.searchsorted(reached, share * reached[:, -1:]).squeeze(-1)


def pack_params(params, dtype):
    """`params` with the matrices in dtype and laid out by `pack`, for `forward` alone; the embedding stays as it is."""
    pack_all = partial(tree_map, lambda w: pack(w.to(dtype)) if w.ndim == 2 else w)
    return params | pack_all({"blocks": params["blocks"], "lm_head": params.get("lm_head", params["embedding"])})


@torch.inference_mode()
def generate(params, prompt, config, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=None,
             generator=None, dtype=torch.float32):
    """Continue prompts token by token, yielding (B) of int64 each time, until each row has drawn stop_token.

    prompt (B, T) of int64, T ≥ 1. A row that has stopped repeats stop_token. The model sees at most context_length
    tokens: of a longer prompt the last ones, and when they are used up it drops the older half and reads the newer
    half again, so that a token costs the same on average however long the text becomes.
    """
    if len(prompt) >= (8 if dtype == torch.float32 else 2):  # fewer are faster in float32 without
        params = pack_params(params, dtype)
    history = fresh = prompt[:, -config.context_length:]
    length = min(config.context_length, history.shape[1] + max_new_tokens)
    # On a CPU sums of half precision are taken in float32: to keep that saves turning all of it for every token.
    cache_dtype = dtype if prompt.is_cuda else torch.promote_types(dtype, torch.float32)
    cache = init_cache(config, len(prompt), length, cache_dtype, prompt.device)
    stopped = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        if history.shape[1] > config.context_length:
            history = fresh = history[:, -max(1, config.context_length // 2):]
            cache = cache | {"filled": 0}
        x, cache = features(params, fresh, config, dtype, cache)
        token = sample_token(to_logits(params, x[:, -1]), temperature, top_k, top_p, generator)  # (B)
        if stop_token is not None:
            token = token.masked_fill(stopped, stop_token)
            stopped = stopped | (token == stop_token)
        yield token
        if stopped.all():
            return
        fresh = token[:, None]  # (B, 1)
        history = torch.cat((history, fresh), 1)


# ---- Checkpoints: a folder that any Llama tool opens ----

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}


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
        flush(file)


def read_safetensors(path):
    """Read a safetensors file → {name: tensor}. Raises InputError where the file is damaged; never runs code from it."""
    path = Path(path)
    size = path.stat().st_size

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in the header")
        return dict(pairs)

    def entry(name, dtype, shape, data_offsets):
        start, end = data_offsets
        if not all(type(number) is int and 0 <= number <= size for number in (*shape, start, end)):
            raise ValueError(f"{name}: sizes that can't be")
        if math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize != end - start:
            raise ValueError(f"{name}: {end - start} bytes for shape {shape} of {dtype}")
        return start, end, name, SAFETENSORS_DTYPES[dtype], shape

    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length), object_pairs_hook=unique)
            header.pop("__metadata__", None)
            entries = sorted((entry(name, **header[name]) for name in header), key=lambda e: e[:3])
            tensors, position = {}, 0
            for start, end, name, dtype, shape in entries:
                if start != position:
                    raise ValueError(f"{name}: its bytes overlap others or leave a gap")
                data = np.fromfile(file, dtype=np.uint8, count=end - start)
                tensor = torch.from_numpy(data).view(dtype) if len(data) else torch.empty(0, dtype=dtype)
                tensors[name] = tensor.view(shape)
                position = end
            if position != size - 8 - length:
                raise ValueError(f"it has {size - 8 - length} bytes of numbers, its header speaks of {position}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({error}); take another checkpoint") from None
    return {name: tensors[name] for name in header}


def flush(file):
    """Make sure a file's bytes are on the disk before anything is renamed over an older one."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder):
    """Make sure the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        flush(file)


def read_json(path):
    """Read a JSON file. Raises InputError where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error})") from None


HF_BLOCK_NAMES = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "mlp.w_gate": "mlp.gate_proj", "mlp.w_up": "mlp.up_proj", "mlp.w_down": "mlp.down_proj",
}


def hf_name(path):
    """Hugging Face's name of a parameter: blocks.0.attention.wq → model.layers.0.self_attn.q_proj.weight."""
    if path.startswith("blocks."):
        _, layer, rest = path.split(".", 2)
        return f"model.layers.{layer}.{HF_BLOCK_NAMES[rest]}.weight"
    return {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight",
            "lm_head": "lm_head.weight"}[path]


def pairs_to_halves(w, head_dim):
    """Reorder the rows of each head from (2i, 2i+1) pairs to two halves, as Hugging Face's rotary layout has them."""
    return w.view(-1, head_dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def halves_to_pairs(w, head_dim):
    """The inverse of `pairs_to_halves`."""
    return w.view(-1, 2, head_dim // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def hf_layout(path, w, head_dim):
    """A parameter in Hugging Face's layout."""
    return pairs_to_halves(w, head_dim) if path.endswith((".wq", ".wk")) else w


def from_hf(tensors, config, source):
    """The tree of parameters, in float32, from Hugging Face's names and layout. `source` is named in errors."""
    shapes = tree_leaves(param_shapes(config))
    expected = {hf_name(path) for path, _ in shapes}
    # Old files carry the rotary frequencies, and a tied model's may carry the output matrix: both say nothing new.
    extra = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")} - expected
    extra -= {"lm_head.weight"} if config.tie_embeddings else set()
    for problem, names in (("lacks", expected - tensors.keys()), ("has unknown", extra)):
        if names:
            raise InputError(f"{source} {problem} {', '.join(sorted(names)[:3])}; expected the tensors of its config.json")
    params = []
    for path, shape in shapes:
        tensor = tensors[hf_name(path)]
        if tensor.shape != shape or not tensor.is_floating_point():
            raise InputError(f"{source}: {hf_name(path)} is {tensor.dtype} {tuple(tensor.shape)}; "
                             f"expected floating-point {shape}")
        if not tensor.isfinite().all():
            raise InputError(f"{source}: {hf_name(path)} has numbers that are not finite; take another checkpoint")
        rotary = path.endswith((".wq", ".wk"))
        params.append(halves_to_pairs(tensor.float(), config.head_dim) if rotary else tensor.float())
    return tree_build([path for path, _ in shapes], params)


def config_to_hf(config, eos_token_id):
    """config.json of a LlamaForCausalLM with these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model, "intermediate_size": config.d_ff, "head_dim": config.head_dim,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
        "bos_token_id": eos_token_id, "eos_token_id": eos_token_id,
    }


def config_from_hf(hf, source):
    """The Config of a Llama config.json. Raises InputError that names an option which this model has not."""
    if not isinstance(hf, dict) or hf.get("model_type") != "llama":
        raise InputError(f"{source} is not the config of a Llama model (model_type is not 'llama')")
    rope = hf.get("rope_parameters") or {}
    plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
             "sliding_window": None, "quantization_config": None}
    for option, value in plain.items():
        if hf.get(option, value) not in (value, None):
            raise InputError(f"{source} asks for {option} {hf[option]!r}, which this model has not")
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{source} asks for rope_type {rope['rope_type']!r}, which this model has not")
    try:
        config = Config(
            vocab_size=hf["vocab_size"], context_length=hf["max_position_embeddings"], d_model=hf["hidden_size"],
            num_layers=hf["num_hidden_layers"], num_heads=hf["num_attention_heads"],
            num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"], d_ff=hf["intermediate_size"],
            rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10000.0)), norm_eps=hf["rms_norm_eps"],
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)))
    except (KeyError, InputError) as error:
        raise InputError(f"{source} is damaged or incomplete ({error})") from None
    if (hf.get("head_dim") or config.head_dim) != config.head_dim:
        raise InputError(f"{source} asks for head_dim {hf['head_dim']}; this model's is d_model / num_heads, "
                         f"{config.head_dim}")
    return config


def save_checkpoint(folder, params, config, tokenizer_file, end_token, optimizer=None, train_state=None):
    """Write a checkpoint folder: beside its place, flushed to disk, then renamed, so that readers see all or nothing.

    `tokenizer_file` is copied in; `end_token` is its (text, id) that ends a document. `optimizer` (a tree of tensors)
    and `train_state` (JSON) are what a run needs to go on. Tensors that are split over ranks are gathered one at a time,
    for which the other ranks call `take_part_in_saving`.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    wholes = map(whole, [leaf for _, leaf in tree_leaves(params) + tree_leaves(optimizer or {})])
    try:
        write_checkpoint(beside, params, config, tokenizer_file, end_token, optimizer, train_state, wholes)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
        flush_folder(folder.parent)
    except OSError:  # as on a full disk, where the part that was written would be in the way
        shutil.rmtree(beside, ignore_errors=True)
        raise
    finally:
        for _ in wholes:  # what was not written, as the other ranks take part in all
            pass


def take_part_in_saving(params, optimizer):
    """What the other ranks do while the first one saves, or can't."""
    for _, leaf in tree_leaves(params) + tree_leaves(optimizer):
        whole(leaf)


def write_checkpoint(folder, params, config, tokenizer_file, end_token, optimizer, train_state, wholes):
    """Write the files of a checkpoint into a new folder, and flush them. `wholes` yields all tensors, none of them split."""
    folder.mkdir(parents=True)
    text, end_id = end_token
    leaves = tree_leaves(params)
    write_safetensors(folder / "model.safetensors", {hf_name(path): w for path, w in leaves},
                      (hf_layout(path, w, config.head_dim) for (path, _), w in zip(leaves, wholes)))
    write_json(folder / "config.json", config_to_hf(config, end_id))
    write_json(folder / "generation_config.json", {"bos_token_id": end_id, "eos_token_id": end_id})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": text, "eos_token": text,
        "model_max_length": config.context_length, "clean_up_tokenization_spaces": False})
    with open(folder / "tokenizer.json", "wb") as file:
        file.write(Path(tokenizer_file).read_bytes())
        flush(file)
    if optimizer is not None:
        write_safetensors(folder / "optimizer.safetensors", dict(tree_leaves(optimizer)), wholes)
    if train_state is not None:
        write_json(folder / "train_state.json", train_state)
    flush_folder(folder)


def load_checkpoint(folder):
    """Read (params in float32, config) from a Llama folder, of ours or of `transformers`, in one file or sharded.

    Raises InputError where it is no such folder, is damaged, or asks for what this model has not.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        advice = f"give {folder}/latest" if (folder / "latest").is_dir() else "expected a Llama folder"
        raise InputError(f"{folder} is not a checkpoint (no config.json in it); {advice}")
    config = config_from_hf(read_json(folder / "config.json"), folder / "config.json")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is damaged ({type(error).__name__}: {error})") from None
    tensors = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}; take another checkpoint")
        tensors |= read_safetensors(folder / name)
    if config.num_layers > len(tensors):  # before anything is made for each layer
        raise InputError(f"{folder}/config.json speaks of {config.num_layers} layers; its tensors are {len(tensors)}")
    return from_hf(tensors, config, folder), config


def load_optimizer(folder, like):
    """Read the optimiser state from a checkpoint folder of ours. `like`: a fresh state, whose shapes it must have."""
    path = Path(folder) / "optimizer.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is missing; the model can be used, but its training can't go on from here")
    tensors = read_safetensors(path)
    expected = [(name, t.shape, t.dtype) for name, t in tree_leaves(like)]
    if [(name, t.shape, t.dtype) for name, t in tensors.items()] != expected:
        raise InputError(f"{path} does not belong to this model; take another checkpoint")
    return tree_build(tensors.keys(), tensors.values())
