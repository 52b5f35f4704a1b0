# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a tiny CLIP on colour drawings in several ways, and shows what each gained and what it kept.

    make demo

The same pre-trained model is trained whole, whole with the similarity loss, with A-CLIP and with SAFT; WiSE-FT goes
part of the way back from the fine-tuned weights. All see colour drawings alone. They are tested on unseen colour
drawings (in-distribution), on line art and silhouettes (out of distribution), and on kinds of things that were not in
the training set. Learning rates and the weight of the similarity loss were chosen on the validation set, by
`--validate`: the lowest loss among those within one standard error of the best accuracy. α is chosen on it in every
run, by accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
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

from hf_robust import ACLIPConfig, RobustTrainer, RobustTrainingArguments, SAFTConfig

OUTPUT = Path("runs/demo")
TITLES = {
    "id": "unseen colour drawings\n(in-distribution)",
    "ood_line": "line art\n(out of distribution)",
    "ood_silhouette": "silhouettes\n(out of distribution)",
    "new": "new kinds of things\n(never trained)",
}
EPOCHS = 3
WISE_FT = ("full", "SAFT")  # whose way from the zero-shot model is shown


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        learning_rate: chosen on the validation set.
        config: the adapter's, None for the whole model.
        similarity_weight: weight of the similarity loss, chosen on the validation set.
    """

    learning_rate: float
    config: PeftConfig | None = None
    similarity_weight: float = 0.0


METHODS = {
    "full": Method(1e-3),
    "full + similarity": Method(1e-3, similarity_weight=30.0),
    "A-CLIP": Method(3e-4, ACLIPConfig()),
    "SAFT": Method(3e-3, SAFTConfig(density=0.001)),
}


def make_trainer(name: str, method: Method, sets: dict[str, Dataset]) -> RobustTrainer:
    """A trainer on the colour drawings; everything but what `method` says is the same for all methods."""
    arguments = RobustTrainingArguments(
        output_dir=str(OUTPUT / name.replace(" ", "-")),
        templates="a drawing of a {}.",
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
    model = CLIPModel.from_pretrained(data.MODEL, dtype=torch.float32)
    return RobustTrainer(
        model=get_peft_model(model, replace(method.config)) if method.config else model,
        args=arguments,
        train_dataset=sets["train"],
        eval_dataset={name: sets[name] for name in TITLES},
        processing_class=CLIPProcessor.from_pretrained(data.MODEL),
    )


def accuracies(metrics: dict[str, float], prefix: str = "") -> dict[str, float]:
    """Accuracy on every test set, a fraction."""
    return {name: metrics[f"{prefix}{name}_accuracy"] for name in TITLES}


def compare(sets: dict[str, Dataset]) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Accuracies, number of trained parameters and seconds by method, and the α-sweeps of some."""
    results: dict[str, dict] = {}
    curves: dict[str, list[dict]] = {}
    for name, method in METHODS.items():
        Console().rule(f"[bold]{name}")
        trainer = make_trainer(name, method, sets)
        if not results:
            results["zero-shot"] = {"accuracy": accuracies(trainer.evaluate(), "eval_"), "trained_parameters": 0}
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        metrics = accuracies(trainer.evaluate(), "eval_")
        results[name] = {"accuracy": metrics, "trained_parameters": trained, "seconds": seconds}
        if name in WISE_FT:
            sweep = trainer.wise_ft_sweep(sets["validation"])
            curves[name] = [point(row) for row in sweep.rows]
            best = next(row for row in sweep.rows if row["alpha"] == sweep.best_alpha)
            wise = {"accuracy": accuracies(best), "trained_parameters": trained, "alpha": sweep.best_alpha}
            results[f"{name} + WiSE-FT"] = wise
            trainer.save_model()  # at the chosen α
    return results, curves


def point(row: dict[str, float]) -> dict[str, float]:
    """A point of the curve: α, accuracy in distribution, and the mean of those out of distribution."""
    found = accuracies(row)
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
        settings = [replace(method, learning_rate=rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3)]
        if method.similarity_weight:
            settings = [replace(method, similarity_weight=weight) for weight in (1.0, 3.0, 10.0, 30.0)]
        found = []
        for setting in settings:
            trainer = make_trainer(name, setting, sets)
            trainer.train()
            metrics = trainer.evaluate(sets["validation"])
            found.append((setting, metrics["eval_accuracy"], metrics["eval_loss"]))
            print(f"{describe(name, setting)}: {100 * found[-1][1]:.1f} %, loss {found[-1][2]:.3f}")
        print(f"-> {describe(name, choose(found, len(sets['validation'])))}")


def describe(name: str, method: Method) -> str:
    """A method and its settings in words."""
    return f"{name}, learning rate {method.learning_rate}, similarity weight {method.similarity_weight}"


def choose(found: list[tuple[Method, float, float]], images: int) -> Method:
    """Of the settings whose accuracy is within one standard error of the best, the one with the lowest loss."""
    best = max(accuracy for _, accuracy, _ in found)
    error = math.sqrt(best * (1 - best) / images)
    return min((one for one in found if one[1] >= best - error), key=lambda one: one[2])[0]


def main() -> None:
    """Loads the drawings, compares the methods, and writes the table and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validate", action="store_true", help="compare settings on the validation set instead")
    arguments = parser.parse_args()
    sets = {name: dataset.cast_column("image", Image(decode=False)) for name, dataset in data.load().items()}
    if arguments.validate:
        validate(sets)
        return
    OUTPUT.mkdir(parents=True, exist_ok=True)
    results, curves = compare(sets)
    show(results)
    (OUTPUT / "results.json").write_text(json.dumps({"results": results, "curves": curves}, indent=2))
    draw_comparison(results, TITLES, OUTPUT / "comparison.png")
    draw_curves(curves, OUTPUT / "wise_ft.png")
    print(f"Wrote results.json, comparison.png, wise_ft.png and the models of WiSE-FT to {OUTPUT}.")


if __name__ == "__main__":
    main()
