# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_robust"]
# ///
"""Base-to-new: train on a few images of half of the classes, test on both halves, each among its own names.

A learned context (CoOp) and SAFT in the text tower, each alone and with OGEN, over several seeds. With a config file,
whose settings are the fields below; flags on the command line win:

    python examples/base_to_new.py --config examples/configs/base_to_new.yaml
    python examples/base_to_new.py --config examples/configs/base_to_new.yaml --methods zero_shot coop --seeds 1 2

Every finished run is kept in results.json, so the same command goes on where it was interrupted. The vision tower
stays as it is in all methods, so every image is embedded once, and the embeddings are kept on disk.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from datasets import Dataset
from matplotlib.figure import Figure
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import ProcessorMixin

from hf_robust import (
    OGENConfig,
    OGENLoss,
    RobustTrainer,
    RobustTrainingArguments,
    SAFTConfig,
    context_prompt,
    with_image_embeds,
    with_image_size,
)
from hf_robust.data.class_spaces import class_space
from hf_robust.data.text_files import read_json
from hf_robust.encoders.templates import readable
from hf_robust.errors import DataError
from hf_robust.evaluation import base_to_new, few_shot, harmonic_mean, plot_over_epochs
from hf_robust.evaluation.report import write_json
from hf_robust.scripting.checks import check_given, check_same_settings, check_training, check_values
from hf_robust.scripting.loading import load_images, load_model, load_processor, loading_data
from hf_robust.scripting.progress import is_silent, show_progress
from hf_robust.scripting.results import package_versions, percent
from hf_robust.scripting.run import run

METHODS = ("zero_shot", "coop", "coop+ogen", "saft", "saft+ogen")
HALVES = ("base", "new")
FIXED = {"eval_strategy": "epoch", "eval_on_start": False, "eval_delay": 0, "save_strategy": "no", "head": "live"}
OWN = {"learning_rate": "context_learning_rate and saft_learning_rate", "seed": "seeds"}
DEFAULTS = {**FIXED, "logging_steps": 10}  # the progress bar shows the loss


@dataclass
class ScriptArguments:
    """Model, data and methods; what concerns the training itself is in `RobustTrainingArguments`.

    Data is what examples/train.py takes. Train and test data have the same classes.
    """

    model_name_or_path: str = field(default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    train_data: str | None = field(default=None, metadata={"help": "Labelled images of all classes to train on."})
    test_data: str | None = field(default=None, metadata={"help": "Labelled images of all classes to test on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images; else image, img, jpg, …"})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels; else label, labels or cls."})
    shots: int = field(default=16, metadata={"help": "Training images per base class."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Of the draw and the training."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": ", ".join(METHODS)})
    context_tokens: int = field(default=4, metadata={"help": "coop: learned word vectors."})
    context_init: str | None = field(default="a photo of a", metadata={"help": "coop: as many tokens to start from."})
    context_learning_rate: float = field(default=2e-3, metadata={"help": "coop: learning rate."})
    density: float = field(default=0.001, metadata={"help": "saft: share of parameters to train."})
    saft_learning_rate: float = field(default=1e-3, metadata={"help": "saft: learning rate."})

    def __post_init__(self) -> None:
        check_given(self, "train_data", "test_data")
        check_values(self.methods, METHODS, seeds=self.seeds)


@dataclass(frozen=True)
class Task:
    """What all runs share.

    Args:
        processor: of the model.
        train: rows of the base classes, with images.
        sets: the two halves of the test set, with image embeddings.
        class_names: by half.
    """

    processor: ProcessorMixin
    train: Dataset
    sets: dict[str, Dataset]
    class_names: dict[str, list[str]]


def load_task(args: ScriptArguments, training_args: RobustTrainingArguments) -> Task:
    """Loads and splits the data, and embeds the test images."""
    processor = load_processor(args.model_name_or_path)
    with loading_data(training_args):
        train = load_images(args.train_data, "train_data", args)
        test = load_images(args.test_data, "test_data", args, train.class_names)
    names = class_space(train.class_names, None, "train_data")
    if test.class_names is None or names.relate(test.class_names).kind != "same":
        what, allowed = "classes of train and test data differ", f"those of {args.train_data}, in the same order"
        raise DataError(what, where=args.test_data, got=test.class_names, allowed=allowed)
    train_base, _ = base_to_new(train.to_dataset())
    with training_args.main_process_first(desc="embedding the test images"):
        sets = dict(zip(HALVES, base_to_new(embedded(test, args, training_args, processor)), strict=True))
    class_names = {half: [readable(name) for name in sets[half].features["label"].names] for half in HALVES}
    return Task(processor, train_base, sets, class_names)


def embedded(
    dataset: Any, args: ScriptArguments, training_args: RobustTrainingArguments, processor: ProcessorMixin
) -> Dataset:
    """The dataset with embeddings in place of its images."""
    model = pretrained(args).to(training_args.device)
    processor = with_image_size(processor, training_args.image_size, model)
    size, workers = training_args.per_device_eval_batch_size, training_args.dataloader_num_workers
    return with_image_embeds(dataset, model, processor, size, workers, is_silent(training_args))


def pretrained(args: ScriptArguments) -> nn.Module:
    """The pre-trained model; nothing of it is trained."""
    return load_model(args.model_name_or_path, args.dtype).requires_grad_(False)


def make_trainer(
    method: str, seed: int, train: Dataset, task: Task, args: ScriptArguments, training_args: RobustTrainingArguments
) -> RobustTrainer:
    """A trainer of one method on a fresh model."""
    model, family = pretrained(args), method.removesuffix("+ogen")
    settings = copy.copy(training_args)
    settings.seed = seed
    if family == "coop":
        names = task.class_names["base"] + task.class_names["new"]
        context = args.context_tokens, args.context_init, names, seed
        model, settings.templates = context_prompt(model, task.processor, *context)
        settings.learning_rate = args.context_learning_rate
    if family == "saft":
        config = SAFTConfig(density=args.density, towers="text")
        model, settings.learning_rate = get_peft_model(model, config), args.saft_learning_rate
    losses = [OGENLoss(OGENConfig(task.class_names["new"], seed=seed))] if method.endswith("+ogen") else []
    data = {"train_dataset": train, "eval_dataset": task.sets, "processing_class": task.processor}
    return RobustTrainer(model, settings, **data, losses=losses)


def accuracies_over_epochs(trainer: RobustTrainer, method: str, seed: int) -> dict[str, Any]:
    """Evaluates, trains, and returns what came of it."""
    metrics = trainer.evaluate()
    keys = {half: f"eval_{half}_accuracy" for half in HALVES}
    accuracies = {half: [metrics[key]] for half, key in keys.items()}
    start, trained = time.perf_counter(), 0
    if method != "zero_shot":
        trainer.train()
        trained = sum(p.numel() for p in trainer.model.model.parameters() if p.requires_grad)
        for half, key in keys.items():
            accuracies[half] += [entry[key] for entry in trainer.state.log_history if key in entry]
    seconds = time.perf_counter() - start
    return {"method": method, "seed": seed, **accuracies, "trained_parameters": trained, "training_seconds": seconds}


def start_results(task: Task, args: ScriptArguments, training_args: RobustTrainingArguments) -> dict[str, Any]:
    """The results so far: those of an interrupted call with the same settings, or none."""
    with_ogen = any(method.endswith("+ogen") for method in args.methods)
    results = {
        "class_names": task.class_names,
        "names_given_to_ogen": task.class_names["new"] if with_ogen else [],
        "images": {"train": len(task.class_names["base"]) * args.shots, **{h: len(task.sets[h]) for h in HALVES}},
        "config": {**asdict(args), **training_args.to_dict()},
        "versions": package_versions(),
        "runs": [],
    }
    results = json.loads(json.dumps(results))
    file = results_file(training_args)
    if not file.exists():
        return results
    found = read_json(file)
    found["config"]["output_dir"] = results["config"]["output_dir"]  # one folder may be written in several ways
    check_same_settings(found, {part: results[part] for part in ("config", "versions", "class_names")}, file)
    return found


def results_file(training_args: RobustTrainingArguments) -> Path:
    """Where the results are."""
    return Path(training_args.output_dir) / "results.json"


def curves(results: dict[str, Any], method: str, half: str) -> list[list[float]]:
    """The accuracies of a method over the epochs, by seed."""
    return [one[half] for one in results["runs"] if one["method"] == method]


def show(results: dict[str, Any]) -> None:
    """Prints the accuracies after the last epoch, in percent."""
    seeds = ", ".join(map(str, results["config"]["seeds"]))
    table = Table("method", title=f"Accuracy in %, shots: {results['config']['shots']}, seeds: {seeds}")
    for title in ("base", "new", "H"):
        table.add_column(title, justify="right")
    for method in results["config"]["methods"]:
        base, new = ([curve[-1] for curve in curves(results, method, half)] for half in HALVES)
        by_seed = [harmonic_mean(*pair) for pair in zip(base, new, strict=True)]
        total = harmonic_mean(mean(base), mean(new))
        table.add_row(method, percent(mean(base), base), percent(mean(new), new), percent(total, by_seed))
    Console().print(table)
    print("H: harmonic mean of the mean base and the mean new accuracy. ±: standard deviation over seeds (n - 1).")
    names = results["names_given_to_ogen"]
    if names:
        listed = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        print(f"OGEN also saw the names (not the images) of {len(names)} new classes: {listed}")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws accuracy on the new classes over the epochs: each method and the same with OGEN, side by side."""
    methods = results["config"]["methods"]
    pairs = [[m for m in methods if m.removesuffix("+ogen") == family] for family in ("coop", "saft")]
    pairs = [pair for pair in pairs if pair]
    if not pairs:
        return
    figure = Figure(figsize=(5.5 * len(pairs), 4.4), layout="constrained")
    for axes, pair in zip(figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0], pairs, strict=True):
        plot_over_epochs({method: curves(results, method, "new") for method in pair}, axes)
    figure.savefig(path, dpi=150)


def pending(results: dict[str, Any]) -> dict[int, list[str]]:
    """The methods still to run, by seed; zero-shot accuracy is the same with every seed."""
    seeds, methods = results["config"]["seeds"], results["config"]["methods"]
    done = {(one["method"], one["seed"]) for one in results["runs"]}
    runs = {seed: [m for m in methods if m != "zero_shot" or seed == seeds[0]] for seed in seeds}
    todo = {seed: [m for m in methods if (m, seed) not in done] for seed, methods in runs.items()}
    return {seed: methods for seed, methods in todo.items() if methods}


def main(args: ScriptArguments, training_args: RobustTrainingArguments) -> None:
    """Runs what has not been run yet, then shows all."""
    check_training(training_args, FIXED, OWN)
    task = load_task(args, training_args)
    results, is_main = start_results(task, args, training_args), training_args.process_index == 0
    todo = pending(results)
    done, runs = len(results["runs"]), len(results["runs"]) + sum(map(len, todo.values()))
    for seed, methods in todo.items():
        with training_args.main_process_first(desc="embedding the training images"):
            train = embedded(few_shot(task.train, args.shots, seed), args, training_args, task.processor)
        for method in methods:
            trainer = make_trainer(method, seed, train, task, args, training_args)
            done += 1
            show_progress(trainer, f"Run {done} of {runs}: {method}, seed {seed}", lines=False)
            results["runs"].append(accuracies_over_epochs(trainer, method, seed))
            if is_main:
                write_json(results, results_file(training_args))
    if is_main:
        show(results)
        draw(results, Path(training_args.output_dir) / "over_epochs.png")


if __name__ == "__main__":
    run(main, ScriptArguments, RobustTrainingArguments, defaults=DEFAULTS)
