# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, silhouette_samples, silhouette_score

from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.evaluation import difficulty
from hf_robust.evaluation.difficulty import embedding_difficulty
from hf_robust.evaluation.difficulty_report import ClassDifficulty

KINDS = ["centroid", "joint", "image_only"]
TEXTS = torch.eye(2)  # cat, dog
IMAGES = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
LABELS = torch.tensor([0, 0, 1])


def small(kind="centroid", **changed):
    given = {"image_embeds": IMAGES, "labels": LABELS, "class_embeds": TEXTS, "class_names": ["cat", "dog"]}
    return embedding_difficulty(**{**given, "silhouette": kind, **changed})


def made(n, n_classes, seed=0, dim=6, noise=0.7):
    """Images around the texts of their classes, every class with at least one."""
    generator = np.random.default_rng(seed)
    texts = generator.normal(size=(n_classes, dim))
    labels = np.concatenate([np.arange(n_classes), generator.integers(n_classes, size=n - n_classes)])
    images = texts[labels] + noise * generator.normal(size=(n, dim))
    return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(texts)


def figures(found):
    return [found.silhouette, found.acs, found.accuracy, found.margin]


def of_classes(found, name):
    return [getattr(one, name) for one in found.classes]


# --- by hand ---


def test_centroid_by_hand():
    found = small()
    assert (found.kind, found.images, found.sampled) == ("centroid", 3, 3)
    # cosines with (cat, dog): (1, 0), (0.6, 0.8), (0, 1); silhouettes 1, (0.2 - 0.4) / 0.4, 1
    assert figures(found) == pytest.approx([0.5, 2.6 / 3, 2 / 3, 1.8 / 3])
    cat, dog = found.classes
    assert (cat.name, cat.images, dog.name, dog.images) == ("cat", 2, "dog", 1)
    assert figures(cat) == pytest.approx([0.25, 0.8, 0.5, 0.4])
    assert figures(dog) == pytest.approx([1, 1, 1, 1])


def test_joint_by_hand():
    found = small("joint")
    # distances: image 0 to image 1 0.4, image 1 to the text dog and to image 2 0.2, equal points 0, the axes 1
    cats = [(1 - 0.2) / 1, (0.2 - 0.4) / 0.4, (1 - 0.2) / 1]  # image 0, image 1, the text
    assert found.silhouette == pytest.approx(sum([*cats, 1, 1]) / 5)
    assert of_classes(found, "silhouette") == pytest.approx([sum(cats) / 3, 1])
    assert figures(found)[1:] == figures(small())[1:]


def test_image_only_by_hand():
    found = small("image_only")
    cats = [(1 - 0.4) / 1, (0.2 - 0.4) / 0.4]
    assert found.silhouette == pytest.approx(sum([*cats, 0]) / 3)  # the only dog: 0
    assert of_classes(found, "silhouette") == pytest.approx([sum(cats) / 2, 0])
    assert figures(found)[1:] == figures(small())[1:]


def test_many_misleading_images_with_high_acs_have_a_low_silhouette():
    """What the paper says ACS misses: the own class is near, another is nearer."""
    texts = torch.tensor([[1.0, 0.1], [1.0, 0.0]])
    found = embedding_difficulty(texts.flip(0), torch.tensor([0, 1]), texts)
    assert found.acs > 0.99 and found.silhouette == pytest.approx(-1) and found.accuracy == 0


def test_class_without_images_has_no_figures_and_counts_as_another_class():
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    found = small(class_embeds=texts, class_names=["cat", "dog", "fox"])
    assert found.classes[2] == ClassDifficulty("fox", 0, None, None, None, None)
    # the nearest other text is now fox: cosines 0.6, 1, 0.8
    assert found.silhouette == pytest.approx((0.4 / 0.4 + -0.4 / 0.4 + 0.2 / 0.2) / 3)
    joint = small("joint", class_embeds=texts, class_names=["cat", "dog", "fox"])
    assert joint.classes[2].silhouette is None
    points = torch.cat([IMAGES, texts])
    labels = [0, 0, 1, 0, 1, 2]
    assert joint.silhouette == pytest.approx(silhouette_score(points, labels, metric="cosine"), abs=1e-6)
    image_only = small("image_only", class_embeds=texts, class_names=["cat", "dog", "fox"])
    assert image_only.silhouette == pytest.approx(small("image_only").silhouette)


def test_a_tie_is_wrong_and_equal_distances_have_the_silhouette_0():
    texts = torch.ones(2, 2)
    found = embedding_difficulty(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1]), texts)
    assert (found.accuracy, found.margin, found.silhouette) == (0, 0, 0)


def test_centroid_silhouette_of_a_single_image_is_its_own():
    found = embedding_difficulty(IMAGES[1:2], torch.tensor([1]), TEXTS)
    assert found.silhouette == pytest.approx(0.5) and of_classes(found, "silhouette") == [None, found.silhouette]
    assert of_classes(found, "name") == ["0", "1"]


# --- laws and oracles ---


@pytest.mark.parametrize("kind", ["joint", "image_only"])
def test_scikit_learn_agrees(kind):
    images, labels, texts = made(60, 5)
    found = embedding_difficulty(images, labels, texts, silhouette=kind)
    points = torch.cat([images, texts]) if kind == "joint" else images
    of = torch.cat([labels, torch.arange(5)]) if kind == "joint" else labels
    assert found.silhouette == pytest.approx(silhouette_score(points, of, metric="cosine"), abs=1e-12)
    samples = silhouette_samples(points, of, metric="cosine")
    assert of_classes(found, "silhouette") == pytest.approx([samples[of == c].mean() for c in range(5)])


def test_centroid_and_accuracy_agree_with_the_plain_formulas(monkeypatch):
    monkeypatch.setattr(difficulty, "SIMILARITIES_AT_ONCE", 5 * 7)  # several parts, the last one smaller
    images, labels, texts = made(60, 5)
    found = embedding_difficulty(images, labels, texts)
    cosines = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1).numpy()
    assert found.accuracy == accuracy_score(labels, cosines.argmax(axis=1))
    silhouettes = []
    for row, label in zip(cosines, labels.tolist(), strict=True):
        a, b = 1 - row[label], min(1 - row[c] for c in range(5) if c != label)
        silhouettes.append((b - a) / max(a, b))
    assert found.silhouette == pytest.approx(np.mean(silhouettes), abs=1e-12)
    by_class = [np.mean([s for s, label in zip(silhouettes, labels, strict=True) if label == c]) for c in range(5)]
    assert of_classes(found, "silhouette") == pytest.approx(by_class)


TASKS = {"n": st.integers(8, 30), "n_classes": st.integers(2, 6), "seed": st.integers(0, 10_000)}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(**TASKS, noise=st.sampled_from([0.0, 0.1, 1.0, 10.0]))
def test_bounds(kind, n, n_classes, seed, noise):
    found = embedding_difficulty(*made(n, n_classes, seed, noise=noise), silhouette=kind)
    for one in (found, *found.classes):
        assert -1 <= one.silhouette <= 1 and -1 <= one.acs <= 1 and 0 <= one.accuracy <= 1 and -2 <= one.margin <= 2


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(**TASKS)
def test_order_of_images_and_of_classes_and_lengths_do_not_matter(kind, n, n_classes, seed):
    images, labels, texts = made(n, n_classes, seed)
    generator = torch.Generator().manual_seed(seed)
    rows, classes = torch.randperm(n, generator=generator), torch.randperm(n_classes, generator=generator)
    places = torch.argsort(classes)  # new class index by old
    lengths = 0.1 + torch.rand(n, 1, generator=generator, dtype=torch.float64)
    before = embedding_difficulty(images, labels, texts, silhouette=kind)
    moved = (lengths * images)[rows], places[labels][rows], 7 * texts[classes]
    after = embedding_difficulty(*moved, silhouette=kind)
    assert figures(after) == pytest.approx(figures(before), abs=1e-9)
    for name in ("images", "silhouette", "acs", "accuracy", "margin"):
        assert of_classes(after, name) == pytest.approx([of_classes(before, name)[c] for c in classes], abs=1e-9)


@settings(max_examples=25)
@given(**TASKS)
def test_centroid_silhouette_is_above_0_where_the_prediction_is_right(n, n_classes, seed):
    images, labels, texts = made(n, n_classes, seed)
    for image, label in zip(images[:5], labels[:5], strict=True):
        one = embedding_difficulty(image[None], label[None], texts)
        assert (one.silhouette > 0) == (one.accuracy == 1) == (one.margin > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_drawn_from_the_global_random_state(kind):
    task = made(60, 5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = embedding_difficulty(*task, silhouette=kind, sample_size=20)
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(numpy_state, np.random.get_state()[1])
    torch.rand(1), np.random.rand(1)
    assert embedding_difficulty(*task, silhouette=kind, sample_size=20) == first


def test_sample_keeps_the_shares_of_the_classes_and_depends_on_the_seed():
    images, _, texts = made(60, 3)
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    rows = difficulty._sample(labels.numpy(), 12, seed=0)
    assert np.bincount(labels[rows]).tolist() == [6, 4, 2] and np.array_equal(np.unique(rows), rows)
    found = embedding_difficulty(images, labels, texts, silhouette="image_only", sample_size=12)
    alone = embedding_difficulty(images[rows], labels[rows], texts, silhouette="image_only")
    assert found.sampled == 12 and found.silhouette == alone.silhouette
    assert figures(found)[1:] == figures(embedding_difficulty(images, labels, texts))[1:]  # of all images
    other = embedding_difficulty(images, labels, texts, silhouette="image_only", sample_size=12, seed=1)
    assert other.silhouette != found.silhouette
    assert embedding_difficulty(images, labels, texts, silhouette="image_only", sample_size=60).sampled == 60
    assert embedding_difficulty(images, labels, texts, sample_size=12).sampled == 60  # centroid takes all


@pytest.mark.parametrize("kind", ["joint", "image_only"])
def test_class_of_which_no_image_was_drawn_has_no_silhouette(kind):
    labels = torch.tensor([0] * 30 + [1] * 29 + [2])
    images, _, texts = made(60, 3)
    found = embedding_difficulty(images, labels, texts, silhouette=kind, sample_size=4)
    assert of_classes(found, "images") == [30, 29, 1] and found.classes[2].silhouette is None
    assert found.classes[2].acs is not None and [one.name for one in found.hardest_first()] in (["0", "1"], ["1", "0"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_and_numpy_are_taken(dtype):
    found = small(image_embeds=IMAGES.to(dtype), class_embeds=TEXTS.to(dtype), labels=LABELS.short())
    assert figures(found) == pytest.approx(figures(small()), abs=0.02)
    assert small(image_embeds=IMAGES.numpy(), labels=LABELS.numpy(), class_embeds=TEXTS.numpy()) == small()


NAN, INF = torch.full((3, 2), math.nan), torch.tensor([[1.0, 0], [math.inf, 0], [0, 1]])
BAD = {
    "unknown kind": ({"kind": "centre"}, ConfigError, "silhouette.*'centre'.*'centroid', 'joint', 'image_only'"),
    "sample size": ({"sample_size": 1}, ConfigError, "sample_size.*1.*from 2"),
    "seed": ({"seed": -1}, ConfigError, "seed.*-1"),
    "no images": ({"image_embeds": IMAGES[:0], "labels": LABELS[:0]}, DataError, r"image_embeds.*\(0, 2\).*1 or more"),
    "one class": ({"class_embeds": TEXTS[:1], "labels": LABELS * 0}, DataError, r"class_embeds.*\(1, 2\).*2 or more"),
    "other length": ({"class_embeds": torch.eye(3)[:2]}, DataError, r"image_embeds.*\(3, 2\).*length 3"),
    "flat": ({"image_embeds": IMAGES[0]}, DataError, r"image_embeds.*\(2,\)"),
    "NaN": ({"image_embeds": NAN}, NonFiniteError, "NaN.*image_embeds, row 0"),
    "infinite": ({"image_embeds": INF}, NonFiniteError, "infinite.*image_embeds, row 1"),
    "NaN text": ({"class_embeds": NAN[:2]}, NonFiniteError, "NaN.*class_embeds, row 0"),
    "zero": ({"image_embeds": IMAGES * torch.tensor([[1], [1], [0]])}, DataError, "direction.*image_embeds, row 2"),
    "fewer labels": ({"labels": LABELS[:2]}, DataError, r"labels.*\(2,\).*\(3,\)"),
    "labels that are no integers": ({"labels": LABELS.float()}, DataError, "labels.*float32.*integers"),
    "boolean labels": ({"labels": LABELS.bool()}, DataError, "labels.*bool.*integers"),
    "label beyond": ({"labels": LABELS + 1}, DataError, "row 2 is no class.*2.*0 to 1"),
    "negative label": ({"labels": LABELS - 1}, DataError, "row 0 is no class.*-1.*0 to 1"),
    "names": ({"class_names": ["cat"]}, DataError, "class_names.*1.*2 names"),
    "one class with images": ({"kind": "image_only", "labels": LABELS * 0}, DataError, "two classes.*3 images of 1"),
    "single images": (
        {"kind": "image_only", "image_embeds": IMAGES[1:], "labels": LABELS[1:]},
        DataError,
        "two images in one of them.*2 images of 2 classes.*centroid",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_embeddings_and_settings_are_refused(name):
    changed, error, message = BAD[name]
    with pytest.raises(error, match=message):
        small(**changed)


# --- the text ---


def test_text_has_the_figures_and_their_reading():
    text = str(small())
    rows = [line.split() for line in text.splitlines()]
    assert ["all", "3", "0.500", "0.867", "66.7", "%", "0.600"] in rows
    assert rows.index(["cat", "2", "0.250", "0.800", "50.0", "%", "0.400"]) < rows.index(
        ["dog", "1", "1.000", "1.000", "100.0", "%", "1.000"]
    )
    words = " ".join(text.split())
    assert "centroid silhouette" in words and "2402.09613" in words and "no thresholds" in words
    assert "separates part" in words and "does not separate" not in words and "drawn" not in words
    assert "Not shown" not in words and max(map(len, text.splitlines())) <= 100


def test_text_of_a_low_silhouette_says_that_the_space_does_not_separate():
    words = " ".join(str(small(labels=1 - LABELS)).split())
    assert "the zero-shot space does not separate this task" in words


def test_text_shows_the_hardest_classes_and_says_what_it_leaves_out():
    images, labels, texts = made(100, 15)
    texts = torch.cat([texts, texts[:2] + 100])
    found = embedding_difficulty(images, labels, texts, [f"name {c}" for c in range(17)], "joint", sample_size=80)
    text = str(found)
    hardest = [one.name for one in found.hardest_first()]
    assert [one.silhouette for one in found.hardest_first()] == sorted(
        one.silhouette for one in found.classes if one.silhouette is not None
    )
    shown = [line.split()[1] for line in text.splitlines() if line.strip().startswith("name ")]
    assert [f"name {c}" for c in shown] == hardest[:10]
    assert "5 classes easier than these" in text and "2 classes without images" in text
    assert "that of 80 images drawn" in text
