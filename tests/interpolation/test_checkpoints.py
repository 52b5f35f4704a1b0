# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from hf_robust.interpolation import streaming
from hf_robust.interpolation.arithmetic import interpolate_tensor
from hf_robust.interpolation.checkpoints import interpolate_checkpoints
from tests.interpolation.folders import content, load, pair, same, save
from tests.tiny_models import FAMILIES, tiny_batch, tiny_model, tiny_processor


def merged(first, second, alpha):
    return {name: interpolate_tensor(first[name], second[name], alpha) for name in second}


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(streaming, "SLICE", 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dual_encoder_equals_the_official_formula(tmp_path, family):
    models = [tiny_model(family, seed) for seed in (0, 1)]
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
    tiny_processor(family).save_pretrained(tmp_path / "b")
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.3)
    model, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    first, second = (one.state_dict() for one in models)
    for name, tensor in model.state_dict().items():
        expected = (1 - 0.3) * first[name].double() + 0.3 * second[name].double()
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-8)
    AutoProcessor.from_pretrained(tmp_path / "out")
    model.get_image_features(**tiny_batch(family, 1))


@pytest.mark.parametrize("first", ["1GB", "60KB"])
@pytest.mark.parametrize("second", ["1GB", "90KB"])
def test_shards_are_those_of_the_fine_tuned_side(tmp_path, first, second):
    models = [tiny_model("clip", seed) for seed in (0, 1)]
    for name, model, size in zip("ab", models, (first, second), strict=True):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
    assert (len(list((tmp_path / "b").glob("*.safetensors"))) > 1) == (second != "1GB")
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.75)
    assert content(tmp_path / "out").keys() == content(tmp_path / "b").keys()
    expected = merged(*(model.state_dict() for model in models), 0.75)
    assert same(AutoModel.from_pretrained(tmp_path / "out").state_dict(), expected)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_layout_and_slices_do_not_matter(seed, alpha, first_shards, second_shards, values):
    first, second = pair(seed)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "SLICE", values)
        folder = Path(name)
        save(folder / "a", dict(reversed(first.items())), first_shards)
        save(folder / "b", second, second_shards)
        interpolate_checkpoints(folder / "a", folder / "b", folder / "out", alpha)
        assert same(load(folder / "out"), merged(first, second, alpha))


@pytest.mark.parametrize("alpha, side", [(0, "a"), (1, "b")])
def test_the_ends_are_copies(tmp_path, alpha, side):
    first, second = pair()
    first["tower.weight"][0], second["tower.weight"][0] = float("nan"), float("inf")
    save(tmp_path / "a", first, shards=2)
    save(tmp_path / "b", second, shards=3)
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", alpha)
    assert content(tmp_path / "out") == content(tmp_path / side)


def test_only_known_files_are_copied_and_metadata_kept(tmp_path):
    save(tmp_path / "a", pair()[0])
    save(tmp_path / "b", pair()[1])
    kept = {"tokenizer.json": "{}", "merges.txt": "a b", "chat_template.jinja": "", "classifier.json": "{}"}
    dropped = {"optimizer.pt": "x", "pytorch_model.bin": "x", "training_args.bin": "x", "README.md": "x", ".git": "x"}
    for name, text in {**kept, **dropped}.items():
        (tmp_path / "b" / name).write_text(text)
    (tmp_path / "b" / "config.json").write_text('{"model_type": "clip", "of": "b"}')
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.5)
    written = content(tmp_path / "out")
    assert written.keys() == {"config.json", "model.safetensors", *kept}
    assert {name: written[name].decode() for name in kept} == kept and b'"of": "b"' in written["config.json"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_trained_head_is_interpolated(tmp_path):
    heads = [{"class_head.weight": torch.randn(2, 3), "class_head.bias": torch.randn(2)} for _ in range(2)]
    for name, tensors, head in zip("ab", pair(), heads, strict=True):
        save_file(head, save(tmp_path / name, tensors) / "classifier.safetensors")
        (tmp_path / name / "classifier.json").write_text('{"class_names": ["x", "y"]}')
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.4)
    assert same(load_file(tmp_path / "out" / "classifier.safetensors"), merged(*heads, 0.4))
    assert same(load(tmp_path / "out"), merged(*pair(), 0.4) | merged(*heads, 0.4))
    assert json.loads((tmp_path / "out" / "classifier.json").read_text()) == {"class_names": ["x", "y"]}


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_fisher_information_weights_what_it_covers(tmp_path, small_slices, alpha):
    first, second = pair()
    save(tmp_path / "a", first, shards=2)
    save(tmp_path / "b", second)
    names = ["tower.weight", "tower.half"]
    fishers = [{name: torch.rand(first[name].shape) for name in names} for _ in range(2)]
    files = tmp_path / "f0.safetensors", tmp_path / "f1.safetensors"
    for fisher, file in zip(fishers, files, strict=True):
        save_file(fisher, file)
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", alpha, fishers=files)
    expected = merged(first, second, alpha)
    for name in names:
        weights = fishers[0][name], fishers[1][name]
        expected[name] = interpolate_tensor(first[name], second[name], alpha, weights)
    assert same(load(tmp_path / "out"), expected)
    assert same(expected, merged(first, second, alpha)) == (alpha in (0, 1))


@pytest.mark.parametrize("alpha", [0.5, 1])
def test_position_ids_of_older_transformers_may_be_missing(tmp_path, alpha):
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    first, second = pair()
    save(tmp_path / "new", first)
    save(tmp_path / "old", {**second, **ids})
    interpolate_checkpoints(tmp_path / "new", tmp_path / "old", tmp_path / "out", alpha)
    assert same(load(tmp_path / "out"), {**merged(first, second, alpha), **ids})
    interpolate_checkpoints(tmp_path / "old", tmp_path / "new", tmp_path / "other", alpha)
    assert same(load(tmp_path / "other"), merged(second, first, alpha))


def test_links_to_files_are_followed(tmp_path):
    """As in the cache of the Hub, whose files have no names of their own."""
    save(tmp_path / "blobs", pair()[0])
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        (tmp_path / "snapshot" / path.name).symlink_to(path.rename(tmp_path / "blobs" / str(number)))
    save(tmp_path / "b", pair()[1])
    interpolate_checkpoints(tmp_path / "snapshot", tmp_path / "b", tmp_path / "out", 0)
    assert same(load(tmp_path / "out"), pair()[0])
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_an_output_is_replaced_only_on_request_and_as_a_whole(tmp_path):
    for name, tensors in zip("ab", pair(), strict=True):
        save(tmp_path / name, tensors)
    out = tmp_path / "deep" / "out"
    interpolate_checkpoints(str(tmp_path / "a"), str(tmp_path / "b"), str(out), 0.5)
    (out / "model-00001-of-00002.safetensors").write_text("stale")
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", out, 0.5, overwrite=True)
    assert content(out).keys() == {"config.json", "model.safetensors"}
    shutil.rmtree(out)
    out.mkdir()  # an empty folder needs no permission
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", out, 0.5)
    assert same(load(out), merged(*pair(), 0.5))
    assert os.listdir(out.parent) == ["out"]


def test_a_link_to_the_output_stays_a_link(tmp_path):
    for name, tensors in zip("ab", pair(), strict=True):
        save(tmp_path / name, tensors)
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "disk" / "out" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "link", 0.5, overwrite=True)
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "disk") == ["out"]
    assert content(tmp_path / "disk" / "out").keys() == {"config.json", "model.safetensors"}


def test_modes_are_those_of_new_files(tmp_path):
    for name, tensors in zip("ab", pair(), strict=True):
        for path in save(tmp_path / name, tensors).iterdir():
            path.chmod(0o400)
    mask = os.umask(0o027)
    try:
        interpolate_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.5)
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {"config.json": 0o640, "model.safetensors": 0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
