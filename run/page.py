"""A run's page, report.html: one file without scripts or links, for any browser."""

import html
import math
import os
import statistics
import time

MOST_POINTS = 500  # of a line in a picture
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #66666b; --grid: #dddde0; --blue: #2f6fb5;
  --orange: #bb5208 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17181b; --soft: #a4a4aa; --grid: #3a3b40; --blue: #79b4f2; --orange: #ffa45c } }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word }
h2 { font-size: 1.15rem; margin: 1.8rem 0 .5rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem }
figure { margin: 1rem 0 0 }
svg { width: 100%; font-size: 12px; fill: var(--soft) }
polyline { fill: none; stroke: var(--soft); stroke-width: 1.5 }
line { stroke: var(--grid) }
.mean_loss { stroke: var(--blue); color: var(--blue) }
.val_loss { stroke: var(--orange); color: var(--orange) }
.reference { stroke-dasharray: 5 3 }
div { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .1rem .8rem .1rem 0; font-variant-numeric: tabular-nums }
th, figcaption { font-weight: 400; color: var(--soft) }
th { white-space: nowrap }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--grid); padding-left: .7rem;
  font-size: .85rem }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # whatever a sample holds, nothing runs or is fetched

# (name in the log, name on the page, its format): in the head the newest of each, and of an evaluation in its row
EVALUATION = (
    ("val_loss", "val loss", "{:.4f}"), ("reference_loss", "reference", "{:.4f}"),
    ("val_bpb", "bits/byte", "{:.4f}"), ("val_accuracy", "accuracy", "{:.1%}"),
)  # fmt: skip
STEP = (
    ("tokens", "tokens", "{:,.0f}"), ("tokens_per_s", "tokens/s", "{:,.0f}"), ("mfu", "MFU", "{:.1%}"),
    ("data_wait_ms", "wait for data", "{:.1f} ms a step"), ("memory_gib", "memory, peak", "{:.2f} GiB"),
)  # fmt: skip
LEGEND = {"mean_loss": "training", "val_loss": "validation", "reference": "reference"}


def write_page(out_dir, records, how, reference=None):
    """Writes report.html into a run's folder. records: of its log; how: how the run stands, in words.

    reference: the Curve that it is compared with, if any.
    """
    name, start = os.fsencode(out_dir.name).decode(errors="replace"), next((r for r in records if "start" in r), {})
    evaluations = [r for r in records if number(r, "val_loss") is not None]
    texts = next((t for r in reversed(records) if (t := {k: v for k, v in r.items() if k.startswith("sample/")})), {})
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())  # a killed run's page stays as it was
    columns = [column for column in EVALUATION if any(number(r, column[0]) is not None for r in evaluations)]
    settings = out_dir / "config.py"
    settings = settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else ""
    parts = [
        f"<h1>{_text(name)}</h1><p>{_text(how)}</p><p>written {written}</p>",
        table((), head(records, start)),
        f'<div class="pictures">{"".join(pictures(records, reference))}</div>',
        "<h2>Evaluations</h2>",
        table(["step", *(name for _, name, _ in columns)], [evaluation(r, columns) for r in evaluations[-10:]]),
        *(["<h2>Samples</h2>"] if texts else []),
        *(f"<pre>{_text(text)}</pre>" for text in texts.values()),
        "<h2>Faults and starts</h2>",
        f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in events(out_dir, records))}</ul>",
        f"<h2>To continue</h2><pre>{_text(command(start))}</pre>",
        f"<h2>Settings</h2><details><summary>config.py</summary><pre>{_text(settings)}</pre></details>",
    ]
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(name)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    partial = out_dir / ".report.html"
    partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, out_dir / "report.html")


def head(records, start):
    """(name, text) of the run's figures and of what it runs on. Speed is the median of the last 20 logged steps."""
    for key, name, form in EVALUATION + STEP:
        values = [value for r in records if (value := number(r, key)) is not None]
        if values and key in ("tokens_per_s", "mfu", "data_wait_ms"):
            values = [statistics.median(values[-20:])]
        if values:
            yield name, form.format(values[-1])
    for key in ("devices", "precision", "git_commit", "versions"):
        if value := start.get(key):
            yield key.replace("_", " "), ", ".join(map(" ".join, value.items())) if isinstance(value, dict) else value


def evaluation(record, columns):
    """An evaluation's row: its step and figures."""
    found = [(number(record, key), form) for key, _, form in columns]
    return [f"{record['step']:,}", *("" if value is None else form.format(value) for value, form in found)]


def events(out_dir, records):
    """A line for each start, skipped step, rollback and crash report."""
    for r in records:
        if "start" in r:
            yield "; ".join([f"started at step {r['step']:,}, {r['start']}", *r.get("changes", [])])
        elif "skipped" in r:
            yield f"skipped step {r['step']:,}: {r['skipped']}"
        elif "went_back_to" in r:
            yield f"rolled back to step {r['step']:,}"
    yield from (f"crash report {path.name}" for path in sorted(out_dir.glob("crash_*.txt")))


def command(start):
    """The command that continues a run, from the record of its start."""
    ranks = str(start.get("devices")).partition(" ")[0]
    return f"{'python' if ranks == '1' else f'torchrun (as before, {ranks} ranks)'} {start.get('command')}"


def pictures(records, reference):
    """The figures' HTML: losses beside the reference, learning rate, gradient norm and speed."""
    last = max((r["step"] for r in records), default=0)
    for title, names in (
        ("loss, nats per token", ("mean_loss", "val_loss")),
        ("learning rate", ("lr",)),
        ("gradient norm", ("grad_norm",)),
        ("tokens/s", ("tokens_per_s",)),
    ):
        lines = {name: [(r["step"], r[name]) for r in records if number(r, name) is not None] for name in names}
        if reference and "val_loss" in names:
            lines = {"reference": reference.until(last)} | lines
        lines = {name: points for name, points in lines.items() if len(dict(points)) > 1}
        if lines:
            yield picture(title, lines)


def picture(title, lines):
    """A figure of lines, {name: [(step, value)]}; the upper edge cuts off what only the first twentieth reaches."""
    width, height, left, bottom = 420, 230, 58, 26
    last = max(points[-1][0] for points in lines.values())
    low = min(y for points in lines.values() for _, y in points)
    high = max(y for points in lines.values() for x, y in points if x >= last / 20)
    pad = 0.06 * (high - low or abs(high) or 1)
    low, high = low - pad, high + pad

    def place(x, y):
        y = min(y, high)
        return f"{left + (width - left - 8) * x / last:.1f}", f"{(height - bottom) * (high - y) / (high - low):.1f}"

    shapes = []
    for y in ticks(low, high):
        _, at = place(0, y)
        shapes.append(f'<line x1="{left}" x2="{width - 8}" y1="{at}" y2="{at}"/>')
        shapes.append(f'<text x="{left - 6}" y="{at}" dy="4" text-anchor="end">{label(y)}</text>')
    for x in ticks(0, last):
        shapes.append(f'<text x="{place(x, 0)[0]}" y="{height - 8}" text-anchor="middle">{label(x)}</text>')
    for name, points in lines.items():
        points = points[:: 1 + len(points) // MOST_POINTS] + points[-1:]
        shapes.append(f'<polyline class="{name}" points="{" ".join(",".join(place(*point)) for point in points)}"/>')
    keys = ", ".join(f'<span class="{name}">{LEGEND[name]}</span>' for name in lines if name in LEGEND)
    return (
        f"<figure><figcaption>{title}{': ' * bool(keys)}{keys}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{"".join(shapes)}</svg></figure>'
    )


def ticks(low, high):
    """Two to six round numbers between two."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    unit *= next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return [i * unit for i in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def label(value):
    """A tick's number: 19k for 19,000."""
    return f"{value / 1000:,.6g}k" if value >= 10_000 else f"{value:.6g}"


def table(names, rows):
    """Rows of texts below their columns' names; without those each row begins with its name."""
    top = f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in names)}</tr>" if names else ""
    first = "td" if names else "th"
    cells = (f"<{first}>{_text(row[0])}</{first}>{''.join(f'<td>{_text(c)}</td>' for c in row[1:])}" for row in rows)
    return f"<div><table>{top}{''.join(f'<tr>{row}</tr>' for row in cells)}</table></div>"


def number(record, name):
    """The number of that name in a record of the log; None where it is none, or not finite."""
    value = record.get(name)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _text(text):
    return html.escape(str(text))
