# SPDX-License-Identifier: Apache-2.0
"""Chunks give the gradients of the whole batch, in the memory of one of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hf_robust import ACLIPConfig, SAFTConfig, select_saft
from hf_robust.encoders.chunks import in_chunks
from hf_robust.encoders.dual_encoder import base_model, image_embeds
from hf_robust.errors import ConfigError
from tests.tiny_models import recompute_activations, tiny_batch, tiny_lora, tiny_model

IMAGES = tiny_batch("clip", 5)["pixel_values"].double()
TARGET = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def full() -> nn.Module:
    return tiny_model("clip").double()


def saft() -> PeftModel:
    model = get_peft_model(full(), SAFTConfig(density=0.1, towers="vision"))
    return select_saft(model, [{"pixel_values": IMAGES}], lambda m, b: loss_of(m, None)) or model


def aclip() -> PeftModel:
    return get_peft_model(full(), ACLIPConfig(towers="vision"))


def lora() -> PeftModel:
    return tiny_lora(full(), lora_dropout=0.5).train()


def loss_of(model: nn.Module, size: int | None) -> Tensor:
    return (in_chunks(partial(image_embeds, model), (IMAGES, None, None), size) * TARGET).sum()


def gradients(model: nn.Module, size: int | None, between=lambda: None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    loss = loss_of(model, size)
    between()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("build", [full, saft, aclip])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_chunks_are_those_of_the_batch(build, checkpointing):
    model = build().train()
    expected = gradients(model, None)
    if checkpointing:
        recompute_activations(base_model(model), {"use_reentrant": False})
    same(gradients(model, 2), expected)


def test_recomputation_sees_the_adapter_after_the_pre_trained_model_was_asked():
    model = saft()
    expected = gradients(model, None)

    def ask_the_pre_trained_model():
        with torch.no_grad(), model.disable_adapter():
            image_embeds(model, IMAGES)

    same(gradients(model, 2, ask_the_pre_trained_model), expected)


def test_dropout_of_the_recomputation_is_that_of_the_forward():
    model = lora()
    torch.manual_seed(0)
    parts = [image_embeds(model, part) for part in IMAGES.split(2)]  # the same draws, with activations kept
    (torch.cat(parts) * TARGET).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    same(gradients(model, 2), expected)


def test_one_chunk_is_in_memory_at_a_time():
    rows, kept = [], []

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            kept.append(len(x))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            rows.append(sum(kept))
            kept.pop()
            return gradient

    x = torch.randn(7, 3, requires_grad=True)
    out = in_chunks(lambda part: Kept.apply(part).sin(), (x,), 3)
    kept.clear()  # what the forward computed is not kept
    out.sum().backward()
    assert rows == [1, 3, 3]
    torch.testing.assert_close(x.grad, x.cos())


@pytest.mark.parametrize("size", [0, 1.5, True])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ConfigError, match="no number of rows of a chunk"):
        in_chunks(torch.sin, (torch.zeros(3, 1),), size)
