"""The network: one Transformer that is GPT-2 or BERT, exactly, or a present-day decoder or encoder.

Tensor dimensions, here and everywhere in the project:
    B batch   T tokens of a sequence   C width (n_embd)   H heads   D width of a head   V vocabulary   N rows, B * T
    K masked positions of a sequence
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

IGNORE = -100  # a target that takes no part in the loss
BY_MATMULS = 512  # tokens up to which a CPU in bf16 trains attention by matmuls

# The non-linearity of each kind of MLP. GPT-2's GELU is the tanh approximation, BERT's (and nanoGPT's) the exact one.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class ModelConfig:
    objective: Literal["clm", "mlm"] = "clm"  # clm: the next token, seeing those before; mlm: masked ones, seeing all
    vocab_size: int | None = 50257  # number of token ids, the real one; none: the data's
    block_size: int = 1024  # longest sequence, in tokens
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_kv_head: int | None = None  # heads of keys and values, shared by equally many of queries; none: n_head
    head_dim: int | None = None  # width of a head; none: n_embd / n_head
    n_embd: int = 768  # width of the residual stream
    n_inner: int | None = None  # width of the MLP; none: 4 * n_embd
    mlp: Literal["gelu_tanh", "gelu", "swiglu", "relu2"] = "gelu_tanh"  # gelu_tanh is GPT-2's, gelu BERT's
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # kind of norm
    norm_position: Literal["pre", "post"] = "pre"  # pre: before each branch, GPT-2's; post: after each sum, BERT's
    norm_eps: float = 1e-5  # added to the variance in norms
    qk_norm: bool = False  # normalise queries and keys, head by head
    position: Literal["learned", "rope"] = "learned"  # a table of positions, or rotations of queries and keys
    rope_theta: float = 10_000.0  # base of rope's wavelengths
    rope_scale: float = 1.0  # rope's waves too long for rope_context are this much longer, as in Llama 3.1; 1: none are
    rope_context: int = 8192  # tokens that a model with rope_scale could hold before
    n_token_types: int | None = None  # token types, of which BERT has 2; none: no table of them
    bias: bool = True  # biases in linear layers and norms
    dropout: float = 0.0  # after the embedding, in attention and after each residual branch
    label_smoothing: float = 0.0  # share of the target that training spreads over the whole vocabulary
    tie_embeddings: bool = True  # the head's weight is the token embedding

    def __post_init__(self):
        counts = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_inner")
        wrong = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in (*counts, "n_token_types")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        counts_are_sound = not wrong
        if counts_are_sound and self.head_dim is None and self.n_embd % self.n_head:
            wrong.append(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; "
                f"n_head {_near_divisors(self.n_embd, self.n_head)} would fit"
            )
        elif counts_are_sound and self.position == "rope" and self.head_width % 2:
            wrong.append(f"head_dim is {self.head_width}; rope turns pairs, so it must be even")
        if counts_are_sound and self.n_head % self.kv_heads:
            wrong.append(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; "
                f"n_kv_head {_near_divisors(self.n_head, self.n_kv_head)} would fit"
            )
        if self.norm_eps < 0:
            wrong.append(f"norm_eps is {self.norm_eps}; it must not be negative")
        wrong += [
            f"{name} is {getattr(self, name)}; it must be above 0"
            for name in ("rope_theta", "rope_scale", "rope_context")
            if getattr(self, name) <= 0
        ]
        wrong += [
            f"{name} is {getattr(self, name)}; it must be at least 0 and below 1"
            for name in ("dropout", "label_smoothing")
            if not 0 <= getattr(self, name) < 1
        ]
        if wrong:
            raise ValueError("\n".join(wrong))

    @property
    def kv_heads(self):
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self):
        """Width of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner_width(self):
        """Width of the MLP."""
        return self.n_inner or 4 * self.n_embd

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: the vocabulary rounded up to 64, which matmul kernels want (50257 becomes 50304)."""
        return -(-self.vocab_size // 64) * 64


def _near_divisors(number, wanted):
    """The three divisors of a number nearest to the one wanted, as text."""
    divisors = [d for d in range(1, min(number, 4 * wanted, 10_000) + 1) if number % d == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:3])))


def _dropout(cfg):
    return nn.Dropout(cfg.dropout) if cfg.dropout else nn.Identity()


def _norm(cfg, width):
    if cfg.norm == "rmsnorm":
        return RMSNorm(width, eps=cfg.norm_eps)
    return LayerNorm(width, eps=cfg.norm_eps, bias=cfg.bias)


class LayerNorm(nn.LayerNorm):
    """torch's, but for weights in another dtype than x's as well, which its autocast of CPUs does not cast (2.13)."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.type_as(x), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """The same of this one."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class Linear(nn.Linear):
    """torch's, but in bf16 on a CPU it multiplies generation's few rows the other way round, twice as fast (2.13)."""

    def forward(self, x):
        few_rows = 0 < x.numel() <= 16 * x.shape[-1]
        if few_rows and self.weight.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled():
            rows = x.reshape(-1, x.shape[-1])
            y = self.weight @ rows[0] if len(rows) == 1 else (self.weight @ rows.T).T
            y = y.view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


def rope_table(positions, head_dim, theta, scale=1.0, context=None):
    """Cosines and sines (T, D) that turn heads at positions (T,), in the signs that rotate wants; arXiv 2104.09864.

    With a scale, frequencies that turn less than once in a context are divided by it, those that turn 4 times and more
    are left, and those between are in between: Llama 3.1's way to longer contexts (arXiv 2407.21783).
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    if scale != 1:
        left = ((context * frequencies / (2 * math.pi) - 1) / 3).clamp(0, 1)
        frequencies = frequencies * (left + (1 - left) / scale)
    angles = positions[:, None] * frequencies  # T D/2
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def rotate(x, rope):
    """x (B, H, T, D) turned by its positions' angles; the pairs are channels i and i + D / 2, as in Llama."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


def attend(q, k, v, mask=None, causal=False, dropout=0.0):
    """softmax(q k' / sqrt(D)) v of q (B, H, T, D) and of k and v (B, H, S, D), or fewer heads, shared by queries'.

    mask (B, 1, 1 or T, S) is True where a query may look. torch's kernel, except for training on a CPU in bf16 with
    sequences up to BY_MATMULS: there it takes, gradients included, 1.7 to 5 times as long as matmuls do (2.13). These
    round the scores to bf16, which the kernel does not.
    """
    (B, H, T, D), S = q.shape, k.shape[2]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or S > BY_MATMULS or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=k.shape[1] != H)
    q, k, v = (x[:, :, None].expand(-1, -1, H // x.shape[1], -1, -1).flatten(0, 2) for x in (q, k, v))  # B*H S D
    mask = torch.ones(T, S, dtype=torch.bool).tril() if causal else mask
    # Not -inf, of which a query that may look nowhere would get NaN.
    bias = q.new_zeros(1) if mask is None else q.new_zeros(1).where(mask, torch.finfo(q.dtype).min)
    bias = bias.expand(B, H, -1, -1).flatten(0, 1) if bias.dim() == 4 else bias
    weights = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(-1)
    return (F.dropout(weights, dropout) @ v).view(B, H, T, D)


class Attention(nn.Module):
    """Multi-head self-attention, causal or to both sides."""

    def __init__(self, cfg):
        super().__init__()
        self.head_width, self.causal, self.dropout = cfg.head_width, cfg.objective == "clm", cfg.dropout
        queries, keys = cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width
        # Separate matrices: a shard of each is whole heads, and an optimizer that works on matrices sees each one.
        self.q = Linear(cfg.n_embd, queries, bias=cfg.bias)
        self.k = Linear(cfg.n_embd, keys, bias=cfg.bias)
        self.v = Linear(cfg.n_embd, keys, bias=cfg.bias)
        self.q_norm = _norm(cfg, cfg.head_width) if cfg.qk_norm else None
        self.k_norm = _norm(cfg, cfg.head_width) if cfg.qk_norm else None
        self.proj = Linear(queries, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, rope=None, mask=None, cache=None):
        B, T, _ = x.shape
        # -1 finds the number of heads, which is smaller where they are shared out over devices.
        q, k, v = (linear(x).view(B, T, -1, self.head_width) for linear in (self.q, self.k, self.v))  # B T H D
        if self.q_norm is not None:
            q, k = self.q_norm(q.type_as(x)), self.k_norm(k.type_as(x))  # norms of bf16 by float32 weights are slow
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B H T D
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k = q.type_as(v), k.type_as(v)  # under autocast back from the norms' float32
        if cache is not None:
            k, v = cache.append(k, v)  # B H S D, S tokens so far
        # After the prompt, tokens come one at a time and may look at everything in the cache.
        causal = self.causal and mask is None and (cache is None or T > 1)
        y = attend(q, k, v, mask, causal, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # B T C


class MLP(nn.Module):
    """The position-wise network of a block: up, non-linearity, down; with a gate beside up in swiglu."""

    def __init__(self, cfg):
        super().__init__()
        self.activation = ACTIVATIONS[cfg.mlp]
        self.gate = Linear(cfg.n_embd, cfg.inner_width, bias=cfg.bias) if cfg.mlp == "swiglu" else None
        self.up = Linear(cfg.n_embd, cfg.inner_width, bias=cfg.bias)
        self.down = Linear(cfg.inner_width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """A Transformer block: attention and MLP, each with a norm and added to the residual stream."""

    def __init__(self, cfg):
        super().__init__()
        self.pre = cfg.norm_position == "pre"
        self.norm1 = _norm(cfg, cfg.n_embd)
        self.attn = Attention(cfg)
        self.norm2 = _norm(cfg, cfg.n_embd)
        self.mlp = MLP(cfg)
        self.dropout = _dropout(cfg)

    def forward(self, x, rope=None, mask=None, cache=None):
        if self.pre:
            x = x + self.dropout(self.attn(self.norm1(x), rope, mask, cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attn(x, rope, mask, cache)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Transform(nn.Module):
    """What BERT puts between its last block and the head of masked tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.dense = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.activation = ACTIVATIONS[cfg.mlp if cfg.mlp.startswith("gelu") else "gelu"]
        self.norm = _norm(cfg, cfg.n_embd)

    def forward(self, x):
        return self.norm(self.activation(self.dense(x)).type_as(x))  # the norm, too, in float32 under autocast


class Transformer(nn.Module):
    """Token ids to logits, or, given targets, to the sum of their cross-entropies."""

    def __init__(self, cfg):
        """Builds the model where torch's default device says; on the meta device that costs nothing."""
        super().__init__()
        self.cfg = cfg
        post, masked = cfg.norm_position == "post", cfg.objective == "mlm"
        self.wte = nn.Embedding(cfg.padded_vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.position == "learned" else None
        self.wtt = nn.Embedding(cfg.n_token_types, cfg.n_embd) if cfg.n_token_types else None
        self.norm_e = _norm(cfg, cfg.n_embd) if post else nn.Identity()
        self.dropout = _dropout(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm_f = nn.Identity() if post else _norm(cfg, cfg.n_embd)
        self.transform = Transform(cfg) if masked else nn.Identity()
        self.head = Linear(cfg.n_embd, cfg.padded_vocab_size, bias=masked and cfg.bias)
        self.tie_weights()

    def tie_weights(self):
        """Makes head and embedding one parameter again; whatever replaces parameters (to_empty does) must call it."""
        if self.cfg.tie_embeddings:
            self.head.weight = self.wte.weight

    def forward(
        self, ids, targets=None, positions=None, attention_mask=None, token_types=None, cache=None, count_correct=False
    ):
        """Logits (B, T, V) of ids (B, T); or, given targets (B, T), the float32 sum of their cross-entropies.

        Targets that equal IGNORE count nothing. With positions (B, K) logits and targets are those of these
        positions alone, (B, K, V) and (B, K). attention_mask (B, T) is False where a token is padding that none
        may look at, token_types (B, T) are 0 where not given. With a cache, ids continue what it holds,
        attention_mask is of all tokens so far, and logits are those of the last token alone, (B, 1, V).
        count_correct, without gradients, returns beside the loss the number of targets that are the likeliest
        token.
        """
        cfg, T, start = self.cfg, ids.shape[1], 0 if cache is None else cache.length
        if start + T > cfg.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size {cfg.block_size}; shorten the sequence")
        assert start == 0 or T == 1, f"{T} tokens behind a cache of {start}: after the prompt they come one at a time"
        place, mask = torch.arange(start, start + T, device=ids.device), None
        x = self.embed(ids, place, token_types)  # B T C
        rope = None
        if self.wpe is None:
            rope = rope_table(place, cfg.head_width, cfg.rope_theta, cfg.rope_scale, cfg.rope_context)
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]  # B 1 1 T
            mask = mask & (place <= place[:, None]) if cfg.objective == "clm" else mask
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, None if cache is None else cache.layers[i])
        if positions is not None:
            x = x.take_along_dim(positions[..., None], dim=1)  # B K C
        elif cache is not None:
            x = x[:, -1:]
        x = self.transform(self.norm_f(x))
        if targets is None:
            return self.head(x)[..., : cfg.vocab_size]
        return self.cross_entropy(
            x.flatten(0, 1),
            self.head.weight,
            targets.flatten(),
            cfg.vocab_size,
            self.head.bias,
            cfg.label_smoothing if self.training else 0.0,
            count_correct,
        )

    def cross_entropy(self, *args):
        """The loss; a method, so that a model whose vocabulary is sharded can have another in its place."""
        return linear_cross_entropy(*args)

    def embed(self, ids, place, token_types=None):
        """What the first block sees (B, T, C): the sum of the embeddings of tokens, positions and token types."""
        x = self.wte(ids)
        if self.wpe is not None:
            x = x + self.wpe(place)
        if self.wtt is not None:
            x = x + self.wtt(torch.zeros_like(ids) if token_types is None else token_types)
        return self.dropout(self.norm_e(x))

    @torch.no_grad()
    def init_weights(self, seed, fill=torch.Tensor.copy_):
        """Normal weights of std 0.02, where norms come first less for projections into the residual stream.

        The latter, over sqrt(2 n_layer), is GPT-2's way; BERT draws all alike. Each weight is a function of the
        seed and its own name, so that sharding, or a layer more, changes no other. fill(param, weight) takes the whole
        weight, on the CPU, into the parameter.
        """
        for name, param in self.named_parameters():
            if name.endswith("bias"):
                weight = torch.zeros(param.shape)
            elif "norm" in name:
                weight = torch.ones(param.shape)
            else:
                std = 0.02
                if self.cfg.norm_position == "pre" and name.endswith(("attn.proj.weight", "mlp.down.weight")):
                    std /= math.sqrt(2 * self.cfg.n_layer)
                key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8])
                generator = torch.Generator().manual_seed(key)  # CPU: the same numbers whatever the device
                rows = self.cfg.vocab_size if name in ("wte.weight", "head.weight") else param.shape[0]
                weight = torch.zeros(param.shape)  # rows that pad the vocabulary stay zero
                weight[:rows] = torch.randn(rows, *param.shape[1:], generator=generator).mul_(std)
            fill(param, weight)

    def num_params(self):
        """Parameters, without the rows that pad the vocabulary; tied ones count once."""
        padding = self.cfg.padded_vocab_size - self.cfg.vocab_size
        padded = {p: p.numel() // len(p) for p in (self.wte.weight, self.head.weight, self.head.bias) if p is not None}
        return sum(p.numel() for p in self.parameters()) - padding * sum(padded.values())


def parameter_shapes(cfg):
    """{name: shape} of a model's parameters, without making it; a tied head is not among them."""
    with torch.device("meta"):
        return {name: list(param.shape) for name, param in Transformer(cfg).named_parameters()}


class Cache:
    """Keys and values of the tokens so far, for generation: one preallocated tensor a layer."""

    class Layer:
        def __init__(self, shape, **kind):
            self.length = 0
            self.k, self.v = torch.empty(shape, **kind), torch.empty(shape, **kind)

        def append(self, k, v):
            """Stores k and v (B, H, T, D) behind what is there and returns all of it, as views."""
            end = self.length + k.shape[2]
            self.k[:, :, self.length : end] = k
            self.v[:, :, self.length : end] = v
            self.length = end
            return self.k[:, :, :end], self.v[:, :, :end]

    def __init__(self, cfg, batch_size, device, dtype, n_tokens=None):
        """n_tokens: that it can hold; none: block_size."""
        shape = (batch_size, cfg.kv_heads, n_tokens or cfg.block_size, cfg.head_width)
        self.layers = [Cache.Layer(shape, device=device, dtype=dtype) for _ in range(cfg.n_layer)]

    @property
    def length(self):
        """Tokens in the cache."""
        return self.layers[0].length

    def clear(self):
        """Forgets every token."""
        for layer in self.layers:
            layer.length = 0


# ---- the loss


def linear_cross_entropy(
    hidden, weight, targets, vocab_size, bias=None, label_smoothing=0.0, count_correct=False, shard=None
):
    """Sum over rows of the cross-entropy of hidden @ weight.T + bias, without ever holding all logits.

    hidden (N, C), weight (padded V, C), bias (padded V,), targets (N,) with IGNORE for rows that count nothing; the
    result is a float32 scalar, and with count_correct, which has no gradients, also the number of rows whose target
    has the largest logit. Matmuls run in autocast's dtype where it is on, sums in float32. A chunk of rows at a time
    goes through logits, loss and gradient, so that memory is that of one chunk and of the gradients. torch 2.13's
    function of the same name ignores autocast and was 3.6 times slower than plain cross-entropy on a CPU.

    shard, where weight and bias are some rows of the vocabulary's: (id of the first, reduce), where
    reduce(tensor, "sum", "max" or "min") is that over all shards. hidden and the results are then the same on each.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        args = hidden, weight, targets, vocab_size, bias, label_smoothing, shard or (0, _alone), dtype
        if torch.is_grad_enabled():
            assert not count_correct, "targets are counted in evaluation, without gradients"
            return _LinearCrossEntropy.apply(*args)
        loss, n_correct, *_ = _loss_and_gradients(*args, with_gradients=False)
        return (loss, n_correct) if count_correct else loss


def _alone(tensor, op):
    """The reduction of one shard."""
    return tensor


def loss_chunks(V, device_type):
    """(rows of a chunk, rows that passes over its logits take at a time, columns whose gradients are added at a time).

    On a CPU the first bound memory, 50 MB in bf16 at V 50304, and the others what it copies and must cache.
    """
    if device_type == "cpu":
        return max(512, 2**23 // V), max(1, 2**20 // V), 4096
    return max(4096, 2**23 // V), max(4096, 2**23 // V), V


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward, where the logits are at hand: backward only scales them, in place, so once."""

    @staticmethod
    def forward(ctx, *args):
        loss, _, *gradients = _loss_and_gradients(*args, with_gradients=True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, scale):
        d_hidden, d_weight, d_bias = (g if g is None else g.mul_(scale) for g in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, d_bias, None, None, None


def _loss_and_gradients(hidden, weight, targets, vocab_size, bias, label_smoothing, shard, dtype, with_gradients):
    first, reduce = shard
    h, w = hidden.detach().to(dtype), weight.detach().to(dtype)
    V = len(w)
    n_ids = max(0, min(V, vocab_size - first))  # rows that do not pad the vocabulary
    rows, few_rows, columns = loss_chunks(V, h.device.type)
    loss, n_correct = torch.zeros((), device=h.device), torch.zeros((), device=h.device)
    d_hidden = torch.empty_like(hidden) if with_gradients else None
    d_weight = torch.zeros_like(weight) if with_gradients else None
    d_bias = torch.zeros_like(bias) if with_gradients and bias is not None else None
    buffer = h.new_empty(min(rows, len(h)), V)  # one for all chunks
    for start in range(0, len(h), rows):
        h_chunk, target = h[start : start + rows], targets[start : start + rows, None]
        logits = torch.mm(h_chunk, w.T, out=buffer[: len(h_chunk)])  # N V
        for few_logits, few_targets in zip(logits.split(few_rows), target.split(few_rows)):
            valid = few_targets != IGNORE
            column = few_targets - first
            here = valid & (0 <= column) & (column < V)  # the target is of this shard
            column = column.where(here, 0)
            x = few_logits.float()
            if bias is not None:
                x += bias.detach()
            x[:, n_ids:] = -math.inf
            x -= reduce(x.amax(1, keepdim=True), "max")
            wanted = reduce(x.gather(1, column).where(here, 0), "sum")
            if label_smoothing:
                mean = reduce(x[:, :n_ids].sum(1, keepdim=True), "sum") / vocab_size
                wanted = wanted.lerp(mean, label_smoothing)
            if not with_gradients:
                likeliest = x.argmax(1, keepdim=True)  # the first of several
                likeliest = reduce((likeliest + first).where(x.gather(1, likeliest) == 0, vocab_size), "min")
                n_correct += ((likeliest == few_targets) & valid).sum()
            exp = x.exp_()
            z = reduce(exp.sum(1, keepdim=True), "sum")
            loss += ((z.log() - wanted) * valid).sum()
            if with_gradients:
                # softmax, minus 1 at the target (or what smoothing leaves of it), and 0 in rows that count nothing
                d_logits = exp.mul_(valid / z)
                d_logits.scatter_add_(1, column, here * (label_smoothing - 1.0))
                if label_smoothing:
                    d_logits[:, :n_ids] -= valid * (label_smoothing / vocab_size)
                if bias is not None:
                    d_bias += d_logits.sum(0)
                few_logits.copy_(d_logits)
        if with_gradients:
            d_hidden[start : start + rows] = logits @ w  # what were logits are their gradients now
            for d_part, part in zip(d_weight.split(columns), logits.split(columns, dim=1)):
                d_part += part.T @ h_chunk
    if with_gradients:
        d_hidden = reduce(d_hidden, "sum")
    return loss, n_correct, d_hidden, d_weight, d_bias
