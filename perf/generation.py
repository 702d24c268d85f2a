"""Cost of generation: bytes of weights and cache, and the least time of a token, by precision and batch."""

import math

from model import parameter_shapes
from perf.cost import block_weights
from perf.hardware import GRAPH_LAUNCH_S

BATCHES = (1, 16)
PRECISIONS = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 2, "int4": 2}  # bytes per number that is not quantized
GROUP = 32  # weights of a row that share a scale and a zero point in int4; in int8 a row shares them


def weight_bytes(cfg, precision):
    """(bytes of a model's weights, bytes of those that a token reads): of a table it looks up one row.

    As torchao has them: int8 has a float32 scale and a zero point of one byte per row. int4 has them per GROUP, its
    scale in the other weights' dtype, and counts as packed, which GPUs' kernels and files have.
    """
    held = looked_up = 0
    for name, shape in parameter_shapes(cfg).items():
        n, is_matrix = math.prod(shape), len(shape) == 2
        size = PRECISIONS[precision] * n
        if is_matrix and name.startswith("blocks.") and precision.startswith("int"):
            size = n + 5 * shape[0] if precision == "int8" else n // 2 + 3 * n // GROUP
        held += size
        if name in ("wpe.weight", "wtt.weight") or name == "wte.weight" and not cfg.tie_embeddings:
            looked_up += size
    return held, held - looked_up


def cache_bytes(cfg, context, precision):
    """Bytes of a sequence's keys and values; generation.py makes room for a multiple of 64 tokens."""
    return 2 * PRECISIONS[precision] * cfg.n_layer * cfg.kv_heads * cfg.head_width * (context + -context % 64)


def token_parts(cfg, gpu, precision, context, batch, host_speed=1.0):
    """{what: seconds} of a step that gives each sequence of a batch a token, its context full.

    Memory and matmuls overlap. Layers with a window read their whole cache, as a CUDA graph does. launching: on a GPU a
    CUDA graph's; a CPU's is unknown.
    """
    n_bytes = weight_bytes(cfg, precision)[1] + batch * cache_bytes(cfg, context, precision)
    weights = cfg.n_layer * block_weights(cfg) + cfg.padded_vocab_size * cfg.n_embd
    flops = batch * (2 * weights + 4 * cfg.n_layer * cfg.n_head * cfg.head_width * context)
    peak = gpu.peak_tflops("fp32" if precision == "fp32" else "bf16") * gpu.sustained
    return {
        "memory": n_bytes / (gpu.memory_gbs * 1e9),
        "matmuls": flops / (peak * 1e12),
        "launching": GRAPH_LAUNCH_S / host_speed if gpu.device_type == "cuda" else 0.0,
    }


def generation(cfg, gpu, context, available, host_speed=1.0):
    """[figures] of generation on one device, for each precision, with 1, 16 and as many sequences as fit."""
    found = []
    for precision in ("fp32", "bf16" if gpu.has_bf16 else "fp16", "int8", "int4"):
        if precision == "int4" and any(shape[1] % GROUP for shape in matrices(cfg)):
            continue  # compress.py refuses it
        held, each = weight_bytes(cfg, precision)[0], cache_bytes(cfg, context, precision)
        most = max(0, int((available - held) // (each + 4 * cfg.padded_vocab_size)))  # with its float32 logits
        for batch in sorted({*BATCHES, most} - {0}):
            parts = token_parts(cfg, gpu, precision, context, batch, host_speed)
            found.append({
                "precision": precision, "batch": batch, "fits": batch <= most, "largest_batch": most,
                "weights_gib": held / 2**30, "cache_gib": batch * each / 2**30,
                "tokens_per_s": batch / (max(parts["memory"], parts["matmuls"]) + parts["launching"]),
                "bottleneck": max(parts, key=parts.get),
            })  # fmt: skip
    return found


def matrices(cfg):
    """Shapes of the matrices in a model's blocks."""
    return [s for name, s in parameter_shapes(cfg).items() if name.startswith("blocks.") and len(s) == 2]


def report_generation(cfg, gpu, context, available, rows, precision):
    """Yields the lines of a plan of generation; precision: the one that the first line answers for."""
    asked = [row for row in rows if row["precision"] == precision]
    fitting = [row for row in asked if row["fits"]]
    if fitting:
        speeds = ", ".join(f"{row['tokens_per_s']:,.0f} with {row['batch']:,}" for row in fitting)
        yield f"answer     fits on {gpu.name} in {precision}: at most {speeds} sequences, in tokens/s"
    else:
        others = dict.fromkeys(row["precision"] for row in rows if row["fits"])
        remedy = f"fits in {', '.join(others)}" if others else "nor in any other precision; take a larger GPU"
        yield f"answer     does not fit on {gpu.name} in {precision}; {remedy}"
    yield f"model      {cfg.n_layer} layers, width {cfg.n_embd}; each sequence {context:,} tokens long"
    yield f"device     {gpu.name}: {gpu.memory_gbs:,.4g} GB/s, {available / 2**30:,.4g} GiB available"
    yield f"{'precision':<10} {'sequences':>9} {'weights GiB':>12} {'cache GiB':>10} {'fits':>5} {'tokens/s':>10}  bottleneck"
    for row in rows:
        yield (
            f"{row['precision']:<10} {row['batch']:>9,} {row['weights_gib']:>12.3f} {row['cache_gib']:>10.3f} "
            f"{'yes' if row['fits'] else 'no':>5} {row['tokens_per_s']:>10,.0f}  {row['bottleneck']}"
        )
    launch = "a CUDA graph's launch" if gpu.device_type == "cuda" else "no time to launch operators, which bounds small models"
    yield f"assumed    peak bandwidth and matmuls, {launch}; int8 and int4 in the blocks, 16 bits elsewhere"
