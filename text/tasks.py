"""The tasks of fine-tuning: what each makes of a record, how its logits are judged, and what it predicts."""

import contextlib
import math

import numpy as np
import torch

from config import UserError
from metrics import classes, correlations
from ops import IGNORE
from text.examples import Row


class Classify:
    """Gives a text, or a pair of texts, one of the labels in the training file."""

    metrics = "accuracy", "f1", "matthews"  # the first one chooses the best checkpoint

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


# A new task is a class, its line here, and its head in heads.py.
TASKS = {"classify": Classify, "regress": Regress}
METRICS = *dict.fromkeys(name for task in TASKS.values() for name in task.metrics), "loss"
