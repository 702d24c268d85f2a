"""One process, accumulation and ranks compute the same; precision, devices and compile are picked or refused."""

import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import DataConfig, Split
from model import ModelConfig, Transformer
from objective import IGNORE, NextToken
from optim import OptimConfig, build_optimizer
from parallel import ParallelConfig, distribute, init_world, pick_device, pick_precision, seed_step
from ranks import on_ranks, run, write_data
from train import evaluate, train_step

SMALL = ModelConfig(vocab_size=37, block_size=11, n_layer=3, n_head=5, n_embd=20)
SEQUENCES, T = 12, 7


def uneven_batch():
    """Twelve sequences, four of them without a target: however they are shared out, one rank has fewer targets."""
    g = torch.Generator().manual_seed(5)
    ids, targets = torch.randint(37, (2, SEQUENCES, T), generator=g)
    targets[[0, 2, 4, 6]] = IGNORE
    targets[1, :5] = IGNORE
    return ids, targets


def build(world, cfg=SMALL, **parallel):
    with torch.device("meta"):
        model = Transformer(cfg)
    return distribute(model, ParallelConfig(device="cpu", precision="fp32", **parallel), world, seed=1)


def one_step(micro_batch_size):
    """(this rank's share of the loss, gradient norm, gradients, all-reduces) of train_step on the uneven batch.

    SGD at rate 1 takes the gradient off the weights, which shows what it was.
    """
    with init_world(ParallelConfig(device="cpu", precision="fp32")) as world:
        model = build(world)
        optimizer = build_optimizer(model, OptimConfig(optimizer="sgd", learning_rate=1.0, beta1=0.0, weight_decay=0.0))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        parts = [part.split(micro_batch_size) for part in uneven_batch()]
        batches = list(zip(*parts))[world.rank :: world.size]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            loss, grad_norm = train_step(model, optimizer, scaler, batches, None, world)
        reduced = sum(event.count for event in profiler.key_averages() if event.key == "c10d::allreduce_")
        grads = {name: before[name] - p.detach() for name, p in model.named_parameters()}
        return loss.item(), grad_norm.item(), grads, reduced


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), val_tokens=100)


@pytest.fixture(scope="module")
def two_ranks(data_dir):
    """What two ranks answer, in one launch: {case: [answer by rank]}."""
    cases = {f"step{size}": (one_step, size) for size in (6, 3, 1)}
    cases |= {f"eval{size}": (evaluated, str(data_dir), size) for size in (1, 3)}
    cases["dropout"] = (dropout_losses,)
    return dict(zip(cases, on_ranks(2, *cases.values())))


@pytest.fixture(scope="module")
def plain():
    """Loss and gradients by plain autograd on torch's own cross-entropy, without train_step."""
    model = Transformer(SMALL)
    model.init_weights(seed=1)
    ids, targets = uneven_batch()
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def check_step(loss, grads, plain):
    largest = max(g.abs().max() for g in plain[1].values())
    assert loss == pytest.approx(plain[0], rel=1e-5)
    for name, g in plain[1].items():
        assert (grads[name] - g).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize("micro_batch_size", [12, 3, 1])
def test_accumulation_gives_the_loss_and_gradients_of_one_batch(micro_batch_size, plain):
    loss, grad_norm, grads, _ = one_step(micro_batch_size)
    check_step(loss, grads, plain)
    norm = torch.stack([g.norm() for g in plain[1].values()]).norm().item()
    assert grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("case", ["step6", "step3", "step1"])
def test_two_ranks_give_the_loss_and_gradients_of_one_process(case, two_ranks, plain):
    (loss_0, norm_0, grads_0, _), (loss_1, norm_1, grads_1, _) = two_ranks[case]
    check_step(loss_0 + loss_1, grads_0, plain)
    assert loss_0 != pytest.approx(loss_1, rel=0.1)  # the targets are spread unevenly indeed
    assert norm_0 == norm_1
    assert all(torch.equal(grads_0[name], grads_1[name]) for name in grads_0)


def test_gradients_are_synchronised_once_a_step(two_ranks):
    """As many collectives in six micro-steps as in one: the count of targets and the gradient's one bucket."""
    counts = {case: two_ranks[case][0][3] for case in ("step6", "step3", "step1")}
    assert counts == {"step6": 2, "step3": 2, "step1": 2}


# ---- evaluation

def evaluated(data_dir, micro_batch_size):
    with init_world(ParallelConfig(device="cpu", precision="fp32")) as world:
        model = build(world, replace(SMALL, dropout=0.5))
        cfg = DataConfig(data_dir=data_dir, seq_len=T, micro_batch_size=micro_batch_size, eval_tokens=1000)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        loss = evaluate(model, Split(data_dir, "val", 37), NextToken(T), cfg, world)["val_loss"]
        assert torch.equal(states[0], torch.get_rng_state()), "evaluation drew from torch's random state"
        assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
        assert model.training
        return loss


@pytest.fixture(scope="module")
def val_loss(data_dir):
    """Mean cross-entropy over windows end to end, the last one short, one at a time."""
    model = Transformer(SMALL)
    model.init_weights(seed=1)
    tokens = torch.from_numpy(Split(data_dir, "val", 37).shards[0].astype(np.int64))
    with torch.no_grad():
        losses = [F.cross_entropy(model(w[None, :-1])[0], w[1:], reduction="none")
                  for w in (tokens[i : i + T + 1] for i in range(0, len(tokens) - 1, T))]
    losses = torch.cat(losses)
    assert len(losses) == 99
    return losses.double().mean().item()


@pytest.mark.parametrize("micro_batch_size", [1, 4, 32])
def test_evaluation_is_the_mean_over_the_split_at_every_batch_size(micro_batch_size, data_dir, val_loss):
    assert evaluated(str(data_dir), micro_batch_size) == pytest.approx(val_loss, rel=1e-6)


@pytest.mark.parametrize("case", ["eval1", "eval3"])
def test_evaluation_is_the_same_on_two_ranks(case, two_ranks, val_loss):
    """15 windows: neither batch size shares them out evenly."""
    assert two_ranks[case] == pytest.approx([val_loss] * 2, rel=1e-6)


# ---- dropout

def dropout_losses():
    with init_world(ParallelConfig(device="cpu", precision="fp32")) as world:
        model, (ids, targets) = build(world, replace(SMALL, dropout=0.5)), uneven_batch()
        losses = []
        for step in (4, 5, 4):
            seed_step(seed=1, step=step, rank=world.rank)
            losses.append(model(ids, targets).item())
        return losses


def test_dropout_differs_between_ranks_and_steps_and_replays(two_ranks):
    (a4, a5, a4_again), (b4, b5, b4_again) = two_ranks["dropout"]
    assert (a4, b4) == (a4_again, b4_again)
    assert len({a4, a5, b4, b5}) == 4


# ---- what is picked

def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="fp16.*bf16 or fp32"):
        pick_precision("fp16", torch.device("cpu"))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_auto_precision_of_a_cpu_is_bf16_only_where_it_computes_in_it():
    flags = Path("/proc/cpuinfo").read_text()
    expected = "bf16" if "avx512_bf16" in flags or "amx_tile" in flags else "fp32"
    assert pick_precision("auto", torch.device("cpu")) == expected
    assert pick_precision("fp32", torch.device("cpu")) == "fp32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="device is cuda, but process 0 .* finds 0 CUDA devices.*--device=cpu"):
        pick_device("cuda")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_mps_that_is_not_there_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="device is mps.*--device=cpu"):
        pick_device("mps")


# ---- compile

def test_compile_that_fails_gives_one_warning_and_trains(data_dir, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(data_dir, tmp_path, compile=True, max_steps=2)
    said = [str(w.message) for w in caught if "torch.compile" in str(w.message)]
    assert len(said) == 1 and said[0].endswith("RuntimeError: no compiler here")
    assert (tmp_path / "finished").exists()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss_and_gradients(plain):
    ids, targets = uneven_batch()
    with init_world(ParallelConfig(device="cpu", precision="fp32")) as world, warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.compile does not work")
        model = build(world, compile=True)
        loss = model(ids, targets) / (targets != IGNORE).sum()
        loss.backward()
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    check_step(loss.item(), {name: p.grad for name, p in model.named_parameters()}, plain)
