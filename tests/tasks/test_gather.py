# SPDX-License-Identifier: Apache-2.0
"""Two ranks with ragged shares: rows, losses and gradients are those of one process with all of them."""

from __future__ import annotations

import torch

from hf_robust.tasks.gather import gather_rows, rank, row_counts
from tests.programs import run_on_ranks


def test_one_process_gets_its_own_tensor():
    tensor = torch.zeros(3, 2)
    assert gather_rows(tensor) is tensor
    assert row_counts(tensor) == [3] and rank() == 0


def test_two_ranks_are_one_process(tmp_path):
    for out, _ in run_on_ranks(2, "from tests.tasks.pairs_on_ranks import main", tmp_path):
        assert "two ranks agree" in out
