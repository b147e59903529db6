# SPDX-License-Identifier: Apache-2.0
"""Grafana dashboards as code; `python -m dashboards.build` writes generated/*.json from it."""
