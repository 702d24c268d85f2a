"""How tests/learning_rates.csv was measured: python tests/measure_learning_rates.py TEXTS OUT.csv

TEXTS holds a data folder for each corpus, by prepare.py --tokenizer=byte --val_fraction=0.1; those called CORPUS_50k are
of the first 100,000 bytes, with --val_fraction=0.5. For each row of a plan the
rates walk by factors of two, from a first guess to both sides, until the best one has a worse neighbour on each side.
Rows that OUT.csv has are not run again.
"""

import collections
import csv
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
import train
from data import objective_for, open_data
from optim import lr_at, set_lr
from world import init_world

ROOT = Path(__file__).resolve().parent.parent
FIELDS = "corpus,n_embd,n_layer,batch_tokens,max_steps,seed,learning_rate,val_loss,seconds,commit,hardware".split(",")
SETTING = FIELDS[:6]  # what the best rate may depend on
SEQ_LEN, HEAD = 64, 32
# The plan: (corpus, width, layers, batch, steps). Those with 204,800 tokens say which batch is best for them.
SHAKESPEARE = [("shakespeare", width, 4, 1024, 200) for width in (64, 128)]
SHAKESPEARE += [("shakespeare", 64, 4, *each) for each in ((4096, 50), (256, 800), (1024, 50), (1024, 800))]
SHAKESPEARE += [("shakespeare", 64, n_layer, 1024, 200) for n_layer in (2, 8)]
SHAKESPEARE += [("shakespeare", 256, 4, 1024, 200)]
LEFT_OUT = [("shakespeare", 32, 4, 1024, 200)]  # too narrow for the fit's power of the width
OTHER_TEXTS = [("wikitext", 96, 3, 2048, 300), ("wikitext", 160, 2, 512, 400)]
OTHER_TEXTS += [(corpus, *each) for corpus in ("sst2", "python") for each in ((192, 3, 512, 300), (96, 6, 1024, 150))]
FITTED = SHAKESPEARE + OTHER_TEXTS
# Own text: 50 KB to train on, CORPUS_50k, at one rate: (width, epochs).
OWN_TEXT = [(64, 1), (64, 4), (128, 4), (64, 16)]


def settings(texts, corpus, width, n_layer, batch_tokens, max_steps, seed, learning_rate):
    """The settings of a run, as the command line would give them."""
    names = {
        "data_dir": texts / corpus, "n_embd": width, "n_layer": n_layer, "n_head": max(1, width // HEAD),
        "block_size": SEQ_LEN, "batch_tokens": batch_tokens, "micro_batch_size": min(64, batch_tokens // SEQ_LEN),
        "max_steps": max_steps, "warmup_steps": max_steps // 10, "learning_rate": learning_rate, "seed": seed,
        "eval_tokens": 32_768, "device": "cpu", "precision": "fp32", "out_dir": "out/unused", "compile": "false",
    }  # fmt: skip
    return config.load(train.Settings, [f"--{name}={value}" for name, value in names.items()])


def val_loss(cfg):
    """Validation loss at the end of a run; inf where it diverges."""
    cfg = train.resolve(cfg)
    with init_world(cfg.world, cfg.parallel) as world, open_data(cfg, world) as (train_data, val_data):
        model, optimizer, scaler = train.build(cfg, world, cfg.run.seed)
        losses = []
        for step in range(cfg.optim.max_steps):
            set_lr(optimizer, lr_at(step, cfg.optim, cfg.optim.max_steps))
            batches, _ = train_data.next()
            loss, *_ = train.train_step(model, optimizer, scaler, batches, cfg, world)
            losses.append(float(loss))
            if not math.isfinite(loss) or min(losses[-20:]) > losses[0] + 1:  # spikes of a step pass
                return math.inf
        objective = objective_for(cfg, train.EVAL_MASK_SEED, world)
        return train.evaluate(model, val_data, objective, cfg.data, world)["val_loss"]


class Table:
    """The rows of a CSV file, and the losses of the settings that they have."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            self.path.write_text(",".join(FIELDS) + "\n")
        with open(self.path, newline="") as file:
            self.losses = {self.key(row): float(row["val_loss"]) for row in csv.DictReader(file)}
        self.commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)

    def key(self, row):
        return row["corpus"], *(int(row[name]) for name in SETTING[1:]), float(f"{float(row['learning_rate']):.3g}")

    def loss(self, texts, *setting):
        """The loss of a setting, from the file or by a run, which adds a line to it."""
        row = dict(zip(FIELDS, setting))
        if self.key(row) not in self.losses:
            start = time.process_time()
            loss = val_loss(settings(texts, *setting))
            row |= {"val_loss": f"{loss:.4f}", "seconds": f"{time.process_time() - start:.0f}"}
            row |= {"commit": self.commit.stdout.strip(), "hardware": "1 thread of a Xeon with AMX"}
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, FIELDS, lineterminator="\n").writerow(row)
            print(*row.values(), flush=True)
            self.losses[self.key(row)] = loss
        return self.losses[self.key(row)]


def walk(table, texts, setting, guess, seeds):
    """Runs rates by factors of two around a guess, until the best has a worse one on both sides; returns the best.

    A rate's loss is the mean over seeds.
    """

    def loss(rate):
        return statistics.mean(table.loss(texts, *setting, seed, float(f"{rate:.3g}")) for seed in seeds)

    while (least := min((guess, guess * 2, guess / 2), key=loss)) != guess:
        guess = least
    return guess


def read(path):
    """{(corpus, width, layers, batch, steps): {learning rate: mean loss over seeds}} of a file."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for (*setting, _, rate), loss in Table(path).losses.items():
        found[tuple(setting)][rate].append(loss)
    return {setting: {rate: statistics.mean(losses) for rate, losses in of.items()} for setting, of in found.items()}


def best_rate(losses, setting):
    """The best rate of a setting: the lowest point of a parabola through the best measured one and its neighbours."""
    rates = losses[setting]
    best = min(rates, key=rates.get)
    left, middle, right = (rates[rate] for rate in (best / 2, best, best * 2))
    if math.isinf(right):
        return best
    return best * 2 ** (0.5 * (left - right) / (left - 2 * middle + right))


def fitted(best):
    """(rate at the first setting, exponents) of the law that fits the best rates, {setting: rate}, by least squares."""
    sizes, center = np.log2([setting[1:] for setting in best]), np.log2(SHAKESPEARE[0][1:])
    columns = np.column_stack([np.ones(len(sizes)), sizes - center])
    constant, *exponents = np.linalg.lstsq(columns, np.log2(list(best.values())), rcond=None)[0]
    return 2**constant, exponents


def main(texts, path):
    torch.set_num_threads(1)
    table, texts = Table(path), Path(texts)
    for plan, n_seeds in ((SHAKESPEARE, 3), (LEFT_OUT, 1), (OTHER_TEXTS, 4)):
        for setting in plan:
            print(setting, "best", walk(table, texts, setting, 4e-3, range(1, 1 + n_seeds)), flush=True)
    for width, epochs in OWN_TEXT:
        for corpus in ("shakespeare", "wikitext", "sst2"):
            table.loss(texts, f"{corpus}_50k", width, 4, 512, round(epochs * 50_000 / 512), 1, 4e-3)


if __name__ == "__main__":
    main(*sys.argv[1:])
