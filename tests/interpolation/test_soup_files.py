# SPDX-License-Identifier: Apache-2.0
"""Soups of checkpoints on disk."""

from __future__ import annotations

import json
import os
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from hf_robust.errors import ConfigError, MergeError, NonFiniteError
from hf_robust.interpolation import streaming
from hf_robust.interpolation.checkpoints import interpolate_checkpoints
from hf_robust.interpolation.soup_files import soup_checkpoints
from hf_robust.interpolation.soups import uniform_soup
from tests.interpolation.folders import content, load, pair, save
from tests.methods import assert_same
from tests.tiny_models import tiny_model


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three checkpoints that fit each other, with the same integers; the second one in two shards."""
    monkeypatch.setattr(streaming, "SLICE", 4)
    for seed, (name, shards) in enumerate([("a", 1), ("b", 2), ("c", 1)]):
        save(tmp_path / name, tensors(seed), shards)
    return tmp_path


def tensors(seed, **changes):
    whole = {name: tensor for name, tensor in pair()[0].items() if not tensor.is_floating_point()}
    return {**pair(3 * seed)[0], **whole, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}


def test_it_is_the_soup_of_the_models(tmp_path):
    models = [tiny_model("clip", seed=seed) for seed in range(3)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / f"{seed}", max_shard_size="90KB" if seed else "1GB")
    soup_checkpoints([tmp_path / f"{seed}" for seed in range(3)], tmp_path / "soup")
    assert_same(AutoModel.from_pretrained(tmp_path / "soup").state_dict(), uniform_soup(models).state_dict())


def test_of_two_it_is_what_lies_half_way(folders):
    soup_checkpoints([folders / "b", folders / "c"], folders / "soup")
    interpolate_checkpoints(folders / "c", folders / "b", folders / "half", 0.5)  # with the files of the second
    assert content(folders / "soup") == content(folders / "half")


def test_of_equal_ones_it_is_each_of_them(folders):
    save(folders / "again", tensors(0))
    save(folders / "anew", tensors(0))
    soup_checkpoints([folders / name for name in ("a", "again", "anew")], folders / "soup")
    assert content(folders / "soup") == content(folders / "a")


def test_precisions_are_cast_up_on_demand(folders):
    half = {"tower.weight": tensors(1)["tower.weight"].half(), "logit_scale": tensors(1)["logit_scale"].bfloat16()}
    save(folders / "b", {**tensors(1), **half}, config={"dtype": "float16"})
    refused(folders, MergeError, "2 tensors differ in dtype.*cast_up")
    for order in (["a", "b", "c"], ["b", "a", "c"]):
        soup_checkpoints([folders / name for name in order], folders / "soup", cast_up=True, overwrite=True)
        found = load(folders / "soup")
        assert found["tower.weight"].dtype == found["logit_scale"].dtype == torch.float32
        sides = [load(folders / name)["tower.weight"].double() for name in "abc"]
        torch.testing.assert_close(found["tower.weight"], (sum(sides) / 3).float(), rtol=1e-7, atol=1e-8)
    assert json.loads((folders / "soup" / "config.json").read_text()) == {"dtype": "float32"}


def test_heads_are_averaged(folders):
    heads = [{"class_head.weight": torch.randn(2, 4)} for _ in "abc"]
    for name, head in zip("abc", heads, strict=True):
        save_file(head, folders / name / "classifier.safetensors")
        (folders / name / "classifier.json").write_text(json.dumps({"class_names": ["x", "y"]}))
    soup_checkpoints([folders / name for name in "abc"], folders / "soup")
    found = load(folders / "soup")["class_head.weight"]
    torch.testing.assert_close(found, sum(head["class_head.weight"] for head in heads) / 3)
    (folders / "c" / "classifier.json").write_text(json.dumps({"class_names": ["y", "x"]}))
    refused(folders, MergeError, r"other classes.*/c.*\['y', 'x'\] and \['x', 'y'\]")
    for name, people in zip("abc", (["x", "y"], ["x", "y"], ["x", "z"]), strict=True):
        (folders / name / "classifier.json").write_text(json.dumps({"identities": people}))
    refused(folders, MergeError, r"other classes.*/c.*\['x', 'z'\] and \['x', 'y'\]")
    os.remove(folders / "b" / "classifier.safetensors")
    refused(folders, MergeError, "only some.*trained head.*missing in .*/b")


def refused(folders, error, match, names="abc"):
    before = content(folders)
    with pytest.raises(error, match=match):
        soup_checkpoints([folders / name for name in names], folders / "out")
    assert content(folders) == before and not list(folders.glob(".hf_robust-tmp-*"))


def test_what_has_no_mean_is_refused(folders):
    refused(folders, ConfigError, "no ingredients", "")
    refused(folders, ConfigError, "twice.*/a", "aba")
    refused(folders, MergeError, "no such folder", "ax")
    save(folders / "c", tensors(2, steps=pair()[0]["steps"] + 1))
    refused(folders, MergeError, "whole numbers.*: steps .at .*/c")
    save(folders / "c", {**tensors(2), "more": torch.ones(1)})
    refused(folders, MergeError, "0 only in .*/a; 1 only in .*/c: more")
    broken = tensors(2)
    broken["tower.weight"][4, 6] = float("inf")
    save(folders / "c", broken)
    refused(folders, NonFiniteError, "tower.weight.*'1 of 35 in .*/c'")
    (folders / "c" / "adapter_config.json").write_text("{}")
    refused(folders, MergeError, "holds an adapter")


def test_memory_does_not_grow_with_the_models(tmp_path):
    for name in "abc":
        save(tmp_path / name, {f"w{index}": torch.ones(2**20) for index in range(4)})  # 16 MB each
    tracemalloc.start()
    soup_checkpoints([tmp_path / name for name in "abc"], tmp_path / "soup")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6  # of which 10 are for reading JSON
