# SPDX-License-Identifier: Apache-2.0
"""LP-FT: a head trained by itself on embeddings, and the training that goes on from there."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_robust import RobustTrainingArguments, wise_ft, with_image_embeds
from hf_robust.data.collator import ImageCollator
from hf_robust.errors import CheckpointError, ConfigError, NonFiniteError
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.tasks.progress import Progress
from hf_robust.tasks.task_loss import TaskLoss
from hf_robust.training import starting
from hf_robust.training.head_first import head_parameters, train_head, whole_set
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import METHODS, NAMES, build, entries, same, weights
from tests.training.test_identities_trainer import SETTINGS as IDENTITIES
from tests.training.test_identities_trainer import people
from tests.training.test_pairs_trainer import captioned
from tests.training.test_several_labels_trainer import labelled

FIRST = {"head": "trainable", "head_first_epochs": 3, "head_first_learning_rate": 0.1}
ENCODER = "model."


class AtTheStart(TrainerCallback):
    """Notes what the first step of the training finds."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.gradients = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        self.random = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        self.images, self.step = list(model.images_seen), state.global_step


def begun(folder, method="full", **settings):
    """A trainer after one step, with what that found in `start`, and its weights as it was built in `built`."""
    start = AtTheStart()
    trainer = build(folder, method, callbacks=[start], **{"max_steps": 1, **FIRST, **settings})
    trainer.built = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.images_seen = []
    vision = next(module for name, module in trainer.model.named_modules() if name.endswith("vision_model"))
    vision.register_forward_hook(lambda _, __, output: trainer.model.images_seen.append(len(output[0])))
    trainer.train()
    trainer.start = start
    return trainer


# --- what it computes ---


def arguments(folder, **settings):
    how = {"head": "trainable", "head_first_epochs": 3, "per_device_train_batch_size": 4, "use_cpu": True}
    return RobustTrainingArguments(str(folder), **{**how, "learning_rate": 0.02, **settings})


def adam(values, gradient, steps, rate, decay):
    """AdamW along half a cosine, from its formulas: `gradient(step)` of all values, of which the first decays."""
    means, squares = ([torch.zeros_like(value) for value in values] for _ in range(2))
    for step in range(steps):
        now = rate * (1 + math.cos(math.pi * step / steps)) / 2
        for i, grad in enumerate(gradient(step)):
            means[i] = 0.9 * means[i] + 0.1 * grad
            squares[i] = 0.999 * squares[i] + 0.001 * grad**2
            mean, square = means[i] / (1 - 0.9 ** (step + 1)), squares[i] / (1 - 0.999 ** (step + 1))
            values[i].data -= now * (decay if i == 0 else 0) * values[i] + now * mean / (square.sqrt() + 1e-8)
    return values


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_adamw_on_the_cross_entropy_of_embeddings(tmp_path, weighted):
    classifier = ZeroShotClassifier(tiny_model("clip").double(), tiny_processor("clip"), NAMES, head="trainable")
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    embeds = F.normalize(torch.randn(10, 24), dim=-1)
    labels = torch.arange(10) % 3
    loss = TaskLoss(torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64), 0.1) if weighted else TaskLoss()
    args = arguments(tmp_path, weight_decay=0.3, seed=3, **({"head_first_learning_rate": 0.05} if weighted else {}))
    logged = []
    train_head(
        classifier, {"image_embeds": embeds, "labels": labels}, loss, args, ["class_head.weight"], logged.append
    )

    generator = Progress(seed=3).generator("head first")
    batches = [rows for _ in range(3) for rows in torch.randperm(10, generator=generator).split(4)]
    values = [before[f"class_head.{name}"].clone().requires_grad_() for name in ("weight", "bias")]
    found = []

    def gradient(step):
        x, y = embeds.double()[batches[step]], labels[batches[step]]
        logs = F.log_softmax(x @ values[0].T + values[1], dim=-1)
        target, of_class = F.one_hot(y, 3).double(), torch.ones(3, dtype=torch.float64)
        if weighted:
            target, of_class = 0.9 * target + 0.1 / 3, loss.weights
        found.append(-(target * logs * of_class).sum(dim=-1).mean())
        return torch.autograd.grad(found[-1], values)

    adam(values, gradient, 9, 0.05 if weighted else 0.02, decay=0.3)
    assert torch.allclose(classifier.class_head.weight, values[0], rtol=1e-10, atol=1e-12)
    assert torch.allclose(classifier.class_head.bias, values[1], rtol=1e-10, atol=1e-12)
    sums = [float(loss.detach()) * len(rows) for loss, rows in zip(found, batches, strict=True)]
    means = [sum(sums[i : i + 3]) / 10 for i in (0, 3, 6)]
    assert logged == pytest.approx(means, rel=1e-10)
    assert same({n: t for n, t in classifier.state_dict().items() if n.startswith(ENCODER)}, _encoder(before))


def _encoder(state):
    return {name: tensor for name, tensor in state.items() if name.startswith(ENCODER)}


def test_the_users_loss_is_minimised_and_a_bad_one_stops_it(tmp_path):
    seen = []

    def margin(outputs, labels, num_items_in_batch):
        seen.append((len(labels), int(num_items_in_batch), outputs.terms is None))
        return F.multi_margin_loss(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = begun(tmp_path, compute_loss_func=margin, losses={"similarity": {}})
    assert seen[:15] == [(size, size, True) for size in (4, 4, 4, 4, 2)] * 3  # without terms
    assert seen[15:] == [(4, 4, False)]
    losses = [entry["head_first_loss"] for entry in trainer.state.log_history if "head_first_loss" in entry]
    assert losses[0] > losses[-1]
    broken = build(tmp_path, **FIRST, compute_loss_func=lambda outputs, *_, **how: outputs.loss * math.nan)
    before = weights(broken)
    with pytest.raises(NonFiniteError, match="loss of the head is nan.*epoch 1 of head_first_epochs"):
        broken.train()
    assert same(weights(broken), before)


def test_a_batch_is_that_of_an_optimizer_step(tmp_path):
    of_four, by_two = (
        build(tmp_path, **FIRST, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        for size in (4, 2)
    )
    for trainer in (of_four, by_two):
        trainer.begin(resumed=False)
    assert same(weights(of_four), weights(by_two))


# --- inside a training ---


@pytest.fixture(scope="module", params=["full", "saft", "lora"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        trainer = begun(folder, request.param, losses={"similarity": {}}, logging_strategy="steps", logging_steps=1)
    return trainer


def test_only_the_head_is_trained_first_and_every_image_embedded_once(trained):
    start = trained.start
    changed = [
        n for n, tensor in start.weights.items() if n in trained.built and not torch.equal(tensor, trained.built[n])
    ]
    assert [name for name in changed if "saft_" not in name] == ["class_head.weight", "class_head.bias"]
    assert start.step == 0 and not start.gradients
    selection = 18 if any("saft_" in name for name in trained.built) else 0
    assert sum(start.images) == 18 + selection


def test_its_loss_is_logged_and_terms_still_compare_with_theta0(trained):
    logged = [entry for entry in trained.state.log_history if "head_first_loss" in entry]
    assert [entry["head_first_epoch"] for entry in logged] == [1, 2, 3]
    assert [entry["step"] for entry in logged] == [0, 0, 0] and trained.state.global_step == 1
    assert logged[0]["head_first_loss"] > logged[2]["head_first_loss"]
    step = next(entry for entry in trained.state.log_history if "loss_similarity_vision" in entry)
    assert step["loss_similarity_vision"] == pytest.approx(0, abs=1e-6)
    assert step["loss_cross_entropy"] < logged[0]["head_first_loss"]


def test_wise_ft_goes_back_to_the_zero_shot_head(trained):
    tuned = weights(trained)
    wise_ft(trained.model, 0.0, trained.zero_shot)
    for name in ("class_head.weight", "class_head.bias"):
        assert torch.equal(trained.model.get_parameter(name), trained.built[name])
        assert not torch.equal(tuned[name], trained.built[name])
    images = ImageCollator(tiny_processor("clip"))(list(image_dataset(5, NAMES, seed=30)))
    zero_shot = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES, head="trainable").eval()
    with torch.no_grad():
        assert torch.equal(trained.model.eval()(**images).logits, zero_shot(**images).logits)
    wise_ft(trained.model, 1.0, trained.zero_shot)
    assert same(weights(trained), tuned)


def test_augmentation_and_what_the_training_draws_are_left_alone(tmp_path):
    def noisy(image):
        return image.rotate(random.random() * 90)

    augmented = {"data_collator": ImageCollator(tiny_processor("clip"), noisy)}
    first, plain = begun(tmp_path, **augmented), begun(tmp_path)
    without = begun(tmp_path, **augmented, head_first_epochs=0, head_first_learning_rate=None)
    assert same(first.start.weights, plain.start.weights)
    assert same(without.start.weights, without.built) and not same(first.start.weights, first.built)
    assert first.start.random == without.start.random


def test_entries_are_selected_with_the_trained_head(tmp_path):
    lp_ft, without = begun(tmp_path, "saft"), build(tmp_path, "saft", head="trainable")
    without.select_entries()
    classifier = ZeroShotClassifier(
        METHODS["saft"](tiny_model("clip")), tiny_processor("clip"), NAMES, head="trainable"
    )
    classifier.class_head.load_state_dict(
        {name: lp_ft.start.weights[f"class_head.{name}"] for name in ("weight", "bias")}
    )
    given = build(tmp_path, model=classifier)
    given.select_entries()
    assert same(entries(lp_ft), entries(given)) and not same(entries(lp_ft), entries(without))


@pytest.mark.parametrize("method", ["full", "saft"])
def test_a_resumed_run_ends_bit_identical_and_does_not_repeat_it(tmp_path, method, monkeypatch):
    settings = {**FIRST, "save_strategy": "steps", "save_steps": 3}
    whole = build(tmp_path, method, **settings)
    whole.train()
    monkeypatch.setattr(starting, "train_head", lambda *args: pytest.fail("trained again"))
    resumed = build(tmp_path, method, **settings)
    resumed.train(str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(resumed)) and same(entries(whole), entries(resumed))
    firsts = [[entry for entry in one.state.log_history if "head_first_loss" in entry] for one in (whole, resumed)]
    assert firsts[0] == firsts[1] and len(firsts[0]) == 3
    with pytest.raises(CheckpointError, match="another run.*head_first_epochs was 3, is 2"):
        build(tmp_path, method, **{**settings, "head_first_epochs": 2}).train(str(tmp_path / "checkpoint-3"))


def test_every_model_of_model_init_gets_its_own(tmp_path):
    made = build(tmp_path, model_init=lambda: tiny_model("clip"), max_steps=1, **FIRST)
    found = []
    for _ in range(2):
        made.train()
        found.append(weights(made))
    assert same(*found)
    given = build(tmp_path, max_steps=1, **FIRST)
    given.train()
    assert same(found[0], weights(given))


# --- other tasks ---


@pytest.mark.parametrize("task", ["several_labels", "identities"])
def test_other_heads_of_their_own_are_trained_too(tmp_path, task):
    sets = {"train_dataset": labelled(8), "eval_dataset": None, "task": task}
    if task == "identities":
        sets = {"train_dataset": people(), "eval_dataset": None, "head": "live", **IDENTITIES}
    trainer = begun(tmp_path, **sets)
    losses = [entry["head_first_loss"] for entry in trainer.state.log_history if "head_first_loss" in entry]
    assert losses[0] > losses[1] > losses[2]
    assert same(_encoder(trainer.start.weights), _encoder(trainer.built))
    own = {
        "several_labels": ["label_scale", "label_bias", "class_head.weight", "class_head.bias"],
        "identities": ["head.W"],
    }
    assert sorted(head_parameters(trainer.model)) == sorted(own[task])
    # the task's own start reads them once more
    assert sum(trainer.start.images) == 2 * len(sets["train_dataset"])


# --- what is refused ---


def stream():
    return IterableDataset.from_generator(
        lambda: iter(image_dataset(6, NAMES)), features=image_dataset(1, NAMES).features
    )


class Pictures(torch.utils.data.Dataset):
    """A torch dataset, of which nothing tells whether its images change."""

    rows = image_dataset(6, NAMES)
    classes, targets = NAMES, rows["label"]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]["image"], self.rows[index]["label"]


NO_HEAD, CHANGING = "no head of its own", "same every time"
REFUSED = {
    "live": ({"head": "live"}, NO_HEAD),
    "frozen": ({"head": "frozen"}, NO_HEAD),
    "labels": (
        {"head": "live", "task": "several_labels", "train_dataset": labelled(8), "eval_dataset": None},
        NO_HEAD,
    ),
    "flyp": ({"head": "live", "task": "flyp"}, NO_HEAD),
    "pairs": ({"head": "live", "train_dataset": captioned(6), "eval_dataset": None}, NO_HEAD),
    "stream": ({"train_dataset": stream, "max_steps": 2}, CHANGING),
    "torch": ({"train_dataset": Pictures}, CHANGING),
    "transform": ({"train_dataset": lambda: image_dataset(6, NAMES).with_transform(dict)}, CHANGING),
    "collator": ({"data_collator": lambda: ImageCollator(tiny_processor("clip")).__call__}, CHANGING),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_first_is_refused_before_anything_is_computed(tmp_path, case, monkeypatch):
    settings, problem = REFUSED[case]
    monkeypatch.setattr(starting, "with_image_embeds", lambda *args: pytest.fail("images are embedded"))
    made = {name: value() if callable(value) else value for name, value in settings.items()}
    trainer = build(tmp_path, **{**FIRST, **made})
    before = weights(trainer)
    with pytest.raises(ConfigError, match=f"{problem}.*head_first_epochs"):
        trainer.train()
    assert same(weights(trainer), before)


def test_embedded_images_are_refused(tmp_path):
    model = tiny_model("clip").requires_grad_(False)
    embedded = with_image_embeds(image_dataset(6, NAMES), model, tiny_processor("clip"))
    with pytest.raises(ConfigError, match="not embedded yet"):
        build(tmp_path, model=model, train_dataset=embedded, **FIRST).train()


@pytest.mark.parametrize(
    "settings",
    [
        {"head_first_epochs": -1},
        {"head_first_epochs": 1.5},
        {"head_first_epochs": True},
        {"head_first_epochs": 1, "head_first_learning_rate": 0.0},
        {"head_first_epochs": 1, "head_first_learning_rate": math.inf},
        {"head_first_epochs": 1, "head_first_learning_rate": "1e-3"},
        {"head_first_epochs": 0, "head_first_learning_rate": 1e-3},
    ],
)
def test_settings_that_are_none_are_refused(tmp_path, settings):
    with pytest.raises(ConfigError, match=[*settings][-1]):
        RobustTrainingArguments(str(tmp_path), head="trainable", **settings)


def test_batches_become_one():
    batches = [{"labels": torch.tensor([0, 1])}, {"labels": torch.tensor([2])}]
    assert whole_set(batches)["labels"].tolist() == [0, 1, 2]
