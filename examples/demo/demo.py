# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a tiny CLIP on colour drawings in several ways, and shows what each gained and what it kept.

    make demo

The same pre-trained model is trained whole, whole with the similarity loss, with A-CLIP, with SAFT, and as a learned
context with OGEN; WiSE-FT goes part of the way back from the fine-tuned weights. All see colour drawings alone; OGEN
is also given the names, not the drawings, of the new kinds. They are tested on unseen colour drawings
(in-distribution), on line art and silhouettes (out of distribution), and on kinds of things that were not in the
training set. Learning rates (by `make compare`), the weight of the similarity loss and the context's rate (both by
`--validate`) were chosen on the validation set: the lowest loss among those within one standard error of the best
accuracy. α is chosen on it in every run, by accuracy.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import data
import torch
from datasets import Dataset, Image
from peft import PeftConfig, get_peft_model
from pictures import draw_comparison, draw_curves
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import CLIPModel, CLIPProcessor

from hf_robust import (
    ACLIPConfig,
    OGENConfig,
    RobustTrainer,
    RobustTrainingArguments,
    SAFTConfig,
    context_prompt,
    model_card,
    results_from_reports,
)
from hf_robust.evaluation import RobustnessSuite, SuiteReport, SuiteSet, evaluate_suite, one_standard_error_rule
from hf_robust.scripting.progress import show_progress
from hf_robust.scripting.run import run

OUTPUT = Path("runs/demo")
TITLES = {
    "id": "unseen colour drawings\n(in-distribution)",
    "ood_line": "line art\n(out of distribution)",
    "ood_silhouette": "silhouettes\n(out of distribution)",
    "new": "new kinds of things\n(never trained)",
}
TEMPLATE = "a drawing of a {}."
EPOCHS = 3
WISE_FT = ("full", "SAFT")  # whose way from the zero-shot model is shown
CARDS = {
    "full + similarity": "similarity_loss.md",
    "A-CLIP": "a_clip.md",
    "context + OGEN": "ogen.md",
    "SAFT": "saft.md",
    "SAFT + WiSE-FT": "wise_ft.md",
}
DATA = "Drawings of 25 kinds of things: OpenMoji, in colour, each as it is and three times turned, shrunk and tinted."


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        learning_rate: chosen on the validation set.
        config: the adapter's, None for the whole model.
        similarity_weight: weight of the similarity loss, chosen on the validation set.
        context: whether a learned context is trained, with OGEN.
    """

    learning_rate: float
    config: PeftConfig | None = None
    similarity_weight: float = 0.0
    context: bool = False


METHODS = {
    "full": Method(1e-3),
    "full + similarity": Method(3e-3, similarity_weight=30.0),
    "A-CLIP": Method(3e-4, ACLIPConfig()),
    "context + OGEN": Method(1e-3, context=True),
    "SAFT": Method(3e-2, SAFTConfig(density=0.001)),
}


def make_trainer(name: str, method: Method, sets: dict[str, Dataset]) -> RobustTrainer:
    """A trainer on the colour drawings; everything but what `method` says is the same for all methods."""
    arguments = RobustTrainingArguments(
        output_dir=str(OUTPUT / name.replace(" ", "-")),
        templates=TEMPLATE,
        learning_rate=method.learning_rate,
        similarity_weight=method.similarity_weight,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=20,
        save_strategy="no",
        seed=0,
    )
    model, processor = (
        CLIPModel.from_pretrained(data.MODEL, dtype=torch.float32),
        CLIPProcessor.from_pretrained(data.MODEL),
    )
    ogen = None
    if method.config:
        model = get_peft_model(model, replace(method.config))
    if method.context:
        names = [*data.KINDS, *data.NEW_KINDS]
        model, arguments.templates = context_prompt(model, processor, init="a drawing of a", class_names=names)
        ogen = OGENConfig(new_class_names=data.NEW_KINDS, warmup=1 / EPOCHS)  # a fifth of 3 epochs would be none
    trainer = RobustTrainer(
        model=model,
        args=arguments,
        train_dataset=sets["train"],
        eval_dataset={name: sets[name] for name in TITLES},
        processing_class=processor,
        ogen=ogen,
    )
    show_progress(trainer, f"Training: {name}")
    return trainer


def evaluate(trainer: RobustTrainer, sets: dict[str, Dataset]) -> SuiteReport:
    """The model as it is now on every test set."""
    suite = RobustnessSuite(
        [SuiteSet(name, name.split("_")[0], sets[name], templates=trainer.model.templates) for name in TITLES]
    )
    return evaluate_suite(trainer.model, trainer.processing_class, suite, batch_size=256, silent=True)


def accuracies(report: SuiteReport) -> dict[str, float]:
    """Accuracy on every test set, a fraction."""
    return {name: result.accuracy for name, result in report.sets.items()}


def compare(sets: dict[str, Dataset], cards: Path | None) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Accuracies, number of trained parameters and seconds by method, and the α-sweeps of some."""
    results: dict[str, dict] = {}
    curves: dict[str, list[dict]] = {}
    for name, method in METHODS.items():
        Console().rule(f"[bold]{name}")
        trainer = make_trainer(name, method, sets)
        reports = {"zero-shot": evaluate(trainer, sets)}
        results.setdefault("zero-shot", {"accuracy": accuracies(reports["zero-shot"]), "trained_parameters": 0})
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        trained = sum(p.numel() for p in trainer.model.model.parameters() if p.requires_grad)
        reports["fine-tuned"] = evaluate(trainer, sets)
        found = accuracies(reports["fine-tuned"])
        results[name] = {"accuracy": found, "trained_parameters": trained, "seconds": seconds}
        save_card(name, trainer, reports, None, cards)
        if name in WISE_FT:
            sweep = trainer.wise_ft_sweep(sets["validation"])
            curves[name] = [point(row) for row in sweep.rows]
            reports["chosen alpha"] = evaluate(trainer, sets)
            found = accuracies(reports["chosen alpha"])
            results[f"{name} + WiSE-FT"] = {
                "accuracy": found,
                "trained_parameters": trained,
                "alpha": sweep.best_alpha,
            }
            save_card(f"{name} + WiSE-FT", trainer, reports, sweep.best_alpha, cards)
            trainer.save_model()  # at the chosen α
    return results, curves


def save_card(
    name: str, trainer: RobustTrainer, reports: dict[str, SuiteReport], alpha: float | None, folder: Path | None
) -> None:
    """Writes the model card of a method, with the figures of this run."""
    if folder is None or name not in CARDS:
        return
    card = model_card(
        trainer.model,
        trainer.args,
        results_from_reports(reports, alpha),
        data=DATA,
        train_images=len(trainer.train_dataset),
        picture=None if alpha is None else "wise_ft.png",
    )
    folder.mkdir(exist_ok=True)
    card.save(folder / CARDS[name])


def point(row: dict[str, float]) -> dict[str, float]:
    """A point of the curve: α, accuracy in distribution, and the mean of those out of distribution."""
    found = {name: row[f"{name}_accuracy"] for name in TITLES}
    ood = mean(value for name, value in found.items() if name.startswith("ood_"))
    return {"alpha": row["alpha"], "validation": row["validation_accuracy"], "id": found["id"], "ood": ood}


def show(results: dict[str, dict]) -> None:
    """Prints accuracies in percent, with the change against zero-shot."""
    table = Table(title="Accuracy in %, and the change against zero-shot", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for title in ("", *TITLES, "α", "trained", "seconds"):
        table.add_column(title.replace("_", "_\n"), justify="right" if title else "left", no_wrap=True)
    zero_shot = results["zero-shot"]["accuracy"]
    for method, result in results.items():
        cells = []
        for name, value in result["accuracy"].items():
            change = 100 * (value - zero_shot[name])
            cells.append(f"{100 * value:.1f}" + ("" if method == "zero-shot" else f"\n{change:+.1f}"))
        alpha = f"{result['alpha']:.1f}" if "alpha" in result else ""
        seconds = f"{result['seconds']:.0f}" if "seconds" in result else ""
        table.add_row(method, *cells, alpha, f"{result['trained_parameters']:,}", seconds)
    Console().print(table)
    print("\n".join(f"{name}: {title}".replace("\n", " ") for name, title in TITLES.items()))
    print("α: how far WiSE-FT goes from the zero-shot to the fine-tuned weights, chosen on the validation set")
    print("trained: number of trained parameters\n")


def validate(sets: dict[str, Dataset]) -> None:
    """Prints validation accuracy and loss of every method over its settings, and which of them to take."""
    for name, method in METHODS.items():
        settings = [replace(method, learning_rate=rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)]
        if method.similarity_weight:
            settings = [replace(method, similarity_weight=weight) for weight in (1.0, 3.0, 10.0, 30.0)]
        found = []
        for setting in settings:
            trainer = make_trainer(name, setting, sets)
            trainer.train()
            metrics = trainer.evaluate(sets["validation"])
            found.append((metrics["eval_accuracy"], metrics["eval_loss"]))
            print(f"{describe(name, setting)}: {100 * found[-1][0]:.1f} %, loss {found[-1][1]:.3f}")
        chosen = one_standard_error_rule(*zip(*found, strict=True), images=len(sets["validation"]))
        print(f"-> {describe(name, settings[chosen])}")


def describe(name: str, method: Method) -> str:
    """A method and its settings in words."""
    return f"{name}, learning rate {method.learning_rate}, similarity weight {method.similarity_weight}"


@dataclass
class ScriptArguments:
    """Fine-tunes a tiny CLIP on colour drawings in several ways."""

    validate: bool = field(default=False, metadata={"help": "Compare settings on the validation set instead."})
    cards: str | None = field(default=None, metadata={"help": "Write a card for every method into this folder."})


def main(arguments: ScriptArguments) -> None:
    """Loads the drawings, compares the methods, and writes the table and the pictures."""
    cards = Path(arguments.cards) if arguments.cards else None
    sets = {name: dataset.cast_column("image", Image(decode=False)) for name, dataset in data.load().items()}
    if arguments.validate:
        validate(sets)
        return
    OUTPUT.mkdir(parents=True, exist_ok=True)
    results, curves = compare(sets, cards)
    show(results)
    (OUTPUT / "results.json").write_text(json.dumps({"results": results, "curves": curves}, indent=2))
    draw_comparison(results, TITLES, OUTPUT / "comparison.png")
    draw_curves(curves, OUTPUT / "wise_ft.png")
    if cards:
        shutil.copy(OUTPUT / "wise_ft.png", cards)
    print(f"Wrote results.json, comparison.png, wise_ft.png and the models of WiSE-FT to {OUTPUT}.")


if __name__ == "__main__":
    run(main, ScriptArguments)
