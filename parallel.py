"""How a model is laid out over processes: DDP, FSDP, tensor parallelism, activation checkpointing, compile."""

import functools
import logging
import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from config import Config, Count, UserError
from context import Context, share_sequences
from data import nearest_batch, seq_len_of
from heads import gather_rows
from launch import compile_model, keep_copies
from pipeline import cut, stage_sizes
from tensor_parallel import shard_tensors
from world import processes_here

DDP_SEGMENTS = 4  # graphs of the blocks: 3/4 of the gradients are sent while backward computes
POWERSGD_RANK, POWERSGD_START = 32, 10  # rank of the approximation; initial steps with plain all-reduce
Checkpointing = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class ParallelConfig(Config):
    strategy: Literal["ddp", "fsdp"] = "ddp"  # ddp: the whole model on each rank; fsdp: weights and state sharded
    shard_size: Count | None = None  # fsdp: ranks that shard one replica, such as a node's; none: all
    reshard: bool = True  # fsdp: gather a block's weights again for backward; false: keep them, 2 bytes per parameter
    accumulate: Literal["sharded", "whole"] = "sharded"  # fsdp: gradients; whole: reduced once a step, 4 bytes each
    pp: Count = 1  # stages of a pipeline, each with a part of the blocks
    cp: Count = 1  # ranks that share each sequence
    tp: Count = 1  # tensor parallel ranks, which split heads, MLP columns and vocabulary rows
    async_tp: bool = False  # tp on cuda, compiled: torch overlaps matmuls with what ranks send; untried
    grad_compression: Literal["bf16", "powersgd"] | None = None  # ddp: compression of sent gradients; none: float32
    activation_checkpointing: Checkpointing = "none"  # full: recompute blocks in backward; selective: all but matmuls
    compile: bool | None = None  # torch.compile of blocks and loss; none: on cuda only
    cuda_graphs: bool | None = None  # replay a micro-step as one CUDA graph; none: in one compiled process on cuda

    def __post_init__(self):
        super().__post_init__()
        wrong = [
            f"{name} is {getattr(self, name)}, but strategy ddp shards nothing; use --strategy=fsdp"
            for name, default in (("shard_size", None), ("reshard", True), ("accumulate", "sharded"))
            if getattr(self, name) != default and self.strategy == "ddp"
        ]
        if self.grad_compression and (self.strategy == "fsdp" or self.tp > 1 or self.pp > 1):
            here = (
                f"grad_compression {self.grad_compression} with strategy {self.strategy}, tp {self.tp} and pp {self.pp}"
            )
            remedy = "use --strategy=ddp --tp=1 --pp=1, or --grad_compression=none"
            wrong.append(f"{here}: it needs ddp without tp and pp; {remedy}")
        if self.async_tp and self.tp == 1:
            wrong.append("async_tp is on, but tp is 1, so there is nothing to overlap; leave async_tp off")
        if self.async_tp and self.compile is False:
            wrong.append("async_tp is on, but compile is false, and torch.compile does it; leave one of them out")
        if wrong:
            raise UserError(*wrong)

    def is_sharded(self, size):
        """Whether parameters are shards over `size` processes; not where a stage of a pipeline is one process."""
        return size > self.pp and (self.strategy == "fsdp" or self.tp > 1 or self.pp > 1)

    @property
    def ranks_of_sequence(self):
        """Ranks that compute the same sequences together."""
        return self.tp * self.cp * self.pp

    def compiles(self, device_type):
        """Whether torch.compile is on."""
        return device_type == "cuda" if self.compile is None else self.compile

    def segments(self, size, n_layer):
        """Graphs that torch.compile makes of the blocks.

        One is fastest; but DDP sends gradients while backward computes only after a segment has ended, and FSDP, tensor
        parallelism and full activation checkpointing act between two blocks.
        """
        if self.is_sharded(size) or self.activation_checkpointing == "full":
            return n_layer
        return min(DDP_SEGMENTS, n_layer) if size > self.pp else 1

    def captures(self, world):
        """Whether CUDA graphs launch the micro-steps.

        They cannot hold a collective of DDP's, a gradient scaler's decisions, or the random state that activation
        checkpointing saves.
        """
        possible = self._on_one_gpu(world) and world.precision != "fp16"
        if self.cuda_graphs and not possible:
            rule = "but they need one process on cuda, bf16 or fp32, and no activation checkpointing"
            raise UserError(f"cuda_graphs is true, {rule}; leave it at none, which uses them where they are possible")
        return possible and (self.compiles("cuda") if self.cuda_graphs is None else self.cuda_graphs)

    def how_kernels_start(self, world, n_layer):
        """How compiling and CUDA graphs work in this layout, as text for a log."""
        if not self.compiles(world.device.type):
            compiled = "eager"
        else:
            n = self.segments(world.size, n_layer)
            compiled = f"blocks compiled as {n} graph{'s' * (n > 1)}" if n < n_layer else "blocks compiled one by one"
        return compiled + ", launched by CUDA graphs" * self.captures(world)

    def keeps_copies(self, world):
        """Whether the blocks' matrices have bf16 copies for a step.

        A process alone on a GPU keeps them. So does a pipeline's stage of one process, where each micro-step ahead would
        save casts of its own. Elsewhere on a CPU they gain nothing (torch 2.13).
        """
        is_lone_stage = self.pp > 1 and not self.is_sharded(world.size) and self.activation_checkpointing == "none"
        return world.precision == "bf16" and (is_lone_stage or self._on_one_gpu(world))

    def _on_one_gpu(self, world):
        """Whether one process trains on CUDA without activation checkpointing."""
        return world.device.type == "cuda" and world.mesh is None and self.activation_checkpointing == "none"

    def mesh_shape(self, size):
        """(replicas, shards of a replica, tensor parallel ranks) of a pipeline's stage for `size` processes.

        UserError where they do not fit.
        """
        if size % self.ranks_of_sequence:
            remedy = f"start them with torchrun --nproc_per_node={self.ranks_of_sequence}, or a multiple of it"
            sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp}
            needed = " x ".join(f"{name} {n}" for name, n in sizes.items() if n > 1)
            raise UserError(f"{size} processes are not a multiple of {needed}; {remedy}")
        data_ranks = size // (self.tp * self.pp)
        shard = 1 if self.strategy == "ddp" else self.shard_size or data_ranks
        if data_ranks % shard:
            by = f"tp {self.tp}" + f" / pp {self.pp}" * (self.pp > 1)
            ranks = f"the {data_ranks} ranks that read different data ({size} processes / {by})"
            raise UserError(f"shard_size {shard} does not divide {ranks}; lower it, or set it to none for all")
        return data_ranks // shard, shard, self.tp

    def check_model(self, model, seq_len):
        """UserError if tp does not divide heads and sizes of a model, or pp its blocks. model: a ModelConfig."""
        if self.pp > model.n_layer:
            raise UserError(f"pp {self.pp} is more stages than n_layer {model.n_layer} has blocks; lower --pp")
        if self.pp * self.cp > 1 and len(model.objectives) > 1:
            which = " and ".join(model.objectives)
            raise UserError(f"objective has {which}, but pp and cp compute one; use --pp=1 --cp=1, or one of them")
        if self.cp > 1 and (rest := seq_len % (2 * self.cp)):
            fitting = " or ".join(str(n) for n in (seq_len - rest, seq_len - rest + 2 * self.cp) if n)
            raise UserError(f"seq_len {seq_len} does not cut into 2 x cp {self.cp} pieces; seq_len {fitting} would")
        sizes = {"n_head": model.n_head, "n_kv_head": model.kv_heads, "n_inner": model.inner_width}
        sizes["seq_len" if self.cp == 1 else "seq_len / cp"] = seq_len // self.cp  # a rank's
        sizes["vocab_size, padded,"] = model.padded_vocab_size
        wrong = [f"{name} {size} is not a multiple of tp {self.tp}" for name, size in sizes.items() if size % self.tp]
        if wrong:
            fitting = [str(n) for n in range(1, self.tp) if not any(size % n for size in sizes.values())]
            raise UserError(f"{', '.join(wrong)}; tp {', '.join(fitting)} would fit")

    def check_precision(self, precision):
        """UserError if a layout cannot train in a precision."""
        if precision == "fp16" and self.pp > 1:
            rule = "where each stage would find overflows of its own"
            raise UserError(f"precision is fp16, but pp is {self.pp}, {rule}; use --precision=bf16, or --pp=1")
        if precision == "fp16" and self.grad_compression == "powersgd":
            rule = "whose error feedback would keep every overflow of precision fp16"
            raise UserError(f"grad_compression is powersgd, {rule}; use --precision=bf16 or --grad_compression=bf16")


def fit_to_ranks(cfg):
    """Settings whose batch the ranks here divide: a smaller micro_batch_size, or else the nearest batch_tokens.

    Rank 0 says what changes.
    """
    unlike = {
        "contrastive compares a micro-batch's texts": "contrastive" in cfg.model.objectives,
        "save_interval is none, and what is not saved begins anew": cfg.checkpoint.save_interval is None,
        "resume is never, and runs that change size resume": cfg.run.resume == "never",
    }
    if rules := [rule for rule, holds in unlike.items() if holds]:
        raise UserError(*(f"elastic is on, but {rule}; leave elastic off" for rule in rules))
    rank, size, _ = processes_here()
    cfg.parallel.mesh_shape(size)  # raises where it does not fit
    data = nearest_batch(replace(cfg.data, seq_len=seq_len_of(cfg)), size // cfg.parallel.ranks_of_sequence)
    names = [name for name in ("batch_tokens", "micro_batch_size") if getattr(data, name) != getattr(cfg.data, name)]
    if "batch_tokens" in names and cfg.data.data_schedule:
        rule = f"data_schedule counts steps of batch_tokens {cfg.data.batch_tokens}, which {size} ranks do not divide"
        raise UserError(f"{rule}; take another number of ranks, or a batch_tokens that all of them divide")
    if names and rank == 0:
        changes = ", ".join(f"{name} {getattr(data, name)} in place of {getattr(cfg.data, name)}" for name in names)
        print(f"elastic    {changes}, which {size} ranks do not divide")
    return replace(cfg, data=replace(cfg.data, **{name: getattr(data, name) for name in names}))


def distribute(model, cfg, world, seed, sizes=None):
    """Makes a model on the meta device ready to train: sharded, checkpointed, compiled, with initial weights.

    sizes: blocks of each stage of a pipeline; None: as equal as can be. Everything happens in place and adds no wrapper
    module, so that parameters keep their names.
    """
    cfg.check_precision(world.precision)
    if cfg.pp > 1:
        cut(model, sizes or stage_sizes(model.cfg.n_layer, cfg.pp), world)
    if cfg.cp > 1:
        share_sequences(model, Context.of(world))
    is_sharded = cfg.is_sharded(world.size)
    if world.data_ranks > 1 and hasattr(model, "gather"):
        model.gather = functools.partial(gather_rows, world)
    if cfg.tp > 1:
        shard_tensors(model, world.mesh["tp"])
    if cfg.async_tp:
        overlap_tensor_parallelism(world)
    if cfg.activation_checkpointing == "selective":  # before compile: the compiler must see what is saved
        recompute_blocks(model, "selective")
    if cfg.compiles(world.device.type):
        compile_model(model, cfg.segments(world.size, len(model.blocks)), world)
    model.graphs = {} if cfg.captures(world) else None
    if cfg.activation_checkpointing == "full":  # after compile: compiled with the block, it fails under tp
        recompute_blocks(model, "full")
    if is_sharded:  # also tensor parallelism with ddp, as shards of one rank: DDP takes no DTensors
        fully_shard_model(model, cfg, world)
    model.to_empty(device=world.device)
    model.tie_weights()
    model.init_weights(seed, fill_shard) if is_sharded else model.init_weights(seed)
    if world.ranks_of_stage > 1 and not is_sharded:
        replicate_model(model, cfg.grad_compression)
    if cfg.keeps_copies(world):
        keep_copies(model)
    return model


# ---- DDP


def replicate_model(model, compression):
    """DDP: reduces gradients over replicas, in float32 or compressed."""
    from torch.distributed._composable.replicate import replicate  # DDP without a wrapper module

    replicate(model, gradient_as_bucket_view=True)
    if compression == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        # A lambda, because torch allows a hook of that name with NCCL only; gloo reduces bf16 as well.
        model.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    elif compression == "powersgd":
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

        def one_by_one(state, bucket):
            future = powerSGD_hook(state, bucket)
            if dist.get_backend() == "gloo":  # its callbacks would run in another order on each rank
                future.wait()
            return future

        state = PowerSGDState(None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_START)
        model.register_comm_hook(state, one_by_one)


# ---- activation checkpointing


def recompute_blocks(model, kind):
    """Activation checkpointing: full saves each block's input; selective also matmul and attention outputs.

    Backward recomputes the rest, with the same dropout.
    """
    context = {}
    if kind == "selective":
        import torch.nn.attention.varlen  # registers the operator that is named below

        aten = torch.ops.aten
        saved = [aten.mm.default, aten.addmm.default]
        # With dropout, attention must run again: its kernel draws random numbers, and later draws must not shift.
        # Attention by batched matmuls (CPU, bf16) also runs again: its weights are the largest activations.
        saved += [] if model.cfg.dropout else [
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
            torch.ops.torch_attn._varlen_attn.default,
        ]  # fmt: skip
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, saved)

    def checkpointed(forward):
        return lambda *args: checkpoint(forward, *args, use_reentrant=False, **context)  # a partial would not compile

    for block in model.blocks:
        block.forward = checkpointed(block.forward)


def overlap_tensor_parallelism(world):
    """Lets torch.compile cut tensor parallelism's matmuls into pieces that are sent while others compute (async TP)."""
    if world.device.type != "cuda":
        raise UserError(f"async_tp is on, but device is {world.device.type}, and it needs cuda; leave it off")
    from torch._inductor import config as inductor

    if torch.__version__ < "2.13":  # later ones do so by themselves
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        enable_symm_mem_for_group(world.mesh["tp"].get_group().group_name)
    inductor._micro_pipeline_tp = True  # torch has no public name for it


# ---- during a step


def sync_gradients(model, last):
    """Makes backward reduce gradients over ranks on the last micro-step of a step only.

    FSDP reduces over a replica's shards at every micro-step, unless accumulate is whole, and over replicas on the last.
    """
    if hasattr(model, "set_requires_all_reduce"):  # FSDP
        model.set_requires_gradient_sync(last or model.accumulates_sharded)
        model.set_requires_all_reduce(last)
    elif hasattr(model, "set_requires_gradient_sync"):  # DDP
        model.set_requires_gradient_sync(last)
        trained = [p for p in model.parameters() if p.requires_grad]
        if trained[0].grad is None:  # DDP takes the first forward's gradients into its buckets
            for p in trained:
                p.grad = torch.zeros_like(p)


def has_gradient_buckets(model):
    """Whether gradients are views of DDP's buckets: then zero them, do not drop them.

    Dropped, they would be allocated again beside the buckets until the micro-step that reduces them.
    """
    return hasattr(model, "set_requires_gradient_sync") and not hasattr(model, "set_requires_all_reduce")


def reshard(model):
    """Frees FSDP's gathered weights after forwards without a backward, since only shards are saved and updated."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


# ---- FSDP


def fully_shard_model(model, cfg, world):
    """Shards all parameters over the ranks of a replica: each block as one group, the rest as another.

    Blocks are gathered in the run's precision; the rest, with the embeddings, in float32, as the residual stream is.
    This equals one process under autocast, except that norms' weights are rounded with their block's. Gradients are
    reduced in float32. A block is gathered while the one before it computes.
    """
    # Two warnings without consequence: nothing works in place on a block's output, and gloo has no all-to-all.
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


def fill_shard(param, weight):
    """Copies this rank's shard of a whole weight into a sharded parameter."""
    part = distribute_tensor(weight, param.device_mesh, param.placements, src_data_rank=None)  # without communication
    param.to_local().copy_(part.to_local())


# ---- optimizers that need whole matrices


def on_whole_matrices(function, parts, params, mesh):
    """Applies function to whole matrices, each on one rank; returns this rank's shards of the results.

    function takes and returns a stack (n, rows, columns). parts: this rank's shards, laid out as params, which all have
    one layout: DTensors, or plain tensors that are equal on all ranks. Along each dimension of the mesh (replicate,
    shard, tp) in turn, a rank gives its shards of most matrices and gets larger shards of the others, until it has
    whole ones; afterwards the other way.
    """
    param, stack, exchanges = params[0], torch.stack(parts), []
    placements = dict(zip(param.device_mesh.mesh_dim_names, param.placements)) if isinstance(param, DTensor) else {}
    sharded_dim = {name: getattr(placements.get(name), "dim", None) for name in mesh.mesh_dim_names}  # None: none
    for name, dim in sharded_dim.items():
        if mesh[name].size() == 1:
            continue
        shape = [len(stack), *param.shape]  # before this dimension of the mesh shards it
        if name != "tp" and sharded_dim["tp"] is not None:  # FSDP shards what tensor parallelism has sharded before
            shape[1 + sharded_dim["tp"]] //= mesh["tp"].size()
        layout = Replicate() if dim is None else Shard(1 + dim)
        stack = _exchange(stack, mesh[name], layout, Shard(0), shape)
        exchanges.append((mesh[name], Shard(0), layout, shape))
    stack = function(stack)
    for exchange in reversed(exchanges):
        stack = _exchange(stack, *exchange)
    return stack.unbind()


def _exchange(part, mesh, source, target, shape):
    """Changes the placement of a tensor of this shape from source to target; takes and returns this rank's part."""
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(part, mesh, [source], shape=torch.Size(shape), stride=stride)
    return whole.redistribute(placements=[target]).to_local()
