"""Settings of the benchmark and the planner."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from config import Config, Count, NotNegative, Positive, Range, UpToOne, UserError, Whole
from data import prepare_command
from perf.hardware import Names

GPT2_VOCAB_SIZE = 50257
Overlap = Annotated[float, Range("at least 0 and at most 1", lambda x: 0 <= x <= 1)]
Factor = Annotated[float, Range("at least 1 and at most 10", lambda x: 1 <= x <= 10)]


@dataclass(frozen=True)
class OutputConfig:
    json: bool | str = False  # JSON of the figures: on the last line printed, or in the file of this name
    compare: bool = False  # plan.py: a row for each known GPU; bench.py: two of its JSON files side by side

    def __post_init__(self):
        path = self.json
        if isinstance(path, str) and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
            raise UserError(f"json is {path}; it must name a file in a folder that exists")

    def write(self, figures):
        """Writes figures as one JSON object, where the settings ask for it."""
        if isinstance(self.json, str):
            Path(self.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
        elif self.json:
            print(json.dumps(figures), flush=True)


def read_json(path, made_by):
    """The JSON object in a file; UserError, which names the command that makes such files, where there is none."""
    try:
        return {**json.loads(Path(path).read_text(encoding="utf-8"))}
    except FileNotFoundError:
        raise UserError(f"there is no {path}; run {made_by} first, which writes it") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no file that {made_by} writes: {error}") from error


def kinds_beside(cfg, kind=None):
    """The names of the kinds of plans that the settings ask for beside one kind."""
    plan = cfg.plan
    on = {"compare": cfg.output.compare, "simulate": plan.simulate, "search": plan.search, "generate": plan.generate}
    return [name for name in on if on[name] and name != kind]


def with_default_vocab(cfg):
    """(settings, note): GPT-2's vocabulary size where nothing gives one. The note says so, or is None."""
    data_dir = cfg.data.folder
    if cfg.model.vocab_size or cfg.run.init_from or (data_dir and os.path.isdir(data_dir)):
        return cfg, None
    if data_dir:
        make_it = f"make it: {prepare_command(cfg)}, or give --vocab_size"
        raise UserError(f"vocab_size is none and data_dir {data_dir} does not exist; {make_it}")
    note = f"vocabulary {GPT2_VOCAB_SIZE:,} tokens, GPT-2's, as neither vocab_size nor data_dir is set"
    return replace(cfg, model=replace(cfg.model, vocab_size=GPT2_VOCAB_SIZE)), note


@dataclass(frozen=True)
class BenchConfig(Config):
    bench_steps: Count = 20  # steps to time; fewer where bench_seconds runs out, but at least 3
    bench_seconds: NotNegative = 60.0  # time limit for them
    bench_warmup: Whole = 3  # steps before the clock starts; they include compilation
    real_data: bool = False  # take batches from data_dir instead of random tokens
    profile: bool = False  # trace 2 more steps: trace.json for ui.perfetto.dev, a table of operators, memory.png
    picture: bool = True  # draw bench.png, a roofline with what was measured
    sweep: bool = False  # try checkpointing x compile x micro-batch; write the fastest that fits as a preset
    sweep_seconds: Positive = 120.0  # time limit for each setting, start and compilation included


@dataclass(frozen=True)
class PlanConfig(Config):
    gpu: Names = "h100-sxm"  # this: as python bench.py measured it; other: by the settings below
    simulate: bool = False  # run a step of rank 0 without data, and count what it sends, beside the formulas
    search: bool = False  # the fastest layouts that fit, and why others fall, instead of one layout's plan
    tokens: Count | None = None  # a budget of training tokens: plan the model, batch and learning rate for it
    hours: Positive | None = None  # a budget of hours on n_gpus, in the same way; with data_dir, of its text
    preset: str | None = None  # file to write a budget's plan to, for train.py; must be new
    n_gpus: Count | None = None  # number of GPUs; none: 8, a budget's 1, or for --gpu=this as many as were measured
    gpus_per_node: Count = 8  # GPUs that gpu_link_gbs connects
    gpu_tflops: Positive | None = None  # dense bf16 matmuls, or fp16 without bf16; none: the data sheet's
    gpu_memory_gib: Positive | None = None  # memory of a GPU
    gpu_memory_gbs: Positive | None = None  # memory bandwidth, 1e9 bytes/s
    gpu_link_gbs: Positive | None = None  # bandwidth to GPUs in the same node, one way, 1e9 bytes/s
    network_gbs: Positive | None = None  # bandwidth per GPU to other nodes, 1e9 bytes/s; 400 Gbit/s are 50
    gpu_watts: Positive | None = None  # rated power
    gpu_price: Positive | None = None  # dollars per GPU-hour, host included
    efficiency: Positive = 1.0  # speed of computing relative to this project's code, to describe other code
    host_speed: Positive = 1.0  # speed of launching kernels relative to one H100's host; hosts differ up to ten times
    gpu_load: UpToOne = 0.85  # mean power over rated power; a guess: metered runs of OLMo ranged from 15 to 85 %
    host_share: NotNegative = 0.3  # power of CPUs, network and fans over the GPUs'; a guess: BLOOM's was 0.59
    pue: Factor = 1.1  # a data centre's power over its computers'; LLaMA's paper, table 15
    availability: UpToOne = 0.9  # share of hours in which the run progresses; BLOOM's was 0.9, a 7B of fms-fsdp's 0.83
    fragmentation: Factor = 1.05  # reserved over allocated memory; published runs have 1.02 to 1.15
    context_gib: NotNegative = 1.0  # memory of driver and NCCL; ml-engineering measured 0.5 to 0.9 for the driver
    weight_bytes: Positive = 4  # bytes per parameter; this and the following describe other projects' code
    gradient_bytes: Positive = 4  # bytes per parameter's gradient
    optimizer_bytes: NotNegative | None = None  # bytes per parameter's optimizer state; none: the optimizer's
    residual_bytes: Positive | None = None  # bytes per number of the residual stream; none: 2 in bf16, else 4
    logits_bytes: Positive | None = None  # bytes per logit where all are in memory at once; none: one chunk at a time
    tp_hidden: Overlap = 0.0  # share of tensor parallelism's traffic that overlaps with computing
    generate: bool = False  # memory and tokens/s of sampling from the model on one GPU, instead of training
    machine: str = "out/machine.json"  # file of python bench.py's figures, for --gpu=this

    def __post_init__(self):
        super().__post_init__()
        needed = ("gpu_tflops", "gpu_memory_gib", "gpu_memory_gbs") if self.gpu == "other" else ()
        if missing := [f"--{name}" for name in needed if getattr(self, name) is None]:
            raise UserError(f"gpu is other, which has no data sheet here; give {', '.join(missing)}")
