# SPDX-License-Identifier: Apache-2.0
"""What whole checkpoints cost: saving one, and telling whether ranks and runs are the same.

    python examples/benchmarks/save_checkpoint.py --rounds 5

A randomly initialised CLIP of ViT-B/32's shapes after one step of AdamW. Trainer's own checkpoint is followed by an
fsync of its files, as what is not on the disk is not saved. The digests are those that ranks compare, before the first
step and with every checkpoint; they are shown beside a training step of 32 images of 64 pixels.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoProcessor, CLIPConfig, CLIPModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_robust import ACLIPConfig, RobustTrainer, RobustTrainingArguments, SAFTConfig
from hf_robust.data.publish import sync
from hf_robust.scripting.run import run
from hf_robust.scripting.timing import Step, interleaved_medians, print_medians
from hf_robust.training.ranks import entries_digest
from hf_robust.training.same_run import bit_digest, describe_run

DEMO = Path(__file__).parents[1] / "demo" / "clip-tiny-drawings"
BATCH = 32
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "SAFT 0.1 %": lambda model: get_peft_model(model, SAFTConfig(density=0.001, score="random")),
    "A-CLIP": lambda model: get_peft_model(model, ACLIPConfig()),
    "full": lambda model: model,
}


def trained(method: str, folder: Path) -> RobustTrainer:
    """A trainer that has made one step."""
    processor: Any = AutoProcessor.from_pretrained(DEMO)
    config = CLIPConfig()  # its defaults are ViT-B/32
    config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    config.vision_config.image_size = processor.image_processor.crop_size["height"]
    images = [Image.new("RGB", (64, 64), (7 * i % 256, 0, 0)) for i in range(BATCH)]
    rows = {"image": images, "label": [("circle", "square")[i % 2] for i in range(BATCH)]}
    args = RobustTrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=BATCH, save_strategy="no", disable_tqdm=True
    )
    trainer = RobustTrainer(
        METHODS[method](CLIPModel(config)), args, train_dataset=Dataset.from_dict(rows), processing_class=processor
    )
    trainer.train()
    trainer.run = describe_run(trainer)
    return trainer


def stock(trainer: RobustTrainer, folder: Path) -> None:
    """Trainer's checkpoint, on the disk."""
    Trainer._save_checkpoint(trainer, trainer.model, None)
    for path in (folder / f"{PREFIX_CHECKPOINT_DIR}-1").rglob("*"):
        sync(path)


def digests(model: nn.Module) -> tuple[str, str]:
    """What ranks compare with every checkpoint."""
    return bit_digest(model.named_parameters()), entries_digest(model)


@dataclass
class ScriptArguments:
    """What whole checkpoints cost."""

    rounds: int = 5
    threads: int = field(default_factory=torch.get_num_threads)


def saving(trainer: RobustTrainer, folder: Path) -> dict[str, Step]:
    """Trainer's checkpoint and ours, each into an empty folder."""

    def new_folder(save: Step) -> None:
        shutil.rmtree(folder / f"{PREFIX_CHECKPOINT_DIR}-1", ignore_errors=True)
        save()

    return {
        "stock": lambda: new_folder(lambda: stock(trainer, folder)),
        "whole": lambda: new_folder(lambda: trainer._save_checkpoint(trainer.model, None)),
    }


def comparing(trainer: RobustTrainer) -> dict[str, Step]:
    """A training step, and what ranks compute to compare."""
    batch = next(iter(trainer.get_train_dataloader()))

    def with_a_checkpoint() -> None:
        bit_digest(trainer.model.named_parameters())
        entries_digest(trainer.model)

    return {
        "step": lambda: void(trainer.training_step(trainer.model, batch)),
        "with a checkpoint": with_a_checkpoint,
        "before training": lambda: void(describe_run(trainer)),
    }


def void(result: object) -> None:
    """What is timed returns nothing."""


def main(arguments: ScriptArguments) -> None:
    """Times checkpoints, digests and a step."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    for method in METHODS:
        with tempfile.TemporaryDirectory(dir=".") as name:  # on a disk: what /tmp is may lie in memory
            trainer = trained(method, Path(name))
            medians = interleaved_medians(saving(trainer, Path(name)), arguments.rounds)
            print_medians(f"saving, {method}", medians, "stock")
            print_medians(f"digests, {method}", interleaved_medians(comparing(trainer), arguments.rounds), "step")


if __name__ == "__main__":
    run(main, ScriptArguments)
