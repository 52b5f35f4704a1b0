# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import logging
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, Value

from hf_robust.data.sources import load_source
from hf_robust.errors import DataError
from tests.tiny_models import image_dataset

NAMES = ["red", "green", "blue"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*files):
    """Files that are no pictures, whatever their names say: nothing may open them."""
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("no picture")


# --- parquet ---


def test_images_in_parquet_stay_undecoded():
    image_dataset(4, NAMES).to_parquet("a.parquet")
    dataset = load_source("a.parquet")
    assert set(dataset[0]["image"]) == {"bytes", "path"} and dataset.features["image"] == Image(decode=False)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (image_dataset(2, ["red", "blue", "green"]), "names in 'label' .at d/a.parquet, d/b.parquet.: got Class"),
        (image_dataset(2, NAMES).rename_column("label", "kind"), "different columns .at d/a.*got .'kind', 'label'"),
        (image_dataset(2, NAMES).cast_column("label", Value("int64")), "different types or class names in 'label'"),
    ],
)  # fmt: skip
def test_shards_that_do_not_fit_are_refused(second, message):
    image_dataset(2, NAMES).to_parquet("d/a.parquet")
    second.to_parquet("d/b.parquet")
    with pytest.raises(DataError, match=message):
        load_source("d")


def test_files_without_rows_are_refused():
    for index in range(2):
        image_dataset(2, NAMES).select([]).to_parquet(f"d/{index}.parquet")
    with pytest.raises(DataError, match="dataset is empty .at data.: got 'd'; allowed at least one row"):
        load_source("d", "data")
    image_dataset(2, NAMES).to_parquet("d/2.parquet")
    assert len(load_source("d")) == 2


def broken_rows():
    """A file whose schema can be read, and whose rows cannot."""
    image_dataset(9, NAMES).to_parquet("broken.parquet")
    content = bytearray(Path("broken.parquet").read_bytes())
    content[20:400] = bytes(380)
    Path("broken.parquet").write_bytes(content)
    return "broken.parquet"


def test_a_broken_file_is_named():
    write("d/a.parquet")
    with pytest.raises(DataError, match="source cannot be read .ArrowInvalid.*Parquet.* .at data.: got 'd/a.parquet'"):
        load_source("d", "data")
    with pytest.raises(DataError, match="source cannot be read .(?!DatasetGen).*at data.: got 'broken.parquet'"):
        load_source(broken_rows(), "data")


# --- what save_to_disk writes ---


def test_saved_datasets():
    sets = {"train": image_dataset(3, NAMES), "validation": image_dataset(2, NAMES)}
    sets["train"].save_to_disk("one")
    DatasetDict(sets).save_to_disk("both")
    DatasetDict(train=sets["train"]).save_to_disk("single")
    found = {name: load_source(name) for name in ("one", "both:dev", "both/validation", "single")}
    assert {name: len(dataset) for name, dataset in found.items()} == {
        "one": 3,
        "both:dev": 2,
        "both/validation": 2,
        "single": 3,
    }
    assert all(dataset.features["image"] == Image(decode=False) for dataset in found.values())
    with pytest.raises(DataError, match="several splits.*allowed train, validation. Write 'both:train'"):
        load_source("both")
    with pytest.raises(DataError, match="no such split"):
        load_source("both:test")
    with pytest.raises(DataError, match="source has no splits"):
        load_source("one:train")
    Path("one/state.json").write_text("{")
    with pytest.raises(DataError, match="source cannot be read .*got 'one'"):
        load_source("one")


# --- the Hub ---


@pytest.fixture
def hub_splits(monkeypatch):
    """Datasets of the Hub by name, with their splits; what is loaded comes as one column of the request."""
    splits = {"owner/one": ["test"], "owner/many": ["training", "validation"], "owner/both": ["dev", "val"]}
    monkeypatch.setattr("hf_robust.data.sources.get_dataset_split_names", lambda name: splits[name])
    monkeypatch.setattr(
        "hf_robust.data.sources.load_dataset",
        lambda name, split: Dataset.from_dict({"got": [f"{name} {split}"], "image": [None]}).cast_column(
            "image", Image()
        ),
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/one", "owner/one test"),
        ("owner/many:train", "owner/many training"),
        ("owner/many:val", "owner/many validation"),
        ("owner/both:val", "owner/both val"),
        ("owner/many:training[:80%]", "owner/many training[:80%]"),
        ("owner/many:training[10:20]", "owner/many training[10:20]"),
    ],
)
def test_splits_of_the_hub(hub_splits, source, expected):
    dataset = load_source(source)
    assert dataset["got"][:] == [expected] and dataset.features["image"] == Image(decode=False)


def test_splits_of_the_hub_are_chosen_or_refused(hub_splits):
    with pytest.raises(DataError, match="several splits .*allowed training, validation. Write 'owner/many:training'."):
        load_source("owner/many")
    with pytest.raises(DataError, match="no such split .*allowed training, validation"):
        load_source("owner/many:test")
    with pytest.raises(DataError, match="source cannot be read .KeyError.* .at data.: got 'owner/other'"):
        load_source("owner/other", "data")


def test_a_missing_dataset_is_reported():
    with pytest.raises(
        DataError, match="no such file, folder of images or dataset of the Hub .at data.: got 'owner/name:"
    ):
        load_source("owner/name:test", "data")


# --- datasets ---


def stream(decode=True):
    features = Features({"image": Image(decode=decode), "label": ClassLabel(names=NAMES)})
    return IterableDataset.from_generator(lambda: iter(image_dataset(2, NAMES)), features=features)


def test_datasets_come_undecoded():
    dataset = image_dataset(2, NAMES)
    assert set(load_source(dataset)[0]["image"]) == {"bytes", "path"} and dataset.features["image"] == Image()
    rows = list(load_source(stream()))
    assert [row["label"] for row in rows] == [0, 1] and set(rows[0]["image"]) == {"bytes", "path"}


def test_datasets_without_images_to_decode_come_as_they_are():
    transformed = image_dataset(2, NAMES).with_transform(lambda rows: {"size": [one.size for one in rows["image"]]})
    unknown = stream().map(lambda row: row)
    for dataset in (Dataset.from_dict({"a": [1]}), stream(decode=False), transformed, unknown):
        assert load_source(dataset) is dataset
    assert unknown.features is None and load_source(transformed)[0] == {"size": (40, 40)}


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict])
def test_a_dict_of_datasets_is_refused(kind):
    splits = {"train": image_dataset(2, NAMES), "test": image_dataset(2, NAMES)}
    splits = splits if kind is DatasetDict else {name: one.to_iterable_dataset() for name, one in splits.items()}
    message = (
        rf"dataset with splits .at data.: got '{kind.__name__}'; allowed train, test. Pass .* dataset\['train'\]."
    )
    with pytest.raises(DataError, match=message):
        load_source(kind(splits), "data")


@pytest.mark.parametrize("source", [None, 3, Path("p"), ["p"], torch.utils.data.TensorDataset()])
def test_anything_else_is_refused_by_its_type(source):
    with pytest.raises(
        DataError, match=f"no source of data .at data.: got '{type(source).__name__}'; allowed text, a da"
    ):
        load_source(source, "data")


# --- what it leaves alone ---


def test_nothing_is_written_on_the_screen_and_no_setting_of_datasets_is_changed(capfd):
    image_dataset(9, NAMES).to_parquet("a.parquet")
    write("p/cat/0.jpg")
    broken, dataset = broken_rows(), image_dataset(2, NAMES)
    handler, level = logging.StreamHandler(io.StringIO()), datasets.logging.get_verbosity()
    logging.getLogger("datasets").addHandler(handler)
    datasets.logging.set_verbosity_info()
    capfd.readouterr()
    try:
        for source in ("a.parquet", "p", dataset):
            load_source(source)
        with pytest.raises(DataError):
            load_source(broken)
        assert datasets.logging.get_verbosity() == datasets.logging.INFO and not datasets.are_progress_bars_disabled()
    finally:
        datasets.logging.set_verbosity(level)
        logging.getLogger("datasets").removeHandler(handler)
    assert capfd.readouterr() == ("", "") and handler.stream.getvalue() == ""


def test_the_same_files_give_the_same_fingerprint():
    """Embeddings on disk are found again by it."""
    write("p/cat/0.jpg", "p/dog/0.jpg", "q/cat/0.jpg", "q/dog/1.jpg")
    assert load_source("p")._fingerprint == load_source("p")._fingerprint != load_source("q")._fingerprint
