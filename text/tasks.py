"""The tasks of fine-tuning: what each makes of a record, how its logits are judged, and what it predicts."""

import contextlib
import functools
import itertools
import math
import re

import numpy as np
import torch

from config import UserError
from heads import label_loss
from metrics import classes, correlations, tags
from ops import IGNORE
from text.chat import Instruct
from text.examples import Examples, Row, read_columns


class Classify:
    """Gives a text, or a pair of texts, one of the labels in the training file."""

    has_head, metrics = True, ("accuracy", "f1", "matthews")  # the first one chooses the best checkpoint
    defaults, examples = {}, Examples  # settings that the user has not given; the class of a file's Rows

    @staticmethod
    def check(cfg):
        """UserError where a setting of the FinetuneConfig does not fit."""

    @staticmethod
    def read(path, names, cfg):
        """{name: its values, a list} of a file's columns. cfg: a FinetuneConfig."""
        return read_columns(path, names, cfg.tsv_columns)

    @staticmethod
    def labels(column, where):
        """The labels in a column as texts, in order; UserError where there is one alone. where: names the column."""
        if len(labels := {str(label) for label in column}) == 1:
            rule = f"{where} has the label {labels.pop()!r} alone"
            raise UserError(f"{rule}; classes are at least two: check --label_column")
        return tuple(sorted(labels, key=lambda label: (int(label) if label.isdecimal() else math.inf, label)))

    def __init__(self, labels, framing):
        self.labels, self.framing = labels, framing

    def rows(self, texts, label, where):
        """The Rows of a record, here one. label: None where it is to be predicted; where: the record, for UserErrors."""
        ids, n_first = self.framing(*texts, where=where)
        position = len(ids) - 1 if self.framing.is_causal else 0
        target = np.array([IGNORE]) if label is None else self.target(label, where)
        return [Row(ids, n_first, target, np.array([position]))]

    def target(self, label, where):
        """The number of a label, an array (1,)."""
        if (label := str(label)) not in self.labels:
            known = ", ".join(self.labels[:9]) + ", ..." * (len(self.labels) > 9)
            raise UserError(f"{where} has the label {label!r}, which train_file has not; its labels are {known}")
        return np.array([self.labels.index(label)])

    def loss(self, rows, logits):
        """The mean loss of all Rows of a file, whose logits are given as arrays (K, L)."""
        targets = np.concatenate([row.targets for row in rows])
        sum_of_losses = label_loss(torch.from_numpy(np.concatenate(logits)), torch.from_numpy(targets)).item()
        return sum_of_losses / max(1, int((targets != IGNORE).sum()))

    def figures(self, rows, logits):
        """{metric: value} for all Rows of a file and their logits, arrays (1, L)."""
        return classes(np.concatenate(logits), np.concatenate([row.targets for row in rows]))

    def predictions(self, rows, logits):
        """A dict for each record of a file, in order."""
        for row in np.concatenate(logits):
            shares = torch.from_numpy(row).double().softmax(0).tolist()
            yield {"prediction": self.labels[int(row.argmax())], "probabilities": dict(zip(self.labels, shares))}


class Regress(Classify):
    """Gives a text, or a pair of texts, a number."""

    metrics = "pearson", "spearman"

    @staticmethod
    def check(cfg):
        """UserError where a setting of the FinetuneConfig does not fit."""
        if cfg.focal_gamma:
            raise UserError(f"focal_gamma is {cfg.focal_gamma}, but task {cfg.task} has no classes; leave it out")

    @staticmethod
    def labels(column, where):
        """The one output's name."""
        return ("value",)

    def target(self, label, where):
        """A label as a number, an array (1,)."""
        with contextlib.suppress(TypeError, ValueError):
            if math.isfinite(number := float(label)) and number != IGNORE:
                return np.array([number], np.float32)  # as logits are
        raise UserError(f"{where} has the label {label!r}, where there must be a finite number other than {IGNORE}")

    def figures(self, rows, logits):
        """{metric: value} for all Rows of a file and their logits, arrays (1, 1)."""
        return correlations(np.concatenate(logits)[:, 0], np.concatenate([row.targets for row in rows]))

    def predictions(self, rows, logits):
        """A dict for each record of a file, in order."""
        for row in np.concatenate(logits):
            yield {"prediction": float(row[0])}


class Tag(Classify):
    """Gives each word of a list one of the tags in the training file, at the word's first token.

    A word has a blank before it, which an encoder's tokenizer drops. Metrics are those of entities where all tags are
    as in B-PER, I-PER and O.
    """

    metrics = "f1", "precision", "recall", "accuracy"

    @staticmethod
    def check(cfg):
        """UserError where a setting of the FinetuneConfig does not fit."""
        if cfg.second_column:
            raise UserError(f"second_column is {cfg.second_column}, but tag has one list of words; leave it out")

    @staticmethod
    def read(path, names, cfg):
        """{name: its values, a list} of a file's columns; a .tsv has a word a line, and no first line of names."""
        return read_columns(path, names, cfg.tsv_columns or (cfg.text_column, cfg.label_column), by_word=True)

    @staticmethod
    def labels(column, where):
        """The tags in a column of lists, in order; UserError where there is one alone. where: names the column."""
        if odd := [value for value in column if not isinstance(value, list)]:
            raise UserError(f"{where} has {_short(odd[0])}, where there must be a list of tags; check --label_column")
        return Classify.labels(itertools.chain.from_iterable(column), where)

    def __init__(self, labels, framing):
        super().__init__(labels, framing)
        self.are_entities = all(re.fullmatch("O|[BIES]-.+", label) for label in labels)
        if not self.are_entities:  # accuracy chooses the best checkpoint
            self.metrics = self.metrics[::-1]
        self._tokens_of = functools.lru_cache(2**16)(self._tokens)

    def rows(self, texts, label, where):
        """The Row of a record, whose one text is a list of words; label: its list of tags, or None."""
        [words], framing = texts, self.framing
        if not (isinstance(words, list) and words and all(isinstance(word, str) and word.strip() for word in words)):
            raise UserError(f"{where} has {_short(words)}, where there must be a list of words; check --text_column")
        if label is not None and not (isinstance(label, list) and len(label) == len(words)):
            raise UserError(f"{where} has {_short(label)}, where there must be a list of {len(words)} tags, one a word")
        ids, places, longest = [*framing.begin], {}, framing.block_size - len(framing.end)
        for number, word in enumerate(words):
            tokens, first = self._tokens_of(word)
            if first is not None and len(ids) + first < longest:
                places[number] = len(ids) + first
            ids += tokens
        if not places:
            raise UserError(f"{where} has no word of which the tokenizer makes tokens that fit; leave it out")
        framing.n_cut += len(ids) > longest
        ids = np.array(ids[:longest] + framing.end, dtype=np.int32)
        targets = np.full(len(places), IGNORE)
        if label is not None:
            targets = np.concatenate([self.target(label[number], where) for number in places])
        return [Row(ids, len(ids), targets, np.array([*places.values()]), about=(len(words), [*places]))]

    def _tokens(self, word):
        """(ids of a word, which of them is the first that is no blank; None where there is none)."""
        tokenizer = self.framing.tokenizer
        ids = tokenizer.encode(f" {word}", continues=True).tolist()
        return ids, next((i for i, id_ in enumerate(ids) if tokenizer.decode_bytes([id_]).strip()), None)

    def figures(self, rows, logits):
        """{metric: value} for all Rows of a file and their logits, arrays (K, L); words without a token do not count."""
        guesses, truths = ([[self.labels[i] for i in numbers] for numbers in part]
                           for part in ([each.argmax(1) for each in logits], [row.targets for row in rows]))  # fmt: skip
        return tags(guesses, truths, self.are_entities)

    def predictions(self, rows, logits):
        """A dict for each record of a file, in order; a word without a token has the tag None."""
        for (n_words, read), scores in zip((row.about for row in rows), logits):
            found = dict(zip(read, scores.argmax(1)))
            yield {"prediction": [self.labels[found[i]] if i in found else None for i in range(n_words)]}


def _short(value):
    return text if len(text := repr(value)) < 60 else f"{text[:57]}..."


# A new task is a class, its line here, and its head in heads.py.
TASKS = {"classify": Classify, "regress": Regress, "tag": Tag, "instruct": Instruct}
METRICS = *dict.fromkeys(name for task in TASKS.values() for name in task.metrics), "loss"
