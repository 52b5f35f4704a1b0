# SPDX-License-Identifier: Apache-2.0
"""RobustTrainer with terms of a user's own: trained, logged, saved in checkpoints and resumed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_robust import RobustTrainingArguments, SimilarityLoss, Term
from hf_robust.errors import AdapterFileError, CheckpointError, ConfigError
from tests.tiny_models import tiny_model
from tests.trainers import build, same, weights

LOGGED = {"logging_strategy": "steps", "logging_steps": 1}


class Drift(Term):
    """How far embeddings moved: along directions that are learned, beside where those of the last batch moved."""

    name, needs = "drift", ("image_embeds",)

    def __init__(self, size=3, weight=2.0):
        super().__init__(weight, "linear")
        self.size, self.last, self.epochs = size, torch.zeros(24), []
        self.directions = nn.Parameter(torch.ones(size, 24))
        self.register_buffer("steps", torch.tensor(0))

    def start_epoch(self, task, progress):
        self.epochs.append(progress.epoch)

    def forward(self, outputs, reference):
        noise = torch.randn(24, generator=reference.task.progress.generator(self.name))
        moved = outputs.image_embeds - reference.image_embeds
        along = (moved - 0.1 * self.last) @ (self.directions + 0.1 * noise).T
        self.last, self.steps = moved.detach().mean(0), self.steps + 1
        return {"along": along.square().mean(), "length": moved.square().sum(-1).mean()}

    def get_extra_state(self):
        return {"last": self.last}

    def set_extra_state(self, state):
        self.last = state["last"]


class StartingPoint(Term):
    """As L2-SP."""

    name, needs = "starting_point", ("weights",)

    def forward(self, outputs, reference):
        return torch.stack([(tuned - start).square().sum() for tuned, start in reference.weights.values()]).sum()


def losses(trained):
    return [entry for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["full", "saft"])
def test_a_resumed_run_with_a_term_s_state_ends_bit_identical(tmp_path, method):
    settings = {"losses": [Drift(), SimilarityLoss(3.0)], "save_strategy": "steps", "save_steps": 3, **LOGGED}
    whole, resumed = (build(tmp_path, method, **settings) for _ in range(2))
    whole.train()
    saved = load_file(tmp_path / "checkpoint-3" / "losses.safetensors")
    assert set(saved) == {"drift.directions", "drift.steps", "drift._extra_state.last"} and saved["drift.steps"] == 3
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(resumed)) and "terms.drift.directions" in weights(whole)
    assert losses(whole)[3:] == losses(resumed)[3:]
    term = resumed.model.terms["drift"]
    assert torch.equal(term.last, whole.model.terms["drift"].last) and term.steps == 10
    assert whole.model.terms["drift"].epochs == [0, 1] and term.epochs == [0, 1]
    whole.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "losses.safetensors").exists()


def test_parts_are_logged_with_their_weights_and_add_up(tmp_path):
    drift = Drift()
    trained = build(tmp_path, losses=[drift, SimilarityLoss(3.0)], **LOGGED)
    trained.train()
    parts = {"loss_cross_entropy", "loss_drift_along", "loss_drift_length", "loss_similarity_vision"}
    for entry in losses(trained):
        assert {name for name in entry if name.startswith("loss_")} == parts
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in parts), rel=1e-5)
    assert not torch.equal(trained.model.terms["drift"].directions, drift.directions)  # a copy was trained
    assert "eval_id_loss" in trained.evaluate()


PUBLISHED = {
    "lipsum": {"prompts": 5, "tokens": 4},
    "context": {"templates": ["a {}.", "the {} at sea."]},
    "features": {},
    "weights": {},
    "spuriosity": {},
}


def test_a_resumed_run_with_all_published_terms_ends_bit_identical(tmp_path):
    settings = {"task": "flyp", "losses": PUBLISHED, "save_strategy": "steps", "save_steps": 3, **LOGGED}
    whole, resumed = (build(tmp_path, **settings) for _ in range(2))
    whole.train()
    logged = {f"loss_{name}" for name in PUBLISHED}
    for step, entry in enumerate(losses(whole)):
        found = {name: entry[name] for name in logged}
        spurious = found.pop("loss_spuriosity")  # the last batch of an epoch has one class, the last epoch no weight
        assert all((value > 0) == (step > 0) for value in found.values()) and (spurious > 0) == (0 < step < 4)
    assert not (tmp_path / "checkpoint-3" / "losses.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(resumed)) and losses(whole)[3:] == losses(resumed)[3:]


@pytest.mark.parametrize("method", ["full", "saft", "aclip", "lora"])
def test_weights_start_where_theta0_had_them(tmp_path, method):
    head = "trainable" if method == "full" else "live"
    trained = build(tmp_path, method, losses=[StartingPoint()], head=head, max_steps=3, **LOGGED)
    trained.train()
    first, *_, last = losses(trained)
    assert first["loss_starting_point"] == 0 < last["loss_starting_point"]
    found = trained.model.reference.weights(trained.model)
    if method == "full":
        before = dict(tiny_model("clip").named_parameters())
        pairs = {name.removeprefix("model."): pair for name, pair in found.items() if name.startswith("model.")}
        assert all(torch.equal(pair.start, before[name]) for name, pair in pairs.items())
        assert "class_head.weight" in found


def test_settings_in_arguments_are_those_of_terms_in_the_trainer(tmp_path):
    settings = {"similarity": {"weight": 5.0, "distance": "l2"}}
    given = '{"similarity": {"weight": 5.0, "distance": "l2"}}'
    args = RobustTrainingArguments(str(tmp_path), losses=given)
    assert args.losses == settings and json.loads(args.to_json_string())["losses"] == settings
    one, other = build(tmp_path, losses=[SimilarityLoss(5.0, "l2")]), build(tmp_path, losses=settings)
    assert repr(one.model.terms) == repr(other.model.terms)
    for bad, message in (("[1]", "no mapping"), ('{"simlarity": {}}', "Did you mean 'similarity'")):
        with pytest.raises(ConfigError, match=message):
            RobustTrainingArguments(str(tmp_path), losses=bad)


def test_another_term_is_another_run(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build(tmp_path, losses=[Drift()], **settings).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"losses.drift.weight was 2.0, is 3.0"):
        build(tmp_path, losses=[Drift(weight=3.0)], **settings).train(checkpoint)
    with pytest.raises(AdapterFileError, match="state of other losses"):
        build(tmp_path, allow_changed=["losses", "parameters"], **settings).train(checkpoint)


def test_a_term_that_does_not_keep_its_argument_is_refused(tmp_path):
    class Forgetful(Drift):
        def __init__(self, temperature=1.0):
            super().__init__()

    with pytest.raises(ConfigError, match="does not keep its argument.*Forgetful.*'temperature'.*self.temperature"):
        build(tmp_path, losses=[Forgetful()], save_strategy="epoch").train()


def test_wise_ft_leaves_terms_out(tmp_path):
    trained = build(tmp_path, losses=[Drift()], max_steps=3)
    trained.train()
    before = trained.model.terms["drift"].directions.clone()
    trained.wise_ft_sweep(trained.eval_dataset["id"], alphas=[0.0, 1.0])
    assert torch.equal(trained.model.terms["drift"].directions, before)
