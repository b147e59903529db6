# SPDX-License-Identifier: Apache-2.0
"""What Prometheus scrapes: the catalogue, the counters, the exporter."""
