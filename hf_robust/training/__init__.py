# SPDX-License-Identifier: Apache-2.0
"""The trainer, its arguments and its checkpoints."""
