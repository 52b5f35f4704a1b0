# SPDX-License-Identifier: Apache-2.0
"""What the similarity loss costs RobustTrainer, with and without cached reference embeddings."""

from __future__ import annotations

import datasets
import pytest

from hf_robust.data import embeds_cache
from hf_robust.data.collator import REFERENCE_EMBEDS
from hf_robust.data.embeds_cache import pretrained_image_embeds
from hf_robust.losses import reference
from hf_robust.tasks.prompts import Prompts
from tests.tiny_models import image_dataset
from tests.trainers import METHODS, NAMES, entries, same, weights
from tests.training.test_trainer_similarity import losses, similar

# PEFT's own LN tuning warns about every LayerNorm
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "datasets" / "hf_robust"


@pytest.fixture
def calls(monkeypatch):
    """How many images θ₀ embedded, live and for the cache."""
    seen = {"live": [], "cache": []}
    for name, module in (("live", reference), ("cache", embeds_cache)):

        def spy(model, inputs, images=seen[name]):
            images.append(len(inputs["pixel_values"]))
            return pretrained_image_embeds(model, inputs)

        monkeypatch.setattr(module, "pretrained_image_embeds", spy)
    return seen


@pytest.mark.parametrize("method", ["full", "saft"])
def test_theta0_embeds_what_is_needed_and_nothing_in_evaluation(tmp_path, method, calls):
    counted = {}
    epochs = {"num_train_epochs": 1, "eval_strategy": "epoch", "train_dataset": image_dataset(9, NAMES)}
    for name, settings in {
        "off": {"losses": None},
        "text": {"loss": {"towers": "text"}},
        "live": {},
        "cached": {"cache_reference_embeddings": True},
        "cached again": {"cache_reference_embeddings": True},
    }.items():
        calls["live"].clear(), calls["cache"].clear()
        trained = similar(tmp_path, method, **epochs, **settings)
        copy = trained.model.reference.vision not in (None, trained.model.model)
        trained.train()
        counted[name] = (sum(calls["live"]), sum(calls["cache"]), copy)
    expected = {"off": (0, 0), "text": (0, 0), "live": (9, 0), "cached": (0, 9), "cached again": (0, 0)}
    assert counted == {name: (*count, name == "live" and method == "full") for name, count in expected.items()}


def test_classes_are_embedded_once_by_theta0(tmp_path, monkeypatch):
    encoded, embed = [], Prompts.embed
    monkeypatch.setattr(Prompts, "embed", lambda *args: encoded.append(1) or embed(*args))
    similar(tmp_path, "lora", max_steps=3).train()
    assert len(encoded) == 1 + 3


@pytest.mark.parametrize("method", METHODS)
def test_with_the_cache_training_is_the_same_up_to_rounding(tmp_path, method, folder):
    epochs = {"num_train_epochs": 1}
    live, cached = (similar(tmp_path, method, cache_reference_embeddings=flag, **epochs) for flag in (False, True))
    assert cached.train_dataset.rows.column_names == ["image", "label", REFERENCE_EMBEDS]
    assert len(list(folder.iterdir())) == 1
    live.train(), cached.train()
    first, *_, last = losses(cached)
    assert first["loss_similarity_vision"] < 1e-6 and first["loss_similarity_text"] == 0
    assert last["loss_similarity_vision"] == pytest.approx(losses(live)[-1]["loss_similarity_vision"], rel=1e-2)
    assert same(entries(live), entries(cached))
    assert cached.evaluate(cached.train_dataset)["eval_loss"] == pytest.approx(
        live.evaluate(live.train_dataset)["eval_loss"], rel=1e-2
    )


@pytest.mark.parametrize("method", ["full", "saft"])
@pytest.mark.parametrize("cached", [False, True])
def test_resumed_run_ends_bit_identical(tmp_path, method, cached):
    settings = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    settings |= {"cache_reference_embeddings": cached, "loss": {"schedule": "cosine", "weight": 20.0}}
    whole = similar(tmp_path, method, **settings)
    whole.train()
    resumed = similar(tmp_path, method, **settings)
    before = weights(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not same(before, weights(resumed))
    assert same(weights(whole), weights(resumed))
    assert losses(whole)[-1]["loss_similarity_vision"] == losses(resumed)[-1]["loss_similarity_vision"] > 0
