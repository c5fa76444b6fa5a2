"""Slots that train several trials at once: what they are handed, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Any

import pytest
from dispatcher_runs import outcome, queued, run, segment, started

from peftsearch.training.segment import Failure, Probe, Segment
from peftsearch.workers.dispatcher import Dispatcher, Order
from peftsearch.workers.packing import PATIENCE_SECONDS, Others, Sizes, Waiting, choose


def key(work: Any) -> Hashable | None:
    return work.trial.domain if isinstance(work, Segment) and work.trial.method != "full" else None


def given(order: Order) -> list[Any]:
    return [] if order.lease is None else [order.work, *(work for _, work in order.beside)]


def leases(order: Order) -> list[int]:
    return [] if order.lease is None else [order.lease, *(lease for lease, _ in order.beside)]


def waiting(*kinds: Hashable | None, held: tuple[int, ...] = (), seconds: float = 0.0) -> list[Waiting]:
    return [Waiting(number, kind, number in held, seconds) for number, kind in enumerate(kinds)]


def chosen(items: list[Waiting]) -> list[int]:
    return [item.job for item in items]


SIZES = Sizes(key, 4)


@pytest.mark.parametrize(
    ("kinds", "held", "expected"),
    [
        (["a", "b", "a", "a"], (), [0, 2, 3]),
        (["a", "b", "b", "a", "b"], (), [1, 2, 4]),
        (["a"] * 6, (), [0, 1, 2, 3]),
        (["a"] * 6, (5, 3), [3, 5, 0, 1]),
        ([None, "a", "a"], (), [1, 2]),
        ([None, None], (), [0]),
        (["a", "b"], (1,), [1]),
        ([], (), []),
    ],
)
def test_a_free_slot_takes_most_of_one_kind(
    kinds: list[Hashable | None], held: tuple[int, ...], expected: list[int]
) -> None:
    assert chosen(choose(waiting(*kinds, held=held), None, 0, SIZES, Others())) == expected


def test_a_slot_at_work_takes_more_of_the_same_until_others_have_waited_for_long() -> None:
    queue = waiting("b", "a", "a", "a")
    assert chosen(choose(queue, "a", 2, SIZES, Others())) == [1, 2]
    assert choose(queue, "a", 4, SIZES, Others()) == []
    assert choose(queue, None, 1, SIZES, Others()) == []
    long = [Waiting(9, "b", False, PATIENCE_SECONDS + 1), *queue]
    assert choose(long, "a", 2, SIZES, Others()) == []
    assert chosen(choose(long, None, 0, SIZES, Others())) == [9, 0]


@pytest.mark.parametrize(
    ("count", "in_hand", "others", "expected"),
    [
        # Three free slots share six: two each.
        (6, 0, Others(idle=2), 2),
        (5, 0, Others(idle=2), 2),
        (1, 0, Others(idle=2), 1),
        # One has four already; what is new belongs to the free one.
        (2, 4, Others(idle=1), 0),
        (2, 0, Others(at_work=(("a", 4),)), 2),
        # A trial of the fuller slot comes back: the emptier one takes it over.
        (1, 3, Others(at_work=(("a", 0),)), 0),
        (1, 0, Others(at_work=(("a", 3),)), 1),
        # Slots with other work do not count.
        (3, 1, Others(at_work=(("b", 1), (None, 1))), 3),
    ],
)
def test_what_waits_is_spread_over_the_slots(count: int, in_hand: int, others: Others, expected: int) -> None:
    found = choose(waiting(*["a"] * count), "a" if in_hand else None, in_hand, SIZES, others)
    assert len(found) == expected


def test_what_is_to_be_measured_and_what_cannot_be_packed_is_handed_out_by_itself() -> None:
    auto = Sizes(key, "auto")
    assert auto.of("a") == 0
    assert auto.of(None) == 1
    assert auto.largest() == 1
    assert len(choose(waiting("a", "a"), None, 0, auto, Others())) == 1
    assert choose(waiting("a"), "a", 1, auto, Others()) == []
    auto.found["a"] = 8
    assert auto.largest() == 8
    assert len(choose(waiting("a", "a"), None, 0, auto, Others())) == 2
    assert Sizes().of("a") == 1


def test_leases_are_each_trials_own() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, sizes=Sizes(key, 4))
        await started(dispatcher, 0)
        tasks = await queued(dispatcher, *(segment(number) for number in range(3)))
        order = await dispatcher.take(0, "life-0")
        assert given(order) == [segment(0), segment(1), segment(2)]
        assert order.at_once == 4
        first, second, third = leases(order)
        await dispatcher.finish(0, "life-0", second, outcome("second"), segment(1))
        assert (await tasks[1])[0].details["text"] == "second"
        # A new trial joins the two that are still in training.
        more = asyncio.create_task(dispatcher.take(0, "life-0", at_work=True))
        late = await queued(dispatcher, segment(9))
        assert given(await asyncio.wait_for(more, 1)) == [segment(9)]
        await dispatcher.finish(0, "life-0", first, outcome("first"), segment(0))
        await dispatcher.finish(0, "life-0", third, outcome("third"), segment(2))
        assert [(await task)[0].details["text"] for task in (tasks[0], tasks[2])] == ["first", "third"]
        late[0].cancel()

    run(scenario)


def test_room_that_is_made_is_filled_at_once() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, sizes=Sizes(key, 2))
        await started(dispatcher, 0)
        tasks = await queued(dispatcher, *(segment(number) for number in range(3)))
        order = await dispatcher.take(0, "life-0")
        more = asyncio.create_task(dispatcher.take(0, "life-0", at_work=True))
        await asyncio.sleep(0.01)
        assert not more.done()
        await dispatcher.finish(0, "life-0", leases(order)[0], outcome("done"), segment(0))
        assert given(await asyncio.wait_for(more, 1)) == [segment(2)]
        for task in tasks:
            task.cancel()

    run(scenario)


def test_a_slot_that_breaks_over_several_gets_each_by_itself() -> None:
    """Nobody knows whose fault it was: the one that breaks slots by itself fails, and the others are trained."""

    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=2, sizes=Sizes(key, 4))
        await started(dispatcher, 0)
        tasks = await queued(dispatcher, *(segment(number) for number in range(3)))
        assert len(given(await dispatcher.take(0, "life-0"))) == 3
        life = 0
        while not all(task.done() for task in tasks):
            life += 1
            await dispatcher.join(0, f"life {life}")
            while (order := await dispatcher.take(0, f"life {life}")).lease is not None:
                assert len(given(order)) == 1
                if order.work == segment(1):
                    break
                await dispatcher.finish(0, f"life {life}", order.lease, outcome("done"), order.work)
                if sum(task.done() for task in tasks) == 3:
                    break
        answers = [await task for task in tasks]
        assert isinstance(answers[1][0], Failure)
        assert [answers[0][1], answers[2][1]] == [1, 1]
        assert life <= 3

    run(scenario)


def test_what_a_slot_has_no_room_for_is_queued_first_and_blames_nobody() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=0, sizes=Sizes(key, 4))
        await started(dispatcher, 0, 1)
        tasks = await queued(dispatcher, *(segment(number) for number in range(2)))
        async with asyncio.timeout(5):
            # Two free slots: one each. The second slot then leaves the first one's to it.
            first, second = await dispatcher.take(0, "life-0"), await dispatcher.take(1, "life-1")
            assert (given(first), given(second)) == ([segment(0)], [segment(1)])
            await dispatcher.fit(1, "life-1", "d", 1, "too many at once")
            await dispatcher.set_aside(1, "life-1", leases(second)[0])
            status = await dispatcher.status()
            assert status["notes"] == ["too many at once"]
            again = await dispatcher.take(1, "life-1")
            assert given(again) == [segment(1)]
            assert again.at_once == 1
            await dispatcher.finish(1, "life-1", leases(again)[0], outcome("done"), segment(1))
            assert (await tasks[1])[1] == 0
        tasks[0].cancel()

    run(scenario)


def test_work_that_cannot_be_packed_is_handed_out_by_itself_and_the_rest_together() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=0, sizes=Sizes(key, 4))
        await started(dispatcher, 0)
        tasks = await queued(dispatcher, *(segment(number) for number in range(3)))
        order = await dispatcher.take(0, "life-0")
        first, second, third = leases(order)
        await dispatcher.set_aside(0, "life-0", second, alone=True)
        await dispatcher.finish(0, "life-0", first, outcome("done"), segment(0))
        await dispatcher.finish(0, "life-0", third, outcome("done"), segment(2))
        tasks += await queued(dispatcher, segment(3), segment(4))
        order = await dispatcher.take(0, "life-0")
        assert (given(order), order.at_once) == ([segment(3), segment(4)], 4)
        for lease, work in zip(leases(order), given(order), strict=True):
            await dispatcher.finish(0, "life-0", lease, outcome("done"), work)
        order = await dispatcher.take(0, "life-0")
        assert (given(order), order.at_once) == ([segment(1)], 1)
        assert order.lease is not None
        await dispatcher.finish(0, "life-0", order.lease, outcome("done"), segment(1))
        assert (await tasks[1])[1] == 0

    run(scenario)


@pytest.mark.parametrize("first", ["noted", "measured"])
def test_the_smallest_size_that_any_slot_found_counts(first: str) -> None:
    async def scenario() -> None:
        sizes = Sizes(key, "auto")
        dispatcher = Dispatcher(max_retries=0, sizes=sizes)
        await started(dispatcher, 0)
        tasks = await queued(dispatcher, segment(0))
        order = await dispatcher.take(0, "life-0")
        for what in (first, "measured" if first == "noted" else "noted"):
            if what == "noted":
                await dispatcher.fit(0, "life-0", "d", 2, "no room")
            else:
                await dispatcher.measured(0, "life-0", leases(order)[0], 8)
        assert sizes.of("d") == 2
        tasks[0].cancel()

    run(scenario)


def test_a_slot_that_leaves_gives_everything_back_and_gets_nothing_more() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=0, sizes=Sizes(key, 4))
        await started(dispatcher, 0)
        tasks = await queued(dispatcher, *(segment(number) for number in range(2)))
        order = await dispatcher.take(0, "life-0")
        more = asyncio.create_task(dispatcher.take(0, "life-0", at_work=True))
        await asyncio.sleep(0.01)
        for lease in leases(order):
            await dispatcher.hand_back(0, "life-0", lease)
        assert (await asyncio.wait_for(more, 1)).stop
        await started(dispatcher, 1)
        assert {work.trial.number for work in given(await dispatcher.take(1, "life-1"))} == {0, 1}
        for task in tasks:
            task.cancel()

    run(scenario)


def test_a_dispatcher_that_does_not_know_what_a_slot_does_leaves_it_its_work() -> None:
    """It was started anew: the slot joins with what it does, and trial actors ask again for just that."""

    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, sizes=Sizes(key, 4))
        doing = [segment(0), segment(1)]
        await dispatcher.join(0, "life-0", info={}, doing=doing)
        tasks = await queued(dispatcher, *doing, segment(2), segment(3, domain="another"))
        # More of the same kind, and none of it twice.
        order = await dispatcher.take(0, "life-0", at_work=True)
        assert given(order) == [segment(2)]
        more = asyncio.create_task(dispatcher.take(0, "life-0", at_work=True))
        await asyncio.sleep(0.01)
        assert not more.done()
        for number, lease in ((0, 77), (1, 78), (2, leases(order)[0])):
            await dispatcher.finish(0, "life-0", lease, outcome(str(number)), segment(number))
            assert (await tasks[number])[0].details["text"] == str(number)
        assert given(await asyncio.wait_for(more, 1)) == [segment(3, domain="another")]
        tasks[3].cancel()

    run(scenario)


def test_what_is_being_trained_is_not_handed_out_a_second_time() -> None:
    """A trial actor that was lost asks again; its first question is still being worked on."""

    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, sizes=Sizes(key, 4))
        await started(dispatcher, 0)
        (lost,) = await queued(dispatcher, segment(0))
        order = await dispatcher.take(0, "life-0")
        lost.cancel()
        (again,) = await queued(dispatcher, segment(0))
        more = asyncio.create_task(dispatcher.take(0, "life-0", at_work=True))
        await asyncio.sleep(0.01)
        assert not more.done()
        await dispatcher.finish(0, "life-0", leases(order)[0], outcome("to nobody"), segment(0))
        order = await asyncio.wait_for(more, 1)
        assert given(order) == [segment(0)]
        await dispatcher.finish(0, "life-0", leases(order)[0], outcome("to the second"), segment(0))
        assert (await again)[0].details["text"] == "to the second"

    run(scenario)


def test_a_slot_whose_leases_ran_out_at_work_gets_nothing_that_is_done_alone() -> None:
    """It was silent for too long, and lives: what it trains was queued again, each piece by itself."""

    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, lease_seconds=0.2, sizes=Sizes(key, 4))
        await started(dispatcher, 0)
        tasks = await queued(dispatcher, segment(0), segment(1))
        order = await dispatcher.take(0, "life-0")
        while not (await dispatcher.status())["queued"]:
            await asyncio.sleep(0.01)
        more = asyncio.create_task(dispatcher.take(0, "life-0", at_work=True))
        await asyncio.sleep(0.05)
        assert not more.done()
        # Its answers count, as nobody else has the work.
        for number, lease in enumerate(leases(order)):
            await dispatcher.finish(0, "life-0", lease, outcome(str(number)), segment(number))
            assert (await tasks[number])[0].details["text"] == str(number)
        more.cancel()

    run(scenario)


def test_a_probe_is_done_by_itself() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, sizes=Sizes(key, 4))
        await started(dispatcher, 0)
        tasks = await queued(dispatcher, Probe("m", "d"))
        order = await dispatcher.take(0, "life-0")
        assert (given(order), order.at_once) == ([Probe("m", "d")], 1)
        tasks[0].cancel()

    run(scenario)
