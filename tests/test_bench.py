"""A benchmark's figures are there, agree with each other, and are of the code that trains."""

import json

import pytest

import bench
import config
import plan
from model import ModelConfig
from ranks import write_data

SMALL = [
    "--vocab_size=37", "--block_size=11", "--n_layer=3", "--n_head=5", "--n_embd=20", "--seq_len=7",
    "--micro_batch_size=3", "--batch_tokens=63", "--bench_steps=5", "--bench_warmup=2", "--device=cpu",
    "--precision=fp32",
]  # fmt: skip


def benched(tmp_path, *args):
    bench.main(config.load(bench.Settings, [*SMALL, f"--json={tmp_path / 'b.json'}", *args]))
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
