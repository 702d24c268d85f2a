"""Predicts a run's memory, days, kilowatt-hours and money by formulas alone, before any hardware is bought.

python plan.py config/gpt2_124m.py --gpu=h100-sxm --n_gpus=8 --max_tokens=10e9
python plan.py config/gpt2_1558m.py --n_gpus=64 --strategy=fsdp --compare
python plan.py config/gpt2_1558m.py --gpu=rtx4090 --generate
python plan.py --gpu=rtx4090 --hours=24 --tokens=1e9

GPUs: v100 t4 rtx3090 rtx4090 rtx5090 a10 a10g a100-40 a100-80 l4 l40s h100-pcie h100-sxm h200 b200 gb200 mi250x mi300x,
this (this machine, as python bench.py measured it), other (given by the settings gpu_tflops and the like).
"""

import bisect
import dataclasses
import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

from config import UserError, as_dict, only, preset_value, run_script
from data import DataConfig, accumulation_steps, divisors, nearest_batch
from distill import DistillConfig
from interop import pretrained
from interop.teacher import teacher_config
from model import ModelConfig
from objective import ObjectiveConfig
from optim import OptimConfig
from parallel import ParallelConfig
from perf import budget, cost, hardware, timing
from perf.generation import generation, report_generation
from perf.memory import changes_that_save, flags, memory, with_settings
from perf.pictures import draw_plan, write_picture
from perf.report_plan import report, report_compared, report_search
from perf.search import SEARCHED, best_of, search, settings_of, why_others_fell, with_layout
from perf.settings import OutputConfig, PlanConfig, kinds_beside, read_json, with_default_vocab
from run.folder import RunConfig
from run.health import HealthConfig
from world import WorldConfig


@dataclass(frozen=True)
class Settings:
    plan: PlanConfig
    output: OutputConfig
    model: ModelConfig
    objective: ObjectiveConfig
    distill: DistillConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    world: WorldConfig = only("device", "precision")
    run: RunConfig = only("init_from")
    presets: tuple = ()
    given: frozenset = dataclasses.field(default=frozenset(), compare=False)


def main(cfg):
    if budget.asks(cfg.plan):
        return plan_budget(cfg)
    if cfg.plan.generate:
        return plan_generation(cfg)
    if cfg.plan.search:
        return plan_search(cfg)
    cfg, notes = resolve(cfg)
    gpu = gpu_of(cfg.plan)
    setup = setup_on(gpu, cfg)
    cfg.parallel.check_precision(setup.precision)
    figures = predict(cfg, gpu, setup)
    available = figures["memory_gib"]["available"] * 2**30 / cfg.plan.fragmentation
    figures["largest_micro_batch_size"] = largest_micro_batch(cfg.model, setup, available)
    fitting = [] if figures["fits"] else to_fit(cfg, gpu, setup)
    figures["to_fit"] = [after | {"change": flags(change)} for change, _, after in fitting]
    rows = scaling(cfg, gpu, fitting[0][1] if fitting else setup)
    if cfg.output.compare:
        figures["devices"] = compare(cfg, gpu)
        lines = report_compared(cfg, figures["devices"], notes)
    else:
        lines = report(cfg, gpu, setup, figures, rows, notes)
    print(*lines, sep="\n")
    if cfg.plan.simulate:
        print(*simulate(cfg, setup), sep="\n", flush=True)
    write_picture("plan.png", (11, 4.5), draw_plan, rows)
    cfg.output.write(figures)


def plan_generation(cfg):
    """Prints memory and tokens/s of sampling from the model on one GPU."""
    on = kinds_beside(cfg, "generate")
    if on or (cfg.plan.n_gpus or 1) > 1:
        other = f"{on[0]} is on" if on else f"n_gpus is {cfg.plan.n_gpus}"
        raise UserError(f"{other}, but generate plans one GPU that samples; leave it out")
    cfg, _ = resolve(replace(cfg, plan=replace(cfg.plan, n_gpus=1)))
    if not cfg.model.is_causal:
        raise UserError(f"generate is on, but a model of objective {cfg.model.base} writes no text; leave generate out")
    gpu = gpu_of(cfg.plan)
    available, context = available_gib(gpu, cfg.plan) * 2**30 / cfg.plan.fragmentation, cfg.data.seq_len
    found = generation(cfg.model, gpu, context, available, cfg.plan.host_speed)
    precision = cfg.world.precision if cfg.world.precision in found else "bf16" if gpu.has_bf16 else "fp16"
    print(*report_generation(cfg.model, gpu, context, available, precision, found), sep="\n")
    cfg.output.write({"gpu": gpu.name, "context": context, "available_bytes": available, "precisions": found})


def plan_search(cfg):
    """Prints the fastest layouts of a run on its GPUs, and why others fall."""
    if on := kinds_beside(cfg, "search"):
        raise UserError(f"{on[0]} is on, but search plans many layouts; leave it out")
    if "contrastive" in cfg.model.objectives:
        rule = "contrastive compares a micro-batch's texts over ranks, so that layouts differ in more than speed"
        raise UserError(f"search is on, but {rule}; leave search out")
    settings = as_dict(cfg)
    for name in cfg.given.intersection(SEARCHED):
        if settings[name] != preset_value(cfg.presets, name):  # a preset's own layout may be one of those that fall
            raise UserError(f"{name} is {settings[name]}, but search tries every {name}; leave it out")
    n_gpus, given = gpus_of(cfg.plan), cfg.parallel
    cfg, note = with_default_vocab(replace(cfg, plan=replace(cfg.plan, n_gpus=n_gpus)))
    cfg = replace(pretrained.resolve(with_layout(cfg, {"tp": 1, "cp": 1, "pp": 1, "shard_size": 1})), parallel=given)
    gpu = gpu_of(cfg.plan)
    available = available_gib(gpu, cfg.plan) * 2**30
    ways = [*search(cfg, n_gpus, functools.partial(setup_on, gpu), gpu, available)]
    fastest = best_of(ways)
    best = [(settings_of(cfg, way.change), predict(cfg, gpu, way.setup)) for way in fastest]
    fell = why_others_fell(ways, fastest[0]) if fastest else []
    print(*filter(None, [note]), *report_search(cfg, gpu, ways, best, fell), sep="\n")
    cfg.output.write({"best": [figures | {"change": settings} for settings, figures in best]})


def plan_budget(cfg):
    """Prints the model, batch, learning rate and length that a budget is best spent on; writes them as a preset."""
    budget.check(cfg)
    n_gpus = cfg.plan.n_gpus or (gpus_of(cfg.plan) if cfg.plan.gpu == "this" else 1)
    cfg, note = with_default_vocab(replace(cfg, plan=replace(cfg.plan, n_gpus=n_gpus)))
    cfg, gpu = pretrained.resolve(cfg), gpu_of(cfg.plan)

    def figures_of(trial):
        trial, found = pretrained.resolve(trial), []
        for micro in (2**k for k in range(trial.data.micro_batch_size.bit_length())):
            one = replace(trial, data=replace(trial.data, micro_batch_size=micro))
            figures = predict(one, gpu, setup_on(gpu, one))
            if figures["fits"]:
                found.append((figures["step_s"], micro, one, figures))
        return min(found)[2:] if found else (trial, None)

    cfg, figures, text = budget.spend(cfg, figures_of)
    lines = [*filter(None, [note]), *budget.report_budget(cfg, gpu, figures, text)]
    print(*lines, sep="\n")
    if cfg.plan.preset:
        print(f"written    {cfg.plan.preset}; {budget.write(cfg, lines)}")
    cfg.output.write(figures)


def available_gib(gpu, p):
    """GiB of a GPU's memory that are left beside the driver."""
    return max(0.0, gpu.usable_memory_gib - (p.context_gib if gpu.device_type == "cuda" else 0))


def resolve(cfg):
    """(settings with the open ones filled in, notes): model, seq_len, number of GPUs, and a batch that they divide."""
    p, notes = cfg.plan, []
    n_gpus = gpus_of(p)
    cfg, note = with_default_vocab(replace(cfg, plan=replace(p, n_gpus=n_gpus)))
    cfg = pretrained.resolve(cfg)
    cfg.parallel.mesh_shape(n_gpus)  # raises where it does not fit
    data = nearest_batch(cfg.data, n_gpus // cfg.parallel.ranks_of_sequence)
    if data != cfg.data:
        flags_of_batch = flags({"batch_tokens": data.batch_tokens, "micro_batch_size": data.micro_batch_size})
        sizes = f"{cfg.data.batch_tokens:,} tokens in micro-batches of {cfg.data.micro_batch_size} x {data.seq_len}"
        notes.append(f"batch      {flags_of_batch}: {n_gpus} GPUs do not divide {sizes}")
    return replace(cfg, data=data), notes + ([note] if note else [])


def gpus_of(plan):
    """Number of GPUs of a plan."""
    return plan.n_gpus or (measured(plan.machine)["ranks"] if plan.gpu == "this" else 8)


def measured(path):
    """python bench.py's figures of this machine; UserError where it has not run."""
    figures = read_json(path, "python bench.py")
    if "rates" not in figures:
        raise UserError(f"{path} has no rates of training; run python bench.py, which measures them")
    return figures


def gpu_of(plan):
    """The Device of a plan, with what the settings specify."""
    if plan.gpu == "this":
        gpu = hardware.this(measured(plan.machine))
    else:
        gpu = hardware.DEVICES.get(plan.gpu) or hardware.Device("other", "hopper", 0, 0, 0, 0)
    given = {
        "tflops": plan.gpu_tflops, "memory_gib": plan.gpu_memory_gib, "memory_gbs": plan.gpu_memory_gbs,
        "link_gbs": plan.gpu_link_gbs, "network_gbs": plan.network_gbs, "watts": plan.gpu_watts,
        "price": plan.gpu_price,
    }  # fmt: skip
    if gpu.name == "other":
        given |= {"fp32_tflops": plan.gpu_tflops, "link_gbs": plan.gpu_link_gbs or hardware.PCIE_GBS / 2}
    return replace(gpu, **{name: value for name, value in given.items() if value is not None})


def setup_on(gpu, cfg):
    """The Setup of a run on n_gpus of a GPU; UserError where it is impossible."""
    p, precision = cfg.plan, cfg.world.precision
    if precision == "auto":
        precision = gpu.machine["precision"] if gpu.machine else "bf16" if gpu.has_bf16 else "fp16"
    if precision == "bf16" and not gpu.has_bf16:
        raise UserError(f"precision is bf16, which {gpu.name} does not compute in; use --precision=fp16")
    mesh_shape = cfg.parallel.mesh_shape(p.n_gpus)
    micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, p.n_gpus // cfg.parallel.ranks_of_sequence)
    others = {field.name: getattr(p, field.name) for field in dataclasses.fields(cost.Setup) if hasattr(p, field.name)}
    others["teacher"] = teacher_config(cfg)
    return cost.setup_of(cfg, mesh_shape, micro_steps, precision, gpu.device_type, **others)


def simulate(cfg, setup):
    """The lines of a simulated step of rank 0 in a Setup, beside what the formulas say of it."""
    if len(cfg.model.objectives) > 1 or cfg.distill.distills:
        what = "a teacher" if cfg.distill.distills else f"objective {cfg.model.objective}"
        raise UserError(f"simulate runs a step with one loss, not with {what}; leave one of them out")
    from perf.simulation import report_simulated, simulated  # here, since both import the training loop
    from train import build, train_step

    world = replace(cfg.world, precision=setup.precision)
    settings = SimpleNamespace(**vars(replace(cfg, world=world)), health=HealthConfig())
    figures = simulated(settings, cfg.plan.n_gpus, build, train_step)
    return report_simulated(figures, cost.collectives(cfg.model, setup, cfg.plan.gpus_per_node))


# ---- the prediction


def predict(cfg, gpu, s):
    """The figures of a run in a Setup on a GPU, in the units that their names end in."""
    p, m = cfg.plan, cfg.model
    need = {name: n_bytes / 2**30 for name, n_bytes in memory(m, s).items()}
    need["total"] = sum(need.values())
    need["reserved"] = need["total"] * p.fragmentation
    need["available"] = available_gib(gpu, p)
    parts = timing.step_seconds(m, s, gpu, p.gpus_per_node, p.efficiency)
    step_s = sum(parts.values())
    batch_tokens = s.micro_steps * s.tokens * s.replicas * s.shards
    tokens = cfg.optim.last_step(cfg.data.batch_tokens) * cfg.data.batch_tokens
    tokens_per_s = batch_tokens / step_s
    sent = sum(cost.bytes_sent(m, s, p.gpus_per_node).values())
    hours = tokens / tokens_per_s / 3600 / p.availability
    flops, causal = (cost.flops_per_token(m, s.seq_len, s.head_share, causal) for causal in (False, True))
    peak = gpu.peak_tflops(s.precision) * 1e12 * s.ranks
    kwh = s.ranks * gpu.watts / 1e3 * p.gpu_load * (1 + p.host_share) * p.pue * hours if gpu.watts else None
    return {
        "gpu": gpu.name, "n_gpus": s.ranks, "batch_tokens": batch_tokens, "micro_batch_size": s.micro_batch_size,
        "micro_steps": s.micro_steps, "activation_checkpointing": s.checkpointing, "cuda_graphs": s.is_captured,
        "n_params": cost.num_params(m),
        "flops_per_token": flops, "flops_per_token_causal": causal,
        "memory_gib": need, "fits": need["reserved"] <= need["available"],
        "step_s": step_s, "step_parts_s": parts, "sent_gb_per_step": sent / 1e9,
        "tokens": tokens, "tokens_per_s": tokens_per_s, "tokens_per_s_per_gpu": tokens_per_s / s.ranks,
        "mfu": tokens_per_s * flops / peak, "mfu_causal": tokens_per_s * causal / peak,
        "days": hours / 24, "gpu_hours": hours * s.ranks, "kwh": kwh,
        "cost": None if gpu.price is None else hours * s.ranks * gpu.price,
    }  # fmt: skip


def largest_micro_batch(m, s, available):
    """Sequences of the largest micro-batch that fits into the available bytes; 0 where none does."""

    def is_too_large(n):
        return sum(memory(m, replace(s, micro_batch_size=n)).values()) > available

    return bisect.bisect_left(range(1, 2**40), True, key=is_too_large)


def to_fit(cfg, gpu, setup):
    """[(change of settings, the Setup with it, its prediction)] that make a run fit, the fastest first.

    For each activation checkpointing and sharding, only the fastest micro-batch.
    """
    found = {}
    for change in changes_that_save(setup):
        changed = with_settings(setup, change)
        figures = predict(cfg, gpu, changed)
        kind = changed.checkpointing, changed.shards
        if figures["fits"] and (kind not in found or figures["step_s"] < found[kind][2]["step_s"]):
            found[kind] = change, changed, figures
    return sorted(found.values(), key=lambda way: way[2]["step_s"])


def scaling(cfg, gpu, setup):
    """[(prediction with the same batch or None, with a batch that grows)] of a Setup on 1, 2, 4, ... times tp cp pp GPUs.

    The same batch is divided into the largest micro-batches up to the Setup's; None where the GPUs do not divide it.
    """
    most = gpu.machine["ranks"] if gpu.machine and not gpu.link_gbs else 16_384  # no link: no figures for more
    of_one = setup.tp * setup.cp * setup.pp
    counts = {setup.ranks} | {of_one * 2**k for k in range(15)}
    is_whole = setup.strategy == "fsdp" and setup.replicas == 1 and cfg.parallel.shard_size is None
    rows = []
    for n_gpus in sorted(n for n in counts if n <= most):
        data_ranks = n_gpus // (setup.tp * setup.pp)
        shards = data_ranks if is_whole and cfg.parallel.strategy == "fsdp" else min(setup.shards, data_ranks)
        if data_ranks % shards:
            continue
        grown = replace(setup, replicas=data_ranks // shards, shards=shards)
        sequences, rest = divmod(cfg.data.batch_tokens // setup.seq_len, data_ranks // setup.cp)
        sizes = divisors(sequences, setup.micro_batch_size)
        same = None
        if sizes and not rest:
            same = replace(grown, micro_batch_size=sizes[-1], micro_steps=sequences // sizes[-1])
        rows.append((same and predict(cfg, gpu, same), predict(cfg, gpu, grown)))
    return rows


def compare(cfg, asked):
    """Predictions for each known GPU and the one asked for; those that fit first, by days.

    A GPU that does not fit the run has the fastest change that fits.
    """
    rows = []
    for gpu in (hardware.DEVICES | {asked.name: asked}).values():
        if cfg.plan.network_gbs:
            gpu = replace(gpu, network_gbs=cfg.plan.network_gbs)
        one = cfg
        if not gpu.has_bf16 and cfg.world.precision == "bf16":
            one = replace(cfg, world=replace(cfg.world, precision="fp16"))
        setup = setup_on(gpu, one)
        figures, change = predict(one, gpu, setup), {}
        if not figures["fits"]:
            change, _, figures = next(iter(to_fit(one, gpu, setup)), ({}, setup, figures))
        rows.append(figures | {"change": flags(change)})
    return sorted(rows, key=lambda row: (not row["fits"], row["days"]))


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
