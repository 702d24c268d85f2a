"""What this machine really does, measured: matmuls, memory, network, disk."""

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
from objective import NextToken
from perf.hardware import known_device
from world import device_name, memory_bytes

# What is measured: (on a CPU, on an accelerator): sizes of matrices, bytes of messages.
MATMUL_SIZES = (512, 1024, 2048), (2048, 4096, 8192, 16384)
MESSAGES = (2**16, 2**20, 2**24, 2**26), (2**20, 2**24, 2**28, 2**30)
LOADER_SECONDS = 0.2  # of one reading, which must not reach the end of the file
COPIED, SHARD_TOKENS, CHECKPOINT_BYTES = 2**29, 2**25, 2**28


def measure(world, out_dir="."):
    """Figures as JSON takes them; a measured one is [median, least, most].

    All ranks call it; the disk of out_dir is rank 0's, which writes there and removes what it wrote.
    """
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
        "matmul_tflops": matmuls(world),
        "bandwidth_gb_per_s": bandwidths(world),
        "collectives_gb_per_s": collectives(world) if world.size > 1 else {},
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
    """The version of NVIDIA's driver, where nvidia-ml-py is there to ask."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None


def timed(work, world, seconds=0.15, repeats=None, between=None, at_least=3):
    """[median, least, most] seconds of work(), the first time apart; of so many repeats, or of at_least.

    What is done between two times is not timed; without it, a device that is given work ahead gets some at once, so
    that giving it is not timed, either.
    """
    work()
    n_calls = 1 if between or world.device.type == "cpu" else 10
    times, end = [], time.perf_counter() + seconds
    while len(times) < (repeats or at_least) or (repeats is None and time.perf_counter() < end):
        if between:
            between()
        world.synchronize()
        start = time.perf_counter()
        for _ in range(n_calls):
            work()
        world.synchronize()
        times.append((time.perf_counter() - start) / n_calls)
    return [statistics.median(times), min(times), max(times)]


def rate(amount, seconds):
    """[median, least, most] of amount a second."""
    median, least, most = seconds
    return [amount / median, amount / most, amount / least]


def on(pair, world):
    """Which of a pair of sizes is for this device."""
    return pair[world.device.type != "cpu"]


# ---- what data sheets tell, too


def matmuls(world):
    """{dtype: {size: TFLOP/s}} of square matmuls."""
    is_cuda = world.device.type == "cuda"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    dtypes |= {"tf32": torch.float32, "fp16": torch.float16} if is_cuda else {}
    if is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(world.device) >= (8, 9):
        dtypes["fp8"] = torch.float8_e4m3fn
    before, found = torch.get_float32_matmul_precision(), {}
    try:
        for name, dtype in dtypes.items():
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            found[name] = {}
            for n in on(MATMUL_SIZES, world):
                a = torch.randn(n, n, device=world.device).to(dtype)
                if name == "fp8":  # its second matrix must lie column by column
                    one = torch.ones((), device=world.device)
                    seconds = timed(lambda: torch._scaled_mm(a, a.T, one, one, out_dtype=torch.bfloat16), world)
                else:
                    seconds = timed(lambda: a @ a, world)
                found[name][str(n)] = rate(2 * n**3 / 1e12, seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def bandwidths(world):
    """{what: GB/s} of copies in memory, read and written bytes both counted, and from host to device."""
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


def collectives(world):
    """{name: {bytes: GB/s of a link}}, nccl-tests' busbw: all bytes x (n - 1) / n, twice for all-reduce, a second."""
    n, found = world.size, {}
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
    reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    for name, factor in (("all-reduce", 2), ("all-gather", 1), ("reduce-scatter", 1)):
        found[name] = {}
        for n_bytes in on(MESSAGES, world):
            whole = torch.zeros(n_bytes // 4 // n * n, device=world.device)
            part = whole.chunk(n)[world.rank].clone()
            work = {
                "all-reduce": lambda: dist.all_reduce(whole),
                "all-gather": lambda: all_gather(whole, part),
                "reduce-scatter": lambda: reduce_scatter(part, whole),
            }[name]
            world.barrier()
            seconds = timed(work, world, repeats=5)  # equally many on all ranks
            found[name][str(n_bytes)] = rate(factor * (n - 1) / n * 4 * len(whole) / 1e9, seconds)
    return found


def disk(world, out_dir):
    """{what: figure} of the disk of out_dir: tokens/s of the data loader and GB/s of a checkpoint that is synced."""
    os.makedirs(out_dir, exist_ok=True)
    free, found = shutil.disk_usage(out_dir).free, {}
    with tempfile.TemporaryDirectory(dir=out_dir, prefix="machine_") as folder:
        n_tokens = min(SHARD_TOKENS, free // 64)
        if n_tokens >= 2**20:
            path = Path(folder, "train.bin")  # nanoGPT's format, which needs no meta.json
            with open(path, "wb") as file:
                file.write(np.random.default_rng(0).integers(50257, size=n_tokens, dtype=np.uint16).data)
                file.flush()
                os.fsync(file.fileno())
            found["loader_tokens_per_s"] = loader_speed(folder, path, world)
            path.unlink()
        n_bytes = min(CHECKPOINT_BYTES, free // 4)
        data, path = np.random.default_rng(0).bytes(n_bytes), Path(folder, "checkpoint")

        def write():
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        found["checkpoint_gb"] = n_bytes / 1e9
        found["write_gb_per_s"] = rate(n_bytes / 1e9, timed(write, world, seconds=1))
    return found


def loader_speed(folder, path, world, seq_len=1024, micro_batch_size=16):
    """{"cold", "warm"}: tokens/s of the training's loader, with the file out of the system's cache and in it."""
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


# ---- for people


def table(figures):
    """Lines of text that tell the figures."""

    def told(rates):
        median, least, most = rates
        return f"{median:.3g} ({least:.3g}-{most:.3g})"

    f, rows = figures, []
    memory = f"{f['memory_gib']:.1f} GiB"
    yield f"machine    {f['ranks']} x {f['device']}, {memory}, torch {f['torch']}, {f['threads']} threads"
    if "cuda" in f:
        yield f"           CUDA {f['cuda']}, driver {f['driver'] or 'unknown: pip install nvidia-ml-py'}"
    yield "           each figure is the median of several runs, with the least and the most of them"
    sheet = f["data_sheet"] or {}
    sizes = next(iter(f["matmul_tflops"].values()))
    columns = "".join(f"{n} x {n}".rjust(24) for n in sizes)
    yield f"matmul     TFLOP/s {columns}{'data sheet':>16}"
    for name, by_size in f["matmul_tflops"].items():
        of_sheet = sheet.get({"fp32": "fp32_tflops", "bf16": "tflops", "fp16": "tflops"}.get(name), "-")
        yield f"           {name:8}{''.join(f'{told(rates):>24}' for rates in by_size.values())}{of_sheet:>16}"
    rows += [(f"memory     {name}", "GB/s", rates, "memory_gbs") for name, rates in f["bandwidth_gb_per_s"].items()]
    for name, by_size in f["collectives_gb_per_s"].items():
        rows += [(f"network    {name} of {int(n):,} bytes", "GB/s", r, "link_gbs") for n, r in by_size.items()]
    for kind, rates in f["disk"].get("loader_tokens_per_s", {}).items():
        rows.append((f"loader     from a {kind} file", "M tokens/s", [rate / 1e6 for rate in rates], None))
    what = f"disk       a checkpoint of {f['disk']['checkpoint_gb']:.3g} GB, synced"
    rows.append((what, "GB/s", f["disk"]["write_gb_per_s"], None))
    for what, unit, rates, of_sheet in rows:
        beside = f"   data sheet {sheet[of_sheet]:g}" if of_sheet in sheet and "host" not in what else ""
        yield f"{what:<52}{told(rates):>24} {unit}{beside}"
