# SPDX-License-Identifier: Apache-2.0
"""Tiny classifiers with terms of the loss, at θ₀ and moved away from it."""

from __future__ import annotations

import torch

from hf_robust.losses import Moved, add_terms
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.tasks.task import Progress
from tests.tiny_models import tiny_batch, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]


def with_terms(*terms, family="clip", cls=ZeroShotClassifier, model=None, cached=False, **settings):
    """A classifier in train mode, in its second step, with terms that were added when it was θ₀."""
    task = cls(tiny_model(family) if model is None else model, tiny_processor(family), NAMES, **settings)
    starts = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}

    def weights(task):
        return {name: Moved(parameter, starts[name]) for name, parameter in task.named_parameters()}

    add_terms(task, {term.name: term for term in terms}, cached, weights)
    task.progress = Progress(step=1, steps=10, epoch=0, epochs=4, seed=7)
    return task.train()


def batch(family="clip", n=4):
    """Images of all classes, some twice."""
    return {**tiny_batch(family, n), "labels": torch.arange(n) % len(NAMES)}


def move(task, by=0.02):
    """Moves all trained weights of the encoder."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.requires_grad and parameter.ndim > 0:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return task


def gradients(task, value):
    """The gradient of a value by the name of the parameter, where there is one."""
    task.zero_grad()
    value.backward()
    return {name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None}


def check_zero_at_the_start(task, name, family="clip"):
    """The term is exactly 0 with gradients of 0 at θ₀, and moves once the weights have."""
    value = task(**batch(family)).terms[name]
    found = gradients(task, value)
    assert value.item() == 0 and found and all(one.count_nonzero() == 0 for one in found.values())
    value = move(task)(**batch(family)).terms[name]
    assert value > 0 and any(one.count_nonzero() > 0 for one in gradients(task, value).values())
