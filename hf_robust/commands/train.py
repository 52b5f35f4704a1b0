# SPDX-License-Identifier: Apache-2.0
"""The command `hf-robust train`: fine-tunes a dual encoder, and compares it with its zero-shot self on several sets.

    hf-robust train photos                                # finds the splits, and decides what else is not said
    hf-robust train --config examples/configs/demo.yaml   # settings are the flags; flags on the command line win

What is learned is read off the columns of the training data, or said by `--task`: class names, pairs of images and
texts, several labels an image, or identities. On two processes, of a machine without GPU too:

    accelerate launch --multi_gpu --num_processes 2 -m hf_robust train photos
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column as TableColumn
from rich.table import Table
from rich.text import Text
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from ..cards.results import Column, role_of
from ..data.columns import LABEL
from ..data.hold_out import hold_out
from ..data.rows import LabelledImages
from ..errors import ConfigError
from ..evaluation.corrupted_sets import corrupted_sets
from ..evaluation.report import write_json
from ..scripting.arguments import setting
from ..scripting.loading import (
    DEFAULT_MODEL,
    load_images,
    load_model,
    load_processor,
    loading_data,
    read_class_names,
    read_sets,
    usable,
    wish_to_resume,
)
from ..scripting.progress import is_silent, show_progress
from ..scripting.results import package_versions, percent
from ..scripting.run import no_empty_folders
from ..tasks.choose import target_of
from ..training.arguments import RobustTrainingArguments
from ..training.trainer import RobustTrainer
from .adapters import GROUP as METHOD
from .adapters import MethodArguments, add_method
from .decide import decide, say
from .rates import search_rate
from .settings import CommandSettings

Sets = dict[str, LabelledImages]
VALIDATION = "validation"
AUTO = "auto"
DATA, MODEL = "data", "model"  # groups of the help
HELD_OUT_SEED = 0  # not that of the training, which may change while the test set stays


@dataclass
class TrainArguments:
    """Fine-tunes a dual encoder so that it keeps what it knew, and says what that gained and cost.

    Data is a folder with one subfolder of images per class; parquet, CSV, TSV or JSON lines (with a column of paths),
    as a file, a pattern or a folder; or a dataset of the Hub, `owner/name`. Where there are several splits, one is
    chosen by `:split`, as in `photos:train`. Underscores in class names are read as spaces.
    """

    data: str | None = setting(None, "Images to train on, validate and test, by their splits.", DATA, positional=True)
    train_data: str | None = setting(None, "Images with labels or texts to train on.", DATA)
    validation_data: str | None = setting(None, "Evaluated during training, too; wise_ft chooses on it.", DATA)
    eval_data: dict | str | None = setting(None, "Sets by name, as id, ood_sketch, other_pets; as a flag: JSON.", DATA)
    validation_share: float = setting(0.0, "Hold out so much of train_data for validation.", DATA)
    test_share: float = setting(0.0, "Hold out so much of train_data, as the evaluation set id.", DATA)
    corruptions: bool = setting(True, "Without a set named ood: evaluate id also with noise, blur and so on.", DATA)
    class_names_file: str | None = setting(None, "Names by line, or .json by label.", DATA)
    image_column: str | None = setting(None, "Column of images; else image, img, jpg, …", DATA)
    label_column: str | None = setting(None, "Column of labels or texts; else label, text, …", DATA)
    model_name_or_path: str = setting(DEFAULT_MODEL, "Hub id or folder.", MODEL)
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Of the weights.", MODEL)
    wise_ft: bool | None = setting(None, "Go back to the alpha that is best on validation data; true, false.", METHOD)

    def __post_init__(self) -> None:
        if isinstance(self.eval_data, str):
            self.eval_data = read_sets(self.eval_data, "eval_data")
        if not self.data and not self.train_data:
            remedy = "Name a folder or a dataset of the Hub first: hf-robust train photos."
            raise ConfigError("nothing to train on", where="data, train_data", remedy=remedy)
        named: Any = self.eval_data or {}
        if self.validation_data and VALIDATION in named:
            remedy = "Rename the one in eval_data."
            raise ConfigError("two sets are named validation", where="eval_data", remedy=remedy)
        for name in ("validation_share", "test_share"):
            if not 0 <= (got := getattr(self, name)) < 1:
                raise ConfigError("share is out of range", where=name, got=got, allowed="[0, 1)")
        validates = self.validation_data or VALIDATION in named
        if (validates and self.validation_share) or ("id" in named and self.test_share):
            where = "validation_share, test_share"
            raise ConfigError("a set is given, and shall be held out, too", where=where)
        if self.wise_ft and not (validates or self.validation_share or self.data):  # the splits of data show later
            raise ConfigError("wise_ft chooses alpha on validation data", where="validation_data")


@dataclass
class TrainingSettings(CommandSettings):
    """`CommandSettings` with what this command decides where it is not said."""

    output_dir: str | None = setting(None, "Where to; default: by data and method.")
    learning_rate: None | str | float = setting(  # type: ignore[assignment]
        None, "Peak; auto: searched on validation data; default: that of the method."
    )
    eval_strategy: None | str = setting(  # type: ignore[assignment]
        None, "no, steps or epoch; default: epoch, where there is validation data."
    )

    def __post_init__(self) -> None:
        self.is_decided = {name: getattr(self, name) is not None for name in ("output_dir", "eval_strategy")}
        self.eval_strategy = self.eval_strategy or ("epoch" if self.load_best_model_at_end else "no")
        self.searches_rate = self.learning_rate == AUTO
        if isinstance(self.learning_rate, str):
            self.learning_rate = None if self.searches_rate else _number(self.learning_rate)
        super().__post_init__()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError("no learning rate", where="learning_rate", got=text, allowed="a number, or auto") from error


def evaluated(trainer: RobustTrainer, sets: Sets) -> dict[str, float]:
    """Of every set what the task is measured by, the accuracy of class names, a fraction."""
    metrics = trainer.evaluate(sets)
    return {name: metrics[f"eval_{name}_{trainer.model.metrics[0]}"] for name in sets}


def show(results: dict[str, Any], sets: Sets) -> None:
    """Prints what the sets are measured by side by side, and what they changed by, in percent."""
    columns = {} if results["method"] == "zero_shot" else {results["method"]: results["fine_tuned"]}
    if results["wise_ft"]:
        columns[f"alpha {results['wise_ft']['alpha']:.1f}"] = results["wise_ft"][results["metric"]]
    table = Table(
        TableColumn("set", overflow="fold"),
        title=f"{results['metric'].replace('accuracy', 'Accuracy')} in %",
        box=SIMPLE_HEAD,
    )
    for title in ("images", "zero-shot", *(title for column in columns for title in (column, "change"))):
        table.add_column(title, justify="right")
    rows = {name: ([name], str(len(dataset))) for name, dataset in sets.items()}
    shifted = [name for name in sets if name.split("_")[0] == "ood"]
    if len(shifted) > 1:
        rows["mean of ood"] = shifted, ""
    for title, (names, images) in rows.items():
        before, *after = (mean(found[name] for name in names) for found in (results["zero_shot"], *columns.values()))
        changes = [[percent(share), f"{round(100 * (share - before), 1) + 0.0:+.1f}"] for share in after]
        table.add_row(Text(title), images, percent(before), *(cell for change in changes for cell in change))
    Console().print(table)
    if results["wise_ft"] and results["wise_ft"]["alpha"] == 0:
        warning = "Warning: alpha 0 is best on the validation data, so the training was undone: the zero-shot model "
        remedy = "Try another --method or --learning_rate auto; --wise_ft false keeps the training."
        print(f"{warning}was saved. {remedy}", file=sys.stderr)


def load_data(args: TrainArguments, training_args: RobustTrainingArguments) -> tuple[LabelledImages, Sets]:
    """The training set, and the evaluation sets by name."""
    names = read_class_names(args.class_names_file)
    validation = {VALIDATION: args.validation_data} if args.validation_data else {}
    with loading_data(training_args):
        target = target_of(training_args.task, None)
        train = load_images(str(args.train_data), "train_data", args, names, target)
        named: Any = args.eval_data or {}
        sources = {**validation, **named}
        sets = {n: load_images(source, n, args, None, train.target) for n, source in sources.items()}
    train, sets = usable(train, training_args), {name: usable(rows, training_args) for name, rows in sets.items()}
    if args.test_share:
        train, sets["id"] = hold_out(train, args.test_share, HELD_OUT_SEED)
    if args.validation_share:
        train, held = hold_out(train, args.validation_share, HELD_OUT_SEED)
        sets = {VALIDATION: held, **sets}
    return train, sets


def with_corruptions(args: TrainArguments, trainer: RobustTrainer, sets: Sets) -> Sets:
    """The sets, and where none is of another distribution, the test set under corruptions."""
    task = trainer.model
    roles = {name: role_of(name, not task.knows(rows)) for name, rows in sets.items() if name != VALIDATION}
    tests = [name for name, role in roles.items() if role == "id"]
    if not args.corruptions or task.target != LABEL or not tests or "ood" in roles.values():
        return sets
    return {**sets, **corrupted_sets(sets[tests[0]])}


def make_trainer(
    args: TrainArguments,
    method: MethodArguments,
    train: LabelledImages,
    sets: Sets,
    training_args: RobustTrainingArguments,
) -> RobustTrainer:
    """A trainer that evaluates on the validation set in training, on all if there is none."""
    set_seed(training_args.seed)  # LoRA's matrices are drawn from the global generator
    names: Any = read_class_names(args.class_names_file)
    trainer = RobustTrainer(
        model=add_method(load_model(args.model_name_or_path, args.dtype), method),
        args=training_args,
        train_dataset=train,
        eval_dataset={VALIDATION: sets[VALIDATION]} if VALIDATION in sets else sets,
        processing_class=load_processor(args.model_name_or_path),
        class_names=names,
    )
    show_progress(trainer)
    return trainer


def prepare(
    args: TrainArguments, method: MethodArguments, training_args: TrainingSettings, train: LabelledImages, sets: Sets
) -> tuple[RobustTrainer, Sets]:
    """The trainer, with a learning rate that is searched if that is wanted, and the sets it is to be measured on."""
    if VALIDATION in sets and not training_args.is_decided["eval_strategy"]:
        training_args.eval_strategy = IntervalStrategy.EPOCH
    if training_args.searches_rate:
        make = partial(make_trainer, args, method, train, sets)
        training_args.learning_rate = search_rate(make, training_args, sets.get(VALIDATION))
    trainer = make_trainer(args, method, train, sets, training_args)
    return trainer, with_corruptions(args, trainer, sets)


def train_and_save(trainer: RobustTrainer, sets: Sets, checkpoint: str | None, wise_ft: bool) -> dict[str, Any]:
    """Evaluates, trains, evaluates, goes part of the way back if that is wanted, and saves; returns what was found."""
    zero_shot = evaluated(trainer, sets)
    start = time.perf_counter()
    trainer.train(checkpoint)
    seconds = time.perf_counter() - start
    columns: dict[Column, dict[str, float]] = {"zero-shot": zero_shot, "fine-tuned": evaluated(trainer, sets)}
    found = None
    if wise_ft:
        sweep = trainer.wise_ft_sweep(sets[VALIDATION])
        columns["chosen alpha"] = evaluated(trainer, sets)
        found = {"alpha": sweep.best_alpha, trainer.model.metrics[0]: columns["chosen alpha"], "sweep": sweep.rows}
    trainer.save_model()  # with a card that shows what was found
    return {
        "zero_shot": zero_shot,
        "fine_tuned": columns["fine-tuned"],
        "wise_ft": found,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "training_seconds": seconds,
    }


def zero_shot_alone(trainer: RobustTrainer, sets: Sets) -> dict[str, Any]:
    """What `train_and_save` returns, where nothing is trained."""
    found = evaluated(trainer, sets)
    return {
        "zero_shot": found,
        "fine_tuned": found,
        "wise_ft": None,
        "trained_parameters": 0,
        "training_seconds": 0.0,
    }


def main(args: TrainArguments, method: MethodArguments, training_args: TrainingSettings) -> None:
    """Decides what is not said, loads, trains, and shows and writes what came of it."""
    args, training_args = decide(args, method, training_args)
    with no_empty_folders([str(training_args.output_dir)]):
        _run(args, method, training_args)


def _run(args: TrainArguments, method: MethodArguments, training_args: TrainingSettings) -> None:
    checkpoint = wish_to_resume(training_args)
    train, sets = load_data(args, training_args)
    trainer, sets = prepare(args, method, training_args, train, sets)
    if args.data and not is_silent(training_args):
        say(args, method, trainer, sets)
    trains = method.method != "zero_shot"
    if trains:
        results = train_and_save(trainer, sets, checkpoint, bool(args.wise_ft))
    else:
        results = zero_shot_alone(trainer, sets)
    results |= {
        "method": method.method,
        "metric": trainer.model.metrics[0],
        "images": {name: len(dataset) for name, dataset in {"train": train, **sets}.items()},
        "config": {**asdict(args), **asdict(method), **trainer.args.to_dict()},
        "versions": package_versions(),
    }
    if trainer.is_world_process_zero():
        write_json(results, Path(str(training_args.output_dir)) / "results.json")
        show(results, sets)
        at = f" at alpha {results['wise_ft']['alpha']:.1f}" if results["wise_ft"] else ""
        written = f"the model{at}, its card and results.json" if trains else "results.json"
        print(f"Wrote {written} to {training_args.output_dir}.")


TYPES = (TrainArguments, MethodArguments, TrainingSettings)
EXAMPLE = "hf-robust train photos --method aclip --output_dir runs/aclip"
