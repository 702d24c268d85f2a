"""Predicted bytes against torch's own counts of saved tensors and of peak allocation."""

import gc
import json
import re
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import bench
import config
import train
from data import accumulation_steps
from launch import compile_model
from model import ModelConfig, Transformer
from objective import n_masked
from optim import OptimConfig, build_optimizer
from parallel import recompute_blocks
from perf import cost, memory
from world import World, init_world

BASE = {"vocab_size": 64, "n_head": 4, "n_embd": 128}
MODERN = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 2, "n_inner": 352, "qk_norm": True,
          "bias": False}  # fmt: skip
BERT = {"objective": "mlm", "norm_position": "post", "mlp": "gelu", "n_token_types": 2}
SHAPES = {
    "gpt": {}, "bert": BERT, "modern": MODERN, "grouped heads": {"n_kv_head": 2}, "qk_norm": {"qk_norm": True},
    "rmsnorm": {"norm": "rmsnorm"}, "relu2": {"mlp": "relu2"}, "dropout": {"dropout": 0.1},
}  # fmt: skip
TOKENS = 2048


def batch_of(cfg):
    ids = torch.zeros(TOKENS // cfg.block_size, cfg.block_size, dtype=torch.long)
    if cfg.objective == "clm":
        return ids, ids
    positions = torch.arange(n_masked(cfg.block_size, 0.15)).repeat(len(ids), 1)
    return ids, positions, positions


def saved_bytes(cfg, precision, checkpointing, compiled=False):
    """Bytes that autograd saves in a forward, without weights and their casts, by torch's own hooks.

    The hooks do not see what selective checkpointing saves: there it is everything that the forward leaves allocated.
    """
    model = Transformer(cfg)
    model.init_weights(1)
    if checkpointing != "none":
        recompute_blocks(model, checkpointing)
    if compiled:
        compile_model(model, cfg.n_layer, World(0, 1, torch.device("cpu"), precision))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(*batch_of(cfg)).backward()
    weights, sizes, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}

    def keep(tensor):
        is_copy = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if tensor.untyped_storage().data_ptr() not in weights and not is_copy:
            kept.append(tensor)  # so that no other tensor takes its address
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(*batch_of(cfg))

    if checkpointing == "none":
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward()
        return sum(sizes.values())
    gc.collect()  # or memory of earlier tests is freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def saved_bytes_of_a_block(cfg, *how):
    two, one = (saved_bytes(replace(cfg, n_layer=n), *how) for n in (2, 1))
    return (two - one) / TOKENS


OF_FORWARD = [("none", shape) for shape in SHAPES]
CHECKPOINTED = [("selective", "gpt"), ("selective", "modern"), ("selective", "dropout"), ("full", "modern")]


SLOW = [("fp32", "selective", "gpt"), ("fp32", "selective", "modern"), ("bf16", "selective", "modern"), ("bf16", "selective", "dropout"),
        ("fp32", "selective", "dropout"), ("bf16", "full", "modern"), ("fp32", "none", "dropout")]  # fmt: skip


@pytest.mark.parametrize(("precision", "checkpointing", "shape"), [
    pytest.param(*case, marks=[pytest.mark.slow] * (case in SLOW))
    for case in ((precision, *kind) for precision in ("bf16", "fp32") for kind in OF_FORWARD + CHECKPOINTED)
])  # fmt: skip
def test_activation_bytes_of_a_block_are_what_autograd_saves(shape, precision, checkpointing):
    """For the second block, at 256 tokens and at 1,024, where CPUs in bf16 use torch's attention kernel, too."""
    for seq_len in (256, 1024):
        cfg = ModelConfig(**BASE, block_size=seq_len, **SHAPES[shape])
        setup = cost.Setup(seq_len, TOKENS // seq_len, precision=precision, on_cpu=True)
        counted = memory.block_activation_bytes(cfg, setup, checkpointing)
        assert counted == pytest.approx(saved_bytes_of_a_block(cfg, precision, checkpointing), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, MODERN], ids=["gpt", "modern"])
def test_activation_bytes_of_a_compiled_block_are_what_autograd_saves(shape):
    cfg = ModelConfig(**BASE, block_size=1024, **shape)
    counted = memory.block_activation_bytes(cfg, cost.Setup(1024, TOKENS // 1024, on_cpu=True, compiled=True))
    assert counted == pytest.approx(saved_bytes_of_a_block(cfg, "bf16", "none", True), rel=0.02)


def peak_bytes(cfg):
    """(profiler of two steps from an empty start, Setup)."""
    gc.collect()
    with init_world(cfg.world, cfg.parallel) as world, profile(profile_memory=True) as profiler:
        micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, 1)
        setup = cost.setup_of(cfg, (1, 1, 1), micro_steps, world.precision, "cpu")
        batches = bench.random_batches(cfg, micro_steps, world)
        model, optimizer, scaler = train.build(cfg, world, 1)
        for _ in range(2):
            with record_function("a step"):
                train.train_step(model, optimizer, scaler, next(batches), cfg, world)
    return profiler, setup


SMALL = ["--vocab_size=5000", "--n_layer=3", "--n_head=4", "--n_embd=128", "--n_inner=512", "--seq_len=128",
         "--block_size=128", "--micro_batch_size=8", "--batch_tokens=1024", "--device=cpu"]  # fmt: skip
RUNS = {
    "gpt": [], "float32": ["--precision=fp32"], "2 micro-steps": ["--batch_tokens=2048"],
    "full": ["--activation_checkpointing=full"], "selective": ["--activation_checkpointing=selective"],
    "modern": ["--norm=rmsnorm", "--mlp=swiglu", "--position=rope", "--n_kv_head=2", "--qk_norm", "--bias=false"],
    "masked": ["--objective=mlm", "--norm_position=post", "--dropout=0.1"], "untied": ["--tie_embeddings=false"],
    "muon": ["--optimizer=muon"], "sgd": ["--optimizer=sgd"], "adafactor": ["--optimizer=adafactor"],
    "documents": ["--document_mask=true", "--window=40", "--global_every=2", "--precision=fp32"],
    "few tokens": ["--micro_batch_size=1", "--batch_tokens=128"],
}  # fmt: skip


OFTEN = ("2 micro-steps", "full", "modern", "masked", "documents")


@pytest.mark.parametrize("run", [pytest.param(r, marks=[] if r in OFTEN else pytest.mark.slow) for r in RUNS])
def test_peak_memory_of_a_step_is_what_torch_allocates(run, tmp_path):
    cfg = config.load(bench.Settings, [*SMALL, "--precision=bf16", *RUNS[run]])
    profiler, setup = peak_bytes(cfg)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    start = min(e["args"]["Total Allocated"] - e["args"]["Bytes"] for e in events if e.get("name") == "[memory]")
    step = max((e for e in events if e.get("name") == "a step" and e.get("dur")), key=lambda e: e["ts"])
    during = [e for e in events if e.get("name") == "[memory]" and 0 <= e["ts"] - step["ts"] <= step["dur"]]
    measured = max(e["args"]["Total Allocated"] for e in during) - start
    assert sum(memory.memory(cfg.model, setup).values()) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("optimizer", "numbers"), [("adamw", 4), ("muon", 4), ("sgd", 3), ("adafactor", 2)])
def test_bytes_per_rank_are_weights_gradients_and_the_optimizers_state(optimizer, numbers):
    """numbers: per parameter; Muon keeps one less for blocks' matrices."""
    model = Transformer(ModelConfig(vocab_size=64, block_size=11, n_layer=3, n_head=5, n_embd=20))
    optim = build_optimizer(model, OptimConfig(optimizer=optimizer))
    n = cost.num_params(model.cfg)
    of_matrices = 3 * 12 * 20 * 20 if optimizer == "muon" else 0
    assert memory.params_and_bytes(optim) == (n, 4 * (numbers * n - of_matrices))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optim.step()
    kept = [x for state in optim.state.values() for x in state.values() if x.dim()]
    if optimizer != "adafactor":
        assert sum(x.numel() for x in kept) == (numbers - 2) * n - of_matrices


def remedies(monkeypatch, gib, **changes):
    monkeypatch.setattr(memory, "memory_bytes", lambda device: gib * 2**30)
    names = ["config/gpt2_124m.py", "--micro_batch_size=8", "--precision=bf16", "--seq_len=1024"]
    cfg = config.load(train.Settings, names + [f"--{name}={value}" for name, value in changes.items()])
    return memory.remedies(cfg, World(0, 1, torch.device("cpu"), "bf16"))


def test_remedies_are_the_mildest_of_each_kind_that_fit(monkeypatch):
    """Measured: 5.35, 4.23, 2.82 GiB."""
    text = remedies(monkeypatch, 4.7)
    assert re.findall(r"--\S+", text) == ["--micro_batch_size=4", "--activation_checkpointing=selective"]
    needed, *fitting = (float(figure) for figure in re.findall(r"about ([\d.]+) GiB", text))
    assert needed == pytest.approx(5.35, rel=0.1) and fitting[1] == pytest.approx(4.23, rel=0.1) and max(fitting) <= 4.7
    flags = re.findall(r"--\S+", remedies(monkeypatch, 3.5))
    assert flags == ["--micro_batch_size=2", "--activation_checkpointing=full"]


def test_where_nothing_would_fit_the_remedies_say_so(monkeypatch):
    text = remedies(monkeypatch, 1.0)
    assert "even --micro_batch_size=1 --activation_checkpointing=full (about" in text and "a smaller model" in text
    text = remedies(monkeypatch, 1.0, micro_batch_size=1, activation_checkpointing="full")
    assert "even" not in text and text.endswith("take a smaller model, or more devices")
