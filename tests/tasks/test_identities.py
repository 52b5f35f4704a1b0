# SPDX-License-Identifier: Apache-2.0
"""The loss of identities, where its head starts, what is measured of others, and what is refused."""

from __future__ import annotations

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_robust.data.collator import ImageCollator, batches_in_order
from hf_robust.data.draws import Draws
from hf_robust.data.rows import labelled_images
from hf_robust.encoders.dual_encoder import base_model, image_embeds, tower_modules
from hf_robust.errors import AdapterFileError, ConfigError, DataError
from hf_robust.tasks.identities import Identities, IdentityMeasure
from hf_robust.tasks.identity_head import MARGINS, identity_head, mean_directions
from hf_robust.tasks.identity_metrics import identity_metrics
from hf_robust.tasks.identity_sampler import IdentitySampler
from tests.tiny_models import FAMILIES, image_dataset, tiny_batch, tiny_lora, tiny_model, tiny_processor

NAMES = ["7", "40", "dog 3"]


def build(family="clip", wrap=lambda model: model, **settings):
    return Identities(wrap(tiny_model(family)), tiny_processor(family), NAMES, **settings)


def rows_of(counts, names=NAMES):
    """A set with so many images of each identity."""
    labels = np.repeat(np.arange(len(counts)), counts)
    whole = image_dataset(3 * len(names), names).rename_column("label", "identity")
    return labelled_images(whole.select([int(label) for label in labels]), "people", target="identity")


def start(task, rows, batch_size=4):
    collator = task.collator(ImageCollator(task.processor))
    task.prepare(partial(batches_in_order, rows, collator, batch_size, 0, torch.device("cpu"), None), Accelerator())
    return collator(list(map(rows.__getitem__, range(len(rows)))))


def test_without_the_extra_it_is_named(monkeypatch):
    labels = np.array([0, 0, 1, 1])
    for module in ("losses", "samplers", "distances"):
        monkeypatch.setitem(sys.modules, f"pytorch_metric_learning.{module}", None)
    message = r"'pytorch_metric_learning\..*' is not installed. pip install 'hf_robust\[identities\]'"
    with pytest.raises(ConfigError, match=message):
        build()
    with pytest.raises(ConfigError, match=message):
        list(IdentitySampler(labels, 2, batch_size=4, draws=Draws(seed=42)))
    with pytest.raises(ConfigError, match=message):
        identity_metrics(torch.eye(2)[labels], labels)


# --- the loss ---


def plain_loss(loss, cosines, labels, scale, margin):
    logits = cosines.clone()
    for row, label in enumerate(labels.tolist()):
        angle = math.acos(cosines[row, label])
        if loss == "arcface":
            far = angle > math.pi - margin  # it would fall again
            logits[row, label] = math.cos(angle) - margin * math.sin(margin) if far else math.cos(angle + margin)
        else:
            logits[row, label] -= margin
    return F.cross_entropy(scale * logits, labels)


@pytest.mark.parametrize("loss", list(MARGINS))
@pytest.mark.parametrize("margin", [None, 0.1])
def test_the_loss_is_that_of_the_papers(loss, margin):
    generator = torch.Generator().manual_seed(0)
    embeds, rows = (F.normalize(torch.randn(n, 2, generator=generator).double(), dim=1) for n in (40, 5))
    labels, scale = torch.randint(5, (40,), generator=generator), 7.0
    if loss == "cosine" and margin is not None:
        with pytest.raises(ConfigError, match="cosine loss has no margin"):
            identity_head(5, 2, loss, scale, margin, embeds)
        return
    head = identity_head(5, 2, loss, scale, margin, embeds)
    with torch.no_grad():
        head.W.copy_(3 * rows.T)  # lengths say nothing
    used = MARGINS[loss] if margin is None else margin
    torch.testing.assert_close(head(embeds, labels), plain_loss(loss, embeds @ rows.T, labels, scale, used))


def test_the_gradient_is_finite_where_an_image_is_its_row():
    task = build(loss="arcface")
    embeds = F.normalize(torch.eye(3, task.head.W.shape[0]), dim=1).requires_grad_()
    with torch.no_grad():
        task.head.W.copy_(embeds.T)
    task(image_embeds=embeds, labels=torch.arange(3)).loss.backward()
    assert embeds.grad.isfinite().all() and task.head.W.grad.isfinite().all()


def test_cosines_are_float32_under_autocast():
    task, generator = build(loss="cosface"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        task.head.W.normal_(generator=generator)
    embeds = F.normalize(torch.randn(4, len(task.head.W), generator=generator), dim=1)
    batch = {"image_embeds": embeds, "labels": torch.tensor([0, 1, 2, 0])}
    with torch.autocast("cpu", torch.bfloat16):
        found = task(**batch).loss
    assert torch.equal(found, task(**batch).loss)


# --- what is trained ---


@pytest.mark.parametrize("wrap", [lambda model: model, tiny_lora], ids=["plain", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_requires_gradients_gets_one_and_no_text_is_among_it(family, wrap):
    task = build(family, wrap)
    batch = start(task, rows_of([2, 2, 2]))
    task.train()(**batch).loss.backward()
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in task.named_parameters() if parameter.grad is not None} == trained
    text = [base_model(task.model).get_submodule(name) for name in tower_modules(task.model, "text")]
    assert not any(parameter.requires_grad for tower in text for parameter in tower.parameters())
    assert not base_model(task.model).logit_scale.requires_grad
    assert {"head.W"} < trained and task.beside() == ["head.W"]


def test_building_and_starting_draw_no_random_number():
    model, rows, states = tiny_model("clip"), rows_of([2, 2, 2]), (torch.get_rng_state(), np.random.get_state()[1])
    start(Identities(model, tiny_processor("clip"), NAMES), rows)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])


# --- where the head starts ---


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_the_head_starts_at_the_mean_embeddings_of_the_pretrained_model(batch_size):
    task = build(wrap=partial(tiny_lora, init_lora_weights=False))
    batch = start(task, rows_of([2, 3, 4]), batch_size)
    with torch.no_grad():
        embeds = image_embeds(tiny_model("clip"), batch["pixel_values"])  # (images, dim)
        assert not torch.allclose(image_embeds(task.model, batch["pixel_values"]), embeds, atol=1e-3)
    means = torch.stack([embeds[batch["labels"] == identity].mean(dim=0) for identity in range(3)])
    torch.testing.assert_close(task.head.W.T, F.normalize(means, dim=1), atol=1e-6, rtol=0)


def test_a_head_that_has_started_stays():
    task = build()
    start(task, rows_of([2, 2, 2]))
    before = task.head.W.clone()
    start(task, rows_of([2, 3, 4]))
    assert torch.equal(task.head.W, before)


def test_an_identity_without_images_and_one_whose_images_cancel_are_refused():
    with pytest.raises(DataError, match=r"1 identities have no image.*\[1\]"):
        mean_directions([(torch.eye(2), torch.tensor([0, 2]))], 3, Accelerator())
    with pytest.raises(DataError, match="cancel"):
        mean_directions([(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0]))], 1, Accelerator())


# --- other identities ---


def test_any_identities_are_measured_by_their_embeddings():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(30, generator=generator) % 6 + 1000
    embeds = F.normalize(torch.eye(6)[labels - 1000] + 0.5 * torch.randn(30, 6, generator=generator), dim=1)
    cosines = (embeds @ embeds.T).fill_diagonal_(-2)
    precisions = []
    for row, label in enumerate(labels):
        same = (labels == label).sum() - 1
        hits = (labels[cosines[row].argsort(descending=True)[:same]] == label).double()  # (same,)
        precisions.append((hits * hits.cumsum(0) / torch.arange(1, same + 1)).sum() / same)
    measure = IdentityMeasure()
    for part in range(2):
        batches = [embeds[15 * part : 15 * part + 15].numpy()], [labels[15 * part : 15 * part + 15].numpy()]
        found = measure(EvalPrediction(*batches), compute_result=part == 1)
        assert bool(found) == (part == 1)
    assert set(found) == set(Identities.metrics)
    assert found["recall@1"] == pytest.approx((labels[cosines.argmax(1)] == labels).double().mean().item())
    assert found["mAP@R"] == pytest.approx(torch.stack(precisions).mean().item())
    assert found["loss"] == 1 - found["mAP@R"] and 0 < found["loss"] < 1


def test_labels_of_other_identities_give_no_loss():
    task, batch = build(), {**tiny_batch("clip", 2), "labels": torch.tensor([4711, 9])}
    with task.answering(rows_of([1, 1], ["ann", "bob"])):
        output = task(**batch)
    assert output.loss is None and output.image_embeds.shape[0] == 2
    with pytest.raises(ConfigError, match="has not started"):
        task(**batch)
    assert not task.knows(rows_of([1, 1], ["ann", "7"])) and task.knows(rows_of([1, 1], ["40", "7"]))


# --- what is refused ---


@pytest.mark.parametrize(
    ("counts", "names", "message"),
    [
        ([3, 1, 2], NAMES, r"1 of 3 identities have fewer than two images.*\['40'\].*filter"),
        ([3, 3, 0], NAMES, "other identities than the head"),
        ([2, 2, 2], ["7", "40", "41"], "other identities than the head"),
    ],
)
def test_training_sets_from_which_nothing_would_be_learned_are_refused(counts, names, message):
    with pytest.raises(DataError, match=message):
        build().check_training(rows_of(counts, names))
    build().check_training(rows_of([2, 2, 2]))


@pytest.mark.parametrize(
    ("identities", "settings", "error", "message"),
    [
        (["ann"], {}, DataError, "one identity"),
        ([7, 8, 7], {}, DataError, "an identity is repeated.*'7'"),
        (NAMES, {"loss": "triplet"}, ConfigError, "unknown loss.*'cosine', 'cosface', 'arcface'"),
        (NAMES, {"scale": 0.0}, ConfigError, "scale is out of range"),
        (NAMES, {"scale": math.inf}, ConfigError, "scale is out of range"),
        (NAMES, {"loss": "arcface", "margin": 28.6}, ConfigError, "margin is out of range.*radians"),
        (NAMES, {"loss": "cosface", "margin": True}, ConfigError, "margin is out of range"),
    ],
)
def test_settings_that_make_no_head_are_refused(identities, settings, error, message):
    with pytest.raises(error, match=message):
        Identities(tiny_model("clip"), tiny_processor("clip"), identities, **settings)


def test_labels_outside_the_head_and_batches_without_images_are_refused():
    task = build()
    batch = start(task, rows_of([2, 2, 2]))
    with pytest.raises(DataError, match="label is no identity.*got 3; allowed 0 to 2"):
        task(batch["pixel_values"], labels=torch.full((6,), 3))
    for both in ({}, {"pixel_values": batch["pixel_values"], "image_embeds": torch.eye(6)}):
        with pytest.raises(ConfigError, match="one of the two"):
            task(**both)


def test_a_checkpoint_of_another_head_is_refused():
    task = build(loss="cosface", margin=0.2, images_per_identity=4)
    task.check_settings(task.settings(), "run")
    assert build(**{n: v for n, v in task.settings().items() if n != "identities"}).settings() == task.settings()
    for name, value in {"identities": NAMES[:2], "loss": "arcface", "scale": 30.0, "margin": None}.items():
        with pytest.raises(AdapterFileError, match=f"{name} differs"):
            task.check_settings({**task.settings(), name: value}, "run")


def test_images_are_shuffled_unless_several_of_an_identity_are_wanted():
    rows = rows_of([2, 2, 2])
    assert build().sampler(rows, 4, Draws(0)) is None
    assert len(list(build(images_per_identity=2).sampler(rows, 4, Draws(0)))) == 4
