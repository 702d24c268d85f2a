"""plan.py --search: each way that it weighs is what plan.py says of these settings, and what is impossible falls by its rule."""

import functools
import json
import random
import time
from dataclasses import replace

import pytest

import config
import plan
import train
from perf.search import layouts, search, settings_of

SMALL = ["--vocab_size=96", "--block_size=32", "--n_layer=4", "--n_head=4", "--n_kv_head=2", "--n_embd=32", "--gpu=rtx4090",
         "--position=rope", "--batch_tokens=1024", "--max_steps=9", "--n_gpus=16"]  # fmt: skip


def searched(tmp_path, *more, arguments=SMALL):
    """(settings, the JSON of a search)."""
    cfg = config.load(plan.Settings, [*arguments, *more, "--search", f"--json={tmp_path / 'found.json'}"])
    plan.main(cfg)
    return cfg, json.loads((tmp_path / "found.json").read_text())


def planned(change, *more, arguments=SMALL):
    """plan.py's figures for a layout, by its own command line."""
    flags = [f"--{name}={str(value).lower()}" for name, value in change.items()]
    cfg, _ = plan.resolve(config.load(plan.Settings, [*arguments, *more, *flags]))
    gpu = plan.gpu_of(cfg.plan)
    return plan.predict(cfg, gpu, plan.setup_on(gpu, cfg))


def test_the_ten_best_are_what_the_planner_says_of_their_settings_and_no_other_is_faster(tmp_path, capsys):
    _, found = searched(tmp_path)
    times = [way["step_s"] for way in found["best"]]
    assert len(times) == 10 and times == sorted(times)
    for way in found["best"]:
        again = planned(way["change"])
        assert (way["step_s"], way["memory_gib"]) == (again["step_s"], again["memory_gib"])
    generator, faster = random.Random(0), 0
    cfg, _ = plan.resolve(config.load(plan.Settings, SMALL))
    for layout in generator.sample([*layouts(cfg, 16, 8)], 40):
        change = settings_of(cfg, layout) | {"activation_checkpointing": generator.choice(["none", "selective", "full"]), "micro_batch_size": 1}
        try:
            faster += planned(change)["step_s"] < times[0]
        except config.UserError:
            pass  # impossible
    assert not faster
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("search ") and sum("--strategy=" in line for line in told) == 10


def test_each_other_value_of_a_setting_falls_by_a_slower_step_memory_or_a_rule(tmp_path, capsys):
    _, found = searched(tmp_path)
    others = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.strip().startswith("--"))
    best = found["best"][0]["change"]
    assert others["--tp=4"] == "n_kv_head 2 is not a multiple of tp 4"
    assert others["--cp=16"].startswith("seq_len / cp") or "times as long" in others["--cp=16"]
    wanted = {f"--tp={n}" for n in (1, 2, 4, 8)} - {f"--tp={best['tp']}"}
    assert wanted <= others.keys() and all("times as long" in others[name] for name in ("--activation_checkpointing=full",))
    _, found = searched(tmp_path, "--gpu=other", "--gpu_tflops=100", "--gpu_memory_gib=1", "--gpu_memory_gbs=900")
    assert found["best"] == [] and "GiB are needed; take more or larger GPUs" in capsys.readouterr().out


def test_the_layouts_are_every_way_to_divide_the_ranks(tmp_path):
    cfg, _ = plan.resolve(config.load(plan.Settings, SMALL))
    found = [tuple(way.values()) for way in layouts(cfg, 12, 8)]
    wanted = {
        (tp, cp, pp, shard) for tp in (1, 2, 4) for cp in range(1, 13) for pp in range(1, 5) for shard in range(1, 13)
        if 12 % (tp * cp * pp) == 0 and (12 // (tp * pp)) % shard == 0
    }  # fmt: skip
    assert len(found) == len(set(found)) and set(found) == wanted


def test_layouts_of_one_node_may_split_by_what_does_not_divide_a_node():
    cfg, _ = plan.resolve(config.load(plan.Settings, SMALL))
    assert {way["tp"] for way in layouts(cfg, 6, 8)} == {1, 2, 3, 6}


@pytest.mark.parametrize("more", [
    ["--gpu=v100"], ["--grad_compression=bf16"], ["{tmp}/sharded.py"], ["{tmp}/async.py"], ["--n_gpus=6"],
], ids=str)  # fmt: skip
def test_what_is_shown_trains_and_is_what_the_planner_says_of_it(more, tmp_path):
    """The settings are added to the command's own, whatever else these say."""
    (tmp_path / "sharded.py").write_text("strategy = 'fsdp'\nreshard = False\naccumulate = 'whole'\ntp = 2\n")
    (tmp_path / "async.py").write_text("tp = 2\nasync_tp = True\nmicro_batch_size = 2\n")
    more = [text.format(tmp=tmp_path) for text in more]
    _, found = searched(tmp_path, *more)
    assert found["best"]
    for way in found["best"]:
        again = planned(way["change"], *more)
        assert (way["step_s"], way["memory_gib"]) == (again["step_s"], again["memory_gib"])
        flags = [f"--{name}={str(value).lower()}" for name, value in way["change"].items()]
        own = [text for text in [*SMALL, *more] if not text.startswith(("--gpu", "--n_gpus"))]
        cfg = config.load(train.Settings, [*own, *flags])
        cfg.parallel.check_model(cfg.model, 32)
        cfg.parallel.check_precision("fp16" if "--gpu=v100" in more else "bf16")


def test_a_larger_micro_batch_is_planned_even_where_a_smaller_one_does_not_fit():
    """The only micro-step of a step has no gradients beside its loss."""
    cfg = config.load(plan.Settings, ["config/gpt2_1558m.py", "--n_gpus=8", "--batch_tokens=16384", "--gpu=t4"])
    cfg, _ = plan.resolve(cfg)
    gpu, available = plan.gpu_of(cfg.plan), 13.5 * 2**30
    fitting, every = (
        [way.change for way in search(cfg, 8, functools.partial(plan.setup_on, gpu), gpu, limit) if 0 < way.n_bytes <= available]
        for limit in (available, float("inf"))
    )
    smaller = [way | {"micro_batch_size": max(1, way["micro_batch_size"] // 2)} for way in every]
    assert fitting == every and any(way not in every for way in smaller)


def test_layouts_without_measured_figures_fall_and_others_are_planned():
    cfg, _ = plan.resolve(config.load(plan.Settings, [*SMALL, "--precision=fp32", "--n_gpus=2"]))
    rates = {"matmul_tflops", "attention_tflops", "head_tflops", "muon_tflops"}
    kinds = {"memory_gb_per_s": {"plain": {"64": 9.0}}, "overhead_ms": {"plain": 0.1}}
    figures = {"precision": "fp32", "ranks": 2, "rates": {name: {"64": 0.1} for name in rates} | kinds}
    gpu = replace(plan.gpu_of(cfg.plan), name="this", device_type="cpu", machine=figures)
    ways = [*search(cfg, 2, functools.partial(plan.setup_on, gpu), gpu, float("inf"))]
    assert {way.change["tp"] for way in ways if way.fits} == {1}
    assert all("measures no tensor parallelism" in way.why for way in ways if way.change["tp"] == 2)


def test_a_batch_that_no_layout_divides_is_told_with_one_that_would_fit(tmp_path, capsys):
    _, found = searched(tmp_path, "--n_gpus=1000")
    assert found["best"] == []
    assert "batch_tokens 1024 is not a multiple of 32000" in (told := capsys.readouterr().out) and "32000 would fit" in told


@pytest.mark.parametrize(("more", "said"), [
    (["--tp=2"], "tp is 2, but search tries every tp; leave it out"),
    (["config/llama_8b.py", "--micro_batch_size=4"], "micro_batch_size is 4, but search tries every"),
    (["{tmp}/texts.py"], "contrastive compares a micro-batch's texts over ranks"),
])  # fmt: skip
def test_what_a_search_cannot_hold_or_compare_is_refused(more, said, tmp_path):
    (tmp_path / "texts.py").write_text("objective = {'clm': 1.0, 'contrastive': 1.0}\ndropout = 0.1")
    with pytest.raises(config.UserError, match=said):
        searched(tmp_path, *[text.format(tmp=tmp_path) for text in more])


@pytest.mark.parametrize("other", ["compare", "simulate", "generate"])
def test_search_goes_with_no_other_kind_of_plan(other):
    with pytest.raises(config.UserError, match="is on, but"):
        plan.main(config.load(plan.Settings, [*SMALL, "--search", f"--{other}"]))


@pytest.mark.slow
def test_a_thousand_gpus_are_searched_in_half_a_minute(tmp_path, capsys):
    start = time.process_time()
    _, found = searched(tmp_path, arguments=["config/llama_70b.py", "--n_gpus=1024"])
    assert time.process_time() - start < 30 and len(found["best"]) == 10
    for way in found["best"]:  # what is shown trains
        flags = [f"--{name}={str(value).lower()}" for name, value in way["change"].items()]
        cfg = config.load(train.Settings, ["config/llama_70b.py", *flags])
        cfg.parallel.check_model(cfg.model, cfg.model.block_size)
