"""A run on disk: save, resume, load.

out_dir/ckpt/step_00001000/ holds the tensors of model and optimizer as safetensors files, written by
torch.distributed.checkpoint, and manifest.json with everything else. It appears under its name only when it is whole,
is the same for one process and for many, and is read without unpickling anything.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from model import ModelConfig, Transformer


@dataclass(frozen=True)
class RunConfig:
    out_dir: str | None = None  # folder of the run; none: out/ and the last preset's name
    seed: int = 1337  # of initial weights, order of the data, and dropout
    resume: Literal["auto", "never"] = "auto"  # auto: go on from the newest checkpoint in out_dir; never: refuse to
    init_from: str | None = None  # folder of a run whose weights to start from
    save_interval: int | None = 1000  # steps between checkpoints, the last step is always saved; none: no checkpoints
    keep_checkpoints: int = 3  # newest checkpoints kept, beside the best by validation loss
    keep_every: int | None = None  # checkpoints of steps that this divides are kept for good

    def __post_init__(self):
        wrong = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("save_interval", "keep_checkpoints", "keep_every")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if not 0 <= self.seed < 2**63:
            wrong.append(f"seed is {self.seed}; it must be at least 0 and below 2**63")
        if wrong:
            raise ValueError("\n".join(wrong))


def checkpoints(out_dir):
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in Path(out_dir).glob("ckpt/step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))  # copies under other names are the user's own


@contextlib.contextmanager
def writing_to(out_dir):
    """Makes the system's errors while writing into a run's folder a ValueError that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"out_dir {out_dir} cannot be written to ({error}); use another --out_dir") from error


def check_shared(out_dir, world, patience=30):
    """ValueError, on all ranks, where out_dir is not one folder that all of them see within `patience` seconds."""
    if world.size == 1:
        return
    token = int(world.worst(secrets.randbelow(2**24) if world.is_main else 0))
    file = Path(out_dir) / f".seen_by_all_ranks_{token}"
    if world.is_main:
        with writing_to(out_dir):
            file.parent.mkdir(parents=True, exist_ok=True)
            for leftover in file.parent.glob(".seen_by_all_ranks_*"):  # of a check that was cut short
                leftover.unlink()
            file.touch()
    world.barrier()
    deadline = time.monotonic() + patience  # a network's file system may show it late
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    some_miss_it = world.worst(not seen)
    if world.is_main:
        file.unlink()
    if some_miss_it:
        raise ValueError(
            f"out_dir {out_dir} is not one folder for all {world.size} ranks: what rank 0 writes there, others do not "
            f"see; put it on a disk that all machines share"
        )


def save_checkpoint(out_dir, step, model, optimizer, facts, world):
    """Writes checkpoint `step`: beside its place, synced, then renamed. facts: what JSON can hold, for the manifest."""
    import torch.distributed.checkpoint as dcp  # here, since it takes half a second

    final = Path(out_dir) / "ckpt" / f"step_{step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    if final.exists():
        return
    if world.is_main:
        for leftover in final.parent.glob(".step_*.partial"):  # of a process that was killed
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    world.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
    with _quietly():
        dcp.save(_tensors(model, optimizer), storage_writer=writer)
    if world.is_main:
        files = {path.name: _sha256(path) for path in sorted(partial.glob("*.safetensors"))}
        manifest = {"step": step, "model": asdict(model.cfg), **facts, "files": files}
        with open(partial / "manifest.json", "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(partial)
        os.replace(partial, final)
        _sync_folder(final.parent)
    world.barrier()


def remove_old_checkpoints(out_dir, cfg):
    """Removes all checkpoints but the newest keep_checkpoints, the best by validation loss and every keep_every-th."""
    paths = checkpoints(out_dir)
    losses = {path: _val_loss(path) for path in paths}
    best = min((path for path in paths if losses[path] < math.inf), key=losses.get, default=None)
    for path in paths[: -cfg.keep_checkpoints]:
        if path != best and not (cfg.keep_every and int(path.name[5:]) % cfg.keep_every == 0):
            # Renamed first: a removal that is cut short must not leave half a checkpoint under a whole one's name.
            doomed = path.with_name(f".{path.name}.partial")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def _val_loss(path):
    """A checkpoint's validation loss; infinite where there is none, or no sound one."""
    try:
        loss = read_manifest(path).get("val_loss")
    except ValueError:  # damaged: a matter for those who want to read it
        loss = None
    return loss if loss is not None and math.isfinite(loss) else math.inf


def read_manifest(path):
    """The manifest of a checkpoint."""
    try:
        manifest = json.loads((Path(path) / "manifest.json").read_text(encoding="utf-8"))
        return {"files": manifest["files"], "model": manifest["model"], "step": manifest["step"], **manifest}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has no readable manifest.json ({type(error).__name__}: {error}); it is no checkpoint "
            f"of flatlm's, or damaged: remove it to go back to the one before"
        ) from error


def load_checkpoint(path, model, optimizer=None):
    """Reads model and, if given, optimizer from a checkpoint in place, on any number of ranks; returns the manifest."""
    import torch.distributed.checkpoint as dcp

    manifest = read_manifest(path)
    for name in sorted({*manifest["files"], *(file.name for file in Path(path).glob("*.safetensors"))}):
        file = Path(path) / name
        if not file.exists() or _sha256(file) != manifest["files"].get(name):
            raise ValueError(
                f"{file} is missing or damaged: its checksum is not the manifest's; "
                f"remove {path} to go back to the checkpoint before"
            )
    wanted, found = asdict(model.cfg), asdict(_model_config(path, manifest))
    differing = [
        f"{name} {found[name]} there, {wanted[name]} here"
        for name in sorted(wanted.keys() - {"dropout", "label_smoothing"})  # which have no weights
        if found[name] != wanted[name]
    ]
    if differing:
        raise ValueError(f"{path} is of another model: {', '.join(differing)}; give the same settings")
    with _quietly():
        dcp.load(_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    return manifest


def newest_checkpoint(run_dir):
    """The newest checkpoint of a run folder, for those who need one: ValueError where there is none."""
    paths = checkpoints(run_dir)
    if not paths:
        there = "does not exist" if not Path(run_dir).is_dir() else "holds no checkpoint of flatlm's (ckpt/step_*)"
        raise ValueError(f"{run_dir} {there}; train.py makes one, in its out_dir")
    return paths[-1]


def load_model(run_dir, device):
    """The model of a run's newest checkpoint, ready to evaluate, and the checkpoint's manifest."""
    path = newest_checkpoint(run_dir)
    manifest = read_manifest(path)
    with torch.device("meta"):
        model = Transformer(_model_config(path, manifest))
    model.to_empty(device=device)
    model.tie_weights()
    load_checkpoint(path, model)
    return model.eval(), manifest


def _model_config(path, manifest):
    """The settings of a checkpoint's model; those that are younger than it have their defaults."""
    if unknown := manifest["model"].keys() - {field.name for field in fields(ModelConfig)}:
        raise ValueError(
            f"{path} is of a model with settings that this code does not know: {', '.join(sorted(unknown))}"
        )
    return ModelConfig(**manifest["model"])


def changed_settings(old, new, fixed):
    """Lines `name: old -> new` of the settings that a resumed run changes; ValueError where `fixed` holds one."""
    changes = {name: f"{name}: {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]}
    refused = [line for name, line in changes.items() if name in fixed]
    if refused:
        raise ValueError(
            f"a run cannot go on with another model, data, objective, seed or optimizer; here {'; '.join(refused)}; "
            f"use the old values, or a new run with --out_dir="
        )
    return list(changes.values())


def keep_source(root, out_dir, step):
    """Copies the .py files that run into out_dir/source/, anew where some changed; names those that did."""
    files = {
        str(p.relative_to(root)): p for pattern in ("*.py", "config/*.py") for p in sorted(Path(root).glob(pattern))
    }
    kept = sorted((Path(out_dir) / "source").glob("step_*"))
    changed = [name for name, path in files.items() if kept and not _same(path, kept[-1] / name)]
    if changed or not kept:
        for name, path in files.items():
            copy = Path(out_dir) / "source" / f"step_{step:08d}" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    return changed


def keep_tokenizer(data_dir, out_dir):
    """Copies meta.json and the tokenizer's file from the data to the run, so that the run can be sampled from alone."""
    for name in ("meta.json", "tokenizer.json"):
        if (Path(data_dir) / name).exists():
            shutil.copyfile(Path(data_dir) / name, Path(out_dir) / name)


def tokenizer_of(run_dir):
    """What load_tokenizer calls the tokenizer of a run's data."""
    path = Path(run_dir) / "meta.json"
    if not path.exists():
        raise ValueError(
            f"{run_dir} has no meta.json, so its tokenizer is unknown: its data came from elsewhere; "
            f'write one, such as {{"tokenizer": "gpt2"}}, into {path}'
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        name, digest = meta["tokenizer"], meta.get("tokenizer_sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} names no tokenizer ({type(error).__name__}); write one, as in {{'tokenizer': 'gpt2'}}"
        ) from error
    if not name.endswith(".json"):
        return name
    file = path.with_name(name)
    if digest and not (file.exists() and _sha256(file) == digest):
        raise ValueError(
            f"{file} is missing or not the tokenizer that the data was made with; copy it from the data again"
        )
    return str(file)


def open_log(out_dir, step):
    """Opens log.jsonl to go on from a step: without what lies past it, or a line that was cut short.

    A run that starts anew keeps the log that it finds as log_1.jsonl, log_2.jsonl and so on.
    """
    path = Path(out_dir) / "log.jsonl"
    if path.exists() and step == 0:
        os.replace(path, next(p for i in itertools.count(1) if not (p := path.with_name(f"log_{i}.jsonl")).exists()))
    elif path.exists():
        partial = path.with_name(f".{path.name}")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        partial.write_text("".join(line for line in lines if _step_of(line) <= step), encoding="utf-8")
        os.replace(partial, path)
    return open(path, "a", encoding="utf-8")


@contextlib.contextmanager
def _quietly():
    """Without torch's warning, at each save and load, that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _step_of(line):
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _same(path, other):
    return other.exists() and path.read_bytes() == other.read_bytes()


def _tensors(model, optimizer):
    """{name: tensor} of all that a checkpoint holds; to load is to write into these very tensors."""
    tensors = {f"model.{name}": param.detach() for name, param in model.named_parameters()}  # tied ones once
    if optimizer is not None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        # This also makes the state of an optimizer that has not stepped yet.
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        tensors |= {f"optimizer.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
