"""The dispatcher's promises, on its own event loop: nothing lost, nothing done twice, nobody waits for the dead."""

from __future__ import annotations

import asyncio

import pytest
from dispatcher_runs import held_by_the_first_of_two, outcome, queued, run, segment, started, take

from peftsearch.training.segment import Failure
from peftsearch.workers.dispatcher import STILLBIRTHS, Dispatcher, Order
from peftsearch.workers.packing import Sizes


def test_an_answer_reaches_whoever_asked() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await started(dispatcher, 0)
        asked = await queued(dispatcher, *(segment(number) for number in range(3)))
        for number in range(3):
            order = await take(dispatcher, 0)
            assert order.work == segment(number)
            await dispatcher.finish(0, "life-0", order.lease or 0, outcome(str(number)))
        assert [(await task)[0].details["text"] for task in asked] == ["0", "1", "2"]

    run(scenario)


def test_a_waiting_slot_is_woken_by_new_work() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await started(dispatcher, 0)
        waiting = asyncio.create_task(dispatcher.take(0, "life-0"))
        await asyncio.sleep(0.01)
        task = asyncio.create_task(dispatcher.submit(segment(1)))
        assert (await asyncio.wait_for(waiting, 1)).work == segment(1)
        task.cancel()

    run(scenario)


def test_work_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await started(dispatcher, 0)
        first, second = await queued(dispatcher, segment(1), segment(2))
        first.cancel()
        await asyncio.sleep(0.01)
        assert (await dispatcher.status())["queued"] == 1
        assert (await take(dispatcher, 0)).work == segment(2)
        second.cancel()

    run(scenario)


def test_leased_work_of_a_dead_slot_is_handed_out_again_and_first() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await started(dispatcher, 0)
        first, second = await queued(dispatcher, segment(1), segment(2))
        lost = await take(dispatcher, 0)
        await dispatcher.join(0, "second life")
        order = await dispatcher.take(0, "second life")
        assert order.work == lost.work == segment(1)
        # The dead slot's late answer is not taken for the new lease's.
        await dispatcher.finish(0, "life-0", lost.lease or 0, outcome("from the dead"))
        await dispatcher.finish(0, "second life", order.lease or 0, outcome("from the living"))
        answer, attempts = await first
        assert answer.details["text"] == "from the living"
        assert attempts == 1
        second.cancel()

    run(scenario)


def test_work_that_keeps_breaking_slots_fails_with_the_last_error() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=2)
        (task,) = await queued(dispatcher, segment(1))
        for life in range(3):
            await dispatcher.join(0, f"life {life}")
            order = await dispatcher.take(0, f"life {life}")
            await dispatcher.crashed(0, f"life {life}", order.lease or 0, "OSError: no space left")
        await dispatcher.join(0, "last life")
        answer, attempts = await task
        assert answer == Failure("its worker died 3 times over it: OSError: no space left")
        assert attempts == 3

    run(scenario)


def test_a_silent_slot_loses_its_lease_and_another_takes_over() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, lease_seconds=0.2)
        await started(dispatcher, 0, 1)
        (task,) = await queued(dispatcher, segment(1))
        lost = await take(dispatcher, 0)
        order = await asyncio.wait_for(take(dispatcher, 1), 5)
        assert order.work == lost.work
        await dispatcher.finish(0, "life-0", lost.lease or 0, outcome("too late"))
        await dispatcher.finish(1, "life-1", order.lease or 0, outcome("in time"))
        assert (await task)[0].details["text"] == "in time"
        # The silent slot was only slow: it may go on taking work.
        (again,) = await queued(dispatcher, segment(2))
        assert (await take(dispatcher, 0)).work == segment(2)
        again.cancel()

    run(scenario)


def test_a_slot_that_beats_keeps_its_lease() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, lease_seconds=0.2)
        await started(dispatcher, 0)
        (task,) = await queued(dispatcher, segment(1))
        order = await take(dispatcher, 0)
        for _ in range(10):
            await asyncio.sleep(0.05)
            await dispatcher.beat(0, "life-0")
        await dispatcher.finish(0, "life-0", order.lease or 0, outcome("slow"))
        assert (await task)[1] == 0

    run(scenario)


def test_a_trial_goes_back_to_the_free_slot_that_holds_its_state() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await held_by_the_first_of_two(dispatcher)
        tasks = await queued(dispatcher, segment(1, 2), segment(2))
        assert (await take(dispatcher, 1)).work == segment(2)
        assert (await take(dispatcher, 0)).work == segment(1, 2)
        for task in tasks:
            task.cancel()

    run(scenario)


def test_slots_hear_which_trials_have_ended() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await started(dispatcher, 0)
        await dispatcher.end("00007")
        (task,) = await queued(dispatcher, segment(8))
        assert (await take(dispatcher, 0)).ended == ("00007",)
        task.cancel()

    run(scenario)


def test_an_unusable_slot_is_reported_and_its_work_waits_for_another() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        (task,) = await queued(dispatcher, segment(1))
        await dispatcher.join(0, "life-0")
        await dispatcher.unusable(0, "life-0", "cannot load the model")
        assert (await dispatcher.status())["unusable"] == {0: "cannot load the model"}
        assert not task.done()
        await started(dispatcher, 1)
        assert (await take(dispatcher, 1)).work == segment(1)
        task.cancel()

    run(scenario)


def test_a_slot_whose_workers_die_while_they_load_the_model_is_given_up() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await started(dispatcher, 0)
        # Warm ones that die are no reason, however many they are.
        for life in range(2 * STILLBIRTHS):
            assert await dispatcher.join(0, f"warm {life}")
            await dispatcher.warm(0, f"warm {life}", {"host": "here"})
        went_on = [await dispatcher.join(0, f"cold {life}") for life in range(STILLBIRTHS + 1)]
        assert went_on == [True] * STILLBIRTHS + [False]
        reason = (await dispatcher.status())["unusable"][0]
        assert reason.startswith("slot 0: its worker died 5 times while it loaded model and data")
        # Started again (a machine has joined), it has as many tries.
        assert await dispatcher.join(0, "another")
        assert not (await dispatcher.status())["unusable"]

    run(scenario)


def test_what_was_leased_in_an_answer_that_got_lost_is_handed_out_again() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await started(dispatcher, 0)
        (asked,) = await queued(dispatcher, segment(1))
        lost = await take(dispatcher, 0)
        # Ray repeats the call.
        order = await take(dispatcher, 0)
        assert order.work == segment(1)
        assert order.lease != lost.lease
        await dispatcher.finish(0, "life-0", order.lease or 0, outcome("once"))
        answer, attempts = await asked
        assert (answer.details["text"], attempts) == ("once", 0)

    run(scenario)


def test_a_slot_that_vanished_while_idle_does_not_keep_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await held_by_the_first_of_two(dispatcher)
        (task,) = await queued(dispatcher, segment(1, 2))
        monkeypatch.setattr("peftsearch.workers.dispatcher._POLL_SECONDS", 0.1)
        await asyncio.sleep(0.4)
        assert (await take(dispatcher, 1)).work == segment(1, 2)
        task.cancel()

    run(scenario)


def test_slots_are_told_to_stop() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await started(dispatcher, 0)
        waiting = asyncio.create_task(dispatcher.take(0, "life-0"))
        await asyncio.sleep(0.01)
        await dispatcher.stop()
        assert (await asyncio.wait_for(waiting, 1)).stop

    run(scenario)


def test_a_slot_that_trains_hears_of_the_stop_and_what_it_hands_back_is_handed_to_nobody() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=0)
        await started(dispatcher, 0, 1)
        (asked,) = await queued(dispatcher, segment(0))
        order = await take(dispatcher, 0)
        assert (await dispatcher.status())["training"] == [0]
        assert await dispatcher.beat(0, "life-0") == Order()
        await dispatcher.stop()
        assert await dispatcher.beat(0, "life-0") == Order(stop=True)
        await dispatcher.hand_back(0, "life-0", order.lease or 0)
        assert (await dispatcher.status())["training"] == []
        assert await dispatcher.take(1, "life-1") == Order(stop=True)
        assert not asked.done()
        asked.cancel()

    run(scenario)


@pytest.mark.parametrize("life", ["life-0", "unknown"])
def test_a_replaced_worker_group_is_told_to_leave(life: str) -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await started(dispatcher, 0)
        await dispatcher.join(0, "second life")
        assert (await dispatcher.take(0, life)).stop

    run(scenario)


def test_a_dispatcher_that_was_started_anew_knows_again_what_its_slots_hold_and_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls are made again to it: trials queue their segments, slots join with what they are at."""
    monkeypatch.setattr("peftsearch.workers.dispatcher._SETTLE_SECONDS", 0.3)

    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, restarted=True)
        tasks = [asyncio.create_task(dispatcher.submit(segment(number))) for number in range(3)]
        assert (await dispatcher.take(0, "life-0")).rejoin
        await dispatcher.join(0, "life-0", info={}, holds=["00001"])
        # What a slot holds is handed to it at once, the rest when all slots had time to say what they are at.
        assert (await take(dispatcher, 0)).work == segment(1)
        assert await dispatcher.beat(1, "life-1") == Order(rejoin=True)
        await dispatcher.join(1, "life-1", info={}, doing=[segment(0)])
        assert await dispatcher.beat(1, "life-1") == Order()
        await dispatcher.join(2, "life-2", info={})
        await dispatcher.join(2, "life-2", info={})
        waiting = asyncio.create_task(take(dispatcher, 2))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert (await asyncio.wait_for(waiting, 2)).work == segment(2)
        # The lease was given by the one that died; the answer counts.
        await dispatcher.finish(1, "life-1", 17, outcome("0"), segment(0))
        assert (await tasks[0])[0].details["text"] == "0"  # type: ignore[union-attr]
        for task in tasks[1:]:
            task.cancel()

    run(scenario)


def test_a_lease_of_a_dispatcher_that_died_is_none_of_the_next_ones() -> None:
    async def scenario() -> None:
        first = Dispatcher(max_retries=1, sizes=Sizes(lambda _: "all", 4))
        await started(first, 0)
        (asked,) = await queued(first, segment(0))
        old = await take(first, 0)
        asked.cancel()

        dispatcher = Dispatcher(max_retries=1, restarted=True, sizes=Sizes(lambda _: "all", 4))
        await dispatcher.join(0, "life-0", info={}, holds=["00001"], doing=[old.work])
        tasks = await queued(dispatcher, segment(0), segment(1))
        assert (await dispatcher.take(0, "life-0", at_work=True)).work == segment(1)
        await dispatcher.finish(0, "life-0", old.lease, outcome("0"), old.work)
        assert (await tasks[0])[0].details["text"] == "0"  # type: ignore[union-attr]
        assert not tasks[1].done()
        tasks[1].cancel()

    run(scenario)


def test_an_answer_that_comes_before_the_question_is_repeated_is_kept() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, restarted=True)
        await dispatcher.join(0, "life-0", info={}, doing=[segment(0)])
        await dispatcher.finish(0, "life-0", 17, outcome("0"), segment(0))
        assert (await dispatcher.submit(segment(0)))[0].details["text"] == "0"  # type: ignore[union-attr]

    run(scenario)


def test_what_a_slot_is_at_is_handed_out_again_when_it_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftsearch.workers.dispatcher._SETTLE_SECONDS", 0.0)

    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1, restarted=True)
        task = asyncio.create_task(dispatcher.submit(segment(0)))
        await dispatcher.join(0, "life-0", info={}, doing=[segment(0)])
        await dispatcher.join(0, "second life")
        order = await dispatcher.take(0, "second life")
        assert order.work == segment(0)
        task.cancel()

    run(scenario)


def test_lost_machines_and_slots_are_no_trials_fault() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=0)
        (task,) = await queued(dispatcher, segment(1))
        await dispatcher.join(0, "life-0")
        await dispatcher.warm(0, "life-0", {"nodes": ["here", "there"]})
        await take(dispatcher, 0)
        await dispatcher.nodes_left(["there"])
        assert (await dispatcher.status())["warm"] == []
        await dispatcher.join(0, "second life")
        order = await dispatcher.take(0, "second life")
        assert order.work == segment(1)
        await dispatcher.slot_ended(0)
        await dispatcher.join(1, "life-1")
        order = await take(dispatcher, 1)
        await dispatcher.finish(1, "life-1", order.lease or 0, outcome("done"))
        assert (await task)[1] == 0

    run(scenario)


def test_a_slot_forgets_a_trial_that_goes_on_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would train the steps again that the other slot has done since."""
    monkeypatch.setattr("peftsearch.workers.dispatcher._POLL_SECONDS", 0.05)

    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=1)
        await held_by_the_first_of_two(dispatcher)
        await asyncio.sleep(0.2)
        (task,) = await queued(dispatcher, segment(1, 2))
        assert (await take(dispatcher, 1)).work == segment(1, 2)
        assert (await dispatcher.take(0, "life-0")).ended == ("00001",)
        task.cancel()

    run(scenario)


def test_work_that_a_leaving_slot_hands_back_goes_to_another_one_and_counts_as_no_retry() -> None:
    async def scenario() -> None:
        dispatcher = Dispatcher(max_retries=0)
        await started(dispatcher, 0, 1)
        (asked,) = await queued(dispatcher, segment(0))
        order = await take(dispatcher, 0)
        await dispatcher.hand_back(0, "life-0", order.lease or 0)
        again = await take(dispatcher, 1)
        assert again.work == segment(0)
        await dispatcher.finish(1, "life-1", again.lease or 0, outcome("done"))
        assert await asked == (outcome("done"), 0)

    run(scenario)
