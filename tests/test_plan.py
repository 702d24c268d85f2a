"""A plan's figures follow from each other, keep the order that holds on any hardware, and are printed."""

import json
from dataclasses import replace

import pytest

import config
import plan
from conftest import ROOT
from perf import hardware, report_plan
from perf.memory import flags, with_settings
from ranks import run_script

JSON = {"n_params", "flops_per_token", "flops_per_token_causal", "memory_gib", "fits", "step_s", "tokens_per_s_per_gpu",
        "mfu", "days", "gpu_hours", "kwh", "cost"}  # fmt: skip
BIG = ["config/gpt2_1558m.py", "--micro_batch_size=1"]


def planned(*args):
    """(settings, GPU, Setup) of a command."""
    cfg, _ = plan.resolve(config.load(plan.Settings, list(args)))
    gpu = plan.gpu_of(cfg.plan)
    return cfg, gpu, plan.setup_on(gpu, cfg)


def figures(*args):
    return plan.predict(*planned(*args))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, no_curves):
    """Runs the planner's main in an empty folder; gives what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        plan.main(config.load(plan.Settings, list(args)))
        return capsys.readouterr().out

    return run


def test_command_prints_its_figures_as_one_object_on_the_last_line(tmp_path):
    arguments = "config/gpt2_124m.py --gpu=h100-sxm --n_gpus=8 --max_tokens=10e9 --json".split()
    done = run_script(ROOT / "plan.py", arguments, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    f = json.loads(done.stdout.splitlines()[-1])
    assert JSON <= f.keys()
    assert {"weights", "gradients", "optimizer", "activations", "logits", "other", "total"} <= f["memory_gib"].keys()
    assert f["n_params"] == 124_439_808 and f["fits"] is True
    for text in (
        "answer     fits on 8 x h100-sxm",
        "FITS",
        "bottleneck",
        "docs/plan.md",
        "tokens/s",
        "mfu",
        "GPU-hours",
        "kWh",
        "$",
        "--availability=0.9",
        "plan.png",
    ):
        assert text in done.stdout
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_figures_follow_from_each_other():
    cfg, gpu, setup = planned("config/gpt2_124m.py", "--gpu=a100-80", "--n_gpus=16", "--max_tokens=3e9", "--pue=1.5",
                              "--gpu_price=2", "--availability=0.8", "--gpu_load=0.5", "--host_share=0.4")  # fmt: skip
    f = plan.predict(cfg, gpu, setup)
    steps = -(-3_000_000_000 // 524_288)
    assert f["tokens"] == steps * 524_288
    assert f["step_s"] == pytest.approx(sum(f["step_parts_s"].values()))
    assert f["days"] * 86400 * 0.8 == pytest.approx(steps * f["step_s"])
    assert f["gpu_hours"] == pytest.approx(16 * 24 * f["days"]) and f["cost"] == pytest.approx(2 * f["gpu_hours"])
    assert f["kwh"] == pytest.approx(f["gpu_hours"] * 0.4 * 0.5 * 1.4 * 1.5)
    assert f["tokens_per_s_per_gpu"] * 16 * f["step_s"] == pytest.approx(524_288)
    assert f["mfu"] == pytest.approx(f["tokens_per_s_per_gpu"] * f["flops_per_token"] / 312e12)
    need = f["memory_gib"]
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "other")
    assert need["total"] == pytest.approx(sum(need[name] for name in parts))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_more_gpus_never_need_more_memory_each(strategy):
    needs = [figures(*BIG, f"--strategy={strategy}", f"--n_gpus={2**k}")["memory_gib"]["total"] for k in range(1, 9)]
    assert needs == sorted(needs, reverse=True)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("gpu", hardware.DEVICES)
def test_more_gpus_are_never_faster_each_but_for_sharing_the_optimizer(strategy, gpu):
    cfg, device, setup = planned(*BIG, f"--gpu={gpu}", "--n_gpus=8", f"--strategy={strategy}")
    speeds = []
    for _, row in plan.scaling(cfg, device, setup):
        parts = row["step_parts_s"]
        speeds.append(row["tokens_per_s_per_gpu"] * row["step_s"] / (row["step_s"] - parts["optimizer_s"]))
    assert all(later <= 1.001 * earlier for earlier, later in zip(speeds, speeds[1:]))


@pytest.mark.parametrize("gpu", hardware.DEVICES)
@pytest.mark.parametrize("preset", ["gpt2_350m", "modern_124m", "bert_large"])
def test_activation_checkpointing_saves_memory_and_costs_at_most_a_third_of_the_time(gpu, preset):
    """With a host that keeps up; where the GPU waits for it, recomputing is free."""
    none, selective, full = (
        figures(f"config/{preset}.py", f"--gpu={gpu}", "--host_speed=100", f"--activation_checkpointing={kind}")
        for kind in ("none", "selective", "full")
    )
    for more, less in ((none, selective), (selective, full)):
        assert less["memory_gib"]["total"] < more["memory_gib"]["total"]
    assert none["step_s"] < selective["step_s"] < full["step_s"] < 1.34 * none["step_s"]


def test_gathering_at_each_micro_step_is_paid_for():
    large = ["--n_layer=96", "--n_head=96", "--n_embd=12288", "--block_size=2048", "--batch_tokens=12582912",
             "--strategy=fsdp", "--n_gpus=1536", "--gpu=a100-80", "--activation_checkpointing=full"]  # fmt: skip
    slow, fast = (figures(*large, f"--micro_batch_size={n}")["step_s"] for n in (1, 4))
    assert slow > 1.2 * fast
    times = [figures(*large, "--micro_batch_size=1", f"--network_gbs={gbs}")["step_s"] for gbs in (3, 6, 25)]
    assert times == sorted(times, reverse=True)


def test_faster_code_saves_computing_alone():
    one, two = (figures("config/gpt2_124m.py", f"--efficiency={e}")["step_parts_s"] for e in (1, 2))
    assert two["matmul_s"] == pytest.approx(one["matmul_s"] / 2) and two["optimizer_s"] == one["optimizer_s"]


def test_largest_micro_batch_is_the_last_that_fits():
    cfg, gpu, setup = planned("config/gpt2_350m.py", "--gpu=rtx4090")
    available = 20 * 2**30
    largest = plan.largest_micro_batch(cfg.model, setup, available)
    fitting, too_large = (
        sum(plan.memory(cfg.model, replace(setup, micro_batch_size=n)).values()) for n in (largest, largest + 1)
    )
    assert largest > 1 and fitting <= available < too_large


def test_what_does_not_fit_comes_with_changes_that_do(run):
    args = ["config/gpt2_1558m.py", "--gpu=a100-40", "--n_gpus=4"]
    cfg, gpu, setup = planned(*args)
    ways = plan.to_fit(cfg, gpu, setup)
    assert not plan.predict(cfg, gpu, setup)["fits"] and ways
    times = [after["step_s"] for _, _, after in ways]
    assert times == sorted(times) and all(after["fits"] for _, _, after in ways)
    for change, changed, _ in ways:
        assert changed == with_settings(setup, change)
    change, out = flags(ways[0][0]), run(*args)
    assert out.startswith("answer     does not fit on 4 x a100-40") and f"fits with {change}: " in out.splitlines()[0]
    assert out.count("DOES NOT FIT") == 1 and f"time       {ways[0][2]['step_s']:.3g} s a step" in out
    assert run(*args, *change.split()).startswith("answer     fits on 4 x a100-40")


def test_compared_gpus_are_all_that_are_known_those_that_fit_first_by_days(run):
    out = run(*BIG, "--compare", "--json", "--n_gpus=16")
    rows = json.loads(out.splitlines()[-1])["devices"]
    assert {row["gpu"] for row in rows} == hardware.DEVICES.keys()
    assert [(not row["fits"], row["days"]) for row in rows] == sorted((not row["fits"], row["days"]) for row in rows)
    assert all(f"\n{name} " in out for name in hardware.DEVICES)


def test_a_gpu_given_by_hand_is_compared_with_the_known_ones_as_they_are(run):
    by_hand = ["--gpu=other", "--gpu_tflops=100", "--gpu_memory_gib=24", "--gpu_memory_gbs=1000"]
    known, with_other = (
        json.loads(run("config/gpt2_124m.py", "--compare", "--json", *args).splitlines()[-1])["devices"]
        for args in ([], by_hand)
    )
    assert len(with_other) == len(known) + 1
    by_name = {row["gpu"]: row["step_s"] for row in with_other}
    assert all(by_name[row["gpu"]] == row["step_s"] for row in known) and by_name["other"] > by_name["h100-sxm"]


@pytest.mark.parametrize("args", [
    ["--n_gpus=12", "--batch_tokens=589824", "--micro_batch_size=4"], ["--n_gpus=6", "--gpus_per_node=4",
     "--batch_tokens=589824", "--micro_batch_size=8"], ["--n_gpus=8", "--strategy=fsdp", "--shard_size=4"],
    ["--n_gpus=16", "--tp=4", "--gpus_per_node=2"], ["--n_gpus=8", "--grad_compression=powersgd"],
], ids=" ".join)  # fmt: skip
def test_the_number_of_gpus_asked_for_is_among_those_of_the_table(args, run):
    out = run("config/gpt2_124m.py", *args)
    [line] = [line for line in out.splitlines() if line.endswith("  <")]
    assert line.split()[0] == args[0].partition("=")[2]


@pytest.mark.parametrize("args", [[], ["--grad_compression=bf16"], ["--strategy=fsdp", "--shard_size=2"], ["--tp=2"]])
def test_changes_that_are_recommended_can_be_made_and_fit(args):
    args = ["config/gpt2_774m.py", "--gpu=rtx4090", "--n_gpus=4", "--micro_batch_size=32", *args]
    ways = plan.to_fit(*planned(*args))
    assert not figures(*args)["fits"] and ways
    for change, _, after in ways:
        again = figures(*args, *flags(change).split())
        assert again["fits"] and again["step_s"] == pytest.approx(after["step_s"])


def test_figures_of_what_does_not_fit_come_with_those_of_what_would(run):
    f = json.loads(run("config/gpt2_1558m.py", "--gpu=a100-40", "--n_gpus=4", "--json").splitlines()[-1])
    changes = [way["change"] for way in f["to_fit"]]
    assert not f["fits"] and "--micro_batch_size=4" in changes and all(way["fits"] for way in f["to_fit"])


def test_the_number_of_gpus_beyond_which_doubling_does_not_pay_is_reported():
    rows = [({"n_gpus": n, "tokens_per_s": speed}, None) for n, speed in ((8, 100), (16, 190), (32, 280), (64, 300))]
    assert report_plan.stops_paying(rows)[0] == 16
    assert report_plan.stops_paying(rows[:2])[0] is None


def test_help_names_every_gpu():
    assert set(plan.__doc__.replace(",", " ").split()) >= hardware.DEVICES.keys() | {"this", "other"}


def test_unknown_gpu_is_given_by_hand():
    by_hand = ["--gpu=other", "--gpu_tflops=989", "--gpu_memory_gib=80", "--gpu_memory_gbs=3350", "--gpu_link_gbs=450",
               "--network_gbs=50"]  # fmt: skip
    known, other = figures("config/gpt2_124m.py"), figures("config/gpt2_124m.py", *by_hand)
    assert other["step_parts_s"]["matmul_s"] == known["step_parts_s"]["matmul_s"]
    assert other["fits"] and other["cost"] is None and other["kwh"] is None


@pytest.mark.parametrize(("args", "message"), [
    (["--gpu=v100", "--precision=bf16"], "precision is bf16, which v100 does not compute in; use --precision=fp16"),
    (["--gpu=other", "--gpu_tflops=9"], "give --gpu_memory_gib, --gpu_memory_gbs"),
    (["--gpu=h100"], "--gpu must be one of"),
    (["--n_gpus=0"], "n_gpus is 0; it must be at least 1, or none"),
    (["--n_gpus=6", "--tp=4"], "6 processes are not a multiple of tp 4"),
    (["--gpu=this", "--machine=none.json"], "there is no none.json; run python bench.py first"),
    (["--pue=0"], "pue is 0.0; it must be at least 1 and at most 10"),
    (["--availability=2"], "availability is 2.0; it must be above 0 and at most 1"),
    (["--availability=0"], "availability is 0.0; it must be above 0"),
    (["--tp_hidden=2"], "tp_hidden is 2.0; it must be at least 0 and at most 1"),
    (["--json=/tmp"], "json is /tmp; it must name a file in a folder that exists"),
    (["--json=no/such.json"], "json is no/such.json; it must name a file in a folder that exists"),
    (["--gpu=this", "--machine=/tmp"], "/tmp is no file that python bench.py writes"),
    (["--host_share=-1"], "host_share is -1.0; it must be at least 0"),
    (["--seq_len=4096"], "seq_len 4096 is above block_size 1024"),
    (["--vocab_size=none", "--data_dir=nowhere"], "or give --vocab_size"),
])  # fmt: skip
def test_wrong_input_is_one_line(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        figures("config/gpt2_124m.py", *args)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- the host

BERT = ["config/bert_base.py", "--micro_batch_size=16", "--n_gpus=1"]


def test_a_plan_that_the_host_bounds_says_so_and_what_helps(run):
    slow, captured = run(*BERT, "--cuda_graphs=false"), run(*BERT)
    [line] = [line for line in slow.splitlines() if "bound by the host" in line]
    assert "a larger --micro_batch_size" in line and "CUDA graphs" in line
    assert "bound by the host" not in captured and "compiled, CUDA graphs" in captured
    [line] = [line for line in run("config/bert_base.py", "--n_gpus=8").splitlines() if "bound by the host" in line]
    assert "a larger --batch_tokens" in line and "one GPU, with CUDA graphs" in line


def test_a_faster_host_a_larger_micro_batch_and_cuda_graphs_help_where_the_host_is_the_limit():
    today = figures(*BERT, "--cuda_graphs=false")["step_s"]
    for change in ("--host_speed=2", "--micro_batch_size=32", "--cuda_graphs=true"):
        assert figures(*BERT, "--cuda_graphs=false", change)["step_s"] < 0.6 * today, change
    gpt2 = ["config/gpt2_124m.py", "--n_gpus=1"]
    assert figures(*gpt2, "--cuda_graphs=false")["step_parts_s"]["overhead_s"] == 0


def test_one_gpu_alone_uses_cuda_graphs():
    assert figures(*BERT)["cuda_graphs"] and not figures(*BERT, "--compile=false")["cuda_graphs"]
    rows = [grown for _, grown in plan.scaling(*planned("config/gpt2_124m.py", "--n_gpus=8"))]
    assert [row["cuda_graphs"] for row in rows] == [row["n_gpus"] == 1 for row in rows]


# ---- first contact


@pytest.mark.parametrize(("args", "note"), [
    (["config/gpt2_124m.py", "--n_gpus=3"], "--batch_tokens=525312 --micro_batch_size=9: 3 GPUs do not divide 524,288 "
     "tokens in micro-batches of 16 x 1024"),
    (["config/shakespeare_char.py", "--vocab_size=256"], "--batch_tokens=1024 --micro_batch_size=2: 8 GPUs do not"),
    (["config/quickstart.py", "--vocab_size=4096"], "--batch_tokens=2048 --micro_batch_size=2: 8 GPUs do not divide"),
])  # fmt: skip
def test_a_batch_that_the_gpus_do_not_divide_is_planned_as_the_nearest_one(args, note, run):
    out = run(*args)
    assert f"\nbatch      {note}" in out
    batch = int(note.split()[0].partition("=")[2])
    f = json.loads(run(*args, "--json").splitlines()[-1])
    assert f["batch_tokens"] == batch and f["tokens"] % batch == 0
    assert "\nbatch      " not in run(*args, *note.split(":")[0].split())  # those settings divide


def test_without_vocabulary_and_data_it_is_gpt2s_and_the_plan_says_so(run):
    out = run("--vocab_size=none")
    assert "vocabulary 50,257 tokens, GPT-2's" in out and "124,439,808 parameters" in out
    assert "vocabulary" not in run("--vocab_size=1000")
