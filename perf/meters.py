"""Measuring time, memory and energy: of functions, and of a training step by phase and category."""

import contextlib
import itertools
import json
import os
import statistics
import tempfile
import threading
import time

import torch
from torch.autograd import DeviceType

from parallel import has_gradient_buckets
from world import local

PHASES = ("forward", "backward", "optimizer", "data")  # the phases of a step, as train_step names them
GIB = 2**30


class PhaseTimer:
    """Times a World's phases while it is entered, with the device idle at both ends, and marks them in traces.

    Time between phases counts nowhere. before: {phase: function to call when it begins}.
    """

    def __init__(self, world, before=None):
        self.world, self.before, self.seconds = world, before or {}, dict.fromkeys(PHASES, 0.0)

    def __enter__(self):
        self._previous, self.world.progress.timer = self.world.progress.timer, self._phase
        return self

    def __exit__(self, *error):
        self.world.progress.timer = self._previous

    @contextlib.contextmanager
    def _phase(self, name):
        if name in self.before:
            self.before[name]()
        self.world.synchronize()
        start = time.perf_counter()
        with torch.profiler.record_function(f"phase {name}"):
            yield
            self.world.synchronize()
        self.seconds[name] += time.perf_counter() - start


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
            expected = 1.5 * one_run * work_of(size) / work_of(sizes[i - 1])  # a run, and its preparation
            if world.worst(time.perf_counter() - start + expected) > seconds:
                left_out += [name.format(larger) for larger in sizes[i:]]
                break
        found[size], one_run = measured(size)
    return found


# ---- traces


def trace(function, path=None):
    """(profiler, events) of a call; events as in the trace that Chrome and Perfetto read, times in microseconds.

    path: a file to keep the trace in; None: it is deleted.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = path or os.path.join(folder, "trace.json")
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:  # without it 2.11 warns
            function()
        profiler.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            return profiler, json.load(file)["traceEvents"]


def spans(events, named):
    """[(start, end)] of the events for which named(category, name) is true."""
    found = (e for e in events if e["ph"] == "X" and named(e.get("cat"), e["name"]))
    return [(e["ts"], e["ts"] + e["dur"]) for e in found]


def is_phase(phase):
    """The condition for spans() that selects a phase which PhaseTimer marked."""
    return lambda kind, name: kind == "user_annotation" and name == f"phase {phase}"


def allocations(events, device):
    """[(time, bytes, bytes allocated in total)] on a device in order of time; negative bytes are freed."""
    kind = getattr(DeviceType, device.type.upper()).value
    memory = [(e["ts"], e["args"]) for e in events if e["name"] == "[memory]"]
    found = [(ts, a["Bytes"], a["Total Allocated"]) for ts, a in memory if a["Device Type"] == kind]
    return sorted(found, key=lambda event: event[0])


def length(intervals, within):
    """Time of the interval `within` that other intervals, which may overlap, cover."""
    covered, end = 0.0, within[0]
    for start, stop in sorted(intervals):
        stop = min(stop, within[1])
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


# ---- time


def time_shares(step, world, n_steps):
    """{phase: share of the time in phases}, and "communication": the mean over ranks.

    Communication is the time in which a rank sends or waits for other ranks and computes nothing. Its share of each
    phase is measured in one profiled step, and moved out of that phase.
    """
    with PhaseTimer(world) as timer:
        for _ in range(n_steps):
            step()
    seconds = timer.seconds | {"communication": 0.0}
    if world.size > 1:
        for phase, share in communication_shares(step, world).items():
            seconds["communication"] += share * seconds[phase]
            seconds[phase] -= share * seconds[phase]
    by_rank = world.gather({phase: spent / sum(seconds.values()) for phase, spent in seconds.items()})
    return {phase: statistics.mean(shares[phase] for shares in by_rank) for phase in seconds}


def communication_shares(step, world):
    """{phase: share of its time in which this rank communicates and computes nothing}."""
    with PhaseTimer(world):
        _, events = trace(step)
    if world.device.type == "cuda":
        sent = spans(events, lambda kind, name: kind == "kernel" and "nccl" in name.lower())
        busy = spans(
            events, lambda kind, name: kind in ("kernel", "gpu_memcpy", "gpu_memset") and "nccl" not in name.lower()
        )
    else:
        sent = spans(events, lambda kind, name: name.startswith("gloo:"))
        busy = spans(events, lambda kind, name: name.startswith("aten::"))
    found = {}
    for phase in PHASES:
        parts = spans(events, is_phase(phase))
        alone = sum(length(sent + busy, part) - length(busy, part) for part in parts)
        found[phase] = alone / max(1e-9, sum(end - start for start, end in parts))
    return found


# ---- memory


def memory_parts(step, model, optimizer, world, checkpointing):
    """({category: GiB} on this rank, peak GiB), from the trace of a step.

    step() runs a train_step. checkpointing: the setting activation_checkpointing. Activations are what the first
    forward leaves for backward, without the weights that autocast has cast, which count as weights. logits is the peak
    of the loss, a chunk of logits and gradients.
    """
    found = {}

    def measure_gradients():  # complete when the optimizer starts
        found["gradients"] = n_bytes(p.grad for p in model.parameters() if p.grad is not None)

    with PhaseTimer(world, before={"optimizer": measure_gradients}):
        _, events = trace(step)
    found["weights"] = n_bytes(model.parameters())
    found["optimizer"] = n_bytes(v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    found |= saved_by_forward(events, world.device)
    before = found["weights"] + found["optimizer"] + (found["gradients"] if has_gradient_buckets(model) else 0)
    is_sharded = hasattr(model, "set_requires_all_reduce")  # FSDP gathers weights in the matmuls' precision
    if not is_sharded and world.precision != "fp32" and checkpointing == "none" and "activations" in found:
        cast = sum(2 * p.numel() for p in model.blocks.parameters() if p.dim() == 2)
        found["weights"] += cast
        found["activations"] -= cast
    names = ("weights", "gradients", "optimizer", "activations", "logits")
    levels = itertools.accumulate(change for _, change, _ in allocations(events, world.device))
    peak = before + max(levels, default=0)
    return {name: found[name] / GIB for name in names if name in found}, peak / GIB


def saved_by_forward(events, device):
    """{"activations", "logits": bytes} of the first forward in a step's trace; {} for a trace without memory."""
    changes = allocations(events, device)
    if not changes:
        return {}

    def allocated(since, until):
        return sum(change for at, change, _ in changes if since <= at < until)

    forward = spans(events, is_phase("forward"))
    loss_start, loss_end = min(spans(events, lambda kind, name: name == "_LinearCrossEntropy"))
    start, end = next(span for span in sorted(forward) if span[0] <= loss_start < span[1])
    highest = now = 0
    for at, change, _ in changes:
        if loss_start <= at < loss_end:
            now += change
            highest = max(highest, now)
    return {"activations": allocated(start, end) - allocated(loss_start, loss_end), "logits": highest}


def n_bytes(tensors):
    """Bytes of this rank's shards of tensors."""
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


# ---- energy


class PowerMeter:
    """Samples a device's power in a thread while it is entered."""

    def __init__(self, read_watts, interval_s=0.05):
        """read_watts: a function that returns the present power; None: nothing is sampled."""
        self.read_watts, self.interval_s, self.watts = read_watts, interval_s, []
        self._ended = threading.Event()

    def __enter__(self):
        if self.read_watts:
            self._thread = threading.Thread(target=self._sample, daemon=True, name="power")
            self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        if self.read_watts:
            self._thread.join()

    def _sample(self):
        while True:
            self.watts.append(self.read_watts())
            if self._ended.wait(self.interval_s):
                return

    @property
    def mean_w(self):
        """Mean of the samples; None without samples."""
        return statistics.mean(self.watts) if self.watts else None


def power_reader(device):
    """(function that returns a device's power in watts, or None; the reason why there is none)."""
    if device.type != "cuda":
        return None, f"a device of type {device.type} does not report its power"
    try:
        import pynvml
    except ImportError:
        return None, "pip install nvidia-ml-py measures it"
    try:
        pynvml.nvmlInit()
        # By UUID, since CUDA_VISIBLE_DEVICES may have renumbered the devices.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetPowerUsage(handle)
    except pynvml.NVMLError as error:
        return None, f"NVML does not report it: {error}"
    return lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3, None
