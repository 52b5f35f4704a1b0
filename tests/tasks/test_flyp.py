# SPDX-License-Identifier: Apache-2.0
"""FLYP: the loss on images and their drawn prompts, and the live head it is evaluated by."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_robust.encoders.dual_encoder import image_embeds, logit_scale, text_embeds, tokenize
from hf_robust.errors import ConfigError, DataError
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.tasks.flyp import FLYP
from hf_robust.tasks.task import Progress
from tests.tiny_models import tiny_batch, tiny_model, tiny_processor

NAMES, TEMPLATES = ["cat", "dog", "ox"], ["a {}", "the {}.", "my big {}"]
PROCESSOR = tiny_processor("clip")
LABELS = torch.tensor([2, 0, 2, 1])
PIXELS = tiny_batch("clip", 4)["pixel_values"].double()


def flyp(**settings) -> FLYP:
    return FLYP(tiny_model("clip").double(), PROCESSOR, NAMES, TEMPLATES, **settings)


def slow_loss(task: FLYP, positives: str) -> torch.Tensor:
    drawn = torch.randint(3, (4,), generator=task.progress.generator("templates"))
    prompts = [TEMPLATES[t].replace("{}", NAMES[c]) for c, t in zip(LABELS.tolist(), drawn.tolist(), strict=True)]
    texts = text_embeds(task.model, **tokenize(PROCESSOR, prompts, task.model))
    logits = logit_scale(task.model) * image_embeds(task.model, PIXELS) @ texts.T
    same = (LABELS[:, None] == LABELS) & ~torch.eye(4, dtype=torch.bool)
    if positives == "ignore":
        logits = logits.where(~same, -1e9)
    targets = torch.eye(4, dtype=torch.float64) + (same if positives == "positive" else 0)
    targets = targets / targets.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@pytest.mark.parametrize("positives", ["negative", "positive", "ignore"])
def test_loss_is_over_the_prompts_of_the_batch(positives):
    task = flyp(positives=positives, contrastive_chunk_size=3).train()
    task.progress = Progress(step=5, steps=9, seed=3)
    loss = task(PIXELS, LABELS).loss
    torch.testing.assert_close(loss, slow_loss(task, positives), rtol=1e-11, atol=0)
    loss.backward()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    assert task.model.logit_scale.grad != 0


def test_mpm_nce_smooths_and_makes_wrong_prompts_harder():
    settings = {"positives": "positive", "label_smoothing": 0.1, "margin": 0.05}
    task = flyp(**settings).train()
    assert {name: task.settings()[name] for name in settings} == settings
    loss = task(PIXELS, LABELS).loss
    drawn = torch.randint(3, (4,), generator=task.progress.generator("templates"))
    prompts = [TEMPLATES[t].replace("{}", NAMES[c]) for c, t in zip(LABELS.tolist(), drawn.tolist(), strict=True)]
    texts = text_embeds(task.model, **tokenize(PROCESSOR, prompts, task.model))
    positive = (LABELS[:, None] == LABELS).double()
    of_each = positive.sum(dim=1, keepdim=True)
    targets = 0.9 * positive / of_each + 0.1 * (1 - positive) / (4 - of_each)  # ỹ
    similarity = image_embeds(task.model, PIXELS) @ texts.T
    sides = [logit_scale(task.model) * (side + 0.05 * (1 - positive)) for side in (similarity, similarity.T)]
    expected = sum(-(targets * side.log_softmax(dim=1)).sum(dim=1).mean() for side in sides) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    assert loss != flyp(positives="positive").train()(PIXELS, LABELS).loss


def test_templates_are_drawn_anew_in_every_step_and_only_the_batch_is_encoded():
    task, encoded = flyp().train(), []
    task.model.text_model.register_forward_hook(lambda module, args, out: encoded.append(len(out[0])))
    draws = []
    for step in range(6):
        task.progress = Progress(step=step, steps=6)
        draws.append(tuple(task._drawn(LABELS).tolist()))
        assert task(PIXELS, LABELS).loss.isfinite()
    assert encoded == [4] * 6  # of nine prompts
    assert len(set(draws)) > 1
    assert tuple(task._drawn(LABELS).tolist()) == draws[5]


def test_scale_has_no_bound():
    task = flyp().train()
    with torch.no_grad():
        task.model.logit_scale.fill_(6.0)
    task(PIXELS, LABELS).loss.backward()
    assert task.model.logit_scale.item() == 6.0


def test_evaluation_is_by_the_live_zero_shot_head_of_all_templates():
    task = flyp().eval()
    plain = ZeroShotClassifier(task.model, PROCESSOR, NAMES, TEMPLATES).eval()
    with torch.no_grad():
        torch.testing.assert_close(task(PIXELS, LABELS).logits, plain(PIXELS, LABELS).logits, rtol=0, atol=0)
        before = task(PIXELS).logits
        task.model.text_projection.weight.mul_(-1)
        assert not task(PIXELS).logits.equal(before)


def test_what_it_does_not_train_is_refused():
    with pytest.raises(ConfigError, match="trains the text tower"):
        flyp(head="frozen")
    with pytest.raises(ConfigError, match="repeated_texts"):
        flyp(positives="diag")
    with pytest.raises(ConfigError, match="label_smoothing"):
        flyp(label_smoothing=1.0)
    with pytest.raises(ConfigError, match="margin"):
        flyp(margin=-0.1)
    with pytest.raises(DataError, match="label is no class.*got 3"):
        flyp().train()(PIXELS, torch.tensor([0, 1, 2, 3]))
