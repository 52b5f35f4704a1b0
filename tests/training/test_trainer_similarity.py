# SPDX-License-Identifier: Apache-2.0
"""The similarity loss in RobustTrainer."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_robust.data.collator import ImageCollator
from hf_robust.encoders.dual_encoder import image_embeds
from hf_robust.errors import ConfigError
from hf_robust.tasks.class_names import class_embeddings
from hf_robust.training.arguments import RobustTrainingArguments
from hf_robust.training.trainer import RobustTrainer
from tests.tiny_models import FAMILIES, image_dataset, tiny_model, tiny_processor
from tests.trainers import METHODS, NAMES, build, weights

# PEFT's own LN tuning warns about every LayerNorm
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
all_methods = pytest.mark.parametrize("method", METHODS)
LOGGED = {"logging_strategy": "steps", "logging_steps": 1}


def similar(folder, method="full", loss=None, **settings):
    """A trainer with the similarity loss; `loss` has settings of it, {"weight": 1.0} for one."""
    losses = {"similarity": {"weight": 2.0, "towers": "both", **(loss or {})}}
    return build(folder, method, **{"losses": losses, **LOGGED, **settings})


def without_dropout(family):
    """A tiny model whose BERT, where it has one, drops nothing."""
    model = tiny_model(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def losses(trained):
    return [entry for entry in trained.state.log_history if "loss" in entry]


# --- what it does ---


@pytest.mark.parametrize(
    ("method", "settings"),
    [(method, {}) for method in METHODS]
    + [(method, {"bf16": True, "activation_checkpointing": True}) for method in METHODS]
    + [(method, {"family": family}) for method in ("full", "lora") for family in FAMILIES[1:]]
    + [("saft", {"loss": {"distance": distance}}) for distance in ("l2", "mse", "l1")],
)
def test_it_is_exactly_zero_in_the_first_step_and_then_not(tmp_path, method, settings):
    model = without_dropout(settings.get("family", "clip"))
    trained = similar(tmp_path, method, model=model, max_steps=2, **settings)
    trained.train()
    first, second = losses(trained)
    assert first["loss"] == first["loss_cross_entropy"]
    for name in ("loss_similarity_vision", "loss_similarity_text"):
        assert first[name] == 0 < second[name]
    parts = second["loss_cross_entropy"] + second["loss_similarity_vision"] + second["loss_similarity_text"]
    assert second["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_saft_in_every_family_starts_at_zero_up_to_rounding(tmp_path, family):
    """Where entries lie in SigLIP's pooling head, torch multiplies in another order with gradients than without."""
    trained = similar(tmp_path, "saft", family=family, model=without_dropout(family), max_steps=2)
    trained.train()
    first, second = losses(trained)
    assert first["loss_similarity_vision"] < 1e-12 < second["loss_similarity_vision"]
    assert first["loss_similarity_text"] == 0 < second["loss_similarity_text"]


@all_methods
def test_a_large_weight_holds_the_embeddings(tmp_path, method):
    def distances(weight):
        trained = similar(tmp_path, method, {"weight": weight})
        trained.train()
        batch = ImageCollator(tiny_processor("clip"))(list(image_dataset(18, NAMES)))
        found, start = (
            (image_embeds(model, batch["pixel_values"]), class_embeddings(model, tiny_processor("clip"), NAMES))
            for model in (trained.model.model.eval(), tiny_model("clip"))
        )
        return [(one - other).norm().item() for one, other in zip(found, start, strict=True)]

    free, held = distances(0.0), distances(100.0)
    assert held[0] < 0.5 * free[0] and held[1] < 0.5 * free[1]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_weight_follows_the_schedule(tmp_path, schedule, monkeypatch):
    monkeypatch.setattr("hf_robust.losses.similarity.DISTANCES", {"cosine": lambda u, v: u.sum(dim=-1) * 0 + 1})
    trained = similar(tmp_path, loss={"schedule": schedule}, max_steps=4, gradient_accumulation_steps=2)
    trained.train()
    found = [entry["loss_similarity_vision"] for entry in losses(trained)]
    expected = {
        "constant": [2, 2, 2, 2],
        "linear": [2, 1.5, 1, 0.5],
        "cosine": [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)],
    }
    assert found == pytest.approx(expected[schedule], rel=1e-6)


@pytest.mark.parametrize(("method", "cached"), [("full", False), ("saft", False), ("full", True)])
def test_accumulated_micro_batches_equal_the_big_batch(tmp_path, method, cached):
    """With 13 images the last step of an epoch has five; with micro-batches of four these are four and one."""

    def run(size, steps):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        settings |= {"learning_rate": 0.05, "max_grad_norm": 0.5, "num_train_epochs": 1}
        settings |= {"cache_reference_embeddings": cached, "train_dataset": image_dataset(13, NAMES)}
        trained = similar(tmp_path, method, model=tiny_model("clip").double(), **settings)
        trained.train()
        return weights(trained), losses(trained)

    big, logs = run(8, 1)
    assert logs[-1]["loss_similarity_vision"] > 1e-6 and logs[-1]["loss_similarity_text"] > 1e-6
    for size, steps in [(1, 8), (4, 2)]:
        found, other_logs = run(size, steps)
        for name, weight in found.items():
            torch.testing.assert_close(weight, big[name], rtol=1e-9, atol=1e-12, msg=name)
        for entry, other in zip(logs, other_logs, strict=True):
            assert {name: entry[name] for name in entry if name.startswith("loss")} == pytest.approx(
                {name: other[name] for name in other if name.startswith("loss")}, rel=1e-5
            )


def test_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = (
        similar(tmp_path, "saft", activation_checkpointing=flag, max_steps=4) for flag in (False, True)
    )
    plain.train(), checkpointed.train()
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["live", "frozen", "trainable"])
def test_what_the_head_froze_stays_frozen(tmp_path, head):
    trained = similar(tmp_path, "lora", {"towers": "vision"}, head=head)
    before = {name: parameter.requires_grad for name, parameter in trained.model.named_parameters()}
    assert any(flag for name, flag in before.items() if "text_model" in name) == (head == "live")
    trained.train()
    assert before == {name: parameter.requires_grad for name, parameter in trained.model.named_parameters()}
    assert losses(trained)[-1]["loss_similarity_vision"] > 0


# --- what is refused ---


def numpy_rows():
    return [dict(row) for row in image_dataset(6, NAMES)]


BAD_SETTINGS = {
    "negative weight": ({"loss": {"weight": -1.0}}, "weight.*got -1.0"),
    "NaN weight": ({"loss": {"weight": math.nan}}, "weight.*got nan"),
    "distance": ({"loss": {"distance": "euclid"}}, "unknown distance.*'euclid'.*'cosine'"),
    "towers": ({"loss": {"towers": "image"}}, "unknown towers.*'image'.*'vision'"),
    "schedule": ({"loss": {"schedule": "step", "weight": 0.0}}, "unknown schedule"),
    "cache without loss": ({"losses": None, "cache_reference_embeddings": True}, "cache_reference_embed"),
    "cache of texts": ({"loss": {"towers": "text"}, "cache_reference_embeddings": True}, "cache_reference_embed"),
    "text, frozen head": ({"loss": {"towers": "text"}, "head": "frozen"}, "towers.*head='live'"),
    "both, own head": ({"head": "trainable"}, "towers.*head='live'"),
    "trained biases": (
        {"model": get_peft_model(tiny_model("clip"), LoraConfig(target_modules=["q_proj"], bias="all"))},
        "trained beside the adapter",
    ),
    "cache of a transform": (
        {"cache_reference_embeddings": True, "train_dataset": image_dataset(6, NAMES).with_transform(lambda x: x)},
        "transform",
    ),
    "cache of rows": (
        {"cache_reference_embeddings": True, "train_dataset": numpy_rows(), "class_names": NAMES},
        "fingerprint",
    ),
}


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_one_error_before_training(tmp_path, name):
    settings, message = BAD_SETTINGS[name]
    with pytest.raises(ConfigError, match=message):
        similar(tmp_path, **settings)


def test_the_cache_is_for_this_package_s_collator_alone(tmp_path):
    settings = {"use_cpu": True, "losses": {"similarity": {}}, "cache_reference_embeddings": True}
    with pytest.raises(ConfigError, match="another data collator"):
        RobustTrainer(
            tiny_model("clip"),
            RobustTrainingArguments(str(tmp_path), **settings),
            train_dataset=image_dataset(6, NAMES),
            processing_class=tiny_processor("clip"),
            data_collator=lambda rows: ImageCollator(tiny_processor("clip"))(rows),
        )
