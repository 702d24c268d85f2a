"""Trains a model.

    python train.py config/quickstart.py --learning_rate=1e-3
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py

The same command again goes on from the newest checkpoint in out_dir.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import plan
from checkpoint import (
    RunConfig,
    changed_settings,
    checkpoints,
    keep_source,
    keep_tokenizer,
    load_checkpoint,
    load_model,
    read_manifest,
    remove_old_checkpoints,
    save_checkpoint,
)
from config import ROOT, as_dict, as_preset, run_script
from data import IGNORE, DataConfig, Loader, Split, TrainOrder, accumulation_steps, eval_batches, read_meta
from model import ModelConfig, Transformer
from optim import OptimConfig, build_optimizer, lr_at, set_lr
from parallel import ParallelConfig, distribute, end_process, init_world, seed_step, sync_gradients


@dataclass(frozen=True)
class TrainConfig:
    eval_interval: int = 250  # steps between evaluations; the first comes before step 1, the last at the end
    log_interval: int = 10  # steps between lines of the log
    target_loss: float | None = None  # validation loss at which the run is finished, whatever max_steps
    max_minutes: float | None = None  # minutes after which to evaluate, save and stop; the same command then goes on
    wandb: bool = False  # log to Weights & Biases as well
    wandb_project: str = "flatlm"  # project there
    wandb_run_name: str | None = None  # name of the run there; none: the name of out_dir

    def __post_init__(self):
        wrong = [f"{name} is {getattr(self, name)}; it must be at least 1" for name in ("eval_interval", "log_interval") if getattr(self, name) < 1]
        if wrong:
            raise ValueError("\n".join(wrong))


@dataclass(frozen=True)
class Settings:
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    run: RunConfig
    train: TrainConfig
    presets: tuple = ()


@dataclass
class State:
    """Where a run is: all that it must remember beside its tensors."""

    step: int = 0
    sequences_seen: int = 0
    hours: float = 0.0
    val_loss: float | None = None
    evaluated_at: int | None = None


def main(cfg):
    with init_world(cfg.parallel) as world:
        cfg = resolve(cfg)
        splits = [Split(cfg.data.data_dir, name, cfg.model.vocab_size, prepare_command(cfg)) for name in ("train", "val")]
        order = TrainOrder(splits[0], cfg.data.seq_len, cfg.run.seed)
        micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, world.size)
        last_step = cfg.optim.last_step(cfg.data.batch_tokens)

        with torch.device("meta"):
            model = Transformer(cfg.model)
        distribute(model, cfg.parallel, world, cfg.run.seed)
        optimizer = build_optimizer(model, cfg.optim)
        scaler = torch.amp.GradScaler(world.device.type, enabled=world.precision == "fp16")
        data_id = "-".join(split.fingerprint() for split in splits)
        state, changes = resume_or_init(cfg, model, optimizer, scaler, data_id, world)
        if state.step and (state.step >= last_step or has_reached_target(state, cfg)):
            return say_finished(cfg, state, world)
        loader = Loader(order, state.sequences_seen, micro_steps, cfg.data.micro_batch_size, world.rank, world.size, world.device)

        with Log(cfg, world, model, splits[1], state, changes, last_step) as log:
            while True:
                ending = state.step >= last_step or log.out_of_time
                if (ending or state.step % cfg.train.eval_interval == 0) and state.evaluated_at != state.step:
                    with log.paused():
                        state.val_loss = evaluate(model, splits[1], cfg.data, world)
                        state.evaluated_at = state.step
                    log.evaluation(state)
                ending = ending or has_reached_target(state, cfg)
                if cfg.run.save_interval and state.step and (ending or state.step % cfg.run.save_interval == 0):
                    with log.paused():
                        save(cfg, model, optimizer, scaler, state, data_id, world)
                if ending:
                    break

                set_lr(optimizer, lr_at(state.step, cfg.optim, last_step))
                seed_step(cfg.run.seed, state.step, world.rank)
                batches, waited = loader.next()
                loss, grad_norm = train_step(model, optimizer, scaler, batches, cfg.optim.grad_clip, world)
                state.step += 1
                state.sequences_seen += cfg.data.batch_tokens // cfg.data.seq_len
                log.step(state, loss, grad_norm, optimizer.param_groups[0]["lr"], waited)
            loader.close()
            log.end(state)


def train_step(model, optimizer, scaler, batches, grad_clip, world):
    """One optimizer step over a list of micro-batches (ids, targets).

    Returns this rank's share of the step's mean loss, to be summed over ranks, and the gradient's norm before clipping.
    Neither waits for the device.
    """
    n_targets = world.sum(sum((targets != IGNORE).sum() for _, targets in batches))
    loss = torch.zeros((), device=world.device)
    for i, (ids, targets) in enumerate(batches):
        sync_gradients(model, i == len(batches) - 1)
        with world.autocast():
            part = model(ids, targets) / n_targets
        loss += part.detach()
        scaler.scale(part * world.size).backward()  # gradients are averaged over ranks, the loss is a sum over them
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


@torch.no_grad()
def evaluate(model, split, cfg, world):
    """Mean loss over the fixed windows of a split, the same for every batch size and number of ranks."""
    model.eval()
    sums = []
    for ids, targets in eval_batches(split, cfg.seq_len, cfg.eval_tokens, cfg.micro_batch_size, world.rank, world.size):
        with world.autocast():
            loss = model(ids.to(world.device), targets.to(world.device))
        sums.append(torch.stack([loss, (targets != IGNORE).sum().to(loss)]))
    loss, n_targets = world.sum(torch.stack(sums).cpu().double().sum(0)).tolist()
    model.train()
    return loss / n_targets


def say_finished(cfg, state, world):
    """Tells that there is nothing left to do."""
    if world.is_main:
        print(f"{cfg.run.out_dir} has finished, at step {state.step} with val loss {state.val_loss:.4f}; "
              f"raise max_steps to train on, or use another --out_dir")


def resolve(cfg):
    """The settings with what they leave open filled in: the data's vocabulary, seq_len, out_dir."""
    if cfg.data.data_dir is None:
        raise ValueError("data_dir is none; set it to a folder that prepare.py made, as --data_dir= or in a preset")
    vocab_size = cfg.model.vocab_size
    if vocab_size is None:
        vocab_size = read_meta(cfg.data.data_dir).get("vocab_size")
        if vocab_size is None and Path(cfg.data.data_dir).is_dir():
            raise ValueError(f"vocab_size is none, and {cfg.data.data_dir} has no meta.json to take it from; set vocab_size")
        if vocab_size is None:
            raise ValueError(f"{cfg.data.data_dir} does not exist; make it: {prepare_command(cfg)}")
    seq_len = cfg.data.seq_len or cfg.model.block_size
    if seq_len > cfg.model.block_size:
        raise ValueError(f"seq_len {seq_len} is above block_size {cfg.model.block_size}; lower it, or raise block_size")
    out_dir = cfg.run.out_dir or f"out/{Path(cfg.presets[-1]).stem if cfg.presets else 'run'}"
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, vocab_size=vocab_size),
        data=dataclasses.replace(cfg.data, seq_len=seq_len),
        run=dataclasses.replace(cfg.run, out_dir=out_dir),
    )


def prepare_command(cfg):
    """The command that makes the data of these settings: presets say how in prepare.py's settings."""
    if not cfg.presets:
        return f"python prepare.py --input=FILES --data_dir={cfg.data.data_dir}"
    return shlex.join(["python", "prepare.py", *cfg.presets, f"--data_dir={cfg.data.data_dir}"])


# ---- resume

def resume_or_init(cfg, model, optimizer, scaler, data_id, world):
    """The state to start from, with the tensors that go with it, and lines that name what has changed since."""
    found = checkpoints(cfg.run.out_dir)
    if not found:
        if cfg.run.init_from:
            source, _ = load_model(cfg.run.init_from, world.device)
            if source.cfg != cfg.model:
                raise ValueError(f"init_from {cfg.run.init_from} is {source.cfg}, the settings say {cfg.model}; make them equal")
            model.load_state_dict(source.state_dict())
        return State(), []
    if cfg.run.resume == "never":
        raise ValueError(f"{cfg.run.out_dir} has checkpoints and resume is never; use another --out_dir, or --resume=auto to go on")
    manifest = read_manifest(found[-1])
    fixed = {field.name for field in dataclasses.fields(ModelConfig)} | {"seq_len", "seed", "optimizer", "data"}
    changes = changed_settings(manifest["settings"], as_dict(cfg) | {"data": data_id}, fixed)
    load_checkpoint(found[-1], model, optimizer)
    if manifest["scaler"]:
        scaler.load_state_dict(manifest["scaler"])
    return State(**manifest["state"]), changes


def save(cfg, model, optimizer, scaler, state, data_id, world):
    """Writes a checkpoint and removes those that are no longer wanted."""
    facts = {
        "state": asdict(state),
        "settings": as_dict(cfg) | {"data": data_id},
        "scaler": scaler.state_dict(),
        "val_loss": state.val_loss if state.evaluated_at == state.step else None,
    }
    save_checkpoint(cfg.run.out_dir, state.step, model, optimizer, facts, world)
    if world.is_main:
        remove_old_checkpoints(cfg.run.out_dir, cfg.run)


def has_reached_target(state, cfg):
    """Whether the last evaluation is at or below target_loss."""
    return cfg.train.target_loss is not None and state.val_loss is not None and state.val_loss <= cfg.train.target_loss


# ---- logging

class Log:
    """What a run tells: the console, log.jsonl, curves.png and, if asked, wandb. Only rank 0 writes."""

    def __init__(self, cfg, world, model, val_split, state, changes, last_step):
        self.cfg, self.world, self.last_step, self.changes = cfg, world, last_step, changes
        self.out_dir = Path(cfg.run.out_dir)
        self.bytes_per_token = val_split.bytes_per_token
        self.flops_per_token = plan.flops_per_token(cfg.model, cfg.data.seq_len)
        self.peak, self.peak_name = plan.peak_flops(world.device, world.precision)
        self.file = self.wandb = None
        self.out_of_time, self.hours_before = False, state.hours
        if world.is_main:
            self._open(model, state)
        self.started = self.interval_start = time.perf_counter()
        self.interval_step, self.waited = state.step, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish(exit_code=1 if error[0] else 0)

    @contextlib.contextmanager
    def paused(self):
        """Time that does not count as training in tokens/s."""
        self._synchronize()
        start = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - start

    def step(self, state, loss, grad_norm, lr, waited):
        """Counts a step; every log_interval steps, and after the last, tells of it. All ranks call it alike."""
        self.waited += waited
        if state.step % self.cfg.train.log_interval and state.step != self.last_step:
            return
        loss = self.world.sum(loss.clone()).item()  # here, and nowhere else in the loop, the host waits for the device
        now, steps = time.perf_counter(), state.step - self.interval_step
        state.hours = self.hours_before + (now - self.started) / 3600
        minutes = self.world.worst((now - self.started) / 60)
        self.out_of_time = self.cfg.train.max_minutes is not None and minutes >= self.cfg.train.max_minutes
        tokens_per_s = steps * self.cfg.data.batch_tokens / (now - self.interval_start)
        record = {
            "step": state.step,
            "tokens": state.step * self.cfg.data.batch_tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm.item(),
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self.flops_per_token / (self.peak * self.world.size),
            "data_wait_ms": self.world.worst(1e3 * self.waited / steps),
            "memory_gib": self.world.worst(peak_memory_gib(self.world.device)),
        }
        left = (self.last_step - state.step) * (now - self.interval_start) / steps
        self.interval_start, self.interval_step, self.waited = now, state.step, 0.0
        self._write(record)
        self._print(f"step {state.step:>{len(str(self.last_step))}}/{self.last_step} | {_short(record['tokens']):>6} tok | loss {loss:7.4f}"
                    f" | lr {lr:.2e} | norm {record['grad_norm']:5.2f} | {tokens_per_s:9,.0f} tok/s | mfu {record['mfu']:6.2%}"
                    f" | {record['memory_gib']:.2f} GiB | wait {record['data_wait_ms']:.1f} ms | left {datetime.timedelta(seconds=round(left))}")

    def evaluation(self, state):
        """Tells of an evaluation and draws the curves anew."""
        record = {"step": state.step, "val_loss": state.val_loss}
        perplexity = math.exp(min(state.val_loss, 700))
        text = f"step {state.step:>{len(str(self.last_step))}}/{self.last_step} | val loss {state.val_loss:.4f} | perplexity {perplexity:.5g}"
        if self.bytes_per_token:
            record["val_bpb"] = state.val_loss / math.log(2) / self.bytes_per_token
            text += f" | {record['val_bpb']:.4f} bits per byte"
        self._write(record)
        self._print(text)
        if self.world.is_main:
            draw_curves(self.out_dir)

    def end(self, state):
        """Tells how the run ended; the last line totals tokens and hours."""
        if not self.world.is_main:
            return
        state.hours = self.hours_before + (time.perf_counter() - self.started) / 3600
        reason = "finished"
        if has_reached_target(state, self.cfg):
            reason = f"finished, target_loss {self.cfg.train.target_loss} reached"
        elif state.step < self.last_step:
            reason = f"stopped after max_minutes {self.cfg.train.max_minutes}, the same command goes on"
        if reason.startswith("finished"):
            (self.out_dir / "finished").write_text(f"{reason}\n")
        print(f"{reason}: step {state.step} of {self.last_step}, {state.step * self.cfg.data.batch_tokens:,} tokens in "
              f"{state.hours:.3f} hours, val loss {state.val_loss:.4f}; the run is in {self.out_dir}", flush=True)

    def _open(self, model, state):
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            (self.out_dir / "finished").unlink(missing_ok=True)
            (self.out_dir / "config.py").write_text(as_preset(self.cfg))
            changed_files = keep_source(ROOT, self.out_dir, state.step)
            _drop_later_lines(self.out_dir / "log.jsonl", state.step)
            self.file = open(self.out_dir / "log.jsonl", "a", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"out_dir {self.out_dir} cannot be written to ({error.strerror}); use another --out_dir") from error
        keep_tokenizer(self.cfg.data.data_dir, self.out_dir)
        if state.step:
            print(f"resumed from step {state.step}, after {state.hours:.3f} hours")
            for line in self.changes + [f"changed source file: {name}" for name in changed_files]:
                print(f"  {line}")
        world, cfg = self.world, self.cfg
        devices = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"{world.device.type}, {torch.get_num_threads()} threads"
        self._write({
            "start": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "step": state.step, "command": shlex.join(sys.argv),
            "git_commit": git_commit(), "python": platform.python_version(), "torch": torch.__version__, "devices": devices, "ranks": world.size,
            "precision": world.precision, "peak_flops": self.peak, "peak_name": self.peak_name, "changes": self.changes,
        })  # fmt: skip
        micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, world.size)
        print(f"model      {model.num_params():,} parameters, {self.flops_per_token / 1e6:,.1f} MFLOP a token (PaLM's count; "
              f"{plan.flops_per_token(cfg.model, cfg.data.seq_len, causal=True) / 1e6:,.1f} causal)")
        print(f"step       {cfg.data.batch_tokens:,} tokens = {micro_steps} micro-steps x {world.size} ranks x {cfg.data.micro_batch_size} sequences "
              f"x {cfg.data.seq_len} tokens; {self.last_step:,} steps = {self.last_step * cfg.data.batch_tokens:,} tokens")
        print(f"runs on    {world.size} x {devices}, {world.precision}; mfu is of {self.peak / 1e12:.4g} TFLOP/s ({self.peak_name})")
        print(f"written to {self.out_dir}", flush=True)
        if cfg.train.wandb:
            self.wandb = start_wandb(cfg, self.out_dir)

    def _write(self, record):
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        if self.wandb and "start" not in record:
            self.wandb.log(record)

    def _print(self, text):
        if self.world.is_main:
            print(text, flush=True)

    def _synchronize(self):
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def peak_memory_gib(device):
    """Largest memory so far: allocated by torch on CUDA, else resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def draw_curves(out_dir):
    """Draws log.jsonl as curves.png: training and validation loss over tokens."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    records = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for name, style in (("loss", {"linewidth": 1}), ("val_loss", {"marker": "o", "markersize": 3})):
        points = [(r["step"], r[name]) for r in records if name in r]
        axes.plot(*zip(*points) if points else ([], []), label=name.replace("_", " "), **style)
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token", title=out_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    partial = out_dir / ".curves.png"
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, out_dir / "curves.png")


def start_wandb(cfg, out_dir):
    """A wandb run that goes on with the id kept in out_dir; offline, said once, where the service is out of reach."""
    import wandb

    id_file = out_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(wandb.util.generate_id())
    options = {"project": cfg.train.wandb_project, "name": cfg.train.wandb_run_name or out_dir.name, "id": id_file.read_text().strip(),
               "resume": "allow", "dir": str(out_dir), "config": as_dict(cfg)}
    try:
        run = wandb.init(**options)
    except (wandb.errors.Error, OSError) as error:
        print(f"wandb is out of reach ({type(error).__name__}); logging offline, `wandb sync` in {out_dir}/wandb uploads it later", flush=True)
        run = wandb.init(**options, mode="offline")
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def git_commit():
    """The commit of the code that runs, with + where files differ from it; None outside a git checkout."""
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return described.stdout.strip() or None


def _drop_later_lines(path, step):
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        partial = path.with_name(".log.jsonl")
        partial.write_text("".join(line + "\n" for line in lines))
        os.replace(partial, path)


def _short(count):
    """12_345_678 as 12.3M"""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return str(count)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
    end_process()
