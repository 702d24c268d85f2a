"""Models go out to Hugging Face's folders and come back as they were."""

import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import config
import convert
from checkpoint import CheckpointConfig, CheckpointWriter
from config import UserError
from convert import export, write_weights
from hugging_face import logits_of, saved
from interop.families import their_tensors
from interop.hub import save_tensors
from interop.pretrained import EXTRA_FILE, load_model, model_location, open_model
from model import ModelConfig, Transformer
from text.tokenizer import load_tokenizer
from world import World

T, V = 23, 269  # more ids than the byte tokenizer has, and no multiple of 64
GPT2 = ModelConfig(vocab_size=V, block_size=T, n_layer=3, n_head=5, n_embd=20)
BERT = replace(GPT2, objective="mlm", n_inner=33, mlp="gelu", norm_position="post", norm_eps=1e-3, n_token_types=2)
LLAMA = replace(
    GPT2, n_head=6, n_kv_head=2, n_embd=48, n_inner=33, mlp="swiglu", norm="rmsnorm", norm_eps=1e-3, position="rope",
    rope_theta=500.0, bias=False, tie_embeddings=False,
)  # fmt: skip
MODELS = {
    "gpt2": GPT2,
    "gpt2 untied": replace(GPT2, tie_embeddings=False, mlp="gelu", n_inner=33, dropout=0.1),
    "gpt2 without biases": replace(GPT2, bias=False),
    "bert": BERT,
    "bert untied": replace(BERT, tie_embeddings=False, mlp="gelu_tanh"),
    "bert without biases or token types": replace(BERT, bias=False, n_token_types=None),
    "llama": LLAMA,
    "llama tied, with biases": replace(LLAMA, bias=True, tie_embeddings=True),
    "llama 3.1": replace(LLAMA, rope_scale=8.0, rope_context=64),
    "mistral": replace(LLAMA, window=4),  # sequences have 7 tokens
    "qwen3": replace(LLAMA, qk_norm=True, head_dim=10, tie_embeddings=True),
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM", "llama": "LlamaForCausalLM",
           "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # fmt: skip
IDS = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(2))


def make_run(folder, cfg, tokenizer="byte"):
    """A run's folder with a checkpoint of a random model, every weight drawn; returns the folder as text."""
    torch.manual_seed(1)
    model = Transformer(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for table in (model.wte.weight, model.head.weight, *[b for b in [model.head.bias] if b is not None]):
            table[cfg.vocab_size :] = 0
    writer = CheckpointWriter(folder, CheckpointConfig(), World(0, 1, torch.device("cpu"), "fp32"))
    settings = {"seq_len": cfg.block_size, "learning_rate": 0.01, "out_dir": "/home/someone/secret"}
    state = {"sequences_seen": 420, "hours": 1.5, "val_loss": 2.5, "evaluated_at": 55}
    writer.save(60, model, None, {"settings": settings, "state": state})
    writer.wait()
    lines = [{"step": step, "val_loss": 2.5, "val_bpb": step / 50} for step in (0, 50, 55)]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if tokenizer:
        splits = {name: {"tokens": n, "bytes": 2 * n} for name, n in (("train", 9000), ("val", 1000))}
        meta = {"tokenizer": tokenizer, "vocab_size": 261, "command": "python prepare.py --input=x", "splits": splits}
        (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{kind of MODELS: (run, folder of its export)}, each made when it is first asked for."""

    class Exported(dict):
        def __missing__(self, kind):
            folder = tmp_path_factory.mktemp("exported")
            run = make_run(folder / "run", MODELS[kind])
            export(open_model(run), folder / "hf")
            self[kind] = run, folder / "hf"
            return self[kind]

    return Exported()


def loaded_there(folder, auto):
    """What transformers loads from a folder, without any extra argument; asserts that it says nothing about it."""
    import transformers
    from transformers.utils import logging as theirs

    heard, handler = [], logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = theirs.get_logger("transformers")
    logger.addHandler(handler)
    try:
        model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    said = [line for line in heard if "torchvision" not in line]
    assert not said and not any(info.values()), (said, info)
    return model


def there(model):
    """A model's config.json as transformers writes it."""
    return json.loads(model.config.to_json_string())


def auto_class(cfg):
    return "AutoModelForMaskedLM" if cfg.objective == "mlm" else "AutoModelForCausalLM"


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_loads_an_export_without_a_word_and_has_its_logits(kind, exported):
    run, folder = exported[kind]
    model, theirs = load_model(run, "cpu")[0], loaded_there(folder, auto_class(MODELS[kind]))
    assert type(theirs).__name__ == CLASSES[kind.split()[0]]
    with torch.no_grad():
        expected = model(IDS)
    torch.testing.assert_close(logits_of(theirs, IDS), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.3 and theirs.dtype == torch.float32


@pytest.mark.parametrize("kind", MODELS)
def test_ours_to_hugging_face_and_back_is_the_same_to_the_bit(kind, exported):
    run, folder = exported[kind]
    (before, _), (after, _) = load_model(run, "cpu"), load_model(str(folder), "cpu")
    there = dataclasses.asdict(after.cfg)
    cfg = before.cfg
    made_explicit = {"n_inner": cfg.inner_width}
    if cfg.position == "rope":
        made_explicit |= {"head_dim": cfg.head_width, "n_kv_head": cfg.kv_heads}
    assert there == dataclasses.asdict(cfg) | made_explicit
    ours, theirs = dict(before.named_parameters()), dict(after.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2 untied", "bert", "bert untied", "bert whole", "llama",
                                  "llama tied, biases", "llama 3.1", "mistral", "qwen3"])  # fmt: skip
def test_hugging_face_to_ours_and_back_is_the_same_to_the_bit(kind, tmp_path):
    theirs, folder = saved(kind, tmp_path / "theirs")
    export(open_model(str(folder)), tmp_path / "back")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    auto = {"bert whole": "AutoModelForPreTraining"}.get(kind, auto_class(open_model(str(folder)).cfg))
    again = loaded_there(tmp_path / "back", auto)
    assert type(again) is type(theirs)
    assert [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back")] == [there(theirs)] * 2
    torch.testing.assert_close(logits_of(again, IDS % 131), logits_of(theirs, IDS % 131), rtol=0, atol=1e-6)


def test_next_sentence_weights_go_out_from_a_run_that_started_with_them(exported, tmp_path):
    theirs, folder = saved("bert whole", tmp_path / "theirs")
    source = open_model(str(folder))
    run = make_run(tmp_path / "run", source.cfg, tokenizer=None)
    save_tensors(source.extra, tmp_path / "run" / EXTRA_FILE)  # as train.py does
    export(open_model(run), tmp_path / "back")
    again = loaded_there(tmp_path / "back", "AutoModelForPreTraining")
    assert torch.equal(again.bert.pooler.dense.weight, theirs.bert.pooler.dense.weight)
    assert torch.equal(again.cls.seq_relationship.bias, theirs.cls.seq_relationship.bias)


def test_weights_keep_the_dtype_that_they_have_or_get_the_one_asked_for(exported, tmp_path):
    run, folder = exported["qwen3"]
    export(open_model(run), tmp_path / "half", "bfloat16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(t, half[name].float()) or torch.allclose(t, half[name].float(), rtol=2**-8)
               for name, t in load_file(folder / "model.safetensors").items())  # fmt: skip
    assert loaded_there(tmp_path / "half", "AutoModelForCausalLM").dtype == torch.bfloat16
    export(open_model(str(tmp_path / "half")), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, again[name]) for name, t in half.items())


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path):
    _, folder = saved("llama", tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="the weights model.norm.weight are not finite in float16; use another"):
        export(open_model(str(folder)), tmp_path / "hf", "float16")
    assert not (tmp_path / "hf").exists()


def test_what_stands_beside_the_weights_goes_where_they_go(tmp_path):
    _, folder = saved("bert", tmp_path / "theirs", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    beside = {"tokenizer.json": "{}", "chat_template.jinja": "{{x}}", "added_tokens.json": "{}", "vocab.txt": "a",
              "README.md": "theirs", "LICENSE": "mine"}  # fmt: skip
    for name, text in beside.items():
        (folder / name).write_text(text)
    export(open_model(str(folder)), tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_text() for name in beside} == beside
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0.2


@pytest.mark.parametrize("kind, keys", [
    ("gpt2 untied", ["resid_pdrop", "embd_pdrop", "attn_pdrop"]), ("llama", ["attention_dropout"]),
])  # fmt: skip
def test_a_config_has_the_models_dropout_and_for_old_transformers_its_rope(kind, keys, exported):
    config = json.loads((exported[kind][1] / "config.json").read_text())
    assert [config[key] for key in keys] == [MODELS[kind].dropout] * len(keys)
    old = json.loads((exported["llama 3.1"][1] / "config.json").read_text())
    assert old["rope_theta"] == 500.0 and old["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip


def test_weights_can_be_read_by_whom_the_other_files_can(exported):
    files = list(exported["gpt2"][1].iterdir())
    assert len({path.stat().st_mode for path in files}) == 1 and len(files) == 6


@pytest.mark.parametrize("place", ["here", "behind a link"])
def test_an_empty_folder_is_filled_wherever_it_is(place, exported, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    export(open_model(exported["gpt2"][0]), "." if place == "here" else tmp_path / "link")
    assert (tmp_path / "empty" / "README.md").read_text().splitlines()[5] == f"# {'empty' if place == 'here' else 'link'}"
    loaded_there(tmp_path / "empty", "AutoModelForCausalLM")


def test_a_tokenizer_too_large_for_a_folders_model_is_refused_there_too(exported, tmp_path):
    _, folder = saved("gpt2", tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(exported["gpt2"][1] / name, folder / name)
    with pytest.raises(UserError, match="has 261 ids, the model a vocab_size of 131; let .*theirs name or hold"):
        export(open_model(str(folder)), tmp_path / "back")


@pytest.mark.parametrize("kind, changes", [
    ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3}),
    ("bert", {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}),
    ("mistral", {"sliding_window": 7}), ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
])  # fmt: skip
def test_a_copys_config_is_what_it_copies(kind, changes, tmp_path):
    theirs, folder = saved(kind, tmp_path / "theirs", **changes)
    for name, dtype in (("same", None), ("half", "bfloat16")):
        export(open_model(str(folder)), tmp_path / name, dtype)
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == there(theirs)
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == there(theirs) | {"dtype": "bfloat16"}


def test_a_copys_class_has_the_head_that_its_weights_have(tmp_path):
    theirs, folder = saved("gpt2", tmp_path / "theirs")
    theirs.transformer.save_pretrained(folder)
    export(open_model(str(folder)), tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    assert loaded_there(tmp_path / "back", "AutoModelForCausalLM").config.n_embd == theirs.config.n_embd


def test_a_copy_publishes_no_file_from_outside_the_folder(tmp_path):
    _, folder = saved("gpt2", tmp_path / "theirs")
    (tmp_path / "secret").write_text("key")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="README.md is a link to .*secret, outside its folder; put a copy in its place"):
        export(open_model(str(folder)), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    with pytest.raises(UserError, match="README.md cannot be copied .*no regular file"):
        export(open_model(str(folder)), tmp_path / "back")


def test_what_a_copy_leaves_out_is_told(tmp_path, capsys):
    _, folder = saved("gpt2", tmp_path / "theirs")
    for name in ("vocab.json", "tekken.json", "notes.txt"):
        (folder / name).write_text("{}")
    export(open_model(str(folder)), tmp_path / "back")
    assert capsys.readouterr().out.splitlines()[-1] == "left out: notes.txt, tekken.json"


@pytest.mark.parametrize("name", ["a $HOME b", "-dash", "new\nline", "ünï"])
def test_a_folders_name_may_be_any_text(name, tmp_path, capsys):
    run = make_run(tmp_path / name / "run", GPT2)
    convert.main(config.load(convert.Settings, [f"--out_dir={run}", f"--to_hf={tmp_path / name / 'hf'}"]))
    assert load_model(str(tmp_path / name / "hf"), "cpu")[0].cfg.n_layer == 3


def test_a_folder_whose_name_is_no_utf8_is_refused_in_a_line(exported, tmp_path):
    with pytest.raises(UserError, match="is not UTF-8"):
        export(open_model(exported["gpt2"][0]), tmp_path / os.fsdecode(b"h\xff"))
    copied = shutil.copytree(exported["gpt2"][0], tmp_path / os.fsdecode(b"r\xff"))
    with pytest.raises(UserError, match="cannot be read .*not valid UTF-8"):
        open_model(str(copied))


def test_a_checkpoint_that_goes_while_it_is_read_is_told_in_a_line(tmp_path):
    """torch's CheckpointException is no Exception."""
    source = open_model(make_run(tmp_path / "run", GPT2))
    for path in source.path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="step_00000060 cannot be read .*; name another checkpoint, or try again") as error:
        export(source, tmp_path / "hf")
    assert "\n" not in str(error.value) and not (tmp_path / "hf").exists()


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    _, theirs = saved("gpt2", tmp_path / "theirs")
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "aa", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (theirs / "LICENSE").write_text("free")
    for path in theirs.iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    export(open_model(str(snapshot)), tmp_path / "back")
    assert (tmp_path / "back" / "LICENSE").read_text() == "free"


def test_gpt2_has_n_ctx_for_llama_cpps_converter(exported):
    assert json.loads((exported["gpt2"][1] / "config.json").read_text())["n_ctx"] == T
    assert "n_ctx" not in json.loads((exported["llama"][1] / "config.json").read_text())


def test_the_model_card_tells_no_secrets_of_urls_and_no_places_of_the_machine(tmp_path, capsys):
    run = make_run(tmp_path / "run", GPT2)
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    meta["command"] = shlex.join([
        "python", "/home/me/prepare.py", "config/x.py", "--input=https://me:pass@host.org/a/b.jsonl?token=abc#d",
        "--tokenizer=/home/me/t/tokenizer.json", "--doc_separator=</s>", "--input=~/corpus/**/*.txt"])  # fmt: skip
    (tmp_path / "run" / "meta.json").write_text(json.dumps(meta))
    source = open_model(run)
    source.manifest["settings"] |= {"data_dir": "/home/me/data/web", "init_from": "/home/me/m", "schedule": "cosine"}
    export(source, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    for secret in ("me:pass", "token=", "abc", "home", "corpus", "/t/"):
        assert secret not in card, secret
    for kept in ("--input=https://host.org/a/b.jsonl", "</s>", "*.txt", "data_dir = 'web'", "init_from = 'm'",
                 "schedule = 'cosine'", "prepare.py x.py", "--tokenizer=tokenizer.json"):  # fmt: skip
        assert kept in card, kept
    source.manifest["settings"]["init_from"] = "openai-community/gpt2"
    export(source, tmp_path / "hub")
    assert "init_from = 'openai-community/gpt2'" in (tmp_path / "hub" / "README.md").read_text()


def test_the_model_card_of_a_mixture_names_folders_and_no_places_nor_the_first_folders_tokens(tmp_path):
    run = make_run(tmp_path / "run", GPT2)
    source = open_model(run)
    source.manifest["settings"] |= {
        "data_dir": {"/home/me/web": 0.7, "/home/me/code": 0.3}, "data_schedule": {"9": {"/home/me/web": 1}},
    }  # fmt: skip
    export(source, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "data_dir = {'web': 0.7, 'code': 0.3}\ndata_schedule = {9: {'web': 1}}" in card
    assert "home" not in card and "of the data" not in card and "data made by" not in card


def test_a_card_is_written_whatever_the_log_and_the_datas_names_are(tmp_path):
    run = make_run(tmp_path / "run", GPT2)
    with open(tmp_path / "run" / "log.jsonl", "ab") as log:
        log.write(b'{"step": 1, "loss": 2.5}\n\xff\n')
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    meta["command"] = f"python prepare.py --input={os.fsdecode(bytes([97, 255]))}.txt"
    (tmp_path / "run" / "meta.json").write_text(json.dumps(meta))
    export(open_model(run), tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "2.5000 nats a token" in card and r"a\udcff.txt" in card


def test_tensors_of_several_dtypes_go_out_as_they_came(tmp_path):
    _, folder = saved("llama", tmp_path / "theirs")
    tensors = {name: t if "norm" in name else t.half() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    export(open_model(str(folder)), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(back[name].dtype == t.dtype and torch.equal(back[name], t) for name, t in tensors.items())


def test_large_models_are_written_in_several_files(exported, tmp_path):
    run, folder = exported["llama"]
    source, whole = open_model(run), load_file(folder / "model.safetensors")
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    total = write_weights(their_tensors(source.cfg, source.read, {}), tmp_path / "hf", shard_bytes=60_000)
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    n = len(files)
    assert [f.name for f in files] == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, 1 + n)]
    assert len(files) > 2 and sum(t.nbytes for t in whole.values()) == total
    found = {name: t for f in files for name, t in load_file(f).items()}
    assert found.keys() == whole.keys() and all(torch.equal(t, found[name]) for name, t in whole.items())
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 60_000 for f in files)
    theirs = loaded_there(tmp_path / "hf", "AutoModelForCausalLM")
    assert torch.equal(theirs.lm_head.weight, whole["lm_head.weight"])
    up = load_model(str(tmp_path / "hf"), "cpu")[0].blocks[2].mlp.up.weight
    assert torch.equal(up, theirs.model.layers[2].mlp.up_proj.weight)


REFUSED = {
    "relu2": (replace(GPT2, mlp="relu2"), "GPT-2 is near, but mlp is relu2, not gelu or gelu_tanh"),
    "the modern encoder": (replace(LLAMA, objective="mlm"),
                           "norm is rmsnorm, not layernorm, position is rope"),
    "grouped heads": (replace(GPT2, n_head=4, n_kv_head=2), "n_kv_head is 2, not 4"),
    "norms behind": (replace(LLAMA, norm_position="post"), "Llama is near, but norm_position is post, not pre"),
    "biases": (replace(LLAMA, bias=True, qk_norm=True), "Qwen3 is near, but bias is True, not False"),
    "token types": (replace(GPT2, n_token_types=2), "n_token_types is 2, not None"),
}  # fmt: skip


@pytest.mark.parametrize("cfg, told", REFUSED.values(), ids=REFUSED)
def test_what_transformers_cannot_compute_is_refused_by_the_settings_name(cfg, told, tmp_path):
    run = make_run(tmp_path / "run", cfg)
    with pytest.raises(UserError, match=told) as error:
        export(open_model(run), tmp_path / "hf")
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_what_an_export_is_said_to_lack_must_be_zeros_there(exported, tmp_path):
    folder = shutil.copytree(exported["gpt2 without biases"][1], tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"][3] = 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match='by "flatlm" in config.json the model has no norm_f.bias, .*remove "flatlm"'):
        open_model(str(folder))
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "flatlm"}))
    assert load_model(str(folder), "cpu")[0].norm_f.bias[3] == 1


def test_a_folder_that_holds_something_is_not_written_to(exported, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").write_text("mine")
    with pytest.raises(UserError, match="hf is not empty; name another folder"):
        export(open_model(exported["gpt2"][0]), tmp_path / "hf")
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["precious"]


def test_an_export_that_fails_leaves_nothing(exported, tmp_path):
    source = open_model(exported["gpt2"][0])
    source.read = lambda name: 1 / 0
    with pytest.raises(ZeroDivisionError):
        export(source, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(tmp_path):
    run = make_run(tmp_path / "run", replace(GPT2, vocab_size=260))
    with pytest.raises(UserError, match="the tokenizer byte has 261 ids, the model a vocab_size of 260"):
        export(open_model(run), tmp_path / "hf")


def test_without_a_known_tokenizer_weights_go_out_alone_and_a_line_says_so(tmp_path, capsys):
    export(open_model(make_run(tmp_path / "run", GPT2, tokenizer=None)), tmp_path / "hf")
    assert "the tokenizer is unknown: " in capsys.readouterr().out
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    loaded_there(tmp_path / "hf", "AutoModelForCausalLM")


def test_the_model_card_says_nothing_of_a_training_that_was_not_ours(exported, tmp_path):
    folder = shutil.copytree(exported["gpt2"][1], tmp_path / "theirs")
    (folder / "README.md").unlink()
    export(open_model(str(folder)), tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "training" not in card


def test_a_run_whose_meta_json_is_damaged_goes_out_without_tokenizer_and_says_so(tmp_path, capsys):
    run = make_run(tmp_path / "run", GPT2)
    (tmp_path / "run" / "meta.json").write_text("{")
    export(open_model(run), tmp_path / "hf")
    assert re.search("the tokenizer is unknown: .*meta.json names no tokenizer", capsys.readouterr().out)
    assert "| steps | 60 |" in (tmp_path / "hf" / "README.md").read_text()


def test_the_model_card_tells_settings_data_losses_tokens_and_hours(exported):
    card = (exported["gpt2"][1] / "README.md").read_text()
    for fact in ("| steps | 60 |", f"| tokens trained on | {420 * T:,} |", "| hours | 1.50 |", "| validation loss | 2.5000 nats",
                 "| validation bits per byte | 1.1000 |", "| data made by | `python prepare.py --input=x` |",
                 "| train tokens of the data | 9,000 |", "learning_rate = 0.01", "AutoModelForCausalLM"):  # fmt: skip
        assert fact in card, fact
    assert "secret" not in card


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_generates_the_tokens_that_sample_does(kind, exported, capsys):
    from transformers import AutoTokenizer

    import sample

    run, folder = exported[kind]
    capsys.readouterr()
    arguments = ["--prompt=def f(", "--temperature=0", "--max_new_tokens=9", "--device=cpu"]
    sample.main(config.load(sample.Settings, [f"--out_dir={run}", *arguments]))
    ours = capsys.readouterr().out
    sample.main(config.load(sample.Settings, [f"--init_from={folder}", *arguments]))
    assert capsys.readouterr().out == ours
    tokenizer, theirs = AutoTokenizer.from_pretrained(folder), loaded_there(folder, "AutoModelForCausalLM")
    ids = tokenizer("def f(", return_tensors="pt")
    out = theirs.generate(**ids, do_sample=False, max_new_tokens=9)[0].tolist()
    end = out.index(256) if 256 in out else len(out)
    assert load_tokenizer("byte").decode(out[:end]) == ours.removesuffix("\n")


def test_a_presets_init_from_is_where_its_run_starts_and_the_run_comes_first(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned.py").write_text("init_from = 'gpt2'")

    def place(*arguments):
        return model_location(config.load(convert.Settings, ["--to_hf=x", *arguments]))

    assert place("tuned.py") == place("--init_from=gpt2") == "gpt2"
    shutil.copytree(exported["gpt2"][0], tmp_path / "out" / "tuned")
    assert place("tuned.py") == "out/tuned"
    assert place("tuned.py", "--init_from=gpt2-large") == "gpt2-large"


MEASURED = """
import sys, threading, time
import safetensors.torch, torch.distributed.checkpoint, transformers
import convert

def private_mib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def watch():
    while True:
        peak[0] = max(peak[0], private_mib())
        time.sleep(0.001)

peak, before = [0], private_mib()
threading.Thread(target=watch, daemon=True).start()
convert.run_script(convert.main, convert.Settings, "")
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_an_export_takes_the_memory_of_about_one_copy_of_the_weights(tmp_path):
    run = make_run(tmp_path / "run", ModelConfig(vocab_size=8000, block_size=64, n_layer=12, n_head=8, n_embd=768))
    command = [sys.executable, "-c", MEASURED, f"--out_dir={run}", f"--to_hf={tmp_path}/hf"]
    done = subprocess.run(command, cwd=Path(convert.__file__).parent, capture_output=True, text=True, timeout=100, check=True)
    weights_mib = (tmp_path / "hf" / "model.safetensors").stat().st_size / 2**20
    assert weights_mib > 300
    assert float(done.stdout.split()[-1]) < 1.2 * weights_mib


@pytest.mark.slow
def test_in_a_fresh_process_transformers_loads_an_export_and_says_nothing(exported):
    code = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["torchao"] = None  # transformers would import it, and it tells of kernels for other machines
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
out = model.generate(**tokenizer("def f(", return_tensors="pt"), do_sample=False, max_new_tokens=5)
print(type(model).__name__, tokenizer.decode(out[0])[:6])
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, str(exported["gpt2"][1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert (done.returncode, done.stdout) == (0, "GPT2LMHeadModel def f(\n"), done.stderr
    assert not [line for line in done.stderr.splitlines() if "Loading weights" not in line and line.strip()], done.stderr


@pytest.mark.parametrize("arguments, told", [
    ([], "give one of to_hf"),
    (["--to_hf=x", "--from_nanogpt=y"], "to_hf and from_nanogpt is given; give one of to_hf"),
    (["--to_hf=x", "--out_dir=/nowhere"], "/nowhere does not exist; train.py makes one"),
    (["--to_hf=x"], "out_dir is none"),
    (["--from_nanogpt=x"], "out_dir is none"),
])  # fmt: skip
def test_a_wrong_command_is_told_in_one_line(arguments, told):
    with pytest.raises(UserError, match=told) as error:
        convert.main(config.load(convert.Settings, arguments))
    assert "\n" not in str(error.value)
