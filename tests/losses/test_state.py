# SPDX-License-Identifier: Apache-2.0
"""The state of terms goes through a file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_robust.errors import AdapterFileError, ConfigError
from hf_robust.losses import SimilarityLoss, Term
from hf_robust.losses.state import FILE, load_terms, save_terms, terms_state


class Queue(Term):
    """A parameter, buffers, and a list that grows."""

    name = "queue"

    def __init__(self, dim=3):
        super().__init__()
        self.dim, self.rows = dim, []
        self.scale = nn.Parameter(torch.ones(dim))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("tokens", torch.zeros(5), persistent=False)

    def get_extra_state(self):
        return {str(index): row for index, row in enumerate(self.rows)}

    def set_extra_state(self, state):
        self.rows = [state[str(index)] for index in range(len(state))]


def queues(**rows):
    found = nn.ModuleDict({"queue": Queue(), "similarity": SimilarityLoss()})
    found["queue"].rows = [torch.full((2,), float(row)) for row in rows.values()]
    return found


def test_all_of_it_comes_back(tmp_path):
    saved, loaded = queues(**{str(i): i for i in range(11)}), queues(other=99)
    with torch.no_grad():
        saved["queue"].scale.add_(0.5), saved["queue"].seen.add_(7)
    save_terms(saved, tmp_path)
    load_terms(loaded, tmp_path)
    assert torch.equal(torch.stack(loaded["queue"].rows), torch.stack(saved["queue"].rows))
    assert loaded["queue"].scale.tolist() == [1.5] * 3 and loaded["queue"].seen == 7
    assert not any("tokens" in name for name in terms_state(saved))


def test_terms_without_state_need_no_file(tmp_path):
    terms = nn.ModuleDict({"similarity": SimilarityLoss()})
    save_terms(terms, tmp_path)
    load_terms(terms, tmp_path)
    assert not (tmp_path / FILE).exists()


def test_an_empty_state_comes_back(tmp_path):
    loaded = queues(other=99)
    save_terms(queues(), tmp_path)
    load_terms(loaded, tmp_path)
    assert loaded["queue"].rows == []


def test_the_state_of_other_terms_is_refused(tmp_path):
    with pytest.raises(AdapterFileError, match="state of other losses.*queue.scale.*Resume with the losses"):
        load_terms(queues(), tmp_path)
    save_terms(queues(one=1), tmp_path)
    for others in ({}, {"queue": Queue(4)}, {"other": Queue()}):
        with pytest.raises(AdapterFileError, match="state of other losses"):
            load_terms(nn.ModuleDict(others), tmp_path)


def test_an_extra_state_that_is_no_tensors_is_refused(tmp_path):
    terms = queues()
    terms["queue"].get_extra_state = lambda: [1, 2]
    with pytest.raises(ConfigError, match="cannot be saved.*queue.*list.*dictionary of tensors"):
        save_terms(terms, tmp_path)
