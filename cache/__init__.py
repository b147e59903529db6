# SPDX-License-Identifier: Apache-2.0
"""Images, their sources, and the page store: what is resident, how it is loaded and evicted."""

from cowshed.cache.errors import (
    CapacityError,
    CowshedError,
    InvariantError,
    PeerError,
    SourceError,
    UsageError,
)
from cowshed.cache.fetches import Fetch, FetchCounters, FetchQueue
from cowshed.cache.images import ExtentState, Image, ImageCounters, ImageStatistics, InheritedImage
from cowshed.cache.remote_source import RemoteSource
from cowshed.cache.sources import FileSource, SourceAtPath, SourceIdentity
from cowshed.cache.store import (
    HUGE_EXTENT_BYTES,
    PageStore,
    SampleEnd,
    StoreCounters,
    StoreEvent,
    probe_huge_frames,
)

__all__ = [
    "HUGE_EXTENT_BYTES",
    "CapacityError",
    "CowshedError",
    "ExtentState",
    "Fetch",
    "FetchCounters",
    "FetchQueue",
    "FileSource",
    "Image",
    "ImageCounters",
    "ImageStatistics",
    "InheritedImage",
    "InvariantError",
    "PageStore",
    "PeerError",
    "RemoteSource",
    "SampleEnd",
    "SourceAtPath",
    "SourceError",
    "SourceIdentity",
    "StoreCounters",
    "StoreEvent",
    "UsageError",
    "probe_huge_frames",
]
