"""A run's folder: its lock, source, tokenizer and log.jsonl; checkpoint.py writes the checkpoints."""

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import foreign
from config import ROOT, Config, Range, UserError, project_files
from console import report
from data import sha256
from shards import refusing_system_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Seed = Annotated[int, Range("at least 0 and below 2**63", lambda n: 0 <= n < 2**63)]


@dataclass(frozen=True)
class RunConfig(Config):
    out_dir: str | None = None  # folder of the run; none: out/ and the last preset's name
    seed: Seed = 1337  # seed of initial weights, order of the data, and dropout
    resume: Literal["auto", "never"] = "auto"  # auto: continue from the newest checkpoint in out_dir; never: refuse to
    init_from: str | None = None  # weights to start from: a run's folder, or a Hugging Face model's folder or name

    def __post_init__(self):
        super().__post_init__()
        if re.search(r"[\ud800-\udfff]", self.out_dir or ""):
            rule = "is not UTF-8, as safetensors wants the paths of checkpoints"
            raise UserError(f"out_dir {self.out_dir} {rule}; use another --out_dir, or rename the folder")


def run_dir_of(cfg):
    """The run's folder: out_dir, or out/ and the last preset's name; None where neither is given."""
    return cfg.run.out_dir or (f"out/{Path(cfg.presets[-1]).stem}" if cfg.presets else None)


def writing_to(out_dir):
    """A context for writing into a run's folder, whose system errors become a UserError that names it."""
    remedy = "use another --out_dir, or make room: then the same command continues"
    return refusing_system_errors(f"out_dir {out_dir} cannot be written to", remedy)


# Names under which a run writes or removes files, but for .lock and what holds a step or a time in its name.
FILES = (
    *("config.py", "meta.json", "tokenizer.json", "chat.json", "finished", "stopped", "log.jsonl", "curves.png"),
    *("report.html", "wandb_id", "tensorboard"),
)


def check_is_ours(out_dir):
    """UserError where a folder has files of a run's names that no run wrote."""
    folder, log = Path(out_dir), Path(out_dir) / "log.jsonl"
    preset, lock = (_text_of(folder / name) for name in ("config.py", ".lock"))
    # An assignment a line, of these names among others
    names = re.findall(r"^(\w+) = ", preset, re.MULTILINE)
    is_preset = len(names) == len(preset.splitlines()) and {"out_dir", "data_dir", "batch_tokens", "seed"} <= {*names}
    is_run = is_preset or any(folder.glob("ckpt/step_*/manifest.json"))
    is_run = is_run or log.is_file() and any(record and "start" in record for _, record in read_log(log))
    others = [name for name in FILES if os.path.lexists(folder / name) and not is_run]
    if lock and not lock.startswith("process "):
        others.append(".lock")
    if others:
        rule = f"holds {', '.join(others)}, which no run wrote"
        raise UserError(f"out_dir {out_dir} {rule}; use another --out_dir, or move such files away")


def _text_of(path):
    """The text of a file; an empty one where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@contextlib.contextmanager
def locked(out_dir, world, patience=30):
    """Locks a run's folder; the lock ends with rank 0's process, too.

    UserError, on all ranks, where another run has it, or where a rank does not see the lock in `patience` seconds.
    """
    path, holder, lock = Path(out_dir) / ".lock", None, None
    with contextlib.ExitStack() as stack:
        if world.is_main:
            with writing_to(out_dir):
                check_is_ours(out_dir)
                path.parent.mkdir(parents=True, exist_ok=True)
                holder = lock_file(stack.enter_context(open(path, "a+", encoding="utf-8")))
                lock = path.read_bytes()
        holder, lock = world.gather((holder, lock))[0]
        if holder:
            remedy = f"stop that one (touch {out_dir}/stop), or use another --out_dir"
            raise UserError(f"out_dir {out_dir} is in use by another run, {holder}; {remedy}")
        deadline = time.monotonic() + patience  # a network file system may show it late
        while not (seen := path.exists() and path.read_bytes() == lock) and time.monotonic() < deadline:
            time.sleep(0.1)
        if world.worst(not seen):
            rule = f"is not one folder for all {world.size} ranks: some do not see rank 0's files there"
            raise UserError(f"out_dir {out_dir} {rule}; put it on a disk that all machines share")
        yield


def lock_file(file):
    """Locks an open file and writes this process into it; returns its text if another process holds the lock."""
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "which has just started"
    except OSError as error:
        print(f"{file.name} is on a disk without locks ({error}); make sure that no other run uses it", flush=True)
    file.truncate(0)
    text = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n"
    os.write(file.fileno(), text.encode())  # unbuffered: closing the file would fail again where the disk is full


def keep_source(out_dir, step, root=ROOT):
    """Copies the project's .py files into out_dir/source/ unless its newest copy is the same; returns changed names."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in project_files(root)}
    kept = sorted((Path(out_dir) / "source").glob("step_*"))
    old = {name: (kept[-1] / name).read_bytes() for name in files if kept and (kept[-1] / name).exists()}
    if old != files:
        for name, code in files.items():
            copy = Path(out_dir) / "source" / f"step_{step:08d}" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(code)
    return [name for name in files if kept and files[name] != old.get(name)]


def git_commit():
    """The commit of the code that runs, with + where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def keep_tokenizer(data_dir, out_dir):
    """Copies meta.json and the tokenizer's file from the data to the run, so that sampling needs the run alone."""
    for name in ("meta.json", "tokenizer.json"):
        if (Path(data_dir) / name).exists():
            shutil.copyfile(Path(data_dir) / name, Path(out_dir) / name)


def tokenizer_of(run_dir):
    """The name or path of a run's tokenizer, for load_tokenizer."""
    path, remedy = Path(run_dir) / "meta.json", 'write one, as in {"tokenizer": "gpt2"}'
    if not path.exists():  # its data came from another project
        raise UserError(f"{run_dir} has no meta.json, so its tokenizer is unknown; {remedy}")
    try:
        meta = foreign.read_json(path, {"tokenizer!": str, "tokenizer_sha256": (str, None)}, has_paths=True)
    except UserError as error:
        raise UserError(f"{path} names no tokenizer ({error}); {remedy}") from error
    name, digest = meta["tokenizer"], meta.get("tokenizer_sha256")
    if not name.endswith(".json"):
        return name
    file = path.with_name(foreign.check_name(name, path))
    if digest and not (file.exists() and sha256(file) == digest):
        raise UserError(f"{file} is missing or not the tokenizer of the run's data; copy it from the data again")
    return str(file)


def read_log(path):
    """(line, record) for each line of log.jsonl, as bytes and a dict with a step; None where a line holds no such."""
    if not path.is_file():  # a pipe would be waited for
        raise OSError(f"{path} is no regular file")
    for line in path.read_bytes().splitlines(keepends=True):
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        yield line, record if isinstance(record, dict) and type(record.get("step")) is int else None


def open_log(out_dir, step):
    """Opens log.jsonl to append bytes from a step on; drops later lines, and a line that was cut short.

    A run that starts at step 0 renames an older log to log_1.jsonl, log_2.jsonl and so on. A log with lines that cannot
    be read is kept whole under such a name.
    """
    path = Path(out_dir) / "log.jsonl"
    aside = next(p for i in itertools.count(1) if not (p := path.with_name(f"log_{i}.jsonl")).exists())
    if path.exists() and step == 0:
        os.replace(path, aside)
    elif path.exists():
        lines = [(line, record) for line, record in read_log(path) if line.endswith(b"\n")]
        if damaged := sum(record is None for _, record in lines):
            shutil.copyfile(path, aside)
            report(f"warning: {path} has {damaged} lines that cannot be read; they are left out, and kept in {aside}")
        partial = path.with_name(f".{path.name}")
        with open(partial, "wb") as file:
            file.writelines(line for line, record in lines if record and record["step"] <= step)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    return open(path, "ab", buffering=0)


def mark_finished(cfg, state):
    """Writes the file `finished`; returns its text."""
    reached = f", target_loss {cfg.train.target_loss} reached" if state.has_reached_target(cfg) else ""
    with writing_to(cfg.run.out_dir):
        (Path(cfg.run.out_dir) / "finished").write_text(f"finished{reached}\n")
    return f"finished{reached}"
