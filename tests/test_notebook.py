"""docs/quickstart.ipynb runs from its first cell to its last, without those that need the network."""

import json
import re

import pytest

from conftest import ROOT

PATH = ROOT / "docs" / "quickstart.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_stored_without_outputs_and_its_links_and_files_exist():
    text = "".join("".join(cell["source"]) for cell in CELLS)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)
    paths = re.findall(r"\]\(([^):]+)\)", text)
    assert paths and all((PATH.parent / path).exists() for path in paths)
    named = re.findall(r"\{python\} (\w+\.py)|(config/\w+\.py)", text)
    assert len(named) > 9 and all((ROOT / (script or preset)).exists() for script, preset in named)


@pytest.mark.slow
def test_the_notebook_trains_plots_and_samples(tmp_path):
    """On few steps. Cells tagged network are left out: pip, and the fine-tuning of GPT-2, which fetches its weights."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(PATH, as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert tags.count(["network"]) == 2 and tags.count(["parameters"]) == 1
    notebook.cells = [cell for cell in notebook.cells if cell.metadata.get("tags") != ["network"]]
    [parameters] = [cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"]]
    parameters.source = f"steps = 30\ndata_dir = {str(tmp_path / 'data')!r}\nout_dir = {str(tmp_path / 'run')!r}"
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(PATH.parent)}})
    client.execute()  # raises where a cell does
    *_, plot, sample, probabilities = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert (tmp_path / "run" / "finished").exists()
    assert any("image/png" in output.get("data", {}) for output in plot), "the curve"
    assert re.search(r"^[0-9.]+ bits per byte", "".join(o.get("text", "") for o in plot), re.MULTILINE)
    assert "".join(o.text for o in sample).count("def main(") == 2
    assert len(re.findall(r"^ *[0-9.]+%  '", "".join(o.text for o in probabilities), re.MULTILINE)) == 5
