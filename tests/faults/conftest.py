# SPDX-License-Identifier: Apache-2.0
"""The stage: a backend in the test's own process."""

from stage import make_stage, stage

__all__ = ["make_stage", "stage"]
