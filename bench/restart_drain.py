# SPDX-License-Identifier: Apache-2.0
"""Rows of the case restart: drains between two backends, in alternate directions, under guests."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cases import MIN_ROUNDS, Bench, Row
from kept import KeptBackend
from pipe_peer import PipePeer
from stats import Aim, compare
from steady import Terms
from steady_crowd import SteadyCrowd

__all__ = ["drain_rows"]

MIB = 1 << 20
PAGES_PER_MIB = 256
FREEZE_MS = 20.0
HIT_SHARE = 0.99
PIPE_SHARE = 0.6
SPAN_SECONDS = 1.0


@dataclass(frozen=True)
class _Way:
    """The transport of guests and of handoffs."""

    name: str
    guests: str
    uri: Callable[[KeptBackend], str]
    pace_ms: float


_WAYS = (
    _Way("unix", "mapped guests", lambda backend: backend.uri, 1.0),
    _Way("tcp", "guests over tcp", KeptBackend.tcp_uri, 4.0),
)


@dataclass
class _Found:
    """Samples of the rounds of one transport."""

    stall_ms: list[float] = field(default_factory=list)
    quiet_ms: list[float] = field(default_factory=list)
    whole_ms: list[float] = field(default_factory=list)
    frozen_ms: list[float] = field(default_factory=list)
    source_hits: list[float] = field(default_factory=list)
    target_hits: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)


def drain_rows(bench: Bench, image: Path, nr_guests: int) -> list[Row]:
    """Measure drains of guests that write, and handoffs of many private pages against a pipe."""
    size_bytes = image.stat().st_size
    rows = []
    with ExitStack() as stack:
        bench.say("two backends with their keepers")
        more = ("--listen=tcp://127.0.0.1:0", "--accept-handoff")
        pair = [
            stack.enter_context(KeptBackend(image, size_bytes + 64 * MIB, *more)) for _ in range(2)
        ]
        ways = _WAYS[:1] if bench.rounds == 1 else _WAYS
        for way in ways:
            rows += _under_writers(bench, pair, way, nr_guests)
        for way in ways:
            rows.append(_throughput(bench, pair, way, nr_guests))
    return rows


def _in_rounds(bench: Bench, what: str, seconds: float, once: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    for number in range(bench.rounds):
        if number >= MIN_ROUNDS and time.monotonic() > deadline:
            break
        bench.say(f"{what}, round {number + 1}")
        once()


def _under_writers(bench: Bench, pair: list[KeptBackend], way: _Way, nr_guests: int) -> list[Row]:
    """Drain guests that write to the same pages repeatedly, and read at random."""
    from case_restart import served_row

    found = _Found()
    terms = Terms(
        uri=way.uri(pair[0]),
        image="disk",
        name=f"drained-{way.name}",
        nr_guests=nr_guests,
        pace_ms=way.pace_ms,
        write_every=2,
        hot_pages=64,
        private_pages=PAGES_PER_MIB,
    )
    with SteadyCrowd(bench.build_dir, terms) as crowd:
        _in_rounds(
            bench,
            f"drains, {way.guests}",
            2 * bench.row_seconds,
            lambda: _drain_once(pair, way, crowd, found),
        )
        served = served_row(f"right answers, {way.guests}", [crowd])
    nr = len(found.stall_ms)
    freeze = {"drain": found.stall_ms, "nothing": found.quiet_ms, "20 ms": [FREEZE_MS] * nr}
    hits = {"target": found.target_hits, "source": found.source_hits}
    where = {
        "ms_whole_drain": median(found.whole_ms),
        "ms_frozen_at_source": median(found.frozen_ms),
        "rounds_of_pages": median(found.rounds),
        "mib_private": nr_guests * terms.private_pages / PAGES_PER_MIB,
    }
    of, to = hits
    return [
        Row(
            f"drain, {nr_guests} {way.guests}",
            "ms",
            freeze,
            [compare(freeze, "drain", "20 ms", Aim(1.0)), compare(freeze, "drain", "nothing")],
            {"drain": where},
        ),
        Row(
            f"hits in a second, {way.guests}",
            "share",
            hits,
            [compare(hits, of, to, Aim(HIT_SHARE, at_least=True))],
        ),
        served,
    ]


def _drain(pair: list[KeptBackend], way: _Way) -> dict[str, Any]:
    """Drain the first of the pair to the second, and swap them; return the report."""
    source, target = pair
    report = source.request("drain", to=way.uri(target))["drain"]
    pair.reverse()
    return dict(report)


def _drain_once(pair: list[KeptBackend], way: _Way, crowd: SteadyCrowd, found: _Found) -> None:
    pair[0].request("warm", image="disk")
    pair[1].request("evict", image="disk")
    crowd.wait_served()
    quiet = crowd.begin_span()
    found.source_hits.append(_hits_of_a_second(pair[0]))
    span = crowd.begin_span()
    began = time.monotonic()
    report = _drain(pair, way)
    found.whole_ms.append((time.monotonic() - began) * 1e3)
    found.target_hits.append(_hits_of_a_second(pair[0]))
    crowd.wait_served()
    crowd.begin_span()
    crowd.wait_served()
    found.quiet_ms.append(max(crowd.stalls_ms(quiet)))
    found.stall_ms.append(max(crowd.stalls_ms(span)))
    found.frozen_ms.append(report["frozen_seconds"] * 1e3)
    found.rounds.append(report["round"])


def _hits_of_a_second(backend: KeptBackend) -> float:
    """Return the share of accesses in the next second that found their extent resident."""
    before = _counts(backend)
    time.sleep(SPAN_SECONDS)
    hits, misses = (now - then for now, then in zip(_counts(backend), before, strict=True))
    return hits / max(1, hits + misses)


def _counts(backend: KeptBackend) -> list[int]:
    """Return hits and misses of all guests."""
    guests = backend.status()["guests"]
    return [sum(guest[key] for guest in guests) for key in ("hits", "misses")]


def _throughput(bench: Bench, pair: list[KeptBackend], way: _Way, nr_guests: int) -> Row:
    """Time whole drains of idle guests, and the same number of bytes through nc."""
    mib_each = 1 if bench.quick else 16
    terms = Terms(
        uri=way.uri(pair[0]),
        image="disk",
        name=f"heavy-{way.name}",
        nr_guests=nr_guests,
        pace_ms=50.0,
        write_every=0,
        private_pages=mib_each * PAGES_PER_MIB,
    )
    mib = mib_each * nr_guests
    handoff, pipe, whole = f"handoff by {way.name}", f"nc by {way.name}", []
    samples: dict[str, list[float]] = {handoff: [], pipe: []}
    with SteadyCrowd(bench.build_dir, terms) as crowd, PipePeer(way.name, mib * MIB) as peer:

        def once() -> None:
            for side in bench.rng.sample((handoff, pipe), 2):
                began = time.monotonic()
                if side == handoff:
                    _drain(pair, way)
                else:
                    peer.transfer()
                seconds = time.monotonic() - began
                samples[side].append(mib / seconds)
                if side == handoff:
                    whole.append(seconds * 1e3)
                    crowd.wait_served()

        _in_rounds(bench, f"handoffs of {mib} MiB by {way.name}", bench.row_seconds, once)
    return Row(
        f"{mib} MiB private, {way.guests}",
        "MiB/s",
        samples,
        [compare(samples, handoff, pipe, None if bench.quick else Aim(PIPE_SHARE, at_least=True))],
        {handoff: {"ms_whole_drain": median(whole)}},
    )
