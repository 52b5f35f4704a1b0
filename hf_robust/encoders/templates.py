# SPDX-License-Identifier: Apache-2.0
"""Prompt templates: a few wordings for each kind of image, and how they become the prompts of classes."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ..errors import ConfigError, DataError

TEMPLATES: dict[str, tuple[str, ...]] = {
    "single": ("a photo of a {}.",),
    "photo": (
        "a photo of a {}.",
        "a picture showing a {}.",
        "a snapshot of one {}.",
        "a photo of the {}, taken up close.",
        "a photo of the {}, seen from afar.",
        "a sharp, well lit photo of a {}.",
        "a dim and grainy photo of a {}.",
        "a blurry photo of a {}.",
        "a photo in which a {} is partly hidden.",
        "a cropped picture of the {}.",
        "a black and white photo of a {}.",
        "a photo of a small {}.",
        "a photo of a big {}.",
        "a photo of several {}.",
        "an everyday scene with a {}.",
        "a {} in front of a plain background.",
    ),
    "satellite": (
        "a satellite image of {}.",
        "a satellite image showing {} from above.",
        "an aerial picture of {}.",
        "{} as seen from space.",
        "a patch of land with {}, in an overhead view.",
        "a low resolution remote sensing image of {}.",
    ),
    "digits": (
        'an image of the number "{}".',
        'the digit "{}" written by hand.',
        'a street sign with the number "{}".',
        "the numeral {} in the middle of the picture.",
        "a close-up of the character {}.",
    ),
    "drawings": (
        "a drawing of a {}.",
        "a colour drawing of a {}.",
        "a line drawing of a {}.",
        "a black silhouette of a {}.",
        "an icon of a {}.",
        "an emoji of a {}.",
        "a sketch of a {} made with a pencil.",
        "a flat cartoon of a {}.",
        "clip art of a {}.",
    ),
}


def check_templates(templates: Sequence[str] | str) -> tuple[str, ...]:
    """Returns the templates a user means.

    Args:
        templates: a key of `TEMPLATES`, one template, or several.

    Raises:
        ConfigError: no template, or one without `{}`.

    Example:
        >>> check_templates("single")
        ('a photo of a {}.',)
    """
    if isinstance(templates, str):
        if templates in TEMPLATES:
            return TEMPLATES[templates]
        templates = (templates,)
    allowed = f"text with {{}} in place of the class name, or one of {', '.join(map(repr, TEMPLATES))}"
    if not templates or not isinstance(templates, Sequence):
        raise ConfigError("no template", got=templates, allowed=allowed)
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ConfigError("template without {}", got=template, allowed=allowed)
    return tuple(templates)


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """Returns the class names as a list, after checking that each one is text of its own.

    Args:
        class_names: one per class.

    Raises:
        DataError: there are none, or one is no text, blank, or repeated (see `name_key`).

    Example:
        >>> check_class_names(["crane", "Crane "])
        Traceback (most recent call last):
        hf_robust.errors.DataError: class name occurs twice (at classes 0 and 1): got 'Crane '
    """
    if isinstance(class_names, str) or len(class_names) == 0:
        raise DataError("no list of class names", got=class_names, allowed="a list with one name per class")
    seen: dict[str, int] = {}
    for index, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip():
            raise DataError("class name is empty", where=f"class {index}", got=name, allowed="text")
        key = name_key(name)
        if key in seen:
            raise DataError("class name occurs twice", where=f"classes {seen[key]} and {index}", got=name)
        seen[key] = index
    return list(class_names)


def name_key(name: str) -> str:
    """Returns what two spellings of one class name have in common.

    Args:
        name: underscores count as blanks; case and blanks around it do not count.

    Example:
        >>> name_key(" Hot_dog") == name_key("hot dog")
        True
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").casefold().split())


def readable(name: str) -> str:
    """Returns the name of a class as a prompt needs it: underscores become blanks.

    Args:
        name: as data call the class.
    """
    return name.replace("_", " ").strip()


def class_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns the prompts of all classes: those of the first class, then those of the second, …

    Args:
        class_names: one per class; braces and percent signs in them are ordinary text.
        templates: prompts with `{}` in place of the class name.

    Example:
        >>> class_prompts(["cat", "dog"], ["a {}", "the {}"])
        ['a cat', 'the cat', 'a dog', 'the dog']
    """
    return [template.replace("{}", name) for name in class_names for template in templates]
