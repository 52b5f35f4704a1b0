# SPDX-License-Identifier: Apache-2.0
"""Model cards, and pushing them with their models to the Hub."""
