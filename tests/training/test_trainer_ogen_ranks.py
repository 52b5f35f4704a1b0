# SPDX-License-Identifier: Apache-2.0
"""RobustTrainer with OGEN on two ranks."""

from __future__ import annotations

import math

import torch

from tests.tiny_models import image_dataset
from tests.trainers import same
from tests.training.test_trainer_ogen import KNOWN, trainer
from tests.training.test_trainer_ranks import run_on_two_ranks

TWO_RANKS = """
import torch
from tests.training.test_trainer_ogen import KNOWN, trainer
from tests.tiny_models import image_dataset
from tests.trainers import weights

def main(folder):
    result = {}
    for method in ("context", "saft", "lora"):
        settings = {"train_dataset": image_dataset(13, KNOWN), "logging_strategy": "steps", "logging_steps": 1}
        trained = trainer(folder, method, **settings, config={"warmup": 0.25})
        trained.evaluate()
        before = weights(trained)
        trained.train()
        result[method] = {
            "before": before,
            "weights": weights(trained),
            "prototypes": trained.model.terms["ogen"].prototypes.mean,
            "noise": trained.model.terms["ogen"].noise.get_state(),
            "teacher": trained.model.terms["ogen"].teacher.new_embeds,
            "logs": [entry for entry in trained.state.log_history if "loss" in entry],
        }
    torch.save(result, f"{folder}/rank{trained.args.process_index}.pt")
"""


def test_two_ranks_stay_bit_identical(tmp_path):
    ranks = run_on_two_ranks(TWO_RANKS, tmp_path)
    one = trainer(tmp_path, train_dataset=image_dataset(13, KNOWN), max_steps=1)
    one.train()
    for method in ("context", "saft", "lora"):
        first, second = (rank[method] for rank in ranks)
        assert same(first["weights"], second["weights"])
        for part in ("prototypes", "noise", "teacher"):
            assert torch.equal(first[part], second[part])
        torch.testing.assert_close(first["prototypes"], one.model.terms["ogen"].prototypes.mean, rtol=0, atol=1e-6)
        terms = [{key: value for key, value in entry.items() if key.startswith("loss_")} for entry in first["logs"]]
        assert terms == [
            {key: entry[key] for key in of_entry} for of_entry, entry in zip(terms, second["logs"], strict=True)
        ]
        assert len(terms[-1]) == 8 and all(math.isfinite(value) for value in terms[-1].values())
        unmoved = [
            name
            for name, tensor in first["weights"].items()
            if torch.equal(tensor, first["before"].get(name, -tensor))
        ]
        assert unmoved == []
