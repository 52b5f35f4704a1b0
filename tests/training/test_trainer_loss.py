# SPDX-License-Identifier: Apache-2.0
"""What RobustTrainer minimises: class weights, label smoothing, and a loss of the user's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from transformers import HfArgumentParser

from hf_robust.data.collator import ImageCollator
from hf_robust.errors import ConfigError
from hf_robust.ogen import OGENConfig, OGENLoss
from hf_robust.tasks.task_loss import class_weights
from hf_robust.training.arguments import RobustTrainingArguments
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import NAMES, OTHER_NAMES, build, entries, same, weights

CLASSES = np.arange(3)
UNEVEN = [0, 0, 0, 0, 1, 0, 0, 2, 0, 1, 0, 0, 0]


def uneven(labels=UNEVEN):
    dataset = image_dataset(len(labels), NAMES)
    return dataset.remove_columns("label").add_column("label", labels).cast_column("label", dataset.features["label"])


def focal(outputs, labels, num_items_in_batch):
    """As `Trainer` asks for it: a sum over the micro-batch, divided by the images of the optimizer step."""
    loss = F.cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).sum() / num_items_in_batch


LOSSES = {
    "label smoothing": {"label_smoothing_factor": 0.2},
    "balanced": {"class_weights": "balanced"},
    "weights": {"class_weights": [1.0, 5.0, 0.5]},
    "both": {"class_weights": "balanced", "label_smoothing_factor": 0.2},
    "own": {"compute_loss_func": focal},
}


def trained(folder, method="full", size=8, steps=1, **settings):
    sgd = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.5, "num_train_epochs": 1}
    how = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, **sgd}
    model, dataset = tiny_model("clip").double(), settings.pop("train_dataset", uneven())
    run = build(folder, method, train_dataset=dataset, model=model, **how, **settings)
    run.train()
    return run


@pytest.mark.parametrize(("name", "method"), [("both", "full"), ("weights", "saft"), ("own", "saft")])
def test_accumulated_micro_batches_equal_the_big_batch(tmp_path, name, method):
    big = weights(trained(tmp_path, method, **LOSSES[name]))
    assert not same(big, weights(trained(tmp_path, method)))
    for key, weight in weights(trained(tmp_path, method, 1, 8, **LOSSES[name])).items():
        torch.testing.assert_close(weight, big[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", LOSSES)
def test_first_loss_is_the_one_documented(tmp_path, name):
    whole = {"size": 13, "logging_strategy": "steps", "logging_steps": 1, "eval_dataset": uneven()}
    run = trained(tmp_path, **whole, **LOSSES[name])
    batch = ImageCollator(tiny_processor("clip"))(list(uneven()))
    outputs = build(tmp_path, model=tiny_model("clip").double()).model.eval()(**batch)
    logits, labels = outputs.logits, batch["labels"]
    w = torch.tensor(compute_class_weight("balanced", classes=CLASSES, y=UNEVEN))
    given = torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64)
    expected = {
        "label smoothing": F.cross_entropy(logits, labels, label_smoothing=0.2),
        "balanced": F.cross_entropy(logits, labels, weight=w),  # over the whole set, torch's own mean
        "weights": F.cross_entropy(logits, labels, weight=given),
        "both": F.cross_entropy(logits, labels, weight=w, label_smoothing=0.2, reduction="sum") / 13,
        "own": focal(outputs, labels, 13),
    }
    assert run.state.log_history[0]["loss_cross_entropy"] == pytest.approx(expected[name].item(), rel=1e-6)
    plain = build(tmp_path, model=run.model.model, eval_dataset=uneven())
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]  # evaluation is by the plain cross-entropy


def test_own_metrics_are_beside_the_plain_loss(tmp_path):
    def accuracy(prediction):
        return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}

    own, plain = (
        build(tmp_path, eval_dataset=uneven(), compute_metrics=accuracy, **settings)
        for settings in ({"compute_loss_func": focal}, {"label_smoothing_factor": 0.3})
    )
    assert own.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_other_terms_are_added_to_a_loss_of_one_s_own(tmp_path):
    settings = {"losses": {"similarity": {"weight": 2.0}}, "logging_strategy": "steps", "logging_steps": 1}
    run = trained(tmp_path, size=4, **settings, compute_loss_func=focal)
    last = [entry for entry in run.state.log_history if "loss" in entry][-1]
    assert last["loss_similarity_vision"] > 0
    assert last["loss"] == pytest.approx(last["loss_cross_entropy"] + last["loss_similarity_vision"], rel=1e-5)


def test_ogen_weights_real_images_alone(tmp_path):
    def first(**settings):
        model = tiny_model("clip")
        model.vision_model.requires_grad_(False)
        model.visual_projection.requires_grad_(False)
        logged = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 1}
        ogen = OGENLoss(OGENConfig(new_class_names=OTHER_NAMES, neighbours=2, heads=2))
        run = build(tmp_path, model=model, losses=[ogen], train_dataset=uneven(), **logged, **settings)
        run.train()
        return run.state.log_history[0]

    plain, weighted = first(), first(class_weights="balanced")
    assert plain["loss_cross_entropy"] != weighted["loss_cross_entropy"]
    assert plain["loss_ogen_new"] == weighted["loss_ogen_new"]


def test_saft_selects_by_the_loss_it_minimises(tmp_path):
    runs = [build(tmp_path, "saft", train_dataset=uneven(), **settings) for settings in ({}, *LOSSES.values())]
    for run in runs:
        run.select_entries()
    assert not any(same(entries(runs[0]), entries(run)) for run in runs[1:])
    halves = build(tmp_path, "saft", train_dataset=uneven(), compute_loss_func=focal, selection_batch_size=5)
    halves.select_entries()
    assert same(entries(halves), entries(runs[-1]))


# --- class weights ---


def test_balanced_weights_are_those_of_scikit_learn():
    expected = torch.tensor(compute_class_weight("balanced", classes=CLASSES, y=UNEVEN))
    for dataset in (uneven(), uneven().with_transform(lambda rows: rows), [dict(row) for row in uneven()]):
        torch.testing.assert_close(class_weights("balanced", dataset, 3), expected)


def test_mean_weight_of_the_training_images_is_one():
    for given in ("balanced", [1.0, 5.0, 0.5], [0, 0, 3]):
        assert class_weights(given, uneven(), 3)[torch.tensor(UNEVEN)].mean().item() == pytest.approx(1, abs=1e-12)
    found = class_weights([1.0, 5.0, 0.5], uneven(), 3)
    torch.testing.assert_close(found / found[0], torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64))


def test_a_class_without_images_is_not_counted():
    torch.testing.assert_close(
        class_weights("balanced", uneven([0, 0, 2]), 4), torch.tensor([0.75, 0, 1.5, 0]).double()
    )


def test_class_weights_are_read_from_a_command_line():
    parser = HfArgumentParser(RobustTrainingArguments)
    assert parser.parse_args_into_dataclasses(["--class_weights", "balanced"])[0].class_weights == "balanced"
    assert parser.parse_dict({"class_weights": [1.0, 2.0]})[0].class_weights == [1.0, 2.0]


BAD = {
    "weights: word": ({"class_weights": "inverse"}, "no class weights.*'inverse'.*'balanced'"),
    "weights: negative": ({"class_weights": [1.0, -1.0, 1.0]}, "no class weights.*-1.0"),
    "weights: infinite": ({"class_weights": [1.0, float("inf"), 1.0]}, "no class weights.*inf"),
    "weights: none": ({"class_weights": []}, "no class weights"),
    "weights: too few": ({"class_weights": [1.0, 2.0]}, "do not fit the classes.*got 2.*3 numbers"),
    "weights: all zero": ({"class_weights": [0, 0, 0]}, "every training image has weight 0"),
    "weights: stream": (
        {"class_weights": "balanced", "train_dataset": uneven().to_iterable_dataset(), "max_steps": 1},
        "cannot be counted.*compute_loss_func",
    ),
    "smoothing": ({"label_smoothing_factor": -0.1}, r"label smoothing is out of range.*-0.1.*\[0, 1\)"),
    "two losses": ({"label_smoothing_factor": 0.1, "compute_loss_func": focal}, "it replaces.*compute_loss_func"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_losses_are_refused_at_construction(tmp_path, name):
    settings, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, **settings)


def test_a_loss_that_is_no_number_is_refused(tmp_path):
    run = build(tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum(1))
    before = weights(run)
    with pytest.raises(ConfigError, match=r"no loss was returned.*\(4,\).*num_items_in_batch"):
        run.train()
    assert same(before, weights(run))
