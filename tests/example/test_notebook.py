"""The notebook runs from its first cell to its last, on fewer steps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook" / "muon.ipynb"


def test_every_cell_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # lightning-muon
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "commit the notebook without its outputs"
    assert "STEPS = 200\n" in cells[0].source
    cells[0].source = cells[0].source.replace("STEPS = 200", "STEPS = 50")
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=folder).execute()
    pictures = [one for cell in cells for one in cell.outputs if "image/png" in one.get("data", {})]
    assert len(pictures) == 3
    said = "".join(one.get("text", "") for cell in cells for one in cell.outputs)
    assert "3 x (96, 96)" in said
    assert "spectra of optimizer step 50" in said
    assert (tmp_path / "runs" / "notebook" / "report.html").stat().st_size > 1_000_000
