# SPDX-License-Identifier: Apache-2.0
"""The terms of whole models against loops that were written from the formulas alone."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from hf_robust.losses import Moved, add_terms
from hf_robust.losses.context import ContextLoss
from hf_robust.losses.features import FeatureLoss
from hf_robust.losses.lipsum import LipsumLoss, RandomPrompts
from hf_robust.losses.spuriosity import SpuriosityLoss
from hf_robust.losses.weights import WeightLoss
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.tasks.flyp import FLYP
from hf_robust.tasks.progress import Progress
from tests.losses.formulas import (
    context,
    contexts_of,
    deep,
    dot,
    features,
    lipsum,
    spuriosity,
)
from tests.tiny_models import tiny_batch, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]
LABELS = [0, 1, 0, 2, 1]
SMALL = given_settings(max_examples=15)


def of_images(model, inputs):
    """Unit embeddings of images by hand, `(batch, dim)`, float64."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        pooled = model.vision_model(inputs["pixel_values"].double()).pooler_output
        embeds = pooled if not hasattr(model, "visual_projection") else model.visual_projection(pooled)
    return np.stack([row / math.sqrt(dot(row, row)) for row in embeds.numpy()])


def of_ids(model, ids):
    """Unit embeddings of tokens by hand, `(texts, dim)`, float64."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        pooled = model.text_model(ids).pooler_output
        embeds = pooled if not hasattr(model, "text_projection") else model.text_projection(pooled)
    return np.stack([row / math.sqrt(dot(row, row)) for row in embeds.numpy()])


def of_texts(model, texts):
    """As `of_ids`, a text at a time, so that there is no padding."""
    tokenizer = tiny_processor("clip").tokenizer
    return np.concatenate([of_ids(model, torch.tensor([tokenizer(text)["input_ids"]])) for text in texts])


def moved_task(term, family="clip", start=None, cls=ZeroShotClassifier, **settings):
    """θ₀, and a task with the term whose weights all have moved since it was added."""
    start = start or tiny_model(family)
    task = cls(copy.deepcopy(start), tiny_processor(family), NAMES, **settings)
    before = dict(start.named_parameters())
    add_terms(
        task,
        {term.name: term},
        weights=lambda task: {n: Moved(p, before[n].detach()) for n, p in task.model.named_parameters()},
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return start, task.train()


def value(task, family="clip"):
    inputs = tiny_batch(family, len(LABELS))
    (found,) = task(**inputs, labels=torch.tensor(LABELS)).terms.values()
    return inputs, found.item()


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_lipsum_of_a_model(family, monkeypatch):
    drawn, draw = [], RandomPrompts.draw
    monkeypatch.setattr(RandomPrompts, "draw", lambda *args, **named: drawn.append(draw(*args, **named)) or drawn[-1])
    start, task = moved_task(LipsumLoss(weight=3.0), family)
    task.progress = Progress(step=1, steps=4, seed=5)
    inputs, found = value(task, family)
    ids = drawn[0]["input_ids"]
    tokenizer = tiny_processor(family).tokenizer
    words = ids[:, 1:9] if family == "clip" else ids[:, :8]
    assert len(ids) == 80 and not set(words.ravel().tolist()) & set(tokenizer.all_special_ids)
    around = {"clip": (10, [0], [1]), "siglip": (64, [], [1] + [0] * 55)}[family]
    assert ids.shape[1] == around[0] and ids[:, : len(around[1])].tolist() == [around[1]] * 80
    assert ids[:, len(around[1]) + 8 :].tolist() == [around[2]] * 80
    scale = math.exp(start.logit_scale.item())
    expected = lipsum(of_images(task.model, inputs), of_images(start, inputs), of_ids(start, ids), scale)
    assert found == pytest.approx(3 * expected, rel=1e-4)


def test_random_words_are_uniform_and_new_in_every_step():
    _, task = moved_task(LipsumLoss())
    prompts = RandomPrompts.of(task, 8)
    first, second = (
        prompts.draw(2000, 8, Progress(step=step, steps=2).generator("words"))["input_ids"] for step in (0, 1)
    )
    assert (first[:, 1:9] != second[:, 1:9]).float().mean() > 0.99
    counts = np.bincount(first[:, 1:9].ravel().numpy(), minlength=514)[2:]  # 0 and 1 are special
    chi_square = ((counts - 16000 / 512) ** 2 / (16000 / 512)).sum()
    assert abs(chi_square - 511) < 5 * math.sqrt(2 * 511)


def test_contexts_of_a_model():
    templates = ["a drawing of a {}.", "{} at night", "no {}!"]
    start, task = moved_task(ContextLoss(templates, weight=3.0))
    inputs, found = value(task)
    prompts = of_texts(start, [template.replace("{}", name) for name in NAMES for template in templates])
    contexts, scale = contexts_of(prompts, len(templates)), math.exp(start.logit_scale.item())
    expected = context(of_images(task.model, inputs), of_images(start, inputs), contexts, scale)
    assert found == pytest.approx(3 * expected, rel=1e-4)


@pytest.mark.parametrize(("axis", "reduction"), [("token", "mean"), ("channel", "sum")])
def test_features_of_a_model(axis, reduction):
    start, task = moved_task(FeatureLoss(norm_axis=axis, reduction=reduction, weight=3.0), start=deep(4))
    inputs, found = value(task)

    def slices(model):
        with torch.no_grad():
            model = copy.deepcopy(model).double().eval()
            states = model.vision_model(inputs["pixel_values"].double(), output_hidden_states=True).hidden_states
        return [states[depth].numpy() for depth in (0, 1, 2, 3, 4)]

    code = {"token": 1, "channel": 2}[axis]
    parts = [features(h, h0, code, reduction) for h, h0 in zip(slices(task.model), slices(start), strict=True)]
    expected = sum(parts) / (len(parts) if reduction == "mean" else 1)
    assert found == pytest.approx(3 * expected, rel=1e-4)


def test_weights_of_a_model():
    start, task = moved_task(WeightLoss(weight=3.0))
    with torch.no_grad():
        task.model.logit_scale.add_(1.0)  # far, and no weight of the encoder
    _, found = value(task)
    before, expected = dict(start.named_parameters()), 0.0
    for name, parameter in task.model.named_parameters():
        if name not in ("logit_scale", "logit_bias"):
            difference = parameter.detach().double() - before[name].detach().double()
            expected += sum(number**2 for number in difference.ravel().tolist())
    assert found == pytest.approx(3 * expected, rel=1e-5)


@pytest.mark.parametrize("cls", [ZeroShotClassifier, FLYP])
def test_surroundings_of_a_model(cls, monkeypatch):
    drawn, texts = [], SpuriosityLoss.texts
    monkeypatch.setattr(SpuriosityLoss, "texts", lambda *args: drawn.append(texts(*args)) or drawn[-1])
    phrases = ["{} by the sea.", "{}, indoors"]
    start, task = moved_task(SpuriosityLoss(0.5, phrases), cls=cls, templates="a picture of a {}.")
    task.progress = Progress(step=3, steps=40, epoch=1, epochs=4)
    inputs, found = value(task)
    for label, text in zip(LABELS, drawn[0], strict=True):
        assert text in [phrase.replace("{}", f"a picture of a {NAMES[label]}") for phrase in phrases]
    arrays = [of_images(task.model, inputs), of_texts(task.model, drawn[0])]
    arrays += [of_images(start, inputs), of_texts(start, drawn[0])]
    expected = spuriosity(*arrays, LABELS, math.exp(start.logit_scale.item()))
    assert found == pytest.approx(0.5 * (1 - 2 / 4) * expected, rel=1e-4)


def test_templates_and_phrases_are_drawn_uniformly_and_anew_in_every_step():
    phrases, templates = ["{} at sea", "{} at home", "{} at work"], ["a {}.", "the {}."]
    _, task = moved_task(SpuriosityLoss(phrases=phrases), templates=templates)
    drawn = []
    for step in (0, 1):
        task.progress = Progress(step=step, steps=2)
        drawn.append(task.terms["spuriosity"].texts(task, torch.zeros(6000, dtype=torch.long)))
    possible = [f"{word} red at {place}" for word in ("a", "the") for place in ("sea", "home", "work")]
    for texts in drawn:
        assert set(texts) == set(possible)
        assert all(abs(texts.count(one) - 1000) < 5 * math.sqrt(1000 * 5 / 6) for one in possible)
    same = sum(one == other for one, other in zip(*drawn, strict=True))
    assert abs(same - 1000) < 5 * math.sqrt(1000 * 5 / 6)


@SMALL
@given(st.floats(0.0, 10.0), st.integers(2, 20).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_the_weight_of_surroundings_by_epoch(weight, epoch):
    found = SpuriosityLoss(weight).weight_at(Progress(epoch=epoch[0], epochs=epoch[1]))
    assert found == pytest.approx(weight * (1 - (epoch[0] + 1) / epoch[1]), abs=1e-12)


@pytest.mark.parametrize(
    "term", [LipsumLoss(), ContextLoss(["a {}.", "no {}"]), FeatureLoss(), WeightLoss(), SpuriosityLoss()]
)
def test_every_term_is_zero_before_the_first_step(term):
    start, task = moved_task(term)
    task.model.load_state_dict(start.state_dict())
    task.progress = Progress(epochs=2)
    output = task(**tiny_batch("clip", len(LABELS)), labels=torch.tensor(LABELS))
    (found,) = output.terms.values()
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-8)
    assert max(p.grad.abs().max() for p in task.model.parameters() if p.grad is not None) < 1e-6
