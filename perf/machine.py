"""Speed of this machine, measured within a minute: matmuls, memory, network, disk, and the rates of training."""

import dataclasses
import functools
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils import collect_env

from data import Loader, Split
from devices import DTYPES, device_name, memory_bytes
from objective import NextToken
from order import TrainOrder
from perf.hardware import known_device
from perf.meters import rising, timed
from perf.rates import training_rates

# Sizes by device type: of matrices, and of messages in bytes.
SIZES = {
    "cpu": {"matmuls": (256, 512, 1024, 2048), "messages": (2**16, 2**20, 2**24, 2**26)},
    "cuda": {"matmuls": (1024, 2048, 4096, 8192, 16384), "messages": (2**20, 2**24, 2**28, 2**30)},
}
SECONDS = {"matmuls": 3.0, "collectives": 3.0, "disk": 4.0}  # to spend on each dtype, collective, disk
LOADER_SECONDS = 0.2  # for each reading, which must not reach the end of the file
SHEET = ("tflops", "fp32_tflops", "memory_gbs", "link_gbs")
COPIED, SHARD_TOKENS, CHECKPOINT_BYTES = 2**29, 2**25, 2**28


def measure(world, out_dir="."):
    """The figures of this machine as JSON takes them; [median, least, most] where something was timed several times.

    All ranks call it. The disk is the one of out_dir; rank 0 writes there, and removes what it wrote.
    """
    device, left_out = world.device, []
    known = known_device(device_name(device))
    figures = {
        "device": device_name(device), "device_type": device.type, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "ranks": world.size, "data_ranks": world.data_ranks,
        "precision": world.precision, "memory_gib": memory_bytes(device) / 2**30,
        "data_sheet": known and {name: getattr(known, name) for name in SHEET},
        "matmul_tflops": matmuls(world, dtypes_of(device), left_out),
        "bandwidth_gb_per_s": bandwidths(world),
        "collectives_gb_per_s": collectives(world, left_out) if world.size > 1 else {},
        "rates": training_rates(world, left_out),
        "left_out": left_out,
    }  # fmt: skip
    if device.type == "cuda":
        driver = collect_env.get_nvidia_driver_version(collect_env.run)  # None without nvidia-smi
        figures |= {"cuda": torch.version.cuda, "driver": driver}
    if world.is_main:
        figures["disk"] = disk(world, out_dir)
    world.barrier()
    return figures


def rate(amount, seconds):
    """[median, least, most] of amount per second."""
    median, least, most = seconds
    return [amount / median, amount / most, amount / least]


# ---- the figures of data sheets


def dtypes_of(device):
    """Names of the dtypes whose matmuls a device may be fast at."""
    if device.type != "cuda":
        return ["fp32", "bf16"]
    has_fp8 = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
    return ["fp32", "bf16", "tf32", "fp16"] + ["fp8"] * has_fp8


def matmuls(world, names, left_out):
    """{dtype: {size: TFLOP/s}} of square matmuls."""
    dtypes = DTYPES | {"tf32": torch.float32, "fp8": torch.float8_e4m3fn}
    before, found = torch.get_float32_matmul_precision(), {}

    def measured(n):
        a = torch.randn(n, n, device=world.device).to(dtypes[name])
        b, multiply = a, torch.matmul
        if name == "fp8":
            one = torch.ones((), device=world.device)
            b, multiply = a.T, functools.partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        seconds = timed(lambda: multiply(a, b), world)
        return rate(2 * n**3 / 1e12, seconds), seconds[0]

    for name in names:
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        sizes = SIZES["cpu" if world.device.type == "cpu" else "cuda"]["matmuls"]
        what = f"{name} matmuls of {{0}} x {{0}}"
        found[name] = rising(sizes, measured, 3, world, SECONDS["matmuls"], left_out, what)
    torch.set_float32_matmul_precision(before)
    return found


def bandwidths(world):
    """{"memory copy": GB/s}, counting bytes read and written."""
    n_bytes = int(min(COPIED, memory_bytes(world.device) / 16))
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

    for name, factor in (("all-reduce", 2), ("all-gather", 1), ("reduce-scatter", 1)):  # noqa: B007  (measured reads factor)
        sizes, what = SIZES["cpu" if world.device.type == "cpu" else "cuda"]["messages"], f"{name} of {{:,}} bytes"
        found[name] = rising(sizes, measured, 1, world, SECONDS["collectives"], left_out, what)
    return found


# ---- disk


def disk(world, out_dir):
    """{what: figure} of the disk of out_dir: the data loader's tokens/s, and GB/s of a checkpoint that is synced."""
    os.makedirs(out_dir, exist_ok=True)
    free, random = shutil.disk_usage(out_dir).free, np.random.default_rng(0)

    def write(path, content):
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    with tempfile.TemporaryDirectory(dir=out_dir, prefix="machine_") as folder:
        path, n_bytes = Path(folder, "checkpoint"), min(2**24, free // 4)  # bytes; more on a fast disk
        small_s = timed(lambda: write(path, random.bytes(n_bytes)), world, repeats=1)[0]
        is_fast = small_s * CHECKPOINT_BYTES / n_bytes < SECONDS["disk"] / 4
        if is_fast:
            n_bytes = min(CHECKPOINT_BYTES, free // 4)
        content = random.bytes(n_bytes)
        seconds = timed(lambda: write(path, content), world, SECONDS["disk"] / 3)
        found = {"checkpoint_gb": n_bytes / 1e9, "write_gb_per_s": rate(n_bytes / 1e9, seconds)}
        path.unlink()
        n_tokens = min(SHARD_TOKENS, free // 64)
        if n_tokens >= 2**20 and is_fast:
            path = Path(folder, "train.bin")  # nanoGPT's format, which needs no meta.json
            write(path, random.integers(50257, size=n_tokens, dtype=np.uint16).data)
            found["loader_tokens_per_s"] = loader_speed(folder, path, world)
    return found


def loader_speed(folder, path, world, seq_len=1024, micro_batch_size=16):
    """{"cold", "warm": tokens/s} of training's data loader, with the file out of the system's cache and in it."""
    split, found = Split(folder, "train", 2**16), {"cold": [], "warm": []}
    alone = dataclasses.replace(world, size=1, rank=0, mesh=None)
    for kind in ("cold", "cold", "cold", "warm", "warm", "warm"):
        if kind == "cold" and hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        elif kind == "warm":
            path.read_bytes()
        start, steps = time.perf_counter(), 0
        loader = Loader(TrainOrder(split, seq_len, 0), NextToken(seq_len), 0, 1, micro_batch_size, alone)
        while (elapsed := time.perf_counter() - start) < LOADER_SECONDS:
            loader.next()
            steps += 1
        loader.close()
        found[kind].append(steps * micro_batch_size * seq_len / elapsed)
    return {kind: [statistics.median(rates), min(rates), max(rates)] for kind, rates in found.items()}


# ---- for people


def table(figures):
    """The figures as lines of text, named as in JSON."""
    f, sheet = figures, figures["data_sheet"] or {}
    yield f"machine    {f['ranks']} x {f['device']}, {f['memory_gib']:.1f} GiB, torch {f['torch']}"
    if "cuda" in f:
        yield f"           CUDA {f['cuda']}, driver {f['driver'] or 'unknown'}"
    yield "           size: median (least-most); a size is a width, attention's tokens or a collective's bytes"
    sheets = {
        "matmul_tflops fp32": "fp32_tflops", "matmul_tflops bf16": "tflops", "matmul_tflops fp16": "tflops",
        "bandwidth_gb_per_s": "memory_gbs", "collectives_gb_per_s": "link_gbs",
    }  # fmt: skip
    for section in ("matmul_tflops", "bandwidth_gb_per_s", "collectives_gb_per_s", "disk", "rates"):
        for name, text in rows(section, f[section]):
            peak = sheet.get(sheets.get(name) or sheets.get(section))
            limit = f"   data sheet {peak:g}" if peak else ""
            yield f"{name:<36}{text}{limit}"
    if f["left_out"]:
        yield f"left out   too slow here: {', '.join(f['left_out'])}"


def rows(name, figures):
    """(name, text) of nested figures, a row for each dictionary that has numbers."""
    cells = []
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from rows(f"{name} {key}", value)
        elif isinstance(value, list):
            median, least, most = (f"{v:,.0f}" if v >= 1e4 else f"{v:.4g}" for v in value)
            cells.append(f"{key}: {median} ({least}-{most})")
        else:
            cells.append(f"{key}: {value:.4g}")
    if cells:
        yield name, ", ".join(cells)
