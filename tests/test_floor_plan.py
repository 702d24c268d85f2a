"""The floor plan: imports run one way through the folders, and importing does nothing else."""

import ast
import subprocess
import sys

import pytest

from config import FOLDERS, project_files
from conftest import ROOT

ORDER = ("libraries", "text", "perf", "run", "interop", "scripts")  # each may import itself and what stands before it
FILES = project_files()
CODE = [path for path in FILES if path.parent.name != "config" or path.name == "__init__.py"]
PRESETS = sorted((ROOT / "config").glob("[!_]*.py"))


IS_SCRIPT = '\nif __name__ == "__main__":\n    pass\n'


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def place_of(module):
    """(folder in ORDER, first part) of a module's dotted name, for the project's own; None for any other."""
    first = module.partition(".")[0]
    if first in FOLDERS and first != "config":
        return first
    if first == "config":
        return "libraries"
    file = ROOT / f"{first}.py"
    if not file.exists():
        return None
    return "scripts" if 'if __name__ == "__main__"' in file.read_text(encoding="utf-8") else "libraries"


def imported(source):
    """Dotted names of all modules that a file, or its syntax tree, imports, inside functions as well."""
    names = set()
    for node in ast.walk(source if isinstance(source, ast.AST) else ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the project has no relative imports"
            names.add(node.module)
    return names


def wrong_imports(path):
    """Modules that a file imports against the rule."""
    here = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    place, wrong = ORDER.index(place_of(here)), []
    for module in imported(path):
        if (there := place_of(module)) is None:
            continue
        of_script = there == "scripts" and (module != "train" or here not in ("bench", "finetune", "compress", "plan"))
        if ORDER.index(there) > place or of_script:
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_imports_run_leftward_through_the_folders(path):
    assert not wrong_imports(path), f"{' | '.join(ORDER)}: imports run leftward, and only bench, finetune, compress and plan import a script, train"


def test_import_rule_finds_what_breaks_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for folder in ("perf", "run"):
        (tmp_path / folder).mkdir()
    for name, text in {
        "model.py": "def f():\n    from run.log import Log\n",
        "train.py": "import model\nfrom run import log\n" + IS_SCRIPT,
        "sample.py": "import train\n" + IS_SCRIPT,
        "bench.py": "from train import build\n" + IS_SCRIPT,
        "added.py": "import model, torch\n",  # a forker's
        "perf/cost.py": "from run.log import Log\nimport model, torch\n",
        "run/log.py": "from perf import cost\nimport train\n",
    }.items():
        (tmp_path / name).write_text(text)
    found = {name_of(path): wrong_imports(path) for path in sorted(tmp_path.glob("**/*.py"))}
    assert found == {
        "added.py": [], "bench.py": [], "model.py": ["run.log"], "perf/cost.py": ["run.log"], "run/log.py": ["train"],
        "sample.py": ["train"], "train.py": [],
    }  # fmt: skip


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f != "config"])
def test_a_folder_is_one_sentence(folder):
    text = (ROOT / folder / "__init__.py").read_text(encoding="utf-8")
    [sentence] = ast.parse(text).body
    assert sentence.value.value.endswith(".") and "\n" not in sentence.value.value


def test_settings_machinery_imports_the_standard_library_alone():
    assert imported(ROOT / "config/__init__.py") | imported(ROOT / "console.py") <= sys.stdlib_module_names | {"console"}


@pytest.mark.parametrize("path", PRESETS, ids=name_of)
def test_presets_import_only_other_presets(path):
    assert {module.partition(".")[0] for module in imported(path)} <= {"config"}


def test_benchmark_takes_code_that_trains_from_train_and_no_settings():
    for node in ast.walk(ast.parse((ROOT / "bench.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "train":
            names = {alias.name for alias in node.names}
            assert "train_step" in names and not any(name.endswith("Config") or name == "Settings" for name in names)


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_files_import_packages_but_torch_and_numpy_only_where_they_are_used(path):
    """So that an existing torch and numpy are enough to train."""
    top = ast.parse(path.read_text(encoding="utf-8"))
    top.body = [node for node in top.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    foreign = {module.partition(".")[0] for module in imported(top) if place_of(module) is None}
    assert foreign <= sys.stdlib_module_names | {"torch", "numpy"}


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
    names = [name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in CODE]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", before_and_after, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
