"""What a run tells: the console, log.jsonl, curves.png and, if asked, wandb."""

import contextlib
import datetime
import importlib.util
import json
import math
import os
import platform
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

import cost
from config import ROOT, as_dict, as_preset
from hardware import peak_flops
from memory import held, memory, setup_here
from objective import head_share
from parallel import device_name, memory_bytes, peak_memory_gib, reset_peak_memory
from rundir import keep_source, keep_tokenizer, open_log, writing_to


class Log:
    """The log of a run, on all ranks alike; only rank 0 prints and writes.

    out_of_time says whether max_minutes are over, as of the last line.
    """

    def __init__(self, cfg, world, model, optimizer, micro_steps, last_step, bytes_per_token, state, changes):
        self.cfg, self.world, self.last_step, self.bytes_per_token = cfg, world, last_step, bytes_per_token
        self.out_dir, self.out_of_time, self.hours_before = Path(cfg.run.out_dir), False, state.hours
        self.head_share = head_share(cfg.model.objective, cfg.objective, cfg.data.seq_len)
        self.flops_per_token = cost.flops_per_token(cfg.model, cfg.data.seq_len, self.head_share)
        self.peak, self.peak_name = peak_flops(world.device, world.precision)
        reset_peak_memory(world.device)  # of the matmul that measured the peak
        of_rank = [world.worst(figure) for figure in held(optimizer)]
        self.predicted = memory(cfg.model, setup_here(cfg, world))
        self.has_told_memory = False
        self.file = self.wandb = None
        self.draws = world.is_main and importlib.util.find_spec("matplotlib") is not None
        if world.is_main:
            changed_files = self._open(state.step)
            self._tell_start(
                model, of_rank, micro_steps, state, changes + [f"changed source file: {name}" for name in changed_files]
            )
        self.started = self.interval_start = time.perf_counter()
        self.interval_step, self.waited = state.step, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.file:
            with contextlib.suppress(OSError):  # of a full disk, which has been told
                self.file.close()
        if self.wandb:
            self.wandb.finish(exit_code=1 if error[0] else 0)  # a second time does nothing

    @contextlib.contextmanager
    def paused(self):
        """Time that does not count as training in tokens/s."""
        self.world.synchronize()
        start = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - start

    def step(self, state, loss, grad_norm, lr, waited, wrong):
        """Counts a step; every log_interval steps, after the last, and where it is wrong, tells of it."""
        self.waited += waited
        if not self.has_told_memory:
            self._tell_memory()
        if wrong:
            self._print(f"{self._step_text(state)}  skipped, number {state.bad_steps} in a row: {wrong}")
        if state.step % self.cfg.train.log_interval and state.step != self.last_step and not wrong:
            return
        now, steps = time.perf_counter(), state.step - self.interval_step
        seconds, elapsed = now - self.interval_start, now - self.started
        tokens_per_s = steps * self.cfg.data.batch_tokens / seconds
        state.hours = self.hours_before + elapsed / 3600
        max_minutes = self.cfg.train.max_minutes
        self.out_of_time = max_minutes is not None and self.world.worst(elapsed) >= 60 * max_minutes
        record = {
            "step": state.step,
            "tokens": state.sequences_seen * self.cfg.data.seq_len,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self.flops_per_token / (self.peak * self.world.size),
            "data_wait_ms": self.world.worst(1e3 * self.waited / steps),
            "memory_gib": self.world.worst(peak_memory_gib(self.world.device)),
        }
        self.interval_start, self.interval_step, self.waited = now, state.step, 0.0
        if wrong:
            record["skipped"] = wrong
        self._write(record)
        left = (self.last_step - state.step) * seconds / steps
        self._print(
            f"{self._step_text(state)} {_short(record['tokens']):>6} tok  loss {loss:7.4f}  lr {lr:.1e}"
            f"  norm {record['grad_norm']:4.2f} {_short(tokens_per_s):>6} tok/s  mfu {record['mfu']:.1%}"
            f"  {record['memory_gib']:.1f} GiB  wait {record['data_wait_ms']:.0f} ms  left {_duration(left)}"
        )

    def evaluation(self, state, figures):
        """Tells of an evaluation and draws the curves anew."""
        record = {"step": state.step, **figures}
        text = f"{self._step_text(state)}  val loss {state.val_loss:.4f}"
        if self.cfg.model.objective == "mlm":
            text += f"  masked accuracy {figures['val_accuracy']:.1%}"
            text += f" (the commonest token alone {figures['val_accuracy_of_commonest']:.1%})"
        else:
            text += f"  perplexity {math.exp(min(state.val_loss, 700)):.5g}"  # beyond that a float has no room
            text += f"  accuracy {figures['val_accuracy']:.1%}"
        if self.bytes_per_token and self.cfg.model.objective == "clm":
            record["val_bpb"] = state.val_loss / math.log(2) / self.bytes_per_token
            text += f"  {record['val_bpb']:.4f} bits per byte"
        self._write(record)
        self._print(text)
        if self.draws and state.step:  # a single point is no curve
            with writing_to(self.out_dir):
                draw_curves(self.out_dir)

    def went_back(self, state):
        """Tells that the run goes on from a checkpoint, past the data of bad steps; drops lines past it."""
        if self.file:
            self.file.close()
            with writing_to(self.out_dir):
                self.file = open_log(self.out_dir, state.step)
        tokens = state.sequences_seen * self.cfg.data.seq_len
        self._write({"went_back_to": state.step, "step": state.step, "tokens": tokens})
        self._print(f"went back to step {state.step}, and goes on behind the data of the bad steps")
        self.interval_start, self.interval_step, self.waited = time.perf_counter(), state.step, 0.0

    def end(self, state, reached_target, stopped_by):
        """Tells how the run ended; the last line totals tokens and hours."""
        if not self.world.is_main:
            return
        state.hours = self.hours_before + (time.perf_counter() - self.started) / 3600
        if reached_target:
            how = f"finished, target_loss {self.cfg.train.target_loss} reached"
        elif state.step >= self.last_step:
            how = "finished"
        else:
            how = f"stopped {f'by {stopped_by}' if stopped_by else f'after max_minutes {self.cfg.train.max_minutes:g}'}"
            how += (
                ", the same command goes on" if self.cfg.run.save_interval else ", with nothing saved (save_interval)"
            )
        if how.startswith("finished"):
            with writing_to(self.out_dir):
                (self.out_dir / "finished").write_text(f"{how}\n")
                (self.out_dir / "stop").unlink(missing_ok=True)  # of who asked too late
        if self.wandb:  # which prints a summary of its own
            self.wandb.finish()
        loss = "" if state.val_loss is None else f", val loss {state.val_loss:.4f}"
        print(f"{how}: step {state.step} of {self.last_step}{loss}; the run is in {self.out_dir}")
        print(f"{state.sequences_seen * self.cfg.data.seq_len:,} tokens in {state.hours:.3f} hours", flush=True)

    def _open(self, step):
        """Makes the run's folder, or takes it up at a step; returns the source files that have changed since."""
        with writing_to(self.out_dir):
            self.out_dir.mkdir(parents=True, exist_ok=True)
            for name in ("finished", "stopped"):
                (self.out_dir / name).unlink(missing_ok=True)
            (self.out_dir / "config.py").write_text(as_preset(self.cfg))
            self.file = open_log(self.out_dir, step)
            keep_tokenizer(self.cfg.data.data_dir, self.out_dir)
            return keep_source(ROOT, self.out_dir, step)

    def _tell_start(self, model, of_rank, micro_steps, state, changes):
        cfg, world, device = self.cfg, self.world, device_name(self.world.device)
        if state.step:
            print(f"resumed from step {state.step}, after {state.hours:.3f} hours", *changes, sep="\n  ")
        if not self.draws:
            print("matplotlib is not installed, so there will be no curves.png")
        causal = cost.flops_per_token(cfg.model, cfg.data.seq_len, self.head_share, causal=True)
        print(
            f"model      {model.num_params():,} parameters, {self.flops_per_token / 1e6:,.1f} MFLOP a token"
            f" by PaLM's count" + (f", {causal / 1e6:,.1f} by the causal one" if cfg.model.objective == "clm" else "")
        )
        print(
            f"a step     {cfg.data.batch_tokens:,} tokens = {micro_steps} micro-steps x {world.data_ranks} ranks"
            f" x {cfg.data.micro_batch_size} sequences x {cfg.data.seq_len} tokens"
        )
        copies, shards, tp = (1, 1, 1) if world.mesh is None else world.mesh.shape
        print(
            f"layout     {copies} x {shards} x {tp} ranks: copies of the model x shards of a copy x tensor parallel\n"
            f"a rank     {of_rank[0]:,.0f} parameters, {of_rank[1] / 2**20:,.1f} MiB with gradients and optimizer state"
        )
        parts = ", ".join(f"{name} {n_bytes / 2**30:.2f}" for name, n_bytes in self.predicted.items() if n_bytes)
        there = memory_bytes(world.device) / 2**30
        print(f"memory     {sum(self.predicted.values()) / 2**30:.2f} GiB a rank predicted, of {there:.1f}: {parts}")
        print(
            f"the run    {self.last_step:,} steps, {self.last_step * cfg.data.batch_tokens:,} tokens, in {self.out_dir}"
        )
        print(
            f"device     {world.size} x {device}, {world.precision}; "
            f"mfu is of {self.peak / 1e12:.4g} TFLOP/s, {self.peak_name}",
            flush=True,
        )
        self._write({
            "start": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "step": state.step,
            "command": shlex.join(sys.argv),
            "changes": changes,
            "git_commit": git_commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "devices": f"{world.size} x {device}",
            "precision": world.precision,
            "peak_flops": self.peak,
            "peak_name": self.peak_name,
            "predicted_memory_gib": sum(self.predicted.values()) / 2**30,
        })  # fmt: skip
        if cfg.train.wandb:
            self.wandb = start_wandb(cfg, self.out_dir, state.step)

    def _tell_memory(self):
        """Tells, after the first step, what memory it took at the most."""
        seen = self.world.worst(peak_memory_gib(self.world.device))
        predicted = f"predicted {sum(self.predicted.values()) / 2**30:.2f}"
        of_process = "" if self.world.device.type == "cuda" else ", and the process has Python and torch beside it"
        self._print(f"memory     {seen:.2f} GiB seen after the first step ({predicted}{of_process})")
        self.has_told_memory = True

    def _step_text(self, state):
        return f"step {state.step:>{len(str(self.last_step))}}/{self.last_step}"

    def _write(self, record):
        if self.file:
            sound = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            with writing_to(self.out_dir):
                self.file.write(json.dumps(sound) + "\n")  # JSON has no NaN
                self.file.flush()
        if self.wandb:
            self.wandb.log(record)

    def _print(self, text):
        if self.world.is_main:
            print(text, flush=True)


def draw_curves(out_dir):
    """Draws training and validation loss of log.jsonl as curves.png."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in (out_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", {"linewidth": 1}), ("val_loss", "validation", {"marker": "o"})):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel="step", ylabel="loss, nats a token", title=out_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out_dir / ".curves.png", dpi=120)
    os.replace(out_dir / ".curves.png", out_dir / "curves.png")


def start_wandb(cfg, out_dir, step):
    """A wandb run under the id kept in out_dir; offline, and said so once, where the service is out of reach."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb is on, but not installed; pip install wandb, or --wandb=false") from error
    id_file = out_dir / "wandb_id"
    if step == 0 or not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    options = {
        "project": cfg.train.wandb_project,
        "name": cfg.train.wandb_run_name or out_dir.name,
        "id": id_file.read_text().strip(),
        "resume": "allow",
        "dir": str(out_dir),
        "config": as_dict(cfg),
    }
    try:
        run = wandb.init(**options, settings=wandb.Settings(init_timeout=30))
    except wandb.errors.Error as error:
        print(
            f"wandb is out of reach ({type(error).__name__}) and logs offline; "
            f"upload later: wandb sync {out_dir}/wandb/*",
            flush=True,
        )
        run = wandb.init(**options, mode="offline")
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def git_commit():
    """The commit of the code that runs, with + where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _duration(seconds):
    """A time in minutes and seconds, or hours and minutes: 3m07s, 12h34m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _short(count):
    """A count in four characters or so: 12.3M for 12,345,678."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return f"{count:.0f}"
