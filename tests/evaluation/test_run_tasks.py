# SPDX-License-Identifier: Apache-2.0
"""evaluate_suite on sets of retrieval and of several labels."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, List
from sklearn.metrics import average_precision_score

from hf_robust import ZeroShotClassifier, class_embeddings
from hf_robust.encoders.dual_encoder import image_embeds, text_embeds, tokenize
from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.evaluation.report import SuiteReport, TaskResult
from hf_robust.evaluation.run import evaluate_suite
from hf_robust.evaluation.suite import RobustnessSuite, SuiteSet
from tests.evaluation.test_run import NAMES, counted
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

N = 13
TEXTS = [[f"{NAMES[row % 4]} {row}", f"number {row % 5}"][: 1 + row % 2] for row in range(N)]  # one or two, some equal
LABELS = [sorted({row % 4, row % 3}) for row in range(N)]


@pytest.fixture(scope="module")
def photos():
    """13 pictures with a label, texts and several labels each."""
    found = image_dataset(N, NAMES).add_column("caption", TEXTS)
    return found.add_column("kinds", LABELS, feature=List(ClassLabel(names=NAMES)))


def sets(photos):
    return [
        SuiteSet("photos", "id", photos),
        SuiteSet("captions", "other", photos, task="retrieval"),
        SuiteSet("kinds", "other", photos, label_column="kinds", task="several_labels"),
    ]


def evaluate(*sets, model=None, **settings):
    model = tiny_model("clip") if model is None else model
    return evaluate_suite(model, tiny_processor("clip"), RobustnessSuite(sets), silent=True, **settings)


@pytest.fixture(scope="module")
def report(photos):
    return evaluate(*sets(photos))


def embeds_of(model, photos):
    """Embeddings of images `(images, dim)`, of their texts `(texts, dim)` and of the classes, in float64."""
    pixel_values = tiny_processor("clip").image_processor(images=photos["image"][:], return_tensors="pt")
    tokens = tokenize(tiny_processor("clip"), [text for row in photos["caption"][:] for text in row], model)
    with torch.no_grad():
        images, texts = image_embeds(model, **pixel_values), text_embeds(model, **tokens)
    return [
        found.double().numpy() for found in (images, texts, class_embeddings(model, tiny_processor("clip"), NAMES))
    ]


# --- figures ---


def test_recalls_are_those_of_all_texts_and_all_images_of_the_set(photos, report):
    """A wrong answer as similar as the right one comes before it; equal texts are one, of several images."""
    images, texts, _ = embeds_of(tiny_model("clip"), photos)
    different = list(dict.fromkeys(text for row in TEXTS for text in row))
    flat = [text for row in TEXTS for text in row]
    similar = images @ texts[[flat.index(text) for text in different]].T  # (images, different texts)
    own = np.array([[text in row for text in different] for row in TEXTS])
    best_of_images = np.where(own, similar, -np.inf).max(axis=1, keepdims=True)
    best_of_texts = np.where(own, similar, -np.inf).max(axis=0)
    image_ranks = 1 + ((similar > best_of_images - 1e-6) & ~own).sum(axis=1)
    text_ranks = 1 + ((similar > best_of_texts - 1e-6) & ~own).sum(axis=0)
    found = report.sets["captions"].metrics
    for k in (1, 5, 10):
        assert found[f"image_to_text_recall@{k}"] == pytest.approx((image_ranks <= k).mean())
        assert found[f"text_to_image_recall@{k}"] == pytest.approx((text_ranks <= k).mean())
    assert found["image_to_text_median_rank"] == np.median(image_ranks)
    assert found["recall@1"] == (found["image_to_text_recall@1"] + found["text_to_image_recall@1"]) / 2
    assert 0 < found["image_to_text_recall@5"] < 1 and "loss" not in found


def test_average_precision_is_that_of_cosines_with_the_classes(photos, report):
    images, _, classes = embeds_of(tiny_model("clip"), photos)
    scores = images @ classes.T
    targets = np.array([[name in row for name in range(4)] for row in LABELS])
    found = report.sets["kinds"].metrics
    assert found["mAP_macro"] == pytest.approx(average_precision_score(targets, scores, average="macro"))
    assert found["mAP_micro"] == pytest.approx(average_precision_score(targets, scores, average="micro"))
    assert found["classes_without_positives"] == 0 and "f1_macro" not in found


def test_every_image_and_every_text_is_encoded_once_for_all_tasks(photos, report, monkeypatch):
    model = tiny_model("clip")
    counts = counted(model, monkeypatch)
    blurred = SuiteSet("blurred captions", "other", photos, corruption=("gaussian_blur", 3), task="retrieval")
    found = evaluate(*sets(photos), blurred, model=model)
    different = len({text for row in TEXTS for text in row})
    assert counts == {"images": 2 * N, "prompts": 4 + different}  # the classes of two sets, the texts of two
    assert found.sets["captions"].metrics == report.sets["captions"].metrics
    assert found.sets["blurred captions"].fingerprint == report.sets["captions"].fingerprint


@pytest.mark.parametrize("settings", [{"batch_size": 1, "on_bad_image": "skip"}, {"batch_size": 5, "workers": 1}])
def test_batch_size_and_workers_change_nothing(photos, report, settings):
    found = evaluate(*sets(photos), **settings)
    for name in ("captions", "kinds"):
        assert found.sets[name].metrics == pytest.approx(report.sets[name].metrics)
        assert found.sets[name].fingerprint == report.sets[name].fingerprint


def test_images_that_cannot_be_used_are_left_out_with_their_texts(photos, report):
    table = photos.with_format("arrow")[:].to_pylist()
    table[2]["image"] = {"bytes": b"no image", "path": "2.png"}
    broken = datasets.Dataset.from_list(table, features=photos.features)
    kept = [row for row in range(N) if row != 2]
    found, expected = evaluate(*sets(broken), on_bad_image="skip"), evaluate(*sets(photos.select(kept)))
    for name in ("captions", "kinds"):
        assert found.sets[name].metrics == pytest.approx(expected.sets[name].metrics)
        assert found.sets[name].rows.tolist() == kept and len(found.sets[name].skipped) == 1
        assert found.sets[name].fingerprint == expected.sets[name].fingerprint != report.sets[name].fingerprint


# --- tasks as models ---


def test_a_trained_head_answers_the_sets_of_its_task_alone(photos, report):
    class OfLabels(ZeroShotClassifier):
        """Stands for a task whose head says yes or no to every class."""

        target = "labels"

    def changed(kind):
        classifier = kind(tiny_model("clip"), tiny_processor("clip"), ["zebra", *NAMES[::-1]], head="trainable")
        with torch.no_grad():
            classifier.class_head.weight.mul_(torch.tensor([1.0, -1.0, 2.0, 0.5, -3.0])[:, None])
        return classifier

    of_labels, of_label = (evaluate(*sets(photos), model=changed(kind)) for kind in (OfLabels, ZeroShotClassifier))
    images, _, classes = embeds_of(tiny_model("clip"), photos)
    scores = images @ (classes * np.array([[-3.0], [0.5], [2.0], [-1.0]])).T
    targets = np.array([[name in row for name in range(4)] for row in LABELS])
    assert of_labels.sets["kinds"].metrics["mAP_micro"] == pytest.approx(
        average_precision_score(targets, scores, average="micro")
    )
    assert of_label.sets["kinds"].metrics == report.sets["kinds"].metrics != of_labels.sets["kinds"].metrics
    assert of_labels.sets["photos"].answers == NAMES and len(of_label.sets["photos"].answers) == 5
    assert of_labels.sets["photos"].predictions.tolist() == report.sets["photos"].predictions.tolist()
    assert of_label.sets["captions"].metrics == of_labels.sets["captions"].metrics == report.sets["captions"].metrics


# --- errors ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "retrieval", "label_column": "words"}, "no column 'words'"),
        ({"task": "retrieval", "label_column": "label"}, "texts are no strings"),
        ({"task": "several_labels"}, "labels are no lists"),
        ({"task": "several_labels", "label_column": "kinds", "class_names": NAMES[::-1]}, "another order"),
        ({"task": "several_labels", "label_column": "kinds", "class_names": [*NAMES, "x"]}, "do not fit the labels"),
    ],
)
def test_sets_that_do_not_fit_their_task_are_refused(photos, monkeypatch, change, message):
    model = tiny_model("clip")
    counts = counted(model, monkeypatch)
    with pytest.raises(DataError, match=message):
        evaluate(replace(sets(photos)[0], **change), model=model)
    assert not counts


def test_a_set_without_texts_or_labels_is_refused(photos):
    bare = photos.select_columns("image")
    with pytest.raises(DataError, match="no column 'text' .at a.*label_column"):
        evaluate(SuiteSet("a", "id", bare, task="retrieval"))
    with pytest.raises(DataError, match="no column 'labels' .at a."):
        evaluate(SuiteSet("a", "id", bare, task="several_labels"))
    nothing = bare.add_column("labels", [[]] * N, feature=List(ClassLabel(names=NAMES)))
    with pytest.raises(DataError, match="no image has a label .at a."):
        evaluate(SuiteSet("a", "id", nothing, task="several_labels"))


def test_texts_that_are_too_long_are_refused_unless_they_are_to_be_cut(photos, monkeypatch):
    model = tiny_model("clip")
    counts = counted(model, monkeypatch)
    long = photos.remove_columns("caption").add_column("text", ["red " * 90, "red " * 91, *("blue",) * (N - 2)])
    with pytest.raises(DataError, match="2 of 3 texts are longer than the text tower .at long.*truncate=True"):
        evaluate(SuiteSet("long", "id", long, task="retrieval"), model=model)
    assert not counts
    found = evaluate(SuiteSet("long", "id", long, task="retrieval", truncate=True), model=model)
    assert counts["prompts"] == 3 and found.sets["long"].metrics["text_to_image_recall@1"] < 1


@pytest.mark.parametrize(
    ("broken", "one", "message"),
    [
        ("visual_projection", 1, "embeddings of images are NaN or infinite .at captions."),
        ("text_projection", 1, "embeddings of texts are NaN or infinite .at captions."),
        ("visual_projection", 2, "logits are NaN or infinite .at kinds."),
    ],
)
def test_embeddings_that_are_not_finite_are_reported(photos, broken, one, message):
    model = tiny_model("clip")
    with torch.no_grad():
        model.get_submodule(broken).weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=message):
        evaluate(replace(sets(photos)[one], role="id"), model=model)


# --- reports ---


def test_means_are_of_sets_that_can_be_compared(report):
    assert report.means == {"id": report.sets["photos"].accuracy} and list(report.classified) == ["photos"]
    figures = (0.25, 0.75)
    more = {str(f): TaskResult(str(f), "ood", "retrieval", np.arange(2), {"recall@1": f}, "") for f in figures}
    every = SuiteReport({**report.sets, **more}, {}, {})
    assert every.means == report.means
    assert every.means_of("recall@1") == {"ood": 0.5, "other": report.sets["captions"].metrics["recall@1"]}


def test_every_task_has_a_table(report):
    tables = [table.splitlines() for table in str(report).split("\n\n")]
    assert [table[1].split()[0] for table in tables] == ["photos", "captions", "kinds"]
    assert "95 % interval" in tables[0][0] and "image→text recall@5" in tables[1][0] and "mAP macro" in tables[2][0]
    found = report.sets["kinds"].metrics
    assert tables[2][1].split() == ["kinds", "other", str(N), f"{found['mAP_macro']:.4f}", f"{found['mAP_micro']:.4f}"]
    assert tables[2][2].split() == ["mean", "other", f"{found['mAP_macro']:.4f}"]


def test_a_report_survives_its_json_file(report, tmp_path):
    report.to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    again = SuiteReport.from_dict(content)
    assert str(again) == str(report) and content["config"]["suite"]["sets"][1]["task"] == "retrieval"
    for name in ("captions", "kinds"):
        assert again.sets[name].metrics == report.sets[name].metrics
        assert again.sets[name].rows.tolist() == report.sets[name].rows.tolist()
    del content["sets"]["photos"]["task"]  # as earlier versions wrote it
    assert SuiteReport.from_dict(content).means == report.means


def test_a_task_is_read_from_yaml(photos, tmp_path):
    photos.to_parquet(tmp_path / "photos.parquet")
    settings = "role: id, source: photos.parquet, task: retrieval, label_column: caption, truncate: true"
    (tmp_path / "suite.yaml").write_text(f"sets:\n  a: {{{settings}}}\n")
    one = RobustnessSuite.from_yaml(tmp_path / "suite.yaml").sets[0]
    assert (one.task, one.label_column, one.truncate) == ("retrieval", "caption", True)
    (tmp_path / "suite.yaml").write_text("sets:\n  a: {templates: photo, " + settings + "}\n")
    with pytest.raises(ConfigError, match="templates means nothing for retrieval .at a."):
        RobustnessSuite.from_yaml(tmp_path / "suite.yaml")


def test_defaults_of_a_file_are_for_the_sets_they_mean_something_for(tmp_path):
    (tmp_path / "suite.yaml").write_text(
        "defaults: {templates: 'an icon of a {}.'}\nsets:\n  photos: {role: id, source: photos}\n"
        "  captions: {role: other, source: captions, task: retrieval}\n"
    )
    photos, captions = RobustnessSuite.from_yaml(tmp_path / "suite.yaml").sets
    assert (photos.templates, captions.templates) == ("an icon of a {}.", "single")
