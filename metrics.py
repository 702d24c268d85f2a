"""Metrics of fine-tuning, as GLUE has them (arXiv 1804.07461, table 1)."""

import numpy as np

from config import UserError

METRICS = {"classify": ("accuracy", "f1", "matthews"), "regress": ("pearson", "spearman")}  # the first is the default
CHOICES = (*dict.fromkeys(name for names in METRICS.values() for name in names), "loss")


def metrics_of(task, logits, targets):
    """{name: value} of METRICS for logits (n, L) and targets (n,), classes or floats.

    f1 is the last class's where there are two, else the mean over classes. Correlations of constants are 0.
    """
    try:
        import scipy.stats
        import sklearn.metrics
    except ImportError as error:
        raise UserError(f"metrics need {error.name}; pip install scipy scikit-learn") from error
    if task == "regress":
        varies = len(targets) > 1 and np.ptp(logits) > 0 and np.ptp(targets) > 0
        pearson, spearman = scipy.stats.pearsonr, scipy.stats.spearmanr
        return {name: float(f(logits[:, 0], targets)[0]) if varies else 0.0
                for name, f in (("pearson", pearson), ("spearman", spearman))}  # fmt: skip
    guesses, n_classes = logits.argmax(axis=1), logits.shape[1]
    how = {"average": "binary", "pos_label": 1} if n_classes == 2 else {"average": "macro", "labels": range(n_classes)}
    return {
        "accuracy": float((guesses == targets).mean()),
        "f1": float(sklearn.metrics.f1_score(targets, guesses, zero_division=0, **how)),
        "matthews": float(sklearn.metrics.matthews_corrcoef(targets, guesses)),
    }
