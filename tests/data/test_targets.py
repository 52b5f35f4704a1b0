# SPDX-License-Identifier: Apache-2.0
"""What rows have beside their images, if it is not one label: texts, several labels, identities."""

from __future__ import annotations

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset, List, Value
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from hf_robust.data.collator import ImageCollator
from hf_robust.data.columns import KINDS, ROW, no_column
from hf_robust.data.digest import rows_digest
from hf_robust.data.embeds_cache import with_reference_embeds
from hf_robust.data.rows import labelled_images
from hf_robust.errors import DataError
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

CLASSES = ["cat", "dog", "owl"]
CAPTIONS = [["two dogs", "dogs at play"], ["a cat"], ["an owl", "a bird", "a bird at night"]]
LISTS = [["dog", "cat"], [], ["owl"]]
VECTORS = [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def beside(feature=None, /, **columns):
    """Images of which none can be opened, with other columns."""
    n = len(next(iter(columns.values())))
    unreadable = [{"bytes": b"no image", "path": None}] * n
    dataset = Dataset.from_dict({"image": unreadable, **columns})
    dataset = dataset.cast_column("image", datasets.Image())
    return dataset if feature is None else dataset.cast_column(next(iter(columns)), feature)


class Listed(torch.utils.data.Dataset):
    """As users write one: rows that show only when they are read."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def torch_rows(name, values):
    return Listed([{"image": Image.new("RGB", (4, 4)), name: value} for value in values])


def streamed(dataset):
    return IterableDataset.from_generator(lambda: iter(dataset.with_format(None).cast_column("image", dict_image())))


def dict_image():
    return datasets.Image(decode=False)


# --- texts ---


def test_texts_are_lists_of_the_rows_that_are_shown():
    rows = labelled_images(beside(caption=CAPTIONS).select([2, 0, 1]), "photos", target=None)
    assert rows.target == "text" and rows.labels is None and rows.class_names is None and rows.has_several_texts
    some = rows.select([1, 2])
    assert some.texts == [some[0]["text"], some[1]["text"]] == CAPTIONS[:2]
    assert [row[ROW] for row in some.__getitems__([1, 0])] == [1, 0]  # by which a batch finds its texts again
    alone = labelled_images(beside(txt=["a cat", "a dog"]), "photos", target="text")
    assert alone.texts == [["a cat"], ["a dog"]] and alone[1]["text"] == ["a dog"] and not alone.has_several_texts
    assert labelled_images(beside(label=[0]), "photos").texts is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch_rows("caption", CAPTIONS),
        lambda: Listed([(Image.new("RGB", (4, 4)), texts) for texts in CAPTIONS]),
        lambda: beside(caption=CAPTIONS).to_iterable_dataset(),
        lambda: streamed(beside(caption=CAPTIONS)),
        lambda: ConcatDataset([Subset(beside(caption=CAPTIONS), [0]), beside(caption=CAPTIONS[1:])]),
    ],
)
def test_texts_of_every_form_of_a_dataset(make):
    rows = labelled_images(make(), "photos", target="text")
    assert [row["text"] for row in rows] == CAPTIONS and rows.target == "text"
    if isinstance(getattr(rows, "rows", None), ConcatDataset):
        assert rows.select([2, 0]).texts == [CAPTIONS[2], CAPTIONS[0]] and rows[2][ROW] == 2


BAD_TEXTS = {  # found before any image is opened
    "empty": (["a cat", ""], "row without text.*photos, row 1"),
    "blank": (["a cat", " \n"], "row without text.*photos, row 1"),
    "none": ([None, "a cat"], "row without text.*photos, row 0"),
    "no list": ([["a cat"], None], "row without text.*photos, row 1"),
    "empty list": ([["a cat"], ["b"], []], r"row without text.*photos, row 2.*dataset.filter"),
    "empty in a list": ([["a cat", "a"], ["b", ""]], "row without text.*photos, row 1"),
    "none in a list": ([["a cat"], ["b", None]], "row without text.*photos, row 1"),
    "numbers": ([1, 2], "texts are no strings.*photos, text"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_rows_without_text_are_refused(name):
    values, message = BAD_TEXTS[name]
    with pytest.raises(DataError, match=message):
        labelled_images(beside(text=values), "photos", target="text")
    with pytest.raises(DataError, match="row without text.*photos, row"):
        list(labelled_images(torch_rows("text", values), "photos", target="text"))


# --- several labels ---


FORMS = {
    "names": (lambda: beside(labels=LISTS), None, CLASSES),
    "names in an order": (lambda: beside(labels=[["Dog", "cat"], [], ["owl"]]), CLASSES, CLASSES),
    "indices with names": (lambda: beside(List(ClassLabel(names=CLASSES)), label=[[1, 0], [], [2]]), None, CLASSES),
    "indices": (lambda: beside(labels=[[1, 0], [], [2]]), CLASSES, CLASSES),
    "vectors": (lambda: beside(labels=VECTORS), CLASSES, CLASSES),
    "vectors without names": (lambda: beside(List(Value("bool")), labels=VECTORS), None, None),
    "vectors of one length": (lambda: beside(List(Value("int8"), length=3), labels=VECTORS), None, None),
    "vectors of numbers": (lambda: beside(List(Value("float32")), labels=VECTORS), CLASSES, CLASSES),
    "torch vectors": (lambda: torch_rows("labels", [torch.tensor(one) for one in VECTORS]), None, None),
    "torch vectors with names": (lambda: torch_rows("labels", [np.array(VECTORS[0]), *VECTORS[1:]]), CLASSES, CLASSES),
    "torch names": (lambda: torch_rows("labels", LISTS), CLASSES, CLASSES),
    "stream": (
        lambda: beside(List(ClassLabel(names=CLASSES)), label=[[1, 0], [], [2]]).to_iterable_dataset(),
        None,
        CLASSES,
    ),
    "stream without features": (lambda: streamed(beside(labels=LISTS)), CLASSES, CLASSES),
}


@pytest.mark.parametrize("form", FORMS)
def test_several_labels_of_every_form_are_one_matrix(form):
    make, order, names = FORMS[form]
    rows = labelled_images(make(), "photos", order=order, target="labels")
    assert [row["labels"] for row in rows] == VECTORS
    assert rows.class_names == names and rows.target == "labels"
    if "torch" not in form and "stream" not in form:
        assert rows.labels.dtype == np.int8 and rows.select([2, 0]).shown_labels.tolist() == [VECTORS[2], VECTORS[0]]
        assert labelled_images(make(), "photos", order=order, target=None).target == "labels"


def test_what_is_not_known_of_a_class_is_minus_one():
    for feature, unknown in ((Value("float32"), float("nan")), (Value("int8"), None), (Value("int8"), -1)):
        rows = labelled_images(beside(List(feature), labels=[[1, unknown, 0], [0, 0, 0]]), "photos", target="labels")
        assert rows.labels.tolist() == [[1, -1, 0], [0, 0, 0]]
    pairs = labelled_images(beside(labels=[[1, 1], [0, 1]]), "photos", order=["cat", "dog"], target="labels")
    assert pairs.labels.tolist() == [[1, 1], [0, 1]]  # a list of indices has none twice


BAD_LISTS = {
    "unknown name": ([["cat"], ["cow"]], CLASSES, "class_names lack a label.*photos, row 1.*'cow'"),
    "unknown index": ([[0], [0, 3]], CLASSES, "label is no class.*photos, row 1.*got 3; allowed 0 to 2"),
    "negative index": ([[0, 2], [-1]], CLASSES, "label is no class.*photos, row 1.*got -1"),
    "no name": ([["cat"], [" "]], None, "label without name.*photos, row 1"),
    "another length": ([[0, 1, 1], [0, 1, 0]], ["cat", "dog"], "another length.*row 0.*got 3; allowed 2"),
    "one of another length": ([[0, 1, 0], [0, 0]], CLASSES, "one of them twice.*row 0.*entry for every class"),
    "another entry": ([[0.0, 1.0, 0.0], [0.0, 0.5, 0.0]], CLASSES, "another entry.*row 1.*got 0.5"),
    "no list": ([[0], None], CLASSES, "row without labels.*row 1.*empty list"),
    "lists of lists": ([[[0]], [[1]]], CLASSES, "neither integers nor text"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists_of_labels_are_refused(name):
    values, order, message = BAD_LISTS[name]
    with pytest.raises(DataError, match=message):
        labelled_images(beside(labels=values), "photos", order=order, target="labels")
    if name != "no name":
        with pytest.raises(DataError, match="row [01]"):
            list(labelled_images(torch_rows("labels", values), "photos", order=order, target="labels"))


def test_what_a_list_of_labels_means_is_not_guessed():
    with pytest.raises(DataError, match=r"indices, or 0/1 vectors.*\[0, 1\].*Value\('bool'\)"):
        labelled_images(beside(labels=[[0, 1], [1, 0]]), "photos", order=["cat", "dog"], target="labels")
    for values in ([[0], [4, 1]], [[], []]):
        with pytest.raises(DataError, match="not known which classes.*class_names"):
            labelled_images(beside(labels=values), "photos", target="labels")
    with pytest.raises(DataError, match="not known which classes.*class_names"):
        list(labelled_images(torch_rows("labels", LISTS), "photos", target="labels"))
    with pytest.raises(DataError, match="labels are no lists.*photos, label"):
        labelled_images(beside(label=[0, 1]), "photos", target="labels")
    with pytest.raises(DataError, match="labels are neither integers nor text"):
        list(labelled_images(torch_rows("labels", [["cat", 1]]), "photos", target="labels", order=CLASSES))


INDICES = {  # in none of which a row by itself is wrong
    "short": [[1, 0, 1], [1, 0]],
    "large": [[1, 0, 1], [1, 0, 2]],
    "one": [[0, 0, 1], torch.tensor([1])],
    "unsorted": [[1, 1, 0], np.array([2, 0])],
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_that_show_only_in_a_row_are_refused_and_not_taken_for_vectors(name):
    message = "0/1 vector has another .*photos, row 1.*names of classes; or use a datasets.Dataset"
    rows = labelled_images(torch_rows("labels", INDICES[name]), "photos", order=CLASSES, target="labels")
    assert sum(rows[0]["labels"]) == sum(INDICES[name][0])
    with pytest.raises(DataError, match=message):
        rows[1]


def test_two_classes_are_vectors_in_a_row_and_indices_where_a_stream_says_so():
    pairs = [[1, 0], [0, 1], [0, -1], [0, 0]]
    rows = labelled_images(torch_rows("labels", pairs), "photos", order=["cat", "dog"], target="labels")
    assert [row["labels"] for row in labelled_images(ConcatDataset([rows, rows]), "photos")] == pairs * 2
    stream = beside(List(ClassLabel(names=["cat", "dog"])), labels=[[1, 0], [1]]).to_iterable_dataset()
    assert [row["labels"] for row in labelled_images(stream, "photos", target="labels")] == [[1, 1], [0, 1]]


def test_several_labels_that_are_all_unknown_stay_and_others_have_their_name_in_messages():
    unknown = [[-1, -1, -1], [-1, -1, -1]]
    rows = labelled_images(beside(labels=unknown), "photos", order=CLASSES, target="labels")
    assert rows.columns.label == "labels" and [row["labels"] for row in rows] == unknown
    assert "no column 'labels'" in str(no_column(KINDS["labels"], ["image"], "photos"))


# --- identities ---


def test_identities_are_numbered_and_keep_their_names_as_text():
    numbers = labelled_images(beside(identity=[40, -7, 40]), "people", target=None)
    assert numbers.target == "identity" and numbers.class_names == ["-7", "40"]
    assert numbers.labels.tolist() == [1, 0, 1] == [row["identity"] for row in numbers]
    texts = labelled_images(beside(identity=["b", "a ", "a", ""]), "people", target="identity")
    assert texts.class_names == ["", "a", "a ", "b"] and texts.labels.tolist() == [3, 2, 1, 0]
    feature = ClassLabel(names=["z", "y", "x"])  # of which a selection has no image of y
    some = labelled_images(beside(feature, identity=[2, 0, 2]), "people", target="identity")
    assert some.class_names == ["z", "x"] and some.labels.tolist() == [1, 0, 1]
    read = labelled_images(torch_rows("identity", [3, 5]), "people", target="identity")
    assert [row["identity"] for row in read] == [3, 5] and read.labels is None
    with pytest.raises(DataError, match="row without identity.*people, row 1"):
        labelled_images(beside(identity=["a", None]), "people", target="identity")
    with pytest.raises(DataError, match="neither integers nor text.*people, identity"):
        labelled_images(beside(identity=[0.5]), "people", target="identity")


class Targets(Listed):
    """As torchvision's: all labels are known before a row is read."""

    def __init__(self, targets, rows=None):
        super().__init__([(Image.new("RGB", (4, 4)), one) for one in (targets if rows is None else rows)])
        self.targets = targets


@pytest.mark.parametrize("values", [["b", "a", "b"], [7, -17, 7], torch.tensor([27, 7, 27]), np.array([3, 1, 3])])
def test_identities_of_targets_are_numbered_as_those_of_a_table(values):
    rows = labelled_images(Targets(values), "people", target="identity")
    table = labelled_images(beside(identity=values), "people", target="identity")
    assert rows.labels.tolist() == table.labels.tolist() == [row["identity"] for row in rows] == [1, 0, 1]
    assert rows.class_names == table.class_names


def test_identities_of_joined_sets_are_numbered_together_and_those_of_rows_are_looked_at():
    parts = [labelled_images(Targets(values), "people", target="identity") for values in ([7, 9, 7], [8, 9])]
    rows = labelled_images(ConcatDataset(parts), "people", target="identity")
    assert rows.class_names == ["7", "9", "8"]
    assert [row["identity"] for row in rows] == rows.labels.tolist() == [0, 1, 0, 2, 1]
    with pytest.raises(DataError, match="labels of rows are not those of `targets`"):
        labelled_images(Targets([7, 9], rows=[7, 8]), "people", target="identity")[1]
    with pytest.raises(DataError, match="neither integers nor text.*people, row 0.*0.5"):
        labelled_images(Targets([0.5, 1]), "people", target="identity")


# --- which of them ---


def test_the_columns_decide_unless_there_are_several():
    both = beside(label=[0, 1], caption=["a cat", "a dog"], identity=[4, 4])
    message = r"label \('label'\) and text \('caption'\) and identity.*photos.*Name the task, or remove one"
    with pytest.raises(DataError, match=message):
        labelled_images(both, "photos", target=None)
    assert labelled_images(both, "photos")[1].items() >= {"label": 1, "caption": "a dog"}.items()  # as ever
    assert labelled_images(both, "photos", target="text").texts == [["a cat"], ["a dog"]]
    assert labelled_images(both, "photos", target="identity").labels.tolist() == [0, 0]
    assert labelled_images(both, "photos", label_column="label", target=None).target == "label"
    named = labelled_images(both, "photos", label_column="caption", target="text")
    assert named.texts == [["a cat"], ["a dog"]]
    nothing = labelled_images(both.select_columns(["image"]), "photos", target=None)
    assert nothing.target is None and nothing.columns.label is None
    assert labelled_images(torch_rows("label", [0]), "photos", target=None).target == "label"
    parts = [labelled_images(both, "photos", target=target) for target in ("text", "label")]
    with pytest.raises(DataError, match="other targets.*photos"):
        labelled_images(ConcatDataset(parts), "photos")


def test_a_transform_may_not_change_a_target():
    for column, values, other in (("text", ["a", "b"], "c"), ("labels", [[1, 0, 0], [0, 0, 1]], [1, 1, 1])):
        plain = image_dataset(2, CLASSES).remove_columns("label").add_column(column, values)
        kept = plain.with_transform(lambda rows, c=column: {"image": rows["image"], c: rows[c]})
        changed = plain.with_transform(lambda rows, c=column, o=other: {"image": rows["image"], c: [o]})
        assert labelled_images(kept, "photos", target=None, order=CLASSES)[0]["image"].open().mode == "RGB"
        with pytest.raises(DataError, match=f"transform changes a {column}"):
            labelled_images(changed, "photos", target=None, order=CLASSES)[0]["image"].open()


# --- what is made of them ---


TARGETS = {
    "text": dict(caption=CAPTIONS),
    "labels": dict(label=LISTS),
    "labels with unknown": dict(label=[[1, -1, 0], [0, 0, 1], [1, 1, 1]]),
    "identity": dict(identities=["b", "a", "b"]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_dataset_of_the_rows_is_read_as_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (column, values), target = *TARGETS[name].items(), name.split()[0]
    dataset = (
        image_dataset(3, CLASSES).remove_columns("label").rename_column("image", "img").add_column(column, values)
    )
    order = CLASSES if name == "labels with unknown" else None
    rows = labelled_images(dataset, "photos", order=order, target=target).select([2, 0, 1])
    embedded = with_reference_embeds(rows, tiny_model("clip"), ImageCollator(tiny_processor("clip")), 2, silent=True)
    assert set(embedded.column_names) == {"image", target, "reference_embeds"}
    again = labelled_images(embedded, "photos", order=order, target=None)
    assert again.target == target and again.texts == rows.texts and again.class_names == rows.class_names
    assert [row[target] for row in again] == [row[target] for row in rows]


def test_a_run_is_known_by_all_that_is_beside_its_images():
    digests = []
    for target, columns in {
        "text": [
            dict(text=["a", "b"]),
            dict(text=["a", "c"]),
            dict(text=[["a"], ["b", "c"]]),
            dict(text=[["a", "b"], ["c"]]),
        ],
        "labels": [dict(labels=[["a"], ["b"]]), dict(labels=[["a"], ["a", "b"]])],
        "identity": [dict(identity=["a", "b"]), dict(identity=["a", "a"])],
    }.items():
        digests += [rows_digest(labelled_images(beside(**one), "photos", target=target)) for one in columns]
    assert len({repr(digest) for digest in digests}) == len(digests) and digests[0]["labels"] is None
    first = labelled_images(beside(text=["a", "b", "a", "b"]), "photos", target="text")
    assert rows_digest(replace(first, numbers=np.array([2, 3]))) == digests[0]
    assert "texts" not in rows_digest(labelled_images(beside(label=[0]), "photos"))
