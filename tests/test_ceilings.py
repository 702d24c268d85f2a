"""A step's time is made up of what was measured of its parts, as the parts make up a step."""

import json
from dataclasses import replace

import pytest

import bench
import config
from perf import ceilings, cost
from world import WorldConfig, init_world

SMALL = {
    "WIDTHS": ((16, 32, 48), ()), "ROWS": ((3, 7), ()), "HEAD_WIDTHS": ((4, 8), ()), "LENGTHS": (5, 520),
    "VOCABULARIES": (37, 64), "HIDDEN": (8, 16), "LOSS_ROWS": ((3, 7), ()), "NUMBERS": ((512, 1024, 2048), ()),
    "PARAMS": ((256, 512, 1024), ()), "OTHERS": 16, "ROUNDS": 1, "SECONDS": 0.0,
}  # fmt: skip
ARGS = [
    "--vocab_size=37", "--block_size=11", "--n_layer=3", "--n_head=5", "--n_embd=20", "--seq_len=7",
    "--micro_batch_size=3", "--batch_tokens=63",
]  # fmt: skip


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_ceilings_are_measured_told_and_make_up_a_step(precision, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(ceilings, name, value)
    with init_world(WorldConfig(device="cpu", precision=precision)) as world:
        figures = json.loads(json.dumps({"ceilings": ceilings.measure_ceilings(world)}))
    text = "\n".join(ceilings.ceilings_table(figures["ceilings"]))
    for word in ("swiglu", "muon", "linear, TFLOP/s", "overhead"):
        assert word in text
    for preset in ("config/gpt2_124m.py", "config/modern_bert.py"):
        seconds = predicted(figures, preset, "--n_kv_head=none")
        assert min(seconds.values()) >= 0 and sum(seconds.values()) > 0


def test_times_lie_on_straight_lines_between_and_beyond_what_was_measured():
    table = [[w, [[n, 2.0 + 3 * w + 5 * n + 7 * w * n] for n in (1, 4, 9)]] for w in (2, 3, 8)]
    for w, n in ((2, 1), (2.5, 5), (8, 9), (20, 30), (5, 100)):
        assert ceilings.at(table, w, n) == pytest.approx(2 + 3 * w + 5 * n + 7 * w * n)
    falling = [[10, 1.0], [20, 3.0]]  # a line that would pass below 0
    assert ceilings.at(falling, 5) == 0.5 and ceilings.at([[1, 5.0], [2, 4.0]], 100) >= 4.0


def invented(**seconds):
    """Figures of a machine on which all is free but what is named, which takes a second for each of its amounts."""
    plane = {"linear": 2, "loss": 3, "adamw": 2} | dict.fromkeys([*ceilings.BYTES, "muon"], 1)

    def table(depth, slope):
        return slope if depth == 0 else [[x, table(depth - 1, slope * x)] for x in (1, 10**9)]

    found = {name: table(depth, seconds.get(name, 0.0)) for name, depth in plane.items()}
    found["attention"] = {kind: table(3, seconds.get(kind, 0.0)) for kind in ("causal", "full")}
    blocks = {
        f"block, {kind}, {again}": seconds.get(kind, 0.0)
        for kind in ceilings.BLOCKS
        for again in ("none", "selective", "full")
    }
    return {
        "ceilings": found | {"least": dict.fromkeys([*plane, "attention"], 0) | blocks},
    }


def predicted(figures, *args):
    cfg = config.load(bench.Settings, [*args[:1], *ARGS, *args[1:]])
    cfg = replace(cfg, data=replace(cfg.data, seq_len=7))
    setup = cost.setup_of(cfg, (1, 1, 1), cfg.data.batch_tokens // 21, "fp32", "cpu")
    return ceilings.step_seconds(cfg.model, setup, figures)


@pytest.mark.parametrize("preset", ["config/gpt2_124m.py", "config/modern_124m.py"])
def test_a_step_has_the_work_that_the_planner_counts(preset):
    """Micro-steps, layers, rows and weights are those of the FLOPs that MFU counts."""
    args = [preset, "--n_kv_head=5", "--batch_tokens=42"]
    flops = 42 * cost.flops_per_token(config.load(bench.Settings, [*args[:1], *ARGS, *args[1:]]).model, 7, head_share=0)
    linear, attention = predicted(invented(linear=6.0), *args), predicted(invented(causal=12.0), *args)
    assert linear["matmul_s"] + attention["attention_s"] == pytest.approx(flops)
    assert sum(linear.values()) == linear["matmul_s"]
    assert predicted(invented(loss=1.0), *args)["head_s"] == pytest.approx(42 * 64 * 20)


def test_a_masked_step_has_the_head_at_masked_places_alone():
    seconds = predicted(invented(loss=1.0, full=1.0, causal=100.0), "config/bert_base.py", "--mask_prob=0.3")
    assert seconds["head_s"] == pytest.approx(9 * 2 * 64 * 20)
    assert seconds["attention_s"] == pytest.approx(3 * 3 * (3 * 5) * 7 * 7 * 4)


def test_recomputation_costs_a_forward_more():
    figures = invented(linear=1.0, causal=1.0, gelu_tanh=1.0)
    none, selective, full = (
        predicted(figures, "config/gpt2_124m.py", f"--activation_checkpointing={kind}")
        for kind in ("none", "selective", "full")
    )
    assert full["matmul_s"] == pytest.approx(4 / 3 * none["matmul_s"]) and selective["matmul_s"] == none["matmul_s"]
    assert full["memory_s"] == selective["memory_s"] > none["memory_s"]


def test_muon_takes_time_for_the_blocks_matrices_alone_and_adamw_for_the_rest():
    args = ["config/gpt2_124m.py", "--bias=false"]
    assert predicted(invented(muon=1.0), *args)["optimizer_s"] == 0
    of_blocks = 3 * (4 * 20**3 + 2 * 20**2 * (2 * 80 + 20) / 3)
    assert predicted(invented(muon=1.0), *args, "--optimizer=muon")["optimizer_s"] == pytest.approx(of_blocks)
    adamw, muon = (
        predicted(invented(adamw=1.0), *args, f"--optimizer={name}")["optimizer_s"] for name in ("adamw", "muon")
    )
    vectors, tables = 7 * 20, (64 + 11) * 20
    assert adamw == pytest.approx((9 + 18) * (vectors + tables + 3 * 12 * 400))
    assert muon == pytest.approx(9 * (vectors + tables))


def test_overhead_is_that_of_the_nearer_kind_of_block():
    figures = invented(plain=1.0, modern=2.0)
    assert predicted(figures, "config/gpt2_124m.py")["overhead_s"] == 9
    assert predicted(figures, "config/modern_124m.py", "--n_kv_head=none", "--head_dim=4")["overhead_s"] == 18


PRESETS = (
    ["config/quickstart.py", "--vocab_size=4096"], ["config/quickstart_bert.py", "--vocab_size=4096"],
    ["config/shakespeare_char.py", "--vocab_size=256"],
    ["config/gpt2_124m.py", "--micro_batch_size=1", "--batch_tokens=1024"],
    ["config/bert_base.py", "--micro_batch_size=8", "--batch_tokens=1024"],
    ["config/modern_124m.py", "--micro_batch_size=1", "--batch_tokens=1024"],
)  # fmt: skip


def errors_of_predictions(folder):
    """{preset: (of a step's time, of its memory)}, from what python bench.py measures alone."""
    bench.main(config.load(bench.Settings, ["--device=cpu", "--picture=false"]))
    found = {}
    for preset in PRESETS:
        args = [*preset, "--device=cpu", "--json=b.json", "--bench_seconds=4", "--picture=false"]
        bench.main(config.load(bench.Settings, args))
        error = json.loads((folder / "b.json").read_text())["error"]
        found[preset[0]] = error["step_s"], error["memory_gib.total"]
    return found


@pytest.mark.slow
def test_steps_take_the_predicted_time_and_memory(tmp_path, monkeypatch):
    """On a machine that is otherwise idle: so it is given three chances to be."""
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        found = errors_of_predictions(tmp_path)
        print({preset: f"step {step:+.1%} memory {memory:+.1%}" for preset, (step, memory) in found.items()})
        assert all(abs(memory) < 0.1 for _, memory in found.values())
        if all(abs(step) < 0.2 for step, _ in found.values()):
            return
    raise AssertionError(found)
