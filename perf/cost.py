"""Cost of a step: parameters, FLOPs, and bytes that ranks send."""

import collections
import functools
import math
from dataclasses import dataclass, replace

import torch

from objective import PAIRS, windows_of
from ops import BY_MATMULS
from parallel import DDP_SEGMENTS, POWERSGD_RANK
from perf.hardware import ROUNDS
from pipeline import stage_sizes

BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once


@dataclass(frozen=True)
class Setup:
    """Everything but the model that a step's cost depends on: batch, layout over ranks, precision and the like."""

    seq_len: int
    micro_batch_size: int  # sequences
    micro_steps: int = 1
    replicas: int = 1  # of a stage, each on shards x tp ranks
    shards: int = 1
    tp: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw"
    strategy: str = "ddp"
    reshard: bool = True
    accumulate: str = "sharded"
    grad_compression: str | None = None
    checkpointing: str = "none"  # activation_checkpointing
    compiled: bool = False
    cuda_graphs: bool = False  # allowed: one compiled process on CUDA captures its steps
    on_cpu: bool = False
    head_share: float = 1.0  # share of tokens that go through the head
    document_mask: bool = False
    pp: int = 1  # stages of a pipeline
    cp: int = 1  # ranks that share sequences; replicas x shards counts them, too
    host_speed: float = 1.0  # relative to the host that LAUNCH_S describes
    weight_bytes: float = 4  # bytes per parameter; this and the following differ in other projects
    gradient_bytes: float = 4
    optimizer_bytes: float | None = None  # bytes per parameter; None: the optimizer's
    residual_bytes: float | None = None  # bytes per number of the residual stream; None: 2 in bf16, else 4
    logits_bytes: float | None = None  # bytes per logit where all are in memory at once; None: one chunk at a time
    tp_hidden: float = 0.0  # share of tensor parallelism's traffic that overlaps with matmuls
    teacher: object = None  # ModelConfig of the teacher, whole on each rank; None: there is none

    @property
    def ranks(self):
        """Processes, each with a device."""
        return self.replicas * self.shards * self.tp * self.pp

    @property
    def tokens(self):
        """Tokens of a micro-step per rank; tp ranks share them."""
        return self.micro_batch_size * self.seq_len // self.cp

    @property
    def is_captured(self):
        """Whether steps are replayed as CUDA graphs."""
        return self.cuda_graphs and self.compiled and self.precision != "fp16" and self.on_one_gpu

    @property
    def on_one_gpu(self):
        """Whether one GPU trains without activation checkpointing."""
        return self.ranks == 1 and not self.on_cpu and self.checkpointing == "none"

    @property
    def is_sharded(self):
        """Whether weights are shards; not where a stage of a pipeline is one process."""
        return self.ranks > self.pp and (self.strategy == "fsdp" or self.tp > 1 or self.pp > 1)

    @property
    def launched(self):
        """How kernels are launched: eager, or compiled, as blocks one by one or as segments of several."""
        by_blocks = self.is_sharded or self.strategy == "fsdp" or self.checkpointing == "full"
        return "eager" if not self.compiled else "blocks" if by_blocks else "segments"

    @property
    def attends_by_matmuls(self):
        """Whether attention runs as plain matmuls instead of torch's kernel."""
        return self.on_cpu and self.precision == "bf16" and self.seq_len <= BY_MATMULS

    def masks(self, cfg):
        """The windows of a model's layers whose attention takes a mask, so that it computes what the mask hides."""
        if not self.on_cpu and self.precision != "fp32" and not cfg.dropout:
            return []  # a kernel that computes what is seen alone
        windows = map(cfg.window_of, range(cfg.n_layer))
        return [w for w in windows if self.document_mask or (w is not None and w < self.seq_len)]

    @property
    def stream(self):
        """Bytes of a number in the residual stream."""
        return self.residual_bytes or (2 if self.precision == "bf16" else 4)

    @property
    def width(self):
        """Bytes of a number in matmuls."""
        return 4 if self.precision == "fp32" else 2


def setup_of(cfg, mesh_shape, micro_steps, precision, device_type, **others):
    """The Setup of a run with these settings on a mesh (replicas, shards, tp); others: fields of other projects."""
    p, (replicas, shards, tp) = cfg.parallel, mesh_shape
    return Setup(
        cfg.data.seq_len, cfg.data.micro_batch_size, micro_steps, replicas, shards, tp, precision, cfg.optim.optimizer,
        p.strategy, p.reshard, p.accumulate, p.grad_compression, p.activation_checkpointing,
        compiled=p.compiles(device_type),
        cuda_graphs=p.cuda_graphs is not False,
        on_cpu=device_type == "cpu",
        head_share=windows_of(cfg.model.objective).head_share(cfg.objective, cfg.data.seq_len),
        document_mask=cfg.objective.document_mask,
        pp=p.pp,
        cp=p.cp,
        **others,
    )  # fmt: skip


# ---- parameters and FLOPs


@functools.cache
def _counted(cfg):
    """(parameters, {name: shape} in a block, the same of others) of a model with one block, counted on the meta device."""
    with torch.device("meta"):
        model = replace(cfg, n_layer=1).build()
    block = {name: tuple(p.shape) for name, p in model.blocks.named_parameters()}
    others = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("blocks.")}
    return model.num_params(), block, others


def numbers(shapes):
    """Numbers in tensors of these shapes."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def num_params(cfg, padded=False):
    """Parameters of a model, tied ones once: 124,439,808 for GPT-2 124M. padded: with the rows that pad its tables."""
    count, block, others = _counted(cfg)
    first = numbers([*block.values(), *others.values()]) if padded else count
    return first + (cfg.n_layer - 1) * numbers(block.values())


def matrices_of_block(cfg):
    """The shapes of a block's matrices."""
    return [shape for shape in _counted(cfg)[1].values() if len(shape) == 2]


def block_weights(cfg):
    """Weights in a block's matmuls."""
    return numbers(matrices_of_block(cfg))


@functools.cache
def block_params(cfg, tp=1, shards=1):
    """Parameters of a block that each of tp ranks has before FSDP shards them, with the rows that pad them for it."""
    return _on_rank(_counted(cfg)[1], tp, shards)


def _on_rank(shapes, tp, shards=1):
    """Numbers that each of tp ranks has of {name: shape}: parallel.py's plan divides some, and replicates the others.

    FSDP pads a tensor's rows to a multiple of shards.
    """
    replicated, found = ("norm", "wpe", "wtt", "transform", "pooler", "pair_head", "proj.bias", "down.bias"), 0
    for name, (rows, *rest) in shapes.items():
        columns = numbers([rest])
        if not any(part in name for part in replicated):
            by_columns = name.endswith(("proj.weight", "down.weight"))
            rows, columns = (rows, columns / tp) if by_columns else (rows / tp, columns)
        found += math.ceil(rows / shards) * shards * columns
    return found


def head_weights(cfg, seq_len, head_share):
    """Weights in the heads' matmuls per token; head_share: share of tokens that go through the vocabulary's head."""
    head = cfg.vocab_size * cfg.n_embd + (cfg.n_embd**2 if not cfg.is_causal else 0)
    of_sequence = cfg.n_embd * (cfg.n_embd + 2) if PAIRS.keys() & cfg.objectives else 0
    return cfg.learns_tokens * head_share * head + of_sequence / max(1, seq_len)


def flops_per_token(cfg, seq_len, head_share=1.0, causal=False):
    """FLOPs of forward and backward per token: 6 per weight in a matmul, plus attention's.

    PaLM's convention (arXiv 2204.02311, appendix B) counts the whole seq_len x seq_len attention; causal counts the
    half that a causal model needs; both leave out what windows hide, but nothing that document masks do. head_share:
    share of tokens that go through the head, the masked ones of a masked model. Activation checkpointing never adds to
    the count.
    """
    keys = sum(keys_seen(cfg, layer, seq_len) for layer in range(cfg.n_layer))
    attention = (6 if causal and cfg.is_causal else 12) * cfg.n_head * cfg.head_width * keys
    blocks = 6 * cfg.n_layer * block_weights(cfg) + attention
    return round(cfg.passes * blocks + 6 * head_weights(cfg, seq_len, head_share))


def stages(cfg, s):
    """Blocks of each stage of a pipeline, whose costs are as equal as can be."""
    return _stages(cfg, s.seq_len, s.head_share, s.pp)


@functools.cache
def _stages(cfg, seq_len, head_share, pp):
    head = 6 * head_weights(cfg, seq_len, head_share)
    blocks = flops_per_token(cfg, seq_len, head_share) - head
    return (*stage_sizes(cfg.n_layer, pp, head * cfg.n_layer / blocks),)


def params_outside(cfg, s, stage, shards=1):
    """Parameters, padding included, that a rank of a stage has outside its blocks, before FSDP shards them."""
    of_last = ("norm_f", "transform", "head") + ("wte",) * cfg.tie_embeddings
    names = of_last * (stage == s.pp - 1) + ("wte", "wpe", "wtt", "norm_e") * (stage == 0)
    others = _counted(cfg)[2].items()
    here = {name: shape for name, shape in others if s.pp == 1 or name.partition(".")[0] in names}
    return _on_rank(here, s.tp, shards)


def keys_seen(cfg, layer, seq_len):
    """Keys that a query sees in a layer, on average over a sequence and in both directions: half are before it."""
    window = min(cfg.window_of(layer) or seq_len, seq_len)
    return 2 * window - window**2 / max(1, seq_len)


# ---- what ranks send each other


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step: `times` with n_bytes each, over `ranks`, `local` of them in one node.

    hidden_in: the computing that they overlap with: a "micro_step", the last one's backward ("step"), or "nothing".
    """

    what: str
    kind: str
    n_bytes: float
    ranks: int
    local: int
    times: float
    hidden_in: str = "nothing"


def collectives(cfg, s, gpus_per_node=8):
    """The large collectives of a step, even with no bytes or one rank; vectors and counts are left out.

    Of a pipeline, those of its first stage.
    """
    data_ranks, data_local = s.replicas * s.shards, max(1, min(gpus_per_node, s.ranks) // s.tp)
    n_layer, block, rest = stages(cfg, s)[0], block_params(cfg, s.tp, s.shards), params_outside(cfg, s, 0, s.shards)
    gradient = 2 if s.grad_compression == "bf16" else s.gradient_bytes
    found = []
    if s.tp > 1:
        # Forward gathers each norm's output for attention and MLP, and reduces and scatters their outputs; backward
        # does the reverse. Full checkpointing repeats forward except for its last reduction, which nothing needs.
        layers, again = n_layer * s.micro_steps, s.checkpointing == "full"
        hidden = s.tokens * cfg.n_embd
        residual, narrow = hidden * s.stream, hidden * s.width
        positions, is_each = s.gradient_bytes * cfg.n_embd * cfg.block_size, s.shards > 1 and s.accumulate != "whole"
        positions *= cfg.position == "learned"
        of_tp = (s.tp, min(s.tp, gpus_per_node))
        found += [
            Collective("layers", "all_gather", narrow, *of_tp, (4 + 2 * again) * layers),
            Collective("layers", "reduce_scatter", narrow, *of_tp, (4 + again) * layers),
            # Embeddings: scattered, their gradient gathered. The last layer: gathered; the head's input: gradient reduced.
            Collective("layers", "reduce_scatter", residual, *of_tp, s.micro_steps),
            Collective("layers", "all_gather", residual, *of_tp, s.micro_steps),
            Collective("layers", "all_gather", residual, *of_tp, s.micro_steps * (s.pp == 1)),
            Collective("layers", "all_reduce", residual * s.head_share, *of_tp, s.micro_steps * (s.pp == 1)),
            Collective("layers", "all_reduce", positions, *of_tp, s.micro_steps if is_each else 1),
        ]
    if s.cp > 1:  # keys and values, and their gradients
        whole = s.cp * s.tokens * 2 * cfg.kv_heads * cfg.head_width * s.width / s.tp
        of_cp, layers = (s.cp, max(1, min(s.cp, gpus_per_node // s.tp))), n_layer * s.micro_steps
        found.append(Collective("context", "all_gather", whole, *of_cp, layers * (1 + (s.checkpointing != "none"))))
        found.append(Collective("context", "reduce_scatter", whole, *of_cp, layers))
    if s.pp > 1:
        of_stages, table = (2, 1 + (s.ranks <= gpus_per_node)), s.gradient_bytes * cfg.padded_vocab_size * cfg.n_embd
        output = s.tokens * cfg.n_embd * s.stream / s.tp
        found.append(Collective("stages", "send", output, *of_stages, s.micro_steps))
        found.append(Collective("stages", "send", table / (s.tp * s.shards), *of_stages, int(cfg.tie_embeddings)))
    if s.strategy == "ddp" and s.tp == s.pp == 1:  # in buckets; the first blocks' and the embedding's are waited for
        sent = powersgd_numbers(cfg) if s.grad_compression == "powersgd" else cfg.n_layer * block + rest
        n_bytes, last = gradient * sent, cfg.n_layer * block / DDP_SEGMENTS * s.compiled + rest
        n_buckets = max(1, round(n_bytes / BUCKET))
        waited = max(1, round(n_buckets * last / (cfg.n_layer * block + rest)))
        bucket = ("gradients", "all_reduce", n_bytes / n_buckets, data_ranks, data_local)
        return found + [Collective(*bucket, waited), Collective(*bucket, n_buckets - waited, "step")]
    gathers = (2 if s.reshard else 1) * n_layer
    sums, hidden_in = (1, "step") if s.accumulate == "whole" else (s.micro_steps, "micro_step")
    of_shards = (s.shards, min(data_local, s.shards))
    of_replicas = (s.replicas, max(1, data_local // s.shards))
    return found + [
        # The first block and the layers outside the blocks are waited for; other blocks are gathered during computing.
        Collective("weights", "all_gather", s.width * block, *of_shards, s.micro_steps),
        Collective("weights", "all_gather", s.weight_bytes * rest, *of_shards, s.micro_steps),
        Collective("weights", "all_gather", s.width * block, *of_shards, (gathers - 1) * s.micro_steps, "micro_step"),
        Collective("gradients", "reduce_scatter", gradient * rest, *of_shards, sums),
        Collective("gradients", "reduce_scatter", gradient * block, *of_shards, sums * n_layer, hidden_in),
        Collective("replicas", "all_reduce", gradient * block / s.shards, *of_replicas, n_layer, "step"),
        Collective("replicas", "all_reduce", gradient * rest / s.shards, *of_replicas, 1),
    ]


def powersgd_numbers(cfg):
    """Numbers that PowerSGD sends instead of gradients after its first steps, which send all.

    A matrix is sent as two thin ones where these have less than half its numbers.
    """
    _, block, others = _counted(cfg)

    def sent(shape):
        whole, thin = numbers([shape]), min(*shape, POWERSGD_RANK) * sum(shape) if len(shape) == 2 else math.inf
        return thin if 2 * thin < whole else whole

    return sum(map(sent, [*cfg.n_layer * [*block.values()], *others.values()]))


def bytes_sent(cfg, s, gpus_per_node=8):
    """{"weights", "gradients", "replicas", "layers", "context", "stages": bytes that a rank sends in a step}, in rings."""
    sent = collections.Counter()
    for c in collectives(cfg, s, gpus_per_node):
        sent[c.what] += c.times * ROUNDS[c.kind] * (c.ranks - 1) / c.ranks * c.n_bytes
    return sent
