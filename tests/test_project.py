# SPDX-License-Identifier: Apache-2.0
"""What holds for the whole package."""

from __future__ import annotations

import ast
import pickle
import pydoc
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import constants
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from pytest_socket import SocketConnectBlockedError

import hf_robust
from hf_robust import errors
from hf_robust.peft_types import RobustPeftType


def test_no_network_in_tests() -> None:
    assert constants.HF_HUB_OFFLINE
    with socket.socket() as connection, pytest.raises((SocketConnectBlockedError, UserWarning)):
        connection.connect(("192.0.2.1", 80))  # an address reserved for documentation


def test_public_names_are_documented() -> None:
    public = [value for value in map(hf_robust.__getattr__, hf_robust.__all__) if callable(value)]
    assert hf_robust.RobustTrainer in public
    for value in public:
        assert value.__doc__ and "Example" in value.__doc__ + str(value.__init__.__doc__), value


def test_public_names_are_there_in_every_way() -> None:
    everything: dict[str, object] = {}
    exec("from hf_robust import *", everything)
    assert {"SAFTConfig", "RobustTrainer", "push", "training"} <= set(dir(hf_robust)) <= everything.keys()
    assert hf_robust.SAFTConfig is everything["SAFTConfig"] is PEFT_TYPE_TO_CONFIG_MAPPING["SAFT"]
    assert pickle.loads(pickle.dumps(hf_robust.RobustTrainer)) is everything["RobustTrainer"]
    assert "class SAFTConfig" in pydoc.plain(pydoc.render_doc(hf_robust))
    assert hf_robust.__version__ == version("hf_robust")
    with pytest.raises(AttributeError, match="nonsense"):
        hf_robust.nonsense  # noqa: B018


LIGHT = """
import functools, pkgutil, sys
import peft, transformers, datasets
others = set(sys.modules)

import hf_robust
slow = {"scipy.stats", "matplotlib", "evaluate", "sklearn", "torchmetrics", "pytorch_metric_learning", "jinja2"}
loaded = sys.modules.keys() - others
assert not loaded & {*slow, "transformers.trainer", "hf_robust.cards.card", "hf_robust.training.trainer"}, loaded
assert {"SAFT", "ACLIP", "RADAPTER"} <= peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.keys()

hf_robust.RobustTrainer
assert not (sys.modules.keys() - others) & slow, sys.modules.keys() & slow
assert "transformers.trainer" in sys.modules

for module in pkgutil.walk_packages(hf_robust.__path__, "hf_robust."):
    room, *path = module.name.split(".")[1:]
    if room in hf_robust.__all__:
        assert functools.reduce(getattr, path, getattr(hf_robust, room)), module
"""


def test_what_is_slow_to_import_is_imported_when_it_is_used() -> None:
    """And every file is an attribute of its room."""
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(errors.ConfigError, match=r"'not_there' is not installed. pip install 'hf_robust\[photos\]'"):
        with errors.needs_extra("photos"):
            import not_there  # noqa: F401


ERRORS = [one for name, one in vars(errors).items() if name.endswith("Error")]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_pickling(kind: type[errors.HfRobustError]) -> None:
    """A DataLoader worker sends its error through a pipe."""
    error = kind("what", where="there", got=1.5, allowed="(0, 1]", remedy="Do it so.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == str(error) == "what (at there): got 1.5; allowed (0, 1]. Do it so."
    assert (copy.where, copy.got, copy.allowed, copy.remedy) == ("there", 1.5, "(0, 1]", "Do it so.")


def test_an_error_of_a_worker_is_one_line_again() -> None:
    """A DataLoader makes a new error of the worker's traceback."""
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
    error = errors.DataError(text + "hf_robust.errors.DataError: image is broken (at photos, row 3): got 1\n")
    assert str(error) == "image is broken (at photos, row 3): got 1"


def test_method_names_are_their_values_and_not_pefts() -> None:
    """PEFT looks its mappings up with the string from the file, and an Enum hashes by its name."""
    for member in RobustPeftType:
        assert member.name == member.value and hash(member) == hash(member.value)
        assert member.name not in PeftType.__members__


# From the ground up; rooms on one floor do not import each other. Imports for type checkers alone do not count.
FLOORS = [
    {"errors", "peft_types", "shown"},
    {"encoders"},
    {"data"},
    {"tasks"},
    {"tuners", "losses"},
    {"ogen", "deploy"},
    {"interpolation", "evaluation"},
    {"cards"},
    {"training"},
    {"scripting"},
    {"comparison"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
PACKAGE = Path(hf_robust.__file__).parent


def imported_rooms(tree: ast.Module, package: list[str]) -> set[str]:
    """The rooms of the package that a module imports from, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]
    paths = [package[: len(package) - node.level + 1] + (node.module or "").split(".") for node in imports]
    return {path[0] for path in paths}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/**/*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    room, *_ = package = list(path.relative_to(PACKAGE).parent.parts)
    floor = next(index for index, rooms in enumerate(FLOORS) if room in rooms)
    below = set().union(*FLOORS[:floor])
    assert imported_rooms(ast.parse(path.read_text(encoding="utf-8")), package) <= below | {room}


EXAMPLES = PACKAGE.parent / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("**/*.py") if path.parent.name != "demo")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_scripts_share_code_through_the_library_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    froms = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    stems = {script.stem for script in EXAMPLES.glob("**/*.py")}
    assert not {module.split(".")[0] for module in froms | plain} & (stems | {"examples"})
    assert "sys.path" not in path.read_text(encoding="utf-8")


def test_few_files_lie_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6
