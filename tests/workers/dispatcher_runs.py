"""A dispatcher on an event loop of a test's own, with slots and askers that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from peftsearch.training.segment import ProbeResult, Segment, TrialPlan
from peftsearch.workers.dispatcher import Dispatcher, Order


def segment(number: int, to_step: int = 1, domain: str = "d", method: str = "lora") -> Segment:
    return Segment(TrialPlan(number, "m", domain, method, {}, 0), to_step)


def outcome(text: str) -> Any:
    return ProbeResult(details={"text": text})


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Play a scenario; one in which somebody waits for ever fails."""

    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 20)

    asyncio.run(bounded())


async def started(dispatcher: Dispatcher, *slots: int) -> None:
    """Slots join and are warm."""
    for slot in slots:
        await dispatcher.join(slot, f"life-{slot}")
        await dispatcher.warm(slot, f"life-{slot}", {})


async def queued(dispatcher: Dispatcher, *works: Any) -> list[asyncio.Task[Any]]:
    """Work is asked for, in this order; returns those who wait for the answers."""
    tasks = [asyncio.create_task(dispatcher.submit(work)) for work in works]
    await asyncio.sleep(0)
    return tasks


async def take(dispatcher: Dispatcher, slot: int) -> Order:
    """A slot takes work, which there must be."""
    order = await dispatcher.take(slot, f"life-{slot}")
    assert order.lease is not None
    return order


async def held_by_the_first_of_two(dispatcher: Dispatcher) -> None:
    """Of two slots, the first has done trial 1's first segment, and holds its state."""
    await started(dispatcher, 0, 1)
    (asked,) = await queued(dispatcher, segment(1))
    order = await take(dispatcher, 0)
    await dispatcher.finish(0, "life-0", order.lease or 0, outcome("first"))
    await asked
