"""A run's state on disk: checkpoints, written while training continues.

out_dir/ckpt/step_00001000/ holds the tensors of model and optimizer as safetensors files, written by
torch.distributed.checkpoint, and manifest.json with everything else. A checkpoint appears under its name only when
it is whole. Its format is the same for one process and for many, and reading it unpickles nothing.
"""

import collections
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import foreign
from config import Config, Count, UserError
from data import sha256
from heads import TunedModel
from lora import AdaptedModel
from model import TRAINING_ONLY, ModelConfig
from world import Failure, cause_of, local, on_all_ranks

FILE_BYTES = 2**27
ATTEMPTS = 9  # to read a checkpoint, where a run that trains removes it meanwhile
COUNT, NUMBER = range(2**63), (float, None)
# Kinds of a manifest's values (see foreign.check)
MANIFEST = {
    "step!": COUNT, "files!": {"*": str}, "model!": dict, "context": range(1, 2**31), "checksum": str, "scaler": dict,
    "quantize": (str, None),
    "settings": {"seq_len": (range(1, 2**31), None), "init_from": (str, None)}, "val_loss": NUMBER, "score": NUMBER,
    "state": {"step": COUNT, "sequences_seen": COUNT, "hours": float, "val_loss": NUMBER, "score": NUMBER,
              "evaluated_at": (COUNT, None), "bad_steps": COUNT, "recent": [[float]], "went_back_to": (COUNT, None)},
}  # fmt: skip


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
        self.out_dir, self.cfg = out_dir, cfg
        self.world = replace(world, cpu_group=world.saver_group)  # its exchanges must not mix with the main thread's
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
        context = {"context": model.context} if hasattr(model, "context") else {}  # see context_of
        facts = {"model": asdict(model.cfg), **context, **facts}
        arguments = step, self._staged(tensors), file_numbers(tensors, self.world), facts
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
        # The ranks of a stage have the same unsharded tensors, and take turns.
        turn, ranks = itertools.count(self.world.rank), self.world.ranks_of_stage
        mine = {n: tensor for n, tensor in tensors.items() if hasattr(tensor, "placements") or next(turn) % ranks == 0}
        return self._stager.stage(mine)

    def _write(self, step, tensors, numbers, facts):
        try:
            write_checkpoint(self.out_dir, step, tensors, numbers, facts, self.world)
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
        total += local(tensor).nbytes // (1 if hasattr(tensor, "placements") else world.ranks_of_stage)
    # Rank 0 plans for all stages of a pipeline; else its own names are all there are.
    return dict(collections.ChainMap(*world.gather(numbers))) if world.pp > 1 else numbers


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


def remove_old_checkpoints(out_dir, cfg):
    """Removes all checkpoints but the newest keep_checkpoints, the best one and every keep_every-th."""
    paths = checkpoints(out_dir)
    best = best_of(paths)
    for path in paths[: -cfg.keep_checkpoints]:
        if path != best and not (cfg.keep_every and step_of(path) % cfg.keep_every == 0):
            # Renamed first: an interrupted removal must not leave half a checkpoint under a whole one's name.
            doomed = path.with_name(f".{path.name}.partial")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def best_of(paths):
    """The best of some checkpoints, by score where they have one, else by validation loss; None where none has any."""
    costs = {}
    for path in paths:
        with contextlib.suppress(UserError):  # a damaged manifest
            manifest = read_manifest(path)
            score = manifest.get("score")
            costs[path] = manifest.get("val_loss") if score is None else -score
    costs = {path: cost for path, cost in costs.items() if cost is not None and math.isfinite(cost)}
    return min(costs, key=costs.get, default=None)


class Removed(UserError):
    """A checkpoint was removed while it was read, as a run does that keeps only its newest ones."""


@contextlib.contextmanager
def reading(path):
    """Turns what is raised while a checkpoint is read into a UserError; Removed where it is no longer there."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        cause = cause_of(error)
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not Path(path).exists():
            remedy = "try again, or raise keep_checkpoints of the run that writes there"
            raise Removed(f"{path} was removed while it was read; {remedy}") from error
        if isinstance(cause, UserError):
            raise
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        raise UserError(f"{path} cannot be read ({reason}); name another checkpoint, or try again") from error


def read_manifest(path, *needed):
    """The manifest of a checkpoint; needed: names of entries that it must have beside those of every checkpoint."""
    file = Path(path) / "manifest.json"
    try:
        kinds = MANIFEST | {f"{name}!": MANIFEST[name] for name in needed}
        manifest = foreign.read_json(file, kinds, finite=False, has_paths=True)
        for name in manifest["files"]:
            foreign.check_name(name, file)
        return manifest
    except UserError as error:
        why = str(error).removesuffix(f"; {foreign.COPY_AGAIN}")
        raise UserError(f"{path} is damaged or not flatlm's: it has no readable manifest.json ({why})") from error


def newest_checkpoint(run_dir, world=None, best=False):
    """The newest checkpoint of a run, or the best, whose checksums match; prints which ones it skips.

    UserError where there is none. With a world, its ranks split the reading. Where a run that trains in run_dir removes
    a checkpoint meanwhile, the search begins again.
    """
    as_rank_0_sees = (lambda value: value) if world is None else (lambda value: world.gather(value)[0])
    for attempt in range(ATTEMPTS):
        paths, problems = as_rank_0_sees(checkpoints(run_dir)), []
        if best and (chosen := as_rank_0_sees(best_of(paths))):
            paths = [*(path for path in paths if path != chosen), chosen]
        if not paths:
            there = "does not exist" if not Path(run_dir).is_dir() else "holds no checkpoint (ckpt/step_*)"
            raise UserError(f"{run_dir} {there}; train.py makes one, in its out_dir")
        for path in reversed(paths):
            try:
                on_all_ranks(world, lambda path=path: _check(path, world))
            except Failure as error:
                if attempt + 1 < ATTEMPTS and not as_rank_0_sees(path.exists()):
                    break
                problems.append(str(error))
                continue
            if problems and (world is None or world.is_main):
                print(*problems, f"taking {path.name} instead", sep="\n", flush=True)
            return path
        else:
            break
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
    if manifest["step"] != step_of(path):
        raise UserError(f"{path} holds step {manifest['step']}; rename it, or give copies other names")
    files = manifest["files"]
    names = sorted({*files, *(file.name for file in path.glob("*.safetensors"))})
    for name in names if world is None else names[world.rank :: world.size]:
        file = path / name
        foreign.check_inside(file)
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is no regular file")
        if not file.exists() or sha256(file) != files.get(name):
            raise UserError(f"{file} is missing or damaged: checksum mismatch")
        with open(file, "rb") as content:
            if int.from_bytes(content.read(8), "little") > foreign.LARGEST_FILE:  # the length of a header in JSON
                raise UserError(f"{file} is damaged: it has a header of more than {foreign.LARGEST_FILE:,} bytes")


def load_checkpoint(path, model, optimizer=None):
    """Loads model and, if given, optimizer from a checkpoint in place, on any number of ranks; returns the manifest."""
    import torch.distributed.checkpoint as dcp

    manifest = read_manifest(path)
    wanted, found = asdict(model.cfg), asdict(config_of_checkpoint(path, manifest))
    names = [name for name in sorted(wanted.keys() - TRAINING_ONLY) if found[name] != wanted[name]]
    if differing := ", ".join(f"{name} {found[name]} there, {wanted[name]} here" for name in names):
        raise UserError(f"{path} holds another model: {differing}; give the same settings")
    _quieten()
    with reading(path):
        dcp.load(_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    model.context = context_of(manifest, model.cfg)
    return manifest


def tensor_reader(path, shapes):
    """A function from a parameter's name to its whole tensor on the CPU, read from a checkpoint.

    shapes: {name: shape} of its model's tensors. UserError, before any memory is taken, where the files lack them.
    """
    import torch.distributed.checkpoint as dcp

    _quieten()
    with reading(path):
        reader = dcp.HuggingFaceStorageReader(str(path))
        metadata = reader.read_metadata()
        reader.read_metadata = lambda: metadata  # otherwise dcp.load reads all files' headers for each tensor
        found = {name: [*tensor.size] for name, tensor in metadata.state_dict_metadata.items()}
        for name, shape in shapes.items():
            if (there := found.get(f"model.{name}", "nothing")) != shape:
                raise UserError(f"{path} holds {there} for {name}, its model has {shape}; {foreign.COPY_AGAIN}")
        n_bytes = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
        if sum(map(math.prod, shapes.values())) > n_bytes:  # a header may name shards that are not there
            raise UserError(f"{path} has files of {n_bytes:,} bytes, which do not hold its model; {foreign.COPY_AGAIN}")

    def read(name):
        tensor = torch.full(shapes[name], math.nan)  # a hole in the files must not pass for a weight
        with reading(path):
            dcp.load({f"model.{name}": tensor}, storage_reader=reader, no_dist=True)
        return tensor

    return read


def check_is_float(where, manifest):
    """UserError where a checkpoint's model is quantized."""
    if kind := manifest.get("quantize"):
        what = f"{where} is quantized to {kind}, for sample.py and evaluate.py alone"
        raise UserError(f"{what}; take the run that compress.py made it from")


def config_of_checkpoint(path, manifest):
    """The ModelConfig of a checkpoint; settings that did not exist when it was written have their defaults."""
    where, model = Path(path) / "manifest.json", manifest["model"]
    foreign.check(model, {"vocab_size!": int}, where)
    kind = TunedModel if "labels" in model else AdaptedModel if "lora_rank" in model else ModelConfig
    return foreign.settings_of(kind, model, where)


def context_of(manifest, cfg):
    """The longest sequence that a checkpoint's model, of settings cfg, saw in training, or its initial weights did.

    Nothing has trained learned positions beyond it, and rope's angles beyond it are unseen.
    """
    block_size, settings = cfg.block_size, manifest.get("settings", {})
    if "context" in manifest:
        return min(block_size, manifest["context"])
    seq_len = None if settings.get("init_from") else settings.get("seq_len")  # an older checkpoint
    return min(block_size, seq_len or block_size)


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
    if not hasattr(os, "O_NONBLOCK"):  # Windows: it opens no folders, and syncs what may be written
        if path.is_dir():
            return
        handle = os.open(path, os.O_RDWR)
    else:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    os.fsync(handle)
    os.close(handle)
