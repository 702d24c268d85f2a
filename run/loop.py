"""The training loop, and a step of it: train.py pre-trains by it, finetune.py fine-tunes."""

import functools
import math
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from config import Config, Count, Positive
from launch import refresh_copies, replay
from ops import IGNORE
from optim import can_capture, lr_at, set_lr
from parallel import has_gradient_buckets, sync_gradients
from run.guard import Stop
from run.health import bad_step
from run.log import Log, print_finished
from run.resume import Saver, State
from world import seed_step


@dataclass(frozen=True)
class TrainConfig(Config):
    eval_interval: Count = 250  # steps between evaluations; the first comes before step 1, the last at the end
    target_loss: float | None = None  # validation loss at which the run is finished, whatever max_steps
    max_minutes: Positive | None = None  # minutes after which to evaluate, save and stop; the same command continues


def fit(cfg, world, stop, parts, train_data, fingerprint, start, train_step, evaluate):
    """Trains from where the run stands to its end, or until a stop is requested; returns its State.

    parts: (model, optimizer, scaler). train_data: a Loader. fingerprint: of the data, by which a resumed run knows it.
    start(): loads the initial weights of a new run. evaluate(): a dict of figures with val_loss, and maybe a score, by
    which the best checkpoint is chosen.
    """
    model, optimizer, scaler = parts
    saver = Saver(cfg, world, model, optimizer, scaler, fingerprint)
    state = saver.resume()
    if state is None:
        start()
        state = State()
    elif state.is_finished(cfg):
        print_finished(cfg, state, world)
        return state
    train_data.seek(state.sequences_seen)

    with Log(cfg, world, model, optimizer, state, saver.changes, train_data.order) as log:
        while True:
            world.progress.step = state.step
            request = Stop.NO if state.is_at_end(cfg) else stop.agreed(log.is_out_of_time, saver.writer.failed)
            if request == Stop.SAVE_FAILED:
                saver.writer.wait()  # raises, on all ranks, what happened

            # evaluate and write checkpoints; the last turn does only this
            ending = request != Stop.NO or state.is_at_end(cfg)
            due = ending or state.step % cfg.train.eval_interval == 0
            # stop requested: skip the evaluation, we may be killed soon
            if due and not request.is_requested and state.evaluated_at != state.step:
                with log.paused():
                    figures = evaluate()
                    state.val_loss, state.evaluated_at = figures["val_loss"], state.step
                    state.score = figures.get("score")
                    log.evaluation(state, figures)
            ending = ending or state.has_reached_target(cfg)
            if saver.is_due(state, ending):
                with log.paused():
                    saver.save(state)
            if ending:
                break

            # learning rate for this step
            lr = lr_at(state.step, cfg.optim, state.last_step(cfg))
            set_lr(optimizer, lr)
            seed_step(cfg.run.seed, state.step, world.rank)

            # forward, backward, update
            with world.phase("data"):
                batches, waited = train_data.next()
            loss, grad_norm, bad = train_step(model, optimizer, scaler, batches, cfg, world, state.recent)
            state.advance(cfg, loss, grad_norm, bad)
            log.step(state, loss, grad_norm, lr, waited, bad)

            if state.bad_steps >= cfg.health.max_bad_steps:
                repeat_step = functools.partial(train_step, model, optimizer, scaler, batches, cfg, world)
                state = saver.roll_back(state, bad, repeat_step)
                train_data.seek(state.sequences_seen)
                log.rolled_back(state)
        saver.writer.wait()
        stop.acknowledge(request)
        log.end(state, request)
    return state


def train_step(model, optimizer, scaler, batches, cfg, world, recent=()):
    """One optimizer step over micro-batches, each a tuple of the model's arguments (tokens, targets, ...).

    Returns the mean loss, the gradient norm before clipping, and None, or why the step was skipped: then weights and
    optimizer are as before, on all ranks. recent: (loss, gradient norm) of sound steps, the baseline for spikes.
    """
    with world.phase("forward", "counting targets"):
        n_targets = world.sum_over_data(sum((targets != IGNORE).sum() for _, targets, *_ in batches))
        n_targets = n_targets.clamp(min=1)  # a batch of special tokens alone has nothing to predict
    refresh_copies(model)
    keep_gradients = has_gradient_buckets(model) or model.graphs is not None
    clear = functools.partial(optimizer.zero_grad, set_to_none=not keep_gradients)
    loss = torch.zeros((), device=world.device)
    for i, batch in enumerate(batches, start=1):
        sync_gradients(model, last=i == len(batches))
        forward_backward = functools.partial(micro_step, model, scaler, world, f"{i} of {len(batches)}")
        recording = {"undo": clear, "may_record": i == 1}  # undone, warming up takes the step's gradients with it
        loss += replay(model.graphs, "micro-step", forward_backward, n_targets, *batch, **recording)
    with world.phase("optimizer"):
        scaler.unscale_(optimizer)
        norm = get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
        grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's is a DTensor
        # One exchange for both: tp ranks have the same loss, all ranks the same norm.
        loss, grad_norm = world.sum_over_all(loss / world.tp, grad_norm / world.size)
        bad = bad_step(loss, grad_norm, cfg.health, recent)
        overflow = scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(grad_norm)
        if overflow and scaler.get_scale() > 1:
            bad = None  # fp16 overflow: GradScaler skips the step and lowers its scale
        if not bad:
            clip_and_step = functools.partial(update, model, optimizer, scaler, cfg)
            graphs = model.graphs if can_capture(optimizer) else None
            replay(graphs, "update", clip_and_step, norm, warm_ups=0)
        scaler.update()
        clear()
    return loss, grad_norm, bad


def micro_step(model, scaler, world, progress, n_targets, *batch):
    """Adds a micro-batch's gradients; returns its part of the step's mean loss, which n_targets divide."""
    with world.phase("forward", progress), world.autocast():
        loss = model(*batch) / n_targets
    with world.phase("backward", progress):
        # DDP and FSDP average gradients over ranks, and the loss is the ranks' sum: so multiply by the ranks.
        scaler.scale(loss * world.data_ranks).backward()
    return loss.detach()


def update(model, optimizer, scaler, cfg, norm):
    """Clips the gradients, whose norm is given, and steps the optimizer."""
    if cfg.optim.grad_clip:
        clip_grads_with_norm_(model.parameters(), cfg.optim.grad_clip, norm)
    scaler.step(optimizer)
