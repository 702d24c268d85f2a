"""Tensor parallelism: each layer is split over ranks, by heads, columns of the MLP and rows of the vocabulary."""

from fnmatch import fnmatch

import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as styles

from ops import Vocabulary, matmul_dtype, residual_dtype
from world import local


class Replicated(styles.ParallelStyle):
    """A module with replicated parameters, run on its whole input or on this rank's part of the input's dimension dim.

    Inputs and output are plain tensors.
    """

    def __init__(self, dim=None):
        super().__init__()
        self.layout = Replicate() if dim is None else Shard(dim)

    def _apply(self, module, mesh):
        def place_inputs(module, inputs, mesh):
            return tuple(DTensor.from_local(x, mesh, [Replicate()]).redistribute(mesh, [self.layout]) for x in inputs)

        return distribute_module(module, mesh, None, place_inputs, lambda module, output, mesh: output.to_local())


class VocabularyRows(styles.ParallelStyle):
    """An embedding with a shard of rows a rank. RowwiseParallel would send float32: its output is cast when summed."""

    def _apply(self, module, mesh):
        def lookup(ids):
            rows = module.weight.to_local()
            row = ids - mesh.get_local_rank() * len(rows)
            is_here = (0 <= row) & (row < len(rows))
            x = F.embedding(row.where(is_here, 0), rows).where(is_here[..., None], 0)  # B T C
            x = DTensor.from_local(x.to(residual_dtype(x)), mesh, [Partial()])
            return x.redistribute(placements=[Shard(1)]).to_local()

        module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))
        module.forward = lookup
        return module


def tensor_parallel_plan(n_layer):
    """{pattern of module names: its parallel style}; splits heads, columns of the MLP and rows of the vocabulary.

    Megatron's plan with sequence parallelism (arXiv 2205.05198): norms and residual stream are sharded by sequence, an
    all-gather precedes attention and MLP, a reduce-scatter follows them.
    """
    part = styles.SequenceParallel(use_local_output=True)
    heads = styles.SequenceParallel(sequence_dim=2, use_local_output=True)
    return {
        "wte": VocabularyRows(),
        "wpe": Replicated(dim=-1),  # positions (T,), or (B, T) with documents
        "wtt": Replicated(dim=1),
        "norm_e": part,
        "blocks.*.norm[12]": part,
        "blocks.*.attn": styles.PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "blocks.*.attn.[qkv]": styles.ColwiseParallel(),
        "blocks.*.attn.[qk]_norm": heads,
        "blocks.*.attn.proj": styles.RowwiseParallel(output_layouts=Shard(1)),
        "blocks.*.mlp": styles.PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "blocks.*.mlp.gate": styles.ColwiseParallel(),
        "blocks.*.mlp.up": styles.ColwiseParallel(),
        "blocks.*.mlp.down": styles.RowwiseParallel(output_layouts=Shard(1)),
        f"blocks.{n_layer - 1}": styles.PrepareModuleOutput(
            output_layouts=Shard(1), desired_output_layouts=Replicate()
        ),
        "norm_f": Replicated(),
        "transform": Replicated(),
        "pooler": Replicated(),
        "pair_head": Replicated(),
        "head": styles.ColwiseParallel(output_layouts=Replicate()),
    }


def shard_tensors(model, mesh):
    """Tensor parallelism over a mesh of one dimension; no rank ever holds all logits."""
    for block in model.blocks:  # before the hooks that gather: what matmuls would cast is sent in their dtype
        for module in (block.attn, block.mlp):
            module.register_forward_pre_hook(lambda module, x: (x[0].to(matmul_dtype(x[0])), *x[1:]))
    for pattern, style in tensor_parallel_plan(model.cfg.n_layer).items():  # a stage has a part of them
        for name, module in list(model.named_modules()):
            if fnmatch(name, pattern) and name.count(".") == pattern.count("."):
                styles.parallelize_module(module, mesh, style)
    # A compiled block must not take the output of a pending collective: its gradient would be wrong (torch 2.13).
    if model.wte is not None:
        model.wte.register_forward_hook(lambda module, ids, x: x.clone())
    model.tie_weights()
    group, rank = mesh.get_group(), mesh.get_local_rank()

    def reduce(tensor, op):
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()), group)
        return tensor

    def head_of_vocabulary():
        weight, bias = local(model.head.weight), None if model.head.bias is None else local(model.head.bias)
        return weight, bias, Vocabulary(model.cfg.vocab_size, rank * len(weight), reduce)

    model.head_of_vocabulary = head_of_vocabulary
