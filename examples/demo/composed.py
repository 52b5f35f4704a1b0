# SPDX-License-Identifier: Apache-2.0
"""Composed drawings: two of the demo's drawings on one canvas, with both kinds as labels, or in a caption.

Example:
    ```python
    import composed

    splits = composed.load()
    splits["train"].features["labels"].feature.names  # the 35 kinds
    splits["id"][0]["labels"]  # [4, 17]
    ```
"""

from __future__ import annotations

import random
from pathlib import Path

import data
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

DATA, CAPTIONED = data.HERE / "data" / "composed", data.HERE / "data" / "captioned"
SETS = ("train", "validation", "id", "ood_hand", "ood_filled")
SMALLEST, LARGEST = 34, 42  # pixels of a drawing on a canvas of `data.SIZE`
PARTNERS = 2  # canvases that every training drawing is on, beside those of others


def on_one_canvas(first: PILImage.Image, second: PILImage.Image, seed: str) -> PILImage.Image:
    """Put two drawings onto a white canvas, one into each of two opposite corners.

    Args:
        first: A drawing.
        second: Another, which lies above the first where they meet.
        seed: The same seed gives the same image.

    Returns:
        An image of the size of one drawing.
    """
    rng = random.Random(seed)
    canvas = PILImage.new("RGB", (data.SIZE, data.SIZE), "white")
    corners = rng.choice([((0, 0), (1, 1)), ((1, 1), (0, 0)), ((0, 1), (1, 0)), ((1, 0), (0, 1))])
    for image, (right, low) in zip((first, second), corners, strict=True):
        size = rng.randint(SMALLEST, LARGEST)
        canvas.paste(image.resize((size, size)), (right * (data.SIZE - size), low * (data.SIZE - size)))
    return canvas


def compose(drawings: Dataset, seed: str, partners: int = 1) -> Dataset:
    """Put every drawing of a set onto canvases, each with one of another kind, drawn by the seed.

    Args:
        drawings: Columns `image` and `label`, of two kinds at least.
        seed: The same seed gives the same set.
        partners: Canvases of a drawing.

    Returns:
        `partners` images a drawing; columns `image` and `labels`, a list of two kinds.
    """
    rng, pictures, kinds = random.Random(seed), list(drawings["image"]), list(drawings["label"])
    images, labels = [], []
    for number in [*range(len(kinds))] * partners:
        other = rng.choice([index for index, kind in enumerate(kinds) if kind != kinds[number]])
        images.append(on_one_canvas(pictures[number], pictures[other], f"{seed}-{len(images)}"))
        labels.append(sorted((kinds[number], kinds[other])))
    names = drawings.features["label"].names
    return Dataset.from_dict(
        {"image": images, "labels": labels},
        features=Features({"image": Image(), "labels": List(ClassLabel(names=names))}),
    )


def caption(composed: Dataset) -> Dataset:
    """Say in words what is on the canvases.

    Args:
        composed: What `compose` returned.

    Returns:
        Columns `image` and `text`, a list of two captions that name both kinds in either order.
    """
    names = composed.features["labels"].feature.names
    pairs = [[names[kind] for kind in labels] for labels in composed["labels"]]
    texts = [[f"an icon of a {a} and a {b}." for a, b in ((first, last), (last, first))] for first, last in pairs]
    captioned = composed.remove_columns("labels")
    return captioned.add_column("text", texts, feature=List(Value("string")))


def load_captioned(folder: Path = CAPTIONED) -> dict[str, Dataset]:
    """Load the composed sets with captions, making them first if they are not there yet.

    Args:
        folder: Where they are.

    Returns:
        As `load`, with columns `image` and `text`.
    """
    if not (folder / f"{SETS[-1]}.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, dataset in load().items():
            caption(dataset).to_parquet(folder / f"{name}.parquet")
    return {name: Dataset(pyarrow.parquet.read_table(folder / f"{name}.parquet")) for name in SETS}


def load(folder: Path = DATA) -> dict[str, Dataset]:
    """Load the composed sets, making them of the demo's drawings first if they are not there yet (about 10 s).

    Args:
        folder: Where they are.

    Returns:
        By name: train, validation, id, ood_hand, ood_filled, as in `data.load`, with columns `image` and `labels`.
    """
    if not (folder / f"{SETS[-1]}.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        drawings = data.load()
        for name in SETS:
            partners = PARTNERS if name == "train" else 1
            compose(drawings[name], name, partners).to_parquet(folder / f"{name}.parquet")
    return {name: Dataset(pyarrow.parquet.read_table(folder / f"{name}.parquet")) for name in SETS}


if __name__ == "__main__":
    print({name: len(dataset) for name, dataset in load_captioned().items()})
