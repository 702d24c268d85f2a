"""Operations of the network, where torch is slow or lacks one: norms, linear layers, rope, attention, the loss.

model.py has the legend of tensor dimensions.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from distill import taught_loss

IGNORE = -100  # target that takes no part in the loss
BY_MATMULS = 512  # tokens up to which a CPU in bf16 trains attention by matmuls
# torch 2.11's varlen_attn lets groups of queries share keys and values unasked.
SHARED_HEADS = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}


def residual_dtype(x):
    """The dtype of the residual stream, in which norms and sublayers add up: bf16 under its autocast, else x's own.

    fp16's range is too small for a sum over all layers.
    """
    device = x.device.type
    autocast_to_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return torch.bfloat16 if autocast_to_bf16 else x.dtype


def matmul_dtype(x):
    """The dtype of matmuls with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that returns x's dtype, where autocast on CUDA returns float32; statistics are float32."""

    def forward(self, x):
        return super().forward(x).type_as(x)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm that computes in its weight's dtype, as torch wants it, and returns x's."""

    def forward(self, x):
        return super().forward(x.type_as(self.weight)).type_as(x)


class Linear(nn.Linear):
    """nn.Linear; in bf16 on a CPU it multiplies generation's few rows transposed, twice as fast (torch 2.13).

    Training multiplies by a copy of the weight, where launch.keep_copies has made one.
    """

    copy: torch.Tensor | None = None

    def matrix(self):
        """The weight, or its copy in training."""
        return self.copy if self.copy is not None and torch.is_grad_enabled() else self.weight

    def forward(self, x):
        few_rows = 0 < x.numel() <= 16 * x.shape[-1] and type(self.weight) is nn.Parameter  # not torchao's
        if few_rows and self.weight.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled():
            rows = x.reshape(-1, x.shape[-1])
            y = self.weight @ rows[0] if len(rows) == 1 else (self.weight @ rows.T).T
            y = y.view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.matrix(), self.bias)


def linear_together(x, *layers, stacked=None):
    """The outputs of linear layers with one input, by one matmul with their stacked weights or by one each.

    stacked None: for training on CUDA; on a CPU it takes up to 1.1 times as long (torch 2.13).
    """
    if stacked is None:
        # Tensor parallelism has DTensors, and an adapter adds to its layer's output.
        are_whole = all(type(layer) is Linear and type(layer.weight) is nn.Parameter for layer in layers)
        stacked = x.is_cuda and torch.is_grad_enabled() and are_whole
    if not stacked:
        return [layer(x) for layer in layers]
    weights = [layer.matrix() for layer in layers]
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(x, torch.cat(weights), bias).split([len(w) for w in weights], dim=-1)


def rope_table(positions, head_dim, theta, scale=1.0, context=None):
    """Cosines and signed sines (..., T, D) for rotate, at positions (..., T); arXiv 2104.09864."""
    angles = positions[..., None] * frequencies_of(head_dim, theta, scale, context, positions.device)  # ... T D/2
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def frequencies_of(head_dim, theta, scale=1.0, context=None, device=None):
    """Angles per position (D/2,) of rope's pairs of channels.

    scale divides the frequencies that turn less than once in a context, leaves those that turn 4 times and more, and
    interpolates between: Llama 3.1's extension of the context (arXiv 2407.21783).
    """
    # Rounded as transformers rounds them: at position 8,192 another order of operations changes angles by 1e-3.
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device) / head_dim)
    if scale != 1:
        left = (context / (2 * math.pi / frequencies) - 1) / 3
        between = (1 - left) * frequencies / scale + left * frequencies
        frequencies = between.where(left < 1, frequencies).where(left > 0, frequencies / scale)
    return frequencies


def rotate(x, rope):
    """Rotates x (B, H, T, D) by its positions' angles; channels i and i + D / 2 form a pair, as in Llama."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


# ---- attention


class Packed(NamedTuple):
    """Documents and a window, for a kernel that computes nothing of what they hide; it stands in place of a mask."""

    starts: torch.Tensor  # (M + 1,) int32: see locate
    before: int  # tokens before itself that a query sees; -1: all of its document
    after: int  # the same after itself


def locate(starts, shape):
    """(number of the document, place in it) of each token in a batch of this shape (B, T), both (B, T).

    starts (M + 1,), int32, ascending, are the first tokens of documents among B * T; a row begins one, too. The last
    ones are B * T, which begins none, so that batches with fewer documents have the same shape.
    """
    at = torch.arange(shape.numel(), dtype=starts.dtype, device=starts.device)
    document = torch.searchsorted(starts, at, right=True) - 1
    return document.view(shape), (at - starts[document]).view(shape)


def mask_of(x, shape, causal, window=None, documents=None, attention_mask=None, packed=False, queries=None):
    """The mask that attend takes for a batch of shape (B, T); None where tokens see all others, or all earlier ones.

    A token sees itself, and of its own document those at most window - 1 tokens before it, unless causal also after it.
    documents: (starts, number of each token's document); attention_mask (B, T): False at padding. packed: the answer
    may be a Packed. queries: places of the tokens that look; None: all. x: the first block's input, for its device and
    dtype.
    """
    B, T = shape
    if attention_mask is not None and T == 1:
        attention_mask = attention_mask[:, -(window or 0) :]  # a windowed layer's Cache returns no more keys
    window = None if window is None or window >= T else window
    if attention_mask is None and window is None and documents is None:
        return None
    if packed and attention_mask is None:
        starts = documents[0] if documents else torch.arange(0, B * T + 1, T, dtype=torch.int32, device=x.device)
        before = -1 if window is None else window - 1
        return Packed(starts, before, 0 if causal else before)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=x.device)
    if attention_mask is not None:
        seen = attention_mask.bool()[:, None, None, :]  # B 1 1 T
    place = torch.arange(T, device=x.device)
    queries = place if queries is None else queries
    if causal:
        seen = seen & (place <= queries[:, None])
    if window is not None:
        seen = seen & ((place - queries[:, None]).abs() < window)
    if documents is None and window is None:
        return seen
    if documents is not None:
        document = documents[1][:, None]  # B 1 T
        seen = seen & (document[:, :, queries, None] == document[:, :, None])  # B 1 T T
    # Numbers to add to scores: torch would make them of a boolean mask in each layer, and keep them for backward.
    dtype = matmul_dtype(x)
    return torch.zeros((), dtype=dtype, device=x.device).where(seen, torch.finfo(dtype).min)


def can_pack(x, head_width, dropout):
    """Whether torch's kernel for Packed takes heads of this width: flash attention, in half precision on CUDA."""
    if x.device.type != "cuda" or dropout or matmul_dtype(x).itemsize != 2:
        return False
    return head_width % 8 == 0 and head_width <= 256 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def attend(q, k, v, mask=None, causal=False, dropout=0.0):
    """softmax(q k' / sqrt(D)) v for q (B, H, T, D), k and v (B, H, S, D), or fewer heads, shared by groups of queries.

    mask (B, 1, 1 or T, S) is True where a query may look, or is added to the scores, or is a Packed. Uses torch's
    kernels, except for training on a CPU in bf16 with sequences up to BY_MATMULS, where they take, gradients included,
    1.7 to 5 times as long as matmuls do (torch 2.13). Matmuls round the scores to bf16, which the kernels do not.
    """
    (B, H, T, D), S = q.shape, k.shape[2]
    if isinstance(mask, Packed):
        return _attend_packed(q, k, v, mask)
    if T == 1 and mask is not None and k.shape[1] != H:
        # A group's queries stand as tokens: torch's memory-efficient kernel, which takes masks, knows no groups.
        y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, D), k, v, mask, dropout)
        return y.view(B, H, T, D)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or S > BY_MATMULS or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=k.shape[1] != H)
    q, k, v = (x[:, :, None].expand(-1, -1, H // x.shape[1], -1, -1).flatten(0, 2) for x in (q, k, v))  # B*H S D
    mask = torch.ones(T, S, dtype=torch.bool).tril() if causal else mask
    # finfo.min, not -inf: a fully masked row would be NaN.
    if mask is None or mask.dtype == torch.bool:
        mask = q.new_zeros(1) if mask is None else q.new_zeros(1).where(mask, torch.finfo(q.dtype).min)
    bias = mask
    bias = bias.expand(B, H, -1, -1).flatten(0, 1) if bias.dim() == 4 else bias
    weights = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(-1)
    return (F.dropout(weights, dropout) @ v).view(B, H, T, D)


def _attend_packed(q, k, v, mask):
    """attend's by flash attention over all tokens of a batch as one row; it has no dropout."""
    from torch.nn.attention.varlen import varlen_attn  # here, since it imports the compiler

    B, H, T, D = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # N H D
    size = {"window_size": (mask.before, mask.after), **SHARED_HEADS}
    return varlen_attn(q, k, v, mask.starts, mask.starts, T, T, **size).view(B, T, H, D).transpose(1, 2)


# ---- the loss


@dataclass(frozen=True)
class LossOptions:
    """Terms that training adds to the cross-entropy."""

    label_smoothing: float = 0.0  # share of the target spread over the whole vocabulary
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5)

    @classmethod
    def of(cls, cfg):
        """The options that a ModelConfig has under the same names."""
        return cls(**{field.name: getattr(cfg, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Vocabulary:
    """A shard of the vocabulary, or all of it: the token ids that the columns of logits stand for."""

    size: int  # token ids of the whole vocabulary; further columns are padding
    first: int = 0  # token id of the shard's first column
    reduce: Callable = lambda tensor, op: tensor  # reduces a tensor in place over all shards by "sum", "max" or "min"

    def ids_in(self, n_columns):
        """How many of the shard's columns stand for token ids; the others are padding."""
        return max(0, min(n_columns, self.size - self.first))


def chunk_loss(logits, targets, vocabulary, options, with_gradients):
    """The loss of a few tokens, its gradient and the correct predictions: the one place to add a term of the loss.

    logits (N, V), float32, cover one shard of the vocabulary and are overwritten. targets (N, 1) are IGNORE for tokens
    without loss. A value that depends on a token's logits of all shards must go through vocabulary.reduce. Returns the
    sum of losses, the number of correct predictions (0 with gradients) and d loss / d logits (N, V), or None without.
    """
    reduce, n_ids = vocabulary.reduce, vocabulary.ids_in(logits.shape[1])
    valid, column = targets != IGNORE, targets - vocabulary.first
    here = valid & (0 <= column) & (column < logits.shape[1])  # this shard has the target
    column = column.where(here, 0)
    logits[:, n_ids:] = -math.inf
    largest = reduce(logits.amax(1, keepdim=True), "max")
    logits -= largest  # from here on, logits are relative to the token's largest
    wanted = reduce(logits.gather(1, column).where(here, 0), "sum")
    if options.label_smoothing:
        mean = reduce(logits[:, :n_ids].sum(1, keepdim=True), "sum") / vocabulary.size
        wanted = wanted.lerp(mean, options.label_smoothing)
    n_correct = torch.zeros((), device=logits.device)
    if not with_gradients:
        likeliest = logits.argmax(1, keepdim=True)  # the first of several
        has_largest = logits.gather(1, likeliest) == 0
        likeliest = reduce((likeliest + vocabulary.first).where(has_largest, vocabulary.size), "min")
        n_correct = ((likeliest == targets) & valid).sum()
    exp = logits.exp_()
    sum_exp = reduce(exp.sum(1, keepdim=True), "sum")
    loss, d_log_Z = sum_exp.log() - wanted, valid  # d_log_Z: d loss / d log Z
    if options.z_loss:
        log_Z = sum_exp.log() + largest
        loss = loss + options.z_loss * log_Z.square()
        d_log_Z = valid * (1 + 2 * options.z_loss * log_Z)
    loss = (loss * valid).sum()
    if not with_gradients:
        return loss, n_correct, None
    # d log(Z) / d logits is the softmax; the target has -1, or what label smoothing leaves of it.
    d_logits = exp.mul_(d_log_Z / sum_exp)
    d_logits = _add_at(d_logits, column, here * (options.label_smoothing - 1.0))
    if options.label_smoothing:
        d_logits[:, :n_ids] -= valid * (options.label_smoothing / vocabulary.size)
    return loss, n_correct, d_logits


def _add_at(x, column, value):
    """x (N, V) with value (N, 1) added in each row's column (N, 1)."""
    if torch.compiler.is_compiling():  # a scatter would not be fused with what computes x
        return x + value.where(torch.arange(x.shape[1], device=x.device) == column, 0.0)
    return x.scatter_add_(1, column, value)


def loss_pass(logits, bias, targets, vocabulary, options, with_gradients, taught=None):
    """chunk_loss of logits (N, V) in the dtype of matmuls, without their bias; the gradients overwrite the logits.

    Returns the sum of losses and the number of correct predictions. Compiled, it keeps float32 values in registers.
    taught, of Teaching.of, adds the teacher's loss: the sum is then (2,), the gradient that of both by their shares.
    """
    x = logits.float() if bias is None else logits.float() + bias
    distilled = None if taught is None else taught_loss(x, taught, targets != IGNORE, vocabulary)
    loss, n_correct, d_logits = chunk_loss(x, targets, vocabulary, options, with_gradients)
    if distilled is not None:
        kl, d_kl, share = distilled
        loss, d_logits = torch.stack([loss, kl]), d_logits.lerp(d_kl, share)
    if with_gradients:
        logits.copy_(d_logits)
    return loss, n_correct


def linear_cross_entropy(
    hidden, weight, targets, vocabulary, bias=None, options=LossOptions(), count_correct=False, loss_pass=loss_pass,
    teaching=None,
):  # fmt: skip
    """Sum over tokens of the loss of logits hidden @ weight.T + bias, without ever holding all logits.

    hidden (N, C), weight (V, C) and bias (V,), of the padded vocabulary or a shard of it; targets (N,) with IGNORE for
    tokens that do not count. Returns a float32 scalar; with count_correct, which has no gradients, also the number of
    tokens whose target has the largest logit. Matmuls run in autocast's dtype where it is on, sums in float32.
    loss_pass: the function of that name, or what torch.compile made of it. With teaching, a Teaching, which needs
    gradients, returns (2,), the loss and the teacher's, for the caller to add by their shares.

    Logits, loss and gradients are computed for a chunk of tokens at a time, so that memory is one chunk's and the
    gradients'. torch 2.13's function of this name ignores autocast and is 3.6 times slower than plain cross-entropy on
    a CPU.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        args = hidden, weight, bias, targets, vocabulary, options, dtype, loss_pass, teaching
        if torch.is_grad_enabled():
            assert not count_correct, "targets are counted in evaluation, without gradients"
            return _LinearCrossEntropy.apply(*args)
        loss, n_correct, *_ = _sum_of_chunks(*args, with_gradients=False)
        return (loss, n_correct) if count_correct else loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too, while it has the logits; backward scales them in place, so it runs once."""

    @staticmethod
    def forward(ctx, *args):
        loss, _, *gradients = _sum_of_chunks(*args, with_gradients=True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, scale):
        scale = scale.sum()  # with a teacher's loss, shares of one scale
        return *(g if g is None else g.mul_(scale) for g in ctx.saved_tensors), *[None] * 6


def _sum_of_chunks(hidden, weight, bias, targets, vocabulary, options, dtype, loss_pass, teaching, with_gradients):
    """(loss, correct predictions, d_hidden, d_weight, d_bias) of all tokens; gradients are None where not wanted."""
    h, w, b = hidden.detach().to(dtype), weight.detach().to(dtype), None if bias is None else bias.detach()
    chunk, few, columns = loss_chunks(len(w), h.device.type)
    loss, n_correct = torch.zeros((), device=h.device), torch.zeros((), device=h.device)
    d_hidden = torch.empty_like(hidden) if with_gradients else None
    d_weight = torch.zeros_like(weight) if with_gradients else None
    d_bias = torch.zeros_like(bias) if with_gradients and bias is not None else None
    buffer = h.new_empty(min(chunk, len(h)), len(w))  # one for all chunks
    if teaching is not None:
        teaching, their_buffer = teaching.shard(vocabulary, len(w), dtype), torch.empty_like(buffer)
    for start in range(0, len(h), chunk):
        h_chunk, target = h[start : start + chunk], targets[start : start + chunk, None]
        logits, taught = torch.mm(h_chunk, w.T, out=buffer[: len(h_chunk)]), itertools.repeat(())  # N V
        if teaching is not None:
            their_chunk = teaching.hidden[start : start + chunk]
            theirs = torch.mm(their_chunk, teaching.weight.T, out=their_buffer[: len(h_chunk)])
            taught = ((teaching.of(few_theirs),) for few_theirs in theirs.split(few))
        for few_logits, few_targets, more in zip(logits.split(few), target.split(few), taught):
            few_loss, few_correct = loss_pass(few_logits, b, few_targets, vocabulary, options, with_gradients, *more)
            # Not in place: compiled by torch 2.11, the gradients would be zero (pytorch/pytorch#180642).
            loss, n_correct = loss + few_loss, n_correct + few_correct
        if with_gradients:
            d_hidden[start : start + chunk] = logits @ w  # the buffer now holds the logits' gradients
            for d_part, part in zip(d_weight.split(columns), logits.split(columns, dim=1)):
                d_part += part.T @ h_chunk
            if bias is not None:
                d_bias += logits.sum(0, dtype=d_bias.dtype)
    if with_gradients:
        d_hidden = vocabulary.reduce(d_hidden, "sum")
    return loss, n_correct, d_hidden, d_weight, d_bias


def loss_chunks(V, device_type):
    """(tokens of a chunk of logits, tokens per pass over it, columns per sum of gradients).

    On a CPU the first bounds memory, 50 MB in bf16 at V 50304, and the others what a pass copies and must cache.
    """
    if device_type == "cpu":
        return max(512, 2**23 // V), max(1, 2**20 // V), 4096
    return max(4096, 2**23 // V), max(4096, 2**23 // V), V
