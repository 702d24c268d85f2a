"""What a step costs: parameters, FLOPs, bytes that ranks send, and, on a known device, seconds."""

from dataclasses import dataclass, replace

from objective import OBJECTIVES
from ops import BY_MATMULS
from parallel import POWERSGD_RANK
from perf.hardware import CONTENTION, COPY_SHARE, collective_s, nvls_share, rates_of, rounds

# Shares of a block's forward that backward repeats: of matmuls, attention, everything else. The last three are of other
# projects: Megatron's selective recomputation, torchtitan's of every second matmul, every second block's.
RECOMPUTED = {
    "none": (0, 0, 0), "selective": (0, 0, 1), "full": (1, 1, 1),
    "attention": (0, 1, 0), "op": (0.5, 0, 1), "half": (0.5, 0.5, 0.5),
}  # fmt: skip
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once


@dataclass(frozen=True)
class Setup:
    """All that the cost of a step depends on, beside the model: its batch, its layout over ranks, how it runs."""

    seq_len: int
    micro_batch_size: int  # sequences
    micro_steps: int = 1
    copies: int = 1  # of the model, and ranks of each copy: shards x tp
    shards: int = 1
    tp: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw"
    strategy: str = "ddp"
    reshard: bool = True
    accumulate: str = "sharded"
    grad_compression: str | None = None
    recomputed: str = "none"
    compiled: bool = False
    on_cpu: bool = False
    head_share: float = 1.0  # share of tokens that go through the head
    weight_bytes: float = 4  # of a parameter, as it is kept; this and the rest differ in other projects
    gradient_bytes: float = 4
    optimizer_bytes: float | None = None  # none: the optimizer's
    residual_bytes: float = 4  # of a number of the residual stream
    logits_bytes: float | None = None  # of a logit, where the loss holds all at once; none: it goes chunk by chunk
    tp_hidden: float = 0.0  # share of tensor parallelism's traffic that hides behind matmuls

    @property
    def ranks(self):
        """Processes, each with a device."""
        return self.copies * self.shards * self.tp

    @property
    def tokens(self):
        """Tokens of a micro-step on a rank, those that tp ranks share counted whole."""
        return self.micro_batch_size * self.seq_len

    @property
    def attends_by_matmuls(self):
        """Whether attention runs as matmuls, not in torch's kernel."""
        return self.on_cpu and self.precision == "bf16" and self.seq_len <= BY_MATMULS

    @property
    def width(self):
        """Bytes of a number in a matmul."""
        return 4 if self.precision == "fp32" else 2


def setup_of(cfg, mesh_shape, micro_steps, precision, device_type):
    """The Setup of a run with these settings on a mesh (copies, shards, tp)."""
    p = cfg.parallel
    return Setup(
        cfg.data.seq_len,
        cfg.data.micro_batch_size,
        micro_steps,
        *mesh_shape,
        precision=precision,
        optimizer=cfg.optim.optimizer,
        strategy=p.strategy,
        reshard=p.reshard,
        accumulate=p.accumulate,
        grad_compression=p.grad_compression,
        recomputed=p.activation_checkpointing,
        compiled=device_type == "cuda" if p.compile is None else p.compile,
        on_cpu=device_type == "cpu",
        head_share=OBJECTIVES[cfg.model.objective].head_share(cfg.objective, cfg.data.seq_len),
    )


def num_params(cfg, padded=False):
    """Parameters of a model in closed form, tied ones once: 124,439,808 for GPT-2 124M.

    padded: with the rows that pad its tables.
    """
    vocab_size = cfg.padded_vocab_size if padded else cfg.vocab_size
    d, biases = cfg.n_embd, int(cfg.bias)
    of_norm = 2 if cfg.norm == "layernorm" and cfg.bias else 1  # vectors of a norm
    tables = vocab_size * (1 if cfg.tie_embeddings else 2) + (cfg.n_token_types or 0)
    tables += cfg.block_size if cfg.position == "learned" else 0
    transform = d * d + biases * (d + vocab_size) + of_norm * d if not cfg.is_causal else 0
    return tables * d + cfg.n_layer * block_params(cfg) + of_norm * d + transform


def flops_per_token(cfg, seq_len, head_share=1.0, causal=False):
    """FLOPs of forward and backward per token: 6 per weight in a matmul, and attention's.

    PaLM's convention (arXiv 2204.02311, appendix B) counts the whole seq_len x seq_len attention; causal counts the
    half that a causal model needs. head_share is the share of tokens that go through the head, of masked models the
    masked ones. Recomputation is never counted.
    """
    head = cfg.vocab_size * cfg.n_embd + (cfg.n_embd**2 if not cfg.is_causal else 0)
    attention = 6 if causal and cfg.is_causal else 12
    attention *= cfg.n_layer * cfg.n_head * cfg.head_width * seq_len
    return round(6 * (cfg.n_layer * block_weights(cfg) + head_share * head) + attention)


def block_matrices(cfg):
    """(rows, columns) of a block's matrices: queries, keys, values, projection; of the MLP up, gate if any, down."""
    d, q, kv, f = cfg.n_embd, cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width, cfg.inner_width
    return [(q, d), (kv, d), (kv, d), (d, q)] + [(f, d)] * (2 if cfg.is_gated else 1) + [(d, f)]


def block_weights(cfg):
    """Weights in a block's matmuls."""
    return sum(rows * columns for rows, columns in block_matrices(cfg))


def block_params(cfg):
    """Parameters of a block."""
    d, biases = cfg.n_embd, int(cfg.bias)
    q, kv = cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width
    matrices_up = 2 if cfg.is_gated else 1
    of_norm = 2 if cfg.norm == "layernorm" and cfg.bias else 1  # vectors of a norm
    norms = of_norm * 2 * (d + cfg.qk_norm * cfg.head_width)
    return block_weights(cfg) + biases * (q + 2 * kv + d + matrices_up * cfg.inner_width + d) + norms


# ---- what ranks send each other


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step: `times` of n_bytes each, over ranks of which `local` share a node.

    hidden_in tells what goes on meanwhile: a "micro_step", the last one's backward ("step"), or "nothing".
    """

    what: str
    kind: str
    n_bytes: float
    ranks: int
    local: int
    times: float
    hidden_in: str = "nothing"

    @property
    def bytes_sent(self):
        """Bytes that one rank sends, by a ring."""
        return self.times * rounds(self.kind) * (self.ranks - 1) / self.ranks * self.n_bytes


def collectives(cfg, s, gpus_per_node=8):
    """All the large collectives of a step, those of no bytes or one rank included.

    Not those of vectors, losses and counts, which cost time but hardly bytes.
    """
    tp_local = min(s.tp, gpus_per_node)
    data_ranks, data_local = s.copies * s.shards, max(1, min(gpus_per_node, s.ranks) // s.tp)
    block = block_params(cfg) / s.tp
    rest = num_params(cfg, padded=True) / s.tp - cfg.n_layer * block
    gradient = 2 if s.grad_compression == "bf16" else s.gradient_bytes
    found = []
    if s.tp > 1:
        # What a norm gives is gathered in front of attention and of the MLP, what they give is summed and scattered;
        # backward the other way round. Full recomputation repeats forward but for its last sum, which nothing needs.
        numbers, layers, again = s.tokens * cfg.n_embd, cfg.n_layer * s.micro_steps, s.recomputed == "full"
        of_tp = (s.tp, tp_local)
        wide, narrow = s.residual_bytes * numbers, s.width * numbers
        found += [
            Collective("layers", "all_gather", wide, *of_tp, (2 + 2 * again) * layers),
            Collective("layers", "reduce_scatter", narrow, *of_tp, (2 + again) * layers),
            Collective("layers", "all_gather", narrow, *of_tp, 2 * layers),
            Collective("layers", "reduce_scatter", wide, *of_tp, 2 * layers),
            # Embeddings scattered, their gradient gathered, the last layer gathered, its gradient summed.
            Collective("layers", "reduce_scatter", wide, *of_tp, s.micro_steps),
            Collective("layers", "all_gather", wide, *of_tp, 2 * s.micro_steps),
            Collective("layers", "all_reduce", wide, *of_tp, s.micro_steps),
        ]
    if s.strategy == "ddp" and s.tp == 1:  # in buckets, of which the last has nothing to hide in
        numbers = powersgd_numbers(cfg) if s.grad_compression == "powersgd" else cfg.n_layer * block + rest
        n_bytes = gradient * numbers
        n_buckets = max(1, round(n_bytes / BUCKET))
        bucket = ("gradients", "all_reduce", n_bytes / n_buckets, data_ranks, data_local)
        return found + [Collective(*bucket, 1), Collective(*bucket, n_buckets - 1, "step")]
    local = min(data_local, s.shards)
    sums, whole = (1, True) if s.accumulate == "whole" else (s.micro_steps, False)
    gathers = (2 if s.reshard else 1) * cfg.n_layer
    copies_local = max(1, data_local // s.shards)
    weights, gradients, copies = (
        ("weights", "all_gather", s.shards, local),
        ("gradients", "reduce_scatter", s.shards, local),
        ("copies", "all_reduce", s.copies, copies_local),
    )

    def add(of, n_bytes, times, hidden_in="nothing"):
        what, kind, ranks, local = of
        found.append(Collective(what, kind, n_bytes, ranks, local, times, hidden_in))

    # The first block and what is outside the blocks are waited for, the rest is gathered while others compute.
    add(weights, s.width * block, s.micro_steps)
    add(weights, s.residual_bytes * rest, s.micro_steps)
    add(weights, s.width * block, (gathers - 1) * s.micro_steps, "micro_step")
    add(gradients, gradient * rest, sums)
    add(gradients, gradient * block, sums * cfg.n_layer, "step" if whole else "micro_step")
    add(copies, gradient * block / s.shards, cfg.n_layer, "step")
    add(copies, gradient * rest / s.shards, 1)
    return found


def powersgd_numbers(cfg):
    """Numbers that PowerSGD sends in place of gradients, after its first steps, which send all.

    A matrix goes as two thin ones, where these are less than half of it.
    """
    tables = [cfg.padded_vocab_size] * (1 if cfg.tie_embeddings else 2) + [cfg.n_token_types or 0]
    tables += [cfg.block_size] if cfg.position == "learned" else []
    tables += [cfg.n_embd] if not cfg.is_causal else []
    matrices = cfg.n_layer * block_matrices(cfg) + [(rows, cfg.n_embd) for rows in tables]
    vectors = num_params(cfg, padded=True) - sum(rows * columns for rows, columns in matrices)
    thin = [(min(rows, columns, POWERSGD_RANK) * (rows + columns), rows * columns) for rows, columns in matrices]
    return vectors + sum(few if 2 * few < many else many for few, many in thin)


def bytes_sent(cfg, s, gpus_per_node=8):
    """{what for: bytes that a rank sends in a step}, for weights, gradients, copies of the model, layers."""
    sent = {}
    for c in collectives(cfg, s, gpus_per_node):
        sent[c.what] = sent.get(c.what, 0) + c.bytes_sent
    return sent


# ---- seconds


def work(cfg, s):
    """Work of a micro-step on a rank: FLOPs of matmuls, FLOPs of attention, bytes that everything else moves."""
    d, q, kv, f = cfg.n_embd, cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width, cfg.inner_width
    matmuls_again, attention_again, rest_again = RECOMPUTED[s.recomputed]
    tokens = s.tokens / s.tp
    head = s.head_share * d * (cfg.vocab_size + (d if not cfg.is_causal else 0))
    matmuls = 2 * tokens * (cfg.n_layer * block_weights(cfg) * (3 + matmuls_again) + 3 * head)
    # Fused attention is 2 matmuls forward and, as it keeps no scores, 5 backward; causal, it needs half of each.
    attention = 2 * tokens * cfg.n_layer * q * s.seq_len * (7 + 2 * attention_again)
    attention *= 0.5 if cfg.is_causal else 1
    # Numbers read and written: norms 2 * 5 d, residual sums 2 * 6 d, the activation function, what goes into and comes
    # out of attention. Matmuls' own traffic is in their rate.
    numbers = 22 * d + (13 if cfg.is_gated else 5) * f + 8 * (q + kv)
    n_bytes = 2 * tokens * cfg.n_layer * numbers * (1 + rest_again / 3)  # a third of it is forward's
    n_bytes += 24 * tokens * s.head_share * cfg.vocab_size  # cross-entropy, mostly in float32
    return matmuls, attention, n_bytes


def step_seconds(cfg, s, gpu, gpus_per_node=8, efficiency=1.0, rates=None):
    """{matmul_s, attention_s, memory_s, communication_s, optimizer_s} of a step on a known GPU; their sum is it.

    communication_s is what is waited for. efficiency multiplies the pace of all computing but the optimizer's.
    """
    # Ten published rows of compiled code with tensor parallelism are no faster than eager ones.
    rates = rates or rates_of(gpu, s.compiled and s.tp == 1)
    matmuls, attention, n_bytes = work(cfg, s)
    peak = efficiency * gpu.peak_tflops(s.precision) * gpu.sustained * 1e12
    bandwidth = efficiency * gpu.memory_gbs * 1e9
    parts = matmuls / peak / rates.matmul, attention / peak / rates.attention, n_bytes / bandwidth / rates.memory
    return {
        "matmul_s": s.micro_steps * parts[0],
        "attention_s": s.micro_steps * parts[1],
        "memory_s": s.micro_steps * parts[2],
        "communication_s": waited_seconds(cfg, s, gpu, gpus_per_node, sum(parts)),
        "optimizer_s": optimizer_seconds(cfg, s, gpu, rates),
    }


def waited_seconds(cfg, s, gpu, gpus_per_node, compute):
    """Seconds of a step in which a rank waits for others, where a micro-step computes for so many."""
    seconds, hidden_bytes = {"nothing": 0.0, "micro_step": 0.0, "step": 0.0}, 0.0
    for c in collectives(cfg, s, gpus_per_node):
        if c.ranks == 1 or not c.times:
            continue
        if c.what == "layers":
            c = replace(c, times=c.times * (1 - s.tp_hidden))
        once = collective_s(c.kind, c.n_bytes, c.ranks, c.local, gpu.link_gbs, gpu.network_gbs, nvls_share(gpu))
        seconds[c.hidden_in] += c.times * once
        hidden_bytes += c.times * rounds(c.kind) * c.n_bytes * (c.hidden_in != "nothing")
    each, last = seconds["micro_step"] / s.micro_steps, seconds["step"]
    waited = seconds["nothing"] + (s.micro_steps - 1) * max(0.0, each - compute)
    waited += max(0.0, each + last - compute, last - 2 / 3 * compute)  # sums of a whole step hide in its last backward
    return waited + (CONTENTION * hidden_bytes / (gpu.link_gbs * 1e9) if hidden_bytes else 0.0)


def optimizer_seconds(cfg, s, gpu, rates):
    """Seconds of clipping and of the optimizer, by what it reads and writes; Muon's matmuls are shared by all ranks."""
    n_bytes = {"adamw": 28, "muon": 28, "sgd": 20, "adafactor": 24}[s.optimizer] + 12  # of a parameter; 12 to clip
    seconds = n_bytes * num_params(cfg) / (s.tp * s.shards) / (COPY_SHARE * gpu.memory_gbs * 1e9)
    if s.optimizer == "muon":
        sizes = [(min(shape), max(shape)) for shape in block_matrices(cfg)]
        flops = sum(5 * 2 * few**2 * (2 * many + few) for few, many in sizes)  # 5 Newton-Schulz steps
        seconds += cfg.n_layer * flops / s.ranks / (gpu.tflops * 1e12 * rates.matmul)
    return seconds
