"""Token shards to batches.

A data folder holds {train,val}_000000.bin, ... and meta.json; shards.py reads and writes them.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
import shlex
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mixture
from config import Config, Count, UserError, preset_value
from foreign import is_regular
from order import TrainOrder
from pairs import Partners
from shards import BLOCK, files_cache, is_own_shard, open_shard, read_meta, unfinished, unreadable


@dataclass(frozen=True)
class DataConfig(Config):
    data_dir: str | dict | None = None  # folder of token shards, by prepare.py; a mixture is {folder: share of tokens}
    data_schedule: dict | None = None  # shares of a mixture that change: {step: {folder: share}}, from that step on
    seq_len: Count | None = None  # tokens of a training sequence; none: block_size
    batch_tokens: Count = 524288  # global batch: tokens per optimizer step, over all ranks and micro-steps
    micro_batch_size: Count = 16  # sequences per forward pass on one rank; gradient accumulation follows from it
    eval_tokens: Count = 10_485_760  # tokens of the validation split to evaluate on, at most

    def __post_init__(self):
        super().__post_init__()
        if wrong := mixture.faults(self.data_dir, self.data_schedule):
            raise UserError(*wrong)
        if self.eval_tokens < len(self.folders):
            rule = f"is too few for {len(self.folders)} folders, each of which gives an equal part"
            raise UserError(f"eval_tokens {self.eval_tokens} {rule}; raise it")

    @property
    def folders(self):
        """The data folders: a mixture has several."""
        return [*self.data_dir] if isinstance(self.data_dir, dict) else [self.data_dir]

    @property
    def folder(self):
        """The data folder whose meta.json counts: a mixture's folders share a tokenizer."""
        return self.folders[0]

    def phases(self, sequences_per_step):
        """[(number of the first sequence, each folder's sequences of mixture.WINDOW)]."""
        by_step = {0: self.data_dir if isinstance(self.data_dir, dict) else {self.data_dir: 1}}
        by_step |= self.data_schedule or {}
        return [
            (step * sequences_per_step, mixture.per_window(by_step[step], self.folders)) for step in sorted(by_step)
        ]


def seq_len_of(cfg):
    """Tokens of a training sequence: seq_len, or block_size where seq_len is none."""
    seq_len, block_size = cfg.data.seq_len, cfg.model.block_size
    if seq_len is not None and seq_len > block_size:
        raise UserError(f"seq_len {seq_len} is above block_size {block_size}; lower it, or raise block_size")
    return seq_len or block_size


def accumulation_steps(cfg, seq_len, ranks):
    """Micro-steps per optimizer step: batch_tokens / (micro_batch_size x seq_len x ranks)."""
    at_once = cfg.micro_batch_size * seq_len * ranks
    if cfg.batch_tokens % at_once == 0:
        return cfg.batch_tokens // at_once
    sequences, rest = divmod(cfg.batch_tokens, seq_len * ranks)
    if rest or not sequences:
        fits = f"batch_tokens {max(1, round(cfg.batch_tokens / at_once)) * at_once}"
    else:
        fits = f"micro_batch_size {near_divisors(sequences, cfg.micro_batch_size, 4)}"
    factors = f"micro_batch_size {cfg.micro_batch_size} x seq_len {seq_len} x {ranks} ranks"
    raise UserError(f"batch_tokens {cfg.batch_tokens} is not a multiple of {at_once} = {factors}; {fits} would fit")


def nearest_batch(data, ranks):
    """The DataConfig with the nearest batch that ranks divide, and the largest micro-batch up to its own.

    One within 3 % goes before it where micro-batches would else be less than half as large, as by a prime number.
    """
    if data.batch_tokens % (data.micro_batch_size * data.seq_len * ranks) == 0:
        return data

    def micro_of(sequences):
        return divisors(sequences, data.micro_batch_size)[-1]

    wanted = data.batch_tokens / (data.seq_len * ranks)  # sequences per rank
    reach = 0 if wanted.is_integer() else min(wanted / 32, data.micro_batch_size / 2)
    near = range(math.ceil(wanted - reach), math.floor(wanted + reach) + 1) or [max(1, round(wanted))]
    sequences = min(near, key=lambda n: (2 * micro_of(n) < data.micro_batch_size, abs(n - wanted)))
    return dataclasses.replace(
        data, batch_tokens=sequences * data.seq_len * ranks, micro_batch_size=micro_of(sequences)
    )


def divisors(number, most):
    """The divisors of a number up to most, the smallest first."""
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def near_divisors(number, wanted, n=3):
    """The n divisors of a number nearest to a wanted one, as text for an error's remedy."""
    nearest = sorted(divisors(number, min(4 * wanted, 10_000)), key=lambda d: abs(d - wanted))[:n]
    return ", ".join(map(str, sorted(nearest)))


# ---- a data folder


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vocab_size_of(data_dir, make_command):
    """The vocabulary size of a data folder."""
    if meta := read_meta(_folder(data_dir, make_command)):
        return meta["vocab_size"]
    raise UserError(f"{data_dir} has no meta.json to take vocab_size from; set --vocab_size, or finish: {make_command}")


def prepare_command(cfg, folder=None):
    """The command that makes a script's data: from its presets, if they set data_dir, else from the user's own text.

    folder: one of a mixture's.
    """
    if len(cfg.data.folders) == 1 and cfg.presets and preset_value(cfg.presets, "data_dir") == cfg.data.data_dir:
        return shlex.join(["python", "prepare.py", *cfg.presets])
    return f"python prepare.py --input=FILES --data_dir={folder or cfg.data.folder}"


def _folder(data_dir, make_command):
    if data_dir is None:
        raise UserError("data_dir is none; set it to a folder that prepare.py made")
    if not os.path.isdir(data_dir):
        raise UserError(f"data_dir {data_dir} does not exist or is no folder; make it: {make_command}")
    if not os.access(data_dir, os.R_OK | os.X_OK):
        raise UserError(f"data_dir {data_dir} cannot be read (Permission denied); make it readable")
    return Path(data_dir)


def _fault(folder, split, paths, meta):
    """Why a split cannot be used, in words that follow the folder's name; None where it can."""
    if any(unfinished(folder).values()):
        return "holds an unfinished prepare"
    if not paths:
        return f"holds no {split} tokens"
    if not meta and any(map(is_own_shard, paths)):
        return "holds shards but no meta.json, which comes last: an unfinished prepare"
    if (digest := meta.get("tokenizer_sha256")) and not _has_hash(folder / "tokenizer.json", digest):
        return "lacks the tokenizer.json of its shards, or has another one"
    odd = sorted({path.name for path in paths} ^ set(meta["splits"][split]["shards"])) if meta else []
    return f"does not hold the {split} shards of its meta.json: {', '.join(odd)} is missing or extra" if odd else None


def _has_hash(path, digest):
    try:
        return is_regular(path) and sha256(path) == digest
    except OSError as error:
        raise unreadable(path, error) from error


class Split:
    """The shards of a split.

    token_bytes: the bytes of text that each id stands for; empty where a tokenizer changes text, None where unknown.
    """

    def __init__(self, data_dir, split, vocab_size, make_command="python prepare.py --help", opened=None):
        """opened: a function that opens shards, from files_cache, which several splits may share."""
        folder, meta = _folder(data_dir, make_command), read_meta(data_dir)
        self.folder, self.name, self.vocab_size = str(data_dir), split, vocab_size
        # The split's name as a word: medieval_train.bin is not validation data.
        self.paths = sorted(p for p in folder.glob("*.bin") if re.search(rf"(^|[_.-]){split}[_.-]", p.name))
        if fault := _fault(folder, split, self.paths, meta):
            raise UserError(f"{folder} {fault}; make the data: {make_command}")
        if meta and meta["vocab_size"] > vocab_size:
            sizes = f"vocab_size is {vocab_size}, but {folder} was made with a vocabulary of {meta['vocab_size']}"
            raise UserError(f"{sizes}; set vocab_size to none, or prepare the data with the initial weights' tokenizer")
        opened = opened or files_cache()
        self.shards = [open_shard(path, vocab_size, opened) for path in self.paths]
        for path, shard in zip(self.paths, self.shards) if meta else ():
            if len(shard) != (promised := meta["splits"][split]["shards"][path.name]):
                raise UserError(f"{path} holds {len(shard)} tokens, meta.json says {promised}; {make_command} makes it")
        self._count()
        self.token_bytes = meta.get("token_bytes")
        self.tokenizer = [meta.get(key) for key in ("tokenizer", "tokenizer_sha256", "vocab_size", "specials")]
        checksums = meta["splits"][split].get("checksums", {}) if meta else {}
        for path, shard in zip(self.paths, self.shards):
            shard.checksums = checksums.get(path.name)
        self._check_blocks(make_command)

    def _count(self):
        self.tokens = sum(map(len, self.shards))
        self.dtype = max((shard.dtype for shard in self.shards), key=lambda dtype: dtype.itemsize)

    @classmethod
    def joined(cls, splits):
        """The shards of a mixture's splits, one split after the other; UserError where their tokenizers differ."""
        joined = copy.copy(splits[0])
        for split in splits[1:]:
            if split.tokenizer != joined.tokenizer:
                names = f"{joined.folder} has the tokenizer {joined.tokenizer[0]}, {split.folder} {split.tokenizer[0]}"
                raise UserError(f"{names}, or another of that name; prepare the folders of a mixture with the same one")
        joined.paths = [path for split in splits for path in split.paths]
        joined.shards = [shard for split in splits for shard in split.shards]
        joined._count()
        return joined

    def _check_blocks(self, make_command, most=8):
        """Compares some blocks of tokens, drawn anew at each start, with their checksums in meta.json."""
        sums = [shard.checksums or [] for shard in self.shards]
        blocks = [(shard, block) for shard in range(len(sums)) for block in range(len(sums[shard]))]
        for i in np.random.default_rng().permutation(len(blocks))[:most]:
            shard, block = blocks[i]
            tokens = self.shards[shard][block * BLOCK : (block + 1) * BLOCK]
            if not len(tokens) or zlib.crc32(tokens) != sums[shard][block]:
                rule = f"{self.paths[shard]} has changed: its tokens from {block * BLOCK:,} on have another checksum"
                raise UserError(f"{rule} than in meta.json; make the data again: {make_command}")

    def fingerprint(self):
        """A hash of the shards by which a resumed run recognizes its data, in parts joined by dots; see is_same_data.

        The first part is of names, sizes and ends, the second of 256 samples, the third, where meta.json has them, of
        all checksums.
        """
        ends, samples = hashlib.sha256(), hashlib.sha256()
        for path, shard in zip(self.paths, self.shards):
            ends.update(f"{path.name} {len(shard)} {shard.dtype} ".encode())
            ends.update(shard[:2048].tobytes() + shard[-2048:].tobytes())
        firsts = np.cumsum([0, *map(len, self.shards)])
        for place in np.linspace(0, max(0, self.tokens - 1), 256, dtype=np.int64):
            shard = min(np.searchsorted(firsts, place, side="right"), len(self.shards)) - 1
            start = place - firsts[shard]
            samples.update(self.shards[shard][start : start + 1024].tobytes())
        parts = [ends, samples]
        if sums := [shard.checksums for shard in self.shards if shard.checksums is not None]:
            parts.append(hashlib.sha256(repr(sums).encode()))
        return ".".join(part.hexdigest()[:16] for part in parts)

    def read(self, places, shape):
        """Windows of tokens, int64 of a shape: row i holds those of places[i], (shard, start, length), then zeros."""
        for shard, start, length in places:
            self.shards[shard].prefetch(start, length)
        rows = np.zeros(shape, self.dtype)
        for row, (shard, start, length) in zip(rows, places):
            if self.shards[shard].dtype == self.dtype:
                self.shards[shard].read(start, row[:length])
            else:
                row[:length] = self.shards[shard][start : start + length]
        if rows.max() >= self.vocab_size:
            shard = self.paths[places[np.argmax(rows.max(axis=1))][0]]
            rule = f"{shard} holds token {rows.max()}, but vocab_size is {self.vocab_size}"
            raise UserError(f"{rule}; set vocab_size to the tokenizer's or make the data again")
        return rows.astype(np.int64)


def is_same_data(old, new):
    """Whether two fingerprints, each of splits joined by "-", agree in the parts that both have.

    Runs from before there were samples or checksums, and data without checksums, have fewer parts.
    """
    splits = itertools.zip_longest(old.split("-"), new.split("-"))
    return all(None not in pair and all(a == b for a, b in zip(*(s.split(".") for s in pair))) for pair in splits)


# ---- the batches of training


def each(batch, function):
    """A batch with function applied to its tensors; an argument that the model is to leave out is None."""
    return tuple(part if part is None else function(part) for part in batch)


class Loader:
    """Batches of a run from sequence number `seen` on, read ahead by a thread.

    Of a step's sequences, micro-step m of rank r takes micro_batch_size, from (m * ranks + r) * micro_batch_size on.
    """

    def __init__(self, order, objective, seen, micro_steps, micro_batch_size, world, ahead=3):
        """objective: turns windows of tokens into a batch. The world gives data_rank, data_ranks and the device."""
        self.order, self._objective, self._seen = order, objective, seen
        self._micro_steps, self._micro_batch_size = micro_steps, micro_batch_size
        self._rank, self._ranks, self._device = world.data_rank, world.data_ranks, world.device
        self._ahead, self._thread = ahead, None

    def seek(self, seen):
        """Continues from sequence number `seen`."""
        self.close()
        self._seen = seen

    def next(self):
        """A step's micro-batches, tuples of the model's arguments on the device, and the seconds waited for them."""
        start = time.perf_counter()
        if self._thread is None:
            self._thread, self._steps, self._ready = ThreadPoolExecutor(1, "loader"), self._read(), collections.deque()
        while len(self._ready) <= self._ahead:
            self._ready.append(self._thread.submit(next, self._steps))
        step = self._ready.popleft().result()  # raises what reading raised
        waited = time.perf_counter() - start
        return [each(batch, lambda part: part.to(self._device, non_blocking=True)) for batch in step], waited

    def close(self):
        """Ends the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def _read(self):
        """Yields the micro-batches of each step, in main memory."""
        B, width = self._micro_batch_size, self._objective.stride + self._objective.extra
        per_step, pins = B * self._ranks * self._micro_steps, self._device.type == "cuda"
        while True:
            steps = max(1, 4096 // per_step)  # permute many indices per call; overhead dominates small calls
            numbers = self._seen + np.arange(steps * per_step)
            # A sequence's partner is its neighbour in the order, which lies anywhere in the data.
            found = [self.order.locate(n) for n in (numbers, numbers ^ 1)[: 1 + self._objective.has_partners]]
            for step in range(steps):
                batches = []
                for micro_step in range(self._micro_steps):
                    first = step * per_step + (micro_step * self._ranks + self._rank) * B
                    places = [[*zip(*(x[first : first + B].tolist() for x in f), [width] * B)] for f in found]
                    assert len(places[0]) == B, f"rank {self._rank} of {self._ranks} lies beyond the step's sequences"
                    batch = read_batch(self._objective, self.order.split, (B, width), self._seen + first, *places)
                    batches.append(each(batch, lambda part: part.pin_memory()) if pins else batch)
                yield batches
            self._seen += steps * per_step


def read_batch(objective, split, shape, first, places, others=None, lengths=None):
    """The objective's batch of windows (B, W) at places, (shard, start, length); others: their partners' places."""
    rows = split.read(places, shape)
    if others is None:
        return objective.batch(rows, first, lengths)
    return objective.batch(rows, first, lengths, Partners(split.read(others, shape), split, places, others))


@contextlib.contextmanager
def open_data(cfg, world):
    """Yields the Loader of a run's training split and its validation Splits, one a data folder."""
    vocab_size, opened, seed = cfg.model.vocab_size, files_cache(), cfg.run.seed
    train, val = (
        [Split(folder, name, vocab_size, prepare_command(cfg, folder), opened) for folder in cfg.data.folders]
        for name in ("train", "val")
    )
    objective = objective_for(cfg, seed, world)
    if "contrastive" in cfg.model.objectives and (n := cfg.data.micro_batch_size * world.data_ranks) < 2:
        raise UserError(f"micro_batch_size times ranks is {n}, but contrastive compares texts; raise micro_batch_size")
    micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, world.data_ranks)
    orders = [TrainOrder(split, objective.stride, seed) for split in train]
    phases = cfg.data.phases(cfg.data.batch_tokens // cfg.data.seq_len)
    order = mixture.Mixture(orders, Split.joined(train), phases, seed) if len(train) > 1 else orders[0]
    with contextlib.closing(Loader(order, objective, 0, micro_steps, cfg.data.micro_batch_size, world)) as loader:
        yield loader, val


def objective_for(cfg, seed, world=None):
    """The objective of a run; the seed draws the masks, if any. world: where ranks share sequences, for this one's."""
    from context import in_parts  # here, since both import torch, which prepare.py does without
    from objective import CONTRASTIVE, windows_of

    if CONTRASTIVE in cfg.model.objectives and cfg.objective.document_mask:
        raise UserError("document_mask is on, but contrastive embeds a sequence as one text; leave it off")
    build = functools.partial(windows_of(cfg.model.objective).build, cfg.objective, cfg.data.seq_len, seed)
    objective = [build(read_meta(folder)) for folder in cfg.data.folders][0]  # others are looked at for mistakes
    return objective if world is None else in_parts(objective, world)


# ---- the windows of evaluation


def eval_batches(split, objective, eval_tokens, batch_size, rank, ranks):
    """Batches that cover the split's first eval_tokens tokens once, over all ranks.

    Windows lie end to end within a shard, and the last one may be short. Its padding, and the rows that give every rank
    the same number of batches, have no targets.
    """
    if split.tokens < 2:
        needs = "evaluation needs at least 2: raise --val_fraction of prepare.py"
        raise UserError(f"the {split.name} split has {split.tokens} tokens; {needs}")
    places, left = [], eval_tokens
    for shard, tokens in enumerate(split.shards):
        here = min(left, max(0, len(tokens) - objective.extra))
        places += [(shard, start, min(objective.stride, here - start)) for start in range(0, here, objective.stride)]
        left -= here
    half, width = len(places) // 2, objective.stride + objective.extra
    far = places[half:] + places[:half]  # a window's partner is half of the split away
    for first in range(rank * batch_size, len(places) + rank * batch_size, batch_size * ranks):
        here = slice(first, first + batch_size)
        lengths = np.zeros(batch_size, dtype=np.int64)
        lengths[: len(places[here])] = [length for *_, length in places[here]]
        windows = [(shard, start, length + objective.extra) for shard, start, length in places[here]]
        others = far[here] if objective.has_partners else None
        yield read_batch(objective, split, (batch_size, width), first, windows, others, lengths)
