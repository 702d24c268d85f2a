"""A plan of generation counts the bytes of real models and caches, and its times follow from bytes and FLOPs."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import config
import plan
from cache import Cache
from model import ModelConfig
from ops import Linear
from perf import hardware
from perf.generation import BATCHES, LOGITS_BYTES, cache_bytes, generation, token_seconds, weight_bytes

SMALL = ModelConfig(vocab_size=99, block_size=40, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=96)
SHAPES = [SMALL, replace(SMALL, tie_embeddings=False, mlp="swiglu", norm="rmsnorm"), replace(SMALL, position="rope")]
H100 = hardware.DEVICES["h100-sxm"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def n_bytes(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("cfg", SHAPES)
@pytest.mark.parametrize("precision", DTYPES)
def test_bytes_are_those_of_a_real_model_and_cache(cfg, precision):
    model = cfg.build().to(DTYPES[precision])
    held, read = weight_bytes(cfg, precision)
    assert held == n_bytes(*model.parameters())
    looked_up = [model.wpe.weight] if cfg.position == "learned" else []
    looked_up += [] if cfg.tie_embeddings else [model.wte.weight]
    assert read == held - n_bytes(*looked_up)
    cache = Cache(cfg, 5, "cpu", DTYPES[precision], n_tokens=24)
    keys_and_values = [part for layer in cache.layers for part in (layer.k, layer.v)]
    assert 5 * cache_bytes(cfg, 24, precision) == n_bytes(*keys_and_values)


def test_quantized_bytes_are_those_of_torchao():
    ao = pytest.importorskip("torchao.quantization")
    four = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))
    for precision, kind in (("int8", ao.Int8WeightOnlyConfig()), ("int4", four)):
        model = SMALL.build().bfloat16()
        ao.quantize_(model.blocks, kind, filter_fn=lambda module, name: isinstance(module, Linear))
        quantized = [p for p in model.parameters() if hasattr(p, "qdata")]
        assert len(quantized) == 6 * SMALL.n_layer
        plain = n_bytes(*(p for p in model.parameters() if not hasattr(p, "qdata")))
        parts = [getattr(p, name) for p in quantized for name in p.__tensor_flatten__()[0]]
        if precision == "int4":  # torchao holds a byte for each number, which has 4 bits
            plain -= n_bytes(*(p.qdata for p in quantized)) // 2
        assert weight_bytes(SMALL, precision)[0] == plain + n_bytes(*parts), precision


def test_times_follow_from_bytes_and_flops():
    cfg = config.load(plan.Settings, ["config/gpt2_124m.py"]).model
    cfg = replace(cfg, vocab_size=50257)
    parts = token_seconds(cfg, H100, "bf16", 1024, 1)
    held = 2 * (124_439_808 + (cfg.padded_vocab_size - 50257) * 768)
    assert parts["memory"] == pytest.approx((held - 2 * 1024 * 768 + 2 * 2 * 12 * 768 * 1024) / 3350e9)
    model = replace(SMALL, n_kv_head=None).build()
    by_matmuls = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's own kernel
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), by_matmuls:
        cache = Cache(model.cfg, 2, "cpu", torch.float32)
        model(torch.zeros(2, 39, dtype=torch.long), cache=cache)
        before = counter.get_total_flops()
        model(torch.zeros(2, 1, dtype=torch.long), cache=cache)
    counted = counter.get_total_flops() - before
    flops = token_seconds(model.cfg, H100, "bf16", 40, 2)["matmuls"] * H100.tflops * 1e12
    padding = 2 * 2 * 32 * (model.cfg.padded_vocab_size - 99)
    assert flops == pytest.approx(counted - padding)


def test_the_largest_batch_is_the_last_that_fits():
    available = 7.7e6
    for precision, figures in generation(SMALL, H100, 40, available).items():
        last = figures["batches"][-1]
        assert last["batch"] == figures["largest_batch"] > max(BATCHES)
        assert last["total_bytes"] <= available
        assert last["total_bytes"] + figures["cache_bytes"] + 99 * LOGITS_BYTES > available, precision


@pytest.fixture
def run(capsys):
    def run(*args):
        plan.main(config.load(plan.Settings, ["config/gpt2_124m.py", "--generate", *args]))
        return capsys.readouterr().out

    return run


def test_the_first_line_is_the_answer(run):
    lines = run("--gpu=rtx4090", "--json").splitlines()
    assert lines[0].startswith("answer     fits on rtx4090 in bf16 (weights 0.232, cache 0.0352 GiB a sequence")
    figures = json.loads(lines[-1])["precisions"]
    assert list(figures) == ["fp32", "bf16", "int8", "int4"]
    weights = [figures[name]["weight_bytes"] for name in figures]
    assert weights == sorted(weights, reverse=True)
    assert "does not fit on t4 in fp32" in run("--gpu=t4", "--gpu_memory_gib=1.2", "--precision=fp32").splitlines()[0]


@pytest.mark.parametrize(("args", "message"), [
    (["config/bert_base.py"], "generate is on, but a model of objective mlm writes no text; leave generate out"),
    (["--n_gpus=4"], "n_gpus is 4, but generate plans one GPU that samples; leave it out"),
    (["--compare"], "compare is on, but generate plans one GPU that samples; leave it out"),
])  # fmt: skip
def test_wrong_input_is_one_line(args, message, run):
    with pytest.raises(config.UserError, match=message):
        run(*args)
