# SPDX-License-Identifier: Apache-2.0
"""Prompts of classes: which are drawn, how they are embedded, and how far they are padded."""

from __future__ import annotations

import pytest
import torch

from hf_robust.encoders import class_embeds
from hf_robust.encoders.class_embeds import class_embeddings
from hf_robust.encoders.dual_encoder import text_embeds, tokenize
from hf_robust.errors import ConfigError
from hf_robust.tasks.prompts import Prompts
from hf_robust.tasks.task import Progress
from tests.tiny_models import FAMILIES, tiny_model, tiny_processor

NAMES = ["cat", "hummingbird", "ox", "owl", "bee"]
TEMPLATES = ["a {}.", "one {} and no other", "{}"]


def build(family: str = "clip", templates: list[str] = TEMPLATES, **sizes: int) -> Prompts:
    return Prompts(tiny_model(family), tiny_processor(family), NAMES, templates, **sizes)


def rows_of(prompts: Prompts, step: int, seed: int = 0) -> list[int]:
    sampled, rows = prompts.draw(Progress(step=step, seed=seed), None)
    assert sampled is None
    return rows.tolist()


def test_a_wording_is_drawn_for_every_class_by_seed_and_step() -> None:
    prompts = build()
    draws = [rows_of(prompts, step) for step in range(40)]
    assert all([row // 3 for row in draw] == [0, 1, 2, 3, 4] for draw in draws)
    assert draws[7] == rows_of(build(), 7) != rows_of(prompts, 7, seed=1)
    assert {row for draw in draws for row in draw} == set(range(15))
    assert any(len({row % 3 for row in draw}) == 3 for draw in draws)  # not one for all classes


def test_what_is_drawn_for_a_class_does_not_depend_on_the_others() -> None:
    prompts, labels = build(classes_per_step=3), torch.tensor([4, 1])
    for step in range(5):
        sampled, rows = prompts.draw(Progress(step=step), labels)
        everywhere = rows_of(prompts, step)
        assert len(rows) == 3 and rows.tolist() == [everywhere[one] for one in sampled.classes]


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_prompts_are_embedded_as_those_of_their_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, model, processor = build(family), tiny_model(family).double(), tiny_processor(family)
    rows = torch.tensor([2, 3, 8, 9, 14])
    texts = [TEMPLATES[row % 3].replace("{}", NAMES[row // 3]) for row in rows.tolist()]
    tokens = tokenize(processor, texts, model)
    lengths = []
    monkeypatch.setattr(
        class_embeds, "text_embeds", lambda m, ids, mask: lengths.append(ids.shape[1]) or text_embeds(m, ids, mask)
    )
    with torch.no_grad():
        found, expected = prompts.encode(model, rows), text_embeds(model, **tokens)
        everything = prompts.embed(model)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(prompts.pick(everything, rows), expected, rtol=1e-9, atol=1e-9)
        whole = class_embeddings(model, processor, NAMES, TEMPLATES)
        assert torch.equal(prompts.encode(model), whole) and torch.equal(prompts.pick(everything, None), whole)
    assert lengths[:2] == [tokens["input_ids"].shape[1], prompts.input_ids.shape[1]]


def test_one_wording_of_all_classes_is_nothing_to_draw() -> None:
    assert build(templates=["a {}"]).draw(Progress(), torch.tensor([0])) == (None, None)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"chunk_size": 0}, "text_chunk_size.*got 0"),
        ({"classes_per_step": 1}, "classes_per_step.*got 1"),
        ({"classes_per_step": 6}, "classes_per_step.*got 6; allowed 2 to 5"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**sizes)
