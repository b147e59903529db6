# SPDX-License-Identifier: Apache-2.0
"""The asyncio face: many tasks over one connection, by every transport."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from places import SCHEMES, Place, make_place

from cowshed.cache.errors import PeerError, UsageError
from cowshed.transport.channels import aio, channel
from cowshed.transport.channels.aio import AsyncChannel

SECONDS = 60.0


@pytest.fixture(scope="module", params=SCHEMES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="cs-") as folder:
        yield make_place(request.param, Path(folder))


def talk(place: Place, test: Callable[[AsyncChannel, AsyncChannel], Awaitable[None]]) -> None:
    async def both() -> None:
        async with aio.listen(place.listen_uri, ["f"]) as listener:
            theirs, ours = await asyncio.gather(
                listener.accept(SECONDS), aio.connect(place.connect_uri(listener.uri), ["f"])
            )
            async with ours, theirs:
                assert ours.channel.features == theirs.channel.features == {"f"}
                await test(ours, theirs)

    asyncio.run(both())


async def serve(peer: AsyncChannel, nr_requests: int) -> None:
    asked = [await peer.recv(SECONDS) for _ in range(nr_requests)]
    for one in reversed(asked):
        one.reply({"n": one.body["n"] + 1})


def test_many_tasks_ask_and_are_answered_in_any_order(place: Place) -> None:
    async def test(ours: AsyncChannel, theirs: AsyncChannel) -> None:
        serving = asyncio.create_task(serve(theirs, 40))
        answers = await asyncio.gather(*(ours.request("add", SECONDS, n=n) for n in range(40)))
        assert [one["n"] for one in answers] == list(range(1, 41))
        await serving

    talk(place, test)


def test_large_messages_wait_for_room(place: Place) -> None:
    async def test(ours: AsyncChannel, theirs: AsyncChannel) -> None:
        async def answer() -> None:
            for _ in range(4):
                (await theirs.recv(SECONDS)).reply({"text": "x" * (3 << 20)})

        serving = asyncio.create_task(answer())
        for _ in range(4):
            assert len((await ours.request("get", SECONDS))["text"]) == 3 << 20
        await serving

    talk(place, test)


def test_a_refusal_and_a_deadline_end_one_request_only(place: Place) -> None:
    async def test(ours: AsyncChannel, theirs: AsyncChannel) -> None:
        late = ours.send("late")
        refused = ours.send("refused")
        asked = [await theirs.recv(SECONDS) for _ in range(2)]
        asked[1].refuse(UsageError("no"))
        with pytest.raises(UsageError, match="no"):
            await ours.result(refused, SECONDS)
        with pytest.raises(PeerError, match=r"in 0\.01 s"):
            await ours.result(late, 0.01)
        asked[0].reply({"n": 1})
        assert (await ours.result(late, SECONDS))["n"] == 1

    talk(place, test)


def test_all_who_wait_are_told_of_the_end(place: Place) -> None:
    async def test(ours: AsyncChannel, theirs: AsyncChannel) -> None:
        waiting = [asyncio.create_task(ours.request("x", SECONDS)) for _ in range(5)]
        for _ in waiting:
            await theirs.recv(SECONDS)
        theirs.close()
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, PeerError)
        assert ours.channel.state is channel.Liveness.GONE
        with pytest.raises(PeerError, match="over"):
            ours.send("y")

    talk(place, test)


def test_nobody_and_silence_have_deadlines(place: Place) -> None:
    async def nobody() -> None:
        async with aio.listen(place.listen_uri) as listener:
            with pytest.raises(PeerError, match="nobody connected"):
                await listener.accept(0.02)

    asyncio.run(nobody())
