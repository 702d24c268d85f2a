"""A benchmark's figures are there, agree with each other, and are of the code that trains."""

import json

import numpy as np
import pytest
import torch

import bench
import config
import plan
import train
from data import Split, TrainOrder
from model import ModelConfig
from objective import IGNORE, Masked
from ranks import on_ranks, write_data
from tokenizer import SPECIALS

SMALL = [
    "--vocab_size=37", "--block_size=11", "--n_layer=3", "--n_head=5", "--n_embd=20", "--seq_len=7",
    "--micro_batch_size=3", "--batch_tokens=63", "--bench_steps=5", "--bench_warmup=2", "--device=cpu",
    "--precision=fp32",
]  # fmt: skip


MASKED = ["config/quickstart_bert.py", "--n_inner=33", "--head_dim=6", "--mask_prob=0.3"]


def benched(tmp_path, *args):
    presets, args = [a for a in args if a[:2] != "--"], [a for a in args if a[:2] == "--"]
    bench.main(config.load(bench.Settings, [*presets, *SMALL, f"--json={tmp_path / 'b.json'}", *args]))
    return json.loads((tmp_path / "b.json").read_text())


def test_figures_agree_with_each_other(tmp_path, capsys):
    f = benched(tmp_path)
    cfg = ModelConfig(vocab_size=37, block_size=11, n_layer=3, n_head=5, n_embd=20)
    assert f["steps"] == 5 and f["micro_steps"] == f["micro_steps_of_training"] == 3
    assert f["tokens_per_s"] * f["step_ms"] / 1e3 == pytest.approx(63)
    assert 0 < f["step_ms_min"] <= f["step_ms"] <= f["step_ms_max"]
    assert f["n_params"] == plan.num_params(cfg)
    assert f["flops_per_token"] == plan.flops_per_token(cfg, 7) > f["flops_per_token_causal"]
    assert f["mfu"] * f["peak_tflops"] * 1e12 == pytest.approx(f["tokens_per_s"] * f["flops_per_token"])
    assert f["mfu"] / f["mfu_causal"] == pytest.approx(f["flops_per_token"] / f["flops_per_token_causal"])
    assert "measured fp32 matmul" in f["peak_name"]
    assert 0.05 < f["peak_memory_gib"] < 64  # this process has torch in it
    assert (f["ranks"], f["precision"], f["micro_batch_size"], f["seq_len"]) == (1, "fp32", 3, 7)
    out = capsys.readouterr().out
    for word in ("step", "tokens/s", "mfu", "PaLM's count", "GiB", "median of 5"):
        assert word in out


def benched_on_ranks(folder, args):
    """Rank 0's figures, and the batches of every rank."""
    seen, step = [], bench.train_step
    bench.train_step = lambda model, optimizer, scaler, batches, *rest: (
        seen.append(batches) or step(model, optimizer, scaler, batches, *rest)
    )
    bench.main(config.load(bench.Settings, [*SMALL, f"--json={folder}/b.json", *args]))
    return seen[0][0][0]


@pytest.mark.parametrize(("args", "data_ranks"), [(["--tp=2"], 1), ([], 2)])
def test_ranks_that_share_layers_share_their_tokens_too(args, data_ranks, tmp_path):
    """Tokens/s count the tokens of a step once; MFU's peak is that of all ranks."""
    args += ["--n_head=2", "--seq_len=8", "--batch_tokens=48"]
    [ids] = on_ranks(2, (benched_on_ranks, str(tmp_path), args))
    assert torch.equal(*ids) == (data_ranks == 1)
    f = json.loads((tmp_path / "b.json").read_text())
    assert (f["ranks"], f["data_ranks"], f["micro_steps"]) == (2, data_ranks, 2 // data_ranks)
    assert f["tokens_per_s"] * f["step_ms"] / 1e3 == pytest.approx(48)
    assert f["mfu"] * f["peak_tflops"] * 1e12 * 2 == pytest.approx(f["tokens_per_s"] * f["flops_per_token"])


def test_steps_too_long_to_time_whole_are_timed_in_part_and_say_so(tmp_path, capsys):
    f = benched(tmp_path, "--batch_tokens=21000", "--bench_seconds=0.001")
    assert f["micro_steps_of_training"] == 1000 and f["micro_steps"] == 1 and f["steps"] == 3
    assert f["tokens_per_s"] * f["step_ms"] / 1e3 == pytest.approx(21)
    assert "a training step has 1000" in capsys.readouterr().out


def test_real_data_is_read_as_training_reads_it(tmp_path):
    data = write_data(tmp_path / "data")
    assert benched(tmp_path, "--real_data", "--vocab_size=none", f"--data_dir={data}")["n_params"] > 0
    with pytest.raises(ValueError, match="data_dir is none; set it"):
        benched(tmp_path, "--real_data")


@pytest.mark.parametrize("real_data", [False, True])
def test_a_masked_preset_is_timed_with_the_head_at_masked_places_alone(real_data, tmp_path, capsys, monkeypatch):
    batches = []

    def train_step(model, optimizer, scaler, step, *args):
        batches.append(step)
        return train.train_step(model, optimizer, scaler, step, *args)

    monkeypatch.setattr(bench, "train_step", train_step)
    specials = {name: 32 + i for i, name in enumerate(SPECIALS)}
    data = write_data(tmp_path / "data", specials=specials)
    args = ["--real_data", "--vocab_size=none", f"--data_dir={data}"] if real_data else []
    f = benched(tmp_path, *MASKED, *args)
    cfg = ModelConfig(
        objective="mlm", vocab_size=37, block_size=11, n_layer=3, n_head=5, n_embd=20, head_dim=6, n_inner=33,
        mlp="swiglu", norm="rmsnorm", qk_norm=True, position="rope", bias=False,
    )  # fmt: skip
    assert f["n_params"] == plan.num_params(cfg) and (f["steps"], f["micro_steps"]) == (5, 3)
    assert f["flops_per_token"] == f["flops_per_token_causal"] == plan.flops_per_token(cfg, 7, 2 / 7)
    assert f["tokens_per_s"] * f["step_ms"] / 1e3 == pytest.approx(63) and f["mfu"] > 0
    for step in batches[2:]:  # past the warm-up
        assert [[part.shape for part in batch] for batch in step] == [[(3, 7), (3, 2), (3, 2)]] * 3
        assert sum((targets != IGNORE).sum() for _, targets, _ in step) > 12  # of 18; some rows hold special tokens
    assert len({batch[0].numpy().tobytes() for batch in batches[-1]}) == 3
    assert "causal" not in capsys.readouterr().out
    if real_data:  # the first are those of a training run
        split = Split(data, "train", 37)
        places = zip(*TrainOrder(split, 5, 1337).locate([0, 1, 2]))
        rows = np.stack([split.shards[shard][start : start + 5] for shard, start in places]).astype(np.int64)
        expected = Masked(7, 0.3, 1337, 37, specials).batch(rows, 0)
        assert all(torch.equal(part, other) for part, other in zip(batches[0][0], expected, strict=True))


def test_profile_writes_a_trace_of_the_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    benched(tmp_path, "--profile")
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"aten::addmm", "aten::scaled_dot_product_attention"} <= names


def test_random_tokens_need_a_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="is none; set it"):
        benched(tmp_path, "--vocab_size=none")


def test_impossible_batches_are_refused_with_ones_that_fit(tmp_path):
    with pytest.raises(ValueError, match="batch_tokens 64 is not a multiple of 21"):
        benched(tmp_path, "--batch_tokens=64")
