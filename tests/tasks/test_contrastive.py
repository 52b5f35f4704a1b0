# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses against loops over pairs, written down as the papers have them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hf_robust.encoders.dual_encoder import logit_bias, logit_scale, tokenize
from hf_robust.errors import ConfigError
from hf_robust.tasks.contrastive import gather_pairs, sigmoid_loss, softmax_loss
from tests.tiny_models import tiny_batch, tiny_model, tiny_processor

SCALE, BIAS = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)


def embeds(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 5, dtype=torch.float64, generator=generator), dim=-1)


def relation(image: int, text: int, owners: list[int], says: list[int], repeated: str) -> str:
    """What a text is to an image: positive, negative or ignored."""
    if owners[text] == image:
        return "positive"
    same = any(owners[other] == image and says[other] == says[text] for other in range(len(owners)))
    return {"ignore": "ignored"}.get(repeated, repeated) if same else "negative"


def slow_softmax(images, texts, owners, says, repeated="ignore", smoothing=0.0, margin=0.0) -> Tensor:
    def row(pairs: list[tuple[int, int]]) -> Tensor:
        """One image with all texts, or one text with all images."""
        kinds = [relation(*pair, owners, says, repeated) for pair in pairs]
        counts = {kind: kinds.count(kind) for kind in ("positive", "negative")}
        epsilon = smoothing if counts["negative"] else 0.0
        shares = {"positive": 1 - epsilon, "negative": epsilon}
        logits = {
            pair: SCALE * (images[pair[0]] @ texts[pair[1]] + margin * (kind == "negative"))
            for pair, kind in zip(pairs, kinds, strict=True)
            if kind != "ignored"
        }
        total = torch.stack(list(logits.values())).logsumexp(0)
        return sum(
            shares[kind] / counts[kind] * (total - logits[pair])
            for pair, kind in zip(pairs, kinds, strict=True)
            if kind != "ignored"
        )

    all_images, all_texts = range(len(images)), range(len(texts))
    of_images = sum(row([(image, text) for text in all_texts]) for image in all_images) / len(images)
    return (of_images + sum(row([(image, text) for image in all_images]) for text in all_texts) / len(texts)) / 2


def slow_sigmoid(images, texts, owners, says, repeated="ignore") -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for image in range(len(images)):
        for text in range(len(texts)):
            kind = relation(image, text, owners, says, repeated)
            logit = SCALE * images[image] @ texts[text] + BIAS
            if kind != "ignored":
                total -= F.logsigmoid(logit if kind == "positive" else -logit)
    return total / len(images)


@settings(max_examples=20, deadline=None)
@given(
    owners=st.lists(st.integers(0, 3), max_size=4),
    says=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    repeated=st.sampled_from(["ignore", "positive", "negative"]),
    smoothing=st.sampled_from([0.0, 0.1]),
    margin=st.sampled_from([0.0, 0.05]),
)
def test_losses_and_gradients_are_those_of_loops(owners, says, repeated, smoothing, margin):
    owners = [*owners, 0, 1, 2, 3]  # every image has a text
    says = says[: len(owners)]
    images, texts = embeds(4, 0).requires_grad_(), embeds(len(owners), 1).requires_grad_()
    pairs = gather_pairs(images, texts, torch.tensor(owners), torch.tensor(says)[:, None])
    of = images, texts, owners, says, repeated
    for found, expected in (
        (softmax_loss(pairs, SCALE, repeated, smoothing, margin), slow_softmax(*of, smoothing, margin)),
        (sigmoid_loss(pairs, SCALE, BIAS, repeated), slow_sigmoid(*of)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        gradients = [torch.autograd.grad(loss, (images, texts), retain_graph=True) for loss in (found, expected)]
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_two_equal_texts_cost_at_least_log_2_where_they_are_negatives():
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 1]]
    pairs = gather_pairs(images, texts, torch.arange(3), torch.tensor([[7], [7], [8]]))
    large = torch.tensor(1e4)
    assert softmax_loss(pairs, large, "negative") > math.log(2) / 3
    matched = gather_pairs(images[[0, 0, 1]], texts, torch.arange(3), torch.tensor([[7], [7], [8]]))
    assert softmax_loss(matched, large, "ignore") == 0
    torch.testing.assert_close(softmax_loss(matched, large, "negative"), torch.tensor(2 * math.log(2) / 3))


def test_one_class_alone_has_no_negatives_and_a_finite_gradient():
    images = embeds(3, 0).requires_grad_()
    pairs = gather_pairs(images, embeds(3, 1), torch.arange(3), torch.zeros(3, 1, dtype=torch.int64))
    loss = softmax_loss(pairs, SCALE, "positive", label_smoothing=0.1) + softmax_loss(pairs, SCALE, "ignore", 0.1)
    loss.backward()
    assert loss.isfinite() and images.grad.isfinite().all()


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_loss_is_that_of_transformers(family):
    model = tiny_model(family).double()
    ids = tokenize(tiny_processor(family), ["a cat", "two dogs", "an ox"], model)
    out = model(**ids, pixel_values=tiny_batch(family, 3)["pixel_values"].double(), return_loss=True)
    pairs, scale = (
        gather_pairs(out.image_embeds, out.text_embeds, torch.arange(3), torch.arange(3)[:, None]),
        logit_scale(model),
    )
    bias = logit_bias(model)
    found = softmax_loss(pairs, scale) if bias is None else sigmoid_loss(pairs, scale, bias)
    torch.testing.assert_close(found, out.loss, rtol=1e-11, atol=0)


@pytest.mark.parametrize("wrong", [{"repeated_texts": "drop"}, {"label_smoothing": 1.0}, {"margin": -0.1}])
def test_settings_out_of_range_are_refused(wrong):
    pairs = gather_pairs(torch.eye(2), torch.eye(2), torch.arange(2), torch.eye(2).long())
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        softmax_loss(pairs, torch.tensor(1.0), **wrong)
