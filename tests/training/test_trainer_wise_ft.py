# SPDX-License-Identifier: Apache-2.0
"""RobustTrainer's sweep over α."""

from __future__ import annotations

import pytest

from hf_robust import wise_ft
from hf_robust.errors import ConfigError
from tests.tiny_models import image_dataset
from tests.trainers import METHODS, NAMES, OTHER_NAMES, build, same, weights

# PEFT's own LN tuning warns about every LayerNorm
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

VALIDATION = image_dataset(12, NAMES, seed=70)


def scores(metrics):
    """Without the prefix of `evaluate`, and without how long it took."""
    names = {name: name.removeprefix("eval_") for name in metrics if name.endswith(("accuracy", "loss"))}
    return {short: metrics[name] for name, short in names.items()}


@pytest.mark.parametrize(
    ("method", "head"), [(method, "live") for method in METHODS] + [("full", "trainable"), ("saft", "trainable")]
)
def test_the_ends_are_the_zero_shot_and_the_fine_tuned_model(tmp_path, method, head):
    trained = build(tmp_path, method, head=head)
    sets = {"validation": VALIDATION, **trained.eval_dataset}
    zero_shot = scores(trained.evaluate(sets))
    trained.train()
    tuned, fine_tuned = weights(trained), scores(trained.evaluate(sets))
    sweep = trained.wise_ft_sweep(VALIDATION, alphas=[0, 0.25, 1])
    assert sweep.rows[0] == {"alpha": 0, **zero_shot}
    assert sweep.rows[2] == {"alpha": 1, **fine_tuned}
    losses = [row["validation_loss"] for row in sweep.rows]
    assert len(set(losses)) == 3
    best = next(row for row in sweep.rows if row["alpha"] == sweep.best_alpha)
    assert best["validation_accuracy"] == max(row["validation_accuracy"] for row in sweep.rows)
    assert {"alpha": sweep.best_alpha, **scores(trained.evaluate(sets))} == best  # the model stays there
    wise_ft(trained.model, 1, trained.zero_shot)
    assert same(weights(trained), tuned)


def test_the_loss_may_choose_and_the_set_be_one_of_the_evaluation_sets(tmp_path):
    sets = {"validation": VALIDATION, "new": image_dataset(9, OTHER_NAMES, seed=90)}
    trained = build(tmp_path, "saft", eval_dataset=sets)
    trained.train()
    sweep = trained.wise_ft_sweep(metric="loss", greater_is_better=False)
    assert [row["alpha"] for row in sweep.rows] == [step / 10 for step in range(11)]
    assert set(sweep.rows[0]) == {"alpha"} | {f"{name}_{kind}" for name in sets for kind in ("accuracy", "loss")}
    assert sweep.best_alpha == min(sweep.rows, key=lambda row: row["validation_loss"])["alpha"]


@pytest.mark.parametrize("eval_dataset", [None, VALIDATION, {"id": VALIDATION}])
def test_a_validation_set_is_needed(tmp_path, eval_dataset):
    trained = build(tmp_path, "saft", eval_dataset=eval_dataset)
    trained.select_entries()
    with pytest.raises(ConfigError, match="chosen on validation data.*validation_dataset"):
        trained.wise_ft_sweep()


def test_a_resumed_training_goes_back_to_the_zero_shot_model(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5}
    whole = build(tmp_path, "full", **settings)
    start = weights(whole)
    whole.train()
    resumed = build(tmp_path, "full", **settings)
    resumed.train(str(tmp_path / "checkpoint-5"))
    assert not same(weights(resumed), start)
    wise_ft(resumed.model, 0, resumed.zero_shot)
    assert same(weights(resumed), start)


def test_an_adapter_needs_no_copy_of_the_zero_shot_weights(tmp_path):
    assert build(tmp_path, "aclip").zero_shot is None
    kept = build(tmp_path, "full", head="frozen")
    trainable = {name for name, parameter in kept.model.named_parameters() if parameter.requires_grad}
    assert set(kept.zero_shot) == trainable and not any("text_model" in name for name in trainable)
