# SPDX-License-Identifier: Apache-2.0
"""Terms of a user's own, about ten lines each, and what they cost of θ₀: nothing twice."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from hf_robust.data.collator import REFERENCE_EMBEDS
from hf_robust.encoders.dual_encoder import image_embeds, logit_scale, text_embeds, tokenize
from hf_robust.errors import ConfigError
from hf_robust.interpolation.linear import adapter_tensors
from hf_robust.losses import Moved, SimilarityLoss, Term, add_terms
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.tasks.task import Progress
from tests.tiny_models import recompute_activations, tiny_batch, tiny_lora, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]
LAYERS = ["vision_model.pre_layrnorm", "vision_model.encoder.layers.0", "vision_model.encoder.layers.1"]


class Drift(Term):
    name, needs = "drift", ("image_embeds",)

    def forward(self, outputs, reference):
        return (outputs.image_embeds - reference.image_embeds).square().sum(dim=-1).mean()


class Lipsum(Term):
    """As Lipsum-FT: embeddings of images may not move along those of random texts."""

    name, needs = "lipsum", ("image_embeds", "text_embeds")

    def forward(self, outputs, reference):
        generator = reference.task.progress.generator("lipsum")
        ids = torch.randint(2, 500, (5, 6), generator=generator)
        ids[:, 0], ids[:, -1] = 0, 1
        texts = reference.text_embeds({"input_ids": ids})
        moved = (outputs.image_embeds - reference.image_embeds) @ texts.T
        return (logit_scale(reference.task.model) * moved).square().mean() / 2


class HiddenStates(Term):
    """As LDIFS: hidden states may not move, each channel normalised over tokens."""

    name, layers = "hidden_states", tuple(LAYERS)

    def forward(self, outputs, reference):
        tuned, start = reference.tuned_hidden_states, reference.hidden_states
        distances = [F.normalize(tuned[one], dim=1) - F.normalize(start[one], dim=1) for one in self.layers]
        return torch.stack([distance.square().mean() for distance in distances]).mean()


class Context(Term):
    """As CAR-FT: what prompts without class say of an image stays."""

    name, needs = "context", ("image_embeds", "text_embeds")

    def start(self, task, batches):
        texts = task.reference.text_embeds(["a photo.", "a drawing.", "a toy."])
        self.register_buffer("contexts", texts, persistent=False)

    def forward(self, outputs, reference):
        scale = logit_scale(reference.task.model).detach()
        start, tuned = (scale * x @ self.contexts.T for x in (reference.image_embeds, outputs.image_embeds))
        return F.kl_div(tuned.log_softmax(-1), start.softmax(-1), reduction="batchmean")


class StartingPoint(Term):
    """As L2-SP."""

    name, needs = "starting_point", ("weights",)

    def forward(self, outputs, reference):
        return torch.stack([(tuned - start).square().sum() for tuned, start in reference.weights.values()]).sum()


class Surroundings(Term):
    """As StarFT: the texts are of the tuned tower too, the weight goes by epochs."""

    name, needs = "surroundings", ("image_embeds", "text_embeds")

    def weight_at(self, progress):
        return self.weight * (1 - (progress.epoch + 1) / progress.epochs)

    def forward(self, outputs, reference):
        task, texts = reference.task, [f"a {name} in snow." for name in NAMES]
        tuned = outputs.image_embeds @ text_embeds(task.model, **tokenize(task.processor, texts, task.model)).T
        start = reference.image_embeds @ reference.text_embeds(texts).T
        return F.kl_div(tuned.log_softmax(-1), start.softmax(-1), reduction="batchmean")


OWN = [Drift, Lipsum, HiddenStates, Context, StartingPoint, Surroundings]


def starts(task):
    if isinstance(task.model, type(tiny_model("clip"))):
        before = dict(tiny_model("clip").named_parameters())
        return {name: Moved(tensor, before[name].detach()) for name, tensor in task.model.named_parameters()}
    return {tensor.name: Moved(tensor.parameter, tensor.start) for tensor in adapter_tensors(task.model)}


def task_with(*terms, model=None, cached=False, head="live"):
    task = ZeroShotClassifier(model or tiny_model("clip"), tiny_processor("clip"), NAMES, head=head)
    add_terms(task, {term.name: term for term in terms}, cached, starts)
    for term in task.terms.values():
        term.start(task, lambda: iter(()))
    return task.train()


def batch(n=4):
    return {**tiny_batch("clip", n), "labels": torch.arange(n) % len(NAMES)}


def trained(task, steps=2):
    """The task after some steps, and the terms of each step."""
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=2e-3)
    found = []
    for step in range(steps):
        task.progress = Progress(step, steps, epoch=0, epochs=2, seed=7)
        optimizer.zero_grad()
        output = task(**batch())
        torch.stack([output.loss, *output.terms.values()]).sum().backward()
        found.append({name: term.item() for name, term in output.terms.items()})
        optimizer.step()
    return found


@pytest.mark.parametrize("kind", ["whole", "lora"])
@pytest.mark.parametrize("cls", OWN)
def test_a_term_of_ten_lines_is_zero_at_the_start_and_pulls_back(cls, kind):
    def run(weight):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # LoRA's first weights
            model = tiny_model("clip") if kind == "whole" else tiny_lora(tiny_model("clip"))
        first, *_, last = trained(task_with(cls(weight=weight), model=model), steps=6)
        assert list(first) == [cls.name] and abs(first[cls.name]) < 1e-5 * weight
        return last[cls.name] / weight

    free, held = run(1e-6), run(1e4)
    assert 0 < held < 0.7 * free


def test_what_several_terms_ask_of_theta0_is_computed_once():
    task = task_with(*(cls() for cls in OWN), SimilarityLoss(towers="both"))
    reference, calls = task.reference, {"vision": 0, "text": 0, "tuned": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    reference.vision.vision_model.register_forward_hook(count("vision"))
    reference.text.text_model.register_forward_hook(count("text"))
    task.model.vision_model.register_forward_hook(count("tuned"))
    output = task(**batch())
    assert calls == {"vision": 1, "text": 2, "tuned": 1}  # texts: random ones, and those of the surroundings
    assert set(output.terms) == {cls.name for cls in OWN} | {"similarity_vision", "similarity_text"}
    task.eval()(**batch())
    assert calls["vision"] == 1


@pytest.mark.parametrize(
    ("cls", "kept"), [(Drift, (True, False)), (Lipsum, (True, True)), (StartingPoint, (False,) * 2)]
)
def test_only_what_is_needed_is_kept(cls, kept):
    task = task_with(cls())
    assert (task.reference.vision is not None, task.reference.text is not None) == kept
    adapted = task_with(cls(), model=tiny_lora(tiny_model("clip"))).reference
    assert {adapted.vision, adapted.text} <= {None, *([] if adapted.vision is None else [adapted.vision])}
    assert not any("reference" in name for name in task.state_dict())
    assert copy.deepcopy(task).reference is task.reference


def test_cached_embeddings_serve_every_term():
    live, cached = task_with(Drift(), SimilarityLoss()), task_with(Drift(), SimilarityLoss(), cached=True)
    embeds = image_embeds(tiny_model("clip"), batch()["pixel_values"]).detach() + 0.1
    found = cached(**batch(), **{REFERENCE_EMBEDS: embeds}).terms
    assert cached.reference.vision is None
    assert found["drift"].item() == pytest.approx(0.01 * embeds.shape[1], rel=1e-3) and found["similarity_vision"] > 0
    assert all(value == 0 for value in live(**batch()).terms.values())


def test_hidden_states_are_those_of_the_layers():
    task = task_with(HiddenStates())
    with torch.no_grad():
        for parameter in task.model.vision_model.parameters():
            parameter.add_(0.05)
    seen = []
    task.terms["hidden_states"].forward = lambda outputs, reference: seen.append(reference) or torch.zeros(())
    task(**batch())
    (reference,) = seen
    for model, found in ((tiny_model("clip"), reference.hidden_states), (task.model, reference.tuned_hidden_states)):
        whole = model.vision_model(batch()["pixel_values"], output_hidden_states=True).hidden_states
        for layer, expected in zip(LAYERS, whole, strict=True):
            torch.testing.assert_close(found[layer], expected, rtol=0, atol=1e-6)
    assert not any(state.requires_grad for state in reference.hidden_states.values())
    assert all(state.requires_grad for state in reference.tuned_hidden_states.values())


def test_a_model_is_watched_as_long_as_someone_looks():
    task = task_with(HiddenStates())
    layer = task.model.get_submodule(LAYERS[1])
    assert len(layer._forward_hooks) == 1
    task.reference = None
    assert not layer._forward_hooks


def test_hidden_states_have_gradients_where_activations_are_recomputed():
    inside = "vision_model.encoder.layers.1.mlp"  # of a layer that is run again in the backward
    cls = type("Inside", (HiddenStates,), {"layers": (*LAYERS, inside)})
    plain, recomputed = task_with(cls(10.0)), task_with(cls(10.0))
    recompute_activations(recomputed.model, {"use_reentrant": False})
    trained(plain), trained(recomputed)
    for (name, one), other in zip(plain.model.named_parameters(), recomputed.model.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=name)
    reentrant = task_with(cls())
    recompute_activations(reentrant.model, {"use_reentrant": True})
    with pytest.raises(ConfigError, match="ran without gradient.*layers.1.*use_reentrant"):
        trained(reentrant)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [2, 2, 2, 2]), ("linear", [2, 1.5, 1, 0]), ("cosine", [2, 1 + math.sqrt(0.5), 1, 0])],
)
def test_weight_over_time(schedule, expected):
    term = Drift(weight=2, schedule=schedule)
    found = [term.weight_at(Progress(step=step, steps=4)) for step in (0, 1, 2, 4)]
    assert found == pytest.approx(expected, abs=1e-15)


# --- what is refused ---


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, True, "1", None])
def test_bad_weight_is_refused(weight):
    with pytest.raises(ConfigError, match="weight is out of range.*losses"):
        Drift(weight=weight)


def a_drift(forward=lambda outputs, reference: reference.image_embeds.sum(), **attributes):
    """A subclass of `Drift` with other attributes."""
    return type("Other", (Drift,), {"forward": lambda self, *args: forward(*args), **attributes})()


REFUSED = {
    "unknown need": (lambda: a_drift(needs=("logits",)), "unknown need of drift.*'logits'.*'image_embeds'"),
    "unknown layer": (lambda: a_drift(layers=("vision_model.encoder.layer.1",)), "no such layer.*layers.1"),
    "text layer": (lambda: a_drift(layers=("text_model.encoder.layers.1",)), "no such layer in the vision tower"),
    "not named": (lambda: a_drift(needs=()), "did not say it needs.*'image_embeds'"),
    "not 0-dim": (lambda: a_drift(lambda outputs, reference: outputs.image_embeds), "no loss.*losses, drift.*4, 24"),
    "needs in a string": (lambda: a_drift(needs="weights"), r"no tuple.*drift, needs.*got 'weights'.*\('weights',\)"),
    "layers in a string": (lambda: a_drift(layers="vision_model"), "no tuple.*drift, layers.*got 'vision_model'"),
    "no forward": (lambda: type("Idle", (Term,), {"name": "idle"})(), "no `forward`.*Idle"),
    "a part without name": (lambda: a_drift(lambda outputs, _: {0: outputs.loss}), "no loss.*a part called 0"),
    "no tensor": (lambda: a_drift(lambda outputs, reference: 1.5), "no loss.*losses, drift.*float"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_term_that_cannot_be_computed_is_one_error(name):
    term, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        task_with(term())(**batch())


def test_texts_of_a_frozen_tower_are_not_held():
    for head in ("frozen", "trainable"):
        with pytest.raises(ConfigError, match="text tower is not trained.*towers.*'both'.*head='live'"):
            task_with(SimilarityLoss(towers="both"), head=head)


@pytest.mark.parametrize("terms", [[SimilarityLoss(towers="text")], [StartingPoint()], [Drift(), HiddenStates()]])
def test_a_cache_that_spares_nothing_is_refused(terms):
    with pytest.raises(ConfigError, match="no forward.*would be spared.*cache_reference_embeddings"):
        task_with(*terms, cached=True)


def test_hidden_states_of_embedded_images_are_refused():
    embeds = image_embeds(tiny_model("clip"), batch()["pixel_values"]).detach()
    with pytest.raises(ConfigError, match="ran without gradient, or not at all.*images, not on embeddings"):
        task_with(HiddenStates())(image_embeds=embeds, labels=batch()["labels"])


def test_the_name_of_the_tasks_own_loss_is_taken():
    with pytest.raises(ConfigError, match="a name to log it by that is taken.*'cross_entropy'"):
        task_with(type("Taken", (SimilarityLoss,), {"name": "cross_entropy"})())


def parts(name, *keys):
    """A term of several parts."""
    return type(
        "Parts", (Term,), {"name": name, "forward": lambda self, outputs, _: dict.fromkeys(keys, outputs.loss)}
    )()


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([parts("cross", "entropy")], "the task's own loss, and the loss 'cross'.*'cross_entropy'"),
        ([SimilarityLoss(), a_drift(name="similarity_vision")], "'similarity', and the loss 'similarity_vision'"),
        ([parts("a", "b_c"), parts("a_b", "c")], "the loss 'a', and the loss 'a_b'.*'a_b_c'"),
    ],
)
def test_no_loss_is_dropped_for_another_of_its_name(terms, message):
    with pytest.raises(ConfigError, match=message):
        task_with(*terms)(**batch())


def test_a_name_that_pytorch_takes_is_refused():
    with pytest.raises(ConfigError, match="attribute of nn.ModuleDict.*'training'"):
        task_with(parts("training", "one"))
