# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_robust"]
# ///
"""Fine-tune a dual encoder on labelled or captioned images, and compare it with its zero-shot self on several sets.

With a config file, whose settings are the fields below; flags on the command line win:

    accelerate launch examples/train.py --config examples/configs/demo.yaml
    accelerate launch examples/train.py --config examples/configs/demo.yaml --method lora --learning_rate 1e-4

What is learned is read off the columns of the training data, or said by `--task`: class names, pairs of images and
texts, several labels an image, or identities.

On two processes, of a machine without GPU too:

    accelerate launch --multi_gpu --num_processes 2 examples/train.py --config examples/configs/demo.yaml
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import LNTuningConfig, LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import set_seed

from hf_robust import ACLIPConfig, RAdapterConfig, RobustTrainer, RobustTrainingArguments, SAFTConfig
from hf_robust.data.rows import LabelledImages
from hf_robust.errors import ConfigError, close_matches
from hf_robust.evaluation.report import write_json
from hf_robust.scripting.checks import check_given
from hf_robust.scripting.loading import (
    load_images,
    load_model,
    load_processor,
    loading_data,
    read_class_names,
    read_sets,
    usable,
    wish_to_resume,
)
from hf_robust.scripting.progress import show_progress
from hf_robust.scripting.results import package_versions, percent, save_with_card
from hf_robust.scripting.run import run
from hf_robust.tasks.choose import target_of

Sets = dict[str, LabelledImages]
DEFAULTS = {"logging_steps": 10}  # the progress bar shows the loss


@dataclass
class ScriptArguments:
    """Model, data and method; what concerns the training itself is in `RobustTrainingArguments`.

    Data is a folder with one subfolder of images per class; parquet, CSV, TSV or JSON lines (with a column of paths),
    as a file, a pattern or a folder; or a dataset of the Hub, `owner/name`. Where there are several splits, one is
    chosen by `:split`, as in `photos:train`. Underscores in class names are read as spaces.
    """

    model_name_or_path: str = field(default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    train_data: str | None = field(default=None, metadata={"help": "Images with labels or texts to train on."})
    validation_data: str | None = field(default=None, metadata={"help": "Evaluated during training, too."})
    eval_data: dict | str | None = field(default=None, metadata={"help": "Evaluation sets by name; as a flag: JSON."})
    class_names_file: str | None = field(default=None, metadata={"help": "Names by line, or .json by label."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images; else image, img, jpg, …"})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels or texts; else label, text, …"})
    method: str = field(default="saft", metadata={"help": "zero_shot, full, saft, aclip, radapter, lora, …"})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Adapters: which modules."})
    density: float = field(default=0.001, metadata={"help": "saft: share of the parameters to train."})
    score: str = field(default="signed_mean", metadata={"help": "saft: what ranks the parameters."})
    scope: str = field(default="global", metadata={"help": "saft: rank all at once, or per_tensor."})
    towers: str = field(default="both", metadata={"help": "saft, aclip, radapter: both, vision or text."})
    exclude_input_embeddings: bool = field(default=True, metadata={"help": "saft: none in patch, token embeddings."})
    radapter_rank: int | None = field(default=None, metadata={"help": "radapter: rank, by default full."})
    average_decay: float = field(default=0.999, metadata={"help": "radapter: 0.9 for a short training."})
    lora_rank: int = field(default=8, metadata={"help": "lora: rank."})
    wise_ft: bool = field(default=False, metadata={"help": "Go back to the alpha that is best on validation_data."})

    def __post_init__(self) -> None:
        if isinstance(self.eval_data, str):
            self.eval_data = read_sets(self.eval_data, "eval_data")
        check_given(self, "train_data")
        if self.validation_data and "validation" in (self.eval_data or {}):
            raise ConfigError(
                "two sets are named validation", where="eval_data", remedy="Rename the one in eval_data."
            )
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


def add_radapter(model: nn.Module, args: ScriptArguments) -> nn.Module:
    """R-Adapter."""
    where: Any = {"towers": args.towers, "target_modules": args.target_modules}
    return get_peft_model(model, RAdapterConfig(r=args.radapter_rank, average_decay=args.average_decay, **where))


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
    "radapter": add_radapter,
    "lora": add_lora,
    "ln_tuning": add_ln_tuning,
}


def evaluated(trainer: RobustTrainer, sets: Sets) -> dict[str, float]:
    """Of every set what the task is measured by, the accuracy of class names, a fraction."""
    metrics = trainer.evaluate(sets)
    return {name: metrics[f"eval_{name}_{trainer.model.metrics[0]}"] for name in sets}


def show(results: dict[str, Any], sets: Sets) -> None:
    """Prints what the sets are measured by side by side, and what they changed by, in percent."""
    columns = {} if results["method"] == "zero_shot" else {results["method"]: results["fine_tuned"]}
    if results["wise_ft"]:
        columns[f"alpha {results['wise_ft']['alpha']:.1f}"] = results["wise_ft"][results["metric"]]
    table = Table("set", title=f"{results['metric'].replace('accuracy', 'Accuracy')} in %")
    for title in ("images", "zero-shot", *(title for column in columns for title in (column, "change"))):
        table.add_column(title, justify="right")
    for name, dataset in sets.items():
        before = results["zero_shot"][name]
        cells = [percent(before)]
        for accuracy in columns.values():
            cells += [percent(accuracy[name]), f"{round(100 * (accuracy[name] - before), 1) + 0.0:+.1f}"]
        table.add_row(name, str(len(dataset)), *cells)
    Console().print(table)
    if results["wise_ft"] and results["wise_ft"]["alpha"] == 0:
        warning = "Warning: alpha 0 is best on the validation data, so the training was undone: the zero-shot model "
        print(f"{warning}was saved.", file=sys.stderr)


def load_data(args: ScriptArguments, training_args: RobustTrainingArguments) -> tuple[LabelledImages, Sets]:
    """The training set, and the evaluation sets by name."""
    names = read_class_names(args.class_names_file)
    validation = {"validation": args.validation_data} if args.validation_data else {}
    with loading_data(training_args):
        target = target_of(training_args.task, None)
        train = load_images(args.train_data, "train_data", args, names, target)
        sources = {**validation, **(args.eval_data or {})}
        sets = {n: load_images(source, n, args, None, train.target) for n, source in sources.items()}
    return usable(train, training_args), {name: usable(rows, training_args) for name, rows in sets.items()}


def make_trainer(
    args: ScriptArguments, training_args: RobustTrainingArguments, train: LabelledImages, sets: Sets
) -> RobustTrainer:
    """A trainer that evaluates on the validation set in training, on all if there is none."""
    validation = {name: dataset for name, dataset in sets.items() if name == "validation"}
    trainer = RobustTrainer(
        model=METHODS[args.method](load_model(args.model_name_or_path, args.dtype), args),
        args=training_args,
        train_dataset=train,
        eval_dataset=validation or sets,
        processing_class=load_processor(args.model_name_or_path),
        class_names=read_class_names(args.class_names_file),
    )
    show_progress(trainer)
    return trainer


def train_and_save(trainer: RobustTrainer, sets: Sets, checkpoint: str | None, wise_ft: bool) -> dict[str, Any]:
    """Evaluates, trains, evaluates, goes part of the way back if that is wanted, and saves; returns what was found."""
    zero_shot = evaluated(trainer, sets)
    start = time.perf_counter()
    trainer.train(checkpoint)
    seconds = time.perf_counter() - start
    columns = {"zero-shot": zero_shot, "fine-tuned": evaluated(trainer, sets)}
    alpha = found = None
    if wise_ft:
        sweep = trainer.wise_ft_sweep(sets["validation"])
        alpha = sweep.best_alpha
        columns["chosen alpha"] = evaluated(trainer, sets)
        found = {"alpha": alpha, trainer.model.metrics[0]: columns["chosen alpha"], "sweep": sweep.rows}
    save_with_card(trainer, sets, columns, alpha)
    return {
        "zero_shot": zero_shot,
        "fine_tuned": columns["fine-tuned"],
        "wise_ft": found,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "training_seconds": seconds,
    }


def main(args: ScriptArguments, training_args: RobustTrainingArguments) -> None:
    """Loads, trains, and shows and writes what came of it."""
    checkpoint = wish_to_resume(training_args)
    set_seed(training_args.seed)
    train, sets = load_data(args, training_args)
    trainer = make_trainer(args, training_args, train, sets)
    if args.method == "zero_shot":
        found = evaluated(trainer, sets)
        results = {"zero_shot": found, "fine_tuned": found, "wise_ft": None}
        results |= {"trained_parameters": 0, "training_seconds": 0}
    else:
        results = train_and_save(trainer, sets, checkpoint, args.wise_ft)
    results |= {
        "method": args.method,
        "metric": trainer.model.metrics[0],
        "images": {name: len(dataset) for name, dataset in {"train": train, **sets}.items()},
        "config": {**asdict(args), **training_args.to_dict()},
        "versions": package_versions(),
    }
    if trainer.is_world_process_zero():
        show(results, sets)
        write_json(results, Path(training_args.output_dir) / "results.json")
        written = "results.json" if args.method == "zero_shot" else "the model, its card and results.json"
        print(f"Wrote {written} to {training_args.output_dir}.")


if __name__ == "__main__":
    run(main, ScriptArguments, RobustTrainingArguments, defaults=DEFAULTS)
