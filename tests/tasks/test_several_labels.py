# SPDX-License-Identifier: Apache-2.0
"""What the task of several labels starts from, trains, answers and refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import EvalPrediction

from hf_robust.data.rows import LabelledImages
from hf_robust.errors import ConfigError, DataError
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.tasks.label_metrics import best_threshold, label_metrics
from hf_robust.tasks.several_labels import SeveralLabels
from tests.tiny_models import tiny_batch, tiny_lora, tiny_model, tiny_processor

NAMES = ["cat", "hummingbird", "ox", "jay"]
HEADS = ["frozen", "live", "trainable"]
LABELS = torch.tensor([[1, 0, 0, 1], [0, 1, torch.nan, 0], [0, 0, 1, 0], [1, 1, 0, torch.nan], [0, 0, 0, 1], [0] * 4])
ACCELERATOR = Accelerator(cpu=True)


def build(head="live", family="clip", wrap=lambda model: model, **settings):
    return SeveralLabels(wrap(tiny_model(family)), tiny_processor(family), NAMES, head=head, **settings).eval()


def batches(family="clip"):
    images = tiny_batch(family, len(LABELS))
    for rows in (slice(0, 4), slice(4, None)):
        yield {**{name: tensor[rows] for name, tensor in images.items()}, "labels": LABELS[rows]}


def prepared(head="live", family="clip", **settings):
    task = build(head, family, **settings)
    task.prepare(lambda: batches(family), ACCELERATOR)
    return task


def rows_of(labels, class_names=NAMES):
    labels = np.array(labels, np.int8)
    return LabelledImages(None, "photos", None, np.arange(len(labels)), labels, class_names)


# --- where it starts ---


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("head", HEADS)
def test_it_begins_with_the_models_own_logits(head, family):
    task, model = build(head, family, wrap=tiny_lora), tiny_model(family)
    output = task(**tiny_batch(family, 3))
    zero_shot = ZeroShotClassifier(model, tiny_processor(family), NAMES).eval()
    torch.testing.assert_close(output.logits, zero_shot(**tiny_batch(family, 3)).logits, atol=1e-5, rtol=0)
    assert output.loss is None


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("head", HEADS)
def test_prepared_the_mean_probability_is_the_base_rate_in_the_order_of_before(head, family):
    before = build(head, family)(**tiny_batch(family, 6)).logits
    logits = prepared(head, family)(**tiny_batch(family, 6)).logits
    known = ~LABELS.isnan()
    torch.testing.assert_close(logits[known].sigmoid().mean(), LABELS[known].mean(), atol=1e-4, rtol=0)
    assert before.flatten().argsort().equal(logits.flatten().argsort()) and before.sub(logits).abs().min() > 0.01


@pytest.mark.parametrize("head", HEADS)
def test_it_is_prepared_once_and_loads_so(head):
    task, loaded = prepared(head), build(head)
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.01)
    own = copy.deepcopy(task.own_tensors())
    loaded.load_state_dict(own, strict=False)
    for one in (task, loaded):
        one.prepare(lambda: batches(), ACCELERATOR)
        assert {name: tensor.tolist() for name, tensor in one.own_tensors().items()} == {
            name: tensor.tolist() for name, tensor in own.items()
        }


def test_the_heads_of_one_task_agree_when_prepared():
    logits = [prepared(head)(**tiny_batch("clip", 6)).logits for head in HEADS]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[0], logits[2], atol=1e-5, rtol=0)


# --- training ---


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("head", HEADS)
def test_exactly_the_parameters_of_the_forward_are_trainable(head, family):
    task = build(head, family).train()
    task(**tiny_batch(family, 6), labels=LABELS).loss.backward()
    with_grad = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert with_grad == {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert {"label_scale", "label_bias"} <= with_grad
    assert not {"model.logit_scale", "model.logit_bias"} & with_grad


@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_the_loss_is_a_mean_over_images_of_what_is_known(loss):
    task = prepared(loss=loss).double()
    whole = task(**tiny_batch("clip", 6), labels=LABELS).loss
    parts = [task(**batch).loss * len(batch["labels"]) / 6 for batch in batches()]
    torch.testing.assert_close(sum(parts), whole)
    known = LABELS[:, :2]  # without NaN
    with task.classes(NAMES[:2]):
        torch.testing.assert_close(
            task(**tiny_batch("clip", 6), labels=known).loss,
            task(**tiny_batch("clip", 6), labels=known.double()).loss,
        )


@pytest.mark.parametrize("labels", [LABELS[:, :3], LABELS[:5], torch.tensor([[0.5, 0, 0, 0]] * 6), LABELS[:, 0]])
def test_labels_of_another_form_are_refused(labels):
    with pytest.raises(DataError, match=r"labels do not fit|no yes or no"):
        build()(**tiny_batch("clip", 6), labels=labels)


# --- other sets ---


@pytest.mark.parametrize("head", HEADS)
def test_some_of_the_classes_in_another_order_are_answered_by_the_rows_of_the_head(head):
    task = prepared(head)
    own = task(**tiny_batch("clip", 6))
    with task.answering(rows_of([[1, 0]], ["Ox", "cat"])):
        some = task(**tiny_batch("clip", 6), labels=LABELS[:, [2, 0]])
    torch.testing.assert_close(some.logits, own.logits[:, [2, 0]])
    assert some.class_embeds.equal(own.class_embeds[[2, 0]])
    assert task(**tiny_batch("clip", 6)).logits.equal(own.logits)


@pytest.mark.parametrize("head", HEADS)
def test_foreign_classes_are_answered_with_the_scale_and_bias_of_the_task(head):
    task = prepared(head)
    with task.answering(rows_of([[1, 0]], ["quiz", "ox"])):
        found = task(**tiny_batch("clip", 6))
    expected = task.label_scale.exp() * found.image_embeds @ found.class_embeds.T + task.label_bias
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits[:, 1], task(**tiny_batch("clip", 6)).logits[:, 2], atol=1e-5, rtol=0)


# --- what it refuses ---


def test_rows_with_labels_of_more_classes_are_refused():
    task = build()
    task.check_rows(rows_of([[1, 0]], ["ox", "cat"]))
    task.check_rows(rows_of([[1, 0, 0, -1]], None))
    with pytest.raises(DataError, match="labels do not fit"):
        task.check_rows(rows_of([[1, 0]], None))


def test_training_needs_a_class_that_some_images_have_and_some_lack(caplog):
    task = build()
    for labels in ([[1, 0, 0, 1]] * 3, [[0, 0, 0, 0]] * 3, [[1, -1, 0, -1], [-1, 0, 0, -1]]):
        with pytest.raises(DataError, match="nothing to tell apart"):
            task.check_training(rows_of(labels))
    with pytest.raises(DataError, match="other classes"):
        task.check_training(rows_of([[1, 0], [0, 1]], ["ox", "cat"]))
    assert not caplog.messages
    task.check_training(rows_of([[1, 0, 0, -1], [0, 0, 1, 0]]))
    assert caplog.messages == [
        "photos: no image has 2 of the classes, which are trained to be absent: 'hummingbird', 'jay'"
    ]


@pytest.mark.parametrize("settings", [{"loss": "ce"}, {"positive_weights": [1.0]}, {"threshold": float("nan")}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=f"at {next(iter(settings))}"):
        build(**settings)


# --- what it is measured by ---


def test_the_measure_is_that_of_all_images_whatever_the_batches():
    task = prepared(loss="asymmetric", threshold=-0.5)
    with torch.no_grad():
        whole = task(**tiny_batch("clip", 6), labels=LABELS)
        parts = [task(**batch).logits for batch in batches()]
    measure, rows = task.measure(rows_of([[1, 0, 0, 0]]), whole=False), (LABELS[:4], LABELS[4:])
    kept = [measure.of_batch(logits, labels) for logits, labels in zip(parts, rows, strict=True)]
    assert measure(EvalPrediction(kept[0].numpy(), rows[0].numpy()), compute_result=False) == {}
    found = measure(EvalPrediction(kept[1].numpy(), rows[1].numpy()), compute_result=True)
    expected = {**label_metrics(whole.logits, LABELS, -0.5), "loss": float(whole.loss)}
    assert found == pytest.approx(expected, abs=1e-6) and set(task.metrics) <= set(found)


def test_the_threshold_is_chosen_and_saved_with_what_builds_the_task_again():
    task = prepared(positive_weights=[1.0, 2.0, 3.0, 4.0], loss="asymmetric")
    logits = task(**tiny_batch("clip", 6)).logits
    assert task.choose_threshold(logits, LABELS) == task.threshold == best_threshold(logits, LABELS) != 0
    settings = task.settings()
    again = SeveralLabels(tiny_model("clip"), tiny_processor("clip"), **settings)
    assert again.settings() == settings and again.threshold == task.threshold
    found = label_metrics(logits, LABELS, task.threshold)["f1_micro"]
    assert found == max(label_metrics(logits, LABELS, t)["f1_micro"] for t in logits.flatten().tolist())
