# SPDX-License-Identifier: Apache-2.0
"""The terms of the loss, and MPM-NCE, against loops in float64 that were written from the formulas alone."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from transformers import CLIPConfig, CLIPModel

from hf_robust.losses import Moved, add_terms
from hf_robust.losses.context import ContextLoss, context_divergence, context_embeds
from hf_robust.losses.features import FeatureLoss, feature_distance, layers_by_depth
from hf_robust.losses.lipsum import LipsumLoss, RandomPrompts, lipsum_penalty
from hf_robust.losses.spuriosity import SpuriosityLoss, spuriosity_divergence
from hf_robust.losses.weights import WeightLoss, squared_distance
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.tasks.contrastive import gather_pairs, softmax_loss
from hf_robust.tasks.flyp import FLYP
from hf_robust.tasks.progress import Progress
from tests.tiny_models import tiny_batch, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]
LABELS = [0, 1, 0, 2, 1]
SMALL = given_settings(max_examples=15)
SHAPES = [(1, 3, 2), (4, 5, 3), (6, 2, 7)]
seeds = st.integers(0, 2**31 - 1)


# --- helpers ---


def units(generator, rows, dim):
    drawn = generator.normal(size=(rows, dim))
    return np.stack([row / math.sqrt(sum(number**2 for number in row)) for row in drawn])


def numeric_gradient(function, at):
    """Central differences of a function of an array."""
    found = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += 1e-5
        down[index] -= 1e-5
        found[index] = (function(up) - function(down)) / 2e-5
    return found


def check(loss, oracle, arrays, constants=()):
    """Value, the gradient of every array, and that the constants get none."""
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    held = [torch.tensor(array, requires_grad=True) for array in constants]
    value = loss(*tensors, *held)
    assert value.ndim == 0 and value.item() == pytest.approx(oracle(*arrays, *constants), rel=1e-9, abs=1e-12)
    value.backward()
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in held)
    for position, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):

        def moved(one, position=position):
            return oracle(*arrays[:position], one, *arrays[position + 1 :], *constants)

        expected = numeric_gradient(moved, array)
        np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=1e-5, atol=1e-6 * (1 + np.abs(expected).max()))


def softmax(logits):
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    return [power / sum(powers) for power in powers]


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def kl(of, to):
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(of, to, strict=True) if p > 0)


# --- the formulas ---


def lipsum(tuned, start, texts, scale):
    total = 0.0
    for f, f0 in zip(tuned, start, strict=True):
        for text in texts:
            total += (scale * dot(f, text) - scale * dot(f0, text)) ** 2 / (2 * len(texts))
    return total / len(tuned)


def contexts_of(embeds, n_templates):
    found = []
    for template in range(n_templates):
        prompts = [embeds[row] for row in range(len(embeds)) if row % n_templates == template]
        mean = sum(prompts) / len(prompts)
        found.append(mean / math.sqrt(dot(mean, mean)))
    return np.stack(found)


def context(tuned, start, contexts, scale):
    def answers(f):
        return softmax([scale * dot(f, one) for one in contexts])

    return sum(kl(answers(f0), answers(f)) for f, f0 in zip(tuned, start, strict=True)) / len(tuned)


def features(tuned, start, axis, reduction):
    def normalised(states):
        found, (n_tokens, width) = np.zeros_like(states), states.shape
        for token in range(n_tokens):
            for channel in range(width):
                line = states[:, channel] if axis == 1 else states[token]
                found[token, channel] = states[token, channel] / (math.sqrt(dot(line, line)) + 1e-10)
        return found

    values = []
    for h, h0 in zip(tuned, start, strict=True):
        squares = (normalised(h) - normalised(h0)) ** 2
        values.append(squares.sum() / (squares.size if reduction == "mean" else 1))
    return sum(values) / len(values)


def spuriosity(tuned_images, tuned_texts, images, texts, labels, scale):
    total = 0.0
    for row, label in enumerate(labels):
        others = [column for column, other in enumerate(labels) if other != label]
        if others:
            teacher = softmax([scale * dot(images[row], texts[column]) for column in others])
            student = softmax([scale * dot(tuned_images[row], tuned_texts[column]) for column in others])
            total += kl(teacher, student)
    return total / len(labels)


def mpm_nce(images, texts, scale, labels, repeated, smoothing, margin, image_of_text=None):
    """Texts of equal labels say the same; each is the text of an image, by default of that at its own place."""
    image_of_text = range(len(labels)) if image_of_text is None else image_of_text

    def relation(image, text):
        if image_of_text[text] == image:
            return "own"
        said = [labels[other] for other in range(len(labels)) if image_of_text[other] == image]
        return {"positive": "own", "ignore": None, "negative": "other"}[repeated] if labels[text] in said else "other"

    def side(rows, columns, relations):
        losses = []
        for row, of in zip(rows, relations, strict=True):
            positive = [j for j, kind in enumerate(of) if kind == "own"]
            counted = [j for j, kind in enumerate(of) if kind is not None]
            logits = [scale * (dot(row, columns[j]) + margin * (j not in positive)) for j in counted]
            largest, n_negatives = max(logits), len(counted) - len(positive)
            normaliser = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
            rest = smoothing if n_negatives else 0  # a batch without negatives has nothing to smooth to
            targets = [(1 - rest) / len(positive) if j in positive else rest / n_negatives for j in counted]
            losses.append(-sum(y * (logit - normaliser) for y, logit in zip(targets, logits, strict=True)))
        return sum(losses) / len(losses)

    of_images = [[relation(i, j) for j in range(len(texts))] for i in range(len(images))]
    of_texts = [[relation(i, j) for i in range(len(images))] for j in range(len(texts))]
    return 0.5 * (side(images, texts, of_images) + side(texts, images, of_texts))


# --- functions ---


@pytest.mark.parametrize(("batch", "others", "dim"), SHAPES)
def test_lipsum_penalty(batch, others, dim):
    generator = np.random.default_rng(batch)
    arrays = [units(generator, rows, dim) for rows in (batch, batch, others)]
    texts = torch.tensor(arrays[2])
    check(
        lambda f, f0: lipsum_penalty(f, f0, texts, 7.5),
        lambda f, f0: lipsum(f, f0, arrays[2], 7.5),
        arrays[:1],
        arrays[1:2],
    )


@SMALL
@given(seeds, st.floats(0.1, 100.0))
def test_lipsum_penalty_goes_with_the_square_of_the_scale(seed, scale):
    generator = np.random.default_rng(seed)
    tuned, start, texts = (units(generator, rows, 4) for rows in (3, 3, 5))
    found = lipsum_penalty(*map(torch.tensor, (tuned, start, texts)), scale).item()
    assert found == pytest.approx(lipsum(tuned, start, texts, scale), rel=1e-9)
    assert found == pytest.approx(scale**2 * lipsum(tuned, start, texts, 1.0), rel=1e-9)


@pytest.mark.parametrize(("classes", "templates"), [(1, 3), (4, 1), (3, 2)])
def test_context_embeds(classes, templates):
    embeds = units(np.random.default_rng(classes), classes * templates, 5)
    found = context_embeds(torch.tensor(embeds), templates).numpy()
    np.testing.assert_allclose(found, contexts_of(embeds, templates), rtol=1e-12)


@pytest.mark.parametrize(("batch", "others", "dim"), SHAPES)
def test_context_divergence(batch, others, dim):
    generator = np.random.default_rng(batch)
    tuned, start, contexts = (units(generator, rows, dim) for rows in (batch, batch, others))
    texts = torch.tensor(contexts)
    check(
        lambda f, f0: context_divergence(f, f0, texts, 3.0),
        lambda f, f0: context(f, f0, contexts, 3.0),
        [tuned],
        [start],
    )


@SMALL
@given(seeds, st.floats(0.1, 100.0))
def test_context_divergence_at_any_scale(seed, scale):
    generator = np.random.default_rng(seed)
    tuned, start, contexts = (units(generator, rows, 4) for rows in (3, 3, 5))
    found = context_divergence(*map(torch.tensor, (tuned, start, contexts)), scale).item()
    assert found == pytest.approx(context(tuned, start, contexts, scale), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 2)])
def test_feature_distance(shape, axis, reduction):
    generator = np.random.default_rng(0)
    tuned, start = generator.normal(size=(2, *shape))
    check(
        lambda h, h0: feature_distance(h, h0, axis, reduction),
        lambda h, h0: features(h, h0, axis, reduction),
        [tuned],
        [start],
    )


@SMALL
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_feature_distance_is_bounded_as_its_norms_say(seed, n_tokens, width):
    tuned, start = np.random.default_rng(seed).normal(size=(2, 2, n_tokens, width))
    for axis, length in ((1, n_tokens), (2, width)):
        found = feature_distance(torch.tensor(tuned), torch.tensor(start), axis, "mean").item()
        assert found == pytest.approx(features(tuned, start, axis, "mean"), rel=1e-9, abs=1e-15)
        assert found <= 4 / length + 1e-12


@pytest.mark.parametrize("depth", [4, 8, 12, 24])
def test_layers_by_depth(depth):
    names = [f"vision_model.encoder.layers.{share * depth // 4 - 1}" for share in (1, 2, 3, 4)]
    assert layers_by_depth(deep(depth)) == ("vision_model.pre_layrnorm", *names)


def test_squared_distance():
    generator = np.random.default_rng(0)
    tuned = [generator.normal(size=shape) for shape in ((), (3,), (2, 4), (5, 1, 2))]
    starts = [generator.normal(size=array.shape) for array in tuned]

    def loss(*tensors):
        return squared_distance([Moved(t, torch.tensor(s)) for t, s in zip(tensors, starts, strict=True)])

    def oracle(*arrays):
        return sum(
            (number - other) ** 2
            for array, start in zip(arrays, starts, strict=True)
            for number, other in zip(array.ravel(), start.ravel(), strict=True)
        )

    check(loss, oracle, tuned)


@pytest.mark.parametrize("labels", [LABELS, [0, 1, 2], [4, 4, 4], [1]])
def test_spuriosity_divergence(labels):
    generator = np.random.default_rng(len(labels))
    arrays = [units(generator, len(labels), 4) for _ in range(4)]
    keys = torch.tensor(labels)
    check(
        lambda *tensors: spuriosity_divergence(*tensors, keys, 3.0),
        lambda *given_arrays: spuriosity(*given_arrays, labels, 3.0),
        arrays[:2],
        arrays[2:],
    )


@SMALL
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), seeds, st.floats(0.1, 100.0))
def test_spuriosity_divergence_of_any_labels(labels, seed, scale):
    generator = np.random.default_rng(seed)
    arrays = [units(generator, len(labels), 4) for _ in range(4)]
    found = spuriosity_divergence(*map(torch.tensor, arrays), torch.tensor(labels), scale).item()
    assert found == pytest.approx(spuriosity(*arrays, labels, scale), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("repeated", ["positive", "ignore", "negative"])
@pytest.mark.parametrize(("smoothing", "margin"), [(0.0, 0.0), (0.02, 0.05), (0.3, 0.7)])
def test_mpm_nce(repeated, smoothing, margin):
    generator = np.random.default_rng(1)
    arrays = [units(generator, 5, 3), units(generator, 5, 3), np.array(4.0)]
    labels = torch.tensor(LABELS)[:, None]

    def loss(images, texts, scale):
        pairs = gather_pairs(images, texts, torch.arange(5), labels)
        return softmax_loss(pairs, scale, repeated, smoothing, margin)

    check(loss, lambda v, t, s: mpm_nce(v, t, s, LABELS, repeated, smoothing, margin), arrays)


@SMALL
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), seeds, st.floats(0.0, 0.9), st.floats(0.0, 1.0))
def test_mpm_nce_of_any_labels(labels, seed, smoothing, margin):
    generator = np.random.default_rng(seed)
    images, texts = (units(generator, len(labels), 4) for _ in range(2))
    keys = torch.tensor(labels)[:, None]
    pairs = gather_pairs(torch.tensor(images), torch.tensor(texts), torch.arange(len(labels)), keys)
    found = softmax_loss(pairs, torch.tensor(9.0, dtype=torch.float64), "positive", smoothing, margin).item()
    expected = mpm_nce(images, texts, 9.0, labels, "positive", smoothing, margin)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("repeated", ["positive", "ignore", "negative"])
def test_mpm_nce_of_several_texts_an_image(repeated):
    generator = np.random.default_rng(2)
    images, texts = units(generator, 3, 4), units(generator, 6, 4)
    image_of_text, says = [0, 1, 0, 2, 2, 1], [7, 7, 5, 7, 4, 3]
    pairs = gather_pairs(*map(torch.tensor, (images, texts, image_of_text)), torch.tensor(says)[:, None])
    found = softmax_loss(pairs, torch.tensor(9.0, dtype=torch.float64), repeated, 0.1, 0.3).item()
    expected = mpm_nce(images, texts, 9.0, says, repeated, 0.1, 0.3, image_of_text)
    assert found == pytest.approx(expected, rel=1e-9)


# --- terms of a whole model ---


def deep(n_layers):
    """A CLIP with more blocks than `tiny_model`."""
    config = copy.deepcopy(tiny_model("clip").config).to_dict()
    config["vision_config"]["num_hidden_layers"] = n_layers
    return CLIPModel(CLIPConfig(**config)).eval()


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
