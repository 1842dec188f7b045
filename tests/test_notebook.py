"""The notebook for one GPU runs from beginning to end, on the embedded model."""

import json
import os
import sys
from pathlib import Path

import nbclient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "one-gpu.ipynb"


def test_the_notebook_for_one_gpu_runs(tmp_path, monkeypatch):
    import nbformat

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # they would go stale
    resources = {"metadata": {"path": str(tmp_path)}}
    done = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    said = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", ()))
    assert "one-gpu: training" in said and "will not fit" not in said
    results = json.loads((tmp_path / "one-gpu" / "run" / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["base", "colour", "bright"]
    published = tmp_path / "one-gpu" / "published"
    assert sorted(path.name for path in published.iterdir()) == ["main", "stage-01-colour", "stage-02-bright"]
    assert results["hashes"]["policies"][2] == json.loads((published / "main" / "mcit.json").read_text())["hash"]
