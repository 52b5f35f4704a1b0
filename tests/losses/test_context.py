# SPDX-License-Identifier: Apache-2.0
"""CAR-FT: its contexts, its divergence, and what it holds."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_robust import ContextLoss, ImageTextPairs, SeveralLabels
from hf_robust.data.collator import REFERENCE_EMBEDS
from hf_robust.encoders.dual_encoder import image_embeds, text_embeds, tokenize
from hf_robust.errors import ConfigError, DataError
from hf_robust.losses import add_terms
from hf_robust.losses.context import context_divergence, context_embeds
from tests.losses.classifiers import NAMES, batch, check_zero_at_the_start, gradients, move, with_terms
from tests.tiny_models import FAMILIES, tiny_lora, tiny_model, tiny_processor

TEMPLATES = ["a {}.", "the {} at sea.", "no {}"]


def contexts_by_hand(model):
    """One template after the other, one class after the other."""
    rows = []
    for template in TEMPLATES:
        prompts = [template.replace("{}", name) for name in NAMES]
        tokens = tokenize(tiny_processor("clip"), prompts, model)
        rows.append(F.normalize(text_embeds(model, **tokens).sum(dim=0), dim=0))
    return torch.stack(rows).detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_zero_at_the_start_in_every_family(family):
    check_zero_at_the_start(with_terms(ContextLoss(TEMPLATES), family=family), "context", family)


@pytest.mark.parametrize("adapted", [False, True])
def test_contexts_are_means_over_classes_by_theta0(adapted):
    model = tiny_lora(tiny_model("clip")) if adapted else tiny_model("clip")
    if adapted:
        with torch.no_grad():  # an adapter that was trained before
            for name, parameter in model.named_parameters():
                parameter.add_(0.3 if "lora_B" in name else 0)
    found = with_terms(ContextLoss(TEMPLATES), model=model).terms["context"].contexts
    torch.testing.assert_close(found, contexts_by_hand(tiny_model("clip")), rtol=0, atol=1e-6)


def test_contexts_of_embeddings():
    embeds = F.normalize(torch.randn(2 * 3, 5), dim=-1)  # two classes in three wordings
    expected = [F.normalize(embeds[one] + embeds[3 + one], dim=0) for one in range(3)]
    torch.testing.assert_close(context_embeds(embeds, 3), torch.stack(expected))


def test_it_is_the_divergence_of_softmaxes():
    tuned, reference, contexts = (F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=-1) for n in (5, 5, 4))
    p, q = ((9.0 * one @ contexts.T).exp() for one in (reference, tuned))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    expected = sum((a * (a / b).log()).sum().item() for a, b in zip(p, q, strict=True)) / 5
    assert context_divergence(tuned, reference, contexts, 9.0).item() == pytest.approx(expected, rel=1e-10)


def test_only_the_images_learn_and_the_scale_stays():
    task = move(with_terms(ContextLoss(TEMPLATES)))
    value = task(**batch()).terms["context"]
    found = gradients(task, value)
    assert "model.logit_scale" not in found and not any("text_model" in name for name in found)
    assert not task.terms.state_dict()
    with torch.no_grad():
        task.model.logit_scale.add_(1)
    assert task(**batch()).terms["context"].item() == value.item()


def test_cached_embeddings_serve_and_no_copy_of_the_text_tower_is_kept():
    embeds = {REFERENCE_EMBEDS: image_embeds(tiny_model("clip"), batch()["pixel_values"]).detach()}
    live, cached = (move(with_terms(ContextLoss(TEMPLATES), cached=one)) for one in (False, True))
    expected = live(**batch()).terms["context"].item()
    assert cached(**batch(), **embeds).terms["context"].item() == pytest.approx(expected, rel=1e-3)
    assert live.reference.text is None and cached.reference.vision is None


def test_it_is_for_tasks_with_class_names():
    task = move(with_terms(ContextLoss(TEMPLATES), cls=SeveralLabels))
    assert task(**{**batch(), "labels": torch.eye(4, 3)}).terms["context"] > 0
    with pytest.raises(ConfigError, match="no classes by name.*losses, context.*'pairs'"):
        add_terms(ImageTextPairs(tiny_model("clip"), tiny_processor("clip")), {"context": ContextLoss()})


@pytest.mark.parametrize("templates", ["single", "a {}.", ["a {}."]])
def test_fewer_than_two_templates_are_refused(templates):
    with pytest.raises(ConfigError, match="every image is.*losses, context, templates.*2 templates or more"):
        ContextLoss(templates)


def test_bad_templates_are_refused():
    with pytest.raises(ConfigError, match="template without {}"):
        ContextLoss(["a {}.", "a thing."])
    with pytest.raises(DataError, match="longer than the text tower"):
        with_terms(ContextLoss(["a {}.", 99 * "very " + "{}"]))
