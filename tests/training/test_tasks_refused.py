# SPDX-License-Identifier: Apache-2.0
"""Settings and sets that a task cannot use, and metrics that none gives: found before training."""

from __future__ import annotations

import math

import pytest
from torch.utils.data import Dataset

from hf_robust import ZeroShotClassifier
from hf_robust.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import NAMES, build


def of(target, n=8, seed=0):
    values = {
        "text": lambda label, row: f"a {NAMES[label]} thing, number {row}",
        "labels": lambda label, row: [NAMES[label], "striped"],
        "identity": lambda label, row: NAMES[label],
    }[target]
    rows = image_dataset(n, NAMES, seed=seed)
    column = [values(label, row) for row, label in enumerate(rows["label"])]
    return rows.remove_columns("label").add_column(target, column)


SETTINGS = {
    "unknown": ({"pairs": {"foo": 1}}, "text", "unknown setting of a task .at task, pairs.*'foo'"),
    "close": ({"several_labels": {"los": "bce"}}, "labels", "several_labels.*'los'.*Did you mean 'loss'"),
    "of another task": ({"flyp": {"text_chunk_size": 4}}, "text", "at task, flyp.*'contrastive_chunk_size'"),
    "given elsewhere": ({"class_names": {"head": "live"}}, "text", "unknown setting of a task.*'head'"),
    "another type": ({"pairs": {"margin": "0.1"}}, "text", "a setting has another type"),
    "no name": ([], "text", "unknown task"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_wrong_settings_of_a_task_are_one_error(tmp_path, case):
    task, target, message = SETTINGS[case]
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, task=task, train_dataset=of(target), eval_dataset=None)


class Plain(Dataset):
    """Rows whose texts show only when they are read."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": image_dataset(4, NAMES)[index]["image"], "text": f"number {index}"}


SETS = {
    "texts that are not known": ("text", Plain(), "retrieval is among all texts.*at id.*'?Plain"),
    "one identity": ("identity", of("identity").select([0, 3]), "nothing to tell apart.*at id"),
    "single images": ("identity", of("identity").select([0, 1, 2]), "at id.*one with 2 images"),
    "no label": ("labels", of("labels").map(lambda row: {"labels": [0] * 4}), "no image has a label.*at id"),
}


@pytest.mark.parametrize("case", SETS)
def test_a_set_that_cannot_be_evaluated_is_refused_at_once(tmp_path, case):
    target, dataset, message = SETS[case]
    names = [*NAMES, "striped"] if target == "labels" else None
    with pytest.raises(DataError, match=message):
        build(tmp_path, train_dataset=of(target), eval_dataset={"id": dataset}, class_names=names)


def test_only_a_head_is_not_worth_training(tmp_path):
    frozen = tiny_model("clip").requires_grad_(False)
    with pytest.raises(ConfigError, match="only the head would be trained"):
        build(tmp_path, model=frozen, train_dataset=of("identity"), eval_dataset=None).train()


@pytest.mark.parametrize("target", ["text", "identity"])
def test_no_loss_is_made_up_beside_metrics_of_the_users_own(tmp_path, target):
    how = {"train_dataset": of(target), "eval_dataset": {"validation": of(target, seed=9)}}
    metrics = {"compute_metrics": lambda prediction: {"found": 1.0}}
    found = build(tmp_path, **how, **metrics).evaluate()
    assert found["eval_validation_found"] == 1.0 and "eval_validation_loss" not in found
    choosing = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    with pytest.raises(ConfigError, match="no loss of a set"):
        build(tmp_path, **how, **metrics, **choosing, metric_for_best_model="validation_loss")
    searched = build(tmp_path, model_init=lambda: tiny_model("clip"), **how, **metrics)
    with pytest.raises(ConfigError, match="no loss of a set.*compute_objective"):
        searched.hyperparameter_search(n_trials=1)


def test_nothing_is_chosen_by_nan(tmp_path):
    how = {"train_dataset": of("identity"), "eval_dataset": {"validation": of("identity", seed=9)}}
    how |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = build(tmp_path, **how, metric_for_best_model="validation_tar_at_far_1e-3")
    assert math.isnan(trainer.evaluate()["eval_validation_tar_at_far_1e-3"])
    with pytest.raises(NonFiniteError, match="the metric to choose by is NaN"):
        trainer.train()


def test_images_without_a_target_are_predicted(tmp_path):
    for target in ("text", "identity"):
        trainer = build(tmp_path, train_dataset=of(target), eval_dataset=None)
        predictions = trainer.predict(of(target, 3).select_columns("image"))
        assert predictions.predictions.shape == (3, 24)


def test_a_run_with_other_classes_per_step_is_another_run(tmp_path):
    def run(size, checkpoint=None):
        names = [f"class {name}" for name in range(8)]
        task = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), names, classes_per_step=size)
        sets = {"train_dataset": image_dataset(8, names), "eval_dataset": None, "per_device_train_batch_size": 2}
        build(tmp_path, model=task, save_strategy="steps", save_steps=2, max_steps=3, **sets).train(checkpoint)

    run(6)
    with pytest.raises(CheckpointError, match="classes_per_step was 6, is None"):
        run(None, str(tmp_path / "checkpoint-2"))


def test_a_stream_needs_a_number_of_steps(tmp_path):
    with pytest.raises(ConfigError, match="max_steps"):
        build(tmp_path, train_dataset=of("text").to_iterable_dataset(), eval_dataset=None, task="pairs")
