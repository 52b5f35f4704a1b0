# SPDX-License-Identifier: Apache-2.0
"""RobustTrainer's evaluation: what is kept of a set, what metrics get, and half precision."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_robust import wise_ft
from hf_robust.errors import ConfigError, NonFiniteError
from hf_robust.tasks import accuracy
from hf_robust.tasks.accuracy import AccuracyAndLoss, correct_and_loss
from hf_robust.training.trainer import RobustTrainer
from tests.tiny_models import image_dataset, tiny_model
from tests.trainers import NAMES, OTHER_NAMES, build, same, weights

SEVEN, NINE = image_dataset(7, NAMES, seed=50), image_dataset(9, NAMES, seed=60)


def numbers(metrics):
    return {name: value for name, value in metrics.items() if name.endswith(("accuracy", "loss"))}


# --- the default metrics ---


def test_metrics_are_those_of_all_logits(tmp_path):
    for size in (1, 3, 8):
        evaluated = build(
            tmp_path, model=tiny_model("clip").double(), eval_dataset=SEVEN, per_device_eval_batch_size=size
        )
        metrics, prediction = evaluated.evaluate(), evaluated.predict(SEVEN)
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        assert logits.shape == (7, 3) and labels.tolist() == SEVEN["label"][:]
        assert metrics["eval_accuracy"] == (logits.argmax(1) == labels).double().mean().item()
        assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-12)
        assert prediction.metrics["test_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-12)
        assert not [name for name in (*metrics, *prediction.metrics) if "preparation" in name]


BATCHES = [
    ({}, [[7, 2]]),
    ({"batch_eval_metrics": True}, [[3, 2], [3, 2], [1, 2]]),
    ({"eval_do_concat_batches": False}, [[3, 3, 1]]),
]


@pytest.mark.parametrize(("settings", "expected"), BATCHES)
@pytest.mark.parametrize("moved", [None, 1])
def test_of_every_image_two_numbers_are_kept(tmp_path, monkeypatch, settings, expected, moved):
    seen = []
    call = AccuracyAndLoss.__call__

    def spy(self, prediction, compute_result=True):
        given = prediction.predictions
        seen.append([len(given), *given.shape[1:]] if not isinstance(given, list) else [len(g) for g in given])
        return call(self, prediction, compute_result)

    monkeypatch.setattr(AccuracyAndLoss, "__call__", spy)
    how = {"per_device_eval_batch_size": 3, "eval_accumulation_steps": moved}
    evaluated = build(tmp_path, eval_dataset=SEVEN, **how, **settings)
    plain = numbers(build(tmp_path, eval_dataset=SEVEN, per_device_eval_batch_size=3).evaluate())
    seen.clear()
    assert numbers(evaluated.evaluate()) == pytest.approx(plain, abs=1e-12)
    assert seen == expected
    prediction = evaluated.predict(SEVEN)
    assert np.concatenate([np.atleast_2d(p) for p in prediction.predictions]).shape == (7, 3)
    assert prediction.metrics["test_accuracy"] == plain["eval_accuracy"]


def test_an_evaluation_that_was_stopped_is_not_counted_by_the_next(tmp_path, monkeypatch):
    evaluated = build(tmp_path, eval_dataset=SEVEN, per_device_eval_batch_size=3, batch_eval_metrics=True)
    expected = numbers(evaluated.evaluate())
    monkeypatch.setattr(accuracy.F, "cross_entropy", Interrupted(after=1))
    with pytest.raises(KeyboardInterrupt):
        evaluated.evaluate()
    monkeypatch.undo()
    assert numbers(evaluated.evaluate()) == expected


class Interrupted:
    def __init__(self, after):
        self.calls, self.cross_entropy = after, F.cross_entropy

    def __call__(self, *args, **settings):
        if settings.get("reduction") == "none":
            self.calls -= 1
            if self.calls < 0:
                raise KeyboardInterrupt
        return self.cross_entropy(*args, **settings)


def test_sums_are_exact():
    logits, labels = torch.randn(1000, 5, dtype=torch.float64), torch.randint(5, (1000,))
    whole = AccuracyAndLoss()(EvalPrediction(logits.numpy(), labels.numpy()))
    batches = AccuracyAndLoss(from_logits=False)
    for rows in range(0, 1000, 7):
        part = slice(rows, rows + 7)
        last = batches(EvalPrediction(correct_and_loss(logits[part], labels[part]), labels[part]), rows + 7 >= 1000)
    assert last["accuracy"] == whole["accuracy"] and last["loss"] == pytest.approx(whole["loss"], abs=1e-12)


# --- the user's metrics ---


def test_metrics_get_inputs_and_losses(tmp_path):
    seen = {}

    def metrics(prediction):
        seen.update(inputs=prediction.inputs, losses=prediction.losses, logits=prediction.predictions)
        return {"images": len(prediction.label_ids)}

    evaluated = build(tmp_path, eval_dataset=SEVEN, compute_metrics=metrics, include_for_metrics=["inputs", "loss"])
    assert evaluated.evaluate()["eval_images"] == 7
    assert seen["inputs"].shape == (7, 3, 32, 32) and seen["losses"].shape == (7,) and seen["logits"].shape == (7, 3)
    evaluated.args.include_for_metrics = []
    evaluated.evaluate()
    assert seen["inputs"] is None and seen["losses"] is None


def test_metrics_may_be_computed_batch_by_batch(tmp_path):
    seen = []

    def metrics(prediction, compute_result):
        seen.append((tuple(prediction.predictions.shape), compute_result))
        return {"batches": len(seen)} if compute_result else {}

    settings = {"batch_eval_metrics": True, "per_device_eval_batch_size": 3}
    evaluated = build(tmp_path, eval_dataset=SEVEN, compute_metrics=metrics, **settings)
    assert evaluated.evaluate()["eval_batches"] == 3
    assert seen == [((3, 3), False), ((3, 3), False), ((1, 3), True)]


def test_logits_may_be_preprocessed(tmp_path):
    def metrics(prediction):
        return {"right": (prediction.predictions == prediction.label_ids).mean()}

    settings = {"compute_metrics": metrics, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(1)}
    evaluated = build(tmp_path, eval_dataset=SEVEN, **settings)
    expected = build(tmp_path, eval_dataset=SEVEN).evaluate()["eval_accuracy"]
    assert evaluated.evaluate()["eval_right"] == expected
    assert evaluated.predict(SEVEN).predictions.shape == (7,)
    with pytest.raises(ConfigError, match="from logits.*preprocess_logits_for_metrics.*Pass compute_metrics"):
        build(tmp_path, preprocess_logits_for_metrics=lambda logits, labels: logits)


def test_the_loss_alone_may_be_computed(tmp_path):
    metrics = build(tmp_path, eval_dataset=SEVEN, prediction_loss_only=True).evaluate()
    expected = build(tmp_path, eval_dataset=SEVEN).evaluate()
    assert "eval_accuracy" not in metrics and metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


# --- batches ---


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")
def test_workers_that_stay_answer_for_the_set_that_is_asked(tmp_path):
    """`Trainer` would answer for the first set every time."""
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    evaluated, plain = build(tmp_path, eval_dataset=SEVEN, **settings), build(tmp_path, eval_dataset=SEVEN)
    for dataset in (SEVEN, NINE, {"a": NINE, "b": SEVEN}):
        assert numbers(evaluated.evaluate(dataset)) == numbers(plain.evaluate(dataset))


def test_the_last_batch_is_dropped_in_training_alone(tmp_path):
    settings = {"dataloader_drop_last": True, "per_device_eval_batch_size": 4, "max_steps": 1}
    evaluated = build(tmp_path, eval_dataset=SEVEN, **settings)
    assert len(evaluated.get_train_dataloader()) == 4  # of 18 images, by 4
    plain = build(tmp_path, eval_dataset=SEVEN, per_device_eval_batch_size=4)
    assert numbers(evaluated.evaluate()) == numbers(plain.evaluate())
    assert len(evaluated.predict(SEVEN).predictions) == 7


# --- half precision ---


def state(trainer):
    trainer.model.eval()(**trainer.data_collator([SEVEN[0]]))  # SAFT writes its values in the forward
    return copy.deepcopy({**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())})


def identical(first, second):
    return same(first, second) and all(first[name].dtype == second[name].dtype for name in first)


@pytest.mark.parametrize("precision", ["bf16_full_eval", "fp16_full_eval"])
@pytest.mark.parametrize(
    ("method", "head"), [("full", "trainable"), ("saft", "live"), ("aclip", "frozen"), ("lora", "live")]
)
def test_half_precision_leaves_weights_and_training_as_they_are(tmp_path, method, head, precision):
    plain, half = (build(tmp_path, method, head=head, **{precision: flag}) for flag in (False, True))
    before, full = state(half), numbers(plain.evaluate())
    found = numbers(half.evaluate())
    assert identical(state(half), before)
    assert found != full and found == pytest.approx(full, rel=0.1, abs=0.3)
    half.predict(SEVEN)
    assert identical(state(half), before)
    plain.train(), half.train()
    assert identical(state(half), state(plain))
    trained = state(half)
    rows, full_rows = (one.wise_ft_sweep(SEVEN, alphas=[0, 0.5, 1]).rows for one in (half, plain))
    for row, full in zip(rows, full_rows, strict=True):
        assert row["validation_loss"] == pytest.approx(full["validation_loss"], rel=0.1)
    wise_ft(half.model, 1, half.zero_shot)
    assert identical(state(half), trained)


@pytest.mark.parametrize("method", ["full", "saft", "lora"])
def test_half_precision_in_the_middle_of_training(tmp_path, method):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_dataset": SEVEN}
    plain, half = build(tmp_path, method), build(tmp_path, method, bf16_full_eval=True, **evaluated)
    plain.train(), half.train()
    assert same(weights(half), weights(plain))
    last = [entry for entry in half.state.log_history if "eval_loss" in entry][-1]
    assert last["eval_loss"] == half.evaluate()["eval_loss"]  # in the same precision after the training


@pytest.mark.parametrize("method", ["full", "saft", "lora"])
def test_half_precision_that_stops_with_an_error(tmp_path, method):
    class Stopped(RobustTrainer):
        def prediction_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    half = build(tmp_path, method, cls=Stopped, bf16_full_eval=True)
    before = state(half)
    with pytest.raises(KeyboardInterrupt):
        half.evaluate()
    assert identical(state(half), before)
    half.train()
    plain = build(tmp_path, method)
    plain.train()
    assert same(weights(half), weights(plain))


def test_the_precision_is_that_of_the_model_that_answers(tmp_path):
    seen = []

    class Seen(RobustTrainer):
        def prediction_step(self, model, *args, **kwargs):
            seen.append((model.model.visual_projection.weight.dtype, model.training, model is self.model))
            return super().prediction_step(model, *args, **kwargs)

    half = build(
        tmp_path, cls=Seen, bf16_full_eval=True, eval_dataset={"id": SEVEN, "new": image_dataset(3, OTHER_NAMES)}
    )
    half.evaluate()
    assert set(seen) == {(torch.bfloat16, False, True)}


def test_a_training_that_failed_is_over(tmp_path):
    class Broken(RobustTrainer):
        def loss_terms(self, outputs, inputs):
            terms = super().loss_terms(outputs, inputs)
            return {"cross_entropy": terms["cross_entropy"] * (np.nan if self.model.training else 1.0)}

    half = build(tmp_path, cls=Broken)
    with pytest.raises(NonFiniteError):
        half.train()
    assert not half.is_in_train
