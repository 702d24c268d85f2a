"""plan.py --search: each way that it weighs is what plan.py says of these settings, and what is impossible falls by its rule."""

import json
import random
import time

import pytest

import config
import plan
import train
from perf.search import layouts, with_layout

SMALL = ["--vocab_size=96", "--block_size=32", "--n_layer=4", "--n_head=4", "--n_kv_head=2", "--n_embd=32", "--gpu=rtx4090",
         "--position=rope", "--batch_tokens=1024", "--max_steps=9", "--n_gpus=16"]  # fmt: skip


def searched(tmp_path, *more, arguments=SMALL):
    """(settings, the JSON of a search)."""
    cfg = config.load(plan.Settings, [*arguments, *more, "--search", f"--json={tmp_path / 'found.json'}"])
    plan.main(cfg)
    return cfg, json.loads((tmp_path / "found.json").read_text())


def planned(change, *more, arguments=SMALL):
    """plan.py's figures for a layout, by its own command line."""
    shards = ["--strategy=ddp", "--shard_size=none"] if change["shard_size"] == 1 else ["--strategy=fsdp"]
    flags = [*(f"--{name}={value}" for name, value in change.items()), *shards]
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
        change = layout | {"activation_checkpointing": generator.choice(["none", "selective", "full"]), "micro_batch_size": 1}
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
        (tp, cp, pp, shard) for tp in range(1, 9) for cp in range(1, 13) for pp in range(1, 5) for shard in range(1, 13)
        if 12 % (tp * cp * pp) == 0 and (12 // (tp * pp)) % shard == 0
    }  # fmt: skip
    assert len(found) == len(set(found)) and set(found) == wanted


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
        cfg = with_layout(config.load(train.Settings, ["config/llama_70b.py"]), way["change"])
        cfg.parallel.check_model(cfg.model, cfg.model.block_size)
