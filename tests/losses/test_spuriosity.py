# SPDX-License-Identifier: Apache-2.0
"""StarFT: its divergence, its texts, its weight by epochs, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from hf_robust import FLYP, ImageTextPairs, SeveralLabels, SpuriosityLoss, add_terms
from hf_robust.errors import ConfigError, DataError
from hf_robust.losses.spuriosity import PHRASES, spuriosity_divergence, surrounded
from hf_robust.tasks.task import Progress
from tests.losses.classifiers import batch, check_zero_at_the_start, gradients, move, with_terms
from tests.tiny_models import FAMILIES, tiny_model, tiny_processor

TEMPLATES = ["a {}.", "the {} "]


def units(rows, dim=6):
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=-1)


def oracle(images, texts, start_images, start_texts, labels, scale):
    """The definition: each image among the texts of other labels."""
    total = 0.0
    for row, label in enumerate(labels):
        others = [column for column, other in enumerate(labels) if other != label]
        if others:
            q = (scale * texts[others] @ images[row]).softmax(-1)
            p = (scale * start_texts[others] @ start_images[row]).softmax(-1)
            total += (p * (p / q).log()).sum().item()
    return total / len(labels)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1], [0, 0, 0, 0, 1]])
def test_it_is_the_divergence_among_texts_of_other_labels(labels):
    embeds = [units(5) for _ in range(4)]
    found = spuriosity_divergence(*embeds, torch.tensor(labels), 9.0)
    assert found.item() == pytest.approx(oracle(*embeds, labels, 9.0), rel=1e-10)


def test_a_batch_of_one_class_counts_nothing():
    tuned = units(3).float().requires_grad_()
    value = spuriosity_divergence(tuned, tuned, units(3).float(), units(3).float(), torch.zeros(3), 9.0)
    value.backward()
    assert value == 0 and tuned.grad.count_nonzero() == 0


@pytest.mark.parametrize("family", [one for one in FAMILIES if one != "vision-text-dual-encoder"])
def test_it_is_zero_at_the_start_in_every_family(family):
    check_zero_at_the_start(with_terms(SpuriosityLoss(), family=family, cls=FLYP), "spuriosity", family)


def test_dropout_of_the_text_tower_alone_makes_the_start_another():
    task = with_terms(SpuriosityLoss(), family="vision-text-dual-encoder")
    assert task(**batch("vision-text-dual-encoder")).terms["spuriosity"] > 0
    task.model.text_model.eval()
    assert task(**batch("vision-text-dual-encoder")).terms["spuriosity"] == 0


@pytest.mark.parametrize("cls", [FLYP, None])
def test_both_towers_learn_by_it_and_the_scale_does_not(cls):
    task = move(with_terms(SpuriosityLoss(), **({} if cls is None else {"cls": cls})))
    value = task(**batch()).terms["spuriosity"]
    found = gradients(task, value)
    for tower in ("vision_model", "text_model"):
        assert any(tower in name and one.count_nonzero() for name, one in found.items())
    assert "model.logit_scale" not in found and not task.terms.state_dict()
    with torch.no_grad():
        task.model.logit_scale.add_(1)
    assert task(**batch()).terms["spuriosity"].item() == value.item()


@pytest.mark.parametrize("settings", [{"cls": FLYP, "contrastive_chunk_size": 2}, {"text_chunk_size": 2}])
def test_texts_are_embedded_in_the_chunks_of_the_task(settings):
    def run(**how):
        task, calls = move(with_terms(SpuriosityLoss(), **how)), []

        def count(module, inputs, output):
            calls.append(len(output.pooler_output))

        task.model.text_model.register_forward_hook(count)
        value = task(**batch()).terms["spuriosity"]
        return value.item(), gradients(task, value), calls

    value, of_whole, whole = run(**{name: one for name, one in settings.items() if name == "cls"})
    chunked, of_chunks, chunks = run(**settings)
    assert 4 in whole and 2 not in whole and chunks.count(2) >= 4
    assert chunked == pytest.approx(value, rel=1e-4)
    for name, one in of_whole.items():
        torch.testing.assert_close(of_chunks[name], one, rtol=1e-3, atol=1e-6, msg=name)


def test_texts_are_prompts_of_the_class_in_surroundings_drawn_by_seed_and_step():
    phrases = ["{} in fog.", "{}, by night"]
    task = with_terms(SpuriosityLoss(phrases=phrases), templates=TEMPLATES)
    term, labels = task.terms["spuriosity"], torch.tensor([0, 1, 2] * 20)
    at = task.progress

    def texts(**changes):
        task.progress = dataclasses.replace(at, **changes)
        return term.texts(task, labels)

    known = {
        label: {surrounded(t.replace("{}", name), phrase) for t in TEMPLATES for phrase in phrases}
        for label, name in enumerate(task.class_names)
    }
    assert all({*texts()[label::3]} == known[label] for label in range(3))
    assert texts() == texts(epoch=2) and texts() != texts(step=2) and texts() != texts(seed=8)
    assert surrounded("a red.", "{} in fog.") == "a red in fog." and surrounded("a {}", "{}!") == "a {}!"


def test_the_weight_goes_by_epochs_to_zero():
    found = [SpuriosityLoss(weight=0.5).weight_at(Progress(epoch=epoch, epochs=10)) for epoch in range(10)]
    assert found == pytest.approx([0.5 * (9 - epoch) / 10 for epoch in range(10)]) and found[-1] == 0
    term = SpuriosityLoss()
    assert term.settings() == {"weight": 0.5, "phrases": None} and term.start_epoch(None, Progress(epochs=2)) is None
    with pytest.raises(ConfigError, match="the only one.*losses, spuriosity.*got 1.*2 epochs or more"):
        term.start_epoch(None, Progress(epochs=1))


def test_phrases_of_our_own_take_a_prompt_and_differ():
    assert len({*PHRASES}) == len(PHRASES) == 12
    assert all(phrase.count("{}") == 1 and phrase.endswith(".") for phrase in PHRASES)


@pytest.mark.parametrize("phrases", ["{} in fog.", [], 5, ["{} in fog.", "in fog."], ["{} in fog.", 5]])
def test_bad_phrases_are_refused(phrases):
    with pytest.raises(ConfigError, match="phrases are none.*losses, spuriosity, phrases"):
        SpuriosityLoss(phrases=phrases)


def test_other_tasks_are_refused():
    with pytest.raises(ConfigError, match="one class by name.*'several_labels'.*'class_names', 'flyp'"):
        with_terms(SpuriosityLoss(), cls=SeveralLabels)
    with pytest.raises(ConfigError, match="one class by name.*'pairs'"):
        add_terms(ImageTextPairs(tiny_model("clip"), tiny_processor("clip")), {"spuriosity": SpuriosityLoss()})
    with pytest.raises(ConfigError, match="as it is trained.*head.*'frozen'.*'live'"):
        with_terms(SpuriosityLoss(), head="frozen")


def test_texts_too_long_for_the_text_tower_are_refused_before_the_training():
    with pytest.raises(DataError, match="longer than the text tower"):
        with_terms(SpuriosityLoss(phrases=["{} here.", "{} " + 70 * "o "]))
