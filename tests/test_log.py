"""Logs, pictures and services may fail: a line says so once, and the run goes on."""

import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from console import open_console
from ranks import codes, launch, logged, records, run, settings, wait_until, write_data


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
    processes = launch(1, settings(data_dir, out_dir, max_steps=300, wandb=True), told, (kill_service, out_dir))
    check_finished(processes, out_dir, told, "warning: wandb failed (")
    assert list(records(out_dir)) == list(range(1, 301))
