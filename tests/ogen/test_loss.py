# SPDX-License-Identifier: Apache-2.0
"""OGEN as a term of the loss: its parts against the formulas' functions, its epochs, its state."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from hf_robust.data.collator import ImageCollator
from hf_robust.encoders.class_embeds import class_embeddings
from hf_robust.errors import ConfigError, DataError
from hf_robust.losses import add_terms
from hf_robust.losses.state import load_terms, save_terms
from hf_robust.ogen import OGENConfig, OGENLoss
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.tasks.flyp import FLYP
from hf_robust.tasks.task import Progress
from tests.tiny_models import image_dataset, tiny_lora, tiny_model, tiny_processor

KNOWN, NEW = ["red", "green", "blue", "pink"], ["cat", "dog", "owl"]
TEXT = r".*text_model.*(q_proj|v_proj)"
PARTS = {"generation_base", "generation_reverse", "base_as_unknown", "reverse", "new"}
DISTILLED = {"distillation_known", "distillation_new"}


def batch(n=8, seed=0):
    return ImageCollator(tiny_processor("clip"))(list(image_dataset(n, KNOWN, seed=seed)))


def text_lora():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of LoRA's first weights
        model = get_peft_model(tiny_model("clip"), LoraConfig(target_modules=TEXT))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # else the text tower would be that of the base
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def task(model=None, known=KNOWN, started=True, cls=ZeroShotClassifier, settings=None, **config):
    found = cls(model or text_lora(), tiny_processor("clip"), known, **(settings or {}))
    add_terms(found, {"ogen": OGENLoss(OGENConfig(NEW, **{"dropout": 0.0, **config}))})
    if started:
        found.terms["ogen"].start(found, lambda: iter([batch(16)]))
    return found.train()


def epochs(found, number, of=5):
    """The parts of a step in each of the epochs."""
    optimizer = torch.optim.SGD([p for p in found.parameters() if p.requires_grad], lr=0.05)
    logs = []
    for epoch in number:
        found.progress = Progress(step=epoch, steps=of, epoch=epoch, epochs=of)
        found.terms["ogen"].start_epoch(found, found.progress)
        optimizer.zero_grad()
        output = found(**batch(seed=epoch))
        weight = found.terms["ogen"].task_weight(found.progress)
        torch.stack([weight * output.loss, *output.terms.values()]).sum().backward()
        optimizer.step()
        logs.append({name.removeprefix("ogen_"): term.item() for name, term in output.terms.items()})
    return logs


def test_weights_and_parts_go_by_epochs():
    found = task()
    warm, first, *_, last = epochs(found, range(5))
    assert {name for name, value in warm.items() if value != 0} == {"generation_base", "generation_reverse"}
    assert set(first) == PARTS | DISTILLED and set(last) == PARTS | DISTILLED
    assert all(value > 0 for value in last.values())
    weights = [found.terms["ogen"].task_weight(Progress(epoch=epoch, epochs=5)) for epoch in range(5)]
    assert weights == [0.0, 0.25, 0.25, 0.25, 0.25]


def test_without_warm_up_and_teacher_the_parts_are_the_weighted_losses():
    config = {"generation_weight": 3.0, "base_as_unknown_weight": 0.5, "reverse_weight": 0.7, "new_weight": 1.1}
    found = task(**config, warmup=0.0, distillation_weight=0.0, neighbours=2)
    loss, inputs = found.terms["ogen"], batch()
    state = loss.noise.get_state()
    found.progress = Progress(epochs=5)
    weighted = found(**inputs).terms
    loss.noise.set_state(state)
    output = found.eval()(**inputs)
    bare = loss(output, found.reference.of_batch(found, output, inputs))
    factors = {"generation_base": 3.0, "generation_reverse": 3.0, "base_as_unknown": 0.5, "reverse": 0.35, "new": 0.55}
    assert bare.keys() == factors.keys()
    for name, factor in factors.items():
        assert weighted[f"ogen_{name}"].item() == pytest.approx(factor * bare[name].item(), rel=1e-6)


def test_new_classes_are_told_apart_by_the_generated_features():
    found = task()
    loss, inputs = found.terms["ogen"], batch()
    output = found.eval()(**inputs)
    parts = loss(output, found.reference.of_batch(found, output, inputs))
    new = class_embeddings(found.model, found.processor, NEW)
    torch.testing.assert_close(loss.encode_new_prompts(found), new, rtol=0, atol=1e-6)
    classes, labels, images = output.class_embeds, inputs["labels"], output.image_embeds
    nearest = (classes @ new.T).sort(dim=1, descending=True).indices[:, :3][labels]  # (batch, 3)
    made = loss.generator(new[nearest], classes[labels][:, None], images[:, None])
    logits = found.model.get_base_model().logit_scale.exp() * made @ new.T
    expected = F.cross_entropy(logits.flatten(0, 1), nearest.flatten())
    assert parts["new"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_teacher_is_the_model_with_averaged_tensors():
    found = task()
    epochs(found, range(4))
    loss, own = found.terms["ogen"], {name: t.detach().clone() for name, t in found.named_parameters()}
    average = loss.history.average(3, 4)
    expected = copy.deepcopy(found)
    with torch.no_grad():
        for name, tensor in expected.named_parameters():
            if tensor.requires_grad:
                tensor.copy_(average[name])
        expected.eval()
        classes, new = expected.encode_prompts(), loss.encode_new_prompts(expected)
    loss.set_teacher(found, average)
    assert torch.equal(loss.teacher.class_embeds, classes) and torch.equal(loss.teacher.new_embeds, new)
    for name, tensor in loss.teacher.generator.named_parameters():
        assert torch.equal(tensor, average[f"terms.ogen.generator.{name}"]) and not tensor.requires_grad
    assert found.training and all(torch.equal(t, own[name]) for name, t in found.named_parameters())


@pytest.mark.parametrize("noise", ["batch", "sample"])
def test_a_state_from_a_file_goes_on_as_if_nothing_had_happened(tmp_path, noise):
    whole, resumed = task(noise=noise, largest_window=3), task(noise=noise, largest_window=3, seed=1)
    epochs(whole, range(4))
    save_terms(whole.terms, tmp_path)
    resumed.model.load_state_dict(whole.model.state_dict())
    load_terms(resumed.terms, tmp_path)
    assert len(resumed.terms["ogen"].history) == 3
    assert epochs(resumed, [3, 4]) == epochs(whole, [3, 4])
    assert len(resumed.terms["ogen"].history) == 3  # the epoch in whose middle it was resumed is not kept again


def test_another_training_starts_without_the_epochs_of_the_first():
    found = task()
    epochs(found, range(3))
    found.terms["ogen"].start(found, lambda: iter([batch(16)]))
    assert len(found.terms["ogen"].history) == 0 and found.terms["ogen"].teacher is None
    assert set(epochs(found, [0])[0]) == PARTS


def test_a_loss_given_to_a_task_is_copied_and_the_global_random_state_left():
    loss, found = OGENLoss(OGENConfig(NEW)), ZeroShotClassifier(text_lora(), tiny_processor("clip"), KNOWN)
    state = torch.get_rng_state()
    add_terms(found, {"ogen": loss})
    assert torch.equal(state, torch.get_rng_state())
    assert not list(loss.parameters()) and list(found.terms["ogen"].parameters())


def test_bad_tasks_are_refused():
    with pytest.raises(ConfigError, match="vision tower must stay as it is.*towers='text'"):
        task(tiny_lora(tiny_model("clip")))
    with pytest.raises(ConfigError, match="OGEN trains the text tower.*'frozen'"):
        task(settings={"head": "frozen"})
    for other in ({"cls": FLYP}, {"settings": {"classes_per_step": 3}}):
        with pytest.raises(ConfigError, match="OGEN compares images with all classes"):
            task(**other)
    with pytest.raises(ConfigError, match="no prototypes"):
        task(started=False)(**batch())
    with pytest.raises(DataError, match="too few known classes.*got 3; allowed at least 4"):
        task(known=KNOWN[:3])
    with pytest.raises(DataError, match="among the known ones.*'cat'"):
        task(known=[*KNOWN, "cat"])
