"""What a run needs before it is bought: memory, days, kilowatt-hours, money; on any GPU, by formulas alone.

python plan.py config/gpt2_124m.py --gpu=h100-sxm --n_gpus=8 --max_tokens=10e9
python plan.py config/gpt2_1558m.py --n_gpus=64 --strategy=fsdp --compare
"""

import dataclasses
import importlib.util
import json
import os
from dataclasses import dataclass

import ceilings
import cost
import hardware
from config import as_dict, run_script
from data import DataConfig, accumulation_steps, vocab_size_of
from memory import changes_that_save, flags, memory, with_settings
from model import ModelConfig
from objective import ObjectiveConfig
from optim import OptimConfig
from parallel import ParallelConfig, check_tensor_parallel, shape_of_mesh


@dataclass(frozen=True)
class OutputConfig:
    json: bool | str = False  # the figures as one JSON object: on the last line printed, or in the file of this name
    compare: bool = False  # plan.py: a row for each known GPU; bench.py: two of its JSON files side by side

    def __post_init__(self):
        if isinstance(self.json, str) and not os.path.isdir(os.path.dirname(self.json) or "."):
            raise ValueError(f"json is {self.json}; its folder does not exist: make it first")


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
        may_be_0 = ("host_share", "context_gib", "optimizer_bytes", "tp_hidden")
        wrong = [
            f"{name} is {value}; it must be above 0"
            for name, value in vars(self).items()
            if isinstance(value, (int, float)) and value <= 0 and name not in may_be_0
        ]
        wrong += [
            f"{name} is {getattr(self, name)}; it must not be negative"
            for name in may_be_0
            if (getattr(self, name) or 0) < 0
        ]
        if self.gpu == "other":
            by_hand = ("gpu_tflops", "gpu_memory_gib", "gpu_memory_gbs")
            if missing := [f"--{name}" for name in by_hand if getattr(self, name) is None]:
                wrong.append(f"gpu is other, of which nothing is known; give {', '.join(missing)}")
        if wrong:
            raise ValueError("\n".join(wrong))


@dataclass(frozen=True)
class Settings:
    plan: PlanConfig
    output: OutputConfig
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    presets: tuple = ()


def main(cfg):
    cfg = resolve(cfg)
    gpu = gpu_of(cfg.plan)
    setup = setup_of(cfg, gpu, cfg.plan.n_gpus)
    figures = predict(cfg, gpu, setup)
    available = figures["memory_gib"]["available"] * 2**30 / cfg.plan.fragmentation
    figures["largest_micro_batch_size"] = largest_micro_batch(cfg.model, setup, available)
    fitting = [] if figures["fits"] else to_fit(cfg, gpu, setup)
    chosen = fitting[0][1] if fitting else setup
    rows = scaling(cfg, gpu, chosen)
    if cfg.output.compare:
        figures["devices"] = compare(cfg)
        lines = report_compared(cfg, figures["devices"])
    else:
        lines = report(cfg, gpu, setup, figures, fitting, rows)
    print(*lines, sep="\n")
    if importlib.util.find_spec("matplotlib"):
        draw(cfg, rows)
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
    """The settings with what they leave open filled in: the GPUs' number, the data's vocabulary, seq_len."""
    seq_len = cfg.data.seq_len or cfg.model.block_size
    if seq_len > cfg.model.block_size:
        raise ValueError(f"seq_len {seq_len} is above block_size {cfg.model.block_size}; lower it, or raise block_size")
    command = f"python prepare.py {' '.join(cfg.presets)}, or give --vocab_size"
    vocab_size = cfg.model.vocab_size or vocab_size_of(cfg.data.data_dir, command)
    n_gpus = cfg.plan.n_gpus or (hardware.measured(cfg.plan.machine)["ranks"] if cfg.plan.gpu == "this" else 8)
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, vocab_size=vocab_size),
        data=dataclasses.replace(cfg.data, seq_len=seq_len),
        plan=dataclasses.replace(cfg.plan, n_gpus=n_gpus),
    )
    check_tensor_parallel(cfg.model, seq_len, cfg.parallel.tp)
    return cfg


def gpu_of(plan, name=None):
    """The GPU of a plan, or that of a name, with what the settings give by hand."""
    if (name or plan.gpu) == "this":
        gpu = hardware.this(hardware.measured(plan.machine))
    else:
        gpu = hardware.DEVICES.get(name or plan.gpu) or hardware.Device("other", "hopper", 0, 0, 0, 0, link_gbs=31)
    by_hand = {
        "tflops": plan.gpu_tflops, "fp32_tflops": plan.gpu_tflops, "memory_gib": plan.gpu_memory_gib,
        "memory_gbs": plan.gpu_memory_gbs,
        "link_gbs": plan.gpu_link_gbs, "network_gbs": plan.network_gbs, "watts": plan.gpu_watts,
        "price": plan.gpu_price,
    }  # fmt: skip
    return dataclasses.replace(gpu, **{name: value for name, value in by_hand.items() if value is not None})


def setup_of(cfg, gpu, n_gpus):
    """The Setup of the run on so many GPUs; ValueError where it cannot be."""
    precision = cfg.parallel.precision
    if precision == "auto":
        precision = gpu.machine["precision"] if gpu.machine else "bf16" if gpu.has_bf16 else "fp16"
    if precision == "bf16" and not gpu.has_bf16:
        raise ValueError(f"precision is bf16, in which {gpu.name} does not compute; use --precision=fp16")
    mesh_shape = shape_of_mesh(cfg.parallel, n_gpus)
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
        raise ValueError(
            f"precision is {s.precision}, and {p.machine} of {gpu.machine['precision']}; "
            f"run python bench.py --precision={s.precision}, which measures it"
        )
    parts = ceilings.step_seconds(m, s, gpu.machine)
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
    """[(changes of settings, the Setup with them, its prediction)] that make a run fit, the fastest first."""
    found = []
    for change in changes_that_save(setup):
        changed = with_settings(setup, change)
        figures = predict(cfg, gpu, changed)
        if figures["fits"]:
            found.append((change, changed, figures))
    return sorted(found, key=lambda way: way[2]["step_s"])


def scaling(cfg, gpu, setup):
    """[(the prediction with the same batch or None, with one that grows)] of a Setup on 1, 2, 4, ... times tp GPUs.

    The same batch is taken in the largest micro-batches up to the Setup's, as far as it can be divided.
    """
    rows = []
    for n_gpus in (setup.tp * 2**k for k in range(15)):
        data_ranks = n_gpus // setup.tp
        is_whole = setup.strategy == "fsdp" and cfg.parallel.shard_size is None
        shards = data_ranks if is_whole else min(setup.shards, data_ranks)
        if data_ranks % shards or n_gpus > 16_384:
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


def stops_paying(rows):
    """The numbers of GPUs from which twice as many are less than 1.5 times as fast: (same batch, growing batch).

    None where that never is.
    """
    found = []
    for column in zip(*rows):
        known = [row for row in column if row]
        slow = (a["n_gpus"] for a, b in zip(known, known[1:]) if b["tokens_per_s"] < 1.5 * a["tokens_per_s"])
        found.append(next(slow, None))
    return found


def compare(cfg):
    """Predictions for each known GPU, with the fastest change that makes it fit: those that fit first, by days."""
    rows = []
    for name in hardware.DEVICES:
        gpu = gpu_of(cfg.plan, name)
        one = cfg
        if not gpu.has_bf16 and cfg.parallel.precision == "bf16":
            one = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, precision="fp16"))
        setup = setup_of(one, gpu, cfg.plan.n_gpus)
        figures, change = predict(one, gpu, setup), {}
        if not figures["fits"]:
            change, _, figures = next(iter(to_fit(one, gpu, setup)), ({}, setup, figures))
        rows.append(figures | {"change": flags(change)})
    return sorted(rows, key=lambda row: (not row["fits"], row["days"]))


# ---- what people read

PARTS = {  # of a step: what they are called, and what lowers them
    "matmul_s": ("matrix multiplications", "only faster GPUs, or more of them, lower that"),
    "attention_s": ("attention", "a shorter --seq_len lowers that"),
    "memory_s": ("norms, activations, loss", "bound by memory bandwidth: compiling, or faster memory, lowers that"),
    "head_s": ("the loss", "a smaller vocabulary lowers that"),
    "overhead_s": ("launching operators", "a larger --micro_batch_size, or compiling, lowers that"),
    "communication_s": ("waiting for other GPUs", "larger micro-batches, fewer GPUs, or a faster network lower that"),
    "optimizer_s": ("optimizer", "a larger --batch_tokens, or --strategy=fsdp, lowers that"),
}


def report(cfg, gpu, setup, f, fitting, rows):
    """The lines of a plan, for people."""
    yield from report_setup(cfg, gpu, f, setup)
    yield from report_memory(f)
    if fitting:
        yield "to fit     one of these would do, the fastest first; what follows below is of the first:"
        for change, _, after in fitting[:4]:
            yield f"           {flags(change)}: {after['memory_gib']['reserved']:.1f} GiB, {_of_run(after)}"
        f = fitting[0][2]
    elif not f["fits"]:
        yield "to fit     no change of micro-batch, recomputation or sharding would do; take more GPUs, or larger ones"
        yield "           what follows is as if it did fit"
    yield from report_time(cfg, gpu, f)
    yield from report_scaling(cfg, rows)
    names = ("efficiency", "gpu_load", "host_share", "pue", "availability", "fragmentation", "context_gib")
    settings = as_dict(cfg)
    yield "assumed    " + " ".join(f"--{name}={settings[name]:g}" for name in names)
    yield "           --help tells where these are from"


def report_setup(cfg, gpu, f, s):
    """Model, batch and GPUs."""
    m = cfg.model
    yield (
        f"model      {f['n_params']:,} parameters: {m.n_layer} layers {m.n_embd} wide; "
        f"{f['flops_per_token'] / 1e9:,.4g} GFLOP a token by PaLM's count, "
        f"{f['flops_per_token_causal'] / 1e9:,.4g} by the causal one"
    )
    yield (
        f"a step     {cfg.data.batch_tokens:,} tokens = {s.micro_steps} micro-steps x {s.copies * s.shards} ranks x "
        f"{s.micro_batch_size} sequences x {s.seq_len} tokens"
    )
    yield f"data       {f['tokens'] // cfg.data.batch_tokens:,} steps, {f['tokens'] / 1e9:,.4g} billion tokens"
    layout = f"{s.copies} copies x {s.shards} shards x {s.tp} tensor parallel"
    runs = f"{s.precision}, {'compiled' if s.compiled else 'eager'}, recomputation {s.recomputed}, {s.optimizer}"
    yield f"on         {s.ranks} x {gpu.name}, {min(cfg.plan.gpus_per_node, s.ranks)} a node, {layout}; {runs}"
    price = "no price known, give --gpu_price" if gpu.price is None else f"${gpu.price:.2f} an hour"
    watts = "" if gpu.watts is None else f"{gpu.watts:g} W, "
    yield (
        f"a GPU      {gpu.tflops:,.4g} TFLOP/s, {gpu.memory_gib:,.4g} GiB at {gpu.memory_gbs:,.4g} GB/s, "
        f"{watts}{price}; link {gpu.link_gbs:g} GB/s, network {gpu.network_gbs:g} GB/s"
    )


def report_memory(f):
    """Memory by what it is for."""
    need = f["memory_gib"]
    verdict = "FITS" if f["fits"] else "DOES NOT FIT"
    yield (
        f"memory     {verdict}: {need['reserved']:.1f} GiB a GPU with fragmentation, of {need['available']:.1f} "
        f"that are there beside driver and NCCL"
    )
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "other"):
        yield f"           {name:<12}{need[name]:7.2f} GiB  {'#' * round(40 * need[name] / need['total'])}"
    largest = f["largest_micro_batch_size"]
    yield f"           largest micro-batch that fits: {largest or 'none'}{' sequences' if largest else ''}"


def report_time(cfg, gpu, f):
    """Step time by what it goes to, and what the run comes to."""
    money = "" if f["cost"] is None else f"; of the run's {_money(f['cost'])} that is"
    yield f"time       a step takes {_seconds(f['step_s'])}{money}:"
    parts = sorted(f["step_parts_s"].items(), key=lambda part: -part[1])
    for name, seconds in parts:
        share = seconds / f["step_s"]
        money = "" if f["cost"] is None else f"{_money(share * f['cost']):>12}"
        yield f"           {PARTS[name][0]:<26}{share:6.1%}{money}  {'#' * round(40 * share)}".rstrip()
    yield f"           so the run is limited by {PARTS[parts[0][0]][0]}: {PARTS[parts[0][0]][1]}"
    yield (
        f"speed      {f['tokens_per_s']:,.0f} tokens/s, {f['tokens_per_s_per_gpu']:,.0f} a GPU; mfu {f['mfu']:.1%} "
        f"by PaLM's count, {f['mfu_causal']:.1%} by the causal one"
    )
    yield f"the run    takes {_of_run(f)}"
    if f["kwh"] is not None:
        p = cfg.plan
        yield f"           at {gpu.watts:g} W a GPU x load {p.gpu_load:g} x (1 + host {p.host_share:g}) x PUE {p.pue:g}"


def report_scaling(cfg, rows):
    """The same run on other numbers of GPUs: the same batch, or one that grows with them."""
    yield f"more GPUs  {'the same batch:':<57}a batch that grows with them:"
    yield "               GPUs          time   GPU-hours         cost  fits    tokens/s a GPU    fits"
    for same, grown in rows:
        text = f"{'cannot be divided so':>45}"
        if same:
            text = (
                f"{_days(same['days']):>14}{same['gpu_hours']:12,.0f}{_money(same['cost']):>13}{_yes(same['fits']):>6}"
            )
        here = "  <- asked for" if grown["n_gpus"] == cfg.plan.n_gpus else ""
        of_grown = f"{grown['tokens_per_s_per_gpu']:18,.0f}{_yes(grown['fits']):>8}"
        yield f"           {grown['n_gpus']:8,}{text}{of_grown}{here}"
    for count, what in zip(stops_paying(rows), ("the same batch", "a batch that grows")):
        if count:
            yield f"           with {what}, twice as many as {count:,} GPUs are less than 1.5 times as fast"


def report_compared(cfg, rows):
    """A row for each GPU."""
    yield f"{cfg.plan.n_gpus} of each: those that the run fits first, by days"
    yield f"{'GPU':<10}  fits {'GiB of':>8}{'':>6}  {'step':>8}{'mfu':>7}{'time':>12}{'cost':>12}{'kWh':>11}  with"
    for row in rows:
        need = row["memory_gib"]
        kwh = "-" if row["kwh"] is None else f"{row['kwh']:,.0f}"
        yield (
            f"{row['gpu']:<10}  {_yes(row['fits']):<4} {need['reserved']:8.1f}{need['available']:6.0f}  "
            f"{_seconds(row['step_s']):>8}{row['mfu']:7.1%}{_days(row['days']):>12}{_money(row['cost']):>12}{kwh:>11}  "
            f"{row['change']}"
        )
    yield "memory is reserved, of what a GPU has; costs are of prices that move (--gpu_price); - is not known"


def _of_run(f):
    kwh = "" if f["kwh"] is None else f", {f['kwh']:,.0f} kWh"
    cost = "" if f["cost"] is None else f", {_money(f['cost'])}"
    return f"{_days(f['days'])}, {f['gpu_hours']:,.0f} GPU-hours{kwh}{cost}"


def _days(days):
    return (
        f"{days:,.1f} days" if days >= 2 else f"{24 * days:.1f} hours" if days >= 0.1 else f"{1440 * days:.0f} minutes"
    )


def _seconds(seconds):
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _money(dollars):
    return "-" if dollars is None else f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"


def _yes(true):
    return "yes" if true else "no"


def draw(cfg, rows):
    """Draws plan.png: memory per GPU, by what it is for, and days, against the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory_axes, time_axes = figure.subplots(1, 2)
    same = [same for same, _ in rows if same]
    bottom, labels = [0.0] * len(same), [f"{row['n_gpus']:,}" for row in same]
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "other"):
        heights = [row["memory_gib"][name] for row in same]
        memory_axes.bar(labels, heights, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, heights)]
    memory_axes.axhline(same[0]["memory_gib"]["available"], color="black", linestyle="--", label="there is")
    memory_axes.set(xlabel="GPUs", ylabel="GiB a GPU", title=f"memory, of {cfg.plan.gpu}")
    counts, days = [row["n_gpus"] for row in same], [row["days"] for row in same]
    time_axes.loglog(counts, days, marker="o", label="the same batch")
    time_axes.loglog(counts, [days[0] * counts[0] / n for n in counts], ":", color="gray", label="if GPUs never waited")
    tokens = same[0]["tokens"]
    grown = [(row["n_gpus"], tokens / row["tokens_per_s"] / 86400) for _, row in rows]
    time_axes.loglog(*zip(*grown), marker=".", label="a batch that grows")
    time_axes.set(xlabel="GPUs", ylabel="days", title=f"time of {tokens / 1e9:,.4g} billion tokens")
    for axes in (memory_axes, time_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig("plan.png", dpi=120)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
