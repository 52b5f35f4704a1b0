# SPDX-License-Identifier: Apache-2.0
"""Training, SAFT's selection and evaluation by RobustTrainer."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model

from hf_robust import SAFTConfig, select_saft
from hf_robust.data.collator import ImageCollator
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.training import starting
from hf_robust.training.arguments import RobustTrainingArguments
from hf_robust.training.trainer import RobustTrainer
from tests.tiny_models import FAMILIES, image_dataset, tiny_model, tiny_processor
from tests.trainers import NAMES, OTHER_NAMES, build, entries, same, weights

# PEFT's own LN tuning warns about every LayerNorm
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


# --- training ---


@pytest.mark.parametrize(
    ("method", "family"),
    [(method, family) for method in ("full", "saft") for family in FAMILIES]
    + [("lora", "clip"), ("ln_tuning", "clip")],
)
def test_every_method_learns_and_every_family_can_be_taught(tmp_path, method, family):
    trained = build(tmp_path, method, family)
    before = trained.evaluate()
    trained.train()
    after = trained.evaluate()
    assert after["eval_id_loss"] < before["eval_id_loss"]
    assert all(0 <= after[f"eval_{name}_accuracy"] <= 1 for name in ("id", "new"))


@pytest.mark.parametrize("method", ["full", "saft"])
def test_accumulated_micro_batches_equal_the_big_batch(tmp_path, method):
    """With 13 images the last step of an epoch has five; with micro-batches of four these are four and one."""

    def run(size, steps):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        settings |= {
            "learning_rate": 0.05,
            "max_grad_norm": 0.5,
            "num_train_epochs": 1,
            "train_dataset": image_dataset(13, NAMES),
        }
        trained = build(tmp_path, method, model=tiny_model("clip").double(), **settings)
        trained.train()
        return weights(trained)

    big = run(8, 1)
    for size, steps in [(1, 8), (4, 2)]:
        for name, weight in run(size, steps).items():
            torch.testing.assert_close(weight, big[name], rtol=1e-9, atol=1e-12, msg=name)


class TwoTerms(RobustTrainer):
    def loss_terms(self, outputs, inputs):
        return {**super().loss_terms(outputs, inputs), "spread": outputs.image_embeds.var(dim=0).sum()}


def test_loss_is_the_sum_of_its_terms_and_each_is_logged(tmp_path):
    settings = {"logging_strategy": "steps", "logging_steps": 2, "gradient_accumulation_steps": 2}
    trained = build(tmp_path, cls=TwoTerms, **settings)
    trained.train()
    logs = [entry for entry in trained.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry["loss_spread"] > 0
        assert entry["loss"] == pytest.approx(entry["loss_cross_entropy"] + entry["loss_spread"], rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = (build(tmp_path, "saft", activation_checkpointing=flag) for flag in (False, True))
    plain.train(), checkpointed.train()
    assert checkpointed.model.model.get_base_model().vision_model.is_activation_checkpointing
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], weight, rtol=1e-4, atol=1e-6)


def test_a_classifier_may_be_given(tmp_path):
    classifier = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES, head="trainable")
    trained = RobustTrainer(
        classifier,
        RobustTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=1, save_strategy="no"),
        train_dataset=[dict(row) for row in image_dataset(6, NAMES)],  # a dataset of another kind
        processing_class=tiny_processor("clip"),
    )
    trained.train()
    assert trained.model is classifier and classifier.class_head.weight.grad is None and classifier.head == "trainable"


def test_defaults_that_differ(tmp_path):
    args = RobustTrainingArguments(str(tmp_path))
    assert (args.remove_unused_columns, args.ddp_broadcast_buffers, args.logging_nan_inf_filter) == (False,) * 3
    assert args.report_to == [] and args.dataloader_pin_memory == torch.accelerator.is_available()
    assert args.use_cpu == (not torch.accelerator.is_available())


# --- SAFT's entries ---


def test_selection_sees_every_image_once_in_order(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    seen = []

    def spy(model, batches, loss_fn):
        batches = list(batches)
        seen.extend(batch["pixel_values"] for batch in batches)
        select_saft(model, batches, loss_fn)

    monkeypatch.setattr(starting, "select_saft", spy)
    trained = build(tmp_path, "saft", selection_batch_size=4, train_dataset=image_dataset(13, NAMES))
    trained.train()
    rows = list(image_dataset(13, NAMES))
    assert [len(batch) for batch in seen] == [4, 4, 4, 1]
    assert torch.equal(torch.cat(seen), ImageCollator(tiny_processor("clip"))(rows)["pixel_values"])
    assert "SAFT selected 344 of" in caplog.text
    trained.train()
    assert len(seen) == 4


def test_entries_do_not_depend_on_settings_and_the_run_not_on_the_selection(tmp_path):
    first = build(tmp_path, "saft")
    first.train()
    for settings in [
        {"selection_batch_size": 5},
        {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
    ]:
        other = build(tmp_path, "saft", **settings)
        other.train()
        assert same(entries(other), entries(first))
    by_hand = build(tmp_path, "saft")
    by_hand.select_entries()
    by_hand.train()
    assert same(weights(by_hand), weights(first))


def test_entries_come_from_both_towers(tmp_path):
    trained = build(tmp_path, "saft")
    trained.select_entries()
    assert any("vision_model" in name for name in entries(trained))
    assert any("text_model" in name for name in entries(trained))


def test_selection_leaves_autocast_behind(tmp_path):
    fresh, evaluated = build(tmp_path, "saft", bf16=True), build(tmp_path, "saft", bf16=True)
    evaluated.evaluate()  # prepares the model, with autocast
    fresh.select_entries(), evaluated.select_entries()
    assert same(entries(fresh), entries(evaluated))
    evaluated.train()
    assert math.isfinite(evaluated.evaluate()["eval_id_loss"])


def test_scores_of_single_images_get_batches_of_one(tmp_path):
    def fisher():
        return get_peft_model(tiny_model("clip"), SAFTConfig(density=0.01, score="fisher"))

    trained, by_hand = (build(tmp_path, model=fisher(), selection_batch_size=4) for _ in range(2))
    trained.select_entries()
    collate = ImageCollator(tiny_processor("clip"))
    batches = [collate([row]) for row in image_dataset(18, NAMES)]
    select_saft(by_hand.model, batches, lambda model, batch: model(**batch).loss)
    assert entries(trained) and same(entries(trained), entries(by_hand))


# --- evaluation ---


def expected_accuracy(model, names, dataset):
    classifier = ZeroShotClassifier(model, tiny_processor("clip"), names).eval()
    batch = ImageCollator(tiny_processor("clip"))(list(dataset))
    with torch.no_grad():
        output = classifier(**batch)
    return (output.logits.argmax(1) == batch["labels"]).double().mean().item(), output.loss.item()


@pytest.mark.parametrize("head", ["live", "frozen", "trainable"])
@pytest.mark.parametrize("size", [3, 8])
def test_each_set_is_classified_among_its_own_classes(tmp_path, head, size):
    trained = build(tmp_path, per_device_eval_batch_size=size, head=head)
    trained.train()
    metrics = trained.evaluate()
    accuracy, loss = expected_accuracy(trained.model.model, OTHER_NAMES, image_dataset(9, OTHER_NAMES, seed=90))
    assert metrics["eval_new_accuracy"] == accuracy
    assert metrics["eval_new_loss"] == pytest.approx(
        loss, rel=1e-4, abs=1e-6
    )  # mean over images, also with a short last batch
    assert trained.model.class_names == NAMES
    if head == "live":
        accuracy, loss = expected_accuracy(trained.model.model, NAMES, image_dataset(7, NAMES, seed=50))
        assert metrics["eval_id_accuracy"] == accuracy
        assert metrics["eval_id_loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)


def test_one_set_a_name_and_sets_at_call_time(tmp_path):
    trained = build(tmp_path)
    whole = trained.evaluate()
    assert trained.evaluate("new", metric_key_prefix="x")["x_accuracy"] == whole["eval_new_accuracy"]
    again = trained.evaluate({"late": image_dataset(9, OTHER_NAMES, seed=90)})
    assert again["eval_late_accuracy"] == whole["eval_new_accuracy"]
    alone = build(tmp_path, eval_dataset=image_dataset(7, NAMES, seed=50))
    assert alone.evaluate()["eval_accuracy"] == whole["eval_id_accuracy"]


def test_class_names_may_be_reworded(tmp_path):
    trained = build(tmp_path, class_names=["a red thing", "a green thing", "a blue thing"])
    accuracy, loss = expected_accuracy(tiny_model("clip"), trained.model.class_names, image_dataset(7, NAMES, seed=50))
    metrics = trained.evaluate()
    assert (metrics["eval_id_accuracy"], metrics["eval_id_loss"]) == (
        accuracy,
        pytest.approx(loss, rel=1e-4, abs=1e-6),
    )


def test_evaluation_during_training_and_prediction(tmp_path):
    trained = build(tmp_path, eval_strategy="epoch")
    trained.train()
    assert len([entry for entry in trained.state.log_history if "eval_new_accuracy" in entry]) == 2
    prediction = trained.predict(image_dataset(7, NAMES, seed=50))
    assert prediction.predictions.shape == (7, 3)
    assert prediction.metrics["test_accuracy"] == trained.evaluate("id")["eval_accuracy"]
