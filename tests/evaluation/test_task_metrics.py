# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import torch

from hf_robust.errors import DataError
from hf_robust.evaluation import MeanAveragePrecision, RetrievalRecall, Verification
from hf_robust.tasks.identity_metrics import identity_metrics
from hf_robust.tasks.label_metrics import label_metrics
from hf_robust.tasks.retrieval_metrics import retrieval_metrics

rng = np.random.default_rng(0)
IMAGES, TEXTS = torch.from_numpy(rng.normal(size=(9, 5))).float(), torch.from_numpy(rng.normal(size=(23, 5))).float()
OWNERS = torch.arange(23) % 9
SCORES, TARGETS = rng.normal(size=(23, 4)), rng.integers(-1, 2, size=(23, 4))
ALL = [
    (
        RetrievalRecall,
        {"text_embeds": TEXTS, "image_embeds": IMAGES[OWNERS], "images": 100 - OWNERS},
        {"scale": 10.0},
        retrieval_metrics(IMAGES, TEXTS, OWNERS, scale=10.0),
    ),
    (
        MeanAveragePrecision,
        {"predictions": SCORES, "references": TARGETS},
        {"threshold": 0.1},
        label_metrics(SCORES, TARGETS, threshold=0.1),
    ),
    (Verification, {"predictions": TEXTS, "references": OWNERS}, {}, identity_metrics(TEXTS, OWNERS)),
]


@pytest.mark.parametrize(("cls", "columns", "options", "expected"), ALL)
def test_batches_and_single_entries_give_what_the_function_gives(cls, columns, options, expected, tmp_path):
    metric = cls(cache_dir=tmp_path)
    assert isinstance(metric, evaluate.Metric) and "Columns" in metric.description
    assert metric.compute(**columns, **options) == pytest.approx(expected, nan_ok=True)
    for start in range(0, 20, 10):
        metric.add_batch(**{name: column[start : start + 10] for name, column in columns.items()})
    singular = {"predictions": "prediction", "references": "reference"}
    for index in range(20, 23):
        metric.add(**{singular.get(name, name): column[index] for name, column in columns.items()})
    assert metric.compute(**options) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("cls", "columns", "options", "expected"), ALL)
def test_two_ranks_give_what_one_gives(cls, columns, options, expected, tmp_path):
    """Ranks meet by files, so threads will do."""

    def on(rank):
        metric = cls(cache_dir=tmp_path, num_process=2, process_id=rank, experiment_id="run")
        metric.add_batch(**{name: column[rank::2] for name, column in columns.items()})
        return metric.compute(**options)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(on, range(2))
    assert first == pytest.approx(expected, nan_ok=True) and second is None


def test_rows_must_be_rows_of_one_length(tmp_path):
    metric = Verification(cache_dir=tmp_path, keep_in_memory=True)
    with pytest.raises(DataError, match=r"not rows of numbers.*predictions.*\(2,\)"):
        metric.add_batch(predictions=[0.1, 0.2], references=[0, 1])
    for dim in (2, 3):
        metric.add_batch(predictions=torch.eye(dim, dtype=torch.bfloat16), references=list(range(dim)))
    with pytest.raises(DataError, match=r"not of one length.*predictions.*\[2, 3\]"):
        metric.compute()
