# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from hf_robust.data.sources import load_source
from hf_robust.errors import DataError, UnsafeFileError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(files):
    """Files by their names, with blanks between; those without suffix are parquet files that hold their own name."""
    for name in files.split():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if Path(name).suffix:
            Path(name).write_text("no picture, no table")
        else:
            pa.parquet.write_table(pa.table({"file": [name]}), Path(f"{name}.parquet").absolute())


# --- files ---

SHARDS = "d/data/train-00000-of-00002 d/data/train-00001-of-00002 d/data/test-00000-of-00001-a09b3c"
FOLDERS = "d/train/0000 d/train/0001 d/validation/0000"
CONFIG = "d/default/train/0000 d/default/test/0000"


@pytest.mark.parametrize(
    ("files", "source", "expected"),
    [
        ("d/part-0 d/part-1", "d", "d/part-0 d/part-1"),
        ("d/a e/b", "d/a.parquet", "d/a"),
        ("d/a d/b d/c.txt", "d/*", "d/a d/b"),
        ("d/a d/.cache/b d/._c", "d", "d/a"),
        ("d/a d/.b", "d/.b.parquet", "d/.b"),
        ("d/.a/__b/c", "d/.a", "d/.a/__b/c"),
        ("d[1]/x[2]* d[1]/x2", "d[1]/x[2]*.parquet", "d[1]/x[2]*"),
        ("d/train d/ood", "d:ood", "d/ood"),
        ("d/train d/ood", "d/*.parquet:train", "d/train"),
        ("d/train d/test", "d/train.parquet", "d/train"),
        ("d/train d/test", "d/train.parquet:train", "d/train"),
        ("d/train d/test", "d/t*n.parquet:training", "d/train"),
        (SHARDS, "d:train", "d/data/train-00000-of-00002 d/data/train-00001-of-00002"),
        (SHARDS, "d:test", "d/data/test-00000-of-00001-a09b3c"),
        (FOLDERS, "d:train", "d/train/0000 d/train/0001"),
        (FOLDERS, "d:val", "d/validation/0000"),
        (FOLDERS, "d/train", "d/train/0000 d/train/0001"),
        (CONFIG, "d:test", "d/default/test/0000"),
        (CONFIG, "d/default:test", "d/default/test/0000"),
        (CONFIG, "d/**/*.parquet:test", "d/default/test/0000"),
        ("d/train-0 d/train_1 d/train2 d/test-0", "d:train", "d/train-0 d/train2 d/train_1"),
        ("d/birds_train d/birds_test", "d:birds_test", "d/birds_test"),
        ("d/a_train d/b_train", "d", "d/a_train d/b_train"),
        ("d/train/train d/train/test", "d:test", "d/train/test"),
        ("d:train/a d/train", "d:train", "d:train/a"),  # a path that exists is that path
    ],
)
def test_splits_of_files(files, source, expected):
    write(files)
    assert load_source(source)["file"][:] == expected.split()


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ("d/train d/test", "d", "source has several splits .at data.: got 'd'; allowed test, train. Write 'd:train'."),
        ("d/train d/test", "d/*", r"several splits.*allowed test, train. Write 'd/\*:train'."),
        (SHARDS, "d", "several splits.*allowed test, train"),
        (FOLDERS, "d", "several splits.*allowed train, validation"),
        ("d/birds_train d/birds_test", "d", "several splits.*allowed birds_test, birds_train"),
        ("d/train-0 d/test-0", "d", "several splits"),
        ("d/part-0 d/part-1", "d:test", "source has no splits .at data.: got 'd:test'. Write 'd'."),
        ("d/train", "d/train.parquet:test", "no such split .at data.*allowed train"),
        ("d/a/train d/b/train", "d", "a/train and b/train are the same split"),
        ("d/train d/train/0", "d:train", "train and train/ are the same split"),
        ("d/val d/dev-00000-of-00001", "d", "dev and val are the same split"),
        ("d/a d/cat/0.jpg", "d", r"several kinds in 'd' .at data.: got \['a.parquet', 'cat/0.jpg'\]"),
        ("d/a d/a.csv", "d", "files of several kinds"),
        ("d/a.csv d/a.tsv", "d", "files of several kinds"),
        ("d/cat/0.jpg d/dog/0.jpg d/labels.csv", "d", "files of several kinds"),
        ("d/0.jpg d/metadata.csv d/labels.tsv", "d", "files of several kinds"),
        ("d/x.parquet/0 d/a", "d/*", "not a regular file .at d/x.parquet"),
        ("d/train/cat/0.jpg d/test/cat/0.jpg d/labels.csv", "d:train", "files of several kinds"),
        ("e/a", "d", "no such file, folder of images or dataset of the Hub .at data.: got 'd'"),
        ("e/a", "d/*.parquet", "no such file"),
        ("e/a", "/d/d/d:train", "no such file"),
        ("e/a", "", "no such file"),
        ("e/a", "~/e", "no such file"),
        ("d/cat/0.jpg", "d/*", "source holds no data .at data.: got 'd/.'"),
        ("e/a", "https://a.org/a.parquet", "source is not on this machine.*Download it"),
    ],
)
def test_files_that_say_nothing_clear_are_refused(files, source, message):
    write(files)
    with pytest.raises((DataError, UnsafeFileError), match=message):
        load_source(source, "data")


# --- folders of images ---


def folders(dataset):
    return [row["path"].split("/")[-3] for row in dataset["image"]]


@pytest.mark.parametrize("asked", ["val", "dev", "valid", "validation", "VALIDATION"])
@pytest.mark.parametrize("on_disk", ["val", "dev", "valid", "validation", "Valid"])
def test_words_of_a_split(asked, on_disk):
    write(f"p/{on_disk}/cat/0.jpg p/training/cat/0.jpg p/testing/cat/0.jpg")
    assert folders(load_source(f"p:{asked}")) == [on_disk]
    assert folders(load_source("p:train")) == ["training"]
    assert folders(load_source("p:test")) == ["testing"]


THREE = "p/train/cat/0.jpg p/val/cat/0.jpg p/test_catalogue/cat/0.jpg"


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        (THREE, "p", "several splits .at data.: got 'p'; allowed test_catalogue, train, val. Write 'p:train'."),
        (THREE, "p:test", "no such split .at data.: got 'p:test'; allowed test_catalogue, train, val. There are '"),
        (THREE, "p:Test_Catalogue", "no such split.*Did you mean 'test_catalogue'"),
        (THREE, "p:", "no such split"),
        (THREE, "p:train[:80%]", r"slice of a local source .at data.: got 'p:train\[:80%\]'"),
        ("p/cat/0.jpg", "p:train[:80%]", "slice of a local source"),
        ("p/cat/0.jpg", "p:test", "source has no splits .at data.: got 'p:test'. Write 'p'."),
        (THREE + " p/validation/cat/0.jpg", "p:train", "val/ and validation/ are the same split .at data.: got 'p'"),
        ("p/b/cat/0.jpg p/Dev/cat/0.jpg", "p", "allowed Dev, b. Write 'p:Dev'."),
    ],
)
def test_a_split_is_chosen_or_refused(files, source, message):
    write(files)
    with pytest.raises(DataError, match=message):
        load_source(source, "data")
