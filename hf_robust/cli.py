# SPDX-License-Identifier: Apache-2.0
"""The command `hf-robust`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

from .data.text_files import read_json
from .errors import AdapterFileError, HfRobustError
from .peft_types import RobustPeftType
from .scripting.merging import MergeArguments, merge
from .scripting.run import run
from .tuners.files import CONFIG_FILE, WEIGHTS_FILE, check_digest

CONFIGS: dict[str, Any] = {method.value: PEFT_TYPE_TO_CONFIG_MAPPING[method] for method in RobustPeftType}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `hf-robust check FOLDER` or `hf-robust merge --zero_shot …`.

    Args:
        arguments: of the command; by default those of the process.

    Returns:
        The exit status: 0 for an adapter that is whole, 1 for one that is refused.

    Raises:
        SystemExit: with status 2, where the command line is wrong or models cannot be merged.

    Example:
        >>> main(["check", "runs/saft"])
        runs/saft: whole
        ...
        0
    """
    parser = argparse.ArgumentParser(prog="hf-robust", description="Robust fine-tuning of CLIP-like models.")
    commands = parser.add_subparsers(required=True)
    check = commands.add_parser("check", help="look whether the folder of a saved adapter is whole")
    check.add_argument("folder", type=Path, help="with adapter_config.json and adapter_model.safetensors")
    commands.add_parser("merge", help="WiSE-FT and soups of models on disk; merge --help says more", add_help=False)
    flags = list(sys.argv[1:] if arguments is None else arguments)
    if flags[:1] == ["merge"]:
        run(merge, MergeArguments, flags=flags[1:], program="hf-robust merge")
        return 0
    folder = parser.parse_args(flags).folder
    try:
        verdict, *found = check_folder(folder)
    except (HfRobustError, ValueError, OSError) as error:
        print(f"{folder}: refused\n  {type(error).__name__}: {error}")
        return 1
    print("\n".join([f"{folder}: {verdict}", *(f"  {line}" for line in found)]))
    return 0


def check_folder(folder: Path) -> list[str]:
    """Looks at an adapter's folder as loading does, but for what only the base can tell.

    Args:
        folder: of a saved SAFT or A-CLIP adapter.

    Returns:
        The verdict; what was looked at, and what could not be, in words.

    Raises:
        AdapterFileError: the folder is not that of an adapter, or is not as it was saved.
        UnsafeFileError: a file is no regular file.
    """
    settings = read_json(folder / CONFIG_FILE)
    method = settings.get("peft_type") if isinstance(settings, dict) else None
    if method not in CONFIGS:
        allowed = ", ".join(CONFIGS)
        raise AdapterFileError("not an adapter of hf_robust", where=str(folder), got=method, allowed=allowed)
    if not (folder / WEIGHTS_FILE).exists():
        raise AdapterFileError("adapter's tensors are not there", where=str(folder), allowed=WEIGHTS_FILE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = CONFIGS[method].from_pretrained(str(folder))
        check_digest(folder, config.saved, PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type])
    verdict = "whole" if config.saved else "of an older version, maybe not whole"
    lines = [verdict, f"settings: of {method}, each of the right kind"]
    if config.saved is None:
        lines.append("not looked at: tensors and base, which older versions of hf_robust did not describe")
    else:
        base = config.base_model_name_or_path or "a base without a name"
        if method == "SAFT" and config.entry_counts is None:
            lines.append("note: no entries have been selected, it changes nothing")
        lines.append(f"tensors: format {config.saved['format_version']}, SHA-256 {config.saved['sha256'][:16]}…")
        lines.append(f"not looked at: the base; loading compares it with {base}, as described in the settings")
    return lines + [f"note: {warning.message}" for warning in caught]
