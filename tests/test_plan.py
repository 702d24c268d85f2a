"""Closed forms against counts: of parameters in the model, of FLOPs by torch's counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import plan
from model import ModelConfig, Transformer

ODD = [
    {},
    {"bias": False},
    {"tie_embeddings": False},
    {"n_inner": 33, "bias": False, "tie_embeddings": False},
]
GPT2 = {  # layers, heads, width: parameters, as Hugging Face's checkpoints count them
    (12, 12, 768): 124_439_808,
    (24, 16, 1024): 354_823_168,
    (36, 20, 1280): 774_030_080,
    (48, 25, 1600): 1_557_611_200,
}


@pytest.mark.parametrize("changes", ODD)
def test_closed_form_of_parameters_is_the_models_count(changes):
    cfg = ModelConfig(vocab_size=37, block_size=11, n_layer=3, n_head=5, n_embd=20, **changes)
    assert plan.num_params(cfg) == Transformer(cfg).num_params()


@pytest.mark.parametrize("shape, count", GPT2.items())
def test_closed_form_of_parameters_is_gpt2s(shape, count):
    layers, heads, width = shape
    assert plan.num_params(ModelConfig(n_layer=layers, n_head=heads, n_embd=width)) == count


@pytest.mark.parametrize("changes", ODD)
def test_flops_are_what_torch_counts_in_forward_and_backward(changes):
    """Exactly: the vocabulary needs no padding, and attention's math kernel does both its matmuls whole."""
    cfg = ModelConfig(vocab_size=64, block_size=11, n_layer=3, n_head=5, n_embd=20, **changes)
    model, ids = Transformer(cfg), torch.zeros(3, 7, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, targets=ids).backward()
    assert counter.get_total_flops() == plan.flops_per_token(cfg, seq_len=7) * ids.numel()


def test_causal_count_halves_attention_alone():
    cfg = ModelConfig()
    without_attention = plan.flops_per_token(cfg, seq_len=0)
    full, causal = (plan.flops_per_token(cfg, 1024, causal=causal) - without_attention for causal in (False, True))
    assert full == 2 * causal == 12 * 12 * 768 * 1024  # PaLM's 12 L H Q T


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
