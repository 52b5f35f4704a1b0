# SPDX-License-Identifier: Apache-2.0
"""ONNX files answer as PyTorch does, for batches of any size."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from hf_robust import FLYP, ACLIPConfig, Identities, SeveralLabels, ZeroShotClassifier, to_onnx, with_image_size
from hf_robust.encoders.dual_encoder import image_embeds, logit_bias, logit_scale, text_embeds, tokenize
from hf_robust.errors import ConfigError
from hf_robust.tasks.task import Task

from ..methods import METHODS, prepared, train
from ..methods import batch as training_batch
from ..tiny_models import image_dataset, tiny_lora, tiny_model, tiny_processor

NAMES = ["cat", "dog", "owl"]
BATCHES = (1, 2, 5)  # the example has 2
CLOSE = 1e-4  # of embeddings and probabilities, absolute; of logits, relative to the largest


def tuned(index: int, family: str) -> PeftModel:
    model = prepared(METHODS[index], tiny_model(family), family)
    train(model, training_batch(family), steps=2)
    return model


def larger(processor: ProcessorMixin, model: PreTrainedModel) -> ProcessorMixin:
    return with_image_size(processor, 64, model)


def clip_live_saft() -> Task:
    model = tuned(0, "clip")
    return ZeroShotClassifier(model, larger(tiny_processor("clip"), model), NAMES, "photo", head="live")


def siglip_several_labels() -> Task:
    return SeveralLabels(tiny_model("siglip"), tiny_processor("siglip"), NAMES, head="frozen")


def siglip2_frozen() -> Task:
    return ZeroShotClassifier(tiny_model("siglip2"), tiny_processor("siglip2"), NAMES, head="frozen")


def metaclip_2_half() -> Task:
    return FLYP(tuned(1, "metaclip_2"), tiny_processor("metaclip_2"), NAMES)


def vision_text_trainable_lora() -> Task:
    family = "vision-text-dual-encoder"
    model = tiny_lora(tiny_model(family), init_lora_weights=False)
    return ZeroShotClassifier(model, tiny_processor(family), NAMES, head="trainable")


CLASSIFIERS = [
    clip_live_saft,
    siglip_several_labels,
    siglip2_frozen,
    metaclip_2_half,
    vision_text_trainable_lora,
]


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
        print(build.__name__, n, largest_difference(found, expected), expected.abs().max())
        assert found.shape == (n, len(NAMES)) and found.dtype == np.float32
        assert largest_difference(found, expected) < CLOSE * expected.abs().max()
        assert largest_difference(torch.tensor(found).softmax(-1).numpy(), expected.softmax(-1)) < CLOSE
    after = task.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
