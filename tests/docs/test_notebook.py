# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from its first cell to the last, on a reader's folder, and is kept without outputs."""

from __future__ import annotations

import json

from matplotlib import pyplot

from tests.docs.a_users_folder import build
from tests.docs.pages import ROOT

NOTEBOOK = ROOT / "examples/notebooks/own_images.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_runs(tmp_path, monkeypatch):
    build(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    sources = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
    for number, source in enumerate(sources):
        exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)
    pyplot.close("all")
    assert (tmp_path / names["ADAPTER"] / "adapter_model.safetensors").exists()
    assert len(names["answers"]) == len(names["photos"]["test"])


def test_it_has_no_outputs():
    """They would be of somebody's run, and large."""
    assert not [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")]
