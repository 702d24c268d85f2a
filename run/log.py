"""The log of a run: the console, log.jsonl, curves.png, report.html and, if asked, TensorBoard and wandb."""

import contextlib
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from config import Config, Count, UserError, as_dict, as_preset, visible
from console import report
from devices import device_name, memory_bytes, peak_memory_gib, reset_peak_memory
from objective import windows_of
from perf import cost
from perf.hardware import peak_flops
from perf.memory import memory, params_and_bytes, setup_here, stages_here
from pipeline import bubble
from run.curves import draw_curves
from run.dashboards import DASHBOARDS
from run.folder import git_commit, keep_source, keep_tokenizer, mark_finished, open_log, read_log, writing_to
from run.pace import Pace
from run.page import write_page
from run.reference import Reference

LEAST_GIB = 0.1  # memory below it prints in MiB


@dataclass(frozen=True)
class LogConfig(Config):
    log_interval: Count = 10  # steps between lines of the log
    log_to: tuple | None = None  # dashboards to log to as well: tensorboard, wandb, or both with a comma between them
    wandb_project: str = "flatlm"  # project on Weights & Biases
    wandb_run_name: str | None = None  # name of the run there; none: the name of out_dir
    reference: str | None = None  # curve to compare with: a run's folder or a file of docs/curves; none: the preset's

    def __post_init__(self):
        super().__post_init__()
        if unknown := [name for name in self.log_to or () if name not in DASHBOARDS]:
            raise UserError(f"log_to names {', '.join(unknown)}; it must be {', '.join(DASHBOARDS)}, or none")


class Log:
    """The log of a run, on all ranks alike; only rank 0 prints and writes."""

    def __init__(self, cfg, world, model, optimizer, state, changes, order):
        """changes: lines that name what differs from the run that was resumed."""
        self.cfg, self.world, self.order = cfg, world, order
        self.out_dir, self.hours_before = Path(cfg.run.out_dir), state.hours
        self.head_share = windows_of(cfg.model.objective).head_share(cfg.objective, cfg.data.seq_len)
        self.flops_per_token = cost.flops_per_token(cfg.model, cfg.data.seq_len, self.head_share)
        self.peak, self.peak_name = peak_flops(world.device, world.precision)
        reset_peak_memory(world.device)  # the matmul that measured the peak had its own
        per_rank = [world.worst(figure) for figure in params_and_bytes(optimizer)]
        setup = setup_here(cfg, world, model.teacher and model.teacher.cfg)
        self.predicted = {k: n / 2**30 for k, n in memory(cfg.model, setup).items() if n}  # GiB
        self.stage, self.n_losses = getattr(model, "stage", None), len(model.objectives)
        self.pace = Pace(model, world)
        self.n_steps, self.file, self.unwritten, self.dashboards, self.failed = 0, None, b"", {}, set()
        self.draws = world.is_main and importlib.util.find_spec("matplotlib") is not None
        self.reference = None
        if world.is_main:
            changes = changes + [f"changed source file: {name}" for name in self._open(state.step)]
            self._print_start(model, per_rank, state, changes, order)
            with self.telling("reference"):
                self.reference = Reference(cfg)
                print(self.reference.line, end="", flush=True)
            self._write({
                "start": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
                "step": state.step,
                "command": shlex.join(sys.argv),
                "changes": changes,
                "git_commit": git_commit(),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "devices": f"{world.size} x {device_name(world.device)}",
                "precision": world.precision,
                "peak_flops": self.peak,
                "peak_name": self.peak_name,
                "predicted_memory_gib": sum(self.predicted.values()),
                "comparable": self.reference and self.reference.shared,
            })  # fmt: skip
            for name in cfg.log.log_to or ():
                with self.telling(name):
                    self.dashboards[name] = DASHBOARDS[name](cfg.log, as_dict(cfg), self.out_dir, state.step)
        self.started = time.perf_counter()
        self._start_interval(state, self.started)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._write_lines()
        if error[0]:
            self._draw(f"ended by {error[0].__name__}: {error[1]}", with_curves=False)
        if self.file:
            with contextlib.suppress(OSError):  # a disk that fails, which was reported before
                self.file.close()
        self._to_dashboards(lambda dashboard: dashboard.finish(failed=bool(error[0])))

    @contextlib.contextmanager
    def telling(self, what):
        """A context for what only tells of the run: where it fails, that is said once, and the run goes on."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # disks, services, and whatever a library raises
            if what not in self.failed:
                self.failed.add(what)
                why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                report(f"warning: {what} failed ({why}); the run goes on without")

    @property
    def is_out_of_time(self):
        """Whether max_minutes are over on this rank; not before the first step, so that each start gets further."""
        minutes = self.cfg.train.max_minutes
        return minutes is not None and self.n_steps > 0 and time.perf_counter() - self.started >= 60 * minutes

    @contextlib.contextmanager
    def paused(self):
        """Excludes time from tokens/s."""
        self.world.synchronize()
        start = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - start

    def step(self, state, loss, grad_norm, lr, waited, bad):
        """Counts a step; logs every log_interval steps, at the end, and bad ones, with the mean loss since the last."""
        now = time.perf_counter()
        state.hours = self.hours_before + (now - self.started) / 3600
        self.waited += waited
        self.pace.step()
        if not bad:
            self.losses.append(loss)
        if self.n_steps == 0:  # the largest peak comes early
            peak = _memory(self.world.worst(peak_memory_gib(self.world.device)))
            process = "" if self.world.device.type == "cuda" else "; the process holds Python and torch as well"
            predicted = _memory(sum(self.predicted.values()))
            self._print(f"memory     {peak} peak after the first step ({predicted} predicted{process})")
            if self.cfg.parallel.compiles(self.world.device.type):
                self._print(f"compiled   in the first step, which took {_duration(now - self.interval_start)}")
        self.n_steps += 1
        if bad:
            self._print(f"{self._step_text(state)}  skipped, number {state.bad_steps} in a row: {bad}")
        if state.step % self.cfg.log.log_interval and not state.is_at_end(self.cfg) and not bad:
            return
        steps, seconds = state.step - self.interval_step, now - self.interval_start
        tokens_per_s = steps * self.cfg.data.batch_tokens / seconds
        paces, stragglers = self.pace.figures(state.step)
        parts = {  # of several objectives
            f"mean_loss_{name}": statistics.fmean(past.parts[name] for past in self.losses or [loss])
            for name in (loss.parts if self.n_losses > 1 else ())
        }
        record = {
            "step": state.step,
            "tokens": state.tokens(self.cfg),
            "loss": loss,
            "mean_loss": statistics.fmean(self.losses) if self.losses else loss,  # over the steps since the last line
            **parts,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self.flops_per_token / (self.peak * self.world.size),
            "data_wait_ms": self.world.worst(1e3 * self.waited / steps),
            **({"stage_wait_ms": [1e3 * s / steps for s in self._waits_of_stages()]} if self.world.pp > 1 else {}),
            "memory_gib": self.world.worst(peak_memory_gib(self.world.device)),
            **paces,
        }
        if len(epochs := self.order.epochs(state.sequences_seen)) > 1:
            record["epochs"] = epochs
        self._start_interval(state, now)
        self._write(record | ({"skipped": bad} if bad else {}))
        left = (state.last_step(self.cfg) - state.step) * seconds / steps
        self._print(
            f"{self._step_text(state)} {_short(record['tokens']):>5} tok  loss {record['mean_loss']:7.4f}"
            f"{_named(parts, 'mean_loss_')}  lr {lr:.1e}"
            f"  norm {grad_norm:4.2f}  {_short(tokens_per_s):>5} tok/s  mfu {record['mfu']:.1%}"
            f"  {_memory(record['memory_gib'], 1)}  wait {record['data_wait_ms']:.0f}ms  left {_duration(left)}"
        )
        for line in stragglers:
            self._print(line)

    def evaluation(self, state, figures, watch=None):
        """Logs an evaluation, compares it with the reference, and redraws the curves and the page.

        watch: a Watch, which looks into the model; where it fails on one rank, none runs it again.
        """
        record, accuracy = {"step": state.step, **figures}, f"accuracy {figures.get('val_accuracy', 0):.1%}"
        text = f"{self._step_text(state)}  val loss {state.val_loss:.4f}{_named(figures, 'val_loss_')}"
        if "val_accuracy" not in figures:  # of fine-tuning
            text += "".join(
                f"  {name} {value:.4f}" for name, value in figures.items() if name not in ("val_loss", "score")
            )
        elif self.cfg.model.is_causal:
            loss = figures.get("val_loss_clm", state.val_loss)
            text += f"  perplexity {math.exp(min(loss, 700)):.5g}  {accuracy}"  # exp(710) overflows
            if "val_bpb" in figures:
                text += f"  {figures['val_bpb']:.4f} bits per byte"
        else:
            text += f"  masked {accuracy} (the most frequent token alone {figures['val_accuracy_of_commonest']:.1%})"
        for name in [*self.cfg.model.objectives][1:]:
            text += f"  {name} accuracy {figures[key]:.1%}" if (key := f"val_accuracy_{name}") in figures else ""
        text += "".join(f"  {loss:.4f} in {folder}" for folder, loss in figures.get("val_losses", {}).items())
        text += "".join(f"  {name} {value:.4f}" for name, value in figures.items() if "/" in name)  # tasks' figures
        beside, beside_text, warning = {}, "", None
        if self.reference:
            with self.telling("reference"):
                beside, beside_text, warning = self.reference.beside(state)
        self._write(record | beside)
        self._print(text + beside_text)
        if warning:
            self._print(warning)
        if watch and not self.world.worst("watch" in self.failed):
            self._look(state, watch)
        self._draw(f"running: {self._step_text(state)}", with_curves=state.step > 0)  # a single point is no curve

    def _draw(self, how, with_curves=True):
        """Redraws curves.png and report.html. how: how the run stands, in words."""
        if self.world.is_main:
            records = []
            with self.telling("log.jsonl"):
                records = [record for _, record in read_log(self.out_dir / "log.jsonl") if record]
            if self.draws and with_curves:
                with self.telling("curves.png"):
                    draw_curves(self.out_dir, records, self.reference and self.reference.curve)
            with self.telling("report.html"):
                write_page(self.out_dir, records, how, self.reference and self.reference.curve)

    def _look(self, state, watch):
        """Logs what a Watch finds in the model, on all ranks."""
        with self.telling("watch"), self.world.phase("evaluation"):
            if found := watch():
                self._write({"step": state.step, **found})
            self.pace.spans.clear()  # of watch's own forward
            for name, text in found.items():
                if isinstance(text, str):
                    self._print(f"{self._step_text(state)}  {name}  {visible(text)}")

    def rolled_back(self, state):
        """Logs a rollback, and drops the lines of log.jsonl past its checkpoint."""
        if self.file:
            with self.telling("log.jsonl"):
                self.file.close()
                self.file, self.unwritten = open_log(self.out_dir, state.step), b""
        self._to_dashboards(lambda dashboard: dashboard.go_back(state.step))
        self._write({"went_back_to": state.step, "step": state.step, "tokens": state.tokens(self.cfg)})
        self._print(f"rolled back to step {state.step}; training continues with the data after the bad steps")
        self._start_interval(state, time.perf_counter())

    def end(self, state, stop):
        """Reports how the run ended. stop: the Stop that ended it, if any."""
        if not self.world.is_main:
            return
        state.hours = self.hours_before + (time.perf_counter() - self.started) / 3600
        is_finished = state.is_finished(self.cfg)
        if is_finished:
            how = mark_finished(self.cfg, state)
            with self.telling("stop"):
                (self.out_dir / "stop").unlink(missing_ok=True)  # a request that came too late
        else:
            out_of_time = f"after max_minutes {self.cfg.train.max_minutes}"
            names = {"OUT_OF_TIME": out_of_time, "FILE": f"by {self.out_dir / 'stop'}"}
            how = f"stopped {names.get(stop.name, f'by {stop.name}')}"
        self._to_dashboards(lambda dashboard: dashboard.finish())  # wandb prints a summary of its own
        loss = "" if state.val_loss is None else f", val loss {state.val_loss:.4f}"
        print(f"{state.tokens(self.cfg):,} tokens in {_duration(3600 * state.hours)}")
        of_steps = f"step {state.step} of {state.last_step(self.cfg)}"
        print(f"{how}: {of_steps}{loss}; the run is in {self.out_dir}", flush=True)
        self._draw(f"{how}: {of_steps}", with_curves=False)
        if not is_finished:
            saved = self.cfg.checkpoint.save_interval
            more = "the same command continues" if saved else "nothing is saved (save_interval is none)"
            print(f"the model is unfinished; {more}", flush=True)

    def _waits_of_stages(self):
        """Seconds since the last line in which each stage waited for its neighbours, on the rank that waited longest."""
        by_rank, n = self.world.gather(self.stage.seconds_waited()), self.world.ranks_of_stage
        return [max(by_rank[i : i + n]) for i in range(0, self.world.size, n)]

    def _start_interval(self, state, now):
        """Starts the interval that the next line of the log is about."""
        self.interval_start, self.interval_step, self.waited, self.losses = now, state.step, 0.0, []

    def _open(self, step):
        """Makes the run's folder, or reopens it at a step; returns the source files that have changed since."""
        with writing_to(self.out_dir):
            self.out_dir.mkdir(parents=True, exist_ok=True)
            for name in ("finished", "stopped"):
                with contextlib.suppress(IsADirectoryError):  # by `mkdir stop`
                    (self.out_dir / name).unlink(missing_ok=True)
            partial = self.out_dir / ".config.py"
            partial.write_text(as_preset(self.cfg), encoding="utf-8")
            os.replace(partial, self.out_dir / "config.py")
            with self.telling("log.jsonl"):
                self.file = open_log(self.out_dir, step)
            keep_tokenizer(self.cfg.data.folder, self.out_dir)
            return keep_source(self.out_dir, step)

    def _print_start(self, model, per_rank, state, changes, order):
        """Prints what trains where, and for how long. per_rank: parameters and bytes of the fullest rank."""
        cfg, world, data = self.cfg, self.world, self.cfg.data
        if state.step:
            print(f"resumed from step {state.step}, after {_duration(3600 * state.hours)}", *changes, sep="\n  ")
        if not self.draws:
            print("matplotlib is not installed, so there will be no curves.png")
        if cfg.model.is_causal and order.split and not order.split.token_bytes:
            unknown = f"{data.folder} has no token_bytes in a meta.json; prepare.py writes them"
            changed = "the data's tokenizer changes text, so a token stands for no fixed number of bytes"
            print(f"no bits per byte: {unknown if order.split.token_bytes is None else changed}")
        flops = f"{self.flops_per_token / 1e6:,.1f} MFLOPs per token by PaLM's count"
        if cfg.model.is_causal:
            causal = cost.flops_per_token(cfg.model, data.seq_len, self.head_share, causal=True)
            flops += f", {causal / 1e6:,.1f} by the causal count"
        print(f"model      {model.num_params():,} parameters, {flops}")
        micro_steps = data.batch_tokens // (data.micro_batch_size * data.seq_len * world.data_ranks)
        print(
            f"step       {data.batch_tokens:,} tokens = {micro_steps} micro-steps x {world.data_ranks} ranks"
            f" x {data.micro_batch_size} sequences x {data.seq_len} tokens"
        )
        if world.size > 1:
            replicas, shards, tp = world.mesh_shape
            stages = f"{world.pp} stages x " if world.pp > 1 else ""
            layout = f"{stages}{replicas} replicas x {shards} shards x {tp} tensor parallel"
            print(f"layout     {world.size} ranks = {layout}" + f", {world.cp} share a sequence" * (world.cp > 1))
        if world.pp > 1:
            sizes = ", ".join(map(str, stages_here(cfg, world)))
            idle = bubble(micro_steps, world.pp)
            print(f"pipeline   stages of {sizes} blocks; equally fast, each waits {idle:.0%} of a step for others")
        n_params, n_bytes = per_rank
        mib = f"{n_bytes / 2**20:,.1f} MiB with gradients and optimizer state"
        print(f"per rank   {n_params:,.0f} parameters, padding included, {mib}")
        predicted, there = sum(self.predicted.values()), memory_bytes(world.device) / 2**30
        in_unit = 1 if predicted >= LEAST_GIB else 2**10  # the sum's unit serves its parts
        parts = ", ".join(f"{name} {in_unit * gib:.2f}" for name, gib in self.predicted.items())
        print(f"memory     {_memory(predicted)} per rank predicted ({parts}), {there:.1f} GiB available")
        last_step = state.last_step(cfg)
        tokens = state.tokens(cfg) + (last_step - state.step) * data.batch_tokens
        epochs = order.epochs(tokens // data.seq_len)
        each = ", ".join(f"{n:.3g} epochs of {folder}" for folder, n in epochs.items())
        each = each if len(epochs) > 1 else f"{epochs[data.folder]:.3g} epochs"
        print(f"run        {last_step:,} steps, {tokens:,} tokens, {each}, in {self.out_dir}")
        if (warmup := cfg.optim.warmup_steps) > last_step:
            print(
                f"warning    warmup_steps {warmup:,} is above the last step: the learning rate never reaches its value"
            )
        for folder, n in epochs.items():
            if n > 20:
                often = f"the run reads the training tokens of {folder} {n:,.0f} times; after about 4 epochs"
                print(
                    f"warning    {often} a model learns little more (arXiv 2305.16264): lower --max_steps, or add text"
                )
        peak = f"mfu relative to {self.peak / 1e12:.4g} TFLOP/s, {self.peak_name}"
        kernels = cfg.parallel.how_kernels_start(world, cfg.model.n_layer)
        print(
            f"device     {world.size} x {device_name(world.device)}, {world.precision}, {kernels}; {peak}", flush=True
        )

    def _step_text(self, state):
        last_step = state.last_step(self.cfg)
        return f"step {state.step:>{len(str(last_step))}}/{last_step}"

    def _write(self, record):
        if self.world.is_main:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            self.unwritten += json.dumps(finite).encode() + b"\n"  # JSON has no NaN
            self._write_lines()
        self._to_dashboards(lambda dashboard: dashboard.log(record))

    def _write_lines(self):
        """Writes what log.jsonl still lacks: where a disk is full, lines wait until it has room."""
        with self.telling("log.jsonl"):
            while self.unwritten and self.file:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def _to_dashboards(self, call):
        for name, dashboard in self.dashboards.items():
            if name not in self.failed:
                with self.telling(name):
                    call(dashboard)

    def _print(self, text):
        if self.world.is_main:
            print(text, flush=True)


def _duration(seconds):
    """A time in minutes and seconds, or hours and minutes: 3m07s, 12h34m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _named(losses, prefix):
    """The objectives' losses among figures, as text: (mlm 5.1234, nsp 0.6931); empty without any."""
    found = [f"{name.removeprefix(prefix)} {loss:.4f}" for name, loss in losses.items() if name.startswith(prefix)]
    return f" ({', '.join(found)})" if found else ""


def _memory(gib, digits=2):
    """Memory in GiB, or in MiB where it is little."""
    return f"{gib:.{digits}f} GiB" if gib >= LEAST_GIB else f"{2**10 * gib:.{digits}f} MiB"


def _short(count):
    """A count in four characters or so: 12.3M for 12,345,678."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return f"{count:.0f}"
