# SPDX-License-Identifier: Apache-2.0
"""What stops RobustTrainer: numbers that are not finite, and bad input."""

from __future__ import annotations

import math

import pytest
from transformers import CLIPVisionModel

from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.training.arguments import RobustTrainingArguments
from hf_robust.training.trainer import RobustTrainer
from tests.tiny_models import image_dataset, tiny_model
from tests.trainers import NAMES, build, same, weights

# --- what is not finite ---


@pytest.mark.parametrize("method", ["full", "saft"])
def test_nan_loss_stops_before_the_step(tmp_path, method):
    class Broken(RobustTrainer):
        def loss_terms(self, outputs, inputs):
            terms = super().loss_terms(outputs, inputs)
            if self.state.global_step == 2:
                kept.update(weights(self))
                return {"cross_entropy": terms["cross_entropy"] * math.nan}
            return terms

    kept = {}
    trained = build(tmp_path, method, cls=Broken)
    with pytest.raises(NonFiniteError, match=r"loss is nan \(at step 3, rank 0\)"):
        trained.train()
    assert kept and same(weights(trained), kept)


def test_nan_gradient_stops_before_the_step(tmp_path):
    trained = build(tmp_path)
    weight = trained.model.model.visual_projection.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(trained)
    with pytest.raises(NonFiniteError, match=r"gradient norm is (inf|nan) \(at step 1\)"):
        trained.train()
    assert same(weights(trained), before)


def test_nan_logits_stop_the_evaluation(tmp_path):
    trained = build(tmp_path)
    trained.model.model.visual_projection.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="logits are not finite.*eval_id"):
        trained.evaluate()


# --- bad input ---


def two_labels(labels):
    return image_dataset(len(labels), NAMES).remove_columns("label").add_column("label", labels)


BAD_INPUT = {
    "no image column": ({"train_dataset": image_dataset(6, NAMES).rename_column("image", "x")}, DataError, "'image'"),
    "no label column": (
        {"train_dataset": image_dataset(6, NAMES).rename_column("label", "x"), "class_names": NAMES},
        DataError,
        "'label'",
    ),
    "label too large": (
        {"train_dataset": two_labels([0, 3]), "class_names": NAMES},
        DataError,
        "row 1 is no class.*train_dataset.*got 3",
    ),
    "fewer names than labels": ({"class_names": NAMES[:2]}, DataError, "2 class_names for the data's 3 classes"),
    "bad evaluation set": (
        {"eval_dataset": {"id": image_dataset(3, NAMES), "ood": two_labels([0, 7])}},
        DataError,
        "row 1 is no class.*ood",
    ),
    "empty training set": ({"train_dataset": image_dataset(6, NAMES).select([])}, DataError, "empty.*train_dataset"),
    "empty evaluation set": ({"eval_dataset": {"ood": image_dataset(3, NAMES).select([])}}, DataError, "empty.*ood"),
    "no class names": ({"train_dataset": two_labels([0, 1])}, DataError, "class names are missing"),
    "repeated class name": ({"class_names": ["red", "Red ", "blue"]}, DataError, "twice"),
    "empty class name": ({"class_names": ["red", " ", "blue"]}, DataError, "empty"),
    "template without braces": ({"templates": "a photo"}, ConfigError, "without {}"),
    "unknown head": ({"head": "linear"}, ConfigError, "unknown head"),
    "label smoothing": ({"label_smoothing_factor": 1.0}, ConfigError, "label smoothing"),
    "one tower": (
        {"model": CLIPVisionModel(tiny_model("clip").config.vision_config)},
        ConfigError,
        "get_image_features/get_text_features",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_error_before_training(tmp_path, name):
    settings, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=message):
        build(tmp_path, **settings)


def test_processor_is_required(tmp_path):
    with pytest.raises(ConfigError, match="processor"):
        RobustTrainer(tiny_model("clip"), RobustTrainingArguments(str(tmp_path), use_cpu=True))


def test_evaluation_set_at_call_time_is_checked(tmp_path):
    with pytest.raises(DataError, match="empty.*late"):
        build(tmp_path).evaluate({"late": image_dataset(3, NAMES).select([])})
