# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch

from hf_robust import ZeroShotClassifier, wise_ft
from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.evaluation.corruptions import corrupt
from hf_robust.evaluation.report import SetResult, SuiteReport
from hf_robust.evaluation.run import evaluate_suite
from hf_robust.evaluation.suite import RobustnessSuite, SuiteSet
from tests.tiny_models import image_dataset, tiny_lora, tiny_model, tiny_processor

NAMES = ["red", "green", "blue", "amber"]


@pytest.fixture(scope="module")
def photos():
    """37 pictures of four classes."""
    return image_dataset(37, NAMES)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def evaluate(*sets, model=None, **settings):
    model = tiny_model("clip") if model is None else model
    return evaluate_suite(model, tiny_processor("clip"), RobustnessSuite(sets), silent=True, **settings)


def logits(model, images, names, templates="single"):
    """What the classifier that is trained says, `(images, classes)`."""
    pixel_values = tiny_processor("clip").image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return ZeroShotClassifier(model, tiny_processor("clip"), names, templates)(pixel_values).logits


# --- answers ---


def test_answers_are_those_of_the_zero_shot_classifier(photos):
    result = evaluate(SuiteSet("photos", "id", photos, templates="photo")).sets["photos"]
    expected = logits(tiny_model("clip"), photos["image"][:], NAMES, "photo").softmax(dim=-1)
    assert result.predictions.tolist() == expected.argmax(dim=-1).tolist()
    np.testing.assert_allclose(result.confidences, expected.amax(dim=-1).numpy(), rtol=1e-5)
    assert result.targets.tolist() == photos["label"][:] and result.rows.tolist() == list(range(37))
    assert len(set(result.predictions.tolist())) > 1
    assert result.accuracy == np.mean(expected.argmax(dim=-1).numpy() == np.array(photos["label"][:]))


@pytest.mark.parametrize("family", ["siglip2", "vision-text-dual-encoder"])
def test_other_families_are_evaluated_too(family, photos):
    model = tiny_model(family)
    suite = RobustnessSuite([SuiteSet("photos", "id", photos.select(range(5)))])
    result = evaluate_suite(model, tiny_processor(family), suite, batch_size=2, silent=True).sets["photos"]
    inputs = tiny_processor(family).image_processor(images=photos["image"][:5], return_tensors="pt")
    with torch.no_grad():
        expected = ZeroShotClassifier(model, tiny_processor(family), NAMES)(**inputs).logits
    assert result.predictions.tolist() == expected.argmax(dim=-1).tolist()
    np.testing.assert_allclose(result.confidences, expected.softmax(dim=-1).amax(dim=-1).numpy(), rtol=1e-4)


def test_a_subset_restricts_the_logits_before_the_argmax(photos):
    """As for ImageNet-A: 1 and 3 are the only answers, whatever the logits of the others."""
    two = photos.filter(lambda row: row["label"] in (1, 3))
    result = evaluate(SuiteSet("two", "id", two, subset=[1, 3])).sets["two"]
    expected = logits(tiny_model("clip"), two["image"][:], NAMES)
    assert set(expected.argmax(dim=-1).tolist()) - {1, 3}  # without the restriction there would be other answers
    assert result.predictions.tolist() == expected[:, [1, 3]].argmax(dim=-1).tolist()
    np.testing.assert_allclose(result.confidences, expected[:, [1, 3]].softmax(dim=-1).amax(dim=-1), rtol=1e-5)
    assert result.answers == ["green", "amber"]


def test_a_merge_answers_with_the_largest_logit_of_its_classes(photos):
    """As for ObjectNet; the pictures of one label are left out, as STL-10's monkeys."""
    merge = {"warm": ["red", "amber"], "green": None, "cold": [2, "green"]}
    relabelled = photos.remove_columns("label").add_column("label", [label % 3 for label in photos["label"]])
    result = evaluate(SuiteSet("merged", "id", relabelled, NAMES, merge=merge)).sets["merged"]
    kept = np.flatnonzero(np.array(relabelled["label"][:]) != 1)
    every = logits(tiny_model("clip"), photos["image"][:], NAMES)
    expected = torch.stack([every[:, [0, 3]].amax(dim=1), every[:, [1, 2]].amax(dim=1)], dim=1)[kept]
    assert result.answers == ["warm", "cold"] and result.rows.tolist() == kept.tolist()
    assert result.predictions.tolist() == expected.argmax(dim=-1).tolist()
    assert result.targets.tolist() == [relabelled["label"][row] // 2 for row in kept.tolist()]
    np.testing.assert_allclose(result.confidences, expected.softmax(dim=-1).amax(dim=-1), rtol=1e-5)


def test_heads_follow_the_text_tower_as_it_is_now(photos):
    """A tuned text tower shows on class names that were not trained on, too."""
    model, names = tiny_model("clip"), ["cat", "dog", "owl", "fox"]
    unnamed = photos.cast_column("label", datasets.Value("int64"))
    sets = SuiteSet("photos", "id", unnamed, names), SuiteSet("other", "other", unnamed, names[::-1])
    before = evaluate(*sets, model=model)
    with torch.no_grad():
        for parameter in model.text_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = evaluate(*sets, model=model)
    for one in sets:
        expected = logits(model, photos["image"][:], one.class_names).softmax(dim=-1)
        assert np.abs(after.sets[one.name].confidences - before.sets[one.name].confidences).max() > 1e-3
        np.testing.assert_allclose(after.sets[one.name].confidences, expected.amax(dim=-1), rtol=1e-5)


def test_an_adapter_is_evaluated_at_its_alpha(photos):
    tuned = tiny_lora(tiny_model("clip"), init_lora_weights=False)
    found = {}
    for alpha in (0.0, 0.5, 1.0):
        wise_ft(tuned, alpha)
        found[alpha] = evaluate(SuiteSet("photos", "id", photos), model=tuned).sets["photos"]
    base = evaluate(SuiteSet("photos", "id", photos)).sets["photos"]
    np.testing.assert_array_equal(found[0.0].confidences, base.confidences)
    for alpha in (0.5, 1.0):
        assert np.abs(found[alpha].confidences - base.confidences).max() > 1e-3
    assert found[0.5].fingerprint == base.fingerprint


def test_the_model_keeps_its_mode_and_gradients(photos):
    model = tiny_model("clip").train()
    model.text_model.eval()
    evaluate(SuiteSet("photos", "id", photos.select(range(4))), model=model)
    assert model.training and model.vision_model.training and not model.text_model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- passes ---


def counted(model, monkeypatch):
    """Counts the images and prompts that a model encodes."""
    counts = Counter()
    images, texts = model.get_image_features, model.get_text_features

    def image_features(pixel_values):
        counts["images"] += len(pixel_values)
        return images(pixel_values=pixel_values)

    def text_features(input_ids, attention_mask):
        counts["prompts"] += len(input_ids)
        return texts(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(model, "get_image_features", image_features)
    monkeypatch.setattr(model, "get_text_features", text_features)
    return counts


def test_every_image_is_encoded_once_however_many_heads_score_it(photos, monkeypatch, tmp_path):
    photos.to_parquet(tmp_path / "photos.parquet")
    file = str(tmp_path / "photos.parquet")
    merge = {"red": ["red"], "green": None, "blue": ["blue", "green"], "amber": None}
    sets = [
        SuiteSet("all", "id", photos),
        SuiteSet("other words", "ood", photos, templates="a drawing of a {}."),
        SuiteSet("merged", "ood", photos, merge=merge),
        SuiteSet("contrast", "ood", photos, corruption=("contrast", 3)),
        SuiteSet("contrast again", "ood", photos, corruption=("contrast", 3)),
        SuiteSet("file", "ood", file),
        SuiteSet("file again", "ood", file, corruption=None),
    ]
    model = tiny_model("clip")
    counts = counted(model, monkeypatch)
    report = evaluate(*sets, model=model)
    assert counts == {"images": 3 * 37, "prompts": 2 * 4}
    assert list(report.sets) == [one.name for one in sets]
    monkeypatch.undo()
    for one in sets:
        alone = evaluate(replace(one, role="id")).sets[one.name]
        np.testing.assert_array_equal(alone.predictions, report.sets[one.name].predictions)
        np.testing.assert_allclose(alone.confidences, report.sets[one.name].confidences, rtol=1e-6)
        assert alone.rows.tolist() == report.sets[one.name].rows.tolist()
        assert alone.fingerprint == report.sets[one.name].fingerprint


def test_images_that_no_set_scores_are_not_encoded(photos, monkeypatch):
    model = tiny_model("clip")
    counts = counted(model, monkeypatch)
    evaluate(SuiteSet("red", "id", photos, merge={"red": [0], "green": None, "blue": None, "amber": [3]}), model=model)
    assert counts["images"] == sum(label in (0, 3) for label in photos["label"])


@pytest.mark.parametrize("settings", [{"batch_size": 5}, {"batch_size": 64, "workers": 2}, {"batch_size": 1}])
def test_batch_size_and_workers_change_nothing(photos, settings):
    """Noise belongs to the row, not to the order in which rows are opened."""
    noisy = SuiteSet("noisy", "id", photos, corruption=("gaussian_noise", 2))
    expected = evaluate(noisy, batch_size=8).sets["noisy"]
    found = evaluate(noisy, **settings).sets["noisy"]
    assert found.predictions.tolist() == expected.predictions.tolist()
    np.testing.assert_allclose(found.confidences, expected.confidences, rtol=1e-4)
    assert found.fingerprint == expected.fingerprint


def test_corrupted_images_are_those_of_corrupt_with_row_and_seed(photos):
    noisy = SuiteSet("noisy", "id", photos, corruption=("shot_noise", 4))
    found = evaluate(noisy, seed=3).sets["noisy"]
    images = [corrupt(image, "shot_noise", 4, seed=3, index=row) for row, image in enumerate(photos["image"])]
    expected = logits(tiny_model("clip"), images, NAMES).softmax(dim=-1)
    np.testing.assert_allclose(found.confidences, expected.amax(dim=-1), rtol=1e-5)
    assert np.abs(evaluate(noisy, seed=4).sets["noisy"].confidences - found.confidences).max() > 1e-4


def test_the_global_random_states_are_left_alone(photos):
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    evaluate(SuiteSet("noisy", "id", photos.select(range(4)), corruption=("gaussian_noise", 1)))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_fingerprints_stand_for_images_and_answers(photos):
    def fingerprint(dataset, **settings):
        return evaluate(SuiteSet("a", "id", dataset, NAMES, **settings)).sets["a"].fingerprint

    eight = photos.select(range(8))
    first = fingerprint(eight)
    assert fingerprint(eight, corruption=("contrast", 1)) == first  # the same images
    assert fingerprint(eight.rename_column("image", "jpg"), image_column="jpg") == first
    assert fingerprint(eight.select(range(7))) != first
    assert fingerprint(eight.select([1, 0, 2, 3, 4, 5, 6, 7])) != first
    assert fingerprint(eight.remove_columns("label").add_column("label", [0] * 8)) != first


@pytest.mark.parametrize("head", ["live", "frozen"])
def test_heads_that_are_not_trained_are_rebuilt(photos, head):
    one = SuiteSet("photos", "id", photos)
    classifier = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), ["cat", "dog"], head=head)
    found, expected = evaluate(one, model=classifier).sets["photos"], evaluate(one).sets["photos"]
    np.testing.assert_array_equal(found.confidences, expected.confidences)


def test_a_trained_head_classifies_the_sets_with_its_class_names(photos):
    classifier = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES, head="trainable")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        classifier.class_head.weight.add_(torch.randn(classifier.class_head.weight.shape, generator=generator))
        classifier.class_head.bias.add_(torch.tensor([0.0, 2.0, 0.0, 1.0]))
    sets = [SuiteSet("own", "id", photos), SuiteSet("some", "ood", photos.select(range(4)), subset=[0, 1, 2, 3])]
    sets.append(SuiteSet("others", "other", photos, ["cat", "dog", "owl", "cow"]))
    sets.append(SuiteSet("turned", "other", photos, NAMES[::-1], merge={name: [name] for name in NAMES}))
    found = evaluate(*sets, model=classifier).sets
    inputs = tiny_processor("clip").image_processor(images=photos["image"][:], return_tensors="pt")
    with torch.no_grad():
        expected = classifier(inputs["pixel_values"]).logits.softmax(dim=-1)
    np.testing.assert_allclose(found["own"].confidences, expected.amax(dim=-1).numpy(), rtol=1e-5)
    assert found["own"].predictions.tolist() == expected.argmax(dim=-1).tolist()
    assert found["some"].predictions.tolist() == found["own"].predictions[:4].tolist()
    zero_shot = evaluate(*sets).sets
    np.testing.assert_array_equal(found["others"].confidences, zero_shot["others"].confidences)
    assert found["turned"].predictions.tolist() == found["own"].predictions.tolist()
    assert found["own"].predictions.tolist() != zero_shot["own"].predictions.tolist()


# --- errors ---


def test_what_is_no_dual_encoder_is_refused(photos):
    with pytest.raises(ConfigError, match="not a supported dual encoder"):
        evaluate(SuiteSet("photos", "id", photos), model=tiny_model("clip").vision_model)


def test_settings_are_checked_before_the_first_image_is_opened(photos, monkeypatch):
    model = tiny_model("clip")
    counts = counted(model, monkeypatch)
    wrong = SuiteSet("wrong", "ood", photos.rename_column("label", "kind"))
    with pytest.raises(DataError, match="no column 'label' .at wrong."):
        evaluate(SuiteSet("photos", "id", photos), wrong, model=model)
    assert not counts


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_reported(workers):
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": "a.png"}], "label": [0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}),
    )
    with pytest.raises(DataError, match="image cannot be opened"):
        evaluate(SuiteSet("broken", "id", broken), workers=workers)


def test_images_that_cannot_be_used_are_left_out_if_asked(photos, caplog):
    table = photos.with_format("arrow")[:].to_pylist()
    table[2]["image"] = {"bytes": b"no image", "path": "2.png"}
    broken = datasets.Dataset.from_list(table, features=photos.features)
    sets = SuiteSet("photos", "id", broken), SuiteSet("blurred", "ood", broken, corruption=("gaussian_blur", 2))
    report = evaluate(*sets, on_bad_image="skip")
    whole = evaluate(SuiteSet("photos", "id", photos)).sets["photos"]
    kept = [row for row in range(len(photos)) if row != 2]
    for found in report.sets.values():
        assert found.rows.tolist() == kept and len(found.skipped) == 1 and "row 2, 2.png" in found.skipped[0]
    assert report.sets["photos"].predictions.tolist() == whole.predictions[kept].tolist()
    assert "photos: 1 images were left out" in str(report) and "1 of 37 images are left out" in caplog.text
    assert SuiteReport.from_dict(report.to_dict()).sets["photos"].skipped == report.sets["photos"].skipped


def test_classes_that_a_set_lacks_stay_possible_answers(photos):
    classifier = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), [*NAMES, "elephant", "zebra"])
    found = evaluate(SuiteSet("photos", "id", photos), model=classifier).sets["photos"]
    assert found.answers == [*NAMES, "elephant", "zebra"]
    with torch.no_grad(), classifier.eval().classes(NAMES):
        inputs = tiny_processor("clip").image_processor(images=photos["image"][:], return_tensors="pt")
        expected = classifier(inputs["pixel_values"]).logits.argmax(dim=-1)
    assert found.predictions.tolist() == expected.tolist() and expected.max() >= len(NAMES)


def test_logits_that_are_not_finite_are_reported(photos):
    model = tiny_model("clip")
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="logits are NaN or infinite .at photos."):
        evaluate(SuiteSet("photos", "id", photos), model=model)


# --- reports ---


def result(name, role, targets, predictions, answers=("a", "b", "c")):
    arrays = [np.arange(len(targets)), np.array(targets), np.array(predictions), np.linspace(0.3, 0.9, len(targets))]
    return SetResult(name, role, list(answers), *arrays, fingerprint="f" + name)


def test_figures_of_a_set_by_hand():
    """a: 2 of 3 right, b: 1 of 1, c has no image."""
    one = result("one", "id", [0, 0, 0, 1], [0, 0, 2, 1])
    assert one.correct.tolist() == [True, True, False, True] and one.accuracy == 0.75
    metrics = one.metrics
    assert metrics["macro_accuracy"] == pytest.approx(5 / 6) and metrics["worst_class_accuracy"] == pytest.approx(
        2 / 3
    )
    assert metrics["accuracy_low"] < 0.75 < metrics["accuracy_high"]
    confidences, correct = [0.3, 0.5, 0.7, 0.9], [1, 1, 0, 1]  # each in a bin of its own
    errors = [abs(share - right) for share, right in zip(confidences, correct, strict=True)]
    assert metrics["calibration_error"] == pytest.approx(sum(errors) / 4)


def test_means_count_every_set_of_a_role_the_same():
    sets = [result("a", "id", [0], [0]), result("b", "ood", [0, 1, 1, 1], [0, 0, 0, 0]), result("c", "ood", [0], [0])]
    report = SuiteReport({one.name: one for one in sets}, {}, {})
    assert report.means == {"id": 1.0, "ood": 0.625}
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "set" and "calibration error" in lines[0] and "95 % interval" in lines[0]
    assert lines[2].split()[:6] == ["b", "ood", "4", "0.2500", "0.5000", "0.0000"]
    assert lines[-1].split() == ["mean", "ood", "0.6250"]


def test_a_report_survives_its_json_file(photos, tmp_path):
    report = evaluate(SuiteSet("photos", "id", photos), SuiteSet("grey", "ood", photos, corruption=("contrast", 5)))
    report.to_json(tmp_path / "folder" / "report.json")
    content = json.loads((tmp_path / "folder" / "report.json").read_text())
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["report.json"]
    assert content["sets"]["photos"]["accuracy"] == report.sets["photos"].accuracy
    assert content["means"] == report.means and content["versions"]["torch"] == torch.__version__
    assert content["config"]["suite"]["sets"][1]["corruption"] == ["contrast", 5]
    assert content["config"]["model"] == {"type": "clip", "dtype": "torch.float32", "adapters": []}
    again = SuiteReport.from_dict(content)
    assert str(again) == str(report) and again.config == json.loads(json.dumps(report.config))
    for name, one in report.sets.items():
        assert again.sets[name].correct.tolist() == one.correct.tolist()
        np.testing.assert_allclose(again.sets[name].confidences, one.confidences, atol=1e-6)


def test_the_adapters_of_a_model_stand_in_the_report(photos):
    report = evaluate(SuiteSet("photos", "id", photos.select(range(2))), model=tiny_lora(tiny_model("clip")))
    assert report.config["model"]["adapters"] == ["LORA"]


def test_there_is_a_progress_bar_unless_silent(photos, capsys):
    suite = RobustnessSuite([SuiteSet("photos", "id", photos), SuiteSet("more", "ood", photos, templates="photo")])
    evaluate_suite(tiny_model("clip"), tiny_processor("clip"), suite)
    assert "Evaluating photos, more" in capsys.readouterr().err
    evaluate_suite(tiny_model("clip"), tiny_processor("clip"), suite, silent=True)
    assert capsys.readouterr().err == ""
