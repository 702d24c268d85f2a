"""Systems that lack what Linux has: the same run without it. And what CI is asked to run on which machine."""

import json
import re

import pytest
import torch

import devices
from conftest import ROOT
from ranks import run, run_script, write_data
from test_repository import text_of, vendored

# Run in a process that has torch: the project is imported anew, after what the system lacks is gone.
TRAINS = """
import ctypes, io, os, signal, sys

system, root, data, out = sys.argv[1:]
folders = [root, *(f"{root}/{name}" for name in ("config", "text", "perf", "run", "interop", "tests"))]
for name, module in list(sys.modules.items()):
    if name != "__main__" and os.path.dirname(getattr(module, "__file__", None) or "") in folders:
        del sys.modules[name]
sys.path[:0] = [root, f"{root}/tests"]

def refusing(function, forbidden):
    def wrapper(path, *args, **options):
        if forbidden(path):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *args, **options)
    return wrapper

def library(name, *args, **options):
    if system == "windows":
        raise TypeError("argument of type 'NoneType' is not iterable")
    return object()  # without mallopt

ctypes.CDLL = library
io.open = refusing(io.open, lambda path: str(path).startswith("/proc"))  # pathlib's
del os.posix_fadvise
if system == "windows":
    sys.platform = "win32"
    sys.modules["fcntl"] = sys.modules["resource"] = None
    for module, names in {signal: "SIGHUP SIGQUIT SIGUSR1", os: "preadv register_at_fork O_NONBLOCK sysconf fork"}.items():
        for name in names.split():
            delattr(module, name)
    os.open = refusing(os.open, os.path.isdir)
from ranks import run
run(data, out, max_steps=4)
run(data, out, max_steps=6)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(what was printed on all systems, the folder of runs): the same training here, and in two parts on others."""
    folder = tmp_path_factory.mktemp("machines")
    data, script = write_data(folder / "data"), folder / "trains.py"
    script.write_text(TRAINS)
    run(data, folder / "linux", max_steps=6)
    told = ""
    for system in ("mac", "windows"):
        done = run_script(script, [system, str(ROOT), str(data), str(folder / system)], folder)
        assert done.returncode == 0, done.stdout + done.stderr
        told += done.stdout
    return told, folder


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
    memory = {
        name: {line["memory_gib"] for line in lines_of(out / name) if "loss" in line}
        for name in ("linux", "mac", "windows")
    }
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
