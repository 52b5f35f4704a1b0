# SPDX-License-Identifier: Apache-2.0
"""What the similarity loss gains and costs full fine-tuning on the demo's icons, with intervals.

    python examples/demo/data.py
    python examples/benchmarks/similarity_gain.py

Rate and weight are those of examples/configs/compare_methods.yaml, chosen on validation data. Every seed trains with
the loss and without; the difference of both is drawn over images and seeds together, so what they share cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
from transformers import PrinterCallback

from hf_robust import RobustTrainer, RobustTrainingArguments, SimilarityLoss
from hf_robust.evaluation import RobustnessSuite, bootstrap_over_runs, evaluate_suite
from hf_robust.scripting.loading import load_model, load_processor
from hf_robust.scripting.run import run

Correct = dict[str, np.ndarray]  # by set, (images,)


@dataclass
class ScriptArguments:
    """Model, data and training."""

    model_name_or_path: str = "examples/demo/clip-tiny-drawings"
    train_data: str = "examples/demo/data/train.parquet"
    suite: str = "examples/configs/compare_suite.yaml"
    templates: str = "an icon of a {}."
    learning_rate: float = 1e-3
    weight: float = field(default=1.0, metadata={"help": "Of the similarity loss."})
    epochs: int = 5
    seeds: list[int] = field(default_factory=lambda: [*range(8)])
    threads: int = field(default_factory=torch.get_num_threads)


def tuned(args: ScriptArguments, suite: RobustnessSuite, weight: float, seed: int) -> Correct:
    """Trains, and returns which images of each set are classified correctly."""
    training = RobustTrainingArguments(
        "runs/similarity_gain",
        templates=args.templates,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=64,
        seed=seed,
        cache_reference_embeddings=weight > 0,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = RobustTrainer(
        load_model(args.model_name_or_path, "float32"),
        training,
        train_dataset=datasets.Dataset.from_parquet(args.train_data),
        processing_class=load_processor(args.model_name_or_path),
        losses=[SimilarityLoss(weight)] if weight > 0 else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    report = evaluate_suite(trainer.model.model, trainer.processing_class, suite, batch_size=256, silent=True)
    return {name: one.correct for name, one in report.classified.items()}


def show(without: Sequence[Correct], held: Sequence[Correct]) -> None:
    """Prints, of every set, both accuracies and their difference."""
    for name in without[0]:
        first, second = (np.stack([one[name] for one in runs]).astype(float) for runs in (without, held))
        low, high = bootstrap_over_runs(second - first)
        means = f"{100 * first.mean():5.1f} without, {100 * second.mean():5.1f} with it"
        print(f"{name:<22} {means}: {100 * (second - first).mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")


def main(args: ScriptArguments) -> None:
    """Trains with every seed, with the loss and without."""
    torch.set_num_threads(args.threads)
    suite = RobustnessSuite.from_yaml(args.suite)
    runs = [[tuned(args, suite, weight, seed) for weight in (0.0, args.weight)] for seed in args.seeds]
    show(*zip(*runs, strict=True))


if __name__ == "__main__":
    run(main, ScriptArguments)
