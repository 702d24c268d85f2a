"""A plan's figures as text and as tables."""

from config import as_dict
from data import divisors
from perf.memory import CATEGORIES

ASSUMED = ("efficiency", "host_speed", "availability", "fragmentation", "context_gib", "gpu_load", "host_share", "pue")
PARTS = {  # parts of a step: name, remedy
    "matmul_s": ("matrix multiplications", "faster or more GPUs"),
    "attention_s": ("attention", "a shorter --seq_len"),
    "memory_s": ("norms, activations, sums", "compiling, or faster memory"),
    "head_s": ("the head and its loss", "a smaller vocabulary"),
    "overhead_s": ("launching operators", "larger micro-batches, or compiling"),
    "bubble_s": ("stages without work", "more micro-steps, or fewer stages (--pp)"),
    "communication_s": ("waiting for other GPUs", "larger micro-batches, fewer GPUs, or a faster network"),
    "optimizer_s": ("the optimizer", "a larger --batch_tokens, or --strategy=fsdp"),
}


def report(cfg, gpu, setup, f, rows, notes):
    """Yields the lines of a plan."""
    yield answer(f)
    yield from notes
    yield from report_run(cfg, gpu, setup, f)
    yield from report_memory(cfg, f)
    if f["to_fit"]:
        yield "to fit     the fastest changes that fit; the first is planned below"
        for way in f["to_fit"]:
            yield f"           {way['change']:<68} {way['memory_gib']['reserved']:5.1f} GiB  {_totals(way)}"
        f = f["to_fit"][0]
    yield from report_time(cfg, gpu, f)
    yield from report_scaling(cfg, rows)
    settings = as_dict(cfg)
    yield f"assumed    {' '.join(f'--{name}={settings[name]:g}' for name in ASSUMED)}"
    yield "           sources: python plan.py --help; how far off plans were: docs/plan.md"


def answer(f):
    """The plan in one line."""
    need = f["memory_gib"]
    on = f"on {f['n_gpus']} x {f['gpu']} ({need['reserved']:.3g} of {need['available']:.3g} GiB)"
    if f["fits"]:
        return f"answer     fits {on}: {_totals(f)}"
    if f["to_fit"]:
        return f"answer     does not fit {on}; fits with {f['to_fit'][0]['change']}: {_totals(f['to_fit'][0])}"
    return f"answer     does not fit {on} with any setting that saves memory; take more or larger GPUs"


def report_run(cfg, gpu, s, f):
    """Model, length, GPUs and layout."""
    m, p, batch_tokens = cfg.model, cfg.plan, cfg.data.batch_tokens
    counts = [f[name] / 1e6 for name in ("flops_per_token", "flops_per_token_causal")]
    flops = f"{counts[0]:,.1f} MFLOP a token (PaLM's count), {counts[1]:,.1f} causal"
    yield f"model      {f['n_params']:,} parameters: {m.n_layer} layers, width {m.n_embd}; {flops}"
    yield f"length     {f['tokens'] // batch_tokens:,} steps of {batch_tokens:,} tokens: {f['tokens']:,} tokens"
    price = ", price unknown, give --gpu_price" if gpu.price is None else f", ${gpu.price:.2f} an hour"
    watts = "" if gpu.watts is None else f", {gpu.watts:g} W"
    yield (
        f"GPUs       {f['n_gpus']} x {gpu.name}: {gpu.tflops:,.4g} TFLOP/s, {gpu.memory_gib:,.4g} GiB at "
        f"{gpu.memory_gbs:,.4g} GB/s{watts}{'' if gpu.machine else price}"
    )
    if gpu.machine:
        yield f"           {gpu.machine['device']}, as python bench.py measured it"
    if f["n_gpus"] > 1:
        links = f"{gpu.link_gbs:g} GB/s within a node of {p.gpus_per_node}, {gpu.network_gbs:g} GB/s between nodes"
        yield f"           each sends {f['sent_gb_per_step']:.3g} GB a step: {links}"
    ranks, layout = s.replicas * s.shards // s.cp, f"{s.replicas} replicas x {s.shards} shards x {s.tp} tensor parallel"
    layout = f"{s.pp} stages, each {layout}" if s.pp > 1 else layout
    layout += f", {s.cp} ranks share a sequence" if s.cp > 1 else ""
    batch = f"{s.micro_steps} micro-steps x {ranks} ranks x {s.micro_batch_size} sequences x {s.seq_len} tokens"
    yield f"a step     {batch}; {layout}"
    how = "compiled, CUDA graphs" if s.is_captured else "compiled" if s.compiled else "eager"
    how += f", activation checkpointing {s.checkpointing}, {s.optimizer}"
    yield f"           {s.precision}, weights in {8 * s.weight_bytes:g} bits, {how}"


def report_memory(cfg, f):
    """Memory by category."""
    need, largest, sequences = f["memory_gib"], f["largest_micro_batch_size"], f["micro_steps"] * f["micro_batch_size"]
    for name in CATEGORIES:
        start = "memory" if name == "weights" else ""
        yield f"{start:<10} {name:<12}{need[name]:9.2f} GiB  {'#' * round(40 * need[name] / need['total'])}".rstrip()
    if not need["gradients"]:
        yield "           the peak is in the loss of the only micro-step, before there are gradients"
    dividing = max(divisors(sequences, largest), default=largest)
    reserved = f"{need['total']:.3g} x {cfg.plan.fragmentation:g} for fragmentation = {need['reserved']:.3g} GiB"
    verdict = f"{'FITS' if f['fits'] else 'DOES NOT FIT'}; largest micro-batch {largest or 'none'}"
    divides = "" if dividing == largest else f" ({dividing} divides the batch)"
    yield f"           {reserved} of {need['available']:.3g}: {verdict}{divides}"


def report_time(cfg, gpu, f):
    """Step time by its parts, and the run's totals."""
    p, has_price = cfg.plan, f["cost"] is not None
    total = f"; of the total {_money(f['cost'])}" if has_price else ""
    yield f"time       {_seconds(f['step_s'])} a step{total}:"
    parts = sorted(f["step_parts_s"].items(), key=lambda part: -part[1])
    for name, seconds in parts:
        share = seconds / f["step_s"]
        if share >= 0.0005:
            money = f"{_money(share * f['cost']):>12}" if has_price else ""
            yield f"           {PARTS[name][0]:<25}{share:6.1%}{money}  {'#' * round(40 * share)}".rstrip()
    is_waiting = gpu.device_type == "cuda" and f["step_parts_s"]["overhead_s"] > 0
    if not is_waiting or parts[0][0] != "overhead_s":
        yield "           bottleneck: {}; what helps: {}".format(*PARTS[parts[0][0]])
    if is_waiting:
        yield f"           {bound_by_host(f)}"
    mfu = f"mfu {f['mfu']:.1%} (PaLM's count), {f['mfu_causal']:.1%} causal"
    yield f"speed      {f['tokens_per_s']:,.0f} tokens/s, {f['tokens_per_s_per_gpu']:,.0f} per GPU; {mfu}"
    yield f"total      {_totals(f)}: {_days(f['days'] * p.availability)} of computing / availability {p.availability:g}"
    if f["kwh"] is not None:
        factors = f"load {p.gpu_load:g} x (1 + host {p.host_share:g}) x PUE {p.pue:g}"
        yield f"           kWh = GPU-hours x {gpu.watts:g} W x {factors}"


def bound_by_host(f):
    """Text for a step in which the GPU waits for the host: both times, and what helps."""
    launching = f["step_s"] - f["step_parts_s"]["communication_s"]
    computing = launching - f["step_parts_s"]["overhead_s"]
    ways = ["a larger --micro_batch_size" if f["micro_steps"] > 1 else "a larger --batch_tokens"]
    if not f["cuda_graphs"]:
        ways.append("CUDA graphs (one process, --compile)" if f["n_gpus"] == 1 else "one GPU, with CUDA graphs")
    times = f"launching takes {_seconds(launching)}, what is launched {_seconds(computing)}"
    return f"bound by the host: {times}; what helps: {', '.join(ways)}, a faster host"


def report_scaling(cfg, rows):
    """The same run on other numbers of GPUs, with the same batch and with one that grows with them."""
    yield f"GPUs       {'the same batch':<60}a larger batch, which changes training"
    yield f"{'':18}micro-batch         time  GPU-hours         cost  fits      tokens a step  tokens/s per GPU"
    for same, grown in rows:
        if not same and grown["n_gpus"] > cfg.plan.n_gpus:
            continue  # more GPUs than the batch can be divided over
        text = f"{'  -  the GPUs do not divide the batch':<56}"
        if same:
            text = f"{same['micro_batch_size']:13}{_days(same['days']):>13}{same['gpu_hours']:11,.0f}"
            text += f"{_money(same['cost']):>13}{'yes' if same['fits'] else 'no':>6}"
        larger = f"{grown['batch_tokens']:19,}{grown['tokens_per_s_per_gpu']:18,.0f}"
        yield f"{grown['n_gpus']:16,}{text}{larger}{'  <' if grown['n_gpus'] == cfg.plan.n_gpus else ''}"
    for count, what in zip(stops_paying(rows), ("the same batch", "a larger batch")):
        if count:
            yield f"           beyond {count:,} GPUs, with {what}, doubling them is less than 1.5 times as fast"


def report_compared(cfg, rows, notes):
    """Yields a row for each GPU."""
    yield from notes
    yield f"{cfg.plan.n_gpus} of each GPU: first those that the run fits on, by days"
    yield f"{'GPU':<10}  fits {'GiB of':>8}{'':>6}  {'step':>8}{'mfu':>7}{'time':>14}{'cost':>12}{'kWh':>11}  with"
    for row in rows:
        need = row["memory_gib"]
        kwh = "-" if row["kwh"] is None else f"{row['kwh']:,.0f}"
        yield (
            f"{row['gpu']:<10}  {'yes' if row['fits'] else 'no':<4} {need['reserved']:8.1f}{need['available']:6.0f}  "
            f"{_seconds(row['step_s']):>8}{row['mfu']:7.1%}{_days(row['days']):>14}{_money(row['cost']):>12}{kwh:>11}  "
            f"{row['change']}"
        )
    yield "GiB are reserved and available; prices change (--gpu_price); - is unknown"


def report_search(cfg, gpu, ways, best, fell):
    """Yields the lines of a search. ways: all; best: [(settings, prediction)]; fell: [(setting, value, text)]."""
    possible, fitting = sum(way.why is None for way in ways), sum(way.fits for way in ways)
    layouts = len({tuple(way.change.items())[:4] for way in ways})
    impossible = f"{len(ways) - possible:,} of {layouts:,} layouts are impossible"
    yield f"search     {possible:,} plans for {cfg.plan.n_gpus:,} x {gpu.name}: {fitting:,} fit; {impossible}"
    if not best:
        needed = [way.n_bytes / 2**30 for way in ways if way.why is None]
        more = f"at least {min(needed, default=0):,.1f} GiB are needed; take more or larger GPUs"
        yield f"           {more if needed else ways[0].why}"
        return
    yield f"{'step':>18}{'mfu':>7}{'GiB of':>9}{'':5}{'time':>12}{'cost':>14}  settings"
    for settings, f in best:
        need = f["memory_gib"]
        on_line = " ".join(f"--{name}={str(value).lower()}" for name, value in settings.items())
        yield (
            f"{_seconds(f['step_s']):>18}{f['mfu']:7.1%}{need['reserved']:9.1f}{need['available']:5.0f}"
            f"{_days(f['days']):>12}{_money(f['cost']):>14}  {on_line}"
        )
    yield "others     with one setting as here, all others at their best:"
    for name, value, text in fell:
        yield f"           {f'--{name}={value}':<40}{text}"


def _totals(f):
    kwh = "" if f["kwh"] is None else f", {f['kwh']:,.0f} kWh"
    cost = "" if f["cost"] is None else f", {_money(f['cost'])}"
    return f"{_days(f['days'])}, {f['gpu_hours']:,.0f} GPU-hours{kwh}{cost}"


def _days(days):
    if days >= 2:
        return f"{days:,.1f} days"
    return f"{24 * days:.1f} hours" if days >= 0.1 else f"{1440 * days:.0f} minutes"


def _seconds(seconds):
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _money(dollars):
    return "-" if dollars is None else f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"


def stops_paying(rows):
    """[same batch, growing batch]: GPUs beyond which twice as many are less than 1.5 times as fast, or None."""
    found = []
    for column in zip(*rows):
        known = [row for row in column if row]
        slow = (a["n_gpus"] for a, b in zip(known, known[1:]) if b["tokens_per_s"] < 1.5 * a["tokens_per_s"])
        found.append(next(slow, None))
    return found
