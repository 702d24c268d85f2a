"""Labelled texts for fine-tuning: tables to examples, and these to batches of similar lengths."""

import hashlib
import itertools
import json
from typing import NamedTuple

import numpy as np
import torch

from config import UserError
from data import Loader, each
from objective import special_id
from ops import IGNORE
from order import permute
from text.files import TextFile, ending_of

WINDOW = 64  # steps whose examples are sorted by length before they become batches


# ---- tables


def read_columns(path, names, header=None, by_word=False):
    """{name: its values, a list} of a .tsv, .jsonl or .parquet file (the first two may be packed).

    header: the names of a .tsv's columns; None: they stand in its first line. by_word: its lines are words, an empty one
    ends a sentence, and its values are lists; the last columns may be absent. UserError where a column or a value is
    missing, or the file is of another kind.
    """
    try:
        ending = ending_of(str(path))[0]
        if ending == ".parquet":
            columns = _parquet_columns(path)
        elif ending in (".tsv", ".jsonl"):
            text = _decoded(path, b"".join(TextFile(path).blocks()))
            is_tsv = ending == ".tsv"
            columns = _tsv_columns(path, text, header, by_word) if is_tsv else _json_columns(path, text, names)
        else:
            raise UserError(f"{path} is no .tsv, .jsonl or .parquet file; convert it to one of them")
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); check the path, or make the file again") from error
    if missing := [name for name in names if name not in columns]:
        there = ", ".join(map(str, columns)) or "none"
        remedy = "name the right ones by --text_column, --second_column and --label_column"
        remedy += ", or a .tsv's, if its first line is data, by --tsv_columns" if ending == ".tsv" else ""
        raise UserError(f"{path} has no column {', '.join(missing)}; its columns are {there}: {remedy}")
    for name in names:
        if None in columns[name]:
            raise UserError(
                f"{path} has no {name} in record {columns[name].index(None) + 1}; fill it in, or leave it out"
            )
    if not columns[names[0]]:
        raise UserError(f"{path} holds no records; it needs at least one")
    return {name: columns[name] for name in names}


def _decoded(path, data):
    try:
        return data.decode("utf-8-sig")  # Windows' programs may begin a file with a mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8 in line {line}; convert it, as by iconv -f latin1 -t utf-8") from error


def _tsv_columns(path, text, header, by_word):
    lines = (line.removesuffix("\r") for line in text.rstrip("\n").split("\n"))
    rows = [line.split("\t") if line else [] for line in lines] if text else []
    first = 1 if header is None else 0
    header = (rows[0] if rows else []) if header is None else header
    if by_word:
        header = header[: len(next(filter(any, rows), ()))]
        if rows and tuple(rows[0]) == tuple(header):
            raise UserError(f"{path} has the columns' names in its first line, where there must be a word; remove it")
    for number, row in enumerate(rows[first:], start=1 + first):
        if len(row) != len(header) and not (by_word and not any(row)):
            rule = f"has {len(row)} columns in line {number}, where there are {len(header)}: {', '.join(header)}"
            raise UserError(f"{path} {rule}; mend the line, or name the columns by --tsv_columns")
    if by_word:
        sentences = [[*lines] for is_word, lines in itertools.groupby(rows, any) if is_word]
        return {name: [[line[i] for line in lines] for lines in sentences] for i, name in enumerate(header)}
    return {name: [row[i] for row in rows[first:]] for i, name in enumerate(header)}


def json_objects(text, path):
    """Yields the object in each line of a .jsonl file that is not blank, and the line's place, for errors."""
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028, too, as JSON does not
        if line.strip():
            place = f"{path} line {number}"
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place} is no JSON ({error}); mend the line") from error
            if not isinstance(found, dict):
                raise UserError(f'{place} is no object; write one, such as {{"text": ...}}')
            yield found, place


def _json_columns(path, text, names):
    records = [record for record, _ in json_objects(text, path)]
    there = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in (*there, *(() if records else names))}


def _parquet_columns(path):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow; pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable parquet file ({error}); make it again") from error


# ---- texts to tokens


class Framing:
    """One or two texts as a model expects them: [CLS] a [SEP] b [SEP] with token types 0 and 1, or a decoder's tokens.

    A decoder's texts begin as its tokenizer has it, and end-of-text stands between two. Texts longer than block_size
    are cut, of two the longer one; n_cut counts them, n_left_out records of which nothing could be learned.
    """

    def __init__(self, tokenizer, is_causal, block_size):
        self.tokenizer, self.is_causal, self.block_size = tokenizer, is_causal, block_size
        self.n_cut = self.n_left_out = 0
        if is_causal:
            self.begin, self.end = [*tokenizer.begin], []
            self.between = [] if tokenizer.eot is None else [tokenizer.eot]
        else:
            self.begin, sep = ([special_id(tokenizer.specials, role)] for role in ("cls", "sep"))
            self.between, self.end = sep, sep
        self.pad = next((tokenizer.specials[name] for name in ("[PAD]", "<|pad|>") if name in tokenizer.specials), 0)

    def __call__(self, first, second=None, where="a text"):
        """(ids, int32; how many of them belong to the first text) of one text or two. where: names them in errors."""
        for text in (first, second):
            if not isinstance(text, str | None):
                raise UserError(f"{where} is {text!r}, no text; name another column by --text_column, --second_column")
        a, b = ([] if text is None else self.tokenizer.encode(text).tolist() for text in (first, second))
        middle = [] if second is None else self.between
        if second is not None and not middle:
            rule = f"stands between two texts, and the tokenizer {self.tokenizer.name} has none"
            raise UserError(f"{where} is a pair, but end-of-text {rule}; use another model")
        room = self.block_size - len(self.begin) - len(middle) - len(self.end)
        if len(a) + len(b) > room:
            self.n_cut += 1
            short = min(len(a), len(b), room // 2)
            long = room - short  # as `tokenizers` does, the second text is the longer one of equals
            a, b = (a[:short], b[:long]) if len(a) <= len(b) else (a[:long], b[:short])
        head = self.begin + a + middle
        ids = head + b + self.end
        if not ids:
            raise UserError(f"{where} is empty, and this tokenizer begins texts with no token; leave such records out")
        return np.array(ids, dtype=np.int32), len(ids) if second is None else len(head)


class Row(NamedTuple):
    """A sequence to train on, with its targets."""

    ids: np.ndarray
    n_first: int  # tokens of the first text; those behind them have token type 1
    targets: np.ndarray  # int64 or float32; IGNORE where there is none
    positions: np.ndarray  # of the tokens whose logits are asked for
    about: object = None  # what its task needs to judge its logits


def examples_of(task, cfg, path, columns, world):
    """The Examples of a file's columns, as task.read gives them; prints how many. cfg: a FinetuneConfig."""
    texts, framing = [*zip(*(columns[name] for name in cfg.text_columns))], task.framing
    labels = columns.get(cfg.label_column, [None] * len(texts))
    framing.n_cut = framing.n_left_out = 0
    named = ((*record, f"{path}, record {i}") for i, record in enumerate(zip(texts, labels), start=1))
    rows = [row for record in named for row in task.rows(*record)]
    if not rows:
        raise UserError(f"{path} has no record with an answer within block_size {framing.block_size}; raise it")
    examples = task.examples(rows, framing)
    if world.is_main:
        mean, longest = examples.lengths.mean(), examples.lengths.max()
        cut = f"; {framing.n_cut:,} of them were longer and are cut to block_size" if framing.n_cut else ""
        lost, n = framing.n_left_out, len(texts) - framing.n_left_out
        cut += f"; {lost:,} others have no answer within block_size and are left out" if lost else ""
        windows = f" in {len(rows):,} windows" if len(rows) > n else ""
        print(f"examples   {n:,} of {path}{windows}, {mean:.0f} tokens on average, at most {longest}{cut}")
    return examples


class Examples:
    """The Rows of a file; an objective for a Loader's batches."""

    def __init__(self, rows, framing):
        self.rows, self.lengths = rows, np.array([len(row.ids) for row in rows])
        self.pad, self.is_causal, self.block_size = framing.pad, framing.is_causal, framing.block_size

    def __len__(self):
        return len(self.rows)

    def fingerprint(self):
        """A hash of ids and targets."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for row in self.rows:
            digest.update(row.ids.tobytes() + row.targets.tobytes())
        return digest.hexdigest()[:16]

    def batch(self, numbers, n_rows):
        """(ids (B, T), targets (B, K), positions (B, K), attention_mask (B, T), token types (B, T)) of some rows.

        B is n_rows; those beyond the numbers have no targets. T is a multiple of 8, for few different shapes, or
        block_size; K is the largest number of a row's targets.
        """
        rows = [self.rows[i] for i in numbers]
        longest = max((len(row.ids) for row in rows), default=1)
        shape = n_rows, min(self.block_size, -(-longest // 8) * 8)
        n_targets, n_positions = (max(map(len, parts)) for parts in zip(*(row[2:4] for row in rows or self.rows[:1])))
        ids, types, lengths = np.full(shape, self.pad), np.zeros(shape, np.int64), np.ones((n_rows, 1), np.int64)
        targets = np.full((n_rows, n_targets), IGNORE, self.rows[0].targets.dtype)
        positions = np.zeros((n_rows, n_positions), np.int64)
        for i, row in enumerate(rows):
            lengths[i] = len(row.ids)
            ids[i, : len(row.ids)] = row.ids
            types[i, row.n_first : len(row.ids)] = 1
            targets[i, : len(row.targets)], positions[i, : len(row.positions)] = row.targets, row.positions
        mask = np.arange(shape[1]) < lengths
        types = None if self.is_causal else torch.from_numpy(types)
        return *map(torch.from_numpy, (ids, targets, positions, mask)), types


# ---- the order of training


class ExampleOrder:
    """The batches of training, a pure function of the seed and the examples' lengths.

    An epoch takes each example once, in permuted order; those of WINDOW steps are sorted by length, cut into batches,
    and the batches shuffled. An epoch's last batch may be smaller. Places, as `sequences_seen` counts them, are
    batch_size a step all the same.
    """

    split = None  # there are no shards

    def __init__(self, name, lengths, batch_size, seed):
        self.name, self.lengths, self.batch_size, self.seed = name, lengths, batch_size, seed
        self.steps_per_epoch, self._epoch = -(-len(lengths) // batch_size), None

    def epochs(self, n):
        """{name: how often n places read the examples}."""
        return {self.name: n / (self.steps_per_epoch * self.batch_size)}

    def batch(self, step):
        """The numbers of the examples of a step, counted from 0; the longest come first."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches, self._epoch = self._shuffled(epoch), epoch
        return self._batches[place]

    def _shuffled(self, epoch):
        n, size, batches = len(self.lengths), self.batch_size, []
        order = permute(np.arange(n, dtype=np.uint64), n, (self.seed, epoch)).astype(np.int64)
        for start in range(0, n, WINDOW * size):
            here = order[start : start + WINDOW * size]
            here = here[np.argsort(-self.lengths[here], kind="stable")]
            cut = [here[i : i + size] for i in range(0, len(here), size)]
            n_whole = len(here) // size
            random = np.random.default_rng((self.seed, epoch, start))
            batches += [cut[i] for i in random.permutation(n_whole)] + cut[n_whole:]
        return batches


class ExampleLoader(Loader):
    """A Loader of an ExampleOrder's batches: the ranks take a micro-step's examples in turn."""

    def _read(self):
        ranks, B, pins = self._ranks, self._micro_batch_size, self._device.type == "cuda"
        while True:
            step, batches = self.order.batch(self._seen // self.order.batch_size), []
            for micro_step in range(self._micro_steps):
                here = step[micro_step * ranks * B : (micro_step + 1) * ranks * B]
                batch = self._objective.batch(here[self._rank :: ranks], B)
                batches.append(each(batch, lambda part: part.pin_memory()) if pins else batch)
            yield batches
            self._seen += self.order.batch_size
