"""What a run needs before it is bought: memory, days, kilowatt-hours, money; on any GPU, by formulas alone.

python plan.py config/gpt2_124m.py --gpu=h100-sxm --n_gpus=8 --max_tokens=10e9
python plan.py config/gpt2_1558m.py --n_gpus=64 --strategy=fsdp --compare

GPUs: v100 t4 rtx3090 rtx4090 rtx5090 a10 a10g a100-40 a100-80 l4 l40s h100-pcie h100-sxm h200 b200 gb200 mi250x mi300x,
this (the machine at hand), other (given by hand).
"""

import dataclasses
import importlib.util
import json
import os
from dataclasses import dataclass

from config import UserError, only, run_script
from data import DataConfig, accumulation_steps
from interop import pretrained
from model import ModelConfig
from objective import ObjectiveConfig
from optim import OptimConfig
from parallel import ParallelConfig
from perf import ceilings, cost, hardware
from perf.memory import changes_that_save, flags, memory, with_settings
from perf.report_plan import draw, report, report_compared
from run.folder import RunConfig
from world import WorldConfig


@dataclass(frozen=True)
class OutputConfig:
    json: bool | str = False  # the figures as one JSON object: on the last line printed, or in the file of this name
    compare: bool = False  # plan.py: a row for each known GPU; bench.py: two of its JSON files side by side

    def __post_init__(self):
        if isinstance(self.json, str) and (
            os.path.isdir(self.json) or not os.path.isdir(os.path.dirname(self.json) or ".")
        ):
            raise UserError(f"json is {self.json}; it must name a file in a folder that exists")


@dataclass(frozen=True)
class PlanConfig:
    gpu: hardware.Names = "h100-sxm"  # this: the machine at hand, as python bench.py measured it; other: by hand
    n_gpus: int | None = None  # none: 8, of this those that were measured
    gpus_per_node: int = 8  # GPUs that gpu_link_gbs connects
    gpu_tflops: float | None = None  # dense, of matmuls in bf16, or fp16 without it; none, here and below: the table's
    gpu_memory_gib: float | None = None  # of a GPU
    gpu_memory_gbs: float | None = None  # 1e9 bytes/s that its memory moves
    gpu_link_gbs: float | None = None  # 1e9 bytes/s that a GPU sends to others of its node, one way
    network_gbs: float | None = None  # 1e9 bytes/s that a GPU sends to other nodes; 400 Gbit/s are 50
    gpu_watts: float | None = None  # rated power
    gpu_price: float | None = None  # of a GPU-hour, host included, in dollars
    efficiency: float = 1.0  # speed of computing beside this project's code as fitted: other code's one number
    gpu_load: float = 0.85  # mean power over rated power; a guess: metered runs of OLMo swung between 15 and 85 %
    host_share: float = 0.3  # power of CPUs, network and fans over the GPUs'; a guess, BLOOM's was 0.59 with idle hours
    pue: float = 1.1  # a data centre's power over its computers'; LLaMA's paper, table 15
    availability: float = 0.9  # share of the hours in which the run gets on; BLOOM's was 0.9, a 7B of fms-fsdp's 0.83
    fragmentation: float = 1.05  # memory that torch reserves over what it allocates; published runs have 1.02 to 1.15
    context_gib: float = 1.0  # of the driver and NCCL beside torch; ml-engineering measured 0.5 to 0.9 of the first
    weight_bytes: float = 4  # of a parameter, as kept; this and the rest are for predicting another project's code
    gradient_bytes: float = 4  # of a parameter's gradient
    optimizer_bytes: float | None = None  # of a parameter's optimizer state; none: the optimizer's
    residual_bytes: float = 4  # of a number of the residual stream
    logits_bytes: float | None = None  # of a logit, where all are there at once; none: a chunk at a time
    tp_hidden: float = 0.0  # share of tensor parallelism's traffic that other work hides
    machine: str = "out/machine.json"  # what python bench.py has measured, for --gpu=this

    def __post_init__(self):
        may_be_0 = {"host_share", "context_gib", "optimizer_bytes", "tp_hidden"}
        wrong = [
            f"{name} is {value}; it must be above 0"
            for name, value in vars(self).items()
            if isinstance(value, (int, float)) and value <= 0 and name not in may_be_0 | {"pue", "fragmentation"}
        ]
        bounds = {
            "tp_hidden": (0, 1),
            "availability": (0, 1),
            "gpu_load": (0, 1),
            "pue": (1, 10),
            "fragmentation": (1, 10),
        }
        wrong += [
            f"{name} is {getattr(self, name)}; it must be from {least} to {most}"
            for name, (least, most) in bounds.items()
            if not least <= getattr(self, name) <= most
        ]
        wrong += [
            f"{name} is {getattr(self, name)}; it must not be negative"
            for name in may_be_0 - bounds.keys()
            if (getattr(self, name) or 0) < 0
        ]
        if self.gpu == "other":
            by_hand = ("gpu_tflops", "gpu_memory_gib", "gpu_memory_gbs")
            if missing := [f"--{name}" for name in by_hand if getattr(self, name) is None]:
                wrong.append(f"gpu is other, of which nothing is known; give {', '.join(missing)}")
        if wrong:
            raise UserError("\n".join(wrong))


@dataclass(frozen=True)
class Settings:
    plan: PlanConfig
    output: OutputConfig
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    world: WorldConfig = only("device", "precision")
    run: RunConfig = only("init_from")
    presets: tuple = ()
    given: frozenset = dataclasses.field(default=frozenset(), compare=False)


def main(cfg):
    cfg = resolve(cfg)
    gpu = gpu_of(cfg.plan)
    setup = setup_of(cfg, gpu, cfg.plan.n_gpus)
    figures = predict(cfg, gpu, setup)
    available = figures["memory_gib"]["available"] * 2**30 / cfg.plan.fragmentation
    figures["largest_micro_batch_size"] = largest_micro_batch(cfg.model, setup, available)
    fitting = [] if figures["fits"] else to_fit(cfg, gpu, setup)
    figures["to_fit"] = [after | {"change": flags(change)} for change, _, after in fitting]
    chosen = fitting[0][1] if fitting else setup
    rows = scaling(cfg, gpu, chosen)
    if cfg.output.compare:
        figures["devices"] = compare(cfg, gpu)
        lines = report_compared(cfg, figures["devices"])
    else:
        lines = report(cfg, gpu, setup, figures, fitting, rows)
    print(*lines, sep="\n")
    if importlib.util.find_spec("matplotlib"):
        try:
            draw(rows)
        except OSError as error:
            raise UserError(f"plan.png cannot be written here: {error}; go to another folder") from None
        print("picture    plan.png")
    else:
        print("matplotlib is not installed, so there is no plan.png")
    write_json(figures, cfg.output.json)


def write_json(figures, where):
    """Writes figures as one JSON object, to a file of that name or, where it is True, on a line of their own."""
    if isinstance(where, str):
        with open(where, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
    elif where:
        print(json.dumps(figures), flush=True)


def resolve(cfg):
    """The settings with what they leave open filled in: the model's, seq_len, and the number of GPUs."""
    n_gpus = cfg.plan.n_gpus or (hardware.measured(cfg.plan.machine)["ranks"] if cfg.plan.gpu == "this" else 8)
    return pretrained.resolve(dataclasses.replace(cfg, plan=dataclasses.replace(cfg.plan, n_gpus=n_gpus)))


def gpu_of(plan):
    """The GPU of a plan, with what the settings give by hand."""
    if plan.gpu == "this":
        gpu = hardware.this(hardware.measured(plan.machine))
    else:
        gpu = hardware.DEVICES.get(plan.gpu) or hardware.Device("other", "hopper", 0, 0, 0, 0)
    by_hand = {
        "tflops": plan.gpu_tflops, "memory_gib": plan.gpu_memory_gib, "memory_gbs": plan.gpu_memory_gbs,
        "link_gbs": plan.gpu_link_gbs, "network_gbs": plan.network_gbs, "watts": plan.gpu_watts,
        "price": plan.gpu_price,
    }  # fmt: skip
    if gpu.name == "other":
        by_hand |= {"fp32_tflops": plan.gpu_tflops, "link_gbs": plan.gpu_link_gbs or hardware.PCIE_GBS / 2}
    return dataclasses.replace(gpu, **{name: value for name, value in by_hand.items() if value is not None})


def setup_of(cfg, gpu, n_gpus):
    """The Setup of the run on so many GPUs; UserError where it cannot be."""
    precision = cfg.world.precision
    if precision == "auto":
        precision = gpu.machine["precision"] if gpu.machine else "bf16" if gpu.has_bf16 else "fp16"
    if precision == "bf16" and not gpu.has_bf16:
        raise UserError(f"precision is bf16, in which {gpu.name} does not compute; use --precision=fp16")
    mesh_shape = cfg.parallel.mesh_shape(n_gpus)
    micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, n_gpus // cfg.parallel.tp)
    setup = cost.setup_of(cfg, mesh_shape, micro_steps, precision, gpu.device_type)
    names = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "residual_bytes", "logits_bytes", "tp_hidden")
    return dataclasses.replace(setup, **{name: getattr(cfg.plan, name) for name in names})


# ---- the prediction


def predict(cfg, gpu, s):
    """What a run in a Setup on a GPU needs: a dict of figures, in the units that their names end in."""
    p, m = cfg.plan, cfg.model
    need = {name: n_bytes / 2**30 for name, n_bytes in memory(m, s).items()}
    need["total"] = sum(need.values())
    need["reserved"] = need["total"] * p.fragmentation
    need["available"] = max(0.0, gpu.usable_memory_gib - (p.context_gib if gpu.device_type == "cuda" else 0))
    parts = step_parts(m, s, gpu, p)
    step_s = sum(parts.values())
    batch_tokens = s.micro_steps * s.tokens * s.copies * s.shards
    tokens = cfg.optim.last_step(cfg.data.batch_tokens) * cfg.data.batch_tokens
    tokens_per_s = batch_tokens / step_s
    hours = tokens / tokens_per_s / 3600 / p.availability
    flops, causal = (cost.flops_per_token(m, s.seq_len, s.head_share, causal) for causal in (False, True))
    peak = gpu.peak_tflops(s.precision) * 1e12 * s.ranks
    kwh = s.ranks * gpu.watts / 1e3 * p.gpu_load * (1 + p.host_share) * p.pue * hours if gpu.watts else None
    return {
        "gpu": gpu.name,
        "n_gpus": s.ranks,
        "batch_tokens": batch_tokens,
        "n_params": cost.num_params(m),
        "flops_per_token": flops,
        "flops_per_token_causal": causal,
        "micro_batch_size": s.micro_batch_size,
        "micro_steps": s.micro_steps,
        "activation_checkpointing": s.recomputed,
        "memory_gib": need,
        "fits": need["reserved"] <= need["available"],
        "step_s": step_s,
        "step_parts_s": parts,
        "tokens": tokens,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": tokens_per_s / s.ranks,
        "mfu": tokens_per_s * flops / peak,
        "mfu_causal": tokens_per_s * causal / peak,
        "sent_gb_per_step": sum(cost.bytes_sent(m, s, p.gpus_per_node).values()) / 1e9,
        "days": hours / 24,
        "gpu_hours": hours * s.ranks,
        "kwh": kwh,
        "cost": None if gpu.price is None else hours * s.ranks * gpu.price,
    }


def step_parts(m, s, gpu, p):
    """Seconds of a step by what takes them: by what was measured of the machine at hand, or by fits."""
    if gpu.machine is None:
        return cost.step_seconds(m, s, gpu, p.gpus_per_node, p.efficiency)
    if s.precision != gpu.machine["precision"]:
        raise UserError(
            f"precision is {s.precision}, and {p.machine} of {gpu.machine['precision']}; "
            f"run python bench.py --precision={s.precision}, which measures it"
        )
    if s.tp > 1:
        raise UserError(f"tp is {s.tp}, and what is measured of this machine does not tell its cost; name a --gpu")
    parts = ceilings.step_seconds(m, s, gpu.machine)
    parts["optimizer_s"] /= s.shards
    waited = cost.waited_seconds(m, s, gpu, p.gpus_per_node, sum(parts.values()) / s.micro_steps) if s.ranks > 1 else 0
    return {name: seconds / p.efficiency for name, seconds in parts.items()} | {"communication_s": waited}


def largest_micro_batch(m, s, available):
    """Sequences of the largest micro-batch that fits into so many bytes; 0 where none does."""

    def fits(n):
        return sum(memory(m, dataclasses.replace(s, micro_batch_size=n)).values()) <= available

    fitting, too_large = 0, 1
    while fits(too_large):
        fitting, too_large = too_large, 2 * too_large
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
    return fitting


def to_fit(cfg, gpu, setup):
    """[(changes of settings, the Setup with them, its prediction)] that make a run fit, in the order of time.

    Of each recomputation and sharding the fastest micro-batch alone.
    """
    found = {}
    for change in changes_that_save(setup):
        changed = with_settings(setup, change)
        figures = predict(cfg, gpu, changed)
        kind = changed.recomputed, changed.shards
        if figures["fits"] and (kind not in found or figures["step_s"] < found[kind][2]["step_s"]):
            found[kind] = change, changed, figures
    return sorted(found.values(), key=lambda way: way[2]["step_s"])


def scaling(cfg, gpu, setup):
    """[(the prediction with the same batch or None, with one that grows)] of a Setup on 1, 2, 4, ... times tp GPUs.

    The same batch is taken in the largest micro-batches up to the Setup's, as far as it can be divided.
    """
    most = gpu.machine["ranks"] if gpu.machine and not gpu.link_gbs else 16_384  # without links none can be priced
    counts = {setup.ranks} | {setup.tp * 2**k for k in range(15)}
    is_whole = setup.strategy == "fsdp" and setup.copies == 1 and cfg.parallel.shard_size is None
    rows = []
    for n_gpus in sorted(n for n in counts if n <= most):
        data_ranks = n_gpus // setup.tp
        shards = data_ranks if is_whole and cfg.parallel.strategy == "fsdp" else min(setup.shards, data_ranks)
        if data_ranks % shards:
            continue
        grown = dataclasses.replace(setup, copies=data_ranks // shards, shards=shards)
        sequences, rest = divmod(cfg.data.batch_tokens // setup.seq_len, data_ranks)
        sizes = [n for n in range(1, min(sequences, setup.micro_batch_size) + 1) if sequences % n == 0]
        same = None
        if sizes and not rest:
            same = dataclasses.replace(grown, micro_batch_size=sizes[-1], micro_steps=sequences // sizes[-1])
            same = predict(cfg, gpu, same)
        rows.append((same, predict(cfg, gpu, grown)))
    return rows


def compare(cfg, asked):
    """Predictions for each known GPU and for the one asked for, those that fit first, by days.

    Each with the fastest change that makes it fit, if it does not without.
    """
    rows = []
    for gpu in (hardware.DEVICES | {asked.name: asked}).values():
        if cfg.plan.network_gbs:
            gpu = dataclasses.replace(gpu, network_gbs=cfg.plan.network_gbs)
        one = cfg
        if not gpu.has_bf16 and cfg.world.precision == "bf16":
            one = dataclasses.replace(cfg, world=dataclasses.replace(cfg.world, precision="fp16"))
        setup = setup_of(one, gpu, cfg.plan.n_gpus)
        figures, change = predict(one, gpu, setup), {}
        if not figures["fits"]:
            change, _, figures = next(iter(to_fit(one, gpu, setup)), ({}, setup, figures))
        rows.append(figures | {"change": flags(change)})
    return sorted(rows, key=lambda row: (not row["fits"], row["days"]))


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
