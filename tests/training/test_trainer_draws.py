# SPDX-License-Identifier: Apache-2.0
"""Trainings with random augmentation and dropout end bit-identical, wherever they were stopped."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from hf_robust.data.collator import ImageCollator
from hf_robust.errors import ConfigError
from hf_robust.training.trainer import RobustTrainer
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import NAMES, build, entries, same, weights
from tests.training.test_trainer_ranks import run_on_two_ranks

STEPS = 6  # two epochs of 18 pictures in batches of 4, two batches a step


def augment(image):
    """Draws from every global generator."""
    turned = image.rotate(40 * torch.rand(()).item())
    flipped = turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else turned
    return flipped.crop((0, 0, 30 + np.random.randint(10), 40))


def augment_rows(rows):
    return {**rows, "image": [augment(image) for image in rows["image"]]}


class AugmentedImages(torch.utils.data.Dataset):
    """As torchvision's, which augment the rows they return."""

    classes = NAMES

    def __init__(self):
        self.rows = image_dataset(18, NAMES)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return augment(self.rows[index]["image"]), self.rows[index]["label"]


class AugmentedStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return ((augment(row["image"]), row["label"]) for row in image_dataset(50, NAMES))


def mixed_up(rows):
    """A collator of the user's that draws for the whole batch."""
    batch = ImageCollator(tiny_processor("clip"))(rows)
    share = random.random() * np.random.rand() * torch.rand(())
    return {**batch, "pixel_values": batch["pixel_values"].lerp(batch["pixel_values"].flip(0), share)}


class MixingCollator(ImageCollator):
    def __call__(self, rows):
        batch = super().__call__(rows)
        return {**batch, "pixel_values": batch["pixel_values"] * (1 - torch.rand(()))}


PLACES = {
    "collator": lambda: {"data_collator": ImageCollator(tiny_processor("clip"), transform=augment)},
    "set_transform": lambda: {"train_dataset": image_dataset(18, NAMES).with_transform(augment_rows)},
    "torch dataset": lambda: {"train_dataset": AugmentedImages()},
    "own collator": lambda: {"data_collator": mixed_up},
    "own image collator": lambda: {"data_collator": MixingCollator(tiny_processor("clip"), transform=augment)},
}


def trainer(folder, place="collator", **settings):
    """With dropout, which draws from torch's global generator, and a checkpoint of every step."""
    torch.manual_seed(0)  # LoRA's first weights
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.3)
    defaults = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1, **PLACES[place]()}
    model = get_peft_model(tiny_model("clip"), lora)
    return build(folder, model=model, **{**defaults, **settings})


def trained(folder, place="collator", resume=None, **settings):
    made = trainer(folder, place, **settings)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return weights(made)


def resumed(folder, place, step, **settings):
    return trained(folder / "resumed", place, folder / f"checkpoint-{step}", save_strategy="no", **settings)


@pytest.mark.parametrize("place", PLACES)
def test_resumed_run_is_bit_identical_at_every_step(tmp_path, place):
    whole = trained(tmp_path, place)
    for step in range(1, STEPS):
        workers = 2 if step in (2, 3) else 0  # in an epoch and at its end
        assert same(whole, resumed(tmp_path, place, step, dataloader_num_workers=workers)), step


@pytest.mark.parametrize("persistent", [False, True])
def test_resumed_run_is_bit_identical_from_workers_to_none(tmp_path, persistent):
    how = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    whole = trained(tmp_path, **how)
    for step in (1, 3, 4):
        assert same(whole, resumed(tmp_path, "collator", step)), step
    assert same(whole, resumed(tmp_path, "collator", 2, **how))
    assert same(whole, resumed(tmp_path, "collator", 3, **how))


def test_a_stream_is_resumed_bit_identical(tmp_path):
    settings = {"train_dataset": AugmentedStream(), "max_steps": 5, "class_names": NAMES, "data_collator": None}
    whole = trained(tmp_path, **settings)
    for step in (1, 4):
        assert same(whole, resumed(tmp_path, "collator", step, **settings)), step


def test_evaluating_logging_and_saving_change_nothing(tmp_path):
    def drawing(prediction):
        return {"score": random.random() + np.random.rand() + torch.rand(()).item()}

    often = {"eval_strategy": "steps", "eval_steps": 1, "logging_strategy": "steps", "logging_steps": 1}
    plain = trained(tmp_path / "plain", save_strategy="no")
    drawn_next = random.random(), np.random.rand(), torch.rand(())
    assert same(plain, trained(tmp_path / "often", **often))
    assert same(plain, trained(tmp_path / "drawing", **often, compute_metrics=drawing))
    assert drawn_next == (random.random(), np.random.rand(), torch.rand(()))


class Shown(RobustTrainer):
    """Keeps what the model was shown."""

    def training_step(self, model, inputs, *args):
        self.shown = [*getattr(self, "shown", []), inputs["pixel_values"].clone()]
        return super().training_step(model, inputs, *args)


def test_order_and_augmentation_hang_on_the_arguments_alone(tmp_path):
    def shown(torch_seed, **settings):
        made = trainer(tmp_path, cls=Shown, save_strategy="no", **settings)
        torch.manual_seed(torch_seed)
        made.train()
        return made, torch.cat(made.shown)

    made, first = shown(42)  # what torch was seeded with before: the default of `seed`
    assert torch.equal(first, shown(5)[1])
    made.shown = []
    made.train()  # again
    assert torch.equal(first, torch.cat(made.shown))
    assert torch.equal(first[:34], shown(5, max_steps=5)[1])
    by_data_seed = shown(5, seed=1, data_seed=2)[1]
    assert torch.equal(by_data_seed, shown(6, seed=3, data_seed=2)[1]) and not torch.equal(by_data_seed, first)
    half = len(first) // 2
    epochs = [{tuple(image.flatten().tolist()) for image in part} for part in (first[:half], first[half:])]
    assert not epochs[0] & epochs[1]


def test_the_order_without_anything_that_draws_is_as_by_accelerate(tmp_path):
    """Those who seed nothing get the order that they had."""
    made = build(tmp_path, cls=Shown, save_strategy="no", seed=7)
    made.train()
    torch.manual_seed(7)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(7))
    expected = ImageCollator(tiny_processor("clip"))([image_dataset(18, NAMES)[int(row)] for row in order])
    assert torch.equal(torch.cat(made.shown)[:18], expected["pixel_values"])


def test_resuming_at_the_start_of_the_epoch_repeats_its_images(tmp_path):
    trained(tmp_path)
    how = {"save_strategy": "no", "ignore_data_skip": True, "allow_changed": ["trainer"]}
    made = trainer(tmp_path / "resumed", cls=Shown, **how)
    made.train(str(tmp_path / "checkpoint-4"))
    whole = trainer(tmp_path / "whole", cls=Shown, save_strategy="no")
    whole.train()
    second = torch.cat(whole.shown)[18:]
    shown = torch.cat(made.shown)
    assert torch.equal(second[: len(shown)], shown)


def test_nothing_is_seeded_where_nothing_draws(tmp_path):
    loader = build(tmp_path).get_train_dataloader()
    assert loader.dataset.draws is None and type(loader.collate_fn) is ImageCollator


@pytest.mark.parametrize("place", ["set_transform", "torch dataset", "own collator"])
def test_selection_of_saft_hangs_on_the_arguments_alone(tmp_path, place):
    found = []
    for seed, train_before in ((1, False), (2, True)):
        made = build(tmp_path, "saft", max_steps=1, **PLACES[place]())
        if train_before:
            made.get_train_dataloader()
            made.draws.set_epoch(3)
        torch.manual_seed(seed)
        made.select_entries()
        found.append(entries(made))
    assert found[0] and same(*found)


@pytest.mark.parametrize("place", ["set_transform", "torch dataset", "own collator"])
def test_what_draws_in_evaluation_draws_the_same_in_every_one(tmp_path, place):
    found = []
    for seed, workers in ((1, 0), (2, 2)):
        settings = PLACES[place]()
        settings["eval_dataset"] = settings.pop("train_dataset", image_dataset(18, NAMES))
        made = build(tmp_path, dataloader_num_workers=workers, class_names=NAMES, **settings)
        torch.manual_seed(seed)
        found += [made.evaluate()["eval_loss"] for _ in range(2)]
    assert len(set(found)) == 1


def test_an_order_by_the_global_generator_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="use_seedable_sampler"):
        trainer(tmp_path, accelerator_config={"use_seedable_sampler": False})


TWO_RANKS = """
import torch
from tests.training.test_trainer_draws import drawn_on_ranks, weights

def main(folder):
    whole = drawn_on_ranks(folder)
    stopped = drawn_on_ranks(f"{folder}/resumed", f"{folder}/checkpoint-1")
    at_end = drawn_on_ranks(f"{folder}/resumed", f"{folder}/checkpoint-2")
    result = {"whole": weights(whole), "in_epoch": weights(stopped), "at_end": weights(at_end), "drawn": whole.drawn}
    torch.save(result, f"{folder}/rank{whole.args.process_index}.pt")
"""


class Drawn(RobustTrainer):
    """Keeps the pixels of every image: of all epochs and in any order."""

    def training_step(self, model, inputs, *args):
        self.drawn = getattr(self, "drawn", set()) | {image.numpy().tobytes() for image in inputs["pixel_values"]}
        return super().training_step(model, inputs, *args)


def drawn_on_ranks(folder, resume=None):
    made = trainer(folder, cls=Drawn, train_dataset=image_dataset(13, NAMES), per_device_train_batch_size=2)
    made.train(resume)
    return made


def test_two_ranks_resume_bit_identical_and_augment_rows_as_one_does(tmp_path):
    first, second = run_on_two_ranks(TWO_RANKS, tmp_path)
    for found in (first, second):
        assert same(found["whole"], first["whole"])
        assert same(found["in_epoch"], first["whole"]) and same(found["at_end"], first["whole"])
    one = drawn_on_ranks(tmp_path / "one")
    assert one.drawn == first["drawn"] | second["drawn"] and len(one.drawn) == 2 * 13
