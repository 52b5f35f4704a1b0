# SPDX-License-Identifier: Apache-2.0
"""ONNX files answer as PyTorch does, for batches of any size."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor

from hf_robust import Identities, ImageTextPairs, SeveralLabels, ZeroShotClassifier, to_onnx, with_image_size
from hf_robust.encoders.dual_encoder import image_embeds, logit_bias, logit_scale, text_embeds, tokenize
from hf_robust.errors import ConfigError
from hf_robust.tasks.task import Task

from ..methods import METHODS
from ..tiny_models import image_dataset, tiny_lora, tiny_model, tiny_processor
from .models import NAMES, tuned

BATCHES = (1, 2, 5)  # the example has 2
TEXTS = ["a cat", "two dogs on a mat", "x", 10 * "a b ", "an owl."]
CLOSE = 1e-4  # of embeddings and probabilities, absolute; of logits, relative to the largest


def clip_live_saft() -> Task:
    model = tuned(METHODS[0])
    larger = with_image_size(tiny_processor("clip"), 64, model)
    return ZeroShotClassifier(model, larger, NAMES, "photo", head="live")


def siglip_several_labels() -> Task:
    return SeveralLabels(tiny_model("siglip"), tiny_processor("siglip"), NAMES, head="frozen", threshold=0.5)


def vision_text_trainable_lora() -> Task:
    family = "vision-text-dual-encoder"
    model = tiny_lora(tiny_model(family), init_lora_weights=False)
    return ZeroShotClassifier(model, tiny_processor(family), NAMES, head="trainable")


def metaclip_2_pairs_aclip() -> Task:
    return ImageTextPairs(tuned(METHODS[1], "metaclip_2"), tiny_processor("metaclip_2"))


def siglip2_identities() -> Task:
    return Identities(tiny_model("siglip2"), tiny_processor("siglip2"), ["a", "b"])


CLASSIFIERS = [clip_live_saft, vision_text_trainable_lora]  # the others below


def pictures(task: Task, n: int) -> dict[str, Tensor]:
    images = [row["image"].resize((30 + 20 * i, 50)) for i, row in enumerate(image_dataset(n, NAMES, seed=n))]
    return dict(task.processor.image_processor(images=images, return_tensors="pt"))


def run(file: Path, inputs: dict[str, Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def metadata(file: Path) -> dict:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}


def largest_difference(one: np.ndarray, other: Tensor) -> float:
    return float(np.abs(one - other.numpy()).max())


@pytest.mark.parametrize("build", CLASSIFIERS)
def test_one_file_from_pixels_to_logits(build: Callable[[], Task], tmp_path: Path) -> None:
    task = build().eval()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    to_onnx(task, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    for n in BATCHES:
        inputs = pictures(task, n)
        with torch.no_grad():
            expected = task(**inputs).logits
        found = run(tmp_path / "model.onnx", inputs)
        assert found.shape == (n, len(NAMES)) and found.dtype == np.float32
        assert largest_difference(found, expected) < CLOSE * expected.abs().max()
        assert largest_difference(torch.tensor(found).softmax(-1).numpy(), expected.softmax(-1)) < CLOSE
    after = task.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("build", [metaclip_2_pairs_aclip, siglip2_identities])
def test_two_files_from_images_and_texts_to_unit_vectors(build: Callable[[], Task], tmp_path: Path) -> None:
    task = build().eval()
    to_onnx(task, tmp_path / "towers", parts="towers")
    processor = AutoProcessor.from_pretrained(tmp_path / "towers")
    for n in BATCHES:
        images, texts = pictures(task, n), tokenize(task.processor, TEXTS[:n], task.model)
        with torch.no_grad():
            expected = image_embeds(task.model, **images), text_embeds(task.model, **texts)
        for name, inputs, embeds in zip(("image", "text"), (images, texts), expected, strict=True):
            found = run(tmp_path / "towers" / f"{name}_encoder.onnx", inputs)
            assert found.shape == embeds.shape and largest_difference(found, embeds) < CLOSE
        assert torch.equal(tokenize(processor, TEXTS[:n], task.model)["input_ids"], texts["input_ids"])
    about, bias = metadata(tmp_path / "towers" / "text_encoder.onnx"), logit_bias(task.model)
    assert about["logit_scale"] == pytest.approx(logit_scale(task.model).item())
    assert about["logit_bias"] == pytest.approx(0.0 if bias is None else bias.item())
    assert (about["padding"], about["max_length"]) == (("longest", 77) if bias is None else ("max_length", 64))


def test_the_file_says_how_it_is_used_and_answers_among_other_names(tmp_path: Path) -> None:
    """One export for all: of several labels, as another set's classes, in place of an older file."""
    task, file = siglip_several_labels().eval(), tmp_path / "new" / "model.onnx"
    file.parent.mkdir()
    file.write_text("older")
    with task.classes(["owl", "cat"]), torch.no_grad():
        to_onnx(task, str(file))
        for n in BATCHES:
            inputs = pictures(task, n)
            expected = task(**inputs).logits
            assert largest_difference(run(file, inputs), expected) < CLOSE * expected.abs().max()
    settings = json.loads(task.processor.image_processor.to_json_string())
    answers = {"class_names": ["owl", "cat"], "activation": "sigmoid", "threshold": 0.5}
    assert metadata(file) == {**answers, "image_processor": settings}
    assert file.stat().st_mode & 0o444 == 0o444 & file.parent.stat().st_mode


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, task: Any, name: str = "model.onnx", parts: str = "classifier") -> None:
        with pytest.raises(ConfigError, match=match):
            to_onnx(task, tmp_path / name, parts)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())

    task = siglip_several_labels()
    refused("no head to export.*got 'Identities'.*parts='towers'", siglip2_identities())
    refused("no head to export.*got 'SiglipModel'", task.model)
    refused("no head to export", siglip2_identities(), "new/deep/model.onnx")
    refused("not a supported dual encoder", SimpleNamespace(model=torch.nn.Linear(2, 2)), "new/deep", "towers")
    refused("no name of an ONNX file.*'.*model'; allowed a file", task, "model")
    refused("no name of a folder", task, parts="towers")
    refused("unknown parts.*got 'both'; allowed 'classifier', 'towers'", task, parts="both")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(r"'onnxscript' is not installed. pip install 'hf_robust\[onnx\]'", task)


@pytest.mark.parametrize(("name", "parts"), [("a/model.onnx", "classifier"), ("a/b", "towers"), ("a/b/c", "towers")])
def test_nothing_is_written_below_a_file(tmp_path: Path, name: str, parts: Any) -> None:
    (tmp_path / "a").write_text("file")
    with pytest.raises(ConfigError, match=r"no folder \(at path\): got '.*/a'"):
        to_onnx(siglip_several_labels(), tmp_path / name, parts)
    assert (tmp_path / "a").read_text() == "file"


def test_a_failing_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Program(torch.onnx.ONNXProgram):
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.model = SimpleNamespace(metadata_props={})

        def save(self, path: Path) -> None:  # type: ignore[override]
            path.write_text("half")
            raise OSError("disk full")

    (tmp_path / "model.onnx").write_text("older")
    monkeypatch.setattr(torch.onnx, "export", Program)
    with pytest.raises(OSError, match="disk full"):
        to_onnx(siglip_several_labels(), tmp_path / "model.onnx")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]
