"""Systems that lack what Linux has: the same run without it. And what CI is asked to run on which machine."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import devices
from conftest import ROOT
from ranks import write_data
from test_repository import text_of, vendored

# A process of its own, which imports torch once and forks for each system: the project is imported by the fork, after
# what the system lacks is gone.
TRAINED_ON = """
import ctypes, io, os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import numpy, torch, torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp, safetensors.torch

def hide(system):
    if system == "linux":
        return
    if system == "windows":
        sys.modules["fcntl"] = sys.modules["resource"] = None
        for name in ("SIGHUP", "SIGQUIT", "SIGUSR1"):
            delattr(signal, name)
        for name in ("preadv", "register_at_fork", "O_NONBLOCK", "sysconf", "fork"):
            delattr(os, name)
        open_file = os.open
        def open_no_folder(path, flags, *args, **options):
            if os.path.isdir(path):
                raise PermissionError(13, "Permission denied", str(path))
            return open_file(path, flags, *args, **options)
        os.open = open_no_folder
    del os.posix_fadvise
    def library(name, *args, **options):
        if system == "windows":
            raise TypeError("argument of type 'NoneType' is not iterable")
        return object()  # without mallopt
    ctypes.CDLL = library
    def no_proc(file, *args, **options):
        if str(file).startswith("/proc"):
            raise PermissionError(13, "Permission denied", str(file))
        return io_open(file, *args, **options)
    io_open, io.open = io.open, no_proc  # pathlib's

def train_on(system):
    hide(system)
    from ranks import run
    if system == "windows":
        run({data!r}, {out!r} + "/" + system, max_steps=4)
    run({data!r}, {out!r} + "/" + system, max_steps=6)

for system in {systems}:
    if (child := os.fork()) == 0:
        train_on(system)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, system
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(what was printed, the folder of runs): the same training on each system, on Windows in two parts."""
    folder = tmp_path_factory.mktemp("machines")
    data, systems = write_data(folder / "data"), ["linux", "mac", "windows"]
    script = TRAINED_ON.format(root=str(ROOT), data=str(data), out=str(folder / "out"), systems=systems)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder / "out"


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("system", ["mac", "windows"])
def test_a_run_is_the_same_to_the_bit_where_a_system_lacks_what_linux_has(system, trained):
    """Without /proc, mallopt and posix_fadvise; on Windows also without fcntl, resource, three signals, preadv, sysconf."""
    _, out = trained
    losses = {
        name: [(line["step"], line["loss"]) for line in lines_of(out / name) if "loss" in line]
        for name in ("linux", system)
    }
    assert losses[system] == losses["linux"] and len(losses[system]) == 6
    assert (out / system / "finished").exists() and not list((out / system).glob("crash_*"))


def test_what_a_system_does_not_tell_is_said_or_left_out(trained):
    told, out = trained
    assert told.count("is on a disk without locks (this system has no flock); make sure that no other run uses it") == 2
    memory = {name: {line["memory_gib"] for line in lines_of(out / name) if "loss" in line} for name in os.listdir(out)}
    assert memory["windows"] == {None} and None not in memory["mac"] | memory["linux"]


# ---- devices


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    for there, wanted in (("cuda mps", "cuda"), ("mps", "mps"), ("", "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
        device = devices.pick_device("auto")
        assert device.type == wanted
        if wanted == "mps":
            assert devices.pick_precision("auto", device) == "fp32" and devices.device_name(device) == "mps"


@pytest.mark.parametrize("there, wanted", [(True, "bf16"), (False, "fp16")])
def test_auto_precision_of_a_gpu_is_bf16_only_where_it_computes_in_it(there, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: there or including_emulation)
    assert devices.pick_precision("auto", torch.device("cuda", 0)) == wanted


def test_a_cpu_without_bf16_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert devices.pick_precision("auto", torch.device("cpu")) == "fp32"


# ---- the list of CI, containers


def test_the_list_of_ci_obeys_githubs_schema_and_its_machines_have_a_row():
    text, page = text_of(".github/workflows/tests.yml"), text_of("docs/machines.md")
    for system, row in {
        "ubuntu-24.04,": "Linux x86-64",
        "-arm": "Linux arm64",
        "macos-": "macOS",
        "windows-": "Windows",
    }.items():
        assert system in text and f"\n| {row}" in page
    assert not [
        script
        for script in re.findall(r"python (\w+\.py)|(tests/\w+\.py)", text)
        for s in script
        if s and not (ROOT / s).exists()
    ]
    vendored("github-workflows", ".github/workflows/tests.yml")


def test_containers_copy_files_that_exist():
    sources = re.findall(r"^COPY (\S+) ", text_of("Dockerfile"), re.MULTILINE)
    assert sources and all((ROOT / source).exists() for source in sources)
    container = json.loads(text_of(".devcontainer/devcontainer.json"))
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
