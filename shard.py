"""Which rank holds what: FSDP, tensor parallelism, and what both ask of initial weights, loss and optimizer.

parallel.py imports this where there are several ranks, since DTensor takes half a second to import.
"""

import logging
import warnings
from fnmatch import fnmatch
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from model import linear_cross_entropy


# ---- tensor parallelism


class Whole(ParallelStyle):
    """A module whose parameters every rank holds; it runs on all of its input, or on this rank's part of dimension dim.

    What it returns is a plain tensor, as is what it is given.
    """

    def __init__(self, dim=None):
        super().__init__()
        self.layout = Replicate() if dim is None else Shard(dim)

    def _apply(self, module, mesh):
        def take(module, inputs, mesh):
            return tuple(DTensor.from_local(x, mesh, [Replicate()]).redistribute(mesh, [self.layout]) for x in inputs)

        return distribute_module(module, mesh, None, take, lambda module, output, mesh: output.to_local())


def tensor_parallel_plan(n_layer):
    """{pattern of module names: how ranks share it out}: whole heads, columns of the MLP, rows of the vocabulary.

    Megatron's plan with sequence parallelism (arXiv 2205.05198): between attention and MLP each rank holds its part of
    the sequence, in front of them the parts are gathered, behind them what ranks have computed is summed and parted.
    """
    part, heads = SequenceParallel(use_local_output=True), SequenceParallel(sequence_dim=2, use_local_output=True)
    return {
        "wte": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "wpe": Whole(dim=0),
        "wtt": Whole(dim=1),
        "norm_e": part,
        "blocks.*.norm[12]": part,
        "blocks.*.attn": PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "blocks.*.attn.[qkv]": ColwiseParallel(),
        "blocks.*.attn.[qk]_norm": heads,
        "blocks.*.attn.proj": RowwiseParallel(output_layouts=Shard(1)),
        "blocks.*.mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "blocks.*.mlp.gate": ColwiseParallel(),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        f"blocks.{n_layer - 1}": PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate()),
        "norm_f": Whole(),
        "transform": Whole(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


def shard_tensors(model, mesh):
    """Shares out a model's layers over the ranks of a mesh of one dimension; no rank ever holds all logits."""
    for pattern, style in tensor_parallel_plan(model.cfg.n_layer).items():
        for name, module in list(model.named_modules()):
            if fnmatch(name, pattern) and name.count(".") == pattern.count("."):
                parallelize_module(module, mesh, style)
    # What a collective still fills must not enter a compiled block: its gradient would be wrong (torch 2.13).
    model.wte.register_forward_hook(lambda module, ids, x: x.clone())
    model.tie_weights()
    group, rank = mesh.get_group(), mesh.get_local_rank()

    def reduce(tensor, op):
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()), group)
        return tensor

    def cross_entropy(hidden, weight, targets, vocab_size, bias, *options):
        weight, bias = weight.to_local(), None if bias is None else bias.to_local()
        return linear_cross_entropy(
            hidden, weight, targets, vocab_size, bias, *options, shard=(rank * len(weight), reduce)
        )

    model.cross_entropy = cross_entropy


# ---- FSDP


def fully_shard_model(model, cfg, world):
    """Shards every parameter over the ranks of a copy of the model: block by block, and the rest as one.

    Blocks are gathered in the run's precision, the rest, whose embeddings start the residual stream, in float32. So all
    compute what one process does under autocast, but that norms' weights are rounded with their block's. Gradients are
    summed over data ranks in float32. A block is gathered while the one before computes.
    """
    # Nothing works in place on a block's output; and that gloo has no all-to-all is no news.
    warnings.filterwarnings("ignore", ".*FSDP2-wrapped module .* returned a view tensor")
    logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
    replicates, shards = world.mesh["replicate"].size() > 1, world.mesh["shard"].size() > 1
    mesh = world.mesh["replicate", "shard"] if replicates else world.mesh["shard"]
    policy = MixedPrecisionPolicy(world.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard and shards)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module, following in pairwise([model, *model.blocks]):
        module.set_modules_to_forward_prefetch([following])
    model.accumulates_sharded = cfg.accumulate == "sharded" and shards


def fill(param, weight):
    """Takes what this rank holds of a whole weight into a sharded parameter."""
    part = distribute_tensor(weight, param.device_mesh, param.placements, src_data_rank=None)  # nothing is sent
    param.to_local().copy_(part.to_local())


# ---- optimizers that must see matrices whole


def on_whole_matrices(function, parts, params, mesh):
    """function, of a stack (n, rows, columns), on matrices of which ranks hold parts, its work shared out over all.

    parts: this rank's, placed as params are, all alike: DTensors, or plain tensors, of which every rank has the same.
    Along one dimension of the mesh (replicate, shard, tp) after the other, ranks swap their parts of all matrices for
    the whole of some, and afterwards back. Returns this rank's parts of the results.
    """
    param, stack, way_back = params[0], torch.stack(parts), []
    dims = dict(zip(param.device_mesh.mesh_dim_names, param.placements)) if isinstance(param, DTensor) else {}
    tp_dim = getattr(dims.get("tp"), "dim", None)
    for name in mesh.mesh_dim_names:
        dim = getattr(dims.get(name), "dim", None)  # of the matrix, which this dimension of the mesh shards; or none
        shape = [len(stack), *param.shape]
        if name != "tp" and tp_dim is not None:  # FSDP has sharded what tensor parallelism had left
            shape[1 + tp_dim] //= mesh["tp"].size()
        if mesh[name].size() > 1:
            layout = Replicate() if dim is None else Shard(1 + dim)
            stack = _swap(stack, mesh[name], layout, Shard(0), shape)
            way_back.append((mesh[name], Shard(0), layout, shape))
    stack = function(stack)
    for swap in reversed(way_back):
        stack = _swap(stack, *swap)
    return stack.unbind()


def _swap(part, mesh, source, target, shape):
    """This rank's part, placed as target, of a tensor of a shape whose part, placed as source, it has."""
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(part, mesh, [source], shape=torch.Size(shape), stride=stride)
    return whole.redistribute(placements=[target]).to_local()
