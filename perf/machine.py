"""Speed of this machine, measured within a minute: matmuls, memory, network, disk, and the rates of training."""

import dataclasses
import importlib.util
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import Loader, Split, TrainOrder
from model import Block, ModelConfig
from objective import NextToken
from ops import Linear, attend, linear_cross_entropy, rope_table
from optim import OptimConfig, build_optimizer
from perf import cost
from perf.hardware import between, known_device
from world import device_name, memory_bytes

# Sizes by device type: of matrices, messages in bytes, blocks, and the sequences of a block.
SIZES = {
    "cpu": {
        "matmuls": (256, 512, 1024, 2048), "messages": (2**16, 2**20, 2**24, 2**26),
        "widths": (128, 256, 512, 1024), "lengths": (64, 512, 1024), "rows": 1024, "vocab_size": 16384,
    },
    "cuda": {
        "matmuls": (1024, 2048, 4096, 8192, 16384), "messages": (2**20, 2**24, 2**28, 2**30),
        "widths": (256, 1024, 2048, 4096), "lengths": (256, 1024, 4096), "rows": 16384, "vocab_size": 32768,
    },
}  # fmt: skip
# Seconds to spend on each: a size that would take longer is left out.
SECONDS = {"matmuls": 3.0, "collectives": 3.0, "disk": 4.0, "rates": 15.0}
HEAD_WIDTH, BLOCK_LENGTH = 64, 128
# Blocks whose element-wise work differs. What is measured of one width and kind stands for others like it.
KINDS = {
    "plain": {},
    "modern": {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "position": "rope", "bias": False},
    "dropout": {"dropout": 0.1},
}
LOADER_SECONDS = 0.2  # for each reading, which must not reach the end of the file
COPIED, SHARD_TOKENS, CHECKPOINT_BYTES = 2**29, 2**25, 2**28


def measure(world, out_dir="."):
    """The figures of this machine as JSON takes them; [median, least, most] where something was timed several times.

    All ranks call it. The disk is the one of out_dir; rank 0 writes there, and removes what it wrote.
    """
    left_out = []
    figures = {
        "device": device_name(world.device),
        "device_type": world.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ranks": world.size,
        "data_ranks": world.data_ranks,
        "precision": world.precision,
        "memory_gib": memory_bytes(world.device) / 2**30,
        "data_sheet": None,
        "matmul_tflops": matmuls(world, dtypes_of(world), left_out),
        "bandwidth_gb_per_s": bandwidths(world),
        "collectives_gb_per_s": collectives(world, left_out) if world.size > 1 else {},
        "rates": training_rates(world, left_out),
        "left_out": left_out,
    }
    if world.device.type == "cuda":
        figures |= {"cuda": torch.version.cuda, "driver": driver()}
        if known := known_device(figures["device"]):
            figures["data_sheet"] = {"tflops": known.tflops, "fp32_tflops": known.fp32_tflops}
            figures["data_sheet"] |= {"memory_gbs": known.memory_gbs, "link_gbs": known.link_gbs}
    if world.is_main:
        figures["disk"] = disk(world, out_dir)
    world.barrier()
    return figures


def driver():
    """The version of NVIDIA's driver; None without nvidia-ml-py."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None


# ---- timing


def timed(work, world, seconds=0.15, repeats=None):
    """[median, least, most] seconds of work()."""
    return timed_in_turn([work], world, seconds, repeats)[0]


def timed_in_turn(works, world, seconds=0.15, repeats=None):
    """[median, least, most] seconds of each work(), called in turn, so that a busy moment slows all of them.

    The first round warms up and is not counted, unless it alone takes three times the seconds. repeats: rounds to time;
    None: at least 3 and as many as fit into the seconds.
    """

    def once(work, n_calls=1):
        world.synchronize()
        start = time.perf_counter()
        for _ in range(n_calls):
            work()
        world.synchronize()
        return (time.perf_counter() - start) / n_calls

    start = time.perf_counter()
    rounds, first = [], [once(work) for work in works]
    n_calls = 10 if world.device.type != "cpu" and sum(first) < seconds / 10 else 1  # hides the time of giving work
    while len(rounds) < repeats if repeats else len(rounds) < 3 or time.perf_counter() - start < seconds:
        if repeats is None and time.perf_counter() - start >= 3 * seconds:
            break
        rounds.append([once(work, n_calls) for work in works])
    return [[statistics.median(times), min(times), max(times)] for times in zip(*rounds or [first])]


def rising(sizes, measured, work_of, world, seconds, left_out, name):
    """{size: figure} for rising sizes, as far as the seconds last on the slowest rank.

    measured(size): (figure, seconds of one run). work_of(size) is proportional to those seconds. Sizes too slow for the
    time that is left are added to left_out by name.
    """
    found, start, one_run = {}, time.perf_counter(), 0.0
    for i, size in enumerate(sizes):
        if found:
            expected = 2 * one_run * work_of(size) / work_of(sizes[i - 1])  # a run, and its preparation
            if world.worst(time.perf_counter() - start + expected) > seconds:
                left_out += [name.format(larger) for larger in sizes[i:]]
                break
        found[size], one_run = measured(size)
    return found


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
            by_size = rising(sizes, measured, lambda n: n**3, world, SECONDS["matmuls"], left_out, what)
            found[name] = {str(n): rates for n, rates in by_size.items()}
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def bandwidths(world):
    """{what: GB/s}: copies in memory, counting bytes read and written, and from host to device."""
    n_bytes = min(COPIED, memory_bytes(world.device) // 16)
    a = torch.zeros(n_bytes // 4, device=world.device)
    b = torch.zeros_like(a)
    found = {"memory copy": rate(2 * n_bytes / 1e9, timed(lambda: b.copy_(a), world))}
    if world.device.type == "cuda":
        n_bytes = 2**28
        host, on_device = torch.zeros(n_bytes // 4), torch.zeros(n_bytes // 4, device=world.device)
        pinned = host.pin_memory()
        found["host to device, pageable"] = rate(n_bytes / 1e9, timed(lambda: on_device.copy_(host), world))
        found["host to device, pinned"] = rate(n_bytes / 1e9, timed(lambda: on_device.copy_(pinned), world))
    return found


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
        by_size = rising(sizes, measured, lambda size: size, world, SECONDS["collectives"], left_out, what)
        found[name] = {str(n_bytes): rates for n_bytes, rates in by_size.items()}
    return found


# ---- disk


def disk(world, out_dir):
    """{what: figure} of the disk of out_dir: the data loader's tokens/s, and GB/s of a checkpoint that is synced."""
    os.makedirs(out_dir, exist_ok=True)
    free, found = shutil.disk_usage(out_dir).free, {}
    with tempfile.TemporaryDirectory(dir=out_dir, prefix="machine_") as folder:
        data = np.random.default_rng(0)

        def write(path, content):
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        small = min(2**24, free // 4)  # bytes; shows whether the disk is fast enough for more
        small_s = timed(lambda: write(Path(folder, "small"), data.bytes(small)), world, repeats=1)[0]
        fast = small_s * CHECKPOINT_BYTES / small < SECONDS["disk"] / 4
        n_bytes = min(CHECKPOINT_BYTES, free // 4) if fast else small
        content, path = data.bytes(n_bytes), Path(folder, "checkpoint")
        found["checkpoint_gb"] = n_bytes / 1e9
        seconds = timed(lambda: write(path, content), world, SECONDS["disk"] / 3)
        found["write_gb_per_s"] = rate(n_bytes / 1e9, seconds)
        path.unlink()
        n_tokens = min(SHARD_TOKENS, free // 64)
        if n_tokens >= 2**20 and fast:
            path = Path(folder, "train.bin")  # nanoGPT's format, which needs no meta.json
            write(path, data.integers(50257, size=n_tokens, dtype=np.uint16).data)
            found["loader_tokens_per_s"] = loader_speed(folder, path, world)
    return found


def loader_speed(folder, path, world, seq_len=1024, micro_batch_size=16):
    """{"cold", "warm": tokens/s} of training's data loader, with the file out of the system's cache and in it."""
    split, found = Split(folder, "train", 2**16), {"cold": [], "warm": []}
    alone = dataclasses.replace(world, size=1, rank=0, mesh=None)
    for kind in ("cold", "cold", "cold", "warm", "warm", "warm"):
        if kind == "cold" and hasattr(os, "posix_fadvise"):
            split.release_pages()  # mapped pages would stay
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        elif kind == "warm":
            path.read_bytes()
        start, steps = time.perf_counter(), 0
        loader = Loader(TrainOrder(split, seq_len, 0), NextToken(seq_len), 0, 1, micro_batch_size, alone)
        while time.perf_counter() - start < LOADER_SECONDS:
            loader.next()
            steps += 1
        elapsed = time.perf_counter() - start
        loader.close()
        found[kind].append(steps * micro_batch_size * seq_len / elapsed)
    return {kind: [statistics.median(rates), min(rates), max(rates)] for kind, rates in found.items()}


# ---- the rates of training


def training_rates(world, left_out):
    """Rates of forward and backward in the run's precision, by which cost.step_seconds predicts a step.

    {matmul_tflops: {width}, attention_tflops: {seq_len}, memory_gb_per_s: {kind: {width}}, head_tflops: {width},
    muon_tflops: {width}, overhead_ms: {kind}}. Matmuls are the linear layers of a block. Memory is the time of a whole
    block minus its matmuls, attention and overhead, relative to the bytes that cost.work counts.
    """
    rows, vocab_size = sizes_of(world, "rows"), sizes_of(world, "vocab_size")
    seconds = SECONDS["rates"] / 3

    def forward_backward(function, *inputs):
        """A function that runs function(*inputs) and its backward."""
        wanted = [*inputs, *(function.parameters() if isinstance(function, torch.nn.Module) else ())]

        def work():
            with world.autocast():
                output = function(*inputs)
            torch.autograd.grad(output, wanted, torch.ones_like(output))

        return work

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, device=world.device, dtype=dtype).mul_(0.02).requires_grad_()

    def block(kind, width, seq_len, batch):
        """(work of a block, its model, its Setup)."""
        cfg = ModelConfig(n_embd=width, n_head=max(1, width // HEAD_WIDTH), n_layer=1, vocab_size=64, **KINDS[kind])
        with world.device:
            layer = Block(cfg)
        rope = None
        if cfg.position == "rope":
            rope = rope_table(torch.arange(seq_len, device=world.device), cfg.head_width, cfg.rope_theta)
        setup = cost.Setup(seq_len, batch, precision=world.precision, on_cpu=world.device.type == "cpu", head_share=0)
        x, params = random(batch, seq_len, width), list(layer.parameters())

        def work():
            with world.autocast():
                y = layer(x, rope)
            torch.autograd.grad(y, [x, *params], torch.ones_like(y))

        return work, layer, cost.work(cfg, setup)

    def attention(seq_len):
        n_heads = 8
        batch, dtype = max(1, rows // seq_len), world.dtype
        q, k, v = (random(batch, seq_len, n_heads, HEAD_WIDTH, dtype=dtype) for _ in range(3))

        def attended(*heads):
            return attend(*(x.transpose(1, 2) for x in heads), causal=True).transpose(1, 2).flatten(2)

        cfg = ModelConfig(n_embd=n_heads * HEAD_WIDTH, n_head=n_heads, n_layer=1)
        setup = cost.Setup(seq_len, batch, precision=world.precision, on_cpu=world.device.type == "cpu")
        seconds = timed(forward_backward(attended, q, k, v), world)[0]
        return cost.work(cfg, setup).attention / 1e12 / seconds, seconds

    def of_blocks(width):
        """(matmuls' TFLOP/s, {kind: (seconds of a block, its work)}) at a width."""
        blocks = {kind: block(kind, width, BLOCK_LENGTH, rows // BLOCK_LENGTH) for kind in KINDS}
        linears = [layer for layer in blocks["plain"][1].modules() if isinstance(layer, Linear)]
        works = [forward_backward(layer, random(rows, layer.in_features)) for layer in linears]
        matmul, *times = timed_in_turn(
            [lambda: [work() for work in works], *(work for work, *_ in blocks.values())], world, seconds / 8
        )
        tflops = blocks["plain"][2].matmuls / 1e12 / matmul[0]
        return (tflops, {kind: t[0] for kind, t in zip(blocks, times)}), sum(t[0] for t in (matmul, *times))

    def of_loss(width):
        h, ids = random(rows, width), torch.randint(vocab_size, (rows,), device=world.device)
        weight = random(vocab_size, width)
        work = forward_backward(lambda h, w: linear_cross_entropy(h, w, ids, vocab_size), h, weight)
        seconds = timed(work, world)[0]
        return 6e-12 * rows * vocab_size * width / seconds, seconds

    def muon(width):
        with world.device:
            model = torch.nn.Module()
            model.blocks = torch.nn.ModuleList(Linear(width, width, bias=False) for _ in range(4))
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3)
        optimizer = build_optimizer(model, OptimConfig(optimizer="muon"))
        seconds = timed(optimizer.step, world)[0]
        return 4 * 30 * width**3 / 1e12 / seconds, seconds

    def climbing(what, sizes, measured, work_of):
        return rising(sizes, measured, work_of, world, seconds, left_out, f"{what} {{}}")

    overhead = {kind: timed(block(kind, HEAD_WIDTH // 8, 2, 1)[0], world)[0] for kind in KINDS}
    widths, lengths = sizes_of(world, "widths"), sizes_of(world, "lengths")
    attention_tflops = climbing("attention over tokens", lengths, attention, lambda n: n)
    blocks = climbing("blocks of width", widths, of_blocks, lambda n: n * n)
    matmul_tflops = {width: tflops for width, (tflops, _) in blocks.items()}
    memory = {kind: {} for kind in KINDS}
    for width, (tflops, seconds_of) in blocks.items():
        for kind, block_s in seconds_of.items():
            work = block(kind, width, BLOCK_LENGTH, rows // BLOCK_LENGTH)[2]
            others = work.matmuls / tflops + work.attention / between(attention_tflops, BLOCK_LENGTH)
            rest = block_s - others / 1e12 - overhead[kind]
            memory[kind][width] = work.elementwise_bytes / 1e9 / max(rest, 0.05 * block_s)
    return {
        "matmul_tflops": matmul_tflops,
        "attention_tflops": attention_tflops,
        "memory_gb_per_s": memory,
        "head_tflops": climbing("the loss at width", widths, of_loss, lambda n: n),
        "muon_tflops": climbing("Muon at width", widths, muon, lambda n: n**3),
        "overhead_ms": {kind: 1e3 * seconds for kind, seconds in overhead.items()},
    }


# ---- for people


def table(figures):
    """The figures as lines of text."""

    def cell(rates):
        return "{:.3g} ({:.3g}-{:.3g})".format(*rates) if rates else "-"

    f = figures
    yield f"machine    {f['ranks']} x {f['device']}, {f['memory_gib']:.1f} GiB, torch {f['torch']}, {f['threads']} threads"
    if "cuda" in f:
        yield f"           CUDA {f['cuda']}, driver {f['driver'] or 'unknown: pip install nvidia-ml-py'}"
    yield "           each figure is the median of several runs, followed by the least and the most"
    sheet = f["data_sheet"] or {}
    sizes = sorted({n for by_size in f["matmul_tflops"].values() for n in by_size}, key=int)
    yield f"matmul     TFLOP/s {''.join(f'{n} x {n}'.rjust(22) for n in sizes)}{'data sheet':>14}"
    for name, by_size in f["matmul_tflops"].items():
        peak = sheet.get({"fp32": "fp32_tflops", "bf16": "tflops", "fp16": "tflops"}.get(name), "-")
        yield f"           {name:8}{''.join(f'{cell(by_size.get(n)):>22}' for n in sizes)}{peak:>14}"
    rows = [(f"memory     {name}", "GB/s", rates, "memory_gbs") for name, rates in f["bandwidth_gb_per_s"].items()]
    for name, by_size in f["collectives_gb_per_s"].items():
        rows += [(f"network    {name} of {int(n):,} bytes", "GB/s", r, "link_gbs") for n, r in by_size.items()]
    for kind, rates in f["disk"].get("loader_tokens_per_s", {}).items():
        rows.append((f"loader     from a {kind} file", "M tokens/s", [rate / 1e6 for rate in rates], None))
    what = f"disk       a checkpoint of {f['disk']['checkpoint_gb']:.3g} GB, synced"
    rows.append((what, "GB/s", f["disk"]["write_gb_per_s"], None))
    for what, unit, rates, in_sheet in rows:
        limit = f"   data sheet {sheet[in_sheet]:g}" if in_sheet in sheet and "host" not in what else ""
        yield f"{what:<52}{cell(rates):>24} {unit}{limit}"
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
    for what in f["left_out"]:
        yield f"left out   {what}: too slow here"
