"""However a model is laid out over processes, it computes what one process does: FSDP, tensor parallelism, both."""

import collections
import contextlib
import ctypes
import functools
import itertools
import math
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optim
import parallel
from checkpoint import FILE_BYTES, CheckpointConfig, CheckpointWriter, _tensors, file_numbers, load_checkpoint
from config import UserError
from conftest import slow
from context import Context
from model import ModelConfig
from objective import IGNORE
from optim import OptimConfig, build_optimizer, orthogonalize
from parallel import ParallelConfig, distribute, on_whole_matrices, overlap_tensor_parallelism
from perf.memory import params_and_bytes
from ranks import on_ranks, step_settings
from run.folder import locked
from train import train_step
from world import World, WorldConfig, init_world, local, seed_step

# 4 heads of 6; an MLP of 38, which 4 ranks share unevenly; a vocabulary of 64 with its padding.
GPT = ModelConfig(vocab_size=37, block_size=11, n_layer=2, n_head=4, n_embd=20, head_dim=6, n_inner=38)
MODELS = {
    "gpt": GPT,
    "bert": replace(GPT, objective="mlm", norm_position="post", n_token_types=2, mlp="gelu"),
    "pairs": replace(GPT, objective={"mlm": 1.0, "nsp": 0.7}, norm_position="post", n_token_types=2, mlp="gelu"),
    "contrast": replace(GPT, objective={"mlm": 0.5, "contrastive": 1.0}, norm_position="post", dropout=1e-9),
    "modern": replace(GPT, n_kv_head=2, norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=True, bias=False,
                      tie_embeddings=False),
}  # fmt: skip
DEEP_MODELS = {f"deep {name}": replace(MODELS[name], n_layer=5) for name in ("gpt", "modern", "bert")}
SEQUENCES, T, STEPS = 12, 8, 3
LAYOUTS = {  # of 4 ranks
    "ddp": {},
    "fsdp": {"strategy": "fsdp"},
    "hsdp": {"strategy": "fsdp", "shard_size": 2},
    "ddp tp": {"tp": 2},
    "fsdp tp": {"strategy": "fsdp", "tp": 2},
}
DEEP = {  # of the deep models
    "pp4": {"pp": 4}, "pp4 fsdp": {"pp": 4, "strategy": "fsdp"}, "pp4 tp": {"pp": 4, "tp": 2},
    "cp2 pp4": {"pp": 4, "cp": 2}, "cp2 pp4 fsdp": {"pp": 4, "cp": 2, "strategy": "fsdp"},
}  # fmt: skip
MORE_LAYOUTS = LAYOUTS | {"tp": {"tp": 2}, "hsdp tp": {"strategy": "fsdp", "shard_size": 2, "tp": 2}}
SPLIT = {  # that split blocks over stages, or sequences
    "pp": {"pp": 2},
    "pp ddp": {"pp": 2},
    "pp fsdp": {"pp": 2, "strategy": "fsdp"},
    "pp tp": {"pp": 2, "tp": 2},
    "pp fsdp tp": {"pp": 2, "tp": 2, "strategy": "fsdp"},
    "cp": {"cp": 2},
    "cp4": {"cp": 4},
    "cp ddp": {"cp": 2},
    "cp fsdp": {"cp": 2, "strategy": "fsdp"},
    "cp tp": {"cp": 2, "tp": 2},
    "cp pp": {"cp": 2, "pp": 2},
    "cp fsdp tp": {"cp": 2, "tp": 2, "strategy": "fsdp"},
    "cp fsdp pp": {"cp": 2, "pp": 2, "strategy": "fsdp"},
    "cp tp pp": {"cp": 2, "pp": 2, "tp": 2},
    "cp fsdp tp pp": {"cp": 2, "pp": 2, "tp": 2, "strategy": "fsdp"},
}
RANKS = dict.fromkeys(LAYOUTS, 4) | {"tp": 2, "hsdp tp": 8}
RANKS |= {"pp": 2, "pp4": 4, "cp2 pp4": 8, "pp ddp": 4, "pp fsdp": 4, "pp tp": 4, "pp fsdp tp": 8}
RANKS |= {"cp": 2, "cp4": 4, "cp ddp": 4, "cp fsdp": 4, "cp tp": 4, "cp pp": 4}
RANKS |= {"cp fsdp tp": 8, "cp fsdp pp": 8, "cp tp pp": 8, "cp fsdp tp pp": 8}
RANKS |= {"pp4 fsdp": 8, "pp4 tp": 8, "cp2 pp4 fsdp": 8}


def batch(name, step):
    """Twelve sequences with an uneven number of targets; of masked models with positions, padding, types, labels."""
    g = torch.Generator().manual_seed(5 + step)
    ids, targets = torch.randint(37, (2, SEQUENCES, T), generator=g)
    targets[[0, 2, 4, 6]] = IGNORE
    targets[1, :5] = IGNORE
    if name.removeprefix("deep ") not in ("bert", "pairs", "contrast"):
        return ids, targets
    positions = torch.stack([torch.randperm(4, generator=g)[:3] for _ in range(SEQUENCES)])
    attention_mask = torch.arange(T) < torch.randint(4, T + 1, (SEQUENCES, 1), generator=g)
    types = (torch.arange(T) > 2).long().expand(SEQUENCES, T)
    labels = torch.tensor([0, 1, IGNORE, 1, 1, 0, IGNORE, IGNORE, 1, 0, 1, 1])
    more = (None, labels) if name == "pairs" else ()
    return ids, targets[:, 5:].contiguous(), positions, attention_mask, types, *more


def whole(tensor):
    """All of a tensor that may be sharded, as a copy."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


@contextlib.contextmanager
def a_model(name, optimizer="adamw", precision="fp32", changes=None, **layout):
    """(world, model, its optimizer) in a layout over the ranks that there are; changes: settings of the model."""
    cfg = ParallelConfig(**layout)
    with init_world(WorldConfig(device="cpu", precision=precision), cfg) as world:
        yield world, *built(replace((MODELS | DEEP_MODELS)[name], **changes or {}), optimizer, cfg, world)


def built(shape, optimizer, cfg, world):
    """A model, and its optimizer."""
    with torch.device("meta"):
        model = shape.build()
    distribute(model, cfg, world, seed=1)
    return model, build_optimizer(model, OptimConfig(optimizer=optimizer, learning_rate=1e-2), world)


def part_of(batch, world):
    """What a rank has of a batch where it shares sequences."""
    return batch if world.cp == 1 else Context.of(world).part_of(*batch)


def step_of(world, model, optimizer, name, step, micro_steps=1, scaler=None):
    """(the loss over all ranks, the gradient's norm) of a step on a batch that ranks and micro-steps divide."""
    size = SEQUENCES // world.data_ranks // micro_steps
    parts = (itertools.repeat(None) if part is None else part.split(size) for part in batch(name, step))
    batches = list(zip(*parts))[world.data_rank :: world.data_ranks]
    batches = [part_of(batch, world) for batch in batches]
    assert len(batches) == micro_steps
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return train_step(model, optimizer, scaler, batches, step_settings(1.0), world)[:2]


def of_all_stages(tensors, world):
    """{name: whole tensor}, of all stages where the model is a pipeline."""
    mine = {name: whole(tensor) for name, tensor in tensors}
    if world.pp == 1:
        return mine
    by_rank = world.gather(mine)
    for others in by_rank:
        assert all(torch.equal(others[name], mine[name]) for name in mine.keys() & others), "a tied table differs"
    return {name: others[name] for others in by_rank for name in others}


def trained(name, micro_steps=1, **layout):
    """(initial weights, losses and norms of three steps, weights then, evaluation) of a model in a layout.

    Muon orthogonalises in float32: bf16 makes updates that differ by percents of gradients that differ in a last bit.
    """
    with mock.patch.object(optim, "MUON_DTYPE", torch.float32), a_model(name, **layout) as (world, model, optimizer):
        first = of_all_stages(model.named_parameters(), world)
        figures = [step_of(world, model, optimizer, name, step, micro_steps) for step in range(STEPS)]
        with torch.no_grad(), world.autocast():
            parts = part_of(batch(name, 0), world)
            sums = torch.cat([x.flatten() for x in model(*parts, count_correct=True)[:2]])
            if world.cp > 1:
                dist.all_reduce(sums, group=world.cp_group)
            figures.append(world.sum_over_stages(sums).tolist())
        parallel.reshard(model)  # gathered weights are rounded to the run's precision
        last = of_all_stages(model.named_parameters(), world)
        return (first, figures, last) if world.is_main else (None, figures, None)


@functools.cache
def alone(name, optimizer, precision="fp32"):
    """The same on one process."""
    return trained(name, optimizer=optimizer, precision=precision)


# How far updates may differ, of their norm: AdamW and Muon enlarge what is nothing but rounding.
TOLERANCE = {"sgd": 1e-5, "adafactor": 1e-4, "adamw": 1e-3, "muon": 1e-4}


def check_equal(name, optimizer, answers):
    first, figures, last = alone(name, optimizer)
    its_first, its_figures, its_last = answers[0]
    assert all(answer[1] == its_figures for answer in answers), "ranks disagree on loss, norm or evaluation"
    assert first.keys() == its_first.keys()
    assert all(torch.equal(first[key], its_first[key]) for key in first), "other initial weights"
    for wanted, found in zip(figures, its_figures):
        assert found == pytest.approx(wanted, rel=1e-5)
    for key in first:
        if not key.endswith("attn.k.bias"):  # whose gradient is nothing but rounding
            error, update = (its_last[key] - last[key]).norm(), (last[key] - first[key]).norm()
            assert error < TOLERANCE[optimizer] * update, (key, error / update)


def matrix(names, optimizers, kinds, micro_steps, layouts=LAYOUTS):
    return [
        {"name": name, "optimizer": optimizer, "activation_checkpointing": kind, "micro_steps": n, "layout": layout}
        for name, optimizer, kind, n, layout in itertools.product(names, optimizers, kinds, micro_steps, layouts)
    ]


def run_case(case):
    case = dict(case)
    return trained(**(MORE_LAYOUTS | SPLIT | DEEP)[case.pop("layout")], **case)


def id_of(case):
    return "-".join(map(str, case.values()))


# Each way to share a model, each optimizer but SGD, which the loss's terms have; SLOW and FULL have the rest. Where tp
# needs no more than two ranks there are no more: torch derives how each operator is sharded in each process anew.
QUICK = matrix(["gpt"], ["adamw"], ["full"], [3], ["fsdp"])
QUICK += matrix(["modern"], ["muon"], ["none"], [1], ["hsdp"])
QUICK += matrix(["gpt"], ["adamw"], ["none"], [1], ["fsdp tp"])
QUICK += matrix(["gpt"], ["adamw"], ["full"], [3], ["tp"])
QUICK += matrix(["contrast"], ["adamw"], ["none"], [1], ["tp"])
QUICK += matrix(["gpt"], ["adamw"], ["full"], [3], ["pp ddp"]) + matrix(["bert"], ["adamw"], ["none"], [1], ["cp fsdp"])
SLOW = matrix(["bert"], ["adafactor"], ["selective"], [1], ["fsdp tp"])
SLOW += matrix(["contrast"], ["adamw"], ["none"], [1], ["ddp tp"])
FULL = matrix([name for name in MODELS if name != "contrast"], ["adamw"], ["none"], [3], MORE_LAYOUTS)  # which compares micro-steps' texts
FULL += matrix([*MODELS], ["muon"], ["full"], [1], MORE_LAYOUTS)
FULL += matrix(["gpt", "modern", "bert"], ["adamw"], ["none"], [3], SPLIT) + matrix(DEEP_MODELS, ["adamw"], ["none"], [3], DEEP)
FULL += matrix(["modern"], ["muon"], ["selective"], [1], SPLIT) + matrix(["bert"], ["adafactor"], ["full"], [1], SPLIT)


@pytest.mark.parametrize("case", QUICK + slow(*SLOW), ids=id_of)
def test_ranks_train_as_one_process(case, ranks):
    check_equal(case["name"], case["optimizer"], ranks[id_of(case)])


@pytest.fixture(scope="module")
def full():
    answers = {}
    # DTensor keeps the names of a mesh's groups, which another layout's mesh may give to others: so processes of their own.
    alone = [[layout] for layout in (MORE_LAYOUTS | SPLIT | DEEP) if layout not in LAYOUTS]
    groups = [[case for case in FULL if case["layout"] in layouts] for layouts in (LAYOUTS, *alone)]
    for cases in groups:
        answers |= zip(map(id_of, cases), on_ranks(RANKS[cases[0]["layout"]], *((run_case, case) for case in cases)))
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=id_of)
def test_ranks_train_as_one_process_in_every_combination(case, full):
    check_equal(case["name"], case["optimizer"], full[id_of(case)])


COMPILED = [("gpt", "ddp", "none"), ("gpt", "fsdp", "full"), ("modern", "fsdp tp", "full"), ("bert", "ddp tp", "selective")]


def compiled(name, layout, kind):
    """(what `trained` gives, graphs, graph breaks) with compiled blocks."""
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters
    counts.clear()
    answer = trained(name, compile=True, activation_checkpointing=kind, **LAYOUTS[layout])
    return answer, counts["stats"]["unique_graphs"], dict(counts["graph_break"])


@pytest.fixture(scope="module")
def of_compiled():
    return dict(zip(COMPILED, on_ranks(4, *((compiled, *case) for case in COMPILED))))


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_four_ranks_train_as_one_process_with_compiled_blocks(case, of_compiled):
    """Each block is one graph, and so is the loss: for training, evaluation, and its batch of another size."""
    answers, graphs, breaks = zip(*of_compiled[case])
    check_equal(case[0], "adamw", answers)
    assert all(2 <= n <= 7 for n in graphs) and not any(breaks)  # with the one that tries the compiler


# ---- what must hold besides

MATRICES = [("q", 1), ("gate", 3), ("down", 2)]  # whose rows, rows and columns tensor parallelism shares out


def orthogonalised(layout):
    """[(whether all parts are those of one process's result, matrices that this rank worked on)], by MATRICES."""
    answers = []
    with a_model("modern", changes={"n_layer": 3}, **MORE_LAYOUTS[layout]) as (world, model, _), torch.no_grad():
        for kind, n in MATRICES:
            blocks, counts = model.blocks[:n], []
            matrices = [block.attn.q.weight if kind == "q" else getattr(block.mlp, kind).weight for block in blocks]
            wanted = orthogonalize(torch.stack([whole(m) for m in matrices]).bfloat16())

            def counted(stack):
                counts.append(len(stack))
                return orthogonalize(stack)

            parts = [local(m).bfloat16() for m in matrices]
            for m, result in zip(matrices, on_whole_matrices(counted, parts, matrices, world.mesh)):
                local(m).copy_(result)
            answers.append((all(torch.equal(whole(m), w.float()) for m, w in zip(matrices, wanted)), sum(counts)))
    return answers


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp", "tp", *slow("ddp tp", "fsdp tp")])
def test_muons_work_is_shared_out_and_its_result_to_the_bit_that_of_whole_matrices(layout, ranks):
    for (_, n), *by_rank in zip(MATRICES, *ranks["orthogonalised", layout]):
        assert all(equal for equal, _ in by_rank)
        assert sum(worked_on for _, worked_on in by_rank) == n
        assert max(worked_on for _, worked_on in by_rank) == math.ceil(n / len(by_rank))


class Collectives(TorchDispatchMode):
    """Counts operators of torch.distributed, by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.name()] += 1
        return function(*args, **kwargs or {})


class Logits(TorchDispatchMode):
    """Notes what is computed as wide as the padded vocabulary."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.dim() > 1]
        self.found += [tuple(x.shape) for x in tensors if x.shape[-1] == 64 and x.shape[0] > 2]
        return out


def logits(name, **layout):
    """Shapes as wide as the padded vocabulary of what a forward and backward compute."""
    with a_model(name, **layout) as (world, model, _), Logits() as mode:
        model(*batch(name, 0)).backward()
        return mode.found


@pytest.mark.parametrize("name", ["gpt", *slow("bert")])
def test_no_rank_holds_full_logits_under_tensor_parallelism(name, ranks):
    assert logits(name), "one process has logits as wide as the vocabulary"
    assert ranks["logits", name] == [[]] * 4


def scaled(layout):
    """Three steps with a gradient scaler, in the second of which rank 3 alone meets an infinity.

    [(loss, norm, scale, whether weights moved)].
    """
    with a_model("gpt", **LAYOUTS[layout]) as (world, model, optimizer):
        scaler, told = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
        unscale = scaler.unscale_
        for step in range(STEPS):

            def spoilt(optimizer):
                if step == 1 and world.rank == 3:
                    local(model.blocks[1].mlp.up.weight.grad)[0, 0] = float("inf")
                unscale(optimizer)

            scaler.unscale_ = spoilt
            before = [whole(p) for p in model.parameters()]
            figures = step_of(world, model, optimizer, "gpt", step, scaler=scaler)
            moved = any(not torch.equal(whole(p), b) for p, b in zip(model.parameters(), before))
            told.append((*figures, scaler.get_scale(), moved))
        return told


@pytest.mark.parametrize("layout", ["fsdp", *slow("fsdp tp")])
def test_an_infinity_on_one_rank_makes_all_skip_the_step(layout, ranks):
    answers, one_process = ranks["scaled", layout], alone("gpt", "adamw")[1]
    for told in answers:
        assert [step[2:] for step in told] == [(1024.0, True), (512.0, False), (512.0, True)]
        assert told[0][:2] == pytest.approx(one_process[0], rel=1e-5)
        assert told[1][0] == pytest.approx(one_process[1][0], rel=1e-5)
        assert told[2][:2] == answers[0][2][:2]


def counted(accumulate, layout):
    """(reductions of gradients over a copy's ranks, over copies) in a step of three micro-steps, and its figures."""
    with a_model("gpt", accumulate=accumulate, **LAYOUTS[layout]) as (world, model, optimizer):
        step_of(world, model, optimizer, "gpt", 0, micro_steps=3)
        with Collectives() as mode:
            figures = step_of(world, model, optimizer, "gpt", 1, micro_steps=3)
        return mode.counts["c10d::_reduce_scatter_base_"], mode.counts["c10d::allreduce_"], figures


@pytest.mark.parametrize("layout", ["fsdp", *slow("hsdp")])
def test_gradients_are_summed_at_every_micro_step_or_kept_whole_and_summed_once(layout, ranks):
    """By groups of parameters: two blocks, and the rest. Over copies always once."""
    sharded, kept_whole = ranks["counted", "sharded", layout][0], ranks["counted", "whole", layout][0]
    assert (sharded[0], kept_whole[0]) == (3 * 3, 3)
    assert sharded[1] == kept_whole[1]
    assert sharded[2] == pytest.approx(kept_whole[2], rel=1e-5)
    assert sharded[2] == pytest.approx(alone("gpt", "adamw")[1][1], rel=1e-5)


@pytest.mark.parametrize("layout", ["fsdp", *slow("fsdp tp")])
def test_in_bf16_sharding_changes_rounding_alone(layout, ranks):
    """Blocks' weights arrive in bf16, as autocast has them on one process; the residual stream stays in float32."""
    wanted, found = alone("gpt", "adamw", "bf16")[1], ranks["bf16", layout][0][1]
    in_fp32 = alone("gpt", "adamw")[1]
    assert abs(wanted[0][0] - in_fp32[0][0]) > 1e-6 * in_fp32[0][0], "bf16 rounds"
    assert found[0][0] == pytest.approx(wanted[0][0], rel=2e-5 if "tp" in layout else 1e-6)
    assert found[0][1] == pytest.approx(wanted[0][1], rel=5e-3)
    assert found[2][0] == pytest.approx(wanted[2][0], rel=1e-3) and found[2][1] == pytest.approx(wanted[2][1], rel=2e-2)


def test_a_stage_of_one_process_trains_in_bf16_as_one_process_does(ranks):
    """Copies of the weights, cast once a step and used by several micro-steps ahead, change no rounding."""
    wanted = trained("gpt", precision="bf16", micro_steps=3)[1]
    assert ranks["bf16", "pp"][0][1] == [pytest.approx(figures, rel=1e-6) for figures in wanted]


def files_of_a_stage():
    """Numbers of the files that a checkpoint of eight tensors a stage has, each a quarter of a file."""
    with init_world(WorldConfig(device="cpu"), ParallelConfig(pp=2)) as world:
        quarter = torch.empty(FILE_BYTES // 4, dtype=torch.int8, device="meta")
        return file_numbers({f"{world.stage}.{i}": quarter for i in range(8)}, world)


def test_files_of_a_pipelines_checkpoint_are_no_larger_than_one_processs(ranks):
    assert collections.Counter(ranks["files", "pp"][0].values()) == {1: 8, 2: 8}  # each of two ranks fills two files


TERMS = {"label_smoothing": 0.1, "z_loss": 0.01}
TERMS_IN = [("gpt", "bf16"), ("bert", "fp32")]


def with_terms(name, precision, layout):
    """What `trained` gives with each term of the loss; SGD, so that updates show gradients."""
    return trained(name, optimizer="sgd", precision=precision, changes=TERMS, **MORE_LAYOUTS[layout])


@pytest.mark.parametrize(("name", "precision"), TERMS_IN)
def test_each_term_of_the_loss_is_the_same_over_a_sharded_vocabulary(name, precision, ranks):
    """In the loss and in the gradient; bert's head has a bias."""
    wanted, answers = with_terms(name, precision, "ddp"), ranks["terms", name, precision]
    plain = trained(name, optimizer="sgd", precision=precision)
    assert wanted[1][0][0] > 1.02 * plain[1][0][0], "the terms change the loss"
    assert all(answer[1] == answers[0][1] for answer in answers), "ranks disagree"
    for figures, found in zip(wanted[1], answers[0][1]):
        assert found == pytest.approx(figures, rel=1e-5 if precision == "fp32" else 5e-3)
    for key, first in wanted[0].items():
        if not key.endswith("attn.k.bias"):  # whose gradient is nothing but rounding
            error, update = (answers[0][2][key] - wanted[2][key]).norm(), (wanted[2][key] - first).norm()
            assert error < (1e-5 if precision == "fp32" else 0.05) * update, (key, error / update)


def dropped(kind):
    """(loss, gradient's norm) with dropout and a kind of activation checkpointing, under tensor parallelism."""
    layout = {"activation_checkpointing": kind, "tp": 2}
    with a_model("gpt", changes={"dropout": 0.3}, **layout) as (world, model, optimizer):
        seed_step(seed=1, step=4, rank=world.rank)
        return step_of(world, model, optimizer, "gpt", 0)


def test_activation_checkpointing_replays_dropout_under_tensor_parallelism(ranks):
    none, full = (ranks["dropped", kind] for kind in ("none", "full"))
    assert none == full
    assert none[0][0] != pytest.approx(alone("gpt", "adamw")[1][0][0], rel=1e-3), "nothing was dropped"


def compressed(kind):
    """Losses of 30 steps on one batch; the matrices are too small for the usual rank."""
    parallel.POWERSGD_RANK = 4
    with a_model("gpt", grad_compression=kind) as (world, model, optimizer):
        return [step_of(world, model, optimizer, "gpt", 0)[0] for _ in range(30)]


@pytest.mark.slow
def test_compressed_gradients_train_nearly_as_whole_ones(ranks):
    none, bf16, powersgd = (ranks["compressed", kind][0] for kind in (None, "bf16", "powersgd"))
    assert bf16 == pytest.approx(none, rel=0.02) and bf16 != none
    assert powersgd[:10] == pytest.approx(none[:10], rel=1e-5), "its first steps are not compressed"
    assert powersgd[-1] != pytest.approx(none[-1], rel=1e-4)
    assert powersgd[-1] < 0.8 * none[0]


def held(layout):
    """(parameters, bytes) that this rank holds."""
    with a_model("gpt", **LAYOUTS[layout]) as (_, _, optimizer):
        return params_and_bytes(optimizer)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp", *slow("fsdp tp")])
def test_ranks_hold_the_model_once_a_copy(layout, ranks):
    with a_model("gpt") as (_, model, _):
        n = sum(p.numel() for p in model.parameters())
    copies, (numbers, n_bytes) = {"ddp": 4, "hsdp": 2}.get(layout, 1), zip(*ranks["held", layout])
    assert n_bytes == tuple(16 * number for number in numbers)
    if layout == "fsdp tp":
        assert n < sum(numbers) < 1.15 * n  # both of two neighbours have norms
    else:
        assert sum(numbers) == copies * n
        assert max(numbers) <= 1.15 * copies * n / 4  # tables and biases do not divide evenly


def shared(folder):
    """(the error of locked where the last rank has another disk, the folder)."""
    with a_model("gpt") as (world, _, _):
        with locked(folder, world, patience=1):
            pass
        try:
            with locked(folder if world.rank < 3 else f"{folder}/another", world, patience=1):
                raise AssertionError("not refused")
        except ValueError as error:
            return str(error), folder


def test_an_out_dir_that_not_all_ranks_see_is_refused_on_all(ranks):
    for message, folder in ranks["shared"]:
        assert "not one folder for all 4 ranks" in message and "share" in message
        assert [path.name for path in Path(folder).iterdir()] == [".lock"]


@pytest.fixture(scope="module")
def round_folder(tmp_path_factory):
    """Where the checkpoints of ROUND lie."""
    return tmp_path_factory.mktemp("round")


class Launches:
    """What ranks answer to a case, by key. Groups of launches, each group made when its first key is asked for.

    A launch has many cases: torch derives how each operator is sharded once a process, in 0.2 s.
    """

    def __init__(self, groups, answers):
        """groups: each [(number of ranks, {key: (function, *args)})]. answers: {key: [answer by rank]} known already."""
        self.groups, self.answers = groups, answers

    def __getitem__(self, key):
        if key not in self.answers:
            [group] = [group for group in self.groups if any(key in cases for _, cases in group)]
            for n, cases in group:
                self.answers |= launched(n, cases)
        return self.answers[key]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, round_folder):
    quick, by_two = ({id_of(case): (run_case, case) for case in QUICK if RANKS[case["layout"]] == n} for n in (4, 2))
    slow = {id_of(case): (run_case, case) for case in SLOW}
    quick |= {("orthogonalised", layout): (orthogonalised, layout) for layout in ("ddp", "fsdp", "hsdp")}
    quick |= {("logits", "gpt"): (logits_of_a_layout, "gpt"), ("scaled", "fsdp"): (scaled, "fsdp")}
    quick |= {("counted", kind, "fsdp"): (counted, kind, "fsdp") for kind in ("sharded", "whole")}
    quick |= {("bf16", "fsdp"): (in_bf16, "fsdp")}
    quick |= {("held", layout): (held, layout) for layout in ("ddp", "fsdp", "hsdp")}
    quick["shared"] = shared, str(tmp_path_factory.mktemp("out"))
    by_two |= {("dropped", kind): (dropped, kind) for kind in ("none", "full")}
    by_two |= {("bf16", "pp"): (functools.partial(trained, "gpt", 3, precision="bf16", **SPLIT["pp"]),)}
    by_two |= {("files", "pp"): (files_of_a_stage,)}
    by_two |= {("orthogonalised", "tp"): (orthogonalised, "tp")}
    by_two |= {("terms", *kind): (with_terms, *kind, "tp") for kind in TERMS_IN}
    slow |= {("orthogonalised", layout): (orthogonalised, layout) for layout in ("ddp tp", "fsdp tp")}
    slow |= {("logits", "bert"): (logits_of_a_layout, "bert"), ("held", "fsdp tp"): (held, "fsdp tp")}
    slow |= {("scaled", "fsdp tp"): (scaled, "fsdp tp"), ("bf16", "fsdp tp"): (in_bf16, "fsdp tp")}
    slow |= {("counted", kind, "hsdp"): (counted, kind, "hsdp") for kind in ("sharded", "whole")}
    slow |= {("compressed", kind): (compressed, kind) for kind in (None, "bf16", "powersgd")}
    (save_1, _), (save_2, load_2), (save_4, load_4) = (saves_and_loads(round_folder, ROUND, n) for n in (1, 2, 4))
    groups = [[(4, quick | save_4 | load_4), (2, by_two | save_2 | load_2)], [(4, slow)]]
    return Launches(groups, launched(1, save_1))


def logits_of_a_layout(name):
    return logits(name, strategy="fsdp", tp=2)


def in_bf16(layout):
    return trained("gpt", precision="bf16", **LAYOUTS[layout])


# ---- checkpoints

SAVED = {  # {where it is saved and loaded: (ranks, layout)}
    "one process": (1, {}), "ddp 2": (2, {}), "tp 2": (2, {"tp": 2}), "fsdp 2": (2, {"strategy": "fsdp"}),
    "fsdp 4": (4, {"strategy": "fsdp"}), "hsdp 4": (4, LAYOUTS["hsdp"]), "fsdp tp 4": (4, LAYOUTS["fsdp tp"]),
    "pp fsdp 4": (4, SPLIT["pp fsdp"]), "cp tp 4": (4, SPLIT["cp tp"]), "cp pp 4": (4, SPLIT["cp pp"]),
}  # fmt: skip
STORED = [("gpt", "adamw"), ("modern", "muon"), ("bert", "adafactor")]


def tensors_of(model, optimizer, world):
    return of_all_stages(_tensors(model, optimizer).items(), world)


def saved(folder, layout, name, optimizer):
    """Two steps, then a checkpoint in folder; then what is in it, and the figures of a third step."""
    with a_model(name, optimizer, **layout) as (world, model, optimizer):
        for step in range(2):
            step_of(world, model, optimizer, name, step)
        tensors = tensors_of(model, optimizer, world)
        saver = CheckpointWriter(folder, CheckpointConfig(), world)
        saver.save(2, model, optimizer, {})
        saver.wait()
        return tensors if world.is_main else None, step_of(world, model, optimizer, name, 2)


def loaded(folder, layout, name, optimizer):
    """What a checkpoint gives another layout: its tensors, and the figures of a third step."""
    with a_model(name, optimizer, **layout) as (world, model, optimizer):
        load_checkpoint(Path(folder) / "ckpt/step_00000002", model, optimizer)
        tensors = tensors_of(model, optimizer, world)
        return tensors if world.is_main else None, step_of(world, model, optimizer, name, 2)


def launched(n, cases):
    """{key: [answer by rank]} of {key: (function, *args)} on n new ranks, or in this process for n = 1."""
    if n == 1:
        return {key: [function(*args)] for key, (function, *args) in cases.items()}
    return dict(zip(cases, on_ranks(n, *cases.values())))


def saves_and_loads(folder, pairs, n):
    """({key: (function, *args)} of what n ranks save, the same of what they load) for checkpoints to make the journeys."""
    places = {(stored, there): str(folder / f"{stored[0]} {there}") for stored, there, _ in pairs}
    saves = {
        (stored, there): (saved, place, SAVED[there][1], *stored)
        for (stored, there), place in places.items()
        if SAVED[there][0] == n
    }
    loads = {
        (stored, there, here): (loaded, places[stored, there], SAVED[here][1], *stored)
        for stored, there, here in pairs
        if SAVED[here][0] == n
    }
    return saves, loads


def check_travel(pair, answers):
    """What was loaded is what had been saved, by {key: [answer by rank]} of both."""
    (tensors, figures), (its_tensors, its_figures) = answers[pair[:2]][0], answers[pair][0]
    assert tensors.keys() == its_tensors.keys() and any(name.startswith("optimizer.") for name in tensors)
    assert all(torch.equal(tensors[name], its_tensors[name]) for name in tensors)
    assert its_figures == pytest.approx(figures, rel=1e-5)


ROUND = [("gpt", "adamw"), "one process", "fsdp tp 4"], [("gpt", "adamw"), "fsdp tp 4", "ddp 2"]
ROUND += [("modern", "muon"), "hsdp 4", "tp 2"], [("modern", "muon"), "tp 2", "one process"]
ROUND += [("bert", "adafactor"), "pp fsdp 4", "one process"],
ROUND = [tuple(pair) for pair in ROUND]
EVERYWHERE = [  # of the first model from each of seven layouts to each, of the others by way of one process
    (stored, saved_in, loaded_in)
    for stored, saved_in, loaded_in in itertools.product(STORED, SAVED, SAVED)
    if (stored == STORED[0] and {saved_in, loaded_in} <= {*[*SAVED][:7]}) or "one process" in (saved_in, loaded_in)
]


@pytest.fixture(scope="module")
def some_travels(ranks, round_folder):
    """What one process saves first, then four ranks, then two, and one process loads at last."""
    keys = [pair[:2] for pair in ROUND] + [pair for pair in ROUND if pair[2] != "one process"]
    return {key: ranks[key] for key in keys} | launched(1, saves_and_loads(round_folder, ROUND, 1)[1])


@pytest.mark.parametrize("pair", ROUND, ids=str)
def test_a_checkpoint_goes_on_in_another_layout(pair, some_travels):
    check_travel(pair, some_travels)


@pytest.fixture(scope="module")
def all_travels(tmp_path_factory):
    answers, folder = {}, tmp_path_factory.mktemp("all")
    (save_1, load_1), (save_2, load_2), (save_4, load_4) = (saves_and_loads(folder, EVERYWHERE, n) for n in (1, 2, 4))
    for n, cases in (1, save_1), (4, save_4), (2, save_2 | load_2), (4, load_4), (1, load_1):
        answers |= launched(n, cases)
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("pair", EVERYWHERE, ids=str)
def test_a_checkpoint_goes_on_in_every_layout(pair, all_travels):
    check_travel(pair, all_travels)


# ---- memory

MIB = 2**20


def memory(layout):
    """(MiB that this process holds when its second step's gradients are there, what the log says of it)."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # so that freed memory is not kept, by us or by the C library
    ctypes.CDLL(None).mallopt(-3, 65536)

    def held_now():
        line = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous"))
        return int(line.split()[1]) / 1024

    cfg = ParallelConfig(**layout)
    with init_world(WorldConfig(device="cpu", precision="fp32"), cfg) as world:
        world.barrier()
        before, seen = held_now(), []
        model, optimizer = built(ModelConfig(vocab_size=50257, n_layer=12, n_embd=1024, n_head=16), "adamw", cfg, world)
        optimizer.register_step_pre_hook(lambda *args: seen.append(held_now() - before))
        ids = torch.randint(50257, (1, 65), generator=torch.Generator().manual_seed(world.rank))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(2):
            train_step(model, optimizer, scaler, [(ids[:, :-1], ids[:, 1:])], step_settings(1.0), world)
        assert sum(p.numel() for p in model.parameters()) > 200e6
        return seen[1], params_and_bytes(optimizer)[1] / MIB


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.skipif(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 16 * 2**30, reason="needs 16 GiB")
def test_fsdp_on_four_ranks_holds_a_quarter_of_the_memory():
    """Weights, gradients and AdamW's state of 204 M parameters; needs 14 GiB."""
    measured = {}
    for layout in ("ddp", "hsdp", "fsdp", "fsdp tp"):
        [answers] = on_ranks(4, (memory, LAYOUTS[layout]))
        measured[layout] = max(mib for mib, _ in answers)
        print(f"{layout:8} {measured[layout]:8,.0f} MiB a rank, {measured[layout] / measured['ddp']:.3f} of ddp; "
              f"{answers[0][1]:,.0f} by the log")  # fmt: skip
        assert all(mib == pytest.approx(said, rel=0.08) for mib, said in answers)
    assert measured["fsdp"] / measured["ddp"] == pytest.approx(0.25, rel=0.1)
    assert measured["fsdp tp"] / measured["ddp"] == pytest.approx(0.25, rel=0.1)
    assert measured["hsdp"] / measured["ddp"] == pytest.approx(0.5, rel=0.1)


# ---- layouts that cannot be


@pytest.mark.parametrize(("settings", "size", "said"), [
    ({"tp": 3}, 4, "4 processes are not a multiple of tp 3"),
    ({"tp": 2, "pp": 3}, 4, "4 processes are not a multiple of tp 2 x pp 3; .*=6, or"),
    ({"strategy": "fsdp", "shard_size": 3, "pp": 2}, 8, "shard_size 3 does not divide the 4 .*8 processes / tp 1 / pp 2"),
    ({"tp": 2}, 1, "1 processes are not a multiple of tp 2; start them with torchrun --nproc_per_node=2"),
    ({"strategy": "fsdp", "shard_size": 3}, 4, "shard_size 3 does not divide the 4 ranks"),
    ({"strategy": "fsdp", "shard_size": 4, "tp": 2}, 4, "shard_size 4 does not divide the 2 .*4 processes / tp 2"),
])  # fmt: skip
def test_a_layout_that_does_not_fit_the_processes_is_refused_with_the_numbers(settings, size, said):
    with pytest.raises(ValueError, match=said):
        ParallelConfig(**settings).mesh_shape(size)


@pytest.mark.parametrize(("settings", "size", "shape"), [
    ({}, 1, (1, 1, 1)), ({}, 8, (8, 1, 1)), ({"strategy": "fsdp"}, 8, (1, 8, 1)), ({"tp": 2}, 8, (4, 1, 2)),
    ({"strategy": "fsdp", "shard_size": 2, "tp": 2}, 8, (2, 2, 2)), ({"strategy": "fsdp"}, 1, (1, 1, 1)),
])  # fmt: skip
def test_a_layout_is_copies_by_shards_by_tensor_parallel_ranks(settings, size, shape):
    assert ParallelConfig(**settings).mesh_shape(size) == shape


@pytest.mark.parametrize(("settings", "said"), [
    ({"tp": 0}, "tp is 0; it must be at least 1"),
    ({"shard_size": 2}, "shard_size is 2, but strategy ddp.*--strategy=fsdp"),
    ({"accumulate": "whole", "reshard": False}, "reshard is False, .*\naccumulate is whole, .*--strategy=fsdp"),
    ({"grad_compression": "bf16", "strategy": "fsdp"}, "grad_compression bf16 with strategy fsdp, tp 1 and pp 1: it needs ddp"),
    ({"grad_compression": "powersgd", "tp": 2}, "grad_compression powersgd with strategy ddp, tp 2 and pp 1: it needs ddp"),
    ({"async_tp": True}, "async_tp is on, but tp is 1"),
    ({"async_tp": True, "tp": 2, "compile": False}, "async_tp is on, but compile is false"),
])  # fmt: skip
def test_parallel_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ParallelConfig(**settings)


@pytest.mark.parametrize(("changes", "seq_len", "tp", "said"), [
    ({}, 8, 3, "n_head 4 is not a multiple of tp 3, n_kv_head 2 .*seq_len 8 .*tp 1, 2 would fit"),
    ({"n_inner": 36}, 8, 4, "^n_kv_head 2 is not a multiple of tp 4; tp 1, 2 would fit"),
    ({"n_inner": 35}, 8, 2, "^n_inner 35 is not a multiple of tp 2"),
    ({}, 7, 2, "^seq_len 7 is not a multiple of tp 2; tp 1 would fit"),
])  # fmt: skip
def test_tensor_parallelism_that_would_cut_heads_is_refused_with_the_numbers(changes, seq_len, tp, said):
    ParallelConfig(tp=2).check_model(MODELS["modern"], 8)
    with pytest.raises(ValueError, match=said):
        ParallelConfig(tp=tp).check_model(replace(MODELS["modern"], **changes), seq_len)


def test_overlapped_tensor_parallelism_is_refused_off_cuda():
    with pytest.raises(UserError, match="async_tp is on, but device is cpu, and it needs cuda"):
        overlap_tensor_parallelism(World(0, 2, torch.device("cpu"), "fp32"))
