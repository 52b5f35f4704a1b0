# SPDX-License-Identifier: Apache-2.0
"""`hf-robust predict`: what is printed of which images."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from hf_robust import ZeroShotClassifier
from hf_robust.commands.predict import PredictArguments, image_files, main, print_csv
from hf_robust.errors import AdapterFileError, ConfigError, DataError
from tests.tasks.saved import captioned, save_base, save_trained, several
from tests.tiny_models import synthetic_picture
from tests.trainers import NAMES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("predicting")


@pytest.fixture(scope="module")
def base(root):
    return save_base(root)


@pytest.fixture(scope="module")
def adapter(root, base):
    return save_trained(root, base, "adapter", "saft").folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Five pictures, one of them in a folder below, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    Path("photos", "more").mkdir(parents=True)
    for label, name in enumerate(("a.png", "b.png", "[bold]c.png", "more/d.png", "e f.png")):
        synthetic_picture(label % 3, 3, 40, seed=label).save(Path("photos", name))
    Path("photos", "notes.txt").write_text("no image")
    return ["photos/[bold]c.png", "photos/a.png", "photos/b.png", "photos/e f.png", "photos/more/d.png"]


@pytest.fixture
def printed(capsys):
    """Predicts, and returns what was printed to stdout and to stderr."""

    def run(model, images, **how):
        capsys.readouterr()
        main(PredictArguments(str(model), images, use_cpu=True, **how))
        found = capsys.readouterr()
        return found.out, found.err

    return run


def test_json_is_one_array_with_an_object_for_every_file(adapter, photos, printed):
    out, err = printed(adapter, ["photos"], format="json", batch_size=2)
    expected = ZeroShotClassifier.from_pretrained(adapter, device="cpu").predict(photos, batch_size=2)
    assert json.loads(out) == [{"file": file, **one} for file, one in zip(photos, expected, strict=True)]
    assert "Looking at images" in err
    assert printed(adapter, ["photos"], format="json", batch_size=2, silent=True)[0] == out


def test_csv_has_a_header_and_a_line_for_every_answer(adapter, photos, printed):
    out, _ = printed(adapter, ["photos/a.png", "photos/e f.png"], format="csv", top_k=2)
    rows = list(csv.DictReader(io.StringIO(out)))
    answers = json.loads(printed(adapter, ["photos/a.png", "photos/e f.png"], format="json", top_k=2)[0])
    expected = [(one["file"], a["label"], a["score"]) for one in answers for a in one["answers"]]
    assert [(row["file"], row["label"], float(row["score"])) for row in rows] == expected and len(rows) == 4


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "é"), ("ascii", r"\xe9")])
def test_csv_escapes_what_stdout_cannot_encode(encoding, shown, monkeypatch):
    """A name that is not UTF-8, as Linux allows, and one that is not in the stdout's encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    print_csv([(name, {"label": "é", "score": 0.5}) for name in ("\udcff.png", "é.png")])
    stream.seek(0)
    assert stream.read() == f"file,label,score\n\\udcff.png,{shown},0.5\n{shown}.png,{shown},0.5\n"


def test_the_table_shows_every_file_as_it_is_called(adapter, photos, printed):
    out, _ = printed(adapter, ["photos"])
    answers = json.loads(printed(adapter, ["photos"], format="json")[0])
    lines = out.splitlines()
    for one in answers:
        assert any(one["file"] in line and one["label"] in line and f"{one['score']:.3f}" in line for line in lines)


def test_other_class_names_and_any_dual_encoder(adapter, base, photos, printed):
    for model in (adapter, base):
        found = json.loads(printed(model, ["photos/a.png"], format="json", class_names=["lynx", "otter"])[0])
        assert found[0]["label"] in ("lynx", "otter")
    with pytest.raises(AdapterFileError, match="not said what was trained"):
        printed(base, ["photos/a.png"])


def test_a_file_without_a_label_has_a_line(root, base, photos, printed):
    saved = save_trained(root, base, "several", "saft", task="several_labels", train_dataset=several())
    saved.trainer.model.threshold = 1e3
    saved.trainer.save_model(saved.folder)
    assert printed(saved.folder, ["photos/a.png"], format="csv")[0] == "file,label,score\nphotos/a.png,,\n"
    assert json.loads(printed(saved.folder, ["photos/a.png"], format="json")[0])[0]["answers"] == []
    assert "photos/a.png" in printed(saved.folder, ["photos/a.png"])[0]
    best = json.loads(printed(saved.folder, ["photos/a.png"], format="json", top_k=1)[0])
    assert best[0]["answers"][0]["label"] in NAMES


def test_a_broken_image_stops_it_before_anything_is_printed_or_is_left_out_by_name(adapter, photos, printed, capsys):
    broken = Path("photos/b.png")
    broken.write_bytes(broken.read_bytes()[:900])
    with pytest.raises(DataError, match="at image 2, photos/b.png"):
        printed(adapter, ["photos"], format="json")
    assert not capsys.readouterr().out
    out, err = printed(adapter, ["photos"], format="json", on_bad_image="skip")
    assert [one["file"] for one in json.loads(out)] == [file for file in photos if file != str(broken)]
    assert "1 of 5 images are left out:" in err and "image 2, photos/b.png" in err
    with pytest.raises(DataError, match="no image can be used"):
        printed(adapter, [str(broken)], on_bad_image="skip")


def test_files_folders_patterns_and_addresses(photos):
    address = "https://example.org/a.jpg"
    given = ["photos/notes.txt", "photos", "photos/[ab].png", "photos/[bold]c.png", address]
    two = ["photos/a.png", "photos/b.png"]
    assert image_files(given) == ["photos/notes.txt", *photos, *two, "photos/[bold]c.png", address]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["photos/a.png", "photos/none.png"], "no such file or folder.*none.png"),
        (["photos/*.jpg"], r"no such file or folder.*\*.jpg"),
        (["empty"], "no images.*empty"),
    ],
)
def test_images_that_are_not_there_are_said_before_the_model_is_loaded(photos, printed, images, message):
    Path("empty").mkdir()
    with pytest.raises(DataError, match=message):
        printed("no-model", images)


def test_what_needs_to_be_given():
    with pytest.raises(ConfigError, match="at images"):
        PredictArguments("adapter", [])
    assert [one.name for one in fields(PredictArguments) if one.metadata.get("positional")] == ["model", "images"]


def test_a_task_without_class_names(root, base, photos, printed):
    saved = save_trained(root, base, "pairs", "full", train_dataset=captioned())
    with pytest.raises(ConfigError, match=r"ImageTextPairs have no class names.*embed_images"):
        printed(saved.folder, ["photos"])
