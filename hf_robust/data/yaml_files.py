# SPDX-License-Identifier: Apache-2.0
"""YAML files of settings, in which nothing is named twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError


class _Loader(yaml.SafeLoader):
    """As the safe loader, which keeps the last of two settings of one name without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [name for index, name in enumerate(names) if name in names[:index]]
        if repeated:
            raise yaml.YAMLError(f"{repeated[0]!r} stands there twice")
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Any:
    """Reads a YAML file.

    Args:
        file: where it is.

    Raises:
        ConfigError: it cannot be read, is no YAML, or names something twice.

    Example:
        >>> read_yaml(Path("examples/configs/demo.yaml"))["method"]
        'saft'
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError("file cannot be read", where=str(file), got=error.strerror) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("file is no YAML", where=str(file), got=" ".join(str(error).split())) from error
