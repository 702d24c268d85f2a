"""Fine-tunes a model to label texts or words, to give texts numbers, to find answers in them, or to answer in chats.

    python finetune.py --task=classify --init_from=bert-base-uncased --train_file=train.tsv --eval_file=dev.tsv
    torchrun --nproc_per_node=2 finetune.py config/finetune_sst2.py --seeds=3
    python finetune.py --task=instruct --init_from=gpt2 --train_file=train.jsonl --eval_file=dev.jsonl

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
from config import Config, Count, NotNegative, Positive, Share, UpToOne, UserError, Whole, only, run_script
from data import DataConfig, each, near_divisors
from generation import GenerationConfig
from heads import TunedModel
from interop.chat import answer_rows, keep_chat, starting_chat
from interop.pretrained import keep_tokenizer_of, load_tokenizer_of, start_from, starting_config, with_model
from interop.score import over_ranks
from lora import AdaptedModel
from model import ModelConfig
from objective import ObjectiveConfig
from optim import OptimConfig, build_optimizer
from parallel import ParallelConfig, distribute, reshard
from run.folder import RunConfig, run_dir_of, writing_to
from run.guard import guarded
from run.health import HealthConfig
from run.log import LogConfig
from run.resume import Saver, State
from text.examples import ExampleLoader, ExampleOrder, Framing, examples_of
from text.tasks import METRICS, TASKS
from train import TrainConfig, sums_over, train
from world import WorldConfig, end_process, init_world

PART = r"embeddings|blocks\.(\d+)(?:-(\d+))?"  # freeze names parts of a model so
PREDICTIONS = "predictions.jsonl"
EMBEDDINGS = ("wte", "wpe", "wtt", "norm_e")


@dataclass(frozen=True)
class FinetuneConfig(Config):
    task: Literal[*TASKS] = "classify"  # classify, regress: a label, a number a text; tag: a label a word; qa; instruct
    train_file: str | None = None  # labelled texts to learn from: a .tsv, .jsonl or .parquet file
    eval_file: str | None = None  # labelled texts to evaluate on
    predict_file: str | None = None  # texts to label at the end, into out_dir/predictions.jsonl; none: eval_file
    text_column: str = "text"  # column of the text; tag: of words; qa: of questions; instruct: of messages, or prompts
    second_column: str | None = None  # column of a second text, for pairs of texts; qa: of the context
    label_column: str | None = "label"  # column of labels; tag: of tags; qa, instruct: of answers (none: in messages)
    tsv_columns: tuple | None = None  # names of the .tsv files' columns; none: they stand in the first line
    stride: Whole = 128  # qa: tokens that a long context's windows share
    max_answer_tokens: Count = 30  # qa: longest answer to predict
    batch_examples: Count = 32  # examples per optimizer step, over all ranks and micro-steps
    epochs: Positive = 3.0  # passes over train_file; max_steps replaces it
    focal_gamma: NotNegative = 0.0  # classify, tag: exponent of the focal loss, for rare classes; 0: cross-entropy
    freeze: tuple | None = None  # parts that stay as they are: embeddings, blocks.3, blocks.0-5, with commas between
    layer_decay: UpToOne = 1.0  # factor of the learning rate from a layer to the one below it; 1: all learn alike
    lora_rank: Count | None = None  # train the head, and adapters of this rank in the blocks; none: everything
    lora_alpha: Positive = 16.0  # lora_rank times the adapters' scale
    chat_template: str | None = None  # instruct: file of a chat template; none: the model's own, or a plain one
    metric: Literal[*METRICS] | None = None  # chooses the best checkpoint; none: the first that the task has
    seeds: Count = 1  # runs with seeds from `seed` on, each in a folder of its own; prints mean and deviation

    @property
    def text_columns(self):
        """The columns of a record's texts."""
        return [name for name in (self.text_column, self.second_column) if name]

    def __post_init__(self):
        super().__post_init__()
        if self.metric and self.metric not in (possible := (*TASKS[self.task].metrics, "loss")):
            rule = f"metric is {self.metric}, which {self.task} does not have"
            raise UserError(f"{rule}; use one of {', '.join(possible)}")
        if len(self.text_columns) not in (n := TASKS[self.task].n_texts):
            rule = f"task {self.task} reads {n[0]} of text_column and second_column"
            raise UserError(f"second_column is {self.second_column or 'none'}, but {rule}; name as many")
        for part in self.freeze or ():
            if not re.fullmatch(PART, part):
                raise UserError(f"freeze names {part!r}; its parts are embeddings, blocks.3 or blocks.0-5")


@dataclass(frozen=True)
class Weights(ModelConfig):
    """The settings of the model that fine-tuning may change."""

    block_size: Count | None = None  # longest text, in tokens; none: the weights' own
    dropout: Share | None = None  # share of activations set to 0; none: the weights' own


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
    model: Weights = only("block_size", "dropout", "label_smoothing")
    objective: ObjectiveConfig = only()
    generation: GenerationConfig = only("max_new_tokens")
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
    cfg, task, table = open_task(cfg, world)
    tune = cfg.finetune
    train_set = examples_of(task, tune, tune.train_file, table, world)
    eval_set = predict_set = examples_of(task, tune, tune.eval_file, task.read(tune.eval_file, tune), world)
    if path := tune.predict_file:
        predict_set = examples_of(task, tune, path, task.read(path, tune, has_labels=False), world)
    order = ExampleOrder(tune.train_file, train_set.lengths, tune.batch_examples, cfg.run.seed)
    cfg = with_steps(cfg, order, world)
    micro_steps = tune.batch_examples // (cfg.data.micro_batch_size * world.data_ranks)
    loader = ExampleLoader(order, train_set, 0, micro_steps, cfg.data.micro_batch_size, world)
    with guarded(cfg, world) as stop, contextlib.closing(loader) as train_data:
        model, optimizer, scaler = build(cfg, world)
        saver = Saver(cfg, world, model, optimizer, scaler, f"{train_set.fingerprint()}-{eval_set.fingerprint()}")
        state = saver.resume()
        if state is None:
            start_from(cfg, model, world, int(train_set.lengths.max()))
            keep_tokenizer_of(cfg, world)
            if not task.has_head and world.is_main:
                keep_chat(task.chat, task.framing.tokenizer, cfg.run.out_dir)
            state = State()
        evaluation = functools.partial(evaluate, model, task, eval_set, cfg, world)
        state = train(saver, state, train_data, evaluation, stop)
        if not state.is_finished(cfg):
            return None
        if checkpoints(cfg.run.out_dir):
            load_checkpoint(newest_checkpoint(cfg.run.out_dir, world, best=True), model)
        figures, rows = evaluation(), predict_set.rows
        figures.pop("score", None)
        if task.has_head:
            answers = logits_of(model, predict_set, cfg, world)
        else:
            answers = answer_rows(cfg, task, rows, world)
            figures |= task.figures(rows, answers)
        if world.is_main:
            with writing_to(cfg.run.out_dir):
                lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in task.predictions(rows, answers)]
                (Path(cfg.run.out_dir) / PREDICTIONS).write_text("".join(lines), encoding="utf-8")
            text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
            print(f"best       {text}; its predictions are in {cfg.run.out_dir}/{PREDICTIONS}", flush=True)
        return figures


# ---- settings and data


def open_task(cfg, world):
    """(cfg with its model's settings, the task, the columns of train_file)."""
    tune, out_dir = cfg.finetune, cfg.run.out_dir
    if lacking := [name for name in ("train_file", "eval_file") if getattr(tune, name) is None]:
        raise UserError(f"{', '.join(lacking)} is none; name a .tsv, .jsonl or .parquet file of labelled texts")
    where = out_dir if checkpoints(out_dir) else cfg.run.init_from
    if where is None:
        raise UserError("init_from is none; name the weights to fine-tune: a run's or a Hugging Face model's folder")
    kind, tp = TASKS[tune.task], cfg.parallel.tp
    is_qa, given = tune.task == "qa", vars(tune) | {"label_smoothing": cfg.model.label_smoothing}
    for name, is_possible, what in (
        ("focal_gamma", kind.has_classes and kind.has_head, "classes"), ("label_smoothing", kind.has_classes, "classes"),
        ("stride", is_qa, "windows"), ("max_answer_tokens", is_qa, "answers in texts"),
        ("chat_template", not kind.has_head, "conversations"),
    ):  # fmt: skip
        if name in cfg.given and given[name] and not is_possible:
            raise UserError(f"{name} is {given[name]}, but task {tune.task} has no {what}; leave it out")
    if tp > 1 and (kind.has_head or tune.lora_rank or 8 % tp):  # batches' widths are multiples of 8
        rule = "heads for labels and adapters are not split" if 8 % tp == 0 else "fine-tuning splits by 2, 4 or 8"
        raise UserError(f"tp is {tp}, but {rule}; use --strategy=fsdp")
    if (pp := cfg.parallel.pp) * (cp := cfg.parallel.cp) > 1:
        rule = "but fine-tuning divides neither blocks nor texts; use --strategy=fsdp"
        raise UserError(f"pp is {pp} and cp {cp}, {rule}")
    tune = replace(tune, **{name: value for name, value in kind.defaults.items() if name not in cfg.given})
    source = starting_config(where, cfg.model, cfg.given)
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(ModelConfig)}
    fields |= {"objective": source.base, "lora_rank": tune.lora_rank}
    fields["lora_scale"] = tune.lora_alpha / (tune.lora_rank or tune.lora_alpha)
    tokenizer = with_model(where, load_tokenizer_of, world)
    framing, table = Framing(tokenizer, source.is_causal, source.block_size), kind.read(tune.train_file, tune)
    if kind.has_head:
        labels = kind.labels(table[tune.label_column], f"{tune.train_file}, column {tune.label_column}")
        model, task = TunedModel(**fields, task=tune.task, labels=labels), kind(labels, framing, tune)  # type: ignore[call-arg]
        if kind.has_classes and world.is_main:
            print(f"labels     {len(labels)}: {', '.join(labels[:9])}{', ...' * (len(labels) > 9)}")
    else:
        if not source.is_causal:
            raise UserError(f"{where} is a masked model, which writes no answers; {tune.task} needs a causal one")
        cfg.parallel.check_model(source, source.block_size)
        chat = with_model(where, lambda opened: starting_chat(opened, tokenizer, tune.chat_template), world)
        model, task = AdaptedModel(**fields), kind(chat, framing)  # type: ignore[call-arg]
    return replace(cfg, model=model, finetune=tune), task, table


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
    (kind, _, rest), n = name.partition("."), len(model.blocks)
    return n - int(rest.partition(".")[0]) if kind == "blocks" else n + 1 if kind in EMBEDDINGS else 0


# ---- evaluation


def evaluate(model, task, examples, cfg, world):
    """Mean loss and the task's metrics; score is the metric that chooses the best checkpoint, if it is not the loss."""
    if not task.has_head:
        model.eval()
        shares = batches_of(examples, cfg)
        shares += [shares[0][:0]] * (-len(shares) % world.data_ranks)  # each rank has equally many
        shares = shares[world.data_rank :: world.data_ranks]
        batches = (examples.batch(here, cfg.data.micro_batch_size) for here in shares)
        loss, n_correct, n_targets = sums_over(model, batches, world)[0][:, 0].tolist()
        model.train()
        reshard(model)
        return {"val_loss": loss / n_targets, "val_accuracy": n_correct / n_targets}
    logits = logits_of(model, examples, cfg, world)
    metrics, chosen = task.figures(examples.rows, logits), cfg.finetune.metric or task.metrics[0]
    score = {} if chosen == "loss" else {"score": metrics[chosen]}
    return {"val_loss": task.loss(examples.rows, logits), **metrics, **score}


@torch.no_grad()
def logits_of(model, examples, cfg, world):
    """The logits of each row, float32 (K, L), on each rank; the ranks share the work."""

    def run(here):
        batch = examples.batch(here, cfg.data.micro_batch_size)
        ids, _, *others = each(batch, lambda part: part.to(world.device))
        with world.autocast():
            logits = model(ids, None, *others).cpu().numpy()
        return {i: part[: len(examples.rows[i].positions)] for i, part in zip(here.tolist(), logits)}

    model.eval()
    by_row = over_ranks(world, batches_of(examples, cfg), run)
    model.train()
    reshard(model)
    return [by_row[i] for i in range(len(examples))]


def batches_of(examples, cfg):
    """The numbers of the examples of each batch of evaluation, sorted by length."""
    order, size = np.argsort(examples.lengths, kind="stable"), cfg.data.micro_batch_size
    return [order[i : i + size] for i in range(0, len(order), size)]


if __name__ == "__main__":
    run_script(main, Settings, __doc__, needs_console=False)
    end_process()
