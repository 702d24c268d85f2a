"""Seconds of a step on a device, predicted."""

from dataclasses import replace
from typing import NamedTuple

from perf.cost import block_weights, collectives, head_weights, keys_seen, matrices_of_block, num_params, stages
from perf.hardware import CONTENTION, GRAPH_LAUNCH_S, ROUNDS, collective_s, measured_rates, rates_of

# Shares of a block's forward that backward repeats: matmuls, attention, everything else. The last three kinds are
# other projects': Megatron's selective one, torchtitan's of every second matmul, and full for every second block.
REPEATED = {
    "none": (0, 0, 0), "selective": (0, 0, 1), "full": (1, 1, 1),
    "attention": (0, 1, 0), "op": (0.5, 0, 1), "half": (0.5, 0.5, 0.5),
}  # fmt: skip


class Work(NamedTuple):
    """Work of a micro-step per rank: FLOPs, and bytes moved."""

    matmuls: float  # FLOPs in blocks
    attention: float  # FLOPs
    elementwise_bytes: float
    head: float  # FLOPs
    loss_bytes: float


def work(cfg, s):
    """The Work of a micro-step of a model in a Setup."""
    d, q, kv, f = cfg.n_embd, cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width, cfg.inner_width
    repeat_matmuls, repeat_attention, repeat_rest = REPEATED[s.checkpointing]
    tokens, passed = s.tokens / s.tp, cfg.passes * s.tokens / s.tp
    # Fused attention is 2 matmuls forward and, as it keeps no scores, 5 backward; causal, it needs half of each.
    masked, layers = s.masks(cfg), range(cfg.n_layer)
    half = 0.5 if cfg.is_causal else 1
    keys = [s.seq_len if cfg.window_of(n) in masked else half * keys_seen(cfg, n, s.seq_len) for n in layers]
    keys = cfg.n_layer * s.seq_len if s.attends_by_matmuls else sum(keys)
    # Bytes read and written: norms 2 * 5 d, residual sums 2 * 6 d, half of both in the residual stream's precision; the
    # activation function, inputs and outputs of attention. The matmuls' own traffic is in their rate.
    elementwise = 11 * d * (2 + s.stream) + 2 * ((13 if cfg.is_gated else 5) * f + 8 * (q + kv))
    return Work(
        matmuls=2 * passed * cfg.n_layer * block_weights(cfg) * (3 + repeat_matmuls),
        attention=2 * passed * q * keys * (7 + 2 * repeat_attention),
        elementwise_bytes=passed * cfg.n_layer * elementwise * (1 + repeat_rest / 3),  # forward is a third of it
        head=6 * tokens * head_weights(cfg, s.seq_len, s.head_share),
        # Eager cross-entropy is mostly in float32; compiled, it reads bf16 logits three times and writes gradients.
        loss_bytes=(8 if s.compiled else 24) * tokens * s.head_share * cfg.vocab_size,
    )


def step_seconds(cfg, s, gpu, gpus_per_node=8, efficiency=1.0, rates=None):
    """{matmul_s, attention_s, memory_s, head_s, overhead_s, bubble_s, communication_s, optimizer_s}: a step's parts.

    communication_s is the time spent waiting; bubble_s that in which stages of a pipeline have nothing to do.
    efficiency multiplies the speed of all computing but the optimizer's. rates: None for the device's own.
    """
    if rates is None:
        # Ten published rows of compiled code with tensor parallelism are no faster than eager ones.
        rates = measured_rates(gpu, cfg, s) if gpu.machine else rates_of(gpu, s.compiled and s.tp == 1, s.launched)
    w = work(cfg, s)
    peak = efficiency * gpu.peak_tflops(s.precision) * gpu.sustained * 1e12
    bandwidth = efficiency * gpu.memory_gbs * 1e9
    loss_s = 0.0 if rates.head else w.loss_bytes / bandwidth / rates.memory
    parts = {
        "matmul_s": w.matmuls / peak / rates.matmul,
        "attention_s": w.attention / peak / rates.attention,
        "memory_s": w.elementwise_bytes / bandwidth / rates.memory + cfg.n_layer * rates.layer_s / efficiency,
        "head_s": w.head / peak / (rates.head or rates.matmul) + loss_s,
    }
    optimizer_s, launch_s = optimizer_seconds(cfg, s, gpu, rates), launch_seconds(cfg, s, rates) / efficiency
    # The host runs ahead of an accelerator, and costs time where launching takes longer than all that is launched.
    hidden_s = 0.0 if s.on_cpu else sum(parts.values()) + optimizer_s / s.micro_steps
    parts["overhead_s"] = max(0.0, launch_s / s.micro_steps - hidden_s)
    if s.teacher:  # its forward, a third of its step
        alone = replace(s, teacher=None, micro_steps=1, tp=1, checkpointing="none", strategy="ddp")
        of_teacher = step_seconds(s.teacher, alone, gpu, gpus_per_node, efficiency)
        parts = {name: seconds + of_teacher[name] / 3 for name, seconds in parts.items()}
    compute = sum(parts.values())
    return {name: s.micro_steps / s.pp * seconds for name, seconds in parts.items()} | {
        "bubble_s": bubble_seconds(cfg, s, compute, parts["head_s"]),
        "communication_s": waited_seconds(cfg, s, gpu, gpus_per_node, compute / s.pp),
        "optimizer_s": optimizer_s,
    }


def bubble_seconds(cfg, s, compute, head):
    """Seconds of a step in which a stage waits. compute: seconds of a micro-step in all stages, head: those in the head.

    The first micro-step goes through all stages, and each further one takes as long as the slowest stage.
    """
    by_stage = [(compute - head) * n / cfg.n_layer for n in stages(cfg, s)]
    by_stage[-1] += head
    return compute + (s.micro_steps - 1) * max(by_stage) - s.micro_steps * compute / s.pp


def launch_seconds(cfg, s, rates):
    """Seconds of a step in which the host launches kernels: of each layer in each micro-step, or CUDA graphs."""
    if s.is_captured:
        return (s.micro_steps + 1) * GRAPH_LAUNCH_S / s.host_speed
    return (s.micro_steps * cfg.n_layer * rates.overhead_s + rates.step_overhead_s) / s.host_speed


def waited_seconds(cfg, s, gpu, gpus_per_node, compute):
    """Seconds of a step that a rank waits for others. compute: seconds that a micro-step computes."""
    seconds, hidden_bytes = {"nothing": 0.0, "micro_step": 0.0, "step": 0.0}, 0.0
    for c in collectives(cfg, s, gpus_per_node):
        if c.ranks == 1 or not c.times:
            continue
        once = collective_s(c.kind, c.n_bytes, c.ranks, c.local, gpu.link_gbs, gpu.network_gbs, gpu.nvls)
        seconds[c.hidden_in] += c.times * (1 - s.tp_hidden if c.what == "layers" else 1) * once
        hidden_bytes += c.times * ROUNDS[c.kind] * c.n_bytes * (c.hidden_in != "nothing")
    each, last = seconds["micro_step"] / s.micro_steps, seconds["step"]
    waited = seconds["nothing"] + (s.micro_steps - 1) * max(0.0, each - compute)
    # Reductions once a step overlap with its last backward.
    waited += max(0.0, each + last - compute, last - 2 / 3 * compute)
    return waited + (CONTENTION * hidden_bytes / (gpu.link_gbs * 1e9) if hidden_bytes else 0.0)


def optimizer_seconds(cfg, s, gpu, rates):
    """Seconds of clipping and of the optimizer, by the bytes that it moves; all ranks share Muon's matmuls."""
    n_bytes = {"adamw": 28, "muon": 28, "sgd": 20, "adafactor": 24}[s.optimizer] + 12  # per parameter; 12 to clip
    seconds = n_bytes * num_params(cfg) / (s.tp * s.pp * s.shards) / (rates.optimizer * gpu.memory_gbs * 1e9)
    if s.optimizer == "muon":
        sizes = [sorted(shape) for shape in matrices_of_block(cfg)]
        flops = sum(5 * 2 * few**2 * (2 * many + few) for few, many in sizes)  # 5 Newton-Schulz steps
        seconds += cfg.n_layer * flops / s.ranks / (gpu.tflops * 1e12 * (rates.muon or rates.matmul))
    return seconds
