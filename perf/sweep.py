"""The fastest settings that fit: tries checkpointing x compile x micro-batch, each in a process of its own."""

import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from config import ROOT, UserError, as_dict, as_preset, load
from data import accumulation_steps
from devices import pick_device
from world import processes_here

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "MemoryError", "Cannot allocate memory")
KEYS = ("activation_checkpointing", "compile", "micro_batch_size")
CHECKPOINTING = ("none", "selective", "full")
ROW = "{:<14} {:<7} {:>11} {:>10} {:>11}  {}"


def sweep(given, cfg):
    """Tries settings, prints a row for each, and writes the fastest as a preset; returns the figures.

    given: the settings of the command line; cfg: the same with open ones filled in.
    """
    if processes_here()[1] > 1:
        raise UserError("sweep starts processes itself, one after the other, for one device: run it without torchrun")
    accumulation_steps(cfg.data, cfg.data.seq_len, 1)  # raises where micro_batch_size does not fit
    sizes = sizes_around(cfg.data.micro_batch_size, cfg.data.batch_tokens // cfg.data.seq_len)
    compiles, rows = [bool(cfg.parallel.compile)], []
    if cfg.parallel.compile is None and pick_device(cfg.world.device).type == "cuda":
        compiles = [True, False]
    print(ROW.format("checkpointing", "compile", "micro-batch", "tokens/s", "memory GiB", "").rstrip())
    for checkpointing, compiled in itertools.product(CHECKPOINTING, compiles):
        only_while_faster = compiled != compiles[0]  # the first one finds the largest that fits
        for row in climb(cfg, checkpointing, compiled, sizes, only_while_faster):
            cells = [f"{row['tokens_per_s']:,.0f}", f"{row['memory_gib']:.3f}"] if row["ended"] == "well" else ["", ""]
            setting = (checkpointing, str(compiled).lower(), row["micro_batch_size"])
            print(ROW.format(*setting, *cells, row.get("said", "")).rstrip(), flush=True)
            rows.append(row)
    fitting = [row for row in rows if row["ended"] == "well"]
    if not fitting:
        raise UserError(f"no setting runs; the last one ended with: {rows[-1]['said']}")
    fastest = max(fitting, key=lambda row: row["tokens_per_s"])
    largest = max(fitting, key=lambda row: (row["micro_batch_size"], row["tokens_per_s"]))
    path = write_preset(given, fastest)
    print(f"\nlargest    {described(largest)}\nfastest    {described(fastest)}")
    print(f"written    {path}, a preset for the end of the command:")
    print(f"           {train_command(given, path)}", flush=True)
    return {"rows": rows, "largest": largest, "fastest": fastest, "preset": str(path)}


def sizes_around(start, sequences):
    """Divisors of a step's sequences as micro-batch sizes: each about double the previous one, including start."""
    divisors = [n for n in range(1, sequences + 1) if sequences % n == 0]
    sizes = [start]
    while larger := [n for n in divisors if n >= 2 * sizes[-1]]:
        sizes.append(larger[0])
    while smaller := [n for n in divisors if 2 * n <= sizes[0]]:
        sizes.insert(0, smaller[-1])
    return sizes


def climb(cfg, checkpointing, compiled, sizes, only_while_faster):
    """Yields rows: from the settings' micro-batch upward while it fits, or, if it does not, downward until one does."""
    at, direction, last = sizes.index(cfg.data.micro_batch_size), None, 0
    while 0 <= at < len(sizes):
        row = trial(cfg, dict(zip(KEYS, (checkpointing, compiled, sizes[at]))))
        yield row
        fits, speed = row["ended"] == "well", row.get("tokens_per_s", 0)
        direction = direction or (1 if fits else -1)
        if fits != (direction == 1) or (only_while_faster and speed < last):
            return
        last, at = speed, at + direction


def trial(cfg, setting):
    """A row: bench.py's figures with a setting, or how the attempt ended.

    It takes two micro-steps, if a step has as many: only the second has gradients and activations at once.
    """
    micro_tokens = setting["micro_batch_size"] * cfg.data.seq_len
    micro_steps = cfg.data.batch_tokens // micro_tokens
    seconds = min(cfg.bench.bench_seconds, cfg.bench.sweep_seconds / 10)
    changes = {"batch_tokens": min(2, micro_steps) * micro_tokens, "bench_seconds": seconds}
    with tempfile.TemporaryDirectory() as folder:
        preset, figures = Path(folder, "trial.py"), Path(folder, "figures.json")
        preset.write_text(as_preset(cfg), encoding="utf-8")
        changes |= setting | {"sweep": False, "profile": False, "picture": False, "json": figures}
        flags = [f"--{name}={value}" for name, value in changes.items()]
        command = [sys.executable, str(ROOT / "bench.py"), str(preset), *flags]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=cfg.bench.sweep_seconds)
        except subprocess.TimeoutExpired:
            return setting | {"ended": "late", "said": f"over {cfg.bench.sweep_seconds:g} s"}
        if done.returncode == 0:
            return setting | figures_of(json.loads(figures.read_text(encoding="utf-8")), micro_steps)
    if done.returncode == -9 or any(words in done.stderr for words in OUT_OF_MEMORY):  # -9: killed by the kernel
        return setting | {"ended": "out of memory", "said": "out of memory"}
    said = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    return setting | {"ended": "in error", "said": said[-1]}


def figures_of(figures, micro_steps):
    """A row's figures from a trial's; tokens/s count a whole step, with one optimizer step."""
    step_s, timed, share = figures["step_ms"] / 1e3, figures["micro_steps"], figures["time_share"]
    whole_s = step_s * (share["optimizer"] + (1 - share["optimizer"]) * micro_steps / timed)
    return {
        "ended": "well",
        "tokens_per_s": figures["tokens_per_s"] * step_s / timed * micro_steps / whole_s,
        "memory_gib": figures["memory_gib"]["total"],
    }


def described(row):
    """A row's settings and figures as text."""
    flags = " ".join(f"--{key}={str(row[key]).lower()}" for key in KEYS)
    return f"{flags}: {row['tokens_per_s']:,.0f} tokens/s, {row['memory_gib']:.3f} GiB"


def write_preset(cfg, row):
    """Writes a row's settings as a preset; returns its path. It keeps the last preset's name, which names the run."""
    path = Path("out/sweep") / f"{Path(cfg.presets[-1]).stem if cfg.presets else 'run'}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# The fastest that fits, by bench.py --sweep: {described(row)}"]
    lines += [f"{key} = {row[key]!r}" for key in KEYS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train_command(cfg, path):
    """The command that trains with this command's presets and settings, and another preset after them."""
    by_presets = as_dict(load(type(cfg), cfg.presets))
    others = {*vars(cfg.bench), *vars(cfg.output), *KEYS}
    changed = {k: v for k, v in as_dict(cfg).items() if v != by_presets[k] and k not in others}
    flags = [f"--{k}={str(v).lower() if v is None or isinstance(v, bool) else v}" for k, v in changed.items()]
    return shlex.join(["python", "train.py", *cfg.presets, os.fspath(path), *flags])
