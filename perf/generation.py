"""Cost of generation: bytes of weights and cache, and tokens/s at most, by precision and sequences at a time."""

import functools
import math

from model import parameter_shapes
from perf.cost import block_weights
from perf.hardware import GRAPH_LAUNCH_S, kind_of_block

BATCHES = (1, 16)
BITS = {"int8": 8, "int4": 4}  # of the blocks' matrices; everything else is in 16 bits then, the cache too
GROUP = 32  # weights of a row that share a scale in int4
SCALE_BYTES = {"int8": 5, "int4": 3}  # torchao's: of each row, of each group; float32 or bf16, and a zero point
LOGITS_BYTES = 18  # per logit while a token is drawn: the model's 2, and float32 logits, differences, shares, sums
FORWARD = 1 / 3  # share of forward and backward
shapes_of = functools.cache(parameter_shapes)


def width(precision):
    """Bytes of a number in the cache, and in whatever is not quantized."""
    return 4 if precision == "fp32" else 2


def weight_bytes(cfg, precision):
    """(bytes of a model's weights, bytes of those that a token reads): all but tables where it looks up a row."""
    held = looked_up = 0
    for name, shape in shapes_of(cfg).items():
        n, is_matrix = math.prod(shape), len(shape) == 2
        n_bytes = n * width(precision)
        if precision in BITS and is_matrix and name.startswith("blocks."):
            n_scales = shape[0] if precision == "int8" else n // GROUP
            n_bytes = n * BITS[precision] // 8 + n_scales * SCALE_BYTES[precision]
        held += n_bytes
        if is_matrix and name.startswith("w") and not (name == "wte.weight" and cfg.tie_embeddings):
            looked_up += n_bytes
    return held, held - looked_up


def cache_bytes(cfg, context, precision):
    """Bytes of keys and values of a sequence of context tokens."""
    return 2 * cfg.n_layer * cfg.kv_heads * cfg.head_width * context * width(precision)


def token_seconds(cfg, gpu, precision, context, batch, host_speed=1.0):
    """{what: least seconds} of a step that gives each of a batch's sequences its next token, all caches full.

    A GPU reads memory while it multiplies; the host launches before that, on a GPU one CUDA graph, on this machine
    each block's operators in a share of the time that python bench.py measured for forward and backward.
    """
    n_bytes = weight_bytes(cfg, precision)[1] + batch * cache_bytes(cfg, context, precision)
    attention = 4 * cfg.n_layer * cfg.n_head * cfg.head_width * context
    flops = batch * (2 * (cfg.n_layer * block_weights(cfg) + cfg.vocab_size * cfg.n_embd) + attention)
    launch_s = GRAPH_LAUNCH_S / host_speed
    if gpu.machine and gpu.device_type == "cpu":
        launch_s = cfg.n_layer * FORWARD * gpu.machine["rates"]["overhead_ms"][kind_of_block(cfg)] / 1e3
    peak = gpu.peak_tflops("fp32" if precision == "fp32" else "bf16") * gpu.sustained * 1e12
    return {"memory": n_bytes / gpu.memory_gbs / 1e9, "matmuls": flops / peak, "launching": launch_s}


def generation(cfg, gpu, context, available, host_speed=1.0):
    """The figures of generation on one GPU, by precision; available: bytes of memory."""
    found = {}
    for precision in ("fp32", "bf16" if gpu.has_bf16 else "fp16", *BITS):
        held, each = weight_bytes(cfg, precision)[0], cache_bytes(cfg, context, precision)
        largest = max(0, int((available - held) // (each + LOGITS_BYTES * cfg.vocab_size)))
        rows = []
        for batch in sorted(n for n in {*BATCHES, largest} if 0 < n <= largest):
            parts = token_seconds(cfg, gpu, precision, context, batch, host_speed)
            step_s = max(parts["memory"], parts["matmuls"]) + parts["launching"]
            bound = max(parts, key=parts.get)
            total = held + batch * (each + LOGITS_BYTES * cfg.vocab_size)
            rows.append({"batch": batch, "total_bytes": total, "tokens_per_s": batch / step_s, "bound": bound})
        found[precision] = {"weight_bytes": held, "cache_bytes": each, "largest_batch": largest, "batches": rows}
    return found


def report_generation(cfg, gpu, context, available, precision, found):
    """Yields the lines of a plan of generation; precision: the first line's."""
    asked, on = found[precision], f"on {gpu.name} in {precision}"
    need = f"weights {asked['weight_bytes'] / 2**30:.3g}, cache {asked['cache_bytes'] / 2**30:.3g} GiB a sequence"
    fitting = [name for name, figures in found.items() if figures["batches"]]
    if asked["batches"]:
        speeds = ", ".join(f"{row['tokens_per_s']:,.0f} with {row['batch']:,}" for row in asked["batches"])
        yield f"answer     fits {on} ({need}, of {available / 2**30:.3g}): tokens/s at most {speeds} at a time"
    else:
        ways = f"fits in {', '.join(fitting)}" if fitting else "in no precision; take a larger GPU"
        yield f"answer     does not fit {on} ({need}, of {available / 2**30:.3g}); {ways}"
    yield f"model      {cfg.n_layer} layers, width {cfg.n_embd}; sequences of {context:,} tokens, as many as fit at last"
    yield f"           {gpu.memory_gbs:,.4g} GB/s; int8, int4: the blocks' matrices, all else in 16 bits"
    yield f"{'':<11}{'precision':<10}{'weights':>12}{'a cache':>12}{'sequences':>11}{'memory':>15}{'tokens/s':>11}  bound by"
    for name, figures in found.items():
        sizes = f"{figures['weight_bytes'] / 2**20:8,.1f} MiB{figures['cache_bytes'] / 2**20:8,.1f} MiB"
        if not figures["batches"]:
            yield f"{'':<11}{name:<10}{sizes}       none"
        for row in figures["batches"]:
            total = f"{row['total_bytes'] / 2**20:>11,.1f} MiB"
            yield f"{'':<11}{name:<10}{sizes}{row['batch']:>11,}{total}{row['tokens_per_s']:>11,.0f}  {row['bound']}"
    yield "           what this leaves out, and how far off it was: docs/plan.md"
