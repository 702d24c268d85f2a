"""A checkpoint gives back what was saved, appears whole or not at all, and is refused when it is damaged."""

import functools
import hashlib
import itertools
import json
import os
import pickle
import shutil
import threading
from dataclasses import replace

import pytest
import torch

import checkpoint
from checkpoint import (
    CheckpointConfig,
    CheckpointWriter,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    remove_old_checkpoints,
)  # fmt: skip
from config import UserError
from interop.pretrained import load_model, run_config, with_model
from model import ModelConfig, Transformer
from optim import OptimConfig, build_optimizer
from ranks import on_ranks, run, write_data
from run.folder import keep_source, tokenizer_of
from run.resume import changed_settings
from world import World, WorldConfig, init_world

SMALL = ModelConfig(vocab_size=37, block_size=11, n_layer=3, n_head=5, n_embd=20)
WORLD = World(0, 1, torch.device("cpu"), "fp32")


def save_checkpoint(out_dir, step, model, optimizer, facts, world, **cfg):
    """Saves as training does, and waits."""
    saver = CheckpointWriter(out_dir, CheckpointConfig(**({"keep_checkpoints": 100} | cfg)), world)
    saver.save(step, model, optimizer, facts)
    saver.wait()


def build(cfg=SMALL, optimizer="adamw", steps=0, seed=1):
    """A model and its optimizer after some steps on random tokens."""
    torch.manual_seed(seed)
    model = Transformer(cfg)
    model.init_weights(seed)
    optimizer = build_optimizer(model, OptimConfig(optimizer=optimizer, learning_rate=0.01))
    for _ in range(steps):
        ids = torch.randint(37, (3, 7))
        model(ids, targets=ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def same(a, b):
    """Whether two state dicts are equal bit by bit, tensors anywhere in them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def saved(tmp_path):
    """A run folder with one checkpoint, and what was saved."""
    model, optimizer = build(steps=2)
    save_checkpoint(tmp_path, 7, model, optimizer, {"val_loss": 1.5, "state": {"step": 7}}, WORLD)
    return tmp_path, model, optimizer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("tied", [True, False])
def test_loading_gives_back_every_bit(optimizer, tied, tmp_path):
    cfg = replace(SMALL, tie_embeddings=tied)
    model, its_optimizer = build(cfg, optimizer, steps=2)
    save_checkpoint(tmp_path, 7, model, its_optimizer, {"val_loss": 1.5}, WORLD)
    other, other_optimizer = build(cfg, optimizer, seed=2)
    manifest = load_checkpoint(newest_checkpoint(tmp_path), other, other_optimizer)
    assert same(model.state_dict(), other.state_dict())
    assert same(its_optimizer.state_dict()["state"], other_optimizer.state_dict()["state"])
    assert len(other_optimizer.state_dict()["state"]) == len(list(other.parameters()))
    assert (other.head.weight is other.wte.weight) == tied
    assert manifest["step"] == 7 and manifest["val_loss"] == 1.5


def test_load_model_needs_no_settings_and_is_ready_to_evaluate(saved):
    run_dir, model, _ = saved
    loaded, source = load_model(run_dir, "cpu")
    assert loaded.cfg == SMALL and not loaded.training and source.manifest["step"] == 7
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.head.weight is loaded.wte.weight


def test_nothing_in_a_checkpoint_is_pickled_or_unpickled(saved, monkeypatch):
    run_dir, model, optimizer = saved

    def forbidden(*args, **kwargs):
        raise AssertionError("unpickles")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    load_checkpoint(newest_checkpoint(run_dir), model, optimizer)
    files = [p for p in newest_checkpoint(run_dir).rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".safetensors":  # length of a JSON header, and that header
            content = path.read_bytes()
            json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_a_tied_table_is_stored_once(saved):
    from safetensors import safe_open

    names = []
    for path in newest_checkpoint(saved[0]).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names += list(file.keys())
    assert "model.wte.weight" in names and "model.head.weight" not in names
    assert len(names) == len(set(names))


# ---- whole or not at all

def test_every_file_is_synced_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    synced, renamed, fsync, replace_ = set(), {}, os.fsync, os.replace

    def record_sync(handle):
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def record_rename(source, to):
        renamed[os.path.basename(to)] = set(synced)
        replace_(source, to)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    save_checkpoint(tmp_path, 7, *build(), {}, WORLD)
    manifest = read_manifest(newest_checkpoint(tmp_path))
    assert manifest["files"].keys() | {"manifest.json", ".step_00000007.partial"} <= renamed["step_00000007"]
    assert "ckpt" in synced  # the folder, or the new name itself could be lost


def test_an_unfinished_checkpoint_is_ignored_and_removed_by_the_next(saved):
    run_dir, model, optimizer = saved
    partial = run_dir / "ckpt" / ".step_00000009.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{")
    assert newest_checkpoint(run_dir).name == "step_00000007"
    save_checkpoint(run_dir, 11, model, optimizer, {}, WORLD)
    assert [p.name for p in checkpoints(run_dir)] == ["step_00000007", "step_00000011"]
    assert not partial.exists()


def test_a_checkpoint_is_never_overwritten(saved):
    run_dir, model, optimizer = saved
    file = next(newest_checkpoint(run_dir).glob("*.safetensors"))
    before = file.stat().st_ino
    saver = CheckpointWriter(run_dir, CheckpointConfig(), WORLD)
    saver.newest = 7  # as in a run that was resumed from it
    saver.save(7, *build(seed=3), {})
    saver.wait()
    with pytest.raises(ValueError, match="checkpoint of step 7 could not be written.*not empty"):
        save_checkpoint(run_dir, 7, *build(seed=3), {}, WORLD)
    assert file.stat().st_ino == before and not list((run_dir / "ckpt").glob(".*"))


def test_a_large_checkpoint_is_in_several_files_each_tensor_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 10_000)
    model, optimizer = build(steps=2)
    save_checkpoint(tmp_path, 7, model, optimizer, {}, WORLD)
    files = list(newest_checkpoint(tmp_path).glob("*.safetensors"))
    assert 5 < len(files) < 40 and read_manifest(newest_checkpoint(tmp_path))["files"].keys() == {f.name for f in files}
    other, other_optimizer = build(seed=2)
    load_checkpoint(newest_checkpoint(tmp_path), other, other_optimizer)
    assert same(model.state_dict(), other.state_dict())
    assert same(optimizer.state_dict()["state"], other_optimizer.state_dict()["state"])


def test_what_is_saved_is_the_model_at_that_moment_whatever_training_does_next(tmp_path):
    model, optimizer = build(steps=2)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    saver = CheckpointWriter(tmp_path, CheckpointConfig(), WORLD)
    saver.save(2, model, optimizer, {})
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    saver.wait()
    loaded, _ = load_model(tmp_path, "cpu")
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())


# ---- which ones stay

def kept(tmp_path, losses, **cfg):
    """Steps whose checkpoints are left after saving one for each of {step: val_loss}, as training does."""
    model, optimizer = build()
    for step, loss in losses.items():
        save_checkpoint(tmp_path, step, model, optimizer, {"val_loss": loss}, WORLD, **cfg)
    assert not list((tmp_path / "ckpt").glob(".*"))
    return [int(p.name[5:]) for p in checkpoints(tmp_path)]


def test_the_newest_checkpoints_stay(tmp_path):
    assert kept(tmp_path, dict.fromkeys(range(3, 18, 3)), keep_checkpoints=2) == [12, 15]


def test_the_best_checkpoint_stays_until_a_better_one(tmp_path):
    assert kept(tmp_path, {3: 2.0, 6: 1.0, 9: None, 12: 3.0, 15: 1.5}, keep_checkpoints=1) == [6, 15]


def test_every_nth_checkpoint_stays(tmp_path):
    assert kept(tmp_path, dict.fromkeys(range(2, 12, 2)), keep_checkpoints=1, keep_every=4) == [4, 8, 10]


# ---- damage

def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [
    flip_a_bit,
    lambda file: file.write_bytes(file.read_bytes()[:-5]),
    lambda file: file.unlink(),
    lambda file: file.write_bytes(b""),
], ids=["bit flip", "truncated", "missing", "empty"])  # fmt: skip
def test_damaged_tensors_are_named_and_the_checkpoint_before_is_taken(saved, spoil, capsys):
    run_dir, model, optimizer = saved
    file = next(newest_checkpoint(run_dir).glob("*.safetensors"))
    save_checkpoint(run_dir, 5, *build(steps=1), {}, WORLD)
    spoil(file)
    assert newest_checkpoint(run_dir).name == "step_00000005"
    told = capsys.readouterr().out
    assert told == (
        f"{file} is missing or damaged: checksum mismatch\ntaking step_00000005 instead\n"
    )
    spoil(next((run_dir / "ckpt/step_00000005").glob("*.safetensors")))
    with pytest.raises(ValueError, match="missing or damaged.*no other checkpoint; bring one back"):
        load_model(run_dir, "cpu")


def test_a_manifest_whose_numbers_have_changed_is_found_out(saved, capsys):
    run_dir, model, optimizer = saved
    save_checkpoint(run_dir, 9, model, optimizer, {"state": {"sequences_seen": 540}}, WORLD)
    manifest = newest_checkpoint(run_dir) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("540", "541"))
    assert newest_checkpoint(run_dir).name == "step_00000007"
    told = capsys.readouterr().out
    assert "manifest.json is damaged: checksum mismatch\ntaking step_00000007" in told


def test_a_checkpoint_under_another_steps_name_is_passed_over(saved, capsys):
    run_dir, *_ = saved
    shutil.copytree(newest_checkpoint(run_dir), run_dir / "ckpt/step_00000900")
    assert newest_checkpoint(run_dir).name == "step_00000007"
    assert "step_00000900 holds step 7; rename it" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"step": 7}'])
def test_a_damaged_manifest_is_refused(saved, content):
    run_dir, model, _ = saved
    manifest = newest_checkpoint(run_dir) / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(ValueError, match="no readable manifest.json"):
        newest_checkpoint(run_dir)


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(saved):
    other, _ = build(replace(SMALL, n_layer=2, bias=False))
    with pytest.raises(ValueError, match="bias True there, False here, n_layer 3 there, 2 here"):
        load_checkpoint(newest_checkpoint(saved[0]), other)


def test_a_checkpoint_with_model_settings_from_elsewhere_is_refused(saved):
    path = newest_checkpoint(saved[0]) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["n_expert"] = 8
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="n_expert"):
        load_model(saved[0], "cpu")


def test_folders_without_checkpoints_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="gone does not exist"):
        newest_checkpoint(tmp_path / "gone")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path)


# ---- read while a run goes on

def save_filled(run_dir, model, step):
    """Saves a checkpoint in which all weights are the step; the one before is removed."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
    save_checkpoint(run_dir, step, model, None, {}, WORLD, keep_checkpoints=1)


def is_whole(model, source):
    return all((p == source.manifest["step"]).all() for p in model.parameters())


def test_a_model_is_read_from_one_checkpoint_while_a_run_saves_and_removes_them(tmp_path):
    writing = build()[0]
    save_filled(tmp_path, writing, 1)
    for first in range(2, 42, 4):  # four checkpoints during each read, however fast the machine
        saves = [functools.partial(save_filled, tmp_path, writing, step) for step in range(first, first + 4)]
        thread = threading.Thread(target=lambda saves=saves: [save() for save in saves], daemon=True)
        thread.start()
        assert is_whole(*load_model(tmp_path, "cpu"))
        assert run_config(tmp_path) == SMALL
        thread.join()


def test_where_the_checkpoint_that_is_read_goes_the_newer_one_is_read(tmp_path):
    writing, steps = build()[0], itertools.count(2)
    save_filled(tmp_path, writing, 1)
    reads = []

    def use(source):
        reads.append(source.manifest["step"])
        if len(reads) < 3:
            source.read("wte.weight")
            save_filled(tmp_path, writing, next(steps))
        return {name: source.read(name) for name, _ in writing.named_parameters()}

    assert all((weight == 3).all() for weight in with_model(tmp_path, use).values()) and reads == [1, 2, 3]


def test_a_checkpoint_that_always_goes_ends_in_a_line(tmp_path):
    writing, steps = build()[0], itertools.count(2)
    save_filled(tmp_path, writing, 1)

    def use(source):
        save_filled(tmp_path, writing, next(steps))
        source.read("wte.weight")

    with pytest.raises(UserError, match="step_00000009 was removed while it was read; .* raise keep_checkpoints"):
        with_model(tmp_path, use)


def both_ranks_read(run_dir):
    """On each rank the steps that were read, where the checkpoint goes from under rank 1 alone."""
    reads = []
    with init_world(WorldConfig(device="cpu", precision="fp32")) as world:

        def use(source):
            source.read("wte.weight")
            reads.append(source.manifest["step"])
            world.gather(None)  # both have read
            if world.rank == 1 and len(reads) == 1:
                save_filled(run_dir, build()[0], 2)
                source.read("wte.weight")

        with_model(run_dir, use, world)
    return reads


def test_ranks_read_the_same_checkpoint_though_it_goes_from_under_one(tmp_path):
    save_filled(tmp_path, build()[0], 1)
    assert on_ranks(2, (both_ranks_read, tmp_path)) == [[[1, 2], [1, 2]]]


# ---- from elsewhere

def link_to_a_copy(path, elsewhere):
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def fifo(path, _):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name, spoil, told", [
    ("*.safetensors", fifo, "is no regular file"), ("manifest.json", fifo, "it is no regular file"),
    ("*.safetensors", link_to_a_copy, "is a link to .*, outside its folder"),
    ("*.safetensors", lambda path, _: (path.unlink(), path.symlink_to("/dev/zero")), "is a link to /dev/zero, outside"),
    ("manifest.json", lambda path, _: (path.unlink(), path.symlink_to("/dev/zero")), "it is no regular file"),
])  # fmt: skip
def test_a_checkpoint_of_other_things_than_files_is_refused_in_a_line(name, spoil, told, saved, tmp_path_factory):
    spoil(next(newest_checkpoint(saved[0]).glob(name)), tmp_path_factory.mktemp("elsewhere") / "file")
    with pytest.raises(UserError, match=told) as error:
        load_model(saved[0], "cpu")
    assert "\n" not in str(error.value)


def rewritten(path, **changes):
    """Writes other entries into a manifest that need no checksum."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    manifest.pop("checksum", None)
    (path / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


@pytest.mark.parametrize("changes, told", [
    ({"files": {"../../../x.safetensors": "0"}}, "'../../../x.safetensors', which is no name of a file beside it"),
    ({"model": {"vocab_size": 37, "n_layer": 10**9}}, "n_layer 1000000000"),
    ({"model": {"vocab_size": None}}, "'vocab_size' is None"), ({"step": -1}, "'step' is -1"),
    ({"model": {"vocab_size": 2**24, "n_embd": 2**20, "n_head": 1}}, r"holds \[64, 20\] for wte.weight, its model has"),
    ({"context": 0}, "'context' is 0"), ({"state": {"recent": [["x"]]}}, "is 'x', where there must be a number"),
])  # fmt: skip
def test_a_manifest_that_says_what_none_of_ours_says_is_refused_in_a_line(changes, told, saved):
    rewritten(newest_checkpoint(saved[0]), **changes)
    with pytest.raises(UserError, match=told) as error:
        load_model(saved[0], "cpu")
    assert "\n" not in str(error.value)


def test_a_run_without_settings_cannot_continue_and_says_so(tmp_path):
    data_dir, out_dir = write_data(tmp_path / "data"), tmp_path / "run"
    run(data_dir, out_dir, max_steps=1)
    for name in ("settings", "state", "scaler"):
        kept = (newest_checkpoint(out_dir) / "manifest.json").read_text()
        rewritten(newest_checkpoint(out_dir), **{name: None})
        with pytest.raises(UserError, match=f"where there must be an object with .*{name}"):
            run(data_dir, out_dir)
        (newest_checkpoint(out_dir) / "manifest.json").write_text(kept)
    state = json.loads(kept)["state"] | {"mood": "good"}
    rewritten(newest_checkpoint(out_dir), state=state)
    with pytest.raises(UserError, match="mood of its state is unknown here"):
        run(data_dir, out_dir)


def test_files_that_torch_cannot_read_are_refused_in_a_line(saved):
    """torch's CheckpointException is no Exception."""
    run_dir, model, optimizer = saved
    path = newest_checkpoint(run_dir)
    file = next(path.glob("*.safetensors"))
    for content, told in (
        (b"x" * 99, "header of more than"), ((9).to_bytes(8, "little") + b"{" * 9, "SafetensorError"),
        ((2).to_bytes(8, "little") + b"{}", "holds nothing for"),
    ):  # fmt: skip
        file.write_bytes(content)
        rewritten(path, files={file.name: hashlib.sha256(content).hexdigest()})
        with pytest.raises(UserError, match=told) as error:
            load_model(run_dir, "cpu")
        with pytest.raises(UserError, match="cannot be read"):
            load_checkpoint(path, model, optimizer)
        assert "\n" not in str(error.value)


# ---- settings, source and tokenizer of a run

def test_changes_are_listed_and_fixed_ones_refused_all_together():
    old, new = {"beta1": 0.9, "lr": 0.1, "gone": 5}, {"beta1": 0.8, "lr": 0.2, "fresh": 6}
    assert changed_settings(old, new) == ["beta1: 0.9 -> 0.8", "lr: 0.1 -> 0.2"]
    told = "n_layer: 3 -> 4; seed: 1 -> 2; use the old values, or a new run with --out_dir="
    with pytest.raises(UserError, match=told):
        changed_settings(old | {"n_layer": 3, "seed": 1}, new | {"n_layer": 4, "seed": 2})


def test_a_run_from_before_a_setting_has_trained_with_its_default():
    assert changed_settings({}, {"fim_rate": 0.0, "window": None, "fresh": 6}) == []
    with pytest.raises(UserError, match="here window: None -> 64; fim_rate: 0.0 -> 0.5; use the old values"):
        changed_settings({}, {"window": 64, "fim_rate": 0.5})


def test_source_is_kept_and_changed_files_are_named(tmp_path):
    root, out_dir = tmp_path / "project", tmp_path / "run"
    (root / "config").mkdir(parents=True)
    (root / "model.py").write_text("a = 1\n")
    (root / "config" / "p.py").write_text("b = 1\n")
    assert keep_source(out_dir, 0, root) == []
    assert keep_source(out_dir, 5, root) == []
    (root / "model.py").write_text("a = 2\n")
    assert keep_source(out_dir, 7, root) == ["model.py"]
    assert (out_dir / "source/step_00000000/model.py").read_text() == "a = 1\n"
    assert (out_dir / "source/step_00000007/config/p.py").read_text() == "b = 1\n"


def test_a_run_knows_its_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="no meta.json.*write one"):
        tokenizer_of(tmp_path)
    (tmp_path / "meta.json").write_text('{"tokenizer": "gpt2"}')
    assert tokenizer_of(tmp_path) == "gpt2"
    (tmp_path / "meta.json").write_text('{"tokenizer": "tokenizer.json"}')
    assert tokenizer_of(tmp_path) == str(tmp_path / "tokenizer.json")


def test_copies_under_other_names_are_no_checkpoints(saved):
    run_dir, _, _ = saved
    for name in ("step_best", "step_00000007_backup"):
        shutil.copytree(run_dir / "ckpt/step_00000007", run_dir / "ckpt" / name)
    assert [path.name for path in checkpoints(run_dir)] == ["step_00000007"]


def test_losses_that_are_no_numbers_and_damaged_manifests_are_never_the_best(tmp_path):
    assert kept(tmp_path, {1: float("nan"), 2: 2.0, 3: 1.0, 4: 3.0}, keep_checkpoints=1) == [3, 4]
    damaged = checkpoints(tmp_path)[0]
    (damaged / "manifest.json").write_text("{")
    remove_old_checkpoints(tmp_path, CheckpointConfig(keep_checkpoints=1))  # does not stop a run over an old one
    assert damaged not in checkpoints(tmp_path)


def test_a_tokenizer_that_is_not_the_datas_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "tokenizer.json", "tokenizer_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="not the tokenizer of the run's data"):
        tokenizer_of(tmp_path)
