# SPDX-License-Identifier: Apache-2.0
"""Which towers a training moves."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from hf_robust import SAFTConfig
from hf_robust.errors import ConfigError
from hf_robust.losses import ContextLoss, FeatureLoss, LipsumLoss
from hf_robust.losses.learning import learns
from tests.losses.classifiers import with_terms
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("towers", ["vision", "text"])
def test_a_tower_with_adapters_or_trained_weights_learns(towers):
    adapted = get_peft_model(tiny_model("clip"), SAFTConfig(density=0.01, towers=towers))  # no entries yet
    assert [one for one in ("vision", "text") if learns(adapted, one)] == [towers]
    plain = tiny_model("clip")
    plain.requires_grad_(False)
    assert not learns(plain, towers)
    plain.get_submodule(f"{towers}_model").requires_grad_(True)
    assert [one for one in ("vision", "text") if learns(plain, one)] == [towers]


@pytest.mark.parametrize("term", [LipsumLoss(), ContextLoss(), FeatureLoss()])
def test_images_that_cannot_move_are_not_held(term):
    model = get_peft_model(tiny_model("clip"), SAFTConfig(density=0.01, towers="text"))
    with pytest.raises(ConfigError, match=f"the vision tower is not trained.*losses, {term.name}.*Do without"):
        with_terms(term, model=model)
