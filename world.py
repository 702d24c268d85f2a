"""The processes of a run: ranks, groups, what they exchange, and the progress of each."""

import contextlib
import datetime
import hashlib
import os
import re
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from config import Config, Positive, UserError
from console import end
from devices import DTYPES, keep_freed_memory, pick_device, pick_precision

YEAR = 60 * 24 * 365  # minutes


@dataclass(frozen=True)
class WorldConfig(Config):
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # dtype of matmuls; auto: the device's fastest
    deterministic: bool = False  # use only algorithms that repeat bitwise on CUDA; a CPU's do anyway
    timeout_minutes: Positive | None = 30.0  # minutes without progress on any rank before the run ends; none: never


@dataclass
class Progress:
    """Where the main thread is: the watchdog reads it, and a benchmark sets `timer` to time the phases."""

    step: int = 0
    n_phases: int = 0  # entered so far; all ranks enter the same phases in the same order
    place: str = "the start"
    timer: object = contextlib.nullcontext  # called with a phase's name, returns a context


@dataclass(frozen=True)
class World:
    """The processes of a run, each with a device; one process unless torchrun started more.

    A stage of the pipeline has the same number of consecutive ranks, one stage where there is none. The mesh of a stage
    is (replicate, shard, tp): tp neighbours split each layer and read the same data, `shard` groups hold one
    replica of the model, and replicas hold equal weights. data_group connects the ranks that compute different tokens:
    neighbours in it, cp of them, share sequences, the others read different ones.
    cpu_group connects all ranks apart from training, and saver_group once more, for the thread that writes checkpoints.
    In the store, ranks leave their progress and how they ended.
    """

    rank: int
    size: int
    device: torch.device
    precision: str
    mesh: DeviceMesh | None = None
    pp: int = 1  # stages of the pipeline
    pp_groups: tuple = ()  # the ranks of a pipeline, once for what goes forward, once for what comes backward
    cp: int = 1  # ranks that share sequences
    cp_group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None
    cpu_group: dist.ProcessGroup | None = None
    saver_group: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def mesh_shape(self):
        """(replicas, shards of a replica, tensor parallel ranks)."""
        return (1, 1, 1) if self.mesh is None else tuple(self.mesh.shape)

    @property
    def tp(self):
        """Ranks that split each layer."""
        return self.mesh_shape[2]

    @property
    def data_rank(self):
        """Number of the part of the data that this rank reads."""
        return self.rank_in_stage // (self.tp * self.cp)

    @property
    def data_ranks(self):
        """Parts that the data is read in."""
        return self.ranks_of_stage // (self.tp * self.cp)

    @property
    def ranks_of_stage(self):
        """Ranks of a stage of the pipeline."""
        return self.size // self.pp

    @property
    def stage(self):
        """Number of this rank's stage of the pipeline."""
        return min(self.rank // self.ranks_of_stage, self.pp - 1)

    @property
    def rank_in_stage(self):
        """Number of this rank among those of its stage."""
        return self.rank - self.stage * self.ranks_of_stage

    @property
    def dtype(self):
        """The dtype of matmuls."""
        return DTYPES[self.precision]

    @property
    def is_main(self):
        """Whether this process prints, logs and writes for all."""
        return self.rank == 0

    @contextlib.contextmanager
    def phase(self, name, detail=""):
        """A part of the run by name, such as "forward": the watchdog reports it, a benchmark times it."""
        self.progress.n_phases += 1
        self.progress.place = f"step {self.progress.step}, {name}{detail and f', {detail}'}"
        with self.progress.timer(name):
            yield

    def autocast(self):
        """A context in which matmuls run in the run's precision."""
        # Without its cache, which CUDA graphs do not allow: forward casts each weight once anyway.
        return torch.autocast(self.device.type, self.dtype, enabled=self.precision != "fp32", cache_enabled=False)

    def synchronize(self):
        """Waits until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    # ---- exchange between ranks

    def sum_over_data(self, tensor):
        """The sum of a tensor over the ranks that read different data, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def sum_over_stages(self, tensor):
        """The sum of a tensor over the stages of a pipeline, in place."""
        if self.pp > 1:
            dist.all_reduce(tensor, group=self.pp_groups[0])
        return tensor

    def sum_over_all(self, *scalars):
        """Sums of scalars over all ranks as floats, bitwise equal on each rank; waits for the device."""
        if self.size == 1:
            return [scalar.item() for scalar in scalars]
        sums = torch.stack([scalar.double() for scalar in scalars])
        dist.all_reduce(sums)
        return sums.tolist()

    def worst(self, value):
        """The largest value of a number over all ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def gather(self, value):
        """A list with each rank's value, of any type; uses cpu_group."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def from_main(self, value):
        """Rank 0's value, of any type, on each rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self.cpu_group)
        return values[0]

    def barrier(self):
        """Waits until all ranks are here."""
        if self.size > 1:
            dist.barrier()


class Failure(Exception):
    """An error of one rank, raised on all."""

    def __init__(self, text, is_of_disk):
        super().__init__(text)
        self.is_of_disk = is_of_disk


def on_all_ranks(world, function):
    """A list with each rank's function(); Failure on all ranks where one raised."""
    from torch.distributed.checkpoint import CheckpointException  # no subclass of Exception

    value = problem = None
    try:
        value = function()
    except (Exception, CheckpointException) as error:
        cause = cause_of(error)
        is_plain = isinstance(cause, (OSError, ValueError))
        problem = str(cause) if is_plain else f"{type(cause).__name__}: {cause}", isinstance(cause, OSError)
    answers = [(value, problem)] if world is None else world.gather((value, problem))
    if problem := next((problem for _, problem in answers if problem), None):
        raise Failure(*problem)
    return [value for value, _ in answers]


def cause_of(error):
    """The first rank's error: torch.distributed.checkpoint wraps the errors of all ranks into one."""
    return next((cause for cause, _ in getattr(error, "failures", {}).values()), error)


def local(tensor):
    """This rank's shard of a tensor, or the tensor itself where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- start and end


@contextlib.contextmanager
def init_world(cfg, layout=None):
    """Joins the process group that torchrun's environment names, yields this process's World, leaves the group.

    cfg: a WorldConfig. layout: a ParallelConfig, which gives the shape of the mesh; None: replicas alone.
    """
    rank, size, local_rank = processes_here()
    if layout:
        layout.mesh_shape(size)  # raises where it does not fit
    device = pick_device(cfg.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_freed_memory()
    precision = pick_precision(cfg.precision, device)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    if size == 1:
        yield World(rank, size, device, precision)
        return
    shared, store = meet(rank, size, cfg.timeout_minutes or YEAR)
    # Twice the watchdog's time: the watchdog names the rank that hangs, a collective's timeout does not.
    timeout = datetime.timedelta(minutes=2 * (cfg.timeout_minutes or YEAR))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    groups = groups_of(device.type, layout, size, timeout)
    cpu_group, saver_group = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    # Progress goes to torchrun's store, which outlives a rank, over a connection of its own: the other may be busy.
    progress_store = dist.PrefixStore(f"ranks_{store.port}", shared.clone())
    progress_store.set_timeout(datetime.timedelta(seconds=20))
    groups |= {"cpu_group": cpu_group, "saver_group": saver_group, "store": progress_store}
    yield World(rank, size, device, precision, **groups)
    # Not in a finally: after an error the other ranks may never come here.
    dist.barrier()
    dist.destroy_process_group()


def groups_of(device_type, layout, size, timeout=None):
    """The fields of a World that say which of `size` ranks exchange what; layout: a ParallelConfig, None: replicas."""
    pp, cp, shape = (layout.pp, layout.cp, layout.mesh_shape(size)) if layout else (1, 1, (size, 1, 1))
    names, pp_groups, cp_group = ("replicate", "shard", "tp"), (), None
    whole = init_device_mesh(device_type, (pp, *shape), mesh_dim_names=("pp", *names))
    mesh = whole[names]
    data_group = mesh["replicate", "shard"]._flatten("data").get_group()
    mesh["shard", "tp"]._flatten("model")  # clip_grad_norm_ then sums norms over it at once, without a warning
    # After the mesh's groups, whose names, numbers in the order of their making, DTensor keeps from one mesh to the next
    if pp > 1:
        backward, _ = dist.new_subgroups_by_enumeration(whole.mesh.flatten(1).T.tolist(), timeout)
        pp_groups = whole.get_group("pp"), backward
    if cp > 1:
        sharing = whole.mesh.view(-1, cp, shape[2]).mT.flatten(0, 1).tolist()
        cp_group, _ = dist.new_subgroups_by_enumeration(sharing, timeout)
    return {"mesh": mesh, "pp": pp, "pp_groups": pp_groups, "cp": cp, "cp_group": cp_group, "data_group": data_group}


def processes_here():
    """(rank, number of processes, rank on this machine) by torchrun's environment variables; (0, 1, 0) without them.

    UserError where one of them is wrong by itself or beside the others.
    """

    def check(name, holds, rule):
        if not holds:
            remedy = "start several processes with torchrun, a single one without these variables"
            value = os.environ.get(name, "not set") or "empty"
            raise UserError(f"{name} is {value} in the environment; it must be {rule}; {remedy}")

    def whole(name, default):
        text = os.environ.get(name, str(default))
        check(name, re.fullmatch("[0-9]{1,9}", text), "a whole number")
        return int(text)

    size, rank, local_rank = whole("WORLD_SIZE", 1), whole("RANK", 0), whole("LOCAL_RANK", 0)
    local_size = whole("LOCAL_WORLD_SIZE", size)
    check("WORLD_SIZE", size > 0, "at least 1")
    check("RANK", rank < size, f"below WORLD_SIZE, here {size}")
    check("LOCAL_WORLD_SIZE", local_size <= size, f"at most WORLD_SIZE, here {size}")
    check("LOCAL_RANK", local_rank < local_size, f"below LOCAL_WORLD_SIZE, here {local_size}")
    if size > 1:
        address = os.environ.get("MASTER_ADDR", "")  # a name, or an address of version 4 or 6
        is_address = re.fullmatch(r"[\w.-]+|[0-9a-f]*:[0-9a-f.]*:[\w:.%]*", address, re.IGNORECASE)
        check("RANK", "RANK" in os.environ, f"set beside WORLD_SIZE, here {size}")
        check("MASTER_ADDR", is_address, "the name or address of rank 0's machine, without a port")
        check("MASTER_PORT", 0 < whole("MASTER_PORT", 0) < 2**16, "a port of that machine, from 1 to 65535")
    return rank, size, local_rank


def meet(rank, size, minutes):
    """Waits until all processes are here; returns the store that they share and one for this start alone.

    UserError where some do not come in so many minutes, or where torchrun ends meanwhile, whose store it is.
    """
    patience = datetime.timedelta(minutes=minutes)
    # torchrun's store is there before its processes are: where it cannot be reached, torchrun has ended.
    has_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    connecting = min(patience, datetime.timedelta(minutes=1)) if has_torchrun else patience
    try:
        shared = next(dist.rendezvous("env://", timeout=connecting))[0]
        store = own_store(shared, rank, size, patience)
        shared.set(f"here_{store.port}_{rank}", "")
        shared.wait([f"here_{store.port}_{other}" for other in range(size)], patience)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        why = str(error).strip().partition("\n")[0]
        limit = f"{size} processes did not meet in timeout_minutes {minutes:g}, or torchrun has ended"
        raise UserError(f"{limit} ({why}); start all of them again") from error
    return shared, store


def own_store(shared, rank, size, patience):
    """A key-value store for this start of the processes alone, kept by rank 0.

    torchrun's store lives through its restarts (pytorch/pytorch#135712): addresses that dead processes left there would
    keep the next ones from finding each other.
    """
    if rank == 0:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], 0, size, is_master=True, wait_for_workers=False)
        shared.set("store_of_rank_0", str(store.port))
        return store
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        shared.wait(["store_of_rank_0"], patience)
        port = int(shared.get("store_of_rank_0"))
        try:
            timeout = datetime.timedelta(seconds=1)
            store = dist.TCPStore(os.environ["MASTER_ADDR"], port, size, timeout=timeout, wait_for_workers=False)
            store.set_timeout(datetime.timedelta(minutes=10))
            return store
        except dist.DistError:  # the port is a dead rank 0's; the new rank 0 will soon replace it
            if time.monotonic() > deadline:
                raise


def end_process():
    """Ends the process without the interpreter's own shutdown, which takes torch half a second, or never succeeds.

    gloo's event thread drops the last collective's tensor, for which it needs the interpreter's lock; DTensor's caches
    keep that thread alive past destroy_process_group, and C++ then aborts with "terminate called without an active
    exception".
    """
    end(0)


def seed_step(seed, step, rank):
    """Seeds dropout for a step: its masks are a function of (seed, step, rank), which a resumed run draws again."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], signed=True))
