# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_robust.tuners.saft import kernels
from hf_robust.tuners.saft.kernels import Entries, SampledEmbedding, sampled_weight_gradient


def some_positions(numel: int, count: int) -> torch.Tensor:
    return torch.randperm(numel)[:count].sort().values


@given(rows=st.integers(1, 7), columns=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_entries_are_a_csr_layout_of_the_positions(rows: int, columns: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    dense = torch.zeros(rows, columns)
    positions = some_positions(rows * columns, int(share * rows * columns))
    dense.view(-1)[positions] = torch.arange(1, len(positions) + 1, dtype=torch.float32)
    entries = Entries.of(positions, dense.shape)
    assert torch.equal(dense[entries.rows, entries.columns], dense.view(-1)[positions])
    csr = dense.to_sparse_csr()
    assert torch.equal(csr.crow_indices(), entries.row_starts)
    assert torch.equal(csr.col_indices(), entries.columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.2])
def test_all_three_regimes_give_the_dense_gradient(density: float, dtype: torch.dtype) -> None:
    out_features, in_features, tokens = 60, 50, 33
    positions = some_positions(out_features * in_features, max(2, int(density * out_features * in_features)))
    grad_output, inputs = torch.randn(tokens, out_features).to(dtype), torch.randn(tokens, in_features).to(dtype)
    entries = Entries.of(positions, torch.Size((out_features, in_features)))
    got = sampled_weight_gradient(grad_output, inputs, entries, torch.float64)
    expected = (grad_output.double().t() @ inputs.double()).flatten()[positions]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 10)


def test_each_regime_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice by density and type; on a machine without MKL the middle one does not exist."""
    calls = []
    for name in ("_gathered", "_sampled"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    grad_output, inputs = torch.randn(5, 100), torch.randn(5, 100)
    for count, dtype in [(10, torch.float32), (100, torch.float32), (100, torch.bfloat16), (900, torch.float32)]:
        entries = Entries.of(some_positions(10_000, count), torch.Size((100, 100)))
        sampled_weight_gradient(grad_output.to(dtype), inputs.to(dtype), entries, torch.float32)
    assert calls == ["_gathered"] + ["_sampled"] * torch.backends.mkl.is_available()


def test_gathering_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Entries.of(some_positions(4000, 37), torch.Size((50, 80)))
    grad_output, inputs = torch.randn(11, 50).double(), torch.randn(11, 80).double()
    whole = kernels._gathered(grad_output, inputs, entries, torch.float64)
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", {"cpu": 30})
    torch.testing.assert_close(kernels._gathered(grad_output, inputs, entries, torch.float64), whole)


def test_nan_outside_the_entries_does_not_leak_in() -> None:
    entries = Entries.of(torch.tensor([3, 8, 12, 30]), torch.Size((10, 10)))
    grad_output, inputs = torch.randn(6, 10), torch.randn(6, 10)
    grad_output[:, 9] = float("nan")
    assert entries.density >= kernels.GATHER_BELOW["cpu"]
    assert sampled_weight_gradient(grad_output, inputs, entries, torch.float32).isfinite().all()


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_gradient(padding_idx: int | None) -> None:
    table = nn.Embedding(9, 4, padding_idx=padding_idx, dtype=torch.float64)
    ids = torch.tensor([[1, 2, 2], [7, 1, 8]])
    positions = some_positions(36, 20)
    delta = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 4, dtype=torch.float64)
    out = SampledEmbedding.apply(
        delta, ids, table.weight.detach(), padding_idx, Entries.of(positions, torch.Size((9, 4)))
    )
    assert torch.equal(out, table(ids))
    (out * weights).sum().backward()
    (table(ids) * weights).sum().backward()
    torch.testing.assert_close(delta.grad, table.weight.grad.flatten()[positions])
    assert delta.grad.abs().sum() > 0
