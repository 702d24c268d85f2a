"""A run's state on disk: checkpoints, written while training continues.

out_dir/ckpt/step_00001000/ holds the tensors of model and optimizer as safetensors files, written by
torch.distributed.checkpoint, and manifest.json with everything else. A checkpoint appears under its name only when
it is whole. Its format is the same for one process and for many, and reading it unpickles nothing.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import threading
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from config import Config, Count, UserError
from data import sha256
from model import TRAINING_ONLY, ModelConfig
from world import local

FILE_BYTES = 2**27


@dataclass(frozen=True)
class CheckpointConfig(Config):
    save_interval: Count | None = 1000  # steps between checkpoints; the last step is always saved; none: no checkpoints
    keep_checkpoints: Count = 3  # newest checkpoints to keep, and the best by validation loss
    keep_every: Count | None = None  # keep for good the checkpoints whose step is a multiple of this


def checkpoints(out_dir):
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in Path(out_dir).glob("ckpt/step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=step_of)  # other names, such as copies, are the user's own


def step_of(path):
    """The step in a checkpoint's name."""
    return int(path.name[5:])


class CheckpointWriter:
    """Writes checkpoints in a thread while training continues: one at a time, each whole or absent."""

    def __init__(self, out_dir, cfg, world):
        self.out_dir, self.cfg, self.world = out_dir, cfg, world
        self.newest = 0  # step of the last checkpoint that is written or was loaded
        self.failed = None  # the error of a failed write on this rank; wait() raises it
        self._stager = self._thread = None

    def save(self, step, model, optimizer, facts):
        """Copies the tensors and starts to write them. facts: JSON values for the manifest."""
        if step == self.newest:
            return
        if self.world.is_main and self._thread and self._thread.is_alive():
            print(f"training waits for checkpoint {self.newest} to be written; a longer save_interval avoids that")
        self.wait()
        self.newest = step
        tensors = _tensors(model, optimizer)
        numbers, facts = file_numbers(tensors, self.world), {"model": asdict(model.cfg), **facts}
        arguments = step, self._staged(tensors), numbers, facts
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True, name="saver")
        self._thread.start()

    def wait(self):
        """Waits for the checkpoint that is being written; UserError, on all ranks, where that failed."""
        if self._thread:
            with self.world.phase("checkpoint", f"{self.newest} is being written"):
                self._thread.join()
            self._thread = None
        if isinstance(self.failed, Failure) and self.failed.is_of_disk:
            newest = next((path.name for path in reversed(checkpoints(self.out_dir))), "none")
            raise UserError(
                f"the checkpoint of step {self.newest} could not be written to {self.out_dir} ({self.failed}); "
                f"the newest whole one is {newest}: make room, then the same command continues"
            )
        if self.failed:
            raise self.failed

    def _staged(self, tensors):
        """CPU copy of this rank's shards and its share of unsharded tensors."""
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        if self._stager is None:  # on CUDA its memory is pinned, which takes long, and kept
            self._stager = BlockingAsyncStager(cache_staged_state_dict=self.world.device.type == "cuda")
        whole = [name for name, tensor in tensors.items() if not hasattr(tensor, "placements")]
        others = set(whole) - set(whole[self.world.rank :: self.world.size])
        return self._stager.stage({name: tensor for name, tensor in tensors.items() if name not in others})

    def _write(self, *arguments):
        try:
            write_checkpoint(self.out_dir, *arguments, self.world)
            on_all_ranks(self.world, lambda: self.world.is_main and remove_old_checkpoints(self.out_dir, self.cfg))
        except Exception as error:  # training raises it, whatever it is
            self.failed = error


def file_numbers(tensors, world):
    """{tensor's name: number of its file, from 1}, such that a rank's files have about FILE_BYTES each.

    torch builds a file in memory before it writes it, and holds Python's lock, training's too, for the last copy.
    """
    numbers, total = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + total // FILE_BYTES
        total += local(tensor).nbytes // (1 if hasattr(tensor, "placements") else world.size)
    return numbers


def write_checkpoint(out_dir, step, tensors, numbers, facts, world):
    """Writes checkpoint `step` under a temporary name, syncs it, renames it; Failure on all ranks where one fails."""
    import torch.distributed.checkpoint as dcp  # here, since it takes half a second

    _quieten()
    final = Path(out_dir) / "ckpt" / f"step_{step:08d}"
    partial = final.with_name(f".{final.name}.partial")

    def prepare():
        for leftover in final.parent.glob(".step_*.partial"):  # a killed process left it
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    def write():
        writer = dcp.HuggingFaceStorageWriter(str(partial), numbers, save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=world.cpu_group, no_dist=world.size == 1)
        return {path.name: sha256(path) for path in partial.glob(f"shard-{world.rank + 1:05d}-*.safetensors")}

    def finish():
        with contextlib.suppress(OSError):  # the log of the steps before, so that a power cut leaves both
            _sync(Path(out_dir) / "log.jsonl")
        manifest = {"step": step, **facts, "files": files}
        manifest["checksum"] = _checksum(manifest)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(partial / "manifest.json")
        _sync(partial)
        os.replace(partial, final)
        _sync(final.parent)

    try:
        on_all_ranks(world, lambda: world.is_main and prepare())
        files = {name: digest for by_rank in on_all_ranks(world, write) for name, digest in by_rank.items()}
        on_all_ranks(world, lambda: world.is_main and finish())
    except Failure:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise


class Failure(Exception):
    """An error of one rank, raised on all."""

    def __init__(self, text, is_of_disk):
        super().__init__(text)
        self.is_of_disk = is_of_disk


def on_all_ranks(world, function):
    """A list with each rank's function(); Failure on all ranks where one raised."""
    from torch.distributed.checkpoint import CheckpointException  # no subclass of Exception

    value = problem = None
    try:
        value = function()
    except (Exception, CheckpointException) as error:
        # torch.distributed.checkpoint wraps the errors of all ranks into one.
        cause = next((cause for cause, _ in getattr(error, "failures", {}).values()), error)
        is_plain = isinstance(cause, (OSError, ValueError))
        problem = str(cause) if is_plain else f"{type(cause).__name__}: {cause}", isinstance(cause, OSError)
    answers = [(value, problem)] if world is None else world.gather((value, problem))
    if problem := next((problem for _, problem in answers if problem), None):
        raise Failure(*problem)
    return [value for value, _ in answers]


def remove_old_checkpoints(out_dir, cfg):
    """Removes all checkpoints but the newest keep_checkpoints, the best by validation loss and every keep_every-th."""
    paths, losses = checkpoints(out_dir), {}
    for path in paths:
        with contextlib.suppress(UserError):  # a damaged manifest
            losses[path] = read_manifest(path).get("val_loss")
    losses = {path: loss for path, loss in losses.items() if loss is not None and math.isfinite(loss)}
    best = min(losses, key=losses.get, default=None)
    for path in paths[: -cfg.keep_checkpoints]:
        if path != best and not (cfg.keep_every and step_of(path) % cfg.keep_every == 0):
            # Renamed first: an interrupted removal must not leave half a checkpoint under a whole one's name.
            doomed = path.with_name(f".{path.name}.partial")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def read_manifest(path):
    """The manifest of a checkpoint."""
    try:
        manifest = json.loads((Path(path) / "manifest.json").read_text(encoding="utf-8"))
        return {"files": manifest["files"], "model": manifest["model"], "step": manifest["step"], **manifest}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged or not flatlm's: it has no readable manifest.json ({why})") from error


def newest_checkpoint(run_dir, world=None):
    """The newest checkpoint of a run whose checksums match; prints which ones it skips.

    UserError where there is none. With a world, its ranks split the reading.
    """
    paths = checkpoints(run_dir) if world is None else world.gather(checkpoints(run_dir))[0]
    if not paths:
        there = "does not exist" if not Path(run_dir).is_dir() else "holds no checkpoint (ckpt/step_*)"
        raise UserError(f"{run_dir} {there}; train.py makes one, in its out_dir")
    problems = []
    for path in reversed(paths):
        try:
            on_all_ranks(world, lambda path=path: _check(path, world))
        except Failure as error:
            problems.append(str(error))
            continue
        if problems and (world is None or world.is_main):
            print(*problems, f"taking {path.name} instead", sep="\n", flush=True)
        return path
    raise UserError("; ".join([*problems, f"{run_dir} has no other checkpoint; bring one back, or start a new run"]))


def set_aside(paths):
    """Renames damaged checkpoints, so that the run can write them again."""
    for path in paths:
        names = (path.with_name(f"damaged_{path.name}_{i}") for i in itertools.count(1))
        os.replace(path, next(name for name in names if not name.exists()))


def _check(path, world):
    """UserError where a file of this rank's share is missing or fails its checksum."""
    manifest = read_manifest(path)
    if "checksum" in manifest and _checksum(manifest) != manifest["checksum"]:  # older ones have none
        raise UserError(f"{path / 'manifest.json'} is damaged: checksum mismatch")
    files = manifest["files"]
    names = sorted({*files, *(file.name for file in path.glob("*.safetensors"))})
    for name in names if world is None else names[world.rank :: world.size]:
        if not (path / name).exists() or sha256(path / name) != files.get(name):
            raise UserError(f"{path / name} is missing or damaged: checksum mismatch")


def load_checkpoint(path, model, optimizer=None):
    """Loads model and, if given, optimizer from a checkpoint in place, on any number of ranks; returns the manifest."""
    import torch.distributed.checkpoint as dcp

    manifest = read_manifest(path)
    wanted, found = asdict(model.cfg), asdict(config_of_checkpoint(path, manifest))
    names = [name for name in sorted(wanted.keys() - TRAINING_ONLY) if found[name] != wanted[name]]
    if differing := ", ".join(f"{name} {found[name]} there, {wanted[name]} here" for name in names):
        raise UserError(f"{path} holds another model: {differing}; give the same settings")
    _quieten()
    dcp.load(_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    return manifest


def tensor_reader(path):
    """A function from a parameter's name to its whole tensor on the CPU, read from a checkpoint."""
    import torch.distributed.checkpoint as dcp

    _quieten()
    reader = dcp.HuggingFaceStorageReader(str(path))
    metadata = reader.read_metadata()
    reader.read_metadata = lambda: metadata  # otherwise dcp.load reads all files' headers for each tensor

    def read(name):
        tensor = torch.empty(metadata.state_dict_metadata[f"model.{name}"].size)
        dcp.load({f"model.{name}": tensor}, storage_reader=reader, no_dist=True)
        return tensor

    return read


def config_of_checkpoint(path, manifest):
    """The ModelConfig of a checkpoint; settings that did not exist when it was written have their defaults."""
    if unknown := manifest["model"].keys() - {field.name for field in fields(ModelConfig)}:
        raise UserError(f"{path} holds a model with settings that are unknown here: {', '.join(sorted(unknown))}")
    return ModelConfig(**manifest["model"])


def _quieten():
    """Mutes torch's warning, at each save and load of one process, that torch.distributed is not initialized."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def _checksum(manifest):
    """The checksum of a manifest, over all its other entries."""
    text = json.dumps({name: value for name, value in manifest.items() if name != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _tensors(model, optimizer):
    """{name: tensor} of a checkpoint's content; loading writes into these tensors."""
    tensors = {f"model.{name}": param.detach() for name, param in model.named_parameters()}  # tied ones once
    if optimizer is not None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        # torch creates the state of a new optimizer by a step, which that state then counts.
        is_new = not optimizer.state
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        for of_param in optimizer.state.values() if is_new else ():
            if "step" in of_param:
                of_param["step"].zero_()
        tensors |= {
            f"optimizer.{name}": value
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and name.startswith("state.")  # a learning rate may be a tensor too
        }
    return tensors


def _sync(path):
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
