# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import save_file

from hf_robust.errors import ConfigError, MergeError, NonFiniteError
from hf_robust.interpolation import publish, streaming
from hf_robust.interpolation.checkpoints import interpolate_checkpoints
from tests.interpolation.folders import content, load, pair, put, refused, same, save, save_pair

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folders(tmp_path):
    return save_pair(tmp_path)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.5", True, None])
def test_alpha(folders, alpha):
    refused(folders, ConfigError, "alpha", alpha=alpha)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_other_tensors(folders, alpha):
    put(folders, "a", **{f"extra_{n}": torch.ones(1) for n in range(7)})
    put(folders, "b", one=torch.ones(1))
    message = r"7 only in zero-shot: extra_0, extra_1, extra_2, extra_3, extra_4 \(\+2 more\); 1 only in fine-tuned"
    refused(folders, MergeError, message, alpha)
    put(folders, "b", **{f"extra_{n}": torch.ones(1) for n in range(7)}, tower__half=None)
    refused(folders, MergeError, "1 only in zero-shot: tower.half; 0 only in fine-tuned", alpha)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("side", [0, 1])
def test_a_prefix_is_recognised(folders, prefix, side):
    save(folders / "ab"[side], {prefix + name: tensor for name, tensor in pair()[side].items()})
    (folders / "b" / WEIGHTS).exists() or save(folders / "b", pair()[1])
    refused(folders, MergeError, f"prefix '{prefix}' is the only difference")


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_other_shapes_and_dtypes(folders, alpha):
    put(folders, "b", tower__weight=torch.ones(7, 5))
    refused(folders, MergeError, r"tower.weight: float32 \(5, 7\) and float32 \(7, 5\)", alpha)
    put(folders, "b", tower__half=torch.ones(9))
    refused(folders, MergeError, r"1 tensors differ in dtype or shape.*tower.half: float16 \(9,\) and float32", alpha)
    put(folders, "b", tower__weight=torch.ones(5, 7, 1), logit_scale=torch.ones(1))
    refused(folders, MergeError, "2 tensors differ", alpha)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["tower__weight", "tower__half", "tower__brain"])
def test_not_finite(folders, monkeypatch, bad, name):
    monkeypatch.setattr(streaming, "SLICE", 4)
    tensor = pair()[0][name.replace("__", ".")]
    tensor.view(-1)[[0, 5]] = bad
    put(folders, "a", **{name: tensor})
    found = rf"infinity \(at {name.replace('__', '.')}\): got '2 of {tensor.numel()} in zero-shot'"
    refused(folders, NonFiniteError, found)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_head_on_one_side_or_of_other_classes(folders, alpha):
    head = {"class_head.weight": torch.ones(2, 3)}
    save_file(head, folders / "b" / "classifier.safetensors")
    refused(folders, MergeError, r"only one .* trained head.*at .*/a.*save_model\(\)", alpha)
    save_file(head, folders / "a" / "classifier.safetensors")
    for side, names in zip("ab", (["x", "y"], ["y", "x"]), strict=True):
        (folders / side / "classifier.json").write_text(json.dumps({"class_names": names}))
    refused(folders, MergeError, "heads are of other classes", alpha)
    (folders / "b" / "classifier.json").unlink()
    save_file({"class_head.weight": torch.ones(3, 3)}, folders / "a" / "classifier.safetensors")
    refused(folders, MergeError, "class_head.weight", alpha)


def test_output_overlaps_an_input(folders):
    (folders / "link").symlink_to(folders / "a")
    (folders / "a" / "deep").mkdir()
    for out in ("a", "b", "a/x", "a/deep", ".", "link", "link/x", "b/../a"):
        refused(folders, MergeError, "output and input overlap", out=out)


def test_output_is_in_use(folders):
    before = content(folders)
    with pytest.raises(MergeError, match="output folder is not empty.*overwrite"):
        interpolate_checkpoints(folders / "a", folders / "b", folders / "out", 0.5)
    assert content(folders) == before
    refused(folders, MergeError, "output is no folder", out="out/old")


FISHERS = {
    "unknown": ({"other": torch.ones(1)}, "the model lacks.*'other'"),
    "another shape": ({"tower.weight": torch.ones(7, 5)}, r"does not fit.*float32 \(7, 5\) for float32 \(5, 7\)"),
    "of integers": ({"steps": torch.ones(4)}, "does not fit.*steps"),
    "integers": ({"tower.weight": torch.ones(5, 7, dtype=torch.int32)}, "does not fit.*int32"),
}


@pytest.mark.parametrize("name", FISHERS)
def test_fisher_information_does_not_fit(folders, name):
    tensors, message = FISHERS[name]
    for side in "ab":
        save_file(tensors, folders / f"{side}.safetensors")
    refused(folders, MergeError, message, fishers=(folders / "a.safetensors", folders / "b.safetensors"))


def test_fisher_information_of_one_side(folders):
    save_file({"tower.weight": torch.ones(5, 7)}, folders / "f.safetensors")
    save_file({}, folders / "empty.safetensors")
    files = folders / "f.safetensors", folders / "empty.safetensors"
    refused(folders, MergeError, "1 only in zero-shot: tower.weight", fishers=files)
    refused(folders, ConfigError, "of both models", fishers=files[:1])
    refused(folders, MergeError, "weight file is missing", fishers=(files[0], folders / "none.safetensors"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_fisher_information_is_not_finite(folders, bad, side):
    for number, file in enumerate(("f0", "f1")):
        fisher = torch.ones(5, 7)
        fisher[2, 3] = bad if number == side else 1.0
        save_file({"tower.weight": fisher}, folders / file)
    message = f"1 of 35 in Fisher of {['zero-shot', 'fine-tuned'][side]}"
    refused(folders, NonFiniteError, message, fishers=(folders / "f0", folders / "f1"))


def test_too_little_space_is_known_before_writing(folders, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 99, 99))
    monkeypatch.setattr(publish.Path, "mkdir", lambda path, **_: path.exists() or pytest.fail("wrote"))
    refused(folders, MergeError, r"not enough disk space.*99 bytes free, \d{3,} needed")


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_disk_full_while_writing(folders, monkeypatch, alpha):
    """`/dev/full` takes the place of an output file."""
    mkdir = publish.Path.mkdir

    def with_full_disk(path, **settings):
        mkdir(path, **settings)
        if path.name.startswith(publish.TEMPORARY):
            (path / (WEIGHTS if alpha == 0 else "config.json")).symlink_to("/dev/full")

    monkeypatch.setattr(publish.Path, "mkdir", with_full_disk)
    refused(folders, MergeError, "files cannot be read or written.*No space left", alpha)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
@pytest.mark.parametrize("name", ["a/model.safetensors", "b/config.json", "b/" + INDEX])
def test_source_changes_during_the_merge(folders, monkeypatch, alpha, name):
    copyfile, before = shutil.copyfile, content(folders)

    def touching(source, target):
        copyfile(source, target)
        os.utime(folders / name, ns=(0, 0))

    monkeypatch.setattr(shutil, "copyfile", touching)
    refused(folders, MergeError, "source changed during the merge", alpha)
    assert content(folders) == before


def test_source_shrinks_during_the_merge(folders, monkeypatch):
    merge = streaming._merge_tensor

    def cutting(*arguments):
        os.truncate(folders / "a" / WEIGHTS, 700)
        merge(*arguments)

    monkeypatch.setattr(streaming, "_merge_tensor", cutting)
    with pytest.raises(MergeError, match="source changed during the merge"):
        interpolate_checkpoints(folders / "a", folders / "b", folders / "out", 0.5, overwrite=True)
    assert content(folders / "out") == {"old": b"old"} and not list(folders.glob(".hf_robust-tmp-*"))


def test_where_folders_cannot_be_exchanged(folders, monkeypatch):
    monkeypatch.setattr(publish, "EXCHANGE", 1 << 10)  # a flag that no system knows
    refused(folders, MergeError, "cannot be replaced in one step here.*choose another")
    monkeypatch.setattr(publish.ctypes, "CDLL", lambda name, use_errno: object())
    refused(folders, MergeError, "cannot be replaced in one step here.*choose another")
    interpolate_checkpoints(folders / "a", folders / "b", folders / "new", 1)
    assert same(load(folders / "new"), pair()[1])
