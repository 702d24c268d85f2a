"""Mixtures of data folders: exact shares, each folder's own epochs, resume, shares that change, losses by folder."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import prepare
import train
from config import UserError
from conftest import slow
from data import DataConfig, Loader, Split
from mixture import WINDOW, Mixture, per_window
from objective import NextToken
from order import TrainOrder
from ranks import SMALL, codes, launch, logged, records, run, wait_until, write_data
from world import World

T = 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three data folders of several shards."""
    folder = tmp_path_factory.mktemp("sources")
    sizes = {"web": 9000, "code": 3000, "math": 1500}
    return {name: str(write_data(folder / name, n, 150, seed=n, shard_tokens=2000)) for name, n in sizes.items()}


def mixture_of(folders, phases, seed=5):
    splits = [Split(folder, "train", 37) for folder in folders]
    return Mixture([TrainOrder(split, T, seed) for split in splits], Split.joined(splits), phases, seed)


def sources_of(mixture, numbers):
    """The folder that each sequence comes from."""
    shards, _ = mixture.locate(numbers)
    return np.array([Path(mixture.split.paths[shard]).parent.name for shard in shards])


def preset_of(tmp_path, data_dir, schedule=None):
    path = tmp_path / "mix.py"
    path.write_text(f"data_dir = {data_dir!r}\ndata_schedule = {schedule!r}\n")
    return str(path)


def mixed(preset, out_dir, **changes):
    """The settings of a small run on a mixture."""
    names = SMALL | {"out_dir": out_dir} | changes
    return config.load(train.Settings, [preset, *(f"--{name}={value}" for name, value in names.items())])


# ---- shares


@pytest.mark.parametrize(("shares", "counts"), [
    ({"a": 0.7, "b": 0.3}, [700, 300]), ({"a": 2, "b": 1}, [667, 333]), ({"a": 1, "b": 1, "c": 1}, [334, 333, 333]),
    ({"a": 0.0015, "b": 0.9985}, [2, 998]), ({"b": 5}, [0, 1000]),
])  # fmt: skip
def test_shares_become_whole_sequences_of_each_thousand(shares, counts):
    folders = sorted({"a", "b", *shares})
    assert per_window(shares, folders) == counts and sum(counts) == WINDOW


def test_any_thousand_sequences_in_a_row_hold_the_shares_exactly(folders):
    sources = sources_of(mixture_of(folders.values(), [(0, [600, 300, 100])]), np.arange(5000))
    for start in (0, 1, 333, 999, 2718, 4000):
        window = sources[start : start + WINDOW]
        assert [(window == name).sum() for name in folders] == [600, 300, 100]
    runs = np.diff(np.flatnonzero(np.diff((sources == "web").astype(int))))
    assert runs.max() < 30, "the folders are mixed, not one after the other"


def test_each_folder_gives_its_own_order_an_epoch_after_the_other(folders):
    mixture = mixture_of(folders.values(), [(0, [600, 300, 100]), (700, [0, 500, 500])])
    numbers = np.arange(9000)
    shards, starts = mixture.locate(numbers)
    sources = sources_of(mixture, numbers)
    for i, name in enumerate(folders):
        here, order = sources == name, mixture.orders[i]
        wanted = order.locate(np.arange(here.sum()))
        first = shards[here].min() if name == "web" else sum(len(o.split.shards) for o in mixture.orders[:i])
        assert np.array_equal(shards[here] - first, wanted[0]) and np.array_equal(starts[here], wanted[1])
    assert mixture.epochs(9000)[folders["code"]] > 2, "several epochs were seen"


def test_shares_change_at_their_step_and_what_was_seen_counts_on(folders):
    mixture = mixture_of(folders.values(), [(0, [600, 300, 100]), (1234, [0, 500, 500]), (2500, [1000, 0, 0])])
    sources = sources_of(mixture, np.arange(4000))
    assert not (sources[1234:2500] == "web").any() and (sources[2500:] == "web").all()
    for n in (0, 1, 999, 1234, 1235, 2499, 2500, 3999):
        seen = [int((sources[:n] == name).sum()) for name in folders]
        assert mixture.seen(n).tolist() == seen
        for (folder, epochs), order, count in zip(mixture.epochs(n).items(), mixture.orders, seen):
            assert epochs == count * T / order.split.tokens and folder == order.split.folder


def test_a_sequence_is_found_from_its_number_alone(folders):
    mixture = mixture_of(folders.values(), [(0, [600, 300, 100]), (700, [0, 500, 500])])
    far = 10**12
    together = mixture.locate(np.array([far, 3, 700, far + 1, 699]))
    alone = [mixture.locate(np.array([n])) for n in (far, 3, 700, far + 1, 699)]
    assert np.array_equal(np.array(together), np.array(alone)[:, :, 0].T)
    other = mixture_of(folders.values(), [(0, [600, 300, 100])], seed=6)
    assert not np.array_equal(sources_of(mixture, np.arange(500)), sources_of(other, np.arange(500)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_micro_batches_only_divide_a_mixtures_sequences(ranks, folders):
    def step(world, micro_steps, micro_batch_size):
        mixture = mixture_of(folders.values(), [(0, [600, 300, 100])])
        loader = Loader(mixture, NextToken(T), 996, micro_steps, micro_batch_size, world)
        ids = torch.cat([ids for ids, _ in loader.next()[0]])
        loader.close()
        return ids

    alone = step(World(0, 1, torch.device("cpu"), "fp32"), 1, 12)
    parts = [step(World(rank, ranks, torch.device("cpu"), "fp32"), 12 // ranks, 1) for rank in range(ranks)]
    together = torch.stack(parts, 1).reshape(12, T)
    assert torch.equal(alone, together)


# ---- runs


def test_a_mixed_run_logs_each_folders_loss_and_epochs(folders, tmp_path, capsys, no_curves):
    shares = {folders["web"]: 0.5, folders["code"]: 0.3, folders["math"]: 0.2}
    cfg = mixed(preset_of(tmp_path, shares), tmp_path / "run", eval_tokens=420)
    train.main(cfg)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "val_losses" in line]
    assert [line["step"] for line in evaluated] == [0, 9]
    for line in evaluated:  # equally many targets in each
        assert list(line["val_losses"]) == list(shares)
        assert line["val_loss"] == pytest.approx(sum(line["val_losses"].values()) / 3, rel=1e-6)
        assert line["val_bpb"] == pytest.approx(line["val_loss"] / math.log(2))  # each id is a byte
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["epochs"].keys() == shares.keys() and all(n > 0 for n in steps[-1]["epochs"].values())
    assert sum(n * len_of(folder) for folder, n in steps[-1]["epochs"].items()) == pytest.approx(9 * 42)
    out = capsys.readouterr().out
    assert all(f"epochs of {folder}" in out and f" in {folder}" in out for folder in shares)
    again = config.load(train.Settings, [str(tmp_path / "run/config.py")])
    assert again.data == cfg.data, "the run's own preset reproduces its mixture"


def len_of(folder):
    return Split(folder, "train", 37).tokens


def test_a_mixture_of_one_folder_is_that_folder(folders, tmp_path, no_curves):
    run(folders["web"], tmp_path / "plain", max_steps=3)
    train.main(mixed(preset_of(tmp_path, {folders["web"]: 2}), tmp_path / "mixed", max_steps=3))
    assert records(tmp_path / "plain") == records(tmp_path / "mixed")


@pytest.mark.parametrize("ranks", [*slow(1), 2])
def test_a_killed_mixed_run_goes_on_to_the_bit_also_on_more_ranks(ranks, folders, tmp_path, no_curves):
    """The shares change before the kill and after it."""
    web, code, math_ = folders.values()
    preset = preset_of(tmp_path, {web: 3, code: 2, math_: 1}, {4: {code: 1, math_: 2}, 13: {web: 1}})
    changes = {"max_steps": 30, "save_interval": 6, "dropout": 0.1 if ranks == 1 else 0.0}
    train.main(mixed(preset, tmp_path / "whole", **changes))
    [process] = launch(1, mixed(preset, tmp_path / "run", **changes))
    wait_until(lambda: logged(tmp_path / "run") >= 9)
    process.kill()
    process.join()
    assert not (tmp_path / "run" / "finished").exists()
    assert codes(launch(ranks, mixed(preset, tmp_path / "run", **changes))) == [0] * ranks
    wanted, found = records(tmp_path / "whole"), records(tmp_path / "run")
    assert found == (wanted if ranks == 1 else pytest.approx(wanted, rel=1e-5))
    assert records(tmp_path / "run", "epochs")[30] == records(tmp_path / "whole", "epochs")[30]


def test_shares_that_were_drawn_by_cannot_change_but_later_ones_can(folders, tmp_path, no_curves):
    web, code, _ = folders.values()
    train.main(mixed(preset_of(tmp_path, {web: 3, code: 1}, {4: {web: 1}}), tmp_path / "run", max_steps=6))
    for data_dir, schedule, changes, said in (
        ({web: 2, code: 1}, {4: {web: 1}}, {}, "data_dir: "),
        ({web: 3, code: 1}, {5: {web: 1}}, {}, "data_schedule: "),
        ({web: 3, code: 1}, None, {}, "data_schedule: "),
        ({web: 3, code: 1}, {4: {web: 1}}, {"batch_tokens": 84}, "batch_tokens: 42 -> 84"),
    ):
        with pytest.raises(UserError, match=f"a run cannot continue .*{said}"):
            train.main(mixed(preset_of(tmp_path, data_dir, schedule), tmp_path / "run", max_steps=8, **changes))
    later = {4: {web: 1}, 7: {code: 1}}
    train.main(mixed(preset_of(tmp_path, {web: 3, code: 1}, later), tmp_path / "run", max_steps=8))
    assert records(tmp_path / "run", "epochs")[8][code] > records(tmp_path / "run", "epochs")[7][code]


@pytest.mark.parametrize("batch_tokens", [21, 84])
def test_a_schedule_is_refused_where_earlier_steps_had_another_batch(batch_tokens, folders, tmp_path, no_curves):
    """A schedule's steps stand for so many sequences each."""
    web, code, _ = folders.values()
    train.main(mixed(preset_of(tmp_path, {web: 3, code: 1}), tmp_path / "run", max_steps=6))
    later = preset_of(tmp_path, {web: 3, code: 1}, {20: {web: 1}})
    with pytest.raises(UserError, match=f"data_schedule counts steps of {batch_tokens // 7} sequences, but 6 .* read 36"):
        train.main(mixed(later, tmp_path / "run", max_steps=8, batch_tokens=batch_tokens))
    train.main(mixed(later, tmp_path / "run", max_steps=8))


# ---- wrong input


@pytest.mark.parametrize(("data_dir", "schedule", "said"), [
    ({"a": -1, "b": 1}, None, "data_dir gives a the share -1; a share is a number of at least 0"),
    ({"a": math.nan, "b": 1}, None, "data_dir gives a the share nan"),
    ({"a": "half", "b": 1}, None, "data_dir gives a the share 'half'"),
    ({"a": 0, "b": 0}, None, "data_dir has shares of 0 alone"),
    ({"a": 1, "b": 5000}, None, "data_dir gives a less than one sequence of 1,000"),
    ({"a": 1, 7: 1}, None, "data_dir names 7"),
    ({"a": 1}, {3: {"b": 1}}, "data_schedule at step 3 names 'b'; the folders of data_dir are 'a'"),
    ({"a": 1}, {0: {"a": 1}}, "data_schedule changes shares at 0; it must be a step"),
    ({"a": 1}, {"3": {"a": 1}}, "data_schedule changes shares at '3'"),
    ({"a": 1}, {3: 0.5}, "data_schedule at step 3 is 0.5; write {folder: share of tokens}"),
    ("a", {3: {"a": 1}}, "data_schedule needs the shares of the start; write data_dir = {'a': 1}"),
])  # fmt: skip
def test_shares_that_make_no_sense_are_refused_in_a_line(data_dir, schedule, said):
    with pytest.raises(UserError) as error:
        DataConfig(data_dir=data_dir, data_schedule=schedule)
    assert str(error.value).startswith(said) and len(error.value.args) == 1


def test_folders_that_cannot_be_mixed_are_named(folders, tmp_path, no_curves):
    other = write_data(tmp_path / "other", tokenizer="gpt2")
    with pytest.raises(UserError, match="has the tokenizer byte, .*other gpt2"):
        train.main(mixed(preset_of(tmp_path, {folders["web"]: 1, str(other): 1}), tmp_path / "run"))
    with pytest.raises(UserError, match=r"nowhere does not exist .* --data_dir=\S*nowhere"):
        train.main(mixed(preset_of(tmp_path, {folders["web"]: 1, str(tmp_path / "nowhere"): 1}), tmp_path / "run"))
    with pytest.raises(UserError, match="eval_tokens 1 is too few for 2 folders"):
        mixed(preset_of(tmp_path, {folders["web"]: 1, str(other): 1}), tmp_path / "run", eval_tokens=1)
    tiny = write_data(tmp_path / "tiny", train_tokens=5)
    with pytest.raises(UserError, match="tiny.* no shard of 2 x 7 tokens"):
        train.main(mixed(preset_of(tmp_path, {folders["web"]: 1, str(tiny): 1}), tmp_path / "run"))
    with pytest.raises(UserError, match="data_dir is a mixture of .*; prepare each by --data_dir="):
        prepare.main(config.load(prepare.Settings, [preset_of(tmp_path, {"a": 1, "b": 1}), "--input=x"]))
    with pytest.raises(UserError, match="data_schedule must be {...}, in a preset or none"):
        config.load(train.Settings, ["--data_schedule=5"])
