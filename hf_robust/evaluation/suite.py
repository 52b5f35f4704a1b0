# SPDX-License-Identifier: Apache-2.0
"""What a model is evaluated on: named datasets, the part each plays, what is asked of their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from datasets import Dataset

from ..data.columns import Target
from ..data.text_files import read_json, read_text
from ..data.yaml_files import read_yaml
from ..encoders.templates import check_class_names, check_templates
from ..errors import ConfigError, DataError, close_matches
from .corruptions import check_corruption
from .roles import ROLES, Role

LABEL_SPACES = ("class_names", "subset")
SuiteTask = Literal["classification", "retrieval", "several_labels"]
TASKS: tuple[SuiteTask, ...] = get_args(SuiteTask)
CLASSIFICATION, RETRIEVAL, SEVERAL_LABELS = TASKS
TARGETS: dict[SuiteTask, Target] = {"classification": "label", "retrieval": "text", "several_labels": "labels"}
WITHOUT_MEANING: dict[SuiteTask, tuple[str, ...]] = {
    "classification": ("truncate",),
    "retrieval": ("class_names", "templates", "subset", "labels_in", "merge"),
    "several_labels": ("subset", "labels_in", "merge", "truncate"),
}
SHIPPED = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class SuiteSet:
    """One dataset of a suite.

    What is asked of its images is the `task`:

    - `"classification"`: which one of the classes. Rows have a label.
    - `"retrieval"`: which of the set's texts belong to an image, and which of its images to a text, see
      `retrieval_metrics`. Rows have a text, or a list of texts, for which `class_names`, `templates`, `subset`,
      `labels_in` and `merge` mean nothing.
    - `"several_labels"`: which images have a class, for every class, see `label_metrics`. Rows have a list of classes
      or a 0/1 vector, for which `subset`, `labels_in` and `merge` mean nothing.

    In classification a prediction is an argmax over the classes in `class_names`, unless one of these says otherwise:

    - `subset`: only these classes can be the answer, the others' logits do not take part. ImageNet-A and -R, whose
      images are of 200 of ImageNet's 1,000 classes.
    - `merge`: the answers are the dataset's own labels, each with the largest logit among its classes. ObjectNet,
      whose labels cover several classes of ImageNet each; STL-10, whose labels stand in another order than CIFAR-10's.

    Args:
        name: names the set in reports.
        role: `"id"`: the distribution of the training set; `"ood"`: its classes in other circumstances; `"new"`:
            classes that were not trained on; `"other"`: other tasks, to see what is forgotten.
        source: a folder with one subfolder of images per class; parquet, CSV, TSV or JSON lines, as a file, a pattern
            (`data/*.parquet`) or a folder; a dataset of the Hub, `owner/name`; or a `datasets.Dataset`. Where there
            are several splits, one is chosen by `:split`, as in `photos:test`. Paths are relative to the working
            directory.
        class_names: one per class, in the order of the labels, which is checked against the dataset's own names; or a
            mapping from these names to words. None: the dataset's own (its `ClassLabel`, or its labels where these are
            text), with underscores read as spaces. For several labels also what integers and vectors mean, where the
            dataset does not say it.
        templates: prompts with `{}` in place of the class name, one such prompt, or a key of `TEMPLATES`.
        subset: indices into the class names.
        labels_in: what a label of a set with `subset` counts: the `"class_names"`, or the entries of the `"subset"`.
        merge: for every label of the dataset, in the order of these, its name and its classes, by name or index. None
            in the place of the classes: images with this label are left out.
        image_column: the dataset's column of images; None for the one with a usual spelling, see `find_column`.
        label_column: the dataset's column of what stands beside the images, likewise: labels, or texts.
        corruption: name and severity (1 to 5) of a corruption, see `corrupt`.
        task: `"classification"`, `"retrieval"` or `"several_labels"`.
        truncate: retrieval: whether texts that are longer than the text tower are cut; else they are refused.

    Raises:
        ConfigError: a setting is none of the allowed ones, means nothing for the task, or does not fit the class
            names.
        DataError: class names are empty or repeated.

    Example:
        >>> SuiteSet("stl10", "ood", "tanganke/stl10:test", ["cat", "car"], merge={"car": ["car"], "cat": [0]}).role
        'ood'
    """

    name: str
    role: Role
    source: str | Dataset
    class_names: Sequence[str] | Mapping[str | int, str] | None = None
    templates: Sequence[str] | str = "single"
    subset: Sequence[int] | None = None
    labels_in: Literal["class_names", "subset"] = "class_names"
    merge: Mapping[str, Sequence[str | int] | None] | None = None
    image_column: str | None = None
    label_column: str | None = None
    corruption: tuple[str, int] | None = None
    task: SuiteTask = "classification"
    truncate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError("set without a name", got=self.name)
        if self.role not in ROLES:
            raise ConfigError("unknown role", where=self.name, got=self.role, allowed=", ".join(ROLES))
        if not isinstance(self.source, str | Dataset) or self.source == "":
            allowed = "text or a datasets.Dataset"
            raise ConfigError("no source", where=self.name, got=type(self.source).__name__, allowed=allowed)
        if self.task not in TASKS:
            raise ConfigError("unknown task", where=self.name, got=self.task, allowed=", ".join(TASKS))
        _check_meaning(self)
        if self.labels_in not in LABEL_SPACES:
            allowed = ", ".join(LABEL_SPACES)
            raise ConfigError("unknown labels_in", where=self.name, got=self.labels_in, allowed=allowed)
        check_templates(self.templates)
        if self.corruption is not None:
            _check_corruption(self.name, self.corruption)
        if self.subset is not None and self.merge is not None:
            raise ConfigError("a set has either a subset or a merge", where=self.name)
        if self.class_names is not None and not isinstance(self.class_names, Mapping):
            self.answers(check_class_names(self.class_names))

    def answers(self, class_names: Sequence[str]) -> dict[str, list[int]]:
        """Returns what can be predicted: the answers by name, in order, each with the indices of its classes.

        Args:
            class_names: the set's own, or those of its dataset where it has none.

        Raises:
            ConfigError: `subset` or `merge` does not fit them.

        Example:
            >>> SuiteSet("a", "ood", "a.parquet", subset=[0, 2]).answers(["cat", "dog", "owl"])
            {'cat': [0], 'owl': [2]}
        """
        if self.subset is not None:
            return {class_names[index]: [index] for index in _check_subset(self.name, self.subset, class_names)}
        if self.merge is None:
            return {name: [index] for index, name in enumerate(class_names)}
        found = {}
        for label, classes in self.merge.items():
            if classes is not None:
                found[str(label)] = _class_indices(f"{self.name}, {label}", classes, class_names)
        if not found:
            raise ConfigError("merge leaves all labels out", where=self.name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON can hold them; a dataset in memory as its fingerprint and number of rows."""
        settings: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.source, Dataset):
            settings["source"] = {"fingerprint": self.source._fingerprint, "rows": len(self.source)}
        for name in ("class_names", "subset", "corruption"):
            if settings[name] is not None and not isinstance(settings[name], Mapping):
                settings[name] = list(settings[name])
        settings["templates"] = list(check_templates(self.templates))
        return settings


@dataclass(frozen=True)
class RobustnessSuite:
    """The datasets a model is evaluated on.

    Args:
        sets: at least one of them with the role `"id"`; their names differ.

    Raises:
        ConfigError: there is no set, no `"id"` set, or two sets have the same name.

    Example:
        >>> suite = RobustnessSuite([SuiteSet("photos", "id", photos), SuiteSet("sketches", "ood", sketches)])
        >>> suite = RobustnessSuite.from_yaml("pacs")
    """

    sets: Sequence[SuiteSet]

    def __post_init__(self) -> None:
        names = [one.name for one in self.sets]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError("two sets have the same name", got=twice[0])
        if not any(one.role == "id" for one in self.sets):
            found = {one.name: one.role for one in self.sets}
            raise ConfigError("no set has the role 'id'", got=found, remedy="Say what the model was trained for.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> RobustnessSuite:
        """Reads a suite from a file with `sets`, settings by name, and `defaults`, settings that all sets begin with.

        Settings are those of `SuiteSet`. In the place of three of them a file can be named, relative to the working
        directory: `class_names_file` (a name per line), `subset_file` (an index per line) and `merge_file` (JSON).

        Args:
            path: a YAML file, or the name of a suite that comes with the package: `imagenet`, `cifar10`, `fmow`,
                `iwildcam`, `pacs`, `officehome`, `domainnet`, `coop`. These name datasets as they are known on the
                Hub, or the folders their authors distribute; copy one to adapt it.

        Raises:
            ConfigError: there is no such file or suite, it is no suite, or a setting is wrong.
            DataError: a file that it names is not there or cannot be used.

        Example:
            >>> [one.name for one in RobustnessSuite.from_yaml("pacs").sets]
            ['photo', 'art_painting', 'cartoon', 'sketch']
        """
        content = _read_yaml(path)
        if (
            not isinstance(content, dict)
            or not isinstance(content.get("sets"), dict)
            or set(content) - {"defaults", "sets"}
        ):
            allowed = "a mapping with 'sets' and, if you like, 'defaults'"
            raise ConfigError("no suite", where=str(path), got=content, allowed=allowed)
        defaults = content.get("defaults") or {}
        sets = {name: {**_meant(defaults, own), **own} for name, own in content["sets"].items()}
        return cls([_set_from_settings(name, settings, str(path)) for name, settings in sets.items()])

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings of all sets as JSON can hold them."""
        return {"sets": [one.to_dict() for one in self.sets]}


def shipped_suites() -> list[str]:
    """Returns the names of the suites that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _meant(defaults: Mapping[str, Any], own: Any) -> dict[str, Any]:
    """Those defaults that mean something for the task of a set."""
    task = {**defaults, **own}.get("task", "classification") if isinstance(own, Mapping) else "classification"
    without = WITHOUT_MEANING[task] if task in WITHOUT_MEANING else ()
    return {name: value for name, value in defaults.items() if name not in without}


def _check_meaning(one: SuiteSet) -> None:
    """Refuses settings that would have no effect."""
    for field in fields(one):
        value = getattr(one, field.name)
        if field.name in WITHOUT_MEANING[one.task] and value != field.default:
            remedy = f"Leave it out, or set it to {field.default!r}."
            raise ConfigError(f"{field.name} means nothing for {one.task}", where=one.name, got=value, remedy=remedy)


def _check_corruption(name: str, corruption: Sequence[Any]) -> None:
    if isinstance(corruption, str) or len(corruption) != 2:
        raise ConfigError("no corruption", where=name, got=corruption, allowed="its name and a severity from 1 to 5")
    check_corruption(*corruption)


def _check_subset(name: str, subset: Sequence[int], class_names: Sequence[str]) -> list[int]:
    allowed = f"different integers from 0 to {len(class_names) - 1}"
    for index in subset:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(class_names):
            raise ConfigError("subset is out of range", where=name, got=index, allowed=allowed)
    if not subset or len(set(subset)) < len(subset):
        raise ConfigError("subset is empty, or names a class twice", where=name, got=list(subset), allowed=allowed)
    return list(subset)


def _class_indices(where: str, classes: Sequence[str | int], class_names: Sequence[str]) -> list[int]:
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        remedy = "Give its classes, or null to leave its images out."
        allowed = "a list of classes"
        raise ConfigError(
            "merge leaves a label without class", where=where, got=classes, allowed=allowed, remedy=remedy
        )
    names, found = list(class_names), []
    for one in classes:
        if isinstance(one, str) and one in names:
            found.append(names.index(one))
        elif isinstance(one, int) and not isinstance(one, bool) and 0 <= one < len(names):
            found.append(one)
        else:
            remedy = close_matches(str(one), names)
            raise ConfigError("merge names a class that does not exist", where=where, got=one, remedy=remedy)
    return found


# --- files ---


def _read_yaml(path: str | Path) -> Any:
    shipped = SHIPPED / f"{path}.yaml"
    if not Path(path).is_file() and str(path) not in shipped_suites():
        allowed = "a YAML file, or one of " + ", ".join(shipped_suites())
        raise ConfigError("no such suite", got=str(path), allowed=allowed)
    file = Path(path) if Path(path).is_file() else shipped
    return read_yaml(file)


def _set_from_settings(name: Any, settings: dict[str, Any], where: str) -> SuiteSet:
    allowed = [field.name for field in fields(SuiteSet)][1:]
    allowed += ["class_names_file", "subset_file", "merge_file"]
    for key in settings:
        if key not in allowed:
            remedy = close_matches(str(key), allowed)
            raise ConfigError("unknown setting", where=f"{where}, {name}", got=key, remedy=remedy)
    for key in ("role", "source"):
        if key not in settings:
            raise ConfigError(f"set without {key}", where=f"{where}, {name}", got=sorted(settings))
    for key in ("class_names", "subset", "merge"):
        file = settings.pop(f"{key}_file", None)
        if file is not None and key not in settings:
            settings[key] = _read_values(key, Path(file), f"{where}, {name}")
    if isinstance(settings.get("corruption"), list):
        settings["corruption"] = tuple(settings["corruption"])
    return SuiteSet(str(name), **settings)


def _read_values(key: str, file: Path, where: str) -> Any:
    if not file.exists():
        remedy = "Write it, or name another file in a copy of the suite; paths start at the working directory."
        raise DataError(f"no file with the {key}", where=where, got=str(file), remedy=remedy)
    if key == "merge":
        return read_json(file)
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if key == "class_names":
        return lines
    try:
        return [int(line) for line in lines]
    except ValueError as error:
        raise DataError("file holds no indices", where=f"{where}, {file}", got=str(error)) from error
