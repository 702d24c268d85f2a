"""Speed of this machine, measured within a minute: matmuls, memory, network, and the rates of training."""

import torch
import torch.distributed as dist

from perf.hardware import known_device
from perf.meters import rising, timed
from perf.rates import training_rates
from world import device_name, memory_bytes

# Sizes by device type: of matrices, and of messages in bytes.
SIZES = {
    "cpu": {"matmuls": (256, 512, 1024, 2048), "messages": (2**16, 2**20, 2**24, 2**26)},
    "cuda": {"matmuls": (1024, 2048, 4096, 8192, 16384), "messages": (2**20, 2**24, 2**28, 2**30)},
}
SECONDS = 3.0  # to spend on each dtype and each collective
COPIED = 2**29  # bytes of the memory copy


def measure(world):
    """The figures of this machine as JSON takes them, [median, least, most] for what is timed; all ranks call it."""
    left_out = []
    figures = {
        "device": device_name(world.device), "device_type": world.device.type, "torch": torch.__version__,
        "cuda": torch.version.cuda, "ranks": world.size, "precision": world.precision,
        "memory_gib": memory_bytes(world.device) / 2**30,
        "matmul_tflops": matmuls(world, dtypes_of(world), left_out),
        "bandwidth_gb_per_s": bandwidths(world),
        "collectives_gb_per_s": collectives(world, left_out) if world.size > 1 else {},
        "rates": training_rates(world, left_out),
    }  # fmt: skip
    world.barrier()
    return figures | {"left_out": left_out}


def rate(amount, seconds):
    """[median, least, most] of amount per second."""
    median, least, most = seconds
    return [amount / median, amount / most, amount / least]


def sizes_of(world, what):
    """The sizes to measure on this device."""
    return SIZES["cpu" if world.device.type == "cpu" else "cuda"][what]


# ---- the figures of data sheets


def dtypes_of(world):
    """Names of the dtypes whose matmuls this device may be fast at."""
    names = ["fp32", "bf16"]
    if world.device.type == "cuda":
        names += ["tf32", "fp16"]
        if torch.version.hip is None and torch.cuda.get_device_capability(world.device) >= (8, 9):
            names.append("fp8")
    return names


def matmuls(world, names, left_out):
    """{dtype: {size: TFLOP/s}} of square matmuls."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
    before, found = torch.get_float32_matmul_precision(), {}

    def measured(n):
        a = torch.randn(n, n, device=world.device).to(dtypes.get(name, torch.float32))
        if name == "fp8":
            one = torch.ones((), device=world.device)
            work = lambda: torch._scaled_mm(a, a.T, one, one, out_dtype=torch.bfloat16)  # noqa: E731
        else:
            work = lambda: a @ a  # noqa: E731
        seconds = timed(work, world)
        return rate(2 * n**3 / 1e12, seconds), seconds[0]

    try:
        for name in names:
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            sizes, what = sizes_of(world, "matmuls"), f"{name} matmuls of {{0}} x {{0}}"
            by_size = rising(sizes, measured, lambda n: n**3, world, SECONDS, left_out, what)
            found[name] = {str(n): rates for n, rates in by_size.items()}
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def bandwidths(world):
    """{"memory copy": GB/s}, counting bytes read and written."""
    n_bytes = min(COPIED, memory_bytes(world.device) // 16)
    a = torch.zeros(n_bytes // 4, device=world.device)
    b = torch.zeros_like(a)
    return {"memory copy": rate(2 * n_bytes / 1e9, timed(lambda: b.copy_(a), world))}


def collectives(world, left_out):
    """{name: {bytes: GB/s of a link}}, nccl-tests' busbw: all bytes x (n - 1) / n, twice for all-reduce, per second."""
    n, found = world.size, {}
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
    reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

    def measured(n_bytes):
        whole = torch.zeros(n_bytes // 4 // n * n, device=world.device)
        part = whole.chunk(n)[world.rank].clone()
        work = {
            "all-reduce": lambda: dist.all_reduce(whole),
            "all-gather": lambda: all_gather(whole, part),
            "reduce-scatter": lambda: reduce_scatter(part, whole),
        }[name]
        world.barrier()
        seconds = timed(work, world, repeats=5)  # the same number on all ranks
        return rate(factor * (n - 1) / n * 4 * len(whole) / 1e9, seconds), 3 * seconds[0]

    for name, factor in (("all-reduce", 2), ("all-gather", 1), ("reduce-scatter", 1)):
        sizes, what = sizes_of(world, "messages"), f"{name} of {{:,}} bytes"
        by_size = rising(sizes, measured, lambda size: size, world, SECONDS, left_out, what)
        found[name] = {str(n_bytes): rates for n_bytes, rates in by_size.items()}
    return found


# ---- for people


def table(figures):
    """The figures as lines of text."""

    def cell(rates):
        return "{:.3g} ({:.3g}-{:.3g})".format(*rates) if rates else "-"

    f, sheet = figures, known_device(figures["device"])
    cuda = f", CUDA {f['cuda']}" if f["device_type"] == "cuda" else ""
    yield f"machine    {f['ranks']} x {f['device']}, {f['memory_gib']:.1f} GiB, torch {f['torch']}{cuda}"
    yield "           each figure is the median of several runs, followed by the least and the most"
    sizes = sorted({n for by_size in f["matmul_tflops"].values() for n in by_size}, key=int)
    yield f"matmul     TFLOP/s {''.join(f'{n} x {n}'.rjust(25) for n in sizes)}{'data sheet':>14}"
    for name, by_size in f["matmul_tflops"].items():
        peak = getattr(sheet, {"fp32": "fp32_tflops", "bf16": "tflops", "fp16": "tflops"}.get(name, ""), "-")
        yield f"           {name:8}{''.join(f'{cell(by_size.get(n)):>25}' for n in sizes)}{peak:>14}"
    rows = [("memory     copy", f["bandwidth_gb_per_s"]["memory copy"], "memory_gbs")]
    for name, by_size in f["collectives_gb_per_s"].items():
        rows += [(f"network    {name} of {int(n):,} bytes", rates, "link_gbs") for n, rates in by_size.items()]
    for what, rates, in_sheet in rows:
        yield f"{what:<52}{cell(rates):>24} GB/s" + (f"   data sheet {getattr(sheet, in_sheet):g}" if sheet else "")
    yield f"training   forward and backward in {f['precision']}, the rates of plan.py --gpu=this"
    rates = f["rates"]
    named = [("matmuls, TFLOP/s by width", rates["matmul_tflops"])]
    named += [("attention, TFLOP/s by seq_len", rates["attention_tflops"])]
    named += [(f"{kind} block, GB/s by width", by_width) for kind, by_width in rates["memory_gb_per_s"].items()]
    named += [
        ("head and loss, TFLOP/s by width", rates["head_tflops"]),
        ("Muon, TFLOP/s by width", rates["muon_tflops"]),
    ]
    named += [("overhead of a block, ms", rates["overhead_ms"])]
    for name, by_size in named:
        yield f"           {name:<32}{', '.join(f'{size}: {rate:.3g}' for size, rate in by_size.items())}"
    if f["left_out"]:
        yield f"left out   too slow here: {', '.join(f['left_out'])}"
