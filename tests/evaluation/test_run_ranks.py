# SPDX-License-Identifier: Apache-2.0
"""evaluate_suite on several ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import ClassLabel, List

from hf_robust.evaluation.report import SuiteReport
from hf_robust.evaluation.run import evaluate_suite
from hf_robust.evaluation.suite import RobustnessSuite, SuiteSet
from tests.programs import run_on_ranks
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

NAMES = ["red", "green", "blue", "amber"]

RANKS = """
import datasets
import torch
from accelerate import PartialState
from hf_robust.errors import DataError
from hf_robust.evaluation.run import evaluate_suite
from hf_robust.evaluation.suite import RobustnessSuite, SuiteSet
from tests.evaluation.test_run_ranks import suite_of
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

def main(folder):
    names = ["red", "green", "blue", "amber"]
    photos = image_dataset(37, names)
    suite = suite_of(photos)
    model, processor = tiny_model("clip"), tiny_processor("clip")
    rows = [{"bytes": b"no image", "path": "broken.png"}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    broken = datasets.Dataset.from_dict({"image": rows, "label": [0]}, features=features)  # rank 0 alone opens it
    some_broken = datasets.concatenate_datasets([photos.select(range(5)), broken, photos.select(range(5, 8))])
    skipping = RobustnessSuite([SuiteSet("some broken", "id", some_broken)])
    report = evaluate_suite(model, processor, skipping, batch_size=2, on_bad_image="skip")
    rank = PartialState().process_index
    report.to_json(f"{folder}/skipping{rank}.json")

    report = evaluate_suite(model, processor, suite, batch_size=4)
    report.to_json(f"{folder}/rank{rank}.json")

    try:
        evaluate_suite(model, processor, RobustnessSuite([SuiteSet("broken", "id", broken)]), silent=True)
    except DataError as error:
        open(f"{folder}/error{rank}.txt", "w").write(str(error))
"""


def suite_of(photos):
    """Of `few` one rank has a batch; of the texts of `pair`, on three ranks, two have one."""
    kinds = List(ClassLabel(names=NAMES))
    told = photos.select_columns("image").add_column("text", [f"picture {row}" for row in range(37)])
    told = told.add_column("labels", [sorted({row % 4, row % 3}) for row in range(37)], feature=kinds)
    return RobustnessSuite(
        [
            SuiteSet("photos", "id", photos),
            SuiteSet("noisy", "ood", photos, corruption=("gaussian_noise", 2)),
            SuiteSet("few", "other", photos.select(range(3))),
            SuiteSet("captions", "other", told, task="retrieval"),
            SuiteSet("kinds", "other", told, task="several_labels"),
            SuiteSet("pair", "other", told.select(range(2)), task="retrieval"),
        ]
    )


def results_on_ranks(n, folder):
    """Runs the script; returns reports, errors, and what went to stderr."""
    folder.mkdir()
    outputs = run_on_ranks(n, RANKS, folder)
    reports = [SuiteReport.from_dict(json.loads((folder / f"rank{rank}.json").read_text())) for rank in range(n)]
    return reports, [(folder / f"error{rank}.txt").read_text() for rank in range(n)], [err for _, err in outputs]


def test_37_images_count_once_on_1_2_and_3_ranks(tmp_path):
    """Ten batches of four and one of one image: never the same number on every rank."""
    suite = suite_of(image_dataset(37, NAMES))
    one = evaluate_suite(tiny_model("clip"), tiny_processor("clip"), suite, batch_size=4, silent=True)
    for n in (2, 3):
        reports, errors, outputs = results_on_ranks(n, tmp_path / str(n))
        for report in reports:
            assert report.config["ranks"] == n and str(report) == str(one)
            for name, expected in one.sets.items():
                assert report.sets[name].fingerprint == expected.fingerprint
                assert report.sets[name].metrics == pytest.approx(expected.metrics, abs=1e-6)
            for name, expected in one.classified.items():
                found = report.classified[name]
                assert found.rows.tolist() == list(range(3 if name == "few" else 37))
                assert found.predictions.tolist() == expected.predictions.tolist()
                np.testing.assert_allclose(found.confidences, expected.confidences, atol=2e-6)
        for rank in range(n):
            found = json.loads((tmp_path / str(n) / f"skipping{rank}.json").read_text())["sets"]["some broken"]
            assert found["rows"] == [0, 1, 2, 3, 4, 6, 7, 8] and len(found["skipped"]) == 1
            assert found["predictions"] == one.sets["photos"].predictions[:8].tolist()
        assert len(set(errors)) == 1 and "image cannot be opened" in errors[0]
        assert "Evaluating photos" in outputs[0] and all("Evaluating" not in output for output in outputs[1:])
