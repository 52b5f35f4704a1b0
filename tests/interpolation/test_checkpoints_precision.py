# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of two precisions."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_robust.errors import MergeError, NonFiniteError
from hf_robust.interpolation.arithmetic import interpolate_tensor
from hf_robust.interpolation.checkpoints import check_same_head, interpolate_checkpoints
from tests.interpolation.folders import load, refused, save

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PAIRS = [(first, second) for first in FLOATS for second in FLOATS if first != second]


def tensors(dtype, seed):
    """Of two dtypes; what is float64 and an integer stays."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return found | {"double": torch.randn(3, generator=generator).double(), "steps": torch.arange(3) + seed}


SHAPES = {"tower.weight": (40_000,), "scale": (), "empty": (0, 3), "odd": (3, 5)}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_output_has_the_dtype_that_holds_both(tmp_path, first, second, alpha, shards):
    start, end = tensors(first, 0), tensors(second, 1)
    name = str(second).removeprefix("torch.")
    config = {"model_type": "clip", "dtype": name, "text_config": {"torch_dtype": name}, "vision_config": {}}
    save(tmp_path / "a", start)
    save(tmp_path / "b", end, shards=shards, config=config)
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", alpha, cast_up=True)
    found, wider = load(tmp_path / "out"), torch.promote_types(first, second)
    assert found.keys() == end.keys()
    for key in SHAPES:
        assert found[key].dtype == wider
        assert torch.equal(found[key], interpolate_tensor(start[key].double(), end[key].double(), alpha).to(wider))
    assert torch.equal(found["double"], interpolate_tensor(start["double"], end["double"], alpha))
    assert torch.equal(found["steps"], end["steps"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    name = str(wider).removeprefix("torch.")
    expected = {"dtype": name, "text_config": {"torch_dtype": name}, "vision_config": {}}
    assert written == {"model_type": "clip", **expected}


def test_index_and_metadata_are_kept_right(tmp_path):
    save(tmp_path / "a", tensors(torch.float32, 0))
    save(tmp_path / "b", tensors(torch.float16, 1), shards=2)
    index = tmp_path / "b" / "model.safetensors.index.json"
    before = json.loads(index.read_text())
    before["metadata"]["total_size"] = sum(t.numel() * t.element_size() for t in load(tmp_path / "b").values())
    index.write_text(json.dumps(before))
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.5, cast_up=True)
    after = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert after["weight_map"] == before["weight_map"]
    total = sum(t.numel() * t.element_size() for t in load(tmp_path / "out").values())
    assert after["metadata"]["total_size"] == total
    with safe_open(tmp_path / "out" / "model-00001-of-00002.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_same_precision_is_copied_as_before(tmp_path):
    save(tmp_path / "a", tensors(torch.float16, 0))
    save(tmp_path / "b", tensors(torch.float16, 1))
    for alpha, side in ((0, "a"), (1, "b")):
        interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / f"{alpha}", alpha, cast_up=True)
        written = (tmp_path / f"{alpha}" / "model.safetensors").read_bytes()
        assert written == (tmp_path / side / "model.safetensors").read_bytes()


def test_it_has_to_be_asked_for(tmp_path):
    save(tmp_path / "a", tensors(torch.float16, 0))
    save(tmp_path / "b", tensors(torch.float32, 1))
    refused(tmp_path, MergeError, "4 tensors differ in dtype or shape.*pass cast_up=True")


@pytest.mark.parametrize(
    "change", [{"odd": torch.ones(3, 4)}, {"steps": torch.ones(3)}, {"odd": torch.ones(3, 5).int()}]
)
def test_shapes_and_integers_have_to_be_the_same(tmp_path, change):
    save(tmp_path / "a", tensors(torch.float16, 0))
    save(tmp_path / "b", tensors(torch.float32, 1) | change)
    refused(tmp_path, MergeError, "1 tensors differ in dtype or shape", cast_up=True)


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_what_is_not_finite_is_refused(tmp_path, alpha):
    save(tmp_path / "a", tensors(torch.float16, 0) | {"odd": torch.full((3, 5), torch.inf).half()})
    save(tmp_path / "b", tensors(torch.float32, 1))
    refused(tmp_path, NonFiniteError, "odd.*15 of 15 in zero-shot", alpha, cast_up=True)


def test_heads_are_cast_up_too(tmp_path):
    for side, dtype, seed in (("a", torch.float16, 0), ("b", torch.float32, 1)):
        save(tmp_path / side, tensors(dtype, seed))
        head = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
        save_file({"class_head.weight": head}, tmp_path / side / "classifier.safetensors")
        (tmp_path / side / "classifier.json").write_text(json.dumps({"class_names": ["x", "y"]}))
    with pytest.raises(MergeError, match="differ in dtype"):
        check_same_head(tmp_path / "a", tmp_path / "b")
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.25, cast_up=True)
    heads = [load_file(tmp_path / side / "classifier.safetensors")["class_head.weight"] for side in ("a", "b", "out")]
    assert torch.equal(heads[2], interpolate_tensor(heads[0].float(), heads[1], 0.25))
