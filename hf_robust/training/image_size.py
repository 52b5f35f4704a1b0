# SPDX-License-Identifier: Apache-2.0
"""The processor of a training with images of another size than in pre-training."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import ProcessorMixin

from ..data.collator import ImageCollator
from ..encoders.image_size import with_image_size
from ..errors import ConfigError
from ..tasks.task import Task


def processor_of_size(
    image_size: int | None, processor: ProcessorMixin, model: nn.Module, data_collator: Any
) -> ProcessorMixin:
    """Returns the processor that makes images of `image_size`, which a data collator must make as well.

    Args:
        image_size: height and width in pixels; None returns the processor as it is.
        processor: the model's processor.
        model: a task, or a dual encoder, plain or wrapped by PEFT.
        data_collator: the one that was given; None for the trainer's own.

    Raises:
        ConfigError: what `with_image_size` raises, or the data collator has another image processor.
    """
    sized = with_image_size(processor, image_size, model.model if isinstance(model, Task) else model)
    if image_size is None or data_collator is None:
        return sized
    expected = sized.image_processor.to_json_string()
    if not isinstance(data_collator, ImageCollator) or data_collator.image_processor.to_json_string() != expected:
        remedy = "Use ImageCollator(with_image_size(processor, image_size, model)). With a collator of another class "
        remedy += "leave image_size at None, and pass such a processor to the trainer too."
        what, got = "the data collator makes images of another size", type(data_collator).__name__
        raise ConfigError(what, where=f"image_size={image_size}", got=got, remedy=remedy)
    return sized
