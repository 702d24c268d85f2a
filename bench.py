"""How fast and how much memory: times train.py's own train_step on this machine.

python bench.py                                                # what this machine can do
python bench.py config/gpt2_124m.py
python bench.py config/gpt2_124m.py --profile --json=bench.json
python bench.py config/gpt2_124m.py --sweep                    # the fastest settings that fit, as a preset
python bench.py --compare A.json B.json
torchrun --nproc_per_node=8 bench.py config/gpt2_124m.py
"""

import dataclasses
import itertools
import os
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from config import UserError, only, run_script
from context import in_parts
from data import DataConfig, accumulation_steps, each, open_data, seq_len_of
from devices import device_name, memory_now_gib, peak_memory_gib, reset_peak_memory
from fim import FIM_TOKENS
from interop.pretrained import resolve
from model import ModelConfig
from objective import ObjectiveConfig, windows_of
from optim import OptimConfig
from pairs import Partners
from parallel import ParallelConfig
from perf import cost, hardware, machine, meters, timing
from perf.memory import explaining_out_of_memory, memory, setup_here
from perf.pictures import draw_memory, draw_roofline, write_picture
from perf.report_bench import compare, errors, report
from perf.settings import BenchConfig, OutputConfig, PlanConfig, read_json, with_default_vocab
from perf.sweep import sweep
from run.folder import RunConfig
from run.guard import Watchdog
from run.health import HealthConfig
from train import build, train_step
from world import WorldConfig, end_process, init_world


@dataclass(frozen=True)
class Settings:
    bench: BenchConfig
    output: OutputConfig
    plan: PlanConfig = only("machine")
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    world: WorldConfig
    health: HealthConfig = only("spike_z")
    run: RunConfig = only("init_from")  # gives the model's shape; weights are random
    presets: tuple = ()
    files: tuple = ()
    given: frozenset = dataclasses.field(default=frozenset(), compare=False)

    def __post_init__(self):
        if self.output.compare and len(self.files) != 2:
            raise UserError(f"compare takes two files, not {len(self.files)}: bench.py --compare A.json B.json")
        if self.files and not self.output.compare:
            raise UserError(f"{' '.join(self.files)}: only --compare reads files of figures")
        if not self.run.init_from:  # the weights' block_size may be another
            seq_len_of(self)  # raises where it does not fit the model


def main(cfg):
    defaults = (ModelConfig(), DataConfig(), OptimConfig(), BenchConfig(picture=cfg.bench.picture), RunConfig())
    if cfg.output.compare:
        compare(*cfg.files)
    elif cfg.bench.sweep:
        cfg.output.write(sweep(cfg, filled_in(cfg)))
    elif not cfg.presets and (cfg.model, cfg.data, cfg.optim, cfg.bench, cfg.run) == defaults:  # names nothing to train
        bench_machine(cfg)
    else:
        bench_training(cfg)


def bench_machine(cfg):
    """Measures this machine, for people, for plan.py --gpu=this, and for predictions of later benchmarks."""
    with init_world(cfg.world, cfg.parallel) as world, Watchdog(cfg.world.timeout_minutes, world):
        folder = os.path.dirname(cfg.plan.machine) or "."
        os.makedirs(folder, exist_ok=True)
        file = OutputConfig(json=cfg.plan.machine)  # raises before the minute of measuring
        figures = machine.measure(world, folder)
        if world.is_main:
            print(*machine.table(figures), sep="\n", flush=True)
            file.write(figures)
            print(f"written    {cfg.plan.machine}, for python plan.py --gpu=this")
            if cfg.bench.picture:
                write_picture("bench.png", (8, 5), draw_roofline, figures, figures["device"])
            cfg.output.write(figures)


def filled_in(cfg, is_main=True):
    """The settings with the open ones of model and data filled in, vocabulary included."""
    cfg, note = with_default_vocab(cfg)
    if note and is_main:
        print(note)
    return resolve(cfg)


# ---- a benchmark of training


def bench_training(cfg):
    """Measures training, and prints, draws and writes the figures."""
    with init_world(cfg.world, cfg.parallel) as world, Watchdog(cfg.world.timeout_minutes, world):
        cfg = filled_in(cfg, world.is_main)
        with explaining_out_of_memory(cfg, world):
            figures = measure(cfg, world)
        # After the model's memory is free, and by all ranks.
        reached = roofline(figures, cfg.plan.machine, world) if cfg.bench.picture else None
        if world.is_main:
            if reached:
                title = f"{figures['device']}, {figures['precision']}"
                write_picture("bench.png", (8, 5), draw_roofline, reached, title)
            cfg.output.write(figures)


def measure(cfg, world):
    """Times steps, then their phases and memory, and prints the figures; returns them."""
    micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, world.data_ranks)
    matmul_flops = hardware.measured_matmul_flops(world.device, world.precision)
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

    n, times, power_w = time_steps(step, micro_steps, cfg.bench, world)
    if n < min(2, micro_steps):
        step(2)  # for the memory peak: only a second micro-step has gradients and activations at once
    peak = peak_memory_gib(world.device)  # before profiling
    model.graphs = None  # phases, traces and parts of memory are those of kernels launched one by one
    figures = speed(cfg, model, micro_steps, n, times, matmul_flops, world)
    figures |= energy(power_w, statistics.mean(times), figures["tokens"], world)
    n_more = max(1, min(3, int(cfg.bench.bench_seconds / 10 / max(times))))
    figures["time_share"] = meters.time_shares(lambda: step(n), world, n_more)
    n_traced, checkpointing = min(max(n, 2), micro_steps), cfg.parallel.activation_checkpointing
    parts, traced = meters.memory_parts(lambda: step(n_traced), model, optimizer, world, checkpointing)
    figures |= memory_of_fullest(parts, traced if world.device.type == "cpu" else peak - memory_before, peak, world)
    figures["predicted"] = predicted(cfg, world, n, 1e12 * figures["peak_tflops"])
    figures["error"] = errors(figures, figures["predicted"])
    if world.is_main:
        report(figures)
    if cfg.bench.profile:
        profile(lambda: step(n), world)
    return figures


def random_batches(cfg, micro_steps, world):
    """The same micro-batches of random tokens for each step, without end."""
    vocab_size = cfg.model.vocab_size
    specials = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3}  # any ids do; [SEP] ends documents
    specials |= {name: id_ for id_, name in enumerate(FIM_TOKENS[0], start=4)}
    meta = {"vocab_size": vocab_size, "specials": specials, "continuations": range(7, vocab_size, 3)}
    windows = in_parts(windows_of(cfg.model.objective).build(cfg.objective, cfg.data.seq_len, 0, meta), world)
    random = np.random.default_rng(world.data_rank)
    shape = (cfg.data.micro_batch_size, windows.stride + windows.extra)
    batches = []
    for i in range(micro_steps):
        rows = random.integers(vocab_size, size=shape)
        others = {"partners": Partners(np.roll(rows, 1, axis=0))} if windows.has_partners else {}
        batches.append(each(windows.batch(rows, i, **others), lambda part: part.to(world.device)))
    return itertools.repeat(batches)


def real_batches(cfg, world):
    """Yields the micro-batches that train.py would train on."""
    with open_data(cfg, world) as (loader, _):
        while True:
            yield loader.next()[0]


def time_steps(step, micro_steps, cfg, world):
    """(micro-steps of a timed step, seconds of each step, mean power in watts, or the reason why there is none)."""
    warmup = []
    while len(warmup) < cfg.bench_warmup and sum(warmup[1:]) < cfg.bench_seconds / 4:
        warmup.append(step(1))
    # A step too long to be timed often is timed with fewer micro-steps; the report says so.
    per_step = cfg.bench_seconds / cfg.bench_steps
    n = max(1, min(micro_steps, int(per_step / warmup[-1]))) if warmup else micro_steps
    times = []
    with meters.power_samples(world.device) as (watts, why_not):
        while len(times) < 3 or (len(times) < cfg.bench_steps and sum(times) < cfg.bench_seconds):
            times.append(step(n))
    return n, times, statistics.mean(watts) if watts else why_not


# ---- figures


def speed(cfg, model, micro_steps, timed_micro_steps, times, matmul_flops, world):
    """Figures of what was timed, and its speed by the median step. matmul_flops: FLOP/s measured before the steps."""
    seconds, seq_len, checkpointing = statistics.median(times), cfg.data.seq_len, cfg.parallel.activation_checkpointing
    tokens = timed_micro_steps * cfg.data.micro_batch_size * seq_len * world.data_ranks
    peak, peak_name = hardware.peak_flops(world.device, world.precision, matmul_flops)
    measured_peak = peak if peak_name.startswith("measured") else matmul_flops
    figures = {
        "device": device_name(world.device), "ranks": world.size, "data_ranks": world.data_ranks,
        "torch": torch.__version__, "precision": world.precision, "objective": " + ".join(cfg.model.objectives),
        "n_params": model.num_params(), "micro_batch_size": cfg.data.micro_batch_size, "seq_len": seq_len,
        "activation_checkpointing": checkpointing,
        "micro_steps": timed_micro_steps, "micro_steps_of_training": micro_steps, "tokens": tokens, "steps": len(times),
        "step_ms": 1e3 * seconds, "step_ms_min": 1e3 * min(times), "step_ms_max": 1e3 * max(times),
        "tokens_per_s": tokens / seconds,
        "peak_tflops": peak / 1e12, "peak_name": peak_name, "measured_tflops": measured_peak / 1e12,
    }  # fmt: skip
    per_device, share = tokens / seconds / world.size, setup_here(cfg, world).head_share
    for suffix, causal in (("", False), ("_causal", True)):
        flops = cost.flops_per_token(cfg.model, seq_len, share, causal)
        figures["flops_per_token" + suffix] = flops
        figures["mfu" + suffix] = per_device * flops / peak
        figures["mfu_of_measured" + suffix] = per_device * flops / measured_peak
        if checkpointing != "none":
            figures["hfu" + suffix] = per_device * (flops + recomputed_flops(cfg, world, causal)) / peak
    return figures


def recomputed_flops(cfg, world, causal):
    """FLOPs per token that backward recomputes, of the blocks' forward, which is a third of the count.

    Selective checkpointing saves the outputs of matmuls, and of attention where parallel.py can name its kernel.
    """
    blocks, twice_as_long = (cost.flops_per_token(cfg.model, n * cfg.data.seq_len, 0.0, causal) for n in (1, 2))
    attention = twice_as_long - blocks  # the part proportional to seq_len
    if cfg.parallel.activation_checkpointing == "full":
        return blocks / 3
    return attention / 3 if setup_here(cfg, world).attends_by_matmuls or cfg.model.dropout > 0 else 0


def energy(power_w, seconds, tokens, world):
    """Mean power of all devices while steps were timed, and energy per token. seconds, tokens: a step's."""
    by_rank = world.gather(power_w)
    if unknown := [why_not for why_not in by_rank if isinstance(why_not, str)]:
        return {"power_w": None, "energy_per_token_mj": None, "power_not_measured": unknown[0]}
    return {"power_w": sum(by_rank), "energy_per_token_mj": 1e3 * sum(by_rank) * seconds / tokens}


def memory_of_fullest(parts, total, peak, world):
    """Memory figures of the fullest rank, in GiB: peaks of torch (on a CPU the process), and categories of tensors."""
    found = {"peak_memory_gib": peak}
    if world.device.type == "cuda":
        found["reserved_memory_gib"] = torch.cuda.max_memory_reserved(world.device) / 2**30
    found["memory_gib"] = parts | {"other": total - sum(parts.values()), "total": total}
    return max(world.gather(found), key=lambda rank: rank["memory_gib"]["total"])


def predicted(cfg, world, micro_steps, peak):
    """The planner's {memory_gib, step_s, tokens_per_s, mfu} for steps of some micro-steps.

    Time is by the data sheet of a known GPU, else by python bench.py's figures of this machine, or left out.
    """
    setup, name = setup_here(cfg, world), device_name(world.device)
    parts = {part: n_bytes / 2**30 for part, n_bytes in memory(cfg.model, setup).items()}
    figures = {"memory_gib": parts | {"total": sum(parts.values())}}
    gpu = hardware.known_device(name)
    if gpu is None and (here := measured_here(cfg.plan.machine, world)):
        gpu = hardware.this(here)
    if gpu is None and world.is_main:
        what = f"{world.size} x {name} in {world.precision} with this torch ({cfg.plan.machine})"
        print(f"predicted  memory alone; time after python bench.py has measured {what}")
    if gpu is None or (gpu.machine and world.tp > 1):
        return figures
    timed = dataclasses.replace(setup, micro_steps=micro_steps)
    step_s = sum(timing.step_seconds(cfg.model, timed, gpu).values())
    tokens_per_s = timed.tokens * micro_steps * world.data_ranks * world.cp / step_s
    flops = cost.flops_per_token(cfg.model, setup.seq_len, setup.head_share)
    return figures | {"step_s": step_s, "tokens_per_s": tokens_per_s, "mfu": tokens_per_s * flops / peak / world.size}


def measured_here(path, world):
    """python bench.py's figures for this device, torch, precision and number of ranks; None where there are none."""
    figures = read_json(path, "python bench.py") if os.path.exists(path) else {}
    now = (device_name(world.device), world.size, world.precision, torch.__version__)
    then = tuple(figures.get(name) for name in ("device", "ranks", "precision", "torch"))
    return figures if now == then and "rates" in figures else None


def roofline(f, path, world):
    """The figures of a roofline with a training step: its FLOPs per byte that must at least be moved.

    Forward and backward read the weights, forward's activations are written and read, and the optimizer reads and
    writes its state. What the device reaches is read from python bench.py's file, or measured in this precision alone.
    """
    gib = f["memory_gib"]
    written = gib["gradients"] + gib.get("activations", 0) + gib.get("logits", 0)
    moved_gib = f["micro_steps"] * 2 * (gib["weights"] + written) + 2 * (gib["weights"] + gib["optimizer"])
    flops = f["flops_per_token"] * f["tokens"] / f["ranks"]
    here = world.from_main(measured_here(path, world))
    sheet = {} if f["peak_name"].startswith("measured") else {f["peak_name"]: f["peak_tflops"]}
    return {
        "roofs_tflops": {f"measured {f['precision']} matmul": f["measured_tflops"]} | sheet,
        "matmul_tflops": here["matmul_tflops"] if here else machine.matmuls(world, [world.precision], []),
        "bandwidth_gb_per_s": here["bandwidth_gb_per_s"] if here else machine.bandwidths(world),
        "step": (flops / (2**30 * moved_gib), flops / (f["step_ms"] / 1e3) / 1e12),
    }


def profile(step, world):
    """Traces two steps: writes trace.json or trace_rank1.json, prints the operators, draws the memory."""
    name = "trace.json" if world.is_main else f"trace_rank{world.rank}.json"
    profiler, events = meters.trace(lambda: (step(), step()), name)
    if world.is_main:
        clock = "cuda" if world.device.type == "cuda" else "cpu"
        print(profiler.key_averages().table(f"self_{clock}_time_total", row_limit=20), flush=True)
        if changes := meters.allocations(events, world.device):
            write_picture("memory.png", (10, 4.5), draw_memory, changes, world.device)
    print(f"trace      {os.path.abspath(name)}; open it at ui.perfetto.dev", flush=True)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
    end_process()
