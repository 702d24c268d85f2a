"""Where a run stands, and how it gets there: resume from a checkpoint, save, roll back after bad steps."""

import dataclasses
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from checkpoint import (
    CheckpointWriter,
    check_is_float,
    checkpoints,
    file_numbers,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    set_aside,
    step_of,
    write_checkpoint,
)
from config import UserError, as_dict, preset_text
from data import is_same_data
from distill import DistillConfig
from mixture import shares_until
from model import ModelConfig
from objective import ObjectiveConfig
from run.folder import mark_finished, writing_to
from run.health import WINDOW, first_bad_tensor
from world import Failure, World, seed_step

AT_THE_START = ("init_from", "init_layers")  # settings that a resumed run does not read
OF_A_RUN = ("settings", "state", "scaler")  # entries of a manifest that a run needs to continue


@dataclass
class State:
    """The state of a run apart from its tensors; a checkpoint's manifest holds it under these names."""

    step: int = 0
    sequences_seen: int = 0
    hours: float = 0.0
    val_loss: float | None = None
    score: float | None = None  # the evaluation's metric, by which the best checkpoint is chosen; None: by val_loss
    evaluated_at: int | None = None
    bad_steps: int = 0  # skipped in a row
    recent: list = field(default_factory=list)  # (loss, gradient norm) of sound steps, the baseline for spikes
    went_back_to: int | None = None  # step of the checkpoint that the last rollback loaded

    def advance(self, cfg, loss, grad_norm, bad):
        """Counts a step; bad: why it was skipped, or None."""
        self.step += 1
        self.sequences_seen += cfg.data.batch_tokens // cfg.data.seq_len
        self.bad_steps = self.bad_steps + 1 if bad else 0
        if cfg.health.spike_z is not None and not bad and math.isfinite(grad_norm):
            self.recent = [*self.recent, (loss, grad_norm)][-WINDOW:]

    def has_reached_target(self, cfg):
        """Whether the last evaluation is at or below target_loss."""
        return None not in (cfg.train.target_loss, self.val_loss) and self.val_loss <= cfg.train.target_loss

    def tokens(self, cfg):
        """Training tokens so far."""
        return self.sequences_seen * cfg.data.seq_len

    def last_step(self, cfg):
        """Number of the run's last step."""
        return cfg.optim.last_step(cfg.data.batch_tokens, self.step, self.tokens(cfg))

    def is_at_end(self, cfg):
        """Whether the run has taken its last step."""
        return self.step >= self.last_step(cfg)

    def is_finished(self, cfg):
        """Whether the run has reached its last step or its target."""
        return self.is_at_end(cfg) or self.has_reached_target(cfg)


class Saver:
    """Saves a run and brings it back: its tensors and its State, on all ranks together."""

    def __init__(self, cfg, world, model, optimizer, scaler, data_fingerprint, teacher_fingerprint=None):
        self.cfg, self.world = cfg, world
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        fingerprints = {"data_fingerprint": data_fingerprint, "teacher_fingerprint": teacher_fingerprint}
        self.settings = as_dict(cfg) | fingerprints | {"ranks": world.size}
        self.settings = json.loads(json.dumps(self.settings))  # as a manifest has them: a schedule's steps as texts
        self.writer = CheckpointWriter(cfg.run.out_dir, cfg.checkpoint, world)
        self.changes = []  # lines `name: old -> new` of the settings that differ from the resumed run's

    def resume(self):
        """The State of the run's newest whole checkpoint, whose tensors are loaded; None where there is none."""
        with self.world.phase("reading the checkpoint"):
            if not (newest := self._newest()):
                return None
            if self.cfg.run.resume == "never":
                remedy = "use another --out_dir, or --resume=auto to continue"
                raise UserError(f"resume is never, and {self.cfg.run.out_dir} has checkpoints; {remedy}")
            check_is_float(newest, read_manifest(newest))
            manifest, step = read_manifest(newest, *OF_A_RUN), step_of(newest)
            old, seen = manifest["settings"], manifest["state"].get("sequences_seen", 0)
            per_step = self.cfg.data.batch_tokens // self.cfg.data.seq_len
            # After a rollback the data is further than the steps.
            self.changes = changed_settings(old, self.settings, max(step, math.ceil(seen / per_step)))
            if self.cfg.data.data_schedule and not old.get("data_schedule") and seen != step * per_step:
                rule = f"data_schedule counts steps of {per_step} sequences, but {step} steps have read {seen}"
                raise UserError(f"{rule}; go on without it, or start a new run by --init_from={self.cfg.run.out_dir}")
            return self._load(newest)

    def is_due(self, state, ending):
        """Whether to save: at the end and every save_interval steps, but not amid bad steps."""
        interval = self.cfg.checkpoint.save_interval
        on_time = interval and state.step % interval == 0 and not state.bad_steps
        return bool(interval and state.step and (ending or on_time))

    def save(self, state):
        """Starts to write a checkpoint."""
        facts = {
            "state": asdict(state),
            "settings": self.settings,
            "scaler": self.scaler.state_dict(),
            "val_loss": state.val_loss if state.evaluated_at == state.step else None,
            "score": state.score if state.evaluated_at == state.step else None,
        }
        self.writer.save(state.step, self.model, self.optimizer, facts)

    def roll_back(self, state, bad, repeat_step):
        """The State of the newest checkpoint, whose tensors are loaded, with the data position after the bad steps.

        UserError, with the first tensor that goes bad in repeat_step(), where there is no checkpoint, or where the run
        has been rolled back to it before. bad: why the last step was skipped.
        """
        self.writer.wait()
        newest = self._newest()
        if not newest or step_of(newest) == state.went_back_to:
            seed_step(self.cfg.run.seed, state.step - 1, self.world.rank)
            tensors = self.world.gather(first_bad_tensor(self.model, repeat_step))
            by_rank = [f"on rank {rank} {name}" for rank, name in enumerate(tensors) if name]
            tried = f"again after a rollback to {newest.name}" if newest else "with no checkpoint to roll back to"
            raise UserError(
                f"{state.bad_steps} steps in a row were skipped, the last one step {state.step} with {bad}, {tried}; "
                f"first bad tensor: {by_rank[0] if by_rank else 'none when the step was repeated'}; "
                f"lower learning_rate, or look at what computes that tensor"
            )
        back, kept = self._load(newest), {"sequences_seen": state.sequences_seen, "hours": state.hours}
        return dataclasses.replace(back, **kept, went_back_to=back.step, bad_steps=0)

    def _newest(self):
        """The newest whole checkpoint, as rank 0 sees the folder: a network file system may show others less."""
        found = self.world.gather(checkpoints(self.cfg.run.out_dir))[0]
        return newest_checkpoint(self.cfg.run.out_dir, self.world) if found else None

    def _load(self, path):
        if self.world.is_main:
            with writing_to(self.cfg.run.out_dir):
                set_aside(later for later in checkpoints(self.cfg.run.out_dir) if step_of(later) > step_of(path))
        manifest = load_checkpoint(path, self.model, self.optimizer)
        if manifest["scaler"]:
            self.scaler.load_state_dict(manifest["scaler"])
        self.writer.newest = step_of(path)
        if unknown := manifest["state"].keys() - {f.name for f in dataclasses.fields(State)}:
            raise UserError(
                f"{path}: {', '.join(sorted(unknown))} of its state is unknown here; use the code that wrote it"
            )
        return State(**manifest["state"])


def check_is_new(out_dir):
    """UserError where a folder holds a run."""
    if checkpoints(out_dir) or any((Path(out_dir) / name).exists() for name in ("config.py", "log.jsonl")):
        raise UserError(f"{out_dir} holds a run already; name another folder")


def write_run(out_dir, step, tensors, facts, preset):
    """Makes a folder a run that stands at a step; its config.py has the settings of preset, a dict.

    tensors: {name: tensor} by checkpoint.py's names; facts: entries of the manifest.
    """
    world = World(0, 1, torch.device("cpu"), "fp32")
    with writing_to(out_dir):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        try:
            write_checkpoint(out_dir, step, tensors, file_numbers(tensors, world), facts, world)
        except Failure as error:
            if error.is_of_disk:
                raise OSError(error) from error
            raise
        (Path(out_dir) / "config.py").write_text(preset_text(preset, {}), encoding="utf-8")


def changed_settings(old, new, step=0):
    """Lines `name: old -> new` of the settings that a run changes at a step; UserError where one must not change."""
    owners = ModelConfig, ObjectiveConfig, DistillConfig
    defaults = {f.name: f.default for owner in owners for f in dataclasses.fields(owner)}
    defaults["teacher_fingerprint"] = None
    fixed = {*defaults, "seq_len", "seed", "optimizer", "data_fingerprint"} - {"teacher", *AT_THE_START}
    fixed |= {"task", "batch_examples", "freeze", "lora_rank", "metric"}  # of fine-tuning
    old = defaults | old  # a run from before a setting has trained with its default
    changes = {name: f"{name}: {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]}
    if "data_fingerprint" in changes and is_same_data(str(old["data_fingerprint"]), new["data_fingerprint"]):
        del changes["data_fingerprint"]
    if shares_until(step, old) != shares_until(step, new):
        fixed |= {"data_dir", "data_schedule"}
    if old.get("data_schedule"):  # whose steps are so many sequences
        fixed.add("batch_tokens")
    if refused := "; ".join(line for name, line in changes.items() if name in fixed):
        rule = "a run cannot continue with another model, data, objective, seed or optimizer"
        raise UserError(f"{rule}; here {refused}; use the old values, or a new run with --out_dir=")
    return [f"{line}, without effect now" if name in AT_THE_START else line for name, line in changes.items()]


def print_finished(cfg, state, world, changes):
    """Says that a run has nothing left to do; marks it as finished where its last start could not.

    changes: lines that name what differs from the run that was resumed.
    """
    if world.is_main:
        if not (Path(cfg.run.out_dir) / "finished").exists():
            mark_finished(cfg, state)
        what = f"{cfg.run.out_dir} has finished, at step {state.step} with val loss {state.val_loss:.4f}"
        limit = "max_steps" if cfg.optim.max_tokens is None else "max_tokens"
        print(f"{what}; raise {limit} to train on, or use another --out_dir", *changes, sep="\n  ")
