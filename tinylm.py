"""tinylm: a Llama-style language model and everything done to it, as pure functions over tensors.

Part I is the language model, a whole program: each operation as it is defined, in the order in which one would learn
it. Part II has forms that compute the same in less time, part III splits a model over ranks. Parameters are a nested
dict of tensors; inside a block the keys are the argument names of the functions that use them. Functions change nothing
of the caller's but a cache and what is called donated. Randomness comes from a seed, a generator or, without, torch.
Axes: B batch, T positions, S key positions, V vocabulary, H heads, D features of a head, N several in one, `...` any.
"""

import math
from dataclasses import dataclass, fields
from functools import partial, reduce, wraps

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

# ==== I. The language model ====

OPERATIONS = {}  # name → operation

def operation(definition):
    """Let a function have forms, which compute the same in less time. Part I reads as if this decorator were not there.

    Part II fills `forms`, pairs (fits, form): a call runs the first that fits the arguments, and else the definition.
    """
    @wraps(definition)
    def call(*args, **options):
        for fits, form in call.forms:
            if fits(*args, **options):
                return form(*args, **options)
        return definition(*args, **options)

    call.definition, call.forms = definition, []
    OPERATIONS[definition.__name__] = call
    return call

# ---- Operations ----

def at_least_float32(x):
    """Half precision becomes float32, in which sums are taken; float32 and float64 stay."""
    return x if x.dtype == torch.float64 else x.float()

@operation
def linear(x, w):
    """Matrix product x wᵀ. x (..., d_in), w (d_out, d_in), computed in x's dtype → (..., d_out)."""
    return x @ w.to(x.dtype).T

@operation
def linears(x, *ws):
    """`linear` of one x by each of several matrices. x (..., d_in), each w (d_out, d_in) → a tuple of (..., d_out)."""
    return tuple(linear(x, w) for w in ws)

@operation
def embedding(tokens, w):
    """Look up rows of a table. tokens (...) of int64, w (vocab_size, d_model) → (..., d_model)."""
    return w.index_select(0, tokens.flatten()).view(*tokens.shape, w.shape[1])

@operation
def rmsnorm(x, gain, eps):
    """x / √(mean(x²) + eps) ⊙ gain (Zhang and Sennrich 2019, eq. 4). x (..., d_model), gain (d_model) → like x."""
    x32 = at_least_float32(x)
    inverse_rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)  # (..., 1)
    return (x32 * inverse_rms * gain).to(x.dtype)

@operation
def rope_angles(length, head_dim, theta, scaling, device):
    """cos and sin of position · theta^(-2i/D) (Su et al. 2021, eq. 15) → two tensors (length, D/2) of float32.

    `scaling`, (factor, low, high, context), divides by `factor` what turns less than `low` times in `context` positions
    and keeps what turns more than `high` times, with a straight line between (Llama 3.1); context 0 divides all.
    """
    factor, low, high, context = scaling
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)  # (D/2)
    kept = ((frequencies * (context / (2 * math.pi)) - low) / (high - low)).clamp(0, 1)  # the share that stays
    angles = torch.arange(length, device=device).float()[:, None] * (frequencies * (kept + (1 - kept) / factor))
    return angles.cos(), angles.sin()  # (length, D/2) each

@operation
def rope(x, cos, sin):
    """Rotate pairs (2i, 2i+1) by their angles (Su et al. 2021, eq. 34). x (..., T, D), cos, sin (T, D/2) → like x."""
    even, odd = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)  # (..., T, D/2) each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)

def softmax(x, dim=-1):
    """exp(x) over its sum along `dim`, in float32 at least; the maximum is subtracted so that exp can't overflow."""
    x = at_least_float32(x)
    weights = torch.exp(x - x.detach().amax(dim, keepdim=True))  # it cancels, so it needs no gradient
    return weights / weights.sum(dim, keepdim=True)

@operation
def attention(q, k, v):
    """Causal scaled dot-product attention, softmax(q kᵀ / √D) v, with grouped-query heads (Ainslie et al. 2023).

    q (..., H, T, D), k and v (..., H_kv, S, D), H a multiple of H_kv, S ≥ T → (..., H, T, D) in q's dtype.
    Head h reads key head h // (H / H_kv). The T queries are the last of the S positions; none sees a later key.
    """
    T, S, D, group = q.shape[-2], k.shape[-2], q.shape[-1], q.shape[-3] // k.shape[-3]
    k, v = (x.to(q.dtype).unsqueeze(-3) for x in (k, v))  # (..., H_kv, 1, S, D)
    scores = at_least_float32((q.unflatten(-3, (-1, group)) * D**-0.5) @ k.mT)  # (..., H_kv, group, T, S)
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)  # keys in a query's future
    return (softmax(scores.masked_fill(future, -math.inf)).to(v.dtype) @ v).flatten(-4, -3)  # (..., H, T, D)

def silu(x):
    """x · sigmoid(x), element by element (Elfwing et al. 2017). Any shape."""
    return x * torch.sigmoid(x)

@operation
def gated_silu(gate, up):
    """silu(gate) ⊙ up. Both of one shape."""
    return silu(gate) * up

def swiglu(x, w_gate, w_up, w_down):
    """Gated feed-forward, (silu(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ (Shazeer 2020, eq. 6). x (..., d_model) → like x."""
    return linear(gated_silu(*linears(x, w_gate, w_up)), w_down)

@operation
def token_losses(logits, targets):
    """-log softmax(logits)[target], in nats and float32 at least. logits (..., V), targets (...) of int64 → (...)."""
    logits = at_least_float32(logits)
    logits = logits - logits.detach().amax(-1, keepdim=True)  # it cancels, and exp can't overflow
    targets = targets.expand(logits.shape[:-1]).unsqueeze(-1)  # (..., 1), one for each row: gather would leave rows out
    return torch.log(torch.exp(logits).sum(-1)) - logits.gather(-1, targets).squeeze(-1)

def cross_entropy(logits, targets):
    """The mean of `token_losses`. logits (..., V), targets (...) of int64 → a scalar, in nats per token."""
    return token_losses(logits, targets).mean()

# ---- The model ----

@dataclass(frozen=True)
class Config:
    """The sizes of a model. Raises ValueError where they can't go together."""
    vocab_size: int
    context_length: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0  # which means num_heads
    d_ff: int = 0  # 8/3·d_model, for as many parameters in SwiGLU's three matrices as in the usual two of 4·d_model
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    head_dim: int = 0  # d_model / num_heads
    rope_scaling: tuple = (1.0, 1.0, 2.0, 0)  # none, as its factor is 1; see `rope_angles`

    def __post_init__(self):
        fill_in = partial(object.__setattr__, self)  # as the dataclass is frozen
        fill_in("num_kv_heads", self.num_kv_heads or self.num_heads)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and value != field.default:  # a default such as 0 may mean "none"
                kind, least, most = ("whole number", 1, 2**31 - 1) if field.type is int else ("number", 1e-20, 1e20)
                if not isinstance(value, (int, field.type)) or isinstance(value, bool) or not least <= value <= most:
                    raise ValueError(f"{field.name} is {value!r}; expected a {kind} from {least} to {most}")
        fill_in("d_ff", self.d_ff or 64 * math.ceil(8 * self.d_model / (3 * 64)))  # rounded up to a multiple of 64
        if not self.head_dim and self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} over num_heads {self.num_heads} leaves a remainder; choose "
                             "num_heads to divide d_model")
        fill_in("head_dim", self.head_dim or self.d_model // self.num_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and RoPE rotates pairs; make d_model / num_heads even")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")

@operation
def init_cache(config, batch_size, length, dtype, device):
    """An empty cache for `length` positions: keys and values (num_layers, B, H_kv, length, D) and the count filled."""
    shape = (config.num_layers, batch_size, config.num_kv_heads, length, config.head_dim)
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")} | {"filled": 0}

@operation
def cached_attention(q, k, v, cache):
    """`attention` to earlier positions too. k, v (B, H_kv, T, D) go into a layer's `cache`; ValueError if full."""
    start, end, room = cache["filled"], cache["filled"] + q.shape[2], cache["k"].shape[2]
    if end > room:
        raise ValueError(f"{int(end)} positions in a cache of {room}; let init_cache make a longer one")
    cache["k"][:, :, start:end], cache["v"][:, :, start:end] = k, v
    return attention(q, cache["k"][:, :, :end], cache["v"][:, :, :end])

def multi_head_attention(x, cos, sin, cache, config, wq, wk, wv, wo):
    """Project to heads, rotate queries and keys, attend, and join the heads (Vaswani et al. 2017, §3.2.2).

    x (B, T, d_model), cos and sin (T, D/2), wq (H·D, d_model), wk and wv (H_kv·D, d_model), wo (d_model, H·D) → like x.
    """
    q, k, v = (y.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for y in linears(x, wq, wk, wv))  # (B, H, T, D)
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    heads = cached_attention(q, k, v, cache) if cache else attention(q, k, v)
    return linear(heads.transpose(1, 2).flatten(-2), wo)  # (B, T, d_model)

@operation
def transformer_block(x, cos, sin, cache, config, attention_norm, attention, mlp_norm, mlp):
    """Pre-norm: x + multi_head_attention(rmsnorm(x)), then x + swiglu(rmsnorm(x)). x (B, T, d_model) → like x."""
    x = x + multi_head_attention(rmsnorm(x, attention_norm, config.norm_eps), cos, sin, cache, config, **attention)
    return x + swiglu(rmsnorm(x, mlp_norm, config.norm_eps), **mlp)

@operation
def transformer_blocks(blocks, x, cos, sin, cache, config, remat=False):
    """All blocks in turn. x (B, T, d_model) → the same. With `remat` each keeps only its input (Chen et al. 2016)."""
    for layer, block in blocks.items():
        layer_cache = cache and {"k": cache["k"][int(layer)], "v": cache["v"][int(layer)], "filled": cache["filled"]}
        block_fn = partial(transformer_block, cos=cos, sin=sin, cache=layer_cache, config=config, **block)
        x = checkpoint(block_fn, x, use_reentrant=False) if remat else block_fn(x)
    return x

@operation
def angles_at(start, T, config, device):
    """`rope_angles` of T positions. Raises ValueError beyond context_length: the model has learned no others."""
    if start + T > config.context_length:
        raise ValueError(f"{start + T} positions, {start} of them cached; expected {config.context_length} at most")
    table = rope_angles(config.context_length, config.head_dim, config.rope_theta, config.rope_scaling, device)
    return tuple(angles[start:start + T] for angles in table)  # (T, D/2) each

def hidden_states(params, tokens, config, dtype=torch.float32, cache=None, remat=False):
    """What the output matrix reads, computed in `dtype`. tokens (B, T) of int64 → (B, T, d_model) and the new cache.

    `cache`, keys and values of earlier positions, is donated, as copies are slow. Raises ValueError past the context.
    """
    start, T = cache["filled"] if cache else 0, tokens.shape[1]
    cos, sin = angles_at(start, T, config, tokens.device)
    x = embedding(tokens, params["embedding"]).to(dtype)  # (B, T, d_model)
    x = transformer_blocks(params["blocks"], x, cos, sin, cache, config, remat)
    return rmsnorm(x, params["final_norm"], config.norm_eps), (cache | {"filled": start + T} if cache else None)

def to_logits(params, x):
    """Scores of every token of the vocabulary. x (..., d_model) → (..., V)."""
    return linear(x, params.get("lm_head", params["embedding"]))  # tied params may have it, laid out for generation

def forward(params, tokens, config, dtype=torch.float32, remat=False):
    """Scores of the token that follows each position. tokens (B, T) of int64 → (B, T, V) in `dtype`."""
    return to_logits(params, hidden_states(params, tokens, config, dtype, remat=remat)[0])

# ---- Parameters: a tree, that is a nested dict whose leaves are tensors ----

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

def tree_build(leaves):
    """The inverse of `tree_leaves`: a nested dict from pairs (dotted path, leaf)."""
    tree = {}
    for path, leaf in leaves:
        *parents, name = path.split(".")
        reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[name] = leaf
    return tree

def param_shapes(config):
    """The tree of parameter shapes, in the order of the forward pass."""
    d, d_ff = config.d_model, config.d_ff
    d_q, d_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = {"attention_norm": (d,), "attention": {"wq": (d_q, d), "wk": (d_kv, d), "wv": (d_kv, d), "wo": (d, d_q)},
             "mlp_norm": (d,), "mlp": {"w_gate": (d_ff, d), "w_up": (d_ff, d), "w_down": (d, d_ff)}}
    shapes = {"embedding": (config.vocab_size, d), "blocks": {str(i): block for i in range(config.num_layers)}}
    return shapes | {"final_norm": (d,)} | ({} if config.tie_embeddings else {"lm_head": (config.vocab_size, d)})

def num_params(config):
    """How many numbers the parameters hold."""
    return sum(math.prod(shape) for _, shape in tree_leaves(param_shapes(config)))

def init_params(config, generator):
    """Random parameters in float32, drawn in the order of `param_shapes`, on the generator's device.

    The standard deviation is 1/√d_in, so that activations keep their size; that of wo and w_down over √(2·num_layers),
    so that the residual stream doesn't grow with depth (Radford et al. 2019, §2.3); that of the embedding 1. The output
    matrix has 1/(3√d_model), for a first loss near ln(vocab_size); from less, learning is slower. A tied one has
    1/√d_model, and wo and w_down a fifth: a token's logit for itself is high at first, but learning as fast as untied.
    """
    into_stream = lambda d_in: (2 * config.num_layers * d_in) ** -0.5 / (5 if config.tie_embeddings else 1)
    deviations = {"wo": into_stream(config.num_heads * config.head_dim), "w_down": into_stream(config.d_ff)}
    deviations |= {} if config.tie_embeddings else {"embedding": 1.0, "lm_head": config.d_model ** -0.5 / 3}

    def initial(path, shape):
        if len(shape) <= 1:
            return torch.ones(shape, device=generator.device)
        deviation = deviations.get(path.split(".")[-1], shape[-1] ** -0.5)
        return torch.randn(shape, generator=generator, device=generator.device) * deviation

    return tree_build((path, initial(path, shape)) for path, shape in tree_leaves(param_shapes(config)))

# ---- Learning ----

@operation
def loss_fn(params, inputs, targets, config, dtype=torch.float32, remat=False):
    """Mean cross-entropy of `targets` after `inputs`, in nats per token. Both (B, T) of int64 → a scalar."""
    return cross_entropy(forward(params, inputs, config, dtype, remat), targets)

def value_and_grad(function, params, *args):
    """The value of function(params, *args), a scalar, and its gradient, a tree like `params`, 0 where it uses none."""
    params = tree_map(lambda p: p.detach().requires_grad_(), params)
    paths, leaves = zip(*tree_leaves(params))
    value = function(params, *args)
    return value.detach(), tree_build(zip(paths, torch.autograd.grad(value, leaves, materialize_grads=True)))

@operation
def global_norm(tree):
    """The Euclidean norm of all leaves taken as one vector, a scalar of float32."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x.float()) for _, x in tree_leaves(tree)]))

@operation
def clip_gradients(grads, norm, max_norm):
    """Scale a tree of global norm `norm`, a scalar tensor, to at most `max_norm` (Pascanu et al. 2013, alg. 1)."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return tree_map(lambda g: g * scale, grads)

def adamw_init(params):
    """The state AdamW starts from: zero moments m and v like `params`, in float32, and the count of steps."""
    zeros = lambda: tree_map(partial(torch.zeros_like, dtype=torch.float32), params)
    return {"step": tree_leaves(params)[0][1].new_zeros((), dtype=torch.int64), "m": zeros(), "v": zeros()}

@operation
def adamw_update(params, grads, state, lr, beta1=0.8, beta2=0.98, eps=1e-8, weight_decay=0.1):
    """One step of AdamW with bias correction, in float32 (Loshchilov and Hutter 2019, alg. 2) → new params, new state.

    Decay, times lr as in PyTorch, is for two axes or more, as a norm's gain has no reason to be near 0. lr is a number
    or a scalar tensor. Corrections are in float64, as 1 - beta2 ** step cancels. Of the betas data/README.md has more.
    """
    step = state["step"] + 1
    m = tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, state["m"], grads)
    v = tree_map(lambda v, g: beta2 * v + (1 - beta2) * g.square(), state["v"], grads)
    correction1, correction2 = 1 - beta1 ** step.double(), 1 - beta2 ** step.double()

    def update(p, m, v):
        direction = (m / correction1) / ((v / correction2).sqrt() + eps)
        return (p - lr * (direction + (weight_decay * p if p.ndim >= 2 else 0))).to(p.dtype)  # a scalar's is float64

    return tree_map(update, params, m, v), {"step": step, "m": m, "v": v}

POLAR_EXPRESS = (8.16, -22.5, 15.9), (4.04, -2.81, 0.5), (3.89, -2.77, 0.506), (3.29, -2.37, 0.465), (2.35, -1.7, 0.42)

@operation
def orthogonalize(g):
    """Bring singular values near 1 (Muon, Jordan et al. 2024), by Polar Express (Amsel et al. 2025).

    X ← aX + (bA + cA²)X, A = XXᵀ: values from 0.001 of the norm on end between 0.84 and 1.15. g (..., m, n) → like g.
    """
    tall, norm = g.shape[-2] > g.shape[-1], torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
    x = (g.mT if tall else g) / (1.02 * norm + 1e-7)  # no singular value is above 1, even rounded; A is the smaller one
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT  # (..., s, s), s the smaller of m and n
        x = a * x + (b * A + c * A @ A) @ x
    return x.mT if tall else x

@operation
def orthogonalize_all(matrices):
    """`orthogonalize` of each matrix of a tree."""
    return tree_map(orthogonalize, matrices)

def muon_split(tree):
    """Two trees: the matrices of the blocks, which Muon updates, and the rest, which AdamW does."""
    is_matrix = lambda path, leaf: path.startswith("blocks.") and leaf.ndim == 2
    return [tree_build(leaf for leaf in tree_leaves(tree) if is_matrix(*leaf) == wanted) for wanted in (True, False)]

def muon_init(params):
    """The state Muon starts from: the momentum of the matrices of the blocks, zero, and AdamW's state of the rest."""
    matrices, rest = muon_split(params)
    return {"momentum": tree_map(partial(torch.zeros_like, dtype=torch.float32), matrices), "adamw": adamw_init(rest)}

def muon_update(params, grads, state, lr, beta1=0.8, beta2=0.98, eps=1e-8, weight_decay=0.1, momentum=0.95):
    """One step of Muon (Jordan et al. 2024) for matrices of the blocks and of AdamW for the rest; → (params, state).

    A matrix moves along its orthogonalised Nesterov momentum. The factor 0.2·√max(m, n) makes its root mean square that
    of an AdamW step, so that one learning rate and one decay serve both (Liu et al. 2025, §2.2).
    """
    (matrices, rest), (matrix_grads, rest_grads) = muon_split(params), muon_split(grads)
    rest, adamw = adamw_update(rest, rest_grads, state["adamw"], lr, beta1, beta2, eps, weight_decay)
    averages = tree_map(lambda m, g: torch.lerp(m, g, 1 - momentum), state["momentum"], matrix_grads)
    directions = orthogonalize_all(tree_map(lambda m, g: torch.lerp(g, m, momentum), averages, matrix_grads))
    update = lambda p, d: p * (1 - lr * weight_decay) - lr * (0.2 * max(p.shape) ** 0.5 * d)
    updated = dict(tree_leaves(tree_map(update, matrices, directions)) + tree_leaves(rest))
    return tree_build((path, updated[path]) for path, _ in tree_leaves(params)), {"momentum": averages, "adamw": adamw}

def cosine_lr(step, lr_max, lr_min, warmup_steps, num_steps):
    """Learning rate of a step from 0 on: warm-up, half a cosine (Loshchilov and Hutter 2017, eq. 5), then lr_min."""
    if step < warmup_steps:
        return lr_max * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return lr_min + 0.5 * (lr_max - lr_min) * (1 + math.cos(math.pi * progress))

# An optimiser is its first state and its update; further arguments of the update are its hyperparameters.
OPTIMIZERS = {"adamw": (adamw_init, adamw_update), "muon": (muon_init, muon_update)}
SCHEDULES = {"cosine": cosine_lr}

# ---- Data ----

def splitmix64(x):
    """Scramble 64 bits, one to one (the finaliser of SplitMix64; Steele et al. 2014). x an int, or uint64 (...)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)

def shuffled_index(index, length, key):
    """Where `index` (...) of int64 lands in a permutation of range(length) by `key`; nothing of that length is stored.

    A Feistel network permutes a power of four (Luby and Rackoff 1988); what falls outside goes through it again.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    index = np.array(index, dtype=np.uint64)
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():
        left, right = index[outside] >> half, index[outside] & mask
        for round_ in range(4):
            scrambled = splitmix64(right + (key * 4 + round_ + 1) * 0x9E3779B97F4A7C15 % 2**64)
            left, right = right, left ^ (scrambled & mask)
        index[outside] = left << half | right
        outside = index >= length
    return index.astype(np.int64)

def get_batch(tokens, batch_size, context_length, seed, step, rank=0, num_ranks=1):
    """The batch of a step: a function of its arguments alone, so that any step's can be had at any time.

    An epoch cuts the tokens into windows of context_length, from a start of its own, and visits each once, in an order
    of its own. Of the step's num_ranks · batch_size windows, rank r, counted from 0, gets the r-th part.
    tokens (N) → inputs, and targets one token on, (batch_size, context_length) of int64. Raises ValueError for small N.
    """
    if len(tokens) <= context_length:
        raise ValueError(f"{len(tokens)} tokens can't fill one window of context_length {context_length} and the token "
                         "after it; use more text or a smaller context_length")
    num_windows = max(1, (len(tokens) - 1) // context_length - 1)  # one less than fit: so each epoch starts elsewhere
    epochs, numbers = np.divmod((step * num_ranks + rank) * batch_size + np.arange(batch_size), num_windows)
    starts = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        key = splitmix64(seed % 2**64) + epoch
        offset = splitmix64(key % 2**64) % (len(tokens) - num_windows * context_length)
        starts[epochs == epoch] = offset + context_length * shuffled_index(numbers[epochs == epoch], num_windows, key)
    windows = np.stack([tokens[start:start + context_length + 1] for start in starts]).astype(np.int64)  # (B, T + 1)
    return torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])

# ---- Generation ----

def nucleus_floor(probabilities, top_p):
    """The least probability in a nucleus, the fewest tokens with mass top_p (Holtzman et al. 2020). (B, V) → (B, 1)."""
    best_first = probabilities.sort(-1, descending=True).values  # (B, V)
    before = best_first.cumsum(-1) - best_first  # the mass of all better tokens
    return best_first.masked_fill(before >= max(top_p, 1e-20), math.inf).amin(-1, keepdim=True)  # the best stays

@operation
def sample_token(logits, chance, temperature, top_k, top_p):
    """Draw the next token: softmax at a temperature over the top_k best, then the nucleus of mass top_p among them.

    Temperature 0 takes the best token, top_k 0 keeps all; ties with the last of either stay too. logits (B, V), chance
    (B, 1) of float64, drawn evenly from [0, 1) → (B) of int64.
    """
    if temperature == 0:
        return logits.float().argmax(-1)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    probabilities = softmax((logits.float() / max(temperature, 1e-20)).nan_to_num())  # no overflow, and no NaN
    if top_p < 1:
        probabilities = probabilities.masked_fill(probabilities < nucleus_floor(probabilities, top_p), 0.0)
    reached = probabilities.double().cumsum(-1)
    return torch.searchsorted(reached, (1 - chance) * reached[:, -1:]).squeeze(-1)  # above 0: none of mass 0 is drawn

@operation
def next_token(params, tokens, config, dtype, cache, chance, stopped, temperature, top_k, top_p, stop_tokens):
    """Read tokens (B, T), draw the next by `sample_token` → it (B), the new cache, whether rows have stopped (B)."""
    x, cache = hidden_states(params, tokens, config, dtype, cache)
    token = sample_token(to_logits(params, x[:, -1]), chance, temperature, top_k, top_p)  # (B)
    if stop_tokens:
        token = token.masked_fill(stopped, stop_tokens[0])
        stopped = torch.stack([stopped, *(token == stop for stop in stop_tokens)]).any(0)
    return token, cache, stopped

@operation
def weights_for_generation(params, dtype, batch_size):
    """`params` with matrices cast to dtype, once for all tokens. Forms go by the number of texts, `batch_size`, too."""
    return tree_map(lambda w: w.to(dtype) if w.ndim == 2 else w, params)

@torch.inference_mode()
def generate(params, prompt, config, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_tokens=(),
             generator=None, dtype=torch.float32):
    """Continue prompts, yielding (B) of int64, an inference tensor, max_new_tokens times or until all rows are stopped.

    prompt (B, T) of int64, T ≥ 1. A row that has stopped repeats the first stop token. The model sees context_length
    tokens at most, of a longer prompt the last; then it drops the older half and reads the newer half again.
    """
    params = weights_for_generation(params, dtype, len(prompt))
    history = fresh = prompt[:, -config.context_length:]  # what the model may see; of it, what the cache lacks
    length = min(config.context_length, history.shape[1] + max_new_tokens)
    cache = init_cache(config, len(prompt), length, dtype, prompt.device)
    stopped = prompt.new_zeros(len(prompt), dtype=torch.bool)
    chance = prompt.new_zeros(len(prompt), 1, dtype=torch.float64)
    for _ in range(max_new_tokens):
        if history.shape[1] > config.context_length:
            history = fresh = history[:, -max(1, config.context_length // 2):]
            cache = cache | {"filled": 0}
        chance = chance.uniform_(generator=generator) if temperature else chance
        token, cache, stopped = next_token(params, fresh, config, dtype, cache, chance, stopped, temperature, top_k,
                                           top_p, stop_tokens)
        yield token
        if stop_tokens and stopped.all():
            return
        history, fresh = torch.cat((history, token[:, None]), 1), token[:, None]  # (B, T), (B, 1)

# ==== II. Faster ====

import os
import platform
import shutil
import sysconfig
import threading
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from types import FunctionType

# Four functions here remember what they computed (lru_cache): it depends on their arguments, or on the machine, alone.

def faster(target, fits):
    """Attach the function below to an operation, as its form for arguments that fit, asked before earlier ones."""
    def attach(form):
        target.forms.insert(0, (fits, form))
        return form
    return attach

@contextmanager
def definitions_alone(names=None):
    """Switch forms off: within it each operation, or each of these names, is computed as it is defined. In all threads,
    and where several overlap until the first ends.
    """
    forms = {name: OPERATIONS[name].forms[:] for name in names or OPERATIONS}
    for name in forms:
        OPERATIONS[name].forms.clear()
    try:
        yield
    finally:
        for name in forms:
            if forms[name]:  # else another, which may have ended before, puts them back
                OPERATIONS[name].forms[:] = forms[name]

def forms_that_differ(compute, tolerance=1e-4):
    """The names of operations whose forms change what compute() gives, a tree of {what: tensors}, or whether it fails;
    an empty list where it is not the same twice.
    """
    def attempt():
        try:
            return tree_map(lambda x: torch.nan_to_num(x, 0.0, 0.0, 0.0), compute())
        except Exception as error:  # as of a form that lacks an argument
            return error

    def differs():
        now = attempt()
        if isinstance(now, Exception) or isinstance(usual, Exception):
            return type(now) is not type(usual)
        distance = lambda what: global_norm(tree_map(torch.sub, now[what], usual[what]))
        return any(distance(what) > tolerance * global_norm(usual[what]) for what in usual)

    def differs_without(names):
        with definitions_alone(names):
            return differs()

    usual, names = attempt(), [name for name, target in OPERATIONS.items() if target.forms]
    if differs() or not differs_without(names):
        return []
    alone = [name for name in names if differs_without([name])]
    for name in [] if alone else names[:]:  # those that only differ together
        if differs_without([other for other in names if other != name]):
            names.remove(name)
    return alone or names

def always(*_, **__):
    return True

def is_compiled(*_, **__):
    """Whether torch.compile is at work, which fuses passes over memory by itself."""
    return torch.compiler.is_compiling()

def is_eager(*_, **__):
    """Whether torch.compile is not at work."""
    return not torch.compiler.is_compiling()

def is_eager_with_grad(*_, **__):
    """Whether eager code computes gradients. Without gradients an autograd function costs more than it saves."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()

def first_leaf(tree):
    """The first tensor of a tree, which tells where all of them are."""
    return first_leaf(next(iter(tree.values()))) if isinstance(tree, dict) else tree

def are_float32(*trees):
    """Whether trees are of float32, by their first leaves."""
    return all(first_leaf(tree).dtype == torch.float32 for tree in trees)

def if_finite(number, new, old):
    """A new tree, or where a number, a scalar tensor, is not finite the old one. The host waits for no GPU to know."""
    if number.is_cpu and is_eager():
        return new if number.isfinite() else old
    return tree_map(partial(torch.where, number.isfinite()), new, old)

# ---- Eager code, on any device: hand-written backward passes, and fewer passes over memory ----

def only_first(backward):
    """A backward pass written by hand, which raises NotImplementedError where its own gradient is asked for: that would
    be wrong, as it takes saved tensors for constants.
    """
    def call(ctx, *d_out):
        if torch.is_grad_enabled() and is_eager():
            raise NotImplementedError("second derivatives: compute all of it within tinylm.definitions_alone()")
        return backward(ctx, *d_out)
    return call

def opaque(like):
    """Let torch.compile take the function below for one operation, with results shaped as those of `like`. Eager code
    calls it as it is: by the first call of such an operation it would import the compiler.
    """
    def wrap(function):
        whole = torch.library.custom_op(f"tinylm::{function.__name__}", function, mutates_args=())
        whole.register_fake(like)
        return wraps(function)(lambda *args: whole(*args) if is_compiled() else function(*args))
    return wrap

def normalized(x, gain, eps):
    """`rmsnorm` of x, and 1 / √(mean(x²) + eps)."""
    x32 = at_least_float32(x)
    mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square() / x.shape[-1]  # (..., 1)
    inverse_rms = torch.rsqrt(mean_square + eps)
    return (x32 * inverse_rms).mul_(gain).to(x.dtype), inverse_rms

@faster(rmsnorm, lambda x, gain, eps: x.is_cpu and is_eager())
def rmsnorm_on_cpu(x, gain, eps):
    """For one row, as when one token is read, in Python's numbers: to call an operation takes longer than its work."""
    if x.numel() == x.shape[-1] and torch.is_inference_mode_enabled():  # else a tangent would be lost
        x32 = at_least_float32(x)
        norm = torch.linalg.vector_norm(x32).item()
        return (x32 * gain).div_(math.sqrt(norm * norm / x.numel() + eps)).to(x.dtype)
    return normalized(x, gain, eps)[0]

class RMSNorm(torch.autograd.Function):
    """`rmsnorm` with its own backward pass. With r = 1 / √(mean(x²) + eps):
    d gain = sum of d out ⊙ x · r,  dx = r · d out ⊙ gain - x · r³ / d_model · sum(d out ⊙ x ⊙ gain).
    """

    @staticmethod
    def forward(ctx, x, gain, eps):
        out, inverse_rms = normalized(x, gain, eps)
        ctx.save_for_backward(x, gain, inverse_rms)
        return out

    @staticmethod
    @only_first
    def backward(ctx, d_out):
        x, gain, inverse_rms = ctx.saved_tensors
        x32, d_out = at_least_float32(x), at_least_float32(d_out)
        products = (d_out * x32).reshape(-1, x.shape[-1])  # (rows, d_model)
        d_gain = inverse_rms.flatten() @ products
        along_x = (products @ gain.to(products.dtype)).view(inverse_rms.shape) * inverse_rms**3
        dx = (d_out * gain).mul_(inverse_rms).addcmul_(x32, along_x, value=-1 / x.shape[-1])
        return dx.to(x.dtype), d_gain.to(gain.dtype), None

@faster(rmsnorm, lambda x, gain, eps: torch.is_tensor(gain) and gain.ndim == 1 and is_eager_with_grad())
def rmsnorm_trained(x, gain, eps):
    return RMSNorm.apply(x, gain, eps)

@lru_cache(maxsize=4)
def rope_table(length, head_dim, theta, scaling, device):
    """`rope_angles`, computed once."""
    with torch.inference_mode(False):  # so that what generation has computed can serve training too
        return rope_angles.definition(length, head_dim, theta, scaling, device)

@faster(rope_angles, always)
def rope_angles_once(length, head_dim, theta, scaling, device):
    return rope_table(length, head_dim, theta, scaling, device)

# Compiled code would take the sines again for each head and each layer, so the table is a constant to it. This is what
# torch.compiler.assume_constant_result says, which would import the compiler for it: a second and more.
rope_angles_once._dynamo_marked_constant = True

def power_of_two(size):
    """The least that is not below a size."""
    return 1 << (size - 1).bit_length()

@faster(angles_at, lambda start, T, config, device: isinstance(start, int) and start + T <= config.context_length
        and is_eager())
def angles_at_eager(start, T, config, device):
    """From a table of no more than twice the positions so far, or 256: a model may take a million."""
    length = max(256, power_of_two(start + T))
    table = rope_table(length, config.head_dim, config.rope_theta, config.rope_scaling, device)
    return tuple(angles[start:start + T] for angles in table)

def has_pairs(x):
    """Whether pairs of x stand where complex numbers can, or will in a copy without gaps."""
    return x.stride(-1) != 1 or math.gcd(2, x.storage_offset(), *x.stride()[:-1]) == 2  # all of them are even

@faster(rope, lambda x, cos, sin: is_eager() and has_pairs(x))
def rope_eager(x, cos, sin):
    """A pair is a complex number and its rotation a product: one pass over x, where the definition makes six."""
    x32 = at_least_float32(x if x.stride(-1) == 1 else x.contiguous())
    pairs = torch.view_as_complex(x32.unflatten(-1, (-1, 2)))  # (..., T, D/2)
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)

@faster(gated_silu, is_eager)
def gated_silu_in_place(gate, up):
    return torch.sigmoid(gate).mul_(gate).mul_(up)

class GatedSiLU(torch.autograd.Function):
    """`gated_silu` with its own backward pass, which makes fewer arrays. With σ = sigmoid(gate):
    d gate = d out ⊙ up ⊙ (σ + silu(gate) ⊙ (1 - σ)),  d up = d out ⊙ silu(gate).
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return gated_silu_in_place(gate, up)

    @staticmethod
    @only_first
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        sigma = torch.sigmoid(gate)
        activated = gate * sigma
        d_gate = torch.lerp(sigma, sigma.new_ones(()), activated).mul_(up).mul_(d_out)  # lerp(a, b, w) is a + w (b - a)
        return d_gate, activated.mul_(d_out)

@faster(gated_silu, is_eager_with_grad)
def gated_silu_trained(gate, up):
    return GatedSiLU.apply(gate, up)

class TokenLosses(torch.autograd.Function):
    """`token_losses` with its own backward pass, d logits = (softmax(logits) - onehot(target)) · d loss.

    It keeps exp(logits - highest) and turns that into the gradient where it lies, so that it goes backward once alone:
    with a large vocabulary each pass over an array of this size, and each new one, is dear.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.dtype, ctx.written, targets = logits.dtype, None, targets.expand(logits.shape[:-1]).unsqueeze(-1)
        logits = at_least_float32(logits)
        highest = logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, targets)
        exps = torch.add(-highest / math.log(2), logits, alpha=1 / math.log(2)).exp2_()  # faster than exp on a CPU
        total = exps.sum(-1, keepdim=True)
        ctx.save_for_backward(exps, total, targets)
        return (total.log() + highest - chosen).squeeze(-1)

    @staticmethod
    @only_first
    def backward(ctx, d_losses):
        try:
            exps, total, targets = ctx.saved_tensors
        except RuntimeError:  # as exps is no more what it was
            exps = None
        if exps is None or exps._version == ctx.written:  # where autograd has hooks, it does not look
            raise NotImplementedError("second passes: compute all of it within tinylm.definitions_alone()")
        d_losses = d_losses.unsqueeze(-1)
        d_logits = exps.mul_(d_losses / total).scatter_add_(-1, targets, -d_losses)
        ctx.written = exps._version
        return d_logits.to(ctx.dtype), None

@faster(token_losses, is_eager)
def token_losses_in_place(logits, targets):
    return TokenLosses.apply(logits, targets)

@opaque(lambda x, after: torch.empty_like(x))
def computed(x: torch.Tensor, after: list[torch.Tensor]) -> torch.Tensor:
    """A copy of x, so that compiled code computes x once, not again for each number made of it, and when all of `after`
    is there."""
    return x.clone()

@faster(adamw_update, lambda params, grads, *_, **__: are_float32(params, grads))
def adamw_update_in_few_passes(params, grads, state, lr, beta1=0.8, beta2=0.98, eps=1e-8, weight_decay=0.1):
    """lr · m̂ / (√v̂ + eps) with the corrections and lr moved to where they cost one pass over memory."""
    step = state["step"] + 1
    correction1, correction2 = 1 - beta1 ** step.double(), (1 - beta2 ** step.double()).sqrt()
    # What is added to √v, and what the sum is multiplied by.
    floor, scale = computed(torch.stack((eps * correction2, correction1 / (lr * correction2))).float(), [])
    keep = 1 - lr * weight_decay

    def update(p, g, m, v):
        m = torch.lerp(m, g, 1 - beta1)
        v = (v * beta2).addcmul_(g, g, value=1 - beta2)
        decayed = p * keep if p.ndim >= 2 else p.clone()
        return decayed.addcdiv_(m, v.sqrt().add_(floor).mul_(scale), value=-1), m, v

    updated = tree_map(update, params, grads, state["m"], state["v"])
    params, m, v = (tree_map(lambda new: new[i], updated) for i in range(3))
    return params, {"step": step, "m": m, "v": v}

@faster(orthogonalize, lambda g: g.ndim == 3 and g.is_cpu)
def polar_express(g):
    """`orthogonalize` of stacked matrices (N, m, n), by products that also add and scale."""
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g) / (1.02 * torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        A = torch.bmm(x, x.mT)  # (N, m, m)
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

# The most numbers in one stack of matrices. On two cores of a Xeon 2^19 take 0.83 of the time of a block alone at 128
# wide, 0.96 at 256, 1.00 at 512; 2^18 0.91, 1.03, 1.01; 2^20 0.83, 1.09, 1.02. On an H200 eight blocks 512 wide take 17
# ms one by one, and with 2^22, 2^24, 2^26 and 2^28 2.7, 1.4, 1.4 and 1.4; twelve of 768 25, 8.1, 5.1, 4.7 and 4.8; four
# of 2,048 21, 21, 22, 20, 20.
STACKED_AT_MOST = {"cpu": 1 << 19, "cuda": 1 << 26}

@faster(orthogonalize_all, lambda matrices: first_leaf(matrices).is_cpu or first_leaf(matrices).is_cuda)
def orthogonalize_by_shape(matrices):
    """Those of one shape go together, as fewer and larger products."""
    groups, done = {}, {}
    for path, w in tree_leaves(matrices):
        groups.setdefault(w.shape, {})[path] = w
    for shape, group in groups.items():
        ws, size = list(group.values()), max(1, STACKED_AT_MOST[first_leaf(group).device.type] // shape.numel())
        parts = (orthogonalize(torch.stack(ws[i:i + size])) for i in range(0, len(ws), size))
        done |= zip(group, (w for part in parts for w in part))
    return tree_build((path, done[path]) for path, _ in tree_leaves(matrices))

# ---- The loss, in pieces where all logits at once would take most of the memory ----

LOGITS_AT_ONCE = 1 << 27  # numbers; with 50,304 tokens in the vocabulary the logits of 2,668 positions

def token_losses_in_pieces(params, inputs, targets, config, dtype):
    """`token_losses` of a model, for evaluation; whole rows at once where they fit. inputs, targets (B, T) of int64 →
    (B, T).
    """
    def of_rows(x, targets):
        size = max(1, LOGITS_AT_ONCE // config.vocab_size)
        pieces = zip(x.split(size, 1), targets.split(size, 1))
        return torch.cat([token_losses(to_logits(params, x), targets) for x, targets in pieces], 1)

    x, _ = hidden_states(params, inputs, config, dtype)
    name = "lm_head" if "lm_head" in params else "embedding"
    params = params | {name: all_gather(params[name], x.dtype).to(x.dtype)}  # once for all pieces
    rows = max(1, LOGITS_AT_ONCE // (config.vocab_size * inputs.shape[1]))
    return torch.cat(list(map(of_rows, x.split(rows), targets.expand_as(inputs).split(rows))))

class LossInPieces(torch.autograd.Function):
    """The mean of `token_losses` of x wᵀ, some rows of x at a time; no more logits than of these exist.

    The forward pass computes the gradients too, while it has the logits (as Hsu et al. 2024, Liger):
    d logits = (softmax(logits) - onehot(target)) / N,  dx = d logits w,  dw = d logitsᵀ x.
    x (N, d_model), w (V, d_model), targets (N) of int64 → a scalar.
    """

    @staticmethod
    def forward(ctx, x, w, targets):
        matrix, loss, dxs, dw = w.to(x.dtype), 0.0, [], 0.0
        vocabulary, size = torch.arange(len(w), device=w.device), max(1, LOGITS_AT_ONCE // len(w))
        for rows, theirs in zip(x.split(size), targets.expand(len(x))[:, None].split(size)):
            if dxs and is_compiled():  # which would compute all pieces at once
                rows = computed(rows, [loss, dw, dxs[-1]])
            logits = at_least_float32(rows @ matrix.T)  # (rows, V)
            highest = logits.amax(-1, keepdim=True)
            exps = torch.exp(logits - highest)
            total = exps.sum(-1, keepdim=True)
            loss = loss + (total.log() + highest - logits.gather(-1, theirs)).sum()
            d_logits = ((exps / total - (vocabulary == theirs).to(exps.dtype)) / len(x)).to(x.dtype)
            dxs.append(d_logits @ matrix)
            dw = dw + (d_logits.T @ rows).to(w.dtype)
        ctx.save_for_backward(torch.cat(dxs), dw)
        return loss / len(x)

    @staticmethod
    @only_first
    def backward(ctx, d_loss):
        dx, dw = ctx.saved_tensors
        return dx * d_loss.to(dx.dtype), dw * d_loss, None

@operation
def mean_loss(x, w, targets):
    """`LossInPieces`: the mean of `token_losses` of x wᵀ."""
    return LossInPieces.apply(x, w, targets)

@faster(loss_fn, lambda params, *_, **__: first_leaf(params).is_cuda)
def loss_in_pieces(params, inputs, targets, config, dtype=torch.float32, remat=False):
    x, _ = hidden_states(params, inputs, config, dtype, remat=remat)
    return mean_loss(x.flatten(0, 1), params.get("lm_head", params["embedding"]), targets.expand_as(inputs).flatten())

# ---- CPU ----

def is_intel():
    """Whether the CPU is one of Intel's, whose MKL computes PyTorch's products."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return "GenuineIntel" in file.read(4096)
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()

HAS_ONEDNN, IS_INTEL = torch.backends.mkldnn.is_available(), is_intel()
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"

@faster(linear, lambda x, w: w.is_cpu)
def linear_on_cpu(x, w):
    """In the way that is fastest for the sizes. w may also come from `pack`.

    MKL gets less out of other CPUs than Intel's. On an AMD EPYC a product of one vector by a w that is not packed is
    faster in pieces, one of 2 to 32 transposed. On an Intel Xeon pieces take 2.0 to 2.5 times as long as x @ w.T, 2 to
    8 vectors transposed 1.0 to 2.1 times, 16 and more are mostly faster (w from 128 × 128 to 32,000 × 288; both CPUs
    with AVX-512, two cores). Small matrices are in the cache, where x @ w.T may be faster: on the EPYC at 64 × 64 in
    bfloat16, 4 µs for 6, but not at 128 × 128, 15 for 7; in float32 still at 256 × 256, 7 for 11.
    """
    if w.is_mkldnn and w.dtype == x.dtype:
        return onednn_product(x, w)
    w = (w.to_dense() if w.is_mkldnn else w).to(x.dtype)
    rows = x.numel() // x.shape[-1]
    if is_large_product(rows, x, w):
        return LargeLinear.apply(x, w)
    least = 1 << (13 if x.dtype == torch.bfloat16 else 16)  # oneDNN makes bfloat16 slow sooner, see `linear_of_one`
    if is_compiled() or w.numel() < least or IS_INTEL and rows <= 8:  # compiled, small products are as defined
        return x @ w.T
    if rows == 1 and x.dtype in (torch.float32, torch.bfloat16):
        return linear_of_one(x, w)
    if 0 < rows <= 32 and x.dtype == torch.float32:
        return (w @ x.reshape(rows, -1).T).T.view(*x.shape[:-1], -1)  # MKL copies its second matrix: let that be x
    return x @ w.T

def is_large_product(rows, x, w):
    """Whether oneDNN multiplies faster than MKL, which on a Xeon it does not (0.87 times as fast).

    On an EPYC MKL gets 200 to 220 GFLOP/s at any size, oneDNN 345 from 768 × 128 × 128 on and 460 from 768 × 384 × 128
    on: steps of small models take 0.74 to 0.8 of the time. Without AVX-512 only what is large was tried.
    """
    least = 1 << 22 if HAS_AVX512 else 1 << 29
    return rows > 32 and rows * w.numel() >= least and x.dtype == torch.float32 and HAS_ONEDNN and not IS_INTEL

# The compiler knows these operations of oneDNN not, or for constant b alone.

@opaque(lambda a, b: a.new_empty(*a.shape[:-1], len(b)))
def onednn_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b.T by oneDNN, through the operation that PyTorch's compiler has for it. b (n, k) may come from `pack`."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

@opaque(lambda d_out, x: x.new_empty(d_out.shape[1], x.shape[1]))
def onednn_weight_gradient(d_out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """d_outᵀ x, the gradient of a `linear`'s matrix, by oneDNN. d_out (rows, m), x (rows, n) → (m, n).

    Its operation for this copies both; a product has to transpose d_out, rows · m numbers, or x and the result, (rows +
    m) · n, whichever is fewer. On an EPYC (Zen 5), one core and two, rows × m × n from memory, not from the cache:
    products take 0.57 to 0.79 of the operation's time at 256 to 1,024 × 384 × 128, 0.94 to 0.98 at 1,024 × 512 × 512
    and 0.87 to 0.91 at 4,096 × 1,408 × 512, but 1.11 to 1.15 at 2,048 × 768 × 768 and 1.06 to 1.11 at 4,096 × 256 ×
    256. MKL mostly takes 1.2 to 2 times as long as the better of the two.
    """
    (rows, m), n = d_out.shape, x.shape[1]
    if rows * min(m, n) > 1 << 19 and rows * max(m, n) <= 1 << 21:
        w = x.new_empty(m, n)  # of which it takes dtype and device alone
        return torch.ops.aten.mkldnn_linear_backward_weights(d_out.to_mkldnn(), x.to_mkldnn(), w, False)[0]
    if n * (rows + m) < rows * m:
        return onednn_product(x.T, d_out.T).T.contiguous()
    return onednn_product(d_out.T, x.T)

class LargeLinear(torch.autograd.Function):
    """x @ w.T in float32 by oneDNN, which multiplies large matrices faster than MKL. dx = d_out w,  dw = d_outᵀ x."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return onednn_product(x, w)

    @staticmethod
    @only_first
    def backward(ctx, d_out):
        x, w = ctx.saved_tensors
        return onednn_product(d_out, w.T), onednn_weight_gradient(d_out.flatten(0, -2), x.flatten(0, -2))

ONEDNN_OFF = threading.Lock()

def linear_of_one(x, w):
    """`linear` of one vector, as in decoding, where all the time goes into reading w.

    In bfloat16 it switches oneDNN off, for the whole process, until the product is there.
    """
    if x.dtype == torch.bfloat16:  # oneDNN would take longer to prepare w, if not packed, than PyTorch's code for all
        with ONEDNN_OFF:  # else another thread would take it for off before, and leave it so
            enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
            try:
                return (w @ x.flatten()).view(*x.shape[:-1], -1)
            finally:
                torch.backends.mkldnn.enabled = enabled
    # MKL shares the rows of w among the cores only where they come as several matrices, and x as a row transposed.
    pieces = w.view(math.gcd(len(w), 8), -1, w.shape[1])  # (pieces, d_out / pieces, d_in)
    return torch.bmm(pieces, x.reshape(1, -1).T.expand(len(pieces), -1, -1)).view(*x.shape[:-1], -1)

def pack(w):
    """A copy of a matrix (d_out, d_in), for `linear` alone, laid out as oneDNN multiplies vectors by it fastest.

    Where there is no such layout, for the device or the dtype, or w has it, it is w itself.
    """
    if not w.is_cpu or is_split(w) or w.is_mkldnn or not HAS_ONEDNN:
        return w
    if w.dtype == torch.float32 or w.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.ops.mkldnn._reorder_linear_weight(w, 16)  # as good for one vector as the layout for one
    return w

@dataclass(frozen=True)
class Int8Matrix:
    """A matrix for `linear` alone: rows (d_out, d_in) of int8, each times its scale, (d_out) of bfloat16."""
    rows: torch.Tensor
    scales: torch.Tensor
    ndim = 0  # so that what casts matrices leaves it as it is
    is_cpu, is_mkldnn = property(lambda self: self.rows.is_cpu), False

    def __len__(self):
        return len(self.rows)

    def to(self, dtype):
        """What it stands for, as a tensor."""
        return self.rows.to(dtype) * self.scales.to(dtype)[:, None]

def to_int8(w):
    """The nearest Int8Matrix; w itself where PyTorch's product, which reads rows by whole vectors, can't take it."""
    if w.shape[1] % 32:
        return w
    pieces = []
    for rows in w.split(max(1, (1 << 24) // w.shape[1])):  # so that little is held in float32
        scales = (rows.float().abs().amax(1).clamp_min(1e-30) / 127).bfloat16()
        pieces.append(((rows / scales.float()[:, None]).round().to(torch.int8), scales))
    return Int8Matrix(*map(torch.cat, zip(*pieces)))

@dataclass(frozen=True)
class MatrixPart:
    """One of several matrices, for `linear` and `linears` alone, whose rows stand behind each other in `whole`: the one
    of a number, counted from 0, (sizes[number], d_in).
    """
    whole: object  # a tensor, also of `pack`, or an Int8Matrix
    sizes: tuple
    number: int
    ndim = 0  # so that what casts matrices leaves it as it is
    shape = property(lambda self: (self.sizes[self.number], self.whole.shape[1]))
    dtype = property(lambda self: self.whole.dtype)

    def to(self, dtype):
        """What it stands for, as a tensor."""
        return self.whole.to(dtype).split_with_sizes(self.sizes)[self.number]

@faster(linears, lambda x, *ws: ws and all(isinstance(w, MatrixPart) and w.whole is ws[0].whole for w in ws))
def linears_at_once(x, *ws):
    """By one product, with the whole of which all are parts."""
    products = linear(x, ws[0].whole).split_with_sizes(ws[0].sizes, -1)
    return tuple(products[w.number] for w in ws)

@faster(linear, lambda x, w: isinstance(w, MatrixPart))
def linear_by_part(x, w):
    """With the whole, too: right, but not fast, where a definition asks for one part alone."""
    return linears_at_once(x, w)[0]

# Matrices of a block that `linear` alone uses, by name: those that one x is multiplied by, and others.
SAME_X, OTHERS = (("wq", "wk", "wv"), ("w_gate", "w_up")), ("wo", "w_down")

# Those of more numbers are not joined, as that copies them. On an EPYC (Zen 4) a token of 4 to 6 layers takes 0.86 to
# 1.00 of the time by joined matrices at 128, 288 and 576 wide, and 0.94 to 1.03 at 768 and 1,152.
JOINED_AT_MOST = 1 << 20

def join(ws):
    """One matrix of the rows of several, all tensors or all Int8Matrices; None where they can't be, or are large."""
    if all(isinstance(w, Int8Matrix) for w in ws):
        rows = join([w.rows for w in ws])
        return None if rows is None else Int8Matrix(rows, torch.cat([w.scales for w in ws]))
    are_alike = all(torch.is_tensor(w) and w.ndim == 2 and not is_split(w) and w.shape[1] == ws[0].shape[1] for w in ws)
    return torch.cat(ws) if are_alike and sum(w.numel() for w in ws) <= JOINED_AT_MOST else None

def with_linear_weights(convert, params, joins=False):
    """`params` with the matrices that `linear` uses converted: the output matrix, and those of blocks by their names;
    with `joins` those of SAME_X, if they are small, are joined before.
    """
    convert_one = lambda w: convert(w) if getattr(w, "ndim", 0) == 2 else w  # a tensor, and no tree

    def converted(tree):
        tree = {name: converted(w) if isinstance(w, dict) else w for name, w in tree.items()}
        for names in SAME_X if joins else ():
            ws = [tree.get(name) for name in names]
            whole = join(ws)
            if whole is not None:
                whole = convert_one(whole)
                tree |= {name: MatrixPart(whole, tuple(map(len, ws)), i) for i, name in enumerate(names)}
        return tree | {name: convert_one(tree[name]) for name in sum(SAME_X, OTHERS) if name in tree}

    output = params.get("lm_head", params["embedding"])
    new = convert_one(output)
    return params | {"blocks": converted(params["blocks"])} | ({} if new is output else {"lm_head": new})

def packed_from(params, dtype, batch_size):
    """How many numbers a matrix has at least which `pack` lays out for so many texts.

    For one text in bfloat16 that is faster in models which the cache holds much of. On an EPYC (Zen 5) products of
    models 128, 288 and 512 wide with 1, 24 and 23 million parameters take 0.86, 0.63 and 0.64 of the time on one core,
    0.92, 0.74 and 0.69 on two; from 59 million on 0.71 to 0.77 and 0.97 to 1.11. On two, smaller matrices than 2^18
    take longer. In float32 packing takes longer than 100 tokens win.
    """
    if batch_size >= (8 if dtype == torch.float32 else 2):
        return 0
    size = sum(w.numel() for _, w in tree_leaves(params) if torch.is_tensor(w))
    is_faster = dtype == torch.bfloat16 and size <= 1 << 25 and HAS_AVX512 and not IS_INTEL  # on others not measured
    return 1 << 18 if is_faster else math.inf

@faster(weights_for_generation, lambda params, *_, **__: first_leaf(params).is_cpu and is_eager()
        and any(form is linear_on_cpu for _, form in linear.forms))  # the definition knows nothing of it
def weights_for_generation_on_cpu(params, dtype, batch_size):
    """The matrices that `linear` uses, small ones joined, and laid out by `pack` where that is faster."""
    least = packed_from(params, dtype, batch_size)
    params = weights_for_generation.definition(params, dtype, batch_size)
    return with_linear_weights(lambda w: pack(w) if w.numel() >= least else w, params, joins=True)

def quantize(params):
    """`params` for writing on a CPU, with the matrices that `linear` uses in int8: a quarter of float32 to read."""
    return with_linear_weights(to_int8, params)

@faster(linear, lambda x, w: isinstance(w, Int8Matrix) and not torch.is_grad_enabled())
def linear_of_int8_weights(x, w):
    """With x in bfloat16, for which PyTorch's product takes an eighth of the time that it takes for float32.

    For many rows, which small matrices and CPUs without VNNI leave to it, it's faster to convert w to x's dtype: on an
    AMD EPYC (Zen 4), for matrices of 288 × 288 to 32,000 × 288, from 64 to 256 rows on in float32 and from 32 to 128 in
    bfloat16; 1,024 rows take 1.3 to 2.9 times as long otherwise.
    """
    if x.numel() >= 128 * x.shape[-1]:
        return linear(x, w.to(x.dtype))
    rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
    return torch.ops.aten._weight_int8pack_mm(rows, w.rows, w.scales).to(x.dtype).view(*x.shape[:-1], len(w))

@lru_cache(maxsize=1)
def has_int8_products():
    """Whether oneDNN has AVX-512's instructions for int8 (VNNI): by others, sums of two products saturate at 16 bits.
    """
    most = torch.full((2, 64), 127, dtype=torch.int8)
    return HAS_AVX512 and HAS_ONEDNN and bool((torch._int_mm(most, most.T) == 64 * 127**2).all())

def is_large_int8_product(x, w):
    """Whether oneDNN's product of int8 is faster, with what comes before and after it, than PyTorch's with bfloat16.

    On an EPYC (Zen 4), matrices of 288 × 288 to 50,304 × 768, 16 rows take 0.3 to 1.03 of the time, 64 to 128 0.2 to
    1.3, 400 0.3 to 0.5 in float32 and 0.7 to 1.0 in bfloat16; 2 to 8 rows up to 3 times as long. Tokens of one text
    take 0.93 and 0.92 of the time where a model is 768 and 1,024 wide; at 512, had the limit been 2^20, 1.1.
    """
    rows, size = x.numel() // x.shape[-1], w.rows.numel()
    return size >= 1 << 21 if rows == 1 else rows >= 16 and rows * size >= 1 << 22

@faster(linear, lambda x, w: isinstance(w, Int8Matrix) and not torch.is_grad_enabled() and is_large_int8_product(x, w)
        and has_int8_products())
def linear_in_int8(x, w):
    """Rows of x are rounded to int8 too, each with a scale of its own."""
    rows = x.reshape(-1, x.shape[-1])
    scales = torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True).float().clamp_min_(1e-30) / 127
    products = torch._int_mm((rows / scales).round_().to(torch.int8), w.rows.T)  # int32
    return (products * scales).mul_(w.scales).to(x.dtype).view(*x.shape[:-1], len(w))

@faster(init_cache, lambda config, batch_size, length, dtype, device: torch.device(device).type == "cpu")
def init_cache_on_cpu(config, batch_size, length, dtype, device):
    """Keys and values in float32 at least, in which a CPU sums half precision: else they'd be converted every token."""
    cache = init_cache.definition(config, batch_size, length, dtype, device)
    wider = torch.promote_types(dtype, torch.float32)
    return cache | {name: cache[name].to(wider) for name in cache.keys() & {"k", "v"}}

@faster(clip_gradients, lambda grads, norm, max_norm: norm.is_cpu and is_eager())
def clip_gradients_on_cpu(grads, norm, max_norm):
    """Gradients that need no scaling stay as they are. A look at the norm would make the host wait for a GPU."""
    return grads if norm <= max_norm else clip_gradients.definition(grads, norm, max_norm)

@faster(global_norm, lambda tree: first_leaf(tree).is_cpu and is_eager())
def global_norm_on_cpu(tree):
    """Large leaves by rows: of numbers added one after another float32 loses 1e-5 of the norm at 2^20, 2e-3 at 2^25."""
    of_rows = lambda x: torch.linalg.vector_norm(x.float(), dim=-1) if x.ndim > 1 and x.numel() >= 1 << 20 else x
    return global_norm.definition(tree_map(of_rows, tree))

def adamw_in_place(params, grads, state, lr, beta1=0.8, beta2=0.98, eps=1e-8, weight_decay=0.1):
    """`adamw_update` that writes the new params and state over the old, which are donated: tensors of float32 on a CPU,
    params and moments contiguous.

    One pass by the kernel of PyTorch's AdamW. On an EPYC (Zen 5) it takes 0.25 to 0.45 of the time of passes that make
    new tensors, 0.5 to 0.9 with copies before it; and nothing has to be compiled.
    """
    ws = [w for _, w in tree_leaves(tree_map(lambda *w: w, params, grads, state["m"], state["v"]))]
    if any(x.shape != w[0].shape for w in ws for x in w):  # which the kernel would not see
        raise ValueError("params, grads, m and v have different shapes; expected m and v as adamw_init has them")
    state["step"] += 1  # into the tensor, as ranks give a dict of their own
    for decay, group in ((weight_decay, [w for w in ws if w[0].ndim >= 2]), (0.0, [w for w in ws if w[0].ndim < 2])):
        if group:
            ps, gs, ms, vs = zip(*group)
            gs = [g.contiguous() for g in gs]  # the kernel takes numbers as they lie in memory
            torch._fused_adamw_(ps, gs, ms, vs, [], [state["step"].float()] * len(ps), lr=float(lr), beta1=beta1,
                                beta2=beta2, eps=eps, weight_decay=decay, amsgrad=False, maximize=False)

# Not where gradients are on, as autograd does not see what the kernel writes.
@faster(adamw_update, lambda params, grads, *_, **__: first_leaf(params).is_cpu and is_eager()
        and not torch.is_grad_enabled() and are_float32(params, grads))
def adamw_update_on_cpu(params, grads, state, lr, beta1=0.8, beta2=0.98, eps=1e-8, weight_decay=0.1):
    copies = [tree_map(partial(torch.clone, memory_format=torch.contiguous_format), tree) for tree in (params, state)]
    adamw_in_place(copies[0], grads, copies[1], lr, beta1, beta2, eps, weight_decay)
    return tuple(copies)

def has_adamw_in_place(update, device):
    """Whether `adamw_in_place` may stand for an update on a device: for AdamW on a CPU, if nothing is asked before its
    form there.
    """
    return (device == "cpu" and update is OPERATIONS["adamw_update"]
            and [form for _, form in update.forms[:2]] == [adamw_update_over_ranks, adamw_update_on_cpu])

@faster(sample_token, lambda logits, chance, temperature, top_k, top_p: logits.is_cpu and is_eager() and temperature
        and (top_k or top_p < 1))
def sample_token_on_cpu(logits, chance, temperature, top_k, top_p):
    """Looks at few: tokens that together have less than half of what the nucleus may leave out are dropped at once.

    Where more than 1,023 are left not all are sorted: bisection, by the logarithm of a weight, bounds the least that
    stays. On an EPYC (Zen 5), 6 layers of 288, vocabulary 32,000, tokens of 16 texts take 0.23 to 0.35 of the time by a
    nucleus and 0.7 by the best 50, those of one 0.42 to 0.58 and 0.95 to 0.99; where there are 2,048 to choose among
    0.53 to 0.94 and 1.03.
    """
    scores = (logits.detach().float() / max(temperature, 1e-20)).nan_to_num_()
    weights = scores.sub_(scores.amax(-1, keepdim=True)).mul_(1 / math.log(2)).exp2_()  # faster than exp on a CPU
    if top_k:
        weights.masked_fill_(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], 0.0)
    drawn = []
    shares = (1 - chance[:, 0]).expand(len(weights)).tolist()
    for row, total, share in zip(weights.numpy(), weights.sum(-1).tolist(), shares):
        low, high, above = (1 - top_p) * total / (2 * len(row)), 1.0, 0.0  # above: the mass of weights over `high`
        tokens = np.flatnonzero(row > low)
        row = row[tokens]
        if top_p < 1:
            mass_over = lambda weight: float(np.dot(row, row > weight))
            wanted = min(top_p * total, mass_over(low))  # rounded weights may add up to less than the nucleus
            for _ in range(len(row).bit_length() - 10):
                middle = math.sqrt(low * high)
                mass = mass_over(middle)
                low, high, above = (middle, high, above) if mass >= wanted else (low, middle, mass)
            best_first = -np.sort(-row[(row > low) & (row <= high)])
            reached = above + best_first.cumsum(dtype=np.float64)
            row = row * (row >= best_first[min(np.searchsorted(reached, wanted), len(reached) - 1)])
        reached = torch.from_numpy(row).double().cumsum(0)
        drawn.append(tokens[torch.searchsorted(reached, share * reached[-1].item())])
    return torch.from_numpy(np.array(drawn, dtype=np.int64))

# ---- Attention in tiles, on any device ----

# In a tile; fewer skip more of the future, more need fewer calls. In float32 a CPU takes half as many where N · S, of
# `tiles`, is 2^13 at least. On an EPYC (Zen 5; no Xeon was at hand) both passes then take 0.89 to 0.98 of the time with
# S of 256 to 2,048, 1.02 with 4,096. With 6 · 1,000 a forward pass would take 1.1, in bfloat16 both 1.01 to 1.25.
TILE_QUERIES = 128
TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 27}  # in a tile; on a CPU they stay in its cache

def tiles(q, k):
    """The tiles of attention: of each a slice of N, one of the queries, one of the keys they see.

    q (N, T, group, D), k (N, S, D) → list of (slice, slice, slice).
    """
    (N, T, group, _), S = q.shape, k.shape[1]
    is_half = q.is_cpu and q.dtype == torch.float32 and S > TILE_QUERIES and N * S >= 1 << 13
    block = max(1, min(T, TILE_QUERIES // 2 if is_half else TILE_QUERIES))
    rows = max(1, TILE_SCORES[q.device.type] // (group * block * S))
    return [(slice(i, i + rows), slice(a, a + block), slice(S - T + a + block))
            for a in range(0, T, block) for i in range(0, N, rows)]  # slices end where their axis does

@lru_cache(maxsize=2)  # a text's last tile has fewer queries
def future_mask(t, group, dtype, device):
    """-∞ where a key lies in the future of a query, else 0, for the keys of t queries themselves: (t·group, t)."""
    return torch.full((t, t), -math.inf, dtype=dtype, device=device).triu_(1).repeat_interleave(group, 0)

def tile_scores(q, k):
    """Scaled scores to base 2, -∞ for keys in the future. q (n, t, group, D), k (n, s, D) → (n, t·group, s)."""
    (_, t, group, D), rows = q.shape, q.flatten(1, 2)
    scores = torch.baddbmm(rows.new_empty(1, 1, 1), rows, k.mT, beta=0, alpha=D**-0.5 / math.log(2))  # only scales
    scores[..., -t:].add_(future_mask(t, group, q.dtype, q.device))
    return at_least_float32(scores)

def add_product(target, a, b, scale=1.0):
    """Add scale · a @ b to a batch of matrices, in place. MKL does both at once, but only where they are contiguous."""
    if target.is_contiguous():
        target.baddbmm_(a, b, alpha=scale)
    else:
        target.add_(torch.bmm(a, b), alpha=scale)

def attention_in_tiles(q, k, v):
    """Attention in tiles of queries, none of which sees keys that lie in its future; see `TiledAttention`."""
    out, kept = v.new_empty(q.shape), []
    log_sum = q.new_empty(*q.shape[:-1], 1, dtype=torch.promote_types(q.dtype, torch.float32))
    for n, t, seen in tiles(q, k):
        p = tile_scores(q[n, t], k[n, seen])  # (n, t·group, s)
        highest = p.amax(-1, keepdim=True)
        p = p.sub_(highest).exp2_()
        total = p.sum(-1, keepdim=True)  # (n, t·group, 1)
        out[n, t] = torch.bmm(p.to(v.dtype), v[n, seen]).div_(total).view(out[n, t].shape)
        log_sum[n, t] = total.log2().add_(highest).view(log_sum[n, t].shape)
        if k.shape[1] <= TILE_QUERIES:
            kept.append(p.div_(total))
    return out, log_sum, *kept

def attention_in_tiles_backward(d_out, q, k, v, out, log_sum, *kept):
    """The gradients of `attention_in_tiles`."""
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    row_sum, scale = at_least_float32(d_out * out).sum(-1, keepdim=True), q.shape[-1]**-0.5  # (N, T, group, 1)
    for i, (n, t, seen) in enumerate(tiles(q, k)):
        q_rows, dq_rows, d_rows, logs, sums = (x[n, t].flatten(1, 2) for x in (q, dq, d_out, log_sum, row_sum))
        p = kept[i] if kept else tile_scores(q[n, t], k[n, seen]).sub_(logs).exp2_()  # (n, t·group, s)
        ds = at_least_float32(torch.bmm(d_rows, v[n, seen].mT)).sub_(sums).mul_(p).to(q.dtype)  # (n, t·group, s)
        add_product(dq_rows, ds, k[n, seen], scale)
        add_product(dk[n, seen], ds.mT, q_rows, scale)
        add_product(dv[n, seen], p.to(v.dtype).mT, d_rows)
    return dq, dk, dv

def attention_parts(q):
    """The forward and the backward pass of tiled attention: Triton kernels where they run, else tiles."""
    if has_kernels(q):
        return attention_in_kernels, attention_in_kernels_backward
    return attention_in_tiles, attention_in_tiles_backward

class TiledAttention(torch.autograd.Function):
    """Attention in tiles, whose scores stay in fast memory, with its own backward pass.

    The scores P of a tile exist only while it is computed, and are computed again from the logarithm of their sum L in
    the backward pass (Dao 2023, FlashAttention-2, alg. 2), so memory grows with T and not with T². Where no kernel runs
    P is kept of at most TILE_QUERIES keys, as it is no larger than what else is. With O = P V:
    dV = Pᵀ dO,  dS = P ⊙ (dO Vᵀ - rowsum(dO ⊙ O)),  dQ = dS K / √D,  dK = dSᵀ Q / √D.
    q (N, T, group, D), k and v (N, S, D) → (N, T, group, D). Scores and their logarithms are taken to base 2, as exp2
    is several times as fast as exp on a CPU. baddbmm saves passes over memory: it adds and scales as it multiplies.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        forward = attention_forward if is_compiled() else attention_parts(q)[0]
        out, log_sum, *kept = forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, log_sum, *kept)
        return out

    @staticmethod
    @only_first
    def backward(ctx, d_out):
        q, k, v, out, log_sum, *kept = ctx.saved_tensors
        backward = attention_backward if is_compiled() else attention_parts(q)[1]
        return backward(d_out, q, k, v, out, log_sum, *kept)

def tiled_attention(q, k, v):
    """`attention` by TiledAttention, whose queries stand together by the key head that they read."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    (S, D), H_kv = k.shape[-2:], k.shape[-3]
    grouped = q.unflatten(-3, (H_kv, -1)).transpose(-3, -2)  # (..., H_kv, T, group, D)
    tiled = TiledAttention.apply(grouped.flatten(0, -4), k.reshape(-1, S, D), v.reshape(-1, S, D))  # (N, T, group, D)
    return tiled.view(grouped.shape).transpose(-3, -2).flatten(-4, -3)  # (..., H, T, D)

def product_in_float32(a, b):
    """Products of a batch of matrices, in float32 at least; of half precision on CUDA, without gradients, never rounded
    to less."""
    if a.is_cuda and a.element_size() == 2 and not torch.is_grad_enabled():  # as this has none
        return torch.bmm(a, b, out_dtype=torch.float32)
    return at_least_float32(torch.bmm(a, b))

def attention_of_one(q, k, v, unseen=None):
    """`attention` of a single query, the last position, which sees every key, or all but those of a mask (S).

    In base 2, as `TiledAttention` has it.
    """
    D, group = q.shape[-1], q.shape[-3] // k.shape[-3]
    # oneDNN takes longer to prepare small products of bfloat16 than others take to compute them.
    dtype = torch.promote_types(q.dtype, torch.float32) if q.is_cpu else q.dtype
    k, v = (x.flatten(0, -3).to(dtype) for x in (k, v))  # (N, S, D)
    rows = q.reshape(-1, group, D).to(dtype)  # (N, group, D)
    scores = product_in_float32(rows, k.mT).mul_(D**-0.5 / math.log(2))  # (N, group, S)
    if unseen is not None:
        scores.masked_fill_(unseen, -math.inf)
    weights = scores.sub_(scores.detach().amax(-1, keepdim=True)).exp2_()
    out = product_in_float32(weights.to(dtype), v).div_(weights.sum(-1, keepdim=True))  # (N, group, D)
    return out.to(q.dtype).view(q.shape)

@faster(attention, lambda q, k, v: q.is_cpu or q.is_cuda)
def attention_eager(q, k, v):
    return attention_of_one(q, k, v) if q.shape[-2] == 1 else tiled_attention(q, k, v)

# ---- CUDA: Triton kernels of our own, for attention and for what is small but launched for every token ----

class tl:
    """Stands for Triton's language, in which the kernels are written and which is imported when they are needed."""

    constexpr = None

def load_rows(matrix, rows, length, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a matrix (length, D) → (rows, WIDTH), with zeros where it has none; a length of None: it has them all."""
    columns = tl.arange(0, WIDTH)
    inside = columns[None, :] < D
    if length is not None:
        inside &= rows[:, None] < length
    return tl.load(matrix + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)

def factor(x):
    """x as a factor of tl.dot: float32 rounded to the 10 bits of TF32's mantissa, as a GPU only cuts the rest off."""
    if x.dtype == tl.float32:
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # NaN would become 0
    return x

def store_rows(matrix, rows, length, values, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write rows (rows, WIDTH) into a matrix (length, D), where it has them."""
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < length) & (columns[None, :] < D)
    tl.store(matrix + rows[:, None] * D + columns[None, :], values.to(matrix.dtype.element_ty), mask=inside)

def keys_seen(start, S, before, group: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Of a block of rows: up to which key, a multiple of KEYS, all rows see all, and from which key none sees any."""
    return (before + start // group + 1) // KEYS * KEYS, tl.minimum(S, before + (start + ROWS - 1) // group + 1)

def attention_kernel(q, k, v, out, log_sum, R, S, before, group: tl.constexpr,
                     D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """A block of rows of attention: keys are met in blocks, and sums so far shrink as higher scores are met.

    A row is a query of one head, of R = T · group in each of N; it sees the keys up to before + row // group. Blocks of
    keys that all rows see need no mask, so those that not all see are met in a second loop.
    """
    n = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    q, out, log_sum, k, v = q + n * R * D, out + n * R * D, log_sum + n * R, k + n * S * D, v + n * S * D
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # the rows that see most begin first
    rows = start + tl.arange(0, ROWS)
    q_rows, last_seen = factor(load_rows(q, rows, R, D, WIDTH)), before + rows // group
    highest, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    sums, scale = tl.zeros([ROWS, WIDTH], tl.float32), D**-0.5 * LOG2_E
    seen_by_all, seen = keys_seen(start, S, before, group, ROWS, KEYS)
    for masked in tl.static_range(2):
        for key in range(seen_by_all if masked else 0, seen if masked else seen_by_all, KEYS):
            keys = key + tl.arange(0, KEYS)
            k_rows = factor(load_rows(k, keys, S if masked else None, D, WIDTH))
            scores = tl.dot(q_rows, tl.trans(k_rows))  # (ROWS, KEYS)
            if masked:
                scores = tl.where(keys[None, :] <= last_seen[:, None], scores, -float("inf"))
            higher = tl.maximum(highest, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - higher[:, None])  # one instruction scales and subtracts
            shrink = tl.exp2(highest - higher)
            v_rows = factor(load_rows(v, keys, S if masked else None, D, WIDTH))
            sums = sums * shrink[:, None] + tl.dot(factor(p.to(v_rows.dtype)), v_rows)
            total = total * shrink + tl.sum(p, 1)
            highest = higher
    store_rows(out, rows, R, sums / total[:, None], D, WIDTH)
    tl.store(log_sum + rows, highest + tl.log2(total), mask=rows < R)

def keys_backward_kernel(q, k, v, d_out, log_sum, row_sum, dk, dv, R, S, before, group: tl.constexpr,
                         D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The gradients of a block of keys and values, from the rows that see them. Matrices are (KEYS, ROWS)."""
    n = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    q, d_out, log_sum, row_sum = q + n * R * D, d_out + n * R * D, log_sum + n * R, row_sum + n * R
    k, v, dk, dv = k + n * S * D, v + n * S * D, dk + n * S * D, dv + n * S * D
    start = tl.program_id(1) * KEYS
    keys = start + tl.arange(0, KEYS)
    k_rows, v_rows = factor(load_rows(k, keys, S, D, WIDTH)), factor(load_rows(v, keys, S, D, WIDTH))
    dk_sums, dv_sums = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
    first = tl.maximum(0, start - before) * group // ROWS * ROWS  # rows from here on see some of the keys,
    all_seen = (tl.maximum(0, start + KEYS - 1 - before) * group + ROWS - 1) // ROWS * ROWS  # and from here all
    all_seen = tl.minimum(R, all_seen)
    for masked in tl.static_range(2):
        for row in range(first if masked else all_seen, all_seen if masked else R, ROWS):
            rows = row + tl.arange(0, ROWS)
            q_rows, d_rows = factor(load_rows(q, rows, R, D, WIDTH)), factor(load_rows(d_out, rows, R, D, WIDTH))
            logs = tl.load(log_sum + rows, mask=rows < R, other=0.0)
            sums = tl.load(row_sum + rows, mask=rows < R, other=0.0)
            p = tl.exp2(tl.dot(k_rows, tl.trans(q_rows)) * (D**-0.5 * LOG2_E) - logs[None, :])
            if masked:
                p = tl.where(keys[:, None] <= (before + rows // group)[None, :], p, 0.0)
            dv_sums += tl.dot(factor(p.to(d_rows.dtype)), d_rows)
            ds = p * (tl.dot(v_rows, tl.trans(d_rows)) - sums[None, :])
            dk_sums += tl.dot(factor(ds.to(q_rows.dtype)), q_rows)
    store_rows(dk, keys, S, dk_sums * D**-0.5, D, WIDTH)
    store_rows(dv, keys, S, dv_sums, D, WIDTH)

def queries_backward_kernel(q, k, v, d_out, out, log_sum, row_sum, dq, R, S, before, group: tl.constexpr,
                            D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The gradients of a block of queries, from the keys that they see; and each row's sum of d out ⊙ out."""
    n = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    q, d_out, out, dq = q + n * R * D, d_out + n * R * D, out + n * R * D, dq + n * R * D
    k, v, log_sum, row_sum = k + n * S * D, v + n * S * D, log_sum + n * R, row_sum + n * R
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    rows = start + tl.arange(0, ROWS)
    q_rows, d_rows = factor(load_rows(q, rows, R, D, WIDTH)), factor(load_rows(d_out, rows, R, D, WIDTH))
    last_seen, logs = before + rows // group, tl.load(log_sum + rows, mask=rows < R, other=0.0)
    sums = tl.sum(d_rows.to(tl.float32) * load_rows(out, rows, R, D, WIDTH).to(tl.float32), 1)
    tl.store(row_sum + rows, sums, mask=rows < R)
    dq_sums = tl.zeros([ROWS, WIDTH], tl.float32)
    seen_by_all, seen = keys_seen(start, S, before, group, ROWS, KEYS)
    for masked in tl.static_range(2):
        for key in range(seen_by_all if masked else 0, seen if masked else seen_by_all, KEYS):
            keys = key + tl.arange(0, KEYS)
            k_rows = factor(load_rows(k, keys, S if masked else None, D, WIDTH))
            v_rows = factor(load_rows(v, keys, S if masked else None, D, WIDTH))
            p = tl.exp2(tl.dot(q_rows, tl.trans(k_rows)) * (D**-0.5 * LOG2_E) - logs[:, None])
            if masked:
                p = tl.where(keys[None, :] <= last_seen[:, None], p, 0.0)
            ds = p * (tl.dot(d_rows, tl.trans(v_rows)) - sums[:, None])
            dq_sums += tl.dot(factor(ds.to(k_rows.dtype)), k_rows)
    store_rows(dq, rows, R, dq_sums * D**-0.5, D, WIDTH)

def next_attention_kernel(q, new_k, new_v, k, v, out, filled, head_stride, group: tl.constexpr,
                          D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr):
    """Attention of a head's next query, at position `filled`: to its own key, and to those of the cache before it.

    q and out (N · group, D), new_k and new_v (N, D), k and v N matrices of (S, D), head_stride numbers apart.
    """
    head, columns, position = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH), tl.load(filled)
    n, inside = head // group, columns < D
    k, v = k + n * head_stride, v + n * head_stride
    query = tl.load(q + head * D + columns, mask=inside, other=0.0).to(tl.float32) * (D**-0.5 * LOG2_E)
    k_row = tl.load(new_k + n * D + columns, mask=inside, other=0.0)
    v_row = tl.load(new_v + n * D + columns, mask=inside, other=0.0)
    is_first = inside & (head % group == 0)  # one of the group fills the cache, at a place where no other reads
    tl.store(k + position * D + columns, k_row, mask=is_first)
    tl.store(v + position * D + columns, v_row, mask=is_first)
    # Each of KEYS lanes has a maximum and sums of its own, so that none waits for others before the end. All begin at
    # the new key's score, which is finite; the first one counts it.
    lanes = tl.arange(0, KEYS)
    highest = tl.zeros([KEYS], tl.float32) + tl.sum(query * k_row.to(tl.float32), 0)
    total = tl.where(lanes == 0, 1.0, 0.0)
    sums = tl.where(lanes[:, None] == 0, v_row.to(tl.float32)[None, :], 0.0)  # (KEYS, WIDTH)
    for key in range(0, position, KEYS):
        keys = key + lanes
        k_rows, v_rows = load_rows(k, keys, position, D, WIDTH), load_rows(v, keys, position, D, WIDTH)
        scores = tl.where(keys < position, tl.sum(k_rows.to(tl.float32) * query[None, :], 1), -float("inf"))
        higher = tl.maximum(highest, scores)
        p, shrink = tl.exp2(scores - higher), tl.exp2(highest - higher)
        sums = sums * shrink[:, None] + p[:, None] * v_rows.to(tl.float32)
        total, highest = total * shrink + p, higher
    share = tl.exp2(highest - tl.max(highest, 0))
    result = tl.sum(sums * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + head * D + columns, result.to(out.dtype.element_ty), mask=inside)

def rmsnorm_kernel(x, gain, out, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """`rmsnorm` of a row of x (rows, D)."""
    places, columns = tl.program_id(0).to(tl.int64) * D + tl.arange(0, WIDTH), tl.arange(0, WIDTH)
    values = tl.load(x + places, mask=columns < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    values *= scale * tl.load(gain + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out + places, values.to(out.dtype.element_ty), mask=columns < D)

def rope_kernel(x, cos, sin, out, size, H, T, stride_b, stride_h, stride_t,
                D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """`rope` of some of `size` rows, a position of a head each, of x (B, H, T, D), which may lie with gaps; out has
    none."""
    rows, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    n, t, inside = rows // T, rows % T, (rows < size) & (columns < D)
    source = x + n // H * stride_b + n % H * stride_h + t * stride_t + columns
    even, odd = tl.split(tl.reshape(tl.load(source, mask=inside, other=0.0).to(tl.float32), [ROWS, WIDTH // 2, 2]))
    pairs = tl.arange(0, WIDTH // 2)[None, :]
    places, known = t * (D // 2) + pairs, (rows < size) & (pairs < D // 2)
    c, s = tl.load(cos + places, mask=known, other=0.0), tl.load(sin + places, mask=known, other=0.0)
    turned = tl.interleave(even * c - odd * s, even * s + odd * c)  # (ROWS, WIDTH)
    tl.store(out + rows * D + columns, turned.to(out.dtype.element_ty), mask=inside)

def gated_silu_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    """`gated_silu` of a block of numbers."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + places, mask=places < size).to(tl.float32)
    u = tl.load(up + places, mask=places < size).to(tl.float32)
    tl.store(out + places, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=places < size)

def linear_kernel(x, w, out, rows, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """`linear` of one vector x (D): some of the numbers of out (rows), each by a row of w (rows, D)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.static_range(0, D, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (columns < D)[None, :]
        weights = tl.load(w + row[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += weights * tl.load(x + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row, tl.sum(sums, 1).to(out.dtype.element_ty), mask=row < rows)

KERNELS = (load_rows, factor, store_rows, keys_seen, attention_kernel, keys_backward_kernel, queries_backward_kernel,
           next_attention_kernel, rmsnorm_kernel, rope_kernel, gated_silu_kernel, linear_kernel)

def missing_to_build(compilers):
    """What of one of these compilers and Python's headers this machine lacks; None where it lacks nothing."""
    if not any(map(shutil.which, compilers)):
        return " or ".join(compilers)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else header

def c_compilers():
    """Those of which Triton takes the first, to build what launches its kernels."""
    return [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]

@lru_cache(maxsize=1)
def triton_kernels():
    """The kernels by name, for Triton to compile when they are launched; None where it, or what it needs, is missing.
    """
    try:
        import triton
        import triton.language as tl
    except ImportError:  # it comes with torch for CUDA, and serves nothing else
        return None
    if missing_to_build(c_compilers()):
        return None
    names = {"__name__": __name__, "tl": tl, "LOG2_E": tl.constexpr(1 / math.log(2))}  # scores are taken to base 2
    for function in KERNELS:  # the same code, with these names around it
        in_names = FunctionType(function.__code__, names, function.__name__)
        in_names.__annotations__ = dict.fromkeys(function.__annotations__, tl.constexpr)
        names[function.__name__] = triton.jit(in_names)
    return names

def has_triton(x):
    """Whether Triton's kernels run on tensors like this: on GPUs from Ampere on."""
    return (x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and torch.cuda.get_device_capability(x.device) >= (8, 0) and triton_kernels() is not None)

def has_next_attention(q):
    """Whether attention of one token is a kernel, whose time is that of the keys that are there."""
    return q.shape[-1] <= 128 and has_triton(q)

def is_h100_or_b200(x):
    """Whether the GPU is of their kind."""
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)

def has_kernels(q):
    """Whether attention of these queries runs as Triton kernels: in half precision, or in TF32 on an H100 or B200."""
    return has_next_attention(q) and (q.dtype != torch.float32 or q.shape[-1] <= 64 and is_h100_or_b200(q)
                                      and torch.backends.cuda.matmul.fp32_precision == "tf32")

# ROWS, KEYS, warps and stages of each kernel for heads of up to 64 features, of up to 128, and on an H100 or B200, in
# half precision and for up to 64 features in float32. There they are, of about 25 (in float32 5) that spill no
# register, the fastest on an H200 at 32, 64 and 128 features, or slower by a tenth at most. Elsewhere nothing was
# measured; tiles are as large as 255 registers a thread and a block's shared memory allow, without a third stage where
# its registers would keep a second block from running beside. Factors of products lie in registers, and an RTX 3090 has
# 99 KB; in an H100 or B200 they lie in shared memory, of 227 KB.
KERNEL_BLOCKS = {"attention_kernel": ((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)),
                 "keys_backward_kernel": ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 3), (32, 64, 4, 2)),
                 "queries_backward_kernel": ((128, 32, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2))}

def kernel_options(name, D, dtype, is_large):
    """What a kernel is compiled for beside types: its sizes, warps and stages, for heads of D features on a GPU, which
    is large if it is an H100 or B200."""
    kind = 3 if dtype == torch.float32 else 2 if is_large else D > 64
    rows, keys, warps, stages = KERNEL_BLOCKS[name][kind]
    width = max(16, power_of_two(D))
    return {"D": D, "WIDTH": width, "ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}

def run_kernel(name, grid, x, *args, **options):
    """Run a kernel of Triton, for each place of a grid, where the tensor x is."""
    with torch.cuda.device_of(x):  # Triton would take the current device
        triton_kernels()[name][grid](x, *args, **options)

def side_by_side(N, num_bytes, l2_size):
    """How many of N heads, with num_bytes of q and k together, to compute side by side: a divisor of N.

    So few that half of L2 holds their q and k: blocks of a head find in it what its others have read. So many, as of
    all of these the blocks that take longest begin first, and no GPU waits for the last ones.
    """
    return next(n for n in range(min(N, max(1, l2_size // 2 * N // num_bytes)), 0, -1) if N % n == 0)

def launch(name, blocks_of_keys, q, k, *tensors):
    """Run a kernel for each of N and each block of keys, or of rows, with the sizes that it takes behind `tensors`."""
    (N, T, group, D), S = q.shape, k.shape[1]
    options = kernel_options(name, D, q.dtype, is_h100_or_b200(q))
    blocks = -(-S // options["KEYS"]) if blocks_of_keys else -(-T * group // options["ROWS"])
    together = side_by_side(N, q.nbytes + k.nbytes, torch.cuda.get_device_properties(q.device).L2_cache_size)
    grid = together, blocks, N // together  # its programs begin in this order, those that differ in `together` first
    run_kernel(name, grid, q, k, *tensors, T * group, S, S - T, group, **options)

def attention_in_kernels(q, k, v):
    """Attention in one Triton kernel, which never writes scores to memory; see `TiledAttention`."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, log_sum = torch.empty_like(q), q.new_empty(*q.shape[:-1], 1, dtype=torch.float32)
    launch("attention_kernel", False, q, k, v, out, log_sum)
    return out, log_sum

def attention_in_kernels_backward(d_out, q, k, v, out, log_sum):
    """The gradients of `attention_in_kernels`, in two kernels, so that each sum is taken in one place, in one order.

    One kernel would spare two of seven products, but had to add up dq in memory: a byte for each 64 operations spared,
    and GPUs do more in the time of a byte.
    """
    d_out, q, k, v, out = (x.contiguous() for x in (d_out, q, k, v, out))
    (dq, dk, dv), row_sum = map(torch.empty_like, (q, k, v)), torch.empty_like(log_sum)
    launch("queries_backward_kernel", False, q, k, v, d_out, out, log_sum, row_sum, dq)
    launch("keys_backward_kernel", True, q, k, v, d_out, log_sum, row_sum, dk, dv)
    return dq, dk, dv

def has_small_kernels(x):
    """Whether norms and the like of x are a kernel each: in eager code on CUDA, without gradients of theirs."""
    return x.is_cuda and is_eager() and not torch.is_grad_enabled() and has_triton(x)

@faster(rmsnorm, lambda x, gain, eps: has_small_kernels(x) and torch.is_tensor(gain) and gain.shape == x.shape[-1:])
def rmsnorm_in_kernel(x, gain, eps):
    x, gain, D = x.contiguous(), gain.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    run_kernel("rmsnorm_kernel", (x.numel() // D,), x, gain, out, eps, D, power_of_two(D))
    return out

@faster(rope, lambda x, cos, sin: has_small_kernels(x) and x.ndim == 4 and x.stride(3) == 1)
def rope_in_kernel(x, cos, sin):
    B, H, T, D = x.shape
    out = x.new_empty(x.shape)
    size, width = B * H * T, power_of_two(D)
    rows = max(1, 1024 // width)  # of a program
    run_kernel("rope_kernel", (-(-size // rows),), x, cos, sin, out, size, H, T, *x.stride()[:3], D, width, rows)
    return out

@faster(gated_silu, lambda gate, up: has_small_kernels(gate))
def gated_silu_in_kernel(gate, up):
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    run_kernel("gated_silu_kernel", (-(-gate.numel() // 1024),), gate, up, out, gate.numel(), 1024)
    return out

@faster(linear, lambda x, w: has_small_kernels(x) and x.numel() == x.shape[-1] <= 8192 and w.is_contiguous()
        and w.shape[1:] == x.shape[-1:] and w.device == x.device)
def linear_in_kernel(x, w):
    x, (rows, D) = x.contiguous(), w.shape
    out = x.new_empty(*x.shape[:-1], rows)
    # A program reads 1,024 numbers at once, or, of a large matrix, 2,048. On an H200 a matrix of 768 × 768 takes 2.0 µs
    # in bfloat16 (4.0 as x @ w.T) and 2.2 in float32 (3.7), 768 × 2,048 2.5 and 3.2 (7.2, 3.9), 50,304 × 768 22 and 38
    # (24, 40).
    width, size = (512, 2048) if rows > 8192 else (min(1024, power_of_two(D)), 1024)
    run_kernel("linear_kernel", (-(-rows * width // size),), x, w, out, rows, D, width, size // width)
    return out

# ---- CUDA: many kernels in one launch, as to launch them one by one takes longer than to run them ----

def record(function):
    """Have CUDA record what a function launches, as a graph to be launched at once → the graph, the function's result.

    Each launch writes to the same result. Masks that others have made are not read, as they may go before the graph
    does. The stream is not PyTorch's own for graphs, which is of the device that recorded first.
    """
    future_mask.cache_clear()
    graph = torch.cuda.CUDAGraph()
    # While this thread records, others may use CUDA.
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            return graph, function()
    finally:
        future_mask.cache_clear()  # these have no content before the launch

def has_tensors_of(old, new):
    """Whether two trees, of the same structure, have the same tensors, not only equal ones."""
    return all(has_tensors_of(old[key], new[key]) for key in old) if isinstance(old, dict) else old is new

def in_graph(function, num_kept):
    """A function on CUDA, launched as one from the second call on; in the first, libraries prepare themselves.

    The first `num_kept` arguments, trees, are read where they are, so for other tensors it is recorded anew. The
    others, tensors, are copied to where the record reads them; other shapes are a first call again. What a record
    returns is overwritten by the next call.
    """
    shapes = recorded = None

    def call(*args):
        nonlocal shapes, recorded
        trees, inputs = args[:num_kept], args[num_kept:]
        new_shapes = [(x.shape, x.dtype) for x in inputs]
        if shapes != new_shapes:
            shapes, recorded = new_shapes, None
            # Of copies, as in the record: Triton compiles for other addresses anew, and can't while CUDA records.
            return function(*trees, *(x.clone() for x in inputs))
        if recorded is None or not all(map(has_tensors_of, recorded[0], trees)):
            recorded = None  # whose memory serves again
            kept, places = [tree_map(lambda leaf: leaf, tree) for tree in trees], [x.clone() for x in inputs]
            with torch.cuda.device_of(first_leaf(args[0])):  # CUDA would take the current device
                recorded = kept, places, *record(partial(function, *trees, *places))
        _, places, graph, result = recorded
        for place, x in zip(places, inputs):
            place.copy_(x)
        graph.replay()
        return result

    return call

@faster(global_norm, lambda tree: first_leaf(tree).is_cuda and is_eager())
def global_norm_in_few_launches(tree):
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([leaf.float() for _, leaf in tree_leaves(tree)])))

# The fewest keys that a recorded step attends to where no kernel does; more come in powers of two, each a graph. On an
# H200 63 tokens of four layers 512 wide are written at 1,720 tokens/s so, with graphs from 8 keys on at 1,150, without
# at 450; of twelve of 768 at 655, 477 and 173.
KEYS_AT_LEAST = 64

@faster(cached_attention, lambda q, k, v, cache: isinstance(cache["filled"], torch.Tensor))
def cached_attention_at(q, k, v, cache):
    """Of one token, whose position is a tensor (1). All shapes are those of the cache, so it serves any position."""
    for name, new in (("k", k), ("v", v)):
        cache[name].index_copy_(2, cache["filled"], new.to(cache[name].dtype))
    unseen = torch.arange(cache["k"].shape[2], device=q.device) > cache["filled"]  # (S)
    return attention_of_one(q, cache["k"], cache["v"], unseen)

@faster(cached_attention, lambda q, k, v, cache: isinstance(cache["filled"], torch.Tensor) and has_next_attention(q))
def cached_attention_in_kernel(q, k, v, cache):
    """Of one token, as `cached_attention_at`. The cache's k and v have no gaps within a text."""
    (B, H, _, D), H_kv = q.shape, k.shape[1]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, width = torch.empty_like(q), max(16, power_of_two(D))
    run_kernel("next_attention_kernel", (B * H,), q, k, v, cache["k"], cache["v"], out, cache["filled"],
               cache["k"].stride(1), H // H_kv, D, width, 8192 // width, num_warps=8)
    return out

def all_angles(config, device):
    """`rope_angles` of a model: the same tensors as long as its table is kept."""
    return rope_angles(config.context_length, config.head_dim, config.rope_theta, config.rope_scaling, device)

@faster(angles_at, lambda start, T, config, device: isinstance(start, torch.Tensor))
def angles_at_place(start, T, config, device):
    """Of one token, whose position is a tensor (1), which the host need not know."""
    return tuple(angles.index_select(0, start) for angles in all_angles(config, device))

def is_worth_a_record(params, tokens, config, dtype, cache, *_):
    """Whether this is one token on CUDA, and what it asks of positions is as the record has it: forms not dropped."""
    w = first_leaf(params)
    return (w.is_cuda and not is_split(w) and tokens.shape[1] == 1 and cache and is_eager()
            and not torch.is_grad_enabled() and attention.forms and cached_attention.forms and angles_at.forms)

@faster(next_token, is_worth_a_record)
def next_token_in_graph(params, tokens, config, dtype, cache, chance, stopped, temperature, top_k, top_p, stop_tokens):
    """`next_token` after one token. The graphs stay in the cache that they belong to, by what they depend on beside
    tensors, for as long as parameters, keys, values and angles are the same ones.
    """
    filled, keys = cache["filled"], cache["k"].shape[3]
    angles_at(filled, 1, config, tokens.device)  # raises beyond the last position
    if filled >= keys:
        raise ValueError(f"{filled + 1} positions in a cache of {keys}; let init_cache make a longer one")
    if not has_next_attention(cache["k"]):
        keys = min(keys, max(KEYS_AT_LEAST, 1 << filled.bit_length()))
    position = torch.full((1,), filled, device=tokens.device)
    # A graph knows these by their addresses.
    tensors = params, cache["k"], cache["v"], all_angles(config, tokens.device)
    recorded, graphs = cache.get("graphs", (tensors, {}))
    if any(old is not new for old, new in zip(recorded, tensors)):
        graphs = {}
    cache["graphs"] = tensors, graphs
    kind = keys, config, dtype, temperature, top_k, top_p, *map(int, stop_tokens or ())
    if kind not in graphs:
        seen = {name: cache[name][..., :keys, :] for name in ("k", "v")}

        def call(tokens, position, chance, stopped):
            token, new, now = next_token.definition(params, tokens, config, dtype, seen | {"filled": position}, chance,
                                                    stopped, temperature, top_k, top_p, stop_tokens)
            if new.keys() != {"k", "v", "filled"}:
                raise NotImplementedError(f"a record of a token keeps k and v alone of {', '.join(new)} in a cache; "
                                          "drop it by next_token.forms.clear()")
            return token, now

        graphs[kind] = in_graph(call, 0)
    token, stopped = (x.clone() for x in graphs[kind](tokens, position, chance, stopped))
    return token, cache | {"filled": filled + 1}, stopped

# ---- CUDA: one operation in a fixed order, one in less precision ----

# The compiler would take it apart, and add rows in whatever order its threads come.
@opaque(lambda d_out, tokens, vocab_size: d_out.new_empty(vocab_size, d_out.shape[-1]))
def embedding_gradient(d_out: torch.Tensor, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The rows d_out (..., d_model) of each token, added up in a fixed order → (vocab_size, d_model).

    Up to 3,072 rows PyTorch has a kernel that may lose some (its pull request 187687), for a small vocabulary one that
    adds in no order unless all has to be deterministic.
    """
    rows, tokens = d_out.reshape(-1, d_out.shape[-1]), tokens.flatten()  # (N, d_model), (N)
    rows, tokens = (padded(x, max(3073, len(x))) for x in (rows, tokens))  # by rows of zeros for token 0
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        return torch.ops.aten.embedding_dense_backward(rows, tokens, vocab_size, -1, False)
    finally:
        torch.set_deterministic_debug_mode(mode)

class EmbeddingInOrder(torch.autograd.Function):
    """`embedding` whose gradient has the same bits each time, so that a run that goes on is the run it would have been.
    """

    @staticmethod
    def forward(ctx, tokens, w):
        ctx.save_for_backward(tokens)
        ctx.vocab_size = len(w)
        return embedding.definition(tokens, w)

    @staticmethod
    @only_first
    def backward(ctx, d_out):
        return None, embedding_gradient(d_out, *ctx.saved_tensors, ctx.vocab_size)

@faster(embedding, lambda tokens, w: w.is_cuda and torch.is_grad_enabled())
def embedding_in_order(tokens, w):
    return EmbeddingInOrder.apply(tokens, w)

@faster(orthogonalize, lambda g: g.ndim == 3 and g.is_cuda)
def orthogonalize_on_cuda(g):
    """In bfloat16, which is faster and enough."""
    return polar_express(g.bfloat16()).to(g.dtype)

# ---- The compiler: what it should not take apart, and what it should join ----

@faster(attention, is_compiled)
def attention_compiled(q, k, v):
    """One query, and short passes over scores where no kernel keeps these out of memory, are fused as defined."""
    for_kernels = q.is_cuda and q.dtype != torch.float32  # what else they need is asked when the operation runs
    if q.shape[-2] == 1 or k.shape[-2] <= TILE_QUERIES and not for_kernels:
        return attention.definition(q, k, v)
    return tiled_attention(q, k, v)

# To torch.compile each of the two is one operation: it would lay out the loops, for minutes, and gain nothing.

@opaque(lambda q, k, v: (q.new_empty(q.shape), at_least_float32(q.new_empty(*q.shape[:-1], 1))))
def attention_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`TiledAttention`'s forward pass → out (N, T, group, D), base-2 logarithm of each row's sum (N, T, group, 1)."""
    return attention_parts(q)[0](q, k, v)[:2]

@opaque(lambda d_out, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))
def attention_backward(d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                       log_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`TiledAttention`'s backward pass → d q, d k, d v."""
    return attention_parts(q)[1](d_out, q, k, v, out, log_sum)

def layer_by_layer(function, compiled):
    """A function of a model whose blocks and loss are compiled by themselves, not together: so what belongs to one of
    them, a gradient or a split parameter, can travel while others are computed.
    """
    forms = [(target, (always, compiled(target.definition))) for target in (transformer_block, mean_loss)]

    def call(*args):
        for target, form in forms:
            target.forms.append(form)
        try:
            return function(*args)
        finally:
            for target, form in forms:
                target.forms.remove(form)

    return call

def in_place(update):
    """An update of (params, grads, state, …) that writes the new params and state over the old, which are donated."""
    def call(params, grads, state, *args):
        for old, new in zip((params, state), update(params, grads, state, *args)):
            tree_map(torch.Tensor.copy_, old, new)

    return call

def is_separable(update):
    """Whether an update of some parameters depends on these alone and on scalars of the state: known of AdamW, as long
    as it has forms. Whoever lets it depend on more, in a form too, has to say so here.
    """
    return update is adamw_update and bool(update.forms)

def block_by_block(write):
    """`write`, an update in place, of one part after the other: what is compiled for one block serves all of them."""
    def call(params, grads, state, *args):
        rest = lambda tree: {key: w for key, w in tree.items() if key != "blocks"}
        scalars = {key: x for key, x in state.items() if not isinstance(x, dict)}  # each part changes a copy
        for part in (rest, *(lambda tree, name=name: tree["blocks"][name] for name in params["blocks"])):
            own = {key: x.clone() if key in scalars else part(x) for key, x in state.items()}
            write(part(params), part(grads), own, *args)
        for key, x in scalars.items():
            x.copy_(own[key])

    return call

# ==== III. Split over ranks ====

# A rank is a process with a device of its own. Split tensors are DTensors, of which each rank has some rows; the class
# takes a second to import, so what is here imports it where a model is split.

def is_split(w):
    """Whether a tensor is a DTensor."""
    return hasattr(w, "device_mesh")

def shard(tree, mesh):
    """Split every tensor of a tree by rows over the ranks of a mesh. Each rank gives the whole and keeps its part."""
    from torch.distributed.tensor import DTensor, Shard
    wrap = lambda w: DTensor.from_local(own_rows(w).clone(), mesh, [Shard(0)], shape=w.shape, stride=w.stride())
    return tree_map(lambda w: wrap(w) if w.ndim else w, tree)  # cloned, so that the whole can be freed

def own_rows(w):
    """This rank's rows of a tensor that all ranks have whole: N / ranks, rounded up; the last have fewer, or none."""
    size = math.ceil(len(w) / torch.distributed.get_world_size())
    return w[torch.distributed.get_rank() * size:][:size]

def own_parts(tree):
    """What this rank has of the tensors of a tree."""
    return tree_map(lambda w: w.to_local() if is_split(w) else w, tree)

def split_like(parts, like):
    """A tree of what each rank has, as tensors that are split like those of another tree."""
    from torch.distributed.tensor import DTensor
    wrap = lambda part, w: DTensor.from_local(part, w.device_mesh, w.placements, shape=w.shape, stride=w.stride())
    return tree_map(lambda part, w: wrap(part, w) if is_split(w) else part, parts, like)

def padded(w, size):
    """A tensor with rows of zeros behind it, `size` in all."""
    return w if len(w) == size else torch.cat((w, w.new_zeros(size - len(w), *w.shape[1:])))

def all_gather(w, dtype=None):
    """All rows of a tensor that is split, in `dtype` or its own, for which all ranks must call; another as it is."""
    return gather_together([w], [dtype or w.dtype])[0] if is_split(w) else w

# Tensors of more bytes travel alone, others together: to copy them costs less than a message each. On two cores of a
# Xeon, two ranks of gloo, the gradients of four layers take with 2^17, 2^20 and 2^22 198, 127 and 128 ms at 256 wide,
# 395, 361 and 348 at 512; with 2^20 and 2^22 664 and 648 at 768, 1,121 and 1,114 at 1,024. Not measured on CUDA.
ALONE_FROM = {"cpu": 1 << 20, "cuda": 25 << 20}

def messages(ws, dtypes):
    """Which tensors travel together, in their `dtypes`: lists of numbers."""
    groups = {}
    for i, (w, dtype) in enumerate(zip(ws, dtypes)):
        is_large = w.numel() * dtype.itemsize > ALONE_FROM[w.device.type]
        groups.setdefault((dtype, i if is_large else None), []).append(i)
    return list(groups.values())

def joined(tensors, dim=0):
    """Several tensors behind each other; one as it is."""
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]

def begin_gather(ws, dtypes):
    """Send what `gather_together` gathers → a function that waits until it has arrived, and returns it."""
    ranks, sent = torch.distributed.get_world_size(), []
    for group in messages(ws, dtypes):
        own = [padded(ws[i].to_local().to(dtypes[i]), math.ceil(len(ws[i]) / ranks)) for i in group]
        message = joined([rows.flatten() for rows in own])
        arrived = message.new_empty(ranks, len(message))
        work = torch.distributed.all_gather_single(arrived.view(-1), message, async_op=True)
        sent.append((group, [rows.numel() for rows in own], arrived, work))

    def gathered_tensors():
        whole = [None] * len(ws)
        for group, sizes, arrived, work in sent:
            work.wait()
            for i, part in zip(group, arrived.split(sizes, 1)):
                whole[i] = part.reshape(-1, *ws[i].shape[1:])[:len(ws[i])]
        return tuple(whole)

    return gathered_tensors

def gather_together(ws, dtypes):
    """`all_gather` of several tensors, in their `dtypes`."""
    return begin_gather(ws, dtypes)()

def scatter_together(wholes, likes):
    """The means of what the ranks have each of whole tensors, split like others and in their dtypes."""
    ranks, scattered = torch.distributed.get_world_size(), [None] * len(likes)
    for group in messages(likes, [whole.dtype for whole in wholes]):
        parts = [padded(wholes[i], math.ceil(len(likes[i]) / ranks) * ranks).reshape(ranks, -1) for i in group]
        message = joined(parts, 1).contiguous()  # (ranks, numbers that each gets)
        total = message.new_empty(message.shape[1])
        torch.distributed.reduce_scatter_single(total, message.view(-1))
        for i, part in zip(group, total.div_(ranks).split([part.shape[1] for part in parts])):
            like = likes[i]
            scattered[i] = split_like(part.view(-1, *like.shape[1:])[:len(like.to_local())].to(like.dtype), like)
    return scattered

class GatherTogether(torch.autograd.Function):
    """What take() returns, the whole of ws, whose gradients are averaged over the ranks and split again.

    `again` is emptied then: a list of what was gathered once more for the backward pass.
    """

    @staticmethod
    def forward(ctx, take, again, *ws):
        ctx.again, ctx.ws = again, ws
        return take()

    @staticmethod
    def backward(ctx, *d_wholes):
        ctx.again.clear()
        return None, None, *scatter_together(d_wholes, ctx.ws)

def gathered(w):
    """`all_gather` of a parameter, with its gradient. Use at once what is gathered."""
    return GatherTogether.apply(begin_gather([w], [w.dtype]), [], w)[0]

class ShardedLinear(torch.autograd.Function):
    """`linear` with rows of w on every rank: they are gathered before use, freed, and gathered again to go backward."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ all_gather(w, x.dtype).T

    @staticmethod
    def backward(ctx, d_out):
        x, w = ctx.saved_tensors
        dw = d_out.flatten(0, -2).T @ x.flatten(0, -2)
        return d_out @ all_gather(w, x.dtype), *scatter_together([dw], [w])

@faster(linear, lambda x, w: is_split(w))
def linear_over_ranks(x, w):
    return ShardedLinear.apply(x, w)

@faster(embedding, lambda tokens, w: is_split(w))
def embedding_over_ranks(tokens, w):
    return embedding(tokens, gathered(w))

@faster(rmsnorm, lambda x, gain, eps: is_split(gain))
def rmsnorm_over_ranks(x, gain, eps):
    return rmsnorm(x, gathered(gain), eps)

@faster(mean_loss, lambda x, w, targets: is_split(w))
def mean_loss_over_ranks(x, w, targets):
    """The output matrix is gathered once, and whole until its gradient is there."""
    return mean_loss(x, gathered(w), targets)

@faster(global_norm, lambda tree: is_split(first_leaf(tree)))
def global_norm_over_ranks(tree):
    """One message adds up the squares of the norms of the rows that each rank has."""
    own = lambda w: w.to_local() if len(w.to_local()) < len(w) else own_rows(w.to_local())  # each number once
    square = global_norm(tree_map(own, tree)).square()
    torch.distributed.all_reduce(square)
    return square.sqrt()

@faster(clip_gradients, lambda grads, norm, max_norm: is_split(first_leaf(grads)))
def clip_gradients_over_ranks(grads, norm, max_norm):
    return split_like(clip_gradients(own_parts(grads), norm, max_norm), grads)

@faster(adamw_update, lambda params, *_, **__: is_split(first_leaf(params)))
def adamw_update_over_ranks(params, grads, state, lr, beta1=0.8, beta2=0.98, eps=1e-8, weight_decay=0.1):
    new = adamw_update(*map(own_parts, (params, grads, state)), lr, beta1, beta2, eps, weight_decay)
    return tuple(map(split_like, new, (params, state)))

@faster(orthogonalize_all, lambda matrices: is_split(first_leaf(matrices)))
def orthogonalize_all_over_ranks(matrices):
    """Every rank orthogonalises the whole of them, a block's at a time, and keeps its rows."""
    def whole(block):
        paths, ws = zip(*tree_leaves(block))
        return orthogonalize_all(tree_build(zip(paths, gather_together(ws, [w.dtype for w in ws]))))

    blocks = {layer: tree_map(own_rows, whole(block)) for layer, block in matrices["blocks"].items()}
    return split_like({"blocks": blocks}, matrices)

def on_own_parts(write):
    """`write`, an update in place, of what this rank has: compiled code would look at split tensors anew each call."""
    return lambda params, grads, state, *args: write(*map(own_parts, (params, grads, state)), *args)

class SplitBlocks:
    """The split tensors of blocks. While a block is computed, those of the one that comes after it are gathered."""

    def __init__(self, blocks):
        split = [[(path, w) for path, w in tree_leaves(block) if is_split(w)] for block in blocks.values()]
        self.blocks = [tuple(zip(*leaves)) for leaves in split]  # (paths, tensors) of each
        self.begun, self.step = {}, 1  # -1 on the way back

    def begin(self, number, dtype):
        _, ws = self.blocks[number]
        return begin_gather(ws, [dtype if w.ndim > 1 else w.dtype for w in ws])

    def whole(self, number, dtype):
        """The whole tensors of a block, by its number, the matrices in a dtype. What was not gathered ahead, or in
        another dtype, as where a block gives another one than it got, is gathered now, which takes longer.
        """
        begun_in, finish = self.begun.pop(number, (None, None))
        finish = finish if begun_in == dtype else self.begin(number, dtype)
        coming = number + self.step
        if 0 <= coming < len(self.blocks) and coming not in self.begun:
            self.begun[coming] = dtype, self.begin(coming, dtype)
        return finish()

@faster(transformer_blocks, lambda blocks, *_, **__: is_split(first_leaf(blocks)))
def transformer_blocks_over_ranks(blocks, x, cos, sin, cache, config, remat=False):
    """A block's tensors are gathered together before it is computed, freed, and gathered again to go backward."""
    split = SplitBlocks(blocks)

    def compute(number, layer, x):
        (paths, ws), take, again = split.blocks[number], partial(split.whole, number, x.dtype), []
        whole = GatherTogether.apply(take, again, *ws)
        storages = {w.untyped_storage()._cdata: i for i, w in enumerate(whole)}

        def pack_saved(tensor):  # what the backward pass would keep: of a gathered tensor only in which storage it is
            i = storages.get(tensor.untyped_storage()._cdata)
            if i is None:
                return tensor.detach()  # else it would keep its own graph, which keeps it
            return i, tensor.shape, tensor.stride(), tensor.storage_offset()

        def unpack_saved(kept):
            if isinstance(kept, torch.Tensor):
                return kept
            if not again:
                again.extend(take())
            return again[kept[0]].as_strided(*kept[1:])

        whole_block = tree_build((dict(tree_leaves(blocks[layer])) | dict(zip(paths, whole))).items())
        # With remat a block keeps nothing by itself.
        with nullcontext() if remat else torch.autograd.graph.saved_tensors_hooks(pack_saved, unpack_saved):
            return transformer_blocks.definition({layer: whole_block}, x, cos, sin, cache, config)

    for number, layer in enumerate(blocks):
        x = checkpoint(compute, number, layer, x, use_reentrant=False) if remat else compute(number, layer, x)
    split.step = -1
    return x

def one_block_at_a_time(blocks, x, cos, sin, cache, config, remat=False):
    """`transformer_blocks` as ranks compute it, by which a definition that looks beyond a block is found."""
    for layer, block in blocks.items():
        x = transformer_blocks.definition({layer: block}, x, cos, sin, cache, config, remat)
    return x

class GradientAverager:
    """Averages gradients over ranks, in few large buckets that travel while the backward pass goes on."""

    BUCKET_BYTES = 25 << 20

    def __init__(self):
        self.waiting, self.size, self.sent = [], 0, []

    def add(self, path, gradient):
        """Take a gradient; all ranks must give the same ones in the same order."""
        self.waiting.append((path, gradient))
        self.size += gradient.nbytes
        if self.size >= self.BUCKET_BYTES:
            self.send()

    def send(self):
        bucket = torch.cat([gradient.flatten() for _, gradient in self.waiting])
        self.sent.append((self.waiting, bucket, torch.distributed.all_reduce(bucket, async_op=True)))
        self.waiting, self.size = [], 0

    def averages(self, grads):
        """Wait for all → a tree like `grads`, of means over the ranks. Raises ValueError where one is missing."""
        taken = {path for gradients in (self.waiting, *(bucket[0] for bucket in self.sent)) for path, _ in gradients}
        for path in [path for path, _ in tree_leaves(grads) if path not in taken]:
            raise ValueError(f"the loss does not use {path}, of which ranks need a gradient; add 0 times its sum")
        if self.waiting:
            self.send()
        result = {}
        for gradients, bucket, work in self.sent:
            work.wait()
            bucket.div_(torch.distributed.get_world_size())
            parts = bucket.split([gradient.numel() for _, gradient in gradients])
            result |= {path: part.view_as(gradient) for (path, gradient), part in zip(gradients, parts)}
        return tree_build((path, result[path]) for path, _ in tree_leaves(grads))

def watched(function, on_gradient):
    """`function`, which also calls on_gradient(path, gradient) for each leaf as soon as its gradient is there."""
    def call(params, *args):
        for path, leaf in tree_leaves(params):
            leaf.register_hook(partial(on_gradient, path))
        return function(params, *args)
    return call
