"""Runs that are killed again and again, at random moments, end as if nothing had been."""

import json
import os
import random
import signal
import statistics
import time

import pytest

from checkpoint import CheckpointWriter, checkpoints, newest_checkpoint
from conftest import ROOT
from ranks import codes, launch, logged, records, settings, torchrun, wait_until, write_data

pytestmark = pytest.mark.slow

KILLS = 20
CHANGES = {"max_steps": 700, "save_interval": 4, "eval_interval": 10, "keep_checkpoints": 2, "lr_decay_steps": "none",
           "dropout": 0.1, "micro_batch_size": 3}  # fmt: skip


def wait_for_a_moment(out_dir, generator):
    """Waits until a save is being written, or for a while after the next step, or just for a while, at random."""
    kind, first = generator.choice(["save", "save", "step", "start"]), logged(out_dir)
    if kind == "start":
        time.sleep(generator.uniform(0, 1))
        return
    wait_until(lambda: logged(out_dir) > first)
    if kind == "save":
        wait_until(lambda: any((out_dir / "ckpt").glob(".*.partial")))
        time.sleep(generator.uniform(0, 0.03))
    else:
        time.sleep(generator.uniform(0, 0.1))


def check_newest(out_dir):
    """The newest checkpoint is whole; says whether a save was cut short."""
    if found := checkpoints(out_dir):
        assert newest_checkpoint(out_dir) == found[-1]
    return any((out_dir / "ckpt").glob(".*"))


def check_ends_as_if_nothing_had_been(n, data_dir, killed, tmp_path):
    assert codes(launch(n, settings(data_dir, tmp_path / "whole", **CHANGES))) == [0] * n
    assert records(killed) == records(tmp_path / "whole")
    assert records(killed, "val_loss") == records(tmp_path / "whole", "val_loss")
    assert [path.name for path in checkpoints(killed)][-2:] == ["step_00000696", "step_00000700"]
    assert not check_newest(killed)


@pytest.mark.parametrize("n", [1, 2])
def test_kill_9_of_all_ranks_at_random_moments_changes_no_loss(n, tmp_path):
    data_dir, out_dir = write_data(tmp_path / "data"), tmp_path / "killed"
    generator, kills, cut_saves = random.Random(os.environ.get("CHAOS_SEED", n)), 0, 0
    while kills < KILLS:
        processes = launch(n, settings(data_dir, out_dir, **CHANGES))
        wait_for_a_moment(out_dir, generator)
        assert all(process.is_alive() for process in processes), "it ended before it could be killed often enough"
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        kills += 1
        cut_saves += check_newest(out_dir)
    assert cut_saves >= 3
    assert codes(launch(n, settings(data_dir, out_dir, **CHANGES))) == [0] * n
    check_ends_as_if_nothing_had_been(n, data_dir, out_dir, tmp_path)


def workers_of(pid):
    """Processes that a process has started, by the kernel's list."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.parametrize("n", [1, 2])
def test_kill_9_of_a_rank_at_random_moments_is_healed_by_torchruns_restarts(n, tmp_path):
    data_dir, out_dir = write_data(tmp_path / "data"), tmp_path / "killed"
    cfg = settings(data_dir, out_dir, **CHANGES)
    run = torchrun(n, ROOT / "train.py", cfg, tmp_path / "told", f"--max-restarts={KILLS}")
    generator, kills, cut_saves = random.Random(os.environ.get("CHAOS_SEED", n)), 0, 0
    try:
        while kills < KILLS:
            wait_for_a_moment(out_dir, generator)
            workers = workers_of(run.pid)
            assert run.poll() is None, (tmp_path / "told").read_text()[-3000:]
            if len(workers) == n:  # else they are being started
                os.kill(generator.choice(workers), signal.SIGKILL)
                kills += 1
                wait_until(lambda: not set(workers) & set(workers_of(run.pid)))
                cut_saves += check_newest(out_dir)
        assert run.wait(timeout=1200) == 0, (tmp_path / "told").read_text()[-3000:]
    finally:
        run.terminate()  # and with it the workers, where something went wrong
    assert cut_saves >= 3 and "terminate called" not in (tmp_path / "told").read_text()
    check_ends_as_if_nothing_had_been(n, data_dir, out_dir, tmp_path)


def test_saving_costs_training_little(tmp_path):
    """Steps of a model whose checkpoint has 500 MB, saved every 10; prints what README says (-s)."""
    data_dir = write_data(tmp_path / "data", train_tokens=200_000)
    shape = {"n_embd": 640, "n_layer": 9, "n_head": 10, "block_size": 256, "seq_len": 256, "micro_batch_size": 4,
             "batch_tokens": 1024, "eval_tokens": 512, "max_steps": 40, "eval_interval": 1000, "precision": "auto",
             "keep_checkpoints": 1}  # fmt: skip
    seconds = {}
    for interval in ("none", 10):
        cfg = settings(data_dir, tmp_path / str(interval), **shape, save_interval=interval)
        assert codes(launch(1, cfg, tmp_path / "told", (note_pauses, tmp_path / "pauses"))) == [0]
        steps = [json.loads(line) for line in (tmp_path / str(interval) / "log.jsonl").read_text().splitlines()]
        seconds[interval] = [shape["batch_tokens"] / step["tokens_per_s"] for step in steps if "loss" in step]
    pauses = [float(line) for line in (tmp_path / "pauses").read_text().splitlines()]
    size = sum(file.stat().st_size for file in checkpoints(tmp_path / "10")[-1].iterdir())
    step, while_writing = statistics.median(seconds["none"]), statistics.median(seconds[10])
    slower = sum(seconds[10][10:40]) + sum(pauses[:3]) - 30 * step  # three intervals, each after a save
    print(f"\ncheckpoint {size / 1e6:.0f} MB; a step without saves {step:.3f} s, with {while_writing:.3f} s (medians); "
          f"pause of a save {statistics.median(pauses):.3f} s; cost of a save, pause and slower steps, "
          f"{slower / 3:.2f} s = {slower / 3 / (10 * step):.1%} of the time between saves")  # fmt: skip
    assert size > 500e6 and len(pauses) == 4
    assert statistics.median(pauses) < 0.1 * 10 * step and slower / 3 < 10 * step


def note_pauses(rank, file):
    """Writes down for how long each save keeps the loop."""
    save = CheckpointWriter.save

    def timed(self, *args):
        start = time.perf_counter()
        save(self, *args)
        with open(file, "a") as noted:
            noted.write(f"{time.perf_counter() - start}\n")

    CheckpointWriter.save = timed
