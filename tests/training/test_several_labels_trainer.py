# SPDX-License-Identifier: Apache-2.0
"""Several labels through the trainer: every tuner, calibrated before anything is trained or selected."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from hf_robust import wise_ft
from hf_robust.encoders.dual_encoder import base_model
from hf_robust.errors import ConfigError, DataError
from hf_robust.tasks.several_labels import SeveralLabels
from tests.tiny_models import synthetic_picture, tiny_batch, tiny_model, tiny_processor
from tests.trainers import NAMES, OTHER_NAMES, build, same, trained, weights

HOW = {"task": "several_labels"}


def labelled(n, names=NAMES, seed=0):
    """Pictures of one class; every other has the next class as well."""
    labels = [[i % len(names), *([(i + 1) % len(names)] if i % 2 else [])] for i in range(n)]
    pictures = [synthetic_picture(i % len(names), len(names), 40, seed + i) for i in range(n)]
    features = Features({"image": Image(), "labels": List(ClassLabel(names=names))})
    return Dataset.from_dict({"image": pictures, "labels": labels}, features=features)


def with_unknown(n):
    """The same as vectors, of which every fifth entry is not known."""
    vectors = [[float(c in labels) for c in range(len(NAMES))] for labels in labelled(n)["labels"]]
    vectors = [[None if (i + c) % 5 == 0 else v for c, v in enumerate(row)] for i, row in enumerate(vectors)]
    features = Features({"image": Image(), "labels": List(Value("float32"))})
    return Dataset.from_dict({"image": labelled(n)["image"], "labels": vectors}, features=features)


SETS = {
    "validation": labelled(6, seed=50),
    "some": labelled(4, ["blue", "Red"], seed=60),
    "new": labelled(4, OTHER_NAMES, seed=70),
}
TRAIN = labelled(8)


def settings(**others):
    return {"train_dataset": TRAIN, "eval_dataset": SETS, "lr_scheduler_type": "constant", **others}


@pytest.fixture(scope="module", params=["full", "saft", "aclip", "lora"])
def trainer(request, tmp_path_factory):
    trainer = build(tmp_path_factory.mktemp(request.param), request.param, **settings())
    trainer.before = trainer.evaluate()
    trainer.start = weights(trainer)
    trainer.train()
    return trainer


def test_every_tuner_trains_it_by_the_columns_alone(trainer):
    assert type(trainer.model) is SeveralLabels and trainer.model.prepared == 1
    after = trainer.evaluate()
    assert after["eval_validation_loss"] < trainer.before["eval_validation_loss"]
    assert {f"eval_{name}_{metric}" for name in SETS for metric in trainer.model.metrics} <= set(after)
    tuned = weights(trainer)
    changed = {name for name in tuned if name not in trainer.start or not tuned[name].equal(trainer.start[name])}
    assert {"label_scale", "label_bias"} < changed


def test_alpha_leaves_scale_and_bias_and_goes_back_to_the_cosines_of_before(trainer):
    sweep = trainer.wise_ft_sweep(alphas=[0, 0.5, 1])
    assert sweep.metric == "validation_mAP_macro" and [row["alpha"] for row in sweep.rows] == [0, 0.5, 1]
    own = {name: tensor.clone() for name, tensor in trainer.model.own_tensors().items()}
    wise_ft(trainer.model, 0.0, trainer.zero_shot)
    assert all(tensor.equal(own[name]) for name, tensor in trainer.model.own_tensors().items())
    first = SeveralLabels(tiny_model("clip"), tiny_processor("clip"), NAMES, templates="a photo of a {}.").eval()
    first.load_state_dict(own, strict=False)
    with torch.no_grad():
        found, expected = (task(**tiny_batch("clip", 3)).logits for task in (trainer.model.eval(), first))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    wise_ft(trainer.model, 1.0, trainer.zero_shot)


def test_a_trainable_head_goes_back_to_the_class_embeddings(tmp_path):
    trainer = trained(tmp_path, "saft", head="trainable", **settings())
    tuned = trainer.model.class_head.weight.detach().clone()
    wise_ft(trainer.model, 0.0)
    start = trainer.model.zero_shot_head()[0]
    torch.testing.assert_close(trainer.model.class_head.weight, start, atol=1e-6, rtol=0)
    assert not tuned.allclose(start, atol=1e-4)


def test_entries_are_selected_by_the_calibrated_loss(tmp_path, monkeypatch):
    trainer, seen = build(tmp_path, "saft", **settings()), []
    select = trainer.select_entries

    def selecting():
        seen.append((float(trainer.model.prepared), trainer.model.label_bias.item()))
        select()

    monkeypatch.setattr(trainer, "select_entries", selecting)
    trainer.train()
    assert len(seen) == 1 and seen[0][0] == 1 and seen[0][1] != 0


@pytest.mark.parametrize("method", ["full", "saft"])
def test_a_resumed_run_ends_with_the_same_bits(method, tmp_path):
    how = settings(
        save_strategy="epoch", task={"several_labels": {"loss": "asymmetric", "positive_weights": "balanced"}}
    )
    whole = trained(tmp_path, method, **how)
    again = build(tmp_path, method, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.model.prepared == 1 and same(weights(again), weights(whole))


def test_accumulated_micro_batches_with_unknown_labels_equal_one_batch(tmp_path):
    how = settings(train_dataset=with_unknown(8), eval_dataset=None, class_names=NAMES, optim="sgd", max_steps=2)
    found = []
    for micro in (4, 2):
        trainer = trained(
            tmp_path, **how, per_device_train_batch_size=micro, gradient_accumulation_steps=4 // micro, **HOW
        )
        found.append(weights(trainer))
    start = dict(build(tmp_path, **how, **HOW).model.named_parameters())
    assert max((found[0][name] - start[name]).abs().max() for name in found[0]) > 1e-3
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_the_similarity_loss_is_added_with_its_cache(tmp_path):
    losses = {"similarity": {"weight": 1.0}}
    how = {"losses": losses, "cache_reference_embeddings": True, "logging_strategy": "steps"}
    trainer = trained(tmp_path, **settings(eval_dataset=None, logging_steps=2, **how))
    logged = [entry["loss_similarity_vision"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert min(logged) > 0


def test_the_threshold_and_the_loss_are_saved_beside_the_model(tmp_path):
    trainer = trained(tmp_path, "lora", **settings(task={"several_labels": {"loss": "asymmetric"}}))
    predictions = trainer.predict(SETS["validation"])
    trainer.model.choose_threshold(predictions.predictions, predictions.label_ids)
    chosen = trainer.evaluate("validation")
    assert chosen["eval_f1_micro"] >= predictions.metrics["test_f1_micro"]
    trainer.save_model()
    saved = json.loads((tmp_path / "classifier.json").read_text())
    assert saved["threshold"] == trainer.model.threshold != 0 and saved["loss"] == "asymmetric"


def test_a_collator_of_the_users_own_makes_the_labels(tmp_path):
    def collate(rows):
        images = tiny_processor("clip").image_processor([row["image"] for row in rows], return_tensors="pt")
        return {**images, "labels": torch.tensor([row["labels"] for row in rows]).float()}

    own, ours = (build(tmp_path, data_collator=one, **settings()) for one in (collate, None))
    assert own.evaluate("validation")["eval_loss"] == pytest.approx(ours.evaluate("validation")["eval_loss"])


def test_what_cannot_be_learned_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    everything = TRAIN.map(lambda row: {"labels": [0, 1, 2]})
    trainer = build(tmp_path, **settings(train_dataset=everything))
    monkeypatch.setattr(base_model(trainer.model.model), "get_image_features", None)
    with pytest.raises(DataError, match="nothing to tell apart"):
        trainer.train()
    with pytest.raises(ConfigError, match="class_weights"):
        build(tmp_path, **settings(class_weights="balanced"))
    with pytest.raises(DataError, match="no lists"):
        build(tmp_path, **HOW)
