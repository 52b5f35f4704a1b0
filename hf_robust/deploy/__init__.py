# SPDX-License-Identifier: Apache-2.0
"""Trained models where this package is not: as plain modules, and as ONNX files."""

from pkgutil import iter_modules

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, [module.name for module in iter_modules(__path__)])
