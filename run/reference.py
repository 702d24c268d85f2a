"""Reference curves: validation losses of another run, with which a run's own are compared at the same step."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import foreign
from config import ROOT, UserError, as_dict
from run.folder import read_log
from shards import read_meta

FAR = 0.1  # of the reference's loss: a run further off hears of usual causes
CAUSES = {
    "above": "a changed learning rate, warm-up or model size, skipped steps, or an edit of the model or the objective",
    "below": "validation text that the training data has too, targets that the model can see, or a larger model",
}

# What two runs share where their losses are comparable at the same step: settings, and how the data was made.
SETTINGS = ("objective", "mask_prob", "vocab_size", "seq_len", "batch_tokens", "eval_tokens", "init_from", "teacher")
OF_DATA = ("dataset", "tokenizer", "val_fraction")
CURVE = {"source!": str, "hardware!": str, "comparable!": dict, "val_loss!": [[float]], "note": str}


@dataclass(frozen=True)
class Curve:
    """Validation losses of a run, [(step, loss)] by step."""

    name: str
    points: list

    def at(self, step):
        """The loss at a step, interpolated along the logarithm of the steps; None past the end.

        Also None between the first two points: there the loss falls too fast.
        """
        for (a, left), (b, right) in zip(self.points[1:], self.points[2:]):
            if a < step < b:
                return left + (right - left) * math.log((1 + step) / (1 + a)) / math.log((1 + b) / (1 + a))
        return dict(self.points).get(step)

    def until(self, step):
        """The points up to a step, the last one interpolated."""
        end = [(step, loss)] if (loss := self.at(step)) is not None else []
        return [point for point in self.points if point[0] < step] + end


class Reference:
    """The curve that a run is compared with: its setting `reference`, or else the one of its preset's name.

    curve: None where there is none, or where it is not comparable. line: what the console says about it. shared:
    {name: value} of what makes this run comparable.
    """

    def __init__(self, cfg):
        self.shared, self.curve, self.line, self._was_far = comparable(cfg), None, "", False
        name = cfg.log.reference or (f"docs/curves/{Path(cfg.presets[-1]).stem}.json" if cfg.presets else "")
        path = Path(cfg.log.reference or ROOT / name)
        if not cfg.log.reference and not path.is_file():
            return
        curve = curve_of(path) if path.is_dir() else foreign.read_json(path, CURVE)
        theirs, points = curve["comparable"], sorted(map(tuple, curve["val_loss"]))
        if len(points) < 2 or {*map(len, points)} != {2}:
            raise UserError(f"{path}: val_loss must be two or more pairs, [[step, loss], ...]")
        differs = [f"{k} is {self.shared.get(k)}, there {v}" for k, v in theirs.items() if self.shared.get(k) != v]
        if differs:
            self.line = f"reference  {name} is not compared: {'; '.join(differs)}\n"
        else:
            self.curve, note = Curve(name, points), f"; {curve['note']}" if "note" in curve else ""
            self.line = f"reference  {name}: val loss {points[-1][1]:.4f} at step {points[-1][0]:.0f}{note}\n"

    def beside(self, state):
        """An evaluation's figures for the log, its text, and a warning, the first time that the run is far off."""
        there = self.curve and self.curve.at(state.step)
        if there is None or state.val_loss is None:
            return {}, "", None
        off, warning = state.val_loss / there - 1, None
        if abs(off) > FAR and not self._was_far:
            self._was_far, side = True, "above" if off > 0 else "below"
            warning = f"warning    that is {abs(off):.0%} {side} {self.curve.name}; usual causes: {CAUSES[side]}"
        gap = round(state.val_loss - there, 2) + 0.0  # never -0.00
        return {"reference_loss": there}, f"  {gap:+.2f} of the reference", warning


def comparable(cfg):
    """{name: value} of all that a run must share with another for their losses at a step to be comparable."""
    settings = as_dict(cfg)
    shared = {name: settings.get(name) for name in SETTINGS}
    if len(cfg.data.folders) == 1:  # a mixture is no dataset with a name
        made = read_meta(cfg.data.folder).get("settings", {})
        shared |= {name: made.get(name) for name in OF_DATA}
        if (Path(cfg.data.folder) / "fineweb_val_000000.bin").exists():  # ours, llm.c's or modded-nanogpt's
            shared["dataset"] = "fineweb10b"
    return json.loads(json.dumps(shared))  # as it is read again


def curve_of(run_dir):
    """The content of a curve's file, from the log of a run; UserError where it has too little."""
    try:
        records = [record for _, record in read_log(Path(run_dir) / "log.jsonl") if record]
    except OSError as error:
        raise UserError(f"{run_dir} has no log ({error}); name the folder of a run") from error
    starts = [record for record in records if record.get("comparable")]
    losses = {r["step"]: round(r["val_loss"], 4) for r in records if isinstance(r.get("val_loss"), float)}
    if not starts or len(losses) < 2:
        rule = f"tells {len(starts)} times what it is comparable with, and has {len(losses)} evaluations"
        raise UserError(f"the log of {run_dir} {rule}; a curve needs 1 and 2: train with this version")
    source = f"{starts[-1].get('command')}, commit {starts[-1].get('git_commit')}"
    curve = {"source": source, "hardware": str(starts[-1].get("devices")), "comparable": starts[-1]["comparable"]}
    return foreign.check(curve | {"val_loss": [[*point] for point in sorted(losses.items())]}, CURVE, run_dir)


def write_curve(run_dir, path):
    """Writes a run's curve as a JSON file, such as docs/curves/NAME.json for a preset of that name."""
    if run_dir is None:
        raise UserError("out_dir is none; name the folder of a run, as in --out_dir=out/quickstart")
    text = re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", json.dumps(curve_of(run_dir), indent=1))
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"to_curve {path} cannot be written ({error}); name another file") from error
    print(f"{run_dir}: written to {path}")
