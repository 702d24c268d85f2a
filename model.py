"""The network: one Transformer that is GPT-2, exactly.

Tensor dimensions, here and everywhere in the project:
    B batch   T tokens of a sequence   C width (n_embd)   H heads   D width of a head   V vocabulary   N rows, B * T
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

IGNORE = -100  # a target that takes no part in the loss


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int | None = 50257  # number of token ids, the real one; none: the data's
    block_size: int = 1024  # longest sequence, in tokens
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width of the residual stream
    n_inner: int | None = None  # width of the MLP; none: 4 * n_embd
    mlp: Literal["gelu_tanh", "gelu"] = "gelu_tanh"  # GPT-2's GELU is the tanh approximation, nanoGPT's the exact one
    bias: bool = True  # biases in linear layers and norms
    norm_eps: float = 1e-5  # added to the variance in norms
    dropout: float = 0.0  # after the embedding, in attention and after each residual branch
    tie_embeddings: bool = True  # the head's weight is the token embedding

    def __post_init__(self):
        wrong = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_inner")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if not wrong and self.n_embd % self.n_head:
            near = [h for h in range(1, min(self.n_embd, 4 * self.n_head, 10_000) + 1) if self.n_embd % h == 0]
            near = sorted(sorted(near, key=lambda h: abs(h - self.n_head))[:3])
            wrong.append(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; "
                f"n_head {', '.join(map(str, near))} would fit"
            )
        if self.norm_eps < 0:
            wrong.append(f"norm_eps is {self.norm_eps}; it must not be negative")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if wrong:
            raise ValueError("\n".join(wrong))

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: the vocabulary rounded up to 64, which matmul kernels want (50257 becomes 50304)."""
        return -(-self.vocab_size // 64) * 64


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.n_embd // cfg.n_head
        self.dropout = cfg.dropout
        # Separate matrices: a shard of each is whole heads, and an optimizer that works on matrices sees each one.
        self.q = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.k = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.v = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, cache=None):
        B, T, _ = x.shape
        # -1 finds the number of heads, which is smaller where they are shared out over devices.
        q = self.q(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # B H T D
        k = self.k(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # B H T D
        v = self.v(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # B H T D
        if cache is not None:
            k, v = cache.append(k, v)  # B H S D, S tokens so far
        # After the prompt, tokens come one at a time and may look at everything in the cache.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # B T C


class MLP(nn.Module):
    """The position-wise network of a block: up, non-linearity, down."""

    def __init__(self, cfg):
        super().__init__()
        n_inner = cfg.n_inner or 4 * cfg.n_embd
        self.approximate = "tanh" if cfg.mlp == "gelu_tanh" else "none"
        self.up = nn.Linear(cfg.n_embd, n_inner, bias=cfg.bias)
        self.down = nn.Linear(n_inner, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    """A Transformer block with its norms before attention and MLP."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)
        self.attn = Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, cache=None):
        x = x + self.dropout(self.attn(self.norm1(x), cache))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


class Transformer(nn.Module):
    """Token ids to logits, or, given targets, to the sum of their cross-entropies."""

    def __init__(self, cfg):
        """Builds the model where torch's default device says; on the meta device that costs nothing."""
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.padded_vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm_f = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)
        self.head = nn.Linear(cfg.n_embd, cfg.padded_vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Makes head and embedding one parameter again; whatever replaces parameters (to_empty does) must call it."""
        if self.cfg.tie_embeddings:
            self.head.weight = self.wte.weight

    def forward(self, ids, targets=None, cache=None):
        """Logits (B, T, V) of ids (B, T); or, given targets (B, T), the float32 sum of cross-entropies.

        Targets that equal IGNORE count nothing. With a cache, ids continue what it holds and logits are those of the
        last token alone, (B, 1, V).
        """
        T, start = ids.shape[1], 0 if cache is None else cache.length
        if start + T > self.cfg.block_size:
            raise ValueError(
                f"{start + T} tokens do not fit into block_size {self.cfg.block_size}; shorten the sequence"
            )
        assert start == 0 or T == 1, f"{T} tokens behind a cache of {start}: after the prompt they come one at a time"
        x = self.wte(ids) + self.wpe(torch.arange(start, start + T, device=ids.device))  # B T C
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.layers[i])
        x = self.norm_f(x)
        if targets is not None:
            return linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), self.cfg.vocab_size)
        if cache is not None:
            x = x[:, -1:]
        return self.head(x)[..., : self.cfg.vocab_size]

    @torch.no_grad()
    def init_weights(self, seed):
        """GPT-2's initialisation: normal with std 0.02, projections into the residual stream over sqrt(2 n_layer).

        Each weight is a function of the seed and its own name, so that sharding, or a layer more, changes no other.
        """
        for name, param in self.named_parameters():
            if name.endswith("bias"):
                param.zero_()
            elif "norm" in name:
                param.fill_(1.0)
            else:
                std = 0.02
                if name.endswith(("attn.proj.weight", "mlp.down.weight")):
                    std /= math.sqrt(2 * self.cfg.n_layer)
                key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8])
                generator = torch.Generator().manual_seed(key)  # CPU: the same numbers whatever the device
                rows = self.cfg.vocab_size if name in ("wte.weight", "head.weight") else param.shape[0]
                param.zero_()  # rows that pad the vocabulary stay zero
                param[:rows] = torch.randn(rows, *param.shape[1:], generator=generator).mul_(std)

    def num_params(self):
        """Parameters, without the rows that pad the vocabulary; tied ones count once."""
        padding = (self.cfg.padded_vocab_size - self.cfg.vocab_size) * self.cfg.n_embd
        tables = 1 if self.cfg.tie_embeddings else 2
        return sum(p.numel() for p in self.parameters()) - tables * padding


class Cache:
    """Keys and values of the tokens so far, for generation: one preallocated tensor of block_size tokens a layer."""

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

    def __init__(self, cfg, batch_size, device, dtype):
        shape = (batch_size, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
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


def linear_cross_entropy(hidden, weight, targets, vocab_size):
    """Sum over rows of the cross-entropy of hidden @ weight.T, without ever holding all logits.

    hidden (N, C), weight (padded V, C), targets (N,) with IGNORE for rows that count nothing; the result is a float32
    scalar. Matmuls run in autocast's dtype where it is on, sums in float32. A chunk of rows at a time goes through
    logits, loss and gradient, so that memory is that of one chunk and of the two gradients. torch 2.13's function of
    the same name ignores autocast and was 3.6 times slower than plain cross-entropy on a CPU.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, dtype)
        return _loss_and_gradients(hidden, weight, targets, vocab_size, dtype, with_gradients=False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward, where the logits are at hand: backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, dtype):
        loss, *gradients = _loss_and_gradients(hidden, weight, targets, vocab_size, dtype, with_gradients=True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, scale):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * scale, d_weight * scale, None, None, None


def _loss_and_gradients(hidden, weight, targets, vocab_size, dtype, with_gradients):
    h, w = hidden.detach().to(dtype), weight.detach().to(dtype)
    # A GPU wants larger matmuls than a CPU, whose caches hold 512 rows; both about 100 to 800 MB of logits at V 50304.
    rows = max(512 if h.device.type == "cpu" else 4096, 2**23 // w.shape[0])
    loss = torch.zeros((), device=h.device)
    d_hidden = torch.empty_like(hidden) if with_gradients else None
    d_weight = torch.zeros_like(weight) if with_gradients else None
    for h_chunk, target, out in zip(
        h.split(rows), targets.split(rows), (d_hidden if with_gradients else h).split(rows)
    ):
        valid = (target != IGNORE)[:, None]
        target = target[:, None].where(valid, 0)
        logits = (h_chunk @ w.T).float()  # N V
        logits[:, vocab_size:] = -math.inf
        logits -= logits.amax(1, keepdim=True)
        target_logit = logits.gather(1, target)
        exp = logits.exp_()
        z = exp.sum(1, keepdim=True)
        loss += ((z.log() - target_logit) * valid).sum()
        if with_gradients:
            d_logits = exp.mul_(valid / z)  # softmax, minus 1 at the target, and 0 in rows that count nothing
            d_logits = d_logits.scatter_add_(1, target, -valid.to(exp)).to(dtype)
            out.copy_(d_logits @ w)
            d_weight += d_logits.T @ h_chunk
    return loss, d_hidden, d_weight
