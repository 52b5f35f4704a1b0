# SPDX-License-Identifier: Apache-2.0
"""The command `hf-robust predict`: what images show, as a table, JSON or CSV."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from ..data.columns import IMAGE
from ..data.files import exists, files_of, is_image, reading
from ..data.given_images import WEB, GivenImages
from ..errors import ConfigError, DataError
from ..scripting.arguments import setting
from ..scripting.checks import check_given
from ..shown import printable
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.prediction import NamedClassesTask
from ..tasks.saved_encoder import find_model
from ..tasks.task import CONFIG_FILE, Task

LONGEST = 200  # characters of a cell
Answers = list[tuple[str, Any]]  # of every file what `NamedClassesTask.predict` says


@dataclass
class PredictArguments:
    """What images show, by a trained model."""

    model: str | None = setting(None, "Folder or Hub id of what was trained.", positional=True)
    images: list[str] = setting([], "Files, folders with images, patterns, or addresses of files.", positional=True)
    format: Literal["table", "json", "csv"] = setting("table", "What is printed.")
    class_names: list[str] | None = setting(None, "The possible answers; default: the classes it was trained on.")
    top_k: int | None = setting(None, "Answers for an image, best first; default: one; of several labels, all.")
    batch_size: int = setting(32, "Images at once.")
    base: str | None = setting(None, "Folder or Hub id of an adapter's base, where it does not lie as it says.")
    on_bad_image: Literal["raise", "skip"] = setting(
        "raise", "Stop at an image that cannot be used, or leave it out, named on stderr."
    )
    use_cpu: bool = setting(False, "Even where there is an accelerator.")
    silent: bool = setting(False, "No progress bars.")

    def __post_init__(self) -> None:
        check_given(self, "model", "images")


def main(args: PredictArguments) -> None:
    """Prints to stdout what images show: a table, one JSON array, or CSV; all else goes to stderr.

    Nothing is printed before all images have been looked at.

    Args:
        args: of which images, by which model.

    Raises:
        DataError: there is no such image, or one that cannot be used and `on_bad_image` is `"raise"`.
        ConfigError, AdapterFileError: the model cannot be loaded, or has no class names.

    Example:
        >>> main(PredictArguments("my-adapter", ["photos/tench.jpg"], format="csv"))
        file,label,score
        photos/tench.jpg,tench,0.93
    """
    files = image_files(args.images)
    task = load_classifier(args)
    if args.on_bad_image == "skip":
        files = usable_files(files, args.silent)
    found = task.predict(files, args.class_names, args.batch_size, args.silent, args.top_k)
    {"table": print_table, "json": print_json, "csv": print_csv}[args.format](list(zip(files, found, strict=True)))


def image_files(given: Sequence[str]) -> list[str]:
    """Returns files and addresses of images.

    Args:
        given: files and addresses, as they are; folders, for the images in and below them; patterns of files.

    Raises:
        DataError: there is nothing of this name, or no image in a folder.

    Example:
        >>> image_files(["photos", "https://example.org/b.jpg"])
        ['photos/a.jpg', 'https://example.org/b.jpg']
    """
    found: list[str] = []
    for name in given:
        if name.startswith(WEB) or os.path.isfile(name):
            found.append(name)
            continue
        if not exists(name):
            raise DataError("there is no such file or folder", where="images", got=name)
        with reading(name, "images"):
            folder, files = files_of(name)
        images = [os.path.join(folder, file) for file in files if is_image(file)]
        if not images:
            raise DataError("there are no images", where="images", got=name)
        found += images
    return found


def load_classifier(args: PredictArguments) -> NamedClassesTask:
    """Loads what was trained; a dual encoder that was not becomes a zero-shot classifier of the class names.

    Args:
        args: the model, its base, and class names.

    Raises:
        ConfigError: the model has no class names.
    """
    name, device = str(args.model), "cpu" if args.use_cpu else None
    if args.class_names and not (find_model(name, None).folder / CONFIG_FILE).exists():
        return ZeroShotClassifier.from_pretrained(name, args.base, device=device, class_names=args.class_names)
    task = Task.from_pretrained(name, args.base, device=device)
    if not isinstance(task, NamedClassesTask):
        what, remedy = f"{type(task).__name__} have no class names to answer with", "In Python, embed_images() gives "
        raise ConfigError(what, where=name, remedy=remedy + "what they have learned.")
    return task


def usable_files(files: Sequence[str], silent: bool) -> list[str]:
    """Returns the images that can be used; the others are named on stderr.

    Args:
        files: paths and addresses.
        silent: without a progress bar.

    Raises:
        DataError: none can be used.
    """
    rows, problems = GivenImages(files), {}
    for place in tqdm(range(len(rows)), desc="Looking for broken images", leave=False, disable=silent):
        try:
            rows[place][IMAGE].open()
        except DataError as error:
            problems[place] = str(error)
    if len(problems) == len(files):
        raise DataError("no image can be used", where="images", got=problems[0], allowed="at least one")
    if problems:
        lines = [f"{len(problems)} of {len(files)} images are left out:", *problems.values()]
        print("\n".join(lines), file=sys.stderr)
    return [file for place, file in enumerate(files) if place not in problems]


def print_table(answers: Answers) -> None:
    """Prints a table for readers.

    Args:
        answers: of every file.
    """
    table = Table("file", "label")
    table.add_column("score", justify="right")
    for file, label, score in _lines(answers):
        texts = [printable(text, LONGEST) for text in (file, label)]
        table.add_row(*(Text(text, overflow="fold") for text in texts), "" if score is None else f"{score:.3f}")
    Console().print(table)


def print_json(answers: Answers) -> None:
    """Prints one JSON array, with an object for every file: `file`, and `label` and `score`, or a list of `answers`.

    Args:
        answers: of every file.
    """
    objects = [{"file": file, **({"answers": one} if isinstance(one, list) else one)} for file, one in answers]
    print(json.dumps(objects, indent=2))


def print_csv(answers: Answers) -> None:
    """Prints CSV with a header, and a line for every answer; one without a label for a file that has none.

    What stdout's encoding has no bytes for is escaped with a backslash: names of files may be in any other.

    Args:
        answers: of every file.
    """
    writer = csv.writer(sys.stdout, lineterminator="\n")
    lines = ((_encodable(file), _encodable(label), score) for file, label, score in _lines(answers))
    writer.writerows([("file", "label", "score"), *lines])


def _encodable(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"  # of a StringIO there is none
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _lines(answers: Answers) -> Iterator[tuple[str, str, float | None]]:
    for file, of_file in answers:
        if of_file == []:
            yield file, "", None
        for answer in of_file if isinstance(of_file, list) else [of_file]:
            yield file, answer["label"], answer["score"]


TYPES = (PredictArguments,)
EXAMPLE = "hf-robust predict my-adapter photos/*.jpg --format csv"
