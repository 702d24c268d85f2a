"""Seconds of evaluate.py's tasks and of lm-eval's own model (hf) on the export; both must find the same figures.

    python tests/measure_evaluation.py FOLDER

makes a model of random weights in an empty folder, 6 layers of 384, and tasks out of Python's own library.
"""

import functools
import json
import logging
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import CheckpointConfig, CheckpointWriter
from convert import export
from interop.harness import HarnessConfig, generate_texts, load_tasks, run_tasks
from interop.pretrained import load_model, load_tokenizer_of, open_model
from interop.score import score_tokens
from model import ModelConfig, Transformer
from run.folder import tokenizer_of
from text.tokenizer import load_tokenizer, train_bpe
from world import World

ALONE = World(0, 1, torch.device("cpu"), "fp32")
TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/NAME.jsonl}, cache_dir: FOLDER/cache}
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
"""
CHOICE = "output_type: multiple_choice\ndoc_to_choice: choices\nmetric_list: [{metric: acc}]\n"
KINDS = {
    "endings": CHOICE,
    "letters": CHOICE,
    "texts": "output_type: loglikelihood_rolling\nmetric_list: [{metric: bits_per_byte}]\n",
    "answers": "output_type: generate_until\ngeneration_kwargs: {until: [ZZZ], max_gen_toks: 64}\n"
    "metric_list: [{metric: chrf}]\n",
}


def write_tasks(folder, words):
    draw = random.Random(1)

    def some(least, most):
        n = draw.randint(least, most)
        start = draw.randrange(len(words) - n)
        return " ".join(words[start : start + n])

    documents = {
        "endings": [
            {"text": some(20, 60), "choices": [some(5, 20) for _ in range(4)], "target": 0} for _ in range(100)
        ],
        "letters": [{"text": some(60, 120), "choices": [*"ABCD"], "target": 0} for _ in range(100)],
        "texts": [{"text": "", "target": some(100, 900)} for _ in range(30)],
        "answers": [{"text": some(20, 120), "target": some(30, 40)} for _ in range(24)],
    }
    for name, kind in KINDS.items():
        (folder / f"{name}.yaml").write_text((TASK + kind).replace("FOLDER", str(folder)).replace("NAME", name))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents[name]))


def write_model(folder, words):
    """A run of random weights, and its export."""
    (run_dir := folder / "run").mkdir()
    train_bpe([" ".join(words)], 4096, run_dir / "tokenizer.json")
    (run_dir / "meta.json").write_text(json.dumps({"tokenizer": "tokenizer.json"}))
    vocab_size = load_tokenizer(tokenizer_of(run_dir)).vocab_size
    model = Transformer(ModelConfig(vocab_size=vocab_size, block_size=512, n_layer=6, n_head=6, n_embd=384))
    model.init_weights(1)
    writer = CheckpointWriter(run_dir, CheckpointConfig(), ALONE)
    writer.save(1, model, None, {})
    writer.wait()
    export(open_model(str(run_dir)), folder / "hf")


def main(folder):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    logging.disable(logging.WARNING)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    words = " ".join(file.read_text(encoding="utf-8", errors="ignore") for file in files).split()
    write_tasks(folder, words)
    write_model(folder, words)
    model, source = load_model(str(folder / "run"), "cpu")
    tokenizer, cfg = load_tokenizer_of(source), HarnessConfig(tasks=tuple(KINDS), include_path=str(folder))
    functions = {
        "score": functools.partial(score_tokens, model),
        "generate": functools.partial(generate_texts, model, tokenizer, world=ALONE),
    }
    for name in KINDS:
        tasks, seconds, found = load_tasks(HarnessConfig(tasks=(name,), include_path=str(folder))), {}, []
        for side in ("evaluate.py", 1, 8) * 2:
            if side == "evaluate.py":
                call = lambda job, requests: functions[job](requests)  # noqa: E731
                run = functools.partial(run_tasks, tasks, cfg, model, tokenizer, call, bootstrap_iters=0)
            else:
                theirs = HFLM(pretrained=str(folder / "hf"), device="cpu", batch_size=side)
                run = functools.partial(evaluate, theirs, tasks, bootstrap_iters=0, log_samples=False)
            start = time.perf_counter()
            found.append(run()["results"][name])
            seconds.setdefault(side, []).append(time.perf_counter() - start)
        figure = next(metric for metric, value in found[0].items() if isinstance(value, float))
        assert all(abs(f[figure] - found[0][figure]) < 1e-5 * abs(found[0][figure]) for f in found), (name, found)
        ours, *others = (min(times) for times in seconds.values())
        print(
            f"{name:<8} evaluate.py {ours:6.2f} s, hf of batches of 1 and 8",
            *(f"{s / ours:.2f} x" for s in others),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
