"""What only a CUDA device shows: -m gpu. One device is enough."""

import json
import math
import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import bench
import config
import train
from checkpoint import CheckpointConfig, CheckpointWriter, checkpoints, load_checkpoint, step_of
from model import Transformer
from optim import OptimConfig, build_optimizer, set_lr
from parallel import ParallelConfig, distribute, fully_shard_model
from ranks import free_port, records, run, step_settings, write_data
from test_shard import MODELS, batch
from train import train_step
from world import World, WorldConfig, init_world, seed_step

DEVICE = os.environ.get("FLATLM_TEST_DEVICE", "cuda")  # cpu, to try the tests themselves
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = ("none", "selective", "full")


def steps(world, model, name, n, learning_rate=1e-2):
    """Losses of n steps on one batch, and the scaler's scale."""
    optimizer = build_optimizer(model, OptimConfig(learning_rate=learning_rate, warmup_steps=0), world)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.precision == "fp16")
    batches = [tuple(part.to(world.device) for part in batch(name, 0))]
    losses = [train_step(model, optimizer, scaler, batches, step_settings(1.0), world)[0] for _ in range(n)]
    return losses, scaler.get_scale()


def losses_of(name, precision, device=DEVICE, n=10, compile=False, **parallel):
    cfg = ParallelConfig(compile=compile, **parallel)
    with init_world(WorldConfig(device=device, precision=precision), cfg) as world:
        with torch.device("meta"):
            model = Transformer(MODELS[name])
        return steps(world, distribute(model, cfg, world, seed=1), name, n)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 5e-3)])
def test_a_gpu_trains_as_a_cpu_does_in_float32(name, precision, tolerance):
    losses, scale = losses_of(name, precision)
    on_cpu, _ = losses_of(name, "fp32", device="cpu")
    assert losses == pytest.approx(on_cpu, rel=tolerance) and on_cpu[-1] < on_cpu[0]
    assert scale == (2.0**16 if precision == "fp16" else 1.0)  # no step was skipped


def test_fp16_skips_steps_until_its_scale_fits():
    with init_world(WorldConfig(device=DEVICE, precision="fp16"), ParallelConfig(compile=False)) as world:
        with torch.device("meta"):
            model = Transformer(MODELS["gpt"])
        distribute(model, ParallelConfig(compile=False), world, seed=1)
        optimizer = build_optimizer(model, OptimConfig(warmup_steps=0), world)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
        batches = [tuple(part.to(world.device) for part in batch("gpt", 0))]
        before = model.wte.weight.detach().clone()
        _, norm, _ = train_step(model, optimizer, scaler, batches, step_settings(1.0), world)
        assert torch.equal(before, model.wte.weight) and not math.isfinite(norm)
        assert scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_compile_and_activation_checkpointing_change_rounding_alone(name, kind):
    torch._dynamo.reset()
    losses, _ = losses_of(name, "bf16", compile=True, activation_checkpointing=kind)
    assert losses == pytest.approx(losses_of(name, "bf16")[0], rel=2e-2)


def captured_steps(name, cuda_graphs, optimizer="adamw", n=6):
    """(losses, weights, graphs by name) of steps of three micro-steps, compiled, with dropout."""
    cfg = ParallelConfig(compile=True, cuda_graphs=cuda_graphs)
    torch._dynamo.reset()
    with init_world(WorldConfig(device=DEVICE, precision="bf16", deterministic=True), cfg) as world:
        with torch.device("meta"):
            model = Transformer(replace(MODELS[name], dropout=0.1))
        distribute(model, cfg, world, seed=1)
        optimizer = build_optimizer(model, OptimConfig(optimizer=optimizer, learning_rate=1e-2), world)
        scaler, losses = torch.amp.GradScaler(world.device.type, enabled=False), []
        for step in range(n):
            seed_step(1, step, 0)
            set_lr(optimizer, 1e-2 / (step + 1))
            batches = [tuple(part.to(world.device) for part in batch(name, 3 * step + i)) for i in range(3)]
            losses.append(train_step(model, optimizer, scaler, batches, step_settings(1.0), world)[:2])
    torch.use_deterministic_algorithms(False)
    return losses, [p.detach().clone() for p in model.parameters()], dict(model.graphs or {})


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("name", MODELS)
def test_captured_steps_are_those_launched_one_by_one(name):
    """Learning rate, data and dropout differ from step to step."""
    losses, weights, _ = captured_steps(name, cuda_graphs=False)
    its_losses, its_weights, graphs = captured_steps(name, cuda_graphs=True)
    assert graphs.keys() == {"micro-step", "update"}
    assert its_losses == [pytest.approx(pair, rel=1e-4) for pair in losses]
    for wanted, found in zip(weights, its_weights):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert captured_steps(name, cuda_graphs=True)[0] == its_losses  # to the bit


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("optimizer", ["muon", "adafactor", "sgd"])
def test_an_optimizer_that_graphs_cannot_hold_steps_between_captured_micro_steps(optimizer):
    losses, _, graphs = captured_steps("gpt", cuda_graphs=True, optimizer=optimizer)
    assert graphs.keys() == {"micro-step"}
    assert losses == [pytest.approx(pair, rel=1e-3) for pair in captured_steps("gpt", False, optimizer=optimizer)[0]]


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need CUDA")
def test_a_captured_run_resumes_to_the_bit(tmp_path):
    """Each start warms up and records anew, and both must leave no trace in weights and random numbers."""
    data = write_data(tmp_path / "data")
    how = {"device": DEVICE, "precision": "bf16", "compile": True, "dropout": 0.1, "deterministic": True}
    whole = run(data, tmp_path / "whole", **how)
    run(data, tmp_path / "parts", **how, max_steps=4)
    torch._dynamo.reset()
    parts = run(data, tmp_path / "parts", **how)
    assert records(whole) == records(parts)


@pytest.mark.parametrize("precision", ["bf16", "fp16"] if DEVICE == "cuda" else ["bf16"])
def test_looking_into_the_model_leaves_training_as_it_is(precision, tmp_path):
    data = write_data(tmp_path / "data", vocab_size=300)
    how = {"device": DEVICE, "precision": precision, "compile": True, "dropout": 0.1, "deterministic": True}
    how |= {"vocab_size": 300, "eval_interval": 3}
    blind = run(data, tmp_path / "blind", **how)
    torch._dynamo.reset()
    looking = run(data, tmp_path / "looking", **how, watch="norms", sample_prompts="ab", sample_tokens=4)
    assert records(looking) == records(blind) and len(records(looking, "sample/0")) == 4
    assert all(0 < norm < 100 for norm in records(looking, "val_grad_norm/blocks.1").values())


@pytest.fixture
def group_of_one(monkeypatch):
    """A World of one rank that has a mesh, as several have."""
    for key, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(key, str(value))
    dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo")
    mesh = init_device_mesh(DEVICE, (1, 1, 1), mesh_dim_names=("replicate", "shard", "tp"))
    yield World(0, 1, torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE), "bf16", mesh)
    dist.destroy_process_group()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_on_one_device_trains_as_without(kind, compile, group_of_one):
    torch._dynamo.reset()
    cfg = ParallelConfig(compile=compile, activation_checkpointing=kind)
    with torch.device("meta"):
        model = Transformer(MODELS["modern"])
    distribute(model, cfg, group_of_one, seed=1)
    fully_shard_model(model, cfg, group_of_one)
    losses, _ = steps(group_of_one, model, "modern", 10)
    assert losses == pytest.approx(losses_of("modern", "bf16")[0], rel=2e-2)


def test_selective_activation_checkpointing_replays_dropout():
    cfg = replace(MODELS["gpt"], dropout=0.3)
    found = []
    for kind in KINDS:
        parallel = ParallelConfig(compile=False, activation_checkpointing=kind)
        with init_world(WorldConfig(device=DEVICE, precision="bf16"), parallel) as world:
            with torch.device("meta"):
                model = Transformer(cfg)
            distribute(model, parallel, world, seed=1)
            torch.manual_seed(3)
            with world.autocast():
                model(*(part.to(world.device) for part in batch("gpt", 0))).backward()
            found.append(model.wte.weight.grad.clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_is_saved_beside_training_is_the_model_at_that_moment(tmp_path):
    """Twice, since what is copied to the second time is the pinned memory of the first."""
    with init_world(WorldConfig(device=DEVICE, precision="bf16"), ParallelConfig(compile=False)) as world:
        with torch.device("meta"):
            model = Transformer(MODELS["gpt"])
        distribute(model, ParallelConfig(compile=False), world, seed=1)
        optimizer = build_optimizer(model, OptimConfig(warmup_steps=0), world)
        scaler = torch.amp.GradScaler(world.device.type, enabled=False)
        batches = [tuple(part.to(world.device) for part in batch("gpt", 0))]
        saver, weights = CheckpointWriter(tmp_path, CheckpointConfig(), world), {}
        for step in range(1, 9):
            train_step(model, optimizer, scaler, batches, step_settings(1.0), world)
            if step % 3 == 0:
                saver.save(step, model, optimizer, {})
                weights[step] = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        saver.wait()
        for path in checkpoints(tmp_path):
            load_checkpoint(path, model)
            assert all(torch.equal(p.cpu(), weights[step_of(path)][name]) for name, p in model.named_parameters())
        assert [step_of(path) for path in checkpoints(tmp_path)] == [3, 6]


def test_saving_costs_at_most_a_twentieth_of_the_time_between_saves(tmp_path, monkeypatch):
    """GPT-2 124M's state is 1.5 GB; the pause is the copy to pinned memory, and writing must not slow down the steps."""
    shape = {} if DEVICE == "cuda" else {"n_layer": 2, "n_embd": 60, "n_head": 5, "block_size": 64, "seq_len": 64}
    shape = {"n_layer": 12, "n_embd": 768, "n_head": 12, "block_size": 1024, "seq_len": 1024} | shape
    names = shape | {"micro_batch_size": 16, "batch_tokens": 32 * shape["seq_len"], "device": DEVICE, "precision": "bf16",
                     "eval_tokens": 2048, "max_steps": 60, "keep_checkpoints": 1}  # fmt: skip
    data, seconds = write_data(tmp_path / "data", train_tokens=400_000, val_tokens=3000, shard_tokens=100_000), {}
    for interval in ("none", 20):
        times = []
        monkeypatch.setattr(
            train, "train_step", lambda *args: [times.append(time.perf_counter()), train_step(*args)][1]
        )
        run(data, tmp_path / str(interval), **names, save_interval=interval)
        seconds[interval] = times[59] - times[19]  # of two saves, after steps 20 and 40
    cost = (seconds[20] - seconds["none"]) / seconds["none"]
    print(f"\n40 steps without saves {seconds['none']:.2f} s, with two {seconds[20]:.2f} s: {cost:.1%}")
    assert cost < 0.05 or DEVICE == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_a_benchmark_takes_time_and_memory_apart(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ["--n_layer=4", "--n_head=4", "--n_embd=256", "--block_size=128", "--micro_batch_size=4"]
    args = [*sizes, "--batch_tokens=1024", "--bench_steps=3", "--picture=false", "--profile", "--compile=false"]
    args += [f"--device={DEVICE}", f"--activation_checkpointing={kind}", "--json=f.json"]
    bench.main(config.load(bench.Settings, args))
    f = json.loads((tmp_path / "f.json").read_text())
    gib = f["memory_gib"]
    assert sum(f["time_share"].values()) == pytest.approx(1) and gib["activations"] > 4 * 4 * 128 * 256 * 4 / 2**30
    assert gib["logits"] > 512 * 50304 * 2 / 2**30 and (tmp_path / "memory.png").stat().st_size > 0
    if DEVICE == "cuda":
        assert f["reserved_memory_gib"] >= f["peak_memory_gib"] >= gib["total"]
        assert f["power_w"] is None or f["power_w"] > 10
