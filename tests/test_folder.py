"""A run's folder: others' files stay as they are, and the log is read whatever is in it."""

import json
import os
import shutil

import pytest

from config import UserError
from ranks import copy_run, records, run, write_data


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("folder") / "data")


@pytest.fixture(scope="module")
def three(data_dir, tmp_path_factory):
    """A run of three steps; to be copied."""
    return run(data_dir, tmp_path_factory.mktemp("three"), max_steps=3)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHERS = {
    "config.py": '"""My own."""\nout_dir = "out"\ndata_dir = "data"\nbatch_tokens = 1\nseed = 1\n',
    "meta.json": '{"mine": 1}', "finished": "mine\n", "stopped": "mine\n", "log.jsonl": '{"step": 1}\n',
    "curves.png": "mine", "tokenizer.json": "{}", "wandb_id": "mine", "tensorboard": "mine", ".lock": "mine",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_with_others_files_is_refused_and_left_as_it_is(name, data_dir, tmp_path):
    (tmp_path / name).write_text(OTHERS[name])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, which no run wrote; use another --out_dir"):
        run(data_dir, tmp_path)
    assert contents(tmp_path) == {tmp_path / name: OTHERS[name].encode(), tmp_path / "notes.txt": b"mine"}


def test_the_datas_own_folder_is_refused(tmp_path):
    data_dir = write_data(tmp_path / "data")
    before = contents(data_dir)
    with pytest.raises(UserError, match="holds meta.json, which no run wrote"):
        run(data_dir, data_dir)
    assert contents(data_dir) == before


def without_comments(text):
    """A preset as a run imported from nanoGPT has it."""
    return "".join(line.split("  # ")[0] + "\n" for line in text.splitlines())


@pytest.mark.parametrize("change", [None, lambda text: "# mine\n" + text, lambda text: "", without_comments])
def test_a_runs_own_folder_goes_on_whatever_became_of_its_preset(change, data_dir, three, tmp_path):
    out_dir = copy_run(three, tmp_path / "run")
    (out_dir / "notes.txt").write_text("mine")
    text = (out_dir / "config.py").read_text()
    (out_dir / "config.py").write_text(change(text)) if change else os.remove(out_dir / "config.py")
    run(data_dir, out_dir, max_steps=4)
    assert list(records(out_dir)) == [1, 2, 3, 4] and (out_dir / "notes.txt").read_text() == "mine"


def test_a_finished_run_whose_mark_could_not_be_written_is_marked_by_the_same_command(
    data_dir, three, tmp_path, capsys
):
    out_dir = copy_run(three, tmp_path / "run")
    os.remove(out_dir / "finished")
    run(data_dir, out_dir, max_steps=3)
    assert "has finished, at step 3" in capsys.readouterr().out and (out_dir / "finished").read_text() == "finished\n"


# ---- log.jsonl

DAMAGED = [
    b'{"step": 2, "loss": "\xff"}\n', b"\x00\x00\n", b"[1]\n", b'{"step": null, "lr": 1}\n', b'{"step": "2"}\n',
    b'{"step": NaN}\n', b'{"loss": 1.0}\n', b"[" * 100_000 + b"\n",
]  # fmt: skip


def test_a_log_with_lines_that_cannot_be_read_goes_on_and_is_kept(data_dir, three, tmp_path, capsys):
    out_dir = copy_run(three, tmp_path / "run")
    first, *others = (out_dir / "log.jsonl").read_bytes().splitlines(keepends=True)
    before = b"".join([first, *DAMAGED, *others])
    (out_dir / "log.jsonl").write_bytes(before)
    run(data_dir, out_dir, max_steps=5)
    assert list(records(out_dir)) == [1, 2, 3, 4, 5] and (out_dir / "log_1.jsonl").read_bytes() == before
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and f"log.jsonl has {len(DAMAGED)} lines that cannot be read" in told
    run(data_dir, out_dir, max_steps=6)
    assert "warning" not in capsys.readouterr().err and not (out_dir / "log_2.jsonl").exists()


def test_a_line_that_a_kill_cut_short_is_no_damage(data_dir, three, tmp_path, capsys):
    out_dir = copy_run(three, tmp_path / "run")
    with open(out_dir / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    run(data_dir, out_dir, max_steps=4)
    assert list(records(out_dir)) == [1, 2, 3, 4]
    assert not (out_dir / "log_1.jsonl").exists() and "warning" not in capsys.readouterr().err


def test_a_log_that_is_a_pipe_keeps_no_run_from_going_on(data_dir, three, tmp_path, capsys):
    out_dir = copy_run(three, tmp_path / "run")
    (out_dir / "log.jsonl").unlink()
    os.mkfifo(out_dir / "log.jsonl")
    run(data_dir, out_dir, max_steps=4)
    told = capsys.readouterr().err
    assert "log.jsonl failed (OSError: " in told and "is no regular file" in told
    assert (out_dir / "finished").exists()


def test_a_folder_named_stop_stops_a_run_which_can_go_on(data_dir, tmp_path):
    (tmp_path / "stop").mkdir()
    run(data_dir, tmp_path, max_steps=3)
    assert not (tmp_path / "finished").exists() and (tmp_path / "stopped").is_dir()
    run(data_dir, tmp_path, max_steps=3)
    assert (tmp_path / "finished").exists()


def test_a_folder_whose_name_is_no_utf8_is_refused_before_training(data_dir, tmp_path):
    with pytest.raises(UserError, match="is not UTF-8, as safetensors wants"):
        run(data_dir, tmp_path / os.fsdecode(b"a\xff"), max_steps=3)
    assert not any(tmp_path.iterdir())


def test_data_whose_name_is_no_utf8_is_trained_on_and_continued(data_dir, tmp_path):
    odd = shutil.copytree(data_dir, tmp_path / os.fsdecode(b"d\xff"))
    for max_steps in (1, 2):
        run(odd, tmp_path / "run", max_steps=max_steps)
    assert list(records(tmp_path / "run")) == [1, 2]


def test_the_log_is_on_the_disk_before_the_checkpoint_of_its_steps_is(data_dir, tmp_path, monkeypatch):
    synced, sync, replace = [], os.fsync, os.replace

    def noting_sync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        synced.append((path, open(path).read() if path.endswith("log.jsonl") else None))
        sync(handle)

    def noting_replace(source, target):
        synced.append((str(target), None))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(os, "replace", noting_replace)
    run(data_dir, tmp_path, max_steps=4, save_interval=2)
    for step in (2, 4):
        [at] = [i for i, (path, _) in enumerate(synced) if path.endswith(f"step_{step:08d}")]
        logs = [text for path, text in synced[:at] if text is not None]
        assert step in [json.loads(line).get("step") for line in logs[-1].splitlines() if "loss" in line]
