"""Operations of the network, written out where torch's are slow or inexact: norms, linear, rope, attention, loss.

Tensor dimensions are those of model.py's legend.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

IGNORE = -100  # target of a row without loss
BY_MATMULS = 512  # longest sequence for which a CPU in bf16 trains attention by matmuls


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with weights cast to the input's dtype, which autocast on a CPU does not do (torch 2.13)."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.type_as(x), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm with the same cast."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class Linear(nn.Linear):
    """nn.Linear that on a CPU in bf16 multiplies generation's few rows as weight @ x, twice as fast (torch 2.13)."""

    def forward(self, x):
        few_rows = 0 < x.numel() <= 16 * x.shape[-1]
        if few_rows and self.weight.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled():
            rows = x.reshape(-1, x.shape[-1])
            y = self.weight @ rows[0] if len(rows) == 1 else (self.weight @ rows.T).T
            y = y.view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


def rope_table(positions, head_dim, theta, scale=1.0, context=None):
    """Cosines and sines (T, D) of rotary embeddings at positions (T,), signed as rotate wants; arXiv 2104.09864.

    With a scale, frequencies of less than one turn in a context are divided by it, those of 4 turns and more stay, and
    those between are interpolated: Llama 3.1's way to longer contexts (arXiv 2407.21783).
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    if scale != 1:
        unscaled = ((context * frequencies / (2 * math.pi) - 1) / 3).clamp(0, 1)
        frequencies = frequencies * (unscaled + (1 - unscaled) / scale)
    angles = positions[:, None] * frequencies  # T D/2
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def rotate(x, rope):
    """x (B, H, T, D) rotated by its positions' angles; channels i and i + D / 2 are a pair, as in Llama."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


def attend(q, k, v, mask=None, causal=False, dropout=0.0):
    """softmax(q k' / sqrt(D)) v for q (B, H, T, D) and k, v (B, H, S, D); k and v may have fewer heads, which repeat.

    mask (B, 1, 1 or T, S) is True where a query may look. This is torch's kernel, except for training on a CPU in bf16
    with sequences up to BY_MATMULS: there the kernel takes 1.7 to 5 times as long as matmuls, gradients included (torch
    2.13). The matmuls round scores to bf16, which the kernel does not.
    """
    (B, H, T, D), S = q.shape, k.shape[2]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or S > BY_MATMULS or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=k.shape[1] != H)
    q, k, v = (x[:, :, None].expand(-1, -1, H // x.shape[1], -1, -1).flatten(0, 2) for x in (q, k, v))  # B*H S D
    mask = torch.ones(T, S, dtype=torch.bool).tril() if causal else mask
    # finfo.min, not -inf: a fully masked row would be NaN.
    bias = q.new_zeros(1) if mask is None else q.new_zeros(1).where(mask, torch.finfo(q.dtype).min)
    bias = bias.expand(B, H, -1, -1).flatten(0, 1) if bias.dim() == 4 else bias
    weights = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(-1)
    return (F.dropout(weights, dropout) @ v).view(B, H, T, D)


# ---- the loss


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that columns of logits stand for: all of them or, under tensor parallelism, one shard."""

    size: int  # tokens of the whole vocabulary, without padding
    first: int = 0  # token of the first column
    reduce: Callable = lambda tensor, op: tensor  # "sum", "max" or "min" of a tensor over all shards

    def n_tokens(self, n_columns):
        """Columns that are tokens; the rest are padding."""
        return max(0, min(n_columns, self.size - self.first))


def chunk_loss(logits, targets, vocabulary, cfg=None, with_gradient=True):
    """Sum of a few rows' losses, and its gradient with respect to their logits: a term of the loss is added here.

    logits (N, V), float32, are overwritten; padding is -inf. targets (N, 1), IGNORE in rows without loss. cfg: the
    ModelConfig, whose label_smoothing and z_loss apply; None, as in evaluation: plain cross-entropy. What a row sums
    or compares over its columns, reduce must combine over shards. The gradient is (N, V), or None.
    """
    smoothing, z_loss = (cfg.label_smoothing, cfg.z_loss) if cfg else (0.0, 0.0)
    reduce, n_tokens = vocabulary.reduce, vocabulary.n_tokens(logits.shape[1])
    valid, column = targets != IGNORE, targets - vocabulary.first
    here = valid & (0 <= column) & (column < logits.shape[1])  # the target is in this shard
    column = column.where(here, 0)

    largest = reduce(logits.amax(1, keepdim=True), "max")  # N 1
    logits -= largest
    wanted = reduce(logits.gather(1, column).where(here, 0), "sum")
    if smoothing:
        mean = reduce(logits[:, :n_tokens].sum(1, keepdim=True), "sum") / vocabulary.size
        wanted = wanted.lerp(mean, smoothing)
    exp = logits.exp_()
    sum_exp = reduce(exp.sum(1, keepdim=True), "sum")
    losses, d_log_z = sum_exp.log() - wanted, 1.0  # N 1, and their derivative by log Z
    if z_loss:  # PaLM's z_loss * (log Z)^2 keeps logits from drifting; arXiv 2204.02311, section 5
        log_z = sum_exp.log() + largest
        losses, d_log_z = losses + z_loss * log_z.square(), 1.0 + 2 * z_loss * log_z
    loss = (losses * valid).sum()
    if not with_gradient:
        return loss, None

    d_logits = exp.mul_(valid * d_log_z / sum_exp)  # the derivative of log Z is softmax
    d_logits.scatter_add_(1, column, here * (smoothing - 1.0))
    if smoothing:
        d_logits[:, :n_tokens] -= valid * (smoothing / vocabulary.size)
    return loss, d_logits


def count_correct_targets(logits, targets, vocabulary):
    """Number of rows (N, V) whose target (N, 1) has the largest logit, the first if several do."""
    column = logits.argmax(1, keepdim=True)
    largest = logits.gather(1, column)
    is_here = largest == vocabulary.reduce(largest.clone(), "max")
    likeliest = vocabulary.reduce((column + vocabulary.first).where(is_here, vocabulary.size), "min")
    return ((likeliest == targets) & (targets != IGNORE)).sum()


def linear_cross_entropy(hidden, weight, targets, vocabulary, bias=None, cfg=None, count_correct=False):
    """chunk_loss of hidden @ weight.T + bias summed over chunks of rows, without ever holding all logits.

    hidden (N, C), weight (padded V, C), bias (padded V,), targets (N,); the result is a float32 scalar, and with
    count_correct, which has no gradients, also the number of correct targets. Where weight and bias are one shard of
    the vocabulary, hidden and the results are the same on all. Matmuls run in autocast's dtype where it is on, sums in
    float32. torch 2.13's own ignores autocast and took 3.6 times plain cross-entropy's time on a CPU.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        args = hidden, weight, bias, targets, vocabulary, cfg, dtype
        if torch.is_grad_enabled():
            assert not count_correct, "targets are counted in evaluation, without gradients"
            return _LinearCrossEntropy.apply(*args)
        loss, n_correct, *_ = _loss_and_gradients(*args, with_gradients=False)
        return (loss, n_correct) if count_correct else loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients, while the logits are at hand; backward only scales them, in place, so once."""

    @staticmethod
    def forward(ctx, *args):
        loss, _, *gradients = _loss_and_gradients(*args, with_gradients=True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, scale):
        return *(g if g is None else g.mul_(scale) for g in ctx.saved_tensors), None, None, None, None


def loss_chunks(V, device_type):
    """(rows of a chunk, rows that chunk_loss takes at a time, columns whose gradients are added at a time).

    On a CPU the first bounds memory, 50 MB in bf16 at V 50304; the others bound what is copied and must stay in cache.
    """
    if device_type == "cpu":
        return max(512, 2**23 // V), max(1, 2**20 // V), 4096
    return max(4096, 2**23 // V), max(4096, 2**23 // V), V


def _loss_and_gradients(hidden, weight, bias, targets, vocabulary, cfg, dtype, with_gradients):
    """The loss; without gradients the number of correct targets; with them those of hidden, weight and bias."""
    h, w = hidden.detach().to(dtype), weight.detach().to(dtype)
    rows, few_rows, columns = loss_chunks(len(w), h.device.type)
    loss, n_correct = torch.zeros((), device=h.device), torch.zeros((), device=h.device)
    d_hidden, d_weight, d_bias = None, None, None
    if with_gradients:
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
    buffer = h.new_empty(min(rows, len(h)), len(w))  # one for all chunks
    for start in range(0, len(h), rows):
        h_chunk, target = h[start : start + rows], targets[start : start + rows, None]
        logits = torch.mm(h_chunk, w.T, out=buffer[: len(h_chunk)])  # N V
        for few_logits, few_targets in zip(logits.split(few_rows), target.split(few_rows)):
            x = few_logits.float()
            if bias is not None:
                x += bias.detach()
            x[:, vocabulary.n_tokens(len(w)) :] = -math.inf
            if not with_gradients:
                n_correct = n_correct + count_correct_targets(x, few_targets, vocabulary)
            few_loss, d_logits = chunk_loss(x, few_targets, vocabulary, cfg, with_gradients)
            loss = loss + few_loss  # not in place: compiled by torch 2.11, gradients would be zero
            if with_gradients:
                few_logits.copy_(d_logits)
                if bias is not None:
                    d_bias += d_logits.sum(0)
        if with_gradients:
            d_hidden[start : start + rows] = logits @ w  # logits holds their gradients now
            for d_part, part in zip(d_weight.split(columns), logits.split(columns, dim=1)):
                d_part += part.T @ h_chunk
    if with_gradients:
        d_hidden = vocabulary.reduce(d_hidden, "sum")
    return loss, n_correct, d_hidden, d_weight, d_bias
