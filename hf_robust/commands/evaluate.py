# SPDX-License-Identifier: Apache-2.0
"""The command `hf-robust evaluate`: what did fine-tuning cost?

A model and its base, on all sets of a suite, at several shares of the way.

    hf-robust evaluate runs/saft --suite mine.yaml --alphas 0.5 1 --output runs/suite.json
    hf-robust evaluate openai/clip-vit-base-patch32 --suite cifar10
    hf-robust evaluate runs/saft --data photos:test

The base is the one that the adapter names, unless another is given. On several devices:

    accelerate launch --multi_gpu --num_processes 2 -m hf_robust evaluate me/my-adapter --suite imagenet
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.utils import CONFIG_NAME
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from ..errors import ConfigError
from ..evaluation.report import SuiteReport, write_json
from ..evaluation.run import evaluate_suite
from ..evaluation.suite import RobustnessSuite, SuiteSet
from ..interpolation.adapters import wise_ft
from ..interpolation.arithmetic import check_alpha
from ..scripting.arguments import setting
from ..scripting.checks import check_file, check_given
from ..scripting.loading import load_adapter_config, load_model, load_processor
from ..scripting.results import percent
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.files import read_settings
from ..tasks.flyp import FLYP
from ..tasks.saved_encoder import find_model
from ..tasks.task import CONFIG_FILE, PROCESSOR_FOLDER, WEIGHTS_FILE, Task

MEASURES = {
    "accuracy": "Accuracy in %",
    "image_to_text_recall@1": "Recall@1 of texts by images in %",
    "text_to_image_recall@1": "Recall@1 of images by texts in %",
    "mAP_macro": "Mean average precision over classes in %",
}


@dataclass
class EvaluateArguments:
    """What a model does on all sets of a suite, beside its base, at several shares of the way."""

    model: str | None = setting(None, "Folder or Hub id of an adapter or a model.", positional=True)
    suite: str | None = setting(None, "YAML file, or one of imagenet, cifar10 and others.")
    data: list[str] | None = setting(None, "Labelled images in the place of a suite: files, folders or Hub ids.")
    templates: str | None = setting(
        None, "For data: name of a template set, or one template with {}; default: the model's."
    )
    base: str | None = setting(None, "Folder or Hub id of what to compare with; default: the adapter's.")
    alphas: list[float] = setting([1.0], "WiSE-FT: shares of the way from the base to the model as it was saved.")
    output: str | None = setting(None, "JSON file to write.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Of the weights.")
    batch_size: int = setting(64, "Images encoded at once, per process.")
    workers: int = setting(0, "Processes that open images, per process.")
    seed: int = setting(0, "Of the noise in corrupted images.")
    use_cpu: bool = setting(False, "Even where there is an accelerator.")
    silent: bool = setting(False, "No progress bar.")

    def __post_init__(self) -> None:
        check_given(self, "model")
        if bool(self.suite) == bool(self.data):
            what = "two things to evaluate on" if self.suite else "nothing to evaluate on"
            raise ConfigError(what, where="suite, data", remedy="Set one of them, as in --data photos:test.")
        if self.suite and self.templates:
            raise ConfigError("a suite has templates of its own", where="templates", got=self.templates)
        self.alphas = [check_alpha(alpha) for alpha in self.alphas]
        if len({title(alpha) for alpha in self.alphas}) < len(self.alphas):
            raise ConfigError("two alphas are the same in three digits", where="alphas", got=self.alphas)


def title(alpha: float) -> str:
    """The name of a column."""
    return f"alpha {alpha:.3g}"


def base_of(args: EvaluateArguments, is_adapter: bool) -> str | None:
    """Folder or Hub id of what the model is compared with; None where it is a whole one and nothing is given."""
    if args.base or not is_adapter:
        return args.base
    name = load_adapter_config(str(args.model)).base_model_name_or_path
    if not name:
        raise ConfigError("the adapter does not name its base model", where=str(args.model), remedy="Give --base.")
    return name


def suite_of(args: EvaluateArguments, saved: Mapping[str, Any]) -> RobustnessSuite:
    """The suite that is asked for, or one of the images given, with the prompts that the model was trained with."""
    if args.suite:
        return RobustnessSuite.from_yaml(args.suite)
    templates = args.templates or saved.get("templates", "single")
    return RobustnessSuite([SuiteSet(source, "id", source, templates=templates) for source in args.data or []])


def evaluate(args: EvaluateArguments) -> dict[str, SuiteReport]:
    """The reports by column."""
    name, folder = str(args.model), find_model(str(args.model), None).folder
    saved = read_settings(folder) if (folder / CONFIG_FILE).exists() else {}
    is_adapter, has_head = ((folder / file).exists() for file in (CONFIG_NAME, WEIGHTS_FILE))
    base, reports, suite = base_of(args, is_adapter), {}, suite_of(args, saved)
    if args.alphas != [1.0] and (has_head or not is_adapter):
        what, remedy = "an adapter alone can go part of the way here", "Merge it with its zero-shot model first."
        raise ConfigError(what, where="alphas", got=args.alphas, allowed="1", remedy=remedy)
    how: Any = {"batch_size": args.batch_size, "workers": args.workers, "seed": args.seed, "silent": args.silent}
    device = PartialState(cpu=args.use_cpu or not torch.accelerator.is_available()).device
    if base is not None:
        model, processor = load_model(base, args.dtype).to(device), load_processor(base)
        reports["base"] = evaluate_suite(_among(saved, model, processor), processor, suite, **how)
    if saved:
        model = Task.from_pretrained(name, base if is_adapter else None, dtype=args.dtype, device=device)
        processor = model.processor
    elif is_adapter:
        model = PeftModel.from_pretrained(model, name)
        if any((folder / place).exists() for place in (f"{PROCESSOR_FOLDER}/{PROCESSOR_NAME}", PROCESSOR_NAME)):
            processor = load_processor(name)  # it may have been trained with images of another size
    else:
        model, processor = load_model(name, args.dtype).to(device), load_processor(name)
    for alpha in args.alphas:
        if args.alphas != [1.0]:  # not every method can go part of the way
            wise_ft(model, alpha)
        reports["model" if args.alphas == [1.0] else title(alpha)] = evaluate_suite(model, processor, suite, **how)
    return reports


def _among(saved: Mapping[str, Any], model: nn.Module, processor: ProcessorMixin) -> nn.Module:
    """A base as it answers among the classes of the model that it is compared with, if that has some."""
    if saved.get("task") not in (ZeroShotClassifier.name, FLYP.name):
        return model
    names = saved["class_names"], saved["templates"]
    return ZeroShotClassifier(model, processor, *names, data_names=saved.get("data_names"))


def show(reports: dict[str, SuiteReport]) -> None:
    """Prints a table in percent for every measure that some set has: sets in rows, models in columns."""
    for metric, title in MEASURES.items():
        if any(metric in result.metrics for result in next(iter(reports.values())).sets.values()):
            Console().print(table(reports, metric, title))


def table(reports: dict[str, SuiteReport], metric: str, title: str) -> Table:
    """The sets that have a measure, and a row of means per role."""
    first = next(iter(reports.values()))
    found = Table("role", "set", "images", *reports, title=title)
    for role in first.means_of(metric):
        names = [name for name, one in first.sets.items() if one.role == role and metric in one.metrics]
        for name in names:
            cells = [percent(report.sets[name].metrics[metric]) for report in reports.values()]
            found.add_row(role, Text(name), str(len(first.sets[name].rows)), *cells)
        if len(names) > 1:
            cells = [percent(report.means_of(metric)[role]) for report in reports.values()]
            found.add_row(role, "mean", "", *cells, style="bold")
        found.add_section()
    return found


def main(args: EvaluateArguments) -> None:
    """Evaluates, prints, and writes."""
    check_file(args.output, "output")
    reports = evaluate(args)
    if PartialState().is_main_process:
        show(reports)
        if args.output:
            models = {name: report.to_dict() for name, report in reports.items()}
            write_json({"models": models, "config": asdict(args)}, Path(args.output))


TYPES = (EvaluateArguments,)
EXAMPLE = "hf-robust evaluate runs/saft --data photos:test --alphas 0.5 1"
