# SPDX-License-Identifier: Apache-2.0
"""Without ranks nothing is gathered; what two ranks gather is tested by `tests/training/test_pairs_trainer.py`."""

from __future__ import annotations

import torch

from hf_robust.tasks.gather import gather_rows, rank, row_counts


def test_one_process_gets_its_own_tensor():
    tensor = torch.zeros(3, 2)
    assert gather_rows(tensor) is tensor
    assert row_counts(tensor) == [3] and rank() == 0
