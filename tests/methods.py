# SPDX-License-Identifier: Apache-2.0
"""The methods every generic check runs over, and the tiny classification task they run on."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn
from torch.nn import functional as F

from hf_robust import ACLIPConfig, RAdapterConfig, SAFTConfig, saft_unselected, select_saft
from hf_robust.encoders.dual_encoder import base_model, image_embeds, logit_bias, logit_scale, text_embeds, tokenize

from .tiny_models import FAMILIES, tiny_batch, tiny_model, tiny_processor

CLIP = "clip"
all_families = pytest.mark.parametrize("family", FAMILIES)
PROMPTS = ["a photo of a cat.", "a photo of a dog.", "a photo of an owl."]
IMAGES = 4
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """One method of the library.

    Args:
        name: shown by pytest.
        config: makes the method's config, with settings that leave a tiny model something to train.
        no_first_gradient: kinds of its tensors whose gradient is zero in the first step.
    """

    name: str
    config: Callable[[], PeftConfig]
    no_first_gradient: tuple[str, ...] = ()


METHODS: list[Method] = [
    Method("SAFT", lambda: SAFTConfig(density=0.02, exclude_input_embeddings=False)),
    Method("A-CLIP", ACLIPConfig),
    # five steps must show, in the average too, and other dropout must draw the same
    Method("R-Adapter", lambda: RAdapterConfig(scale=1.0, average_decay=0.5, drop_path=0.0), ("radapter_scale",)),
]


@functools.cache
def batch(family: str, seed: int = 0) -> Batch:
    """Four pictures, their labels, and the tokens of three class prompts."""
    prompts = tokenize(tiny_processor(family), PROMPTS, tiny_model(family))
    labels = torch.tensor([(index + seed) % len(PROMPTS) for index in range(IMAGES)])
    return {**tiny_batch(family, IMAGES, seed=seed), **prompts, "labels": labels}


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """`(images, prompts)`, in float32 or better."""
    texts = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "attention_mask")}
    images = {name: tensor for name, tensor in batch.items() if name not in texts and name != "labels"}
    images["pixel_values"] = images["pixel_values"].to(base_model(model).logit_scale.dtype)
    found = logit_scale(model) * image_embeds(model, **images) @ text_embeds(model, **texts).T
    bias = logit_bias(model)
    return found if bias is None else found + bias


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(logits(model, batch), batch["labels"])


def prepared(method: Method, model: nn.Module, family: str, **settings: Any) -> PeftModel:
    """`model` wrapped by the method and ready to train; `settings` go into the config."""
    config = method.config()
    for name, value in settings.items():
        setattr(config, name, value)
    wrapped = get_peft_model(model, config)
    _select(wrapped, "default", family, seed=0)
    return wrapped


def add(method: Method, model: PeftModel, family: str, name: str) -> None:
    """Adds a second adapter, ready to train, that has seen other data than the first."""
    model.add_adapter(name, method.config())
    _select(model, name, family, seed=1)


def _select(model: PeftModel, name: str, family: str, seed: int) -> None:
    if saft_unselected(model, name):
        select_saft(model, [batch(family, seed), batch(family, seed + 10)], loss_fn, adapter_name=name)


def train(model: nn.Module, batch: Batch, steps: int = 5) -> list[float]:
    """AdamW with weight decay on one batch, the model left in eval mode; returns the losses."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


# --- what to compare ---


def prefix_of(model: PeftModel) -> str:
    return PEFT_TYPE_TO_PREFIX_MAPPING[model.peft_config["default"].peft_type]


def base_names(model: PeftModel) -> dict[str, str]:
    """The names of the base's tensors in the wrapped model's state dict, by their names without wrappers."""
    names = [name for name in model.state_dict() if prefix_of(model) not in name and ".modules_to_save." not in name]
    wrappers = re.compile(r"^base_model\.model\.|\.base_layer\b|\.original_module\b")
    return {wrappers.sub("", name): name for name in names}


def base_tensors(model: PeftModel) -> dict[str, Tensor]:
    state = model.state_dict()
    return {plain: state[name].clone() for plain, name in base_names(model).items()}


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    state, prefix = model.state_dict(), prefix_of(model)
    return {n: t.clone() for n, t in state.items() if prefix in n and "sha256" not in n}  # that of a file, else zeros


def shown_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The base's weights as `named_parameters` shows them now."""
    parameters = dict(model.named_parameters())
    return {plain: parameters[n].detach().clone() for plain, n in base_names(model).items() if n in parameters}


def merged_tensors(model: PeftModel, adapters: list[str]) -> dict[str, Tensor]:
    model.merge_adapter(adapters)
    merged = base_tensors(model)
    model.unmerge_adapter()
    return merged


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Stricter than torch.equal, for which −0 is 0 and NaN is not NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


@torch.no_grad()
def outputs(model: nn.Module, family: str = CLIP) -> Tensor:
    assert not model.training
    return logits(model, batch(family))


def spoil(model: PeftModel, value: float) -> None:
    """Writes a value into the last tensor of the adapter, in the last layer: those before it can be merged."""
    last = [t for n, t in model.state_dict().items() if prefix_of(model) in n and t.is_floating_point()][-1]
    last.view(-1)[0] = value


def trained(method: Method, family: str = CLIP, dtype: torch.dtype = torch.float32, **settings: object) -> PeftModel:
    model = prepared(method, tiny_model(family).to(dtype), family, **settings).eval()
    before = outputs(model, family)
    train(model, batch(family))
    assert (outputs(model, family) - before).abs().max() > 1e-2  # else every comparison below would be empty
    return model
