# SPDX-License-Identifier: Apache-2.0
"""Trained tasks in folders, with the base that adapters name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, List
from transformers import AutoModel

from tests.tiny_models import image_dataset, synthetic_picture, tiny_model, tiny_processor
from tests.trainers import NAMES, build

TEST = image_dataset(7, NAMES, seed=50)
PICTURES = [synthetic_picture(label, 3, size, seed=60 + label) for label, size in enumerate((40, 33, 90))]


def save_base(folder: Path, family: str = "clip") -> str:
    tiny_model(family).save_pretrained(folder / "base")
    tiny_processor(family).save_pretrained(folder / "base")
    return str(folder / "base")


@dataclass
class Saved:
    """A trained model, where it was saved, and its trainer."""

    folder: str
    trainer: Any


def save_trained(root: Path, base: str, name: str, method: str = "full", **settings: Any) -> Saved:
    """Trains two steps."""
    how = {"max_steps": 2, "eval_dataset": None, "per_device_eval_batch_size": 32, **settings}
    trainer = build(root / "runs", method, model=AutoModel.from_pretrained(base), **how)
    trainer.train()
    trainer.save_model(str(root / name))
    return Saved(str(root / name), trainer)


def several(n: int = 8, seed: int = 0) -> Dataset:
    """Every other picture has two labels."""
    labels = [[i % 3, *([(i + 1) % 3] if i % 2 else [])] for i in range(n)]
    pictures = [synthetic_picture(i % 3, 3, 40, seed + i) for i in range(n)]
    features = Features({"image": Image(), "labels": List(ClassLabel(names=NAMES))})
    return Dataset.from_dict({"image": pictures, "labels": labels}, features=features)


def captioned(n: int = 6) -> Dataset:
    pictures = [synthetic_picture(i % 3, 3, 40, i) for i in range(n)]
    return Dataset.from_dict({"image": pictures, "text": [f"{NAMES[i % 3]} {i}" for i in range(n)]})


def people() -> Dataset:
    dataset = image_dataset(8, ["ann", "bob"])
    return dataset.remove_columns("label").add_column("identity", [["ann", "bob"][i % 2] for i in dataset["label"]])
