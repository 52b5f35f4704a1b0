# SPDX-License-Identifier: Apache-2.0
"""The command `hf-robust compare`: which method keeps most of what the model knew?

All of them on one task, over several seeds, also with WiSE-FT:

    hf-robust compare photos
    hf-robust compare --config examples/configs/compare_methods.yaml
    hf-robust compare --config examples/configs/compare_methods.yaml --methods full saft

Every method has its learning rate chosen on the validation data, from the same grid, by the one-standard-error rule:
the search starts in the middle of the grid and ends where both neighbours are worse. The weight of a loss is chosen
then: the largest within one standard error of the best. With `--selection id+other` other tasks have a say: what is
compared is the mean of the accuracy on the validation data and of that on `--other_validation_data '{"pets": …}'`.
Then the method is trained once per seed, evaluated on the suite, taken back by WiSE-FT, and evaluated again: to the
smallest α whose accuracy on the validation data is within one standard error of the best one's.

Every training that ends is kept in a file of its own, so the same command goes on where it was interrupted, and calls
with other methods or seeds may run at the same time and share the folder. The last one to end leaves all there is in
results.json, table.md and scatter.png; cards/ has a model card for every method, with the figures of its first seed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from ..comparison.methods import AFTER, ALL_METHODS, DEFAULT_METHODS, LOSSES
from ..comparison.runs import Runs
from ..comparison.search import GRID, WEIGHTS, search
from ..comparison.tables import report
from ..comparison.task import Comparison
from ..comparison.trainings import train_and_evaluate, zero_shot
from ..errors import ConfigError
from ..evaluation import RobustnessSuite
from ..scripting.arguments import setting
from ..scripting.checks import check_given, check_training, check_values
from ..scripting.loading import DEFAULT_MODEL, load_images, load_processor, loading_data, read_sets
from ..scripting.results import package_versions
from ..training.arguments import RobustTrainingArguments
from .decide import by_splits, suite_of
from .settings import CommandSettings
from .train import TrainArguments, load_data

ALPHAS = tuple(step / 10 for step in range(1, 11))
FIXED = {"eval_strategy": "no", "save_strategy": "no", "head": "live", "task": None}
OWN = {"learning_rate": "learning_rates", "seed": "seeds"}
MAY_CHANGE = ("methods", "seeds", "search_only", "output_dir")  # between calls that share a folder


@dataclass
class CompareArguments:
    """All methods on one task, over several seeds; each with settings chosen on validation data.

    What concerns the training itself is in `RobustTrainingArguments`; its `losses` are settings of the methods with
    these.
    """

    data: str | None = setting(
        None, "Images to train on, choose by and test on, by their splits.", "data", positional=True
    )
    model_name_or_path: str = setting(DEFAULT_MODEL, "Hub id or folder.", "model")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Of the weights.", "model")
    train_data: str | None = setting(None, "Labelled images to train on.", "data")
    validation_data: str | None = setting(None, "Rates, weights and α are chosen on these.", "data")
    suite: str | None = setting(None, "What to evaluate on: a YAML file or a suite's name.", "data")
    selection: Literal["id", "id+other"] = setting("id", "What has a say in what is chosen.", "comparison")
    other_validation_data: dict | str | None = setting(None, "id+other: JSON of other tasks by name.", "data")
    image_column: str | None = setting(None, "Column of images; else image, img, jpg, …", "data")
    label_column: str | None = setting(None, "Column of labels; else label, labels or cls.", "data")
    shots: int | None = setting(None, "Training images per class; all if not given.", "data")
    seeds: list[int] = setting([1, 2, 3], "Of the shots and the training.", "comparison")
    methods: list[str] = setting([*DEFAULT_METHODS], ", ".join(ALL_METHODS), "comparison")
    new_class_names: list[str] | None = setting(None, "context+ogen: names it is told.", "comparison")
    learning_rates: list[float] = setting([*GRID], "To choose from.", "comparison")
    weights: list[float] = setting([*WEIGHTS], "Of a loss, times its own.", "comparison")
    alphas: list[float] = setting([*ALPHAS], "WiSE-FT: to choose from.", "comparison")
    after: list[str] = setting([*AFTER], "Done afterwards.", "comparison")
    search_only: bool = setting(False, "Choose the settings and stop.", "comparison")

    def __post_init__(self) -> None:
        if isinstance(self.other_validation_data, str):
            self.other_validation_data = read_sets(self.other_validation_data, "other_validation_data")
        names = "train_data", "validation_data", "suite"
        if not self.data:
            check_given(self, *names)
        elif any(getattr(self, name) for name in names):
            raise ConfigError("data is all of these", where=", ".join(names), remedy="Leave them out, or data.")
        self.learning_rates, self.weights = sorted(self.learning_rates), sorted(self.weights)
        lists: dict[str, Any] = {"seeds": self.seeds, "learning_rates": self.learning_rates, "weights": self.weights}
        check_values(self.methods, ALL_METHODS, **lists, alphas=self.alphas)
        if not self.learning_rates[0] > 0:
            got = self.learning_rates
            raise ConfigError("learning rate is out of range", where="learning_rates", got=got, allowed="above 0")
        if not self.weights[0] >= 0:
            raise ConfigError("weight is out of range", where="weights", got=self.weights, allowed="from 0")
        if not self.new_class_names and any(ALL_METHODS[name].ogen for name in self.methods):
            raise ConfigError("context+ogen needs the names of new classes", where="new_class_names", got=None)
        for way in self.after:
            if way not in AFTER:
                allowed = ", ".join(AFTER)
                raise ConfigError("nothing that is done afterwards", where="after", got=way, allowed=allowed)
        for name, what in (("alphas", "the fine-tuned model"), ("weights", "a loss's own weight")):
            if 1 not in (got := getattr(self, name)):
                raise ConfigError(f"{what} is missing", where=name, got=got, allowed="1 among them")
        if (self.selection == "id+other") != bool(self.other_validation_data):
            what, both = "id+other goes with images of other tasks", (self.selection, self.other_validation_data)
            raise ConfigError(what, where="selection, other_validation_data", got=both, allowed="both, or neither")
        if "id" in (self.other_validation_data or {}):
            raise ConfigError("id is the validation data itself", where="other_validation_data", got="id")


@dataclass
class TrainingSettings(CommandSettings):
    """`CommandSettings` of trainings of which nothing is kept."""

    output_dir: str | None = setting("comparison", "Where to.")
    save_strategy: str = setting("no", "Nothing is saved but what was found.")


def load(args: CompareArguments, training_args: RobustTrainingArguments) -> Comparison:
    """Loads processor, data and suite."""
    processor = load_processor(args.model_name_or_path)
    named: Any = args.other_validation_data or {}
    if args.data:
        columns: Any = {"image_column": args.image_column, "label_column": args.label_column}
        train, sets = load_data(by_splits(TrainArguments(args.data, **columns)), training_args)
        validation = sets.pop("validation")
        suite = suite_of(train, sets, training_args.templates)
    else:
        suite = RobustnessSuite.from_yaml(str(args.suite))
    with loading_data(training_args):
        if not args.data:
            train = load_images(str(args.train_data), "train_data", args)
            validation = load_images(str(args.validation_data), "validation_data", args)
        others = {name: load_images(path, name, args) for name, path in named.items()}
    return Comparison(
        args.model_name_or_path,
        args.dtype,
        processor,
        training_args,
        train.to_dataset(),
        validation,
        suite,
        args.shots,
        args.alphas,
        args.after,
        args.new_class_names,
        others,
    )


def shared_settings(args: CompareArguments, training_args: RobustTrainingArguments) -> dict[str, Any]:
    """What all calls that share a folder have in common."""
    config = {**asdict(args), **training_args.to_dict()}
    config = {name: value for name, value in config.items() if name not in MAY_CHANGE}
    return json.loads(json.dumps({"config": config, "versions": package_versions()}))


def main(args: CompareArguments, training_args: RobustTrainingArguments) -> None:
    """Runs what has not been run yet, then shows all."""
    check_training(training_args, FIXED, OWN)
    unknown = set(training_args.losses or {}) - set(LOSSES)
    if unknown:
        raise ConfigError("no method adds this loss", where="losses", got=sorted(unknown), allowed=", ".join(LOSSES))
    folder, common = Path(str(training_args.output_dir)), shared_settings(args, training_args)
    runs, comparison = Runs(folder, common), load(args, training_args)
    training_args.distributed_state.wait_for_everyone()  # all ranks have read what there is
    before = runs.get("zero-shot", zero_shot, comparison)
    how = args.learning_rates, args.weights
    settings = {name: search(comparison, runs, name, *how) for name in args.methods}
    if not args.search_only:
        for seed in args.seeds:
            for name in args.methods:
                arguments = comparison, name, settings[name], seed, before, seed == args.seeds[0]
                runs.get(f"{name}_seed_{seed}", train_and_evaluate, *arguments)
    if PartialState().is_main_process:
        report(common, Runs(folder, common).found, folder)
        print(f"Wrote table.md, results.json and cards to {folder}.")


TYPES = (CompareArguments, TrainingSettings)
EXAMPLE = "hf-robust compare photos --methods full saft aclip --seeds 1 2"
