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

from config import UserError
from ops import LayerNorm, Linear, RMSNorm, attend, linear_cross_entropy, rope_table, rotate

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
    vocab_size: int | None = None  # number of token ids, without padding; none: the data's
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
            raise UserError("\n".join(wrong))

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
            raise UserError(f"{start + T} tokens do not fit into block_size {cfg.block_size}; shorten the sequence")
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
