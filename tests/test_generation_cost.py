"""What generation costs: bytes as real models and caches have them, and times that follow from them."""

import json
from dataclasses import replace

import pytest
import torch
from test_convert import GPT2, LLAMA

import config
import plan
from cache import Cache
from config import UserError
from model import ModelConfig
from perf import hardware
from perf.generation import cache_bytes, generation, token_parts, weight_bytes

CFG = ModelConfig(vocab_size=70, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, mlp="swiglu")
MODELS = {"gpt2": GPT2, "llama": LLAMA, "untied": replace(CFG, tie_embeddings=False)}
H100 = hardware.DEVICES["h100-sxm"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_and_cache_have_the_bytes_of_real_ones(name, precision):
    cfg, dtype = MODELS[name], {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = cfg.build().to(dtype)
    held, read = weight_bytes(cfg, precision)
    assert held == sum(p.nbytes for p in model.parameters())
    tables = [table for table in (model.wpe, model.wtt) if table is not None]
    tables += [] if cfg.tie_embeddings else [model.wte]
    assert read == held - sum(table.weight.nbytes for table in tables)
    cache = Cache(cfg, 3, "cpu", dtype, cfg.block_size + -cfg.block_size % 64)
    assert 3 * cache_bytes(cfg, cfg.block_size, precision) == sum(x.k.nbytes + x.v.nbytes for x in cache.layers)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_have_the_bytes_of_what_torchao_makes(kind):
    pytest.importorskip("torchao", reason="pip install torchao")
    from interop.quantized import quantize, stored

    model = CFG.build()
    quantize(model, kind)
    assert weight_bytes(CFG, kind)[0] == sum(x.nbytes for x in stored(model.to(torch.bfloat16), kind).values())


def test_a_token_takes_the_time_of_its_bytes_or_of_its_flops():
    cfg = config.load(plan.Settings, ["config/gpt2_1558m.py", "--vocab_size=50257"]).model
    one, many = (token_parts(cfg, H100, "bf16", 1024, batch) for batch in (1, 64))
    # 1.5576 B parameters less the positions' table, 2 bytes each; 48 layers of 2 x 1,600 numbers per token
    assert one["memory"] == pytest.approx(2 * (1_557_611_200 + 47 * 1600 - 1024 * 1600 + 48 * 3200 * 1024) / 3350e9)
    weights = 48 * 12 * 1600**2 + 50304 * 1600
    assert many["matmuls"] == pytest.approx(64 * (2 * weights + 48 * 4 * 1600 * 1024) / 989e12)
    assert many["matmuls"] == pytest.approx(64 * one["matmuls"])


def test_more_sequences_and_fewer_bits_are_never_slower_and_what_fits_is_the_most():
    cfg = config.load(plan.Settings, ["config/gpt2_1558m.py", "--vocab_size=50257"]).model
    rows = generation(cfg, H100, 1024, 20 * 2**30)
    for precision in ("fp32", "bf16", "int8", "int4"):
        speeds = [row["tokens_per_s"] for row in rows if row["precision"] == precision]
        assert speeds == sorted(speeds) and len(speeds) == 3
    alone = [row["tokens_per_s"] for row in rows if row["batch"] == 1]
    assert alone == sorted(alone)
    for row in rows:
        need = row["weights_gib"] + row["cache_gib"] + 4 * 50304 * row["batch"] / 2**30
        assert row["fits"] == (need <= 20) and row["batch"] <= max(16, row["largest_batch"])


def planned(capsys, *args):
    plan.main(config.load(plan.Settings, [*args, "--generate"]))
    return capsys.readouterr().out


def test_command_answers_first_and_prints_a_row_for_each_precision_and_batch(capsys):
    out = planned(capsys, "config/gpt2_1558m.py", "--gpu=rtx4090", "--vocab_size=50257", "--json")
    lines = out.splitlines()
    assert lines[0].startswith("answer     fits on rtx4090 in bf16: at most ")
    figures = json.loads(lines[-1])
    assert len(figures["generation"]) == 12 and figures["context"] == 1024
    few = planned(capsys, "config/gpt2_1558m.py", "--gpu=t4", "--vocab_size=50257", "--n_layer=400")
    assert few.startswith("answer     does not fit on t4 in fp16; fits in int4\n")


@pytest.mark.parametrize(("args", "line"), [
    (["config/bert_base.py", "--vocab_size=30522"], "generate is on, but a model trained by mlm writes no text"),
    (["--n_gpus=2"], "n_gpus is 2, but generate plans for one GPU; leave it out"),
    (["--compare"], "compare is on, but generate plans for one GPU; leave it out"),
    (["--gpu=v100", "--precision=bf16"], "precision is bf16, which v100 does not plan; take auto or fp32"),
])  # fmt: skip
def test_wrong_input_is_told_in_a_line(args, line, capsys):
    with pytest.raises(UserError) as error:
        planned(capsys, *args)
    assert line in str(error.value) and "\n" not in str(error.value)
