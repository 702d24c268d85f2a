"""How the model runs, not what it computes: processes, precision, recomputation, compile."""

import contextlib
import ctypes
import functools
import hashlib
import os
import resource
import sys
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


Recomputed = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class ParallelConfig:
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matmuls; auto: the fastest that the device has
    activation_checkpointing: Recomputed = "none"  # full: backward computes blocks again; selective: but not matmuls
    compile: bool | None = None  # torch.compile of the blocks; none: on cuda only
    deterministic: bool = False  # only algorithms that give the same bits each time; the CPU's do so anyway


@dataclass(frozen=True)
class World:
    """The processes of a run, each with a device; one process unless torchrun started more."""

    rank: int
    size: int
    device: torch.device
    precision: str

    @property
    def is_main(self):
        """Whether this process prints, logs and writes for all."""
        return self.rank == 0

    def sum(self, tensor):
        """The sum of a tensor over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def worst(self, value):
        """The largest of a number over all ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor(float(value), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def barrier(self):
        """Waits until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def synchronize(self):
        """Waits until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self):
        """A context in which matmuls run in the run's precision."""
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
        return torch.autocast(self.device.type, dtypes[self.precision], enabled=self.precision != "fp32")


@contextlib.contextmanager
def init_world(cfg):
    """Joins the process group that torchrun's environment names, yields this process's World, leaves the group."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {size}, but there is no MASTER_ADDR; start several processes with torchrun")
    device = pick_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    precision = pick_precision(cfg.precision, device)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield World(rank, size, device, precision)
    if size > 1:  # not after an error: the other ranks may never come here
        dist.barrier()
        dist.destroy_process_group()


def end_process():
    """Ends the process without the interpreter's own shutdown, which takes torch half a second, or never succeeds.

    The latter where gloo's event thread still drops the last collective's tensor, for which it needs the interpreter's
    lock: DTensor's caches keep that thread alive past destroy_process_group, and C++ then aborts with "terminate called
    without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def keep_freed_memory():
    """Lets the C library keep what is freed for the next allocation, unless the environment tunes it by MALLOC_*.

    glibc else returns each large tensor to the kernel, and the next one faults in page by page: half the time of a
    step where they are many. It costs up to 10 % more memory at the peak.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not any(name.startswith("MALLOC_") for name in os.environ):
        trim_threshold, mmap_max = -1, -4  # the options' numbers in malloc.h
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)  # no allocation is a mapping of its own


def pick_device(name, local_rank=0):
    """The device of a name; `auto` is the fastest kind there is."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count() <= local_rank:
        raise ValueError(
            f"device is cuda, but process {local_rank} of this machine finds {torch.cuda.device_count()} "
            f"CUDA devices; start fewer processes or use --device=cpu"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is mps, but this torch finds none; use --device=cpu")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def pick_precision(name, device):
    """The precision of a name; `auto` is bf16 where the hardware computes in it, else fp16 on CUDA, else fp32."""
    if device.type == "cuda":
        fastest = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif device.type == "cpu":
        fastest = "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
    else:
        fastest = "fp32"
    if name == "fp16" and device.type == "cpu":
        raise ValueError("precision is fp16, which CPUs do not train in; use bf16 or fp32")
    return fastest if name == "auto" else name


def device_name(device):
    """What to call a device in a log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} of {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def peak_memory_gib(device):
    """Largest memory so far: allocated by torch on CUDA, else resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def reset_peak_memory(device):
    """Lets peak_memory_gib start anew, where that can be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def distribute(model, cfg, world, seed):
    """Turns a model on the meta device into one that trains: weights, recomputed and compiled blocks, synced gradients.

    Everything happens in place and adds no wrapper, so that parameters keep their names.
    """
    model.to_empty(device=world.device)
    model.tie_weights()
    model.init_weights(seed)
    if cfg.activation_checkpointing != "none":
        recompute_blocks(model, cfg.activation_checkpointing)
    if cfg.compile or (cfg.compile is None and world.device.type == "cuda"):
        compile_blocks(model, world)
    if world.size > 1:
        from torch.distributed._composable.replicate import replicate  # DDP without a wrapper module

        replicate(model, gradient_as_bucket_view=True)
    return model


def recompute_blocks(model, kind):
    """Keeps of each block, for backward, its input alone, or, selective, what its matmuls and attention gave as well.

    The rest is computed again in backward, with the same dropout.
    """
    context = {}
    if kind == "selective":
        aten = torch.ops.aten
        kept = [aten.mm.default, aten.addmm.default]
        # Attention that draws dropout in its kernel must run again: kept, it would not draw, and what is drawn after it
        # would differ. That of a CPU in bf16, by batched matmuls, runs again too, as its weights are what is large.
        kept += [] if model.cfg.dropout else [
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        ]  # fmt: skip
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, kept)

    def recomputed(forward):
        return lambda *args: checkpoint(forward, *args, use_reentrant=False, **context)  # a partial would not compile

    for block in model.blocks:
        block.forward = recomputed(block.forward)  # not a module around the block, so that parameters keep their names


def compile_blocks(model, world):
    """Compiles each block by itself: quick to compile, and bitwise repeatable where the whole model is not."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=world.device))
    except Exception as error:  # no compiler, no Triton, a Python too new: whatever torch says
        if world.is_main:
            reason = next(iter(str(error).strip().splitlines()), "")
            warnings.warn(
                f"torch.compile does not work here, training goes on without it: {type(error).__name__}: {reason}",
                stacklevel=2,
            )
        return
    torch._dynamo.config.suppress_errors = True  # a block that cannot be compiled runs as it is, with torch's warning
    for block in model.blocks:
        block.compile()


def sync_gradients(model, wanted):
    """Whether the next backward sums gradients over ranks: wanted on the last micro-step of a step alone."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(wanted)


def seed_step(seed, step, rank):
    """Seeds dropout for a step: its masks are a function of (seed, step, rank), which a resumed run draws again."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], signed=True))
