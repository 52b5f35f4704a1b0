# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on images and captions: what it gains in retrieval, and what of another task is forgotten.

    python examples/benchmarks/captions.py --model_name_or_path model --data caltech101 --other cifar10/test.parquet

Captions are made of class names and the wordings of "photo"; one is drawn for each image and epoch. Retrieval is among
one test image of each class and its caption, so that no two captions say the same, and a mean over several such sets.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import numpy as np
import torch
from peft import get_peft_model
from torch import nn
from transformers import PrinterCallback, ProcessorMixin

from hf_robust import ACLIPConfig, RobustTrainer, RobustTrainingArguments, SAFTConfig, SimilarityLoss, with_image_size
from hf_robust.encoders.templates import TEMPLATES, readable
from hf_robust.evaluation import RobustnessSuite, SuiteSet, bootstrap_over_runs, evaluate_suite
from hf_robust.evaluation.report import write_json
from hf_robust.scripting.loading import load_model, load_processor
from hf_robust.scripting.run import run

METHODS: dict[str, Any] = {
    "full": lambda model: model,
    "saft": lambda model: get_peft_model(model, SAFTConfig(density=0.01)),
    "aclip": lambda model: get_peft_model(model, ACLIPConfig()),
}


@dataclass
class ScriptArguments:
    """Model, data and training."""

    model_name_or_path: str
    data: str = field(metadata={"help": "A folder with train.parquet and test.parquet, of images and labels."})
    other: str = field(metadata={"help": "A parquet file of another task, on which forgetting shows."})
    output_dir: str = "runs/captions"
    methods: list[str] = field(default_factory=lambda: [*METHODS])
    rates: list[float] = field(default_factory=lambda: [1e-5, 1e-3, 1e-4], metadata={"help": "One a method."})
    weights: list[float] = field(default_factory=lambda: [0.0, 10.0], metadata={"help": "Of the similarity loss."})
    seeds: list[int] = field(default_factory=lambda: [0])
    train_images: int = field(default=6, metadata={"help": "Of each class."})
    other_images: int = 1000
    test_sets: int = 5
    batch_size: int = 128
    chunk_size: int = 32
    epochs: float = 2
    image_size: int = 112
    threads: int = field(default_factory=torch.get_num_threads)


def captioned(dataset: datasets.Dataset, rows: list[int], wordings: tuple[str, ...]) -> datasets.Dataset:
    """Some rows, with the captions of their classes in the place of their labels."""
    names = [readable(name) for name in dataset.features["label"].names]
    chosen = dataset.select(rows)
    texts = [[wording.replace("{}", names[label]) for wording in wordings] for label in chosen["label"]]
    return chosen.remove_columns("label").add_column("text", texts)


def load_suite(args: ScriptArguments, test: datasets.Dataset) -> RobustnessSuite:
    """Sets of one image a class, and the other task."""
    labels = np.array(test["label"])
    by_class = [np.flatnonzero(labels == one).tolist() for one in np.unique(labels)]
    several = [[rows[number % len(rows)] for rows in by_class] for number in range(args.test_sets)]
    single = TEMPLATES["single"]
    sets = [
        SuiteSet(f"captions {number}", "id", captioned(test, rows, single), task="retrieval")
        for number, rows in enumerate(several)
    ]
    other = datasets.Dataset.from_parquet(args.other)
    return RobustnessSuite([*sets, SuiteSet("other", "other", other.select(range(args.other_images)))])


def measured(model: nn.Module, processor: ProcessorMixin, suite: RobustnessSuite) -> dict[str, Any]:
    """Mean recalls over the sets of captions, and the accuracy on the other task, in %; and both by set and image."""
    report = evaluate_suite(model, processor, suite, silent=True)
    sets = [one.metrics for name, one in report.sets.items() if name.startswith("captions")]
    names = ("image_to_text_recall@1", "image_to_text_recall@5", "text_to_image_recall@1", "text_to_image_recall@5")
    found: dict[str, Any] = {name: round(100 * mean(metrics[name] for metrics in sets), 1) for name in names}
    found |= {"other_accuracy": round(100 * report.classified["other"].accuracy, 1)}
    recalls = [metrics["recall@1"] for metrics in sets]
    return found | {"recalls": recalls, "correct": report.classified["other"].correct.astype(int).tolist()}


def show(results: list[dict[str, Any]]) -> None:
    """Prints the last result, without what it has by set and image."""
    print({name: value for name, value in results[-1].items() if name not in ("recalls", "correct")}, flush=True)


def show_difference(results: list[dict[str, Any]], method: str, weight: float) -> None:
    """Prints what the similarity loss has changed, in points, with 95 % intervals over seeds, and sets or images."""
    for name in ("recalls", "correct"):
        of_weight = {
            w: np.array([one[name] for one in results if one["method"] == method and one["weight"] == w])
            for w in (0.0, weight)
        }  # (seeds, sets or images) each
        change = of_weight[weight] - of_weight[0.0]
        low, high = (100 * end for end in bootstrap_over_runs(change))
        print(f"{method}, weight {weight:g}, {name}: {100 * change.mean():+.1f} ({low:+.1f} to {high:+.1f})")


def trained(
    args: ScriptArguments, model: nn.Module, processor: ProcessorMixin, train: datasets.Dataset, **how: Any
) -> RobustTrainer:
    """A trainer after its training."""
    training = RobustTrainingArguments(
        args.output_dir,
        task={"pairs": {"contrastive_chunk_size": args.chunk_size}},
        learning_rate=how["rate"],
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        cache_reference_embeddings=how["weight"] > 0,
        seed=how["seed"],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    losses = [SimilarityLoss(how["weight"])] if how["weight"] > 0 else None
    trainer = RobustTrainer(model, training, train_dataset=train, processing_class=processor, losses=losses)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def main(args: ScriptArguments) -> None:
    """Trains every method with every weight and seed, and prints what came of it."""
    torch.set_num_threads(args.threads)
    folder = Path(args.data)
    train, test = (datasets.Dataset.from_parquet(str(folder / f"{split}.parquet")) for split in ("train", "test"))
    labels = np.array(train["label"])
    rows = [row for one in np.unique(labels) for row in np.flatnonzero(labels == one)[: args.train_images].tolist()]
    pairs, suite = captioned(train, rows, TEMPLATES["photo"]), load_suite(args, test)
    base = load_model(args.model_name_or_path, "float32")
    processor = with_image_size(load_processor(args.model_name_or_path), args.image_size, base)
    results = [{"method": "zero-shot", "weight": None, **measured(base, processor, suite)}]
    show(results)
    for method, rate in zip(args.methods, args.rates, strict=True):
        for weight in args.weights:
            for seed in args.seeds:
                start, how = time.perf_counter(), {"rate": rate, "weight": weight, "seed": seed}
                model = METHODS[method](load_model(args.model_name_or_path, "float32"))
                trainer = trained(args, model, processor, pairs, **how)
                seconds = round(time.perf_counter() - start)
                found = {"method": method, **how, "seconds": seconds}
                results.append(found | measured(trainer.model.model, processor, suite))
                show(results)
                write_json({"runs": results}, Path(args.output_dir) / "results.json")
        for weight in args.weights:
            if weight > 0 and 0.0 in args.weights:
                show_difference(results, method, weight)


if __name__ == "__main__":
    run(main, ScriptArguments)
