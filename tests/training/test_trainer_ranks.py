# SPDX-License-Identifier: Apache-2.0
"""RobustTrainer on two ranks."""

from __future__ import annotations

import math

import pytest
import torch

from tests.programs import run_on_ranks
from tests.tiny_models import image_dataset
from tests.trainers import NAMES, build, entries, same

TWO_RANKS = """
import torch
from hf_robust.errors import NonFiniteError
from hf_robust.training.trainer import RobustTrainer
from tests.tiny_models import image_dataset
from tests.trainers import NAMES, build, entries, weights

def main(folder):
    result = {}

    def scores(trained):
        return {name: value for name, value in trained.evaluate().items() if name.endswith(("accuracy", "loss"))}

    for method in ("saft", "full"):
        trained = build(folder, method, train_dataset=image_dataset(13, NAMES))
        result["zero_shot"] = scores(trained)
        trained.train()
        result[method] = {"weights": weights(trained), "entries": entries(trained), "metrics": scores(trained)}

    LOSSES = {"similarity": {"weight": 2.0, "towers": "both"}}
    SIMILARITY = {"losses": LOSSES, "max_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    for name, method, settings in (
        ("similar saft", "saft", {}),
        ("similar full", "full", {}),
        ("cached full", "full", {"cache_reference_embeddings": True}),
    ):
        trained = build(folder, method, train_dataset=image_dataset(13, NAMES), **SIMILARITY, **settings)
        trained.train()
        logs = [entry for entry in trained.state.log_history if "loss" in entry]
        result[name] = {"weights": weights(trained), "logs": logs}

    PUBLISHED = {
        "lipsum": {"prompts": 5, "tokens": 4},
        "context": {"templates": ["a {}.", "the {} at sea."]},
        "features": {},
        "weights": {},
        "spuriosity": {},
    }
    settings = {**SIMILARITY, "losses": PUBLISHED, "task": "flyp"}
    trained = build(folder, train_dataset=image_dataset(13, NAMES), **settings)
    trained.train()
    logs = [entry for entry in trained.state.log_history if "loss" in entry]
    result["published terms"] = {"weights": weights(trained), "logs": logs}

    class Broken(RobustTrainer):
        def loss_terms(self, outputs, inputs):
            terms = super().loss_terms(outputs, inputs)
            bad = self.args.process_index == self.args.world_size - 1 and self.state.global_step == 1
            return {"cross_entropy": terms["cross_entropy"] * (float("nan") if bad else 1.0)}

    try:
        build(folder, cls=Broken).train()
    except NonFiniteError as error:
        result["error"] = str(error)
    torch.save(result, f"{folder}/rank{trained.args.process_index}.pt")
"""


def run_on_two_ranks(script, folder):
    """Runs a script, and returns what each rank saved."""
    run_on_ranks(2, script, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_two_ranks_stay_bit_identical_and_agree_with_one(tmp_path):
    first, second = run_on_two_ranks(TWO_RANKS, tmp_path)
    for method in ("saft", "full"):
        assert same(first[method]["weights"], second[method]["weights"])
        assert same(first[method]["entries"], second[method]["entries"])
        assert first[method]["metrics"] == second[method]["metrics"]
    for name in ("similar saft", "similar full", "cached full"):
        assert same(first[name]["weights"], second[name]["weights"])
        terms = [{key: value for key, value in entry.items() if "_" in key} for entry in first[name]["logs"]]
        assert terms == [{key: entry[key] for key in terms[0]} for entry in second[name]["logs"]]
        assert terms[-1]["loss_similarity_vision"] > 0 == round(terms[0]["loss_similarity_vision"], 6)
        assert all(math.isfinite(value) for entry in terms for value in entry.values())
    published = first["published terms"]
    assert same(published["weights"], second["published terms"]["weights"])
    for name in ("lipsum", "context", "features", "weights", "spuriosity"):
        assert published["logs"][0][f"loss_{name}"] == 0 < published["logs"][1][f"loss_{name}"]
    assert len(list((tmp_path / "datasets" / "hf_robust").iterdir())) == 1
    one = build(tmp_path, "saft", train_dataset=image_dataset(13, NAMES))
    zero_shot = one.evaluate()
    one.select_entries()
    assert entries(one) and same(entries(one), first["saft"]["entries"])
    for name, value in first["zero_shot"].items():  # padding that makes batches even is not counted
        assert value == pytest.approx(zero_shot[name], rel=1e-6)
    assert first["error"] == second["error"] and "loss is nan (at step 2, rank 1)" in first["error"]
