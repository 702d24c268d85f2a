"""Pipelines: the order of micro-steps, the division into stages, what is sent, resume; see also test_shard.py."""

import collections
import functools
import itertools
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from checkpoint import CheckpointConfig, CheckpointWriter, load_checkpoint
from config import UserError
from model import Block, parameter_shapes
from parallel import ParallelConfig, distribute
from perf import cost
from perf.timing import bubble_seconds
from pipeline import cut, schedule, stage_sizes
from ranks import on_ranks, records, run, step_settings, write_data
from test_shard import GPT, MODELS, SAVED, SEQUENCES, T, a_model, launched, step_of, tensors_of
from test_train import assert_same_run
from train import train_step
from world import World


@pytest.mark.parametrize("n_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_stages_that_wait_for_each_other_get_through_all_micro_steps(n, n_stages):
    """Each action runs when what it needs has come; no stage holds more micro-steps than stages follow it, and one."""
    left = [list(schedule(n, stage, n_stages)) for stage in range(n_stages)]
    done = [set() for _ in range(n_stages)]
    assert all(sorted(actions) == sorted(itertools.product(["forward", "backward"], range(n))) for actions in left)
    while any(left):
        moved = False
        for stage, actions in enumerate(left):
            if not actions:
                continue
            action, i = actions[0]
            if action == "forward":
                ready = stage == 0 or ("forward", i) in done[stage - 1]
            else:
                assert ("forward", i) in done[stage]
                ready = stage == n_stages - 1 or ("backward", i) in done[stage + 1]
            if ready:
                done[stage].add(actions.pop(0))
                held = sum(1 if action == "forward" else -1 for action, _ in done[stage])
                assert 0 <= held <= min(n, n_stages - stage)
                moved = True
        assert moved, f"stages wait for each other: {left}"


@pytest.mark.parametrize("head", [0.0, 0.7, 2.5, 40.0])
@pytest.mark.parametrize(("n_layer", "n_stages"), [(5, 1), (5, 3), (5, 5), (12, 2), (12, 5)])
def test_the_slowest_stage_is_as_fast_as_in_the_best_division(n_layer, n_stages, head):
    def slowest(sizes):
        return max(*sizes, sizes[-1] + head)

    sizes, cuts = stage_sizes(n_layer, n_stages, head), itertools.combinations(range(1, n_layer), n_stages - 1)
    assert sum(sizes) == n_layer and len(sizes) == n_stages and min(sizes) >= 1
    best = min(slowest([b - a for a, b in itertools.pairwise([0, *cut, n_layer])]) for cut in cuts)
    assert slowest(sizes) == pytest.approx(best)


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_stages_together_have_each_parameter_once_but_for_a_tied_table(pp):
    """The planner's count of each stage is what the stage's model has."""
    for name in ("gpt", "modern", "bert"):
        cfg = replace(MODELS[name], n_layer=4)
        s = cost.Setup(8, 2, pp=pp)
        parts, whole = [], parameter_shapes(cfg)
        for stage in range(pp):
            with torch.device("meta"):
                model = cfg.build()
            if pp > 1:
                cut(model, cost.stages(cfg, s), World(stage, pp, torch.device("cpu"), "fp32", pp=pp))
            parts.append({key: list(p.shape) for key, p in model.named_parameters()})
            in_blocks = cost.stages(cfg, s)[stage] * cost.block_params(cfg)
            assert cost.params_outside(cfg, s, stage) + in_blocks == sum(p.numel() for p in model.parameters())
            assert model.num_params() == cost.num_params(cfg)
        twice = collections.Counter(key for part in parts for key in part)
        assert {key: shape for part in parts for key, shape in part.items()} == whole
        assert {key for key, n in twice.items() if n > 1} == (
            {"wte.weight"} if cfg.tie_embeddings and pp > 1 else set()
        )


def sent(name, **layout):
    """[bytes of each message] that this rank sends in a step of three micro-steps."""
    messages, isend = [], dist.isend
    with a_model(name, changes={"n_layer": 3}, **layout) as (world, model, optimizer):

        def counting(tensor, *args, **kwargs):
            messages.append(tensor.nbytes)
            return isend(tensor, *args, **kwargs)

        with mock.patch.object(dist, "isend", counting):
            step_of(world, model, optimizer, name, 0, micro_steps=3)
    return messages


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stages_send_what_the_planner_counts(precision):
    for n, layout in (2, {"pp": 2}), (3, {"pp": 3}), (4, {"pp": 2, "tp": 2}):
        [by_rank] = on_ranks(n, (functools.partial(sent, "modern", precision=precision, **layout),))
        s = cost.Setup(T, SEQUENCES // 3, 3, precision=precision, **layout)
        [c] = (c for c in cost.collectives(replace(MODELS["modern"], n_layer=3), s) if c.what == "stages" and c.times)
        assert by_rank[0] == [c.n_bytes] * c.times


def trained_in_turns(data_dir, folder, changes, *turns):
    """Trains a small run to each of some steps in turn, each time as a new start of this rank's process."""
    for max_steps, layout in turns:
        run(data_dir, folder, max_steps=max_steps, **changes, **layout)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"dropout": 0.2}, {"objective": "mlm", "optimizer": "muon"}], ids=str)
def test_a_resumed_pipeline_equals_one_never_stopped(changes, tmp_path):
    specials = {f"<|{name}|>": 32 + i for i, name in enumerate(["endoftext", "mask", "cls", "sep", "pad"])}
    data = write_data(tmp_path / "data", specials=specials)
    whole, parts, pp = tmp_path / "whole", tmp_path / "parts", {"pp": 2}
    on_ranks(
        2,
        (trained_in_turns, data, whole, changes, (9, pp)),
        *((trained_in_turns, data, parts, changes, (n, pp)) for n in (4, 9)),
    )
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_a_run_goes_on_from_a_pipeline_to_one_process_and_back(tmp_path):
    data, pp = write_data(tmp_path / "data"), {"pp": 2}
    run(data, tmp_path / "whole")
    on_ranks(2, (trained_in_turns, data, tmp_path / "parts", {}, (3, pp)))
    run(data, tmp_path / "parts", max_steps=6)
    on_ranks(2, (trained_in_turns, data, tmp_path / "parts", {}, (9, pp)))
    for name in ("loss", "val_loss", "grad_norm"):
        whole, parts = records(tmp_path / "whole", name), records(tmp_path / "parts", name)
        assert {step: parts[step] for step in whole} == pytest.approx(whole, rel=1e-4)


WAY = ["one process", "pp fsdp 4", "cp tp 4", "hsdp 4", "cp pp 4", "fsdp tp 4", "ddp 2"]


def visited(folder, step, layout):
    """Loads a run's checkpoint of a step, takes a step, and saves; returns the tensors before and after, and figures."""
    with a_model("gpt", **layout) as (world, model, optimizer):
        if step:
            load_checkpoint(Path(folder) / "ckpt" / f"step_{step:08d}", model, optimizer)
        came, figures = tensors_of(model, optimizer, world), step_of(world, model, optimizer, "gpt", step)
        left, saver = tensors_of(model, optimizer, world), CheckpointWriter(folder, CheckpointConfig(), world)
        saver.save(step + 1, model, optimizer, {})
        saver.wait()
        return (came, left) if world.is_main else None, figures


@pytest.mark.slow
def test_a_run_wanders_through_six_layouts_and_carries_each_bit_along(tmp_path):
    """Each layout finds the tensors of the one before, and all together train as one process does."""
    left, found = None, []
    for step, there in enumerate(WAY):
        n, layout = SAVED[there]
        [((came, leaving), figures), *_] = launched(n, {"visit": (visited, str(tmp_path), step, layout)})["visit"]
        if step:
            assert came.keys() == left.keys() and any(name.startswith("optimizer.") for name in came)
            assert all(torch.equal(came[name], left[name]) for name in came)
        left = leaving
        found.append(figures)
    with a_model("gpt") as (world, model, optimizer):
        assert found == [
            pytest.approx(step_of(world, model, optimizer, "gpt", step), rel=1e-5) for step in range(len(WAY))
        ]


# ---- time

FORWARD_S = 0.05  # seconds of a block's forward that sleeps; its backward takes twice as long


class Sleeping(torch.autograd.Function):
    """The identity, whose forward and backward take a while without computing."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(FORWARD_S)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * FORWARD_S)
        return gradient


def sleeping_forward(self, x, *args, forward=Block.forward):
    return forward(self, Sleeping.apply(x), *args)


def seconds_of_steps(changes, micro_steps, n_steps=5, **layout):
    """The least seconds of a step with one thread a rank. changes: settings of the model."""
    with a_model("gpt", changes=changes, **layout) as (world, model, optimizer):
        ids = torch.randint(37, (2, micro_steps, 2, model.cfg.block_size), generator=torch.Generator().manual_seed(0))
        times = []
        for _ in range(n_steps + 1):
            world.barrier()
            start = time.perf_counter()
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            train_step(model, optimizer, scaler, [*zip(*ids)], step_settings(1.0), world)
            times.append(time.perf_counter() - start)
        return min(times[1:])


def seconds_alone(*args):
    """The same in a process without the others."""
    with mock.patch.dict(os.environ, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"):
        return seconds_of_steps(*args)


def seconds_of_sleepy_steps(*args, **layout):
    """The same, where blocks sleep."""
    with mock.patch.object(Block, "forward", sleeping_forward):
        return seconds_of_steps(*args, **layout)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("pp", [2, 4])
def test_a_pipelines_step_takes_as_long_as_the_planner_says(pp):
    """Within a fifth. Blocks sleep, so that four stages need no four cores."""
    micro_steps, cfg = 6, replace(GPT, n_layer=8)
    s, compute = cost.Setup(T, 2, micro_steps, pp=pp, on_cpu=True, precision="fp32"), cfg.n_layer * 3 * FORWARD_S
    without = micro_steps * compute / pp
    predicted = without + bubble_seconds(cfg, s, compute, head=0.0)
    [by_rank] = on_ranks(pp, (functools.partial(seconds_of_sleepy_steps, {"n_layer": 8}, micro_steps, pp=pp),))
    print(f"\npp {pp}: predicted {predicted:.3f} s, measured {max(by_rank):.3f} s, without waiting {without:.3f} s")
    assert max(by_rank) == pytest.approx(predicted, rel=0.2) and predicted > 1.15 * without


@pytest.mark.slow
@pytest.mark.alone
def test_a_pipelines_step_takes_a_half_of_one_process_and_the_bubble():
    """Within a fifth, on two cores, as the least of a few rounds. Two processes compute alone, as two stages do."""
    changes, micro_steps = {"n_layer": 8, "n_embd": 320, "n_inner": 1280, "block_size": 256}, 6
    cfg, alone, staged = replace(GPT, **changes), [], []
    s = cost.Setup(cfg.block_size, 2, micro_steps, pp=2, on_cpu=True, precision="fp32")
    share = 6 * cost.head_weights(cfg, cfg.block_size, 1.0) / cost.flops_per_token(cfg, cfg.block_size)
    args = changes, micro_steps
    for _ in range(5):
        of_one, of_two = on_ranks(2, (seconds_alone, *args), (functools.partial(seconds_of_steps, pp=2), *args))
        alone.append(statistics.mean(of_one))
        staged.append(max(of_two))
        compute = min(alone) / micro_steps
        predicted = min(alone) / 2 + bubble_seconds(cfg, s, compute, share * compute)
        print(f"\npredicted {predicted:.3f} s, measured {min(staged):.3f} s, one process {min(alone):.3f} s")
        if len(staged) > 1 and min(staged) == pytest.approx(predicted, rel=0.2):
            return
    pytest.fail(f"predicted {predicted} s; measured {staged}")


@pytest.mark.parametrize(("name", "layout", "said"), [
    ("gpt", {"pp": 3}, "pp 3 is more stages than n_layer 2 has blocks; lower --pp"),
    ("contrast", {"pp": 2}, "objective has mlm and contrastive, but pp and cp compute one; use --pp=1"),
    ("pairs", {"cp": 2}, "objective has mlm and nsp, but pp and cp compute one; use --pp=1 --cp=1"),
    ("gpt", {"cp": 3}, "seq_len 8 does not cut into 2 x cp 3 pieces; seq_len 6 or 12 would"),
    ("gpt", {"cp": 4, "tp": 4}, "seq_len / cp 2 is not a multiple of tp 4"),
    ("gpt", {"pp": 2, "grad_compression": "bf16"}, "grad_compression bf16 with .*needs ddp without tp and pp"),
])  # fmt: skip
def test_what_a_pipeline_cannot_do_is_refused_in_a_line(name, layout, said):
    with pytest.raises(UserError, match=said):
        ParallelConfig(**layout).check_model(MODELS[name], T)


def test_fp16_is_refused_since_each_stage_would_skip_steps_of_its_own():
    world = World(0, 2, torch.device("cpu"), "fp16", pp=2)
    with pytest.raises(UserError, match="fp16, but pp is 2.*--precision=bf16"):
        distribute(GPT.build(), ParallelConfig(pp=2), world, seed=1)
