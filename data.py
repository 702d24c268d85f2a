"""Token shards to batches.

A data folder holds {train,val}_000000.bin, ... and meta.json. A shard is a 24-byte header and its tokens, uint16 or
uint32, and is memory-mapped. nanoGPT's raw train.bin, llm.c's and modded-nanogpt's files are read as they are.
"""

import collections
import contextlib
import hashlib
import json
import mmap
import os
import re
import shlex
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Config, Count, UserError, preset_value

HEADER = struct.Struct("<8sIIQ")  # magic, version, bytes a token, tokens
MAGIC, VERSION = b"flatlm\0\0", 1
LLMC = {20240520: np.uint16, 20240801: np.uint32}  # magic of llm.c's GPT-2 and Llama 3 files, 256 int32 of header


@dataclass(frozen=True)
class DataConfig(Config):
    data_dir: str | None = None  # folder of token shards, made by prepare.py
    seq_len: Count | None = None  # tokens of a training sequence; none: block_size
    batch_tokens: Count = 524288  # global batch: tokens per optimizer step, over all ranks and micro-steps
    micro_batch_size: Count = 16  # sequences per forward pass on one rank; gradient accumulation follows from it
    eval_tokens: Count = 10_485_760  # tokens of the validation split to evaluate on, at most


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


def near_divisors(number, wanted, n=3):
    """The n divisors of a number nearest to a wanted one, as text for an error's remedy."""
    divisors = [d for d in range(1, min(number, 4 * wanted, 10_000) + 1) if number % d == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:n])))


# ---- shards on disk


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes a split as shards of shard_tokens tokens, under temporary names until finish()."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.dtype, self.shard_tokens = Path(folder), split, np.dtype(dtype), shard_tokens
        self.counts = {}  # tokens of each shard, by its name

    def write(self, tokens):
        """Appends an array of tokens."""
        while len(tokens):
            if not self.counts or self.counts[self.name] == self.shard_tokens:
                self.name = f"{self.split}_{len(self.counts):06d}.bin"
                self.counts[self.name] = 0
                (self.folder / f"{self.name}.part").write_bytes(bytes(HEADER.size))
            part, tokens = np.split(tokens, [self.shard_tokens - self.counts[self.name]])
            with open(self.folder / f"{self.name}.part", "ab") as file:
                file.write(part.astype(self.dtype).tobytes())
            self.counts[self.name] += len(part)

    def finish(self):
        """Writes the headers and renames the shards; returns {name: tokens}."""
        for name, count in self.counts.items():
            partial = self.folder / f"{name}.part"
            with open(partial, "r+b", buffering=0) as file:
                file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, count))
                os.fsync(file.fileno())
            os.replace(partial, self.folder / name)
        return self.counts


def open_shard(path):
    """The tokens of a shard file, memory-mapped; its first bytes tell whose format it is."""
    path = Path(path)
    with open(path, "rb") as file:
        head, size = file.read(1024), path.stat().st_size
    if head.startswith(MAGIC):
        _, version, token_bytes, count = HEADER.unpack(head[: HEADER.size].ljust(HEADER.size, b"\0"))
        dtype, start = {2: np.uint16, 4: np.uint32}.get(token_bytes), HEADER.size
        if version != VERSION or dtype is None:
            known = f"this code reads version {VERSION} with 2 or 4"
            raise UserError(f"{path} has version {version} and {token_bytes} bytes a token; {known}")
    elif len(head) == 1024 and (magic := int.from_bytes(head[:4], "little")) in LLMC:
        dtype, start, count = LLMC[magic], 1024, int.from_bytes(head[8:12], "little")
    elif path.name in ("train.bin", "val.bin") and size % 2 == 0:  # nanoGPT's have no header
        dtype, start, count = np.uint16, 0, size // 2
    else:
        raise UserError(f"{path} is not a token shard of flatlm's or llm.c's; make the data again with prepare.py")
    if size != (promised := start + count * np.dtype(dtype).itemsize):
        sizes = f"it has {size} bytes, and its header promises {promised}"
        raise UserError(f"{path} is damaged: {sizes}; make the data again with prepare.py")
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,)) if count else np.empty(0, dtype)


def is_own_shard(path):
    """Whether prepare.py wrote a file, judged by its first bytes."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_meta(data_dir):
    """The content of a data folder's meta.json; {} where there is none, as with other projects' files."""
    path = Path(data_dir) / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: meta["splits"][name] for name in ("train", "val")}
        return meta | {"vocab_size": int(meta["vocab_size"]), "splits": splits}
    except (ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged ({why}); remove it and make the data again with prepare.py") from error


def vocab_size_of(data_dir, make_command):
    """The vocabulary size of a data folder."""
    if meta := read_meta(_folder(data_dir, make_command)):
        return meta["vocab_size"]
    raise UserError(f"{data_dir} has no meta.json to take vocab_size from; set --vocab_size, or finish: {make_command}")


def prepare_command(cfg):
    """The command that makes a script's data: from its presets, if they set data_dir, else from the user's own text."""
    if cfg.presets and preset_value(cfg.presets, "data_dir") == cfg.data.data_dir:
        return shlex.join(["python", "prepare.py", *cfg.presets])
    return f"python prepare.py --input=FILES --data_dir={cfg.data.data_dir}"


def _folder(data_dir, make_command):
    if data_dir is None:
        raise UserError("data_dir is none; set it to a folder that prepare.py made")
    if not Path(data_dir).is_dir():
        raise UserError(f"data_dir {data_dir} does not exist or is no folder; make it: {make_command}")
    return Path(data_dir)


def _fault(folder, split, paths, meta):
    """Why a split cannot be used, in words that follow the folder's name; None where it can."""
    if any(folder.glob("*.part")):
        return "holds an unfinished prepare"
    if not paths:
        return f"holds no {split} tokens"
    if not meta and any(map(is_own_shard, paths)):
        return "holds shards but no meta.json, which comes last: an unfinished prepare"
    odd = sorted({path.name for path in paths} ^ set(meta["splits"][split]["shards"])) if meta else []
    return f"does not hold the {split} shards of its meta.json: {', '.join(odd)} is missing or extra" if odd else None


class Split:
    """The shards of a split. bytes_per_token is None where the text's bytes are not known."""

    def __init__(self, data_dir, split, vocab_size, make_command="python prepare.py --help"):
        folder, meta = _folder(data_dir, make_command), read_meta(data_dir)
        self.name, self.vocab_size = split, vocab_size
        # The split's name as a word: medieval_train.bin is not validation data.
        self.paths = sorted(p for p in folder.glob("*.bin") if re.search(rf"(^|[_.-]){split}[_.-]", p.name))
        if fault := _fault(folder, split, self.paths, meta):
            raise UserError(f"{folder} {fault}; make the data: {make_command}")
        if meta and meta["vocab_size"] > vocab_size:
            sizes = f"vocab_size is {vocab_size}, but {folder} was made with a vocabulary of {meta['vocab_size']}"
            raise UserError(f"{sizes}; set vocab_size to none, or prepare the data with the initial weights' tokenizer")
        self.shards = [open_shard(path) for path in self.paths]
        for path, shard in zip(self.paths, self.shards) if meta else ():
            if len(shard) != (promised := meta["splits"][split]["shards"][path.name]):
                raise UserError(f"{path} holds {len(shard)} tokens, meta.json says {promised}; {make_command} makes it")
        self.tokens = sum(map(len, self.shards))
        text_bytes = meta["splits"][split].get("bytes") if meta else None
        self.bytes_per_token = text_bytes / self.tokens if text_bytes else None

    def fingerprint(self):
        """A hash of the shards' names, sizes and ends, by which a resumed run recognizes its data."""
        digest = hashlib.sha256()
        for path, shard in zip(self.paths, self.shards):
            digest.update(f"{path.name} {len(shard)} {shard.dtype} ".encode())
            digest.update(shard[:2048].tobytes() + shard[-2048:].tobytes())
        return digest.hexdigest()[:16]

    def release_pages(self):
        """Releases the memory of pages read so far; the system's file cache keeps them."""
        for shard in self.shards:
            if len(shard):
                shard._mmap.madvise(mmap.MADV_DONTNEED)

    def copy(self, shard, start, row):
        """Fills row with the tokens of a shard that begin at start."""
        row[:] = self.shards[shard][start : start + len(row)]
        if row.max() >= self.vocab_size:
            here = f"{self.paths[shard]} holds token {row.max()}, but vocab_size is {self.vocab_size}"
            raise UserError(f"{here}; set vocab_size to the tokenizer's or make the data again")


# ---- the order of training


def permute(index, n, key):
    """The images of indices under a random permutation of range(n), in O(1) memory.

    A Feistel network of 6 rounds on the smallest even number of bits that covers n, repeated until the result is below
    n. index: uint64 array; key: tuple of ints, the permutation's seed.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    factors = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9], dtype=np.uint64)  # odd constants that mix well
    rounds = np.random.SeedSequence(key).generate_state(6, np.uint64)
    out, todo = index.astype(np.uint64), np.ones(len(index), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in rounds:
            mixed = (right ^ round_key) * factors[0]
            mixed = (mixed ^ (mixed >> np.uint64(29))) * factors[1]
            left, right = right, left ^ (mixed >> np.uint64(32)) & mask
        out[todo] = left << half | right
        todo[todo] = out[todo] >= n
    return out


class TrainOrder:
    """The order of training sequences, a pure function of the seed and the data.

    An epoch takes each window once, in permuted order. Windows of stride tokens lie end to end within a shard, from an
    offset that each epoch draws anew. So sequences_seen is all that a run must remember of its data.
    """

    def __init__(self, split, stride, seed):
        self.split, self.stride, self.seed = split, stride, seed
        # An offset may push the last window out of its shard: without it, all epochs have equally many.
        self.ends = np.cumsum([max(0, len(shard) // stride - 1) for shard in split.shards])
        self.per_epoch = int(self.ends[-1])
        if self.per_epoch == 0:
            lacks = f"no shard of 2 x {stride} tokens (its longest has {max(map(len, split.shards))})"
            raise UserError(f"the {split.name} split has {lacks}; lower seq_len or block_size, or add text")

    def locate(self, numbers):
        """(shard, start) for each sequence number, as arrays."""
        numbers = np.asarray(numbers, dtype=np.uint64)
        window, offset = np.empty(len(numbers), dtype=np.int64), np.empty(len(numbers), dtype=np.int64)
        epochs = numbers // np.uint64(self.per_epoch)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            window[here] = permute(numbers[here] % np.uint64(self.per_epoch), self.per_epoch, (self.seed, int(epoch)))
            offset[here] = np.random.SeedSequence((self.seed, int(epoch), 1)).generate_state(1)[0] % self.stride
        shard = np.searchsorted(self.ends, window, side="right")
        first = np.concatenate([[0], self.ends])[shard]
        return shard, offset + (window - first) * self.stride


class Loader:
    """Batches of a run from sequence number `seen` on, read ahead by a thread.

    Of a step's sequences, micro-step m of rank r takes micro_batch_size, from (m * ranks + r) * micro_batch_size on.
    """

    def __init__(self, order, objective, seen, micro_steps, micro_batch_size, world, ahead=3):
        """objective: turns windows of tokens into a batch. The world gives data_rank, data_ranks and the device."""
        self.split, self._order, self._objective, self._seen = order.split, order, objective, seen
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
        return [tuple(part.to(self._device, non_blocking=True) for part in batch) for batch in step], waited

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
            shards, starts = self._order.locate(self._seen + np.arange(steps * per_step))
            for step in range(steps):
                batches = []
                for micro_step in range(self._micro_steps):
                    first = step * per_step + (micro_step * self._ranks + self._rank) * B
                    rows = np.empty((B, width), dtype=np.int64)
                    for row, shard, start in zip(rows, shards[first : first + B], starts[first : first + B]):
                        self._order.split.copy(shard, start, row)
                    batch = self._objective.batch(rows, self._seen + first)
                    batches.append(tuple(part.pin_memory() for part in batch) if pins else batch)
                yield batches
            self._seen += steps * per_step
            self._order.split.release_pages()  # otherwise the process grows to the size of the data


@contextlib.contextmanager
def open_data(cfg, world):
    """Yields the Loader of a run's training split and its validation Split."""
    command = prepare_command(cfg)
    train, val = (Split(cfg.data.data_dir, name, cfg.model.vocab_size, command) for name in ("train", "val"))
    objective = objective_for(cfg, cfg.run.seed)
    micro_steps = accumulation_steps(cfg.data, cfg.data.seq_len, world.data_ranks)
    order = TrainOrder(train, objective.stride, cfg.run.seed)
    with contextlib.closing(Loader(order, objective, 0, micro_steps, cfg.data.micro_batch_size, world)) as loader:
        yield loader, val


def objective_for(cfg, seed):
    """The objective of a run; the seed draws the masks, if any."""
    from objective import OBJECTIVES  # here, since it imports torch, which prepare.py does without

    objective = OBJECTIVES[cfg.model.objective]
    return objective.build(cfg.objective, cfg.data.seq_len, seed, read_meta(cfg.data.data_dir))


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
    for first in range(rank * batch_size, len(places) + rank * batch_size, batch_size * ranks):
        rows = np.zeros((batch_size, objective.stride + objective.extra), dtype=np.int64)
        lengths = np.zeros(batch_size, dtype=np.int64)
        for row, (shard, start, length) in enumerate(places[first : first + batch_size]):
            split.copy(shard, start, rows[row, : length + objective.extra])
            lengths[row] = length
        yield objective.batch(rows, first, lengths)
