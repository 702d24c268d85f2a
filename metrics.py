"""Metrics of fine-tuning: GLUE's (arXiv 1804.07461, table 1), those of entities as CoNLL counts them, and SQuAD's."""

import collections
import operator
import re
import string

import numpy as np

from config import UserError


def _library(name):
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise UserError(f"metrics need {error.name}; pip install scipy scikit-learn seqeval") from error


def classes(logits, targets):
    """accuracy, f1 and matthews of logits (n, L) for targets (n,), the right classes' numbers.

    f1 is the last class's where there are two, else the mean over classes.
    """
    sklearn, guesses, n_classes = _library("sklearn.metrics"), logits.argmax(axis=1), logits.shape[1]
    how = {"average": "binary", "pos_label": 1} if n_classes == 2 else {"average": "macro", "labels": range(n_classes)}
    return {
        "accuracy": float((guesses == targets).mean()),
        "f1": float(sklearn.f1_score(targets, guesses, zero_division=0, **how)),
        # 0 by definition where all are one class, of which scikit-learn warns
        "matthews": float(sklearn.matthews_corrcoef(targets, guesses)) if len({*targets, *guesses}) > 1 else 0.0,
    }


def correlations(guesses, targets):
    """pearson and spearman of numbers (n,) with the right ones; those of constants are 0."""
    stats, varies = _library("scipy.stats"), len(targets) > 1 and np.ptp(guesses) > 0 and np.ptp(targets) > 0
    both = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
    return {name: float(function(guesses, targets)[0]) if varies else 0.0 for name, function in both.items()}


def tags(guesses, truths, are_entities):
    """f1, precision, recall and accuracy of tags, a list for each sentence, for the right ones.

    are_entities: of entities by seqeval, as conlleval counts them: an entity is right where its type and both ends are,
    and an I- without its B- begins one. Otherwise of tags, as the mean over those that occur. accuracy: of words.
    """
    library = _library("seqeval.metrics.sequence_labeling" if are_entities else "sklearn.metrics")
    flat_guesses, flat_truths = ([tag for sentence in part for tag in sentence] for part in (guesses, truths))
    pair, average = ((truths, guesses), "micro") if are_entities else ((flat_truths, flat_guesses), "macro")
    precision, recall, f1, _ = library.precision_recall_fscore_support(*pair, average=average, zero_division=0)
    n_right = sum(map(operator.eq, flat_guesses, flat_truths))
    figures = {"f1": f1, "precision": precision, "recall": recall, "accuracy": n_right / len(flat_truths)}
    return {name: float(value) for name, value in figures.items()}


def answers(guesses, truths):
    """exact_match and f1 of answers for lists of right ones, as SQuAD 2.0 counts them (arXiv 1806.03822).

    Compared without case, ASCII punctuation, the articles a, an, the, and spacing; f1 is that of words. Of several
    right answers the best fit counts; without one, the right answer is no text.
    """
    exact, f1 = [], []
    for guess, those in zip(guesses, truths):
        words, options = _plain_words(guess), [*filter(None, map(_plain_words, those))] or [[]]
        exact.append(words in options)
        f1.append(max(_overlap(words, option) for option in options))
    return {"exact_match": sum(exact) / len(exact), "f1": sum(f1) / len(f1)}


def _plain_words(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _overlap(words, others):
    """F1 of the words that two lists share; without words, 1 where both are empty."""
    if not (words and others):
        return float(words == others)
    return 2 * (collections.Counter(words) & collections.Counter(others)).total() / (len(words) + len(others))
