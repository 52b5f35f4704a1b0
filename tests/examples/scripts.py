# SPDX-License-Identifier: Apache-2.0
"""The scripts of `examples/`, as modules and as programs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
from torch import Tensor
from transformers import CLIPModel

from hf_robust import RobustTrainingArguments
from hf_robust.scripting.arguments import parse_arguments
from tests.programs import ROOT, run_on_ranks, run_programs


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports `examples/<name>.py`."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"{name}_script", module)
    spec.loader.exec_module(module)
    return module


def load_training_script(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script's module; its `run` is its command line, with the config of `folder`, and returns results.json.

    Args:
        name: as in `load_script`.
        folder: holds config.yaml; the cache of datasets is put there.
        monkeypatch: of the test.
    """
    module = load_script(name, monkeypatch)
    types = module.ScriptArguments, RobustTrainingArguments
    return _with_run(module, types, module.DEFAULTS, folder, monkeypatch)


def load_command(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As `load_training_script` does of a script, the module of a command.

    Args:
        name: `train`, for instance.
        folder: as there.
        monkeypatch: of the test.
    """
    module = importlib.import_module(f"hf_robust.commands.{name}")
    return _with_run(module, module.TYPES, {}, folder, monkeypatch)


def _with_run(module: ModuleType, types: Any, defaults: Any, folder: Path, monkeypatch: Any) -> ModuleType:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")

    def run(output: Path, *flags: str, config: Path = folder / "config.yaml") -> Any:
        flags = ["--config", str(config), "--output_dir", str(output), *flags]
        module.main(*parse_arguments(types, defaults, flags))
        return json.loads((output / "results.json").read_text())

    monkeypatch.setattr(module, "run", run, raising=False)
    return module


def image_sizes_seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """Height and width of the images that CLIP models embed from now on."""
    sizes, embed = set(), CLIPModel.get_image_features

    def noting(model: CLIPModel, pixel_values: Tensor, **options: Any) -> Any:
        sizes.add(tuple(pixel_values.shape[-2:]))
        return embed(model, pixel_values=pixel_values, **options)

    monkeypatch.setattr(CLIPModel, "get_image_features", noting)
    return sizes


def launch_on_two(folder: Path, *command: str, cwd: Path = ROOT) -> str:
    """Runs a script, or `-m hf_robust` and a command, on two processes; returns what it printed.

    They meet as with `torchrun --standalone`, whose store asks the system for a port: one chosen here, or by
    accelerate, could be taken before the store opens it.

    Args:
        folder: the cache of datasets is put there.
        *command: with its flags.
        cwd: where it is started.
    """
    config = ROOT / "examples" / "accelerate_configs" / "cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *command]
    standalone = {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": "127.0.0.1"}  # flags of torchrun, not of accelerate
    ((out, _),) = run_programs(launch, cwd=cwd, HF_DATASETS_CACHE=str(folder / "cache"), **standalone)
    return out


def command_on_two(name: str, folder: Path, *flags: str, cwd: Path = ROOT) -> str:
    """Runs a command on two ranks; returns what they printed. Quicker than `launch_on_two`, by two starts of Python.

    Args:
        name: as of `load_command`.
        folder: for the script and the cache of datasets.
        *flags: of the command.
        cwd: where it runs.
    """
    script = f"""
import os
from hf_robust.commands import {name} as command
from hf_robust.scripting.arguments import parse_arguments

def main(folder):
    os.chdir({str(cwd)!r})
    command.main(*parse_arguments(command.TYPES, flags={list(flags)!r}))
"""
    return "".join(out for out, _ in run_on_ranks(2, script, folder))
