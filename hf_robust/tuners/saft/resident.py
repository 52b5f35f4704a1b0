# SPDX-License-Identifier: Apache-2.0
"""How the values of adapters get into the weights of a unit's base, and out of them again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import BaseWeightsError
from .plan import Plan, Stamp, make_plan, same_bits, set_versions

# Numbers for the version counters of written weights start here, far from what in-place edits of the base count up to.
FIRST_VERSION = 2**20
REMEDY = (
    "Edit, shard, offload or share the base while the adapter is off (with model.disable_adapter()) or merged; "
    "the weights as they are now can be had back by loading the base again."
)


class ResidentValues:
    """What a unit's base shows: θ₀, or θ₀ plus the values of some adapters.

    It is told what shall be there, by tensors of positions and values, and knows when nothing has to be done.

    Args:
        unit: name of the unit, for messages.
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.plan: Plan | None = None
        self.changed = False  # whether the base holds values in the place of θ₀
        self.has_changed = False  # whether it has done so before
        self._written: Stamp | None = None  # of the values the base shows; None: it shows θ₀
        self._copies: tuple[Tensor, ...] = ()  # of the values, as they were written
        self._stored: tuple[Tensor, ...] = ()  # what was put at the entries of the base
        self._base_versions: tuple[int, ...] = ()
        self._written_versions: tuple[int, ...] = ()
        self._last: tuple[Stamp, tuple[int, ...], tuple[int, ...]] | None = None
        self._next_version = FIRST_VERSION

    def plan_for(self, base_layer: nn.Module, indices: Mapping[str, Tensor]) -> Plan:
        """Returns the plan for the entries of some adapters.

        Args:
            base_layer: the unit's base.
            indices: positions of the entries, by adapter.

        Raises:
            AdapterFileError: positions are no integers, out of range, or not strictly increasing.
        """
        if self.plan is not None and torch.compiler.is_compiling():
            return self.plan  # the last write outside has made it
        stamp = Stamp.of(list(indices.values()))
        if self.plan is None or self.plan.adapters != tuple(indices) or not self.plan.stamp.matches(stamp):
            self.restore(base_layer)
            self.plan = make_plan(base_layer, dict(indices), stamp)
        return self.plan

    def write(self, base_layer: nn.Module, indices: Mapping[str, Tensor], values: Sequence[Tensor]) -> bool:
        """Makes the base hold θ₀ plus the values; False when the base cannot be written.

        Args:
            base_layer: the unit's base.
            indices: positions of the entries, by adapter.
            values: their values, in the same order.

        Raises:
            BaseWeightsError: the base has been changed or replaced while it held values.
        """
        if torch.compiler.is_compiling():
            return not indices
        if not indices:
            self.restore(base_layer)
            return True
        stamp = Stamp.of([*indices.values(), *values])
        if self._written is not None and self._written.matches(stamp):
            return True
        plan = self.plan_for(base_layer, indices)
        if not plan.is_writable(base_layer):
            self.restore(base_layer)
            return False
        if not self.changed:
            plan = self.plan = plan.with_fresh_originals()
            self._base_versions = plan.versions()
        elif plan.versions() != self._written_versions:
            self.check_base()
        effective = plan.effective(plan.delta(values).detach())
        # Before the first step θ₀ is what shall be there; later this is not looked at, as it waits for the device.
        if self.has_changed or not all(map(same_bits, effective, plan.originals)):
            plan.store(effective)
            self._stored = tuple(effective)
            set_versions(plan.parameters, self._versions_of(stamp))
            self.changed = self.has_changed = True
        self._written_versions = plan.versions()
        self._copies = tuple(value.detach().clone() for value in values)
        self._written = stamp
        return True

    def restore(self, base_layer: nn.Module, check: bool = True) -> None:
        """Gives the base its own values back, and its version counters: what autograd saved of θ₀ is valid again.

        Args:
            base_layer: the unit's base.
            check: look first whether the entries of the base are what was written there.

        Raises:
            BaseWeightsError: the base has been changed, replaced or shared while it held values.
        """
        if self.changed and self.plan is not None:
            if not self.plan.is_writable(base_layer):
                what = "weights of the base were replaced or shared while they held a SAFT adapter's values"
                raise BaseWeightsError(what, where=self.unit, got=self.plan.adapters, remedy=REMEDY)
            if check:
                self.check_base()
            edited = self.plan.versions() != self._written_versions
            self.plan.store(self.plan.originals)
            if not edited:
                set_versions(self.plan.parameters, self._base_versions)
        self.changed = False
        self._written = None

    def check_base(self) -> None:
        """Looks whether the entries of the base are what was written there.

        Raises:
            BaseWeightsError: they are not, so that the base without the adapter cannot be known.
        """
        check_bases([self])

    def forget(self, base_layer: nn.Module, check: bool = True) -> None:
        """Gives the base back, as `restore` does, and forgets the plan: what is in it from now on is θ₀."""
        self.restore(base_layer, check)
        self.plan = self._last = None

    def write_again(self) -> None:
        """Notes that the next `write` has to write, whatever the version counters of the values say."""
        self._written = self._last = None

    def standing_entries(self) -> list[tuple[Tensor, Tensor]]:
        """The entries of the base that hold values, each with what was put there."""
        if not self.changed or self.plan is None:
            return []
        return list(zip(self.plan.entries_now(), self._stored, strict=True))

    def unmoved_values(self) -> list[tuple[Tensor, Tensor]]:
        """The values whose counters have not moved since they were written, each with the copy taken then."""
        if self._written is None or not self._written.matches(Stamp.of(self._written.tensors)):
            return []  # they will be written again anyway
        values = self._written.tensors[len(self._written.tensors) - len(self._copies) :]
        return [(value.detach(), copy) for value, copy in zip(values, self._copies, strict=True)]

    def pretrained(self) -> dict[str, Tensor]:
        """θ₀ of the parameters that hold values now, by name."""
        found: dict[str, Tensor] = {}
        for tensor in self.plan.tensors if self.changed and self.plan is not None else ():
            found[tensor.name] = tensor.parameter.detach().clone()
            found[tensor.name].view(-1)[tensor.entries.positions] = tensor.originals
        return found

    def _versions_of(self, stamp: Stamp) -> tuple[int, ...]:
        """The version numbers of this state: those it had when it was last there, else new ones."""
        if self._last is not None:
            last_stamp, last_base, last_versions = self._last
            if last_stamp.matches(stamp) and last_base == self._base_versions:
                return last_versions
        self._next_version += 1
        versions = (self._next_version,) * len(self._base_versions)
        self._last = (stamp, self._base_versions, versions)
        return versions


def check_bases(residents: Sequence[ResidentValues]) -> None:
    """Looks whether the entries of several units' bases are what was written there, with one wait for each device.

    Raises:
        BaseWeightsError: in one they are not, so that the base without the adapter cannot be known.
    """
    if not _all_same([pair for resident in residents for pair in resident.standing_entries()]):
        edited = next(resident for resident in residents if not _all_same(resident.standing_entries()))
        what, got = "weights of the base were changed while they held a SAFT adapter's values", edited.plan
        raise BaseWeightsError(what, where=edited.unit, got=got and got.adapters, remedy=REMEDY)


def see_edits(residents: Sequence[ResidentValues]) -> None:
    """Finds what was changed behind autograd's back, as `.data` edits and optimizers with own kernels do.

    Values are written again at the next write. One wait for each device, and one more where something will be written.

    Raises:
        BaseWeightsError: entries of a base that will be written were changed.
    """
    if not _all_same([pair for resident in residents for pair in resident.unmoved_values()]):
        for resident in residents:  # all: to ask each one would wait for the device each time
            resident.write_again()
    check_bases([resident for resident in residents if not resident.unmoved_values()])


def _all_same(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the tensors of all pairs have the same bits."""
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for first, second in pairs:
        by_device.setdefault(first.device, []).append((first.view(torch.uint8), second.view(torch.uint8)))
    joined = [[torch.cat(side) for side in zip(*group, strict=True)] for group in by_device.values()]
    return all(same_bits(first, second) for first, second in joined)
