# SPDX-License-Identifier: Apache-2.0
"""Embeddings in the place of images: `with_image_embeds`, and training and evaluation with them."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_robust import ACLIPConfig, OGENConfig, OGENLoss, SAFTConfig, ZeroShotClassifier, with_image_embeds
from hf_robust.data.collator import ImageCollator
from hf_robust.data.rows import labelled_images
from hf_robust.encoders.dual_encoder import image_embeds
from hf_robust.errors import ConfigError
from tests.tiny_models import FAMILIES, image_dataset, tiny_model, tiny_processor
from tests.trainers import NAMES, build, entries, same, weights

TEXT = {
    "saft": lambda model: get_peft_model(model, SAFTConfig(density=0.01, towers="text")),
    "aclip": lambda model: get_peft_model(model, ACLIPConfig(towers="text")),
    "lora": lambda model: get_peft_model(model, LoraConfig(target_modules=r".*text_model.*(q_proj|v_proj)")),
}


def embedded(dataset, family="clip"):
    return with_image_embeds(dataset, tiny_model(family), tiny_processor(family), batch_size=5, silent=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_column_holds_the_embeddings_of_the_images(family):
    images = image_dataset(7, NAMES)
    found = embedded(images, family)
    assert found.column_names == ["label", "image_embeds"] and found.features["label"].names == NAMES
    batch = ImageCollator(tiny_processor(family))(list(images))
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = image_embeds(tiny_model(family), **batch)
    collated = ImageCollator(tiny_processor(family))(list(found.select([4, 1])))
    assert set(collated) == {"image_embeds", "labels"}
    assert torch.equal(collated["labels"], labels[[4, 1]])
    torch.testing.assert_close(collated["image_embeds"], expected[[4, 1]], rtol=0, atol=1e-6)


def test_only_the_image_counts_and_what_is_beside_it_serves_any_task():
    beside = {"labels": [["cat"], []], "score": [0.5, 2.0], "caption": ["a cat", "a dog"], "identity": [7, -7]}
    images = Dataset.from_dict({"img": image_dataset(2, NAMES)["image"], **beside})
    found = embedded(images.add_column("label", [0.25, 0.75]))
    assert found.column_names == [*beside, "label", "image_embeds"]
    assert found.select_columns(list(beside))[:] == images.remove_columns("img")[:]
    assert labelled_images(found, "photos", target="text").texts == [["a cat"], ["a dog"]]
    assert labelled_images(found, "photos", target="identity").class_names == ["-7", "7"]
    assert labelled_images(found, "photos", label_column="labels", target="labels").class_names == ["cat"]


def test_second_call_reads_the_file(monkeypatch):
    first = embedded(image_dataset(7, NAMES))
    monkeypatch.setattr("hf_robust.data.embeds_cache.pretrained_image_embeds", lambda *args: pytest.fail("again"))
    assert embedded(image_dataset(7, NAMES))[:] == first[:]


@pytest.mark.parametrize("method", TEXT)
def test_training_and_evaluation_need_no_vision_tower(tmp_path, method, monkeypatch):
    sets = {"id": image_dataset(7, NAMES, seed=50), "new": image_dataset(9, ["cat", "dog"], seed=90)}
    runs = []
    for embed in (lambda dataset: dataset, embedded):
        if embed is embedded:
            prepared = {name: embed(dataset) for name, dataset in sets.items()}, embed(image_dataset(18, NAMES))
            monkeypatch.setattr("hf_robust.tasks.task.image_embeds", lambda *args: pytest.fail("vision tower was run"))
        else:
            prepared = sets, image_dataset(18, NAMES)
        torch.manual_seed(0)
        model = TEXT[method](tiny_model("clip"))
        trained = build(tmp_path, model=model, eval_dataset=prepared[0], train_dataset=prepared[1])
        trained.train()
        runs.append((weights(trained), trained.evaluate(), entries(trained)))
    assert same(runs[0][2], runs[1][2])
    for name in runs[0][0].keys() - {
        name for name in runs[0][0] if "k_proj" in name and "bias" in name
    }:  # pure rounding
        tensor = runs[0][0][name]
        torch.testing.assert_close(runs[1][0][name], tensor, rtol=0, atol=2e-3)  # Adam amplifies rounding
    for name in ("id", "new"):
        assert runs[1][1][f"eval_{name}_accuracy"] == runs[0][1][f"eval_{name}_accuracy"]
        assert runs[1][1][f"eval_{name}_loss"] == pytest.approx(runs[0][1][f"eval_{name}_loss"], rel=1e-3)


def test_ogen_trains_with_them(tmp_path):
    known, new = ["red", "green", "blue", "pink"], ["cat", "dog", "owl"]
    train = embedded(image_dataset(18, known))
    model = TEXT["aclip"](tiny_model("clip"))
    trained = build(tmp_path, model=model, train_dataset=train, eval_dataset=None, losses=[OGENLoss(OGENConfig(new))])
    trained.train()
    embeds = train.with_format("torch")
    expected = torch.stack([embeds[:]["image_embeds"][embeds[:]["label"] == label].mean(0) for label in range(4)])
    torch.testing.assert_close(trained.model.terms["ogen"].prototypes.mean, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: get_peft_model(model, SAFTConfig(density=0.01)),
        lambda model: get_peft_model(model, ACLIPConfig(), adapter_name="frozen").requires_grad_(False),
    ],
    ids=["full", "saft", "frozen adapter"],
)
@pytest.mark.parametrize("which", ["train", "eval", "later"])
def test_a_vision_tower_that_is_not_the_pretrained_one_is_refused(tmp_path, wrap, which):
    images = image_dataset(7, NAMES)
    sets = {"train_dataset": embedded(images) if which == "train" else images}
    sets["eval_dataset"] = {"id": embedded(images) if which == "eval" else images}
    with pytest.raises(ConfigError, match=r"embeddings in the place of images.*towers='text'"):
        trained = build(tmp_path, model=wrap(tiny_model("clip")), **sets)
        trained.evaluate(embedded(images))


def test_classifier_takes_either_images_or_embeddings():
    classifier = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES)
    batch = ImageCollator(tiny_processor("clip"))(list(image_dataset(2, NAMES)))
    for inputs in ({}, {**batch, "image_embeds": torch.zeros(2, 24)}):
        with pytest.raises(ConfigError, match="images or their embeddings"):
            classifier(**inputs)


def test_embedded_images_have_no_reference_to_cache(tmp_path):
    model = TEXT["saft"](tiny_model("clip"))
    settings = {"losses": {"similarity": {}}, "cache_reference_embeddings": True}
    with pytest.raises(ConfigError, match="embedded already"):
        build(tmp_path, model=model, train_dataset=embedded(image_dataset(7, NAMES)), **settings)
