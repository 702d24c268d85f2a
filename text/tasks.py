"""The tasks of fine-tuning: what each makes of a record, how its logits are judged, and what it predicts."""

import contextlib
import functools
import itertools
import math
import re
from typing import NamedTuple

import numpy as np
import torch

from config import UserError
from foreign import shown
from heads import SPAN, label_loss
from metrics import answers, classes, correlations, tags
from ops import IGNORE
from text.chat import Instruct
from text.examples import Examples, Row, read_columns


class Classify:
    """Gives a text, or a pair of texts, one of the labels in the training file."""

    has_head, metrics = True, ("accuracy", "f1", "matthews")  # the first one chooses the best checkpoint
    has_classes = True  # which cross-entropy tells apart
    n_texts = 1, 2  # how many columns of texts it may read
    defaults, examples = {}, Examples  # settings that the user has not given; the class of a file's Rows

    @staticmethod
    def read(path, cfg, has_labels=True):
        """{name: its values, a list} of a file's columns. cfg: a FinetuneConfig."""
        return read_columns(path, cfg.text_columns + [cfg.label_column] * has_labels, cfg.tsv_columns)

    @staticmethod
    def labels(column, where):
        """The labels in a column as texts, in order; UserError where there is one alone. where: names the column."""
        labels = set()
        for label in column:
            if not isinstance(label, str | int | float) or label == "" or label != label:
                rule = f"{where} has the label {shown(label)}, where there must be a text or a number"
                raise UserError(f"{rule}; check --label_column, or leave such records out")
            labels.add(str(label))
        if len(labels) == 1:
            rule = f"{where} has the label {labels.pop()!r} alone"
            raise UserError(f"{rule}; classes are at least two: check --label_column")
        return tuple(sorted(labels, key=lambda x: (int(x) if re.fullmatch(r"-?\d+", x) else math.inf, x)))

    def __init__(self, labels, framing, cfg):
        """labels: as the method of that name gives them; cfg: a FinetuneConfig."""
        self.labels, self.framing, self.cfg = labels, framing, cfg

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
        return np.array([self.labels.index(label)])  # type: ignore[attr-defined]

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
    has_classes = False

    @staticmethod
    def labels(column, where):
        """The one output's name."""
        return ("value",)

    def target(self, label, where):
        """A label as a number, an array (1,)."""
        with contextlib.suppress(TypeError, ValueError):
            number = np.array([float(label)], np.float32)  # as logits are
            if np.isfinite(number).all() and number[0] != IGNORE:
                return number
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
    n_texts = (1,)

    @staticmethod
    def read(path, cfg, has_labels=True):
        """{name: its values, a list} of a file's columns; a .tsv has a word a line, and no first line of names."""
        names = [cfg.text_column, cfg.label_column]
        return read_columns(path, names[: 1 + has_labels], cfg.tsv_columns or names, by_word=True)

    @staticmethod
    def labels(column, where):
        """The tags in a column of lists, in order; UserError where there is one alone. where: names the column."""
        if odd := [value for value in column if not isinstance(value, list)]:
            raise UserError(f"{where} has {shown(odd[0])}, where there must be a list of tags; check --label_column")
        return Classify.labels(itertools.chain.from_iterable(column), where)

    def __init__(self, labels, framing, cfg):
        super().__init__(labels, framing, cfg)
        self.are_entities = all(re.fullmatch("O|[BIES]-.+", label) for label in labels)
        if not self.are_entities:  # accuracy chooses the best checkpoint
            self.metrics = self.metrics[::-1]
        self._tokens_of = functools.lru_cache(2**16)(self._tokens)

    def rows(self, texts, label, where):
        """The Row of a record, whose one text is a list of words; label: its list of tags, or None."""
        [words], framing = texts, self.framing
        if not (isinstance(words, list) and words and all(isinstance(word, str) and word.strip() for word in words)):
            raise UserError(f"{where} has {shown(words)}, where there must be a list of words; check --text_column")
        if label is not None and not (isinstance(label, list) and len(label) == len(words)):
            raise UserError(f"{where} has {shown(label)}, where there must be a list of {len(words)} tags, one a word")
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


class Window(NamedTuple):
    """A part of a question's context in a Row."""

    question: tuple  # (context, answers), one object for all of its windows
    first: int  # place of the window's first token in the Row
    starts: np.ndarray  # characters of the context where its tokens begin
    ends: np.ndarray


class Answer(Classify):
    """Finds the answer to a question in its context, or that there is none (SQuAD 2.0, arXiv 1806.03822).

    A Row holds the question and a window of the context. Its targets are the answer's first and last token or, where
    the window does not hold the answer, twice a token that stands for none: an encoder's [CLS], as in BERT's paper, or
    the end-of-text behind a decoder's window, which has seen all of it.
    """

    metrics = "f1", "exact_match"
    has_classes = False
    n_texts = (2,)

    @staticmethod
    def labels(column, where):
        """The names of the two outputs."""
        return SPAN

    def __init__(self, labels, framing, cfg):
        super().__init__(labels, framing, cfg)
        self.ending, self.lacks_some = framing.end or framing.between, False  # lacks_some: questions without an answer
        if not self.ending:
            name = framing.tokenizer.name
            raise UserError(f"the tokenizer {name} has no end-of-text, which stands for no answer; use another model")
        self.none = -1 if framing.is_causal else 0  # place of the token that stands for no answer
        self._spans_of = functools.lru_cache(64)(framing.tokenizer.spans)  # questions share contexts

    def rows(self, texts, label, where):
        """The Rows of a question and its context, one for each window; label: {text: [...], answer_start: [...]}."""
        for text in texts:
            if not (isinstance(text, str) and text.strip()):
                raise UserError(f"{where} has {shown(text)}, where there must be a text; check the columns' names")
        [question, context], framing, stride = texts, self.framing, self.cfg.stride
        asked, room = framing.tokenizer.encode(question).tolist(), framing.block_size - len(self.ending)
        room -= len(framing.begin) + len(framing.between)
        framing.n_cut += len(asked) > room // 2
        head = framing.begin + asked[: room // 2] + framing.between
        room -= len(asked[: room // 2])
        if stride >= room:
            rule = f"leaves {room} tokens for a window of the context in {where}"
            raise UserError(f"stride is {stride}, but block_size {framing.block_size} {rule}; lower stride")
        ids, starts, ends = self._spans_of(context)
        if not len(ids):
            raise UserError(f"{where} has a context of which the tokenizer makes no token; leave it out")
        first, last = (None, None) if label is None else self.target(label, where, context)
        about, rows = (context, [] if label is None else label["text"]), []
        for start in range(0, max(1, len(ids) - stride), room - stride):
            here = slice(start, start + room)
            row = np.array([*head, *ids[here].tolist(), *self.ending], dtype=np.int32)
            targets = np.full(2, IGNORE if label is None else self.none % len(row))
            if first is not None and start <= first and last < start + room:
                targets = np.array([first, last]) + len(head) - start
            window = Window(about, len(head), starts[here], ends[here])
            rows.append(Row(row, len(head), targets, np.arange(len(row)), window))
        return rows

    def target(self, label, where, context):
        """The first and the last token of a context that hold the first of the answers; (None, None) without one."""
        columns = [label.get(name) for name in ("text", "answer_start")] if isinstance(label, dict) else [None]
        if not all(isinstance(column, list) for column in columns) or len(columns[0]) != len(columns[1]):
            rule = "where there must be {text: [...], answer_start: [...]} with lists of one length"
            raise UserError(f"{where} has {shown(label)}, {rule}; check --label_column")
        for text, start in zip(*columns):
            if not (isinstance(text, str) and text.strip() and isinstance(start, int) and start >= 0):
                raise UserError(f"{where} has the answer {shown(text)} at {shown(start)}; give its text and place")
            if (there := context[start : start + len(text)]) != text:
                rule = f"has the answer {shown(text)} at {start}, where the context has {shown(there)}"
                raise UserError(f"{where} {rule}; mend answer_start, which counts characters from 0")
        if not columns[0]:
            self.lacks_some = True
            return None, None
        (text, *_), (start, *_), (_, starts, ends) = *columns, self._spans_of(context)
        first, last = np.searchsorted(ends, start, "right"), np.searchsorted(starts, start + len(text)) - 1
        if first > last:
            raise UserError(
                f"{where} has the answer {shown(text)}, of which the tokenizer makes no token; leave it out"
            )
        return first, last

    def loss(self, rows, logits):
        """The mean loss of all Rows of a file and their logits, arrays (T, 2)."""
        pairs = [(torch.from_numpy(each.T), torch.from_numpy(row.targets)) for row, each in zip(rows, logits)]
        return sum(label_loss(*pair).item() for pair in pairs) / (2 * len(pairs))

    def figures(self, rows, logits):
        """{metric: value} for all Rows of a file and their logits, arrays (T, 2)."""
        truths = {id(row.about.question): row.about.question[1] for row in rows}
        return answers([found["prediction"] for found in self.predictions(rows, logits)], [*truths.values()])

    def predictions(self, rows, logits):
        """A dict for each record of a file, in order.

        The answer is the span of at most max_answer_tokens in a window with the largest sum of logits. Where files have
        questions without an answer, it is empty if [CLS] has a larger sum in all windows.
        """
        for _, windows in itertools.groupby(zip(rows, logits), key=lambda pair: id(pair[0].about.question)):
            best, least = (-math.inf, "", None), math.inf
            for row, scores in windows:
                question, first, starts, ends = row.about
                start, end = scores[first : first + len(starts)].T
                n_tokens = np.arange(len(starts)) - np.arange(len(starts))[:, None] + 1  # of spans from row to column
                is_span = (n_tokens > 0) & (n_tokens <= self.cfg.max_answer_tokens)
                sums = np.where(is_span, start[:, None] + end, -math.inf)
                i, j = np.unravel_index(sums.argmax(), sums.shape)
                if sums[i, j] > best[0]:
                    text = question[0][starts[i] : ends[j]]
                    best = sums[i, j], text.strip(), int(starts[i]) + len(text) - len(text.lstrip())
                least = min(least, scores[self.none].sum())
            text, place = ("", None) if self.lacks_some and least > best[0] else best[1:]
            yield {"prediction": text, "answer_start": place}


# A new task is a class, its line here, and its head in heads.py.
TASKS: dict[str, type[Classify | Instruct]] = {
    "classify": Classify,
    "regress": Regress,
    "tag": Tag,
    "qa": Answer,
    "instruct": Instruct,
}
METRICS = *dict.fromkeys(name for task in TASKS.values() for name in task.metrics), "loss"
