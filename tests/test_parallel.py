"""One process, accumulation and ranks compute the same; precision, devices and compile are picked or refused."""

import collections
import ctypes
import functools
import math
import os
import random
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import DataConfig, Split
from devices import pick_device, pick_precision
from launch import compile_model, keep_copies
from model import ModelConfig, Transformer
from objective import IGNORE, Masked, NextSentence, NextToken
from optim import OptimConfig, build_optimizer
from parallel import ParallelConfig, distribute
from ranks import on_ranks, run, step_settings, write_data
from text.tokenizer import SPECIALS
from train import evaluate, train_step
from world import World, WorldConfig, init_world, seed_step

ROOT = Path(__file__).resolve().parent.parent
SMALL = ModelConfig(vocab_size=37, block_size=11, n_layer=3, n_head=5, n_embd=20)
MODELS = {
    "gpt": SMALL,
    "bert": replace(SMALL, objective="mlm", norm_position="post", n_token_types=2, mlp="gelu"),
    "modern": replace(SMALL, objective="mlm", n_kv_head=1, norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=True,
                      bias=False),
}  # fmt: skip
SEQUENCES, T = 12, 7
SPECIAL_IDS = {name: 32 + i for i, name in enumerate(SPECIALS)}


def uneven_batch(name="gpt"):
    """Twelve sequences, four of them without a target: however ranks split them, one rank has fewer targets.

    Of masked models, with positions, sequences of several lengths, and token types.
    """
    g = torch.Generator().manual_seed(5)
    ids, targets = torch.randint(37, (2, SEQUENCES, T), generator=g)
    targets[[0, 2, 4, 6]] = IGNORE
    targets[1, :5] = IGNORE
    if name == "gpt":
        return ids, targets
    positions = torch.stack([torch.randperm(4, generator=g)[:3] for _ in range(SEQUENCES)])
    attention_mask = torch.arange(T) < torch.randint(4, T + 1, (SEQUENCES, 1), generator=g)
    types = (torch.arange(T) > 2).long().expand(SEQUENCES, T) if name == "bert" else None
    return ids, targets[:, 4:].contiguous(), positions, attention_mask, *([types] if name == "bert" else [])


def build(world, cfg=SMALL, **parallel):
    with torch.device("meta"):
        model = Transformer(cfg)
    return distribute(model, ParallelConfig(**parallel), world, seed=1)


def one_step(name, micro_batch_size, count=False):
    """(the loss, gradient norm, gradients, all-reduces if to be counted) of train_step.

    It is on the uneven batch. SGD at rate 1 takes the gradient off the weights, which shows what it was.
    """
    with init_world(WorldConfig(device="cpu", precision="fp32")) as world:
        model = build(world, MODELS[name])
        optimizer = build_optimizer(model, OptimConfig(optimizer="sgd", learning_rate=1.0, beta1=0.0, weight_decay=0.0))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        parts = [part.split(micro_batch_size) for part in uneven_batch(name)]
        batches = list(zip(*parts))[world.rank :: world.size]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if count else nullcontext()
        with profile as profiler:
            loss, grad_norm, _ = train_step(model, optimizer, scaler, batches, step_settings(None), world)
        events = profiler.key_averages() if count else ()
        reduced = sum(event.count for event in events if event.key == "c10d::allreduce_")
        grads = {name: before[name] - p.detach() for name, p in model.named_parameters()}
        return loss, grad_norm, grads, reduced


STEPS = [("gpt", 6), ("gpt", 3), ("gpt", 1), ("bert", 3), ("bert", 1), ("modern", 3)]
COUNTED = [("gpt", 6), ("gpt", 1), ("bert", 3)]
EVALUATIONS = [("gpt", 1), ("gpt", 3), ("bert", 1), ("bert", 3), ("modern", 4)]


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory):
    """Data of each model, its name as a word of the folder's."""
    masked = str(write_data(tmp_path_factory.mktemp("masked"), val_tokens=192, specials=SPECIAL_IDS))
    return {
        "gpt": str(write_data(tmp_path_factory.mktemp("data"), val_tokens=100)), "bert": masked, "modern": masked,
    }  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(data_dirs):
    return data_dirs["gpt"]


@pytest.fixture(scope="module")
def two_ranks(data_dirs):
    """What two ranks answer, in one launch: {case: [answer by rank]}."""
    cases = {("step", *args): (one_step, *args, args in COUNTED) for args in STEPS}
    cases |= {("eval", name, size): (evaluated, name, data_dirs[name], size) for name, size in EVALUATIONS}
    cases["eval of sequences"] = (sequences_evaluated, data_dirs["bert"], 3)
    cases["dropout"] = (dropout_losses,)
    cases["buckets"] = (places_of_gradients,)
    return dict(zip(cases, on_ranks(2, *cases.values())))


@functools.cache
def plain(name):
    """Loss and gradients by plain autograd on torch's own cross-entropy of whole logits, without train_step."""
    model = Transformer(MODELS[name])
    model.init_weights(seed=1)
    ids, targets, *rest = uneven_batch(name)
    logits = model(ids, **dict(zip(("attention_mask", "token_types"), rest[1:])))  # B T V
    if rest:
        logits = torch.stack([row[places] for row, places in zip(logits, rest[0])])  # B K V
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def check_step(loss, grads, plain):
    largest = max(g.abs().max() for g in plain[1].values())
    assert loss == pytest.approx(plain[0], rel=1e-5)
    for name, g in plain[1].items():
        assert (grads[name] - g).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize(("name", "micro_batch_size"), [
    ("gpt", 12), ("gpt", 3), ("gpt", 1), ("bert", 12), ("bert", 5), ("modern", 12), ("modern", 1),
])  # fmt: skip
def test_accumulation_gives_the_loss_and_gradients_of_one_batch(name, micro_batch_size):
    loss, grad_norm, grads, _ = one_step(name, micro_batch_size)
    check_step(loss, grads, plain(name))
    norm = torch.stack([g.norm() for g in plain(name)[1].values()]).norm().item()
    assert grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_two_ranks_give_the_loss_and_gradients_of_one_process(case, two_ranks):
    (loss_0, norm_0, grads_0, _), (loss_1, norm_1, grads_1, _) = two_ranks["step", *case]
    check_step(loss_0, grads_0, plain(case[0]))
    assert (loss_0, norm_0) == (loss_1, norm_1)
    assert all(torch.equal(grads_0[name], grads_1[name]) for name in grads_0)


def test_gradients_are_synchronised_once_a_step(two_ranks):
    """As many collectives in six micro-steps as in one: of targets' number, gradients, and the step's two figures."""
    assert {case: two_ranks["step", *case][0][3] for case in COUNTED} == dict.fromkeys(COUNTED, 3)


def places_of_gradients():
    """The number of allocations that this rank's gradients lie in, before each micro-step of three steps."""
    seen, ids = [], torch.zeros(2, T, dtype=torch.long)
    with init_world(WorldConfig(device="cpu", precision="fp32")) as world:
        model = Transformer(SMALL)
        distribute(model, ParallelConfig(), world, seed=1)
        model.register_forward_pre_hook(
            lambda *args: seen.append({p.grad.untyped_storage().data_ptr() for p in model.parameters()})
        )
        optimizer, scaler = build_optimizer(model, OptimConfig()), torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(3):
            train_step(model, optimizer, scaler, [(ids, ids)] * 2, step_settings(1.0), world)
    return [len(places) for places in seen]


def test_gradients_of_ddp_lie_in_its_buckets_alone_from_the_first_micro_step_on(two_ranks):
    """Else micro-steps that send nothing would sum them up beside the buckets: 4 bytes a parameter more."""
    for places in two_ranks["buckets"]:
        assert places[1:] == [1] * 5  # of a small model there is one bucket


# ---- evaluation

def windows_of_model(name):
    return NextToken(T) if name == "gpt" else Masked(T, 0.3, 0, 37, SPECIAL_IDS)


def echo(model):
    """Makes a model say again what it sees, so that some of its answers are right."""
    with torch.no_grad():
        model.wte.weight.mul_(50)
        if model.cfg.objective == "mlm":
            model.transform.dense.weight.copy_(torch.eye(20))
    return model


def evaluated(name, data_dir, micro_batch_size):
    """What evaluate says."""
    with init_world(WorldConfig(device="cpu", precision="fp32")) as world:
        model = echo(build(world, replace(MODELS[name], dropout=0.5)))
        cfg = DataConfig(data_dir=data_dir, seq_len=T, micro_batch_size=micro_batch_size, eval_tokens=1000)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        figures = evaluate(model, [Split(data_dir, "val", 37)], windows_of_model(name), cfg, world)
        assert torch.equal(states[0], torch.get_rng_state()), "evaluation drew from torch's random state"
        assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
        assert model.training
        return figures


@pytest.fixture(scope="module")
def plainly_evaluated(data_dirs):
    """The same by torch's own cross-entropy and argmax, over windows end to end, the last one short, one at a time."""
    def figures(name):
        model = Transformer(MODELS[name])
        model.init_weights(seed=1)
        echo(model)
        windows, losses, right, all_targets = windows_of_model(name), [], [], []
        tokens = Split(data_dirs[name], "val", 37).shards[0][:].astype(np.int64)
        for number, start in enumerate(range(0, len(tokens) - windows.extra, windows.stride)):
            row = tokens[start : start + windows.stride + windows.extra]
            if name == "gpt":
                ids, targets, places = torch.from_numpy(row[:-1]), torch.from_numpy(row[1:]), slice(None)
            else:
                filled, length = np.zeros((1, windows.stride), dtype=np.int64), len(row)
                filled[0, :length] = row
                ids, targets, places, *_ = (part[0] for part in windows.batch(filled, number, np.array([length])))
                ids, targets, places = ids[: length + 2], targets[targets != IGNORE], places[targets != IGNORE]
            with torch.no_grad():
                logits = model(ids[None])[0, places]
            losses.append(F.cross_entropy(logits, targets, reduction="none").double())
            right.append(logits.argmax(-1) == targets)
            all_targets += targets.tolist()
        loss = torch.cat(losses).mean().item()
        return {
            "val_loss": loss,
            "val_accuracy": torch.cat(right).double().mean().item(),
            "val_accuracy_of_commonest": collections.Counter(all_targets).most_common(1)[0][1] / len(all_targets),
            **({"val_bpb": loss / math.log(2)} if name == "gpt" else {}),  # each of its ids is a byte
        }, len(all_targets)

    return functools.cache(figures)


@pytest.mark.parametrize(("name", "n_targets"), [("gpt", 99), ("bert", 38 * 2 + 1), ("modern", 38 * 2 + 1)])
def test_the_plain_evaluation_is_of_every_target_and_tells_right_from_wrong(name, n_targets, plainly_evaluated):
    figures, counted = plainly_evaluated(name)
    assert counted == n_targets
    assert 0.02 < figures["val_accuracy"] < 0.9 and figures["val_accuracy"] != figures["val_accuracy_of_commonest"]


def check_evaluation(figures, expected):
    assert figures.keys() == expected.keys()
    for name in {"val_loss", "val_bpb"} & figures.keys():
        assert figures[name] == pytest.approx(expected[name], rel=1e-6)
    for name in ("val_accuracy", "val_accuracy_of_commonest"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("micro_batch_size", [1, 4, 32])
def test_evaluation_is_the_mean_over_the_split_at_every_batch_size(
    name, micro_batch_size, data_dirs, plainly_evaluated
):
    check_evaluation(evaluated(name, data_dirs[name], micro_batch_size), plainly_evaluated(name)[0])


@pytest.mark.parametrize("case", EVALUATIONS, ids=str)
def test_evaluation_is_the_same_on_two_ranks(case, two_ranks, plainly_evaluated):
    """15 windows, or 39: no batch size shares them out evenly."""
    for figures in two_ranks["eval", *case]:
        check_evaluation(figures, plainly_evaluated(case[0])[0])


def sequences_evaluated(data_dir, micro_batch_size):
    """What evaluate says of a model that also learns from pairs of sentences and by contrast."""
    cfg = replace(MODELS["bert"], objective={"mlm": 1.0, "nsp": 1.0, "contrastive": 1.0}, dropout=0.5)
    with init_world(WorldConfig(device="cpu", precision="fp32")) as world:
        with torch.device("meta"):
            model = cfg.build()
        distribute(model, ParallelConfig(), world, seed=1)
        data = DataConfig(data_dir=data_dir, seq_len=T, micro_batch_size=micro_batch_size, eval_tokens=1000)
        windows = NextSentence(T, 0.3, 0, 37, SPECIAL_IDS)
        return evaluate(model, [Split(data_dir, "val", 37)], windows, data, world)


def test_evaluation_of_sequences_is_the_same_on_two_ranks(two_ranks, data_dirs):
    wanted = sequences_evaluated(data_dirs["bert"], 7)
    assert 0 < wanted["val_accuracy_nsp"] < 1 and wanted["val_loss_contrastive"] > 0.1
    for figures in two_ranks["eval of sequences"]:
        assert figures == pytest.approx(wanted, rel=1e-5)


# ---- dropout

def dropout_losses():
    with init_world(WorldConfig(device="cpu", precision="fp32")) as world:
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


# ---- activation checkpointing

ONE = World(0, 1, torch.device("cpu"), "fp32")


def checkpointed(name, kind, precision="fp32", dropout=0.0):
    """(loss, gradients) of one forward and backward, with a kind of activation checkpointing."""
    world = replace(ONE, precision=precision)
    model = build(world, replace(MODELS[name], dropout=dropout), activation_checkpointing=kind)
    torch.manual_seed(3)
    with world.autocast():
        loss = model(*uneven_batch(name))
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state), "backward moved the random state on"
    assert list(model.state_dict()) == list(Transformer(MODELS[name]).state_dict())
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_changes_no_bit_of_loss_and_gradients(name, precision, dropout):
    loss, grads = checkpointed(name, "none", precision, dropout)
    for kind in ("full", "selective"):
        other, other_grads = checkpointed(name, kind, precision, dropout)
        assert torch.equal(loss, other) and grads.keys() == other_grads.keys()
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    assert dropout == 0 or loss != checkpointed(name, "none", precision)[0]  # or nothing was dropped


class Storages(TorchDispatchMode):
    """Remembers, weakly, the storage of all that is computed; of a model's parameters, nothing."""

    def __init__(self, model):
        super().__init__()
        self.seen, self.known = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.seen[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        return out

    def alive(self):
        """Bytes of those that something still holds."""
        return sum(n_bytes for reference, n_bytes in self.seen.values() if not reference.expired())


def kept_for_backward(name, kind, n_layer, dropout=0.0):
    """Bytes that forward leaves behind for backward."""
    cfg = replace(MODELS[name], n_layer=n_layer, dropout=dropout)
    model, batch = build(ONE, cfg, activation_checkpointing=kind), uneven_batch(name)
    with Storages(model) as storages:
        loss = model(*batch)
    bytes_kept = storages.alive()
    assert loss.requires_grad
    return bytes_kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_saves_what_it_says_of_each_block(name, dropout):
    """Full: its input alone. Selective: beside it what matmuls gave, and, where it need not drop, attention."""
    kept = {kind: kept_for_backward(name, kind, 3, dropout) - kept_for_backward(name, kind, 2, dropout)
            for kind in ("none", "selective", "full")}  # fmt: skip
    assert kept["full"] < kept["selective"] < kept["none"]
    cfg = MODELS[name]
    keys_and_values, ups = 2 * cfg.kv_heads * cfg.head_width, 2 if cfg.mlp == "swiglu" else 1
    matmuls = 3 * cfg.n_embd + keys_and_values + ups * cfg.inner_width  # queries, proj and down are n_embd wide
    attention = 0 if dropout else cfg.n_embd + cfg.n_head  # and the logarithm of each softmax's sum
    numbers = SEQUENCES * T * 4
    assert kept["full"] == numbers * cfg.n_embd
    assert kept["selective"] == numbers * (cfg.n_embd + matmuls + attention)


# ---- what is picked

def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="fp16.*bf16 or fp32"):
        pick_precision("fp16", torch.device("cpu"))


def test_powersgd_with_fp16_is_refused():
    """One overflow, which fp16's scaler meets on purpose, would stay in what PowerSGD carries over for ever."""
    with pytest.raises(ValueError, match="powersgd.* fp16; use --precision=bf16"):
        build(replace(ONE, precision="fp16"), grad_compression="powersgd")


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


# torch 2.11 fails to make C++ of the loss's pass with gradients, which then runs eagerly; on CUDA it makes Triton code.
COMPILES_LOSS = torch.__version__ >= "2.13"


@pytest.mark.slow
@pytest.mark.parametrize(("n_segments", "n_graphs"), [(1, 1), (2, 2), (3, 1)])  # of 3 blocks; segments of one size share
def test_compiled_segments_give_the_same_loss_and_gradients(n_segments, n_graphs):
    ids, targets = uneven_batch()
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters
    counts.clear()
    with init_world(WorldConfig(device="cpu", precision="fp32")) as world, warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.compile does not work")
        model = build(world)
        with torch.no_grad():
            eager = [x.item() for x in model.eval()(ids, targets, count_correct=True)]
        compile_model(model.train(), n_segments, world)
        loss = model(ids, targets) / (targets != IGNORE).sum()
        loss.backward()
        assert counts["stats"]["unique_graphs"] == n_graphs + 2  # with the trial's and the loss's
        with torch.no_grad():
            assert [x.item() for x in model.eval()(ids, targets, count_correct=True)] == pytest.approx(eager, rel=1e-5)
        model.train()(ids, targets)
    # Evaluation adds a block's and the loss's; training then compiles nothing again.
    assert counts["stats"]["unique_graphs"] == n_graphs + 3 + COMPILES_LOSS and not counts["graph_break"]
    check_step(loss.item(), {name: p.grad for name, p in model.named_parameters()}, plain("gpt"))


@pytest.mark.parametrize("settings, size, graphs", [
    ({}, 1, 1), ({}, 8, 4), ({"strategy": "fsdp"}, 8, 12), ({"tp": 2}, 8, 12), ({"strategy": "fsdp"}, 1, 1),
    ({"pp": 2}, 2, 1), ({"pp": 2}, 4, 12),
    ({"activation_checkpointing": "full"}, 1, 12), ({"activation_checkpointing": "selective"}, 1, 1),
])  # fmt: skip
def test_blocks_are_compiled_as_one_graph_where_nothing_happens_between_them(settings, size, graphs):
    assert ParallelConfig(**settings).segments(size, 12) == graphs


# ---- copies of weights

def test_copies_of_weights_change_no_bit():
    """The copies are cast once a step instead of in each forward, and their gradients are added up in float32."""
    trained = []
    for copies in (False, True):
        with init_world(WorldConfig(device="cpu", precision="bf16")) as world:
            model = build(world, MODELS["modern"])
            if copies:
                keep_copies(model)
            optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-2))
            batches = list(zip(*(part.split(2) for part in uneven_batch("modern"))))
            assert len(batches) > 1
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            figures = [train_step(model, optimizer, scaler, batches, step_settings(1.0), world) for _ in range(3)]
            trained.append((figures, list(model.parameters())))
    (figures, weights), (with_copies, their_weights) = trained
    assert figures == with_copies and figures[0] != figures[2]
    assert all(map(torch.equal, weights, their_weights))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_compiled_blocks_with_activation_checkpointing_are_compiled(kind):
    """Blocks that compile does not take run as they are, without an error: so torch's own counts are asked."""
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters
    counts.clear()
    with init_world(WorldConfig(device="cpu", precision="fp32")) as world, warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.compile does not work")
        model, batch = build(world, MODELS["bert"], compile=True, activation_checkpointing=kind), uneven_batch("bert")
        before = dict(counts["stats"])  # of the function that distribute tries
        loss = model(*batch) / (batch[1] != IGNORE).sum()
        loss.backward()
    for count in ("unique_graphs", "calls_captured"):
        assert counts["stats"][count] > before[count], count
    assert counts["frames"]["ok"] == counts["frames"]["total"] or not COMPILES_LOSS
    assert not counts["graph_break"]
    check_step(loss.item(), {name: p.grad for name, p in model.named_parameters()}, plain("bert"))


FAULTS = """
import resource
import torch
from world import WorldConfig, init_world

with init_world(WorldConfig(device="cpu")):
    faults = []
    for _ in range(30):  # the heap has grown to what it needs by then
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MiB, freed at once
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.slow
@pytest.mark.parametrize("environment, kept", [({}, True), ({"MALLOC_ARENA_MAX": "3"}, False)])
def test_freed_memory_is_kept_for_the_next_tensor_unless_the_environment_tunes_it(environment, kept):
    command = [sys.executable, "-c", FAULTS]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 10) == kept
