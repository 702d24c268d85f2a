"""Metrics of fine-tuning, as GLUE has them (arXiv 1804.07461, table 1)."""

import numpy as np

from config import UserError


def _library(name):
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise UserError(f"metrics need {error.name}; pip install scipy scikit-learn") from error


def classes(logits, targets):
    """accuracy, f1 and matthews of logits (n, L) for targets (n,), the right classes' numbers.

    f1 is the last class's where there are two, else the mean over classes.
    """
    sklearn, guesses, n_classes = _library("sklearn.metrics"), logits.argmax(axis=1), logits.shape[1]
    how = {"average": "binary", "pos_label": 1} if n_classes == 2 else {"average": "macro", "labels": range(n_classes)}
    return {
        "accuracy": float((guesses == targets).mean()),
        "f1": float(sklearn.f1_score(targets, guesses, zero_division=0, **how)),
        "matthews": float(sklearn.matthews_corrcoef(targets, guesses)),
    }


def correlations(guesses, targets):
    """pearson and spearman of numbers (n,) with the right ones; those of constants are 0."""
    stats, varies = _library("scipy.stats"), len(targets) > 1 and np.ptp(guesses) > 0 and np.ptp(targets) > 0
    both = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
    return {name: float(function(guesses, targets)[0]) if varies else 0.0 for name, function in both.items()}
