"""Every notebook runs from top to bottom on a tiny model, and is stored without its outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hf_continual.testing import tiny_model, toy_tokenizer

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    for cell in notebook.cells:
        assert "outputs" not in cell or (cell.outputs == [] and cell.execution_count is None), cell.source


def test_opens_with_what_you_will_see(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "you will see" in first.source


def test_runs(notebook, tmp_path, monkeypatch):
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    toy_tokenizer().save_pretrained(model)
    for name, value in {
        "HF_CONTINUAL_NOTEBOOK_MODEL": str(model),
        "HF_CONTINUAL_NOTEBOOK_ROWS": "12",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),
        "MPLBACKEND": "agg",
    }.items():
        monkeypatch.setenv(name, value)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result")
    ]
    assert any("image/png" in output.data for output in printed), "no plot is shown"
