# SPDX-License-Identifier: Apache-2.0
"""How long things take, measured so that whatever else the machine does meets them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Step = Callable[[], None]


def interleaved_medians(
    steps: Mapping[str, Step], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Returns the median seconds of each step, all taking turns in every round.

    Args:
        steps: what to time, by name.
        rounds: how often each is timed; one more comes first, which warms up.
        clock: says how many seconds have passed.

    Example:
        >>> interleaved_medians({"sleep": lambda: time.sleep(0.1)}, rounds=3)
        {'sleep': 0.1}
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if number:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_medians(
    title: str,
    medians: Mapping[str, float],
    reference: str,
    more: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Prints the seconds of each step, and how many times those of the reference they are.

    Args:
        title: of the table.
        medians: seconds by name.
        reference: one of the names.
        more: further columns by their titles: what to show, by name.
    """
    columns = {} if more is None else more
    print(f"\n{title:<24} {'seconds':>8} {f'x {reference}':>10}", *(f"{one:>8}" for one in columns))
    for name, seconds in medians.items():
        ratio = seconds / medians[reference]
        print(f"{name:<24} {seconds:>8.4f} {ratio:>10.3f}", *(f"{one[name]!s:>8}" for one in columns.values()))
