# SPDX-License-Identifier: Apache-2.0
"""Losses and metrics of RobustTrainer on two ranks, against one process."""

from __future__ import annotations

import pytest
import torch

from tests.programs import run_on_ranks
from tests.tiny_models import image_dataset, tiny_model
from tests.trainers import NAMES, build, same, weights
from tests.training.test_trainer_loss import LOSSES, UNEVEN, trained, uneven

TWO_RANKS = """
import torch
from tests.training.test_trainer_loss_ranks import found

def main(folder):
    torch.save(found(folder, size=4), f"{folder}/rank{torch.distributed.get_rank()}.pt")
"""
SIXTEEN = uneven([*UNEVEN, 2, 1, 0])
SETTINGS = {"train_dataset": SIXTEEN, "train_sampling_strategy": "sequential"}


def found(folder, size):
    result = {name: weights(trained(folder, size=size, **SETTINGS, **LOSSES[name])) for name in ("both", "own")}
    seven, model = image_dataset(7, NAMES, seed=50), tiny_model("clip").double()
    metrics = build(folder, model=model, eval_dataset=seven, per_device_eval_batch_size=2).evaluate()
    return {**result, "metrics": (metrics["eval_accuracy"], metrics["eval_loss"])}


def test_ranks_equal_one_big_batch(tmp_path):
    run_on_ranks(2, TWO_RANKS, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    one = found(tmp_path, size=8)
    for name in ("both", "own"):
        assert same(first[name], second[name])
        for key, weight in one[name].items():
            torch.testing.assert_close(first[name][key], weight, rtol=1e-9, atol=1e-12, msg=key)
    assert first["metrics"] == second["metrics"] and first["metrics"][0] == one["metrics"][0]
    assert first["metrics"][1] == pytest.approx(one["metrics"][1], abs=1e-12)
