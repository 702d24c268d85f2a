"""Whatever JSON others' files hold, a reader answers with a value or with one line, in bounded time and memory."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import foreign
from checkpoint import CheckpointConfig, CheckpointWriter, newest_checkpoint, read_manifest
from config import UserError
from convert import export
from hugging_face import saved
from interop.hub import HubModel, read_config, tensors_in
from interop.hub_tokenizer import load_hub_tokenizer
from interop.pretrained import load_model, run_config
from model import ModelConfig, Transformer
from test_tokenizer import byte_level_like, load_tokenizer, sentencepiece_like, unigram_like, vocab_file
from world import World

LIMIT_S, LIMIT_MIB = 60, 1024  # of one example; most take milliseconds
ODD = [0, -1, 1, 2**31, 2**64, 10**6, 1e308, -0.0, True, False, None, "", "x", "../../x", "\0", "a\nb", "\ud800", [], {}, [[]],
       [None], {"": None}, "Infinity", 5.5]  # fmt: skip
LEAF = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=9)
ANY = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
                   max_leaves=9)  # fmt: skip


KINDS = {"n": range(1, 9), "x": (float, None), "s": [str], "o": {"a!": bool, "*": int}}


@pytest.mark.parametrize("value, told", [
    ({}, None), ({"n": 8, "x": 3, "s": ["a"], "o": {"a": True, "b": 7}, "other": [{}]}, None), ({"x": None, "s": []}, None),
    ({"n": 9}, "f: 'n' is 9, where there must be a whole number from 1 to 8"), ({"n": True}, "'n' is True, where"),
    ({"n": 2.0}, "'n' is 2.0, where"), ({"x": "3"}, "'x' is '3', where there must be a number or null"),
    ({"x": False}, "'x' is False"), ({"s": ["a", 3]}, "'s': 1 is 3, where there must be a text"),
    ({"o": {}}, "'o' is {}, where there must be an object with a"), ({"o": {"a": 1}}, "'o': 'a' is 1, where"),
    ({"o": {"a": True, "b": "x" * 99}}, "'o': 'b' is 'x{56}[.]{3}, where there must be a whole number"),
])  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_its_place(value, told):
    if told is None:
        assert foreign.check(value, KINDS, "f") == value
    else:
        with pytest.raises(UserError, match=told):
            foreign.check(value, KINDS, "f")


@pytest.mark.parametrize("text, told", [
    (b"{", "cannot be read as JSON"), (b"[]", "holds no JSON object"), (b"\xff{}", "cannot be read as JSON"),
    (b'{"x": NaN}', "NaN is no finite number"), (b'{"x": -1e999}', "-1e999 is no finite number"),
    (b'{"x": %s}' % (b"9" * 41), "a number has 41 digits"), (b'{"x": "\\ud800"}', "surrogates not allowed"),
    (b'{"x":' + b"[" * 65 + b"]" * 65 + b"}", "nested more than 64 levels"), (b"[" * 10**6, "cannot be read as JSON"),
    (b'{"x": [' + b"[]," * 2**22 + b"[]]}", "more than 4,194,304 objects and lists"),
], ids=range(10))  # fmt: skip
def test_a_file_beyond_the_bounds_is_refused(text, told, tmp_path):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match=f"x.json .*{told}.*copy it from its source again"):
        foreign.read_json(tmp_path / "x.json")


def test_paths_that_are_no_utf8_are_read_where_there_may_be_some(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"x": os.fsdecode(b"a\xff")}))
    assert foreign.read_json(tmp_path / "x.json", has_paths=True) == {"x": os.fsdecode(b"a\xff")}
    with pytest.raises(UserError, match="surrogates not allowed"):
        foreign.read_json(tmp_path / "x.json")


def test_what_is_sound_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"x": "\\ud83d\\ude42", "n": 1000000000000000019884624838656}')
    assert foreign.read_json(tmp_path / "x.json") == {"x": "🙂", "n": 10**30 + 19884624838656}
    assert foreign.read_json(tmp_path / "y.json", lacking={"a": 1}) == {"a": 1}
    with pytest.raises(UserError, match="y.json cannot be read as JSON .*No such file"):
        foreign.read_json(tmp_path / "y.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="link.json cannot be read"):
        foreign.read_json(tmp_path / "link.json", lacking={})


@pytest.mark.parametrize("changes, told", [
    ({"n_layer": 10**6}, "n_layer 1000000"), ({"n_layer": "3"}, "n_layer '3'"), ({"new": 1}, "'new', which is unknown"),
    ({"dropout": 2.0}, "dropout is 2.0; it must be"), ({"n_head": 5}, "n_embd 768 is not a multiple of n_head 5"),
])  # fmt: skip
def test_settings_that_make_no_model_are_refused(changes, told):
    assert foreign.settings_of(ModelConfig, {"vocab_size": 37, "n_layer": 3.0}, "f") == ModelConfig(vocab_size=37, n_layer=3)
    with pytest.raises(UserError, match=told):
        foreign.settings_of(ModelConfig, {"vocab_size": 37} | changes, "f")


def places(value, path=()):
    """Paths of keys to every place in a JSON value; long objects and lists have only their first and last."""
    yield path
    keys = [*value] if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys if len(keys) < 20 else [keys[0], keys[-1]]:
        yield from places(value[key], (*path, key))


def planted(value, path, odd):
    """A JSON value with another value at a place."""
    if not path:
        return odd
    value = value.copy()
    value[path[0]] = planted(value[path[0]], path[1:], odd)
    return value


@st.composite
def damaged(draw, sound):
    """A JSON file's bytes: a sound value with odd ones in a few places or under new names, or cut, or anything else."""
    value = sound
    for _ in range(draw(st.integers(1, 2))):
        path, odd = draw(st.sampled_from([*places(value)])), draw(ANY)
        value = planted(value, path, odd)
        if isinstance(value, dict) and draw(st.integers(0, 9)) == 0:
            value = value | {draw(st.text(max_size=9)): draw(ANY)}
    data = json.dumps(value).encode()
    how = draw(st.integers(0, 19))
    if how == 0:
        data = data[: draw(st.integers(0, len(data)))]
    if how == 1:
        data = draw(st.binary(max_size=40))
    return b"[" * 99_999 if how == 2 else data


def try_all(examples, sound, attempt):
    """Gives `examples` damaged files to attempt(data), which may raise a UserError of one line, and nothing else."""
    answers = {"taken": 0, "refused": 0}

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=[*HealthCheck])  # fmt: skip
    @given(damaged(sound))
    def answered(data):
        start = time.process_time()
        try:
            attempt(data)
            answers["taken"] += 1
        except UserError as error:
            assert "\n" not in str(error), error
            str(error).encode()  # it can be printed
            answers["refused"] += 1
        assert time.process_time() - start < LIMIT_S

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answered()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < LIMIT_MIB
    assert answers["refused"] > examples / 4, answers
    return answers


many = pytest.mark.parametrize("examples", [30, pytest.param(2000, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder} of sound models of transformers."""
    return {kind: saved(kind, tmp_path_factory.mktemp(kind))[1] for kind in ("gpt2", "bert", "llama", "qwen3")}


@many
@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "qwen3"])
def test_any_config_is_read_or_refused_in_a_line(kind, examples, folders, tmp_path):
    sound = json.loads((folders[kind] / "config.json").read_text())

    def attempt(data):
        (tmp_path / "config.json").write_bytes(data)
        read_config(tmp_path)

    try_all(examples, sound, attempt)


@many
def test_any_model_is_loaded_and_copied_or_refused_in_a_line(examples, folders, tmp_path, capsys):
    folder = shutil.copytree(folders["gpt2"], tmp_path / "hf")
    sound = json.loads((folder / "config.json").read_text())

    def attempt(data):
        (folder / "config.json").write_bytes(data)
        model = HubModel(folder)
        export(model, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")

    try_all(examples, sound, attempt)


@many
def test_any_index_of_weights_is_read_or_refused_in_a_line(examples, tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(2)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}

    def attempt(data):
        (tmp_path / "model.safetensors.index.json").write_bytes(data)
        tensors_in(tmp_path)

    try_all(examples, {"metadata": {"total_size": 28}, "weight_map": weight_map}, attempt)


@many
def test_any_header_of_safetensors_is_read_or_refused_in_a_line(examples, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")

    def attempt(header):
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])
        for tensor in tensors_in(tmp_path).values():
            tensor.sum()

    try_all(examples, json.loads(whole[8 : 8 + size]), attempt)


@many
@pytest.mark.parametrize("kind", ["gpt2", "llama2", "unigram", "bert"])
def test_any_tokenizer_json_is_read_or_refused_in_a_line(kind, examples, tmp_path, capfd):
    if kind == "bert":
        load_tokenizer(vocab_file(tmp_path)).save(tmp_path / "tokenizer.json")
        (tmp_path / "vocab.txt").unlink()
    else:
        made = {"gpt2": byte_level_like, "llama2": sentencepiece_like, "unigram": unigram_like}[kind](kind)
        made.save(str(tmp_path / "tokenizer.json"))
    sound = json.loads((tmp_path / "tokenizer.json").read_text())

    def attempt(data):
        (tmp_path / "tokenizer.json").write_bytes(data)
        tokenizer = load_hub_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("the quick  brown\n42 Füchse 日本 ", continues=True))

    try_all(examples, sound, attempt)


@many
@pytest.mark.parametrize("file", ["tokenizer_config", "generation_config", "special_tokens_map", "added_tokens", "config"])
def test_any_file_beside_a_tokenizer_is_read_or_refused_in_a_line(file, examples, tmp_path):
    byte_level_like("gpt2").save(str(tmp_path / "tokenizer.json"))
    token = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    sound = {
        "tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast", "bos_token": token, "eos_token": "<|endoftext|>",
                             "added_tokens_decoder": {"555": token | {"special": True}}, "add_bos_token": True},
        "generation_config": {"eos_token_id": [555, 3], "bos_token_id": 555},
        "special_tokens_map": {"bos_token": token, "eos_token": "<|endoftext|>", "additional_special_tokens": [token]},
        "added_tokens": {"<|endoftext|>": 555},
        "config": {"model_type": "gpt2", "tokenizer_class": "GPT2TokenizerFast", "eos_token_id": 555},
    }[file]  # fmt: skip

    def attempt(data):
        (tmp_path / f"{file}.json").write_bytes(data)
        tokenizer = load_hub_tokenizer(tmp_path)
        assert all(type(id_) is int for id_ in {*tokenizer.stops, *tokenizer.begin})

    try_all(examples, sound, attempt)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run's only checkpoint, whose manifest has no checksum, to be spoilt."""
    run_dir, model = tmp_path_factory.mktemp("run"), Transformer(ModelConfig(vocab_size=37, n_layer=1, n_head=1, n_embd=4))
    writer = CheckpointWriter(run_dir, CheckpointConfig(), World(0, 1, torch.device("cpu"), "fp32"))
    state = {"step": 3, "sequences_seen": 9, "hours": 0.1, "val_loss": 2.0, "recent": [[1.0, 2.0]], "went_back_to": None}
    writer.save(3, model, None, {"settings": {"seq_len": 5, "init_from": None}, "state": state, "val_loss": 2.0})
    writer.wait()
    path = newest_checkpoint(run_dir)
    manifest = read_manifest(path)
    del manifest["checksum"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@many
def test_any_manifest_is_loaded_or_refused_in_a_line(examples, checkpoint, tmp_path, capsys):
    path = shutil.copytree(checkpoint, tmp_path / "ckpt" / checkpoint.name)

    def attempt(data):
        (path / "manifest.json").write_bytes(data)
        load_model(tmp_path, "cpu")
        run_config(tmp_path)

    try_all(examples, read_manifest(checkpoint), attempt)


def test_settings_that_break_two_rules_are_refused_in_a_line(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "ckpt" / checkpoint.name)
    manifest = read_manifest(checkpoint)
    manifest["model"]["objective"] = {"": 0}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="objective names ''; .* objective has 0 of clm, mlm") as error:
        load_model(tmp_path, "cpu")
    assert len(error.value.args) == 1


@many
def test_any_header_of_a_checkpoints_file_is_read_or_refused_in_a_line(examples, checkpoint, tmp_path, capsys):
    path = shutil.copytree(checkpoint, tmp_path / "ckpt" / checkpoint.name)
    manifest, [file] = read_manifest(path), path.glob("*.safetensors")
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    sound = json.loads(whole[8 : 8 + size])
    sound["__metadata__"]["DCP_SHARDING_INFO"] = json.loads(sound["__metadata__"]["DCP_SHARDING_INFO"])

    def attempt(data):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # JSON in a text in JSON
            header = json.loads(data)
            header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(header["__metadata__"]["DCP_SHARDING_INFO"])
            data = json.dumps(header).encode()
        file.write_bytes(len(data).to_bytes(8, "little") + data + whole[8 + size :])
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
        load_model(tmp_path, "cpu")

    try_all(examples, sound, attempt)
