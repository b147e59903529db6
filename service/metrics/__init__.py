# SPDX-License-Identifier: Apache-2.0
"""The metrics for Prometheus: catalog, counters, exporter."""
