# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from hf_robust.data.rows import labelled_images
from hf_robust.scripting.results import package_versions, percent, save_with_card
from hf_robust.scripting.timing import interleaved_medians, print_medians
from tests.tiny_models import image_dataset
from tests.trainers import NAMES, OTHER_NAMES, build


def test_figures_are_in_percent():
    assert percent(0.125) == percent(0.125, [0.125]) == "12.5" and percent(0.5, [0.4, 0.6]) == "50.0 ± 14.1"


def test_versions_are_those_installed():
    assert package_versions()["torch"] == torch.__version__


def test_a_card_shows_all_sets_but_the_validation_set(tmp_path):
    trainer = build(tmp_path)
    names = {"photos": NAMES, "pets": OTHER_NAMES, "id_b": NAMES, "validation": NAMES}
    sets = {name: labelled_images(image_dataset(6, classes), name) for name, classes in names.items()}
    accuracies = {"zero-shot": dict.fromkeys(sets, 0.5), "fine-tuned": dict.fromkeys(sets, 2 / 3)}
    save_with_card(trainer, sets, accuracies)
    card = (tmp_path / "README.md").read_text().replace("\\", "")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    assert {tuple(row[:3]) for row in rows[2:5]} == {
        ("photos", "OOD", "6"),
        ("pets", "other task", "6"),
        ("id_b", "ID", "6"),
    }
    assert all(row[3].startswith("50.0 (") and row[4].startswith("66.7 (") for row in rows[2:5])
    assert "validation" not in card and "Training images: 18" in card
    assert (tmp_path / "model.safetensors").exists()


def test_steps_take_turns(capsys):
    called = []
    steps = {name: (lambda name=name: called.append(name)) for name in "ab"}
    medians = interleaved_medians(steps, rounds=2)
    assert called == ["a", "b"] * 3 and medians.keys() == {"a", "b"}
    print_medians("steps", {"a": 1.0, "b": 1.5}, "a", {"waits": {"a": 0, "b": 2}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    head = ["steps", "seconds", "x", "a", "waits"]
    assert lines == [[], head, ["a", "1.0000", "1.000", "0"], ["b", "1.5000", "1.500", "2"]]
