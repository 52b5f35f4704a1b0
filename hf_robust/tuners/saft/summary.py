# SPDX-License-Identifier: Apache-2.0
"""Where SAFT's entries went."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from .layer import SAFTLayer
from .plan import floating_parameters
from .selection import find_selected


@dataclass(frozen=True)
class KindSummary:
    """The selected entries of all tensors of one kind.

    Args:
        kind: name of the tensors, with `*` for the number of the layer.
        count: how many entries were selected in them.
        share_of_entries: `count` over all selected entries, a fraction.
        share_of_tensor: `count` over the size of these tensors, a fraction.
    """

    kind: str
    count: int
    share_of_entries: float
    share_of_tensor: float


@dataclass(frozen=True)
class MaskSummary:
    """Where the selected entries of an adapter lie; `print` shows the ten largest kinds.

    Args:
        kinds: most entries first.
        selected: number of selected entries.
        parameters: number of parameters of the model.
    """

    kinds: tuple[KindSummary, ...]
    selected: int
    parameters: int

    def __str__(self) -> str:
        share = self.selected / self.parameters
        head = f"SAFT selected {self.selected:,} of {self.parameters:,} parameters ({share:.3%})"
        lines = [head, f"{'entries':>10} {'of all':>7} {'of tensor':>9}  tensor"]
        shown, rest = self.kinds[:10], self.kinds[10:]
        lines += [f"{k.count:>10,} {k.share_of_entries:>7.1%} {k.share_of_tensor:>9.2%}  {k.kind}" for k in shown]
        if rest:
            count = sum(kind.count for kind in rest)
            lines.append(f"{count:>10,} {count / self.selected:>7.1%} {'':>9}  {len(rest)} other kinds")
        return "\n".join(lines)


def mask_summary(model: nn.Module, adapter_name: str | None = None) -> MaskSummary:
    """Says in which tensors the entries of a SAFT adapter lie.

    A selection that went mostly into the input embeddings is a warning sign: these serve every task. See
    `exclude_input_embeddings` of [`SAFTConfig`].

    Args:
        model: a `PeftModel` with a SAFT adapter, or a module that holds one.
        adapter_name: the adapter; by default the active one.

    Raises:
        SelectionError: the adapter has not selected its entries yet, or there is none.

    Example:
        >>> print(mask_summary(model))  # doctest: +SKIP
        SAFT selected 151,277 of 151,277,313 parameters (0.100%)
    """
    layers, name = find_selected(model, adapter_name)
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for layer in layers:
        for parameter, selected, numel in _per_parameter(layer, name):
            kind = re.sub(r"\.\d+\.", ".*.", f"{layer.unit}.{parameter}")
            counts[kind] = counts.get(kind, 0) + selected
            sizes[kind] = sizes.get(kind, 0) + numel
    total = sum(counts.values())
    kinds = [KindSummary(k, n, n / total, n / sizes[k]) for k, n in counts.items() if n]
    kinds.sort(key=lambda kind: (-kind.count, kind.kind))
    return MaskSummary(tuple(kinds), total, _size_of_base(model))


def _per_parameter(layer: SAFTLayer, adapter_name: str) -> list[tuple[str, int, int]]:
    """For each parameter of a unit: its name, its selected entries, its size."""
    entries = layer.changed_entries(adapter_name)
    parameters = floating_parameters(layer.base_layer).items()
    return [(name, len(entries.get(name, ())), parameter.numel()) for name, parameter in parameters]


def _size_of_base(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".saft_values." not in f".{name}")
