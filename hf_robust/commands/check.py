# SPDX-License-Identifier: Apache-2.0
"""The command `hf-robust check`: looks whether the folder of a saved adapter is whole."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

from ..data.text_files import read_json
from ..errors import AdapterFileError, HfRobustError
from ..peft_types import RobustPeftType
from ..scripting.arguments import setting
from ..scripting.checks import check_given
from ..tuners.files import CONFIG_FILE, WEIGHTS_FILE, check_digest

CONFIGS: dict[str, Any] = {method.value: PEFT_TYPE_TO_CONFIG_MAPPING[method] for method in RobustPeftType}


@dataclass
class CheckArguments:
    """Looks whether the folder of a saved adapter is whole; exit status 0, or 1 where it is refused."""

    folder: str | None = setting(None, "With adapter_config.json and adapter_model.safetensors.", positional=True)

    def __post_init__(self) -> None:
        check_given(self, "folder")


def main(args: CheckArguments) -> None:
    """Prints what was found.

    Raises:
        SystemExit: with status 1, where the folder is refused.
    """
    folder = Path(str(args.folder))
    try:
        verdict, *found = check_folder(folder)
    except (HfRobustError, ValueError, OSError) as error:
        print(f"{folder}: refused\n  {type(error).__name__}: {error}")
        sys.exit(1)
    print("\n".join([f"{folder}: {verdict}", *(f"  {line}" for line in found)]))


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


TYPES = (CheckArguments,)
EXAMPLE = "hf-robust check runs/saft"
