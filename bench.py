"""How fast and how much memory: times train.py's own train_step on this machine.

python bench.py config/gpt2_124m.py
python bench.py config/gpt2_124m.py --profile --json=bench.json
torchrun --nproc_per_node=8 bench.py config/gpt2_124m.py
"""

import dataclasses
import json
import os
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

import cost
from config import run_script
from data import DataConfig, Loader, Split, TrainOrder, accumulation_steps
from hardware import peak_flops
from model import ModelConfig
from objective import ObjectiveConfig, head_share, windows_of
from optim import OptimConfig
from parallel import ParallelConfig, device_name, end_process, init_world, peak_memory_gib
from train import build, model_of, prepare_command, seq_len_of, train_step, windows_for


@dataclass(frozen=True)
class BenchConfig:
    bench_steps: int = 20  # steps to time, fewer where bench_seconds is over first, but at least 3
    bench_seconds: float = 60.0  # time for them
    bench_warmup: int = 3  # steps before the clock starts; they hold compilation
    real_data: bool = False  # take batches from data_dir, not random tokens
    profile: bool = False  # write trace.json of 2 more steps, for ui.perfetto.dev or chrome://tracing
    json: str | None = None  # file to write the figures to

    def __post_init__(self):
        wrong = []
        if self.bench_steps < 1:
            wrong.append(f"bench_steps is {self.bench_steps}; it must be at least 1")
        if self.bench_warmup < 0 or self.bench_seconds < 0:
            wrong.append(
                f"bench_warmup is {self.bench_warmup}, bench_seconds {self.bench_seconds}; neither may be negative"
            )
        if self.json and not os.path.isdir(os.path.dirname(self.json) or "."):
            wrong.append(f"json is {self.json}; its folder does not exist: make it first")
        if wrong:
            raise ValueError("\n".join(wrong))


@dataclass(frozen=True)
class Settings:
    bench: BenchConfig
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    presets: tuple = ()

    def __post_init__(self):
        seq_len_of(self)  # raises where it does not fit the model


def main(cfg):
    with init_world(cfg.parallel) as world:
        seq_len = seq_len_of(cfg)
        cfg = dataclasses.replace(cfg, model=model_of(cfg), data=dataclasses.replace(cfg.data, seq_len=seq_len))
        micro_steps = accumulation_steps(cfg.data, seq_len, world.data_ranks)
        model, optimizer, scaler = build(cfg, world, seed=1337)
        batches = (
            real_batches(cfg, micro_steps, world) if cfg.bench.real_data else random_batches(cfg, micro_steps, world)
        )

        def step(n_micro_steps):
            start = time.perf_counter()
            train_step(model, optimizer, scaler, next(batches)[:n_micro_steps], cfg.optim.grad_clip, world)
            world.synchronize()
            return world.worst(time.perf_counter() - start)

        warmup = []
        while len(warmup) < cfg.bench.bench_warmup and sum(warmup[1:]) < cfg.bench.bench_seconds / 4:
            warmup.append(step(1))
        # Where a whole step is too long to be timed often, time one of fewer micro-steps, and say so.
        per_step = cfg.bench.bench_seconds / cfg.bench.bench_steps
        timed_micro_steps = max(1, min(micro_steps, int(per_step / warmup[-1]))) if warmup else micro_steps
        times = []
        while len(times) < 3 or (len(times) < cfg.bench.bench_steps and sum(times) < cfg.bench.bench_seconds):
            times.append(step(timed_micro_steps))
        figures = measure(cfg, model, micro_steps, timed_micro_steps, times, world)
        if world.is_main:
            report(figures, cfg.bench.json)
        if cfg.bench.profile:
            write_trace(lambda: step(timed_micro_steps), world)


def random_batches(cfg, micro_steps, world):
    """Yields a step's micro-batches of random tokens, for ever the same ones."""
    vocab_size = cfg.model.vocab_size
    specials = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3}  # any ids will do
    meta = {"vocab_size": vocab_size, "specials": specials, "continuations": range(4, vocab_size, 3)}
    windows = windows_of(cfg.model.objective, cfg.objective, cfg.data.seq_len, 0, meta)
    random = np.random.default_rng(world.data_rank)
    shape = (cfg.data.micro_batch_size, windows.stride + windows.extra)
    batches = [windows.batch(random.integers(vocab_size, size=shape), first=i) for i in range(micro_steps)]
    step = [tuple(part.to(world.device) for part in batch) for batch in batches]
    while True:
        yield step


def real_batches(cfg, micro_steps, world):
    """Yields the micro-batches of a training run, as train.py would see them."""
    split = Split(cfg.data.data_dir, "train", cfg.model.vocab_size, prepare_command(cfg))
    windows = windows_for(cfg, seed=1337)
    order = TrainOrder(split, windows.stride, seed=1337)
    loader = Loader(order, windows, 0, micro_steps, cfg.data.micro_batch_size, world)
    while True:
        yield loader.next()[0]


def measure(cfg, model, micro_steps, timed_micro_steps, times, world):
    """The figures of a benchmark; a step's time is the median's."""
    peak_memory = world.worst(peak_memory_gib(world.device))  # before the matmul that measures an unknown peak
    seconds = statistics.median(times)
    seq_len = cfg.data.seq_len
    tokens = timed_micro_steps * cfg.data.micro_batch_size * seq_len * world.data_ranks
    peak, peak_name = peak_flops(world.device, world.precision)
    share = head_share(cfg.model.objective, cfg.objective, seq_len)
    flops = {causal: cost.flops_per_token(cfg.model, seq_len, share, causal) for causal in (False, True)}
    return {
        "device": device_name(world.device),
        "ranks": world.size,
        "data_ranks": world.data_ranks,
        "torch": torch.__version__,
        "precision": world.precision,
        "objective": cfg.model.objective,
        "n_params": model.num_params(),
        "micro_batch_size": cfg.data.micro_batch_size,
        "seq_len": seq_len,
        "micro_steps": timed_micro_steps,
        "micro_steps_of_training": micro_steps,
        "steps": len(times),
        "step_ms": 1e3 * seconds,
        "step_ms_min": 1e3 * min(times),
        "step_ms_max": 1e3 * max(times),
        "tokens_per_s": tokens / seconds,
        "flops_per_token": flops[False],
        "flops_per_token_causal": flops[True],
        "mfu": tokens / seconds * flops[False] / (peak * world.size),
        "mfu_causal": tokens / seconds * flops[True] / (peak * world.size),
        "peak_tflops": peak / 1e12,
        "peak_name": peak_name,
        "peak_memory_gib": peak_memory,
    }


def report(figures, json_path):
    """Prints the figures for people, and writes them for programs."""
    f = figures
    of_training = (
        ""
        if f["micro_steps"] == f["micro_steps_of_training"]
        else f" (a training step has {f['micro_steps_of_training']}: too long to time here)"
    )
    print(f"runs on    {f['ranks']} x {f['device']}, {f['precision']}, torch {f['torch']}")
    print(f"model      {f['n_params']:,} parameters")
    print(
        f"step       {f['step_ms']:,.1f} ms, the median of {f['steps']} (min {f['step_ms_min']:,.1f}, "
        f"max {f['step_ms_max']:,.1f}), of {f['micro_steps']} micro-steps{of_training}"
    )
    print(f"           x {f['data_ranks']} ranks x {f['micro_batch_size']} sequences x {f['seq_len']} tokens")
    print(f"speed      {f['tokens_per_s']:,.0f} tokens/s")
    print(
        f"mfu        {f['mfu']:.2%} of {f['peak_tflops']:.4g} TFLOP/s a device ({f['peak_name']}), "
        f"at {f['flops_per_token'] / 1e6:,.1f} MFLOP a token (PaLM's count)"
    )
    if f["objective"] == "clm":
        print(
            f"           {f['mfu_causal']:.2%} at {f['flops_per_token_causal'] / 1e6:,.1f} MFLOP a token "
            f"(causal attention counted as half)"
        )
    print(f"memory     {f['peak_memory_gib']:.2f} GiB at the peak, on the fullest device", flush=True)
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


def write_trace(step, world):
    """Writes trace.json, or trace_rank1.json and so on, of two steps."""
    with torch.profiler.profile() as profiler:
        step()
        step()
    name = "trace.json" if world.is_main else f"trace_rank{world.rank}.json"
    profiler.export_chrome_trace(name)
    print(f"trace      {os.path.abspath(name)}; open it at ui.perfetto.dev", flush=True)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
    end_process()
