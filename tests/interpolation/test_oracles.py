# SPDX-License-Identifier: Apache-2.0
"""VRF against loops in float64 that were written from the formulas alone."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from hf_robust.interpolation.nearest import kth_squared_distance
from hf_robust.interpolation.per_image import PerImageEnsemble
from hf_robust.interpolation.per_image_fit import choose_neighbour
from hf_robust.interpolation.temperature import fit_temperature
from hf_robust.tasks.class_names import ZeroShotClassifier
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]
TEMPLATES = ["a photo of a {}.", "no {}!"]
SMALL = given_settings(max_examples=15)
seeds = st.integers(0, 2**31 - 1)


# --- helpers ---


def unit(row):
    return row / math.sqrt(sum(number**2 for number in row))


def softmax(logits):
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return np.array([power / sum(powers) for power in powers])


def squared(one, other):
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def confidence(logits, temperature):
    return sum(max(softmax(row / temperature)) for row in logits) / len(logits)


def temperature_of(logits, labels):
    """A bisection; T or the end of the bracket that is nearer."""
    accuracy = sum(int(np.argmax(row)) == label for row, label in zip(logits, labels, strict=True)) / len(labels)
    low, high = 0.1, 10.0
    if confidence(logits, low) <= accuracy:
        return low
    if confidence(logits, high) >= accuracy:
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if confidence(logits, middle) > accuracy else (low, middle)
    return (low + high) / 2


class Model:
    """A dual encoder in float64 and its zero-shot head, by hand."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double().eval()
        processor = tiny_processor("clip")
        self.prepare = processor.image_processor
        rows = []
        for name in NAMES:
            prompts = [template.replace("{}", name) for template in TEMPLATES]
            ids = [torch.tensor([processor.tokenizer(prompt)["input_ids"]]) for prompt in prompts]
            with torch.no_grad():
                texts = [self.model.text_projection(self.model.text_model(one).pooler_output)[0] for one in ids]
            rows.append(unit(sum(unit(text.numpy()) for text in texts) / len(texts)))
        self.head = np.stack(rows)
        self.scale = math.exp(self.model.logit_scale.item())

    def __call__(self, pictures):
        """Unit embeddings and logits."""
        pixels = self.prepare(images=list(pictures), return_tensors="pt")["pixel_values"].double()
        with torch.no_grad():
            embeds = self.model.visual_projection(self.model.vision_model(pixels).pooler_output).numpy()
        embeds = np.stack([unit(row) for row in embeds])
        return embeds, self.scale * embeds @ self.head.T


class Oracle:
    """7.4 as it stands."""

    def __init__(self, fine_tuned, zero_shot, train, validation, neighbour=None, squared_metric=True):
        self.fine_tuned, self.zero_shot, self.squared_metric = fine_tuned, zero_shot, squared_metric
        embeds, right = fine_tuned(train["image"])
        _, wrong = zero_shot(train["image"])
        self.failures = [
            embed.astype(np.float16).astype(float)  # as the ensemble keeps them
            for embed, z, z0, label in zip(embeds, right, wrong, train["label"], strict=True)
            if np.argmax(z) == label and np.argmax(z0) != label
        ]
        k = round(1000 * len(self.failures) / len(train)) if neighbour is None else neighbour
        self.k = min(max(k, 1), len(self.failures))
        self.temperatures = [
            temperature_of(model(validation["image"])[1], validation["label"]) for model in (fine_tuned, zero_shot)
        ]

    def share(self, embed, midpoint=1.5, scale=0.6):
        if not self.failures:
            return 0.0
        distance = sorted(squared(embed, failure) for failure in self.failures)[self.k - 1]
        distance = distance if self.squared_metric else math.sqrt(distance)
        return 1 / (1 + math.exp((distance - midpoint) / scale))

    def __call__(self, pictures, **settings):
        embeds, tuned = self.fine_tuned(pictures)
        _, start = self.zero_shot(pictures)
        first, second = self.temperatures
        found = []
        for embed, z, z0 in zip(embeds, tuned, start, strict=True):
            w = self.share(embed, **settings)
            found.append(w * softmax(z / first) + (1 - w) * softmax(z0 / second))
        return np.stack(found)


# --- parts ---


@SMALL
@given(seeds, st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_the_distance_to_the_kth_nearest(seed, others, dim, rows_at_once):
    generator = np.random.default_rng(seed)
    near, far = generator.normal(size=(3, dim)), generator.normal(size=(others, dim))
    for k in range(1, others + 1):
        found = kth_squared_distance(torch.tensor(near), torch.tensor(far), k, rows_at_once)
        expected = [sorted(squared(one, other) for other in far)[k - 1] for one in near]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@given_settings(max_examples=50)
@given(st.integers(1, 3000), st.integers(0, 3000))
def test_k(images, more):
    failures = min(images, more)
    rule = min(max(round(1000 * failures / images), 1), failures)
    assert choose_neighbour(failures, images, None) == rule
    assert choose_neighbour(failures, images, 7) == min(7, failures)


@SMALL
@given(seeds, st.integers(1, 12), st.integers(2, 4))
def test_temperature(seed, images, classes):
    generator = np.random.default_rng(seed)
    logits, labels = 4 * generator.normal(size=(images, classes)), generator.integers(classes, size=images)
    found, expected = fit_temperature(torch.tensor(logits), torch.tensor(labels)), temperature_of(logits, labels)
    accuracy = (logits.argmax(1) == labels).mean()
    assert found.gap == pytest.approx(confidence(logits, found.value) - accuracy, abs=1e-6)
    assert abs(confidence(logits, found.value) - confidence(logits, expected)) < 1e-5


# --- the whole ---


@pytest.fixture(scope="module")
def models():
    """A pre-trained model, and one whose weights have moved."""
    start, tuned = tiny_model("clip"), tiny_model("clip")
    task = ZeroShotClassifier(tuned, tiny_processor("clip"), NAMES, templates=TEMPLATES).train()
    rows = image_dataset(24, NAMES, seed=200)
    pixels = tiny_processor("clip").image_processor(images=list(rows["image"]), return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(4):
        optimizer.zero_grad()
        task(pixels, labels=torch.tensor(rows["label"])).loss.backward()
        optimizer.step()
    return start, tuned


def confused(models, n, seed):
    """Pictures that each model has right here and wrong there: a quarter are labelled as θ₀ has them."""
    rows = image_dataset(n, NAMES, seed=seed)
    answers = Model(models[0])(rows["image"])[1].argmax(axis=1).tolist()
    labels = [
        {0: answer, 1: (label + 1) % 3}.get(index // 3 % 4, label)
        for index, (answer, label) in enumerate(zip(answers, rows["label"], strict=True))
    ]
    return rows.remove_columns("label").add_column("label", labels).cast_column("label", rows.features["label"])


def fitted(models, train, validation, **settings):
    start, tuned = (copy.deepcopy(model) for model in models)
    classifier = ZeroShotClassifier(tuned, tiny_processor("clip"), NAMES, templates=TEMPLATES)
    return PerImageEnsemble.fit(classifier, train, validation, start, silent=True, **settings)


def check(ensemble, oracle, **settings):
    pictures = image_dataset(12, NAMES, seed=900)["image"]
    pixels = tiny_processor("clip").image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = ensemble.eval()(pixels).exp().numpy()
    np.testing.assert_allclose(found, oracle(pictures, **settings), atol=1e-4)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"neighbour": 1}, {"neighbour": 3, "midpoint": 0.2, "scale": 0.1}, {"metric": "l2"}]
)
def test_fit_and_probabilities(models, settings):
    train, validation = confused(models, 40, seed=0), confused(models, 30, seed=500)
    ensemble = fitted(models, train, validation, **settings)
    start, tuned = map(Model, models)
    oracle = Oracle(
        tuned, start, train, validation, settings.get("neighbour"), settings.get("metric", "sq_l2") == "sq_l2"
    )
    assert 3 < len(oracle.failures) < 30 and all(0.11 < one < 9.9 for one in oracle.temperatures)
    ratio = {name: settings[name] for name in ("midpoint", "scale") if name in settings}
    check(ensemble, oracle, **ratio)


def test_without_failures_the_zero_shot_model_answers(models):
    start, tuned = map(Model, models)
    train, validation = confused(models, 12, seed=0), confused(models, 30, seed=500)
    answers = start(train["image"])[1].argmax(axis=1).tolist()
    train = train.remove_columns("label").add_column("label", answers)
    train = train.cast_column("label", validation.features["label"])
    oracle = Oracle(tuned, start, train, validation)
    assert not oracle.failures
    check(fitted(models, train, validation), oracle)
