"""Figures of a benchmark, a plan and of cleaning as pictures, where matplotlib is installed."""

import importlib.util
import itertools

from config import UserError


def write_picture(path, size, draw, *args):
    """Writes what draw(figure, *args) draws, or says that matplotlib is missing. size: width and height in inches."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {path}: pip install matplotlib draws it", flush=True)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure, *args)
    for axes in figure.axes:
        axes.grid(alpha=0.3, which="both")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"{path} cannot be written here: {error}; go to another folder") from None
    print(f"picture    {path}", flush=True)


def draw_roofline(figure, figures, title):
    """Draws TFLOP/s against FLOP per byte of memory moved: machine.py's figures, or a training step's beside them."""
    bytes_of = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    medians = {d: {int(n): rates[0] for n, rates in by_n.items()} for d, by_n in figures["matmul_tflops"].items()}
    memory_gbs = figures["bandwidth_gb_per_s"]["memory copy"][0]
    roofs = figures.get("roofs_tflops") or {f"{dtype} matmul": max(by_n.values()) for dtype, by_n in medians.items()}
    ridges = {name: 1e3 * roof / memory_gbs for name, roof in roofs.items()}
    # An n x n matmul moves three matrices for 2 n^3 FLOPs.
    points = {
        f"{dtype} matmuls": [(2 * n / 3 / bytes_of[dtype], tflops) for n, tflops in by_n.items()]
        for dtype, by_n in medians.items()
    } | ({"training step": [figures["step"]]} if "step" in figures else {})
    axes, xs = figure.subplots(), [x for series in points.values() for x, _ in series] + list(ridges.values())
    left, right = min(xs) / 2, 2 * max(xs)
    for name, roof in roofs.items():
        line = [(left, left * memory_gbs / 1e3), (ridges[name], roof), (right, roof)]
        axes.plot(*zip(*line), label=f"{name}, {roof:.4g} TFLOP/s")
    for name, series in points.items():
        axes.plot(*zip(*series), label=name, linestyle="", marker="*" if len(series) == 1 else "o", markersize=8)
    axes.set(xscale="log", yscale="log", title=title, xlabel="FLOP per byte of memory moved", ylabel="TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    figure.legend(title=f"memory {memory_gbs:,.3g} GB/s", loc="outside lower center", ncols=2)


def draw_memory(figure, changes, device):
    """Draws the memory of tensors over time, from meters.allocations; on a CPU relative to the first allocation."""
    axes, on_cuda = figure.subplots(), device.type == "cuda"
    levels = [total for *_, total in changes] if on_cuda else itertools.accumulate(n for _, n, _ in changes)
    times = [(at - changes[0][0]) / 1e3 for at, *_ in changes]
    axes.fill_between(times, [n / 2**30 for n in levels], step="post", alpha=0.6)
    axes.set(xlabel="ms", ylabel="GiB of tensors" if on_cuda else "GiB of tensors, since the start")


def draw_plan(figure, rows):
    """Draws memory per GPU by category, and days, against the number of GPUs."""
    from perf.memory import CATEGORIES  # slow to import

    memory_axes, time_axes = figure.subplots(1, 2)
    same = [same for same, _ in rows if same]
    bottom, labels = [0.0] * len(same), [f"{row['n_gpus']:,}" for row in same]
    for name in CATEGORIES:
        heights = [row["memory_gib"][name] for row in same]
        memory_axes.bar(labels, heights, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, heights)]
    memory_axes.axhline(same[0]["memory_gib"]["available"], color="black", linestyle="--", label="available")
    memory_axes.set(xlabel="GPUs", ylabel="GiB per GPU", title=f"memory on {same[0]['gpu']}")
    memory_axes.tick_params(axis="x", rotation=45)
    counts, days = [row["n_gpus"] for row in same], [row["days"] for row in same]
    time_axes.plot(counts, [days[0] * counts[0] / n for n in counts], ":", color="gray", label="linear scaling")
    time_axes.plot(counts, days, marker="o", label="the same batch")
    time_axes.plot(*zip(*((row["n_gpus"], row["days"]) for _, row in rows)), marker=".", label="a batch that grows")
    time_axes.set(xlabel="GPUs", ylabel="days", title=f"time for {same[0]['tokens'] / 1e9:,.4g} billion tokens")
    time_axes.set(xscale="log", yscale="log")
    for axis in (time_axes.xaxis, time_axes.yaxis):
        axis.set_major_formatter("{x:,g}")
    figure.legend(*memory_axes.get_legend_handles_labels(), loc="outside lower left", ncols=7, fontsize=8)
    time_axes.legend(fontsize=8)


def draw_cleaning(figure, rows):
    """Draws clean.py's steps: documents that each dropped, and documents by length before and after."""
    steps_axes, length_axes = figure.subplots(1, 2)
    steps = rows[:0:-1]  # from below
    bars = steps_axes.barh([row["step"] for row in steps], [row["dropped"] for row in steps])
    total = max(1, rows[0]["documents"])
    steps_axes.bar_label(bars, [f"{row['dropped']:,} ({row['dropped'] / total:.1%})" for row in steps], padding=3)
    steps_axes.set(title=f"documents dropped, of {rows[0]['documents']:,}", xlabel="documents")
    steps_axes.margins(x=0.25)
    for row, label in ((rows[0], "before"), (rows[-1], "after")):
        numbers = {int(bits): n for bits, n in row["lengths"].items()}
        bits = range(min(numbers, default=1) - 1, max(numbers, default=1) + 2)
        length_axes.plot([2 ** (b - 0.5) for b in bits], [numbers.get(b, 0) for b in bits], marker="o", label=label)
    length_axes.set(xscale="log", title="length of documents", xlabel="bytes", ylabel="documents, by powers of 2")
    length_axes.legend()
