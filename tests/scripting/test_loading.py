# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_robust import RobustTrainingArguments
from hf_robust.errors import ConfigError, DataError
from hf_robust.scripting.loading import checkpoint_to_resume, load_images, load_model, read_class_names
from tests.tiny_models import image_dataset, tiny_model

NAMES = ["red", "green", "blue"]
COLUMNS = SimpleNamespace(image_column="image", label_column="label")


def test_names_of_folders_become_class_names(tmp_path):
    for index, row in enumerate(image_dataset(6, ["sea_lion", "blue car"])):
        path = tmp_path / "images" / ["sea_lion", "blue car"][row["label"]] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    images = load_images(str(tmp_path / "images"), "test", COLUMNS, None)
    assert images.features["label"].names == ["blue car", "sea lion"]
    assert len(images) == 6 and images.unique("label") == [0, 1]
    assert "bytes" in images[0]["image"]  # left to the collator to decode


def test_labels_may_be_text_and_columns_have_other_names(tmp_path):
    args = SimpleNamespace(image_column="img", label_column="kind")
    dataset = image_dataset(3, NAMES).remove_columns("label").add_column("label", ["red", "blue", "red"])
    source = str(tmp_path / "text.parquet")
    dataset.to_parquet(source)
    assert load_images(source, "train", args, None)["label"][:] == [1, 0, 1]
    assert load_images(source, "train", args, NAMES)["label"][:] == [0, 2, 0]
    assert load_images(source, "test", args, ["cat"]).features["label"].names == ["blue", "red"]
    with pytest.raises(DataError, match="outside the class names.*text.parquet.*'blue'"):
        load_images(source, "train", args, ["red", "bleu"], only_these=True)
    image_dataset(3, NAMES).rename_columns({"image": "img", "label": "kind"}).to_parquet(tmp_path / "renamed.parquet")
    assert load_images(str(tmp_path / "renamed.parquet"), "train", args, None).column_names == ["image", "label"]


def test_class_names_are_lines(tmp_path):
    (tmp_path / "names.txt").write_text("cat\nHüte\n", encoding="utf-8")
    assert read_class_names(str(tmp_path / "names.txt")) == ["cat", "Hüte"] and read_class_names(None) is None
    with pytest.raises(ConfigError, match="class names cannot be read.*no.txt"):
        read_class_names(str(tmp_path / "no.txt"))


def test_a_model_that_is_not_there_is_one_short_error(tmp_path):
    tiny_model("clip").save_pretrained(tmp_path / "model")
    assert load_model(str(tmp_path / "model"), "float32").config.model_type == "clip"
    (tmp_path / "empty").mkdir()
    for name in ("no/where", str(tmp_path / "empty")):
        with pytest.raises(ConfigError, match=f"no model can be loaded .at {name}.: got") as caught:
            load_model(name, "float32")
        assert "\n" not in str(caught.value)


@pytest.fixture
def output(tmp_path):
    """A folder with checkpoints."""
    for number in (5, 10, 9):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("wish", "found"),
    [(None, None), ("false", None), ("true", "checkpoint-10"), ("True", "checkpoint-10"), ("last", "checkpoint-10")],
)
def test_the_newest_checkpoint_is_found(output, wish, found):
    args = RobustTrainingArguments(str(output), resume_from_checkpoint=wish)
    assert checkpoint_to_resume(args) == (found and str(output / found))
    named = RobustTrainingArguments("elsewhere", resume_from_checkpoint=str(output / "checkpoint-5"))
    assert checkpoint_to_resume(named) == str(output / "checkpoint-5")


def test_no_checkpoint_is_an_error(output, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, wish in ((tmp_path / "empty", "last"), (tmp_path / "new", "true"), (output, "nowhere"), (output, ".")):
        args = RobustTrainingArguments(str(folder), resume_from_checkpoint=wish)
        with pytest.raises(ConfigError, match="no checkpoint to resume from .at resume_from_checkpoint.: got"):
            checkpoint_to_resume(args)
