# SPDX-License-Identifier: Apache-2.0
"""Wheel and sdist, and the wheel in an environment that has nothing of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import hf_robust

PACKAGE = Path(hf_robust.__file__).parent
PROJECT = PACKAGE.parent


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """What a command prints, without a path that leads to the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a build leaves files beside what it builds."""
    copy = tmp_path_factory.mktemp("source")
    for path in PROJECT.glob("[!.]*"):
        if path.is_file():
            shutil.copy(path, copy)
    for folder in ("hf_robust", "tests"):
        shutil.copytree(PROJECT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def built(source: Path) -> Path:
    """The folder of `make build`, which makes the wheel of what the sdist holds."""
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    return source / "dist"


def the_wheel(folder: Path) -> ZipFile:
    (path,) = folder.glob("*.whl")
    return ZipFile(path)


def metadata(wheel: ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and the packages that this one has, but for what is installed editable."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder)
    return folder


# --- what is in them ---


def test_the_wheel_has_every_file_of_the_package_and_no_other(built: Path) -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    inside = [name for name in the_wheel(built).namelist() if ".dist-info/" not in name]
    assert sorted(inside) == sorted(str(path.relative_to(PROJECT)) for path in files)
    assert {"hf_robust/py.typed", "hf_robust/cards/model_card_template.md", "hf_robust/__init__.pyi"} <= set(inside)


def test_the_sdist_builds_what_the_source_builds(source: Path, built: Path, tmp_path: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"} <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {"hf_robust", "hf_robust.egg-info"}
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, cwd=source)
    of_sdist, of_source = the_wheel(built), the_wheel(tmp_path)
    assert {n: of_sdist.read(n) for n in of_sdist.namelist()} == {n: of_source.read(n) for n in of_source.namelist()}


def test_metadata(built: Path) -> None:
    found = metadata(the_wheel(built))
    assert found["Version"] == re.search(r'^version = "(.*)"$', (PROJECT / "pyproject.toml").read_text(), re.M)[1]
    assert found["Version"] == re.search(r"^## \[(\d.*)\]", (PROJECT / "CHANGELOG.md").read_text(), re.M)[1]
    assert (found["License-Expression"], found["License-File"]) == ("Apache-2.0", "LICENSE")
    assert {"identities", "search", "all"} <= set(found.get_all("Provides-Extra"))
    needed = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    named = {re.match(r"[\w-]+", line)[0] for line in needed}
    assert {"torch", "transformers", "peft", "accelerate", "datasets", "evaluate"} <= named
    assert not {"pytorch-metric-learning", "optuna", "pytest"} & named


# --- in use ---

INSTALLED = """
import hf_robust
from hf_robust.cards.card import TEMPLATE
from hf_robust.evaluation import shipped_suites
print(hf_robust.__file__, hf_robust.__version__, *shipped_suites())
"""


def test_the_installed_wheel_is_imported_and_run(built: Path, environment: Path) -> None:
    where, version, *suites = run(environment / "bin/python", "-c", INSTALLED, cwd=environment).split()
    assert Path(where).is_relative_to(environment)
    assert version == metadata(the_wheel(built))["Version"]
    assert "imagenet" in suites
    assert "hf-robust" in run(environment / "bin/hf-robust", "--help", cwd=environment)


CONSUMER = """
from peft import get_peft_model
from hf_robust import RobustTrainingArguments, SAFTConfig, ZeroShotClassifier, mask_summary, wise_ft
from hf_robust.evaluation import harmonic_mean
import hf_robust

reveal_type(SAFTConfig(density=0.001).density)
reveal_type(harmonic_mean(0.5, 0.5))
reveal_type(hf_robust.TEMPLATES)
hf_robust.evaluation.statistics.paired_test([True], [False])
harmonic_mean("a half", 0.5)
hf_robust.no_such_name
"""
SETTINGS = """
[mypy]
follow_imports = skip
[mypy-hf_robust.*]
follow_imports = silent
"""


def test_a_users_type_checker_sees_types(environment: Path, tmp_path: Path) -> None:
    """Other packages are skipped: torch alone takes a minute."""
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "settings.ini").write_text(SETTINGS)
    mypy = [sys.executable, "-m", "mypy", "--config-file", "settings.ini", "--python-executable"]
    found = run(*mypy, environment / "bin/python", "consumer.py", cwd=tmp_path, status=1)
    said = [re.sub(r"consumer.py:\d+: (\w+: )?", "", line) for line in found.splitlines()]
    assert said[:3] == [f'Revealed type is "{kind}"' for kind in ("float", "float", "dict[str, tuple[str, ...]]")]
    assert [re.search(r"\[(.*)\]$", line)[1] for line in said[3:-1]] == ["arg-type", "attr-defined"]
