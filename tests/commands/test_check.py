# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_robust import SAFTConfig
from hf_robust.cli import main
from tests.methods import CLIP, Method, prepared
from tests.tiny_models import tiny_model


@pytest.fixture
def folder(method: Method, tmp_path: Path) -> Path:
    prepared(method, tiny_model(CLIP), CLIP).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def status(folder: Path) -> int:
    """The exit status of the command."""
    try:
        main(["check", str(folder)])
    except SystemExit as stopped:
        return int(str(stopped.code))
    return 0


def changed(folder: Path, **settings: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_a_whole_adapter(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert status(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    sha256 = json.loads((folder / "adapter_config.json").read_text())["saved"]["sha256"]
    assert lines[0] == f"{folder}: whole" and sha256[:16] in lines[2] and "not looked at: the base" in lines[3]


def test_a_damaged_adapter(folder: Path, capsys: pytest.CaptureFixture) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file)
    assert status(folder) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}: refused\n  AdapterFileError: an adapter's tensors are not those that were saved")


def test_an_adapter_of_an_older_version_says_what_is_not_known(folder: Path, capsys: pytest.CaptureFixture) -> None:
    changed(folder, saved=None)
    assert status(folder) == 1  # that of a new file
    file = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if not name.endswith("sha256")}, file)
    assert status(folder) == 0
    out = capsys.readouterr().out
    assert "maybe not whole" in out and "not looked at: tensors and base, which older" in out and "SHA-256" not in out


def test_an_adapter_without_entries_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    get_peft_model(tiny_model(CLIP), SAFTConfig()).save_pretrained(tmp_path, save_embedding_layers=False)
    assert status(tmp_path) == 0
    assert "no entries have been selected" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter(folder: Path, missing: str, capsys: pytest.CaptureFixture) -> None:
    (folder / missing).unlink()
    assert status(folder) == 1
    assert missing in capsys.readouterr().out


def test_another_method_and_no_method(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    LoraConfig().save_pretrained(str(tmp_path))
    assert status(tmp_path) == 1
    (tmp_path / "adapter_config.json").write_text("[]")
    assert status(tmp_path) == 1
    assert status(tmp_path / "nowhere") == 1
    out = capsys.readouterr().out
    assert "got 'LORA'; allowed SAFT, ACLIP" in out and out.count("not an adapter of hf_robust") == 2
