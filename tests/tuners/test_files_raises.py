# SPDX-License-Identifier: Apache-2.0
"""Each refusal of an adapter's files is needed: without it, a damaged file is no longer refused as it was."""

from __future__ import annotations

import ast
import copy
import inspect
import shutil
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from peft import get_peft_model

from hf_robust import select_saft
from hf_robust.errors import HfRobustError
from hf_robust.tuners import files, fingerprint, loading
from hf_robust.tuners.base import RobustLayer, RobustTuner
from hf_robust.tuners.config import RobustConfig
from hf_robust.tuners.linear_layer import LinearLayer
from hf_robust.tuners.saft.config import SAFTConfig
from hf_robust.tuners.saft.layer import SAFTLayer

from .bad_files import BADS, forge, read_tensors
from .test_files import OTHER_BASES, OVER_LIVE, PEFT, STATE_DICT, TRANSFORMERS, Door, Saved
from .test_files import savings as savings

Case = Callable[[], Any]
MODULES = (files, fingerprint, loading)
MEMBERS = [
    *[(RobustConfig, name) for name in ("from_json_file", "from_pretrained")],
    *[(RobustTuner, "_remap_adapter_state_dict_for_load"), (RobustLayer, "check_values")],
    *[(SAFTConfig, "check_weights"), (SAFTLayer, "check_tensors"), (LinearLayer, "check_tensors")],
]


def functions() -> list[FunctionType]:
    """Those that refuse adapters."""
    owners = [*MODULES, loading.Arrival]
    found: list[Any] = [f for owner in owners for f in vars(owner).values()]
    found += [vars(owner)[name] for owner, name in MEMBERS]
    found = [f.__func__ if isinstance(f, classmethod) else f for f in found]
    names = {owner.__module__ for owner, _ in MEMBERS} | {module.__name__ for module in MODULES}
    return [f for f in found if inspect.isfunction(f) and f.__module__ in names]


def raises() -> Iterator[tuple[FunctionType, ast.Module, int, bool]]:
    """All `raise` statements of the functions: the module without it, its line, and whether it raises on."""
    for function in functions():
        lines, start = inspect.getsourcelines(function)
        source = Path(function.__code__.co_filename).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and start <= node.lineno < start + len(lines):
                yield function, Without(node).visit(ast.parse(source)), node.lineno, node.exc is None


class Without(ast.NodeTransformer):
    def __init__(self, statement: ast.Raise) -> None:
        self.place = (statement.lineno, statement.col_offset)

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:  # noqa: N802
        return ast.copy_location(ast.Pass(), node) if (node.lineno, node.col_offset) == self.place else node


def code_in(code: CodeType, name: str, line: int) -> CodeType | None:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    for const in inner:
        if (const.co_name, const.co_firstlineno) == (name, line):
            return const
    return next(filter(None, (code_in(const, name, line) for const in inner)), None)


@contextmanager
def replaced(function: FunctionType, tree: ast.Module) -> Iterator[None]:
    original = function.__code__
    changed = code_in(compile(tree, original.co_filename, "exec"), original.co_name, original.co_firstlineno)
    assert changed is not None
    function.__code__ = changed
    try:
        yield
    finally:
        function.__code__ = original


def refusal(case: Case) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case()
        except Exception as error:
            return error
    return None


def cases(savings: dict[str, Saved], folder: Path) -> Iterator[Case]:
    for saved in savings.values():
        bads = [bad for bad in BADS if saved.method.name in bad.methods and bad.name != "pipe"]  # which would be read
        for number, bad in enumerate(bads):
            damaged = folder / f"{saved.method.name}-{number}"
            shutil.copytree(saved.folder, damaged)
            bad.damage(damaged)
            for door in [PEFT] if bad.of in ("place", "header") else [PEFT, OVER_LIVE, STATE_DICT, TRANSFORMERS]:
                yield partial(opened, saved, door, damaged)
        for other in OTHER_BASES:
            yield partial(opened, saved, PEFT, saved.folder, other)
        yield from cases_of_whole_modules(saved, folder)
        yield lambda: SAFTConfig.from_pretrained(str(savings["A-CLIP"].folder))


def cases_of_whole_modules(saved: Saved, folder: Path) -> Iterator[Case]:
    settings: Any = {"density": 0.01, "score": "magnitude"} if saved.method.name == "SAFT" else {}
    settings["modules_to_save"] = ["visual_projection"]
    model = get_peft_model(saved.fresh_base(), type(saved.live.peft_config["default"])(**settings))
    if saved.method.name == "SAFT":
        select_saft(model)
    name = "base_model.model.visual_projection.weight"
    for number, change in enumerate([lambda weight: weight[None], lambda weight: weight * float("nan")]):
        damaged = folder / f"{saved.method.name}-whole-{number}"
        model.save_pretrained(damaged)
        tensors = read_tensors(damaged)
        forge(damaged, {**tensors, name: change(tensors[name]).contiguous()})
        yield partial(opened, saved, PEFT, damaged)


def opened(saved: Saved, door: Door, folder: Path, other: str | None = None) -> None:
    model = OTHER_BASES[other](saved) if other else saved.fresh_base()
    door.open(copy.deepcopy(saved.live) if door.into_live else model, folder)


def test_no_refusal_can_be_left_out(savings: dict[str, Saved], tmp_path: Path) -> None:
    by_line: dict[tuple[str, int], list[tuple[Case, str]]] = defaultdict(list)
    by_function: dict[CodeType, list[tuple[Case, str]]] = defaultdict(list)
    for case in cases(savings, tmp_path):
        error = refusal(case)
        while isinstance(error, HfRobustError):
            frames = list(traceback.walk_tb(error.__traceback__))
            by_line[frames[-1][0].f_code.co_filename, frames[-1][1]].append((case, str(error)))
            for frame, _ in frames:
                by_function[frame.f_code].append((case, str(error)))
            error = error.__cause__
    survivors = []
    for function, tree, line, raises_on in raises():
        code = function.__code__
        reached = by_function[code] if raises_on else by_line[code.co_filename, line]
        with replaced(function, tree):
            if all(message == str(refusal(case)) for case, message in reached):
                survivors.append(f"{Path(code.co_filename).name}:{line} in {code.co_name}, {len(reached)} cases")
    assert not survivors, "\n".join(survivors)
