"""How fast and how much memory: times train.py's own train_step on this machine.

python bench.py                                                # what this machine can do
python bench.py config/gpt2_124m.py
python bench.py config/gpt2_124m.py --profile --json=bench.json
python bench.py config/gpt2_124m.py --sweep                    # the fastest settings that fit, as a preset
python bench.py --compare A.json B.json
torchrun --nproc_per_node=8 bench.py config/gpt2_124m.py
"""

import dataclasses
import os
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from config import UserError, only, run_script
from data import DataConfig, accumulation_steps, seq_len_of
from interop.pretrained import resolve
from model import ModelConfig
from objective import OBJECTIVES, ObjectiveConfig
from optim import OptimConfig
from parallel import ParallelConfig
from perf import cost, machine, meters
from perf.ceilings import ceilings_table, measure_ceilings
from perf.hardware import known_device, measured, measured_matmul_flops, peak_flops, this
from perf.memory import explaining_out_of_memory, memory, setup_here
from perf.report_bench import compare, draw, draw_memory, errors, print_operators, report
from perf.sweep import SweepConfig, sweep
from plan import OutputConfig, PlanConfig, step_parts, write_json
from run.folder import RunConfig
from run.health import HealthConfig
from train import build, open_data, train_step
from world import (
    WorldConfig,
    device_name,
    end_process,
    init_world,
    memory_now_gib,
    peak_memory_gib,
    pick_device,
    reset_peak_memory,
)


@dataclass(frozen=True)
class BenchConfig:
    bench_steps: int = 20  # steps to time, fewer where bench_seconds is over first, but at least 3
    bench_seconds: float = 60.0  # time for them
    bench_warmup: int = 3  # steps before the clock starts; they hold compilation
    real_data: bool = False  # take batches from data_dir, not random tokens
    profile: bool = False  # trace 2 more steps: trace.json for ui.perfetto.dev, a table of operators, memory.png
    picture: bool = True  # draw bench.png: what the device can reach, and what was measured

    def __post_init__(self):
        wrong = []
        if self.bench_steps < 1:
            wrong.append(f"bench_steps is {self.bench_steps}; it must be at least 1")
        if self.bench_warmup < 0 or self.bench_seconds < 0:
            wrong.append(
                f"bench_warmup is {self.bench_warmup}, bench_seconds {self.bench_seconds}; neither may be negative"
            )
        if wrong:
            raise UserError("\n".join(wrong))


@dataclass(frozen=True)
class Settings:
    bench: BenchConfig
    output: OutputConfig
    plan: PlanConfig = only("machine")
    sweep: SweepConfig
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    world: WorldConfig
    health: HealthConfig = only("spike_z")
    run: RunConfig = only("init_from")  # whose shape is measured, with random weights
    presets: tuple = ()
    files: tuple = ()
    given: frozenset = dataclasses.field(default=frozenset(), compare=False)

    def __post_init__(self):
        if self.output.compare and len(self.files) != 2:
            raise UserError(f"compare takes two files, not {len(self.files)}: bench.py --compare A.json B.json")
        if self.files and not self.output.compare:
            raise UserError(f"{' '.join(self.files)}: files of figures are read by --compare alone")
        if not self.run.init_from:  # whose block_size may be another
            seq_len_of(self)  # raises where it does not fit the model


def main(cfg):
    if cfg.output.compare:
        compare(*cfg.files)
    elif cfg.sweep.sweep:
        write_json(sweep_settings(cfg), cfg.output.json)
    elif is_of_machine(cfg):
        bench_machine(cfg)
    else:
        bench_training(cfg)


def is_of_machine(cfg):
    """Whether a command names nothing that is trained, nor how."""
    plain = (ModelConfig(), DataConfig(), OptimConfig(), BenchConfig(picture=cfg.bench.picture), RunConfig())
    return not cfg.presets and (cfg.model, cfg.data, cfg.optim, cfg.bench, cfg.run) == plain


def bench_machine(cfg):
    """What this machine can do, whatever is trained on it; kept for plan.py --gpu=this and for the next benchmarks."""
    with init_world(cfg.world, cfg.parallel) as world:
        folder = os.path.dirname(cfg.plan.machine) or "."
        figures = machine.measure(world, folder)
        if world.is_main:
            print(*machine.table(figures), sep="\n", flush=True)
        figures["ceilings"] = measure_ceilings(world)
        if world.is_main:
            print(*ceilings_table(figures["ceilings"]), sep="\n", flush=True)
            write_json(figures, cfg.plan.machine)
            print(f"written    {cfg.plan.machine}, for python plan.py --gpu=this")
            if cfg.bench.picture:
                draw(figures, device_name(world.device))
            write_json(figures, cfg.output.json)


def sweep_settings(cfg):
    """The figures of sweep.py."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("sweep starts processes itself, one after the other, for one device: run it without torchrun")
    given, cfg = cfg, resolve(cfg)
    accumulation_steps(cfg.data, cfg.data.seq_len, 1)  # raises where micro_batch_size does not fit
    return sweep(cfg, given, compiled_by_default=pick_device(cfg.world.device).type == "cuda")


# ---- a benchmark of training


def bench_training(cfg):
    """Measures training, and prints, draws and writes the figures."""
    with init_world(cfg.world, cfg.parallel) as world:
        cfg = resolve(cfg)
        with explaining_out_of_memory(cfg, world):
            figures = measure(cfg, world)
        if world.is_main:
            if cfg.bench.picture:  # now, when the model's memory is free
                draw(roofline_of_training(figures, world), f"{figures['device']}, {figures['precision']}")
            write_json(figures, cfg.output.json)


def measure(cfg, world):
    """Times steps, takes some more apart, and prints the figures; returns them."""
    micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, world.data_ranks)
    reset_peak_memory(world.device)
    memory_before = memory_now_gib(world.device)
    model, optimizer, scaler = build(cfg, world, seed=1337)
    batches = real_batches(cfg, world) if cfg.bench.real_data else random_batches(cfg, micro_steps, world)

    def step(n_micro_steps):
        start = time.perf_counter()
        with world.phase("data"):
            batch = next(batches)[:n_micro_steps]
        train_step(model, optimizer, scaler, batch, cfg, world)
        world.synchronize()
        return world.worst(time.perf_counter() - start)

    n, times, power_w = timed(step, micro_steps, cfg.bench, world)
    if n < min(2, micro_steps):
        step(2)  # for the peak of memory: only a second micro-step has gradients beside its activations
    peak = peaks(world.device)
    figures = speed(cfg, model, micro_steps, n, times, world)
    figures |= energy(power_w, statistics.mean(times), figures["tokens"], world)
    n_more = max(1, min(3, int(cfg.bench.bench_seconds / 10 / max(times))))
    figures["time_share"] = meters.time_shares(lambda: step(n), world, n_more)
    n_traced = min(max(n, 2), micro_steps)
    parts, traced = meters.memory_parts(
        lambda: step(n_traced),
        model,
        optimizer,
        world,
        cfg.parallel.activation_checkpointing,
    )
    total = traced if world.device.type == "cpu" else peak["peak_memory_gib"] - memory_before
    figures |= memory_of_fullest(peak | {"total": total}, parts, world)
    figures["predicted"] = predicted(cfg, world, n, 1e12 * figures["peak_tflops"])
    figures["error"] = errors(figures, figures["predicted"])
    if world.is_main:
        report(figures)
    if cfg.bench.profile:
        profile(lambda: step(n), world)
    return figures


def random_batches(cfg, micro_steps, world):
    """Yields a step's micro-batches of random tokens, for ever the same ones."""
    vocab_size = cfg.model.vocab_size
    specials = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3}  # any ids will do
    meta = {"vocab_size": vocab_size, "specials": specials, "continuations": range(4, vocab_size, 3)}
    windows = OBJECTIVES[cfg.model.objective].build(cfg.objective, cfg.data.seq_len, 0, meta)
    random = np.random.default_rng(world.data_rank)
    shape = (cfg.data.micro_batch_size, windows.stride + windows.extra)
    batches = [windows.batch(random.integers(vocab_size, size=shape), first=i) for i in range(micro_steps)]
    step = [tuple(part.to(world.device) for part in batch) for batch in batches]
    while True:
        yield step


def real_batches(cfg, world):
    """Yields the micro-batches of a training run, as train.py would see them."""
    loader, _ = open_data(cfg, world)
    while True:
        yield loader.next()[0]


def timed(step, micro_steps, cfg, world):
    """(micro-steps of a timed step, seconds of each, mean power in watts or, in words, why there is none)."""
    warmup = []
    while len(warmup) < cfg.bench_warmup and sum(warmup[1:]) < cfg.bench_seconds / 4:
        warmup.append(step(1))
    # Where a whole step is too long to be timed often, time one of fewer micro-steps, and say so.
    per_step = cfg.bench_seconds / cfg.bench_steps
    n = max(1, min(micro_steps, int(per_step / warmup[-1]))) if warmup else micro_steps
    times, (read_watts, why_not) = [], meters.power_reader(world.device)
    with meters.PowerMeter(read_watts) as meter:
        while len(times) < 3 or (len(times) < cfg.bench_steps and sum(times) < cfg.bench_seconds):
            times.append(step(n))
    return n, times, why_not if meter.mean_w is None else meter.mean_w


# ---- figures


def speed(cfg, model, micro_steps, timed_micro_steps, times, world):
    """The figures of what was timed and of its speed; a step's time is the median's."""
    seconds = statistics.median(times)
    seq_len = cfg.data.seq_len
    tokens = timed_micro_steps * cfg.data.micro_batch_size * seq_len * world.data_ranks
    peak, peak_name = peak_flops(world.device, world.precision)
    is_measured = peak_name.startswith("measured")
    measured_peak = peak if is_measured else measured_matmul_flops(world.device, world.precision)
    share = OBJECTIVES[cfg.model.objective].head_share(cfg.objective, seq_len)
    figures = {
        "device": device_name(world.device),
        "ranks": world.size,
        "data_ranks": world.data_ranks,
        "torch": torch.__version__,
        "precision": world.precision,
        "objective": cfg.model.objective,
        "n_params": model.num_params(),
        "micro_batch_size": cfg.data.micro_batch_size,
        "seq_len": seq_len,
        "activation_checkpointing": cfg.parallel.activation_checkpointing,
        "micro_steps": timed_micro_steps,
        "micro_steps_of_training": micro_steps,
        "tokens": tokens,
        "steps": len(times),
        "step_ms": 1e3 * seconds,
        "step_ms_min": 1e3 * min(times),
        "step_ms_max": 1e3 * max(times),
        "tokens_per_s": tokens / seconds,
        "peak_tflops": peak / 1e12,
        "peak_name": peak_name,
        "measured_tflops": measured_peak / 1e12,
    }
    for suffix, causal in (("", False), ("_causal", True)):
        counted = cost.flops_per_token(cfg.model, seq_len, share, causal)
        again = recomputed_flops(cfg, world, causal)
        per_device = tokens / seconds / world.size
        figures["flops_per_token" + suffix] = counted
        figures["mfu" + suffix] = per_device * counted / peak
        figures["mfu_of_measured" + suffix] = per_device * counted / measured_peak
        if cfg.parallel.activation_checkpointing != "none":
            figures["hfu" + suffix] = per_device * (counted + again) / peak
    return figures


def recomputed_flops(cfg, world, causal):
    """FLOPs a token of the blocks' forward that backward computes again; forward is a third of what is counted.

    Selective recomputation keeps what matmuls gave, and attention where parallel.py can name its kernel.
    """
    blocks, twice_as_long = (cost.flops_per_token(cfg.model, n * cfg.data.seq_len, 0.0, causal) for n in (1, 2))
    attention = twice_as_long - blocks  # all that grows with seq_len
    runs_again = setup_here(cfg, world).attends_by_matmuls or cfg.model.dropout > 0
    again = {"none": 0, "full": blocks, "selective": attention if runs_again else 0}
    return again[cfg.parallel.activation_checkpointing] / 3


def energy(power_w, seconds, tokens, world):
    """The mean power of all devices while steps of so many seconds were timed, and what a token takes of it."""
    by_rank = world.gather(power_w)
    unknown = [why_not for why_not in by_rank if isinstance(why_not, str)]
    if unknown:
        return {"power_w": None, "energy_per_token_mj": None, "power_not_measured": unknown[0]}
    return {"power_w": sum(by_rank), "energy_per_token_mj": 1e3 * sum(by_rank) * seconds / tokens}


def peaks(device):
    """Peaks of this rank's memory in GiB: torch's, and with what it has reserved; on a CPU, the process's."""
    found = {"peak_memory_gib": peak_memory_gib(device)}
    if device.type == "cuda":
        found["reserved_memory_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return found


def memory_of_fullest(peak, parts, world):
    """The peaks of the fullest rank, and the parts of its memory."""
    peak = max(world.gather(peak | {"memory_gib": parts}), key=lambda rank: rank["total"])
    parts, total = peak.pop("memory_gib"), peak.pop("total")
    return peak | {"memory_gib": parts | {"other": total - sum(parts.values()), "total": total}}


def predicted(cfg, world, micro_steps, peak):
    """What the planner expects: memory_gib in the measured parts, and step_s, tokens_per_s and mfu of some micro-steps.

    Time by the data sheet of a known GPU, else by what python bench.py has measured of this machine, or not at all.
    """
    setup = setup_here(cfg, world)
    parts = {name: n_bytes / 2**30 for name, n_bytes in memory(cfg.model, setup).items()}
    figures = {"memory_gib": parts | {"total": sum(parts.values())}}
    gpu = known_device(device_name(world.device)) or measured_here(cfg.plan.machine, world)
    if gpu is None and world.is_main:
        print(
            f"predicted  memory alone: {cfg.plan.machine} is not of this device and torch, {world.size} ranks and "
            f"{world.precision}, as python bench.py would measure it"
        )
    if gpu is not None and (gpu.machine is None or world.tp == 1):
        timed = dataclasses.replace(setup, micro_steps=micro_steps)
        step_s = sum(step_parts(cfg.model, timed, gpu, cfg.plan).values())
        tokens_per_s = timed.tokens * micro_steps * world.data_ranks / step_s
        flops = cost.flops_per_token(cfg.model, setup.seq_len, setup.head_share)
        figures |= {"step_s": step_s, "tokens_per_s": tokens_per_s, "mfu": tokens_per_s * flops / peak / world.size}
    return figures


def measured_here(path, world):
    """The Device that python bench.py has measured, where that was this one, as it is now; else None."""
    if not os.path.exists(path):
        return None
    figures = measured(path)
    now = (device_name(world.device), world.size, world.precision, torch.__version__)
    return this(figures) if now == tuple(figures[name] for name in ("device", "ranks", "precision", "torch")) else None


def roofline_of_training(f, world):
    """The figures of a picture: what a step computes for a byte of tensors that it reads and writes, at the least.

    Weights are read in forward and backward, what forward keeps is written and read, and the optimizer reads and writes
    all that it has.
    """
    gib = f["memory_gib"]
    written = gib["gradients"] + gib.get("activations", 0) + gib.get("logits", 0)
    moved_gib = f["micro_steps"] * 2 * (gib["weights"] + written) + 2 * (gib["weights"] + gib["optimizer"])
    flops = f["flops_per_token"] * f["tokens"] / f["ranks"]
    return {
        "roofs_tflops": {f["peak_name"]: f["peak_tflops"], f"measured {f['precision']} matmul": f["measured_tflops"]},
        "matmul_tflops": machine.matmuls(world),
        "bandwidth_gb_per_s": machine.bandwidths(world),
        "step": (flops / (2**30 * moved_gib), flops / (f["step_ms"] / 1e3) / 1e12),
    }


def profile(step, world):
    """Writes a trace of two steps, trace.json or trace_rank1.json, prints their operators, and draws their memory."""
    name = "trace.json" if world.is_main else f"trace_rank{world.rank}.json"
    profiler, events = meters.trace(lambda: (step(), step()), name)
    if world.is_main:
        print_operators(profiler, world.device)
        draw_memory(meters.allocations(events, world.device), world.device, "memory.png")
    print(f"trace      {os.path.abspath(name)}; open it at ui.perfetto.dev", flush=True)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
    end_process()
