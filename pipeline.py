"""Pipeline parallelism: stages of blocks on different ranks, whose micro-steps interleave as 1F1B.

A stage computes what one process does, but that its input comes from the stage before and its output goes to the next.
Gradients come back the same way.
"""

import contextlib
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import get_total_norm

from ops import residual_dtype
from world import local


def schedule(n, stage, n_stages):
    """Yields ("forward" or "backward", i) for n micro-steps in the order of a stage.

    1F1B (PipeDream-Flush, Narayanan et al. 2021, arXiv 2006.09503): a stage runs ahead by as many micro-steps as stages
    follow it, and so holds the activations of one more at most, whatever n.
    """
    ahead = min(n, n_stages - 1 - stage)
    for i in range(ahead):
        yield "forward", i
    for i in range(n):
        if i + ahead < n:
            yield "forward", i + ahead
        yield "backward", i


def bubble(n, n_stages):
    """Share of a step of n micro-steps in which each stage waits, where all are equally fast."""
    return (n_stages - 1) / (n + n_stages - 1)


def stage_sizes(n_layer, n_stages, head=0.0):
    """Blocks of each stage, such that the slowest is as fast as it can be; head: the head's cost in blocks."""

    def slowest(last):
        return max(-(-(n_layer - last) // (n_stages - 1)), last + head)

    last = min(range(n_layer - n_stages + 1, 0, -1), key=slowest) if n_stages > 1 else n_layer
    return [(n_layer - last + i) // (n_stages - 1) for i in range(n_stages - 1)] + [last]


class Stage:
    """This rank's part of a pipeline: its exchange with the ranks before and after it."""

    def __init__(self, width, world):
        self.width, self.world = width, world
        column = range(world.rank_in_stage, world.size, world.ranks_of_stage)
        self.is_first, self.is_last = world.stage == 0, world.stage == world.pp - 1
        self.before, self.after = column[world.stage - 1], column[(world.stage + 1) % world.pp]  # none at the ends
        self.other_end = column[0] if self.is_last else column[-1]
        self.sending = {}  # {neighbour: (work, tensor)} on its way
        self.waits = []  # for neighbours, in seconds; on CUDA pairs of events

    def send(self, x, neighbour):
        """Starts to send a tensor, after the one before it has arrived."""
        self.finish(neighbour)
        x = x.detach().contiguous()
        self.sending[neighbour] = dist.isend(x, neighbour, self._group(self.world.rank, neighbour)), x

    def finish(self, *neighbours):
        """Waits until what was sent to neighbours has arrived; without names, to all."""
        for neighbour in neighbours or [*self.sending]:
            if neighbour in self.sending:
                self.sending.pop(neighbour)[0].wait()

    def receive(self, x, neighbour):
        """Returns x, filled with the next tensor that a neighbour sends."""
        with self._waiting():
            dist.recv(x, neighbour, self._group(neighbour, self.world.rank))
        return x

    @contextlib.contextmanager
    def _waiting(self):
        """Times what this stage waits for: on CUDA the stream waits, not the host."""
        if self.world.device.type != "cuda":
            start = time.perf_counter()
            yield
            self.waits.append(time.perf_counter() - start)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.waits.append((start, end))

    def seconds_waited(self):
        """Seconds of waiting for neighbours since the last call."""
        waits, self.waits = self.waits, []
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
            waits = [start.elapsed_time(end) / 1e3 for start, end in waits]
        return sum(waits)

    def _group(self, source, target):
        # On CUDA the messages of a group queue: what goes forward must not wait behind what comes backward.
        return self.world.pp_groups[target < source]

    def first_input(self, ids, place, token_types=None):
        """In place of the embedding: the output (B, T, C) of the stage before; backward sends its gradient there."""
        B, T = ids.shape
        x = torch.empty(B, T // self.world.tp, self.width, device=ids.device)
        x = self.receive(x.to(residual_dtype(x)), self.before)
        if torch.is_grad_enabled():
            x.requires_grad_().register_hook(lambda gradient: self.send(gradient, self.before))
        else:
            self.waits.pop()  # evaluation's are not counted
        return x

    def last_output(self, x, targets=None, count_correct=False):
        """In place of the loss: sends the output (B, T, C) to the stage after; the loss is 0 here."""
        if count_correct:
            self.send(x, self.after)
            return torch.zeros(2, device=x.device).unbind()
        return _Sent.apply(x, self)


class _Sent(torch.autograd.Function):
    """The loss of a stage that sends its output on: 0, whose backward begins with the gradient that comes back."""

    @staticmethod
    def forward(ctx, x, stage):
        ctx.stage, ctx.like = stage, torch.empty_like(x, device="meta")
        stage.send(x, stage.after)
        return torch.zeros((), device=x.device)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.stage.receive(torch.empty_like(ctx.like, device=gradient.device), ctx.stage.after), None


def cut(model, sizes, world):
    """Leaves in a model what this rank's stage has of it, under the same names. sizes: blocks of each stage."""
    model.stage, n_params, is_tied = Stage(model.cfg.n_embd, world), model.num_params(), model.cfg.tie_embeddings
    model.num_params = lambda: n_params
    end = sum(sizes[: world.stage + 1])
    for layer in {*range(model.cfg.n_layer)} - {*range(end - sizes[world.stage], end)}:
        delattr(model.blocks, str(layer))
    if not model.stage.is_first:
        model.embed = model.stage.first_input
        model.wte = model.wte if is_tied and model.stage.is_last else None
        model.wpe = model.wpe and nn.Identity()  # none would stand for rope
        model.wtt = model.norm_e = None
    if not model.stage.is_last:
        model.selected, model.predict = lambda x, positions=None: x, model.stage.last_output
        model.norm_f = model.transform = model.head = None
        model.tie_weights = lambda: None


def total_norm(model, world):
    """The norm of a model's gradients; of a pipeline, that of all stages."""
    params = [p for p in model.parameters() if p.grad is not None]
    if world.pp == 1:
        return get_total_norm(p.grad for p in params)
    if model.cfg.tie_embeddings:
        sum_tied_gradients(model)
        if model.stage.is_last:
            params = [p for p in params if p is not model.wte.weight]  # the first stage counts it
    norm = get_total_norm(p.grad for p in params)
    square = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).double() ** 2
    return world.sum_over_stages(square).sqrt().float()


def sum_tied_gradients(model):
    """Gives the table that is both embedding and head the sum of the first and the last stage's gradient."""
    stage = model.stage
    if stage.is_first or stage.is_last:
        mine = local(model.wte.weight.grad)
        theirs, there = torch.empty_like(mine), (stage.other_end, stage.world.pp_groups[0])
        exchange = [dist.P2POp(dist.isend, mine, *there), dist.P2POp(dist.irecv, theirs, *there)]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        mine += theirs
