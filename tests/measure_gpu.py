"""Measures on one GPU what docs/results.md says of speed there, beside nanoGPT's code, and prints it as Markdown.

    git clone https://github.com/karpathy/nanoGPT
    python tests/measure_gpu.py nanoGPT
    python tests/measure_gpu.py --tiny              # tiny shapes on a CPU, to see that this script works

Both projects train the same shape at the same batch, compiled, in bf16, with clipping and fused AdamW. They take turns,
each in a process of its own; a figure is the median over rounds, a ratio the median of the rounds' ratios.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from peer_nanogpt import GPT2, ROOT, in_own_process, run, their_timed_step, tokens_per_s, write_their_data

CHAR = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 256, "dropout": 0.2}
WORK = {  # name: (work, our script and settings, nanoGPT's model or None, its (sequences, micro-steps), goal)
    "124m": ("GPT-2 124M, 8 x 16 x 1024", "bench.py config/gpt2_124m.py --batch_tokens=131072", GPT2, (16, 8),
             "1.12 x nanoGPT, at most 9 GiB"),
    "char": ("6 x 384, 64 x 256, vocabulary 256", "train.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 "
             "--vocab_size=256 --dropout=0.2 --micro_batch_size=64 --batch_tokens=16384", CHAR, (64, 1),
             "2.2 x nanoGPT (6.5 ms)"),
    "1558m": ("GPT-2 1558M, 2 x 8 x 1024", "bench.py config/gpt2_1558m.py --batch_tokens=16384", None, (),
              "47 k tokens/s, 49 % MFU"),
    "modern": ("modern_124m with Muon, 8 x 16 x 1024", "bench.py config/modern_124m.py --batch_tokens=131072", None, (),
               "0.92 of GPT-2 124M's MFU"),
    "bert": ("BERT base, length 128, its preset", "bench.py config/bert_base.py", None, (), "600 k tokens/s, 33 % MFU"),
}  # fmt: skip
GENERATION = {1: "1,300 tokens/s", 16: "16,000 tokens/s", 64: "38,000 tokens/s"}  # goals by batch
KNOWN = (*WORK, "generation", "start", "waits", "profile")
TINY_MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 64}
TINY = [f"--{name}={value}" for name, value in TINY_MODEL.items()]
TINY += "--n_kv_head=none --n_inner=64 --seq_len=16 --micro_batch_size=2 --batch_tokens=64".split()
TINY += ["--device=cpu", "--compile=false"]


def our_step(command, folder, data, tiny):
    """{tokens_per_s, mfu, memory_gib} of train.py's step: by bench.py, or by the log of a run of train.py."""
    script, *settings = command.split()
    if script == "bench.py":
        run([ROOT / script, *settings, *tiny, "--picture=false", "--json=figures.json"], folder)
        f = json.loads((folder / "figures.json").read_text())
        return {"tokens_per_s": f["tokens_per_s"], "mfu": f["mfu"], "memory_gib": f["peak_memory_gib"]}
    out_dir, max_steps, log_interval = folder / f"run_{time.time_ns()}", *((8, 2) if tiny else (300, 10))
    run([ROOT / script, *with_run([*settings, *tiny], out_dir, data, max_steps, log_interval=log_interval)], folder)
    later = log_of(out_dir)[2:]  # after compiling
    return {name: statistics.median(r[name] for r in later) for name in ("tokens_per_s", "mfu", "memory_gib")}


def with_run(settings, out_dir, data, max_steps, **others):
    """The settings and those that make a run of train.py short."""
    names = {"data_dir": data, "out_dir": out_dir, "max_steps": max_steps, "save_interval": "none"} | others
    return [*settings, *(f"--{name}={value}" for name, value in names.items())]


def log_of(out_dir):
    """The records of training in a run's log."""
    return [record for line in (out_dir / "log.jsonl").open() if "tokens_per_s" in (record := json.loads(line))]


def seconds_to_first_step(folder, settings, data):
    """Seconds from train.py's command to its first step, at a first start and at a second one of the same command."""
    found, env = [], os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    for name in ("first", "second"):
        command = [sys.executable, ROOT / "train.py", *with_run(settings, folder / name, data, 2, log_interval=1)]
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as process:
            found += [time.perf_counter() - start for line in process.stdout if re.match(r"step +1\b", line)]
        assert process.returncode == 0, f"{command} failed"
    return found


def waits_of_the_loop(folder, settings, data, max_steps):
    """{what: median milliseconds that a run of train.py spends in it}: the loader, the log, each checkpoint."""
    sys.path.insert(0, str(ROOT))
    import config
    import train
    from run.log import Log
    from run.resume import Saver

    def timed(function, times):
        def wrapped(*args):
            start = time.perf_counter()
            function(*args)
            times.append(1e3 * (time.perf_counter() - start))

        return wrapped

    spent, out_dir = {"log": [], "checkpoint": []}, folder / "waits"
    Log.step, Saver.save = timed(Log.step, spent["log"]), timed(Saver.save, spent["checkpoint"])
    with contextlib.redirect_stdout(None):
        settings = with_run(settings, out_dir, data, max_steps, save_interval=max_steps // 3, log_interval=3)
        train.main(config.load(train.Settings, settings))
    spent["loader"] = [record["data_wait_ms"] for record in log_of(out_dir)]
    return {what: statistics.median(times) for what, times in spent.items()}


def dearest_kernels(folder, settings, device):
    """[(kernel, milliseconds a step)], the ten dearest in the two steps that bench.py --profile traces."""
    run([ROOT / "bench.py", *settings, "--bench_steps=3", "--picture=false", "--profile"], folder)
    spent, kind = Counter(), "kernel" if device == "cuda" else "cpu_op"
    for event in json.loads((folder / "trace.json").read_text())["traceEvents"]:
        if event.get("cat") == kind:
            spent[event["name"]] += event["dur"] / 2e3
    return spent.most_common(10)


def table_row(work, pairs, goal, command):
    """Prints a row of the table. pairs: for each round nanoGPT's figures and ours."""

    def cell(side, name, form):
        values = [pair[side][name] for pair in pairs if pair[side].get(name) is not None]
        return format(statistics.median(values), form) if values else ""

    ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for theirs, ours in pairs if theirs]
    cells = [work, cell(0, "tokens_per_s", ",.0f"), cell(1, "tokens_per_s", ",.0f")]
    cells += [f"{statistics.median(ratios):.2f}" if ratios else "", cell(1, "mfu", ".1%")]
    cells += [cell(0, "memory_gib", ".1f"), cell(1, "memory_gib", ".1f"), goal, f"`python {command}`"]
    print(f"| {' | '.join(cells)} |", flush=True)


def measure(names, theirs, folder, rounds, tiny):
    """Prints the tables of the named works and parts. theirs: nanoGPT's folder or None."""
    device, settings, sizes = ("cpu", TINY, (64, 20_000)) if tiny else ("cuda", [], (256, 20_000_000))
    tokens, data = np.random.default_rng(0).integers(sizes[0], size=sizes[1]), folder / "tokens"  # ids do not matter
    write_their_data(data, tokens, tokens[:16_384], sizes[0])
    if tiny:
        print("Tiny shapes on a CPU: the figures mean nothing.\n")
    print("| work | nanoGPT, tokens/s | flatlm, tokens/s | ratio | MFU | nanoGPT, GiB | flatlm, GiB | goal | command |")
    print(f"|{9 * '---|'}")
    for work, command, shape, batch, goal in [WORK[name] for name in WORK if name in names]:
        step, pairs = (TINY_MODEL, 2, 2, device, 3) if tiny else (shape, *batch, device, 20), []
        for _ in range(rounds):
            them = in_own_process(their_timed_step, theirs, *step) if theirs and shape else {}
            pairs.append((them, our_step(command, folder, data, settings)))
        table_row(work, pairs, goal, command)
    for batch, goal in GENERATION.items() if "generation" in names else ():
        args, pairs = ((TINY_MODEL, batch, 8, device) if tiny else (GPT2, batch, 256, device)), []
        for _ in range(rounds):
            them = {"tokens_per_s": in_own_process(tokens_per_s, theirs, *args)} if theirs else {}
            pairs.append((them, {"tokens_per_s": in_own_process(tokens_per_s, None, *args)}))
        table_row(f"generation, GPT-2 124M, batch {batch}", pairs, goal, "tests/measure_gpu.py nanoGPT")
    gpt2 = ["config/gpt2_124m.py", "--batch_tokens=131072", *settings]
    if "start" in names:
        first, second = seconds_to_first_step(folder, gpt2, data)
        print(f"\nGPT-2 124M, command to first step: {first:.1f} s, again {second:.1f} s (goal 15 s).", flush=True)
    if "waits" in names:
        waits = in_own_process(waits_of_the_loop, folder, gpt2, data, 9 if tiny else 60)
        text = ", ".join(f"{ms:.2f} ms {what}" for what, ms in waits.items())
        print(f"\nGPT-2 124M's loop waits, a step or a checkpoint: {text} (goal 0 for loader and log).", flush=True)
    if "profile" in names:
        print("\n| kernel, GPT-2 124M | ms a step |\n|---|---|")
        for name, ms in dearest_kernels(folder, gpt2, device):
            print(f"| `{name[:90]}` | {ms:.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, nargs="?", help="folder of nanoGPT; without it, this project alone")
    parser.add_argument("--only", default=",".join(KNOWN), help="names, with commas; all: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each comparison")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    args = parser.parse_args()
    if args.nanogpt and not (args.nanogpt / "model.py").exists():
        parser.error(f"{args.nanogpt} is not nanoGPT's folder; clone it first")
    if wrong := set(args.only.split(",")) - set(KNOWN):
        parser.error(f"{', '.join(sorted(wrong))}: --only takes {', '.join(KNOWN)}")
    with tempfile.TemporaryDirectory() as folder:
        measure(args.only.split(","), args.nanogpt and args.nanogpt.resolve(), Path(folder), args.rounds, args.tiny)


if __name__ == "__main__":
    main()
