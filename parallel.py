"""How the model runs, not what it computes: processes, precision, recomputation, compile.

What of a model each of several processes holds is in shard.py.
"""

import contextlib
import ctypes
import datetime
import functools
import hashlib
import os
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from guard import Watchdog


POWERSGD_RANK, POWERSGD_START = 32, 10  # of the matrices that are sent; sums of gradients before it starts
Recomputed = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class ParallelConfig:
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matmuls; auto: the fastest that the device has
    strategy: Literal["ddp", "fsdp"] = "ddp"  # ddp: each rank has the whole model; fsdp: its share of weights and state
    shard_size: int | None = None  # fsdp: ranks that share one copy of the model, a node's, say; none: all
    reshard: bool = True  # fsdp: gather a block's weights again for backward; false: keep them, 2 bytes a parameter
    accumulate: Literal["sharded", "whole"] = "sharded"  # fsdp, gradients; whole: sent once a step, 4 bytes a weight
    tp: int = 1  # ranks that share each layer: heads, columns of the MLP, rows of the vocabulary
    grad_compression: Literal["bf16", "powersgd"] | None = None  # ddp: what of gradients is sent; none: all, in float32
    activation_checkpointing: Recomputed = "none"  # full: backward computes blocks again; selective: but not matmuls
    compile: bool | None = None  # torch.compile of the blocks; none: on cuda only
    deterministic: bool = False  # only algorithms that give the same bits each time; the CPU's do so anyway
    timeout_minutes: float | None = 30.0  # without progress, of any rank, after which the run ends; none: never

    def __post_init__(self):
        wrong = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("tp", "shard_size")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        wrong += [
            f"{name} is {getattr(self, name)} and strategy ddp, which shards nothing; use --strategy=fsdp"
            for name, default in (("shard_size", None), ("reshard", True), ("accumulate", "sharded"))
            if getattr(self, name) != default and self.strategy == "ddp"
        ]
        if self.grad_compression and (self.strategy == "fsdp" or self.tp > 1):
            wrong.append(
                f"grad_compression is {self.grad_compression}, which is of ddp alone, not of strategy {self.strategy} "
                f"with tp {self.tp}; use --strategy=ddp --tp=1, or --grad_compression=none"
            )
        if self.timeout_minutes is not None and self.timeout_minutes <= 0:
            wrong.append(f"timeout_minutes is {self.timeout_minutes}; it must be above 0, or none")
        if wrong:
            raise ValueError("\n".join(wrong))


@dataclass(frozen=True)
class World:
    """The processes of a run, each with a device; one process unless torchrun started more.

    Their mesh is (replicate, shard, tp): tp neighbours share layers and read the same data, `shard` of these groups
    share one copy of the model, and copies are replicated. data_group are the ranks that read different data;
    cpu_group are all, for what is exchanged beside training: by the thread that saves. In the store they leave word of
    where they are and how they end.
    """

    rank: int
    size: int
    device: torch.device
    precision: str
    mesh: DeviceMesh | None = None
    data_group: dist.ProcessGroup | None = None
    cpu_group: dist.ProcessGroup | None = None
    watchdog: Watchdog | None = None
    store: dist.Store | None = None

    @property
    def tp(self):
        """Ranks that share each layer."""
        return 1 if self.mesh is None else self.mesh["tp"].size()

    @property
    def data_rank(self):
        """Which part of the data this rank reads."""
        return self.rank // self.tp

    @property
    def data_ranks(self):
        """Parts that the data is read in."""
        return self.size // self.tp

    @property
    def dtype(self):
        """What matmuls compute in."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]

    @property
    def is_main(self):
        """Whether this process prints, logs and writes for all."""
        return self.rank == 0

    def sum(self, tensor):
        """The sum of a tensor over the ranks that read different data."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def at(self, place):
        """Tells the watchdog, if any, where this rank is; all ranks come to the same places."""
        if self.watchdog:
            self.watchdog.at(place)

    def total(self, *tensors):
        """Sums of single numbers over all ranks, the same to the bit on each; waits for the device."""
        if self.size == 1:
            return [tensor.item() for tensor in tensors]
        total = torch.stack([tensor.double() for tensor in tensors])
        dist.all_reduce(total)
        return total.tolist()

    def worst(self, value):
        """The largest of a number over all ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def gather(self, value):
        """A list of what each rank gives, of any type; not of the training loop's, which may be busy at the time."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def barrier(self):
        """Waits until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def on_whole_matrices(self, function, parts, params):
        """This rank's parts of what function makes of a stack of matrices, of which it has parts as it has of params.

        Of several ranks, which share out the work; shard.py says how.
        """
        from shard import on_whole_matrices

        return on_whole_matrices(function, parts, params, self.mesh)

    def synchronize(self):
        """Waits until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def autocast(self):
        """A context in which matmuls run in the run's precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.precision != "fp32")


@contextlib.contextmanager
def init_world(cfg):
    """Joins the process group that torchrun's environment names, yields this process's World, leaves the group."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {size}, but there is no MASTER_ADDR; start several processes with torchrun")
    mesh_shape = shape_of_mesh(cfg, size)
    device = pick_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    precision = pick_precision(cfg.precision, device)
    if precision == "fp16" and cfg.grad_compression == "powersgd":
        raise ValueError(
            "grad_compression is powersgd, which would remember an overflow of precision fp16 for ever; "
            "use --precision=bf16 or --grad_compression=bf16"
        )
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    mesh = data_group = cpu_group = store = None
    if size > 1:
        shared = next(dist.rendezvous("env://"))[0]
        store = own_store(shared, rank, size)
        # The watchdog, which knows more, comes before the timeout of collectives.
        timeout = datetime.timedelta(minutes=2 * cfg.timeout_minutes if cfg.timeout_minutes else 60 * 24 * 365)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        mesh = init_device_mesh(device.type, mesh_shape, mesh_dim_names=("replicate", "shard", "tp"))
        data_group = mesh["replicate", "shard"]._flatten("data").get_group()
        mesh["shard", "tp"]._flatten("model")  # norms are summed over it at once, else in two sums with a warning
        cpu_group = dist.new_group(backend="gloo", timeout=timeout)
        # The one that torchrun keeps outlives a rank; by a connection of its own, as the other may be busy.
        store = dist.PrefixStore(f"ranks_{store.port}", shared.clone())
        store.set_timeout(datetime.timedelta(seconds=20))
    watchdog = Watchdog(cfg.timeout_minutes, rank, size, store)
    try:
        yield World(rank, size, device, precision, mesh, data_group, cpu_group, watchdog, store)
    finally:
        watchdog.close()
    if size > 1:  # not after an error: the other ranks may never come here
        dist.barrier()
        dist.destroy_process_group()


def own_store(shared, rank, size):
    """A key-value store of this start of the processes alone, kept by rank 0.

    The one that torchrun shares with them lives through its restarts (pytorch/pytorch#135712): what dead processes left
    there, their addresses, would keep the next ones from finding each other.
    """
    if rank == 0:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], 0, size, is_master=True, wait_for_workers=False)
        shared.set("store_of_rank_0", str(store.port))
        return store
    deadline = time.monotonic() + 600
    while True:
        port = int(shared.get("store_of_rank_0"))
        try:
            timeout = datetime.timedelta(seconds=1)
            store = dist.TCPStore(os.environ["MASTER_ADDR"], port, size, timeout=timeout, wait_for_workers=False)
            store.set_timeout(datetime.timedelta(minutes=10))
            return store
        except dist.DistError:  # of a dead rank 0: that of the next one will stand there soon
            if time.monotonic() > deadline:
                raise


def shape_of_mesh(cfg, size):
    """(copies of the model, ranks that share a copy, ranks that share each layer) of so many processes."""
    if size % cfg.tp:
        raise ValueError(
            f"{size} processes are not a multiple of tp {cfg.tp}; start them with torchrun --nproc_per_node={cfg.tp}, "
            f"or a multiple of it"
        )
    data_ranks = size // cfg.tp
    shard = 1 if cfg.strategy == "ddp" else cfg.shard_size or data_ranks
    if data_ranks % shard:
        raise ValueError(
            f"shard_size {shard} does not divide the {data_ranks} ranks that read different data ({size} processes / "
            f"tp {cfg.tp}); lower it, or set it to none for all"
        )
    return data_ranks // shard, shard, cfg.tp


def check_tensor_parallel(cfg, seq_len, tp):
    """ValueError where tensor parallelism over tp ranks would cut through what must stay whole."""
    sizes = {
        "n_head": cfg.n_head,
        "n_kv_head": cfg.kv_heads,
        "n_inner": cfg.inner_width,
        "seq_len": seq_len,
        "vocab_size, padded,": cfg.padded_vocab_size,
    }
    wrong = [f"{name} {size} is not a multiple of tp {tp}" for name, size in sizes.items() if size % tp]
    if wrong:
        fitting = [str(n) for n in range(1, tp) if not any(size % n for size in sizes.values())]
        raise ValueError(f"{', '.join(wrong)}; tp {', '.join(fitting)} would fit")


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
    step where they are many. It costs some 10 % more memory at the peak, and where tensors of many sizes come and go,
    as with recomputation of blocks, up to several times as much.
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


def memory_bytes(device):
    """Bytes of memory that this process can have on a device, code and libraries not counted."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed, statm = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if allowed == resource.RLIM_INFINITY or not statm.exists():
        return limit
    mapped, resident = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in statm.read_text().split()[:2])
    return min(limit, allowed - (mapped - resident))


def reset_peak_memory(device):
    """Lets peak_memory_gib start anew, where that can be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError):  # of a system that has or allows no such file
            Path("/proc/self/clear_refs").write_text("5")


def memory_now_gib(device):
    """What peak_memory_gib is the peak of, now; without /proc that peak itself."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_memory_gib(device)
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def distribute(model, cfg, world, seed):
    """Turns a model on the meta device into one that trains: sharded, recomputed and compiled, with weights.

    Everything happens in place and adds no wrapper, so that parameters keep their names.
    """
    is_sharded = world.size > 1 and (cfg.strategy == "fsdp" or cfg.tp > 1)
    if is_sharded:
        import shard
    if cfg.tp > 1:
        shard.shard_tensors(model, world.mesh["tp"])
    if cfg.activation_checkpointing == "selective":  # the compiler must see what is kept
        recompute_blocks(model, "selective")
    if cfg.compile or (cfg.compile is None and world.device.type == "cuda"):
        compile_blocks(model, world)
    if cfg.activation_checkpointing == "full":  # not compiled with the block: that fails on tensor parallel ones
        recompute_blocks(model, "full")
    if is_sharded:  # under tensor parallelism also with ddp, as one copy a rank: DDP itself takes no DTensors
        shard.fully_shard_model(model, cfg, world)
    model.to_empty(device=world.device)
    model.tie_weights()
    model.init_weights(seed, shard.fill) if is_sharded else model.init_weights(seed)
    if world.size > 1 and not is_sharded:
        replicate_model(model, cfg.grad_compression)
    return model


def replicate_model(model, compression):
    """Sums gradients over ranks that each have the whole model, in float32 or compressed."""
    from torch.distributed._composable.replicate import replicate  # DDP without a wrapper module

    replicate(model, gradient_as_bucket_view=True)
    if compression == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        # Not the hook itself: torch, by its name, wants NCCL for it, but gloo sums bf16 as well.
        model.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    elif compression == "powersgd":
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

        def one_by_one(state, bucket):
            future = powerSGD_hook(state, bucket)
            if dist.get_backend() == "gloo":  # which follows a sum up when it is there, in another order on each rank
                future.wait()
            return future

        state = PowerSGDState(None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_START)
        model.register_comm_hook(state, one_by_one)


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
        block.forward = torch.compile(block.forward)


def sync_gradients(model, last):
    """Makes the next backward sum gradients over ranks, or not: on the last micro-step of a step alone.

    FSDP, unless it accumulates whole gradients, sums over the ranks of a copy at every micro-step, over copies on the
    last.
    """
    if hasattr(model, "set_requires_all_reduce"):  # FSDP
        model.set_requires_gradient_sync(last or model.accumulates_sharded)
        model.set_requires_all_reduce(last)
    elif hasattr(model, "set_requires_gradient_sync"):  # DDP
        model.set_requires_gradient_sync(last)
        if next(model.parameters()).grad is None:  # what is there in the first forward, DDP takes into its buckets
            for p in model.parameters():
                p.grad = torch.zeros_like(p)


def keeps_gradients(model):
    """Whether gradients lie in DDP's buckets, and are to be zeroed there: dropped, they would be summed up beside them.

    In all micro-steps but the last, that is, which sends them: as much again as they take.
    """
    return hasattr(model, "set_requires_gradient_sync") and not hasattr(model, "set_requires_all_reduce")


def reshard(model):
    """Gives back gathered weights, as backward does: after forwards alone, since only shards are saved and stepped."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def seed_step(seed, step, rank):
    """Seeds dropout for a step: its masks are a function of (seed, step, rank), which a resumed run draws again."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], signed=True))
