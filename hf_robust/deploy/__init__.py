# SPDX-License-Identifier: Apache-2.0
"""Trained models where this package is not: as plain modules, and as ONNX files."""
