"""Measuring time, memory and energy: of functions, and of a training step by phase and category."""

import contextlib
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
import warnings

import torch
from torch.autograd import DeviceType

from parallel import has_gradient_buckets
from perf.memory import CATEGORIES
from world import local

PHASES = ("forward", "backward", "optimizer", "data")  # the phases of a step, as train_step names them


@contextlib.contextmanager
def timed_phases(world, before=None):
    """Gives {phase: seconds} of a World's phases, timed with the device idle at both ends, and marked in traces.

    Time between phases counts nowhere. before: {phase: function to call when it begins}.
    """
    seconds, previous = dict.fromkeys(PHASES, 0.0), world.progress.timer

    @contextlib.contextmanager
    def timer(name):
        if before and name in before:
            before[name]()
        world.synchronize()
        start = time.perf_counter()
        with torch.profiler.record_function(f"phase {name}"):
            yield
            world.synchronize()
        seconds[name] += time.perf_counter() - start

    world.progress.timer = timer
    try:
        yield seconds
    finally:
        world.progress.timer = previous


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


def rising(sizes, measured, power, world, seconds, left_out, name):
    """{size as text: figure} for rising sizes, as far as the seconds last on the slowest rank.

    measured(size): (figure, seconds of one run), which grow as size ** power. Sizes too slow for the time that is left
    are added to left_out by name.
    """
    found, start, one_run = {}, time.perf_counter(), 0.0
    for i, size in enumerate(sizes):
        if found:
            expected = 1.5 * one_run * (size / sizes[i - 1]) ** power  # a run, and its preparation
            if world.worst(time.perf_counter() - start + expected) > seconds:
                left_out += [name.format(larger) for larger in sizes[i:]]
                break
        found[str(size)], one_run = measured(size)
    return found


# ---- traces


def trace(function, path=None):
    """(profiler, events) of a call; events as in the trace that Chrome and Perfetto read, times in microseconds.

    path: a file to keep the trace in; None: it is deleted.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = path or os.path.join(folder, "trace.json")
        with warnings.catch_warnings():
            # The remedy it names, acc_events, spends a second on the events of every 10,000 operators.
            warnings.filterwarnings("ignore", "Warning: Profiler clears events")
            with torch.profiler.profile(profile_memory=True) as profiler:
                function()
        profiler.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            return profiler, json.load(file)["traceEvents"]


def spans(events, named):
    """[(start, end)] of the events for which named(category, name) is true."""
    found = (e for e in events if e["ph"] == "X" and named(e.get("cat"), e["name"]))
    return [(e["ts"], e["ts"] + e["dur"]) for e in found]


def phase_spans(events, phase):
    """[(start, end)] of a phase that timed_phases marked."""
    return spans(events, lambda kind, name: kind == "user_annotation" and name == f"phase {phase}")


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
    with timed_phases(world) as seconds:
        for _ in range(n_steps):
            step()
    seconds["communication"] = 0.0
    if world.size > 1:
        for phase, share in communication_shares(step, world).items():
            seconds["communication"] += share * seconds[phase]
            seconds[phase] -= share * seconds[phase]
    by_rank = world.gather({phase: spent / sum(seconds.values()) for phase, spent in seconds.items()})
    return {phase: statistics.mean(shares[phase] for shares in by_rank) for phase in seconds}


def communication_shares(step, world):
    """{phase: share of its time in which this rank communicates and computes nothing}."""
    with timed_phases(world):
        _, events = trace(step)
    if world.device.type == "cuda":
        on_gpu = ("kernel", "gpu_memcpy", "gpu_memset")
        sent = spans(events, lambda kind, name: kind == "kernel" and "nccl" in name.lower())
        busy = spans(events, lambda kind, name: kind in on_gpu and "nccl" not in name.lower())
    else:
        sent = spans(events, lambda kind, name: name.startswith("gloo:"))
        busy = spans(events, lambda kind, name: name.startswith("aten::"))
    found = {}
    for phase in PHASES:
        parts = phase_spans(events, phase)
        alone = sum(length(sent + busy, part) - length(busy, part) for part in parts)
        found[phase] = alone / max(1e-9, sum(end - start for start, end in parts))
    return found


# ---- memory


def memory_parts(step, model, optimizer, world, checkpointing):
    """({category: GiB} on this rank, peak GiB), from the trace of a step.

    step() runs a train_step. checkpointing: the setting activation_checkpointing. Activations are those that the first
    forward leaves for backward; weights include autocast's copies; logits is the peak of the loss.
    """
    found = {}

    def measure_gradients():  # complete when the optimizer starts
        found["gradients"] = n_bytes(p.grad for p in model.parameters() if p.grad is not None)

    with timed_phases(world, before={"optimizer": measure_gradients}):
        _, events = trace(step)
    found["weights"] = n_bytes(model.parameters()) + n_bytes(model.copies[0] if model.copies else ())
    found["optimizer"] = n_bytes(v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    found |= saved_by_forward(events, world.device)
    before = found["weights"] + found["optimizer"] + (found["gradients"] if has_gradient_buckets(model) else 0)
    is_sharded = hasattr(model, "set_requires_all_reduce")  # FSDP gathers weights in the matmuls' precision
    casts = not is_sharded and not model.copies and world.precision != "fp32" and checkpointing == "none"
    if casts and "activations" in found:
        cast = sum(2 * p.numel() for p in model.blocks.parameters() if p.dim() == 2)
        found["weights"] += cast
        found["activations"] -= cast
    levels = itertools.accumulate(change for _, change, _ in allocations(events, world.device))
    peak = before + max(levels, default=0)
    return {name: found[name] / 2**30 for name in CATEGORIES if name in found}, peak / 2**30


def saved_by_forward(events, device):
    """{"activations", "logits": bytes} of the forwards before the first backward in a step's trace.

    {} for a trace without memory. A stage of a pipeline may have several, and no loss.
    """
    changes = allocations(events, device)
    if not changes:
        return {}

    def allocated(since, until):
        return sum(change for at, change, _ in changes if since <= at < until)

    (start, _), (end, _) = (min(phase_spans(events, phase)) for phase in ("forward", "backward"))
    losses = [span for span in spans(events, lambda kind, name: name == "_LinearCrossEntropy") if span[0] < end]
    loss_start, loss_end = min(losses, default=(end, end))
    in_loss = itertools.accumulate(change for at, change, _ in changes if loss_start <= at < loss_end)
    activations = allocated(start, end) - allocated(loss_start, loss_end)
    return {"activations": activations, "logits": max([0, *in_loss])}


def n_bytes(tensors):
    """Bytes of this rank's shards of tensors."""
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


# ---- energy


@contextlib.contextmanager
def power_samples(device, interval_s=0.05):
    """Gives ([watts], None), samples of a device's power by a thread, or ([], the reason why there are none)."""
    read_watts, why_not = power_reader(device)
    watts, ended = [], threading.Event()

    def sample():
        while True:
            watts.append(read_watts())
            if ended.wait(interval_s):
                return

    thread = threading.Thread(target=sample, daemon=True, name="power")
    if read_watts:
        thread.start()
    try:
        yield watts, why_not
    finally:
        ended.set()
        if read_watts:
            thread.join()


def power_reader(device):
    """(function that returns a device's power in watts, or None; the reason why there is none)."""
    if device.type != "cuda" or torch.version.hip:
        return None, "only NVIDIA's GPUs report it"
    try:
        torch.cuda.power_draw(device)
    except ModuleNotFoundError:
        return None, "pip install nvidia-ml-py measures it"
    except Exception as error:  # its class is in nvidia-ml-py
        return None, f"NVML does not report it: {error}"
    return lambda: torch.cuda.power_draw(device) / 1e3, None
