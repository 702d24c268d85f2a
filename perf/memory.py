"""What a rank must hold: weights, gradients, optimizer state, activations, logits."""

import contextlib
import dataclasses
import itertools

import torch

from config import UserError
from data import accumulation_steps
from ops import loss_chunks
from optim import STACK
from perf.cost import block_params, block_weights, num_params, setup_of
from world import local, memory_bytes

ALLOCATOR_SLACK = 1.1  # with what is kept of freed tensors
KINDS = ("micro_batch_size", "activation_checkpointing", "shard_size")  # of settings that save memory
OPTIMIZER_BYTES = {"adamw": 8, "muon": 8, "sgd": 4, "adafactor": 0}  # state of a parameter


def memory(cfg, s):
    """Bytes that a rank has allocated when it has most, of a model in a Setup, by what they are for.

    {weights, gradients, optimizer, activations, logits, other}: weights with those that are gathered or that autocast
    has cast, logits with all that the loss needs; other is what backward and the optimizer have in hand, a block that
    is computed again, say. At the peak there may be none of some.
    """
    d, V = cfg.n_embd, cfg.padded_vocab_size / s.tp
    blocks, n = cfg.n_layer * block_params(cfg) / s.tp, num_params(cfg, padded=True) / s.tp
    one_block, is_sharded = blocks / cfg.n_layer, s.ranks > 1 and (s.strategy == "fsdp" or s.tp > 1)
    weights, copies, sent = s.weight_bytes * n / s.shards, 0, 0
    if is_sharded:  # the block that computes and the next are gathered, or all, and all else that is not in blocks
        copies = (2 if s.reshard and s.shards > 1 else cfg.n_layer) * s.width * one_block
        copies += s.weight_bytes * (n - blocks)
        sent = (s.width + 2 * s.gradient_bytes) * one_block  # gradients as they come, and go, two blocks' at a time
    elif s.width < s.weight_bytes:
        copies = 2 * cfg.n_layer * block_weights(cfg)
    copies_later = copies if is_sharded or s.recomputed == "none" else copies / cfg.n_layer
    unsent = 4 * n if s.grad_compression == "powersgd" else 0  # which it remembers, for the next steps
    gradients = s.gradient_bytes * n / (s.shards if is_sharded and s.accumulate == "sharded" else 1)
    are_there_before = s.micro_steps > 1 or (s.ranks > 1 and not is_sharded)  # DDP keeps its buckets
    before = gradients if are_there_before else 0
    activations, again = activation_bytes(cfg, s)
    head, head_left = head_bytes(cfg, s)
    of_embedding = s.gradient_bytes * V * d * (cfg.tie_embeddings + are_there_before)
    in_hand = {"muon": 8 * min(STACK, cfg.n_layer * cfg.inner_width * d), "adafactor": 16 * d * max(V, cfg.inner_width)}
    moments = [  # (copies of weights, gradients, activations, logits, other)
        (copies, before, activations, head, 0),  # the loss
        (copies_later, before, activations, head_left, again + sent + backward_bytes(cfg, s)),  # last block
        (0, gradients, 0, 0, of_embedding),  # the end of backward
        (0, gradients, 0, 0, in_hand.get(s.optimizer, 0)),  # the optimizer
    ]
    copies, gradients, activations, logits, other = max(moments, key=sum)
    return {
        "weights": weights + copies,
        "gradients": gradients,
        "optimizer": optimizer_bytes(cfg, s, n),
        "activations": activations,
        "logits": logits,
        "other": other + unsent,
    }


def optimizer_bytes(cfg, s, n):
    """Bytes of the optimizer's state on a rank, of n parameters before they are sharded."""
    each = OPTIMIZER_BYTES[s.optimizer] if s.optimizer_bytes is None else s.optimizer_bytes
    without = 4 * cfg.n_layer * block_weights(cfg) / s.tp if s.optimizer == "muon" else 0  # blocks' matrices have half
    return (n * each - without) / s.shards


def activation_bytes(cfg, s):
    """Bytes that a micro-step keeps for backward, and those of a block that backward computes again."""
    per_token = block_activation_bytes(cfg, s)
    kept = per_token if s.recomputed == "none" else block_activation_bytes(cfg, s, s.recomputed)
    masks = (1 if not s.on_cpu else s.residual_bytes) * cfg.n_embd if cfg.dropout else 0
    outside = s.residual_bytes * cfg.n_embd + 8 + masks  # of the first norm or of the last, and dropout's
    again = 0 if s.recomputed == "none" else per_token
    return s.tokens * (cfg.n_layer * kept + outside), s.tokens * again


def block_activation_bytes(cfg, s, recomputed="none"):
    """Bytes a token that a block keeps for backward, on each of tp ranks.

    Counted from what autograd saves (torch 2.13); ranks that share layers gather each norm's output whole.
    """
    d, q, kv, f, w = cfg.n_embd, cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width, cfg.inner_width, s.width
    up = 2 if cfg.is_gated else 1  # matrices
    kernel = w * (2 * q + 2 * kv) + 4 * cfg.n_head  # queries, keys, values, what comes out, and sums of softmax
    x = s.residual_bytes * d
    if recomputed == "full":
        return x / s.tp
    if recomputed == "selective":  # what matmuls gave, and the kernel
        runs_again = s.attends_by_matmuls or cfg.dropout
        return (x + w * (q + 2 * kv + 2 * d + up * f) + (0 if runs_again else w * q + 4 * cfg.n_head)) / s.tp
    attention = kernel
    # By matmuls, or in torch's way round its kernel: with heads' copies of keys and values, and attention's weights.
    if s.attends_by_matmuls or (s.on_cpu and cfg.dropout):
        score = s.width if s.attends_by_matmuls else 4
        attention = score * (3 * q + cfg.n_head * s.seq_len * (3 if cfg.dropout else 1)) + w * q
    stats = 4 if cfg.norm == "rmsnorm" else 8  # bytes a norm and row
    unfused = 2 if cfg.norm == "rmsnorm" and s.on_cpu else 1  # CPUs keep what is normalised, too
    norms = 2 * (unfused * x + stats)
    if cfg.qk_norm:
        norms += unfused * 4 * (q + kv) + stats * (cfg.n_head + cfg.kv_heads)
    # Norms' outputs, eager in a copy for each matmul where these are narrower.
    inputs = w * d * (2 if s.compiled or s.residual_bytes == w else 3 + up)
    if s.compiled:  # the non-linearity's inputs and the matmuls', but sums of the residual stream are made again
        qk_norm = w * (q + kv) + stats * (cfg.n_head + cfg.kv_heads) if cfg.qk_norm else 0
        return inputs + (x + 2 * stats + qk_norm + attention + w * d + w * f * (up + 1)) / s.tp
    mlp = w * f * (2 * up)  # up, and what follows the non-linearity, with a gate
    masks = (w if s.on_cpu else 1) * 2 * d if cfg.dropout else 0
    return inputs + (norms + attention + mlp + masks) / s.tp


def head_bytes(cfg, s):
    """Bytes that the loss has at most, and those that backward starts with."""
    n, d, V, w = s.tokens * s.head_share, cfg.n_embd, cfg.padded_vocab_size // s.tp, s.width
    gradients = 4 * n * d + s.gradient_bytes * V * d
    hidden = 4 * n * d
    if s.logits_bytes is not None:
        return s.logits_bytes * n * V * s.tp + hidden, s.gradient_bytes * V * d
    rows, few_rows, columns = loss_chunks(V, "cpu" if s.on_cpu else "cuda")
    casts = 2 * (n * d + V * d) if w == 2 else 0
    chunk = min(n, rows) * V * w + (min(n, rows, few_rows) * V * 4 if w == 2 else 0)
    return hidden + casts + chunk + gradients + w * d * min(V, columns), gradients


def backward_bytes(cfg, s):
    """Bytes of gradients that flow through a block: of the residual stream, of the MLP's width."""
    return s.tokens * (2 * s.residual_bytes * cfg.n_embd + 2 * s.width * cfg.inner_width) / s.tp


def held(optimizer):
    """(parameters, bytes of them, their gradients and the optimizer's state) that this rank holds, all in float32.

    Adafactor's state, one number a row and a column, is left out.
    """
    numbers, n_bytes = 0, 0
    for group in optimizer.param_groups:
        n = sum(local(p).numel() for p in group["params"])
        numbers += n
        n_bytes += 4 * n * (2 + (2 if "betas" in group else 1 if "momentum" in group else 0))
    return numbers, n_bytes


# ---- when it runs out


@contextlib.contextmanager
def explaining_out_of_memory(cfg, world):
    """Makes torch's error of memory that ran out a UserError that names what would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # of a CPU it is a plain RuntimeError
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        hint = "; the environment's MALLOC_MMAP_THRESHOLD_=65536 gives freed memory back, which costs time"
        text = f"out of memory on rank {world.rank}: {remedies(cfg, world)}{hint if world.device.type == 'cpu' else ''}"
        raise UserError(text) from error


def remedies(cfg, world):
    """What would fit into this rank's memory, in words: the mildest setting of each kind, and about what it needs."""
    available, setup = memory_bytes(world.device), setup_here(cfg, world)

    def need(change):
        return ALLOCATOR_SLACK * sum(memory(cfg.model, with_settings(setup, change)).values())

    def told(change):
        return f"{flags(change)} (about {need(change) / 2**30:.2f} GiB)"

    changes = changes_that_save(setup)
    fitting = {}
    for change in sorted((c for c in changes if len(c) == 1 and need(c) <= available), key=lambda c: KINDS.index(*c)):
        fitting.setdefault(*change, told(change))
    text = f"about {need({}) / 2**30:.2f} GiB are needed, of {available / 2**30:.2f}; "
    if not fitting and changes and need(changes[-1]) <= available:
        fitting = {"all": told(changes[-1])}
    if fitting:
        return text + "what would fit: " + ", ".join(fitting.values())
    hopeless = f"even {told(changes[-1])} would not fit: " if changes else ""
    return text + hopeless + "take a smaller model, or more devices"


def changes_that_save(setup):
    """Every change of settings, {name: value}, that saves memory: the mildest first, all that there is last."""
    recomputed = ("none", "selective", "full")
    n, shards = setup.micro_batch_size, setup.shards * setup.copies
    values = (
        [None] + [m for m in range(n - 1, 0, -1) if n % m == 0],
        [None, *recomputed[recomputed.index(setup.recomputed) + 1 :]],
        [None] + [shards] * (setup.copies > 1 and setup.grad_compression is None),
    )
    changes = [{name: v for name, v in zip(KINDS, change) if v} for change in itertools.product(*values)]
    return sorted(filter(None, changes), key=len)


def with_settings(setup, change):
    """The Setup after a change of settings, of those that changes_that_save names."""
    n = change.get("micro_batch_size", setup.micro_batch_size)
    shards = change.get("shard_size", setup.shards)
    return dataclasses.replace(
        setup,
        micro_batch_size=n,
        micro_steps=setup.micro_steps * setup.micro_batch_size // n,
        shards=shards,
        copies=setup.copies * setup.shards // shards,
        strategy="fsdp" if shards > 1 else setup.strategy,
        recomputed=change.get("activation_checkpointing", setup.recomputed),
    )


def flags(change):
    """A change of settings as a command line has it."""
    named = [f"--{name}={value}" for name, value in change.items()]
    return " ".join(named + ["--strategy=fsdp"] * ("shard_size" in change))


def setup_here(cfg, world):
    """The Setup of the run that these processes are."""
    mesh_shape = (1, 1, 1) if world.mesh is None else tuple(world.mesh.shape)
    micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, world.data_ranks)
    return setup_of(cfg, mesh_shape, micro_steps, world.precision, world.device.type)
