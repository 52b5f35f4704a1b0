# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_robust", "pyyaml", "rich"]
# ///
"""Fine-tune a dual encoder on labelled images, and compare it with its zero-shot self on several evaluation sets.

With a config file, whose settings are the fields below; flags on the command line win:

    accelerate launch examples/train.py --config examples/configs/demo.yaml
    accelerate launch examples/train.py --config examples/configs/demo.yaml --method lora --learning_rate 1e-4

On two processes, of a machine without GPU too:

    accelerate launch --multi_gpu --num_processes 2 examples/train.py --config examples/configs/demo.yaml
"""

from __future__ import annotations

import gc
import json
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from statistics import stdev
from typing import Any

import yaml
from accelerate import PartialState
from datasets import ClassLabel, Dataset
from peft import LNTuningConfig, LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel, AutoProcessor, HfArgumentParser, set_seed

from hf_robust import ACLIPConfig, RobustTrainer, RobustTrainingArguments, SAFTConfig
from hf_robust.data.collator import feature_class_names
from hf_robust.data.sources import load_source
from hf_robust.encoders.dual_encoder import family
from hf_robust.errors import ConfigError, DataError, close_matches
from hf_robust.evaluation.report import write_json

DEFAULTS: dict[str, Any] = {}  # those of the library
VERSIONS_OF = ("hf_robust", "torch", "transformers", "peft", "accelerate", "datasets")


@dataclass
class ScriptArguments:
    """Model, data and method; what concerns the training itself is in `RobustTrainingArguments`.

    Data is a folder with one subfolder of images per class; parquet, CSV, TSV or JSON lines (with a column of paths),
    as a file, a pattern or a folder; or a dataset of the Hub, `owner/name`. Where there are several splits, one is
    chosen by `:split`, as in `photos:train`. Underscores in class names are read as spaces.
    """

    model_name_or_path: str = field(default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder."})
    dtype: str = field(default="float32", metadata={"help": "Precision the weights are loaded in."})
    train_data: str | None = field(default=None, metadata={"help": "Labelled images to train on."})
    validation_data: str | None = field(default=None, metadata={"help": "Evaluated during training, too."})
    eval_data: dict | str | None = field(default=None, metadata={"help": "Evaluation sets by name; as a flag: JSON."})
    class_names_file: str | None = field(default=None, metadata={"help": "One name per line, in label order."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the labels."})
    method: str = field(default="saft", metadata={"help": "zero_shot, full, saft, aclip, lora, ln_tuning."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "saft, aclip, lora: which modules."})
    density: float = field(default=0.001, metadata={"help": "saft: share of the parameters to train."})
    score: str = field(default="signed_mean", metadata={"help": "saft: what ranks the parameters."})
    scope: str = field(default="global", metadata={"help": "saft: rank all at once, or per_tensor."})
    towers: str = field(default="both", metadata={"help": "saft, aclip: both, vision or text."})
    exclude_input_embeddings: bool = field(default=True, metadata={"help": "saft: none in patch, token embeddings."})
    lora_rank: int = field(default=8, metadata={"help": "lora: rank."})
    wise_ft: bool = field(default=False, metadata={"help": "Go back to the alpha that is best on validation_data."})

    def __post_init__(self) -> None:
        if isinstance(self.eval_data, str):
            self.eval_data = json.loads(self.eval_data)
        if not self.train_data:
            raise ConfigError("no training data", where="train_data")
        if self.method not in METHODS:
            raise ConfigError("unknown method", got=self.method, remedy=close_matches(self.method, list(METHODS)))
        if self.wise_ft and not self.validation_data:
            raise ConfigError("wise_ft chooses alpha on validation data", where="validation_data")


def keep_as_is(model: nn.Module, args: ScriptArguments) -> nn.Module:
    """Zero-shot, and full fine-tuning: the model itself."""
    return model


def add_saft(model: nn.Module, args: ScriptArguments) -> nn.Module:
    """SAFT; `RobustTrainer` selects the entries before it trains them."""
    names = ("density", "score", "scope", "towers", "target_modules", "exclude_input_embeddings")
    return get_peft_model(model, SAFTConfig(**{name: getattr(args, name) for name in names}))


def add_aclip(model: nn.Module, args: ScriptArguments) -> nn.Module:
    """A-CLIP."""
    return get_peft_model(model, ACLIPConfig(towers=args.towers, target_modules=args.target_modules))


def add_lora(model: nn.Module, args: ScriptArguments) -> nn.Module:
    """LoRA."""
    targets = args.target_modules or "all-linear"
    return get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=targets))


def add_ln_tuning(model: nn.Module, args: ScriptArguments) -> nn.Module:
    """Training of all LayerNorms."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    return get_peft_model(model, LNTuningConfig(target_modules=names))


METHODS = {
    "zero_shot": keep_as_is,
    "full": keep_as_is,
    "saft": add_saft,
    "aclip": add_aclip,
    "lora": add_lora,
    "ln_tuning": add_ln_tuning,
}


def parse_arguments(script_arguments: type, defaults: dict[str, Any]) -> tuple[Any, RobustTrainingArguments]:
    """Reads the config file, then the command line.

    Args:
        script_arguments: the script's own dataclass, beside `RobustTrainingArguments`.
        defaults: of the script, where they are not the library's.
    """
    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    known, flags = config_parser.parse_known_args()
    parser = HfArgumentParser((script_arguments, RobustTrainingArguments))
    parser.set_defaults(**defaults)
    if known.config:
        settings = yaml.safe_load(Path(known.config).read_text())
        names = [one.name for one in fields(script_arguments) + fields(RobustTrainingArguments)]
        for name in settings:
            if name not in names:
                raise ConfigError("unknown setting", where=known.config, got=name, remedy=close_matches(name, names))
        parser.set_defaults(**settings)
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def check_training(training_args: RobustTrainingArguments, fixed: dict[str, Any], own: dict[str, str]) -> None:
    """Refuses training arguments that a script sets itself.

    Args:
        training_args: as they were read.
        fixed: values that have to be, by name.
        own: the script's own settings that stand in the place of an argument, by its name.
    """
    for name, ours in own.items():
        if getattr(training_args, name) != getattr(RobustTrainingArguments, name):
            raise ConfigError("not a setting of this script", where=name, remedy=f"Set {ours}.")
    for name, value in fixed.items():
        got = getattr(training_args, name)
        if got != value:
            raise ConfigError("cannot be changed here", where=name, got=got, allowed=repr(value))


def check_values(methods: Sequence[str], known: Iterable[str], **lists: Sequence[Any]) -> None:
    """Refuses unknown methods, and lists that are empty or hold a value twice.

    Args:
        methods: chosen by the user.
        known: those there are.
        lists: other lists by name.
    """
    for method in methods:
        if method not in known:
            raise ConfigError("unknown method", got=method, remedy=close_matches(method, list(known)))
    for name, values in {"methods": methods, **lists}.items():
        if len(values) == 0 or len(set(values)) < len(values):
            raise ConfigError(f"{name} are empty or repeated", got=values, allowed="at least one, each once")


def check_same_settings(found: dict[str, Any], expected: dict[str, Any], file: Path) -> None:
    """Refuses to go on with results of other settings.

    Args:
        found: sections of settings, as read from the file; it may hold more.
        expected: those of this call.
        file: where they were found.
    """
    pairs = [(part, name) for part, settings in expected.items() for name in settings]
    changed = [f"{part}.{name}" for part, name in pairs if found[part].get(name) != expected[part][name]]
    if changed:
        remedy = "Set another output_dir, or remove what is there."
        raise ConfigError("results are of other settings", where=str(file), got=changed, remedy=remedy)


def is_silent(training_args: RobustTrainingArguments) -> bool:
    """Whether this process shows no progress."""
    return training_args.disable_tqdm or training_args.process_index > 0


def percent(value: float, by_seed: Sequence[float]) -> str:
    """A figure in percent, with its standard deviation over seeds (n - 1) where there are several."""
    return f"{100 * value:.1f}" + (f" ± {100 * stdev(by_seed):.1f}" if len(by_seed) > 1 else "")


def load_images(
    source: str, where: str, args: ScriptArguments, class_names: list[str] | None, only_these: bool = False
) -> Dataset:
    """Loads a dataset and gives it the columns `image`, not yet decoded, and `label`; `where` names it in messages."""
    dataset = load_source(source, where)
    for ours, theirs in (("image", args.image_column), ("label", args.label_column)):
        if ours not in dataset.column_names and theirs in dataset.column_names:
            dataset = dataset.rename_column(theirs, ours)
    label = dataset.features.get("label")
    if isinstance(label, ClassLabel):
        return dataset.cast_column("label", ClassLabel(names=[name.replace("_", " ") for name in label.names]))
    if label is not None and label.dtype == "string":
        return number_labels(dataset, source, class_names, only_these)
    return dataset


def number_labels(dataset: Dataset, source: str, class_names: list[str] | None, only_these: bool) -> Dataset:
    """Makes class indices of labels that are text; class names that are known already keep their order."""
    found = set(dataset.unique("label"))
    unknown = sorted(found - set(class_names or found))
    if unknown and only_these:
        remedy = close_matches(unknown[0], class_names)
        raise DataError("label is outside the class names", where=source, got=unknown[0], remedy=remedy)
    names = sorted(found) if unknown or class_names is None else class_names
    return dataset.cast_column("label", ClassLabel(names=names))


def accuracies(metrics: dict[str, float], sets: dict[str, Dataset]) -> dict[str, float]:
    """The accuracy of every set, a fraction."""
    return {name: metrics[f"eval_{name}_accuracy"] for name in sets}


def show(results: dict[str, Any], sets: dict[str, Dataset]) -> None:
    """Prints zero-shot and fine-tuned accuracy side by side, in percent."""
    columns = {results["method"]: results["fine_tuned"]}
    if results["wise_ft"]:
        columns[f"alpha {results['wise_ft']['alpha']:.1f}"] = results["wise_ft"]["accuracy"]
    table = Table("set", "images", "zero-shot", title="Accuracy in %")
    for title in columns:
        table.add_column(title)
        table.add_column("change")
    for name, dataset in sets.items():
        before = 100 * results["zero_shot"][name]
        cells = [f"{before:.1f}"]
        for accuracy in columns.values():
            cells += [f"{100 * accuracy[name]:.1f}", f"{100 * accuracy[name] - before:+.1f}"]
        table.add_row(name, str(len(dataset)), *cells)
    Console().print(table)


def end_processes() -> None:
    """Ends the group of processes; for after a script's `main`, when nothing of its training is left.

    A model in DDP that outlives the group may wait for the group's threads for ever: pytorch/pytorch#56297.
    """
    gc.collect()
    PartialState().destroy_process_group()


def main(args: ScriptArguments, training_args: RobustTrainingArguments) -> None:
    """Loads, evaluates, trains, evaluates, and writes what came of it."""
    set_seed(training_args.seed)
    names = Path(args.class_names_file).read_text().splitlines() if args.class_names_file else None
    validation = {"validation": args.validation_data} if args.validation_data else {}
    with training_args.main_process_first(desc="loading data"):
        train = load_images(args.train_data, "train_data", args, names, only_these=True)
        known = names or feature_class_names(train)
        sources = {**validation, **(args.eval_data or {})}
        sets = {name: load_images(source, name, args, known) for name, source in sources.items()}
    model = AutoModel.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    family(model)  # refuses what is no dual encoder
    trainer = RobustTrainer(
        model=METHODS[args.method](model, args),
        args=training_args,
        train_dataset=train,
        eval_dataset={name: sets[name] for name in validation} or sets,
        processing_class=AutoProcessor.from_pretrained(args.model_name_or_path),
        class_names=names,
    )
    zero_shot = fine_tuned = accuracies(trainer.evaluate(sets), sets)
    seconds = trained = 0
    wise_ft = None
    if args.method != "zero_shot":
        start = time.perf_counter()
        trainer.train(training_args.resume_from_checkpoint)
        seconds = time.perf_counter() - start
        fine_tuned = accuracies(trainer.evaluate(sets), sets)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        if args.wise_ft:
            sweep = trainer.wise_ft_sweep(sets["validation"])
            accuracy = accuracies(trainer.evaluate(sets), sets)
            wise_ft = {"alpha": sweep.best_alpha, "accuracy": accuracy, "sweep": sweep.rows}
        trainer.save_model()
    results = {
        "method": args.method,
        "zero_shot": zero_shot,
        "fine_tuned": fine_tuned,
        "wise_ft": wise_ft,
        "trained_parameters": trained,
        "training_seconds": seconds,
        "images": {name: len(dataset) for name, dataset in {"train": train, **sets}.items()},
        "config": {**asdict(args), **training_args.to_dict()},
        "versions": {package: version(package) for package in VERSIONS_OF},
    }
    if trainer.is_world_process_zero():
        show(results, sets)
        write_json(results, Path(training_args.output_dir) / "results.json")


if __name__ == "__main__":
    main(*parse_arguments(ScriptArguments, DEFAULTS))
    end_processes()
