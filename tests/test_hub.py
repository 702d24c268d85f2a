"""Models of Hugging Face's come in as they are, or are refused in one line."""

import dataclasses
import importlib
import inspect
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import bench
import config
import plan
import train
from config import UserError
from convert import export
from data import Split
from hugging_face import KINDS, LLAMA3, T, V, logits_of, random_model, saved
from interop.families import FAMILIES, HARMLESS
from interop.hub import HubModel, read_config
from interop.pretrained import load_model, load_weights, open_model, starting_config
from interop.tokenizer import write_tokenizer
from model import ModelConfig, Transformer
from ops import rope_table
from ranks import SMALL, on_ranks, records, settings, write_data
from text.tokenizer import SPECIALS, load_tokenizer, train_bpe

IDS = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(2))
REAL = torch.arange(7) < torch.tensor([7, 4, 6])[:, None]  # (B, T): sequences of 7, 4 and 6 tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: (model of transformers, its folder)}, each made when it is first asked for."""

    class Folders(dict):
        def __missing__(self, kind):
            self[kind] = saved(kind, tmp_path_factory.mktemp("theirs"))
            return self[kind]

    return Folders()


@pytest.fixture
def copy(folders, tmp_path):
    """A function that copies the folder of a kind, to be damaged, and changes its config.json."""

    def make(kind="gpt2", **changes):
        folder = tmp_path / "copy"
        shutil.copytree(folders[kind][1], folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return make


def ours(folder):
    return load_model(str(folder), "cpu")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers_has_its_logits_here(kind, folders):
    theirs, folder = folders[kind]
    model, expected = ours(folder), logits_of(theirs, IDS)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.3
    assert model.cfg.objective == ("mlm" if "bert" in kind else "clm")


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "qwen3"])
def test_a_padded_batch_has_transformers_logits_where_tokens_are_real(kind, folders):
    theirs, folder = folders[kind]
    types = torch.randint(2, IDS.shape, generator=torch.Generator().manual_seed(3)) if kind == "bert" else None
    more = {} if types is None else {"token_type_ids": types}
    expected = logits_of(theirs, IDS, attention_mask=REAL.long(), **more)
    with torch.no_grad():
        logits = ours(folder)(IDS, attention_mask=REAL, token_types=types)
    torch.testing.assert_close(logits[REAL], expected[REAL], rtol=0, atol=1e-4)


def test_rope_of_llama_31_is_transformers_at_every_wavelength(folders):
    """The scale matters here: without it logits differ by a thousand times the tolerance."""
    theirs, folder = folders["llama 3.1"]
    model = ours(folder)
    assert (model.cfg.rope_scale, model.cfg.rope_context) == (8.0, 16)
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), logits_of(theirs, ids), rtol=0, atol=1e-4)
        model.cfg = dataclasses.replace(model.cfg, rope_scale=1.0)
        assert (model(ids) - logits_of(theirs, ids)).abs().max() > 0.1


# ---- files as they are found

def same_weights(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_old_files_of_gpt2_without_prefix_and_with_masks_are_read(copy, folders):
    folder = copy("gpt2")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    for i in range(3):
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, T, T).tril(), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()  # tied, and there all the same
    save_file(tensors, folder / "model.safetensors")
    assert same_weights(ours(folder), ours(folders["gpt2"][1]))


def test_old_files_of_bert_with_tensorflows_names_and_a_next_sentence_head_are_read(copy, folders):
    folder = copy("bert whole")
    tensors = load_file(folder / "model.safetensors")
    tensors = {re.sub("LayerNorm.weight", "LayerNorm.gamma", name): t for name, t in tensors.items()}
    tensors = {re.sub("LayerNorm.bias", "LayerNorm.beta", name): t for name, t in tensors.items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(T)[None]
    save_file(tensors, folder / "model.safetensors")
    assert same_weights(ours(folder), ours(folders["bert whole"][1]))
    assert open_model(str(folder)).extra.keys() == {
        f"{module}.{kind}" for module in ("bert.pooler.dense", "cls.seq_relationship") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_old_pickles_of_plain_weights_are_read(zipped, copy, folders):
    folder = copy("gpt2")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert same_weights(ours(folder), ours(folders["gpt2"][1]))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_several_files_are_read(suffix, copy, folders):
    folder = copy("llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, weight_map = "model" if suffix == "safetensors" else "pytorch_model", {}
    for i in range(3):
        part = {name: tensors[name] for name in sorted(tensors)[i::3]}
        file = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_weights(ours(folder), ours(folders["llama"][1]))


def test_weights_in_bf16_come_in_unchanged(tmp_path):
    theirs = random_model("qwen3").bfloat16()
    theirs.save_pretrained(tmp_path)
    model = ours(tmp_path)
    assert model.wte.weight.dtype == torch.float32
    assert torch.equal(model.blocks[1].mlp.up.weight, theirs.model.layers[1].mlp.up_proj.weight.float())
    assert open_model(str(tmp_path)).dtype == "bfloat16"


def test_settings_of_rope_as_transformers_below_5_wrote_them_are_read(copy):
    folder = copy("llama 3.1", rope_theta=500.0, rope_scaling=LLAMA3 | {"type": "llama3"}, rope_parameters=None)
    cfg = HubModel(folder).cfg
    assert (cfg.rope_theta, cfg.rope_scale, cfg.rope_context) == (500.0, 8.0, 16)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_what_a_config_leaves_out_is_as_transformers_has_it(kind, copy):
    import transformers

    folder = copy(kind)
    path = folder / "config.json"
    cut = json.loads(path.read_text())
    cut = {key: value for key, value in cut.items() if key not in ("activation_function", "hidden_act")}
    path.write_text(json.dumps(cut))
    theirs = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    with torch.no_grad():
        expected = logits_of(theirs.from_pretrained(folder), IDS)
        torch.testing.assert_close(ours(folder)(IDS), expected, rtol=0, atol=1e-4)


# ---- another context

def starting(folder, *arguments, **wanted):
    return starting_config(str(folder), ModelConfig(**wanted), {*arguments, *wanted})


def test_a_shorter_context_takes_the_first_positions(folders):
    theirs, folder = folders["gpt2"]
    cfg = starting(folder, block_size=9)
    model = Transformer(cfg)
    load_weights(open_model(str(folder)), model)
    assert model.wpe.weight.shape == (9, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), logits_of(theirs, IDS), rtol=0, atol=1e-4)


def test_a_longer_context_is_refused_for_learned_positions_and_taken_by_rope(folders):
    with pytest.raises(UserError, match=f"block_size is 24, but .* holds at most {T} tokens; lower it"):
        starting(folders["gpt2"][1], block_size=T + 1)
    assert starting(folders["llama"][1], block_size=99).block_size == 99


def test_qwen3s_sliding_window_bounds_the_context(copy):
    changes = {"sliding_window": 9, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2}
    folder = copy("qwen3", **changes)
    assert starting(folder).block_size == 9
    with pytest.raises(UserError, match="block_size is 10, but .* holds at most 9 tokens"):
        starting(folder, block_size=10)


def test_mistrals_sliding_window_is_ours_and_bounds_no_context(copy):
    cfg = starting(copy("mistral", sliding_window=9), block_size=99)
    assert (cfg.window, cfg.global_every, cfg.block_size) == (9, None, 99)


def without(folder, *keys):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))
    return folder


@pytest.mark.parametrize("changes, window", [
    ({}, 4096), ({"use_sliding_window": False, "sliding_window": 9}, 9), ({"sliding_window": None}, None),
])  # fmt: skip
def test_mistral_has_a_sliding_window_unless_it_says_none(changes, window, copy):
    folder = without(copy("mistral", **changes), *([] if changes else ["sliding_window"]))
    _, cfg, longest = read_config(folder)
    assert (cfg.window, longest) == (window, None)


@pytest.mark.parametrize("changes, longest", [
    ({"sliding_window": 9}, None), ({"sliding_window": 9, "use_sliding_window": True}, None),
    ({"sliding_window": 9, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2}, 9),
])  # fmt: skip
def test_qwen3_has_a_sliding_window_where_it_uses_it_in_some_layer(changes, longest, copy):
    assert read_config(copy("qwen3", **changes))[2] == longest


CLASSES_OF = {"gpt2": "GPT2", "bert": "Bert", "llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}


@pytest.mark.parametrize("kind, name", CLASSES_OF.items())
def test_what_a_config_leaves_out_is_as_in_transformers(kind, name):
    import transformers

    theirs = getattr(transformers, f"{name}Config")()
    told = {key: value for key, value in FAMILIES[kind].defaults.items() if value is not None}
    assert told == {key: getattr(theirs, key) for key in told}
    left_open = FAMILIES[kind].defaults.keys() - told
    assert left_open <= {"n_inner", "head_dim", "num_key_value_heads"}, "which follow from others"


@pytest.mark.parametrize("window", [1, 2, 7, T - 1, T, None])
def test_beyond_its_sliding_window_a_mistral_is_transformers(window, tmp_path):
    theirs, folder = saved("mistral", tmp_path, sliding_window=window)
    ids = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours(folder)(ids), logits_of(theirs, ids), rtol=0, atol=1e-4)


def test_what_the_user_has_set_must_be_as_it_is_there(folders):
    folder = folders["gpt2"][1]
    with pytest.raises(UserError, match="another model: n_embd 20 there, 60 here, n_layer 3 there, 2 here; leave"):
        starting(folder, n_layer=2, n_embd=60)
    cfg = starting(folder, n_layer=3, dropout=0.1, n_inner=80, vocab_size=None)
    assert (cfg.dropout, cfg.n_layer, cfg.vocab_size) == (0.1, 3, V)


# ---- bad input: each one clear line

def tampered(folder, change):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


def edited(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def without_waiting(path):
    """A pipe in a file's place, on which a plain open waits for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


BAD = {
    "a pipe for a config": (lambda f: without_waiting(f / "config.json"), "config.json .*it is no regular file"),
    "a pipe for weights": (lambda f: without_waiting(f / "model.safetensors"), "safetensors holds no .*no regular file"),
    "a pipe for an index": (lambda f: [(f / "model.safetensors").unlink(),
                                       without_waiting(f / "model.safetensors.index.json")], "no regular file"),
    "an index to a pipe": (lambda f: [
        (f / "model.safetensors").unlink(), without_waiting(f / "a.safetensors"),
        (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')], "no regular file"),
    "a config of a GB": (lambda f: os.truncate(f / "config.json", 2**30), "is larger than 48,000,000 bytes"),
    "a deep config": (lambda f: (f / "config.json").write_text('{"x":' * 99 + "1" + "}" * 99), "nested more than 64"),
    "a config of infinity": (lambda f: (f / "config.json").write_text('{"n_embd": 1e999}'), "1e999 is no finite number"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no checkpoint of flatlm's.*no config.json"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "a config of something else": (lambda f: (f / "config.json").write_text("[]"), "config.json holds no JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
    "truncated": (lambda f: tampered(f, lambda d: d[:-5]), "holds no tensors that can be read .SafetensorError"),
    "cut in its header": (lambda f: tampered(f, lambda d: d[:99]), "holds no tensors that can be read"),
    "empty": (lambda f: tampered(f, lambda d: b""), "holds no tensors that can be read"),
    "a header that lies": (lambda f: tampered(f, lambda d: b"\xff" * 8 + d[8:]), "holds no tensors that can be read"),
    "offsets that lie": (lambda f: tampered(f, lambda d: d.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)),
                         "holds no tensors that can be read"),
    "not finite": (lambda f: edited(f, lambda t: t["transformer.ln_f.weight"].fill_(float("nan"))),
                   "'transformer.ln_f.weight' holds numbers that are not finite"),
    "missing": (lambda f: edited(f, lambda t: t.pop("transformer.h.2.ln_1.bias")),
                "lacks 1 tensors of a GPT2LMHeadModel, transformer.h.2.ln_1.bias for one"),
    "one too many": (lambda f: edited(f, lambda t: t.update(lora_A=torch.ones(2))),
                     "1 tensors that no GPT2LMHeadModel has, or has twice, 'lora_A' for one"),
    "of whole numbers": (lambda f: edited(f, lambda t: t.update({"transformer.ln_f.weight": torch.ones(20).int()})),
                         "'transformer.ln_f.weight' has the dtype torch.int32; weights must be floats"),
    "of 8 bits": (lambda f: edited(f, lambda t: t.update({"transformer.ln_f.weight": torch.ones(20).to(torch.float8_e5m2)})),
                  "'transformer.ln_f.weight' has the dtype torch.float8_e5m2"),
    "tied, but another": (lambda f: edited(f, lambda t: t.update({"lm_head.weight": torch.ones(V, 20)})),
                          "'lm_head.weight' differs from 'transformer.wte.weight', to which config.json ties it; set"),
    "there twice": (lambda f: edited(f, lambda t: t.update({"wte.weight": torch.ones(V, 20)})),
                    "has, or has twice, '(transformer.)?wte.weight' for one"),
    "another shape": (lambda f: edited(f, lambda t: t.update({"transformer.wpe.weight": torch.ones(9, 20)})),
                      r"wpe.weight' has the shape \[9, 20\], where config.json gives \[23, 20\]"),
}  # fmt: skip


@pytest.mark.parametrize("damage, told", BAD.values(), ids=BAD)
def test_a_bad_folder_is_refused_in_one_line(damage, told, copy):
    folder = copy("gpt2")
    damage(folder)
    with pytest.raises(UserError, match=told) as error:
        load_model(str(folder), "cpu")
    assert "\n" not in str(error.value) and isinstance(error.value, config.UserError)


UNKNOWN = {
    "architecture": ("gpt2", {"model_type": "mamba"}, "has the model type 'mamba', not supported; supported are"),
    "lacking": ("gpt2", {"n_embd": None}, "config.json: "),
    "of another type": ("gpt2", {"n_layer": "three"}, "config.json: "),
    "impossible": ("gpt2", {"n_head": 3}, "config.json: n_embd 20 is not a multiple of n_head 3"),
    "activation": ("gpt2", {"activation_function": "relu"}, "activation_function 'relu', which our models do not"),
    "scores as they are": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False"),
    "a size with a point": ("gpt2", {"n_layer": 3.0}, "n_layer 3.0, where there must be whole numbers above 0"),
    "a size of none": ("llama", {"vocab_size": None}, "vocab_size None, where there must be whole numbers"),
    "a huge size": ("bert", {"hidden_size": 2**40}, "hidden_size 1099511627776, where"),
    "a size that torch cannot hold": ("gpt2", {"n_embd": 2**31 - 1, "n_inner": 2**31 - 1, "n_head": 1},
                                      "whole numbers above 0 that a model can have"),
    "a million layers": ("gpt2", {"n_layer": 10**6}, "n_layer 1000000, where there must be"),
    "tied by a word": ("gpt2", {"tie_word_embeddings": "false"}, "'tie_word_embeddings' is 'false', where there must be true or false"),
    "a list of types": ("gpt2", {"model_type": ["gpt2"]}, "has the model type"),
    "rope twice": ("llama", {"rope_scaling": LLAMA3 | {"factor": 2.0}, "rope_parameters": LLAMA3},
                   "factor both 2.0 and 8.0"),
    "a context beside rope": ("llama 3.1", {"original_max_position_embeddings": 9},
                              "original_max_position_embeddings both 9 and 16"),
    "rope without a factor": ("llama", {"rope_parameters": LLAMA3 | {"factor": None}}, "rope_scale None"),
    "rope as a list": ("llama", {"rope_parameters": [1]}, r"is \[1\], where there must be an object or null"),
    "inverse layers": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    "decoder": ("bert", {"is_decoder": True}, "is_decoder True"),
    "yarn": ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}}, "rope of type 'yarn'"),
    "other llama3": ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, r"with factors \(2.0, 4.0\)"),
    "part of heads": ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.5}},
                      "partial_rotary_factor 0.5"),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "half biased": ("llama", {"attention_bias": True}, "biases in one of attention and MLP alone"),
    "seeing all": ("gpt2", {"is_causal": False}, "is_causal False"),
    "seeing all, rope": ("llama", {"is_causal": False}, "is_causal False"),
    "causal bert": ("bert", {"is_causal": True}, "is_causal True"),
    "old rope beside new": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type both 'linear' and"),
    "old rope, new name": ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type both 'yarn' and 'default'"),
    "old rope without a type": ("llama 3.1", {"rope_scaling": {"factor": 8.0}}, "rope_type both None and 'llama3'"),
    "two types": ("llama", {"rope_parameters": {"type": "yarn", "rope_type": "default"}}, "both 'yarn' and 'default'"),
    "rope of each layer": ("llama", {"rope_parameters": {"full_attention": {}}}, "an unknown full_attention of rope"),
    "a key of tomorrow": ("llama", {"attention_chunk_size": 4}, "an unknown attention_chunk_size"),
    "a window of llama": ("llama", {"sliding_window": 4}, "sliding_window 4, which our models do not"),
    "layers of llama": ("llama", {"layer_types": ["sliding_attention"]}, "layer_types ..sliding_attention.."),
    "linear layers": ("qwen3", {"layer_types": ["linear_attention"]}, "layers of other types, linear_attention"),
    "two names": ("gpt2", {"hidden_size": 30}, "hidden_size 30 beside n_embd 20"),
    "pruned": ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    "code of its own": ("llama", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
    "biased": ("qwen3", {"attention_bias": True}, "attention_bias True"),
}  # fmt: skip


@pytest.mark.parametrize("kind, changes, told", UNKNOWN.values(), ids=UNKNOWN)
def test_a_model_that_cannot_be_computed_here_is_refused_in_one_line(kind, changes, told, copy):
    with pytest.raises(UserError, match=told) as error:
        load_model(str(copy(kind, **changes)), "cpu")
    assert "\n" not in str(error.value) and isinstance(error.value, config.UserError)


def test_of_every_key_that_transformers_config_knows_we_have_an_opinion():
    import transformers

    for kind, name in CLASSES_OF.items():
        theirs = getattr(transformers, f"{name}Config")
        known = {field.name for field in dataclasses.fields(theirs)} | {*theirs.attribute_map}
        assert known - FAMILIES[kind].kinds.keys() - HARMLESS == set(), name


def test_keys_that_transformers_models_read_change_nothing_that_is_called_harmless():
    """Keys read by models with another head, by training's start, or for sums in another order."""
    from transformers import cache_utils, masking_utils, modeling_rope_utils

    heads = {"classifier_dropout", "num_labels", "problem_type", "summary_activation", "summary_first_dropout",
             "summary_last_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"}  # fmt: skip
    others = {"initializer_range", "pad_token_id", "use_cache", "reorder_and_upcast_attn", "chunk_size_feed_forward"}
    for kind in CLASSES_OF:
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        source = "".join(map(inspect.getsource, (module, cache_utils, masking_utils, modeling_rope_utils)))
        read = {*re.findall(r"config\.([a-z]\w*)", source)}
        read |= {*re.findall(r"getattr\(\s*(?:self\.)?\w*config, [\"']([a-z]\w*)", source)}
        assert {"vocab_size", "is_causal", "_"} - read == {"_"} and read & HARMLESS - FAMILIES[kind].kinds.keys() <= heads | others, kind


@pytest.mark.parametrize("kind, changes", [
    ("gpt2", {"n_ctx": 9, "hidden_size": 20, "reorder_and_upcast_attn": True, "_x": 1, "temperature": 2.0}),
    ("llama", {"layer_types": ["full_attention"] * 3, "sliding_window": None, "pretraining_tp": 2, "is_causal": True}),
    ("bert", {"position_embedding_type": "absolute", "pooler_type": "x", "chunk_size_feed_forward": 2}),
])  # fmt: skip
def test_keys_that_change_nothing_change_nothing(kind, changes, copy, folders):
    with torch.no_grad():
        assert torch.equal(ours(copy(kind, **changes))(IDS), ours(folders[kind][1])(IDS))


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_ropes_angles_are_transformers_to_the_bit_at_long_positions(theta, scale):
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": theta}
    parameters = LLAMA3 | {"rope_theta": theta, "original_max_position_embeddings": 8192} if scale > 1 else parameters
    config = transformers.LlamaConfig(head_dim=128, rope_parameters=parameters, max_position_embeddings=2**17)
    positions = torch.arange(0, 2**17, 7)
    cos, sin = rope_table(positions, 128, theta, scale, 8192)
    their_cos, their_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    assert torch.equal(cos, their_cos[0]) and torch.equal(sin[:, 64:], their_sin[0, :, 64:])


def test_a_bert_without_a_head_for_masked_tokens_is_told_so(copy):
    folder = copy("bert")
    edited(folder, lambda t: [t.pop(name) for name in [*t] if name.startswith("cls.")])
    with pytest.raises(UserError, match="has no head for masked tokens .cls.predictions., so it predicts none; use a BertForM"):
        load_model(str(folder), "cpu")


def test_code_in_a_pickle_does_not_run(copy):
    class Planted:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'it_ran'}",)

    folder = copy("gpt2")
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Planted()}, folder / "pytorch_model.bin")
    told = "pytorch_model.bin holds no tensors that can be read .it is damaged, or holds more than plain values.*could run code"
    with pytest.raises(UserError, match=told) as error:
        load_model(str(folder), "cpu")
    assert "\n" not in str(error.value) and not (folder / "it_ran").exists()
    pickle.loads(pickle.dumps(Planted()))
    assert (folder / "it_ran").exists(), "the plant itself works"


@pytest.mark.parametrize("kind", ["meta", "sparse", "a number for a name"])
def test_a_pickle_of_odd_tensors_is_refused(kind, copy):
    folder = copy("gpt2")
    (folder / "model.safetensors").unlink()
    odd = {"meta": torch.ones(2, device="meta"), "sparse": torch.ones(2).to_sparse()}.get(kind, torch.ones(2))
    torch.save({7 if "number" in kind else "x": odd}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin holds more than plain tensors") as error:
        load_model(str(folder), "cpu")
    assert "\n" not in str(error.value)


def test_a_pickle_of_other_things_than_tensors_is_refused(copy):
    folder = copy("gpt2")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": {}}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than plain tensors"):
        load_model(str(folder), "cpu")


def test_an_index_leads_nowhere_but_into_its_folder(copy, folders):
    folder = copy("gpt2")
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    names = load_file(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names '../elsewhere.safetensors', which is no name of a file beside it"):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize("weight_map", [{"lm_head.weight": "elsewhere.safetensors"}, {"x": 3}, ["x"], None])
def test_an_index_that_does_not_fit_its_files_is_refused_in_one_line(weight_map, copy):
    folder = copy("gpt2")
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="index.json(: | names ).*; copy it from its source again") as error:
        load_model(str(folder), "cpu")
    assert "\n" not in str(error.value)


# ---- by name

def test_a_name_is_read_from_hugging_faces_cache_and_one_that_is_not_there_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "models--someone--tiny"
    shutil.copytree(folders["gpt2"][1], there / "snapshots" / ("a" * 40))
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("a" * 40)
    assert same_weights(ours("someone/tiny"), ours(folders["gpt2"][1]))
    told = "someone/other is no folder here, and the Hugging Face hub did not give"
    with pytest.raises(UserError, match=told) as error:
        ours("someone/other")
    assert "\n" not in str(error.value) and isinstance(error.value, config.UserError)


# ---- training from there

@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), vocab_size=V - 4)


def train_from(folder, data_dir, out_dir, **changes):
    """A small run that takes its model from a folder."""
    own = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd"}
    names = {name: value for name, value in SMALL.items() if name not in own}
    names |= {"data_dir": data_dir, "out_dir": out_dir, "init_from": folder} | changes
    train.main(config.load(train.Settings, [f"--{name}={value}" for name, value in names.items()]))
    return out_dir


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_a_model_of_transformers_trains_on_from_its_loss(kind, folders, data_dir, tmp_path, no_curves):
    theirs, folder = folders[kind]
    out_dir = train_from(folder, data_dir, tmp_path / "run", max_steps=3, learning_rate=1e-3, eval_interval=3)
    tokens = torch.from_numpy(np.concatenate(Split(data_dir, "val", V).shards).astype(np.int64))[:141]
    rows = tokens.unfold(0, 8, 7)  # the windows of evaluation: 20 of 7 tokens and the one after
    expected = F.cross_entropy(logits_of(theirs, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    losses = records(out_dir, "val_loss")
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[3] < losses[0]


def test_a_bert_of_transformers_trains_on_and_keeps_its_next_sentence_head(folders, tmp_path, no_curves):
    theirs, folder = folders["bert whole"]
    specials = {name: V - 5 + i for i, name in enumerate(SPECIALS)}
    data_dir = write_data(tmp_path / "data", vocab_size=V, specials=specials)
    out_dir = train_from(folder, data_dir, tmp_path / "run", max_steps=9)
    losses = records(out_dir, "val_loss")
    assert losses[9] < losses[0] - 0.1
    extra = open_model(str(out_dir)).extra
    assert torch.equal(extra["bert.pooler.dense.weight"], theirs.bert.pooler.dense.weight)
    assert torch.equal(extra["cls.seq_relationship.bias"], theirs.cls.seq_relationship.bias)
    again = train_from(out_dir, data_dir, tmp_path / "again", max_steps=1)
    assert open_model(str(again)).extra.keys() == extra.keys()


def test_what_another_start_carried_is_not_kept(folders, tmp_path, no_curves):
    specials = {name: V - 5 + i for i, name in enumerate(SPECIALS)}
    data_dir = write_data(tmp_path / "data", vocab_size=V, specials=specials)
    for kind, names in (("bert whole", 4), ("bert", 0)):
        train_from(folders[kind][1], data_dir, tmp_path / "run", max_steps=1, save_interval="none")
        extra = tmp_path / "run" / "carried.safetensors"
        assert len(load_file(extra) if extra.exists() else {}) == names


def test_data_of_another_tokenizer_than_the_weights_is_told(folders, tmp_path, no_curves, capsys):
    _, folder = saved("gpt2", tmp_path / "theirs", vocab_size=340)
    train_bpe(["the quick brown fox"] * 9, 270, tmp_path / "bpe.json")
    write_tokenizer(load_tokenizer(str(tmp_path / "bpe.json")), folder, "clm", 23)
    for tokenizer, told in (("byte", True), ("tokenizer.json", False)):
        data_dir = write_data(tmp_path / tokenizer, vocab_size=270, tokenizer=tokenizer)
        shutil.copyfile(folder / "tokenizer.json", data_dir / "tokenizer.json")
        train_from(folder, data_dir, tmp_path / f"run {tokenizer}", max_steps=1)
        out = capsys.readouterr().out
        assert ("has tokens of byte, the weights know tokens of" in out) == told == ("warning    " + str(data_dir) in out)


def test_a_run_that_has_begun_says_that_another_start_is_of_no_effect(folders, data_dir, tmp_path, no_curves, capsys):
    train_from(folders["gpt2"][1], data_dir, tmp_path / "run", max_steps=1)
    train_from(folders["gpt2 erf"][1], data_dir, tmp_path / "run", max_steps=2)
    assert re.search("init_from: .* -> .*, without effect now", capsys.readouterr().out)


def test_the_model_of_a_folder_is_what_is_planned(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [f"--init_from={folders['llama'][1]}", "--seq_len=11", "--batch_tokens=33", "--micro_batch_size=3",
                 "--n_gpus=1"]  # fmt: skip
    plan.main(config.load(plan.Settings, [*arguments, "--json"]))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["n_params"] == sum(p.numel() for p in folders["llama"][0].parameters())


def test_a_run_that_started_there_goes_on_when_the_folder_is_gone(folders, data_dir, tmp_path, no_curves):
    folder = shutil.copytree(folders["gpt2"][1], tmp_path / "theirs")
    train_from(folder, data_dir, tmp_path / "run", max_steps=2)
    shutil.rmtree(folder)
    train_from(folder, data_dir, tmp_path / "run", max_steps=4)
    assert list(records(tmp_path / "run")) == [1, 2, 3, 4]


def test_the_model_of_a_folder_is_what_is_benchmarked(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, folder = folders["llama"]
    arguments = ["--seq_len=11", "--batch_tokens=33", "--micro_batch_size=3", "--bench_steps=3", "--bench_warmup=0",
                 "--picture=false", "--device=cpu", "--precision=fp32"]  # fmt: skip
    bench.main(config.load(bench.Settings, [f"--init_from={folder}", *arguments, f"--json={tmp_path / 'a.json'}"]))
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["n_params"] == sum(p.numel() for p in theirs.parameters())
    assert figures["seq_len"] == 11


def test_a_vocabulary_smaller_than_the_datas_is_refused(folders, tmp_path, no_curves):
    data_dir = write_data(tmp_path / "data", vocab_size=V + 1)
    with pytest.raises(UserError, match=f"vocab_size is {V}, but .* was made with a vocabulary of {V + 1}"):
        train_from(folders["gpt2"][1], data_dir, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"strategy": "fsdp"}, {"tp": 2}], ids=["fsdp", "tp"])
def test_sharded_runs_start_from_the_same_weights(layout, folders, tmp_path, no_curves):
    folder, data_dir = folders["llama"][1], write_data(tmp_path / "data", vocab_size=V)
    sizes = {"n_head": 6, "n_kv_head": 2, "n_embd": 48, "n_inner": 33, "vocab_size": V, "block_size": 8, "seq_len": 6,
             "batch_tokens": 36, "init_from": folder, "max_steps": 2}  # fmt: skip
    if "tp" in layout:  # which cannot share out a width of 33
        folder = saved("llama", tmp_path / "even", intermediate_size=34)[1]
        sizes |= {"n_inner": 34, "init_from": folder}
    one = train_from(folder, data_dir, tmp_path / "one", **sizes)
    cfg = settings(data_dir, tmp_path / "two", **sizes, **layout)
    cfg = dataclasses.replace(cfg, given=frozenset({"block_size"}))
    on_ranks(2, (train.main, cfg))
    assert list(records(tmp_path / "two").values()) == pytest.approx(list(records(one).values()), rel=1e-5)
    for name, run in (("one", one), ("two", tmp_path / "two")):  # and a sharded checkpoint goes out as a whole one does
        (run / "meta.json").unlink()  # of a tokenizer too large for these models
        export(open_model(str(run)), tmp_path / "hf" / name)
    whole, sharded = (load_file(tmp_path / "hf" / name / "model.safetensors") for name in ("one", "two"))
    assert whole.keys() == sharded.keys()
    for name in whole:
        torch.testing.assert_close(sharded[name], whole[name], rtol=0, atol=1e-3)
