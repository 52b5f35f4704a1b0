# SPDX-License-Identifier: Apache-2.0
"""The demo's drawings and its tiny CLIP: splits without leaks, a rasteriser that repeats, a model that loads."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

DEMO = Path(__file__).parents[2] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

import data  # noqa: E402

ROWS = data.drawings()
BEAR = next(row for row in ROWS if row["name"] == "bear" and row["source"] == "openmoji")
DOG_ICON = next(row for row in ROWS if row["name"] == "dog" and row["source"] == "material")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return data.load(tmp_path_factory.mktemp("drawings"))


@pytest.fixture(scope="module")
def model():
    return CLIPModel.from_pretrained(data.MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return CLIPProcessor.from_pretrained(data.MODEL)


def pixels(drawing, style):
    return np.array(data.draw(drawing, style))


def words(text):
    return {word.rstrip("s") if len(word) > 3 else word for word in re.split(r"[\s\-:,’]+", text.lower())}


class TestSplits:
    def test_a_concept_is_in_one_split(self):
        splits_of = defaultdict(set)
        for row in ROWS:
            splits_of[row["kind"], row["concept"]].add(row["split"])
        assert [concept for concept, names in splits_of.items() if len(names) > 1] == []

    def test_a_drawing_is_listed_once(self):
        files = [(row["source"], row["file"]) for row in ROWS]
        assert len(files) == len(set(files))

    def test_no_held_out_concept_is_named_in_pre_training(self):
        held_out = [row for row in ROWS if row["split"] in ("validation", "test")]
        pre_training = [row for row in ROWS if row["split"] == "pretrain"]
        assert {row["concept"] for row in held_out}.isdisjoint(row["concept"] for row in pre_training if row["kind"])
        # Names made of common words ("smiling face", "red square", "family") only have to differ as a whole.
        whole = ("smiley", "person", "lettered button", "flag", "shape", "heart")
        concepts = {row["concept"] for row in held_out if row["kind"] not in whole}
        concept_words = [words(concept) for concept in concepts]
        leaks = [row["name"] for row in pre_training if any(c <= words(row["name"]) for c in concept_words)]
        assert leaks == []

    def test_splits_hold_what_they_say(self, splits):
        assert len(splits["id"]) >= 200
        assert len(splits["ood_line"]) >= 200
        assert len(splits["ood_silhouette"]) >= 100
        assert len(splits["new"]) >= 100

    def test_class_lists_agree(self, splits):
        for name in ("train", "validation", "id", "ood_line", "ood_silhouette"):
            assert splits[name].features["label"].names == list(data.KINDS)
        assert splits["new"].features["label"].names == list(data.NEW_KINDS)
        assert set(data.KINDS).isdisjoint(data.NEW_KINDS)
        assert set(splits["train"]["label"]) == set(splits["id"]["label"]) == set(range(len(data.KINDS)))
        flag = data.KINDS.index("flag")
        assert [label for label in splits["id"]["label"] if label != flag] == list(splits["ood_line"]["label"])

    def test_no_test_image_is_a_training_image_or_blank(self, splits):
        seen = {image.tobytes() for image in splits["train"]["image"]}
        seen.update(picture["image"].tobytes() for picture in data.pretraining())
        for name in ("validation", "id", "ood_line", "ood_silhouette", "new"):
            images = [image.tobytes() for image in splits[name]["image"]]
            assert seen.isdisjoint(images)
            assert all(min(image) < 128 for image in images)


class TestDraw:
    def test_is_deterministic(self):
        assert np.array_equal(pixels(BEAR, "colour"), pixels(BEAR, "colour"))

    def test_styles_differ(self):
        colour, line, silhouette = (pixels(BEAR, style) for style in ("colour", "line", "silhouette"))
        assert colour.std(axis=2).max() > 10
        assert line.std(axis=2).max() == silhouette.std(axis=2).max() == 0  # black, white and grey
        assert line.mean() > colour.mean() > silhouette.mean()

    def test_icons_keep_a_margin(self):
        icon = pixels(DOG_ICON, "silhouette")
        assert icon.shape == (data.SIZE, data.SIZE, 3)
        assert icon[:7].min() == icon[-7:].min() == icon[:, :7].min() == icon[:, -7:].min() == 255
        assert icon.min() == 0

    def test_turned_repeats_with_its_seed(self):
        image = data.draw(BEAR, "colour")
        assert data.turned(image, "a").tobytes() == data.turned(image, "a").tobytes()
        assert data.turned(image, "a").tobytes() != data.turned(image, "b").tobytes()


class TestModel:
    def test_weights_are_small(self):
        assert sum(file.stat().st_size for file in data.MODEL.glob("*.safetensors")) <= 12e6

    def test_loads_with_the_auto_class(self):
        assert isinstance(AutoProcessor.from_pretrained(data.MODEL), CLIPProcessor)

    def test_text_is_pooled_at_its_end(self, model, processor):
        """The legacy rule for eos_token_id 2 pools at the largest id: here that would be any word."""
        config, tokenizer = model.config.text_config, processor.tokenizer
        assert config.eos_token_id == tokenizer.eos_token_id != 2
        prompts = [f"a drawing of a {kind}." for kind in data.KINDS + data.NEW_KINDS]
        with torch.no_grad():
            batch = model.get_text_features(**tokenizer(prompts, padding=True, return_tensors="pt")).pooler_output
            alone = model.get_text_features(**tokenizer(prompts[0], return_tensors="pt")).pooler_output
        torch.testing.assert_close(batch[:1], alone, atol=1e-5, rtol=1e-4)
        batch = torch.nn.functional.normalize(batch, dim=-1)
        similarity = batch @ batch.T - torch.eye(len(prompts))
        assert similarity.max() < 0.999

    @pytest.mark.parametrize(
        ("name", "chance"), [("id", 1 / 25), ("ood_line", 1 / 25), ("ood_silhouette", 1 / 25), ("new", 1 / 9)]
    )
    def test_zero_shot_is_well_above_chance(self, model, processor, splits, name, chance):
        kinds = splits[name].features["label"].names
        prompts = processor.tokenizer([f"a drawing of a {k}." for k in kinds], padding=True, return_tensors="pt")
        images = processor.image_processor(list(splits[name]["image"]), return_tensors="pt")
        with torch.no_grad():
            predictions = model(**images, **prompts).logits_per_image.argmax(dim=1)
        accuracy = (predictions == torch.tensor(splits[name]["label"])).float().mean()
        assert accuracy > 4 * chance
