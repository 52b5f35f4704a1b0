# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a tiny CLIP on the icons of a phone in several ways, and shows what each gained and what it kept.

    make demo

The same pre-trained model is trained whole, with A-CLIP and with SAFT, over two seeds; WiSE-FT goes back from the
fine-tuned weights, as far as it costs no more than a standard error on the validation set. All see outline icons by
two hands, in white on coloured tiles. They are tested on unseen ones (in distribution), on tiles by other hands and on
filled icons in black (out of distribution), on things that were not in the training set, and on another task: colour
emoji. The settings are those of `make compare`, and the learning rates those that it chose on the validation set.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import data
from pictures import draw_story
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hf_robust.commands import compare
from hf_robust.comparison.methods import Chosen
from hf_robust.comparison.runs import Runs
from hf_robust.comparison.tables import collect
from hf_robust.comparison.trainings import train_and_evaluate, zero_shot
from hf_robust.scripting.arguments import parse_arguments
from hf_robust.scripting.results import percent
from hf_robust.scripting.run import run

CONFIG = "examples/configs/compare_methods.yaml"
OUTPUT = Path("runs/demo")
SEEDS = (1, 2)
RATES = {"full": 1e-3, "aclip": 3e-3, "saft-per-tensor-0.01": 1e-2}  # found by `make compare`
NAMES = {
    "zero-shot": "zero-shot",
    "full": "full fine-tuning",
    "full+wise-ft": "full + WiSE-FT",
    "aclip": "A-CLIP",
    "aclip+wise-ft": "A-CLIP + WiSE-FT",
    "saft-per-tensor-0.01": "SAFT",
    "saft-per-tensor-0.01+wise-ft": "SAFT + WiSE-FT",
}
TITLES = {  # of the columns, by the name of the set
    "tiles": "ID",
    "tiles by other hands": "artist",
    "filled icons": "style",
    "new things": "new",
    "colour emoji": "other",
}
DRAWN = ("zero-shot", "full", "full+wise-ft", "aclip+wise-ft", "saft-per-tensor-0.01+wise-ft")
LEGEND = """Accuracy in %, mean over two seeds ± half of its 95 % interval; share of the
parameters that are trained; seconds of a training.
ID      unseen icons on coloured tiles, by the two hands of the training set
artist  icons on tiles by other hands
style   filled icons in black on white
new     icons of 38 things that were not trained, in black on white
other   another task: colour emoji
★       the best place on average over ID, OOD (artist and style), new and other"""
OWN_PHOTOGRAPHS = """
To do it with your own photographs in photos/{{train,validation,test}}/<class>/*.jpg, and
some of what else you will meet in other_photos/<class>/*.jpg, by the row that forgets least:

{command} train photos --eval_data '{{"ood": "other_photos"}}' --density 0.01 --scope per_tensor \\
    --no_exclude_input_embeddings
"""


def compare_all() -> dict[str, dict[str, Any]]:
    """Trains with every method and seed; returns the rows that the comparison makes of it."""
    flags = ["--config", CONFIG, "--output_dir", str(OUTPUT), "--seeds", *map(str, SEEDS), "--methods", *RATES]
    args, training_args = parse_arguments(compare.TYPES, flags=[*flags, "--after", "wise-ft"])
    comparison, runs = compare.load(args, training_args), Runs(OUTPUT, compare.shared_settings(args, training_args))
    before = runs.get("zero-shot", zero_shot, comparison)
    for seed in SEEDS:
        for name, rate in RATES.items():
            arguments = comparison, name, Chosen(rate), seed, before, seed == SEEDS[0]
            runs.get(f"{name}_seed_{seed}", train_and_evaluate, *arguments)
    return collect(runs.found)


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Prints accuracies in percent with their intervals, and what they cost."""
    best = min(rows, key=lambda name: rows[name]["rank"])
    parameters = max(row.get("trained_parameters", 0) for row in rows.values())
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", *TITLES.values(), "trained", "s"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in rows.items():
        found = [f"{percent(mean(row['set_accuracy'][n]))} ±{100 * row['set_interval'][n]:.0f}" for n in TITLES]
        share, seconds = row.get("trained_parameters", 0) / parameters, row.get("seconds", 0)
        cells = f"{'★' if name == best else ' '} {NAMES[name]}", *found, f"{share:.1%}", f"{seconds:.0f}"
        table.add_row(*cells, style="bold green" if name == best else "")
    Console().print(table)
    print(LEGEND)


@dataclass
class ScriptArguments:
    """Fine-tunes a tiny CLIP on the icons of a phone in several ways."""


def main(arguments: ScriptArguments) -> None:
    """Draws the drawings, compares the methods, and shows the table and the picture."""
    sets = data.load()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    rows = compare_all()
    show(rows)
    draw_story({NAMES[name]: rows[name] for name in DRAWN}, sets, OUTPUT / "story.png")
    print(f"\nAs a picture: {OUTPUT / 'story.png'}")
    print(OWN_PHOTOGRAPHS.format(command=os.path.relpath(Path(sys.executable).with_name("hf-robust"))))


if __name__ == "__main__":
    run(main, ScriptArguments)
