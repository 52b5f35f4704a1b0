# SPDX-License-Identifier: Apache-2.0
"""The formulas of the terms of the loss, as loops in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from tests.tiny_models import tiny_model

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


# --- a model ---


def deep(n_layers):
    """A CLIP with more blocks than `tiny_model`."""
    config = copy.deepcopy(tiny_model("clip").config).to_dict()
    config["vision_config"]["num_hidden_layers"] = n_layers
    return CLIPModel(CLIPConfig(**config)).eval()
