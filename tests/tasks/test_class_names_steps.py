# SPDX-License-Identifier: Apache-2.0
"""What a training step of the live head encodes: drawn wordings, drawn classes, chunks, a share of each process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from hf_robust import ACLIPConfig, SAFTConfig, select_saft
from hf_robust.encoders import chunks, class_embeds
from hf_robust.encoders.dual_encoder import text_embeds
from hf_robust.errors import ConfigError
from hf_robust.tasks.class_names import ZeroShotClassifier, class_embeddings
from hf_robust.tasks.task import Progress
from tests.programs import run_on_ranks
from tests.tiny_models import recompute_activations, tiny_batch, tiny_lora, tiny_model, tiny_processor

NAMES = ["cat", "hummingbird", "ox", "owl", "bee", "newt"]
TEMPLATES = ["a {}.", "one {} and no other", "{}"]
IMAGES = {name: tensor.double() for name, tensor in tiny_batch("clip", 4).items()}
LABELS = torch.tensor([0, 2, 5, 2])


def full() -> nn.Module:
    return tiny_model("clip").double()


def saft() -> nn.Module:
    model = get_peft_model(full(), SAFTConfig(density=0.02))
    task = build(model)
    with task.as_in_training():
        select_saft(task, [{**IMAGES, "labels": LABELS}], lambda task, batch: task(**batch).loss)
    return model


MODELS = {
    "full": full,
    "SAFT": saft,
    "A-CLIP": lambda: get_peft_model(full(), ACLIPConfig()),
    "LoRA": lambda: tiny_lora(full(), init_lora_weights=False, lora_dropout=0.5),
}


def build(model: nn.Module, templates: Any = TEMPLATES, step: int = 3, **sizes: int) -> ZeroShotClassifier:
    task = ZeroShotClassifier(model, tiny_processor("clip"), NAMES, templates, **sizes).train()
    task.progress = Progress(step=step, steps=10)
    return task


def gradients(task: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        task(**IMAGES, labels=LABELS).loss.backward()
    found = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys() and any("text_model" in name for name in found)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=tolerance * largest, msg=lambda m, n=name: n + m
        )


@pytest.fixture
def text_runs(monkeypatch):
    """The number of prompts in each run of a text tower."""
    runs = []
    monkeypatch.setattr(
        class_embeds, "text_embeds", lambda m, ids, mask: runs.append(len(ids)) or text_embeds(m, ids, mask)
    )
    return runs


# --- wordings ---


def test_training_compares_with_one_wording_of_each_class_and_evaluation_with_all(text_runs) -> None:
    task = build(full())
    output = task(**IMAGES, labels=LABELS)
    assert text_runs == [6] and output.prompt_rows.shape == (6,)
    with torch.no_grad():
        every = task.prompts.embed(task.model)
        torch.testing.assert_close(output.class_embeds.detach(), every[output.prompt_rows])
        whole = class_embeddings(task.model, task.processor, NAMES, TEMPLATES)
        for evaluated in (task(**IMAGES), task.eval()(**IMAGES)):  # without gradients train mode draws none, either
            assert torch.equal(evaluated.class_embeds, whole) and evaluated.prompt_rows is None
    assert torch.equal(task(**IMAGES, labels=LABELS).class_embeds, task.encode_prompts())
    with task.as_in_training():
        torch.testing.assert_close(task(**IMAGES, labels=LABELS).loss, output.loss, rtol=1e-12, atol=0)
    assert task(**IMAGES, labels=LABELS).prompt_rows is None


def test_with_one_wording_training_is_what_evaluation_is() -> None:
    task = build(full(), templates="single")
    output = task(**IMAGES, labels=LABELS)
    assert output.prompt_rows is None and torch.equal(output.class_embeds, task.eval().encode_prompts())


def test_among_other_classes_nothing_is_drawn() -> None:
    task = build(full(), classes_per_step=5)
    for names in (NAMES[::-1], ["bus", "tram", "car", "van", "bike", "cart"]):
        with task.classes(names):
            output = task(**IMAGES, labels=LABELS)
        assert output.prompt_rows is None and output.logits.isfinite().all()


# --- chunks ---


@pytest.mark.parametrize("method", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_have_the_gradients_of_all_prompts_at_once(method, checkpointing, monkeypatch, text_runs) -> None:
    """Dropout draws for each chunk, so there the same chunks are compared with, whose activations are kept."""
    model, oracle = MODELS[method](), None if method != "LoRA" else 4
    text_runs.clear()
    task = build(model, text_chunk_size=4)
    if checkpointing:
        recompute_activations(task, {"use_reentrant": False})
    found = gradients(task)
    assert text_runs == [4, 2, 2, 4]  # twice each; the backward begins with the last
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "checkpoint", lambda function, *part, use_reentrant: function(*part))
        expected = gradients(build(model, text_chunk_size=oracle))
    same(found, expected)
    if method == "LoRA":
        with pytest.raises(AssertionError):
            same(gradients(task, seed=1), expected)


def test_chunks_hold_under_autocast() -> None:
    model = full().float()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (gradients_of(build(model, text_chunk_size=size)) for size in (4, None))
    same(found, expected, tolerance=0.02)


def gradients_of(task: nn.Module) -> dict[str, Tensor]:
    task(tiny_batch("clip", 4)["pixel_values"], labels=LABELS).loss.backward()
    found = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    return found


# --- classes ---


def test_classes_of_a_step_have_the_logits_of_all_and_the_others_none(text_runs) -> None:
    task, whole = build(full(), classes_per_step=5), build(full())
    output, expected = task(**IMAGES, labels=LABELS), whole(**IMAGES, labels=LABELS)
    assert text_runs == [5, 6]
    classes = output.prompt_rows // 3
    left_out = ({*range(6)} - {*classes.tolist()}).pop()
    there = output.logits[:, LABELS]
    torch.testing.assert_close(there, expected.logits[:, LABELS])
    assert (output.logits[:, left_out] == -torch.inf).all()
    drawn = [one for one in classes.tolist() if one not in LABELS]
    rarer = expected.logits[:, drawn] + torch.tensor(3 / 2).double().log()
    torch.testing.assert_close(output.logits[:, drawn], rarer)
    torch.testing.assert_close(output.class_embeds, expected.class_embeds[classes])
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


def test_all_classes_in_a_step_are_as_without() -> None:
    found, expected = (build(full(), **sizes)(**IMAGES, labels=LABELS) for sizes in ({"classes_per_step": 6}, {}))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("setting", ["text_chunk_size", "classes_per_step"])
def test_sizes_are_refused_for_heads_that_encode_nothing(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"head='frozen' encodes no prompts.*{setting}.*got 4"):
        build(full(), head="frozen", **{setting: 4})


def test_trainings_that_some_classes_cannot_stand_for_are_refused() -> None:
    task = build(full(), classes_per_step=5)
    args = SimpleNamespace(train_batch_size=2, world_size=2, class_weights=None, label_smoothing_factor=0.0)
    assert task.training_loss(None, args, None).weights is None
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        task.training_loss(None, SimpleNamespace(**{**vars(args), "label_smoothing_factor": 0.1}), None)
    with pytest.raises(ConfigError, match="classes_per_step.*more than 6"):
        task.training_loss(None, SimpleNamespace(**{**vars(args), "world_size": 3}), None)


# --- processes ---


def test_two_processes_encode_a_share_each_and_train_as_one(tmp_path: Path) -> None:
    outputs = run_on_ranks(2, "from tests.tasks.prompt_ranks import main\n", tmp_path)
    assert all("two ranks agree" in printed for printed, _ in outputs)
