"""Trains a model.

    python train.py config/quickstart.py --learning_rate=1e-3
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py

The same command again continues from the newest checkpoint in out_dir.
"""

import dataclasses
import functools
import math
import operator
from dataclasses import dataclass

import torch

from checkpoint import CheckpointConfig
from config import UserError, run_script
from data import DataConfig, Split, each, eval_batches, objective_for, open_data, seq_len_of
from interop.pretrained import resolve, start_from
from model import ModelConfig, Transformer
from objective import ObjectiveConfig
from ops import IGNORE
from optim import OptimConfig, build_optimizer
from parallel import ParallelConfig, distribute, reshard
from run.folder import RunConfig, run_dir_of
from run.guard import guarded
from run.health import HealthConfig
from run.log import LogConfig
from run.loop import TrainConfig, fit, train_step
from world import WorldConfig, end_process, init_world

EVAL_MASK_SEED = 0  # masked evaluation draws the same masks in every run


@dataclass(frozen=True)
class Settings:
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    world: WorldConfig
    run: RunConfig
    checkpoint: CheckpointConfig
    health: HealthConfig
    log: LogConfig
    train: TrainConfig
    presets: tuple = ()
    given: frozenset = dataclasses.field(default=frozenset(), compare=False)

    def __post_init__(self):
        if not self.run.init_from:  # the weights' block_size may be another
            seq_len_of(self)  # raises where it does not fit the model


def main(cfg):
    cfg = resolve(dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, out_dir=run_dir_of(cfg) or "out/run")))
    with (
        init_world(cfg.world, cfg.parallel) as world,
        open_data(cfg, world) as (train_data, val_data),
        guarded(cfg, world) as stop,
    ):
        model, optimizer, scaler = build(cfg, world, cfg.run.seed)
        fingerprint = f"{train_data.order.split.fingerprint()}-{Split.joined(val_data).fingerprint()}"
        val_objective = objective_for(cfg, EVAL_MASK_SEED)
        start = functools.partial(start_from, cfg, model, world)
        evaluation = functools.partial(evaluate, model, val_data, val_objective, cfg.data, world)
        fit(cfg, world, stop, (model, optimizer, scaler), train_data, fingerprint, start, train_step, evaluation)


def evaluate(model, splits, objective, cfg, world):
    """Mean loss and accuracy over the fixed windows of splits, the same for every batch size and number of ranks.

    Also returns the accuracy of always predicting the most frequent target and, where the splits know the bytes of
    their tokens, the bits per byte of the targets' text. Several splits get equal parts of eval_tokens; val_losses has
    the loss of each by its folder's name.
    """
    model.eval()
    share = cfg.eval_tokens // len(splits), cfg.micro_batch_size, world.data_rank, world.data_ranks
    sums = {split.folder: sums_over(model, eval_batches(split, objective, *share), world) for split in splits}
    model.train()
    reshard(model)
    loss, n_correct, frequencies = map(sum, zip(*sums.values()))
    n_targets, n_bytes = frequencies.sum().item(), 0
    if empty := [folder for folder, (*_, n) in sums.items() if not n.any()]:
        what = f"eval_tokens {cfg.eval_tokens} reads special tokens alone from the validation split of {empty[0]}"
        raise UserError(f"{what}; raise eval_tokens, or the split's share of the text by --val_fraction of prepare.py")
    if model.cfg.is_causal and splits[0].token_bytes:
        n_bytes = sum(map(operator.mul, frequencies.tolist(), splits[0].token_bytes))
    return {
        "val_loss": loss / n_targets,
        "val_accuracy": n_correct / n_targets,
        "val_accuracy_of_commonest": frequencies.max().item() / n_targets,
        **({"val_bpb": loss / math.log(2) / n_bytes} if n_bytes else {}),
        **(
            {"val_losses": {name: loss / n.sum().item() for name, (loss, _, n) in sums.items()}}
            if len(sums) > 1
            else {}
        ),
    }


@torch.no_grad()
def sums_over(model, batches, world):
    """(sum of losses, number of right answers, number of each token among the targets) over all ranks' batches."""
    sums, frequencies = torch.zeros(2, dtype=torch.float64), torch.zeros(model.cfg.vocab_size, dtype=torch.int64)
    for batch in batches:
        with world.phase("evaluation"), world.autocast():
            loss_and_correct = model(*each(batch, lambda part: part.to(world.device)), count_correct=True)
        sums += torch.stack(loss_and_correct).cpu()
        frequencies += torch.bincount(batch[1][batch[1] != IGNORE], minlength=len(frequencies))
    return *world.sum_over_data(sums).tolist(), world.sum_over_data(frequencies)


def build(cfg, world, seed):
    """The model, ready to train on this rank, its optimizer, and the gradient scaler, which only fp16 uses."""
    with torch.device("meta"):
        model = Transformer(cfg.model)
    distribute(model, cfg.parallel, world, seed)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.precision == "fp16")
    return model, build_optimizer(model, cfg.optim, world), scaler


if __name__ == "__main__":
    run_script(main, Settings, __doc__, needs_console=False)
    end_process()
