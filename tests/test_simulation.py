"""A step on paper: what it counts is what ranks really exchange, and what the planner's formulas say."""

import collections
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import plan
from config import UserError, load
from conftest import ROOT, slow
from optim import OptimConfig
from parallel import ParallelConfig
from perf.cost import Setup, collectives
from perf.simulation import Collectives, simulated
from ranks import on_ranks, step_settings
from test_shard import MODELS, SEQUENCES, T
from train import build, train_step
from world import WorldConfig, init_world

SIZES = {
    "small": {},  # which ranks do not divide
    "wide": {"n_embd": 64, "head_dim": 16, "n_inner": 128, "block_size": 32, "n_layer": 4},
}
LAYOUTS = {
    "fsdp": (4, {"strategy": "fsdp"}),
    "hsdp": (4, {"strategy": "fsdp", "shard_size": 2}),
    "tp": (2, {"tp": 2}),
    "fsdp tp": (4, {"strategy": "fsdp", "tp": 2}),
    "pp": (2, {"pp": 2}),
    "pp fsdp": (4, {"strategy": "fsdp", "pp": 2}),
    "pp tp": (4, {"pp": 2, "tp": 2}),
    "cp fsdp": (4, {"strategy": "fsdp", "cp": 2}),
    "cp pp": (4, {"pp": 2, "cp": 2}),
    "cp tp": (4, {"cp": 2, "tp": 2}),
    "16 x 2 x 2": (64, {"strategy": "fsdp", "pp": 2, "tp": 2}),
}


def settings_of(name, n, layout, size="small", precision="bf16", micro_steps=3):
    """What simulated and the planner read of a script's settings, and the Setup that stands for it."""
    model, parallel = replace(MODELS[name], **SIZES[size]), ParallelConfig(**layout)
    replicas, shards, tp = parallel.mesh_shape(n)
    readers = replicas * shards // parallel.cp
    micro_batch = max(1, SEQUENCES // readers // micro_steps)
    data = SimpleNamespace(
        seq_len=T, micro_batch_size=micro_batch, batch_tokens=T * micro_batch * micro_steps * readers,
    )  # fmt: skip
    cfg = SimpleNamespace(
        model=model, parallel=parallel, world=WorldConfig(device="cpu", precision=precision), data=data,
        optim=OptimConfig(optimizer="adamw", learning_rate=1e-2), health=step_settings().health,
        objective=SimpleNamespace(document_mask=False, mask_prob=0.5),
    )  # fmt: skip
    setup = Setup(
        T, micro_batch, micro_steps, replicas, shards, tp, precision, strategy=parallel.strategy, pp=parallel.pp,
        cp=parallel.cp, on_cpu=True, checkpointing=parallel.activation_checkpointing,
        head_share=1.0 if model.is_causal else 0.5,
    )  # fmt: skip
    return cfg, setup


def told_apart(counts, least):
    """{(kind, bytes): times} of what is no vector or count."""
    found = collections.Counter()
    for (kind, _, n_bytes), times in counts.items():
        found[kind, n_bytes] += times * (n_bytes >= least)
    return +found


CASES = list(itertools.product(["gpt", "modern"], LAYOUTS, SIZES))
CASES += [("bert", layout, "wide") for layout in ("fsdp", "fsdp tp", "pp tp", "cp fsdp", "cp tp")]


@pytest.mark.parametrize("case", [("gpt", "pp", "wide"), ("gpt", "pp fsdp", "wide"), *slow(*CASES)], ids=str)
def test_formulas_are_exact_to_the_byte_where_they_claim_to_be(case):
    name, layout, size = case
    cfg, setup = settings_of(name, *LAYOUTS[layout], size)
    said, least = collections.Counter(), 10 * 8 * cfg.model.n_embd
    for c in collectives(cfg.model, setup):
        said[c.kind, round(c.n_bytes)] += round(c.times) * (c.ranks > 1 and c.n_bytes >= least)
    assert told_apart(simulated(cfg, LAYOUTS[layout][0], build, train_step)["collectives"], least) == +said


def exchanged(name, layout):
    """What a rank exchanges with real others in a step."""
    n, settings = LAYOUTS[layout]
    cfg, _ = settings_of(name, n, settings)
    with init_world(cfg.world, cfg.parallel) as world:
        model, optimizer, scaler = build(cfg, world, 0)
        shape = cfg.data.micro_batch_size, T // world.cp
        batches = [(torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)) for _ in range(3)]
        with Collectives() as sent:
            train_step(model, optimizer, scaler, batches, cfg, world)
    return dict(sent.counts)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "fsdp tp", "pp fsdp", "pp tp", "cp tp"])
def test_a_step_on_paper_exchanges_what_ranks_do(layout):
    """Counts and bytes of every collective but that of the figures that ranks sum at the end of a step."""
    [by_rank] = on_ranks(LAYOUTS[layout][0], (exchanged, "gpt", layout))
    cfg, _ = settings_of("gpt", *LAYOUTS[layout])
    found = simulated(cfg, LAYOUTS[layout][0], build, train_step)["collectives"]
    theirs = by_rank[0]
    for key in [key for key in theirs if key[:2] == ("all_reduce", "float64") and key[2] == 16]:
        theirs[key] -= 1
    assert {key: n for key, n in theirs.items() if n} == found


def test_plain_ddp_is_not_simulated():
    cfg, _ = settings_of("gpt", 4, {})
    with pytest.raises(UserError, match="plain ddp sends each gradient once; use --strategy=fsdp"):
        simulated(cfg, 4, build, train_step)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["llama_8b", "llama_70b"])
def test_a_thousand_ranks_fit_on_paper(preset, tmp_path, monkeypatch, capsys):
    """Of the 70 billion, a fortieth of the blocks: each stage has them all alike."""
    monkeypatch.chdir(tmp_path)
    arguments = [str(ROOT / f"config/{preset}.py"), "--n_gpus=1024", "--batch_tokens=8388608", "--n_layer=8", "--simulate"]
    plan.main(load(plan.Settings, arguments))
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("simulated"))
    rows = [line.split() for line in lines[start + 2 : -1]]
    large = [row for row in rows if "left" not in row and "picture" not in row]
    assert len(large) >= 4 and all(row[2].replace(",", "") == row[3].replace(",", "") for row in large)
