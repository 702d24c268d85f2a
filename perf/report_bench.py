"""A benchmark's figures as text, and two benchmarks' side by side."""

from perf.settings import read_json


def errors(figures, prediction):
    """{figure: predicted / measured - 1}, flat."""
    measured = flat({name: figures[name] for name in ("tokens_per_s", "mfu", "memory_gib")})
    measured["step_s"] = figures["step_ms"] / 1e3
    # "other" is not one thing, and a trace counts a sharded model's gathered weights as activations.
    apart = {"memory_gib.other"}
    if figures["ranks"] > 1:
        apart |= {"memory_gib.weights", "memory_gib.activations"}
    expected = {name: value for name, value in flat(prediction).items() if name not in apart}
    return {name: value / measured[name] - 1 for name, value in expected.items() if value and measured.get(name)}


def flat(figures, prefix=""):
    """Nested figures as {"a.b": value}."""
    found = {}
    for name, value in figures.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def report(f):
    """Prints the figures of a training step."""
    timed, whole = f["micro_steps"], f["micro_steps_of_training"]
    in_part = "" if timed == whole else f" (a training step has {whole}: too long to time here)"
    print(f"runs on    {f['ranks']} x {f['device']}, {f['precision']}, torch {f['torch']}")
    print(f"model      {f['n_params']:,} parameters")
    spread = f"median of {f['steps']} (min {f['step_ms_min']:,.1f}, max {f['step_ms_max']:,.1f})"
    print(f"step       {f['step_ms']:,.1f} ms, {spread}; {timed} micro-steps{in_part}")
    print(f"           x {f['data_ranks']} ranks x {f['micro_batch_size']} sequences x {f['seq_len']} tokens")
    print(f"speed      {f['tokens_per_s']:,.0f} tokens/s")
    report_utilization(f)
    power = f"not measured: {f.get('power_not_measured')}"
    if f["power_w"] is not None:
        power = f"{f['power_w']:,.0f} W for all devices, {f['energy_per_token_mj']:,.3g} mJ per token"
    print(f"power      {power}")
    print("time       " + ", ".join(f"{phase} {share:.1%}" for phase, share in f["time_share"].items()))
    beside = ", with Python and torch"
    if "reserved_memory_gib" in f:
        beside = f", {f['reserved_memory_gib']:.2f} reserved by torch"
    print(f"memory     peak {f['peak_memory_gib']:.2f} GiB on the fullest device{beside}; tensors:")
    report_table(f)


def report_utilization(f):
    """Prints MFU and HFU, each by both counts of FLOPs."""
    counts = {"": "PaLM's count"}
    if f["objective"].startswith("clm"):
        counts["_causal"] = "causal attention counted as half"
    flops = [f"{f['flops_per_token' + count] / 1e6:,.1f} MFLOP a token ({what})" for count, what in counts.items()]
    print(f"flops      {'; '.join(flops)}")
    rows = [("mfu", "mfu", f"relative to {f['peak_tflops']:.4g} TFLOP/s a device ({f['peak_name']})")]
    if not f["peak_name"].startswith("measured"):
        measured = f"relative to {f['measured_tflops']:.4g} TFLOP/s a device (a measured {f['precision']} matmul)"
        rows.append(("", "mfu_of_measured", measured))
    if "hfu" in f:
        rows.append(("hfu", "hfu", f"mfu with the FLOPs that {f['activation_checkpointing']} checkpointing repeats"))
    for label, name, meaning in rows:
        print(f"{label:<10} {', '.join(f'{f[name + count]:.2%}' for count in counts)} {meaning}")


def report_table(f):
    """Prints step time and memory as measured and predicted, and the prediction's error."""
    expected = flat(f["predicted"])
    rows = [
        ("step, s", "step_s", f["step_ms"] / 1e3, ",.3f"),
        ("tokens/s", "tokens_per_s", f["tokens_per_s"], ",.0f"),
        ("mfu", "mfu", f["mfu"], ".2%"),
        *((f"{part}, GiB", f"memory_gib.{part}", gib, ".3f") for part, gib in f["memory_gib"].items()),
    ]
    print(f"\n{'':<16}{'measured':>12}{'predicted':>12}{'error':>9}")
    for label, name, value, form in rows:
        prediction = format(expected[name], form) if name in expected else ""
        off = f"{f['error'][name]:+.1%}" if name in f["error"] else ""
        print(f"{label:<16}{value:>12{form}}{prediction:>12}{off:>9}".rstrip())
    if f["memory_gib"]["other"] < 0:
        print("  other is negative: the categories do not all peak at the same moment")


def compare(path_a, path_b):
    """Prints the figures of two --json files side by side, and the ratio of the second to the first."""
    a, b = (comparable(read_json(path, "bench.py --json")) for path in (path_a, path_b))
    rows = [("", path_a, path_b, "B / A")]
    for name in a | b:
        x, y = a.get(name), b.get(name)
        if x is None and y is None:  # measured in neither
            continue
        is_ratio = all(type(v) in (int, float) for v in (x, y)) and x
        rows.append((name, _cell(x), _cell(y), f"{y / x:.3f}" if is_ratio else ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        print("  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]))


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
