"""A training step of one rank among many, on one CPU and without data: what it sends, computes and holds.

torch's fake tensors have shapes and no numbers, and its fake process group sends nothing, so that a rank of a thousand
runs as it would, but that no operator computes. What is counted is what the code does, not what formulas say of it.
"""

import collections
import contextlib
import functools
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import UserError
from world import World, groups_of, local

# Collectives by torch's names: two ways of calling the same three
KINDS = {
    "allreduce_": "all_reduce", "all_reduce": "all_reduce", "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter", "send": "send",
}  # fmt: skip


class PaperWorld(World):
    """A World whose sums over ranks are made up, since fake tensors have no numbers."""

    def sum_over_all(self, *scalars):
        """A 1 for each scalar."""
        return [1.0 for _ in scalars]


class Collectives(TorchDispatchMode):
    """Counts collectives: {(kind, dtype, bytes of the whole tensor): times}."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        space, _, name = function.name().partition("::")
        if space in ("c10d", "_c10d_functional") and name in KINDS:
            tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
            whole = max(tensors, key=lambda x: x.nbytes)
            self.counts[KINDS[name], str(whole.dtype).removeprefix("torch."), whole.nbytes] += 1
        return out


@contextlib.contextmanager
def real_meshes():
    """Lets torch make meshes of ranks amid fake tensors, for which it needs their numbers (torch 2.13)."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    def outside(method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            with unset_fake_temporarily():
                return method(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("__init__", "__getitem__", "_flatten"):
            stack.enter_context(mock.patch.object(DeviceMesh, name, outside(getattr(DeviceMesh, name))))
        yield


@contextlib.contextmanager
def plain_parameters():
    """Lets modules without DTensors leave the meta device: torch would swap fake tensors, which it refuses."""
    to_empty = torch.nn.Module.to_empty

    def on_paper(model, *, device):
        if any(hasattr(p, "placements") for p in model.parameters()):
            return to_empty(model, device=device)
        made = {p: torch.nn.Parameter(torch.empty_like(p, device=device)) for p in model.parameters()}
        for module in model.modules():
            module._parameters |= {name: made[p] for name, p in module._parameters.items() if p is not None}
        return model

    with mock.patch.object(torch.nn.Module, "to_empty", on_paper):
        yield


@contextlib.contextmanager
def paper_world(cfg, n_ranks):
    """The World of rank 0 among so many that are not there. cfg: a script's settings."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if cfg.parallel.strategy == "ddp" and cfg.parallel.tp == cfg.parallel.pp == 1 and n_ranks > 1:
        raise UserError("simulate runs fsdp, tp and pp; plain ddp sends each gradient once; use --strategy=fsdp")
    dist.init_process_group("fake", rank=0, world_size=n_ranks, store=FakeStore())
    try:
        groups = groups_of("cpu", cfg.parallel, n_ranks)
        yield PaperWorld(0, n_ranks, torch.device("cpu"), cfg.world.precision, **groups)
    finally:
        dist.destroy_process_group()


def simulated(cfg, n_ranks, build, train_step):
    """{"collectives": {(kind, dtype, bytes of the whole tensor): times}, "flops", "parameters"} of rank 0's step.

    FLOPs are torch's count of matmuls and attention, parameters those that the rank holds, padding included. build and
    train_step are train.py's. cfg: a script's settings, whose batch the ranks divide.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    data = cfg.data
    on_paper = FakeTensorMode(allow_non_fake_inputs=True)
    with paper_world(cfg, n_ranks) as world, real_meshes(), plain_parameters(), on_paper:
        model, optimizer, scaler = build(cfg, world, seed=0)
        shape = data.micro_batch_size, data.seq_len // world.cp
        n = data.batch_tokens // (data.micro_batch_size * data.seq_len * world.data_ranks)
        targets = shape if cfg.model.is_causal else (shape[0], max(1, round(cfg.objective.mask_prob * shape[1])))
        places = [] if cfg.model.is_causal else [targets]  # of the masked tokens
        batches = [[torch.zeros(size, dtype=torch.long) for size in (shape, targets, *places)] for _ in range(n)]
        with Collectives() as sent, FlopCounterMode(display=False) as flops:
            train_step(model, optimizer, scaler, batches, cfg, world)
        parameters = sum(local(p).numel() for p in model.parameters())
    return {"collectives": dict(sent.counts), "flops": flops.get_total_flops(), "parameters": parameters}


def report_simulated(figures, formulas):
    """Yields the lines of a simulation. formulas: the Collectives that perf/cost.py says of the same rank."""
    formulas = [c for c in formulas if c.ranks > 1 and c.times and c.n_bytes]
    least = min((c.n_bytes for c in formulas), default=0)
    counted, said = collections.Counter(), collections.Counter()
    for (kind, _, n_bytes), times in figures["collectives"].items():
        counted[kind, n_bytes] += times
    for c in formulas:
        said[c.kind, round(c.n_bytes)] += round(c.times)
    rows = sorted(counted.keys() | +said, key=lambda key: -key[1] * max(counted[key], said[key]))
    yield f"simulated  rank 0: {figures['parameters']:,} parameters held, {figures['flops'] / 1e12:,.4g} TFLOP a step"
    yield f"{'':11}{'collective':<16}{'MiB':>12}{'times':>8}  by the formulas"
    for kind, n_bytes in rows:
        formula = f"{said[kind, n_bytes]:,}" if n_bytes >= least else "left out: a vector or a count"
        yield f"{'':11}{kind:<16}{n_bytes / 2**20:12,.3f}{counted[kind, n_bytes]:8,}  {formula}"
