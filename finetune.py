"""Fine-tunes a model to classify texts, or to give them numbers.

    python finetune.py --task=classify --init_from=bert-base-uncased --train_file=train.tsv --eval_file=dev.tsv
    torchrun --nproc_per_node=2 finetune.py config/finetune_sst2.py --seeds=3

The same command again continues from the newest checkpoint in out_dir.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from checkpoint import CheckpointConfig, checkpoints, load_checkpoint, newest_checkpoint
from config import Config, Count, NotNegative, Positive, Share, UpToOne, UserError, only, run_script
from data import DataConfig, each, near_divisors
from heads import LabelModel, label_loss
from interop.pretrained import keep_tokenizer_of, load_tokenizer_of, start_from, starting_config, with_model
from metrics import CHOICES, METRICS, metrics_of
from model import TRAINING_ONLY, ModelConfig
from objective import ObjectiveConfig
from ops import IGNORE
from optim import OptimConfig, build_optimizer
from parallel import ParallelConfig, distribute, reshard
from run.folder import RunConfig, run_dir_of, writing_to
from run.guard import guarded
from run.health import HealthConfig
from run.log import LogConfig
from run.loop import TrainConfig, fit, train_step
from text.examples import ExampleLoader, ExampleOrder, Examples, Framing, read_columns
from world import WorldConfig, end_process, init_world

PART = r"embeddings|blocks\.(\d+)(?:-(\d+))?"  # of a model, to freeze
EMBEDDINGS = ("wte", "wpe", "wtt", "norm_e")


@dataclass(frozen=True)
class FinetuneConfig(Config):
    task: Literal["classify", "regress"] = "classify"  # classify: one of the labels in train_file; regress: a number
    train_file: str | None = None  # labelled texts to learn from: a .tsv, .jsonl or .parquet file
    eval_file: str | None = None  # labelled texts to evaluate on
    predict_file: str | None = None  # texts to label at the end, into out_dir/predictions.jsonl; none: eval_file
    text_column: str = "text"  # column of the text
    second_column: str | None = None  # column of a second text, for pairs of texts
    label_column: str = "label"  # column of the label
    tsv_columns: tuple | None = None  # names of the .tsv files' columns; none: they stand in the first line
    batch_examples: Count = 32  # examples per optimizer step, over all ranks and micro-steps
    epochs: Positive = 3.0  # passes over train_file; max_steps replaces it
    focal_gamma: NotNegative = 0.0  # classify: exponent of the focal loss, for rare classes; 0: cross-entropy
    freeze: tuple | None = None  # parts that stay as they are: embeddings, blocks.3, blocks.0-5, with commas between
    layer_decay: UpToOne = 1.0  # factor of the learning rate from a layer to the one below it; 1: all learn alike
    lora_rank: Count | None = None  # train the head, and adapters of this rank in the blocks; none: everything
    lora_alpha: Positive = 16.0  # lora_rank times the adapters' scale
    metric: Literal[*CHOICES] | None = None  # chooses the best checkpoint; none: the first that the task has
    seeds: Count = 1  # runs with seeds from `seed` on, each in a folder of its own; prints mean and deviation

    def __post_init__(self):
        super().__post_init__()
        if self.metric and self.metric not in (*METRICS[self.task], "loss"):
            possible = ", ".join((*METRICS[self.task], "loss"))
            raise UserError(f"metric is {self.metric}, which {self.task} does not have; use one of {possible}")
        if self.focal_gamma and self.task != "classify":
            raise UserError(f"focal_gamma is {self.focal_gamma}, but task {self.task} has no classes; leave it out")
        for part in self.freeze or ():
            if not re.fullmatch(PART, part):
                raise UserError(f"freeze names {part!r}; its parts are embeddings, blocks.3 or blocks.0-5")


@dataclass(frozen=True)
class Optim(OptimConfig):
    """OptimConfig with fine-tuning's usual values."""

    learning_rate: NotNegative = 2e-5
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "linear"
    weight_decay: NotNegative = 0.01
    beta2: Share = 0.999


@dataclass(frozen=True)
class Settings:
    finetune: FinetuneConfig
    model: ModelConfig = only("block_size", *sorted(TRAINING_ONLY - {"z_loss"}))
    objective: ObjectiveConfig = only()
    data: DataConfig = only("micro_batch_size")
    optim: Optim
    parallel: ParallelConfig
    world: WorldConfig
    run: RunConfig
    checkpoint: CheckpointConfig = only("keep_checkpoints")
    health: HealthConfig
    log: LogConfig
    train: TrainConfig = only("eval_interval", "max_minutes")
    presets: tuple = ()
    given: frozenset = dataclasses.field(default=frozenset(), compare=False)


def main(cfg):
    out_dir, n = run_dir_of(cfg) or "out/finetune", cfg.finetune.seeds
    with init_world(cfg.world, cfg.parallel) as world:
        results = []
        for seed in range(cfg.run.seed, cfg.run.seed + n):
            run = replace(cfg.run, seed=seed, out_dir=out_dir if n == 1 else f"{out_dir}/seed_{seed}")
            figures = fine_tune(replace(cfg, run=run), world)
            if figures is None:  # a stop was requested
                return
            results.append(figures)
        if n > 1 and world.is_main:
            spread = {name: [figures[name] for figures in results] for name in results[0]}
            for name, values in spread.items():
                print(f"{name:<10} {statistics.fmean(values):.4f} +- {statistics.stdev(values):.4f} over {n} seeds")
            with writing_to(out_dir):
                (Path(out_dir) / "seeds.json").write_text(json.dumps(spread, indent=1) + "\n")


def fine_tune(cfg, world):
    """One run: its figures on eval_file with the best checkpoint; None where it was stopped before its end."""
    cfg, train_set, eval_set, predict_set = open_examples(cfg, world)
    order = ExampleOrder(cfg.finetune.train_file, train_set.lengths, cfg.finetune.batch_examples, cfg.run.seed)
    cfg = with_steps(cfg, order, world)
    micro_steps = cfg.finetune.batch_examples // (cfg.data.micro_batch_size * world.data_ranks)
    loader = ExampleLoader(order, train_set, 0, micro_steps, cfg.data.micro_batch_size, world)
    with guarded(cfg, world) as stop, contextlib.closing(loader) as train_data:
        parts = build(cfg, world)
        model = parts[0]

        def start():
            start_from(cfg, model, world)
            keep_tokenizer_of(cfg, world)

        evaluation = functools.partial(evaluate, model, eval_set, cfg, world)
        fingerprint = f"{train_set.fingerprint()}-{eval_set.fingerprint()}"
        state = fit(cfg, world, stop, parts, train_data, fingerprint, start, train_step, evaluation)
        if not state.is_finished(cfg):
            return None
        if checkpoints(cfg.run.out_dir):
            load_checkpoint(newest_checkpoint(cfg.run.out_dir, world, best=True), model)
        figures = evaluation()
        figures.pop("score", None)
        write_predictions(cfg, logits_of(model, predict_set, cfg, world), world)
        if world.is_main:
            text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
            print(f"best       {text}; its predictions are in {cfg.run.out_dir}/predictions.jsonl", flush=True)
        return figures


# ---- settings and data


def open_examples(cfg, world):
    """(cfg with its model, the Examples of train_file, of eval_file, and of those to predict)."""
    tune, out_dir = cfg.finetune, cfg.run.out_dir
    if lacking := [name for name in ("train_file", "eval_file") if getattr(tune, name) is None]:
        raise UserError(f"{', '.join(lacking)} is none; name a .tsv, .jsonl or .parquet file of labelled texts")
    where = out_dir if checkpoints(out_dir) else cfg.run.init_from
    if where is None:
        raise UserError("init_from is none; name the weights to fine-tune: a run's or a Hugging Face model's folder")
    if cfg.parallel.tp > 1:
        raise UserError(f"tp is {cfg.parallel.tp}, but heads for labels are not split; use --strategy=fsdp")
    model = starting_config(where, cfg.model, cfg.given, kept=TRAINING_ONLY - cfg.given)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelConfig)}
    labels = ("value",)
    if tune.task == "classify":
        labels = labels_of(tune, read_columns(tune.train_file, [tune.label_column], tune.tsv_columns))
    adapters = {"lora_rank": tune.lora_rank, "lora_scale": tune.lora_alpha / (tune.lora_rank or tune.lora_alpha)}
    cfg = replace(cfg, model=LabelModel(**fields, task=tune.task, labels=labels, **adapters))
    tokenizer = with_model(where, load_tokenizer_of, world)
    train_set, eval_set = (read_examples(cfg, path, tokenizer, world) for path in (tune.train_file, tune.eval_file))
    if tune.predict_file is None:
        return cfg, train_set, eval_set, eval_set
    return cfg, train_set, eval_set, read_examples(cfg, tune.predict_file, tokenizer, world, has_labels=False)


def labels_of(cfg, columns):
    """The labels of a column as texts, in order; UserError where there is one alone. cfg: a FinetuneConfig."""
    labels = {str(label) for label in columns[cfg.label_column]}
    if len(labels) == 1:
        rule = f"{cfg.train_file} has the label {labels.pop()!r} alone"
        raise UserError(f"{rule}; classes are at least two: check --label_column, {cfg.label_column}")
    return tuple(sorted(labels, key=lambda label: (int(label) if label.isdecimal() else math.inf, label)))


def read_examples(cfg, path, tokenizer, world, has_labels=True):
    """The Examples of a file; UserError, with the record, where a text or a label is none."""
    tune = cfg.finetune
    texts = [name for name in (tune.text_column, tune.second_column) if name]
    columns = read_columns(path, texts + [tune.label_column] * has_labels, tune.tsv_columns)
    for name in texts:
        if wrong := [i for i, text in enumerate(columns[name], start=1) if not isinstance(text, str)]:
            raise UserError(f"{path} has no text as {name} of record {wrong[0]}; name another column")
    labels = columns[tune.label_column] if has_labels else []
    targets = [target_of(cfg.model, label, f"{path}, record {i}") for i, label in enumerate(labels, start=1)] or None
    framing = Framing(tokenizer, cfg.model.is_causal, cfg.model.block_size)
    examples = Examples(framing, *(columns[name] for name in texts), *[None] * (len(texts) == 1), targets)
    if world.is_main:
        mean, longest = examples.lengths.mean(), examples.lengths.max()
        cut = f"; {framing.n_cut:,} of them were longer and are cut to block_size" if framing.n_cut else ""
        print(f"examples   {len(examples):,} of {path}, {mean:.0f} tokens on average, at most {longest}{cut}")
    return examples


def target_of(model, label, where):
    """The target of a label: the number of its class, or a float."""
    if model.task == "classify":
        if (label := str(label)) not in model.labels:
            known = ", ".join(model.labels[:9]) + ", ..." * (len(model.labels) > 9)
            raise UserError(f"{where} has the label {label!r}, which train_file has not; its labels are {known}")
        return model.labels.index(label)
    with contextlib.suppress(TypeError, ValueError):
        if math.isfinite(number := float(label)) and number != IGNORE:
            return number
    raise UserError(f"{where} has the label {label!r}, where there must be a finite number other than {IGNORE}")


def with_steps(cfg, order, world):
    """cfg with what follows from the number of examples; a token of `batch_tokens` is one of an average example."""
    tune, given, ranks = cfg.finetune, cfg.given, world.data_ranks
    size, micro = tune.batch_examples, cfg.data.micro_batch_size
    if "micro_batch_size" not in given:
        micro = math.gcd(micro, max(1, size // ranks))
    if size % (micro * ranks):
        fits = f"batch_examples {max(1, round(size / (micro * ranks))) * micro * ranks}"
        fits = f"micro_batch_size {near_divisors(size // ranks, micro)}" if size % ranks == 0 else fits
        rule = f"batch_examples {size} is not a multiple of micro_batch_size {micro} x {ranks} ranks"
        raise UserError(f"{rule}; {fits} would fit")
    mean = max(1, round(float(order.lengths.mean())))
    data = replace(cfg.data, data_dir=tune.train_file, seq_len=mean, batch_tokens=size * mean, micro_batch_size=micro)
    steps = cfg.optim.max_steps if "max_steps" in given else math.ceil(tune.epochs * order.steps_per_epoch)
    warmup = cfg.optim.warmup_steps if "warmup_steps" in given else steps // 10
    interval = cfg.train.eval_interval if "eval_interval" in given else order.steps_per_epoch
    graphs = cfg.parallel.cuda_graphs or False  # batches have too many shapes
    return replace(
        cfg, data=data, optim=replace(cfg.optim, max_steps=steps, warmup_steps=warmup),
        train=replace(cfg.train, eval_interval=interval), parallel=replace(cfg.parallel, cuda_graphs=graphs),
        checkpoint=replace(cfg.checkpoint, save_interval=interval),
    )  # fmt: skip


def build(cfg, world):
    """The model, ready to train on this rank, its optimizer, and the gradient scaler, which only fp16 uses."""
    with torch.device("meta"):
        model = cfg.model.build()
    model.focal_gamma = cfg.finetune.focal_gamma
    freeze(model, cfg.finetune.freeze or ())
    if (decay := cfg.finetune.layer_decay) != 1 and cfg.optim.optimizer == "muon":
        raise UserError(f"layer_decay is {decay}, which muon does not have; use --optimizer=adamw")
    distribute(model, cfg.parallel, world, cfg.run.seed)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.precision == "fp16")
    return model, build_optimizer(model, cfg.optim, world, lambda name: decay ** layers_above(model, name)), scaler


def freeze(model, parts):
    """Keeps parts of a model from training, each as in PART; UserError where there is no such block.

    With adapters, all else but the head and its pooler stays as it is, too.
    """
    frozen, n = [], len(model.blocks)
    for name, param in model.named_parameters():
        if model.cfg.lora_rank and not (".lora_" in name or name.startswith(("pooler", "classifier"))):
            param.requires_grad_(False)
    for part in parts:
        first, last = re.fullmatch(PART, part).groups()
        if first is None:
            frozen += filter(None, (getattr(model, name) for name in EMBEDDINGS))
        elif int(first) <= int(last or first) < n:
            frozen += model.blocks[int(first) : int(last or first) + 1]
        else:
            raise UserError(f"freeze names {part}, but the model has blocks 0 to {n - 1}; name some of them, in order")
    for module in frozen:
        module.requires_grad_(False)


def layers_above(model, name):
    """Layers between the parameter of a name and the head, which has none; embeddings are the lowest layer."""
    kind, _, rest = name.partition(".")
    n = len(model.blocks)
    return n - int(rest.partition(".")[0]) if kind == "blocks" else n + 1 if kind in EMBEDDINGS else 0


# ---- evaluation


def evaluate(model, examples, cfg, world):
    """Mean loss and metrics; score is the metric that chooses the best checkpoint."""
    logits, tune = logits_of(model, examples, cfg, world), cfg.finetune
    targets = torch.from_numpy(examples.targets)
    loss = label_loss(torch.from_numpy(logits), targets).item() / len(examples)
    metrics = metrics_of(tune.task, logits, examples.targets)
    chosen = tune.metric or METRICS[tune.task][0]
    return {"val_loss": loss, **metrics, **({} if chosen == "loss" else {"score": metrics[chosen]})}


@torch.no_grad()
def logits_of(model, examples, cfg, world):
    """Logits (n, L) of all examples, float32, on each rank; the ranks share the work."""
    size, ranks = cfg.data.micro_batch_size, world.data_ranks
    order, found = np.argsort(examples.lengths, kind="stable"), []
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    batches += [order[:0]] * (-len(batches) % ranks)  # equally many for each rank
    model.eval()
    for here in batches[world.data_rank :: ranks]:
        ids, _, *others = each(examples.batch(here, size), lambda part: part.to(world.device))
        with world.phase("evaluation"), world.autocast():
            found.append((here, model(ids, None, *others)[: len(here), 0].cpu().numpy()))
    model.train()
    reshard(model)
    logits = np.zeros((len(examples), len(cfg.model.labels)), np.float32)
    for here, values in (pair for by_rank in world.gather(found) for pair in by_rank):
        logits[here] = values
    return logits


def write_predictions(cfg, logits, world):
    """Writes a line for each text: the prediction and, of classes, their probabilities."""
    if not world.is_main:
        return
    with writing_to(cfg.run.out_dir), open(Path(cfg.run.out_dir) / "predictions.jsonl", "w", encoding="utf-8") as file:
        for row in logits:
            record = {"prediction": float(row[0])}
            if cfg.model.task == "classify":
                shares = torch.from_numpy(row).double().softmax(0).tolist()
                record = {"prediction": cfg.model.labels[int(row.argmax())]}
                record["probabilities"] = dict(zip(cfg.model.labels, shares))
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_script(main, Settings, __doc__, needs_console=False)
    end_process()
