# SPDX-License-Identifier: Apache-2.0
"""The scripts of `examples/` as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports `examples/<name>.py`, with `examples/` on the path."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"{name}_script", module)
    spec.loader.exec_module(module)
    return module
