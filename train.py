"""Trains a model.

    python train.py config/quickstart.py --learning_rate=1e-3
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py

The same command again goes on from the newest checkpoint in out_dir.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from checkpoint import (
    RunConfig,
    Saver,
    changed_settings,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    set_aside,
    step_of,
)
from config import as_dict, as_preset, preset_value, run_script
from data import (
    DataConfig,
    Loader,
    Split,
    TrainOrder,
    accumulation_steps,
    eval_batches,
    read_meta,
    seq_len_of,
    vocab_size_of,
)
from guard import CrashReports, StopRequests
from health import HealthConfig, defect, first_bad_tensor
from log import Log
from memory import explaining_out_of_memory
from model import ModelConfig, Transformer
from objective import IGNORE, ObjectiveConfig, windows_of
from optim import OptimConfig, build_optimizer, lr_at, set_lr
from parallel import (
    ParallelConfig,
    check_tensor_parallel,
    distribute,
    end_process,
    init_world,
    keeps_gradients,
    reshard,
    seed_step,
    sync_gradients,
)
from pretrained import is_run, keep_carried, load_weights, open_model, other_tokens, starting_config
from rundir import check_shared, locked, writing_to


EVAL_MASK_SEED = 0  # masked evaluation is the same in every run
SAVE_FAILED = 10_000  # beside the numbers of stop requests, and above them


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
        wrong = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("eval_interval", "log_interval")
            if getattr(self, name) < 1
        ]
        if self.max_minutes is not None and self.max_minutes <= 0:
            wrong.append(f"max_minutes is {self.max_minutes}; it must be above 0, or none")
        if wrong:
            raise ValueError("\n".join(wrong))


@dataclass(frozen=True)
class Settings:
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    run: RunConfig
    health: HealthConfig
    train: TrainConfig
    presets: tuple = ()
    given: frozenset = dataclasses.field(default=frozenset(), compare=False)

    def __post_init__(self):
        if not self.run.init_from:  # whose block_size may be another
            seq_len_of(self)  # raises where it does not fit the model


@dataclass
class State:
    """Where a run is: all that it must remember beside its tensors."""

    step: int = 0
    sequences_seen: int = 0
    hours: float = 0.0
    val_loss: float | None = None
    evaluated_at: int | None = None
    bad_steps: int = 0  # skipped in a row
    recent: list = dataclasses.field(default_factory=list)  # sound steps that spikes are measured against
    went_back_to: int | None = None


def main(cfg):
    cfg = resolve(cfg)
    with init_world(cfg.parallel) as world:
        train_split, val_split = (
            Split(cfg.data.data_dir, name, cfg.model.vocab_size, prepare_command(cfg)) for name in ("train", "val")
        )
        windows, val_windows = (windows_for(cfg, seed) for seed in (cfg.run.seed, EVAL_MASK_SEED))
        order = TrainOrder(train_split, windows.stride, cfg.run.seed)
        micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, world.data_ranks)
        last_step = cfg.optim.last_step(cfg.data.batch_tokens)

        settings = as_dict(cfg) | {"data_fingerprint": f"{train_split.fingerprint()}-{val_split.fingerprint()}"}
        with guarded(cfg, world) as stop, explaining_out_of_memory(cfg, world):
            model, optimizer, scaler = build(cfg, world, cfg.run.seed)
            state, changes = resume_or_init(cfg, settings, model, optimizer, scaler, world)
            if state.step and (state.step >= last_step or has_reached_target(state, cfg)):
                return say_finished(cfg, state, world)
            saver = Saver(cfg.run, world, newest=state.step)
            sizes = micro_steps, cfg.data.micro_batch_size
            loader = Loader(order, windows, state.sequences_seen, *sizes, world)

            with Log(
                cfg, world, model, optimizer, micro_steps, last_step, val_split.bytes_per_token, state, changes
            ) as log:
                while True:
                    world.watchdog.step = state.step
                    asked = asked_to_stop(stop, saver, world) if state.step < last_step else 0
                    ending = state.step >= last_step or log.out_of_time or asked
                    is_due = ending or state.step % cfg.train.eval_interval == 0
                    if is_due and not asked and state.evaluated_at != state.step:  # who asks may soon kill
                        with log.paused():
                            figures = evaluate(model, val_split, val_windows, cfg.data, world)
                            state.val_loss, state.evaluated_at = figures["val_loss"], state.step
                            log.evaluation(state, figures)
                    ending = ending or has_reached_target(state, cfg)
                    if is_to_be_saved(state, cfg, ending):
                        with log.paused():
                            save(saver, settings, model, optimizer, scaler, state)
                    if ending:
                        break

                    set_lr(optimizer, lr_at(state.step, cfg.optim, last_step))
                    seed_step(cfg.run.seed, state.step, world.rank)
                    world.at("waiting for data")
                    batches, waited = loader.next()
                    judge = functools.partial(defect, recent=state.recent, spike_z=cfg.health.spike_z)
                    loss, grad_norm, wrong = train_step(
                        model, optimizer, scaler, batches, cfg.optim.grad_clip, world, judge
                    )
                    state.step += 1
                    state.sequences_seen += cfg.data.batch_tokens // cfg.data.seq_len
                    state.bad_steps = state.bad_steps + 1 if wrong else 0
                    log.step(state, loss, grad_norm, optimizer.param_groups[0]["lr"], waited, wrong)
                    if state.bad_steps >= cfg.health.max_bad_steps:
                        saver.wait()
                        state = go_back(cfg, state, wrong, model, optimizer, scaler, batches, world)
                        loader.close()
                        loader = Loader(order, windows, state.sequences_seen, *sizes, world)
                        saver.newest = state.step
                        log.went_back(state)
                loader.close()
                saver.wait()
                log.end(state, has_reached_target(state, cfg), stop.obeyed(asked))


@contextlib.contextmanager
def guarded(cfg, world):
    """Keeps the run's folder to this run and reports crashes in it; yields the requests to stop."""
    with (
        StopRequests(cfg.run.out_dir, world) as stop,  # first, so that torchrun's SIGTERM cuts short no report
        CrashReports(cfg.run.out_dir, world, as_preset(cfg)) as crash,
        locked(cfg.run.out_dir, world),
    ):
        check_shared(cfg.run.out_dir, world)
        world.watchdog.report = crash.write
        yield stop


def build(cfg, world, seed):
    """The model, ready to train on this rank, its optimizer, and the gradient scaler, which only fp16 uses."""
    check_tensor_parallel(cfg.model, cfg.data.seq_len, cfg.parallel.tp)
    with torch.device("meta"):
        model = Transformer(cfg.model)
    distribute(model, cfg.parallel, world, seed)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.precision == "fp16")
    return model, build_optimizer(model, cfg.optim, world), scaler


def train_step(model, optimizer, scaler, batches, grad_clip, world, judge=defect):
    """One optimizer step over a list of micro-batches (ids, targets, ...), what the model's forward takes.

    Returns the step's mean loss, the gradient's norm before clipping, and what is wrong with them, by judge(loss, norm)
    on all ranks alike: then the step is skipped, and weights and optimizer are as before.
    """
    loss, grad_norm = compute_gradients(model, optimizer, scaler, batches, grad_clip, world)
    loss, grad_norm = world.total(loss / world.tp, grad_norm / world.size)  # each rank has a share, or all have it
    wrong = judge(loss, grad_norm)
    overflows = scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(grad_norm)
    if overflows and scaler.get_scale() > 1:
        wrong = None  # the scaler skips the step by itself, and answers by a smaller scale
    world.at("optimizer")
    if not wrong:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=not keeps_gradients(model))
    return loss, grad_norm, wrong


def compute_gradients(model, optimizer, scaler, batches, grad_clip, world):
    """Leaves a step's gradients, clipped, with the parameters; this rank's share of the mean loss, and their norm."""
    world.at("counting targets")
    n_targets = world.sum(sum((targets != IGNORE).sum() for _, targets, *_ in batches))
    n_targets = n_targets.clamp(min=1)  # a batch of special tokens alone has nothing to predict
    loss = torch.zeros((), device=world.device)
    for i, batch in enumerate(batches):
        sync_gradients(model, i == len(batches) - 1)
        world.at(f"forward {i + 1} of {len(batches)}")
        with world.autocast():
            part = model(*batch) / n_targets
        loss += part.detach()
        world.at(f"backward {i + 1} of {len(batches)}")
        scaler.scale(part * world.data_ranks).backward()  # gradients are averaged over ranks, the loss is their sum
    world.at("clipping")
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    return loss, grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm  # of a sharded model


@torch.no_grad()
def evaluate(model, split, windows, cfg, world):
    """Mean loss and accuracy over the fixed windows of a split, the same for every batch size and number of ranks.

    Beside them the accuracy of a guess that always is the targets' commonest token.
    """
    model.eval()
    sums, frequencies = torch.zeros(2, dtype=torch.float64), torch.zeros(model.cfg.vocab_size, dtype=torch.int64)
    for batch in eval_batches(split, windows, cfg.eval_tokens, cfg.micro_batch_size, world.data_rank, world.data_ranks):
        world.at("evaluation")
        with world.autocast():
            loss_and_correct = model(*(part.to(world.device) for part in batch), count_correct=True)
        sums += torch.stack(loss_and_correct).cpu()
        frequencies += torch.bincount(batch[1][batch[1] != IGNORE], minlength=len(frequencies))
    model.train()
    reshard(model)
    loss, n_correct = world.sum(sums).tolist()
    n_targets = world.sum(frequencies).sum().item()
    if n_targets == 0:
        raise ValueError(
            f"the first eval_tokens {cfg.eval_tokens} of the {split.name} split hold nothing to predict, only special "
            f"tokens; raise eval_tokens, or the text's share by --val_fraction of prepare.py"
        )
    return {
        "val_loss": loss / n_targets,
        "val_accuracy": n_correct / n_targets,
        "val_accuracy_of_commonest": frequencies.max().item() / n_targets,
    }


def say_finished(cfg, state, world):
    """Tells that there is nothing left to do."""
    if world.is_main:
        print(
            f"{cfg.run.out_dir} has finished, at step {state.step} with val loss {state.val_loss:.4f}; "
            f"raise max_steps to train on, or use another --out_dir"
        )


def resolve(cfg):
    """The settings with what they leave open filled in: out_dir, the model's, seq_len."""
    if cfg.run.save_interval and importlib.util.find_spec("safetensors") is None:
        raise ValueError("checkpoints need safetensors: pip install safetensors, or --save_interval=none to go without")
    out_dir = cfg.run.out_dir or f"out/{Path(cfg.presets[-1]).stem if cfg.presets else 'run'}"
    return filled_in(dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, out_dir=out_dir)))


def filled_in(cfg):
    """The settings with those of the model and seq_len that they leave open filled in."""
    cfg = dataclasses.replace(cfg, model=model_of(cfg))
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=seq_len_of(cfg)))


def model_of(cfg):
    """The model's settings: those of the weights that it starts from, or its own with the data's vocabulary."""
    if cfg.run.init_from:
        has_begun = cfg.run.out_dir and is_run(cfg.run.out_dir)
        return starting_config(cfg.run.out_dir if has_begun else cfg.run.init_from, cfg.model, cfg.given)
    vocab_size = cfg.model.vocab_size or vocab_size_of(cfg.data.data_dir, prepare_command(cfg))
    return dataclasses.replace(cfg.model, vocab_size=vocab_size)


def windows_for(cfg, seed):
    """How windows of the data become batches of the model's objective; the seed draws the masks, if any."""
    return windows_of(cfg.model.objective, cfg.objective, cfg.data.seq_len, seed, read_meta(cfg.data.data_dir))


def prepare_command(cfg):
    """The command that makes the data of these settings: the presets', if they name data_dir, or one for own text."""
    if cfg.presets and preset_value(cfg.presets, "data_dir") == cfg.data.data_dir:
        return shlex.join(["python", "prepare.py", *cfg.presets])
    return f"python prepare.py --input=FILES --data_dir={cfg.data.data_dir}"


# ---- resume


def resume_or_init(cfg, settings, model, optimizer, scaler, world):
    """The state to start from, with the tensors that go with it, and lines that name what has changed since."""
    world.at("reading the checkpoint")
    found = world.gather(checkpoints(cfg.run.out_dir))[0]  # rank 0's, as a network's disk may show others less
    if not found:
        if cfg.run.init_from:
            start_from(cfg, model, world)
        return State(), []
    if cfg.run.resume == "never":
        raise ValueError(
            f"resume is never, and {cfg.run.out_dir} has checkpoints; use another --out_dir, or --resume=auto to go on"
        )
    newest = newest_checkpoint(cfg.run.out_dir, world)
    fixed = {field.name for owner in (ModelConfig, ObjectiveConfig) for field in dataclasses.fields(owner)}
    fixed |= {"seq_len", "seed", "optimizer", "data_fingerprint"}
    changes = changed_settings(read_manifest(newest)["settings"], settings, fixed)
    changes = [f"{line}, of no effect now" if line.startswith("init_from: ") else line for line in changes]
    return restore(newest, cfg, model, optimizer, scaler, world), changes


def start_from(cfg, model, world):
    """Takes the weights that a run is to start from."""
    source = open_model(cfg.run.init_from, world)
    load_weights(source, model)
    if world.is_main:
        with writing_to(cfg.run.out_dir):
            keep_carried(source, cfg.run.out_dir)
        print(f"weights    of {source.name}")
        if line := other_tokens(source, cfg.data.data_dir):
            print(f"warning    {line}")


def restore(path, cfg, model, optimizer, scaler, world):
    """Loads a checkpoint of the run in place, sets aside later ones; returns the run's state that goes with it."""
    if world.is_main:
        with writing_to(cfg.run.out_dir):
            set_aside(later for later in checkpoints(cfg.run.out_dir) if step_of(later) > step_of(path))
    manifest = load_checkpoint(path, model, optimizer)
    if manifest["scaler"]:
        scaler.load_state_dict(manifest["scaler"])
    return State(**manifest["state"])


def go_back(cfg, state, wrong, model, optimizer, scaler, batches, world):
    """The state of the newest checkpoint, but with the data of the bad steps behind it.

    ValueError, which names what went bad, where there is none, or where it has been gone back to already.
    """
    found = world.gather(checkpoints(cfg.run.out_dir))[0]
    newest = newest_checkpoint(cfg.run.out_dir, world) if found else None
    if not found or step_of(newest) == state.went_back_to:
        seed_step(cfg.run.seed, state.step - 1, world.rank)
        tensor = first_bad_tensor(
            model, lambda: compute_gradients(model, optimizer, scaler, batches, cfg.optim.grad_clip, world)
        )
        by_rank = [f"on rank {rank} {name}" for rank, name in enumerate(world.gather(tensor)) if name]
        raise ValueError(
            f"{state.bad_steps} steps in a row were skipped, the last of them step {state.step} with {wrong}, "
            + (f"again after going back to {newest.name}" if found else "and there is no checkpoint to go back to")
            + f"; first to go bad: {by_rank[0] if by_rank else 'no tensor when the step was computed again'}; "
            "lower learning_rate, or look at what computes that tensor"
        )
    back = restore(newest, cfg, model, optimizer, scaler, world)
    back.sequences_seen, back.hours, back.went_back_to = state.sequences_seen, state.hours, back.step
    back.bad_steps = 0
    return back


def is_to_be_saved(state, cfg, ending):
    """Whether a checkpoint is due; amid bad steps it is not, since one may have to go back to it."""
    if not cfg.run.save_interval or not state.step:
        return False
    return bool(ending) or (state.step % cfg.run.save_interval == 0 and not state.bad_steps)


def asked_to_stop(stop, saver, world):
    """The number of a stop request that some rank has; 0 without. Raises where a checkpoint could not be written."""
    asked = int(world.worst(SAVE_FAILED if saver.failed else stop.asked))
    if asked == SAVE_FAILED:
        saver.wait()  # raises, on all ranks, what happened
    return asked


def save(saver, settings, model, optimizer, scaler, state):
    """Begins to write a checkpoint."""
    facts = {
        "state": asdict(state),
        "settings": settings,
        "scaler": scaler.state_dict(),
        "val_loss": state.val_loss if state.evaluated_at == state.step else None,
    }
    saver.save(state.step, model, optimizer, facts)


def has_reached_target(state, cfg):
    """Whether the last evaluation is at or below target_loss."""
    return cfg.train.target_loss is not None and state.val_loss is not None and state.val_loss <= cfg.train.target_loss


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
    end_process()
