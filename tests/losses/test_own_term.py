# SPDX-License-Identifier: Apache-2.0
"""The term of one's own in the documentation runs as it stands there, with every family."""

from __future__ import annotations

import pytest
from transformers import AutoModel, AutoProcessor

from hf_robust.losses import SimilarityLoss
from tests.docs.pages import ROOT, blocks
from tests.tiny_models import tiny_model, tiny_processor
from tests.trainers import build

DRAWINGS = ROOT / "examples/demo/clip-tiny-drawings"


@pytest.mark.parametrize("family", ["clip", "siglip", "vision-text-dual-encoder", "drawings"])
def test_a_term_of_ones_own_trains(tmp_path, family):
    block, *_ = blocks(ROOT / "docs/guides/own_loss.md", "python")
    names: dict = {}
    exec(block.text, names)
    if family == "drawings":
        model, processor = AutoModel.from_pretrained(DRAWINGS), AutoProcessor.from_pretrained(DRAWINGS)
    else:
        model, processor = tiny_model(family), tiny_processor(family)
    losses = [SimilarityLoss(weight=10.0), names["Relations"](schedule="linear")]
    settings = {"max_steps": 2, "learning_rate": 1e-4, "logging_strategy": "steps", "logging_steps": 1}
    trainer = build(tmp_path, model=model, processing_class=processor, losses=losses, eval_dataset=None, **settings)
    trainer.train()
    first, second, *_ = (log["loss_relations"] for log in trainer.state.log_history if "loss_relations" in log)
    assert abs(first) < 1e-6 < second
