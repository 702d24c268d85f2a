"""Memory per rank: weights, gradients, optimizer state, activations, logits."""

import contextlib
import dataclasses
import itertools

import torch

from config import UserError
from data import accumulation_steps
from devices import memory_bytes
from ops import loss_chunks
from optim import STACK
from perf.cost import block_params, block_weights, num_params, params_outside, setup_of, stages
from world import local

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "logits", "other")
ALLOCATOR_SLACK = 1.1  # reserved over allocated memory
SAVING = ("micro_batch_size", "activation_checkpointing", "shard_size")  # settings that save memory, mildest first
OPTIMIZER_BYTES = {"adamw": 8, "muon": 8, "sgd": 4, "adafactor": 0}  # state per parameter


def memory(cfg, s):
    """{category: bytes allocated on one rank at the peak}; a category may be empty at that moment.

    Of a pipeline, a rank of the stage that needs most. weights: with gathered and cast copies, and a teacher's; logits:
    all buffers of the loss; other: working memory of backward and of the optimizer.
    """
    return max((memory_of_stage(cfg, s, stage) for stage in range(s.pp)), key=lambda parts: sum(parts.values()))


def memory_of_stage(cfg, s, stage):
    """The same of a rank of one stage."""
    d, V, tokens, n_layer = cfg.n_embd, cfg.padded_vocab_size / s.tp, cfg.passes * s.tokens, stages(cfg, s)[stage]
    is_last, in_flight = stage == s.pp - 1, min(s.micro_steps, s.pp - stage)  # micro-steps ahead of backward, and it
    one_block, is_sharded = block_params(cfg, s.tp), s.is_sharded
    blocks, n = n_layer * one_block, n_layer * one_block + params_outside(cfg, s, stage)
    weights, copies, sent = s.weight_bytes * n / s.shards, 0, 0
    if is_sharded:  # gathered: this block and the next, or all of them, and the layers outside the blocks
        copies = (2 if s.reshard and s.shards > 1 else n_layer) * s.width * one_block
        copies += s.weight_bytes * (n - blocks)
        sent = (s.width + 2 * s.gradient_bytes) * one_block  # gradients before and after reduction, two blocks' at once
    elif s.width < s.weight_bytes:
        copies = 2 * n_layer * block_weights(cfg)
    is_lone_stage = s.pp > 1 and not is_sharded and s.checkpointing == "none"
    copies_kept = copies if (is_lone_stage or s.on_one_gpu) and s.precision == "bf16" else 0
    copies_later = copies if is_sharded or s.checkpointing == "none" else copies / n_layer
    error_feedback = 4 * n if s.grad_compression == "powersgd" else 0  # PowerSGD keeps what it has not sent
    gradients = s.gradient_bytes * n / (s.shards if is_sharded and s.accumulate == "sharded" else 1)
    # DDP keeps its buckets, CUDA graphs write to the same tensors.
    kept_between = s.micro_steps > 1 or s.is_captured or (s.ranks > s.pp and not is_sharded)
    before = gradients if kept_between else 0
    masks = (s.stream if s.on_cpu else 1) * d if cfg.dropout else 0
    outside = s.stream * d + 8 + masks  # the first or last norm, and dropout after the embedding
    activations = in_flight * tokens * (n_layer * block_activation_bytes(cfg, s, s.checkpointing) + outside)
    mask = s.width * s.seq_len * (s.tokens if s.document_mask else s.seq_len // s.cp)
    activations += mask * len({*s.masks(cfg)})  # one for all layers with the same window
    if s.cp > 1 and s.on_cpu and cfg.is_causal:
        activations += s.width * (2 * s.cp + 1) * (s.seq_len / (2 * s.cp)) ** 2  # context.py's masks of both pieces
    recomputed = 0 if s.checkpointing == "none" else tokens * block_activation_bytes(cfg, s)
    head, head_left = head_bytes(cfg, s) if is_last else (0, 0)
    # Gradients that flow through a block: two of the residual stream, two of the MLP's width.
    flowing = tokens * (2 * s.stream * d + 2 * s.width * cfg.inner_width) / s.tp
    embedding_gradient = s.gradient_bytes * V * d * (cfg.tie_embeddings + kept_between) * (is_last or stage == 0)
    working = {"muon": 8 * min(STACK, n_layer * cfg.inner_width * d), "adafactor": 16 * d * max(V, cfg.inner_width)}
    pool = int(s.is_captured)  # a CUDA graph keeps the memory that it works in
    moments = [  # (copies of weights, gradients, activations, logits, other)
        (copies, before, activations, head, 0),  # the loss
        (copies_later, before, activations, head_left, recomputed + sent + flowing),  # the last block
        (copies_kept, gradients, 0, 0, embedding_gradient),  # the end of backward
        (copies_kept, gradients, pool * activations, pool * head, working.get(s.optimizer, 0)),  # the optimizer
    ]
    copies, gradients, activations, logits, other = max(moments, key=sum)
    state = OPTIMIZER_BYTES[s.optimizer] if s.optimizer_bytes is None else s.optimizer_bytes
    unused = 4 * n_layer * block_weights(cfg) / s.tp if s.optimizer == "muon" else 0  # a matrix has one state
    optimizer = (n * state - unused) / s.shards
    weights += copies + teacher_bytes(s)
    return dict(zip(CATEGORIES, (weights, gradients, optimizer, activations, logits, other + error_feedback)))


def block_activation_bytes(cfg, s, checkpointing="none"):
    """Bytes per token that a block saves for backward, on each of tp ranks.

    Counted from autograd's saved tensors (torch 2.13). Under tensor parallelism the matmuls' inputs are whole on each
    rank, everything else is split.
    """
    d, q, kv, f = cfg.n_embd, cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width, cfg.inner_width
    w, stream = s.width, s.stream * cfg.n_embd
    up = 2 if cfg.is_gated else 1  # matrices that lead up to the MLP's width
    row = 4 if cfg.norm == "rmsnorm" else 8  # statistics of a normalised row
    # An eager norm saves float32 numbers on CUDA, in other projects the residual stream's. A CPU's RMSNorm saves its
    # normalised input, too.
    normed = 8 if cfg.norm == "rmsnorm" and s.on_cpu else s.stream if s.on_cpu or s.residual_bytes else 4
    head_rows, softmax_sums = cfg.n_head + cfg.kv_heads, 4 * cfg.n_head
    if checkpointing == "full":
        return stream / s.tp
    if checkpointing == "selective":  # the outputs of matmuls and of the attention kernel
        outputs = w * (q + 2 * kv + 2 * d + up * f)
        kernel = 0 if s.attends_by_matmuls or cfg.dropout else w * q + softmax_sums
        return (stream + outputs + kernel) / s.tp

    attention = w * (2 * q + 2 * kv * s.cp) + softmax_sums  # q, k, v and the output; k and v of all ranks
    if s.attends_by_matmuls or (s.on_cpu and cfg.dropout):  # plain operators: k and v repeated for each head, scores
        number = w if s.attends_by_matmuls else 4
        attention = number * (3 * q + cfg.n_head * s.seq_len * (3 if cfg.dropout else 1)) + w * q
    if s.compiled:
        # Inputs of matmuls are shared, the second residual sum is recomputed, and the MLP's product is saved once.
        qk_norms = w * (q + kv) + row * head_rows if cfg.qk_norm else 0
        return 2 * w * d + (stream + 2 * row + qk_norms + attention + w * d + w * f * (up + 1)) / s.tp
    # An eager matmul in a narrower dtype saves its own cast of the norm's output: q, k, v and the MLP's one or two.
    inputs = w * d * (2 if s.stream == w or s.tp > 1 else 3 + up)  # tensor parallelism casts before it gathers
    norms = 2 * (normed * d + row)
    qk_norms = normed * (q + kv) + row * head_rows if cfg.qk_norm else 0
    mlp = w * f * 2 * up  # inputs and output of the activation function, and of the gate's product
    masks = (w if s.on_cpu else 1) * 2 * d if cfg.dropout else 0
    return inputs + (norms + qk_norms + attention + mlp + masks) / s.tp


def head_bytes(cfg, s):
    """(peak bytes in the loss, bytes of it left when backward starts)."""
    n, d, V, w = s.tokens * s.head_share, cfg.n_embd, cfg.padded_vocab_size // s.tp, s.width
    hidden, gradient = s.stream * n * d, s.gradient_bytes * V * d
    if s.logits_bytes is not None:
        return s.logits_bytes * n * V * s.tp + 2 * hidden, gradient  # hidden states and their gradient
    chunk, few, columns = loss_chunks(V, "cpu" if s.on_cpu else "cuda")
    casts = 2 * (n * d * (s.stream != w) + V * d) if w == 2 else 0
    in_float32 = w == 2 and not s.compiled  # compiled, a pass keeps them in registers
    logits = min(n, chunk) * V * w + (min(n, chunk, few) * V * 4 if in_float32 else 0)
    logits *= 1 + (s.teacher is not None)  # the teacher's
    return hidden + casts + logits + (hidden + gradient) + w * d * min(V, columns), hidden + gradient


def teacher_bytes(s):
    """Bytes of a teacher's weights: its blocks' matrices in the run's precision, the rest in float32."""
    if s.teacher is None:
        return 0
    matrices = s.teacher.n_layer * block_weights(s.teacher)
    return s.width * matrices + 4 * (num_params(s.teacher, padded=True) - matrices)


def params_and_bytes(optimizer):
    """(parameters, bytes of them, their gradients and the optimizer's state) on this rank, all in float32.

    Adafactor's state, one number per row and column, is left out.
    """
    n_params, n_bytes = 0, 0
    for group in optimizer.param_groups:
        n = sum(local(p).numel() for p in group["params"])
        n_params += n
        n_bytes += 4 * n * (2 + (2 if "betas" in group else 1 if "momentum" in group else 0))
    return n_params, n_bytes


# ---- out of memory


@contextlib.contextmanager
def explaining_out_of_memory(cfg, world):
    """Turns torch's out-of-memory errors into a UserError that names settings that would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # a plain RuntimeError on a CPU
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        text = f"out of memory on rank {world.rank}: {remedies(cfg, world)}"
        if world.device.type == "cpu":
            text += "; MALLOC_MMAP_THRESHOLD_=65536 in the environment returns freed memory at once, which costs time"
        raise UserError(text) from error


def remedies(cfg, world):
    """Settings that would fit into this rank's memory, as text: the mildest change of each kind, and its memory."""
    available, setup = memory_bytes(world.device), setup_here(cfg, world)

    def need(change):
        return ALLOCATOR_SLACK * sum(memory(cfg.model, with_settings(setup, change)).values())

    def described(change):
        return f"{flags(change)} (about {need(change) / 2**30:.2f} GiB)"

    changes, fitting = changes_that_save(setup), {}
    for change in sorted((c for c in changes if len(c) == 1 and need(c) <= available), key=lambda c: SAVING.index(*c)):
        fitting.setdefault(*change, described(change))
    text = f"it takes about {need({}) / 2**30:.2f} GiB of {available / 2**30:.2f}; "
    if not fitting and changes and need(changes[-1]) <= available:
        fitting = {"all": described(changes[-1])}
    if fitting:
        return f"{text}what would fit: {', '.join(fitting.values())}"
    hopeless = f"even {described(changes[-1])} would not fit: " if changes else ""
    return f"{text}{hopeless}take a smaller model, or more devices"


def changes_that_save(setup):
    """Every change of settings, {name: value}, that saves memory; the mildest first, all together last."""
    kinds, n, ranks = ("none", "selective", "full"), setup.micro_batch_size, setup.shards * setup.replicas
    values = (
        [None] + [m for m in range(n - 1, 0, -1) if n % m == 0],
        [None, *kinds[kinds.index(setup.checkpointing) + 1 :]],
        [None] + [ranks] * (setup.replicas > 1 and setup.grad_compression is None),
    )
    changes = [{name: v for name, v in zip(SAVING, change) if v} for change in itertools.product(*values)]
    return sorted(filter(None, changes), key=len)


def with_settings(setup, change):
    """The Setup after one of the changes that changes_that_save returns."""
    n, shards = change.get("micro_batch_size", setup.micro_batch_size), change.get("shard_size", setup.shards)
    return dataclasses.replace(
        setup, micro_batch_size=n, micro_steps=setup.micro_steps * setup.micro_batch_size // n,
        shards=shards, replicas=setup.replicas * setup.shards // shards,
        strategy="fsdp" if shards > 1 else setup.strategy,
        checkpointing=change.get("activation_checkpointing", setup.checkpointing),
    )  # fmt: skip


def flags(change):
    """A change of settings as text for a command line."""
    named = change | ({"strategy": "fsdp"} if "shard_size" in change else {})
    return " ".join(f"--{name}={value}" for name, value in named.items())


def stages_here(cfg, world):
    """Blocks of each stage of the run that these processes train."""
    return stages(cfg.model, setup_here(cfg, world))


def setup_here(cfg, world, teacher=None):
    """The Setup of the run that these processes train. teacher: its ModelConfig, if any."""
    micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, world.data_ranks)
    return setup_of(cfg, world.mesh_shape, micro_steps, world.precision, world.device.type, teacher=teacher)
