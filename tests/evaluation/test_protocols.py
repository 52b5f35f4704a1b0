# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_robust import RobustTrainingArguments
from hf_robust.errors import ConfigError, DataError
from hf_robust.evaluation import base_to_new, few_shot, harmonic_mean, one_standard_error_rule
from hf_robust.training.trainer import RobustTrainer
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

few_examples = settings(max_examples=30)


def rows(labels, n_classes):
    """Rows without images: a number of their own, a label, and another column after it."""
    names = [f"class {index}" for index in range(n_classes)]
    features = Features({"row": Value("int64"), "label": ClassLabel(names=names), "note": Value("string")})
    columns = {"row": list(range(len(labels))), "label": labels, "note": [f"note {label}" for label in labels]}
    return Dataset.from_dict(columns, features=features)


@st.composite
def labelled(draw, least_classes=2):
    n_classes = draw(st.integers(least_classes, 9))
    return draw(st.lists(st.integers(0, n_classes - 1), max_size=30)), n_classes


# --- base-to-new ---


@few_examples
@given(labelled())
def test_halves_are_disjoint_and_complete(drawn):
    labels, n_classes = drawn
    dataset = rows(labels, n_classes)
    base, new = base_to_new(dataset)
    names = dataset.features["label"].names
    base_names, new_names = base.features["label"].names, new.features["label"].names
    assert base_names + new_names == names and len(base_names) - len(new_names) == n_classes % 2
    assert sorted(base["row"][:] + new["row"][:]) == list(range(len(labels)))
    for half in (base, new):
        assert half["row"][:] == sorted(half["row"][:])
        assert half.column_names == dataset.column_names
        for row in half:
            assert half.features["label"].names[row["label"]] == names[labels[row["row"]]]
            assert row["note"] == f"note {labels[row['row']]}"


def test_a_class_without_rows_keeps_its_place():
    base, new = base_to_new(rows([0, 4, 4, 2], 5))
    assert base.features["label"].names == ["class 0", "class 1", "class 2"]
    assert base["label"][:] == [0, 2] and new["label"][:] == [1, 1]


@few_examples
@given(labelled(), st.randoms())
def test_selected_and_shuffled_rows_are_split_in_their_order(drawn, random):
    labels, n_classes = drawn
    chosen = [random.randrange(len(labels)) for _ in labels]  # some twice, some not
    dataset = rows(labels, n_classes).select(chosen)
    middle = (n_classes + 1) // 2
    base, new = base_to_new(dataset)
    assert base["row"][:] == [row for row in chosen if labels[row] < middle]
    assert base["label"][:] == [labels[row] for row in chosen if labels[row] < middle]
    assert new["label"][:] == [labels[row] - middle for row in chosen if labels[row] >= middle]


def test_a_half_can_be_split_again():
    base, _ = base_to_new(rows([7, 0, 3, 2, 1, 5], 8))
    again, rest = base_to_new(base)
    assert again["row"][:] == [1, 4] and rest["row"][:] == [2, 3] and rest["label"][:] == [1, 0]


def broken_images(labels, n_classes):
    """Images that no one can decode."""
    content = [{"bytes": b"no image", "path": None} for _ in labels]
    return rows(labels, n_classes).add_column("image", content, feature=Image())


def test_images_are_never_decoded():
    for decode in (True, False):
        dataset = broken_images([0, 1, 2, 0], 3).cast_column("image", Image(decode=decode))
        base, new = base_to_new(dataset)
        shots = few_shot(base, 1)
        assert (len(base), len(new), len(shots)) == (3, 1, 2)
        assert base.features["image"] == dataset.features["image"] == shots.features["image"]
    assert base[0]["image"]["bytes"] == b"no image"


def test_images_are_not_copied(tmp_path):
    broken_images([0, 1, 2, 0], 3).save_to_disk(tmp_path / "data")
    dataset = Dataset.load_from_disk(str(tmp_path / "data")).select([3, 0, 2, 1])
    before = sorted((tmp_path / "data").iterdir())
    base, _ = base_to_new(dataset)
    for half in (base, few_shot(base, 1)):
        assert {file["filename"] for file in half.cache_files} == {file["filename"] for file in dataset.cache_files}
        assert address(half) == address(dataset)
    assert sorted((tmp_path / "data").iterdir()) == before


def address(dataset):
    """Where the bytes of the images are in memory."""
    return dataset.data.column("image").chunk(0).field("bytes").buffers()[2].address


def test_halves_have_stable_fingerprints_of_their_own():
    dataset = rows([0, 1, 2, 3], 4)
    halves, again = base_to_new(dataset), base_to_new(dataset)
    prints = [half._fingerprint for half in halves]
    assert prints == [half._fingerprint for half in again]
    assert len({*prints, dataset._fingerprint}) == 3
    assert few_shot(dataset, 1)._fingerprint == few_shot(dataset, 1)._fingerprint


def test_format_and_split_are_kept():
    dataset = rows([0, 1, 2, 3], 4).with_format("numpy", columns=["label"])
    dataset._split = "test"
    base, _ = base_to_new(dataset)
    assert base.format["type"] == "numpy" and list(base[0]) == ["label"] and base.split == "test"


def test_a_transform_is_kept_and_not_run():
    def fail_then_pass(batch):
        raise AssertionError("transform was run")

    base, _ = base_to_new(rows([0, 1, 2, 3], 4).with_transform(fail_then_pass))
    with pytest.raises(AssertionError, match="transform was run"):
        base[0]
    assert len(few_shot(base, 1)) == 2


@pytest.mark.parametrize("function", [base_to_new, lambda dataset: few_shot(dataset, 1)])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (rows([0, 1], 2).remove_columns("label"), "no column 'label'"),
        (rows([0, 1], 2).cast_column("label", Value("int64")), "no class names.*int64.*ClassLabel"),
        ([{"label": 0}], "not a datasets.Dataset.*'list'"),
        (rows([0, 1, -1], 2), "label of row 2 is no class.*got -1; allowed 0 to 1"),
        (rows([0, None, 1], 2), "label of row 1 is no class"),
    ],
)
def test_rows_without_classes_are_refused(function, dataset, message):
    with pytest.raises(DataError, match=message):
        function(dataset)


def test_one_class_has_no_halves():
    with pytest.raises(DataError, match=r"too few classes.*\['class 0'\]; allowed at least 2"):
        base_to_new(rows([0, 0], 1))


def test_the_trainer_classifies_each_half_among_its_own_names(tmp_path):
    names = ["red", "green", "blue", "sand", "sea"]
    sets = dict(zip(("base", "new"), base_to_new(image_dataset(15, names)), strict=True))
    args = RobustTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1)
    data = {"train_dataset": few_shot(sets["base"], 2), "eval_dataset": sets}
    trainer = RobustTrainer(tiny_model("clip"), args, **data, processing_class=tiny_processor("clip"))
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics.keys() >= {"eval_base_accuracy", "eval_new_accuracy"}
    assert trainer.model.class_names == names[:3]
    with trainer.model.classes(names[3:]):
        expected = trainer.predict(sets["new"]).metrics["test_accuracy"]
    assert metrics["eval_new_accuracy"] == expected


# --- few shots ---


@few_examples
@given(labelled(least_classes=1), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_shots_are_exact_a_subset_in_order_and_repeatable(drawn, shots, seed):
    labels, n_classes = drawn
    labels = labels + [label for label in range(n_classes) for _ in range(shots)]  # enough of each
    dataset = rows(labels, n_classes)
    found = few_shot(dataset, shots, seed)
    assert Counter(found["label"][:]) == {label: shots for label in range(n_classes)}
    assert found["row"][:] == sorted(set(found["row"][:]))
    assert found["label"][:] == [labels[row] for row in found["row"][:]]
    assert found.features == dataset.features
    few_shot(dataset, shots, seed + 1)
    assert few_shot(dataset, shots, seed)["row"][:] == found["row"][:]


def test_seeds_draw_other_rows_and_leave_the_global_state_alone():
    dataset = rows([0, 1] * 50, 2)
    state = np.random.get_state()[1].copy()
    drawn = {tuple(few_shot(dataset, 16, seed)["row"][:]) for seed in (0, 1, 2, 3)}
    assert len(drawn) == 4 and np.array_equal(np.random.get_state()[1], state)
    np.random.seed(5)
    assert tuple(few_shot(dataset, 16, 3)["row"][:]) in drawn


def test_every_row_can_be_drawn():
    dataset = rows([0, 1, 0, 1, 0, 1], 2)
    assert {row for seed in range(30) for row in few_shot(dataset, 1, seed)["row"]} == set(range(6))


@pytest.mark.parametrize(("labels", "count"), [([0, 0, 1, 2, 2], 1), ([0, 0, 2, 2], 0)])
def test_a_class_with_too_few_images_is_named(labels, count):
    with pytest.raises(DataError, match=f"class 'class 1' has too few images: got {count}; allowed at least 2"):
        few_shot(rows(labels, 3), 2)


@pytest.mark.parametrize("shots", [0, -1, 1.5, "4"])
def test_shots_are_positive_integers(shots):
    with pytest.raises(ConfigError, match="shots is out of range.*integers from 1"):
        few_shot(rows([0, 1], 2), shots)


# --- harmonic mean ---

fractions = st.integers(0, 1000).map(lambda right: right / 1000)


@given(fractions, fractions)
def test_harmonic_mean_lies_between_and_is_symmetric(base, new):
    found = harmonic_mean(base, new)
    assert found == harmonic_mean(new, base)
    assert min(base, new) - 1e-12 <= found <= (base + new) / 2 + 1e-12
    if base > 0 and new > 0:
        assert found == pytest.approx(1 / ((1 / base + 1 / new) / 2), rel=1e-12)


def test_harmonic_mean_of_published_figures():
    """The averages of CoOp over 11 datasets, as later papers quote them."""
    assert round(100 * harmonic_mean(0.8269, 0.6322), 2) == 71.66
    assert harmonic_mean(0, 0) == harmonic_mean(0.5, 0) == 0


# --- the choice of a setting ---


def test_of_settings_within_one_standard_error_the_lowest_loss_is_taken():
    accuracies, losses = [0.69, 0.78, 0.80, 0.77, 0.1], [0.2, 1.1, 1.3, 1.2, 0.1]
    for error, place in ((0.04, 1), (0.0126, 2), (0.126, 0)):
        assert one_standard_error_rule(accuracies, losses, [9, 9, error, 9, 9]) == place  # that of the best counts
    assert one_standard_error_rule([0.5], [2.0], [0.0]) == 0
