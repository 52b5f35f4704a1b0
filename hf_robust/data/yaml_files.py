# SPDX-License-Identifier: Apache-2.0
"""YAML files of settings, in which nothing is named twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .text_files import read_text

LIMIT, LEVELS = 2**20, 20  # bytes of a file, and how deep lists and mappings may lie in each other
DIGITS, TEXT = 100, yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG


class _Loader(yaml.SafeLoader):
    """As the safe loader, without what settings do not need and a hostile file could use.

    An alias is a few bytes that stand for a whole part of the file, so that a few lines can become gigabytes.
    """

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None:
            raise yaml.YAMLError("anchors and aliases (&name, *name) are not read; write it out")
        if event.tag is not None:
            raise yaml.YAMLError("tags (!name) are not read")
        self.levels += 1
        if self.levels > LEVELS:
            raise yaml.YAMLError(f"more than {LEVELS} lists and mappings lie in each other")
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag != TEXT and len(node.value) > DIGITS:  # 1:1:1:… would be computed with base 60 for minutes
            raise yaml.YAMLError(f"a number with {len(node.value)} digits")
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # the safe loader keeps the last of two settings of one name without a word
        mapping: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError("a list or mapping is no name of a setting")
            name = self.construct_object(key)
            if name in mapping:
                raise yaml.YAMLError(f"{name!r} stands there twice")
            mapping[name] = self.construct_object(value, deep=deep)
        return mapping


def read_yaml(file: Path) -> Any:
    """Reads a YAML file.

    Args:
        file: where it is.

    Raises:
        ConfigError: it cannot be read, is no YAML, is larger than 1 MiB, nested too deeply, names something twice, or
            has anchors, aliases or tags.
        UnsafeFileError: it is no regular file.

    Example:
        >>> read_yaml(Path("examples/configs/demo.yaml"))["method"]
        'saft'
    """
    return parse_yaml(read_text(file, LIMIT, ConfigError), str(file))


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML, with the same limits.

    Args:
        text: the YAML.
        where: the file, for the message.

    Raises:
        ConfigError: as for `read_yaml`.

    Example:
        >>> parse_yaml("method: saft", "my.yaml")
        {'method': 'saft'}
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: 2001-13-32, or a number out of range
        raise ConfigError(f"file is no YAML ({' '.join(str(error).split())})", where=where) from error
