"""Measures this project and nanoGPT's code on one machine: speed, memory, time to a loss, generation.

    git clone https://github.com/karpathy/nanoGPT
    python tests/peer_nanogpt.py nanoGPT --text=tinyshakespeare.txt
    python tests/peer_nanogpt.py nanoGPT --only=step --rounds=1

Both take turns, each run in a process of its own, on the CPU; a figure is the median over rounds, a ratio the median of
the rounds' ratios. Steps run eager and compiled, and the faster of the two counts on either side. nanoGPT, which runs
from a copy of its folder, has float32 alone on a CPU; this project chooses its precision itself.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}  # of nanoGPT's README, for CPUs
GPT2 = {"vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
MIDDLE = {"n_layer": 6, "n_head": 6, "n_embd": 384}
SHAPES = {  # name: (model, sequences a step, steps of nanoGPT to time)
    "a": (SMALL, 12, 200),
    "b": (MIDDLE | {"vocab_size": 65, "block_size": 256}, 8, 15),
    "c": (MIDDLE | {"vocab_size": 50257, "block_size": 512}, 4, 10),
}
DOCUMENTED = (  # the command of nanoGPT's README for a CPU
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0"
)


def run(arguments, folder):
    """(output, seconds, peak MiB) of Python in a folder; RuntimeError with the last lines if it fails."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read().decode(errors="replace")
    if status:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed:\n{text[-2000:]}")
    return text, seconds, usage.ru_maxrss / 1024


def in_own_process(function, *arguments):
    """What a function of this file returns in a fresh process; the two projects' modules have the same names."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def row(name, unit, theirs, ours, more_is_better=True):
    """Prints a line of the table from the rounds' figures."""
    ratios = [o / t if more_is_better else t / o for o, t in zip(ours, theirs)]
    theirs, ours = statistics.median(theirs), statistics.median(ours)
    print(f"| {name} | {theirs:,.4g} {unit} | {ours:,.4g} {unit} | {statistics.median(ratios):.2f} |", flush=True)


# ---- a step


def their_step(theirs, shape, compiled):
    """(median ms, peak MiB) of nanoGPT's training loop on random tokens; endless where compile does not work."""
    model, batch, steps = SHAPES[shape]
    sizes = {name: model[name] for name in ("n_layer", "n_head", "n_embd", "block_size")} | {"batch_size": batch}
    command = (
        ["train.py", *(f"--{name}={value}" for name, value in sizes.items()), f"--dataset=random_{shape}",
         "--device=cpu", "--dtype=float32", f"--compile={compiled}", "--gradient_accumulation_steps=1",
         "--eval_iters=1", "--eval_interval=1000000", f"--max_iters={steps}"]
    )  # fmt: skip
    try:
        text, _, memory = run(command, theirs)
    except RuntimeError:
        if not compiled:
            raise
        return float("inf"), float("inf")
    times = [float(ms) for ms in re.findall(r"^iter \d+:.* time ([\d.]+)ms", text, re.M)]
    return statistics.median(times[5:]), memory


def their_timed_step(folder, shape, batch, micro_steps, device, steps):
    """{tokens_per_s, memory_gib} of a step of nanoGPT's model, its loop written anew: micro-steps, clipping, AdamW."""
    sys.path.insert(0, str(folder))
    import torch

    from model import GPT, GPTConfig

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    padded, T = -(-shape["vocab_size"] // 64) * 64, shape["block_size"]  # as its train.py pads GPT-2's vocabulary
    with contextlib.redirect_stdout(None):
        model = GPT(GPTConfig(**{"dropout": 0.0, "bias": True} | shape | {"vocab_size": padded})).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    loss_of = torch.compile(model) if device == "cuda" else model
    (ids, targets), times = torch.randint(shape["vocab_size"], (2, batch, T), device=device), []
    for _ in range(steps + 3):
        start = time.perf_counter()
        for _ in range(micro_steps):
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(ids, targets)[1] / micro_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {"tokens_per_s": micro_steps * batch * T / statistics.median(times[3:]), "memory_gib": gib}


def our_step(theirs, shape, compiled, folder):
    """(median ms, peak MiB, MFU, peak TFLOP/s) of train.py's own step on the same tokens, as bench.py times it."""
    model, batch, steps = SHAPES[shape]
    tokens = batch * model["block_size"]
    figures = folder / "bench.json"
    _, _, memory = run(
        ["bench.py", *(f"--{name}={value}" for name, value in model.items()), "--bias=false", "--mlp=gelu",
         f"--micro_batch_size={batch}", f"--batch_tokens={tokens}", f"--bench_steps={steps}", f"--compile={compiled}",
         "--real_data=true", f"--data_dir={theirs / f'data/random_{shape}'}", f"--json={figures}"],
        ROOT,
    )  # fmt: skip
    figures = json.loads(figures.read_text())
    return figures["step_ms"], memory, figures["mfu"], figures["peak_tflops"]


def compare_steps(theirs, folder, rounds):
    """Speed and memory of a training step at three shapes."""
    for shape, (model, batch, _) in SHAPES.items():
        tokens = np.random.default_rng(0).integers(model["vocab_size"], size=300_000).astype(np.uint16)
        write_their_data(theirs / f"data/random_{shape}", tokens, tokens, model["vocab_size"])
        pairs = []
        for _ in range(rounds):
            runs = [
                (their_step(theirs, shape, compiled), our_step(theirs, shape, compiled, folder))
                for compiled in (False, True)
            ]
            pairs.append([min(ways) for ways in zip(*runs)])
        name = f"({shape}) {model['n_layer']} x {model['n_embd']}, {batch} x {model['block_size']} tokens, "
        name += f"vocabulary {model['vocab_size']:,}"
        thousands = batch * model["block_size"]  # tokens a step, over ms: thousands of tokens a second
        row(name, "k tokens/s", *([thousands / side[0] for side in sides] for sides in zip(*pairs)))
        row(f"({shape}) peak memory of the process", "MiB", *([side[1] for side in sides] for sides in zip(*pairs)),
            more_is_better=False)  # fmt: skip
        mfu, peak = (statistics.median(ours[i] for _, ours in pairs) for i in (2, 3))
        print(f"| ({shape}) MFU of a measured {peak:.3g} TFLOP/s | | {mfu:.1%} | |", flush=True)


def write_their_data(folder, train, val, vocab_size):
    """A data set as nanoGPT reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tokens in (("train", train), ("val", val)):
        (folder / f"{name}.bin").write_bytes(tokens.astype(np.uint16).tobytes())
    if vocab_size < 50257:  # else it takes GPT-2's, rounded up
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


# ---- the head


def head_growth(theirs, N=2048, C=384, V=50304):
    """MiB by which a process grows in forward and backward of the head alone, beside weights and their gradients."""
    sys.path.insert(0, str(theirs or ROOT))
    import torch

    if theirs:
        from model import GPT, GPTConfig

        def prepared(V):
            with contextlib.redirect_stdout(None):
                model = GPT(GPTConfig(n_layer=0, n_embd=C, n_head=1, vocab_size=V, block_size=512, dropout=0.0))
            return list(model.parameters()), model

        def step(model):
            ids = torch.zeros(N // 512, 512, dtype=torch.long)
            model(ids, ids)[1].backward()
    else:
        from devices import keep_freed_memory
        from ops import Vocabulary, linear_cross_entropy

        keep_freed_memory()

        def prepared(V):
            weight, hidden = torch.nn.Parameter(torch.randn(V, C)), torch.randn(N, C, requires_grad=True)
            return [weight, hidden], (hidden, weight, torch.zeros(N, dtype=torch.long), Vocabulary(V))

        def step(arguments):
            with torch.autocast("cpu", torch.bfloat16):
                linear_cross_entropy(*arguments).backward()

    for vocabulary in (64, V):  # the small one loads what is loaded but once
        parameters, model = prepared(vocabulary)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(model)
        step(model)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def compare_heads(theirs, folder, rounds):
    """Memory of the head and its loss."""
    pairs = [(in_own_process(head_growth, theirs), in_own_process(head_growth, None)) for _ in range(rounds)]
    row("memory of the head, 2,048 tokens, 384 wide, vocabulary 50,304", "MiB", *zip(*pairs), more_is_better=False)


# ---- time to a loss


def their_loss(theirs):
    """Loss of nanoGPT's checkpoint over the whole validation split, in windows of its block_size end to end."""
    sys.path.insert(0, str(theirs))
    import torch

    from model import GPT, GPTConfig

    checkpoint = torch.load(theirs / "out-shakespeare-char/ckpt.pt")
    with contextlib.redirect_stdout(None):
        model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    data = torch.from_numpy(np.fromfile(theirs / "data/shakespeare_char/val.bin", np.uint16).astype(np.int64))
    T = checkpoint["model_args"]["block_size"]
    n = (len(data) - 1) // T * T
    ids, targets = data[:n].view(-1, T), data[1 : n + 1].view(-1, T)
    with torch.no_grad():
        return model.eval()(ids, targets)[1].item()


def compare_time_to_loss(theirs, folder, seeds, text):
    """Seconds of the whole process to the loss where nanoGPT's documented run on a CPU ends."""
    characters = text.read_text(encoding="utf-8")
    id_of = {c: i for i, c in enumerate(sorted(set(characters)))}
    ids, cut = np.array([id_of[c] for c in characters]), int(0.9 * len(characters))
    write_their_data(theirs / "data/shakespeare_char", ids[:cut], ids[cut:], len(id_of))
    data = folder / "data"
    run(["prepare.py", f"--input={text}", "--tokenizer=byte", "--val_fraction=0.1", f"--data_dir={data}"], ROOT)
    pairs, losses = [], []
    for seed in range(seeds):
        _, their_seconds, _ = run(DOCUMENTED.split(), theirs)
        out_dir = folder / f"speedrun_{seed}"
        command = ["train.py", "config/speedrun_cpu.py", "--target_loss=1.898", f"--seed={seed}"]
        _, seconds, _ = run([*command, f"--data_dir={data}", f"--out_dir={out_dir}"], ROOT)
        pairs.append((their_seconds, seconds))
        losses.append([json.loads(line).get("val_loss") for line in (out_dir / "log.jsonl").open()][-1])
        if losses[-1] > 1.898:
            sys.exit(f"seed {seed} ended at {losses[-1]:.4f}, above 1.898")
    row(f"time to a loss of 1.898, tiny Shakespeare, {seeds} seeds", "s", *zip(*pairs), more_is_better=False)
    slowest = max(seconds for _, seconds in pairs)
    print(f"| its slowest seed | | {slowest:.2f} s | {min(t / o for t, o in pairs):.2f} |")
    loss = in_own_process(their_loss, theirs)
    print(f"| validation loss at the end, the worst seed | {loss:.4f} | {max(losses):.4f} | |")


# ---- generation


def tokens_per_s(theirs, shape, batch, new, device="cpu"):
    """Tokens a second of generation from one token, all sequences together; random weights take as long as others.

    Past block_size nanoGPT moves its context by a token each time, this project by half of it.
    """
    sys.path.insert(0, str(theirs or ROOT))
    import torch

    prompt = torch.zeros(batch, 1, dtype=torch.long, device=device)
    if theirs:
        from model import GPT, GPTConfig

        with contextlib.redirect_stdout(None):
            model = GPT(GPTConfig(**shape, dropout=0.0, bias=False)).to(device).eval()

        def generate(new):
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                model.generate(prompt, new, temperature=0.8, top_k=200).tolist()
    else:
        from generation import GenerationConfig
        from generation import generate as tokens_of
        from model import ModelConfig, Transformer
        from sample import generation_dtype

        model = Transformer(ModelConfig(**shape, bias=False, mlp="gelu")).eval()
        model.init_weights(1)
        model.to(device, generation_dtype("auto", torch.device(device), model.num_params()))

        def generate(new):
            cfg = GenerationConfig(max_new_tokens=new, temperature=0.8, top_k=200)
            for tokens in tokens_of(model, prompt, cfg, 1, shape["vocab_size"]):
                tokens.tolist()

    generate(4)
    start = time.perf_counter()
    generate(new)
    return batch * new / (time.perf_counter() - start)


def compare_generation(theirs, folder, rounds):
    """Generation by a small model and by GPT-2 124M, alone and in a batch."""
    for name, shape, batch, new in (
        ("4 x 128", SMALL, 1, 512),
        ("4 x 128", SMALL, 8, 512),
        ("GPT-2 124M", GPT2, 1, 512),
        ("GPT-2 124M", GPT2, 8, 256),
    ):
        times = rounds if shape is SMALL else 1
        pairs = [
            [in_own_process(tokens_per_s, side, shape, batch, new) for side in (theirs, None)] for _ in range(times)
        ]
        row(f"generation, {name}, {batch} x {new} new tokens", "tokens/s", *zip(*pairs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, help="folder of nanoGPT")
    parser.add_argument("--text", type=Path, help="tiny Shakespeare; if not given, where nanoGPT's prepare.py puts it")
    parser.add_argument("--only", choices=["step", "head", "loss", "sample"], help="this part alone")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each comparison")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the time to a loss")
    args = parser.parse_args()
    text = (args.text or args.nanogpt / "data/shakespeare_char/input.txt").resolve()
    if not (args.nanogpt / "configurator.py").exists():
        parser.error(f"{args.nanogpt} is not nanoGPT's folder; clone it first")
    if args.only in (None, "loss") and not text.exists():
        parser.error(f"{text} does not exist; give tiny Shakespeare by --text=")
    print("| what | nanoGPT | flatlm | times better |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        theirs = Path(shutil.copytree(args.nanogpt, folder / "nanogpt", ignore=shutil.ignore_patterns(".git", "*.pkl")))
        parts = {
            "step": lambda: compare_steps(theirs, folder, args.rounds),
            "head": lambda: compare_heads(theirs, folder, args.rounds),
            "loss": lambda: compare_time_to_loss(theirs, folder, args.seeds, text),
            "sample": lambda: compare_generation(theirs, folder, args.rounds),
        }
        for name, part in parts.items():
            if args.only in (None, name):
                part()


if __name__ == "__main__":
    main()
