# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model

from hf_robust import ACLIPConfig, class_embeddings, with_image_embeds
from hf_robust.data.collator import ImageCollator
from hf_robust.encoders.dual_encoder import image_embeds
from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.evaluation.difficulty import embedding_difficulty, task_difficulty
from tests.tiny_models import FAMILIES, image_dataset, tiny_model, tiny_processor
from tests.trainers import NAMES


def figures(found):
    return [found.silhouette, found.acs, found.accuracy, found.margin]


def of_classes(found, name):
    return [getattr(one, name) for one in found.classes]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def measure(dataset, model=None, family="clip", **settings):
    given = {"processor": tiny_processor(family), "templates": "abcd {}.", "batch_size": 4, "silent": True}
    return task_difficulty(tiny_model(family) if model is None else model, dataset, **{**given, **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_dataset_is_embedded_with_its_own_class_names(cache, family):
    dataset, model, processor = image_dataset(9, NAMES), tiny_model(family), tiny_processor(family)
    batch = ImageCollator(processor)(list(dataset))
    labels = batch.pop("labels")
    with torch.no_grad():
        images = image_embeds(model, **batch)
    texts = class_embeddings(model, processor, NAMES, "abcd {}.")
    found = measure(dataset, family=family)
    expected = embedding_difficulty(images, labels, texts, NAMES)
    assert of_classes(found, "name") == NAMES and of_classes(found, "images") == of_classes(expected, "images")
    assert figures(found) == pytest.approx(figures(expected), abs=1e-4)
    joint = measure(dataset, family=family, silhouette="joint")
    assert joint.silhouette == pytest.approx(
        embedding_difficulty(images, labels, texts, NAMES, "joint").silhouette, abs=1e-4
    )


def test_images_are_embedded_once(cache, monkeypatch):
    first = measure(image_dataset(9, NAMES))
    monkeypatch.setattr("hf_robust.data.embeds_cache.pretrained_image_embeds", lambda *args: pytest.fail("again"))
    assert measure(image_dataset(9, NAMES)) == first
    embedded = with_image_embeds(image_dataset(9, NAMES), tiny_model("clip"), tiny_processor("clip"), silent=True)
    assert measure(embedded) == first


def test_what_cannot_be_cached_is_embedded_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_robust.evaluation.difficulty.with_image_embeds", lambda *args: pytest.fail("cached"))
    dataset = image_dataset(9, NAMES)
    found = measure(list(dataset), class_names=NAMES)
    assert figures(found) == pytest.approx(figures(measure(dataset.to_iterable_dataset())), abs=1e-6)
    assert of_classes(found, "name") == NAMES


def test_sample_and_kind_reach_the_measure(cache):
    found = measure(image_dataset(9, NAMES), silhouette="image_only", sample_size=7, seed=3)
    assert (found.kind, found.images, found.sampled) == ("image_only", 9, 7)


def test_adapters_have_no_say_and_stay_on(cache):
    dataset = image_dataset(9, NAMES)
    before = measure(dataset)
    model = get_peft_model(tiny_model("clip"), ACLIPConfig()).train()
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(1.0)
    assert measure(dataset, model) == before
    assert measure(list(dataset), model, class_names=NAMES).silhouette == pytest.approx(before.silhouette, abs=1e-6)
    assert model.training and sum(one.requires_grad for one in model.parameters()) > 0
    with torch.no_grad():
        tuned = class_embeddings(model, tiny_processor("clip"), NAMES, "abcd {}.")
    assert not torch.allclose(tuned, class_embeddings(tiny_model("clip"), tiny_processor("clip"), NAMES, "abcd {}."))


class EmptyStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


def unlabelled(dataset):
    return [{"image": row["image"]} for row in dataset]


BAD_DATA = {
    "no names": (lambda data: list(data), {}, DataError, "class names are missing.*Pass class_names"),
    "too few names": (
        lambda data: data,
        {"class_names": NAMES[:2]},
        DataError,
        "2 class_names for the data's 3 classes",
    ),
    "repeated name": (lambda data: data, {"class_names": [*NAMES[:-1], NAMES[0]]}, DataError, "name occurs twice"),
    "empty": (lambda data: data.select([]), {}, DataError, "empty"),
    "empty stream": (lambda data: EmptyStream(), {"class_names": NAMES}, DataError, "empty"),
    "no images": (lambda data: data.remove_columns("image"), {}, DataError, "no column 'image'"),
    "no labels": (unlabelled, {"class_names": NAMES}, DataError, "without `label`"),
    "template": (lambda data: data, {"templates": "abcd"}, ConfigError, "template without {}"),
    "kind": (lambda data: data, {"silhouette": "text"}, ConfigError, "unknown silhouette"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_and_settings_are_refused(cache, name):
    change, settings_, error, message = BAD_DATA[name]
    with pytest.raises(error, match=message):
        measure(change(image_dataset(9, NAMES)), **settings_)


def test_model_of_nan_weights_is_refused(cache):
    model = tiny_model("clip")
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN.*image_embeds, row 0"):
        measure(list(image_dataset(9, NAMES)), model, class_names=NAMES)


def test_one_class_is_refused(cache):
    with pytest.raises(DataError, match="class_embeds.*2 or more"):
        measure(image_dataset(4, NAMES[:1]))
