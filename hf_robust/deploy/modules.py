# SPDX-License-Identifier: Apache-2.0
"""A trained task as plain modules: merged, in float32 on the CPU, and with nothing to decide in a forward."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..encoders.class_embeds import evaluating
from ..encoders.dual_encoder import base_model, family, image_embeds, text_embeds
from ..encoders.pretrained import ADAPTERS
from ..errors import ConfigError, NonFiniteError
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.task import Task
from .positions import resized_positions


class ImageEncoder(nn.Module):
    """Images to unit vectors.

    Args:
        model: a plain dual encoder.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> Tensor:
        """Returns `(batch, dim)`, L2-normalised; arguments are those of `image_embeds`."""
        return image_embeds(self.model, pixel_values, pixel_attention_mask, spatial_shapes)


class TextEncoder(nn.Module):
    """Tokenised texts to unit vectors.

    Args:
        model: a plain dual encoder.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns `(texts, dim)`, L2-normalised; arguments are those of `text_embeds`."""
        return text_embeds(self.model, input_ids, attention_mask)


class ImageClassifier(nn.Module):
    """Images to logits, with a linear head.

    Args:
        encoder: of the images.
        weight: of the head, `(classes, dim)`.
        bias: of the head, `(classes,)` or 0-dim; None for none.
        class_names: one per class.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, encoder: ImageEncoder, weight: Tensor, bias: Tensor | None, class_names: list[str]) -> None:
        super().__init__()
        self.encoder, self.class_names = encoder, class_names
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> Tensor:
        """Returns `(batch, classes)`; arguments are those of `image_embeds`."""
        logits = self.encoder(pixel_values, pixel_attention_mask, spatial_shapes) @ self.weight.T
        return logits if self.bias is None else logits + self.bias


@torch.no_grad()
def image_classifier(classifier: Task) -> ImageClassifier:
    """Returns a classifier as it answers now: the vision tower, and its class names baked into a linear head.

    Adapters are merged in a copy, which is in float32, on the CPU and in eval mode; the classifier itself stays as it
    is. Inside `classifier.classes(names)` the head is that of the names.

    Args:
        classifier: a `ZeroShotClassifier`, or a task made of it: `SeveralLabels`, `FLYP`.

    Raises:
        ConfigError: it is no such task, or its adapters cannot be merged.
        NonFiniteError: a value of the model or the head is NaN or infinite.

    Example:
        >>> plain = image_classifier(classifier)
        >>> program = torch.export.export(plain, (pixel_values,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    """
    if not isinstance(classifier, ZeroShotClassifier):
        allowed, remedy = "a task with class names", "Take the towers: to_onnx(task, 'folder', parts='towers')."
        raise ConfigError("there is no head to export", got=type(classifier).__name__, allowed=allowed, remedy=remedy)
    with evaluating(classifier):
        weight, bias = classifier.linear_head()
    encoder = ImageEncoder(merged_copy(classifier.model))
    _check_finite("weight of the head", weight)
    if bias is not None:
        _check_finite("bias of the head", bias)
    head = _plain(weight), None if bias is None else _plain(bias), list(classifier.class_names)
    return ImageClassifier(encoder, *head).eval()


def towers(task: Task) -> tuple[ImageEncoder, TextEncoder]:
    """Returns the two towers of a task as it embeds now, merged in one copy, as `image_classifier` is.

    Args:
        task: any task.

    Raises:
        ConfigError: its adapters cannot be merged.
        NonFiniteError: a value is NaN or infinite.

    Example:
        >>> images, texts = towers(classifier)
        >>> texts(**tokenize(classifier.processor, ["a photo of a cat."], classifier.model)).shape
        torch.Size([1, 512])
    """
    merged = merged_copy(task.model)
    return ImageEncoder(merged).eval(), TextEncoder(merged).eval()


def merged_copy(model: nn.Module) -> PreTrainedModel:
    """Returns a copy of a dual encoder with its active adapters merged, in float32 on the CPU, and not trainable.

    Args:
        model: a dual encoder, plain or wrapped by PEFT; it stays as it is.

    Raises:
        ConfigError: the model is no supported dual encoder or is quantised, its adapters are switched off, or they are
            not those of a `PeftModel`.
        NonFiniteError: a value is NaN or infinite, of the model or once merged.

    Example:
        >>> merged_copy(PeftModel.from_pretrained(clip, "my-adapter")).save_pretrained("for-everybody")
    """
    family(model)
    _check_mergeable(model)
    copied: Any = copy.deepcopy(model).cpu().float()  # before merging, which in 16 bits rounds away what was learned
    if isinstance(copied, PeftModel):
        copied = copied.merge_and_unload()
    for name, tensor in copied.state_dict().items():
        _check_finite(name, tensor)
    kinds = {module.config._attn_implementation for module in copied.modules() if isinstance(module, PreTrainedModel)}
    if kinds - {"sdpa", "eager"}:  # kernels of GPUs, for 16 bits
        copied.set_attn_implementation("eager")
    if copied.config.model_type == "siglip2":
        copied.vision_model.embeddings.resize_positional_embeddings = resized_positions
    return cast(PreTrainedModel, copied.eval().requires_grad_(False))


def _check_mergeable(model: nn.Module) -> None:
    base = base_model(model)
    if getattr(base.config, "quantization_config", None) is not None:
        remedy = "Load it without quantisation; an ONNX file can be quantised by onnxruntime.quantization."
        raise ConfigError("a quantised model cannot be exported", where="quantization_config", remedy=remedy)
    layers = [(name, module) for name, module in base.named_modules() if isinstance(module, ADAPTERS)]
    if layers and not isinstance(model, PeftModel):
        remedy = "Load it with PeftModel.from_pretrained(base, folder), which can merge it."
        raise ConfigError("adapters of load_adapter cannot be merged", where=layers[0][0], remedy=remedy)
    off = [name for name, module in layers if module.disable_adapters]
    if off:
        remedy = "Leave disable_adapter(); for the model before its training, export that one."
        raise ConfigError("adapters are switched off, and merging would apply them", where=off[0], remedy=remedy)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        remedy = "Look for weights that are NaN; an earlier checkpoint may be whole."
        raise NonFiniteError("a value to export is NaN or infinite", where=name, remedy=remedy)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float().clone()
