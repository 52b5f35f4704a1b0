# SPDX-License-Identifier: Apache-2.0
"""`torch.export` takes tasks and their plain modules, for batches of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_robust import ZeroShotClassifier
from hf_robust.deploy.modules import image_classifier

from ..methods import METHODS
from ..tiny_models import tiny_batch, tiny_model, tiny_processor
from .models import NAMES, tuned


def classifier(model: nn.Module, family: str, head: Any) -> ZeroShotClassifier:
    return ZeroShotClassifier(model, tiny_processor(family), NAMES, head=head).eval()


@torch.no_grad()
def assert_exports(module: nn.Module, family: str, task: ZeroShotClassifier) -> None:
    inputs = tiny_batch(family, 2)
    shapes = {name: {0: torch.export.Dim("batch")} for name in inputs}
    exported = torch.export.export(module, (), inputs, dynamic_shapes=shapes).module()
    for n in (1, 2, 5):
        other = tiny_batch(family, n, seed=4)
        found = exported(**other)
        logits = found if isinstance(found, torch.Tensor) else found.logits
        torch.testing.assert_close(logits, task(**other).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["clip", "siglip2"])
def test_the_image_part(family: str) -> None:
    """Of the other families the tests of ONNX export it."""
    task = classifier(tiny_model(family), family, "live")
    assert_exports(image_classifier(task), family, task)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_task_itself_with_its_adapter(method: Any) -> None:
    task = classifier(tuned(method), "clip", "frozen")
    assert_exports(task, "clip", task)
