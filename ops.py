"""Operations of the network, with what torch is slow or inexact at: norms, linear layers, rope, attention, loss.

Tensor dimensions are those of model.py's legend.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

IGNORE = -100  # target that takes no part in the loss
BY_MATMULS = 512  # tokens up to which a CPU in bf16 trains attention by matmuls


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
