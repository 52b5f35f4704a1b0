# SPDX-License-Identifier: Apache-2.0
"""What a saved adapter's files must be, at every door through which they come into a model."""

from __future__ import annotations

import copy
import re
import shutil
import sys
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
from transformers import CLIPModel

from hf_robust import ACLIPConfig, SAFTConfig, select_saft
from hf_robust.errors import AdapterFileError, HfRobustError, NonFiniteError
from hf_robust.tuners.files import CONFIG_FILE, WEIGHTS_FILE

from ..methods import METHODS, Method, assert_same, batch, outputs, prepared, same_bits, train
from ..programs import run_programs
from ..tiny_models import tiny_model
from .bad_files import BADS, Bad, first, read_config, read_tensors, strip, write_config, write_tensors

OLDER = "The tensors of adapter .* come without a digest, as from older versions"


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
def savings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("clip").save_pretrained(folder / "base")
    base = CLIPModel.from_pretrained(folder / "base").eval()
    found = {}
    for method in METHODS:
        model = prepared(method, copy.deepcopy(base), "clip")
        train(model, batch("clip"))
        model.save_pretrained(folder / method.name)
        live = PeftModel.from_pretrained(copy.deepcopy(base), folder / method.name)
        found[method.name] = Saved(method, folder / method.name, base, live, outputs(model))
    return found


@pytest.fixture
def saved(savings: dict[str, Saved], method: Method) -> Saved:
    return savings[method.name]


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
CHOSEN |= {"key twice", "other values", "huge counts", "no dimension"}
CASES = [
    pytest.param(method, door, bad, id=f"{method.name}-{door.name}-{bad.name}")
    for method in METHODS
    for door in DOORS
    for bad in BADS
    if method.name in bad.methods
    if door is PEFT or bad.name in CHOSEN
    if door is not OVER_LIVE or bad.of != "config"  # PEFT does not read it there
]


def snapshot(model: Any) -> dict[str, Any]:
    """All that a refused load must leave as it was, but for the state dict."""
    return {
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: list(map(type, m._forward_pre_hooks.values())) for name, m in model.named_modules()},
        "configs": "peft_config" in vars(model),
        "transformers": getattr(model, "_hf_peft_config_loaded", None),
        "adapters": list(model.peft_config) if isinstance(model, PeftModel) else None,
        "active": model.active_adapters if isinstance(model, PeftModel) else None,
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize(("method", "door", "bad"), CASES, indirect=["method"])
def test_bad_files_change_nothing(saved: Saved, folder: Path, door: Door, bad: Bad) -> None:
    model = copy.deepcopy(saved.live) if door.into_live else saved.fresh_base()
    before = all_of(model)
    bad.damage(folder)
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
        assert_unchanged(model, before)
    else:
        assert not checked or (door is OVER_LIVE and bad.name == "no seal")
        assert same_bits(found, saved.logits)


def wider() -> CLIPModel:
    config = copy.deepcopy(tiny_model("clip").config)
    config.vision_config.intermediate_size *= 2
    return CLIPModel(config).eval()


def one_weight_off(base: CLIPModel) -> CLIPModel:
    base.visual_projection.weight.data.view(-1)[0] += 8.7
    return base


OTHER_BASES: dict[str, Callable[[Saved], CLIPModel]] = {
    "other weights": lambda saved: tiny_model("clip", seed=1),
    "one weight off": lambda saved: one_weight_off(saved.fresh_base()),
    "twice as wide": lambda saved: wider(),
    "already merged": lambda saved: PeftModel.from_pretrained(saved.fresh_base(), saved.folder).merge_and_unload(),
    "already merged, in bfloat16": lambda saved: (
        PeftModel.from_pretrained(saved.fresh_base(), saved.folder).merge_and_unload().to(torch.bfloat16)
    ),
}


@pytest.mark.parametrize("door", [PEFT, WITHOUT_MEMORY, STATE_DICT, TRANSFORMERS], ids=lambda door: door.name)
@pytest.mark.filterwarnings("ignore:The PEFT config.s `base_model_name_or_path` was renamed")
@pytest.mark.parametrize("other", OTHER_BASES)
def test_other_bases_are_refused(saved: Saved, door: Door, other: str) -> None:
    model = OTHER_BASES[other](saved)
    before = all_of(model)
    with pytest.raises(AdapterFileError, match="belongs to another base"):
        outputs(door.open(model, saved.folder))
    assert_unchanged(model, before)


def all_of(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    logits = outputs(model)
    return snapshot(model), copy.deepcopy(model.state_dict()), logits


def assert_unchanged(model: nn.Module, before: tuple[dict[str, Any], dict[str, Tensor], Tensor]) -> None:
    assert snapshot(model) == before[0]
    assert_same(model.state_dict(), before[1])
    assert same_bits(outputs(model), before[2])


@pytest.mark.parametrize("method", [m for m in METHODS if m.name == "SAFT"], indirect=True, ids=["SAFT"])
def test_tensors_of_modules_that_only_another_adapter_has_are_refused(saved: Saved) -> None:
    model = copy.deepcopy(saved.live)
    model.add_adapter("second", SAFTConfig(target_modules=["visual_projection"], score="magnitude"))
    select_saft(model, adapter_name="second")
    before = all_of(model)
    with pytest.raises(AdapterFileError, match="numbers of entries differ"):
        model.load_adapter(str(saved.folder), "second")
    assert_unchanged(model, before)


# --- what is not refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_good_files_come_through_every_door(saved: Saved, door: Door) -> None:
    model = copy.deepcopy(saved.live) if door.into_live else saved.fresh_base()
    assert same_bits(outputs(door.open(model, saved.folder)), saved.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("door", [PEFT, WITHOUT_MEMORY, STATE_DICT, TRANSFORMERS], ids=lambda door: door.name)
def test_a_base_in_another_precision_is_the_same_base(
    saved: Saved, door: Door, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = outputs(door.open(saved.fresh_base().to(dtype), saved.folder))
    torch.testing.assert_close(found.float(), saved.logits, rtol=0.05, atol=0.1)
    other = PeftModel.from_pretrained(saved.fresh_base().to(dtype), saved.folder)
    other.save_pretrained(tmp_path)
    if door is TRANSFORMERS and dtype is torch.float64:  # it rounds the values before we see them
        with pytest.raises(AdapterFileError, match="tensors are not those that were saved"):
            door.open(saved.fresh_base(), tmp_path)
        return
    assert same_bits(outputs(door.open(saved.fresh_base(), tmp_path)).float(), saved.logits)


@pytest.mark.parametrize("there", [torch.float16, torch.float32], ids=str)
def test_numbers_too_small_for_float16_do_not_make_another_base(
    method: Method, there: torch.dtype, tmp_path: Path
) -> None:
    base = tiny_model("clip")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.view(-1)[0] = 1.3e-6  # among those compared; float16 has steps of 6e-8 here
    here = torch.float32 if there is torch.float16 else torch.float16
    prepared(method, copy.deepcopy(base).to(here), "clip").save_pretrained(tmp_path, save_embedding_layers=False)
    PeftModel.from_pretrained(base.to(there), tmp_path)


def test_statistics_that_training_moves_do_not_make_another_base(method: Method, tmp_path: Path) -> None:
    first_block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    base = nn.Sequential(first_block, nn.Sequential(nn.Linear(4, 2)))
    config = ACLIPConfig(target_modules=["0.0"])
    model = get_peft_model(copy.deepcopy(base), SAFTConfig(score="random") if method.name == "SAFT" else config)
    if method.name == "SAFT":
        select_saft(model)
    model.train()(torch.randn(8, 4))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(base, tmp_path)


def test_values_too_large_for_the_base_are_refused(saved: Saved, folder: Path) -> None:
    strip(folder)
    tensors = read_tensors(folder)
    tensors[first(tensors)].view(-1)[0] = 1e6
    write_tensors(folder, tensors)
    with pytest.raises(NonFiniteError, match="too large for the base's format"):
        PeftModel.from_pretrained(saved.fresh_base().half(), folder)


def test_the_state_of_a_model_goes_into_an_adapter_made_with_the_settings_of_a_file(saved: Saved) -> None:
    trained = PeftModel.from_pretrained(saved.fresh_base(), saved.folder, is_trainable=True)
    train(trained, batch("clip", seed=2))
    model = get_peft_model(saved.fresh_base(), PeftConfig.from_pretrained(str(saved.folder)))
    model.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert same_bits(outputs(model.eval()), outputs(trained))


def test_an_older_file_loads_with_a_warning(saved: Saved, folder: Path) -> None:
    strip(folder)
    with pytest.warns(UserWarning, match=OLDER):
        model = PeftModel.from_pretrained(saved.fresh_base(), folder)
    assert same_bits(outputs(model), saved.logits)
    model.save_pretrained(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (folder / name).read_bytes() == (saved.folder / name).read_bytes()


def test_older_files_are_looked_at_as_far_as_they_can_be(saved: Saved, folder: Path) -> None:
    strip(folder)
    tensors = read_tensors(folder)
    tensors[first(tensors)].view(-1)[0] = float("nan")
    write_tensors(folder, tensors)
    with pytest.raises(NonFiniteError):
        PeftModel.from_pretrained(saved.fresh_base(), folder)


@pytest.mark.parametrize("memory", [False, True], ids=["copied", "low_cpu_mem_usage"])
def test_a_file_may_change_once_it_is_loaded(saved: Saved, folder: Path, memory: bool) -> None:
    path = folder / WEIGHTS_FILE
    first_model = PeftModel.from_pretrained(saved.fresh_base(), folder, low_cpu_mem_usage=memory)
    first_model.load_adapter(str(folder), "second", low_cpu_mem_usage=memory)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert same_bits(outputs(first_model), saved.logits)
    path.open("wb").close()  # to read tensors that are mapped from it would end the process now
    first_model.set_adapter("second", inference_mode=True)
    assert same_bits(outputs(first_model), saved.logits)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name == "SAFT"], indirect=True, ids=["SAFT"])
def test_huge_numbers_in_a_config_take_no_memory(saved: Saved, folder: Path) -> None:
    """In a process that may take 2 GB more; the tensors of one module would be of 2.4 GB."""
    config = read_config(folder)
    config["entry_counts"] = dict.fromkeys(config["entry_counts"], 3 * 10**8)
    write_config(folder, config)
    (_, error), *_ = run_programs([sys.executable, "-c", LIMITED, str(folder), str(saved.folder.parent / "base")])
    assert "numbers of entries differ" in error


LIMITED = """
import resource, sys
from pathlib import Path
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CLIPModel
from hf_robust import SAFTConfig
from hf_robust.errors import AdapterFileError

folder, base = map(Path, sys.argv[1:])
model = CLIPModel.from_pretrained(base)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2 * 10**9,) * 2)
for load in (
    lambda: SAFTConfig.from_pretrained(folder),
    lambda: set_peft_model_state_dict(
        get_peft_model(model, PeftConfig.from_pretrained(folder)), load_file(folder / "adapter_model.safetensors")
    ),
    lambda: model.load_adapter(str(folder)),
):
    try:
        load()
    except AdapterFileError as error:
        print(error, file=sys.stderr)
    else:
        raise SystemExit("has been loaded")
"""
