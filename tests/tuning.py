"""Small fine-tuning runs: a BERT with a tokenizer, data for each task, and a run's settings and figures."""

import json

import numpy as np
import torch

import config
import finetune
from checkpoint import checkpoints
from hugging_face import V, saved
from interop.pretrained import RunModel
from ranks import records, without_matplotlib

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["good", "bad", "film", "plot", "the", "a", "is", "was", "very", "not"]
# Settings of each task for the data of write_tables
TASKS = {
    "classify": {},
    "regress": {"task": "regress"},
    "tag": {"task": "tag", "text_column": "words", "label_column": "tags"},
    "qa": {"task": "qa", "text_column": "question", "second_column": "context", "label_column": "answers", "stride": 4},
}


def small_bert(folder):
    """Writes a small BERT with a tokenizer into a folder."""
    saved("bert", folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS]
    tokens = list(dict.fromkeys(tokens))
    tokens += [f"[unused{i}]" for i in range(V - len(tokens))]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder


def write_tables(folder):
    """Writes sentences that are good or bad, such with tags, and questions, for training and evaluation, into a folder."""
    random = np.random.default_rng(2)
    for name, n in (("train", 22), ("dev", 9)):
        labels = random.integers(0, 2, n)
        lines = [f"{' '.join(random.choice(WORDS[2:], random.integers(1, 9)))} {WORDS[y]}\t{y}" for y in labels]
        (folder / f"{name}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
        records = [{"words": words, "tags": [tag_of(word) for word in words]}
                   for words in (line.split("\t")[0].split() for line in lines)]  # fmt: skip
        write_records(folder / f"{name}_tag.jsonl", records)
        write_records(folder / f"{name}_qa.jsonl", [question(random, i) for i in range(n)])
    return folder


def question(random, i):
    """A record with a question, whose answer stands in the context; but for every fourth one."""
    before, after = (random.choice(WORDS[4:], random.integers(1, 16)).tolist() for _ in range(2))
    answer = "good film" if i % 2 else "bad plot"
    answers = (
        {"text": [answer], "answer_start": [len(" ".join([*before, ""]))]}
        if i % 4
        else {"text": [], "answer_start": []}
    )
    context = " ".join([*before, *([answer] if i % 4 else []), *after])
    return {"question": answer.split()[1], "context": context, "answers": answers}


def tag_of(word):
    """The tag of a word in write_tables' sentences."""
    return {"film": "B-X", "plot": "B-Y", "very": "I-Y", "good": "I-X"}.get(word, "O")


def write_records(path, records):
    """Writes a .jsonl file; returns its path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def settings(folder, tables, out_dir, **changes):
    """The settings of a run on write_tables' data."""
    task = changes.get("task", "classify")
    ending = ".tsv" if task in ("classify", "regress") else f"_{task}.jsonl"
    names = {"init_from": folder, "train_file": tables / f"train{ending}", "eval_file": tables / f"dev{ending}",
             "out_dir": out_dir, "batch_examples": 4, "micro_batch_size": 1, "learning_rate": 1e-3, "device": "cpu",
             "precision": "fp32", "max_steps": 8, "schedule": "constant", "warmup_steps": 1, "log_interval": 1,
             "eval_interval": 4} | TASKS[task] | changes  # fmt: skip
    return config.load(finetune.Settings, [f"--{name}={value}" for name, value in names.items()])


def tune(*args, **changes):
    with without_matplotlib():
        finetune.main(settings(*args, **changes))


def losses(*args, **changes):
    """Losses by step, and a weight in the end."""
    tune(*args, **changes)
    return records(args[2], "loss"), RunModel(args[2]).read("classifier.weight")


def losses_on_rank(folder, tables, out_dir, changes):
    found, weight = losses(folder, tables, out_dir, **changes)
    return found, weight.tolist()


def tensors(run_dir):
    """{name: tensor} of a run's newest checkpoint."""
    from safetensors.torch import load_file

    files = sorted(checkpoints(run_dir)[-1].glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def check_same_run(whole, parts):
    """Two runs have the same tensors and losses, to the bit."""
    ours, theirs = tensors(whole), tensors(parts)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert records(whole) == records(parts)


def predictions(run_dir):
    """A run's predictions, in order."""
    return [json.loads(line)["prediction"] for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
