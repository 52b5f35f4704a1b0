# SPDX-License-Identifier: Apache-2.0
"""What scripts show and leave of their results."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from statistics import stdev

VERSIONS_OF = ("hf_robust", "torch", "transformers", "peft", "accelerate", "datasets")


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that results depend on, by name."""
    return {package: version(package) for package in VERSIONS_OF}


def percent(value: float, by_seed: Sequence[float] = ()) -> str:
    """Returns a figure in percent, with its standard deviation over seeds (n - 1) where there are several.

    Args:
        value: a fraction.
        by_seed: fractions that it is the mean of.

    Example:
        >>> percent(0.5, [0.4, 0.6])
        '50.0 ± 14.1'
    """
    return f"{100 * value:.1f}" + (f" ± {100 * stdev(by_seed):.1f}" if len(by_seed) > 1 else "")
