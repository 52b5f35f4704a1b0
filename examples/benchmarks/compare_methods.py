# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_robust"]
# ///
"""Which method keeps most of what the model knew? All of them on one task, over several seeds, also with WiSE-FT.

    python examples/benchmarks/compare_methods.py --config examples/configs/compare_methods.yaml
    python examples/benchmarks/compare_methods.py --config examples/configs/compare_methods.yaml --methods full saft

Every method has its learning rate chosen on the validation data, from the same grid, by the one-standard-error rule:
the search starts in the middle of the grid and ends where both neighbours are worse. Then the method is trained once
per seed, evaluated on the suite, taken back by WiSE-FT, and evaluated again: to the smallest α whose accuracy on the
validation data is within one standard error of the best one's.

Every training that ends is kept in a file of its own, so the same command goes on where it was interrupted, and calls
with other methods or seeds may run at the same time and share the folder. The last one to end leaves all there is in
results.json, table.md and scatter.png; cards/ has a model card for every method, with the figures of its first seed.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, variance
from typing import Any, Literal

from accelerate import PartialState
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from scipy.stats import rankdata
from transformers import ProcessorMixin, set_seed

from hf_robust import (
    ACLIPConfig,
    OGENConfig,
    OGENLoss,
    RobustTrainer,
    RobustTrainingArguments,
    SAFTConfig,
    context_prompt,
    model_card,
    with_image_embeds,
    with_image_size,
)
from hf_robust.cards.results import TITLES, Column, results_from_accuracies
from hf_robust.data.rows import LabelledImages
from hf_robust.data.sources import load_source
from hf_robust.data.text_files import read_json
from hf_robust.encoders.templates import check_templates
from hf_robust.errors import ConfigError, NonFiniteError
from hf_robust.evaluation import (
    RobustnessSuite,
    SuiteReport,
    evaluate_suite,
    few_shot,
    one_standard_error_rule,
    plot_id_ood,
    standard_error,
)
from hf_robust.evaluation.answers import load_labels
from hf_robust.evaluation.report import write_json
from hf_robust.scripting.checks import check_given, check_same_settings, check_training, check_values
from hf_robust.scripting.loading import load_images, load_model, load_processor, loading_data
from hf_robust.scripting.progress import is_silent, show_progress
from hf_robust.scripting.results import package_versions, percent
from hf_robust.scripting.run import run

SEARCH_SEED = 0  # of the trainings that choose the learning rate
GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ALPHAS = tuple(step / 10 for step in range(1, 11))
FIXED = {"eval_strategy": "no", "save_strategy": "no", "head": "live"}
OWN = {"learning_rate": "learning_rates", "seed": "seeds"}
LOSSES = {"similarity": {"weight": 10.0}}  # of the methods with the similarity loss
DEFAULTS = {**FIXED, "logging_steps": 10, "losses": LOSSES}  # the progress bar shows the loss
MAY_CHANGE = ("methods", "seeds", "search_only", "output_dir")  # between calls that share a folder
NOTE = """Accuracy in %: mean over the sets and seeds ± half of its 95 % interval, which is about the choice of images
and of seeds. trained: number of trained parameters. seconds: of a training, loading and evaluation apart. α: of
WiSE-FT, the smallest within one standard error of the best on validation data, for each seed. rank: the place by
accuracy, averaged over the columns; the best is marked."""


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        config: the adapter's; None for all weights.
        similarity: with the similarity loss.
        probe: a linear head alone, which starts as the zero-shot head.
        ogen: a learned context, which starts as the words of the template, with OGEN.
    """

    config: PeftConfig | None = None
    similarity: bool = False
    probe: bool = False
    ogen: bool = False


LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
METHODS = {
    "linear-probe": Method(probe=True),
    "full": Method(),
    "full+similarity": Method(similarity=True),
    "lora": Method(LORA),
    "lora+similarity": Method(LORA, similarity=True),
    "aclip": Method(ACLIPConfig()),
    "saft": Method(SAFTConfig()),
    "saft+similarity": Method(SAFTConfig(), similarity=True),
    "context+ogen": Method(ogen=True),
}
SCOPES = {
    "global": {"scope": "global", "exclude_input_embeddings": False},
    "global-inner": {"scope": "global", "exclude_input_embeddings": True},
    "per-tensor": {"scope": "per_tensor", "exclude_input_embeddings": False},
}
SAFT_VARIANTS = {
    f"saft-{name}-{density:g}": Method(SAFTConfig(density=density, **scope))
    for name, scope in SCOPES.items()
    for density in (1e-4, 1e-3, 1e-2)
}
ALL_METHODS = {**METHODS, **SAFT_VARIANTS}
DEFAULT_METHODS = [name for name, method in METHODS.items() if not method.ogen]  # it needs new_class_names


@dataclass
class ScriptArguments:
    """Model, data and methods; what concerns the training itself is in `RobustTrainingArguments`.

    Training and validation data are what examples/train.py takes.
    """

    model_name_or_path: str = field(default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    train_data: str | None = field(default=None, metadata={"help": "Labelled images to train on."})
    validation_data: str | None = field(default=None, metadata={"help": "Learning rates and α are chosen on these."})
    suite: str | None = field(default=None, metadata={"help": "What to evaluate on: a YAML file or a suite's name."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images; else image, img, jpg, …"})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels; else label, labels or cls."})
    shots: int | None = field(default=None, metadata={"help": "Training images per class; all if not given."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Of the shots and the training."})
    methods: list[str] = field(default_factory=lambda: [*DEFAULT_METHODS], metadata={"help": ", ".join(ALL_METHODS)})
    new_class_names: list[str] | None = field(default=None, metadata={"help": "context+ogen: names it is told."})
    learning_rates: list[float] = field(default_factory=lambda: [*GRID], metadata={"help": "To choose from."})
    alphas: list[float] = field(default_factory=lambda: [*ALPHAS], metadata={"help": "WiSE-FT: to choose from."})
    search_only: bool = field(default=False, metadata={"help": "Choose the learning rates and stop."})

    def __post_init__(self) -> None:
        check_given(self, "train_data", "validation_data", "suite")
        self.learning_rates = sorted(self.learning_rates)
        lists = {"seeds": self.seeds, "learning_rates": self.learning_rates, "alphas": self.alphas}
        check_values(self.methods, ALL_METHODS, **lists)
        if not self.new_class_names and any(ALL_METHODS[name].ogen for name in self.methods):
            raise ConfigError("context+ogen needs the names of new classes", where="new_class_names", got=None)
        if 1 not in self.alphas:
            raise ConfigError(
                "the fine-tuned model is missing", where="alphas", got=self.alphas, allowed="1 among them"
            )


@dataclass(frozen=True)
class Task:
    """What all trainings share."""

    args: ScriptArguments
    training_args: RobustTrainingArguments
    processor: ProcessorMixin
    train: Dataset
    validation: LabelledImages
    suite: RobustnessSuite


class Runs:
    """What has ended so far: one JSON file each, in a folder that other calls with the same settings share.

    Args:
        output: holds the folder `runs`, and the settings from when the first run has ended.
        settings: of this call.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings_file, self.settings = output / "runs", output / "settings.json", settings
        self.check()
        self.found = {path.stem: read_json(path) for path in sorted(self.folder.glob("*.json"))}

    def check(self) -> None:
        """Refuses a folder with runs of other settings."""
        if self.settings_file.exists():
            check_same_settings(read_json(self.settings_file), self.settings, self.settings_file)

    def get(self, name: str, run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """What `run(*arguments)` returned, now or in an earlier call."""
        if name not in self.found:
            is_main = PartialState().is_main_process
            if is_main:
                Console().rule(f"[bold]{name}")
            self.found[name] = run(*arguments)
            if is_main:
                self.check()  # another call may have come first
                write_json(self.settings, self.settings_file)
                write_json(self.found[name], self.folder / f"{name}.json")
        return self.found[name]


# --- training ---


def load_task(args: ScriptArguments, training_args: RobustTrainingArguments) -> Task:
    """Loads processor, data and suite."""
    processor, suite = load_processor(args.model_name_or_path), RobustnessSuite.from_yaml(args.suite)
    with loading_data(training_args):
        train = load_images(args.train_data, "train_data", args).to_dataset()
        validation = load_images(args.validation_data, "validation_data", args)
    return Task(args, training_args, processor, train, validation, suite)


def make_trainer(task: Task, method: Method, learning_rate: float, seed: int) -> RobustTrainer:
    """A trainer of one method on a fresh model; everything but what the method says is the same for all."""
    settings = copy.copy(task.training_args)
    settings.learning_rate, settings.seed = learning_rate, seed
    if not method.similarity:
        settings.losses, settings.cache_reference_embeddings = None, False
    set_seed(seed)  # LoRA's matrices are drawn from the global generator
    model, losses = load_model(task.args.model_name_or_path, task.args.dtype), []
    train = task.train if task.args.shots is None else few_shot(task.train, task.args.shots, seed)
    if method.config is not None:
        model = get_peft_model(model, replace(method.config))
    if method.probe:
        model.requires_grad_(False).to(settings.device)
        settings.head = "trainable"
        how = settings.per_device_eval_batch_size, settings.dataloader_num_workers, is_silent(settings)
        processor = with_image_size(task.processor, settings.image_size, model)
        with settings.main_process_first(desc="embedding the training images"):
            train = with_image_embeds(train, model, processor, *how)
    if method.ogen:
        losses = [OGENLoss(OGENConfig(new_class_names=task.args.new_class_names))]
        model, settings.templates = with_context(model, task, settings.templates)
    data = {"train_dataset": train, "eval_dataset": {"validation": task.validation}}
    trainer = RobustTrainer(model, settings, **data, processing_class=task.processor, losses=losses)
    show_progress(trainer)
    return trainer


def with_context(model: Any, task: Task, templates: Any) -> tuple[Any, str]:
    """The model with a learned context that starts as the words before the class name, and the template for it."""
    words = check_templates(templates)[0].partition("{}")[0].strip()
    sets = [load_labels(one, load_source(one.source, one.name)) for one in task.suite.sets]
    names = [*task.args.new_class_names, *(task.validation.class_names or [])]
    names += [name for one in sets for name in one.class_names]  # which the words for the context must not be among
    tokens = len(task.processor.tokenizer(words, add_special_tokens=False).input_ids)
    return context_prompt(model, task.processor, tokens, words, names)


def validate(task: Task, name: str, learning_rate: float) -> dict[str, Any]:
    """Trains, and returns accuracy and loss on the validation data."""
    trainer = make_trainer(task, ALL_METHODS[name], learning_rate, SEARCH_SEED)
    try:
        trainer.train()
        metrics = trainer.evaluate(task.validation)
        figures = {"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"]}
    except NonFiniteError as error:
        figures = {"stopped": str(error)}
    return {"searched": name, "learning_rate": learning_rate, "images": len(task.validation), **figures}


def search(task: Task, runs: Runs, name: str) -> float:
    """The learning rate of a method."""

    def validated(rate: float) -> dict[str, Any]:
        return runs.get(f"{name}_rate_{rate:g}", validate, task, name, rate)

    return find_learning_rate(task.args.learning_rates, validated, runs.found["zero-shot"]["validation_accuracy"])


def find_learning_rate(
    rates: list[float], validated: Callable[[float], dict[str, Any]], zero_shot_accuracy: float
) -> float:
    """Goes down from the middle of the grid to where training does no harm, and from there to the better neighbours.

    Args:
        rates: the grid, in ascending order.
        validated: returns what `validate` returns for a rate.
        zero_shot_accuracy: on the validation data, a fraction.
    """
    place = len(rates) // 2
    found = {place: validated(rates[place])}
    while place > 0 and does_harm(found[place], zero_shot_accuracy):
        place -= 1
        found[place] = validated(rates[place])
    while True:
        best = rates.index(choose(list(found.values()))["learning_rate"])
        neighbours = [place for place in (best + 1, best - 1) if 0 <= place < len(rates) and place not in found]
        if not neighbours:
            return rates[best]
        found[neighbours[0]] = validated(rates[neighbours[0]])


def does_harm(run: dict[str, Any], zero_shot_accuracy: float) -> bool:
    """Whether a training stopped, or lost accuracy by more than a standard error."""
    least = zero_shot_accuracy - standard_error(zero_shot_accuracy, run["images"])
    return "stopped" in run or run["accuracy"] < least


def choose(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The one to take among what `validate` returned for several rates."""
    usable = [one for one in found if "accuracy" in one]
    if not usable:
        raise ConfigError("no training ended", where="learning_rates", got=[one["stopped"] for one in found])
    accuracies, losses = ([one[name] for one in usable] for name in ("accuracy", "loss"))
    return usable[one_standard_error_rule(accuracies, losses, usable[0]["images"])]


def train_and_evaluate(
    task: Task, name: str, learning_rate: float, seed: int, zero_shot: dict[str, Any]
) -> dict[str, Any]:
    """Trains, and returns what the model and the one that WiSE-FT makes of it do on the suite."""
    trainer = make_trainer(task, ALL_METHODS[name], learning_rate, seed)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    columns = {"zero-shot": zero_shot, "fine-tuned": evaluate(task, trainer.model)}
    found = {
        "method": name,
        "learning_rate": learning_rate,
        "seed": seed,
        "trained_parameters": trained,
        "training_seconds": seconds,
        "fine_tuned": columns["fine-tuned"],
    }
    save_card(task, trainer, name, columns, None)
    if not ALL_METHODS[name].ogen:  # token vectors are not linear in their change
        accuracy = trainer.evaluate(task.validation)["eval_accuracy"]
        tolerance = standard_error(accuracy, len(task.validation))
        sweep = trainer.wise_ft_sweep(alphas=task.args.alphas, tolerance=tolerance)
        best = columns["fine-tuned"] if sweep.best_alpha == 1 else evaluate(task, trainer.model)
        found |= {"alpha": sweep.best_alpha, "wise_ft": best, "sweep": sweep.rows}
        save_card(task, trainer, f"{name}+wise-ft", {**columns, "chosen alpha": best}, sweep.best_alpha)
    return found


def save_card(
    task: Task, trainer: RobustTrainer, name: str, columns: dict[Column, dict[str, Any]], alpha: float | None
) -> None:
    """Writes the model card of a method, with the figures of the first seed."""
    if trainer.args.seed != task.args.seeds[0] or not trainer.is_world_process_zero():
        return
    accuracies = {column: {n: one["accuracy"] for n, one in of["sets"].items()} for column, of in columns.items()}
    sets = {n: (one["role"], one["images"]) for n, one in columns["zero-shot"]["sets"].items()}
    results = results_from_accuracies(accuracies, sets, alpha)
    card = model_card(trainer.model, trainer.args, results, train_images=len(trainer.train_dataset))
    folder = Path(trainer.args.output_dir) / "cards"
    folder.mkdir(parents=True, exist_ok=True)
    card.save(folder / f"{name}.md")


def evaluate(task: Task, model: Any) -> dict[str, Any]:
    """Mean accuracy by role, and the figures of every set."""
    how = task.training_args
    size, workers = how.per_device_eval_batch_size, how.dataloader_num_workers
    suite = task.suite
    if model.templates != check_templates(how.templates):  # a learned context
        suite = RobustnessSuite([replace(one, templates=model.templates) for one in suite.sets])
    report: SuiteReport = evaluate_suite(model, model.processor, suite, size, workers, silent=is_silent(how))
    sets = {name: {"role": one.role, "images": len(one.rows), **one.metrics} for name, one in report.sets.items()}
    return {"means": report.means, "sets": sets}


def zero_shot(task: Task) -> dict[str, Any]:
    """The pre-trained model on the suite and on the validation data."""
    trainer = make_trainer(task, Method(), learning_rate=0.0, seed=SEARCH_SEED)
    validation_accuracy = trainer.evaluate(task.validation)["eval_accuracy"]
    return {**evaluate(task, trainer.model), "validation_accuracy": validation_accuracy}


# --- results ---


def report(common: dict[str, Any], runs: dict[str, dict[str, Any]], folder: Path) -> None:
    """Prints and writes what there is."""
    write_json({**common, "runs": runs}, folder / "results.json")
    text = search_table(runs)
    if any("method" in run for run in runs.values()):
        rows = collect(runs)
        text = f"{table(rows)}\n{NOTE}\n\n{text}"
        draw(rows, folder / "scatter.png")
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)


def collect(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of the table: accuracies by role, one per seed, each the mean over the role's sets; and the rank."""
    rows = {"zero-shot": accuracies([runs["zero-shot"]])}
    for method in ALL_METHODS:
        ended = [run for run in runs.values() if run.get("method") == method]
        for name, model in ((method, "fine_tuned"), (f"{method}+wise-ft", "wise_ft")):
            if ended and model in ended[0]:
                rows[name] = {
                    **accuracies([run[model] for run in ended]),
                    "alpha": [run["alpha"] if model == "wise_ft" else 1.0 for run in ended],
                    "trained_parameters": ended[0]["trained_parameters"],
                    "seconds": mean(run["training_seconds"] for run in ended),
                    "learning_rate": ended[0]["learning_rate"],
                }
    for row, rank in zip(rows.values(), mean_ranks([row["accuracy"] for row in rows.values()]), strict=True):
        row["rank"] = rank
    return rows


def accuracies(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """By role and by set: accuracies, one per evaluation, and half of the 95 % interval of their mean."""
    sets = evaluations[0]["sets"]
    roles = {role: [n for n, one in sets.items() if one["role"] == role] for role in evaluations[0]["means"]}
    return {
        "accuracy": {role: mean_accuracies(evaluations, names) for role, names in roles.items()},
        "interval": {role: half_interval(evaluations, names) for role, names in roles.items()},
        "set_accuracy": {name: mean_accuracies(evaluations, [name]) for name in sets},
        "set_interval": {name: half_interval(evaluations, [name]) for name in sets},
    }


def mean_accuracies(evaluations: list[dict[str, Any]], names: list[str]) -> list[float]:
    """The mean accuracy over the sets of these names, one per evaluation."""
    return [mean(one["sets"][name]["accuracy"] for name in names) for one in evaluations]


def half_interval(evaluations: list[dict[str, Any]], names: list[str]) -> float:
    """Half of the 95 % interval of a mean accuracy over sets and seeds, a fraction: from other images, other seeds.

    All seeds see the same images, so more seeds do not make the first part smaller.
    """
    means, sets = mean_accuracies(evaluations, names), [evaluations[0]["sets"][name] for name in names]
    of_images = sum(standard_error(one["accuracy"], one["images"]) ** 2 for one in sets) / len(sets) ** 2
    of_seeds = variance(means) / len(means) if len(means) > 1 else 0.0
    return 1.96 * math.sqrt(of_images + of_seeds)


def mean_ranks(accuracies: list[dict[str, list[float]]]) -> list[float]:
    """The mean over the roles of the place that a row has there by its mean accuracy; 1 is the best."""
    places = [rankdata([-mean(row[role]) for row in accuracies]) for role in accuracies[0]]  # (roles, rows)
    return [float(mean(of_row)) for of_row in zip(*places, strict=True)]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown."""
    roles = list(rows["zero-shot"]["accuracy"])
    best = min(row["rank"] for row in rows.values())
    cells = [["method", "trained", "seconds", "learning rate", "α", *(TITLES[role] for role in roles), "rank"]]
    for name, row in rows.items():
        settings = ["0", "", "", ""]
        if name != "zero-shot":
            alphas = ", ".join(f"{alpha:g}" for alpha in sorted(set(row["alpha"])))
            cost = [f"{row['trained_parameters']:,}", f"{row['seconds']:.0f}"]
            settings = [*cost, f"{row['learning_rate']:g}", alphas]
        figures = [f"{percent(mean(row['accuracy'][role]))} ± {percent(row['interval'][role])}" for role in roles]
        title = f"**{name}**" if row["rank"] == best else name
        cells.append([title, *settings, *figures, f"{row['rank']:.1f}"])
    return aligned(cells)


def search_table(runs: dict[str, dict[str, Any]]) -> str:
    """The validation accuracies and losses that learning rates were chosen by, in Markdown."""
    found = [run for run in runs.values() if "searched" in run]
    rates = sorted({run["learning_rate"] for run in found})
    cells = [["validation accuracy (loss)", *(f"{rate:g}" for rate in rates)]]
    for method in ALL_METHODS:
        of_method = {run["learning_rate"]: run for run in found if run["searched"] == method}
        if of_method:
            chosen = choose(list(of_method.values()))
            cells.append([method, *(validation_cell(of_method.get(rate), chosen) for rate in rates)])
    return aligned(cells)


def validation_cell(run: dict[str, Any] | None, chosen: dict[str, Any]) -> str:
    """Accuracy in percent and loss; empty where the search did not come, a dash where training stopped."""
    if run is None:
        return ""
    text = f"{100 * run['accuracy']:.1f} ({run['loss']:.2f})" if "accuracy" in run else "–"
    return f"**{text}**" if run is chosen else text


def aligned(cells: list[list[str]]) -> str:
    """A Markdown table that can be read as it is, too; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]]) + "\n"


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws accuracy in distribution against every other role: zero-shot, by WiSE-FT, fine-tuned."""
    roles = [role for role in rows["zero-shot"]["accuracy"] if role != "id"]
    figure = Figure(figsize=(1.8 + 5 * len(roles), 5), layout="constrained")
    panels = figure.subplots(1, len(roles), squeeze=False)[0]
    for role, axes in zip(roles, panels, strict=True):
        plot_id_ood({name: way(rows, name, role) for name in ALL_METHODS if name in rows}, axes, lines=role == "ood")
        axes.set_ylabel(f"accuracy (%), {TITLES[role]}")
        axes.get_legend().remove()
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=150)


def way(rows: dict[str, dict[str, Any]], method: str, role: str) -> list[dict[str, float]]:
    """Mean accuracies at α = 0, at the chosen α and at α = 1."""
    by_alpha = {0.0: rows["zero-shot"], 1.0: rows[method]}
    if chosen := rows.get(f"{method}+wise-ft"):
        by_alpha = {mean(chosen["alpha"]): chosen, **by_alpha}
    return [
        {"alpha": alpha, "id": mean(row["accuracy"]["id"]), "ood": mean(row["accuracy"][role])}
        for alpha, row in by_alpha.items()
    ]


def shared_settings(args: ScriptArguments, training_args: RobustTrainingArguments) -> dict[str, Any]:
    """What all calls that share a folder have in common."""
    config = {**asdict(args), **training_args.to_dict()}
    config = {name: value for name, value in config.items() if name not in MAY_CHANGE}
    return json.loads(json.dumps({"config": config, "versions": package_versions()}))


def main(args: ScriptArguments, training_args: RobustTrainingArguments) -> None:
    """Runs what has not been run yet, then shows all."""
    check_training(training_args, FIXED, OWN)
    if list(training_args.losses or {}) != ["similarity"]:
        what, allowed = "these are of the methods with the similarity loss", "settings of 'similarity' alone"
        raise ConfigError(what, where="losses", got=training_args.losses, allowed=allowed)
    folder, common = Path(training_args.output_dir), shared_settings(args, training_args)
    runs = Runs(folder, common)
    task = load_task(args, training_args)
    training_args.distributed_state.wait_for_everyone()  # all ranks have read what there is
    runs.get("zero-shot", zero_shot, task)
    rates = {name: search(task, runs, name) for name in args.methods}
    if not args.search_only:
        for seed in args.seeds:
            for name in args.methods:
                arguments = task, name, rates[name], seed, runs.found["zero-shot"]
                runs.get(f"{name}_seed_{seed}", train_and_evaluate, *arguments)
    if PartialState().is_main_process:
        report(common, Runs(folder, common).found, folder)


if __name__ == "__main__":
    run(main, ScriptArguments, RobustTrainingArguments, defaults=DEFAULTS)
