# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset

from hf_robust import RobustTrainingArguments
from hf_robust.errors import CheckpointError, ConfigError, DataError
from hf_robust.scripting.loading import load_images, load_model, read_class_names, usable, wish_to_resume
from hf_robust.training.manifest import seal_checkpoint
from tests.tiny_models import image_dataset, tiny_model

NAMES = ["red", "green", "blue"]
COLUMNS = SimpleNamespace(image_column=None, label_column=None)


def test_labels_may_be_text_and_take_the_order_of_class_names(tmp_path):
    dataset = image_dataset(3, NAMES).remove_columns("label").add_column("label", ["red", "blue", "red"])
    source = str(tmp_path / "text.parquet")
    dataset.to_parquet(source)
    assert load_images(source, "train_data", COLUMNS).labels.tolist() == [1, 0, 1]
    assert load_images(source, "train_data", COLUMNS, NAMES).labels.tolist() == [0, 2, 0]


def test_a_column_that_is_named_is_the_one_and_splits_are_read_one_at_a_time(tmp_path):
    for split, n in (("train", 6), ("test", 3)):
        two = image_dataset(n, NAMES).add_column("category", [2] * n)
        two.to_parquet(tmp_path / f"{split}.parquet")
    named = SimpleNamespace(image_column=None, label_column="category")
    assert load_images(f"{tmp_path}:test", "eval", named).labels.tolist() == [2, 2, 2]
    assert len(load_images(f"{tmp_path}:train", "train_data", COLUMNS)) == 6
    with pytest.raises(DataError, match="several splits .at train_data.*test, train.*:train"):
        load_images(str(tmp_path), "train_data", COLUMNS)
    wrong = SimpleNamespace(image_column="img", label_column=None)
    with pytest.raises(DataError, match="no column 'img' .at eval.*category, image, label"):
        load_images(f"{tmp_path}:test", "eval", wrong)


def test_images_that_cannot_be_used_are_left_out_if_asked(tmp_path):
    table = image_dataset(3, NAMES).with_format("arrow")[:].to_pylist()
    table[1]["image"] = {"bytes": b"no image", "path": "1.png"}
    Dataset.from_list(table, features=image_dataset(1, NAMES).features).to_parquet(tmp_path / "a.parquet")
    args = RobustTrainingArguments(str(tmp_path / "out"), on_bad_image="skip", disable_tqdm=True)
    rows = usable(load_images(str(tmp_path / "a.parquet"), "id", COLUMNS), args)
    assert len(rows) == 2 and "row 1" in rows.skipped[0]


def test_class_names_are_lines_or_an_object(tmp_path):
    (tmp_path / "names.txt").write_text("cat\nHüte\n", encoding="utf-8")
    assert read_class_names(str(tmp_path / "names.txt")) == ["cat", "Hüte"] and read_class_names(None) is None
    (tmp_path / "names.json").write_text('{"n02": "Hüte", "n01": "cat"}', encoding="utf-8")
    assert read_class_names(str(tmp_path / "names.json")) == {"n02": "Hüte", "n01": "cat"}
    (tmp_path / "bad.json").write_text("[1", encoding="utf-8")
    with pytest.raises(DataError, match="no valid JSON .at .*bad.json"):
        read_class_names(str(tmp_path / "bad.json"))
    with pytest.raises(DataError, match="file cannot be read .at .*no.txt"):
        read_class_names(str(tmp_path / "no.txt"))


def test_a_model_that_is_not_there_is_one_short_error(tmp_path):
    tiny_model("clip").save_pretrained(tmp_path / "model")
    assert load_model(str(tmp_path / "model"), "float32").config.model_type == "clip"
    (tmp_path / "empty").mkdir()
    for name in ("no/where", str(tmp_path / "empty")):
        with pytest.raises(ConfigError, match=f"no model can be loaded .*. .at {name}") as caught:
            load_model(name, "float32")
        assert "\n" not in str(caught.value)


@pytest.fixture
def output(tmp_path):
    """A folder with checkpoints."""
    for number in (5, 10, 9):
        (tmp_path / f"checkpoint-{number}").mkdir()
        for file in ("trainer_state.json", "optimizer.pt"):
            (tmp_path / f"checkpoint-{number}" / file).touch()
        facts = {"step": number, "epoch": 0, "extra": False, "order": number, "run": {}, "versions": {}}
        seal_checkpoint(tmp_path / f"checkpoint-{number}", facts)
    return tmp_path


@pytest.mark.parametrize(
    ("wish", "found"),
    [(None, None), ("false", None), ("true", "checkpoint-10"), ("True", "checkpoint-10"), ("last", "checkpoint-10")],
)
def test_the_newest_checkpoint_is_found(output, wish, found):
    args = RobustTrainingArguments(str(output), resume_from_checkpoint=wish)
    assert wish_to_resume(args) == (found and str(output / found))
    named = RobustTrainingArguments("elsewhere", resume_from_checkpoint=str(output / "checkpoint-5"))
    assert wish_to_resume(named) == str(output / "checkpoint-5")


def test_no_checkpoint_is_an_error(output, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, wish in ((tmp_path / "empty", "last"), (tmp_path / "new", "true"), (output, "nowhere"), (output, ".")):
        args = RobustTrainingArguments(str(folder), resume_from_checkpoint=wish)
        with pytest.raises(CheckpointError, match="no whole checkpoint|no such checkpoint|no manifest"):
            wish_to_resume(args)
