"""The floor plan: which file may import which, and that importing does nothing else."""

import ast
import subprocess
import sys

import pytest

from conftest import ROOT

LIBRARIES = {"model", "tokenizer", "corpus", "data", "objective", "optim", "config"}
COSTS = {"hardware", "cost", "memory"}
BELOW_SCRIPTS = LIBRARIES | COSTS | {"rundir", "guard", "health", "parallel", "checkpoint", "pretrained", "plan"}
MAY_IMPORT = {
    "model": set(),
    "tokenizer": set(),
    "corpus": set(),
    "data": set(),
    "objective": set(),
    "optim": set(),
    "shard": {"model"},  # which rank holds what: what parallel.py does where there are several
    "rundir": set(),
    "guard": {"config"},
    "health": {"optim"},  # to look at a sharded tensor's own part
    "parallel": {"model", "shard", "guard"},
    "checkpoint": {"model", "optim", "rundir"},
    "families": {"model"},  # what others call what is ours
    "hub_tokenizer": {"tokenizer"},
    "hub": {"families", "hub_tokenizer", "model"},
    "pretrained": {"checkpoint", "config", "families", "hub", "model", "rundir", "shard", "tokenizer"},
    "hardware": set(),
    "cost": {"hardware", "model", "objective", "parallel"},
    "memory": {"cost", "data", "model", "optim", "parallel"},
    "plan": {"checkpoint", "pretrained", "config", "model", "objective", "data", "optim", "parallel", "ceilings", "report_plan"} | COSTS,
    "log": {"config", "objective", "rundir", "parallel"} | COSTS,  # what a run tells: the half of train.py that is not the loop
    "prepare": {"config", "corpus", "tokenizer", "data"},
    "train": BELOW_SCRIPTS | {"log"},
    "score": {"model"},
    "sample": {"config", "model", "objective", "pretrained", "parallel", "checkpoint", "score"},
    "machine": {"data", "objective", "parallel", "hardware"},  # what this machine does, whatever is trained on it
    "ceilings": {"machine", "model", "optim", "parallel"},  # what a step's parts take on this machine
    "meters": {"health", "optim", "parallel"},  # what of a step goes where
    "report_bench": set(),  # figures in words and pictures
    "report_plan": {"config", "memory"},
    "sweep": {"config"},  # starts bench.py as a person would
    # A benchmark must time the code that trains.
    "bench": BELOW_SCRIPTS | {"train", "machine", "ceilings", "meters", "report_bench", "sweep"},
    "nanogpt": {"hub", "model", "families", "tokenizer", "data", "optim", "rundir", "parallel", "checkpoint"},
    "convert": {"config", "families", "hub", "hub_tokenizer", "nanogpt", "pretrained", "checkpoint"},
}
FILES = sorted(ROOT.glob("*.py"))
PRESETS = sorted((ROOT / "config").glob("[!_]*.py"))


def imported(source):
    """Top-level names of all that a file, or its syntax tree, imports, inside functions as well."""
    names = set()
    for node in ast.walk(source if isinstance(source, ast.AST) else ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a flat project has no relative imports"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_import_only_what_the_floor_plan_lets_them(path):
    assert path.stem in MAY_IMPORT, "a new file needs its sentence and its row in the floor plan"
    assert imported(path) & (MAY_IMPORT.keys() | {"config"} | {file.stem for file in FILES}) <= MAY_IMPORT[path.stem]


def test_settings_machinery_imports_the_standard_library_alone():
    assert imported(ROOT / "config/__init__.py") <= sys.stdlib_module_names


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_presets_import_only_other_presets(path):
    assert imported(path) <= {"config"}


def test_benchmark_takes_code_that_trains_from_train_and_no_settings():
    for node in ast.walk(ast.parse((ROOT / "bench.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "train":
            names = {alias.name for alias in node.names}
            assert "train_step" in names and not any(name.endswith("Config") or name == "Settings" for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_import_packages_but_torch_and_numpy_only_where_they_are_used(path):
    """So that an existing torch and numpy are enough to train."""
    top = ast.parse(path.read_text(encoding="utf-8"))
    top.body = [node for node in top.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imported(top) <= sys.stdlib_module_names | {"torch", "numpy", "config"} | MAY_IMPORT.keys()


def test_every_file_imports_without_side_effects(tmp_path):
    before_and_after = """
import os, random, sys, threading
import numpy, torch
def seen():
    return (dict(os.environ), os.getcwd(), threading.active_count(), torch.get_rng_state().tolist(), random.getstate(),
            numpy.random.get_state()[1].tolist(), torch.get_num_threads(), torch.get_default_dtype(), os.listdir())
before = seen()
for name in sys.argv[1:]:
    __import__(name)
after = seen()
assert before == after, [(a, b) for a, b in zip(before, after) if a != b]
"""
    names = ["config", *(path.stem for path in FILES)]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", before_and_after, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
