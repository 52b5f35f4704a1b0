# SPDX-License-Identifier: Apache-2.0
"""Tiny CLIP models with an adapter of every method, which has changed something."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_robust import context_prompt
from hf_robust.encoders.dual_encoder import image_embeds, text_embeds, tokenize

from ..methods import METHODS, Method, batch, prepared, train
from ..tiny_models import LETTERS, tiny_batch, tiny_lora, tiny_model, tiny_processor

NAMES = ["cat", "dog", "owl"]


def tuned(method: Method, family: str = "clip") -> PeftModel:
    """The model after two steps of a training."""
    model = prepared(method, tiny_model(family), family)
    train(model, batch(family), steps=2)
    return model


def lora() -> PeftModel:
    """A model with LoRA, and with a module that is trained whole."""
    model = tiny_lora(tiny_model("clip"), init_lora_weights=False, modules_to_save=["visual_projection"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(-1)
    return model


def context() -> PeftModel:
    """A model with one learned word."""
    return context_prompt(tiny_model("clip"), tiny_processor("clip"), 1, None, NAMES)[0].eval()


MODELS: dict[str, Callable[[], PeftModel]] = {method.name: partial(tuned, method) for method in METHODS}
MODELS |= {"LoRA": lora, "context": context}
all_models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


@torch.no_grad()
def embeds(model: nn.Module) -> Tensor:
    """Of images and of prompts, one of which has the word that `context` has learned; one below the other."""
    texts = [f"{letter} cat." for letter in LETTERS if letter.isalpha()]
    prompts = tokenize(tiny_processor("clip"), texts, model)
    return torch.cat([image_embeds(model, **tiny_batch("clip", 3)), text_embeds(model, **prompts)])
