# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: the table, the picture, and a command to copy."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from datasets import Dataset
from PIL import Image

from hf_robust.commands import train
from hf_robust.comparison.methods import ALL_METHODS, Chosen
from hf_robust.evaluation import RobustnessSuite
from hf_robust.scripting.arguments import parse_arguments
from tests.programs import ROOT

sys.path.insert(0, str(ROOT / "examples" / "demo"))

import data  # noqa: E402
import demo  # noqa: E402


def row(id, ood, rank, trained=100, **more):
    accuracy = {"tiles": id, "tiles by other hands": [0.1], "filled icons": ood, "new things": [0.4]}
    accuracy["colour emoji"] = [0.5]
    return {"set_accuracy": accuracy, "set_interval": dict.fromkeys(accuracy, 0.02), "rank": rank} | {
        "trained_parameters": trained,
        "seconds": 12.4,
        **more,
    }


ROWS = {
    "zero-shot": {**row([0.3], [0.5], 3.0), "trained_parameters": 0, "seconds": 0},
    "full": row([0.8, 0.9], [0.4, 0.3], 2.0, trained=1000),
    "saft-per-tensor-0.01+wise-ft": row([0.7, 0.8], [0.6, 0.7], 1.0, trained=10),
}


def test_the_table_shows_means_intervals_and_costs_and_marks_the_best(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    demo.show(ROWS)
    lines = capsys.readouterr().out.splitlines()
    (best,) = [line for line in lines if "★" in line and "SAFT + WiSE-FT" in line]
    assert best.split()[4:] == ["75.0", "±2", "10.0", "±2", "65.0", "±2", "40.0", "±2", "50.0", "±2", "1.0%", "12"]
    (full,) = [line for line in lines if "full fine-tuning" in line]
    assert "85.0 ±2" in full and "100.0%" in full and "★" not in full and "…" not in full


def test_every_row_of_the_comparison_has_a_name():
    for method in demo.RATES:
        assert method in ALL_METHODS and method in demo.NAMES and f"{method}+wise-ft" in demo.NAMES


def test_the_picture_is_drawn(tmp_path):
    images = [Image.new("RGB", (64, 64), (place % 255, 0, 0)) for place in range(300)]
    sets = dict.fromkeys(("id", "ood_filled", "ood_hand"), Dataset.from_dict({"image": images}))
    demo.draw_story({demo.NAMES[name]: one for name, one in ROWS.items()}, sets, tmp_path / "story.png")
    with Image.open(tmp_path / "story.png") as picture:
        assert picture.size == (1440, 960)


def test_the_command_to_copy_is_one():
    lines = demo.OWN_PHOTOGRAPHS.format(command="hf-robust").replace("\\\n", " ").strip().splitlines()[-1]
    program, command, *flags = shlex.split(lines)
    args, method, _ = parse_arguments(train.TYPES, flags=flags)
    assert (program, command, args.data) == ("hf-robust", "train", "photos") and set(args.eval_data) == {"ood"}
    assert (method.method, method.density, method.scope) == ("saft", 0.01, "per_tensor")
    assert not method.exclude_input_embeddings


def test_the_settings_are_those_of_the_comparison(monkeypatch, tmp_path):
    ran = []

    class Runs(demo.Runs):
        def get(self, name, run, *arguments):
            ran.append((name, run.__name__, arguments[2:4]))
            return {}

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(demo, "Runs", Runs)
    monkeypatch.setattr(demo.compare, "load", lambda *arguments: arguments)
    monkeypatch.setattr(demo, "collect", lambda found: found)
    demo.compare_all()
    expected = [
        (f"{name}_seed_{seed}", "train_and_evaluate", (Chosen(rate), seed))
        for seed in demo.SEEDS
        for name, rate in demo.RATES.items()
    ]
    assert ran == [("zero-shot", "zero_shot", ()), *expected]


def test_the_columns_of_the_table_are_the_sets_of_the_suite(monkeypatch):
    monkeypatch.chdir(ROOT)
    suite = RobustnessSuite.from_yaml("examples/configs/compare_suite.yaml")
    assert [one.name for one in suite.sets] == [*demo.TITLES]
    assert {Path(one.source).stem for one in suite.sets} <= set(data.CLASSES)
