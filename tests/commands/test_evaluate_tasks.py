# SPDX-License-Identifier: Apache-2.0
"""What `hf-robust evaluate` prints of sets of several tasks."""

from __future__ import annotations

import numpy as np

from hf_robust.commands import evaluate
from hf_robust.evaluation.report import SetResult, SuiteReport, TaskResult


def report(share, recalls, precision):
    """Four photos of which a share is classified rightly, two sets of captions, one of several labels."""
    rows, targets = np.arange(4), np.zeros(4, dtype=int)
    photos = SetResult("photos", "id", ["a", "b"], rows, targets, (rows >= 4 * share).astype(int), np.ones(4), "f")
    names = ("flickr", "coco")
    recall, back = "image_to_text_recall@1", "text_to_image_recall@1"
    captions = [
        TaskResult(name, "other", "retrieval", rows, {recall: of_set, back: of_set / 2}, "f")
        for name, of_set in zip(names, recalls, strict=True)
    ]
    kinds = TaskResult("kinds", "ood", "several_labels", rows, {"mAP_macro": precision}, "f")
    return SuiteReport({one.name: one for one in (photos, *captions, kinds)}, {}, {})


def test_every_measure_has_a_table_with_its_sets(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    evaluate.show({"base": report(0.5, (0.4, 0.2), 0.25), "alpha 1": report(0.75, (0.6, 0.8), 0.5)})
    lines = [line.replace("│", " ").strip() for line in capsys.readouterr().out.splitlines()]
    rows = [" ".join(line.split()) for line in lines]
    titles = [line for line in rows if line.endswith("in %")]
    assert titles == [
        "Accuracy in %",
        "Recall@1 of texts by images in %",
        "Recall@1 of images by texts in %",
        "Mean average precision over classes in %",
    ]
    assert "id photos 4 50.0 75.0" in rows and "ood kinds 4 25.0 50.0" in rows
    assert {"other flickr 4 40.0 60.0", "other coco 4 20.0 80.0", "other mean 30.0 70.0"} <= set(rows)
    assert {"other flickr 4 20.0 30.0", "other coco 4 10.0 40.0", "other mean 15.0 35.0"} <= set(rows)
