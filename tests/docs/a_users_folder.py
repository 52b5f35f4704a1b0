# SPDX-License-Identifier: Apache-2.0
"""A folder as the documentation supposes: a model, whose name is a folder's here, images of every kind, an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value
from peft import get_peft_model

from hf_robust import RobustTrainer, RobustTrainingArguments, SAFTConfig
from tests.docs.pages import ROOT
from tests.tiny_models import image_dataset, synthetic_picture, tiny_model, tiny_processor

MODEL = "openai/clip-vit-base-patch32"  # transformers takes a folder of this name before the Hub
CLASSES = ["cat", "dog", "fox", "owl"]


def build(folder: Path) -> None:
    """Fills an empty folder."""
    tiny_model("clip").save_pretrained(folder / MODEL)
    tiny_processor("clip").save_pretrained(folder / MODEL)
    for seed, split in enumerate(("train", "validation", "test")):
        write_images(folder / "photos" / split, CLASSES, seed)
    write_images(folder / "sketches" / "test", CLASSES, 3)
    write_images(folder / "timm/oxford-iiit-pet" / "test", ["beagle", "siamese"], 4)
    for seed, split in enumerate(("train", "validation", "test")):
        write_table(folder / f"{split}.parquet", seed, "text", [f"{word} {n}" for n in (1, 2) for word in CLASSES])
        labels = [["cat"], ["dog", "fox"], ["fox"], ["cat", "dog", "owl"]] * 2
        write_table(folder / "scenes" / f"{split}.parquet", seed, "labels", labels)
        write_table(folder / "cows" / f"{split}.parquet", seed, "identity", [10 * seed + row // 2 for row in range(8)])
    for label, name in enumerate(("a.jpg", "b.jpg")):
        synthetic_picture(label, len(CLASSES), 40, seed=9).save(folder / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    save_adapter(folder)


def write_images(folder: Path, classes: list[str], seed: int) -> None:
    for number, row in enumerate(image_dataset(8, classes, seed=100 * seed)):
        file = folder / classes[row["label"]] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(file)


def write_table(file: Path, seed: int, column: str, values: list[Any]) -> None:
    kinds = {"text": Value("string"), "identity": Value("int64"), "labels": List(Value("string"))}
    pictures = [synthetic_picture(row % 4, 4, 40, seed=100 * seed + row) for row in range(len(values))]
    features = Features({"image": datasets.Image(), column: kinds[column]})
    file.parent.mkdir(exist_ok=True)
    Dataset.from_dict({"image": pictures, column: values}, features=features).to_parquet(file)


def save_adapter(folder: Path) -> None:
    """An adapter as pages leave behind that a reader has seen before."""
    base = tiny_model("clip")
    base.name_or_path = MODEL
    model = get_peft_model(base, SAFTConfig(density=0.01, score="magnitude"))
    args = RobustTrainingArguments(str(folder / "runs"), max_steps=1, disable_tqdm=True, save_strategy="no")
    data = {"train_dataset": image_dataset(8, CLASSES), "processing_class": tiny_processor("clip")}
    trainer = RobustTrainer(model, args, **data)
    trainer.train()
    trainer.save_model(str(folder / "my-adapter"))
