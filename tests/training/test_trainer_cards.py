# SPDX-License-Identifier: Apache-2.0
"""What the cards of a trainer show of its evaluations, without being told."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

from hf_robust import SAFTConfig, WiSEFTCallback
from tests.tiny_models import image_dataset, tiny_model
from tests.trainers import METHODS, NAMES, OTHER_NAMES, build
from tests.training.test_identities_trainer import of as identities
from tests.training.test_identities_trainer import people
from tests.training.test_pairs_trainer import captioned, pairs
from tests.training.test_several_labels_trainer import labelled
from tests.training.test_several_labels_trainer import settings as several
from tests.training.test_trainer_data import spoiled


def table(folder, number=0):
    """The rows of a table of the card, by the name of the set, as cells by their heads."""
    lines = ModelCard.load(folder / "README.md").text.replace("\\", "").splitlines()
    tables = [index for index, line in enumerate(lines) if line.startswith("| set ")]
    if len(tables) <= number:
        return {}
    rows = []
    for line in lines[tables[number] :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def percents(metrics, name):
    return f"{100 * metrics[name]:.1f}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own LN tuning
def test_evaluate_train_evaluate_save(tmp_path, method):
    trainer = build(tmp_path, method, eval_dataset=image_dataset(7, NAMES, seed=50))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    (row,) = [table(tmp_path)["evaluation"]]
    assert row[""] == "ID" and row["images"] == "7" and before != after
    assert row["zero-shot"].split(" (")[0] == percents(before, "eval_accuracy")
    assert row["fine-tuned"].split(" (")[0] == percents(after, "eval_accuracy")
    result = ModelCard.load(tmp_path / "README.md").data.eval_results[0]
    assert (result.dataset_name, result.metric_value) == ("evaluation", round(after["eval_accuracy"], 4))


def test_sets_that_were_given_to_evaluate_alone_are_shown_by_their_names(tmp_path):
    trainer = build(tmp_path, eval_dataset=None)
    sets = {"id": image_dataset(7, NAMES, seed=50), "pets": image_dataset(9, OTHER_NAMES, seed=90)}
    hidden = {"validation": image_dataset(6, NAMES, seed=70), "train": image_dataset(18, NAMES)}
    trainer.evaluate(sets | hidden)
    trainer.train()
    trainer.evaluate(sets | hidden)
    trainer.evaluate(image_dataset(18, NAMES))  # without a name: may be the training set
    trainer.evaluate(image_dataset(5, NAMES, seed=3), metric_key_prefix="test")
    trainer.save_model()
    found = table(tmp_path)
    assert [*found] == ["id", "test", "pets", "forgetting"] and found["test"][""] == "ID"
    assert found["pets"][""] == "other task" and found["test"]["zero-shot"] == "–"


def test_alpha_of_a_sweep_and_what_was_evaluated_beside_it(tmp_path):
    sets = {"validation": image_dataset(7, NAMES, seed=70), "id": image_dataset(7, NAMES, seed=50)}
    sketches = image_dataset(7, NAMES, seed=60)
    trainer = build(tmp_path, eval_dataset=sets)
    before = trainer.evaluate({"sketch": sketches})
    trainer.train()
    sweep = trainer.wise_ft_sweep(alphas=[0.0, 0.5, 1.0])
    after = trainer.evaluate({"sketch": sketches})
    trainer.save_model()
    found, chosen = table(tmp_path), f"chosen (α = {sweep.best_alpha:g})"
    shown = [cell.split(" (")[0] for cell in found["id"].values()][2:]
    best = next(row for row in sweep.rows if row["alpha"] == sweep.best_alpha)
    assert shown == [percents(row, "id_accuracy") for row in (sweep.rows[0], sweep.rows[2], best)]
    assert found["sketch"]["zero-shot (α = 0)"].startswith(percents(before, "eval_sketch_accuracy"))
    assert found["sketch"]["fine-tuned (α = 1)"] == "–"
    assert found["sketch"][chosen].startswith(percents(after, "eval_sketch_accuracy"))


def test_a_callback_of_wise_ft_says_its_alpha(tmp_path):
    how = {"eval_strategy": "steps", "eval_steps": 5, "max_steps": 10, "callbacks": [WiSEFTCallback(0.5)]}
    trainer = build(tmp_path, **how)
    trainer.evaluate()
    trainer.train()
    assert trainer.card_results().chosen_alpha == 0.5
    tuned = trainer.card_results().sets[0].accuracies
    after = trainer.evaluate()
    assert "chosen alpha" not in tuned and tuned["fine-tuned"]  # found in training, at α = 1
    chosen = trainer.card_results().sets[0].accuracies["chosen alpha"]
    assert chosen.value == after["eval_id_accuracy"] and trainer.card_results().saved == "chosen alpha"


@pytest.mark.parametrize(
    ("make", "name", "primary", "others"),
    [
        (lambda folder: pairs(folder, eval_dataset={"id": captioned(6, 50)}), "id", "recall@1", "text→image recall@5"),
        (lambda folder: build(folder, **several()), "new", "mAP_macro", "mAP micro"),
        (identities, "others", "mAP@R", "recall@1"),
        (lambda f: identities(f, eval_dataset=people(12, ["bob", "eve"], 5)), "evaluation", "mAP@R", "roc auc"),
    ],
)
def test_other_tasks_show_their_own_measures(tmp_path, make, name, primary, others):
    trainer = make(tmp_path)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    prefix = "eval" if name == "evaluation" else f"eval_{name}"
    row, more = table(tmp_path)[name], table(tmp_path, number=1)[name]
    columns = [percents(metrics, f"{prefix}_{primary}") for metrics in (before, after)]
    assert [row["zero-shot"], row["fine-tuned"]] == columns
    measure = others.replace("→", "_to_").replace(" ", "_")
    assert more[f"`{others}`"] == " → ".join(percents(metrics, f"{prefix}_{measure}") for metrics in (before, after))
    assert "`loss`" not in more and f"{primary} in %" in (tmp_path / "README.md").read_text()
    if primary == "recall@1":
        assert more["`text→image median rank`"].split(" → ")[1] == f"{after['eval_id_text_to_image_median_rank']:g}"


def test_identities_are_never_another_task(tmp_path):
    trainer = identities(tmp_path)
    trainer.evaluate()
    assert trainer.found.sets["others"].role == "ood"


def test_an_adapter_that_was_trained_before_is_not_zero_shot(tmp_path):
    first = get_peft_model(tiny_model("clip"), LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    first.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_model("clip"), tmp_path / "adapter", is_trainable=True)
    trainer = build(tmp_path, model=again)
    trainer.evaluate()
    assert trainer.card_results().columns == ["fine-tuned"]
    trainer.train()
    assert trainer.card_results() is None  # that model is no more
    trainer.evaluate()
    assert trainer.card_results().columns == ["fine-tuned"]


def test_evaluations_in_training_are_those_of_its_checkpoints(tmp_path):
    how = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 5}
    trainer = build(tmp_path, "saft", **how, save_strategy="steps", save_steps=2)
    trainer.train()
    shown = table(tmp_path / "checkpoint-4")["id"]
    found = [row["eval_id_accuracy"] for row in trainer.state.log_history if "eval_id_accuracy" in row]
    assert len(found) == 4  # after 0, 2, 4 and 5 steps
    shares = [shown[column].split(" (")[0] for column in ("zero-shot", "fine-tuned")]
    assert shares == [f"{100 * found[0]:.1f}", f"{100 * found[2]:.1f}"]
    trainer.save_model()
    assert table(tmp_path)["id"]["fine-tuned"].startswith(f"{100 * found[3]:.1f}")


def test_the_best_checkpoint_has_not_the_results_of_the_last(tmp_path):
    how = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    how |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_id_accuracy", "learning_rate": 1e-7}
    trainer = build(tmp_path, **how)
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.card_results() is None
    trainer.evaluate()
    trainer.save_model()
    assert table(tmp_path)["id"] and "was chosen on the set id," in (tmp_path / "README.md").read_text()


def test_training_on_and_models_made_anew(tmp_path):
    trainer = build(tmp_path, model_init=lambda: METHODS["saft"](tiny_model("clip")))
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert trainer.card_results().columns == ["zero-shot", "fine-tuned"]
    trainer.train()
    assert trainer.card_results() is None
    trainer.evaluate()
    assert trainer.card_results().columns == ["zero-shot", "fine-tuned"]


def test_radii_make_another_model(tmp_path):
    sets = {"validation": image_dataset(7, NAMES, seed=70), "id": image_dataset(7, NAMES, seed=50)}
    trainer = build(tmp_path, eval_dataset=sets)
    trainer.train()
    trainer.evaluate()
    trainer.tpgm_sweep(steps=1)
    assert trainer.card_results() is None


def test_a_resumed_run_that_has_nothing_left_to_do_is_trained(tmp_path):
    build(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = build(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    trainer.evaluate()
    assert trainer.card_results().columns == ["fine-tuned"]


def test_a_head_that_was_trained_first_is_not_zero_shot(tmp_path):
    head = {"head": "trainable", "head_first_epochs": 2, "head_first_learning_rate": 1e-2}
    trainer = build(tmp_path, **head, eval_on_start=True, eval_strategy="no", max_steps=1)
    trainer.train()
    assert "zero-shot" not in trainer.found.sets["id"].metrics


def test_two_sets_of_one_name_are_not_compared(tmp_path):
    trainer = build(tmp_path)
    trainer.evaluate({"id": image_dataset(7, NAMES, seed=50)})
    trainer.train()
    trainer.evaluate({"id": image_dataset(8, NAMES, seed=50)})
    (only,) = trainer.card_results().sets
    assert only.images == 8 and [*only.accuracies] == ["fine-tuned"]


@pytest.mark.parametrize("value", [75.0, float("nan")])
def test_measures_of_ones_own_that_are_no_fractions_are_not_shown(tmp_path, value):
    trainer = build(tmp_path, compute_metrics=lambda prediction: {"accuracy": value})
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    assert table(tmp_path) == {}


def test_what_was_left_out_is_counted_and_listed_without_paths(tmp_path):
    sets = {"id": spoiled(7, [3], seed=50), "good": image_dataset(7, NAMES, seed=50)}
    trainer = build(tmp_path, train_dataset=spoiled(18, [2, 11]), eval_dataset=sets, on_bad_image="skip")
    trainer.model.model.name_or_path = "unknown"
    trainer.evaluate()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text().replace("\\", "")
    assert "- Left out: 2 of 18 images of the training set: row 2, image cannot be opened; row 11, image" in text
    assert "- Left out: 1 of 7 images of the set id: row 3, image cannot be opened\n" in text
    assert text.count("Left out") == 2 and "11.png" not in text


def test_export_shira_is_offered_in_the_log_and_on_the_card(tmp_path, caplog):
    for where, offered in (({"target_modules": ["q_proj"], "exclude_modules": ["bias"]}, True), ({}, False)):
        caplog.clear()
        model = get_peft_model(tiny_model("clip"), SAFTConfig(density=0.01, **where))
        trainer = build(tmp_path, model=model, max_steps=1)
        with caplog.at_level("INFO", "hf_robust"):
            trainer.train()
        trainer.save_model()
        assert ("export_shira" in caplog.text) == offered == ("export_shira" in (tmp_path / "README.md").read_text())


def test_several_labels_of_a_plain_set(tmp_path):
    trainer = build(tmp_path, **several(eval_dataset=labelled(6, seed=50)))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    assert table(tmp_path)["evaluation"][""] == "ID"
