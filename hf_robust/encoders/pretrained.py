# SPDX-License-Identifier: Apache-2.0
"""The pre-trained model θ₀ inside a model with adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from PIL import Image
from torch import Tensor, nn
from transformers import ProcessorMixin

from ..errors import ConfigError
from .class_embeds import evaluating
from .dual_encoder import base_model, image_embeds, text_embeds, tokenize, tower_modules

ADAPTERS = BaseTunerLayer | AuxiliaryTrainingWrapper
WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.|$)")  # what PEFT puts into the names of the base's tensors


@contextmanager
def pretrained_weights(model: nn.Module) -> Iterator[None]:
    """Inside the context the model is θ₀ in eval mode: its adapters are off; afterwards all is as it was.

    Args:
        model: a model with adapters, by PEFT or by transformers' `load_adapter`, or one that is θ₀ itself.

    Example:
        >>> with torch.no_grad(), pretrained_weights(model):
        ...     before = image_embeds(model, pixel_values)
    """
    layers: Any = [
        module for module in model.modules() if isinstance(module, ADAPTERS) and not module.disable_adapters
    ]
    # PEFT lets all of an active adapter require gradients afterwards, also in a tower the head froze
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluating(model):
            for layer in layers:
                layer.enable_adapters(False)
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)


def pretrained_tensors(model: nn.Module, towers: Literal["vision", "both"] = "both") -> Iterator[tuple[str, Tensor]]:
    """Yields θ₀'s tensors by the names they have without adapters.

    Args:
        model: a dual encoder, plain or wrapped by PEFT; without adapters it is θ₀ itself.
        towers: of all of it, or of the vision tower.

    Example:
        >>> next(pretrained_tensors(clip))[0]
        'logit_scale'
    """
    base = base_model(model)
    prefix = model.base_model.prefix if isinstance(model, PeftModel) else None
    parts = [""] if towers == "both" else tower_modules(base, towers)
    with pretrained_weights(model):
        for part in parts:
            for name, tensor in base.get_submodule(part).state_dict(prefix=f"{part}." if part else "").items():
                if prefix is None or (prefix not in name and ".modules_to_save." not in name):
                    yield WRAPPERS.sub("", name), tensor


def is_pretrained(model: nn.Module, processor: ProcessorMixin) -> bool:
    """Whether a model's adapters, where it has any, change nothing: by the embeddings of one image and one text.

    Args:
        model: a dual encoder, plain or with adapters.
        processor: its processor.

    Example:
        >>> is_pretrained(get_peft_model(clip, LoraConfig(target_modules="all-linear")), processor)
        True
    """
    if not any(isinstance(module, ADAPTERS) for module in model.modules()):
        return True
    device = base_model(model).device
    image = processor.image_processor(images=[Image.new("RGB", (32, 32), "grey")], return_tensors="pt").to(device)
    text = {name: tensor.to(device) for name, tensor in tokenize(processor, ["a photo"], model).items()}
    with torch.no_grad(), evaluating(model):
        now = image_embeds(model, **image), text_embeds(model, **text)
        with pretrained_weights(model):
            before = image_embeds(model, **image), text_embeds(model, **text)
    return all(torch.allclose(*both, rtol=0, atol=1e-5) for both in zip(now, before, strict=True))


def check_vision_is_pretrained(model: nn.Module, what: str) -> None:
    """Refuses a vision tower that is trained or has adapters.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        what: what needs the vision tower as it was, for the message.

    Raises:
        ConfigError: a parameter of it requires gradients, or one of its modules has an adapter.
    """
    base = base_model(model)
    parts = [(name, base.get_submodule(name)) for name in tower_modules(model, "vision")]
    changed = [f"{part}.{name}" for part, m in parts for name, p in m.named_parameters() if p.requires_grad]
    changed += [f"{part}.{name}" for part, m in parts for name, one in m.named_modules() if isinstance(one, ADAPTERS)]
    if changed:
        remedy = (
            "Adapt the text tower alone: context_prompt(...), SAFTConfig(towers='text'), ACLIPConfig(towers='text')."
        )
        raise ConfigError(f"{what}, so the vision tower must stay as it is", got=changed[:3], remedy=remedy)
