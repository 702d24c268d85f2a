"""Models in 8 and 4 bits: what torchao computes of the same weights, and a run that is read but not trained."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
import config
import convert
import evaluate
import finetune
import sample
import train
from config import UserError
from interop.pretrained import RunModel, load_model
from interop.quantized import GROUP, KINDS, packed, quantize, stored, stored_shapes, unpacked
from model import ModelConfig
from ops import Linear
from ranks import run, settings, write_data
from test_compress import random_model
from test_convert import BERT, LLAMA

pytest.importorskip("torchao", reason="pip install torchao")
CFG = ModelConfig(vocab_size=261, block_size=12, n_layer=2, n_head=2, n_embd=32, n_inner=96, mlp="swiglu")

SIZE = {"vocab_size": 261, "block_size": 12, "seq_len": 12, "batch_tokens": 72, "n_embd": 32, "n_head": 2}


def by_hand(layer, x, kind):
    """A quantized layer's output from its integers and scales alone."""
    weight = layer.weight
    group = GROUP if kind == "int4" else layer.in_features
    numbers = weight.qdata.float().unflatten(1, (-1, group))
    floats = ((numbers - weight.zero_point[..., None]) * weight.scale[..., None]).flatten(1)
    if kind == "int8_dynamic":
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        x = (x / scale).round().clamp(-128, 127) * scale
    return F.linear(x, floats, layer.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_torchao_does_and_what_their_integers_and_scales_say(kind):
    from torchao import quantization as ao

    model, x = random_model(CFG), torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(2))
    plain = [nn.Linear(96, 32) for _ in model.blocks]
    for mine, layer in zip(plain, model.blocks):
        mine.load_state_dict(layer.mlp.down.state_dict())
    whole = [F.linear(x, mine.weight, mine.bias).detach() for mine in plain]
    theirs = {
        "int8": ao.Int8WeightOnlyConfig(), "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
        "int4": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP)),
    }  # fmt: skip
    quantize(model, kind)
    for mine, block, before in zip(plain, model.blocks, whole):
        ao.quantize_(mine, theirs[kind])
        with torch.inference_mode():
            y = block.mlp.down(x)
            assert torch.equal(y, mine(x))
            torch.testing.assert_close(y, by_hand(block.mlp.down, x, kind), rtol=1e-3, atol=2e-2)
        error = ((y - before).norm() / before.norm()).item()
        assert 1e-4 < error < (0.2 if kind == "int4" else 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_norms_and_head_stay(kind):
    model, before = random_model(CFG), dict(random_model(CFG).named_parameters())
    quantize(model, kind)
    matrices = {f"blocks.{name}.weight" for name, m in model.blocks.named_modules() if isinstance(m, Linear)}
    for name, param in model.named_parameters():
        assert type(param) is not nn.Parameter if name in matrices else torch.equal(param, before[name])
    assert len(matrices) == 14 and model.num_params() == random_model(CFG).num_params()


def test_numbers_of_four_bits_are_packed_two_in_a_byte():
    numbers = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    assert packed(numbers).shape == (3, 16) and packed(numbers).dtype == torch.uint8
    assert torch.equal(unpacked(packed(numbers)), numbers.short())
    assert packed(torch.tensor([[-1, 7]])).tolist() == [[0x7F]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of data and of a run on them."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder / "data", vocab_size=261)
    run(data, folder / "run", max_steps=9, save_interval=9, **SIZE)
    return data, folder / "run"


def compressed(trained, out_dir, **changes):
    names = {"out_dir": trained[1], "to_run": out_dir, "device": "cpu", "precision": "fp32", "eval_tokens": 500}
    compress.main(config.load(compress.Settings, [f"--{name}={value}" for name, value in (names | changes).items()]))
    return out_dir


def told(script, *argv):
    with pytest.raises(UserError) as error:
        script.main(config.load(script.Settings, [str(arg) for arg in argv]))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_model_is_the_same_to_the_bit_and_serves(kind, trained, tmp_path, capsys):
    compressed(trained, tmp_path / "small", quantize=kind)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{kind} ")).split()
    mine, source = load_model(str(tmp_path / "small"), torch.device("cpu"))
    other = load_model(str(trained[1]), torch.device("cpu"))[0]
    quantize(other, kind)
    for (name, a), b in zip(stored(mine, kind).items(), stored(other, kind).values()):
        assert torch.equal(a, b), name
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(mine(ids), other(ids))
    sizes = {name: tensor.nbytes for name, tensor in stored(mine, kind).items()}
    shapes = stored_shapes(source.cfg, kind)
    assert int(row[2].replace(",", "")) == sum(sizes.values()) and {n: math.prod(s) for n, s in shapes.items()} == {
        n: t.numel() for n, t in stored(mine, kind).items()
    }
    argv = [f"--out_dir={tmp_path}/small", "--device=cpu"]
    for precision in ("fp32", "bf16"):
        sample.main(config.load(sample.Settings, [*argv, f"--precision={precision}", "--prompt=a", "--max_new_tokens=5"]))
    assert "5 tokens in" in capsys.readouterr().err
    evaluate.main(config.load(evaluate.Settings, [*argv, "--text=hello"]))
    assert "hello" in capsys.readouterr().out


def test_a_quantized_run_is_neither_trained_nor_exported_nor_quantized_again(trained, tmp_path):
    data, small = trained[0], compressed(trained, tmp_path / "small", quantize="int8")
    rule = "is quantized to int8, for sample.py and evaluate.py alone; take the run that compress.py made it from"
    with pytest.raises(UserError, match=rule):
        train.main(settings(data, tmp_path / "new", init_from=small, **SIZE))
    with pytest.raises(UserError, match=rule):
        train.main(settings(data, small, **SIZE))
    assert rule in told(convert, f"--out_dir={small}", f"--to_hf={tmp_path}/hf")
    assert rule in told(convert, f"--out_dir={small}", f"--to_gguf={tmp_path}/x.gguf")
    for change in ({"quantize": "int4"}, {"prune": "heads"}):
        with pytest.raises(UserError, match=rule):
            compressed((data, small), tmp_path / "again", **change)
    (tmp_path / "x.tsv").write_text("a\t1\nb\t0\n")
    files = [f"--{name}={tmp_path}/x.tsv" for name in ("train_file", "eval_file")]
    assert rule in told(finetune, f"--init_from={small}", *files, "--tsv_columns=text,label", f"--out_dir={tmp_path}/ft")


def test_damaged_quantized_run_is_refused(trained, tmp_path):
    small = compressed(trained, tmp_path / "small", quantize="int8")
    file = next((small / "ckpt/step_00000000").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        RunModel(small)


@pytest.mark.parametrize(("cfg", "kind", "line"), [
    (LLAMA, "int4", "rows of .* weights; quantize=int4 needs a multiple of 32; take int8"),
    (CFG, "int3", "a model is quantized to 'int3'; known kinds are int8, int8_dynamic, int4"),
])  # fmt: skip
def test_model_that_torchao_cannot_quantize_is_refused(cfg, kind, line):
    with pytest.raises(UserError, match=line):
        quantize(random_model(cfg), kind)


def test_without_torchao_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="quantized models need torchao 0.18 or newer .*; pip install torchao"):
        quantize(random_model(CFG), "int8")


def test_masked_models_are_quantized():
    model = random_model(BERT)
    quantize(model, "int8")
    with torch.inference_mode():
        assert model(torch.arange(9)[None]).isfinite().all()


@pytest.mark.parametrize(("change", "line"), [
    ({}, "prune and quantize are none; give one of them"),
    ({"prune": "heads", "quantize": "int8"}, "prune and quantize are heads and int8; give one of them"),
    ({"quantize": "int8", "to_run": "none"}, "to_run is none; name the folder of the run to write"),
    ({"quantize": "int5"}, "quantize"),
])  # fmt: skip
def test_wrong_input_is_told_in_a_line(change, line, trained, tmp_path):
    with pytest.raises(UserError) as error:
        compressed(trained, change.pop("to_run", tmp_path / "small"), **change)
    assert line in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "small").exists()
