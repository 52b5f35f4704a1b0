# SPDX-License-Identifier: Apache-2.0
"""What a saved adapter's files must be, at every door through which they come into a model."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from hf_robust.errors import AdapterFileError, HfRobustError
from hf_robust.tuners.files import CONFIG_FILE, WEIGHTS_FILE, digest

from ..methods import Method, assert_same, batch, outputs, prepared, same_bits, train
from ..tiny_models import tiny_model
from .bad_files import BADS, Bad, read_config, read_tensors, seal_name, sealed, strip, write_config, write_tensors

OLDER = "The file of adapter .* has no digest, as those of older versions"


@dataclass(frozen=True)
class Saved:
    method: Method
    folder: Path
    base: CLIPModel
    live: PeftModel
    logits: Tensor

    def fresh_base(self) -> CLIPModel:
        return copy.deepcopy(self.base)


@pytest.fixture(scope="module")
def saved(method: Method, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("clip").save_pretrained(folder / "base")
    base = CLIPModel.from_pretrained(folder / "base").eval()
    model = prepared(method, copy.deepcopy(base), "clip")
    train(model, batch("clip"))
    model.save_pretrained(folder / "adapter")
    live = PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
    return Saved(method, folder / "adapter", base, live, outputs(model))


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(saved.folder, tmp_path / "adapter"))


# --- doors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Door:
    """A way into a model.

    Args:
        name: shown by pytest.
        open: loads a folder into a model, and returns the model with the adapter.
        into_live: whether the model has an adapter already.
        checks: what is looked at before PEFT or transformers reads it; the rest is refused, or harmless.
    """

    name: str
    open: Callable[[nn.Module, Path], nn.Module]
    into_live: bool = False
    checks: tuple[str, ...] = ("config", "header", "tensors", "place")


def _second(model: Any, folder: Path) -> nn.Module:
    model.load_adapter(str(folder), "second")
    model.set_adapter("second", inference_mode=True)
    return model


def _over_live(model: Any, folder: Path) -> nn.Module:
    model.load_adapter(str(folder), "default")
    return model


def _state_dict(model: Any, folder: Path) -> nn.Module:
    tensors = load_file(folder / WEIGHTS_FILE)
    wrapped = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
    set_peft_model_state_dict(wrapped, tensors)
    return wrapped.eval()


def _transformers(model: Any, folder: Path) -> nn.Module:
    model.load_adapter(str(folder))
    return model


PEFT = Door("from_pretrained", lambda model, folder: PeftModel.from_pretrained(model, folder))
OVER_LIVE = Door("load_adapter over a live name", _over_live, into_live=True, checks=("tensors",))
STATE_DICT = Door("get_peft_model and state dict", _state_dict, checks=("tensors",))
TRANSFORMERS = Door("load_adapter of transformers", _transformers, checks=())
SECOND = Door("load_adapter", _second, into_live=True)
WITHOUT_MEMORY = Door(
    "low_cpu_mem_usage", lambda model, folder: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
)
AUTO = Door("AutoPeftModel", lambda model, folder: AutoPeftModel.from_pretrained(str(folder)))
DOORS = [PEFT, WITHOUT_MEMORY, SECOND, OVER_LIVE, AUTO, STATE_DICT, TRANSFORMERS]
# what is tried at every door
CHOSEN = {
    "value bit",
    "seal bit",
    "no seal",
    "other saving",
    "one tensor x",
    "NaN",
    "missing module",
    "missing values",
}
CHOSEN |= {"missing indices", "extra tensor", "float16", "wrong shape", "name twice", "truncated", "newer format"}
CHOSEN |= {"key twice", "other values", "huge counts"}
BAD_AT_DOOR = [pytest.param(door, bad, id=f"{door.name}-{bad.name}") for door in DOORS for bad in BADS
               if door is PEFT or bad.name in CHOSEN]  # fmt: skip


def snapshot(model: Any) -> dict[str, Any]:
    """All that a refused load must leave as it was, but for the state dict."""
    return {
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: list(module._forward_pre_hooks.values()) for name, module in model.named_modules()},
        "attributes": set(vars(model)) - {"peft_type"},
        "transformers": getattr(model, "_hf_peft_config_loaded", None),
        "adapters": list(model.peft_config) if isinstance(model, PeftModel) else None,
        "active": model.active_adapters if isinstance(model, PeftModel) else None,
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize(("door", "bad"), BAD_AT_DOOR)
def test_bad_files_change_nothing(saved: Saved, folder: Path, door: Door, bad: Bad) -> None:
    if saved.method.name not in bad.methods:
        pytest.skip("of the other method")
    if door is OVER_LIVE and bad.of == "config":
        pytest.skip("PEFT does not read the config")
    model = copy.deepcopy(saved.live) if door.into_live else saved.fresh_base()
    bad.damage(folder)
    refused_or_same(saved, folder, door, model, bad)


def refused_or_same(saved: Saved, folder: Path, door: Door, model: nn.Module, bad: Bad) -> None:
    before, tensors, logits = snapshot(model), copy.deepcopy(model.state_dict()), outputs(model)
    checked = bad.of in door.checks
    errors: Any = bad.error if checked and door is not OVER_LIVE else (HfRobustError, SafetensorError)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", OLDER)
            found = outputs(door.open(model, folder))
    except errors as error:
        assert errors is not bad.error or re.search(bad.match, str(error)), str(error)
        if door is TRANSFORMERS and isinstance(error, SafetensorError):  # it has put the adapter in before
            with pytest.raises(AdapterFileError, match="lacks"):
                outputs(model)
        assert snapshot(model) == before
        assert_same(model.state_dict(), tensors)
        assert same_bits(outputs(model), logits)
    else:
        assert not checked or bad.name == "no seal"
        assert same_bits(found, saved.logits)
