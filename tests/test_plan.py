"""Closed forms against counts: of parameters in the model, of FLOPs by torch's counter."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import config
import plan
import train
from model import ModelConfig, Transformer
from objective import ObjectiveConfig, head_share
from optim import OptimConfig, build_optimizer
from parallel import World, recompute_blocks

ODD = [
    {},
    {"bias": False},
    {"tie_embeddings": False},
    {"n_inner": 33, "bias": False, "tie_embeddings": False},
    {"n_head": 6, "n_kv_head": 2, "head_dim": 3},  # queries 18 wide, keys and values 6, the stream 20
    {"n_kv_head": 1, "bias": False},
    {"head_dim": 7},
    {"mlp": "swiglu"},
    {"mlp": "swiglu", "n_inner": 33, "bias": False},
    {"mlp": "relu2"},
    {"qk_norm": True},
    {"qk_norm": True, "norm": "rmsnorm", "head_dim": 6},
    {"norm": "rmsnorm"},
    {"position": "rope"},
    {"n_token_types": 3},
    {"norm_position": "post"},
    {"objective": "mlm"},
    {"objective": "mlm", "bias": False, "tie_embeddings": False},
    {"objective": "mlm", "tie_embeddings": False, "norm": "rmsnorm"},
    {"objective": "mlm", "norm_position": "post", "n_token_types": 2, "mlp": "gelu", "norm_eps": 1e-12},  # BERT
    {"n_head": 6, "n_kv_head": 3, "head_dim": 4, "n_inner": 33, "mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True,
     "position": "rope", "bias": False, "objective": "mlm"},
]  # fmt: skip
GPT2 = {  # layers, heads, width: parameters, as Hugging Face's checkpoints count them
    (12, 12, 768): 124_439_808,
    (24, 16, 1024): 354_823_168,
    (36, 20, 1280): 774_030_080,
    (48, 25, 1600): 1_557_611_200,
}


def odd(changes, vocab_size=37):
    sizes = {"vocab_size": vocab_size, "block_size": 11, "n_layer": 3, "n_head": 5, "n_embd": 20}
    return ModelConfig(**sizes | changes)


@pytest.mark.parametrize("changes", ODD, ids=str)
def test_closed_form_of_parameters_is_the_models_count(changes):
    cfg = odd(changes)
    assert plan.num_params(cfg) == Transformer(cfg).num_params()


@pytest.mark.parametrize("shape, count", GPT2.items())
def test_closed_form_of_parameters_is_gpt2s(shape, count):
    layers, heads, width = shape
    assert plan.num_params(ModelConfig(n_layer=layers, n_head=heads, n_embd=width)) == count


@pytest.mark.parametrize(("preset", "count"), [("bert_base", 109_514_298), ("bert_large", 335_174_458)])
def test_closed_form_of_parameters_is_berts(preset, count):
    """As Hugging Face counts BertForMaskedLM of bert-base-uncased and bert-large-uncased."""
    assert plan.num_params(config.load(train.Settings, [f"config/{preset}.py"]).model) == count


MODERN = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "bias": False}


@pytest.mark.parametrize(("changes", "count"), [
    ({"vocab_size": 151_936, "n_layer": 28, "n_embd": 1024, "n_head": 16, "n_kv_head": 8, "head_dim": 128,
      "n_inner": 3072, "qk_norm": True}, 596_049_920),
    ({"vocab_size": 32_000, "n_layer": 22, "n_embd": 2048, "n_head": 32, "n_kv_head": 4, "n_inner": 5632,
      "tie_embeddings": False}, 1_100_048_384),
], ids=["Qwen3-0.6B", "TinyLlama-1.1B"])  # fmt: skip
def test_closed_form_of_parameters_is_that_of_published_decoders(changes, count):
    assert plan.num_params(ModelConfig(**MODERN, **changes)) == count


@pytest.mark.parametrize("changes", ODD, ids=str)
def test_flops_are_what_torch_counts_in_forward_and_backward(changes):
    """Exactly: the vocabulary needs no padding, and attention's math kernel does both its matmuls whole."""
    cfg, ids = odd(changes, vocab_size=64), torch.zeros(3, 7, dtype=torch.long)
    model = Transformer(cfg)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, targets=ids).backward()
    assert counter.get_total_flops() == plan.flops_per_token(cfg, seq_len=7) * ids.numel()


@pytest.mark.parametrize("changes", [changes for changes in ODD if "objective" in changes], ids=str)
@pytest.mark.parametrize(("seq_len", "number"), [(8, 2), (8, 1), (10, 5)])
def test_flops_of_a_masked_model_are_what_torch_counts_with_the_head_at_masked_places_alone(changes, seq_len, number):
    cfg, ids = odd(changes, vocab_size=64), torch.zeros(3, seq_len, dtype=torch.long)
    share = head_share("mlm", ObjectiveConfig(mask_prob=number / seq_len), seq_len)
    targets = positions = torch.arange(number).expand(3, number)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Transformer(cfg)(ids, targets, positions).backward()
    assert counter.get_total_flops() == plan.flops_per_token(cfg, seq_len, share) * ids.numel()


def test_causal_count_halves_attention_alone():
    cfg = ModelConfig()
    without_attention = plan.flops_per_token(cfg, seq_len=0)
    full, causal = (plan.flops_per_token(cfg, 1024, causal=causal) - without_attention for causal in (False, True))
    assert full == 2 * causal == 12 * 12 * 768 * 1024  # PaLM's 12 L H Q T


def test_causal_count_does_not_halve_the_attention_of_a_model_that_looks_to_both_sides():
    cfg = ModelConfig(objective="mlm")
    assert plan.flops_per_token(cfg, 1024, 0.15, causal=True) == plan.flops_per_token(cfg, 1024, 0.15, causal=False)


def test_causal_count_halves_attention_as_wide_as_its_queries():
    """Whose width is not the stream's, and whose keys are fewer."""
    cfg = ModelConfig(n_head=6, n_kv_head=2, head_dim=50, n_embd=99)
    saved = plan.flops_per_token(cfg, 1024) - plan.flops_per_token(cfg, 1024, causal=True)
    assert saved == 6 * 12 * 6 * 50 * 1024


def test_gpt2_124m_needs_6_flops_a_weight_and_attention():
    """nanoGPT's transformer_sizing notebook: 6 N + 12 L H Q T, N without positions; norms and biases are no matmuls."""
    cfg = ModelConfig(bias=False)
    notebook = 6 * (124_337_664 - 1024 * 768) + 12 * 12 * 768 * 1024
    norms = 6 * 25 * 768
    assert plan.flops_per_token(cfg, 1024) == notebook - norms


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA B200", 2250),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10G", 70),
    ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("Tesla V100-SXM2-16GB", 125), ("Tesla T4", 65),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090", 71), ("AMD Instinct MI300X", 1307),
])
def test_peaks_of_known_devices_are_the_data_sheets(name, tflops):
    assert plan.known_peak(name) == tflops * 1e12


@pytest.mark.parametrize("name", [
    "NVIDIA GeForce GTX 1080", "NVIDIA L40", "NVIDIA A1000", "NVIDIA T400", "NVIDIA H20", "cpu", "",
    # Relatives of known devices, with other peaks.
    "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
])
def test_unknown_devices_have_no_data_sheet(name):
    assert plan.known_peak(name) is None


def test_peak_of_an_unknown_device_is_measured_and_says_so():
    peak, name = plan.peak_flops(torch.device("cpu"), "fp32")
    assert 1e9 < peak < 1e14
    assert "measured" in name and "fp32" in name


@pytest.mark.parametrize(("optimizer", "numbers"), [("adamw", 4), ("muon", 4), ("sgd", 3), ("adafactor", 2)])
def test_what_is_held_is_weights_gradients_and_the_optimizers_state(optimizer, numbers):
    """Numbers a parameter; Muon keeps one less of blocks' matrices."""
    model = Transformer(ModelConfig(vocab_size=64, block_size=11, n_layer=3, n_head=5, n_embd=20))
    optim = build_optimizer(model, OptimConfig(optimizer=optimizer))
    n = plan.num_params(model.cfg)
    of_matrices = 3 * 12 * 20 * 20 if optimizer == "muon" else 0
    assert plan.held(optim) == (n, 4 * (numbers * n - of_matrices))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optim.step()
    kept = [x for state in optim.state.values() for x in state.values() if x.dim()]
    if optimizer != "adafactor":
        assert sum(x.numel() for x in kept) == (numbers - 2) * n - of_matrices


# ---- memory

def saved_bytes(cfg, tokens, precision, recomputed):
    """Bytes that autograd keeps of a forward, but for weights, by torch's own hooks."""
    model = Transformer(cfg)
    model.init_weights(1)
    if recomputed == "full":
        recompute_blocks(model, "full")
    weights, sizes, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor)  # so that no other takes its place
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(cfg.vocab_size, (tokens // cfg.block_size, cfg.block_size))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(ids, ids)
    return sum(sizes.values())


MODERN_SHAPE = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 2, "n_inner": 352, "qk_norm": True,
          "bias": False}  # fmt: skip


@pytest.mark.parametrize("shape", [{}, MODERN_SHAPE], ids=["gpt", "modern"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_activation_bytes_of_a_block_are_about_what_autograd_keeps(shape, precision, recomputed):
    """The third block's share. At 1,024 tokens, where attention on CPUs is torch's kernel in bf16 too, as on GPUs."""
    cfg = ModelConfig(vocab_size=37, block_size=1024, n_head=4, n_embd=128, **shape)
    counted, measured = (
        function(replace(cfg, n_layer=3), 4096, precision, recomputed)
        - function(replace(cfg, n_layer=2), 4096, precision, recomputed)
        for function in (plan.activation_bytes, saved_bytes)
    )
    assert counted == pytest.approx(measured, rel=0.15)


def remedies(monkeypatch, gib, **changes):
    monkeypatch.setattr(plan, "memory_bytes", lambda device: gib * 2**30)
    names = ["config/gpt2_124m.py", "--micro_batch_size=8", "--precision=bf16", "--seq_len=1024"]
    cfg = config.load(train.Settings, names + [f"--{name}={value}" for name, value in changes.items()])
    return plan.remedies(cfg, World(0, 1, torch.device("cpu"), "bf16"))


def test_remedies_are_the_mildest_of_each_kind_that_fit(monkeypatch):
    """The figures stand in the README as measured: 5.35, 4.23, 2.82 GiB."""
    text = remedies(monkeypatch, 4.7)
    assert re.findall(r"--\S+", text) == ["--micro_batch_size=4", "--activation_checkpointing=selective"]
    needed, *fitting = (float(figure) for figure in re.findall(r"about ([\d.]+) GiB", text))
    assert needed == pytest.approx(5.35, rel=0.1) and fitting[1] == pytest.approx(4.23, rel=0.1) and max(fitting) <= 4.7
    flags = re.findall(r"--\S+", remedies(monkeypatch, 3.2))
    assert flags == ["--micro_batch_size=2", "--activation_checkpointing=full"]


def test_where_nothing_would_fit_the_remedies_say_so(monkeypatch):
    text = remedies(monkeypatch, 1.0)
    assert "even --micro_batch_size=1 --activation_checkpointing=full (about" in text and "a smaller model" in text
    text = remedies(monkeypatch, 1.0, micro_batch_size=1, activation_checkpointing="full")
    assert "even" not in text and text.endswith("take a smaller model, or more devices")
