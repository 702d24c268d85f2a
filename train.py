"""Trains a model.

    python train.py config/quickstart.py --learning_rate=1e-3
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py

The same command again continues from the newest checkpoint in out_dir.
"""

import dataclasses
import functools
import math

import torch

from checkpoint import CheckpointConfig
from config import Config, Count, Positive, UserError, run_script
from data import DataConfig, Split, each, eval_batches, objective_for, open_data, seq_len_of
from distill import DistillConfig
from heads import CONTRASTED, contrast
from interop.harness import HarnessConfig, open_tasks
from interop.pretrained import resolve, start_from
from interop.teacher import check_teacher, start_from_layers, teach
from launch import refresh_copies, replay
from model import ModelConfig
from objective import CONTRASTIVE, IGNORE, Loss, ObjectiveConfig, count_targets, weighted_sum
from optim import OptimConfig, build_optimizer, can_capture, lr_at, set_lr
from parallel import ParallelConfig, distribute, fit_to_ranks, has_gradient_buckets, reshard, sync_gradients
from perf.memory import stages_here
from pipeline import schedule, total_norm
from run.folder import RunConfig, run_dir_of
from run.guard import Stop, guarded
from run.health import HealthConfig, bad_step
from run.log import Log, LogConfig
from run.resume import Saver, State, print_finished
from run.watch import Watch, WatchConfig
from world import WorldConfig, end_process, init_world, seed_step

EVAL_MASK_SEED = 0  # masked evaluation draws the same masks in every run
TEMPORARY = 75  # exit code, by sysexits.h: a node leaves or comes, and torchrun starts again with those that are there


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    eval_interval: Count = 250  # steps between evaluations; the first comes before step 1, the last at the end
    target_loss: float | None = None  # validation loss at which the run is finished, whatever max_steps
    max_minutes: Positive | None = None  # minutes after which to evaluate, save and stop; the same command continues
    elastic: bool = False  # fit micro_batch_size, or else batch_tokens, to the ranks that there are


@dataclasses.dataclass(frozen=True)
class Settings:
    model: ModelConfig
    objective: ObjectiveConfig
    distill: DistillConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    world: WorldConfig
    run: RunConfig
    checkpoint: CheckpointConfig
    health: HealthConfig
    log: LogConfig
    train: TrainConfig
    harness: HarnessConfig
    watch: WatchConfig
    presets: tuple = ()
    given: frozenset = dataclasses.field(default=frozenset(), compare=False)

    def __post_init__(self):
        if not self.run.init_from:  # the weights' block_size may be another
            seq_len_of(self)  # raises where it does not fit the model


def main(cfg):
    cfg = resolve(dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, out_dir=run_dir_of(cfg) or "out/run")))
    cfg = fit_to_ranks(cfg) if cfg.train.elastic else cfg
    check_teacher(cfg)
    with (
        init_world(cfg.world, cfg.parallel) as world,
        open_data(cfg, world) as (train_data, val_data),
        guarded(cfg, world) as stop,
    ):
        tasks = open_tasks(cfg, world)
        model, optimizer, scaler = build(cfg, world, cfg.run.seed)
        data_fingerprint = f"{train_data.order.split.fingerprint()}-{Split.joined(val_data).fingerprint()}"
        saver = Saver(cfg, world, model, optimizer, scaler, data_fingerprint, teach(cfg, model, world))
        state = saver.resume()
        if state is None:
            start_from(cfg, model, world)
            start_from_layers(cfg, model, world)
            state = State()
        plain = dataclasses.replace(cfg, objective=cfg.objective.without_augmentation())
        val_objective = objective_for(plain, EVAL_MASK_SEED, world)
        evaluation = functools.partial(evaluate, model, val_data, val_objective, cfg.data, world)
        watch = Watch(cfg, world, model, val_data, val_objective)
        train(saver, state, train_data, evaluation, stop, tasks, watch)


def train(saver, state, train_data, evaluation, stop, tasks=None, watch=None):
    """Trains from `state` to the run's end, or until a stop is requested; returns the State it has reached.

    saver: the run's Saver, which holds its settings, world, model and optimizer. evaluation(): {name: figure}, one of
    them val_loss. tasks(model): the same, due every tasks_interval steps.
    """
    cfg, world, model, optimizer, scaler = saver.cfg, saver.world, saver.model, saver.optimizer, saver.scaler
    if state.step and state.is_finished(cfg):  # max_steps 0 evaluates
        print_finished(cfg, state, world, saver.changes)
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
            tasks_due = tasks and (ending or state.step % cfg.harness.tasks_interval == 0)
            due = ending or tasks_due or state.step % cfg.train.eval_interval == 0
            # stop requested: skip the evaluation, we may be killed soon
            if due and not request.is_requested and state.evaluated_at != state.step:
                with log.paused():
                    figures = evaluation()
                    if tasks_due:
                        figures |= tasks(model)
                    state.val_loss, state.score = figures["val_loss"], figures.get("score")
                    state.evaluated_at = state.step
                    log.evaluation(state, figures, watch)
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
    if cfg.train.elastic and request.is_signal:
        raise SystemExit(TEMPORARY)
    return state


def train_step(model, optimizer, scaler, batches, cfg, world, recent=()):
    """One optimizer step over micro-batches, each a tuple of the model's arguments (tokens, targets, ...).

    Returns the mean loss, a Loss, the gradient norm before clipping, and None, or why the step was skipped: then
    weights and optimizer are as before, on all ranks. recent: (loss, gradient norm) of sound steps, the baseline for
    spikes.
    """
    with world.phase("forward", "counting targets"):
        n_targets = world.sum_over_data(sum(count_targets(model.objectives, *batch) for batch in batches))
        n_targets = n_targets.clamp(min=1)  # a batch of special tokens alone has nothing to predict
    refresh_copies(model)
    keep_gradients = has_gradient_buckets(model) or model.graphs is not None
    clear = functools.partial(optimizer.zero_grad, set_to_none=not keep_gradients)
    losses = torch.zeros_like(n_targets, dtype=torch.float32)
    if world.pp > 1:
        losses += in_stages(model, scaler, world, n_targets, batches)
    else:
        for i, batch in enumerate(batches, start=1):
            sync_gradients(model, last=i == len(batches))
            forward_backward = functools.partial(micro_step, model, scaler, world, f"{i} of {len(batches)}")
            recording = {"undo": clear, "may_record": i == 1}  # undone, warming up takes the step's gradients with it
            losses += replay(model.graphs, "micro-step", forward_backward, n_targets, *batch, **recording)
    with world.phase("optimizer"):
        scaler.unscale_(optimizer)
        norm = total_norm(model, world)
        grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's is a DTensor
        # One exchange for all: tp ranks have the same losses, all ranks the same norm.
        *losses, grad_norm = world.sum_over_all(*(losses / world.tp), grad_norm / world.size)
        loss = Loss.of(losses, model.objectives)
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
    """Adds a micro-batch's gradients; returns its part of the objectives' mean losses (M,), which n_targets divide."""
    losses = forward(model, world, progress, n_targets, *batch)
    backward(model, scaler, world, progress, losses)
    return losses.detach()


def in_stages(model, scaler, world, n_targets, batches):
    """The sum of all micro-steps, whose forwards and backwards come in the order of this rank's stage of a pipeline."""
    losses, n = {}, len(batches)
    for action, i in schedule(n, world.stage, world.pp):
        progress = f"{i + 1} of {n}"
        if action == "forward":
            losses[i] = forward(model, world, progress, n_targets, *batches[i])
        else:
            sync_gradients(model, last=i + 1 == n)
            backward(model, scaler, world, progress, losses[i])
            losses[i] = losses[i].detach()
    model.stage.finish()
    return sum(losses.values())


def forward(model, world, progress, n_targets, *batch):
    """A micro-batch's part of the objectives' mean losses (M,)."""
    with world.phase("forward", progress), world.autocast():
        return model(*batch) / n_targets


def backward(model, scaler, world, progress, losses):
    """Adds the gradients of a forward's losses."""
    with world.phase("backward", progress):
        # DDP and FSDP average gradients over ranks, and the loss is the ranks' sum: so multiply by the ranks.
        scaler.scale(weighted_sum(losses, model.objectives) * world.data_ranks * world.cp).backward()


def update(model, optimizer, scaler, cfg, norm):
    """Clips the gradients, whose norm is given, and steps the optimizer."""
    if cfg.optim.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.optim.grad_clip, norm)
    scaler.step(optimizer)


def evaluate(model, splits, objective, cfg, world):
    """Mean loss and accuracy over the fixed windows of splits, the same for every batch size and number of ranks.

    Also returns the accuracy of always predicting the most frequent target and, where the splits know the bytes of
    their tokens, the bits per byte of the targets' text. Several splits get equal parts of eval_tokens; val_losses has
    the loss of each by its folder's name. Of several objectives val_loss is the weighted sum, the other figures are the
    first one's, and val_loss_nsp and val_accuracy_nsp, for example, are each one's own.
    """
    model.eval()
    share = cfg.eval_tokens // len(splits), cfg.micro_batch_size, world.data_rank, world.data_ranks
    sums = {split.folder: sums_over(model, eval_batches(split, objective, *share), world) for split in splits}
    model.train()
    reshard(model)
    (losses, n_correct, counts), frequencies = map(sum, zip(*sums.values()))
    n_targets, n_bytes, weights = counts[0].item(), 0, model.cfg.objectives
    if empty := [(name, folder) for folder, (s, _) in sums.items() for name, n in zip(weights, s[2]) if not n]:
        what = "finds no target of {} in the validation split of {}".format(*empty[0])
        what = f"eval_tokens {cfg.eval_tokens} {what}"
        raise UserError(f"{what}; raise eval_tokens, or the split's share of the text by --val_fraction of prepare.py")
    if model.cfg.is_causal and splits[0].token_bytes:
        token_bytes = torch.tensor(splits[0].token_bytes)
        n_bytes = frequencies[: len(token_bytes)].dot(token_bytes).item()  # a model may have more ids than its data
    figures = {
        "val_loss": weighted_sum((losses / counts).tolist(), weights),
        "val_accuracy": (n_correct[0] / n_targets).item(),
        "val_accuracy_of_commonest": torch.max(frequencies).item() / n_targets,
    }
    if n_bytes:
        figures["val_bpb"] = losses[0].item() / math.log(2) / n_bytes
    if len(sums) > 1:
        figures["val_losses"] = {name: weighted_sum((s[0] / s[2]).tolist(), weights) for name, (s, _) in sums.items()}
    if len(weights) > 1:
        for kind, sums_of_kind in (("loss", losses), ("accuracy", n_correct)):
            figures |= {f"val_{kind}_{name}": x for name, x in zip(weights, (sums_of_kind / counts).tolist())}
        figures.pop(f"val_accuracy_{CONTRASTIVE}", None)  # nothing is nearer to a text than itself
    return figures


@torch.no_grad()
def sums_over(model, batches, world):
    """Sums over all ranks' batches: (3, M) and (V,).

    The first has the losses, right answers and targets of each objective, the second the number of each token among
    the targets.
    """
    sums = torch.zeros(3, len(model.cfg.objectives), dtype=torch.float64)
    frequencies, embedded = torch.zeros(model.cfg.vocab_size, dtype=torch.int64), {}
    for i, batch in enumerate(batches):
        with world.phase("evaluation"), world.autocast():
            here = each(batch, lambda part: part.to(world.device))
            losses, n_correct, *embeddings = model(*here, count_correct=True)
        sums[:2] += torch.stack([losses, n_correct]).view(2, -1).cpu()
        sums[2] += count_targets(model.cfg.objectives, *batch)
        frequencies += torch.bincount(batch[1][batch[1] != IGNORE], minlength=len(frequencies))
        if embeddings:  # of contrastive
            first = (i * world.data_ranks + world.data_rank) * len(batch[0])
            texts = (batch[1].amax(1) != IGNORE) & (torch.arange(len(batch[0])) < CONTRASTED - first)
            embedded[first] = embeddings[0].cpu()[texts]
    sums, frequencies = world.sum_over_data(sums), world.sum_over_data(frequencies)
    world.sum_over_stages(sums[:2])  # the last one's, since the others have 0
    if embedded:
        by_first = {first: part for of_rank in world.gather(embedded) for first, part in of_rank.items()}
        sums[:, -1] = contrast(torch.cat([by_first[first] for first in sorted(by_first)]))
    return sums, frequencies


def build(cfg, world, seed):
    """The model, ready to train on this rank, its optimizer, and the gradient scaler, which only fp16 uses."""
    with torch.device("meta"):
        model = cfg.model.build()
    distribute(model, cfg.parallel, world, seed, stages_here(cfg, world))
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.precision == "fp16")
    return model, build_optimizer(model, cfg.optim, world), scaler


if __name__ == "__main__":
    run_script(main, Settings, __doc__, needs_console=False)
    end_process()
