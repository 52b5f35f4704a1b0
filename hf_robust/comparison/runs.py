# SPDX-License-Identifier: Apache-2.0
"""What has ended so far: one JSON file each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from ..data.text_files import read_json
from ..evaluation.report import write_json
from ..scripting.checks import check_same_settings

Run = dict[str, Any]


class Runs:
    """What has ended so far: one JSON file each, in a folder that other calls with the same settings share.

    Args:
        output: holds the folder `runs`, and the settings from when the first run has ended.
        settings: of this call, in sections.

    Raises:
        ConfigError: the folder has runs of other settings.

    Example:
        >>> runs = Runs(Path("runs/compare"), {"config": {"shots": 8}})
        >>> runs.get("full_seed_1", train_and_evaluate, comparison, "full", 1e-5, 1)
        {'method': 'full', ...}
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings_file, self.settings = output / "runs", output / "settings.json", settings
        self.check()
        self.found = {path.stem: read_json(path) for path in sorted(self.folder.glob("*.json"))}

    def check(self) -> None:
        """Refuses a folder with runs of other settings.

        Raises:
            ConfigError: it is one.
        """
        if self.settings_file.exists():
            check_same_settings(read_json(self.settings_file), self.settings, self.settings_file)

    def get(self, name: str, run: Callable[..., Run], *arguments: Any) -> Run:
        """Returns what `run(*arguments)` returned, now or in an earlier call.

        Args:
            name: of the run, and of its file.
            run: called on all ranks if it has not ended before.
            *arguments: its arguments.
        """
        if name not in self.found:
            is_main = PartialState().is_main_process
            if is_main:
                Console().rule(f"[bold]{name}")
            self.found[name] = run(*arguments)
            if is_main:
                self.check()  # another call may have come first
                write_json(self.settings, self.settings_file)
                write_json(self.found[name], self.folder / f"{name}.json")
        return self.found[name]
