# SPDX-License-Identifier: Apache-2.0
"""What `hf-robust train photos` decides: what is trained on, chosen by and tested on, and where results go."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..cards.results import role_of
from ..data.class_spaces import ClassSpace
from ..data.files import split_off
from ..data.rows import LabelledImages
from ..data.sources import split_names
from ..data.splits import split_word
from ..errors import ConfigError, DataError
from ..evaluation.corrupted_sets import SEVERITY, parts
from ..evaluation.suite import RobustnessSuite, SuiteSet
from ..training.trainer import RobustTrainer
from .adapters import MethodArguments

if TYPE_CHECKING:
    from .train import Sets, TrainArguments, TrainingSettings

VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2  # held out where there is no such split


def decide(
    args: TrainArguments, method: MethodArguments, training_args: TrainingSettings
) -> tuple[TrainArguments, TrainingSettings]:
    """Fills in settings that are not given, by the splits of the data.

    Args:
        args: model and data.
        method: what is trained.
        training_args: of the training; only its `output_dir` is filled in.

    Returns:
        Both, where `data` is given with settings in its place.

    Raises:
        DataError: there is no such data, or it has splits, but none to train on.

    Example:
        >>> args, _ = decide(TrainArguments("photos"), MethodArguments(), TrainingSettings())
        >>> args.train_data, args.validation_data, args.eval_data, args.validation_share
        ('photos:train', None, {'id': 'photos:test'}, 0.1)
    """
    if args.data:
        args = by_splits(args)
    if not training_args.is_decided["output_dir"]:
        training_args.output_dir = f"{_short(split_off(args.data or str(args.train_data))[0])}-{method.method}"
    if Path(str(training_args.output_dir)).is_file():
        raise ConfigError("a file is where results shall go", where="output_dir", got=str(training_args.output_dir))
    return args, training_args


def by_splits(args: TrainArguments) -> TrainArguments:
    """Fills in what is trained on, chosen by and tested on, by the splits of `data`.

    Args:
        args: with `data`.

    Raises:
        DataError: there is no such data, or it has splits, but none to train on.
    """
    data, (name, split) = str(args.data), split_off(str(args.data))
    splits = [] if split else split_names(name, "data")
    found = {split_word(one) or one: f"{name}:{one}" for one in splits}
    given: Any = args.eval_data or {}
    for taken in (args.train_data, args.validation_data):  # which is no evaluation set, then
        found = {one: source for one, source in found.items() if source != taken}
    if splits and "train" not in found and not args.train_data:
        remedy = "Name one of them by --train_data, as in 'photos:day'."
        raise DataError("no split to train on", where="data", got=data, allowed=", ".join(found), remedy=remedy)
    train = found.pop("train", data)
    train = args.train_data or train
    own, test = found.pop("validation", None), found.pop("test", None)
    validation = args.validation_data or (None if "validation" in given else own)
    tests = {**({"id": test} if test else {}), **found, **given}
    return replace(
        args,
        train_data=train,
        validation_data=None if args.validation_share else validation,
        eval_data=tests,
        validation_share=args.validation_share or (0.0 if validation or "validation" in given else VALIDATION_SHARE),
        test_share=args.test_share or (0.0 if "id" in tests else TEST_SHARE),
        wise_ft=True if args.wise_ft is None else args.wise_ft,
    )


def _short(source: str) -> str:
    """The name of a source, of letters that every file system takes."""
    return re.sub(r"\W+", "-", Path(source).name or Path(source).resolve().name).strip("-") or "model"


def suite_of(train: LabelledImages, sets: Sets, templates: str) -> RobustnessSuite:
    """Returns the suite of evaluation sets; without one of another distribution also the first under corruptions.

    Args:
        train: the training set.
        sets: to evaluate, by name.
        templates: of the prompts.

    Example:
        >>> [one.name for one in suite_of(train, {"id": test}, "single").sets][:2]
        ['id', 'ood_gaussian_noise']
    """
    known = ClassSpace(train.class_names or [])
    found = [
        SuiteSet(name, role_of(name, known.relate(rows.class_names or []).order is None), rows.to_dataset())
        for name, rows in sets.items()
    ]
    tests = [one for one in found if one.role == "id"]
    if tests and not any(one.role == "ood" for one in found):
        found += [
            replace(tests[0], name=f"ood_{name}", role="ood", source=part.to_dataset(), corruption=(name, SEVERITY))
            for name, part in parts(sets[tests[0].name]).items()
        ]
    return RobustnessSuite([replace(one, templates=templates) for one in found])


def say(args: TrainArguments, method: MethodArguments, trainer: RobustTrainer, sets: Sets) -> None:
    """Prints what was decided.

    Args:
        args: model and data.
        method: what is trained.
        trainer: before its training.
        sets: what is evaluated.
    """
    how, task = trainer.args, trainer.model
    classes = task.settings().get("class_names")
    train = trainer.train_dataset
    of_classes = "" if classes is None else f" of {len(classes)} classes"
    validation = sets["validation"] if "validation" in sets else None
    held = " held out" if args.validation_share else f", {args.validation_data}"
    tests = {name: len(rows) for name, rows in sets.items() if name != "validation"}
    trains = method.method != "zero_shot"
    length = f"{how.max_steps} steps" if how.max_steps > 0 else f"{how.num_train_epochs:g} epochs"
    rows = {
        "model": args.model_name_or_path,
        "method": method.method + (", then WiSE-FT by validation" if args.wise_ft and trains else ""),
        "trained on": f"{len(train):,} images{of_classes}, {args.train_data}",
        "validated on": "nothing" if validation is None else f"{len(validation):,} images{held}",
        "tested on": ", ".join(f"{name} ({n:,})" for name, n in tests.items()) or "nothing",
        **({"training": f"{length}, {how.train_batch_size} images a step"} if trains else {}),
        **({"learning rate": f"{how.learning_rate:g}"} if trains else {}),
        "results": str(how.output_dir),
    }
    table = Table(title="Decided; flags change it, see --help", title_justify="left", box=None, show_header=False)
    for what, value in rows.items():
        table.add_row(what, Text(value))
    Console().print(table)
