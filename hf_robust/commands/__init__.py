# SPDX-License-Identifier: Apache-2.0
"""What `hf-robust` does: a module for each command.

Each has `main`; `TYPES`, the dataclasses whose instances `main` takes, the fields of which are the command's settings;
and `EXAMPLE`, a command line for its help.
"""
