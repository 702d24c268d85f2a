"""A benchmark's figures are complete, agree with each other, and are measured on the code that trains."""

import dataclasses
import functools
import itertools
import json
import os
import resource
import statistics
import subprocess
import time
import types
from collections import defaultdict
from unittest import mock

import numpy as np
import pytest
import torch

import bench
import config
import plan
import train
from data import Split
from model import ModelConfig
from objective import IGNORE, Masked
from order import TrainOrder
from perf import cost, hardware, machine, meters, pictures, rates, sweep, timing
from ranks import on_ranks, run_script, write_data
from run.folder import run_dir_of
from test_machine import small_sizes
from text.tokenizer import SPECIALS
from world import World, WorldConfig, init_world

SMALL = [
    "--vocab_size=37", "--block_size=11", "--n_layer=3", "--n_head=5", "--n_embd=20", "--seq_len=7",
    "--micro_batch_size=3", "--batch_tokens=63", "--bench_steps=5", "--bench_warmup=2", "--device=cpu",
    "--precision=fp32", "--picture=false",
]  # fmt: skip


GPT = SMALL[:7] + ["--batch_tokens=21"]
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
    assert f["n_params"] == cost.num_params(cfg)
    assert f["flops_per_token"] == cost.flops_per_token(cfg, 7) > f["flops_per_token_causal"]
    assert f["mfu"] * f["peak_tflops"] * 1e12 == pytest.approx(f["tokens_per_s"] * f["flops_per_token"])
    assert f["mfu"] / f["mfu_causal"] == pytest.approx(f["flops_per_token"] / f["flops_per_token_causal"])
    assert "measured fp32 matmul" in f["peak_name"]
    assert 0.05 < f["peak_memory_gib"] < 64  # this process has torch in it
    assert (f["ranks"], f["precision"], f["micro_batch_size"], f["seq_len"]) == (1, "fp32", 3, 7)
    out = capsys.readouterr().out
    for word in ("step", "tokens/s", "mfu", "PaLM's count", "GiB", "median of 5"):
        assert word in out


def benched_on_ranks(folder, args):
    """Rank 0's figures in a folder; returns this rank's first batch, and how often it measured matmuls."""
    seen, step = [], bench.train_step
    os.chdir(folder)
    bench.train_step = lambda model, optimizer, scaler, batches, *rest: (
        seen.append(batches) or step(model, optimizer, scaler, batches, *rest)
    )
    cfg = config.load(bench.Settings, [*SMALL, f"--json={folder}/b.json", *args])
    with small_sizes(), mock.patch.object(machine, "matmuls", wraps=machine.matmuls) as matmuls:
        bench.main(cfg)
    return seen[0][0][0], matmuls.call_count


@pytest.mark.parametrize(("args", "data_ranks"), [pytest.param(["--tp=2"], 1, marks=pytest.mark.slow), ([], 2)])
def test_ranks_that_share_layers_share_their_tokens_too(args, data_ranks, tmp_path):
    """Tokens/s count the tokens of a step once; MFU is relative to the peak of all ranks."""
    args += ["--n_head=2", "--seq_len=8", "--batch_tokens=48", "--picture=true"]
    [by_rank] = on_ranks(2, (benched_on_ranks, str(tmp_path), args))
    ids, measured = zip(*by_rank)
    assert torch.equal(*ids) == (data_ranks == 1) and measured == (1, 1)  # all ranks time matmuls together
    f = json.loads((tmp_path / "b.json").read_text())
    assert (f["ranks"], f["data_ranks"], f["micro_steps"]) == (2, data_ranks, 2 // data_ranks)
    assert f["tokens_per_s"] * f["step_ms"] / 1e3 == pytest.approx(48)
    assert f["mfu"] * f["peak_tflops"] * 1e12 * 2 == pytest.approx(f["tokens_per_s"] * f["flops_per_token"])
    assert sum(f["time_share"].values()) == pytest.approx(1)
    assert 0 < f["time_share"]["communication"] < 1
    whole = cost.num_params(ModelConfig(vocab_size=64, block_size=11, n_layer=3, n_head=2, n_embd=20)) * 4 / 2**30
    assert f["memory_gib"]["weights"] == f["memory_gib"]["gradients"] < whole * 1.001
    assert (f["memory_gib"]["weights"] < 0.9 * whole) == (data_ranks == 1)  # tp halves most of it


@pytest.mark.parametrize("args", [
    ["--strategy=ddp"], ["--strategy=fsdp"], ["--strategy=fsdp", "--accumulate=whole", "--reshard=false"],
    ["--pp=2"], ["--pp=2", "--activation_checkpointing=full"],
], ids=" ".join)  # fmt: skip
@pytest.mark.slow
def test_memory_of_ranks_that_share_the_work_is_what_was_predicted(args, tmp_path):
    sizes = ["--vocab_size=640", "--n_head=4", "--n_embd=128", "--n_layer=6", "--seq_len=64", "--block_size=64"]
    batch = ["--micro_batch_size=8", "--batch_tokens=2048", "--precision=bf16"]
    on_ranks(2, (benched_on_ranks, str(tmp_path), [*sizes, *batch, *args]))
    assert abs(json.loads((tmp_path / "b.json").read_text())["error"]["memory_gib.total"]) < 0.1


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
    assert f["n_params"] == cost.num_params(cfg) and (f["steps"], f["micro_steps"]) == (5, 3)
    assert f["flops_per_token"] == f["flops_per_token_causal"] == cost.flops_per_token(cfg, 7, 2 / 7)
    assert f["tokens_per_s"] * f["step_ms"] / 1e3 == pytest.approx(63) and f["mfu"] > 0
    for step in batches[2:]:  # past the warm-up
        assert [[part.shape for part in batch] for batch in step] == [[(3, 7), (3, 2), (3, 2)]] * 3
        assert sum((targets != IGNORE).sum() for _, targets, _ in step) > 12  # of 18; some rows hold special tokens
    assert len({batch[0].numpy().tobytes() for batch in batches[-1]}) == 3
    assert "causal" not in capsys.readouterr().out
    if real_data:  # the first ones equal a training run
        split = Split(data, "train", 37)
        places = zip(*TrainOrder(split, 5, 1337).locate([0, 1, 2]))
        rows = np.stack([split.shards[shard][start : start + 5] for shard, start in places]).astype(np.int64)
        expected = Masked(7, 0.3, 1337, 37, specials).batch(rows, 0)
        assert all(torch.equal(part, other) for part, other in zip(batches[0][0], expected, strict=True))


def test_profile_writes_a_trace_of_the_steps_their_operators_and_their_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    benched(tmp_path, "--profile")
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"aten::addmm", "aten::scaled_dot_product_attention"} <= names
    out = capsys.readouterr().out
    shares = [float(line.partition("%")[0].split()[-1]) for line in out.splitlines() if "::" in line]
    assert 3 < len(shares) <= 20 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_without_vocabulary_and_data_it_is_gpt2s_and_the_benchmark_says_so(tmp_path, capsys):
    small = ["--vocab_size=none", "--micro_batch_size=1", "--batch_tokens=7", "--bench_steps=1", "--bench_warmup=0"]
    cfg = ModelConfig(vocab_size=50257, block_size=11, n_layer=3, n_head=5, n_embd=20)
    assert benched(tmp_path, *small)["n_params"] == cost.num_params(cfg)
    assert "vocabulary 50,257 tokens, GPT-2's" in capsys.readouterr().out


def test_impossible_batches_are_refused_with_ones_that_fit(tmp_path):
    with pytest.raises(ValueError, match="batch_tokens 64 is not a multiple of 21"):
        benched(tmp_path, "--batch_tokens=64")


def test_running_out_of_memory_is_one_line_with_settings_that_would_fit(monkeypatch):
    def train_step(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "train_step", train_step)
    args = [arg for arg in SMALL if not arg.startswith("--seq_len")]
    with pytest.raises(ValueError, match="out of memory on rank 0: .* what would fit: --micro_batch_size=1"):
        bench.main(config.load(bench.Settings, [*args, "--batch_tokens=66"]))


# ---- where time, memory and energy go


def test_shares_of_time_are_those_of_the_phases_and_sum_to_1(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    f = benched(tmp_path, "--real_data", "--vocab_size=none", f"--data_dir={data}")
    share = f["time_share"]
    assert sum(share.values()) == pytest.approx(1)
    assert share["communication"] == 0 and all(share[name] > 0 for name in meters.PHASES)
    assert "time       forward" in capsys.readouterr().out


def test_phases_have_the_time_inside_them_and_time_between_counts_nowhere(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    world, order = World(0, 1, torch.device("cpu"), "fp32"), []
    with meters.timed_phases(world, before={"optimizer": lambda: order.append("before")}) as seconds:
        for name in ("data", "forward", "optimizer", "forward"):
            with world.phase(name, "1 of 2"):
                order.append(name)
    assert seconds == {"data": 1, "forward": 4 + 64, "backward": 0, "optimizer": 16}
    assert order == ["data", "forward", "before", "optimizer", "forward"]
    with world.phase("data"):  # the timer is gone
        pass
    assert seconds["data"] == 1


def test_time_that_intervals_cover_counts_overlaps_once():
    assert meters.length([(0, 2), (1, 3), (5, 9), (-4, -1)], (0.5, 7)) == 2.5 + 2
    assert meters.length([], (0, 1)) == 0


def test_parts_of_memory_are_what_they_are_named_after_and_sum_to_the_total(tmp_path):
    f = benched(tmp_path, "--n_embd=100", "--n_inner=300")["memory_gib"]
    cfg = ModelConfig(vocab_size=64, block_size=11, n_layer=3, n_head=5, n_embd=100, n_inner=300)  # 37, padded
    weights = 4 * cost.num_params(cfg) / 2**30
    assert f["weights"] == f["gradients"] == pytest.approx(weights)
    assert f["optimizer"] == pytest.approx(2 * weights, rel=1e-3)  # and a step a tensor
    assert f["total"] == pytest.approx(sum(f.values()) - f["total"])
    rows, chunk = 3 * 7, 4 * 64
    assert f["logits"] * 2**30 >= rows * chunk + 4 * (rows + 64) * 100  # logits, gradients of hidden and of weights
    assert f["logits"] * 2**30 < 4 * rows * chunk + 2 * 4 * (rows + 64) * 100


def saved_bytes(net, batch):
    """Bytes that autograd keeps of a forward by its own hooks, but for parameters and what the loss keeps."""
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage
        return tensor

    of_parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    of_batch = {part.untyped_storage().data_ptr() for part in batch}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(*batch)
    of_loss = {t.untyped_storage().data_ptr() for t in loss.grad_fn.saved_tensors if t is not None}
    return sum(s.nbytes() for place, s in seen.items() if place not in of_parameters | of_batch | of_loss)


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_activations_are_what_autograd_keeps(kind, tmp_path):
    args = [*SMALL, "--n_embd=40", "--batch_tokens=21", f"--activation_checkpointing={kind}"]
    f = benched(tmp_path, *args)
    cfg = config.load(bench.Settings, args)
    world = World(0, 1, torch.device("cpu"), "fp32")
    net, *_ = train.build(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=7)), world, 1)
    ids = torch.randint(37, (3, 7))
    kept, stream = saved_bytes(net, (ids, ids)), 4 * 21 * 40
    measured = f["memory_gib"]["activations"] * 2**30
    if kind == "none":
        assert measured == pytest.approx(kept, rel=0.05)
    elif kind == "full":  # the blocks' inputs, and what is around the blocks
        assert 3 * stream < measured < 5 * stream + 3 * 5100  # and a random state a block
    else:
        assert (
            8 * stream
            < measured
            < 0.8 * benched(tmp_path, *SMALL, "--n_embd=40", "--batch_tokens=21")["memory_gib"]["activations"] * 2**30
        )


def test_hfu_is_printed_only_with_activation_checkpointing(tmp_path, capsys):
    f = benched(tmp_path)
    assert "hfu" not in f and "hfu" not in capsys.readouterr().out
    cfg = ModelConfig(vocab_size=37, block_size=11, n_layer=3, n_head=5, n_embd=20)
    head = 6 * 37 * 20
    attention = 12 * 3 * 20 * 7
    for args, again in (
        (["--activation_checkpointing=full"], (cost.flops_per_token(cfg, 7) - head) / 3),
        (["--activation_checkpointing=selective"], 0),  # torch's kernel is kept
        (["--activation_checkpointing=selective", "--precision=bf16"], attention / 3),
    ):
        f = benched(tmp_path, *args)
        assert f["hfu"] / f["mfu"] == pytest.approx(1 + again / f["flops_per_token"])
        assert f["hfu_causal"] > 0 and "hfu" in capsys.readouterr().out


def test_power_is_sampled_during_the_steps(tmp_path, capsys, monkeypatch):
    assert benched(tmp_path)["power_w"] is None
    assert "power      not measured: only NVIDIA's GPUs report it" in capsys.readouterr().out
    monkeypatch.setattr(meters, "power_reader", lambda device: (lambda: 250.0, None))
    f = benched(tmp_path)
    assert f["power_w"] == 250 and "250 W" in capsys.readouterr().out
    assert f["energy_per_token_mj"] == pytest.approx(250e3 / f["tokens_per_s"], rel=0.9)  # by the mean, not the median


@pytest.mark.parametrize(("answer", "watts", "reason"), [
    (75_500, 75.5, None), (ModuleNotFoundError("pynvml"), None, "pip install nvidia-ml-py measures it"),
    (OSError("not supported"), None, "NVML does not report it: not supported"),
])  # fmt: skip
def test_power_is_torchs_in_watts_or_there_is_a_reason(answer, watts, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "power_draw", mock.Mock(side_effect=itertools.repeat(answer)))
    read, why_not = meters.power_reader(torch.device("cuda"))
    assert (read and read(), why_not) == (watts, reason)


# ---- prediction, comparison, pictures


@pytest.fixture
def small_machine(tmp_path, monkeypatch):
    """Measures the machine at sizes that take no time; in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    with small_sizes():
        yield


def test_compare_prints_figures_side_by_side_with_their_ratio(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text('{"step_ms": 8.0, "device": "x", "memory_gib": {"total": 2.0}, "none": null, "zero": 0}')
    b.write_text('{"step_ms": 10, "device": "y", "memory_gib": {"total": 1.0}, "none": null, "zero": 1, "hfu": 0.25}')
    bench.main(config.load(bench.Settings, ["--compare", str(a), str(b)]))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == [str(a), str(b), "B", "/", "A"]
    assert rows[1:] == [
        ["step_ms", "8", "10", "1.250"], ["device", "x", "y"], ["memory_gib.total", "2", "1", "0.500"],
        ["zero", "0", "1"], ["hfu", "-", "0.25"],
    ]  # fmt: skip
    for files, message in (
        ([str(a)], "takes two files, not 1"),
        ([str(a), str(tmp_path / "c.json")], "there is no .*c.json; run bench.py --json first"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.main(config.load(bench.Settings, ["--compare", *files]))
    with pytest.raises(ValueError, match="only --compare reads files"):
        config.load(bench.Settings, [str(a)])
    with pytest.raises(ValueError, match="neither a preset file"):  # train.py reads no such files
        config.load(train.Settings, [str(tmp_path / "c.json")])


def test_bare_json_is_one_object_on_the_last_line_behind_the_picture(small_machine, tmp_path, capsys):
    bench.main(config.load(bench.Settings, [*SMALL, "--json", "--picture=true"]))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["tokens"] == 63 and figures["time_share"].keys() == {*meters.PHASES, "communication"}
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="must name a file in a folder that exists"):
        config.load(bench.Settings, [f"--json={tmp_path}/no/b.json"])


@pytest.mark.slow
def test_the_machine_is_measured_for_the_planner_and_for_predictions_beside_what_is_measured(
    small_machine, tmp_path, capsys
):
    assert "step_s" not in benched(tmp_path)["predicted"]  # nothing is known of this machine
    bench.main(config.load(bench.Settings, ["--device=cpu", "--precision=fp32", "--json"]))
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out/machine.json").read_text())
    assert "matmul_tflops fp32" in out and "overhead_ms" in out and (tmp_path / "bench.png").exists()

    cfg, _ = plan.resolve(config.load(plan.Settings, [*GPT, "--gpu=this", "--precision=fp32"]))
    gpu = plan.gpu_of(cfg.plan)
    setup = plan.setup_on(gpu, cfg)
    f = plan.predict(cfg, gpu, setup)
    assert (f["gpu"], f["n_gpus"], f["fits"]) == ("this", 1, True)
    assert 0 < f["step_s"] == pytest.approx(sum(timing.step_seconds(cfg.model, setup, gpu).values()))
    with pytest.raises(ValueError, match="run python bench.py --precision=bf16"):
        plan.predict(cfg, gpu, dataclasses.replace(setup, precision="bf16"))
    for args in ([], ["--compare"]):
        plan.main(config.load(plan.Settings, [*GPT, "--gpu=this", "--precision=fp32", *args]))
        assert "this" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give --gpu_link_gbs"):
        plan.main(config.load(plan.Settings, [*GPT, "--batch_tokens=42", "--gpu=this", "--n_gpus=2"]))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json has no rates of training; run python bench.py"):
        plan.main(config.load(plan.Settings, [*GPT, "--gpu=this", "--machine=bad.json"]))

    f = benched(tmp_path, "--batch_tokens=21000", "--bench_seconds=0.001")
    expected, error = f["predicted"], f["error"]
    assert expected["tokens_per_s"] * expected["step_s"] == pytest.approx(21)  # the micro-step that was timed
    assert error["step_s"] == pytest.approx(expected["step_s"] / (f["step_ms"] / 1e3) - 1)
    assert error["mfu"] == pytest.approx(expected["mfu"] / f["mfu"] - 1)
    assert error["memory_gib.total"] == pytest.approx(expected["memory_gib"]["total"] / f["memory_gib"]["total"] - 1)
    assert abs(error["memory_gib.weights"]) < 0.05  # the planner pads the vocabulary, too
    lines = capsys.readouterr().out.splitlines()
    start = len(lines) - 1 - lines[::-1].index("")
    assert [line.split()[:1] for line in lines[start + 2 :]][:3] == [["step,"], ["tokens/s"], ["mfu"]]
    assert benched(tmp_path, "--precision=bf16")["predicted"].keys() == {"memory_gib"}  # not measured


def test_without_matplotlib_there_is_no_picture_and_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    pictures.write_picture("bench.png", (8, 5), pictures.draw_roofline, {}, "")
    assert capsys.readouterr().out == "no bench.png: pip install matplotlib draws it\n"


@pytest.mark.slow
def test_the_roofline_takes_what_was_measured_or_measures_the_runs_precision_alone(
    small_machine, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(bench, "write_picture", lambda path, size, draw, figures, title: drawn.append(figures))
    benched(tmp_path, "--picture=true")
    assert drawn[-1]["matmul_tflops"].keys() == {"fp32"} and list(drawn[-1]["roofs_tflops"]) == ["measured fp32 matmul"]
    bench.main(config.load(bench.Settings, ["--device=cpu", "--precision=fp32"]))
    monkeypatch.setattr(bench.machine, "matmuls", None)  # not called again
    benched(tmp_path, "--picture=true")
    assert drawn[-1]["matmul_tflops"] == json.loads((tmp_path / "out/machine.json").read_text())["matmul_tflops"]


@pytest.mark.parametrize(("rates", "warning"), [((3e12, 2e12), "two measurements differ by 50%"), ((3e12, 2.9e12), "")])
def test_mfu_relative_to_a_peak_of_a_busy_machine_says_so(rates, warning, tmp_path, monkeypatch, capsys):
    measured = iter(rates)
    monkeypatch.setattr(bench.hardware, "measured_matmul_flops", lambda device, precision: next(measured))
    f = benched(tmp_path)
    assert f["peak_tflops"] == 3 and ("busy" in f["peak_name"]) == bool(warning)
    assert f"measured fp32 matmul{warning and ', '}{warning}" in capsys.readouterr().out


def test_a_benchmark_that_hangs_is_ended(tmp_path):
    (tmp_path / "hangs.py").write_text(f"""
import time, bench, config
bench.train_step = lambda *args: time.sleep(60)
bench.main(config.load(bench.Settings, {[*SMALL, "--timeout_minutes=0.05"]!r}))
""")
    done = run_script(tmp_path / "hangs.py", [], tmp_path)
    told = "error: no progress for 0.05 minutes (timeout_minutes): the run hangs"
    assert done.returncode == 1 and told in done.stderr


PRESETS = {
    "quickstart": ["--vocab_size=4096"],
    "quickstart_bert": ["--vocab_size=4096"],
    "shakespeare_char": ["--vocab_size=256"],
    "speedrun_cpu": ["--vocab_size=256"],
    "gpt2_124m": ["--micro_batch_size=2", "--batch_tokens=2048"],
    "bert_base": ["--micro_batch_size=16", "--batch_tokens=2048"],
    "modern_124m": ["--micro_batch_size=2", "--batch_tokens=2048"],
}


@pytest.mark.alone
@pytest.mark.slow
def test_steps_take_the_predicted_time(monkeypatch):
    """Within 20 %, with one thread, as the median of rates and steps measured in turn by the time of this process.

    Other processes take no part in that time, but share the caches: a machine that is busy is given more rounds. One
    where the ratio of the same preset differs by a quarter between rounds measures nothing.
    """
    monkeypatch.setattr(meters, "time", types.SimpleNamespace(perf_counter=time.process_time))
    n_threads, ratios = torch.get_num_threads(), defaultdict(list)
    torch.set_num_threads(1)

    def off():
        """The presets whose median is not within 20 %."""
        return [p for p in PRESETS if len(ratios[p]) < 3 or abs(statistics.median(ratios[p]) - 1) >= 0.2]

    with init_world(WorldConfig(device="cpu")) as world:
        trained = {preset: small_step(preset, world) for preset in PRESETS}
        for _ in range(15):
            figures = {
                "matmul_tflops": machine.matmuls(world, ["fp32", world.precision], []), "device": "cpu", "memory_gib": 1,
                "bandwidth_gb_per_s": machine.bandwidths(world), "collectives_gb_per_s": {}, "device_type": "cpu",
                "precision": world.precision, "rates": rates.training_rates(world, []),
            }  # fmt: skip
            for preset in off():
                cfg, micro_steps, step = trained[preset]
                setup = cost.setup_of(cfg, (1, 1, 1), micro_steps, world.precision, "cpu")
                predicted = sum(timing.step_seconds(cfg.model, setup, hardware.this(figures)).values())
                ratios[preset].append(predicted / meters.timed(step, world, seconds=2)[0])
            if not off():
                break
    torch.set_num_threads(n_threads)
    for p in PRESETS:
        print(f"{p}: predicted / measured {statistics.median(ratios[p]):.2f}, {len(ratios[p])} rounds")
    if off() and min(sorted(ratios[p])[-2] / min(ratios[p]) for p in off()) > 1.25:
        pytest.skip(f"this machine is busy: what was measured differs between rounds: {dict(ratios)}")
    assert not off(), dict(ratios)


def small_step(preset, world):
    """(settings, micro-steps of a step, a function that takes one) of a preset at the size that PRESETS gives."""
    cfg = train.resolve(config.load(bench.Settings, [f"config/{preset}.py", *PRESETS[preset], "--device=cpu"]))
    micro_steps = cfg.data.batch_tokens // cfg.data.micro_batch_size // cfg.data.seq_len
    batches = bench.random_batches(cfg, micro_steps, world)
    model, optimizer, scaler = train.build(cfg, world, 1)
    return cfg, micro_steps, lambda: train.train_step(model, optimizer, scaler, next(batches), cfg, world)


# ---- the sweep


def rows_of(ended):
    """A trial that returns {(checkpointing, compile, micro-batch): tokens/s, or None for out of memory}."""

    def trial(cfg, setting):
        speed = ended[tuple(setting[key] for key in sweep.KEYS)]
        if speed is None:
            return setting | {"ended": "out of memory", "said": "out of memory"}
        return setting | {"ended": "well", "tokens_per_s": speed, "memory_gib": 1.0}

    return trial


def test_a_sweep_climbs_while_settings_fit_and_compiled_or_not_while_they_get_faster(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    speeds = {(kind, False, n): 100 + n for kind in ("none", "selective", "full") for n in (1, 2, 4, 8, 16)}
    speeds |= {(kind, True, n): 200 - n for kind in ("none", "selective", "full") for n in (1, 2, 4, 8, 16)}
    speeds |= {("none", False, 4): None, ("none", True, 4): None, ("none", True, 2): None, ("full", True, 16): None}
    monkeypatch.setattr(sweep, "trial", rows_of(speeds))
    cfg = config.load(bench.Settings, [*SMALL, "--sweep", "--micro_batch_size=4", "--batch_tokens=112"])
    cfg = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, compile=None))
    monkeypatch.setattr(sweep, "pick_device", lambda device: torch.device("cuda"))
    found = sweep.sweep(cfg, cfg)
    tried = [tuple(row[key] for key in sweep.KEYS) for row in found["rows"]]
    assert [n for kind, compiled, n in tried if (kind, compiled) == ("none", True)] == [4, 2, 1]  # down to what fits
    assert [n for kind, compiled, n in tried if (kind, compiled) == ("none", False)] == [4, 2]
    assert [n for kind, compiled, n in tried if (kind, compiled) == ("selective", True)] == [4, 8, 16]  # up to the end
    assert [n for kind, compiled, n in tried if (kind, compiled) == ("full", True)] == [4, 8, 16]
    assert [n for kind, compiled, n in tried if (kind, compiled) == ("full", False)] == [4, 8, 16]
    assert (found["fastest"]["micro_batch_size"], found["largest"]["micro_batch_size"]) == (1, 16)
    monkeypatch.setattr(sweep, "trial", rows_of(dict.fromkeys(speeds)))
    with pytest.raises(ValueError, match="no setting runs; the last one ended with: out of memory"):
        sweep.sweep(cfg, cfg)


def test_micro_batches_of_a_sweep_divide_the_step():
    assert sweep.sizes_around(6, 90) == [1, 3, 6, 15, 30, 90]
    assert sweep.sizes_around(1, 1) == [1]


@pytest.mark.slow
def test_a_sweep_under_a_limit_of_memory_has_a_row_for_what_does_not_fit_and_ends_in_a_preset_that_trains(
    tmp_path, capsys, monkeypatch
):
    """Its sizes are 1 sequence or, as that is a prime, 8009."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("n_layer, n_head, n_embd, block_size = 2, 2, 64, 64\nvocab_size = 97\n")
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    monkeypatch.setattr(sweep.subprocess, "run", functools.partial(subprocess.run, preexec_fn=limit))
    monkeypatch.setattr(sweep, "CHECKPOINTING", ("none",))
    args = ["--batch_tokens=512576", "--micro_batch_size=1", "--device=cpu", "--precision=fp32"]
    short = ["--bench_steps=3", "--bench_warmup=0", "--bench_seconds=0"]
    bench.main(config.load(bench.Settings, ["mine.py", *args, *short, "--sweep", "--sweep_seconds=60", "--json"]))
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert [(row["micro_batch_size"], row["ended"]) for row in found["rows"]] == [(1, "well"), (8009, "out of memory")]
    assert out[2].split() == ["none", "false", "8009", "out", "of", "memory"]
    row = found["rows"][0]
    assert found["fastest"] == found["largest"] == row and row["tokens_per_s"] > 0 and row["memory_gib"] > 0
    command = next(line for line in out if "train.py" in line).split()
    assert command[:4] == ["python", "train.py", "mine.py", "out/sweep/mine.py"]
    assert set(command[4:]) == set(args) - {"--micro_batch_size=1"}
    cfg = train.resolve(config.load(train.Settings, command[2:]))
    assert (cfg.data.micro_batch_size, cfg.data.batch_tokens, run_dir_of(cfg)) == (1, 512576, "out/mine")
    assert (cfg.parallel.activation_checkpointing, cfg.parallel.compile) == ("none", False)


def test_endings_of_a_trial_are_distinguished(monkeypatch):
    cfg = config.load(bench.Settings, [*SMALL, "--sweep_seconds=9"])
    setting = dict(zip(sweep.KEYS, ("none", False, 3)))
    for code, stderr, ended, said in (
        (-9, "", "out of memory", "out of memory"),
        (2, "error: out of memory on rank 0: about 3 GiB are needed", "out of memory", "out of memory"),
        (1, "Traceback\nRuntimeError: something else", "in error", "RuntimeError: something else"),
        (7, "", "in error", "ended with code 7"),
    ):
        done = types.SimpleNamespace(returncode=code, stderr=stderr)
        monkeypatch.setattr(sweep.subprocess, "run", lambda *args, **kwargs: done)
        assert sweep.trial(cfg, setting) == setting | {"ended": ended, "said": said}

    def late(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired("bench.py", timeout)

    monkeypatch.setattr(sweep.subprocess, "run", late)
    assert sweep.trial(cfg, setting) == setting | {"ended": "late", "said": "over 9 s"}


def test_a_sweep_is_refused_under_torchrun_and_for_batches_that_do_not_fit(monkeypatch):
    with pytest.raises(ValueError, match="batch_tokens 64 is not a multiple of 21"):
        bench.main(config.load(bench.Settings, [*SMALL, "--sweep", "--batch_tokens=64"]))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="run it without torchrun"):
        bench.main(config.load(bench.Settings, [*SMALL, "--sweep"]))
