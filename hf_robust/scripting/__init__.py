# SPDX-License-Identifier: Apache-2.0
"""What the scripts of `examples/` share: the command line, how errors and progress look, what is loaded and shown."""
