"""Whole runs: what they leave behind, and that they go on exactly where they were stopped, however they were."""

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import config
import train
from checkpoint import checkpoints, load_checkpoint, newest_checkpoint, read_manifest
from conftest import slow
from data import Split
from interop.pretrained import load_model
from interop.score import loglikelihood_rolling
from model import ModelConfig, Transformer
from objective import IGNORE, Masked
from optim import OptimConfig, build_optimizer, lr_at
from order import TrainOrder
from perf import cost
from ranks import (
    SMALL,
    copy_run,
    launch,
    logged,
    on_ranks,
    records,
    run,
    run_script,
    settings,
    step_settings,
    without_matplotlib,
    write_data,
)  # fmt: skip
from run import log
from shards import ShardWriter
from text.tokenizer import SPECIALS, load_tokenizer, train_bpe
from world import World

ROOT = Path(train.__file__).parent
SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare.txt"
MASKED = {"objective": "mlm", "mask_prob": 0.3}
SPECIAL_IDS = {name: 32 + i for i, name in enumerate(SPECIALS)}  # the last of 37, as the byte tokenizer has them


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def masked_dir(tmp_path_factory):
    """Data for masked training, in which tokens repeat."""
    return write_data(tmp_path_factory.mktemp("masked"), specials=SPECIAL_IDS)


@pytest.fixture(scope="module")
def nine(data_dir, tmp_path_factory):
    """A run of nine steps, uninterrupted; not to be written to."""
    return run(data_dir, tmp_path_factory.mktemp("nine"), with_curves=True)


@pytest.fixture(scope="module")
def four(data_dir, tmp_path_factory):
    """The first four steps of the same run; to be copied, then taken up again."""
    return run(data_dir, tmp_path_factory.mktemp("four"), max_steps=4)


@pytest.fixture(scope="module")
def masked_nine(masked_dir, tmp_path_factory):
    """A masked run of nine steps; not to be written to."""
    return run(masked_dir, tmp_path_factory.mktemp("masked_nine"), **MASKED)


@pytest.fixture(scope="module")
def masked_four(masked_dir, tmp_path_factory):
    """The first four steps of the same run; to be copied, then taken up again."""
    return run(masked_dir, tmp_path_factory.mktemp("masked_four"), max_steps=4, **MASKED)


def steps_kept(out_dir):
    return [int(p.name[5:]) for p in checkpoints(out_dir)]


def weights(out_dir):
    """{name: tensor} of all that the newest checkpoint holds, optimizer included."""
    return {k: v for path in newest_checkpoint(out_dir).glob("*.safetensors") for k, v in load_file(path).items()}


def contents(out_dir):
    """{path: bytes} of a run's files, but for the lock, which each start writes anew."""
    return {p: p.read_bytes() for p in out_dir.rglob("*") if p.is_file() and p.name != ".lock"}


def assert_same_run(a, b):
    """Two runs have logged the same losses and gradient norms and ended in the same tensors, bit by bit."""
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert records(a, name) == records(b, name), name
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- a run

def test_a_run_logs_every_step_and_keeps_what_it_takes_to_know_it_again(nine, data_dir):
    lines = [json.loads(line) for line in (nine / "log.jsonl").read_text().splitlines()]
    assert {"start", "step", "command", "git_commit", "devices"} <= lines[0].keys()
    assert "environ" not in str(lines[0]) and os.environ["PATH"] not in str(lines)
    steps = [line for line in lines if "loss" in line]
    schedule = OptimConfig(learning_rate=1e-2, warmup_steps=2, lr_decay_steps=20)
    assert [line["step"] for line in steps] == list(range(1, 10))
    for line in steps:
        assert line["tokens"] == 42 * line["step"]
        assert line["lr"] == lr_at(line["step"] - 1, schedule, 9)
        assert line["grad_norm"] > 0 and line["tokens_per_s"] > 0 and 0 < line["mfu"] < 1
        assert line["data_wait_ms"] >= 0 and 0.05 < line["memory_gib"] < 64
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 9]
    for line in lines:
        if "val_loss" in line:  # each id is a byte
            assert line["val_bpb"] == pytest.approx(line["val_loss"] / math.log(2))
    assert (nine / "finished").read_text().startswith("finished")
    assert (nine / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((nine / "source").rglob("train.py")) and (nine / "meta.json").exists()
    assert not [p for p in nine.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".metadata") or p.name == ".metadata"]


def test_bits_per_byte_are_of_the_text_that_is_evaluated_as_scoring_has_them(tmp_path, capsys):
    text = "Fünf Füchse, fünf 🙂 Füchse: 日本語! " * 9
    train_bpe([text], 290, tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    while len(ids := tokenizer.encode(text).tolist()) % 11:  # scoring gives a short last window more context
        text = text[:-1]
    data_dir = write_data(tmp_path / "data", vocab_size=tokenizer.vocab_size, tokenizer="tokenizer.json")
    shutil.copy(tmp_path / "tokenizer.json", data_dir)
    writer, meta = ShardWriter(data_dir, "val", np.uint16, 10**6), json.loads((data_dir / "meta.json").read_text())
    writer.write(np.array([tokenizer.eot, *ids, tokenizer.eot], dtype=np.uint16))
    meta["splits"]["val"] = {"shards": writer.finish(), "tokens": 2 + len(ids), "bytes": len(text.encode())}
    meta["token_bytes"] = tokenizer.byte_counts()
    (data_dir / "meta.json").write_text(json.dumps(meta))
    for eval_tokens in (44, len(ids), len(ids) + 1):
        out_dir = tmp_path / f"run_{eval_tokens}"
        run(data_dir, out_dir, vocab_size="none", block_size=23, seq_len=11, batch_tokens=33, eval_tokens=eval_tokens)
        n_bytes = len(tokenizer.decode_bytes(ids[:eval_tokens]))  # end-of-text, the last target, has none
        nats = records(out_dir, "val_loss")[9] * eval_tokens
        assert records(out_dir, "val_bpb")[9] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-9)
        if eval_tokens == len(ids):
            score = -loglikelihood_rolling(load_model(out_dir, "cpu")[0], tokenizer, [text])[0].log_likelihood
            assert nats == pytest.approx(score, rel=1e-5) and n_bytes == len(text.encode()) > len(ids) + 99
        else:
            assert n_bytes != round(eval_tokens * len(text.encode()) / len(ids))  # or any count would do


@pytest.mark.parametrize(("changes", "why"), [
    ({"token_bytes": []}, "the data's tokenizer changes text"), ({}, "has no token_bytes in a meta.json"),
])  # fmt: skip
def test_where_the_bytes_of_tokens_are_unknown_a_run_prints_no_bits_per_byte_but_why(changes, why, tmp_path, capsys):
    data_dir = write_data(tmp_path / "data")
    meta = json.loads((data_dir / "meta.json").read_text())
    del meta["token_bytes"]
    (data_dir / "meta.json").write_text(json.dumps(meta | changes))
    run(data_dir, tmp_path / "run", max_steps=1)
    out = capsys.readouterr().out
    assert "no bits per byte: " in out and why in out and "bits per byte" not in out.partition("\nmodel")[2]
    assert not records(tmp_path / "run", "val_bpb")


def test_the_loss_that_is_printed_is_the_mean_since_the_last_line(nine, data_dir, tmp_path, capsys):
    run(data_dir, tmp_path, log_interval=4)
    each, mean = records(nine), records(tmp_path, "mean_loss")
    assert list(mean) == [4, 8, 9] and records(tmp_path) == {step: each[step] for step in mean}
    for first, last in ((1, 4), (5, 8), (9, 9)):
        wanted = statistics.fmean(each[step] for step in range(first, last + 1))
        assert mean[last] == pytest.approx(wanted, rel=1e-12)
    printed = re.findall(r"step (\d)/9 .* loss +(\S+)  lr", capsys.readouterr().out)
    assert [(int(step), float(loss)) for step, loss in printed] == [(s, round(m, 4)) for s, m in mean.items()]


def test_a_run_prints_its_epochs_and_warns_where_they_are_many(data_dir, tmp_path, capsys):
    """The data has 2000 training tokens, and a step 42."""
    run(data_dir, tmp_path / "few", max_steps=1, warmup_steps=1)
    assert "run        1 steps, 42 tokens, 0.021 epochs, in " in (told := capsys.readouterr().out)
    assert "warning" not in told
    run(data_dir, tmp_path / "short", max_steps=2, warmup_steps=3)
    assert "warning    warmup_steps 3 is above the last step: the learning rate" in capsys.readouterr().out
    run(data_dir, tmp_path / "many", max_steps=1000, target_loss=1000.0)
    told = capsys.readouterr().out
    assert "1,000 steps, 42,000 tokens, 21 epochs, in " in told
    assert f"warning    the run reads the training tokens of {data_dir} 21 times; " in told and "lower --max_steps" in told


def test_a_small_run_prints_its_time_in_seconds_and_its_memory_in_mib(data_dir, tmp_path, capsys):
    run(data_dir, tmp_path, max_steps=1)
    told = capsys.readouterr().out
    assert re.search(r"^memory     0\.36 MiB per rank predicted \(weights 0.06, .*\), [\d.]+ GiB available$", told, re.M)
    assert re.search(r"^42 tokens in 0m\d\ds$", told, re.M), told
    assert [log._duration(s) for s in (59, 60, 5400)] == ["0m59s", "1m00s", "1h30m"]
    assert [log._memory(gib) for gib in (0.05, 0.1, 12.375)] == ["51.20 MiB", "0.10 GiB", "12.38 GiB"]


def test_training_learns_what_can_be_learned(data_dir, tmp_path):
    """Each token is the one before plus 0, 1 or 2: log 3 is the least loss there is, log 37 that of knowing nothing."""
    run(data_dir, tmp_path, max_steps=150, lr_decay_steps="none", log_interval=50, eval_interval=150)
    first, last = records(tmp_path, "val_loss").values()
    assert first == pytest.approx(math.log(37), abs=0.15)
    assert math.log(3) < last < math.log(3) + 0.3


def test_the_first_loss_is_that_of_the_first_sequences(nine, data_dir):
    names = "vocab_size", "block_size", "n_layer", "n_head", "n_embd"
    model = Transformer(ModelConfig(**{name: SMALL[name] for name in names}))
    model.init_weights(seed=1337)
    assert records(nine)[1] == pytest.approx(loss_of_sequences(model, data_dir, range(6)), rel=1e-6)


def loss_of_sequences(model, data_dir, numbers):
    """Mean loss of the sequences of these numbers in training's order, by torch's own cross-entropy."""
    split = Split(data_dir, "train", 37)
    rows = [split.shards[shard][at : at + 8] for shard, at in zip(*TrainOrder(split, 7, 1337).locate(list(numbers)))]
    rows = torch.from_numpy(np.stack(rows).astype(np.int64))
    with torch.no_grad():
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()


def test_evaluation_comes_first_each_interval_and_last_and_changes_nothing(data_dir, nine, tmp_path):
    run(data_dir, tmp_path, eval_interval=4)
    assert list(records(tmp_path, "val_loss")) == [0, 4, 8, 9]
    assert_same_run(tmp_path, nine)


def test_recomputation_in_backward_changes_no_loss_not_even_with_dropout(masked_dir, tmp_path):
    changes = MASKED | {"dropout": 0.3, "norm_position": "post", "n_token_types": 2}
    plain = run(masked_dir, tmp_path / "plain", **changes)
    for kind in ("full", "selective"):
        recomputed = run(masked_dir, tmp_path / kind, **changes, activation_checkpointing=kind)
        assert_same_run(plain, recomputed)
        assert records(plain, "val_loss") == records(recomputed, "val_loss")


def test_max_steps_0_evaluates_and_stops(data_dir, tmp_path, nine, capsys):
    run(data_dir, tmp_path, max_steps=0)
    assert records(tmp_path, "val_loss") == {0: records(nine, "val_loss")[0]} and not records(tmp_path)
    assert "finished" in capsys.readouterr().out


def test_max_tokens_ends_a_run(data_dir, tmp_path, nine):
    run(data_dir, tmp_path, max_tokens=9 * 42 - 1, max_steps=5)
    assert records(tmp_path) == records(nine)


@pytest.mark.parametrize("batch_tokens", [21, 84])
def test_max_tokens_counts_the_tokens_of_steps_with_another_batch_size(
    batch_tokens, data_dir, four, tmp_path, capsys
):
    """Five steps follow the four of 42 tokens: the log, the schedule and what is printed end with them."""
    out_dir, tokens = copy_run(four, tmp_path / "run"), 4 * 42 + 5 * batch_tokens
    run(data_dir, out_dir, batch_tokens=batch_tokens, max_tokens=tokens - 1, lr_decay_steps="none")
    assert list(records(out_dir, "tokens").items())[-1] == (9, tokens)
    told = capsys.readouterr().out
    assert f"run        9 steps, {tokens} tokens, {tokens / 2000:.3g} epochs, in " in told and "step 9/9 " in told
    assert f"{tokens} tokens in " in told and "finished: step 9 of 9, " in told
    schedule = OptimConfig(learning_rate=1e-2, warmup_steps=2)
    assert [records(out_dir, "lr")[step] for step in range(5, 10)] == [lr_at(step, schedule, 9) for step in range(4, 9)]
    run(data_dir, out_dir, batch_tokens=42, max_tokens=tokens)
    assert "has finished, at step 9" in (told := capsys.readouterr().out) and "raise max_tokens" in told


def test_a_batch_size_that_changes_is_counted_in_the_tokens_of_max_steps(data_dir, four, tmp_path, capsys):
    run(data_dir, copy_run(four, tmp_path / "run"), batch_tokens=84, max_steps=6)
    assert "run        6 steps, 336 tokens, " in capsys.readouterr().out


def test_checkpoints_come_each_interval_and_last_and_the_newest_stay(data_dir, tmp_path):
    run(data_dir, tmp_path, save_interval=2, keep_checkpoints=2, keep_every=4)
    assert steps_kept(tmp_path) == [4, 8, 9]


def test_a_run_without_checkpoints_leaves_none(data_dir, tmp_path):
    run(data_dir, tmp_path, save_interval="none", max_steps=3)
    assert steps_kept(tmp_path) == [] and (tmp_path / "finished").exists()


def test_a_runs_config_is_a_preset_that_reproduces_it(nine, tmp_path, no_curves):
    cfg = config.load(train.Settings, [str(nine / "config.py"), f"--out_dir={tmp_path}"])
    train.main(cfg)
    assert_same_run(tmp_path, nine)
    again, first = ((p / "config.py").read_text().splitlines() for p in (tmp_path, nine))
    assert [line.split("=")[0].strip() for line, other in zip(again, first) if line != other] == ["out_dir"]


def test_without_matplotlib_a_run_trains_says_so_and_draws_nothing(data_dir, tmp_path, capsys):
    run(data_dir, tmp_path, max_steps=1)
    assert (tmp_path / "finished").exists() and not (tmp_path / "curves.png").exists()
    assert capsys.readouterr().out.count("matplotlib is not installed") == 1


def test_console_lines_are_aligned_and_fit_120_columns_even_of_a_long_run(data_dir, tmp_path, capsys):
    run(data_dir, tmp_path, max_steps=19_073, eval_interval=12, target_loss=3.4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    steps = [line for line in lines if " tok/s" in line]
    assert len(steps) > 10 and max(map(len, lines)) <= 120, max(lines, key=len)
    assert len({line.find(" loss ") for line in steps}) == 1


# ---- masked training

def test_a_masked_run_learns_and_tells_its_accuracy_beside_that_of_the_commonest_token(tmp_path, capsys):
    """The token before or behind is the masked one in 7 of 8 cases; each of 32 is about as common as the others."""
    data_dir = write_data(tmp_path / "data", specials=SPECIAL_IDS, val_tokens=2000)
    sizes = {"n_layer": 1, "batch_tokens": 84, "micro_batch_size": 12, "eval_tokens": 2000}
    out_dir = run(data_dir, tmp_path / "run", **MASKED, **sizes, max_steps=150, lr_decay_steps="none", log_interval=50,
                  eval_interval=150)  # fmt: skip
    loss, accuracy, commonest = (records(out_dir, f"val_{name}") for name in
                                 ("loss", "accuracy", "accuracy_of_commonest"))  # fmt: skip
    assert loss[0] == pytest.approx(math.log(37), abs=0.15) and loss[150] < 0.75 * loss[0]
    assert accuracy[0] < 1.5 * commonest[0] and 2 * commonest[150] < accuracy[150]
    assert 1 / 32 < commonest[0] == commonest[150] < 0.08
    lines = [line for line in capsys.readouterr().out.splitlines() if "val loss" in line and line.startswith("step ")]
    for step, line in zip((0, 150), lines, strict=True):
        assert f"val loss {loss[step]:.4f}  masked accuracy {accuracy[step]:.1%} " in line and len(line) <= 120
        assert f"(the most frequent token alone {commonest[step]:.1%})" in line and "perplexity" not in line
    assert "val_bpb" not in (out_dir / "log.jsonl").read_text()  # a masked loss codes no text


def test_the_first_masked_loss_is_that_of_the_first_sequences(masked_nine, masked_dir):
    """Put together apart from train.py: where the windows lie, and what Masked makes of them."""
    model = Transformer(ModelConfig(objective="mlm", **{name: SMALL[name] for name in
                                                        ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}))
    model.init_weights(seed=1337)
    split = Split(masked_dir, "train", 37)
    places = zip(*TrainOrder(split, 5, 1337).locate(list(range(6))))  # 5 tokens between [CLS] and [SEP]
    rows = np.stack([split.shards[shard][at : at + 5] for shard, at in places]).astype(np.int64)
    ids, targets, positions = Masked(7, 0.3, 1337, 37, SPECIAL_IDS).batch(rows, 0)
    with torch.no_grad():
        logits = torch.stack([row[place] for row, place in zip(model(ids), positions)])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert records(masked_nine)[1] == pytest.approx(loss, rel=1e-6)


def test_mfu_of_a_masked_run_counts_the_head_at_masked_places_alone(masked_nine):
    start, *lines = [json.loads(line) for line in (masked_nine / "log.jsonl").read_text().splitlines()]
    cfg = load_model(masked_nine, "cpu")[0].cfg
    for line in lines:
        if "mfu" in line:
            flops = line["mfu"] * start["peak_flops"] / line["tokens_per_s"]
            assert flops == pytest.approx(cost.flops_per_token(cfg, 7, 2 / 7), rel=1e-9)


@pytest.mark.slow
def test_a_killed_masked_run_goes_on_as_if_nothing_had_been(masked_dir, tmp_path):
    changes = MASKED | {"max_steps": 20, "save_interval": 4, "eval_interval": 7, "lr_decay_steps": "none"}
    [process] = launch(1, settings(masked_dir, tmp_path / "killed", **changes))
    assert kill_when(process, lambda: logged(tmp_path / "killed") >= 10)
    assert logged(tmp_path / "killed") < 20
    run(masked_dir, tmp_path / "killed", **changes)
    run(masked_dir, tmp_path / "whole", **changes)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    for name in ("val_loss", "val_accuracy", "val_accuracy_of_commonest"):
        assert records(tmp_path / "whole", name) == records(tmp_path / "killed", name)


@pytest.mark.parametrize("micro_batch_size", [1, 6])
def test_a_change_of_micro_batch_changes_no_masked_loss(
    micro_batch_size, masked_dir, masked_four, masked_nine, tmp_path
):
    out_dir = run(masked_dir, copy_run(masked_four, tmp_path / "run"), micro_batch_size=micro_batch_size, **MASKED)
    assert list(records(out_dir).values()) == pytest.approx(list(records(masked_nine).values()), rel=1e-5)
    for name in ("val_loss", "val_accuracy", "val_accuracy_of_commonest"):
        assert records(out_dir, name)[9] == pytest.approx(records(masked_nine, name)[9], rel=1e-5)


@pytest.mark.slow
def test_a_masked_run_goes_on_on_two_ranks(masked_dir, masked_four, masked_nine, tmp_path):
    out_dir = copy_run(masked_four, tmp_path / "run")
    on_ranks(2, (train.main, settings(masked_dir, out_dir, **MASKED)))
    assert list(records(out_dir).values()) == pytest.approx(list(records(masked_nine).values()), rel=1e-5)
    assert records(out_dir, "val_loss")[9] == pytest.approx(records(masked_nine, "val_loss")[9], rel=1e-5)
    assert records(out_dir, "val_accuracy")[9] == records(masked_nine, "val_accuracy")[9]


def test_masked_evaluation_does_not_depend_on_a_runs_seed(masked_dir, masked_four, tmp_path):
    """A run of another seed that starts from the same weights has other masks in training alone."""
    out_dir = run(masked_dir, tmp_path, init_from=masked_four, seed=5, max_steps=1, **MASKED)
    for name in ("val_loss", "val_accuracy"):
        assert records(out_dir, name)[0] == records(masked_four, name)[4]


def test_a_run_does_not_go_on_with_another_objective(masked_dir, masked_four, tmp_path):
    out_dir = copy_run(masked_four, tmp_path / "run")
    before = contents(out_dir)
    with pytest.raises(ValueError, match="another model, data, objective, .* here objective: mlm -> clm; mask_prob: 0.3 -> 0.15; use"):
        run(masked_dir, out_dir, objective="clm")
    assert before == contents(out_dir)


def test_a_step_without_a_target_leaves_sound_weights():
    """A masked batch may hold special tokens alone, as where a vocabulary knows none of a text's words."""
    model = Transformer(ModelConfig(objective="mlm", vocab_size=37, block_size=11, n_layer=1, n_head=5, n_embd=20))
    model.init_weights(seed=1)
    world, positions = World(0, 1, torch.device("cpu"), "fp32"), torch.tensor([[1, 2]])
    optimizer = build_optimizer(model, OptimConfig())
    batch = torch.full((1, 7), 36), torch.full((1, 2), IGNORE), positions
    loss, *_ = train.train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), [batch], step_settings(1.0), world)
    assert loss == 0 and all(torch.isfinite(p).all() for p in model.parameters())


# ---- going on

@pytest.mark.parametrize("changes", [
    MASKED | {"dropout": 0.1}, {"optimizer": "sgd", "precision": "bf16"}, {"optimizer": "muon", "dropout": 0.1},
    {"optimizer": "adafactor", "grad_clip": "none", "tie_embeddings": False, "bias": False},
], ids=str)  # fmt: skip
def test_resumed_run_equals_uninterrupted_run(changes, data_dir, masked_dir, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    data_dir = masked_dir if "objective" in changes else data_dir
    run(data_dir, whole, **changes)
    for max_steps in (2, 6, 9):
        run(data_dir, parts, max_steps=max_steps, **changes)
    assert_same_run(whole, parts)
    assert len(set(records(whole).values())) == 9


def test_a_run_resumes_across_epochs(tmp_path):
    data_dir = write_data(tmp_path / "data", train_tokens=80)  # 10 sequences an epoch, 6 a step
    run(data_dir, tmp_path / "whole")
    run(data_dir, tmp_path / "parts", max_steps=4)
    run(data_dir, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def kill_when(process, happened, timeout=600):
    """kill -9 as soon as happened(); says whether the process was still alive then."""
    deadline = time.monotonic() + timeout
    while process.is_alive() and not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.0005)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


@pytest.mark.parametrize("at", [3, *slow(17)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(at, data_dir, tmp_path):
    """At step 3 nothing has been saved yet."""
    changes = {"max_steps": 30, "save_interval": 7, "eval_interval": 10, "lr_decay_steps": "none"}
    [process] = launch(1, settings(data_dir, tmp_path / "killed", **changes))
    assert kill_when(process, lambda: logged(tmp_path / "killed") >= at)
    assert logged(tmp_path / "killed") < 30 and not (tmp_path / "killed" / "finished").exists()
    run(data_dir, tmp_path / "killed", **changes)
    run(data_dir, tmp_path / "whole", **changes)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert records(tmp_path / "whole", "val_loss") == records(tmp_path / "killed", "val_loss")


def test_a_run_without_checkpoints_that_starts_anew_keeps_the_log_it_finds(data_dir, tmp_path):
    for max_steps in (4, 3, 2):
        run(data_dir, tmp_path, max_steps=max_steps, save_interval="none")
    logs = [tmp_path / name for name in ("log_1.jsonl", "log_2.jsonl", "log.jsonl")]
    assert [json.loads(log.read_text().splitlines()[-1])["step"] for log in logs] == [4, 3, 2]


def test_the_log_loses_lines_past_the_resumed_step_and_a_torn_one(data_dir, four, nine, tmp_path):
    out_dir = copy_run(four, tmp_path / "run")
    with open(out_dir / "log.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 99.0}\n{"step": 6, "val_loss": 99.0}\n{"start": "", "versions": {"torch": ""}')
    run(data_dir, out_dir)
    assert records(out_dir) == records(nine)
    assert list(records(out_dir, "val_loss")) == [0, 4, 9]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 6])
def test_a_change_of_micro_batch_changes_no_loss(micro_batch_size, data_dir, four, nine, tmp_path):
    out_dir = run(data_dir, copy_run(four, tmp_path / "run"), micro_batch_size=micro_batch_size)
    assert list(records(out_dir).values()) == pytest.approx(list(records(nine).values()), rel=1e-5)


def test_after_a_change_of_batch_size_the_next_sequences_follow(data_dir, four, tmp_path):
    out_dir = copy_run(four, tmp_path / "run")
    model, source = load_model(out_dir, "cpu")
    assert source.manifest["state"]["sequences_seen"] == 4 * 6
    run(data_dir, out_dir, batch_tokens=63, max_steps=6)
    assert records(out_dir)[5] == pytest.approx(loss_of_sequences(model, data_dir, range(24, 33)), rel=1e-5)
    assert read_manifest(newest_checkpoint(out_dir))["state"]["sequences_seen"] == 24 + 2 * 9
    assert records(out_dir, "tokens")[6] == 7 * (24 + 2 * 9)


def test_a_run_goes_on_on_another_number_of_ranks(data_dir, four, nine, tmp_path):
    one_two = copy_run(four, tmp_path / "one_two")
    two, two_one, two_two = tmp_path / "two", tmp_path / "two_one", tmp_path / "two_two"
    on_ranks(2, *((train.main, settings(data_dir, out_dir, max_steps=max_steps))
                  for out_dir, max_steps in ((two, 9), (two_one, 4), (one_two, 9), (two_two, 4), (two_two, 9))))
    run(data_dir, two_one)
    expected, val = list(records(nine).values()), list(records(nine, "val_loss").values())
    for out_dir in (two, two_one, one_two):
        assert list(records(out_dir).values()) == pytest.approx(expected, rel=1e-5)
        assert records(out_dir, "val_loss")[9] == pytest.approx(val[1], rel=1e-5)
    assert_same_run(two, two_two)
    assert steps_kept(two_two) == [4, 9] and (two_two / "finished").exists()


@pytest.fixture(scope="module")
def wanderers(data_dir, tmp_path_factory):
    """{optimizer: folders of runs that went on in one layout and in another, and of the same on one process}.

    Launched once for all optimizers: torch derives how each operator is sharded once a process, in 0.2 s.
    """
    sizes = {"n_head": 4, "n_embd": 20, "n_inner": 36, "seq_len": 8, "batch_tokens": 96}
    folders, four, two, one = {}, [], [], []
    for optimizer in ("adamw", "muon"):
        names, folder = ("straight", "stopped", "wandering", "alone"), tmp_path_factory.mktemp(optimizer)
        straight, stopped, wandering, alone = folders[optimizer] = [folder / name for name in names]
        small = sizes | {"optimizer": optimizer}
        sharded = small | {"strategy": "fsdp", "tp": 2}
        four += [(train.main, settings(data_dir, out_dir, max_steps=max_steps, **sharded))
                 for out_dir, max_steps in ((straight, 9), (stopped, 4), (stopped, 9), (wandering, 3))]  # fmt: skip
        one += [settings(data_dir, wandering, max_steps=6, **small), settings(data_dir, alone, **small)]
        two += [(train.main, settings(data_dir, wandering, **small))]
    on_ranks(4, *four)
    with without_matplotlib():
        for cfg in one:
            train.main(cfg)
    on_ranks(2, *two)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_in_another_layout(optimizer, wanderers):
    """On 4 ranks, fsdp x tp, then on one, then on 2, ddp, it is a run never stopped; in one layout to the bit."""
    straight, stopped, wandering, alone = wanderers[optimizer]
    assert_same_run(straight, stopped)
    expected = records(alone)
    assert expected[9] < expected[1]
    for out_dir in (straight, wandering):
        assert list(records(out_dir).values()) == pytest.approx(list(expected.values()), rel=1e-3)
        assert records(out_dir, "val_loss")[9] == pytest.approx(records(alone, "val_loss")[9], rel=1e-3)


def test_changes_of_model_data_seed_or_optimizer_are_refused_all_at_once(data_dir, four, tmp_path):
    out_dir = copy_run(four, tmp_path / "run")
    before = contents(out_dir)
    with pytest.raises(ValueError) as error:
        run(data_dir, out_dir, n_layer=2, seed=5, optimizer="sgd", seq_len=6, learning_rate=0.5, batch_tokens=36)
    for change in ("n_layer: 3 -> 2", "seed: 1337 -> 5", "optimizer: adamw -> sgd", "seq_len: 7 -> 6", "--out_dir="):
        assert change in str(error.value)
    assert "learning_rate" not in str(error.value)
    with pytest.raises(ValueError, match="data_fingerprint: .* -> "):
        run(write_data(tmp_path / "other", seed=8), out_dir)
    assert before == contents(out_dir)


def test_other_changes_are_named_and_logged(data_dir, four, tmp_path, capsys):
    out_dir = copy_run(four, tmp_path / "run")
    run(data_dir, out_dir, learning_rate=0.02, max_steps=5)
    out = capsys.readouterr().out
    assert "resumed from step 4" in out and "learning_rate: 0.01 -> 0.02" in out and "max_steps: 4 -> 5" in out
    assert "n_layer" not in out
    schedule = OptimConfig(learning_rate=0.02, warmup_steps=2, lr_decay_steps=20)
    assert records(out_dir, "lr")[5] == lr_at(4, schedule, 5)
    assert "learning_rate: 0.01 -> 0.02" in records(out_dir, "changes")[4]


def test_data_that_has_moved_is_the_same_data(data_dir, four, nine, tmp_path):
    shutil.copytree(data_dir, tmp_path / "moved")
    assert records(run(tmp_path / "moved", copy_run(four, tmp_path / "run"))) == records(nine)


def test_a_finished_run_says_so_and_goes_on_when_max_steps_grows(data_dir, four, nine, tmp_path, capsys):
    out_dir = copy_run(four, tmp_path / "run")
    before = contents(out_dir)
    run(data_dir, out_dir, max_steps=4)
    assert "has finished, at step 4" in capsys.readouterr().out
    assert before == contents(out_dir)
    run(data_dir, out_dir, max_steps=9, eval_interval=2)
    assert_same_run(out_dir, nine)
    assert list(records(out_dir, "val_loss")) == [0, 4, 6, 8, 9]  # not 4 again
    assert (out_dir / "finished").exists()


def test_resume_never_refuses_a_folder_with_checkpoints_and_takes_others(data_dir, four, tmp_path):
    with pytest.raises(ValueError, match="resume is never.*has checkpoints.*another --out_dir, or --resume=auto"):
        run(data_dir, four, resume="never")
    run(data_dir, tmp_path, resume="never", max_steps=1)


def test_an_unfinished_checkpoint_is_passed_over(data_dir, four, nine, tmp_path):
    out_dir = copy_run(four, tmp_path / "run")
    partial = out_dir / "ckpt" / ".step_00000007.partial"
    shutil.copytree(newest_checkpoint(out_dir), partial)
    assert records(run(data_dir, out_dir)) == records(nine)
    assert not partial.exists() and steps_kept(out_dir) == [4, 9]


def test_a_run_whose_only_checkpoint_is_damaged_stops_before_it_writes(data_dir, four, tmp_path):
    out_dir = copy_run(four, tmp_path / "run")
    file = next(newest_checkpoint(out_dir).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    log = (out_dir / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="missing or damaged.*no other checkpoint; bring one back"):
        run(data_dir, out_dir)
    assert (out_dir / "log.jsonl").read_text() == log and file.exists()


# ---- init_from

def test_init_from_takes_weights_and_nothing_else(data_dir, four, tmp_path):
    out_dir = run(data_dir, tmp_path / "run", init_from=four, max_steps=2, seed=5, optimizer="sgd")
    assert records(out_dir, "val_loss")[0] == records(four, "val_loss")[4]
    assert list(records(out_dir)) == [1, 2]
    assert records(out_dir, "lr")[1] == pytest.approx(0.01 / 2)
    assert read_manifest(newest_checkpoint(out_dir))["state"]["sequences_seen"] == 12
    tied = Transformer(ModelConfig(**read_manifest(newest_checkpoint(four))["model"]))
    load_checkpoint(newest_checkpoint(four), tied)
    assert tied.head.weight is tied.wte.weight


def test_a_checkpoint_in_the_folder_wins_over_init_from(data_dir, four, nine, tmp_path):
    out_dir = copy_run(four, tmp_path / "run")
    assert records(run(data_dir, out_dir, init_from=nine)) == records(nine)


# ---- early ends

def test_target_loss_ends_a_run_and_stays_reached(data_dir, tmp_path, capsys):
    changes = {"eval_interval": 5, "max_steps": 40, "target_loss": 3.3}
    run(data_dir, tmp_path, **changes)
    losses = records(tmp_path, "val_loss")
    assert losses[max(losses)] <= 3.3 < losses[max(losses) - 5] and max(losses) < 40
    assert "target_loss 3.3" in (tmp_path / "finished").read_text()
    assert steps_kept(tmp_path) == [max(losses)]
    capsys.readouterr()
    run(data_dir, tmp_path, **changes)
    assert "has finished" in capsys.readouterr().out


def test_max_minutes_ends_a_run_and_the_same_command_goes_on(data_dir, nine, tmp_path, capsys):
    changes = {"max_minutes": 1e-6}
    run(data_dir, tmp_path, **changes)
    assert logged(tmp_path) == 1 and not (tmp_path / "finished").exists()
    assert list(records(tmp_path, "val_loss")) == [0, 1] and steps_kept(tmp_path) == [1]
    *_, how, last = capsys.readouterr().out.splitlines()
    assert how.startswith("stopped after max_minutes 1e-06: step 1 of 9, val loss")
    assert last == "the model is unfinished; the same command continues"
    run(data_dir, tmp_path, **changes)
    assert logged(tmp_path) == 2
    run(data_dir, tmp_path)
    assert records(tmp_path) == records(nine) and (tmp_path / "finished").exists()


def test_max_minutes_ends_a_run_at_any_step_not_just_at_lines_of_the_log(data_dir, tmp_path):
    run(data_dir, tmp_path, max_minutes=1e-6, log_interval=1000)
    assert steps_kept(tmp_path) == [1] and list(records(tmp_path, "val_loss")) == [0, 1]


# ---- wandb

def test_wandb_logs_offline_and_goes_on_under_the_same_id(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(data_dir, tmp_path, log_to="wandb", max_steps=2)
    wandb_id = (tmp_path / "wandb_id").read_text().strip()
    run(data_dir, tmp_path, log_to="wandb", max_steps=4, watch="norms")
    assert (tmp_path / "wandb_id").read_text().strip() == wandb_id
    stored = [p for p in (tmp_path / "wandb").glob("offline-run-*") if p.name.endswith(wandb_id)]
    assert len(stored) >= 1 and all(list(p.glob("*.wandb")) for p in stored)
    assert list(records(tmp_path)) == [1, 2, 3, 4]
    written = b"".join(path.read_bytes() for p in stored for path in p.glob("*.wandb"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    names = {name for line in lines if "start" not in line for name in line}
    assert "val_grad_norm/blocks.1" in names and not [name for name in names if name.encode() not in written]


# ---- wrong input

def unprepared(folder):
    write_data(folder)
    (folder / "meta.json").unlink()


def spoilt(**how):
    """A maker of a data folder, of which one shard is then spoilt."""
    def make(folder):
        write_data(folder)
        shard = folder / "train_000001.bin"
        content = shard.read_bytes()
        shard.write_bytes(content[: how["cut"]] if "cut" in how else how["head"] + content[len(how["head"]) :])
    return make


def with_large_ids(folder):
    write_data(folder, vocab_size=50)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"vocab_size": 37}))


BAD_DATA = {
    "missing": (lambda folder: None, "(does not exist|holds no train tokens).*: python prepare.py"),
    "empty": (lambda folder: folder.mkdir(), "holds no train tokens.*: python prepare.py"),
    "without meta.json": (unprepared, "no meta.json.*unfinished prepare; .*python prepare.py"),
    "damaged meta.json": (lambda f: write_data(f).joinpath("meta.json").write_text("{"), "meta.json is damaged.*again"),
    "cut shard": (spoilt(cut=1001), "train_000001.bin is damaged.*make the data again"),
    "foreign shard": (spoilt(head=b"PK\3\4flat"), "train_000001.bin is not a token shard.*make the data again"),
    "missing shard": (lambda f: write_data(f).joinpath("train_000001.bin").unlink(), "train_000001.bin is missing"),
    "ids past the vocabulary": (with_large_ids, r"holds token \d+, but vocab_size is 37"),
    "larger vocabulary": (lambda f: write_data(f, vocab_size=50), "vocab_size is 37.*vocabulary of 50; set vocab_size"),
    "short train": (lambda f: write_data(f, train_tokens=13), "no shard of 2 x 7 tokens.*lower seq_len"),
    "short val": (lambda f: write_data(f, val_tokens=1), "val split has 1 tokens.*val_fraction"),
}
BAD_SETTINGS = {
    "no data_dir": ({"data_dir": "none"}, "data_dir is none; set it"),
    "long sequence": ({"seq_len": 12}, "seq_len 12 is above block_size 11; lower it"),
    "odd batch": ({"batch_tokens": 40}, "batch_tokens 40 is not a multiple of 21 = micro_batch_size 3 .*;.* would fit"),
    "heads": ({"n_head": 3}, "n_embd 20 is not a multiple of n_head 3; n_head 1, 2, 4 would fit"),
    "fp16": ({"precision": "fp16"}, "precision is fp16.*use bf16 or fp32"),
    "device": ({"device": "mps"}, "device is mps.*use --device=cpu"),
    "min_lr": ({"min_lr": 0.5}, "min_lr 0.5 is above learning_rate 0.01; lower it"),
    "interval": ({"eval_interval": 0}, "eval_interval is 0; it must be at least 1"),
    "init_from": ({"init_from": "/nowhere"}, "/nowhere is no folder; give the out_dir of a run, or"),
}  # fmt: skip


def refused(told, data_dir, out_dir, **changes):
    """A run is refused with one line, by a raise of ours, so that it shows as such; it leaves no checkpoint."""
    with pytest.raises(ValueError, match=told) as error:
        run(data_dir, out_dir, **changes)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, config.UserError), "shows as a traceback"
    assert not checkpoints(out_dir)


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_with_value_rule_and_remedy(case, tmp_path):
    make, told = BAD_DATA[case]
    make(tmp_path / "data")
    refused(told, tmp_path / "data", tmp_path / "run")


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused_with_value_rule_and_remedy(case, data_dir, tmp_path):
    changes, told = BAD_SETTINGS[case]
    refused(told, **{"data_dir": data_dir, "out_dir": tmp_path / "run"} | changes)


def test_data_and_settings_that_cannot_be_masked_are_refused(data_dir, masked_dir, tmp_path):
    raw, unmasked = tmp_path / "raw", write_data(tmp_path / "unmasked", specials={"<|endoftext|>": 36})
    raw.mkdir()
    for split in ("train", "val"):
        np.concatenate(Split(data_dir, split, 37).shards).tofile(raw / f"{split}.bin")
    refused("mlm needs to know the special tokens of its data.*use prepare.py", raw, tmp_path / "run", **MASKED)
    refused("need a mask token, .* has only <.endoftext.>; make the data", unmasked, tmp_path / "run", **MASKED)
    words = MASKED | {"whole_word_masking": True}
    refused("whole_word_masking is on, but .* leave it off, or", masked_dir, tmp_path / "run", **words)
    short = {"seq_len": 2, "batch_tokens": 12}
    refused("seq_len is 2; masked training needs at least 3", masked_dir, tmp_path / "run", **MASKED, **short)
    refused("mask_prob is 1.0; it must be above 0 and below 1", masked_dir, tmp_path / "run", objective="mlm",
            mask_prob=1)  # fmt: skip


def test_foreign_folders_are_refused_as_init_from(data_dir, four, tmp_path):
    refused("holds no checkpoint of flatlm's", data_dir, tmp_path / "run", init_from=data_dir)
    foreign = tmp_path / "foreign"
    (foreign / "ckpt" / "step_00000001").mkdir(parents=True)
    (foreign / "ckpt" / "step_00000001" / "ckpt.pt").write_bytes(b"\x80\4")
    refused("no readable manifest.json", data_dir, tmp_path / "run", init_from=foreign)
    refused("another model: n_layer 3 there, 2 here", data_dir, tmp_path / "run", init_from=four, n_layer=2)


def test_an_out_dir_that_is_a_file_is_refused(data_dir, tmp_path):
    (tmp_path / "file").write_text("precious")
    refused("cannot be written to.*use another --out_dir", data_dir, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_foreign_data_needs_a_vocabulary_and_then_trains(data_dir, tmp_path):
    """nanoGPT's files: bare uint16, no meta.json."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for split in ("train", "val"):
        np.concatenate(Split(data_dir, split, 37).shards).tofile(raw / f"{split}.bin")
    refused("no meta.json to take vocab_size from; set --vocab_size", raw, tmp_path / "run", vocab_size="none")
    assert (run(raw, tmp_path / "run", max_steps=2) / "finished").exists()
    assert "val_bpb" not in (tmp_path / "run" / "log.jsonl").read_text()  # nobody counted bytes


def test_wrong_input_ends_the_command_with_code_2_and_one_line(tmp_path):
    folders = [f"--data_dir={tmp_path / 'gone'}", f"--out_dir={tmp_path / 'run'}"]
    done = run_script(ROOT / "train.py", ["--device=cpu", *folders], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "prepare.py" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_step_with_a_gradient_scaler_is_the_step_without_one():
    """The path that fp16 takes on CUDA, in float32 on the CPU: scaling by a power of two changes no bit."""
    weights, norms = [], []
    for enabled in (True, False):
        model = Transformer(ModelConfig(vocab_size=37, block_size=11, n_layer=2, n_head=5, n_embd=20))
        model.init_weights(seed=1)
        optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-2))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        ids = torch.randint(37, (3, 8), generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            batches = [(ids[:, :-1], ids[:, 1:])] * 2
            _, norm, _ = train.train_step(model, optimizer, scaler, batches, step_settings(), World(0, 1, torch.device("cpu"), "fp32"))
        norms.append(norm)
        weights.append(model.state_dict())
        json.dumps(scaler.state_dict())  # as the manifest of a checkpoint holds it
    assert norms[0] == norms[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_step_whose_gradient_overflows_is_skipped_and_the_scale_lowered():
    model = Transformer(ModelConfig(vocab_size=37, block_size=11, n_layer=2, n_head=5, n_embd=20))
    model.init_weights(seed=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-2))
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    ids = torch.randint(37, (3, 8), generator=torch.Generator().manual_seed(1))
    batches = [(ids[:, :-1], ids[:, 1:])] * 2
    train.train_step(model, optimizer, scaler, batches, step_settings(), World(0, 1, torch.device("cpu"), "fp32"))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert scaler.get_scale() < 3e38


def test_importing_the_script_leaves_out_what_is_slow_and_may_not_be_needed():
    """Of checkpoints, curves and logs; importing torch is what --help waits for."""
    code = "import sys, train; print(*{'torch.distributed.checkpoint', 'matplotlib', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare.txt is absent")
def test_speedrun_cpu_reaches_the_loss_of_nanogpts_documented_run(tmp_path):
    def command(*arguments):
        subprocess.run([sys.executable, *arguments, f"--data_dir={tmp_path}/data"], cwd=ROOT, check=True)

    command("prepare.py", f"--input={SHAKESPEARE}", "--tokenizer=byte", "--val_fraction=0.1")
    command("train.py", "config/speedrun_cpu.py", "--target_loss=1.898", f"--out_dir={tmp_path}/run")
    evaluations = records(tmp_path / "run", "val_loss")
    assert list(evaluations) == [0, 100] and evaluations[100] <= 1.898
    assert "target_loss 1.898 reached" in (tmp_path / "run" / "finished").read_text()
