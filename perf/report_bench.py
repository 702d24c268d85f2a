"""A benchmark's figures as text, side by side, and as pictures."""

import importlib.util
import itertools
import math
import os

import torch

from perf.settings import read_json

GIB = 2**30


def errors(figures, prediction):
    """{figure: predicted / measured - 1}, flat."""
    measured = flat({name: figures[name] for name in ("tokens_per_s", "mfu", "memory_gib")})
    measured["step_s"] = figures["step_ms"] / 1e3
    expected = flat(prediction)
    # A trace counts a sharded model's gathered weights as activations; "other" is not one thing.
    not_comparable = {"memory_gib.other"}
    if figures["ranks"] > 1:
        not_comparable |= {"memory_gib.weights", "memory_gib.activations"}
    names = [name for name in expected if expected[name] and measured.get(name) and name not in not_comparable]
    return {name: expected[name] / measured[name] - 1 for name in names}


def flat(figures, prefix=""):
    """Nested figures as {"a.b": value}."""
    found = {}
    for name, value in figures.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def report(f):
    """Prints the figures of a training step."""
    whole = f["micro_steps_of_training"]
    in_part = "" if f["micro_steps"] == whole else f" (a training step has {whole}: too long to time here)"
    print(f"runs on    {f['ranks']} x {f['device']}, {f['precision']}, torch {f['torch']}")
    print(f"model      {f['n_params']:,} parameters")
    print(
        f"step       {f['step_ms']:,.1f} ms, median of {f['steps']} (min {f['step_ms_min']:,.1f}, "
        f"max {f['step_ms_max']:,.1f}); {f['micro_steps']} micro-steps{in_part}"
    )
    print(f"           x {f['data_ranks']} ranks x {f['micro_batch_size']} sequences x {f['seq_len']} tokens")
    print(f"speed      {f['tokens_per_s']:,.0f} tokens/s")
    report_utilization(f)
    if f["power_w"] is None:
        print(f"power      not measured: {f['power_not_measured']}")
    else:
        print(f"power      {f['power_w']:,.0f} W for all devices, {f['energy_per_token_mj']:,.3g} mJ per token")
    print("time       " + ", ".join(f"{phase} {share:.1%}" for phase, share in f["time_share"].items()))
    reserved = f", {f['reserved_memory_gib']:.2f} reserved by torch" if "reserved_memory_gib" in f else ""
    process = "" if reserved else ", with Python and torch"
    print(f"memory     peak {f['peak_memory_gib']:.2f} GiB on the fullest device{reserved}{process}; tensors:")
    report_table(f)


def report_utilization(f):
    """Prints MFU and HFU, each by both counts of FLOPs."""
    counts = {"": "PaLM's count"}
    if f["objective"] == "clm":
        counts["_causal"] = "causal attention counted as half"
    flops = [f"{f['flops_per_token' + count] / 1e6:,.1f} MFLOP a token ({what})" for count, what in counts.items()]
    print(f"flops      {'; '.join(flops)}")
    peak = f"relative to {f['peak_tflops']:.4g} TFLOP/s a device ({f['peak_name']})"
    rows = [("mfu", "mfu", peak)]
    if not f["peak_name"].startswith("measured"):
        measured = f"relative to {f['measured_tflops']:.4g} TFLOP/s a device (a measured {f['precision']} matmul)"
        rows.append(("", "mfu_of_measured", measured))
    if "hfu" in f:
        rows.append(("hfu", "hfu", f"mfu with the FLOPs that {f['activation_checkpointing']} checkpointing repeats"))
    for label, name, meaning in rows:
        print(f"{label:<10} {', '.join(f'{f[name + count]:.2%}' for count in counts)} {meaning}")


def report_table(f):
    """Prints step time and memory as measured and predicted, and the prediction's error."""
    expected, error = flat(f["predicted"]), f["error"]
    rows = [
        ("step, s", "step_s", f["step_ms"] / 1e3, ",.3f"),
        ("tokens/s", "tokens_per_s", f["tokens_per_s"], ",.0f"),
        ("mfu", "mfu", f["mfu"], ".2%"),
        ("memory, GiB", None, None, ""),
        *((f"  {part}", f"memory_gib.{part}", gib, ".3f") for part, gib in f["memory_gib"].items()),
    ]
    print(f"\n{'':<16}{'measured':>12}{'predicted':>12}{'error':>9}")
    for label, name, value, form in rows:
        cells = [format(v, form) if v is not None else "" for v in (value, expected.get(name))]
        off = f"{error[name]:+.1%}" if name in error else ""
        print(f"{label:<16}{cells[0]:>12}{cells[1]:>12}{off:>9}".rstrip())
    if f["memory_gib"]["other"] < 0:
        print("  other is negative: the categories do not all peak at the same moment")
    print(end="", flush=True)


def compare(path_a, path_b):
    """Prints the figures of two --json files side by side, and the ratio of the second to the first."""
    a, b = (comparable(read_json(path, "bench.py --json")) for path in (path_a, path_b))
    names = [*a, *(name for name in b if name not in a)]
    rows = [("", path_a, path_b, "B / A")]
    for name in names:
        x, y = a.get(name), b.get(name)
        if x is None and y is None:  # measured in neither
            continue
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (x, y))
        rows.append((name, _cell(x), _cell(y), f"{y / x:.3f}" if numbers and x else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))


def comparable(figures):
    """Figures as {"a.b": value}: medians of what was measured several times; without the predictions' errors."""
    found = flat({name: value for name, value in figures.items() if name not in ("rates", "left_out", "error")})
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def _cell(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) < 32 else f"{text[:28]}..."


# ---- pictures


def draw(figures, title):
    """Draws bench.png, a roofline, from machine.py's figures or a training step's."""
    if not _can_draw("bench.png"):
        return
    bytes_of = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    medians = {d: {int(n): rates[0] for n, rates in by_n.items()} for d, by_n in figures["matmul_tflops"].items()}
    points = {
        f"{dtype} matmuls": [(2 * n / 3 / bytes_of[dtype], tflops) for n, tflops in by_n.items()]
        for dtype, by_n in medians.items()
    }  # an n x n matmul moves three matrices for 2 n^3 FLOPs
    roofs = figures.get("roofs_tflops") or {f"{dtype} matmul": max(by_n.values()) for dtype, by_n in medians.items()}
    points |= {"training step": [figures["step"]]} if "step" in figures else {}
    draw_roofline(roofs, figures["bandwidth_gb_per_s"]["memory copy"][0], points, "bench.png", title)
    print(f"picture    {os.path.abspath('bench.png')}", flush=True)


def draw_memory(changes, device, path):
    """Draws the memory of tensors over time, from meters.allocations; on a CPU relative to the first allocation."""
    if not changes or not _can_draw(path):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    on_cuda, start = device.type == "cuda", changes[0][0]
    levels = [total for *_, total in changes] if on_cuda else list(itertools.accumulate(n for _, n, _ in changes))
    axes.fill_between([(at - start) / 1e3 for at, *_ in changes], [n / GIB for n in levels], step="post", alpha=0.6)
    axes.set(xlabel="ms", ylabel="GiB of tensors" if on_cuda else "GiB of tensors, since the start")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(f"memory     {os.path.abspath(path)}", flush=True)


def _can_draw(path):
    if importlib.util.find_spec("matplotlib"):
        return True
    print(f"no {path}: pip install matplotlib draws it", flush=True)
    return False


def draw_roofline(roofs_tflops, memory_gbs, points, path, title):
    """Draws a roofline. roofs_tflops: {name: TFLOP/s}; points: {series: [(FLOP per byte moved, TFLOP/s)]}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    xs = [x for series in points.values() for x, _ in series] + [1e3 * r / memory_gbs for r in roofs_tflops.values()]
    ys = [y for series in points.values() for _, y in series] + list(roofs_tflops.values())
    left, right = _decades(xs)
    for name, roof in roofs_tflops.items():
        ridge = 1e3 * roof / memory_gbs
        line = [(left, left * memory_gbs / 1e3), (ridge, roof), (max(right, ridge), roof)]
        axes.plot(*zip(*line), label=f"{name}, {roof:.4g} TFLOP/s")
    for name, series in points.items():
        axes.plot(*zip(*series), label=name, linestyle="", marker="*" if len(series) == 1 else "o", markersize=8)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=_decades(ys), title=title)
    axes.set(xlabel="FLOP per byte of memory moved", ylabel="TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title=f"memory {memory_gbs:,.3g} GB/s")
    figure.savefig(path, dpi=120)


def _decades(numbers):
    """The powers of ten below and above numbers."""
    return 10.0 ** math.floor(math.log10(min(numbers))), 10.0 ** math.ceil(math.log10(1.2 * max(numbers)))


# ---- operators


def print_operators(profiler, device, n=15):
    """Prints the operators with the most device time of their own."""
    on_host = torch.autograd.DeviceType.CPU  # the operator that launched a kernel has its time
    operators = [op for op in profiler.key_averages() if op.device_type == on_host and not op.is_user_annotation]
    ms_of = {
        op: (op.self_cpu_time_total if device.type == "cpu" else op.self_device_time_total) / 1e3 for op in operators
    }
    total = sum(ms_of.values())
    print(f"\n{'operator':<60}{'ms':>10}{'share':>8}{'calls':>8}")
    for op in sorted(operators, key=ms_of.get, reverse=True)[:n]:
        print(f"{op.key[:58]:<60}{ms_of[op]:>10,.1f}{ms_of[op] / total:>8.1%}{op.count:>8,}")
    print(flush=True)
