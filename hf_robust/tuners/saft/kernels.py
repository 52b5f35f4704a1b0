# SPDX-License-Identifier: Apache-2.0
"""Gradients of selected weight entries, without the dense weight gradient where that can be avoided.

The selected entries' values already stand in the weights of the base, so every forward here is the base's own. What is
special is the backward: it returns the gradient of the k selected entries, in place of the gradient of all of them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Where a faster kernel takes over, as a share of the weight's entries; measured on ViT-B/32's matrices, on two CPU
# cores and on an H100.
GATHER_BELOW = {"cpu": 0.002, "cuda": 0.0001}
SAMPLED_BELOW = 0.05
# Elements of one gathered block: a few tens of megabytes on a CPU, a few hundred on a GPU, whatever the batch.
BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True)
class Entries:
    """The selected entries of one tensor.

    Args:
        positions: flat positions, sorted and unique, `(entries,)`, int64.
        rows: `positions // columns`, `(entries,)`.
        columns: `positions % columns`, `(entries,)`.
        row_starts: where each row starts in `positions`, `(rows + 1,)`: with `columns` the CSR layout of the entries.
        density: entries per element of the tensor, a fraction.
    """

    positions: Tensor
    rows: Tensor
    columns: Tensor
    row_starts: Tensor
    density: float

    @classmethod
    def of(cls, positions: Tensor, shape: torch.Size) -> Entries:
        """Splits flat positions in a tensor of `shape` into rows (first dimension) and columns (all the others)."""
        width = max(shape[1:].numel(), 1)
        height = shape.numel() // width
        rows, columns = positions // width, positions % width
        row_starts = torch.searchsorted(rows, torch.arange(height + 1, device=rows.device))
        return cls(positions, rows, columns, row_starts, positions.numel() / max(shape.numel(), 1))


def sampled_weight_gradient(grad_output: Tensor, inputs: Tensor, entries: Entries, dtype: torch.dtype) -> Tensor:
    """The selected entries of a linear layer's weight gradient, `(grad_outputᵀ @ inputs)[rows, columns]`.

    Few entries are gathered and multiplied; more are computed by a sampled dense-dense product where that exists (CPU
    with MKL, float32 and float64); for many the dense product is the fastest.

    Args:
        grad_output: `(tokens, out_features)`.
        inputs: `(tokens, in_features)`.
        entries: the selected entries of the weight `(out_features, in_features)`.
        dtype: of the result; sums are made in it, or better.

    Returns:
        `(entries,)` in `dtype`.
    """
    if entries.density < GATHER_BELOW.get(inputs.device.type, 0):
        return _gathered(grad_output, inputs, entries, dtype)
    if entries.density < SAMPLED_BELOW and _has_sampled_product(inputs):
        return _sampled(grad_output, inputs, entries).to(dtype)
    return (grad_output.t() @ inputs).flatten()[entries.positions].to(dtype)


def _gathered(grad_output: Tensor, inputs: Tensor, entries: Entries, dtype: torch.dtype) -> Tensor:
    block = max(1, BLOCK_ELEMENTS[inputs.device.type] // max(len(inputs), 1))
    pairs = zip(entries.rows.split(block), entries.columns.split(block), strict=True)
    products = (_columns(grad_output, rows).to(dtype).mul_(_columns(inputs, columns)) for rows, columns in pairs)
    return torch.cat([product.sum(0) for product in products])  # (entries,)


def _columns(matrix: Tensor, columns: Tensor) -> Tensor:
    return matrix.gather(1, columns.expand(len(matrix), -1))  # on a CPU three times as fast as matrix[:, columns]


def _has_sampled_product(inputs: Tensor) -> bool:
    on_cpu = inputs.device.type == "cpu" and torch.backends.mkl.is_available()
    return on_cpu and inputs.dtype in (torch.float32, torch.float64)


def _sampled(grad_output: Tensor, inputs: Tensor, entries: Entries) -> Tensor:
    # Zeros, not empty: with beta=0 the kernel still multiplies what it finds there, and 0 * NaN is NaN.
    zeros = torch.zeros(entries.columns.shape, dtype=inputs.dtype)
    size = (grad_output.shape[1], inputs.shape[1])
    layout = torch.sparse_csr_tensor(entries.row_starts, entries.columns, zeros, size)
    return torch.sparse.sampled_addmm(layout, grad_output.t(), inputs, beta=0.0).values()


with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state", said once a process: here, unheard
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


class SampledLinear(torch.autograd.Function):
    """`F.linear` whose weight and bias already hold `delta`, and whose backward computes only delta's gradient."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, inputs: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, entries: Entries, biases: Tensor
    ) -> Tensor:
        # The inputs are needed for entries of the weight alone: keep no activation for entries of the bias.
        ctx.save_for_backward(inputs if len(entries.positions) else None, weight)
        ctx.entries, ctx.biases, ctx.dtype = entries, biases, delta.dtype
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        inputs, weight = ctx.saved_tensors
        grad_inputs = grad_output @ weight if ctx.needs_input_grad[0] else None
        grad_output = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, out_features)
        grads = []
        if inputs is not None:
            inputs = inputs.reshape(-1, inputs.shape[-1])  # (tokens, in_features)
            grads.append(sampled_weight_gradient(grad_output, inputs, ctx.entries, ctx.dtype))
        if len(ctx.biases):
            grads.append(_columns(grad_output, ctx.biases).sum(0, dtype=ctx.dtype))
        return grad_inputs, torch.cat(grads), None, None, None, None


class SampledEmbedding(torch.autograd.Function):
    """`F.embedding` whose weight already holds `delta`; its backward touches only rows that hold selected entries."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, delta: Tensor, ids: Tensor, weight: Tensor, padding_idx: int | None, entries: Entries
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.entries, ctx.padding_idx, ctx.dtype = entries, padding_idx, delta.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (ids,) = ctx.saved_tensors
        chosen_rows, row_of_entry = torch.unique(ctx.entries.rows, return_inverse=True)
        ids, grad_output = ids.flatten(), grad_output.flatten(0, -2).to(ctx.dtype)  # (tokens,), (tokens, dim)
        slots = torch.searchsorted(chosen_rows, ids).clamp_(max=len(chosen_rows) - 1)
        hit = chosen_rows[slots] == ids
        if ctx.padding_idx is not None:
            hit &= ids != ctx.padding_idx
        sums = grad_output.new_zeros(len(chosen_rows), grad_output.shape[1])
        sums.index_add_(0, slots[hit], grad_output[hit])  # (chosen rows, dim)
        return sums[row_of_entry, ctx.entries.columns], None, None, None, None


class ResidentAlias(torch.autograd.Function):
    """The weight itself, which already holds `delta`; the backward picks delta's entries out of the dense gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, delta: Tensor, positions: Tensor) -> Tensor:  # noqa: D102
        ctx.positions, ctx.dtype = positions, delta.dtype
        return weight.detach()  # shares the version counter, so that a backward after a rewrite is still noticed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        grad_weight = grad_output if ctx.needs_input_grad[0] else None
        return grad_weight, grad_output.flatten()[ctx.positions].to(ctx.dtype), None
