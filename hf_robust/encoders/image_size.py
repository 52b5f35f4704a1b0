# SPDX-License-Identifier: Apache-2.0
"""Images of another size than in pre-training: the processor that makes them."""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor, ProcessorMixin

from ..errors import ConfigError
from .dual_encoder import INTERPOLATING, SIZE_FREE, base_model, check_image_size, family


def with_image_size(processor: ProcessorMixin, image_size: int | None, model: nn.Module) -> ProcessorMixin:
    """Returns a processor whose images are squares of another size.

    Larger images show more detail and cost more: the number of patches grows with the square of the size. The model
    needs no change, as `image_embeds` has transformers interpolate the positions. What the image processor cuts off at
    the borders stays the same fraction.

    Args:
        processor: the model's processor; it is not changed, and shares its tokenizer with the returned one.
        image_size: height and width in pixels; None returns the processor as it is.
        model: a dual encoder, plain or wrapped by PEFT.

    Raises:
        ConfigError: the size is no positive multiple of the patch size; the vision tower is not known to take another
            size than in pre-training; the image processor does not resize, or makes no squares (SigLIP 2's keeps the
            shape of an image and limits the number of patches); or PEFT's adapter on the positions would have no part
            in interpolated ones.

    Example:
        >>> larger = with_image_size(processor, 448, clip)
        >>> larger.image_processor.crop_size["height"], processor.image_processor.crop_size["height"]
        (448, 224)
    """
    if image_size is None:
        return processor
    images = pixels_of(processor)
    _check_tower(model, images)
    if isinstance(image_size, bool) or not isinstance(image_size, int):
        raise ConfigError("image size is no number of pixels", got=image_size, allowed="a positive integer")
    check_image_size(model, image_size, image_size)
    sized = copy.copy(processor)
    sized.image_processor = _resized(processor.image_processor, image_size, now=_side(images))
    return sized


def pixels_of(processor: ProcessorMixin) -> Tensor:
    """Returns what the processor makes of an image, `(1, channels, height, width)`, for SigLIP 2 its patches.

    Args:
        processor: a dual encoder's processor.
    """
    blank = Image.new("RGB", (60, 40))
    return processor.image_processor(images=[blank], return_tensors="pt")["pixel_values"]


def _side(images: Tensor) -> int:
    height, width = images.shape[-2:]
    if height != width:
        remedy = "Set its do_resize and do_center_crop."
        raise ConfigError("the image processor does not make squares", got=(height, width), remedy=remedy)
    return height


def _resized(image_processor: BaseImageProcessor, image_size: int, now: int) -> BaseImageProcessor:
    settings: dict[str, Any] = image_processor.to_dict()
    if not settings.get("do_resize"):
        raise ConfigError("the image processor does not resize", where="do_resize", got=settings.get("do_resize"))
    settings["size"] = {edge: round(pixels * image_size / now) for edge, pixels in settings["size"].items()}
    if settings.get("crop_size") is not None:
        settings["crop_size"] = {"height": image_size, "width": image_size}
    return type(image_processor).from_dict(settings)


def _check_tower(model: nn.Module, images: Tensor) -> None:
    family(model)  # refuses what is no dual encoder
    base = base_model(model)
    if images.dim() != 4:
        remedy = "Set processor.image_processor.max_num_patches instead: 1024 patches of 16 pixels are 512 by 512."
        raise ConfigError("images keep their shape and have no size in pixels", where="image_size", remedy=remedy)
    tower = base.config.vision_config.model_type
    if tower not in INTERPOLATING + SIZE_FREE:
        allowed = ", ".join(INTERPOLATING + SIZE_FREE)
        what = "the vision tower is not known to take images of another size"
        raise ConfigError(what, where="image_size", got=tower, allowed=allowed)
    for name, module in base.vision_model.named_modules():
        peft_layer = isinstance(module, BaseTunerLayer) and type(module).__module__.startswith("peft.")
        if peft_layer and isinstance(module.get_base_layer(), nn.Embedding):
            what, where = "an adapter of PEFT has no part in interpolated positions", f"vision_model.{name}"
            raise ConfigError(what, where=where, remedy="Leave the module out of target_modules.")
