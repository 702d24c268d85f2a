"""A budget's plan keeps to its tokens, hours and memory; its learning rate is near the best of the grids measured."""

import csv
import math
import os
from dataclasses import replace

import numpy as np
import pytest

import config
import plan
import train
from conftest import ROOT
from measure_learning_rates import FITTED, OTHER_TEXTS, best_rate, fitted, read
from perf import budget
from perf.settings import read_json
from ranks import records, write_data

LOSSES = read(ROOT / "tests/learning_rates.csv")


def planned(*args):
    """(settings of the preset, its text, what plan.py printed) of a budget; the preset lies in the current folder."""
    plan.main(config.load(plan.Settings, [*args, "--preset=found.py"]))
    return config.load(train.Settings, ["found.py"]), open("found.py", encoding="utf-8").read()


@pytest.fixture
def here(tmp_path, monkeypatch, no_curves):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rate_of(width, n_layer, batch_tokens, steps):
    """(learning rate, its source) by the guidance."""
    args = [f"--n_embd={width}", f"--n_layer={n_layer}", "--n_head=1", f"--batch_tokens={batch_tokens}"]
    return budget.learning_rate(config.load(plan.Settings, [*args, "--vocab_size=261"]), steps)


def test_constants_are_the_fit_to_the_measured_grid():
    center, exponents = fitted({setting: best_rate(LOSSES, setting) for setting in FITTED})
    assert center == pytest.approx(budget.RATE_AT_CENTER, rel=0.02)
    assert exponents == pytest.approx(list(budget.EXPONENTS.values()), abs=0.01)
    for i, name in enumerate(budget.MEASURED, start=1):
        values = [setting[i] for setting in FITTED]
        assert budget.MEASURED[name] == (min(values), max(values))


@pytest.mark.parametrize("setting", OTHER_TEXTS, ids=str)
def test_rate_is_near_the_best_of_a_grid_on_text_that_the_fit_has_not_seen(setting):
    """By the fit to the other three texts."""
    center, exponents = fitted({other: best_rate(LOSSES, other) for other in FITTED if other[0] != setting[0]})
    sizes = zip(setting[1:], budget.CENTER.values(), exponents)
    ratio = center * math.prod((size / middle) ** power for size, middle, power in sizes) / best_rate(LOSSES, setting)
    print(setting, f"the fit to other texts over the best rate: {ratio:.2f}")
    assert 1 / 1.5 <= ratio <= 1.5


def test_step_law_is_near_the_best_of_a_published_grid_where_it_is_used():
    with open(ROOT / "tests/published_rates.csv", newline="", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if k != "source"} for row in csv.DictReader(file)]
    used = [row for row in rows if budget.FROM_STEP_LAW <= row["block_weights"] <= budget.TO_STEP_LAW * 1.001]
    ratios = [1.79 * r["block_weights"] ** -0.713 * r["tokens"] ** 0.307 / r["learning_rate"] for r in used]
    assert len(used) == 18 and 1 / 2.2 < min(ratios) < max(ratios) < 1.5
    batches = [0.58 * row["tokens"] ** 0.571 / row["batch_tokens"] for row in used]
    assert 1 / 3 < min(batches) < max(batches) < 1


def test_rate_and_its_source_change_without_a_jump_from_small_models_to_large():
    rates, sources = [], []
    for width in np.geomspace(64, 8192, 100).astype(int):
        rate, source = rate_of(width, 8, 65536, 2000)
        rates.append(rate)
        sources.append(source)
    assert max(abs(np.diff(np.log(rates)))) < 0.3
    for text in (budget.FIT, budget.STEP_LAW, budget.TABLE, "not measured at this size", "held at the end"):
        assert any(text in source for source in sources)


@pytest.mark.parametrize(
    "args", ["--gpu=rtx4090 --hours=24", "--gpu=t4 --hours=0.5 --n_gpus=2", "--gpu=rtx4090 --tokens=1e9 --hours=24"]
)
def test_run_keeps_to_its_budget_and_to_twenty_tokens_a_parameter(args, here, capsys):
    cfg, _ = planned(*args.split(), "--json=f.json")
    f, asked = read_json("f.json", ""), config.load(plan.Settings, args.split()).plan
    tokens = cfg.optim.max_steps * cfg.data.batch_tokens
    assert 24 * f["days"] <= asked.hours and tokens == f["tokens"]
    if asked.tokens:
        assert asked.tokens - cfg.data.batch_tokens < tokens <= asked.tokens
    else:
        assert 24 * f["days"] > 0.9 * asked.hours
    assert 12 < tokens / f["n_params"] < 32 and f["fits"]
    assert cfg.model.n_embd == 64 * cfg.model.n_layer
    out = capsys.readouterr().out
    assert all(name in out for name in ("answer", "size", "batch", "rate", "arXiv", "found.py"))


def test_preset_for_own_text_trains_at_once(here, capsys):
    write_data("data", train_tokens=9000, val_tokens=600)
    cfg, text = planned("--gpu=rtx4090", "--data_dir=data", "--bias=false")
    tokens = cfg.optim.max_steps * cfg.data.batch_tokens
    assert 15 < tokens / 9000 <= 16 and cfg.model.bias is False and text.startswith("# answer")
    train.main(config.load(train.Settings, ["found.py", "--max_steps=2", "--warmup_steps=0", "--device=cpu"]))
    assert 2 in records("out/found", "val_loss")


def test_more_text_is_read_less_often_by_a_larger_model(here):
    sizes = []
    for n in (250_000, 250_002, 3_000_000):
        write_data(f"data{n}", train_tokens=n, val_tokens=600, shard_tokens=n)
        cfg = config.load(plan.Settings, ["--gpu=rtx4090", f"--data_dir=data{n}", "--preset=a.py"])
        plan.main(replace(cfg, output=replace(cfg.output, json=f"{n}.json")))
        os.remove("a.py")
        f = read_json(f"{n}.json", "")
        assert f["tokens"] / n == pytest.approx(16 if n == 250_000 else 4, rel=0.03)
        sizes.append(f["n_params"])
    assert sizes[1] < sizes[0] < sizes[2]


def test_sixteen_epochs_of_short_texts_are_better_than_four_and_four_than_one():
    for corpus in ("shakespeare", "wikitext", "sst2"):
        losses = [LOSSES[f"{corpus}_50k", 64, 4, 512, round(n * 50_000 / 512)][4e-3] for n in (1, 4, 16)]
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    "args, text",
    [
        ("--gpu=t4 --hours=0", "hours is 0"),
        ("--tokens=1e9", "add --gpu=NAME"),
        ("--gpu=t4 --hours=1 --data_dir=nope", "data_dir nope does not exist; make it: python prepare.py"),
        ("--gpu=t4 --tokens=63", "tokens is 63, fewer than"),
        ("--gpu=t4 --preset=a.py", "add --tokens, --hours or --data_dir"),
        ("--gpu=t4 --hours=1 --preset=taken.py", "preset is taken.py; it must name a new .py file"),
        ("--gpu=t4 --hours=1 --search", "search is on"),
        ("--gpu=t4 --hours=1 --objective=mlm", "objective is mlm"),
        ("--gpu=t4 --hours=1e-9", "hours is 1e-09, too few"),
        ("--gpu=other --gpu_tflops=1 --gpu_memory_gbs=1 --gpu_memory_gib=1.01 --hours=1", "even one layer does not fit"),
    ],
)
def test_wrong_budget_is_one_line(args, text, here):
    (here / "taken.py").write_text("kept = 1\n")
    with pytest.raises(config.UserError) as error:
        plan.main(config.load(plan.Settings, args.split()))
    assert len(error.value.args) == 1 and text in error.value.args[0]
    assert (here / "taken.py").read_text() == "kept = 1\n"
