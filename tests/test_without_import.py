# SPDX-License-Identifier: Apache-2.0
"""What PEFT makes of an adapter of ours in a program that does not import this package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING

import hf_robust
from hf_robust import SAFTConfig

GUIDE = Path(hf_robust.__file__).parents[1] / "docs" / "guides" / "without_hf_robust.md"
PROGRAM = """
import sys
from peft import PeftConfig
print("hf_robust" in sys.modules)
print(type(PeftConfig.from_pretrained("adapter")).__module__)
print("hf_robust" in sys.modules)
"""


def block(language: str) -> str:
    """The first block of a language in the guide."""
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)[0]


def test_peft_has_no_hook_for_methods_of_others() -> None:
    """When it has one, the guide is wrong."""
    assert type(PEFT_TYPE_TO_CONFIG_MAPPING) is dict
    with pytest.raises(KeyError):
        PEFT_TYPE_TO_CONFIG_MAPPING["NONE"]


@pytest.mark.skipif(peft.__version__ != "0.21.2", reason="the guide's patch is for PEFT 0.21.2")
def test_with_the_guides_patch_an_entry_point_is_enough(tmp_path: Path) -> None:
    SAFTConfig().save_pretrained(str(tmp_path / "adapter"))
    site = tmp_path / "site"
    shutil.copytree(Path(peft.__file__).parent, site / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "patch").write_text(block("diff"), encoding="utf-8")
    subprocess.run(["git", "apply", "--unsafe-paths", f"--directory={site}", "patch"], cwd=tmp_path, check=True)
    info = site / "with_methods-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: with-methods\nVersion: 1\n", encoding="utf-8")
    points = block("toml").replace('[project.entry-points."peft.methods"]', "[peft.methods]").replace('"', "")
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(GUIDE.parents[2])])}
    how: dict = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", PROGRAM], **how)
    assert done.stdout.splitlines() == ["False", "hf_robust.tuners.saft.config", "True"], done.stderr
