# SPDX-License-Identifier: Apache-2.0
"""Does the similarity loss help to tell identities apart that were never trained on?

    python examples/benchmarks/identities.py --model_name_or_path model --data caltech101 --output_dir runs/identities

The classes of a set are taken for identities without names and split in three: some are trained on; settings are
chosen on others; the last have no say, and are shown at the end. Full fine-tuning, SAFT and A-CLIP, each with the
similarity loss and without. The learning rate is the best of a grid without it. With it the weight is the best of
another at that rate, and then the next higher rate is tried, as what is held may be pulled harder. Best is the mAP@R
of the validation identities.

Recall@1 is of the never trained identities ("new"), and of other images of those that were trained on ("known").
Every training that ends is kept in results.json, so the same command goes on where it was interrupted.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import numpy as np
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin

from hf_robust import ACLIPConfig, RobustTrainer, RobustTrainingArguments, SAFTConfig
from hf_robust.data.text_files import read_json
from hf_robust.evaluation.report import write_json
from hf_robust.scripting.checks import check_same_settings
from hf_robust.scripting.loading import load_model, load_processor
from hf_robust.scripting.run import run

METHODS = ("full", "saft", "aclip")
RESAMPLES = 10_000


@dataclass
class ScriptArguments:
    """Model, data and what is compared.

    `data` is a folder with train.parquet and test.parquet, of columns `image` and `label`.
    """

    model_name_or_path: str
    data: str
    output_dir: str = "runs/identities"
    methods: list[str] = field(default_factory=lambda: [*METHODS])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first one chooses settings."})
    rates: list[float] = field(default_factory=lambda: [1e-5, 3e-5, 1e-4], metadata={"help": "full and aclip."})
    saft_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    weights: list[float] = field(
        default_factory=lambda: [1.0, 10.0, 100.0], metadata={"help": "Of the similarity loss."}
    )
    loss: str = "cosface"
    scale: float = 30.0
    images_per_identity: int = 3
    batch_size: int = 24
    epochs: float = 2
    image_size: int = 112
    train_images: int = field(default=6, metadata={"help": "Of each identity, as are the next ones."})
    validation_images: int = 5
    known_images: int = 4
    new_images: int = 8
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass(frozen=True)
class Comparison:
    """What all trainings share."""

    args: ScriptArguments
    processor: ProcessorMixin
    sets: dict[str, datasets.Dataset]
    models: dict[str, nn.Module]  # untrained, by method; a copy is trained
    file: Path


# --- data and models ---


def load_sets(args: ScriptArguments) -> dict[str, datasets.Dataset]:
    """Images to train on and of validation identities, other images of known ones, and those of new ones."""
    folder = Path(args.data)
    train, test = (datasets.Dataset.from_parquet(str(folder / f"{split}.parquet")) for split in ("train", "test"))
    classes = np.random.default_rng(0).permutation(train.features["label"].num_classes)
    known, validation, new = (part.tolist() for part in np.array_split(classes, 3))
    return {
        "train": some(train, known, args.train_images),
        "validation": some(train, validation, args.validation_images),
        "known": some(test, known, args.known_images),
        "new": some(train, new, args.new_images),
    }


def some(dataset: datasets.Dataset, classes: list[int], images: int) -> datasets.Dataset:
    """The first images of each of these classes, whose numbers are the identities."""
    labels = np.array(dataset["label"])
    rows = [row for one in classes for row in np.flatnonzero(labels == one)[:images].tolist()]
    chosen = dataset.select(rows).remove_columns("label")
    return chosen.add_column("identity", labels[rows])


def untrained(method: str, base: PreTrainedModel) -> nn.Module:
    """A copy of the model, with the method's adapter."""
    model = copy.deepcopy(base)
    configs = {"saft": SAFTConfig(density=0.001), "aclip": ACLIPConfig()}
    return get_peft_model(model, configs[method]) if method in configs else model


def load_comparison(args: ScriptArguments) -> Comparison:
    """Loads all that is needed; SAFT's entries hang on no rate and no seed, and are selected once."""
    torch.set_num_threads(args.threads)
    base, processor = load_model(args.model_name_or_path, "float32"), load_processor(args.model_name_or_path)
    models = {method: untrained(method, base) for method in args.methods}
    found = Comparison(args, processor, load_sets(args), models, Path(args.output_dir) / "results.json")
    if "saft" in models:
        make_trainer(found, models["saft"], learning_rate=0.0, weight=0.0, seed=0, max_steps=1).train()
    return found


def make_trainer(
    comparison: Comparison, model: nn.Module, learning_rate: float, weight: float, seed: int, **settings: Any
) -> RobustTrainer:
    """A trainer of a model on the known identities."""
    args = comparison.args
    task = {"loss": args.loss, "scale": args.scale, "images_per_identity": args.images_per_identity}
    training = RobustTrainingArguments(
        args.output_dir,
        task={"identities": task},
        losses={"similarity": {"weight": weight}} if weight > 0 else None,
        cache_reference_embeddings=weight > 0,
        image_size=args.image_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    train, processor = comparison.sets["train"], comparison.processor
    trainer = RobustTrainer(model, training, train_dataset=train, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    return trainer


# --- one training ---


def train_and_evaluate(comparison: Comparison, method: str, rate: float, weight: float, seed: int) -> dict[str, Any]:
    """Trains, and returns what comes of it on validation identities, on known and on new ones."""
    trainer = make_trainer(comparison, copy.deepcopy(comparison.models[method]), rate, weight, seed)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    found = {"method": method, "rate": rate, "weight": weight, "seed": seed, "seconds": round(seconds, 1)}
    return found | evaluate(comparison, trainer)


def evaluate(comparison: Comparison, trainer: RobustTrainer) -> dict[str, Any]:
    """Metrics of each set, and of each of its images whether the nearest other one is of its identity."""
    found: dict[str, Any] = {}
    for name in ("validation", "known", "new"):
        output = trainer.predict(comparison.sets[name], metric_key_prefix=name)
        metrics = ("recall@1", "mAP@R", "roc_auc", "tar_at_far_1e-2")
        found[name] = {metric: output.metrics[f"{name}_{metric}"] for metric in metrics}
        cosines = output.predictions @ output.predictions.T  # (images, images)
        np.fill_diagonal(cosines, -np.inf)
        found[name]["hits"] = (output.label_ids[cosines.argmax(axis=1)] == output.label_ids).astype(int).tolist()
    return found


def get(comparison: Comparison, method: str, rate: float, weight: float, seed: int) -> dict[str, Any]:
    """What a training gave, now or in an earlier call."""
    saved = read_json(comparison.file) if comparison.file.exists() else {"settings": settings(comparison), "runs": {}}
    check_same_settings(saved["settings"], settings(comparison), comparison.file)
    name = f"{method} rate={rate:g} weight={weight:g} seed={seed}"
    if name not in saved["runs"]:
        if method == "zero-shot":
            model = copy.deepcopy(next(iter(comparison.models.values())))
            found = evaluate(comparison, make_trainer(comparison, model, 0.0, 0.0, seed))
        else:
            found = train_and_evaluate(comparison, method, rate, weight, seed)
        saved["runs"][name] = found
        write_json(saved, comparison.file)
        print(f"{name}: mAP@R of validation identities {found['validation']['mAP@R']:.3f}", flush=True)
    return saved["runs"][name]


def settings(comparison: Comparison) -> dict[str, Any]:
    """What all trainings in a file share."""
    may_differ = ("output_dir", "methods", "seeds", "rates", "saft_rates", "weights", "threads")
    return {"script": {name: value for name, value in asdict(comparison.args).items() if name not in may_differ}}


# --- the comparison ---


def choose(comparison: Comparison, method: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Rate and weight without the similarity loss, and with it."""
    args = comparison.args
    rates = sorted(args.saft_rates if method == "saft" else args.rates)

    def score(setting: tuple[float, float]) -> float:
        return get(comparison, method, *setting, args.seeds[0])["validation"]["mAP@R"]

    without = max(((rate, 0.0) for rate in rates), key=score)
    rate, weight = max(((without[0], weight) for weight in args.weights), key=score)
    higher = rates[min(rates.index(rate) + 1, len(rates) - 1)]
    return without, max((rate, weight), (higher, weight), key=score)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean over images, by bootstrap."""
    rows = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(differences[rows].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def main(args: ScriptArguments) -> None:
    """Chooses settings, trains with all seeds, and prints recall@1 in %."""
    comparison = load_comparison(args)
    start = get(comparison, "zero-shot", 0.0, 0.0, 0)
    print(f"zero-shot: known {100 * start['known']['recall@1']:.1f}, new {100 * start['new']['recall@1']:.1f}")
    for method in args.methods:
        hits: dict[str, list[np.ndarray]] = {"known": [], "new": []}
        for title, (rate, weight) in zip(("without", "with"), choose(comparison, method), strict=True):
            runs = [get(comparison, method, rate, weight, seed) for seed in args.seeds]
            by_set = {name: [run[name]["recall@1"] for run in runs] for name in hits}
            shown = ", ".join(f"{n} {100 * mean(of):.1f} ({min(of):.3f} to {max(of):.3f})" for n, of in by_set.items())
            print(f"{method} {title} similarity loss, rate {rate:g}, weight {weight:g}: {shown}")
            for name, found in hits.items():
                found.append(np.mean([run[name]["hits"] for run in runs], axis=0))  # (images,)
        for name, (without, held) in hits.items():
            low, high = interval(held - without)
            print(f"  {name}: {100 * (held - without).mean():+.1f} with it ({100 * low:+.1f} to {100 * high:+.1f})")


if __name__ == "__main__":
    run(main, ScriptArguments)
