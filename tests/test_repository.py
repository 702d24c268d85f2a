"""What stands around the code: files that GitHub and other tools read, and what SECURITY.md says of the code."""

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from config import project_files
from conftest import ROOT

CODE = {path: ast.parse(path.read_text(encoding="utf-8")) for path in project_files()}
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def tool(name):
    """The path of a program beside Python or on the PATH; skips the test where there is none."""
    found = shutil.which(Path(sys.executable).with_name(name)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed (pip install {name})")


# ---- files of other tools


def vendored(kind, *names):
    """Checks files against a schema that the package check-jsonschema carries."""
    pytest.importorskip("check_jsonschema", reason="check-jsonschema, which carries the schemas, is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{kind}", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_issue_forms_obey_githubs_schema_and_ask_for_the_crash_report():
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"))
    vendored("github-issue-forms", *forms)
    assert [form.name for form in forms if "crash_*.txt" in text_of(form)] == ["bug.yml", "number.yml"]


def test_citation_obeys_its_schema_and_has_the_projects_version():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert f"\nversion: {project['version']}\n" in text_of("CITATION.cff")
    assert f"\n## {project['version']}" in text_of("CHANGELOG.md")
    vendored("citation-file-format", "--force-filetype", "yaml", "CITATION.cff")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_commands_and_files_of_a_page_at_the_top_exist(page):
    text = text_of(page)
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]+)#?([^)\s]*)\)", text):
        headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{path}#{anchor}"
    targets = re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE)
    assert {*re.findall(r"^make ([\w-]+)", text, re.MULTILINE)} <= {*targets}
    assert not [path for path in re.findall(r"(?:tests|config|docs)/\w+\.\w+", text) if not (ROOT / path).exists()]


def test_code_is_clean_for_ruff():
    for command in ("check", "format --check"):
        ruff = [tool("ruff"), *command.split(), "--no-cache"]
        done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_code_is_clean_for_mypy(tmp_path):
    done = subprocess.run([tool("mypy"), "--cache-dir", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- what SECURITY.md says is not done


@functools.cache
def all_calls():
    """(file, name as it is written, call) for each call in the project."""
    return [
        (path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node)
        for path, tree in CODE.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def calls(*names):
    """(file, call) for each call of these names."""
    return [(path, call) for path, name, call in all_calls() if name in names]


def test_torch_loads_weights_alone():
    found = calls("torch.load")
    assert [path for path, _ in found] == ["interop/hub.py"]
    for _, call in found:
        assert [k.value.value for k in call.keywords if k.arg == "weights_only"] == [True]


def test_nothing_is_unpickled_but_by_the_reader_of_plain_values():
    importing = {
        path.relative_to(ROOT).as_posix()
        for path, tree in CODE.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.partition(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
    }
    assert importing == {"interop/hub.py", "interop/nanogpt.py"}  # for the name of an error; for _PlainUnpickler
    assert not calls("pickle.load", "pickle.loads")
    assert not [call for _, call in calls("np.load") if "allow_pickle" in ast.unparse(call)]


def test_code_runs_from_presets_alone():
    assert not calls("exec", "eval", "compile", "os.system", "os.popen", "yaml.load")
    assert {path for path, _ in calls("runpy.run_path", "runpy.run_module")} == {"config/__init__.py"}
    assert not [path for path, call in calls("subprocess.run", "subprocess.Popen") if "shell" in ast.unparse(call)]
    assert not [path for path in CODE if "trust_remote_code" in text_of(path)]


def test_chat_templates_are_rendered_in_the_sandbox_alone():
    """And a template cannot leave it."""
    jinja2 = pytest.importorskip("jinja2")
    from text.chat import environment

    assert not calls("jinja2.Environment", "jinja2.Template", "Environment", "Template")
    for escape in ("{{ ''.__class__.__mro__ }}", "{{ raise_exception.__globals__.os }}", "{{ [].append(1) }}"):
        with pytest.raises(jinja2.exceptions.SecurityError):
            environment("", "").from_string(escape).render()
