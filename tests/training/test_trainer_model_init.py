# SPDX-License-Identifier: Apache-2.0
"""RobustTrainer with a function that makes models, and searches over settings with it."""

from __future__ import annotations

import sys

import optuna
import pytest
import torch

from hf_robust import WiSEFTCallback, wise_ft
from hf_robust.errors import ConfigError
from hf_robust.ogen import OGENConfig, OGENLoss
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.training.trainer import RobustTrainer
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import METHODS, NAMES, OTHER_NAMES, build, entries, same, weights

# PEFT's own LN tuning warns about every LayerNorm
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
VALIDATION = image_dataset(12, NAMES, seed=70)


optuna.logging.set_verbosity(optuna.logging.ERROR)


def lora():
    return METHODS["lora"](tiny_model("clip"))


def classifier():
    return ZeroShotClassifier(METHODS["saft"](tiny_model("clip")), tiny_processor("clip"), NAMES, head="trainable")


# --- model_init ---


@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_of_a_model_and_starts_anew_every_time(tmp_path, method):
    made = build(tmp_path, model_init=lambda: METHODS[method](tiny_model("clip")))
    start = weights(made)
    made.train()
    first, selected = weights(made), entries(made)
    assert not same(first, start)
    made.train()
    assert same(weights(made), first) and same(entries(made), selected)
    if method != "lora":  # whose first weights come from another state of the generator
        given = build(tmp_path, method)
        given.train()
        assert same(weights(given), first) and same(entries(given), selected)


def test_a_classifier_may_be_made(tmp_path):
    made = build(tmp_path, model_init=classifier)
    made.train()
    alone = build(tmp_path, model=classifier())
    alone.train()
    assert made.model.head == "trainable" and entries(made) and same(weights(made), weights(alone))


def test_the_function_may_take_the_trial(tmp_path):
    made = build(tmp_path, model_init=lambda trial: lora() if trial is None else pytest.fail("no search"))
    made.train()


def test_a_model_or_a_function(tmp_path):
    for settings, got in (({"model": tiny_model("clip"), "model_init": lora}, "both"), ({"model": None}, "neither")):
        with pytest.raises(ConfigError, match=f"model, or a function.*{got}"):
            RobustTrainer(**settings, processing_class=tiny_processor("clip"))


def test_theta0_is_taken_anew(tmp_path):
    """As model_init may return another model every time."""
    seeds = iter(range(10))
    made = build(
        tmp_path,
        model_init=lambda: tiny_model("clip", seed=next(seeds)),
        **{"losses": {"similarity": {}}, "cache_reference_embeddings": True, "callbacks": [WiSEFTCallback(1.0)]},
        **{"logging_strategy": "steps", "logging_steps": 1},
    )
    for seed in (1, 2):
        made.train()
        first = [entry for entry in made.state.log_history if "loss" in entry][0]
        assert first["loss_similarity_vision"] < 1e-6  # the embeddings of the model before are far away
        callback = next(one for one in made.callback_handler.callbacks if isinstance(one, WiSEFTCallback))
        assert callback.zero_shot is made.zero_shot
        wise_ft(made.model, 0, made.zero_shot)
        for name, parameter in tiny_model("clip", seed=seed).named_parameters():
            assert torch.equal(made.model.model.get_parameter(name), parameter), name


def test_ogen_is_built_around_every_model(tmp_path):
    def model():
        made = tiny_model("clip")
        made.vision_model.requires_grad_(False)
        made.visual_projection.requires_grad_(False)
        return made

    made = build(
        tmp_path, model_init=model, losses=[OGENLoss(OGENConfig(OTHER_NAMES, neighbours=2, heads=2))], max_steps=2
    )
    made.train()
    first = weights(made)
    assert any("generator" in name for name in first)
    made.train()
    assert same(weights(made), first)


def test_an_interrupted_training_is_resumed(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "model_init": lambda: METHODS["saft"](tiny_model("clip"))}
    whole = build(tmp_path, **settings)
    whole.train()
    resumed = build(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(resumed)) and same(entries(whole), entries(resumed))


# --- searches ---


def searched(folder, model_init, space=None, **settings):
    found = []

    class Recorded(RobustTrainer):
        def keep_start(self):
            super().keep_start()
            if self.sweep is not None or entries(self):
                pytest.fail("something is left of the trial before")
            self.start = {name: tensor.clone() for name, tensor in self.model.model.named_parameters()}

        def train(self, *args, trial=None, **kwargs):
            output = super().train(*args, trial=trial, **kwargs)
            found.append(
                {
                    "start": self.start,
                    "weights": weights(self),
                    "entries": entries(self),
                    "rate": self.args.learning_rate,
                }
            )
            return output

    settings = {"eval_dataset": VALIDATION, "max_steps": 2, **settings}
    run = build(folder, model_init=model_init, cls=Recorded, **settings)

    def rates(trial):
        return {"learning_rate": trial.suggest_categorical("learning_rate", [1e-2, 1e-3])}

    best = run.hyperparameter_search(space or rates, n_trials=2, sampler=grid())
    return run, found, best


def grid():
    return optuna.samplers.GridSampler({"learning_rate": [1e-2, 1e-3]}, seed=0)


@pytest.mark.parametrize("method", ["full", "saft", "lora"])
def test_two_trials_start_from_the_same_model(tmp_path, method):
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "losses": {"similarity": {}},
        "cache_reference_embeddings": method == "full",
    }
    before = dict(vars(build(tmp_path).args))
    run, found, best = searched(tmp_path, lambda: METHODS[method](tiny_model("clip")), **settings)
    assert same(*(one["start"] for one in found)) and sorted(one["rate"] for one in found) == [1e-3, 1e-2]
    for one in found:  # each is what a trainer of its own gives
        alone = build(
            tmp_path / "alone",
            model_init=lambda: METHODS[method](tiny_model("clip")),
            **{"eval_dataset": VALIDATION, "max_steps": 2, "learning_rate": one["rate"], **settings},
        )
        alone.train()
        assert same(one["weights"], weights(alone)) and same(one["entries"], entries(alone))
        if one["rate"] == best.hyperparameters["learning_rate"]:
            assert best.objective == alone.evaluate()["eval_loss"]
    assert {path.parent.name for path in tmp_path.glob("run-*/checkpoint-2")} == {"run-0", "run-1"}
    assert not list(tmp_path.glob("checkpoint-*"))
    assert run.args.learning_rate == before["learning_rate"] and run.sweep is None  # as before the search
    assert run.evaluate()["eval_loss"] == build(tmp_path, method, eval_dataset=VALIDATION).evaluate()["eval_loss"]


def test_settings_of_the_classifier_hold_in_their_own_trial(tmp_path):
    heads = []

    class Head(RobustTrainer):
        def train(self, *args, **kwargs):
            output = super().train(*args, **kwargs)
            heads.append((self.model.head, self.args.head, self.task_loss.label_smoothing, self.args.warmup_steps))
            return output

    def space(trial):
        head = trial.suggest_categorical("learning_rate", [1e-2, 1e-3])
        return {"head": "frozen", "label_smoothing_factor": 0.1, "warmup_steps": 0.5} if head == 1e-2 else {}

    run = build(tmp_path, model_init=lora, cls=Head, eval_dataset=VALIDATION, max_steps=1)
    run.hyperparameter_search(space, n_trials=2, sampler=grid())
    assert sorted(heads) == [("frozen", "frozen", 0.1, 0.5), ("live", "live", 0.0, 0)]
    assert run.model.head == run.args.head == "live"


def test_the_objective_is_the_loss_on_validation_data(tmp_path):
    sets = {"validation": VALIDATION, "ood": image_dataset(9, OTHER_NAMES)}
    run, found, best = searched(tmp_path, lora, eval_dataset=sets)
    alone = build(tmp_path, model_init=lora, max_steps=2, eval_dataset=VALIDATION, **best.hyperparameters)
    alone.train()
    assert best.objective == alone.evaluate()["eval_loss"]
    with pytest.raises(ConfigError, match="chosen on validation data.*'ood'.*compute_objective"):
        build(tmp_path, model_init=lora, eval_dataset={"ood": VALIDATION}).hyperparameter_search()
    given = build(tmp_path, model_init=lora, eval_dataset={"ood": VALIDATION}, max_steps=1)
    best = given.hyperparameter_search(
        lambda trial: {}, lambda metrics: metrics["eval_ood_accuracy"], n_trials=1, direction="maximize"
    )
    assert 0 <= best.objective <= 1


def test_a_trial_that_fails_leaves_the_trainer_as_it_was(tmp_path):
    run = build(tmp_path, model_init=lora, eval_dataset=VALIDATION, max_steps=1)
    for space, message in [
        (lambda trial: {"image_size": 64}, "processor is made once.*image_size"),
        (lambda trial: {"learning_rat": 1.0}, "no such argument.*learning_rat'.*Did you mean 'learning_rate'"),
        (lambda trial: {"learning_rate": 1.0, "torch_compile": True}, "compiled model.*torch_compile"),
        (lambda trial: {"losses": {"similarity": {"weight": -1.0}}}, "weight.*got -1.0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run.hyperparameter_search(space, n_trials=1)
    assert run.args.learning_rate == 1e-2 and not run.args.torch_compile and run.hp_search_backend is None
    run.train()
    alone = build(tmp_path, model_init=lora, max_steps=1)
    alone.train()
    assert same(weights(run), weights(alone))


def test_a_search_without_optuna_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"'optuna' is not installed. pip install 'hf_robust\[search\]'"):
        build(tmp_path, model_init=lora).hyperparameter_search()


def test_searches_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="new model.*model_init"):
        build(tmp_path, "lora").hyperparameter_search()
    with pytest.raises(ConfigError, match="backend.*'ray'.*'optuna'"):
        build(tmp_path, model_init=lora).hyperparameter_search(backend="ray")
    with pytest.raises(ConfigError, match="model_init makes several.*optimizers.*optimizer_cls_and_kwargs"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        build(tmp_path, model_init=lora, optimizers=(optimizer, None))
