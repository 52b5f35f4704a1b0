# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_robust"]
# ///
"""What did fine-tuning cost? A base model and an adapter of it, on all sets of a suite, at several shares of the way.

    python examples/evaluate_suite.py --base openai/clip-vit-base-patch32 --suite cifar10
    python examples/evaluate_suite.py --adapter runs/saft --suite mine.yaml --alphas 0.5 1 --output runs/suite.json

The base is the one that the adapter names, unless another is given. A model that was fine-tuned whole is a base. On
several devices:

    accelerate launch --multi_gpu --num_processes 2 examples/evaluate_suite.py --adapter me/my-adapter --suite imagenet
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from huggingface_hub import file_exists
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers.utils import PROCESSOR_NAME

from hf_robust import wise_ft
from hf_robust.errors import ConfigError
from hf_robust.evaluation.report import SuiteReport, write_json
from hf_robust.evaluation.run import evaluate_suite
from hf_robust.evaluation.suite import RobustnessSuite
from hf_robust.interpolation.arithmetic import check_alpha
from hf_robust.scripting.checks import check_given
from hf_robust.scripting.loading import load_adapter_config, load_model, load_processor
from hf_robust.scripting.results import percent
from hf_robust.scripting.run import run
from hf_robust.tasks.task import PROCESSOR_FOLDER, WEIGHTS_FILE

MEASURES = {
    "accuracy": "Accuracy in %",
    "image_to_text_recall@1": "Recall@1 of texts by images in %",
    "text_to_image_recall@1": "Recall@1 of images by texts in %",
    "mAP_macro": "Mean average precision over classes in %",
}


@dataclass
class ScriptArguments:
    """Model, suite, and where the results go."""

    suite: str | None = field(default=None, metadata={"help": "YAML file, or one of imagenet, cifar10 and others."})
    base: str | None = field(default=None, metadata={"help": "Hub id or folder; default: the adapter's."})
    adapter: str | None = field(default=None, metadata={"help": "Hub id or folder of an adapter."})
    alphas: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "WiSE-FT: shares of the way."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    batch_size: int = field(default=64, metadata={"help": "Images encoded at once, per process."})
    workers: int = field(default=0, metadata={"help": "Processes that open images, per process."})
    seed: int = field(default=0, metadata={"help": "Of the noise in corrupted images."})
    use_cpu: bool = field(default=False, metadata={"help": "Even where there is an accelerator."})
    silent: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        check_given(self, "suite")
        self.alphas = [check_alpha(alpha) for alpha in self.alphas]
        if len({title(alpha) for alpha in self.alphas}) < len(self.alphas):
            raise ConfigError("two alphas are the same in three digits", where="alphas", got=self.alphas)
        if self.base is None and self.adapter is None:
            raise ConfigError("no model", where="base, adapter", allowed="one of the two, or both")


def title(alpha: float) -> str:
    """The name of a column."""
    return f"alpha {alpha:.3g}"


def has_file(adapter: str, name: str) -> bool:
    """Whether an adapter on the Hub or in a folder has a file."""
    return (Path(adapter) / name).exists() if Path(adapter).is_dir() else file_exists(adapter, name)


def check_head(adapter: str) -> None:
    """Refuses an adapter whose head was trained: heads made of class names would be evaluated in its place."""
    if has_file(adapter, WEIGHTS_FILE):
        what = "the adapter has a trained head, which has no part in zero-shot classification"
        raise ConfigError(what, where=adapter, remedy="Train with head='live' or 'frozen' to compare all sets.")


def base_of(args: ScriptArguments) -> str:
    """Hub id or folder of the base model."""
    name = args.base or load_adapter_config(args.adapter).base_model_name_or_path
    if not name:
        raise ConfigError("the adapter does not name its base model", where=args.adapter, remedy="Give --base.")
    return name


def evaluate(args: ScriptArguments, suite: RobustnessSuite) -> dict[str, SuiteReport]:
    """The reports by column."""
    name = base_of(args)
    if args.adapter:
        check_head(args.adapter)
    how = {"batch_size": args.batch_size, "workers": args.workers, "seed": args.seed, "silent": args.silent}
    processor = load_processor(name)
    device = PartialState(cpu=args.use_cpu or not torch.accelerator.is_available()).device
    model = load_model(name, args.dtype).to(device)
    reports = {"base": evaluate_suite(model, processor, suite, **how)}
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
        saved = [f"{PROCESSOR_FOLDER}/{PROCESSOR_NAME}", PROCESSOR_NAME]
        if any(has_file(args.adapter, name) for name in saved):  # it may have been trained with images of another size
            processor = load_processor(args.adapter)
        for alpha in args.alphas:
            if args.alphas != [1.0]:  # not every method can go part of the way
                wise_ft(model, alpha)
            reports[title(alpha)] = evaluate_suite(model, processor, suite, **how)
    return reports


def show(reports: dict[str, SuiteReport]) -> None:
    """Prints a table in percent for every measure that some set has: sets in rows, models in columns."""
    for metric, title in MEASURES.items():
        if any(metric in result.metrics for result in reports["base"].sets.values()):
            Console().print(table(reports, metric, title))


def table(reports: dict[str, SuiteReport], metric: str, title: str) -> Table:
    """The sets that have a measure, and a row of means per role."""
    first = reports["base"]
    found = Table("role", "set", "images", *reports, title=title)
    for role in first.means_of(metric):
        names = [name for name, one in first.sets.items() if one.role == role and metric in one.metrics]
        for name in names:
            cells = [percent(report.sets[name].metrics[metric]) for report in reports.values()]
            found.add_row(role, name, str(len(first.sets[name].rows)), *cells)
        if len(names) > 1:
            cells = [percent(report.means_of(metric)[role]) for report in reports.values()]
            found.add_row(role, "mean", "", *cells, style="bold")
        found.add_section()
    return found


def main(args: ScriptArguments) -> None:
    """Evaluates, prints, and writes."""
    reports = evaluate(args, RobustnessSuite.from_yaml(args.suite))
    if PartialState().is_main_process:
        show(reports)
        if args.output:
            models = {name: report.to_dict() for name, report in reports.items()}
            write_json({"models": models, "config": asdict(args)}, Path(args.output))


if __name__ == "__main__":
    run(main, ScriptArguments)
