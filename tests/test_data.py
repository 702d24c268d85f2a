"""Token shards to batches: the order of training, the windows of evaluation, the files that are read and refused."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import shards
from config import UserError
from conftest import ROOT
from data import (
    DataConfig,
    Loader,
    Split,
    accumulation_steps,
    eval_batches,
    is_same_data,
    nearest_batch,
    vocab_size_of,
)
from objective import IGNORE, Masked, NextToken, ObjectiveConfig
from order import TrainOrder, permute
from run.resume import changed_settings
from shards import HEADER, MAGIC, Shard, ShardWriter, checksums, open_shard, read_meta
from world import World

SHARDS = (101, 37, 64, 5)  # tokens; the last is shorter than a window
T = 7


def tokens_of(number, start=0):
    return np.arange(start, start + number, dtype=np.uint16)


def write_shards(folder, split, shards, dtype=np.uint16, vocab_size=1000):
    """A data folder as prepare.py leaves it, with these arrays as the shards of a split."""
    folder.mkdir(exist_ok=True)
    meta_file = folder / "meta.json"
    meta = {"vocab_size": vocab_size, "splits": {"train": {}, "val": {}}}
    if meta_file.exists():
        meta = json.loads(meta_file.read_text())
    promised = {}
    for i, tokens in enumerate(shards):
        name = f"{split}_{i:06d}.bin"
        header = HEADER.pack(MAGIC, 1, np.dtype(dtype).itemsize, len(tokens))
        (folder / name).write_bytes(header + np.asarray(tokens, dtype).tobytes())
        promised[name] = len(tokens)
    meta["splits"][split] = {"tokens": sum(promised.values()), "shards": promised, "bytes": 3 * sum(promised.values())}
    meta_file.write_text(json.dumps(meta))


def numbered_shards(sizes=SHARDS):
    """Shards in which each token is its own position over all of them, so that a window tells where it is from."""
    starts = np.cumsum([0, *sizes])
    return [tokens_of(size, start) for size, start in zip(sizes, starts)]


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        write_shards(tmp_path / "data", split, numbered_shards())
    return tmp_path / "data"


@pytest.fixture
def split(folder):
    return Split(folder, "train", 1000)


def sequences(split, numbers, seq_len=T, seed=1):
    """Tokens of the sequences of these numbers, a target more than seq_len each."""
    shard, start = TrainOrder(split, seq_len, seed).locate(numbers)
    return split.read([(*place, seq_len + 1) for place in zip(shard, start)], (len(numbers), seq_len + 1))


def world(rank=0, ranks=1):
    return World(rank, ranks, torch.device("cpu"), "fp32")


def loaded(split, steps, seen=0, micro_steps=1, micro_batch_size=1, rank=0, ranks=1, seed=1):
    """[step][micro-step] of ids and targets that a loader gives."""
    loader = Loader(TrainOrder(split, T, seed), NextToken(T), seen, micro_steps, micro_batch_size, world(rank, ranks))
    try:
        return [loader.next()[0] for _ in range(steps)]
    finally:
        loader.close()


# ---- the permutation

@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 16, 17, 255, 257, 1001, 65_537])
def test_permutation_takes_each_index_once(n):
    out = permute(np.arange(n, dtype=np.uint64), n, (3, 1))
    assert np.array_equal(np.sort(out), np.arange(n))


def test_permutation_of_one_index_needs_no_other():
    n = 10**12 + 39  # nothing of that size is held
    some = permute(np.array([0, 1, n - 1], dtype=np.uint64), n, (3, 1))
    assert len(set(some.tolist())) == 3 and some.max() < n
    assert permute(np.array([1], dtype=np.uint64), n, (3, 1))[0] == some[1]


def test_permutation_differs_by_seed_and_epoch_and_is_the_same_for_the_same():
    n, index = 1001, np.arange(1001, dtype=np.uint64)
    drawn = {key: permute(index, n, key) for key in [(1, 0), (2, 0), (1, 1), (0, 1), (2, 1)]}
    assert np.array_equal(drawn[1, 0], permute(index, n, (1, 0)))
    for one in drawn:
        for other in drawn:
            if one != other:
                same = np.mean(drawn[one] == drawn[other])
                assert same < 0.01, (one, other)


def test_permutation_looks_random():
    """Of a random permutation, correlations of neighbours and of index and image are about 1 / sqrt(n)."""
    n = 10_007
    index = np.arange(n, dtype=np.uint64)
    for key in range(5):
        out = permute(index, n, (key, 0)).astype(float)
        assert abs(np.corrcoef(index.astype(float), out)[0, 1]) < 5 / np.sqrt(n)
        assert abs(np.corrcoef(out[1:], out[:-1])[0, 1]) < 5 / np.sqrt(n)
        steps = np.abs(np.diff(out))
        assert abs(steps.mean() - n / 3) < 0.03 * n


def test_small_permutations_are_all_about_equally_likely():
    counts = {}
    for seed in range(2400):
        drawn = tuple(permute(np.arange(4, dtype=np.uint64), 4, (seed, 0)).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 24 and 50 < min(counts.values()) and max(counts.values()) < 160


# ---- the order of training

def test_epoch_holds_each_window_once_and_windows_do_not_cross_shards(split):
    order = TrainOrder(split, T, seed=1)
    assert order.per_epoch == sum(max(0, size // T - 1) for size in SHARDS)
    bounds = np.cumsum([0, *SHARDS])
    offsets = set()
    for epoch in range(9):
        rows = sequences(split, np.arange(order.per_epoch) + epoch * order.per_epoch)
        assert np.array_equal(np.diff(rows, axis=1), np.ones((len(rows), T)))  # each is one run of tokens
        shard_of_first, shard_of_last = (np.searchsorted(bounds, rows[:, i], side="right") for i in (0, -1))
        assert np.array_equal(shard_of_first, shard_of_last)
        targets = rows[:, 1:].ravel()
        assert len(set(targets.tolist())) == len(targets)  # no target twice
        offset = {int(first - bounds[shard - 1]) % T for first, shard in zip(rows[:, 0], shard_of_first)}
        assert len(offset) == 1
        offsets |= offset
    assert len(offsets) > 3


def test_epochs_together_reach_every_target_but_those_past_a_shards_last_whole_window(split):
    order = TrainOrder(split, T, seed=1)
    targets = set(sequences(split, np.arange(60 * order.per_epoch))[:, 1:].ravel().tolist())
    starts = np.cumsum([0, *SHARDS])
    assert targets == {start + i for start, size in zip(starts, SHARDS) for i in range(1, size // T * T)}


def test_order_differs_by_seed_and_epoch(split):
    per_epoch = TrainOrder(split, T, 1).per_epoch
    first, second, other = (sequences(split, np.arange(per_epoch) + start, seed=seed)[:, 0].tolist()
                            for start, seed in [(0, 1), (per_epoch, 1), (0, 2)])
    assert first != second and first != other and second != other
    assert not np.array_equal(np.argsort(first), np.argsort(second))  # not by the epoch's offset alone
    assert first == sequences(split, np.arange(per_epoch))[:, 0].tolist()


def test_sequence_does_not_depend_on_what_is_asked_with_it(split):
    together = sequences(split, np.arange(200))
    for number in (0, 25, 26, 27, 131, 199):
        assert np.array_equal(sequences(split, [number])[0], together[number])


# ---- the loader

def test_loader_gives_the_order_one_sequence_after_another(split):
    steps = loaded(split, 60, micro_steps=2, micro_batch_size=51)  # past the 4096 that are permuted at once
    expected = sequences(split, np.arange(60 * 102)).reshape(60, 2, 51, T + 1)
    for step, want in zip(steps, expected):
        for (ids, targets), rows in zip(step, want, strict=True):
            assert ids.dtype == torch.int64
            assert np.array_equal(ids, rows[:, :-1]) and np.array_equal(targets, rows[:, 1:])


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 12), (1, 1), (2, 3), (3, 4), (3, 1), (12, 1), (4, 3)])
def test_step_takes_the_same_sequences_however_it_is_divided(split, ranks, micro_batch_size):
    micro_steps = 12 // (ranks * micro_batch_size)
    of_rank = [loaded(split, 5, 0, micro_steps, micro_batch_size, rank, ranks) for rank in range(ranks)]
    for step in range(5):
        rows = torch.cat([of_rank[rank][step][m][0] for m in range(micro_steps) for rank in range(ranks)])
        assert np.array_equal(rows, sequences(split, np.arange(12) + 12 * step)[:, :-1])


@pytest.mark.parametrize("seen", [6, 24, 30, 600])
def test_resumed_loader_goes_on_where_the_other_stopped(split, seen):
    straight = loaded(split, 110, micro_steps=2, micro_batch_size=3)[seen // 6 :]
    resumed = loaded(split, 110 - seen // 6, seen=seen, micro_steps=2, micro_batch_size=3)
    other_shape = loaded(split, 110 - seen // 6, seen=seen, micro_steps=1, micro_batch_size=6)
    for want, got, whole in zip(straight, resumed, other_shape, strict=True):
        assert torch.equal(torch.cat([ids for ids, _ in want]), torch.cat([ids for ids, _ in got]))
        assert torch.equal(torch.cat([ids for ids, _ in want]), whole[0][0])


def test_loader_tells_its_mistakes_where_the_batch_is_asked_for(tmp_path):
    for name in ("train", "val"):
        write_shards(tmp_path, name, [np.r_[tokens_of(50), 60, tokens_of(50)]], vocab_size=60)
    with pytest.raises(ValueError, match="train_000000.bin holds token 60, but vocab_size is 60; set"):
        loaded(Split(tmp_path, "train", 60), steps=20)


def test_closed_loader_leaves_no_thread(split):
    loader = Loader(TrainOrder(split, T, 1), NextToken(T), 0, 2, 3, world())
    loader.next()
    [thread] = loader._thread._threads
    loader.close()
    assert not thread.is_alive()


def test_loader_continues_from_where_it_is_sent(split):
    def first(loader):
        return [part.tolist() for part in loader.next()[0][0]]

    loader = Loader(TrainOrder(split, T, 1), NextToken(T), 0, 2, 3, world())
    at_0 = first(loader)
    at_6 = first(loader)
    loader.seek(0)
    assert first(loader) == at_0
    loader.seek(6)
    assert first(loader) == at_6 != at_0
    loader.close()


# ---- evaluation

def evaluated(split, eval_tokens=10**9, seq_len=T, batch_size=3, rank=0, ranks=1):
    """[(id, target)] of all valid targets, in order, and the number of batches."""
    pairs, n_batches = [], 0
    for ids, targets in eval_batches(split, NextToken(seq_len), eval_tokens, batch_size, rank, ranks):
        assert ids.shape == targets.shape == (batch_size, seq_len)
        valid = targets != IGNORE
        pairs += zip(ids[valid].tolist(), targets[valid].tolist())
        n_batches += 1
    return pairs, n_batches


@pytest.mark.parametrize("seq_len", [1, 2, T, 36, 64, 200])
def test_evaluation_covers_every_target_of_the_split_once(split, seq_len):
    bounds = np.cumsum([0, *SHARDS])
    expected = [(t - 1, t) for t in range(bounds[-1]) if t not in bounds]
    assert evaluated(split, seq_len=seq_len)[0] == expected


@pytest.mark.parametrize("eval_tokens", [1, 6, 7, 8, 100, 101, 136, 203, 204, 1000])
def test_evaluation_stops_after_eval_tokens_targets_or_at_the_splits_end(split, eval_tokens):
    whole, _ = evaluated(split)
    assert evaluated(split, eval_tokens)[0] == whole[:eval_tokens]


def test_eval_tokens_of_the_splits_size_covers_its_last_partial_window(split):
    assert evaluated(split, eval_tokens=split.tokens) == evaluated(split)


@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 1), (2, 1), (99, 1), (3, 2), (1, 5), (7, 3), (50, 2)])
def test_evaluation_is_the_same_for_every_batch_size_and_number_of_ranks(split, batch_size, ranks):
    of_ranks = [evaluated(split, 150, T, batch_size, rank, ranks) for rank in range(ranks)]
    assert sorted(sum((pairs for pairs, _ in of_ranks), [])) == sorted(evaluated(split, 150)[0])
    assert len({n_batches for _, n_batches in of_ranks}) == 1  # ranks that reduce together must meet equally often


def test_split_of_one_token_cannot_be_evaluated(tmp_path):
    for name in ("train", "val"):
        write_shards(tmp_path, name, [tokens_of(1)])
    with pytest.raises(ValueError, match="the val split has 1 tokens; evaluation needs at least 2"):
        list(eval_batches(Split(tmp_path, "val", 1000), NextToken(T), 99, 3, 0, 1))


# ---- shards on disk

@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_written_shards_hold_shard_tokens_each_and_read_back(tmp_path, dtype):
    tokens = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 1003, dtype=dtype)
    writer = ShardWriter(tmp_path, "train", dtype, shard_tokens=100)
    for part in np.split(tokens, [1, 1, 77, 400, 401, 1000]):
        writer.write(part)
    assert [p.suffix for p in tmp_path.iterdir()] == [".part"] * 11  # no reader takes them yet
    counts = writer.finish()
    assert list(counts.values()) == [100] * 10 + [3]
    shards = [open_shard(tmp_path / name) for name in counts]
    assert {shard.dtype for shard in shards} == {np.dtype(dtype)}
    assert np.array_equal(np.concatenate(shards), tokens)
    header = struct.pack("<8sIIQ", b"flatlm\0\0", 1, np.dtype(dtype).itemsize, 3)
    assert (tmp_path / "train_000010.bin").read_bytes() == header + tokens[-3:].tobytes()


def test_uint32_ids_reach_the_batch_whole(tmp_path):
    for name in ("train", "val"):
        write_shards(tmp_path, name, [np.arange(70_000, 70_099)], np.uint32, vocab_size=100_000)
    ids, targets = loaded(Split(tmp_path, "train", 100_000), 1, micro_batch_size=5)[0][0]
    assert ids.min() >= 70_000 and torch.equal(ids + 1, targets)
    assert evaluated(Split(tmp_path, "val", 100_000))[0][-1] == (70_097, 70_098)


def test_nanogpt_files_are_read(tmp_path):
    for name, number in (("train", 500), ("val", 50)):
        tokens_of(number).tofile(tmp_path / f"{name}.bin")
    split = Split(tmp_path, "train", 1000)
    assert split.tokens == 500
    assert np.array_equal(np.diff(sequences(split, np.arange(9))), np.ones((9, T)))
    assert len(evaluated(Split(tmp_path, "val", 1000))[0]) == 49


@pytest.mark.parametrize(("dtype", "vocab_size"), [
    (np.uint16, 50_257), (np.uint16, 65_536), (np.uint16, 300), (np.uint32, 128_256), (np.uint32, 50_257),
    (np.uint32, 300), (np.uint32, 2**24),
])  # fmt: skip
@pytest.mark.parametrize("number", [100, 101, 60_000])
def test_width_of_tokens_without_a_header_is_what_they_and_the_vocabulary_allow(tmp_path, dtype, vocab_size, number):
    tokens = np.random.default_rng(0).zipf(1.3, number).clip(max=vocab_size).astype(dtype) - 1  # mostly small ids
    for name in ("train", "val"):
        tokens.astype(dtype).tofile(tmp_path / f"{name}.bin")
    split = Split(tmp_path, "train", vocab_size)
    assert split.shards[0].dtype == dtype and np.array_equal(split.shards[0], tokens)


@pytest.mark.parametrize(("tokens", "vocab_size", "message"), [
    (np.zeros(100, np.uint16), 300, "holds token 0 alone and no header, so its width is unknown"),
    (np.arange(100, dtype=np.uint16), 128_256, "vocab_size 128256 needs uint32 tokens, and those of "),
    (np.arange(101, dtype=np.uint16), 128_256, "vocab_size 128256 needs uint32 tokens, and those of "),
    (np.arange(70_000, 70_100, dtype=np.uint32), 70_050, "vocab_size 70050 needs uint32 tokens, and those of "),
    (np.arange(100, dtype=np.uint32), 90, "train.bin holds token 99, but vocab_size is 90"),
])  # fmt: skip
def test_tokens_of_no_certain_width_are_refused(tmp_path, tokens, vocab_size, message):
    tokens.tofile(tmp_path / "train.bin")
    assert message in refused(tmp_path, vocab_size)


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, np.uint16), (20240801, 7, np.uint32)])
def test_llmc_files_are_read(tmp_path, magic, version, dtype):
    for name, number in (("fineweb_train_000001", 301), ("fineweb_train_000002", 99), ("fineweb_val_000000", 50)):
        header = np.zeros(256, np.int32)
        header[:3] = magic, version, number
        (tmp_path / f"{name}.bin").write_bytes(header.tobytes() + np.arange(number).astype(dtype).tobytes())
    split = Split(tmp_path, "train", 1000)
    assert [len(shard) for shard in split.shards] == [301, 99] and split.shards[0].dtype == dtype
    assert np.array_equal(split.shards[0], np.arange(301))
    assert Split(tmp_path, "val", 1000).tokens == 50


def test_empty_shard_is_read_as_empty(tmp_path):
    for name in ("train", "val"):
        write_shards(tmp_path, name, [tokens_of(0), tokens_of(50)])
    split = Split(tmp_path, "train", 1000)
    assert split.tokens == 50
    assert len(sequences(split, np.arange(6))) == 6 and len(evaluated(split)[0]) == 49
    for sizes in ([0], [0, 0], [5, 0]):
        write_shards(tmp_path / str(sizes), "train", [tokens_of(size) for size in sizes])
        assert Split(tmp_path / str(sizes), "train", 1000).fingerprint()


def fingerprint_of(folder, shards):
    for name in ("train", "val"):
        write_shards(folder, name, shards)
    return Split(folder, "train", 1000).fingerprint()


def test_fingerprint_knows_other_data(tmp_path):
    shards = numbered_shards()
    fingerprint = fingerprint_of(tmp_path / "a", shards)
    assert fingerprint == fingerprint_of(tmp_path / "b", shards) and is_same_data(fingerprint, fingerprint)
    shards[1] = shards[1][::-1]
    assert not is_same_data(fingerprint, fingerprint_of(tmp_path / "c", shards))


def test_fingerprint_knows_a_middle_that_has_changed_whatever_size_and_ends_are(tmp_path):
    shards = [np.arange(300_000) % 1000, np.arange(70_000) % 997]
    fingerprint = fingerprint_of(tmp_path / "a", shards)
    ends = fingerprint.split(".")[0]
    changed = shards[0].copy()
    changed[100_000:103_000] = 7  # two samples lie in these
    other = fingerprint_of(tmp_path / "b", [changed, shards[1]])
    assert other.split(".")[0] == ends and not is_same_data(fingerprint, other)


def test_fingerprint_knows_one_token_that_has_changed_where_meta_has_checksums(tmp_path):
    fingerprints = []
    for token in (7, 8):
        folder = tmp_path / str(token)
        folder.mkdir()
        tokens = np.arange(3_000_000) % 1000
        tokens[1_234_567] = token
        splits = {}
        for name in ("train", "val"):
            writer = ShardWriter(folder, name, np.uint16, 2_500_000)
            writer.write(tokens)
            splits[name] = {"shards": writer.finish(), "checksums": writer.checksums}
            assert all(checksums(open_shard(folder / shard)) == sums for shard, sums in writer.checksums.items())
        (folder / "meta.json").write_text(json.dumps({"vocab_size": 1000, "splits": splits}))
        fingerprints.append(Split(folder, "train", 1000).fingerprint())
    one, other = (fingerprint.split(".") for fingerprint in fingerprints)
    assert one[:2] == other[:2] and one[2] != other[2] and not is_same_data(*fingerprints)


@pytest.mark.parametrize(("old", "new", "is_same"), [
    ("aa-bb", "aa.cc.dd-bb.ee", True), ("aa.cc-bb.ee", "aa.cc.dd-bb.ee.ff", True), ("aa.cc.d-bb", "aa.cc.dd-bb", False),
    ("aa-bb", "aa.cc.dd-b.ee", False), ("aa.c-bb", "aa.cc-bb", False), ("aa.cc.dd-bb.ee.ff", "aa-bb", True),
    ("aa", "aa-bb", False), ("None", "aa-bb", False), ("", "aa-bb", False),
])  # fmt: skip
def test_fingerprints_are_compared_in_the_parts_that_both_have(old, new, is_same):
    assert is_same_data(old, new) is is_same


def test_run_from_before_samples_and_checksums_resumes_on_its_data_and_no_other():
    old = {"data_fingerprint": "aa-bb", "seed": 1}
    assert changed_settings(old, {"data_fingerprint": "aa.cc.dd-bb.ee.ff", "seed": 1}) == []
    with pytest.raises(UserError, match="data_fingerprint: aa-bb -> aa.cc.dd-b.ee.ff"):
        changed_settings(old, {"data_fingerprint": "aa.cc.dd-b.ee.ff", "seed": 1})


def test_first_part_of_a_fingerprint_is_that_of_runs_from_before_there_were_others(split):
    digest = hashlib.sha256()
    for i, (number, tokens) in enumerate(zip(SHARDS, numbered_shards())):
        digest.update(f"train_{i:06d}.bin {number} uint16 ".encode() + 2 * tokens.tobytes())
    assert split.fingerprint().split(".")[0] == digest.hexdigest()[:16]


def test_shard_that_is_not_what_its_checksums_say_is_refused(folder):
    meta = json.loads((folder / "meta.json").read_text())
    promised = meta["splits"]["train"]["checksums"] = {
        path.name: checksums(open_shard(path)) for path in folder.glob("train*")
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    assert Split(folder, "train", 1000).tokens == sum(SHARDS)
    path = folder / "train_000002.bin"
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    assert "train_000002.bin has changed: its tokens from 0 on have another checksum than in meta" in refused(folder)
    path.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    promised[path.name].append(0)  # of a block that is not there
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "train_000002.bin" in refused(folder)


# ---- data that is refused

def refused(folder, vocab_size=1000, split="train"):
    with pytest.raises(ValueError) as caught:
        Split(folder, split, vocab_size, "python prepare.py config/mine.py")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folder_and_empty_folder_print_the_command_that_makes_them(tmp_path):
    message = refused(tmp_path / "nothing")
    assert f"{tmp_path / 'nothing'} does not exist" in message and "python prepare.py config/mine.py" in message
    assert "holds no train tokens; make the data: python prepare.py config/mine.py" in refused(tmp_path)


def test_folder_with_one_split_alone_names_the_other(folder):
    for path in folder.glob("val*"):
        path.unlink()
    assert "holds no val tokens" in refused(folder, split="val")


def test_unfinished_prepare_is_refused(folder):
    (folder / "meta.json").unlink()
    message = refused(folder)
    assert "no meta.json" in message and "an unfinished prepare; make the data: python prepare.py" in message
    for path in folder.glob("*.bin"):
        path.rename(f"{path}.part")
    assert "holds an unfinished prepare; make the data: python prepare.py config/mine.py" in refused(folder)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "7", "{}", '{"vocab_size": 7}', '{"vocab_size": "x", "splits": {"train": {}, "val": {}}}',
    '{"vocab_size": 7, "splits": {"val": {}}}',
])  # fmt: skip
def test_damaged_meta_is_refused(folder, text):
    (folder / "meta.json").write_text(text)
    assert "meta.json is damaged" in refused(folder)


ODD = [None, True, -1, 1.5, 10**30, 2**63, "x", "../../x", "\ud800", [], {}, [[]], {"a": {}}, [1.5], {"x": -1}, [None]]


def places(value, path=()):
    """The path of every value within a JSON value, itself included."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def with_value(value, path, new):
    """A copy of a JSON value with another value at a path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = with_value(value[path[0]], path[1:], new)
    return copy


def test_any_value_in_any_place_of_meta_is_read_or_refused_in_one_line(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta |= {"specials": {"[MASK]": 3}, "continuations": [5, 6], "tokenizer": "byte", "notes": {"x": 1}, "settings": {}}
    for name, split in meta["splits"].items():
        split["checksums"] = {path.name: checksums(open_shard(path)) for path in folder.glob(f"{name}*")}
    n_refused = 0
    for path in places(meta):
        for odd in [*ODD, float("inf"), float("nan")]:
            (folder / "meta.json").write_text(json.dumps(with_value(meta, path, odd)))
            try:
                Split(folder, "train", 1000)
                Masked.build(ObjectiveConfig(), T, 0, read_meta(folder))
            except UserError as error:
                n_refused += 1
                assert "\n" not in str(error)
    assert n_refused > 300


@pytest.mark.slow
def test_arbitrary_json_in_place_of_meta_or_of_an_entry_is_read_or_refused(folder):
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    values = some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=9)
    trees = some.recursive(values, lambda v: some.lists(v, max_size=4) | some.dictionaries(some.text(max_size=9), v))
    meta = json.loads((folder / "meta.json").read_text())

    @hypothesis.settings(max_examples=2000, deadline=None)
    @hypothesis.given(some.sampled_from(list(places(meta))), trees)
    def check(path, value):
        (folder / "meta.json").write_text(json.dumps(with_value(meta, path, value)))
        try:
            Split(folder, "train", 2**24)
        except UserError as error:
            assert "\n" not in str(error)

    check()


def test_meta_that_is_too_large_too_deep_or_no_file_is_refused(folder, tmp_path):
    path = folder / "meta.json"
    for text in ("[" * 10**6, '{"a":' * 10**6, '{"a": "' + "x" * (1 << 24) + '"}', "9" * 10_000, "\0"):
        path.write_text(text)
        assert "meta.json is damaged" in refused(folder)
    path.unlink()
    os.mkfifo(path)
    assert "is no regular file" in refused(folder)
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    assert "is no regular file" in refused(folder)


def test_each_start_checks_some_blocks_and_all_are_checked_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 5)
    monkeypatch.setattr(shards, "BLOCK", 5)
    for name in ("train", "val"):
        write_shards(tmp_path, name, [tokens_of(100)])
    meta, sums = json.loads((tmp_path / "meta.json").read_text()), checksums(open_shard(tmp_path / "train_000000.bin"))
    sums[17] ^= 1
    meta["splits"]["train"]["checksums"] = {"train_000000.bin": sums}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    found = 0
    for _ in range(200):  # each checks 8 of 20 blocks
        try:
            Split(tmp_path, "train", 1000)
        except UserError as error:
            assert "its tokens from 85 on have another checksum" in str(error)
            found += 1
    assert 20 < found < 180


@pytest.mark.parametrize("size", [20, 24, 24 + 73, 24 + 72, 24 + 76])
def test_shard_of_another_size_than_its_header_says_is_refused(folder, size):
    path = folder / "train_000001.bin"  # of 37 tokens, 2 bytes each
    path.write_bytes((path.read_bytes() + b"\0\0")[:size])
    message = refused(folder)
    assert "train_000001.bin" in message and "prepare.py" in message


def test_shard_with_an_unknown_header_is_refused(folder):
    path = folder / "train_000001.bin"
    data = path.read_bytes()
    path.write_bytes(b"notflat\0" + data[8:])
    assert "train_000001.bin is not a token shard" in refused(folder)
    path.write_bytes(data[:8] + struct.pack("<I", 2) + data[12:])
    assert "train_000001.bin has version 2 and 2 bytes a token; this code reads version 1" in refused(folder)
    path.write_bytes(data[:12] + struct.pack("<I", 8) + data[16:])
    assert "has version 1 and 8 bytes a token" in refused(folder)
    path.write_bytes(b"")
    assert "train_000001.bin is not a token shard" in refused(folder)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
@pytest.mark.parametrize("has_meta", [True, False])
def test_shard_that_is_no_regular_file_is_refused_without_waiting(folder, kind, has_meta):
    path = folder / "train_000001.bin"
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link to nothing": lambda: path.symlink_to("no")}[kind]()
    if not has_meta:
        (folder / "meta.json").unlink()
    assert "train_000001.bin is no regular file" in refused(folder) if has_meta else "no meta.json" in refused(folder)


def test_data_without_its_tokenizer_or_with_another_one_is_refused(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "tokenizer.json").write_text("{}")
    meta |= {"tokenizer": "tokenizer.json", "tokenizer_sha256": hashlib.sha256(b"{}").hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    assert Split(folder, "train", 1000).tokens
    for change in (lambda path: path.write_text("{} "), Path.unlink, os.mkfifo):
        change(folder / "tokenizer.json")
        assert "lacks the tokenizer.json of its shards, or has another one; make the data" in refused(folder)


def test_folder_whose_name_is_too_long_is_one_line(tmp_path):
    assert "does not exist" in refused(tmp_path / ("x" * 300))


def test_missing_extra_and_swapped_shards_are_refused(folder):
    path = folder / "train_000001.bin"
    moved = path.rename(folder / "train_000009.bin")
    message = refused(folder)
    assert "train_000001.bin" in message and "train_000009.bin" in message
    moved.unlink()
    assert "train_000001.bin" in refused(folder)
    path.write_bytes((folder / "train_000002.bin").read_bytes())
    assert "holds 64 tokens, meta.json says 37" in refused(folder)


def test_vocab_size_below_the_datas_is_refused(folder):
    assert "vocab_size is 999" in refused(folder, vocab_size=999) and "1000" in refused(folder, vocab_size=999)
    assert Split(folder, "train", 1001).tokens == sum(SHARDS)


def test_vocab_size_is_the_datas_or_asked_for(folder, tmp_path):
    assert vocab_size_of(folder, "make it") == 1000
    tokens_of(99).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="set --vocab_size"):
        vocab_size_of(tmp_path, "make it")


def test_id_outside_the_vocabulary_of_foreign_files_is_refused_in_evaluation_too(tmp_path):
    tokens_of(50).tofile(tmp_path / "val.bin")
    with pytest.raises(ValueError, match="val.bin holds token 4[0-9], but vocab_size is 41"):
        evaluated(Split(tmp_path, "val", 41))


@pytest.mark.parametrize("sizes", [(13,), (6, 13, 1)])
def test_split_without_a_shard_of_two_windows_cannot_be_trained_on(tmp_path, sizes):
    for name in ("train", "val"):
        write_shards(tmp_path, name, numbered_shards(sizes))
    with pytest.raises(ValueError, match=r"no shard of 2 x 7 tokens \(its longest has 13\); lower seq_len"):
        TrainOrder(Split(tmp_path, "train", 1000), T, seed=1)


def test_split_of_just_two_windows_can_be_trained_on(tmp_path):
    for name in ("train", "val"):
        write_shards(tmp_path, name, [tokens_of(14)])
    rows = sequences(Split(tmp_path, "train", 1000), np.arange(40))
    assert len(set(rows[:, 0].tolist())) > 3 and rows.max() <= 13


# ---- batch sizes

@pytest.mark.parametrize(("batch_tokens", "micro_batch_size", "seq_len", "ranks", "steps"), [
    (524_288, 16, 1024, 8, 4), (420, 3, 7, 5, 4), (105, 3, 7, 5, 1),
])  # fmt: skip
def test_accumulation_is_batch_tokens_over_what_ranks_hold_at_once(batch_tokens, micro_batch_size, seq_len, ranks, steps):
    cfg = DataConfig(batch_tokens=batch_tokens, micro_batch_size=micro_batch_size)
    assert accumulation_steps(cfg, seq_len, ranks) == steps


@pytest.mark.parametrize(("sequences", "micro", "ranks", "found"), [
    (12, 3, 4, (12, 3)), (12, 3, 3, (12, 2)), (8, 3, 3, (9, 3)), (10, 4, 4, (8, 2)), (2, 3, 4, (4, 1)), (30, 4, 3, (30, 2)),
    (512, 16, 7, (504, 12)), (1024, 16, 24, (1008, 14)), (511, 16, 7, (511, 1)), (512, 16, 3, (513, 9)),
])  # fmt: skip
def test_the_nearest_batch_keeps_its_tokens_where_ranks_divide_them(sequences, micro, ranks, found):
    cfg = nearest_batch(DataConfig(seq_len=7, batch_tokens=7 * sequences, micro_batch_size=micro), ranks)
    assert (cfg.batch_tokens // 7, cfg.micro_batch_size) == found
    accumulation_steps(cfg, 7, ranks)


def test_batch_tokens_that_do_not_divide_list_micro_batch_sizes_that_do():
    with pytest.raises(ValueError) as caught:
        accumulation_steps(DataConfig(batch_tokens=12 * 7 * 2, micro_batch_size=5), 7, 2)
    assert str(caught.value) == ("batch_tokens 168 is not a multiple of 70 = micro_batch_size 5 x seq_len 7 x 2 ranks; "
                                 "micro_batch_size 2, 3, 4, 6 would fit")
    for fits in (2, 3, 4, 6):
        accumulation_steps(DataConfig(batch_tokens=168, micro_batch_size=fits), 7, 2)


@pytest.mark.parametrize(("batch_tokens", "fits"), [(169, 140), (10, 70), (104, 70), (106, 140)])
def test_batch_tokens_that_no_micro_batch_size_divides_name_the_nearest_that_fits(batch_tokens, fits):
    with pytest.raises(ValueError, match=f"; batch_tokens {fits} would fit"):
        accumulation_steps(DataConfig(batch_tokens=batch_tokens, micro_batch_size=5), 7, 2)
    accumulation_steps(DataConfig(batch_tokens=fits, micro_batch_size=5), 7, 2)


def test_split_is_a_word_of_a_files_name_not_a_part_of_one(tmp_path):
    for name in ("medieval_train_000001.bin", "medieval_val_000000.bin"):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, 50
        (tmp_path / name).write_bytes(header.tobytes() + np.zeros(50, np.uint16).tobytes())
    assert [path.name for path in Split(tmp_path, "val", 1000).paths] == ["medieval_val_000000.bin"]
    assert [path.name for path in Split(tmp_path, "train", 1000).paths] == ["medieval_train_000001.bin"]


def test_remedy_for_huge_numbers_comes_at_once():
    with pytest.raises(ValueError, match="is not a multiple of"):
        accumulation_steps(DataConfig(batch_tokens=10**15, micro_batch_size=3), 1024, 1)


# ---- files that change while they are read

def with_checksums(folder):
    """Adds the checksums of its shards to a data folder's meta.json, as prepare.py does."""
    meta = json.loads((folder / "meta.json").read_text())
    for name, split in meta["splits"].items():
        split["checksums"] = {path.name: checksums(open_shard(path)) for path in folder.glob(f"{name}*")}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def refused_while_reading(split):
    with pytest.raises(UserError) as caught:
        loaded(split, 60)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 20, 24, 50, 224])
def test_shard_that_is_cut_while_it_is_read_ends_the_run_with_a_line(folder, split, size):
    assert loaded(split, 60)
    os.truncate(folder / "train_000000.bin", size)
    rule = f"train_000000.bin has changed while it was in use, from 226 to {size} bytes; restore it and repeat"
    assert rule in refused_while_reading(split)


def test_shard_that_is_cut_during_evaluation_ends_the_run_with_a_line(folder):
    split = Split(folder, "val", 1000)
    os.truncate(folder / "val_000002.bin", 100)
    with pytest.raises(UserError, match="val_000002.bin has changed while it was in use, from 152 to 100 bytes"):
        evaluated(split)


@pytest.mark.parametrize("way", ["in place", "another file"])
def test_shard_that_is_replaced_by_one_of_its_size_ends_the_run_with_a_line(folder, tmp_path, way):
    split, path = Split(with_checksums(folder), "train", 1000), folder / "train_000000.bin"
    loaded(split, 60)
    other = path.read_bytes()[:-1] + b"\1"
    if way == "in place":
        path.write_bytes(other)
    else:
        (tmp_path / "other").write_bytes(other)
        os.replace(tmp_path / "other", path)
        assert loaded(split, 60)  # the old file is read while it is open
        split = split_of_closed_files(split)
    os.utime(path, (7, 7))  # no clock decides
    assert "train_000000.bin has changed while it was in use, from 226 to 226 bytes" in refused_while_reading(split)


def split_of_closed_files(split):
    """A split as it is after so many other shards that the cache of open files has dropped all of its own."""
    for shard in split.shards:
        shard._opened.cache_clear()
    return split


def test_touched_or_copied_shard_of_the_same_content_is_read_on_where_checksums_tell(folder, tmp_path):
    split = Split(with_checksums(folder), "train", 1000)
    before = [step[0][0].tolist() for step in loaded(split, 60)]
    for path in folder.glob("train*"):
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
        os.utime(path, (7, 7))
    assert [step[0][0].tolist() for step in loaded(split_of_closed_files(split), 60)] == before


def test_growing_shard_ends_the_run_with_a_line(folder, split):
    with open(folder / "train_000000.bin", "ab") as file:
        file.write(b"12")
    assert "from 226 to 228 bytes" in refused_while_reading(split)


def test_removed_shard_ends_the_run_with_a_line_once_it_is_opened_again(folder, split):
    loaded(split, 60)
    (folder / "train_000000.bin").unlink()
    assert loaded(split, 60)
    message = refused_while_reading(split_of_closed_files(split))
    assert "train_000000.bin cannot be read (No such file or directory); make it readable and repeat" in message


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file that gives an I/O error is Linux's")
def test_io_error_names_the_shard():
    shard = Shard("/proc/self/mem", np.uint16, 0, 100, (0, 0), shards.unbuffered)  # nothing lies at address 0
    with pytest.raises(UserError, match=r"/proc/self/mem cannot be read \(Input/output error\); make it readable"):
        shard[:7]


FEW_FILES = """
import resource, sys
import numpy as np
from data import Split
resource.setrlimit(resource.RLIMIT_NOFILE, (20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
split = Split(sys.argv[1], "train", 1000)
places = [(shard, 3, 7) for shard in np.random.default_rng(0).integers(0, 50, 300)]
rows = split.read(places, (300, 7))
assert (rows == [[10 * shard + 3 + i for i in range(7)] for shard, *_ in places]).all()
"""


def test_shards_are_read_where_there_are_more_than_a_process_may_open(tmp_path):
    for name in ("train", "val"):
        write_shards(tmp_path, name, [tokens_of(11, 10 * i) for i in range(50)])
    told = subprocess.run([sys.executable, "-c", FEW_FILES, tmp_path], cwd=ROOT, stderr=-1)
    assert told.returncode == 0, told.stderr.decode()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory by kind is told by Linux")
def test_memory_does_not_grow_with_the_data_that_the_loader_has_read(tmp_path):
    def file_pages_mib():
        return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) / 1024

    write_shards(tmp_path, "train", [np.zeros(2**24, np.uint16), np.zeros(2**23, np.uint16), np.zeros(0)])
    split, before = Split(tmp_path, "train", 1000), file_pages_mib()
    loader = Loader(TrainOrder(split, 1024, 1), NextToken(1024), 0, 1, 64, world())
    for _ in range(2**24 // 1024 // 64):
        loader.next()
    loader.close()
    assert file_pages_mib() - before < 8
