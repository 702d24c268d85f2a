"""A plan's figures for people: in words, in tables, as a picture."""

from config import as_dict, comments
from perf.memory import flags

ASSUMED = ("efficiency", "availability", "fragmentation", "context_gib", "gpu_load", "host_share", "pue")
MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "other")  # what it is for
PARTS = {  # of a step: what they are called, and what shortens them
    "matmul_s": ("matrix multiplications", "faster GPUs shorten them, more GPUs share them"),
    "attention_s": ("attention", "a shorter --seq_len shortens it"),
    "memory_s": ("norms, non-linearities, sums", "compiling, or faster memory, shortens them"),
    "head_s": ("the loss", "a smaller vocabulary shortens it"),
    "overhead_s": ("launching operators", "larger micro-batches, or compiling, shorten it"),
    "communication_s": ("waiting for other GPUs", "larger micro-batches, fewer GPUs, or a faster network shorten it"),
    "optimizer_s": ("the optimizer", "a larger --batch_tokens, or --strategy=fsdp, shortens it"),
}


def report(cfg, gpu, setup, f, fitting, rows):
    """The lines of a plan, for people."""
    yield from report_run(cfg, gpu, f)
    yield from report_layout(cfg, gpu, setup)
    yield from report_memory(cfg, gpu, f)
    largest = f["largest_micro_batch_size"] or "none"
    yield f"           the largest --micro_batch_size that fits is {largest}{_dividing(f)}"
    if fitting:
        yield "to fit     one of these would do, in the order of time; the first is planned below:"
        for change, _, after in fitting:
            yield f"           {flags(change):<68} {after['memory_gib']['reserved']:5.1f} GiB  {_of_run(after)}"
        change, setup, f = fitting[0]
        yield f"\n---- the same run with {flags(change)}\n"
        yield from report_layout(cfg, gpu, setup)
        yield from report_memory(cfg, gpu, f)
    elif not f["fits"]:
        yield "to fit     no change of micro-batch, recomputation or sharding would do; take more GPUs, or larger ones"
        yield "\n---- the same run, if it did fit\n"
    yield from report_time(cfg, gpu, f)
    yield from report_scaling(cfg, rows)
    yield "assumed    GPUs by data sheets, rates fitted to published runs, prices of spring 2026 (hardware.py); step"
    yield "           times of other code's published runs were off by 15 % in the median (README.md); and, to be set:"
    settings, sources = as_dict(cfg), comments(type(cfg))
    for name in ASSUMED:
        yield f"           {f'--{name}={settings[name]:g}':<21} {sources[name]}"


def report_run(cfg, gpu, f):
    """Model, length and GPUs."""
    m = cfg.model
    yield (
        f"model      {f['n_params']:,} parameters: {m.n_layer} layers {m.n_embd} wide; "
        f"{f['flops_per_token'] / 1e9:,.4g} GFLOP a token by PaLM's count, "
        f"{f['flops_per_token_causal'] / 1e9:,.4g} with causal attention as half"
    )
    steps = f["tokens"] // cfg.data.batch_tokens
    yield f"length     {steps:,} steps of {cfg.data.batch_tokens:,} tokens: {f['tokens'] / 1e9:,.4g} billion tokens"
    price = "price unknown, give --gpu_price" if gpu.price is None else f"${gpu.price:.2f} an hour, power included"
    watts = "" if gpu.watts is None else f"{gpu.watts:g} W, "
    yield (
        f"GPUs       {f['n_gpus']} x {gpu.name}, up to {cfg.plan.gpus_per_node} a node; each "
        f"{gpu.tflops:,.4g} TFLOP/s, {gpu.memory_gib:,.4g} GiB at {gpu.memory_gbs:,.4g} GB/s, {watts}{price}"
    )
    if gpu.machine:
        yield f"           which is {gpu.machine['device']}, as python bench.py measured it"
    if f["n_gpus"] > 1:
        yield (
            f"           and sends {f['sent_gb_per_step']:.3g} GB a step, at up to {gpu.link_gbs:g} GB/s in its node, "
            f"{gpu.network_gbs:g} GB/s beyond"
        )


def report_layout(cfg, gpu, s):
    """How a step is laid out over the GPUs."""
    yield (
        f"a step     {s.micro_steps} micro-steps x {s.copies * s.shards} ranks x {s.micro_batch_size} sequences x "
        f"{s.seq_len} tokens; {s.copies} copies of the model x {s.shards} shards x {s.tp} tensor parallel"
    )
    yield (
        f"           matmuls in {s.precision}; weights kept in {8 * s.weight_bytes:g} bits"
        f"{f', with copies in {s.precision}' if s.width < s.weight_bytes else ''}; "
        f"{'compiled' if s.compiled else 'eager'}; activation_checkpointing {s.recomputed}; {s.optimizer}"
    )


def report_memory(cfg, gpu, f):
    """Memory by what it is for."""
    need, p = f["memory_gib"], cfg.plan
    for name in MEMORY:
        start = "memory" if name == "weights" else ""
        yield f"{start:<10} {name:<12}{need[name]:9.2f} GiB  {'#' * round(40 * need[name] / need['total'])}".rstrip()
    if not need["gradients"]:
        yield "           at the peak, in the loss of the only micro-step, there are no gradients yet"
    verdict = "FITS" if f["fits"] else "DOES NOT FIT"
    reserved = f"{need['total']:.1f} x {p.fragmentation:g} for fragmentation = {need['reserved']:.1f} GiB a GPU"
    there = f"{need['available']:.1f}"
    if gpu.device_type == "cuda":
        there += f" ({gpu.usable_memory_gib:.1f} less {p.context_gib:g} of driver and NCCL)"
    yield f"           {reserved}, of {there}: {verdict}"


def report_time(cfg, gpu, f):
    """Step time by what it goes to, and what the run comes to."""
    money = "" if f["cost"] is None else f", and of the run's {_money(f['cost'])}"
    yield f"time       {_seconds(f['step_s'])} a step; of it{money}:"
    parts = sorted(f["step_parts_s"].items(), key=lambda part: -part[1])
    for name, seconds in parts:
        share = seconds / f["step_s"]
        money = "" if f["cost"] is None else f"{_money(share * f['cost']):>12}"
        yield f"           {PARTS[name][0]:<29}{share:6.1%}{money}  {'#' * round(40 * share)}".rstrip()
    yield f"           most of all limit it {PARTS[parts[0][0]][0]}: {PARTS[parts[0][0]][1]}"
    yield (
        f"speed      {f['tokens_per_s']:,.0f} tokens/s, {f['tokens_per_s_per_gpu']:,.0f} a GPU; mfu {f['mfu']:.1%} "
        f"by PaLM's count, {f['mfu_causal']:.1%} by the causal one"
    )
    p = cfg.plan
    computing = _days(f["days"] * p.availability)
    yield f"in all     {_of_run(f)}: {computing} of computing / availability {p.availability:g}"
    if f["kwh"] is not None:
        watts = f"{gpu.watts:g} W x load {p.gpu_load:g} x (1 + host {p.host_share:g}) x PUE {p.pue:g}"
        yield f"           kWh are GPU-hours x {watts}"


def report_scaling(cfg, rows):
    """The same run on other numbers of GPUs: the same batch, or one that grows with them."""
    yield f"GPUs       {'the same batch':<60}a larger batch, which trains otherwise"
    yield "                  micro-batch         time  GPU-hours         cost  fits      tokens a step  tokens/s a GPU"
    for same, grown in rows:
        text = f"{'  -  fewer sequences than GPUs, or no multiple of them':<56}"
        if same:
            text = f"{same['micro_batch_size']:13}{_days(same['days']):>13}{same['gpu_hours']:11,.0f}"
            text += f"{_money(same['cost']):>13}{_yes(same['fits']):>6}"
        of_grown = f"{grown['batch_tokens']:19,}{grown['tokens_per_s_per_gpu']:16,.0f}"
        here = "  <" if grown["n_gpus"] == cfg.plan.n_gpus else ""
        yield f"{grown['n_gpus']:16,}{text}{of_grown}{here}"
    for count, what in zip(stops_paying(rows), ("the same batch", "a larger batch")):
        if count:
            yield f"           beyond {count:,} GPUs, with {what}, twice as many are less than 1.5 times as fast"


def _dividing(f):
    """Which micro-batches up to the largest divide the batch, where that itself does not."""
    largest = f["largest_micro_batch_size"]
    sequences = f["micro_steps"] * f["micro_batch_size"]
    dividing = max((n for n in range(1, min(largest, sequences) + 1) if sequences % n == 0), default=largest)
    return "" if dividing == largest else f", of those that divide the batch {dividing}"


def report_compared(cfg, rows):
    """A row for each GPU."""
    yield f"{cfg.plan.n_gpus} of each: those that the run fits first, by days"
    yield f"{'GPU':<10}  fits {'GiB of':>8}{'':>6}  {'step':>8}{'mfu':>7}{'time':>14}{'cost':>12}{'kWh':>11}  with"
    for row in rows:
        need = row["memory_gib"]
        kwh = "-" if row["kwh"] is None else f"{row['kwh']:,.0f}"
        yield (
            f"{row['gpu']:<10}  {_yes(row['fits']):<4} {need['reserved']:8.1f}{need['available']:6.0f}  "
            f"{_seconds(row['step_s']):>8}{row['mfu']:7.1%}{_days(row['days']):>14}{_money(row['cost']):>12}{kwh:>11}  "
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


def draw(rows):
    """Draws plan.png: memory per GPU, by what it is for, and days, against the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory_axes, time_axes = figure.subplots(1, 2)
    same = [same for same, _ in rows if same]
    bottom, labels = [0.0] * len(same), [f"{row['n_gpus']:,}" for row in same]
    for name in MEMORY:
        heights = [row["memory_gib"][name] for row in same]
        memory_axes.bar(labels, heights, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, heights)]
    memory_axes.axhline(same[0]["memory_gib"]["available"], color="black", linestyle="--", label="there is")
    memory_axes.set(xlabel="GPUs", ylabel="GiB a GPU", title=f"memory, of {same[0]['gpu']}")
    counts, days = [row["n_gpus"] for row in same], [row["days"] for row in same]
    time_axes.plot(counts, [days[0] * counts[0] / n for n in counts], ":", color="gray", label="if GPUs never waited")
    time_axes.plot(counts, days, marker="o", label="the same batch")
    grown = [(row["n_gpus"], row["days"]) for _, row in rows]
    time_axes.plot(*zip(*grown), marker=".", label="a batch that grows")
    time_axes.set(xlabel="GPUs", ylabel="days", title=f"time of {same[0]['tokens'] / 1e9:,.4g} billion tokens")
    time_axes.set(xscale="log", yscale="log")
    for axis in (time_axes.xaxis, time_axes.yaxis):
        axis.set_major_formatter("{x:,g}")
    memory_axes.tick_params(axis="x", rotation=45)
    figure.legend(*memory_axes.get_legend_handles_labels(), loc="outside lower left", ncols=7, fontsize=8)
    time_axes.legend(fontsize=8)
    for axes in (memory_axes, time_axes):
        axes.grid(alpha=0.3)
    figure.savefig("plan.png", dpi=120)
