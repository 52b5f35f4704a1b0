# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from datasets import Image
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_robust.data.files import files_of
from hf_robust.data.sources import load_source
from hf_robust.errors import DataError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*files):
    """Files that are no pictures, whatever their names say: nothing may open them."""
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("no picture")


def paths(dataset):
    """The image files of a dataset, relative to the working directory."""
    assert dataset.features["image"] == Image(decode=False)
    return [Path(row["path"]).relative_to(Path.cwd()).as_posix() for row in dataset["image"]]


def classes(dataset):
    return dataset.features["label"].names


@pytest.mark.parametrize(
    ("files", "source", "expected"),
    [
        (["p/cat/0.jpg", "p/dog/1.PNG"], "p", None),
        (["p/train/cat/0.jpg", "p/test/dog/0.jpg"], "p:train", ["p/train/cat/0.jpg"]),
        (["p/train/cat/0.jpg", "p/test/dog/0.jpg"], "p/train", ["p/train/cat/0.jpg"]),
        (["p/train/cat/0.jpg", "p/test/dog/0.jpg"], "p/:test", ["p/test/dog/0.jpg"]),
        (["p/train/cat/0.jpg", "p/docs/a.txt"], "p", ["p/train/cat/0.jpg"]),  # one split need not be named
        (["p/train/cat/0.jpg", "p/eval/cat/0.jpg"], "p:eval", ["p/eval/cat/0.jpg"]),
        (["p/train/cat/0.jpg", "p/test_tube/dog/0.jpg"], "p:test_tube", ["p/test_tube/dog/0.jpg"]),
        (["p/dev/0.jpg", "p/test_tube/0.jpg", "p/train/0.jpg"], "p", None),
        (["p/train/0.jpg"], "p", ["p/train/0.jpg"]),
        (["p/train/dev/0.jpg", "p/train/train/0.jpg", "p/val/train/0.jpg"], "p:val", ["p/val/train/0.jpg"]),
        (["p/cat/0.jpg", "p/.ipynb_checkpoints/0.jpg", "p/__MACOSX/0.jpg", "p/cat/._0.jpg"], "p", ["p/cat/0.jpg"]),
        (["p/train/cat/0.jpg", "p/.git/cat/0.jpg", "p/__MACOSX/train/cat/0.jpg"], "p", ["p/train/cat/0.jpg"]),
        (["p [2024] */cat/0.jpg", "p 2/dog/0.jpg"], "p [2024] *", ["p [2024] */cat/0.jpg"]),
        (["p [2]*/train/cat/0.jpg", "p [2]*/test/dog/0.jpg"], "p [2]*:train", ["p [2]*/train/cat/0.jpg"]),
        (["p:train/cat/0.jpg", "p/train/dog/0.jpg"], "p:train", ["p:train/cat/0.jpg"]),  # it exists
        (["p:a/train/cat/0.jpg", "p/a/dog/0.jpg"], "p:a:train", ["p:a/train/cat/0.jpg"]),
        (["p/cat/0.jpg", "p/README.md", "p/cat/cats.pdf", "p/dataset_info.json"], "p", ["p/cat/0.jpg"]),
    ],
)  # fmt: skip
def test_classes_and_splits(files, source, expected):
    """None expected: all files."""
    write(*files)
    dataset, expected = load_source(source), expected or files
    assert paths(dataset) == expected
    assert [classes(dataset)[label] for label in dataset["label"]] == [path.split("/")[-2] for path in expected]
    assert classes(dataset) == sorted({path.split("/")[-2] for path in expected})


split_names = st.sets(st.sampled_from(["Train", "val", "testing", "test_catalogue", "extra"]), min_size=1)
class_names = st.sets(st.sampled_from(["train", "dev", "bus", "test_tube", "validation", "[a]", "a b"]), min_size=1)


@settings(max_examples=30, deadline=None)
@given(split_names, class_names, st.integers(1, 3))
def test_splits_share_no_image_and_miss_none(splits, names, n_images):
    """Whatever folders are called, every image is in the one split whose folder it lies in."""
    splits |= {"train"} if not splits & {"Train", "val", "testing"} else set()
    with TemporaryDirectory() as root:
        files = [f"{root}/{split}/{name}/{i}.jpg" for split in splits for name in names for i in range(n_images)]
        write(*files)
        if len(splits) > 1:
            with pytest.raises(DataError, match="several splits"):
                load_source(root)
        found = {split: load_source(f"{root}:{split}") for split in splits}
        for split, dataset in found.items():
            assert classes(dataset) == sorted(names)
            assert [row["path"] for row in dataset["image"]] == sorted(f for f in files if f"{root}/{split}/" in f)


def test_an_empty_folder_is_a_class_without_images():
    write("p/cat/0.jpg", "p/owl/0.jpg", "p/cow/.DS_Store")
    Path("p/dog").mkdir()
    dataset = load_source("p")
    assert classes(dataset) == ["cat", "cow", "dog", "owl"] and dataset["label"][:] == [0, 3]


def test_linked_folders_are_classes_and_splits():
    write("all/cat/0.jpg", "all/dog/0.jpg")
    Path("p").mkdir()
    Path("p/cat").symlink_to(Path("all/cat").absolute())
    Path("q").mkdir()
    Path("q/train").symlink_to(Path("all").absolute())
    assert classes(load_source("p")) == ["cat"] and classes(load_source("q:train")) == ["cat", "dog"]


def test_links_back_are_not_followed():
    """To the folder itself, to the one above, and to each other."""
    write("p/cat/0.jpg", "p/cat/more/1.jpg", "p/dog/2.jpg")
    Path("p/self").symlink_to(Path("p").absolute())
    assert files_of("p/**/*.jpg") == files_of("p") == ("p", ["cat/0.jpg", "cat/more/1.jpg", "dog/2.jpg"])
    write("q/3.jpg")
    for link, folder in {"p/cat/more/up": "p/cat", "p/q": "q", "q/back": "p"}.items():
        Path(link).symlink_to(Path(folder).absolute())
    assert files_of("p") == ("p", ["cat/0.jpg", "cat/more/1.jpg", "dog/2.jpg", "q/3.jpg"])


def test_images_without_folders_have_no_labels():
    write("p/1.jpg", "p/0.jpg", "q/train/cat/0.jpg", "q/extra/0.jpg")
    assert load_source("p").column_names == load_source("q:extra").column_names == ["image"]
    assert paths(load_source("p")) == ["p/0.jpg", "p/1.jpg"]


@pytest.mark.parametrize("source", ["p", "p:train"])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("csv", "file_name,label\nb.jpg,NA\na/0.jpg,None\n"),
        ("jsonl", '{"file_name": "b.jpg", "label": "NA"}\n{"file_name": "a/0.jpg", "label": "None"}\n'),
    ],
)
def test_metadata_beside_images(suffix, content, source):
    folder = source.replace(":", "/")
    write(f"{folder}/b.jpg", f"{folder}/a/0.jpg", f"{folder}/a/not_listed.jpg")
    if source != "p":
        write("p/other/cat/0.jpg")
    Path(folder, f"metadata.{suffix}").write_text(content)
    dataset = load_source(source)
    assert paths(dataset) == [f"{folder}/b.jpg", f"{folder}/a/0.jpg"] and dataset["label"][:] == ["NA", "None"]


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        (["p/a/cat/0.jpg"], "p", "a folder within a folder .at data.: got 'p/a/cat/0.jpg'.*name the folder"),
        (["p/train2017/cat/0.jpg", "p/val2017/cat/0.jpg"], "p", "a folder within a folder"),
        (["p/train/a/cat/0.jpg", "p/test/cat/0.jpg"], "p:train", "a folder .at data.: got 'p/train/a/cat/0.jpg'"),
        (["p/cat/0.jpg", "p/0.jpg"], "p", "beside the folders of classes .at data.: got 'p/0.jpg'"),
        (["p/train/cat/0.jpg", "p/0.jpg"], "p:train", "beside the folders of splits .at data.: got '0.jpg'"),
        (["p/train/cat/0.jpg", "p/test/cat/0.jpg", "p/metadata.csv"], "p:train", "beside the folders of splits"),
        (["p/train/0.jpg", "p/test/0.jpg"], "p", "folders of splits hold no classes .at data.: got .'test', 'train'"),
        (["p/cat/0.jpg", "p/dog/0.heiv"], "p", "folder of a class holds no images .at data.: got 'p/dog/0.heiv'"),
        (["p/cat/0.jpg"], "p/cat/*.jpg", "images are not in a folder .at data.*Name their folder"),
        (["p/cat/0.jpg"], "p/cat/0.jpg", "images are not in a folder"),
        (["p/metadata.csv", "p/metadata.jsonl", "p/0.jpg"], "p", "metadata of several kinds"),
        (["p/README.md"], "p", "source holds no data .at data.: got 'p'; allowed parquet"),
        (["p/.git/0.jpg"], "p", "source holds no data"),
        (["p.zip"], "p.zip", "source holds no data"),
    ],
)  # fmt: skip
def test_image_folders_that_say_nothing_clear_are_refused(files, source, message):
    write(*files)
    with pytest.raises(DataError, match=message):
        load_source(source, "data")


def test_a_folder_that_may_not_be_read_is_not_left_out(monkeypatch):
    write("p/cat/0.jpg", "p/dog/0.jpg")
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scandir(path if path != "p/dog" else "p/gone"))
    with pytest.raises(DataError, match="source cannot be read .FileNotFoundError: .*p/gone.* .at data.: got 'p'"):
        load_source("p", "data")
