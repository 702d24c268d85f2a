"""Devices: their kinds, names, precision and memory."""

import contextlib
import ctypes
import math
import os
import sys
from pathlib import Path

import torch

from config import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name, local_rank=0):
    """The torch.device of a name; auto is the fastest kind that is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count() <= local_rank:
        found = f"process {local_rank} of this machine finds {torch.cuda.device_count()} CUDA devices"
        raise UserError(f"device is cuda, but {found}; start fewer processes or use --device=cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device is mps, but this torch finds none; use --device=cpu")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def pick_precision(name, device):
    """The precision of a name; auto is bf16 where the hardware computes in it, else fp16 on CUDA, else fp32."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision is fp16, which CPUs do not train in; use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpu_has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and cpu_has_bf16 else "fp32"


def device_name(device):
    """The name of a device for logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} of {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


# ---- memory


def tune_malloc(**options):
    """Sets options of glibc's allocator by their names in malloc.h; does nothing under another C library."""
    numbers = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}
    try:
        libc = ctypes.CDLL(None)
    except TypeError:  # Windows
        return
    for name, value in options.items() if hasattr(libc, "mallopt") else ():
        libc.mallopt(numbers[name], value)


def keep_freed_memory():
    """Lets the C library keep freed memory for the next allocation, unless the environment tunes it by MALLOC_*.

    By default glibc returns each large tensor to the kernel, and the next one faults in page by page: half the time of
    a step that has many. Keeping it costs some 10 % more memory at the peak, and several times as much where sizes
    vary, as with activation checkpointing.
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        tune_malloc(trim_threshold=-1, mmap_max=0)  # never trim; no allocation is a mapping of its own


def peak_memory_gib(device):
    """Peak memory so far: allocated by torch on CUDA, else resident in the process; NaN where the system tells none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def reset_peak_memory(device):
    """Restarts peak_memory_gib from the present, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError):  # not every system has or permits this file
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_now_gib(device):
    """Present value of the quantity that peak_memory_gib is the peak of; without /proc, that peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    sizes = _sizes()
    return sizes[1] / 2**30 if sizes else peak_memory_gib(device)


def memory_bytes(device):
    """Bytes of a device's memory that this process can use, code and libraries not counted; inf where none tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if resource is None:
        return math.inf
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed, sizes = resource.getrlimit(resource.RLIMIT_AS)[0], _sizes()
    if allowed == resource.RLIM_INFINITY or not sizes:
        return limit
    mapped, resident = sizes
    return min(limit, allowed - (mapped - resident))


def _sizes():
    """(mapped, resident) bytes of this process; None where the system has no /proc, or shows nothing in it."""
    with contextlib.suppress(OSError):
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
        return tuple(int(n) * os.sysconf("SC_PAGE_SIZE") for n in pages[:2])
