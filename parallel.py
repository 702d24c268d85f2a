"""How a model lies over the processes: replicas, FSDP and tensor parallelism, activation checkpointing, compile."""

import functools
import logging
import warnings
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from typing import Literal

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
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from config import UserError
from ops import Vocabulary
from world import local

POWERSGD_RANK, POWERSGD_START = 32, 10  # rank of the approximation; initial steps with plain all-reduce
Checkpointing = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Literal["ddp", "fsdp"] = "ddp"  # ddp: the whole model on each rank; fsdp: its weights and state sharded
    shard_size: int | None = None  # fsdp: ranks that hold one replica, such as those of a node; none: all
    reshard: bool = True  # fsdp: gather a block's weights again for backward; false: keep them, 2 bytes a parameter
    accumulate: Literal["sharded", "whole"] = "sharded"  # fsdp: gradients between micro-steps; whole: reduced once a step, 4 bytes a parameter
    tp: int = 1  # ranks that split each layer: heads, columns of the MLP, rows of the vocabulary
    grad_compression: Literal["bf16", "powersgd"] | None = None  # ddp: what to send of gradients; none: all, in float32
    activation_checkpointing: Checkpointing = "none"  # full: backward recomputes blocks; selective: all but matmuls
    compile: bool | None = None  # torch.compile of the blocks; none: on cuda only

    def __post_init__(self):
        wrong = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("tp", "shard_size")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        wrong += [
            f"{name} is {getattr(self, name)} and strategy ddp, which shards nothing; use --strategy=fsdp"
            for name, default in (("shard_size", None), ("reshard", True), ("accumulate", "sharded"))
            if getattr(self, name) != default and self.strategy == "ddp"
        ]
        if self.grad_compression and (self.strategy == "fsdp" or self.tp > 1):
            wrong.append(
                f"grad_compression is {self.grad_compression}, which works with ddp alone, not with strategy "
                f"{self.strategy} and tp {self.tp}; use --strategy=ddp --tp=1, or --grad_compression=none"
            )
        if wrong:
            raise UserError("\n".join(wrong))

    def mesh_shape(self, size):
        """(replicas, shards of a replica, tensor parallel ranks) of `size` processes; UserError where they do not fit."""
        if size % self.tp:
            raise UserError(
                f"{size} processes are not a multiple of tp {self.tp}; start them with torchrun "
                f"--nproc_per_node={self.tp}, or a multiple of it"
            )
        data_ranks = size // self.tp
        shard = 1 if self.strategy == "ddp" else self.shard_size or data_ranks
        if data_ranks % shard:
            raise UserError(
                f"shard_size {shard} does not divide the {data_ranks} ranks that read different data ({size} processes "
                f"/ tp {self.tp}); lower it, or set it to none for all"
            )
        return data_ranks // shard, shard, self.tp

    def check_tensor_parallel(self, model, seq_len):
        """UserError where tp ranks would split a head, or sizes that tp does not divide. model: a ModelConfig."""
        sizes = {
            "n_head": model.n_head,
            "n_kv_head": model.kv_heads,
            "n_inner": model.inner_width,
            "seq_len": seq_len,
            "vocab_size, padded,": model.padded_vocab_size,
        }
        wrong = [f"{name} {size} is not a multiple of tp {self.tp}" for name, size in sizes.items() if size % self.tp]
        if wrong:
            fitting = [str(n) for n in range(1, self.tp) if not any(size % n for size in sizes.values())]
            raise UserError(f"{', '.join(wrong)}; tp {', '.join(fitting)} would fit")


def distribute(model, cfg, world, seed):
    """Turns a model on the meta device into one that trains: sharded, recomputed and compiled, with weights.

    Everything happens in place and adds no wrapper, so that parameters keep their names.
    """
    is_sharded = world.size > 1 and (cfg.strategy == "fsdp" or cfg.tp > 1)
    if is_sharded:
        import parallel as shard
    if cfg.tp > 1:
        shard.shard_tensors(model, world.mesh["tp"])
    if cfg.activation_checkpointing == "selective":  # the compiler must see what is kept
        recompute_blocks(model, "selective")
    if cfg.compile or (cfg.compile is None and world.device.type == "cuda"):
        compile_blocks(model, world)
    if cfg.activation_checkpointing == "full":  # not compiled with the block: that fails on tensor parallel ones
        recompute_blocks(model, "full")
    if is_sharded:  # under tensor parallelism also with ddp, as one copy a rank: DDP itself takes no DTensors
        fully_shard_model(model, cfg, world)
    model.to_empty(device=world.device)
    model.tie_weights()
    model.init_weights(seed, fill) if is_sharded else model.init_weights(seed)
    if world.size > 1 and not is_sharded:
        replicate_model(model, cfg.grad_compression)
    return model


# ---- DDP


def replicate_model(model, compression):
    """Sums gradients over ranks that each have the whole model, in float32 or compressed."""
    from torch.distributed._composable.replicate import replicate  # DDP without a wrapper module

    replicate(model, gradient_as_bucket_view=True)
    if compression == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        # Not the hook itself: torch, by its name, wants NCCL for it, but gloo sums bf16 as well.
        model.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    elif compression == "powersgd":
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

        def one_by_one(state, bucket):
            future = powerSGD_hook(state, bucket)
            if dist.get_backend() == "gloo":  # which follows a sum up when it is there, in another order on each rank
                future.wait()
            return future

        state = PowerSGDState(None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_START)
        model.register_comm_hook(state, one_by_one)


# ---- memory and speed of a block


def recompute_blocks(model, kind):
    """Keeps of each block, for backward, its input alone, or, selective, what its matmuls and attention gave as well.

    The rest is computed again in backward, with the same dropout.
    """
    context = {}
    if kind == "selective":
        aten = torch.ops.aten
        kept = [aten.mm.default, aten.addmm.default]
        # Attention that draws dropout in its kernel must run again: kept, it would not draw, and what is drawn after it
        # would differ. That of a CPU in bf16, by batched matmuls, runs again too, as its weights are what is large.
        kept += [] if model.cfg.dropout else [
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        ]  # fmt: skip
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, kept)

    def recomputed(forward):
        return lambda *args: checkpoint(forward, *args, use_reentrant=False, **context)  # a partial would not compile

    for block in model.blocks:
        block.forward = recomputed(block.forward)  # not a module around the block, so that parameters keep their names


def compile_blocks(model, world):
    """Compiles each block by itself: quick to compile, and bitwise repeatable where the whole model is not."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=world.device))
    except Exception as error:  # no compiler, no Triton, a Python too new: whatever torch says
        if world.is_main:
            reason = next(iter(str(error).strip().splitlines()), "")
            warnings.warn(
                f"torch.compile does not work here, training goes on without it: {type(error).__name__}: {reason}",
                stacklevel=2,
            )
        return
    torch._dynamo.config.suppress_errors = True  # a block that cannot be compiled runs as it is, with torch's warning
    for block in model.blocks:
        block.forward = torch.compile(block.forward)


# ---- during a step


def sync_gradients(model, last):
    """Makes the next backward sum gradients over ranks, or not: on the last micro-step of a step alone.

    FSDP, unless it accumulates whole gradients, sums over the ranks of a copy at every micro-step, over copies on the
    last.
    """
    if hasattr(model, "set_requires_all_reduce"):  # FSDP
        model.set_requires_gradient_sync(last or model.accumulates_sharded)
        model.set_requires_all_reduce(last)
    elif hasattr(model, "set_requires_gradient_sync"):  # DDP
        model.set_requires_gradient_sync(last)
        if next(model.parameters()).grad is None:  # what is there in the first forward, DDP takes into its buckets
            for p in model.parameters():
                p.grad = torch.zeros_like(p)


def keeps_gradients(model):
    """Whether gradients lie in DDP's buckets, and are to be zeroed there: dropped, they would be summed up beside them.

    In all micro-steps but the last, that is, which sends them: as much again as they take.
    """
    return hasattr(model, "set_requires_gradient_sync") and not hasattr(model, "set_requires_all_reduce")


def reshard(model):
    """Gives back gathered weights, as backward does: after forwards alone, since only shards are saved and stepped."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


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

    def head_of_vocabulary():
        weight, bias = local(model.head.weight), None if model.head.bias is None else local(model.head.bias)
        return weight, bias, Vocabulary(model.cfg.vocab_size, rank * len(weight), reduce)

    model.head_of_vocabulary = head_of_vocabulary


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
