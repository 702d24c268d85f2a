"""The network: a Transformer that is GPT-2 or BERT exactly, or a modern decoder or encoder.

Tensor dimensions, here and everywhere in the project:
    B batch   T tokens of a sequence   N tokens of a batch, B * T   C width (n_embd)   H heads   D width of a head
    V vocabulary   K masked positions of a sequence
"""

import functools  # noqa: I001  (the names of ops on few lines)
import hashlib
import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from config import Config, Count, NotNegative, Positive, Share, UserError
from data import near_divisors
from foreign import LARGEST
from objective import CONTRASTIVE, OBJECTIVES, PAIRS, weights_of
from ops import (
    LayerNorm, Linear, LossOptions, RMSNorm, Vocabulary, attend, can_pack, linear_cross_entropy, linear_together,
    locate, loss_pass, mask_of, residual_dtype, rope_table, rotate,
)  # fmt: skip

# The MLP's activation functions: GPT-2's GELU is the tanh approximation, BERT's and nanoGPT's the exact one. With those
# in GATED, activation(gate(x)) * up(x) takes the place of activation(up(x)).
ACTIVATIONS = {
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "swiglu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}
GATED = {"swiglu"}
TRAINING_ONLY = {"dropout", "label_smoothing", "z_loss"}  # settings that change nothing in evaluation


@dataclass(frozen=True)
class ModelConfig(Config):
    objective: Literal[*OBJECTIVES] | dict = field(default="clm", hash=False)  # clm: next token; mlm: masked ones
    vocab_size: Count | None = None  # number of token ids, without padding; none: the data's
    block_size: Count = 1024  # longest sequence, in tokens
    n_layer: Count = 12  # blocks
    n_head: Count = 12  # attention heads
    n_kv_head: Count | None = None  # heads of keys and values, each shared by a group of queries; none: n_head
    head_dim: Count | None = None  # width of a head; none: n_embd / n_head
    n_embd: Count = 768  # width of the residual stream
    n_inner: Count | None = None  # width of the MLP; none: 4 * n_embd
    mlp: Literal[*ACTIVATIONS] = "gelu_tanh"  # activation; gelu_tanh: GPT-2's, gelu: BERT's, swiglu: Llama's
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # kind of norm
    norm_position: Literal["pre", "post"] = "pre"  # pre: before each sublayer, GPT-2; post: after each sum, BERT
    norm_eps: NotNegative = 1e-5  # epsilon added to the variance in norms
    qk_norm: bool = False  # normalize queries and keys in each head
    window: Count | None = None  # tokens that one sees backwards, itself included, in encoders also ahead; none: all
    global_every: Count | None = None  # every n-th layer sees all tokens despite the window; none: no layer
    position: Literal["learned", "rope"] = "learned"  # learned: an embedding; rope: rotated queries and keys
    rope_theta: Positive = 10_000.0  # base of rope's wavelengths
    rope_scale: Positive = 1.0  # factor by which rope stretches long wavelengths, as Llama 3.1 does; 1: none
    rope_context: Count = 8192  # context before rope_scale extended it, in tokens
    n_token_types: Count | None = None  # token types (segments), 2 in BERT; none: no embedding
    bias: bool = True  # biases in linear layers and norms
    dropout: Share = 0.0  # dropout rate, after the embedding, in attention and after each sublayer
    label_smoothing: Share = 0.0  # share of the target spread over the vocabulary, in training
    z_loss: NotNegative = 0.0  # weight of log(Z)^2 in the loss, in training; PaLM: 1e-4
    tie_embeddings: bool = True  # share the head's weight with the token embedding
    pooling: Literal["mean", "cls"] = "mean"  # a text's embedding, in contrastive and --embed: tokens' mean, or [CLS]'s

    def __post_init__(self):
        super().__post_init__()
        large = [name for name, most in LARGEST.items() if (getattr(self, name) or 0) > most]
        if wrong := [f"{name} is {getattr(self, name)}; it must be at most {LARGEST[name]:,}" for name in large]:
            raise UserError(*wrong)
        if self.head_dim is None and self.n_embd % self.n_head:
            fitting = near_divisors(self.n_embd, self.n_head)
            wrong.append(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; n_head {fitting} would fit")
        elif self.position == "rope" and self.head_width % 2:
            wrong.append(f"head_dim is {self.head_width}; rope rotates pairs of channels, so it must be even")
        if self.n_head % self.kv_heads:
            fitting = f"n_kv_head {near_divisors(self.n_head, self.n_kv_head)} would fit"
            wrong.append(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; {fitting}")
        if self.global_every and not self.window:
            wrong.append(f"global_every is {self.global_every}, but window is none, so all layers are; set --window")
        if (pairs := [*PAIRS.keys() & self.objectives]) and (self.n_token_types or 0) < 2:
            wrong.append(f"n_token_types is {self.n_token_types}, but {pairs[0]} has two kinds of tokens; set it to 2")
        if CONTRASTIVE in self.objectives and not self.dropout:
            wrong.append("dropout is 0, but contrastive compares a text's two outputs under dropout; set it to 0.1")
        if self.pooling == "cls" and self.is_causal:
            wrong.append("pooling is cls, but a causal model's first token sees itself alone; set it to mean")
        if wrong:
            raise UserError(*wrong)

    def build(self):
        """The model with these settings."""
        from heads import PretrainingModel  # here, since it is a Transformer

        return Transformer(self) if len(self.objectives) == 1 else PretrainingModel(self)

    @property
    def objectives(self):
        """{name: weight} of the objectives, clm or mlm first."""
        return weights_of(self.objective)

    @property
    def base(self):
        """The objective that decides which tokens the model sees."""
        return next(iter(self.objectives))

    @property
    def is_causal(self):
        """Whether a token sees earlier ones alone."""
        return OBJECTIVES[self.base].causal  # type: ignore[attr-defined]

    @property
    def passes(self):
        """Times that training computes a sequence: contrastive's two copies, and a masked model's with its masks."""
        reads_masks = not self.is_causal and (self.learns_tokens or PAIRS.keys() & self.objectives)
        return 2 + bool(reads_masks) if CONTRASTIVE in self.objectives else 1

    @property
    def learns_tokens(self):
        """Whether training predicts tokens; contrastive may be alone."""
        return self.objectives[self.base] > 0

    @property
    def is_gated(self):
        """Whether the MLP has a gate."""
        return self.mlp in GATED

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

    def window_of(self, layer):
        """The window of a layer, counted from 0; None where it sees all tokens."""
        return None if self.global_every and (layer + 1) % self.global_every == 0 else self.window

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: vocab_size rounded up to 64, for fast matmuls (50257 becomes 50304)."""
        return -(-self.vocab_size // 64) * 64


def _dropout(cfg):
    return nn.Dropout(cfg.dropout) if cfg.dropout else nn.Identity()


def _norm(cfg, width):
    if cfg.norm == "rmsnorm":
        return RMSNorm(width, eps=cfg.norm_eps)
    return LayerNorm(width, eps=cfg.norm_eps, bias=cfg.bias)


class Attention(nn.Module):
    """Multi-head self-attention, causal or bidirectional, to all tokens or those in a window."""

    def __init__(self, cfg, window=None):
        super().__init__()
        self.head_width, self.causal, self.dropout, self.window = cfg.head_width, cfg.is_causal, cfg.dropout, window
        queries, keys = cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width
        # Separate matrices: a shard of each is whole heads, and Muon sees each one.
        self.q = Linear(cfg.n_embd, queries, bias=cfg.bias)
        self.k = Linear(cfg.n_embd, keys, bias=cfg.bias)
        self.v = Linear(cfg.n_embd, keys, bias=cfg.bias)
        self.q_norm = _norm(cfg, cfg.head_width) if cfg.qk_norm else None
        self.k_norm = _norm(cfg, cfg.head_width) if cfg.qk_norm else None
        self.proj = Linear(queries, cfg.n_embd, bias=cfg.bias)
        self.attend = attend  # context.py's, where ranks share sequences

    def forward(self, x, rope=None, masks=None, cache=None):
        B, T, _ = x.shape
        mask = None if masks is None else masks[self.window]
        q, k, v = self.heads(x, rope)
        if cache is not None:
            k, v = cache(k, v)  # B H S D, S tokens so far, or in the window; a function of Cache.by_layer
        # After the prompt, tokens come one at a time and see everything that the cache returns.
        causal = self.causal and mask is None and (cache is None or T > 1)
        y = self.attend(q, k, v, mask, causal, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # B T C

    def heads(self, x, rope=None):
        """Queries, keys and values (B, H, T, D) for x (B, T, C); keys' and values' heads may be fewer."""
        B, T, _ = x.shape
        # -1 stands for the heads, fewer than cfg.n_head under tensor parallelism.
        q, k, v = (y.view(B, T, -1, self.head_width) for y in linear_together(x, self.q, self.k, self.v))  # B T H D
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B H T D
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return q.type_as(v), k.type_as(v), v  # rope's table is float32


class MLP(nn.Module):
    """The feed-forward network of a block: up, activation, down; with a gate parallel to up in swiglu."""

    def __init__(self, cfg):
        super().__init__()
        self.activation = ACTIVATIONS[cfg.mlp]
        self.gate = Linear(cfg.n_embd, cfg.inner_width, bias=cfg.bias) if cfg.is_gated else None
        self.up = Linear(cfg.n_embd, cfg.inner_width, bias=cfg.bias)
        self.down = Linear(cfg.inner_width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        gate, up = linear_together(x, self.gate, self.up)
        return self.down(self.activation(gate) * up)


class Block(nn.Module):
    """A Transformer block: attention and MLP, each with a norm and a residual connection."""

    def __init__(self, cfg, window=None):
        super().__init__()
        self.pre = cfg.norm_position == "pre"
        self.norm1 = _norm(cfg, cfg.n_embd)
        self.attn = Attention(cfg, window)
        self.norm2 = _norm(cfg, cfg.n_embd)
        self.mlp = MLP(cfg)
        self.dropout = _dropout(cfg)

    def forward(self, x, rope=None, masks=None, cache=None):
        if self.pre:
            x = x + self.dropout(self.attn(self.norm1(x), rope, masks, cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attn(x, rope, masks, cache)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Transform(nn.Module):
    """BERT's layer between the last block and the head."""

    def __init__(self, cfg):
        super().__init__()
        self.dense = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.activation = ACTIVATIONS[cfg.mlp if cfg.mlp.startswith("gelu") else "gelu"]
        self.norm = _norm(cfg, cfg.n_embd)

    def forward(self, x):
        return self.norm(self.activation(self.dense(x)))


class Transformer(nn.Module):
    """Token ids to logits or, with targets, to the sum of their losses."""

    def __init__(self, cfg):
        """Builds the model on torch's default device; on the meta device that costs nothing."""
        super().__init__()
        self.cfg = cfg
        post, masked = cfg.norm_position == "post", not cfg.is_causal
        self.wte = nn.Embedding(cfg.padded_vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.position == "learned" else None
        self.wtt = nn.Embedding(cfg.n_token_types, cfg.n_embd) if cfg.n_token_types else None
        self.norm_e = _norm(cfg, cfg.n_embd) if post else nn.Identity()
        self.dropout = _dropout(cfg)
        windows = [cfg.window_of(layer) for layer in range(cfg.n_layer)]
        self.blocks, self.windows = nn.ModuleList(Block(cfg, window) for window in windows), {*windows}
        self.norm_f = nn.Identity() if post else _norm(cfg, cfg.n_embd)
        self.transform = Transform(cfg) if masked else nn.Identity()
        self.head = Linear(cfg.n_embd, cfg.padded_vocab_size, bias=masked and cfg.bias)
        self.loss_pass = loss_pass  # launch.py compiles this, and run_blocks
        self.copies = None  # (bf16 copies, the blocks' matrices that are cast into them) of launch.keep_copies
        self.pieces = None  # context.py: the pieces of sequences that this rank computes; None: whole ones
        self.graphs = None  # CUDA graphs of training by name; None: kernels are launched one by one
        self.objectives = cfg.objectives  # {name: weight} of the losses in training; a teacher adds its own
        # A model to learn from, no part of this one (interop/teacher.py), and what it predicts of the next targets
        self.teacher = self.teaching = None
        self.tie_weights()

    def tie_weights(self):
        """Makes head and embedding one parameter; call it again after to_empty, which replaces parameters."""
        if self.cfg.tie_embeddings:
            self.head.weight = self.wte.weight

    def forward(
        self, ids, targets=None, positions=None, attention_mask=None, token_types=None, documents=None, cache=None,
        place=None, count_correct=False,
    ):  # fmt: skip
        """Logits (B, T, V) for ids (B, T) or, with targets (B, T), the float32 sum of their losses.

        Targets that equal IGNORE do not count. positions (B, K) selects tokens: logits are then (B, K, V), targets
        (B, K). attention_mask and what follows: see states. With a cache, logits are the last token's alone, (B, 1, V),
        unless positions selects others. count_correct, without gradients, also returns the number of targets that have
        the largest logit.
        """
        x = self.states(ids, attention_mask, token_types, documents, cache, place)
        if cache is not None and positions is None:
            x = x[:, -1:]
        return self.predict(self.selected(x, positions), targets, count_correct)

    def states(self, ids, attention_mask=None, token_types=None, documents=None, cache=None, place=None):
        """The last block's output (B, T, C) for ids (B, T).

        attention_mask (B, T) is False at padding, token_types (B, T) default to 0. documents, the starts of ops.locate,
        are computed as if each were a sequence of its own. With a cache, ids continue its tokens, and attention_mask
        covers all tokens so far. With place, ids (B, 1) stand at that position, (1,), or each at its own, (B, 1), in
        kernels that do not depend on it, so that a CUDA graph may repeat them; the caller keeps place below the cache's
        capacity.
        """
        cfg, shape, T, masks, queries = self.cfg, ids.shape, ids.shape[1], None, None  # queries: places; None: all
        caches = None if cache is None else cache.by_layer(place)
        if place is not None:
            assert T == 1 and attention_mask is None, "at a given place there is one token, which sees all before it"
            masks = {window: cache.mask(place, window) for window in self.windows}
        else:
            start = 0 if cache is None else cache.length
            if start + T > cfg.block_size:
                raise UserError(f"{start + T} tokens do not fit into block_size {cfg.block_size}; shorten the sequence")
            assert start == 0 or T == 1, f"{T} tokens behind a cache of {start}: after a prompt they come one at a time"
            place = torch.arange(start, start + T, device=ids.device)
        if self.pieces is not None:
            shape, place = self.pieces.whole(shape), (queries := self.pieces.places(T, ids.device))
        if documents is not None:
            assert cache is None, "documents are for whole sequences, a cache is for one document"
            documents = documents, *locate(documents, shape)
            place = documents[-1] if queries is None else documents[-1][:, queries]  # B T
        x = self.embed(ids, place, token_types)  # B T C
        rope = None
        if self.wpe is None:
            rope = rope_table(place[..., None, :], cfg.head_width, cfg.rope_theta, cfg.rope_scale, cfg.rope_context)
        if masks is None:  # one of each kind for all layers
            packed = queries is None and can_pack(x, cfg.head_width, cfg.dropout if self.training else 0.0)
            given = documents, attention_mask, packed, queries
            masks = {window: mask_of(x, shape, cfg.is_causal, window, *given) for window in self.windows}
        return self.run_blocks(x, rope, masks, caches)

    def selected(self, x, positions=None):
        """The last norm's output for the last block's: of all tokens, or of those at positions (B, K)."""
        if positions is not None:
            # An embedding: unlike a gather's, its gradient repeats bitwise and never waits for the device.
            first = x.shape[1] * torch.arange(len(x), device=x.device)[:, None]  # B 1
            x = F.embedding(first + positions, x.flatten(0, 1))  # B K C
        return self.norm_f(x)

    def predict(self, x, targets=None, count_correct=False):
        """forward's answer for the last norm's output (B, T or K, C)."""
        x = self.transform(x)
        if targets is None:
            return self.head(x)[..., : self.cfg.vocab_size]
        weight, bias, vocabulary = self.head_of_vocabulary()
        options = LossOptions.of(self.cfg) if self.training else LossOptions(), count_correct, self.loss_pass
        args = x.flatten(0, 1), weight, targets.flatten(), vocabulary, bias, *options
        return linear_cross_entropy(*args, teaching=self.teaching)

    def head_of_vocabulary(self):
        """Weight and bias of the head, and their Vocabulary; tensor parallelism replaces it by a shard's."""
        return self.head.weight, self.head.bias, Vocabulary(self.cfg.vocab_size)

    def embed(self, ids, place, token_types=None):
        """The first block's input (B, T, C): the sum of the embeddings of tokens, positions and token types."""
        x = self.wte(ids)
        if self.wpe is not None:
            x = x + self.wpe(place)
        if self.wtt is not None:
            x = x + self.wtt(torch.zeros_like(ids) if token_types is None else token_types)
        return self.dropout(self.norm_e(x).to(residual_dtype(x)))

    def run_blocks(self, x, rope=None, masks=None, caches=None):
        """The last block's output (B, T, C) for the first one's input; masks: {window: mask}."""
        for block, cache in zip(self.blocks, caches or itertools.repeat(None)):
            x = block(x, rope, masks, cache)
        return x

    @torch.no_grad()
    def init_weights(self, seed, fill=torch.Tensor.copy_):
        """Draws normal weights, std 0.02; pre-norm models divide residual projections' by sqrt(2 n_layer), as GPT-2.

        A weight is a function of the seed and its own name, so that sharding, or an added layer, changes no other.
        fill(param, weight) copies the whole weight, on the CPU, into the parameter.
        """
        for name, param in self.named_parameters():
            if name.endswith(("bias", "lora_b")):  # an adapter adds nothing at first
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
                weight = torch.zeros(param.shape)  # padding rows stay zero
                weight[:rows] = torch.randn(rows, *param.shape[1:], generator=generator).mul_(std)
            fill(param, weight)

    def num_params(self):
        """Parameters, without the vocabulary's padding rows; tied ones count once."""
        padding = self.cfg.padded_vocab_size - self.cfg.vocab_size
        sizes = {name: (p.numel(), p.numel() // len(p)) for name, p in self.named_parameters()}  # of all rows, of one
        tables = [sizes[name][1] for name in ("wte.weight", "head.weight", "head.bias") if name in sizes]
        return sum(size for size, _ in sizes.values()) - padding * sum(tables)


def parameter_shapes(cfg):
    """{name: shape} of a model's parameters, without allocating them; a tied head is not among them."""
    with torch.device("meta"):
        return {name: list(param.shape) for name, param in cfg.build().named_parameters()}
