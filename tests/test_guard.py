"""What may befall a run: it is asked to stop, a rank hangs or dies, the disk is full, another run takes its folder."""

import ctypes
import os
import re
import resource
import signal
import subprocess
import threading
import time

import pytest
import torch

import config
from checkpoint import checkpoints, newest_checkpoint
from conftest import ROOT, slow
from data import Loader
from ranks import codes, launch, logged, records, run, settings, torchrun, wait_until, write_data
from run.guard import crash_reports
from world import World

LONG = {"max_steps": 4000, "save_interval": 1000, "lr_decay_steps": "none"}
STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("guard") / "data")


def check_stopped(out_dir, told, by):
    """The run was saved where it stopped, says how to go on, and is not marked as finished."""
    text = told.read_text()
    step = int(checkpoints(out_dir)[-1].name[5:])
    assert f"stopped by {by}: step {step} of 4000" in text, text
    assert "the model is unfinished; the same command continues" in text.splitlines()[-1]
    assert step == logged(out_dir) and 0 < step < 4000 and not (out_dir / "finished").exists()
    assert newest_checkpoint(out_dir) == checkpoints(out_dir)[-1] and "Traceback" not in text


# ---- asked to stop

def heed_hangups(rank, heed):
    """As in a terminal, or under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL if heed else signal.SIG_IGN)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_makes_a_run_finish_its_step_save_and_say_how_to_go_on(number, data_dir, tmp_path):
    out_dir = tmp_path / "run"
    processes = launch(1, settings(data_dir, out_dir, **LONG), tmp_path / "told", (heed_hangups, True))
    wait_until(lambda: logged(out_dir) >= 5)
    os.kill(processes[0].pid, number)
    assert codes(processes) == [0]
    check_stopped(out_dir, tmp_path / "told", number.name)


def test_under_nohup_a_closed_terminal_stops_no_run(data_dir, tmp_path):
    out_dir = tmp_path / "run"
    processes = launch(1, settings(data_dir, out_dir, **LONG), tmp_path / "told", (heed_hangups, False))
    wait_until(lambda: logged(out_dir) >= 5)
    os.kill(processes[0].pid, signal.SIGHUP)
    at = logged(out_dir)
    wait_until(lambda: logged(out_dir) > at + 5)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert codes(processes) == [0]
    check_stopped(out_dir, tmp_path / "told", "SIGTERM")


@pytest.mark.parametrize("who", ["one", "all"])
def test_a_signal_to_one_rank_or_all_stops_all_at_the_same_step(who, data_dir, tmp_path):
    out_dir = tmp_path / "run"
    processes = launch(2, settings(data_dir, out_dir, **LONG), tmp_path / "told")
    wait_until(lambda: logged(out_dir) >= 5)
    for process in processes[1:] if who == "one" else processes:
        os.kill(process.pid, signal.SIGTERM)
    assert codes(processes) == [0, 0]
    check_stopped(out_dir, tmp_path / "told", "SIGTERM")


def test_a_stopped_run_goes_on_to_the_bit(data_dir, tmp_path):
    changes = {"max_steps": 120, "dropout": 0.1, "save_interval": 1000}
    out_dir = tmp_path / "stopped"
    processes = launch(1, settings(data_dir, out_dir, **changes))
    wait_until(lambda: logged(out_dir) >= 5)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert codes(processes) == [0] and logged(out_dir) < 120
    run(data_dir, out_dir, **changes)
    assert records(out_dir) == records(run(data_dir, tmp_path / "whole", **changes))


def test_a_file_named_stop_does_the_same_and_goes_when_it_is_obeyed(data_dir, tmp_path):
    out_dir = tmp_path / "run"
    processes = launch(2, settings(data_dir, out_dir, **LONG), tmp_path / "told")
    wait_until(lambda: logged(out_dir) >= 5)
    (out_dir / "stop").touch()
    assert codes(processes) == [0, 0] and not (out_dir / "stop").exists() and (out_dir / "stopped").exists()
    check_stopped(out_dir, tmp_path / "told", out_dir / "stop")


def sleep_from_step_5(rank, out_dir):
    """Plants a data loader that sleeps."""
    take = Loader.next
    Loader.next = lambda self: time.sleep(1000) if logged(out_dir) >= 5 else take(self)


def test_a_second_sigint_stops_at_once_but_not_one_that_comes_with_the_first(data_dir, tmp_path):
    out_dir = tmp_path / "run"

    [process] = launch(1, settings(data_dir, out_dir, **LONG), tmp_path / "told", (sleep_from_step_5, out_dir))
    wait_until(lambda: logged(out_dir) >= 5)
    for pause in (0.2, 1.5, 0):
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
        time.sleep(pause)
    assert codes([process]) == [130]
    assert "interrupted twice: stopped at once, without saving" in (tmp_path / "told").read_text()
    assert not checkpoints(out_dir)


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_to_torchrun_stops_the_run_and_its_workers_end_well(number, data_dir, tmp_path):
    """torchrun itself then ends with 1; SIGUSR1 it must be told to hand on."""
    out_dir = tmp_path / "run"
    options = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT"]
    process = torchrun(2, ROOT / "train.py", settings(data_dir, out_dir, **LONG), tmp_path / "told", *options)
    wait_until(lambda: logged(out_dir) >= 5)
    process.send_signal(number)
    assert process.wait(600) == 1
    text = (tmp_path / "told").read_text()
    (tmp_path / "told").write_text(text.partition("Traceback")[0])  # torchrun's own
    check_stopped(out_dir, tmp_path / "told", number.name)
    assert "SIGKILL" not in text and "terminate called" not in text


def test_a_run_without_checkpoints_says_that_a_stop_saved_nothing(data_dir, tmp_path):
    cfg = settings(data_dir, tmp_path / "run", **LONG | {"save_interval": "none"})
    processes = launch(1, cfg, tmp_path / "told")
    wait_until(lambda: logged(tmp_path / "run") >= 5)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert codes(processes) == [0]
    told = (tmp_path / "told").read_text()
    assert "stopped by SIGTERM: step " in told and "unfinished; nothing is saved (save_interval is none)" in told


# ---- one run, one folder

def test_a_second_run_in_the_same_folder_is_refused(data_dir, tmp_path):
    out_dir = tmp_path / "run"
    processes = launch(1, settings(data_dir, out_dir, **LONG))
    wait_until(lambda: logged(out_dir) >= 5)
    told = f"in use by another run, process {processes[0].pid} on .* since .*touch"
    with pytest.raises(ValueError, match=told) as error:
        run(data_dir, out_dir, max_steps=5)
    assert isinstance(error.value, config.UserError)
    processes[0].kill()  # which frees it
    processes[0].join()
    run(data_dir, out_dir, max_steps=5, resume="auto")


# ---- disks

def check_save_failed(code, text, out_dir, why, newest):
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in text, text
    assert str(out_dir) in lines[0] and why in lines[0] and "then the same command continues" in lines[0]
    assert f"the newest whole one is {newest}" in lines[0] or "out_dir" in lines[0]  # or the log was first to find out
    assert newest_checkpoint(out_dir).name == newest and not list((out_dir / "ckpt").glob(".*"))


def limit_file_size(rank, of_rank):
    if rank == of_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize("n", [1, *slow(2)])
def test_a_file_that_may_not_grow_stops_the_run_with_one_line_and_the_last_checkpoint_intact(n, data_dir, tmp_path):
    out_dir = tmp_path / "run"
    changes = {"save_interval": 10, "max_steps": 4000, "lr_decay_steps": "none"}
    run_to_10 = launch(n, settings(data_dir, out_dir, **changes | {"max_steps": 10}))
    assert codes(run_to_10) == [0] * n

    processes = launch(n, settings(data_dir, out_dir, **changes), tmp_path / "told", (limit_file_size, n - 1))
    [code] = codes(processes[:1])
    for process in processes:  # as torchrun does
        process.kill()
    check_save_failed(code, (tmp_path / "told").read_text(), out_dir, "File too large", "step_00000010")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB: the source that a run keeps, and a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "none", disk], capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(data_dir, small_disk, tmp_path):
    out_dir, changes = small_disk / "run", {"save_interval": 10, "max_steps": 60, "keep_checkpoints": 100}
    processes = launch(1, settings(data_dir, out_dir, **changes), tmp_path / "told")
    [code] = codes(processes)
    newest = checkpoints(out_dir)[-1].name
    check_save_failed(code, (tmp_path / "told").read_text(), out_dir, "No space left on device", newest)
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    run(data_dir, out_dir, **changes)
    assert records(out_dir) == records(run(data_dir, tmp_path / "whole", **changes))


@pytest.mark.parametrize("n", [1, *slow(2)])
def test_a_folder_that_becomes_unwritable_ends_the_run_with_one_line(n, data_dir, tmp_path):
    out_dir = tmp_path / "run"
    processes = launch(n, settings(data_dir, out_dir, **LONG | {"save_interval": 50}), tmp_path / "told")
    wait_until(lambda: checkpoints(out_dir))
    newest = checkpoints(out_dir)[-1]
    os.rename(out_dir / "ckpt", out_dir / "moved")
    (out_dir / "ckpt").touch()  # even root can make no folder in a file
    assert codes(processes) == [2] * n
    [line] = [line for line in (tmp_path / "told").read_text().splitlines() if line.startswith("error: ")]
    assert "could not be written" in line and "Not a directory" in line and "then the same command continues" in line
    os.remove(out_dir / "ckpt")
    os.rename(out_dir / "moved", out_dir / "ckpt")
    assert newest in checkpoints(out_dir) and newest_checkpoint(out_dir) == checkpoints(out_dir)[-1]


def test_a_read_only_disk_is_refused_with_one_line(data_dir, small_disk, tmp_path):
    out_dir = run(data_dir, small_disk / "run", max_steps=5)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ValueError, match="out_dir .* cannot be written to .*Read-only.*use another --out_dir") as error:
        run(data_dir, out_dir, max_steps=9)
    assert isinstance(error.value, config.UserError)


@pytest.mark.slow
def test_a_mistake_that_rank_0_finds_is_one_line_under_torchrun(data_dir, tmp_path):
    """A second run in a folder, which is not told by reports into the first one's folder either."""
    out_dir = tmp_path / "run"
    first = launch(1, settings(data_dir, out_dir, **LONG))
    wait_until(lambda: logged(out_dir) >= 5)
    assert torchrun(2, ROOT / "train.py", settings(data_dir, out_dir, **LONG), tmp_path / "told").wait(600) == 1
    first[0].kill()
    text = (tmp_path / "told").read_text()
    assert text.count("in use by another run") == text.count("error: ") == 1, text
    assert not list(out_dir.glob("crash_*"))


# ---- hangs

def check_hang(processes, told, who, where):
    assert set(codes(processes)) & {1}
    lines = [line for line in told.read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "no progress for 0.05 minutes (timeout_minutes)" in lines[0], told.read_text()
    assert f"{who} hangs, at {where}, in " in lines[0]
    return lines[0]


def hang(rank, out_dir):
    if rank == 1:
        sleep_from_step_5(rank, out_dir)


def test_a_rank_that_hangs_is_named_with_where_it_was(data_dir, tmp_path):
    cfg = settings(data_dir, tmp_path / "run", **LONG, timeout_minutes=0.05)
    processes = launch(2, cfg, tmp_path / "told", (hang, tmp_path / "run"))
    wait_until(lambda: not all(process.is_alive() for process in processes))
    for process in processes:
        process.kill()
    ended = [process for process in processes if not process.is_alive()]
    line = check_hang(ended, tmp_path / "told", "rank 1", "step 5, data")
    assert "others wait for it at step 5, forward, counting targets, in " in line
    [report] = (tmp_path / "run").glob("crash_*_rank_1.txt")
    assert "time.sleep(1000)" in report.read_text() and "learning_rate = 0.01" in report.read_text()


@pytest.mark.slow
def test_a_frozen_rank_is_named_by_the_others(data_dir, tmp_path):
    processes = launch(2, settings(data_dir, tmp_path / "run", **LONG, timeout_minutes=0.05), tmp_path / "told")
    wait_until(lambda: logged(tmp_path / "run") >= 200)  # some ticks of the watchdog, at which it notes places down
    os.kill(processes[1].pid, signal.SIGSTOP)
    assert codes(processes[:1]) == [1]
    processes[1].kill()
    [line] = [line for line in (tmp_path / "told").read_text().splitlines() if line.startswith("error: ")]
    assert "no progress for 0.05 minutes" in line and "rank 1 hangs, last seen at step" in line


def dawdle(rank):
    take = Loader.next
    Loader.next = lambda self: [time.sleep(2.4), take(self)][1]


@pytest.mark.slow
def test_slow_steps_that_take_less_than_the_timeout_are_no_hang(data_dir, tmp_path):
    """Each takes more than a third of it, all of them more than the whole."""
    cfg = settings(data_dir, tmp_path / "run", max_steps=4, timeout_minutes=0.1)
    assert codes(launch(1, cfg, tmp_path / "told", (dawdle,))) == [0] and (tmp_path / "run" / "finished").exists()


def test_a_watchdog_ends_with_its_run_however_that_ended(data_dir, tmp_path):
    with pytest.raises(ValueError, match="resume is never"):
        run(data_dir, run(data_dir, tmp_path / "run", max_steps=1), resume="never")
    assert not [thread for thread in threading.enumerate() if thread.name in ("watchdog", "signals", "saver") and
                (thread.join(60) or thread.is_alive())]


# ---- crashes

@pytest.mark.slow
def test_a_crash_is_reported_by_each_rank_and_the_first_one_is_shown(data_dir, tmp_path):
    script = tmp_path / "crashing.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from data import Loader

take = Loader.next
def crashes(self):
    crashes.calls += 1
    if self._rank == 1 and crashes.calls == 4:
        raise RuntimeError("the cat sat on the keyboard")
    return take(self)
crashes.calls, Loader.next = 0, crashes
train.run_script(train.main, train.Settings, "")
train.end_process()
""")
    process = torchrun(2, script, settings(data_dir, tmp_path / "run", **LONG), tmp_path / "told")
    assert process.wait(600) == 1
    text, reports = (tmp_path / "told").read_text(), list((tmp_path / "run").glob("crash_*.txt"))
    reports.sort(key=lambda report: report.name[-10:])  # the time comes first in a name
    assert [report.name[-10:] for report in reports] == ["rank_0.txt", "rank_1.txt"]
    first = reports[1].read_text()
    assert "rank 1 of 2 on " in first and "step 3, data" in first and "torch 2." in first
    assert "RuntimeError: the cat sat on the keyboard" in first and "learning_rate = 0.01" in first
    assert f"error on rank 1, step 3, data; the report, with settings and versions, is {reports[1]}" in text
    assert text.count("RuntimeError: ") == 2 and "Connection closed" not in text  # ours, and torchrun's summary
    assert "terminate called" not in text


def test_reports_of_one_second_have_names_of_their_own(tmp_path):
    world = World(0, 1, torch.device("cpu"), "fp32")
    with crash_reports(tmp_path, world, "settings") as write:
        for i in range(30):
            assert "the report, with settings and versions, is " in write(f"crash {i} at \udcff")
    texts = [path.read_text() for path in tmp_path.glob("crash_*_rank_0.txt")]
    assert sorted(int(text.split("crash ")[1].split()[0]) for text in texts) == list(range(30))


def limit_memory(rank):
    """To 1.5 GiB beyond what is mapped already; freed memory is given back."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    ctypes.CDLL(None).mallopt(-3, 65536)  # what the variable does where it is there when a process starts
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * 2**29, mapped + 3 * 2**29))


@pytest.mark.alone
@pytest.mark.slow
def test_memory_that_runs_out_ends_the_run_with_what_would_fit(tmp_path):
    data = write_data(tmp_path / "data", train_tokens=80_000)
    changes = {"n_embd": 320, "n_layer": 12, "block_size": 256, "seq_len": 256, "micro_batch_size": 32,
               "batch_tokens": 32 * 256, "eval_tokens": 256, "max_steps": 1}  # fmt: skip

    processes = launch(1, settings(data, tmp_path / "run", **changes), tmp_path / "told", (limit_memory,))
    assert codes(processes) == [2]
    [line] = [line for line in (tmp_path / "told").read_text().splitlines() if line.startswith("error: ")]
    told = re.search(r"out of memory on rank 0: it takes about .* GiB of .*; what would fit: (.*); MALLOC_MMAP", line)[1]
    ways = [way.split(" (about")[0] for way in told.split(", ")]
    assert not list((tmp_path / "run").glob("crash_*"))
    assert [way.split("=")[0] for way in ways] == ["--micro_batch_size", "--activation_checkpointing"], line
    for i, way in enumerate(ways):  # and so they do
        name, value = way[2:].split("=")
        cfg = settings(data, tmp_path / f"run_{i}", **changes | {name: value})
        assert codes(launch(1, cfg, tmp_path / "told", (limit_memory,))) == [0], (tmp_path / "told").read_text()
