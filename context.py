"""Context parallelism: ranks share sequences, each with two pieces of every one, and exchange keys and values.

A sequence of 2n pieces gives rank r of n the pieces r and 2n - 1 - r, so that causal attention costs all ranks the
same. Every rank has the keys and values of the whole sequence while it computes a layer's attention.
"""

import torch
import torch.distributed as dist

from ops import IGNORE, attend

# torch 2.13's names for the same two
gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Context:
    """A rank's place among n ranks that share sequences."""

    def __init__(self, rank, n, group=None):
        self.n, self.group, self.masks = n, group, {}
        self.mine = [rank, 2 * n - 1 - rank]  # numbers of this rank's pieces
        order = [piece for r in range(n) for piece in (r, 2 * n - 1 - r)]  # in which ranks have them
        self.order = sorted(range(2 * n), key=order.__getitem__)

    @classmethod
    def of(cls, world):
        """The Context of this rank of a World."""
        return cls(world.rank_in_stage // world.tp % world.cp, world.cp, world.cp_group)

    def places(self, T, device=None):
        """Places (T,) of this rank's tokens in sequences of n T tokens."""
        size = T // 2
        return torch.cat([torch.arange(size, device=device) + size * piece for piece in self.mine])

    def whole(self, shape):
        """The shape (B, n T) of whole sequences whose part has the shape (B, T)."""
        return torch.Size([shape[0], self.n * shape[1]])

    def cut(self, x):
        """This rank's tokens (B, T) of whole sequences (B, n T)."""
        return None if x is None else x.unflatten(1, (2 * self.n, -1))[:, self.mine].flatten(1)

    def part_of(self, ids, targets, positions=None, attention_mask=None, token_types=None, documents=None):
        """This rank's part of a batch: its tokens, their targets; attention_mask and documents stay whole.

        It keeps the positions (B, K) of its tokens, as places among them, in as few columns as they need.
        """
        if positions is None:
            return self.cut(ids), self.cut(targets), None, attention_mask, self.cut(token_types), documents
        T = ids.shape[1] // self.n
        place_of = torch.full((self.n * T,), T)  # T: on another rank
        place_of[self.places(T)] = torch.arange(T)
        local = place_of[positions]
        is_mine = (local < T) & (targets != IGNORE)
        first = is_mine.int().argsort(dim=1, descending=True, stable=True)
        first = first[:, : min(positions.shape[1], -(-max(1, int(is_mine.sum(1).max())) // 8) * 8)]
        targets = targets.where(is_mine, IGNORE).gather(1, first)
        local = local.where(is_mine, 0).gather(1, first)
        return self.cut(ids), targets, local, attention_mask, self.cut(token_types), documents

    def attend(self, q, k, v, mask=None, causal=False, dropout=0.0):
        """ops.attend for this rank's queries (B, H, T, D) and all ranks' keys and values, of which it has (B, H, T, D)."""
        pieces = _Gathered.apply(torch.cat([k, v], 1), self.n, self.group).chunk(2 * self.n, dim=2)
        k, v = torch.cat([pieces[i] for i in self.order], dim=2).chunk(2, dim=1)  # B H nT D
        if mask is not None or not causal:
            return attend(q, k, v, mask, False, dropout)
        size, outputs = q.shape[2] // 2, []
        for piece, queries in zip(self.mine, q.chunk(2, dim=2)):
            seen = size * (piece + 1)
            mask = self._causal_mask(q, size, seen)
            outputs.append(attend(queries, k[:, :, :seen], v[:, :, :seen], mask, False, dropout))
        return torch.cat(outputs, dim=2)

    def _causal_mask(self, q, size, seen):
        """The mask (size, seen) of the last `size` of `seen` tokens, each of which sees itself and those before it."""
        if q.is_cuda:  # it has kernels for that, and makes no mask
            from torch.nn.attention.bias import causal_lower_right  # here, since it imports the compiler

            return causal_lower_right(size, seen)
        key = size, seen, q.dtype
        if key not in self.masks:  # one for all layers and steps
            hidden = torch.ones(size, seen, dtype=torch.bool).triu(seen - size + 1)
            self.masks[key] = torch.zeros(size, seen, dtype=q.dtype).masked_fill(hidden, torch.finfo(q.dtype).min)
        return self.masks[key]


class _Gathered(torch.autograd.Function):
    """All ranks' tensors (B, H, T, D), side by side along T; backward sums their gradients."""

    @staticmethod
    def forward(ctx, x, n, group):
        ctx.n, ctx.group = n, group
        gathered = x.new_empty(n * len(x), *x.shape[1:])
        gather_single(gathered, x.contiguous(), group=group)
        return torch.cat(gathered.chunk(n), dim=2)

    @staticmethod
    def backward(ctx, gradient):
        by_rank = torch.cat(gradient.chunk(ctx.n, dim=2))
        own = by_rank.new_empty(len(by_rank) // ctx.n, *by_rank.shape[1:])
        reduce_single(own, by_rank, group=ctx.group)
        return own, None, None


def in_parts(objective, world):
    """The objective itself or, where ranks share sequences, one whose batches are this rank's part of its."""
    return objective if world.cp == 1 else _InParts(objective, Context.of(world))


class _InParts:
    def __init__(self, objective, context):
        self.objective, self.context = objective, context

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def batch(self, *args, **kwargs):
        return self.context.part_of(*self.objective.batch(*args, **kwargs))


def share_sequences(model, context):
    """Makes a model compute the pieces of sequences that its rank has."""
    model.pieces = context
    for block in model.blocks:
        block.attn.attend = context.attend
