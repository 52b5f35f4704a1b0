# SPDX-License-Identifier: Apache-2.0
"""evaluate_suite on several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from hf_robust.evaluation.report import SuiteReport
from hf_robust.evaluation.run import evaluate_suite
from hf_robust.evaluation.suite import RobustnessSuite, SuiteSet
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

NAMES = ["red", "green", "blue", "amber"]

RANKS = """
import sys
import datasets
import torch
from accelerate import PartialState
from hf_robust.errors import DataError
from hf_robust.evaluation.run import evaluate_suite
from hf_robust.evaluation.suite import RobustnessSuite, SuiteSet
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

torch.set_num_threads(1)
folder, names = sys.argv[1], ["red", "green", "blue", "amber"]
photos = image_dataset(37, names)
suite = RobustnessSuite([
    SuiteSet("photos", "id", photos),
    SuiteSet("noisy", "ood", photos, corruption=("gaussian_noise", 2)),
    SuiteSet("few", "other", photos.select(range(3))),
])
model, processor = tiny_model("clip"), tiny_processor("clip")
report = evaluate_suite(model, processor, suite, batch_size=4)
rank = PartialState().process_index
report.to_json(f"{folder}/rank{rank}.json")

rows = [{"bytes": b"no image", "path": "broken.png"}]
features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
broken = datasets.Dataset.from_dict({"image": rows, "label": [0]}, features=features)  # rank 0 alone opens it
try:
    evaluate_suite(model, processor, RobustnessSuite([SuiteSet("broken", "id", broken)]), silent=True)
except DataError as error:
    open(f"{folder}/error{rank}.txt", "w").write(str(error))
PartialState().destroy_process_group()
"""


def run_on_ranks(n, folder, port):
    """Runs the script as `accelerate launch` does; returns reports, errors, and what went to stderr."""
    folder.mkdir()
    (folder / "script.py").write_text(RANKS)
    common = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(n)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(n)}
    command = [sys.executable, str(folder / "script.py"), str(folder)]
    processes = []
    for rank in map(str, range(n)):
        environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=240)[1] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    reports = [SuiteReport.from_dict(json.loads((folder / f"rank{rank}.json").read_text())) for rank in range(n)]
    return reports, [(folder / f"error{rank}.txt").read_text() for rank in range(n)], outputs


def test_37_images_count_once_on_1_2_and_3_ranks(tmp_path, free_port):
    """Ten batches of four and one of one image: never the same number on every rank; of `few` one rank has a batch."""
    photos = image_dataset(37, NAMES)
    noisy = SuiteSet("noisy", "ood", photos, corruption=("gaussian_noise", 2))
    few = SuiteSet("few", "other", photos.select(range(3)))
    suite = RobustnessSuite([SuiteSet("photos", "id", photos), noisy, few])
    one = evaluate_suite(tiny_model("clip"), tiny_processor("clip"), suite, batch_size=4, silent=True)
    for n in (2, 3):
        reports, errors, outputs = run_on_ranks(n, tmp_path / str(n), free_port)
        for report in reports:
            assert report.config["ranks"] == n and str(report) == str(one)
            for name, expected in one.sets.items():
                found = report.sets[name]
                assert found.rows.tolist() == list(range(3 if name == "few" else 37))
                assert found.predictions.tolist() == expected.predictions.tolist()
                np.testing.assert_allclose(found.confidences, expected.confidences, atol=2e-6)
                assert found.fingerprint == expected.fingerprint
        assert len(set(errors)) == 1 and "image cannot be opened" in errors[0]
        assert "Evaluating photos" in outputs[0] and all("Evaluating" not in output for output in outputs[1:])
