"""Logs, pictures and services may fail: a line says so once, and the run goes on."""

import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from console import open_console
from ranks import codes, launch, logged, records, run, settings, wait_until, write_data
from run.dashboards import TensorBoard, flat


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("log") / "data")


def check_finished(processes, out_dir, told, warning):
    """The run ended well, and told of the fault once."""
    assert codes(processes) == [0] and (out_dir / "finished").exists(), told.read_text()
    warnings = [line for line in told.read_text().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith(warning), warnings
    assert "the run goes on without" in warnings[0] and "Traceback" not in told.read_text()
    assert not list(out_dir.glob("crash_*"))


def from_step_5(out_dir, function, *args):
    """Starts a thread that plants a fault."""
    def plant():
        wait_until(lambda: logged(out_dir) >= 5)
        function(*args)

    threading.Thread(target=plant, daemon=True).start()


# ---- the console

def leave_output_unread(rank, out_dir):
    def close():
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)

    from_step_5(out_dir, close)


def test_a_run_whose_output_is_no_longer_read_goes_on_and_saves(data_dir, tmp_path):
    out_dir = tmp_path / "run"
    cfg = settings(data_dir, out_dir, max_steps=100)
    processes = launch(1, cfg, tmp_path / "told", (leave_output_unread, out_dir))
    check_finished(processes, out_dir, tmp_path / "told", "warning: standard output cannot be written ([Errno 32]")
    assert list(records(out_dir)) == list(range(1, 101)) and (out_dir / "ckpt" / "step_00000100").exists()


# ---- log.jsonl

def limit_log(rank, out_dir, told):
    """No file may grow beyond the log's size until that was told of."""
    def limit():
        size = (out_dir / "log.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))  # within a line
        wait_until(lambda: "warning: " in told.read_text())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    from_step_5(out_dir, limit)


def test_lines_that_a_full_disk_refuses_are_written_once_it_has_room(data_dir, tmp_path):
    out_dir, told = tmp_path / "run", tmp_path / "told"
    told.touch()
    cfg = settings(data_dir, out_dir, max_steps=300, save_interval="none")
    processes = launch(1, cfg, told, (limit_log, out_dir, told))
    check_finished(processes, out_dir, told, "warning: log.jsonl failed (OSError: [Errno 27] File too large)")
    assert list(records(out_dir)) == list(range(1, 301))


# ---- curves.png

@pytest.mark.parametrize("name", ["a$_$b", "a\tb", "$"])
def test_curves_of_a_run_of_any_name_are_drawn(name, data_dir, tmp_path, capsys):
    open_console(is_needed=True)  # as a script does
    out_dir = run(data_dir, tmp_path / name, with_curves=True, max_steps=1)
    assert (out_dir / "curves.png").read_bytes().startswith(b"\x89PNG") and "warning: " not in capsys.readouterr().err


def test_curves_that_cannot_be_drawn_end_no_run(data_dir, tmp_path, capsys):
    (tmp_path / ".curves.png").mkdir()
    run(data_dir, tmp_path, with_curves=True, max_steps=3, eval_interval=1)
    assert capsys.readouterr().err.count("warning: curves.png failed (IsADirectoryError") == 1
    assert (tmp_path / "finished").exists() and not (tmp_path / "curves.png").exists()


def test_odd_values_in_the_log_keep_no_curves_from_being_drawn(data_dir, tmp_path, capsys):
    out_dir = run(data_dir, tmp_path, with_curves=True, max_steps=1)
    (out_dir / "curves.png").unlink()
    with open(out_dir / "log.jsonl", "a") as file:
        file.write('{"step": 1, "lr": "high", "val_loss": [1]}\n')
    run(data_dir, tmp_path, with_curves=True, max_steps=2)
    assert (out_dir / "curves.png").exists() and "warning: " not in capsys.readouterr().err


# ---- wandb

def kill_service(rank, out_dir):
    os.environ["WANDB_MODE"] = "offline"

    def kill():
        for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
            for pid in child.read_text().split():
                os.kill(int(pid), signal.SIGKILL)

    from_step_5(out_dir, kill)


@pytest.mark.slow
def test_a_run_whose_wandb_service_dies_goes_on(data_dir, tmp_path):
    out_dir, told = tmp_path / "run", tmp_path / "told"
    processes = launch(1, settings(data_dir, out_dir, max_steps=300, log_to="wandb"), told, (kill_service, out_dir))
    check_finished(processes, out_dir, told, "warning: wandb failed (")
    assert list(records(out_dir)) == list(range(1, 301))


# ---- TensorBoard

def points(out_dir):
    """{name: [(step, value), ...]} of all that TensorBoard shows of a run; texts as texts."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    shown, found = EventAccumulator(str(out_dir / "tensorboard"), tensor_size_guidance={"scalars": 0, "text": 0}), {}
    for name in shown.Reload().Tags()["tensors"]:
        values = [(event.step, make_ndarray(event.tensor_proto).item()) for event in shown.Tensors(name)]
        values = [(step, value.decode() if isinstance(value, bytes) else value) for step, value in values]
        found[name.removesuffix("/text_summary")] = values
    return found


def logged_points(out_dir):
    """The same of log.jsonl; numbers are as exact as TensorBoard keeps them."""
    found = {}
    for line in (out_dir / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in flat({} if "start" in record else record):
            value = "    " + value if isinstance(value, str) else float(np.float32(value))
            found.setdefault(name, []).append((record["step"], value))
    del found["step"]
    return found


def test_tensorboard_shows_a_killed_and_resumed_run_as_the_log_has_it(data_dir, tmp_path):
    killed, whole, changes = tmp_path / "killed", tmp_path / "whole", {"max_steps": 30, "eval_interval": 10}
    cfg = settings(data_dir, killed, log_to="tensorboard", save_interval=4, **changes)
    [process] = launch(1, cfg, tmp_path / "told")
    wait_until(lambda: logged(killed) >= 7 and (killed / "ckpt" / "step_00000004").exists())
    os.kill(process.pid, signal.SIGKILL)
    assert codes([process]) == [-signal.SIGKILL]
    [first] = (killed / "tensorboard").iterdir()  # TensorBoard reads files by the second in their names
    wait_until(lambda: time.time() > int(first.name.split(".")[3]) + 1)
    for _ in range(2):  # the second time, the run has finished already
        run(data_dir, killed, log_to="tensorboard", save_interval=4, **changes)
    run(data_dir, whole, log_to="tensorboard", **changes)
    shown, wanted = points(killed), points(whole)
    assert shown == logged_points(killed) and {"val_bpb", "memory_gib", "lr"} <= shown.keys()
    for name in ("loss", "grad_norm", "val_loss", "tokens"):
        assert shown[name] == wanted[name] and len(wanted[name]) == (4 if name == "val_loss" else 30), name


def test_tensorboard_drops_the_points_of_steps_that_were_rolled_back(tmp_path):
    board = TensorBoard(None, {}, tmp_path, 0)
    for step in (1, 2, 3, 4):
        board.log({"step": step, "loss": 10 + step, "val_losses": {"data/a": 1.5 * step}, "skipped": f"at {step}"})
    board.go_back(2)
    board.log({"step": 3, "loss": 7, "score": None, "stage_wait_ms": [0.5, 2]})
    board.finish()
    assert points(tmp_path) == {
        "loss": [(1, 11), (2, 12), (3, 7)], "val_losses/data/a": [(1, 1.5), (2, 3)],
        "stage_wait_ms/0": [(3, 0.5)], "stage_wait_ms/1": [(3, 2)], "skipped": [(1, "    at 1"), (2, "    at 2")],
    }  # fmt: skip


def test_a_dashboard_that_fails_ends_no_run(data_dir, tmp_path, capsys):
    run(data_dir, tmp_path, max_steps=1)
    (tmp_path / "tensorboard").write_text("a file, where a folder should be made")
    run(data_dir, tmp_path, max_steps=3, log_to="tensorboard")
    told = capsys.readouterr()
    assert told.err.count("warning: tensorboard failed (FileExistsError") == 1 and "finished: step 3" in told.out
    assert list(records(tmp_path)) == [1, 2, 3]


def test_a_dashboard_that_fails_later_ends_no_run(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of tensorboard's thread
    from_step_5(tmp_path, shutil.rmtree, tmp_path / "tensorboard")
    run(data_dir, tmp_path, max_steps=100, log_to="tensorboard")
    told = capsys.readouterr()
    assert told.err.count("warning: tensorboard failed (FileNotFoundError") == 1 and "finished: step 100" in told.out
    assert list(records(tmp_path)) == list(range(1, 101))
