# SPDX-License-Identifier: Apache-2.0
"""How two lists of class names relate, and which words stand for the classes of a dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..encoders.templates import check_class_names, name_key, readable
from ..errors import DataError, close_matches

MOST_SHOWN = 12  # classes in a message


@dataclass(frozen=True)
class ClassSpace:
    """The classes that a head was made for.

    Args:
        words: what stands in the prompts, in the order of the head's rows.
        data_names: what the training data calls them, in the same order; None where it has no names.
    """

    words: Sequence[str]
    data_names: Sequence[str] | None = None

    def relate(self, names: Sequence[str]) -> Relation:
        """Returns how the classes of another dataset relate to these.

        Underscores count as blanks; case, and blanks around a name, do not count.

        Args:
            names: the other dataset's class names, in the order of its labels.

        Example:
            >>> ClassSpace(["hot dog", "tea", "pie"]).relate(["Tea", "hot_dog"])
            Relation(kind='subset', words=['tea', 'hot dog', 'pie'], order=[1, 0, 2])
        """
        by_data = {name_key(name): index for index, name in enumerate(self.data_names or ())}
        by_word = {name_key(name): index for index, name in enumerate(self.words)}
        keys = [name_key(name) for name in names]
        # a word may be what the data call another class, so names of one kind are not looked up among the other
        known = next((of for of in (by_data, by_word) if all(key in of for key in keys)), by_data | by_word)
        found = [known.get(key) for key in keys]
        own = [index for index in found if index is not None]
        if len(own) < len(found) or len(set(own)) < len(own):
            pairs = zip(names, found, strict=True)
            return Relation("foreign", [readable(name) if i is None else self.words[i] for name, i in pairs])
        order = own + [index for index in range(len(self.words)) if index not in set(own)]
        kind: Kind = "subset" if len(own) < len(order) else "same" if order == sorted(order) else "reordered"
        return Relation(kind, [self.words[index] for index in order], order)


Kind = Literal["same", "reordered", "subset", "foreign"]


@dataclass(frozen=True)
class Relation:
    """How the classes of a dataset relate to those of a head.

    Args:
        kind: `"same"`, `"reordered"`, `"subset"` (some classes are missing, which remain possible answers) or
            `"foreign"` (at least one class is not among the head's).
        words: what stands in the prompts: the dataset's classes in the order of its labels, then the missing ones.
        order: likewise the rows of the head; None where it has none for these classes.
    """

    kind: Kind
    words: list[str]
    order: list[int] | None = None


def class_space(
    data_names: Sequence[str] | None, class_names: Sequence[str] | Mapping[str | int, str] | None, where: str
) -> ClassSpace:
    """Returns the classes of a training set, with the words that the user gives them.

    Args:
        data_names: the data's own names in label order; None where it has none.
        class_names: None for the data's own, with underscores read as blanks; a list of words in label order, which is
            checked against the data's own names; or a mapping from these names to words. A list may name more classes
            than the data has, if it names all of these first.
        where: the setting, for the message.

    Raises:
        DataError: there are no names; a name is empty or repeated; the list has another length, holds the data's own
            names in another order, or the data's are numbers in the order of text, so that a list is easily wrong; or
            the mapping lacks a class.

    Example:
        >>> class_space(["n01", "n02"], {"n02": "goldfish", "n01": "tench"}, "class_names").words
        ['tench', 'goldfish']
    """
    if class_names is None:
        if data_names is None:
            remedy = "Pass class_names (class_names_file in a script), one per class in the order of the labels; or a "
            remedy += "training set whose labels are text or a ClassLabel. Where none are learned, name the task."
            raise DataError("class names are missing", where=where, remedy=remedy)
        return ClassSpace(check_class_names([readable(name) for name in data_names]), list(data_names))
    if isinstance(class_names, Mapping):
        return _from_mapping(data_names, class_names, where)
    words = check_class_names(class_names)
    if data_names is not None:
        check_pairing(data_names, words, where)
        data_names = [*data_names, *words[len(data_names) :]]
    return ClassSpace(words, data_names)


def _from_mapping(data_names: Sequence[str] | None, words: Mapping[str | int, str], where: str) -> ClassSpace:
    known = {name_key(str(name)): word for name, word in words.items()}
    names = list(map(str, range(len(words)))) if data_names is None else list(data_names)
    missing = [name for name in names if name_key(name) not in known]
    if missing:
        remedy = close_matches(missing[0], list(map(str, words)))
        raise DataError("class_names lack a class of the data", where=where, got=missing[0], remedy=remedy)
    return ClassSpace(check_class_names([known[name_key(name)] for name in names]), data_names)


def check_pairing(data_names: Sequence[str], words: Sequence[str], where: str) -> None:
    """Refuses a list that may mean another order than the data's: all would come out wrong, and nothing would tell.

    Args:
        data_names: the data's own names in label order.
        words: what the user calls the classes, meant to be in the same order.
        where: the setting, for the message.

    Raises:
        DataError: see `class_space`.
    """
    place = {name_key(name): index for index, name in enumerate(data_names)}
    elsewhere = [word for index, word in enumerate(words) if place.get(name_key(word), index) != index]
    named_first = all(name_key(word) == name_key(name) for word, name in zip(words, data_names, strict=False))
    if elsewhere:
        what = "class_names stand in another order than the data's classes"
    elif len(words) != len(data_names) and not (len(words) > len(data_names) and named_first):
        what = f"{len(words)} class_names for the data's {len(data_names)} classes"
    elif are_numbers_as_text(data_names) and not named_first:
        what = "the data's classes are numbers in the order of text, so a list may be meant otherwise"
    else:
        return
    pairs = [f"{name!r}: {word!r}" for name, word in zip(data_names, words, strict=False)]
    shown = ", ".join(pairs[:MOST_SHOWN]) + (", …" if len(pairs) > MOST_SHOWN else "")
    remedy = "Pass a mapping from the data's names to yours, class_names={" + repr(data_names[0]) + ": …}."
    raise DataError(f"{what}; they would be paired so: {shown}", where=where, remedy=remedy)


def are_numbers_as_text(names: Sequence[str]) -> bool:
    """Whether names stand in another order by their numbers than as text: 0, 1, 10, 2 or img1, img10, img2.

    Args:
        names: class names in label order.
    """

    def parts(name: str) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    return list(names) == sorted(names) and list(names) != sorted(names, key=parts)
