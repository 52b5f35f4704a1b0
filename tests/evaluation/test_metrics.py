# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score
from torchmetrics.functional.classification import multiclass_calibration_error

from hf_robust.errors import ConfigError, DataError
from hf_robust.evaluation.metrics import (
    Accuracy,
    BaseNewAccuracy,
    CalibrationError,
    EffectiveRobustness,
    Forgetting,
    OODAverage,
    accuracies,
    expected_calibration_error,
)

few_examples = settings(max_examples=30)
SETS = {
    "predictions": [0, 1, 2, 0, 1, 1, 1, 0],
    "references": [0, 1, 2, 1, 1, 1, 0, 1],
    "sets": ["a", "a", "a", "a", "b", "b", "b", "b"],
}  # 3/4 in a and 1/2 in b


@st.composite
def classified(draw):
    n_classes = draw(st.integers(1, 5))
    index = st.integers(0, n_classes - 1)
    both = draw(st.lists(st.tuples(index, index), min_size=1, max_size=40))
    return [prediction for prediction, _ in both], [reference for _, reference in both]


@st.composite
def confident(draw):
    both = draw(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
    return [confidence for confidence, _ in both], [correct for _, correct in both]


# --- accuracies ---


def test_accuracies_by_hand():
    # class 0: 3 of 4, class 1: 1 of 2, class 7: 0 of 1; class 2 is predicted but has no images
    found = accuracies([0, 0, 0, 2, 1, 0, 0], [0, 0, 0, 0, 1, 1, 7])
    expected = {"accuracy": 4 / 7, "macro_accuracy": (3 / 4 + 1 / 2 + 0) / 3, "worst_class_accuracy": 0}
    assert found == pytest.approx(expected)


@few_examples
@given(classified(), st.randoms())
def test_accuracies_agree_with_scikit_learn_and_ignore_order_and_names(drawn, random):
    predictions, references = drawn
    found = accuracies(predictions, references)
    recalls = recall_score(references, predictions, labels=sorted(set(references)), average=None)
    assert found["accuracy"] == pytest.approx(accuracy_score(references, predictions))
    assert found["macro_accuracy"] == pytest.approx(recalls.mean())
    assert found["worst_class_accuracy"] == pytest.approx(recalls.min())
    assert 0 <= found["worst_class_accuracy"] <= found["macro_accuracy"] + 1e-12 <= 1 + 2e-12
    order = random.sample(range(len(references)), len(references))
    renamed = [10 - np.array(column)[order] for column in drawn]
    assert accuracies(*renamed) == pytest.approx(found)


def test_macro_accuracy_is_scikit_learns_balanced_accuracy():
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(4, size=(2, 200))
    found = accuracies(torch.from_numpy(predictions), references)
    assert found["macro_accuracy"] == pytest.approx(balanced_accuracy_score(references, predictions))


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "do not fit.*at least one image"),
        ([0, 1], [0], r"do not fit.*\(\(2,\), \(1,\)\)"),
        ([[0.1, 0.9]], [[0, 1]], r"do not fit.*\(1, 2\)"),
        ([0.1, 0.9], [0, 1], "not class indices.*at predictions.*float64.*argmax"),
        ([0, 1], ["cat", "dog"], "not class indices.*at references"),
    ],
)
def test_only_class_indices_are_counted(predictions, references, message):
    with pytest.raises(DataError, match=message):
        accuracies(predictions, references)


# --- calibration ---


def test_calibration_error_by_hand():
    # bins [0.5, 0.75) and [0.75, 1]: |1/2 - 0.6| of 2 images and |2/3 - 0.9| of 3
    found = expected_calibration_error([0.55, 0.65, 0.8, 0.9, 1.0], [True, False, True, True, False], bins=4)
    assert found == pytest.approx((2 * 0.1 + 3 * (0.9 - 2 / 3)) / 5)


def test_a_confidence_of_1_is_in_the_last_bin():
    """Apart from the others in it, two errors that cancel would count."""
    assert expected_calibration_error([0.95, 1.0], [True, True]) == pytest.approx(0.025)
    assert expected_calibration_error([0.96, 1.0, 1.0], [True, True, False], bins=5) == pytest.approx(2.96 / 3 - 2 / 3)
    assert expected_calibration_error([0.98, 1.0], [False, True]) == pytest.approx(0.49)


@few_examples
@given(confident(), st.integers(1, 20), st.randoms())
def test_calibration_error_is_that_of_its_definition_and_ignores_the_order(drawn, bins, random):
    confidences, correct = drawn
    found = expected_calibration_error(confidences, correct, bins)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64).numpy()
    expected = 0.0
    for index in range(bins):
        last = index == bins - 1
        inside = [i for i, c in enumerate(confidences) if edges[index] <= c and (last or c < edges[index + 1])]
        expected += abs(sum(correct[i] - confidences[i] for i in inside)) / len(correct)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0 <= found <= 1
    assert abs(np.mean(confidences) - np.mean(correct)) <= found + 1e-9  # what one bin for all would give
    order = random.sample(range(len(correct)), len(correct))
    shuffled = [confidences[i] for i in order], [correct[i] for i in order]
    assert expected_calibration_error(*shuffled, bins) == pytest.approx(found, abs=1e-12)


def test_calibration_error_of_calibrated_and_of_always_wrong_models():
    assert expected_calibration_error([0.75] * 4, [True, True, True, False]) == pytest.approx(0)
    assert expected_calibration_error([1.0] * 4, [False] * 4) == pytest.approx(1)
    assert expected_calibration_error([0.0] * 4, [False] * 4) == 0


@pytest.mark.parametrize(
    ("confidences", "correct", "bins", "message"),
    [
        ([], [], 15, "no list of images"),
        ([0.5], [True, False], 15, r"do not fit.*\(\(1,\), \(2,\)\)"),
        ([0.5, 1.1], [True, False], 15, r"confidence is no fraction.*1.1; allowed \[0, 1\]"),
        ([-0.1, 0.5], [True, False], 15, "no fraction.*-0.1"),
        ([0.5, float("nan")], [True, False], 15, "no fraction.*nan"),
        ([0.5], [2], 15, "not whether correct.*2"),
        ([0.5], [True], 0, "bins is out of range: got 0; allowed integers from 1"),
        ([0.5], [True], 1.5, "bins is out of range"),
    ],
)
def test_what_has_no_calibration_error_is_refused(confidences, correct, bins, message):
    with pytest.raises((ConfigError, DataError), match=message):
        expected_calibration_error(confidences, correct, bins)


def test_calibration_of_logits_and_of_their_probabilities(tmp_path):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, 5, generator=generator)
    references = torch.randint(5, (300,), generator=generator)
    expected = multiclass_calibration_error(logits.double(), references, num_classes=5, n_bins=15).item()
    for kind, rows in (("logits", logits), ("probabilities", logits.softmax(dim=1))):
        for form in (rows, rows.numpy(), rows.tolist(), rows.requires_grad_()):
            metric = CalibrationError(kind, cache_dir=tmp_path)
            found = metric.compute(predictions=form, references=references)["calibration_error"]
            assert found == pytest.approx(expected, abs=1e-6)
    coarse = CalibrationError("logits", cache_dir=tmp_path).compute(predictions=rows, references=references, bins=2)
    assert coarse["calibration_error"] != pytest.approx(expected, abs=1e-3)


def test_logits_that_look_like_probabilities_are_still_logits(tmp_path):
    """All within [0, 1], where torchmetrics would take them for probabilities."""
    metric = CalibrationError("logits", cache_dir=tmp_path)
    found = metric.compute(predictions=[[0.9, 0.1]], references=[0])["calibration_error"]
    assert found == pytest.approx(1 - 1 / (1 + np.exp(-0.8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_probabilities_of_any_precision_are_taken(dtype, tmp_path):
    rows = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype).softmax(dim=1)
    metric = CalibrationError("probabilities", cache_dir=tmp_path)
    assert 0 < metric.compute(predictions=rows, references=[0] * 50)["calibration_error"] < 1


def test_probabilities_rounded_up_past_1_are_taken(tmp_path):
    rows = torch.tensor([[1.0 + 2**-10, 0.0], [1.0, 0.0]])
    metric = CalibrationError("probabilities", cache_dir=tmp_path)
    assert metric.compute(predictions=rows, references=[0, 1]) == {"calibration_error": pytest.approx(0.5)}


def test_rows_are_not_kept_but_confidence_and_correctness(tmp_path):
    metric = CalibrationError("logits", cache_dir=tmp_path)
    metric.add_batch(predictions=torch.zeros(100, 1000), references=[0] * 100)
    assert set(metric.features) == {"predictions", "references"} and len(metric) == 100
    assert metric.features["predictions"].dtype == "float64" and metric.features["references"].dtype == "bool"
    metric.add(prediction=torch.zeros(1000), reference=1)
    assert metric.compute() == {"calibration_error": pytest.approx(abs(100 / 101 - 0.001))}


def test_the_kind_of_predictions_must_be_said(tmp_path):
    for arguments in ((), ("scores",)):
        with pytest.raises(ConfigError, match=r"kind.*CalibrationError\('logits'\) or CalibrationError\('prob"):
            CalibrationError(*arguments, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("kind", "rows", "references", "message"),
    [
        ("logits", [[0.0, 1.0]], [0, 1], r"do not fit.*\(\(1, 2\), \(2,\)\)"),
        ("logits", [0.0, 1.0], [0, 1], "do not fit"),
        ("logits", [[0.0, float("nan")]], [0], "predictions are NaN"),
        ("logits", [[0.0, 1.0]], [2], "label is no class.*got 2; allowed 0 to 1"),
        ("logits", [[0.0, 1.0]], [-1], "label is no class.*got -1"),
        ("probabilities", [[0.5, 0.5], [3.0, -2.0]], [0, 1], "not probabilities"),
        ("probabilities", [[0.5, 0.5], [0.5, 0.4]], [0, 1], r"not probabilities.*\[0.5, 0.4\].*Error\('logits'\)"),
    ],
)
def test_rows_that_are_no_predictions_are_refused(kind, rows, references, message, tmp_path):
    with pytest.raises(DataError, match=message):
        CalibrationError(kind, cache_dir=tmp_path).add_batch(predictions=rows, references=references)


# --- metrics of several sets ---


def test_base_new_and_their_harmonic_mean_by_hand(tmp_path):
    halves = SETS | {"sets": ["base" if name == "a" else "new" for name in SETS["sets"]]}
    found = BaseNewAccuracy(cache_dir=tmp_path).compute(**halves)
    assert found == {"base_accuracy": 0.75, "new_accuracy": 0.5, "harmonic_mean": pytest.approx(0.6)}


def test_ood_average_by_hand(tmp_path):
    assert OODAverage(cache_dir=tmp_path).compute(**SETS) == {"ood_average": 0.625}
    uneven = {name: column[:5] for name, column in SETS.items()}  # 3/4 in a, and the single image of b is right
    assert OODAverage(cache_dir=tmp_path).compute(**uneven) == {"ood_average": 0.875}


def test_effective_robustness_by_hand(tmp_path):
    columns = SETS | {"sets": ["id"] * 4 + ["v2"] * 2 + ["sketch"] * 2}  # ID 0.75, v2 1, sketch 0
    metric = EffectiveRobustness(cache_dir=tmp_path)
    # odds of the baseline 1 and 1/3, so that 3 and 1 are expected: an OOD accuracy of 0.5
    assert metric.compute(**columns, baseline=[(0.5, 0.25)]) == {"effective_robustness": pytest.approx(0)}
    found = metric.compute(**columns, baseline=[(0.5, 0.5), (0.6, 0.6)])  # expected 0.75
    assert found == {"effective_robustness": pytest.approx(-0.25)}


def test_forgetting_by_hand(tmp_path):
    found = Forgetting(cache_dir=tmp_path).compute(**SETS, zero_shot={"a": 0.95, "b": 0.6})
    assert found == {"forgetting": pytest.approx(0.15)}


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (BaseNewAccuracy, {}, r"not the two halves.*\['a', 'b'\]"),
        (EffectiveRobustness, {"baseline": [(0.5, 0.5)]}, r"no image of the ID set.*\['a', 'b'\]"),
        (Forgetting, {"zero_shot": {"a": 0.5}}, r"tasks.*differ.*\['a'\], \['a', 'b'\]"),
    ],
)
def test_sets_that_do_not_fit_are_refused_and_the_metric_can_be_used_again(cls, options, message, tmp_path):
    metric = cls(cache_dir=tmp_path, keep_in_memory=True)
    with pytest.raises(DataError, match=message):
        metric.compute(**SETS, **options)
    metric.add_batch(**SETS)
    assert len(metric) == 8


def test_the_id_set_alone_has_no_effective_robustness(tmp_path):
    columns = SETS | {"sets": ["id"] * 8}
    with pytest.raises(DataError, match="no out-of-distribution sets"):
        EffectiveRobustness(cache_dir=tmp_path, keep_in_memory=True).compute(**columns, baseline=[(0.5, 0.5)])


# --- as evaluate.Metric ---

ALL = [
    (Accuracy, (), {}),
    (CalibrationError, ("logits",), {}),
    (BaseNewAccuracy, (), {}),
    (OODAverage, (), {}),
    (EffectiveRobustness, (), {"baseline": [(0.4, 0.3), (0.6, 0.4)]}),
    (Forgetting, (), {"zero_shot": {"base": 0.5, "new": 0.5}}),
]


def columns_of(cls, images=37):
    generator = np.random.default_rng(0)
    references = generator.integers(3, size=images)
    predictions = np.where(generator.random(images) < 0.6, references, generator.integers(3, size=images))
    if cls is CalibrationError:
        return {"predictions": generator.normal(size=(images, 3)), "references": references}
    first = "id" if cls is EffectiveRobustness else "base"
    sets = {} if cls is Accuracy else {"sets": [first if index % 3 else "new" for index in range(images)]}
    return {"predictions": predictions, "references": references} | sets


@pytest.mark.parametrize(("cls", "arguments", "options"), ALL)
def test_batches_and_single_images_give_what_all_at_once_give(cls, arguments, options, tmp_path):
    columns = columns_of(cls)
    expected = cls(*arguments, cache_dir=tmp_path).compute(**columns, **options)
    assert expected and all(isinstance(value, float) for value in expected.values())
    for in_memory in (False, True):
        metric = cls(*arguments, cache_dir=tmp_path, keep_in_memory=in_memory)
        for start in (0, 16, 32):
            metric.add_batch(**{name: column[start : start + 16] for name, column in columns.items()})
        assert metric.compute(**options) == pytest.approx(expected)
        singular = {"predictions": "prediction", "references": "reference", "sets": "sets"}
        for index in range(37):  # the same metric again
            metric.add(**{singular[name]: column[index] for name, column in columns.items()})
        assert metric.compute(**options) == pytest.approx(expected)


@pytest.mark.parametrize(("cls", "arguments", "options"), ALL)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_an_uneven_rest_give_what_one_gives(cls, arguments, options, ranks, tmp_path):
    """Ranks meet by files, so threads will do; each has a metric, a batch and images of its own."""
    columns = columns_of(cls)

    def on(rank):
        metric = cls(*arguments, cache_dir=tmp_path, num_process=ranks, process_id=rank, experiment_id="run")
        metric.add_batch(**{name: column[rank::ranks] for name, column in columns.items()})
        return metric.compute(**options)

    with ThreadPoolExecutor(ranks) as pool:
        first, *others = pool.map(on, range(ranks))
    assert others == [None] * (ranks - 1)
    assert first == pytest.approx(cls(*arguments, cache_dir=tmp_path).compute(**columns, **options))


@pytest.mark.parametrize(("cls", "arguments", "options"), ALL)
def test_nothing_but_locks_is_left_and_only_in_the_folder(cls, arguments, options, tmp_path, monkeypatch):
    elsewhere = tmp_path / "default"
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", elsewhere)
    cls(*arguments, cache_dir=tmp_path / "here").compute(**columns_of(cls), **options)
    assert not elsewhere.exists()
    left = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert all(path.name.endswith(".lock") and not path.stat().st_size for path in left)


@pytest.mark.parametrize(("cls", "arguments", "options"), ALL)
def test_they_are_evaluate_metrics_that_describe_themselves(cls, arguments, options, tmp_path):
    metric = cls(*arguments, cache_dir=tmp_path)
    assert isinstance(metric, evaluate.Metric)
    assert metric.description.startswith(cls.__doc__.splitlines()[0]) and "Columns:" in metric.description


def test_metrics_can_be_combined(tmp_path):
    both = evaluate.combine([Accuracy(cache_dir=tmp_path), OODAverage(cache_dir=tmp_path)])
    both.add_batch(**SETS)
    found = both.compute()
    assert found["accuracy"] == found["ood_average"] == 0.625
