"""Steps that are not sound are skipped by all ranks together; where they go on, the run goes back; then it stops."""

import copy
import functools
import itertools
import json
import math
import shutil

import pytest
import torch
import torch.distributed as dist

import config
import train
from checkpoint import checkpoints, newest_checkpoint
from launch import keep_copies
from model import ModelConfig, Transformer
from optim import OptimConfig, build_optimizer
from ranks import on_ranks, records, run, settings, step_settings, wait_until, write_data
from run.health import WINDOW, HealthConfig, bad_step, first_bad_tensor
from run.resume import State
from world import World

ANY_LOSS_IS_A_SPIKE = [(1e-3 * (i % 2), 1e9) for i in range(WINDOW)]
LAYOUTS = {"ddp": {}, "fsdp": {"strategy": "fsdp", "max_steps": 10},
           "tp": {"tp": 2, "seq_len": 8, "batch_tokens": 48, "n_head": 4, "max_steps": 10}}  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("health") / "data", train_tokens=20_000)


# ---- what is wrong with a step

SPIKES = HealthConfig(spike_z=5.0)


def test_a_step_that_is_not_finite_is_always_bad_and_joins_no_window(data_dir, tmp_path):
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)):
        assert "loss" in bad_step(loss, norm, HealthConfig()) and "loss" in bad_step(loss, norm, SPIKES)
    cfg, state = settings(data_dir, tmp_path, spike_z=5.0), State()
    state.advance(cfg, math.nan, 1.0, "loss nan")
    state.advance(cfg, 1.0, math.inf, None)  # an overflow that the gradient scaler skipped
    assert state.recent == [] and (state.step, state.bad_steps) == (2, 0)


def test_a_spike_is_what_lies_beyond_so_many_deviations_of_a_whole_window():
    recent = [[2.0 + 0.1 * (-1) ** i, 1.0] for i in range(WINDOW)]  # mean 2, deviation 0.1
    assert bad_step(2.49, 1.0, SPIKES, list(recent)) is None
    assert bad_step(2.51, 1.0, SPIKES, list(recent)) == "loss 2.51, 5.1 standard deviations above 2"
    assert bad_step(0.0, 1.0, SPIKES, list(recent)) is None  # a fall is welcome
    assert bad_step(9.0, 1.0, SPIKES, recent[1:]) is None  # the window is not full
    assert bad_step(9.0, 1.0, HealthConfig(), recent) is None
    assert "gradient norm" in bad_step(2.0, 2.0, SPIKES, [[2.0, 1 + 0.01 * (-1) ** i] for i in range(WINDOW)])
    assert bad_step(2.0, 2.0, SPIKES, list(recent)) is None  # norms that were all the same have no deviation to measure by


def test_sound_steps_join_the_window_and_spikes_do_not(data_dir, tmp_path):
    cfg, state = settings(data_dir, tmp_path, spike_z=5.0), State()
    for i in range(WINDOW + 3):
        state.advance(cfg, 2.0 + 0.1 * (-1) ** i, 1.0, None)
    state.advance(cfg, 9.0, 1.0, "a spike")
    assert len(state.recent) == WINDOW and state.recent[-1] == (2.1, 1.0) and state.bad_steps == 1
    state.advance(cfg, 2.05, 1.0, None)
    assert len(state.recent) == WINDOW and state.recent[-1] == (2.05, 1.0) and state.bad_steps == 0
    assert State(**json.loads(json.dumps(vars(state)))).recent[-1] == [2.05, 1.0]  # as a checkpoint keeps it


# ---- faults in runs

def planted(cfg, rank, first, last, tensor="blocks.1.mlp.up.weight"):
    """Trains with cfg; what a weight's gradient is on one rank is no number in the first-th to the last-th backward.

    Returns the message where the run is refused to go on.
    """
    build, calls, hooks = train.build, [], []

    def build_with_fault(cfg, world, seed):
        built = build(cfg, world, seed)
        if world.rank == rank:
            module, _, name = tensor.rpartition(".")

            def spoil(grad):
                calls.append(1)
                return grad * math.nan if first <= len(calls) <= last else grad

            def plant(module, _):  # on the weight as it is in forward: of a sharded model, whole
                while hooks:
                    hooks.pop().remove()
                hooks.append(getattr(module, name).register_hook(spoil))

            built[0].get_submodule(module).register_forward_pre_hook(plant)
        return built

    train.build = build_with_fault
    try:
        train.main(cfg)
    except ValueError as error:
        return str(error) if isinstance(error, config.UserError) else repr(error)
    except SystemExit as ending:
        return ending.code
    finally:
        train.build = build
        if dist.is_initialized():  # after an error; all ranks raise it
            dist.destroy_process_group()


CHANGES = {"max_steps": 24, "save_interval": 4, "keep_checkpoints": 10, "lr_decay_steps": "none", "max_bad_steps": 3,
           "dropout": 0.1}  # fmt: skip
FAULTS = {"none": (0, 0), "one": (7, 7), "three": (7, 9), "always": (7, 10**9)}  # backwards that give a bad gradient


@pytest.fixture(scope="module")
def faults(data_dir, tmp_path_factory):
    """{(layout, fault): (what a run on two ranks with a fault on rank 1 said at its end, its folder)}."""
    folder = tmp_path_factory.mktemp("faults")

    class Runs(dict):
        def __missing__(self, key):
            layout, cases = key[0], {}
            for fault in FAULTS if layout == "ddp" else ("none", "one", "always"):
                cfg = settings(data_dir, folder / f"{layout}_{fault}", **CHANGES | LAYOUTS[layout])
                cases[fault] = (planted, cfg, 1, *FAULTS[fault])
            for fault, answer in zip(cases, on_ranks(2, *cases.values())):
                self[layout, fault] = answer, folder / f"{layout}_{fault}"
            return self[key]

    return Runs()


TRIED = ["ddp", pytest.param("fsdp", marks=pytest.mark.slow), pytest.param("tp", marks=pytest.mark.slow)]
BAD = {"ddp": [7, 8, 9], "fsdp": [7, 8, 9], "tp": [4, 5]}  # steps of these backwards; tp takes two a step


@pytest.mark.parametrize("layout", TRIED)
def test_a_gradient_that_is_bad_on_one_rank_is_skipped_by_all_and_logged(layout, faults):
    answer, out_dir = faults[layout, "one"]
    losses, sound, bad = records(out_dir), records(faults[layout, "none"][1]), BAD[layout][0]
    skipped = records(out_dir, "skipped")
    assert answer == [None, None] and (out_dir / "finished").exists()
    assert list(skipped) == [bad] and "gradient norm nan" in skipped[bad]
    assert all(losses[step] == sound[step] for step in range(1, bad + 1))  # forward was sound
    assert losses[bad + 1] != sound[bad + 1] and losses.keys() == sound.keys()
    assert all(map(math.isfinite, losses.values()))


def test_many_bad_steps_make_the_run_go_back_and_leave_their_data_behind(data_dir, faults, tmp_path):
    """It then is the run that a person gets who takes the checkpoint and moves on in the data by hand."""
    answer, out_dir = faults["ddp", "three"]
    assert answer == [None, None] and (out_dir / "finished").exists()
    assert records(out_dir, "went_back_to") == {4: 4} and not records(out_dir, "skipped")
    losses, sound = records(out_dir), records(faults["ddp", "none"][1])
    assert list(losses) == list(range(1, 25)) and all(losses[step] == sound[step] for step in range(1, 5))
    by_hand = tmp_path / "by_hand"
    shutil.copytree(faults["ddp", "none"][1], by_hand)
    for path in checkpoints(by_hand)[1:]:
        shutil.rmtree(path)
    manifest = checkpoints(by_hand)[0] / "manifest.json"
    facts = json.loads(manifest.read_text())
    del facts["checksum"]  # which would tell
    assert facts["state"]["sequences_seen"] == 4 * 6
    facts["state"]["sequences_seen"] = 9 * 6
    manifest.write_text(json.dumps(facts))
    on_ranks(2, (train.main, settings(data_dir, by_hand, **CHANGES)))
    assert records(by_hand) == losses


@pytest.mark.parametrize("layout", TRIED)
def test_bad_steps_that_come_again_end_the_run_and_name_step_rank_and_tensor(layout, faults):
    answer, out_dir = faults[layout, "always"]
    assert answer[1] == 2 and not (out_dir / "finished").exists()
    back = 4 if layout != "tp" else 0
    if back:
        assert f"last one step {back + 3} with loss" in answer[0]
        assert "again after a rollback to step_00000004" in answer[0]
    else:
        assert "last one step 6 with loss" in answer[0] and "with no checkpoint to roll back to" in answer[0]
    assert "first bad tensor: on rank 1 the gradient of blocks.1.mlp.up.weight" in answer[0] and "\n" not in answer[0]


@pytest.mark.slow
def test_a_run_killed_amid_bad_steps_does_as_if_it_had_not_been(data_dir, faults, tmp_path):
    """Going on with more steps from the checkpoint of step 4, it meets the fault again, which counts from there."""
    out_dir = tmp_path / "run"
    shutil.copytree(faults["ddp", "none"][1], out_dir)
    for path in checkpoints(out_dir)[1:]:
        shutil.rmtree(path)
    [answer] = on_ranks(2, (planted, settings(data_dir, out_dir, **CHANGES), 1, 3, 5))
    assert answer == [None, None] and records(out_dir) == records(faults["ddp", "three"][1])


def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were():
    model = Transformer(ModelConfig(vocab_size=37, block_size=11, n_layer=2, n_head=5, n_embd=20))
    model.init_weights(seed=1)
    optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-2))
    world, scaler = World(0, 1, torch.device("cpu"), "fp32"), torch.amp.GradScaler("cpu", enabled=False)
    ids = torch.randint(37, (3, 8), generator=torch.Generator().manual_seed(1))
    step = functools.partial(
        train.train_step, model, optimizer, scaler, [(ids[:, :-1], ids[:, 1:])], step_settings(spike_z=5.0), world
    )
    assert step()[2] is None
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    assert "standard deviations above" in step(ANY_LOSS_IS_A_SPIKE)[2]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], before[1][key][name]) for name in state)
    assert all(p.grad is None for p in model.parameters())


def test_spikes_are_skipped_and_the_window_goes_on_where_a_run_was_stopped(data_dir, tmp_path):
    """At a threshold so low that sound steps are skipped too."""
    changes = {"max_steps": 160, "spike_z": 1.0, "save_interval": 70, "lr_decay_steps": 160, "max_bad_steps": 100}
    changes |= {"n_layer": 1, "micro_batch_size": 6}
    whole = run(data_dir, tmp_path / "whole", **changes)
    skipped = records(whole, "skipped")
    assert skipped and min(skipped) > WINDOW and all("standard deviations above" in text for text in skipped.values())
    run(data_dir, tmp_path / "parts", **changes | {"max_steps": 140})
    assert records(run(data_dir, tmp_path / "parts", **changes)) == records(whole)
    assert records(tmp_path / "parts", "skipped") == skipped


def test_what_is_bad_in_forward_is_named_before_what_follows_from_it(data_dir, tmp_path, monkeypatch):
    build = train.build

    def build_with_bad_weight(cfg, world, seed):
        built = build(cfg, world, seed)
        linear = next(m for m in built[0].blocks[2].modules() if isinstance(m, torch.nn.Linear))
        linear.register_forward_hook(lambda module, inputs, output: output * math.inf)
        return built

    monkeypatch.setattr(train, "build", build_with_bad_weight)
    with pytest.raises(ValueError, match="first bad tensor: on rank 0 the output of blocks.2.") as error:
        run(data_dir, tmp_path / "run", max_bad_steps=2, save_interval="none")
    assert "2 steps in a row were skipped, the last one step 2 with loss nan" in str(error.value)
    assert "with no checkpoint to roll back to" in str(error.value)


class InfiniteGradient(torch.autograd.Function):
    """A weight itself, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, math.inf)


@pytest.mark.parametrize("copies", [False, True])
def test_a_weights_bad_gradient_is_named_whether_or_not_training_multiplies_by_a_copy(copies):
    model = Transformer(ModelConfig(vocab_size=37, block_size=11, n_layer=2, n_head=5, n_embd=20))
    model.init_weights(1)
    if copies:
        keep_copies(model)
    up, ids = model.blocks[0].mlp.up, torch.randint(37, (3, 7))
    up.forward = lambda x: torch.nn.functional.linear(x, InfiniteGradient.apply(up.matrix()), up.bias)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, ids).backward()

    assert first_bad_tensor(model, step) == "the gradient of blocks.0.mlp.up.weight"


def test_a_spike_is_skipped_in_fp16_too_where_overflows_are_the_scalers_own_affair():
    """The scaler's path in float32 on the CPU."""
    model = Transformer(ModelConfig(vocab_size=37, block_size=11, n_layer=2, n_head=5, n_embd=20))
    model.init_weights(seed=1)
    world, ids = World(0, 1, torch.device("cpu"), "fp32"), torch.randint(37, (3, 8))
    optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-2))
    before = copy.deepcopy(model.state_dict())

    def step(scale, recent=()):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        batches, cfg = [(ids[:, :-1], ids[:, 1:])], step_settings(spike_z=5.0)
        wrong = train.train_step(model, optimizer, scaler, batches, cfg, world, recent)[2]
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        return wrong, scaler.get_scale() / scale

    spike, scale = step(2.0**10, ANY_LOSS_IS_A_SPIKE)
    assert "standard deviations above" in spike and scale == 1.0
    assert step(3e38) == (None, pytest.approx(0.5))  # an overflow
    with torch.no_grad():
        model.wte.weight[0, 0] = math.inf
    before = copy.deepcopy(model.state_dict())
    assert step(2.0**10)[0].startswith("loss ")


def test_a_run_whose_first_steps_are_skipped_is_saved_and_goes_on_to_the_bit(data_dir, tmp_path):
    """Saved before the optimizer has ever stepped: then its state must be as if it had not been asked for."""
    changes = {"max_steps": 9, "lr_decay_steps": "none", "dropout": 0.1}
    for name, interval in (("whole", 100), ("parts", 2)):
        cfg = settings(data_dir, tmp_path / name, **changes, save_interval=interval)
        assert planted(cfg, 0, 1, 2) is None
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    for path in checkpoints(tmp_path / "parts")[1:]:
        shutil.rmtree(path)
    before = records(tmp_path / "whole")
    run(data_dir, tmp_path / "parts", **changes, save_interval=100, resume="auto")
    assert records(tmp_path / "parts") == before


def test_going_back_passes_over_a_damaged_checkpoint(data_dir, tmp_path, capsys, monkeypatch):
    step, out_dir, steps, damaged = train.train_step, tmp_path / "run", itertools.count(1), []

    def damage_step_8(*args):
        if next(steps) == 9:  # the first after the checkpoint, which is still being written
            wait_until((out_dir / "ckpt" / "step_00000008").is_dir)
            damaged.append(next((out_dir / "ckpt" / "step_00000008").glob("*.safetensors")))
            damaged[0].write_bytes(b"no tensors")
        return step(*args)

    monkeypatch.setattr(train, "train_step", damage_step_8)
    cfg = settings(data_dir, out_dir, **CHANGES | {"max_steps": 15})
    assert planted(cfg, 0, 21, 26) is None  # steps 11, 12, 13, of two backwards each
    told = capsys.readouterr().out
    assert f"{damaged[0]} is missing or damaged" in told and "taking step_00000004 instead" in told
    assert records(out_dir, "went_back_to") == {4: 4} and (out_dir / "finished").exists()
    assert (out_dir / "ckpt" / "damaged_step_00000008_1").is_dir()
    assert newest_checkpoint(out_dir).name == "step_00000015"
    assert [path.name for path in checkpoints(out_dir)] == [f"step_{n:08d}" for n in (4, 8, 12, 15)]
