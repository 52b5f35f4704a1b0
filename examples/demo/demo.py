# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a tiny CLIP on colour drawings, whole and with SAFT, and shows what each gained and what it kept.

    make demo

Three models classify the same kinds of things: zero-shot, after full fine-tuning, after SAFT. All are trained on
colour drawings alone. They are tested on unseen colour drawings (in-distribution), on line art and silhouettes (out of
distribution), and on kinds of things that were not in the training set. Learning rates were chosen on the validation
set, by `--validate`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import data
import matplotlib
import torch
from datasets import Dataset, Image
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPModel, CLIPProcessor

from hf_robust import RobustTrainer, RobustTrainingArguments, SAFTConfig

OUTPUT = Path("runs/demo")
TITLES = {
    "id": "unseen colour drawings\n(in-distribution)",
    "ood_line": "line art\n(out of distribution)",
    "ood_silhouette": "silhouettes\n(out of distribution)",
    "new": "new kinds of things\n(never trained)",
}
COLOURS = {"zero-shot": "#9aa0a6", "full": "#d9822b", "SAFT": "#1f6feb"}
EPOCHS = 3
LEARNING_RATES = {"full": 1e-3, "SAFT": 3e-3}
DENSITY = 0.001


def adapted(method: str) -> nn.Module:
    """The pre-trained model, ready for a method."""
    model = CLIPModel.from_pretrained(data.MODEL, dtype=torch.float32)
    return get_peft_model(model, SAFTConfig(density=DENSITY)) if method == "SAFT" else model


def make_trainer(method: str, learning_rate: float, sets: dict[str, Dataset]) -> RobustTrainer:
    """A trainer on the colour drawings; everything but the model and its learning rate is the same for all methods."""
    arguments = RobustTrainingArguments(
        output_dir=str(OUTPUT / method.replace(" ", "-")),
        templates="a drawing of a {}.",
        learning_rate=learning_rate,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=20,
        save_strategy="no",
        seed=0,
    )
    return RobustTrainer(
        model=adapted(method),
        args=arguments,
        train_dataset=sets["train"],
        eval_dataset={name: sets[name] for name in TITLES},
        processing_class=CLIPProcessor.from_pretrained(data.MODEL),
    )


def accuracies(trainer: RobustTrainer) -> dict[str, float]:
    """Accuracy on every test set, a fraction."""
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}_accuracy"] for name in TITLES}


def compare(sets: dict[str, Dataset]) -> dict[str, dict]:
    """Zero-shot and fine-tuned accuracies with the number of trained parameters and the seconds it took."""
    results: dict[str, dict] = {}
    for method, learning_rate in LEARNING_RATES.items():
        Console().rule(f"[bold]{method}")
        trainer = make_trainer(method, learning_rate, sets)
        if not results:
            results["zero-shot"] = {"accuracy": accuracies(trainer), "trained_parameters": 0, "seconds": 0.0}
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        results[method] = {"accuracy": accuracies(trainer), "trained_parameters": trained, "seconds": seconds}
        if method == "SAFT":
            trainer.save_model()
    return results


def show(results: dict[str, dict]) -> None:
    """Prints accuracies in percent, with the change against zero-shot."""
    table = Table(title="Accuracy in %, and the change against zero-shot")
    for title in ("", *TITLES, "trained", "seconds"):
        table.add_column(title, justify="right" if title else "left")
    zero_shot = results["zero-shot"]["accuracy"]
    for method, result in results.items():
        cells = []
        for name, value in result["accuracy"].items():
            change = 100 * (value - zero_shot[name])
            cells.append(f"{100 * value:.1f}" + ("" if method == "zero-shot" else f"\n{change:+.1f}"))
        table.add_row(method, *cells, f"{result['trained_parameters']:,}", f"{result['seconds']:.0f}")
    Console().print(table)
    print("\n".join(f"{name}: {title}".replace("\n", " ") for name, title in TITLES.items()))
    print("trained: number of trained parameters\n")


def plot(results: dict[str, dict], path: Path) -> None:
    """Draws the accuracies as groups of bars, one group a test set."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for place, (method, result) in enumerate(results.items()):
        positions = [group + 0.28 * (place - 1) for group in range(len(TITLES))]
        percent = [100 * value for value in result["accuracy"].values()]
        bars = axes.bar(positions, percent, width=0.26, color=COLOURS[method], label=method)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    axes.set_xticks(range(len(TITLES)), TITLES.values())
    axes.set_ylabel("accuracy (%)")
    axes.set_title("Trained on colour drawings: what was gained, and what was kept")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper right")
    axes.set_ylim(0, 1.2 * max(100 * v for r in results.values() for v in r["accuracy"].values()))
    figure.savefig(path, dpi=150)


def validate(sets: dict[str, Dataset]) -> None:
    """Prints the validation accuracy of every method over learning rates."""
    for method in LEARNING_RATES:
        for learning_rate in (1e-4, 3e-4, 1e-3, 3e-3):
            trainer = make_trainer(method, learning_rate, sets)
            trainer.train()
            accuracy = trainer.evaluate(sets["validation"])["eval_accuracy"]
            print(f"{method}, learning rate {learning_rate}: {100 * accuracy:.1f} %")


def main() -> None:
    """Loads the drawings, compares the methods, and writes the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validate", action="store_true", help="compare learning rates on the validation set instead")
    arguments = parser.parse_args()
    sets = {name: dataset.cast_column("image", Image(decode=False)) for name, dataset in data.load().items()}
    if arguments.validate:
        validate(sets)
        return
    OUTPUT.mkdir(parents=True, exist_ok=True)
    results = compare(sets)
    show(results)
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=2))
    plot(results, OUTPUT / "comparison.png")
    print(f"Wrote {OUTPUT}/results.json, {OUTPUT}/comparison.png and the adapter, {OUTPUT}/SAFT.")


if __name__ == "__main__":
    main()
