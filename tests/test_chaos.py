"""Runs that are killed again and again, at random moments, end as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

import config
from checkpoint import checkpoints, newest_checkpoint
from conftest import ROOT
from ranks import codes, launch, logged, records, settings, wait_until, write_data

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
    assert codes(launch(n, settings(data_dir, tmp_path / "whole", **CHANGES)), patience=120) == [0] * n
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
    assert codes(launch(n, settings(data_dir, out_dir, **CHANGES)), patience=120) == [0] * n
    check_ends_as_if_nothing_had_been(n, data_dir, out_dir, tmp_path)


def workers_of(pid):
    """Processes that a process has started, by the kernel's list."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.parametrize("n", [1, 2])
def test_kill_9_of_a_rank_at_random_moments_is_healed_by_torchruns_restarts(n, tmp_path):
    data_dir, out_dir = write_data(tmp_path / "data"), tmp_path / "killed"
    names = config.as_dict(settings(data_dir, out_dir, **CHANGES))
    arguments = [f"--{name}={'none' if value is None else value}" for name, value in names.items()]
    command = ["--standalone", f"--nproc_per_node={n}", f"--max-restarts={KILLS}", str(ROOT / "train.py"), *arguments]
    with open(tmp_path / "told", "w") as told:
        run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *command], stdout=told, stderr=told)
    generator, kills, cut_saves = random.Random(os.environ.get("CHAOS_SEED", n)), 0, 0
    while kills < KILLS:
        wait_for_a_moment(out_dir, generator)
        workers = workers_of(run.pid)
        assert run.poll() is None, (tmp_path / "told").read_text()[-3000:]
        if len(workers) == n:  # else they are being started
            os.kill(generator.choice(workers), signal.SIGKILL)
            kills += 1
            wait_until(lambda: not set(workers) & set(workers_of(run.pid)))
            cut_saves += check_newest(out_dir)
    assert run.wait(timeout=120) == 0, (tmp_path / "told").read_text()[-3000:]
    assert cut_saves >= 3 and "terminate called" not in (tmp_path / "told").read_text()
    check_ends_as_if_nothing_had_been(n, data_dir, out_dir, tmp_path)
