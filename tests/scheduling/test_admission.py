"""Slots, queue and turns, with work that waits until the test lets it go."""

import asyncio
import gc
import random
import threading
import weakref

import numpy as np
import pytest

from avex_serve.audio.waveform import resample
from avex_serve.errors import AudioError, ClientGoneError, DeadlineError, OverloadError
from avex_serve.scheduling import allowance
from avex_serve.scheduling.admission import LARGE_BYTES, Admission, HeldBytes, Ticket, admitted, hold_ticket
from avex_serve.scheduling.allowance import Deadline, Limits
from avex_serve.scheduling.stages import recorded

PATIENCE = 20  # seconds until a test that hangs fails


@pytest.fixture
def open_admission():
    """Make one, closed at the end."""
    made = []

    def make(slots=1, queue=0, **arguments):
        made.append(Admission(slots, queue, 2**20, Limits(), **arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Work:
    """Work that lasts until `end`."""

    def __init__(self):
        self.began, self.end = threading.Event(), threading.Event()

    def __call__(self):
        self.began.set()
        assert self.end.wait(PATIENCE)
        return "done"


def start(admission, work, deadline=None):
    return asyncio.create_task(admission.run(work, deadline or Deadline()))


async def seen(event):
    assert await asyncio.to_thread(event.wait, PATIENCE)


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def run(test):
    async def bounded():
        async with asyncio.timeout(PATIENCE):
            await test

    asyncio.run(bounded())


@pytest.mark.parametrize(("slots", "queue"), [(1, 0), (1, 2), (3, 2)])
def test_slots_and_queue_are_bounded(open_admission, slots, queue):
    admission = open_admission(slots, queue)

    async def test():
        at_work = [Work() for _ in range(slots)]
        waiting = [Work() for _ in range(queue)]
        tasks = [start(admission, work) for work in at_work]
        for work in at_work:
            await seen(work.began)
        tasks += [start(admission, work) for work in waiting]
        await asyncio.sleep(0)
        with pytest.raises(OverloadError, match=f"{slots} requests at work and {queue} waiting"):
            admission.check_room()
        with pytest.raises(OverloadError):
            await start(admission, Work())
        assert not any(work.began.is_set() for work in waiting)
        for work in (*at_work, *waiting):
            work.end.set()
        assert await asyncio.gather(*tasks) == ["done"] * (slots + queue)
        admission.check_room()

    run(test())


def test_first_come_first_served(open_admission):
    admission, order = open_admission(1, 9), []

    async def test():
        first = Work()
        tasks = [start(admission, first)]
        await seen(first.began)
        tasks += [start(admission, lambda i=i: order.append(i)) for i in range(9)]
        await asyncio.sleep(0)
        first.end.set()
        await asyncio.gather(*tasks)

    run(test())
    assert order == list(range(9))


def test_the_wait_for_a_slot_is_written_down(open_admission):
    admission = open_admission(slots=1, queue=2)

    async def test():
        first, second = Work(), Work()
        with recorded() as at_once:
            running = start(admission, first)
        with recorded() as after_it:
            waiting = start(admission, second)
        with recorded() as given_up:
            leaving = start(admission, Work())
        await seen(first.began)
        await asyncio.sleep(0.2)
        leaving.cancel()
        await asyncio.wait([leaving])
        first.end.set()
        second.end.set()
        await asyncio.gather(running, waiting)
        [(_, short)], [(_, long)], [(_, lost)] = at_once.seconds, after_it.seconds, given_up.seconds
        assert short < long
        assert lost > 0.1
        assert {name for work in (at_once, after_it, given_up) for name, _ in work.seconds} == {"queue"}

    run(test())


def test_cancelled_while_waiting(open_admission):
    """Its place is free at once, and it is never done."""
    admission = open_admission(1, 1)

    async def test():
        first, second, third = Work(), Work(), Work()
        one = start(admission, first)
        await seen(first.began)
        two = start(admission, second)
        await asyncio.sleep(0)
        two.cancel()
        with pytest.raises(asyncio.CancelledError):
            await two
        three = start(admission, third)
        await asyncio.sleep(0)
        first.end.set()
        third.end.set()
        assert await asyncio.gather(one, three) == ["done", "done"]
        assert not second.began.is_set()

    run(test())


def test_cancelled_at_the_moment_its_turn_comes(open_admission):
    admission = open_admission(1, 1)

    async def test():
        first = Work()
        one = start(admission, first)
        await seen(first.began)
        second = Work()
        two = start(admission, second)
        await asyncio.sleep(0)
        first.end.set()
        assert second.began.wait(PATIENCE)  # the slot is handed over without the event loop
        two.cancel()
        with pytest.raises(asyncio.CancelledError):
            await two
        await one
        second.end.set()
        await until(lambda: has_room(admission))
        third = Work()
        third.end.set()
        assert await start(admission, third) == "done"

    run(test())


def test_cancelled_at_work(open_admission):
    """It keeps its slot until its next step, which tells it to end."""
    admission = open_admission()
    ended = []

    def work():
        began.set()
        proceed.wait(PATIENCE)
        try:
            allowance.current().checkpoint()
        except ClientGoneError as error:
            ended.append(error)
            raise

    began, proceed = threading.Event(), threading.Event()

    async def test():
        task = start(admission, work)
        await seen(began)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(OverloadError):
            admission.check_room()
        proceed.set()
        await until(lambda: ended)
        second = Work()
        second.end.set()
        await until(lambda: has_room(admission))
        assert await start(admission, second) == "done"

    run(test())


def has_room(admission):
    try:
        admission.check_room()
    except OverloadError:
        return False
    return True


def test_deadline_that_passed_in_the_queue(open_admission):
    admission = open_admission(1, 1)

    async def test():
        first, second = Work(), Work()
        one = start(admission, first)
        await seen(first.began)
        two = start(admission, second, Deadline(0.01))
        await asyncio.sleep(0.02)
        first.end.set()
        await one
        with pytest.raises(DeadlineError, match="not ready in time"):
            await two
        assert not second.began.is_set()

    run(test())


def test_deadline_that_passes_at_work(open_admission):
    admission = open_admission()

    def work():
        while True:
            allowance.current().checkpoint()

    async def test():
        with pytest.raises(DeadlineError):
            await start(admission, work, Deadline(0.05))
        await until(lambda: has_room(admission))

    run(test())


def test_short_request_beside_a_long_one_in_the_only_slot(open_admission):
    admission = open_admission(1, 1, turn_seconds=0)
    short_done, steps = threading.Event(), []

    def long():
        while not short_done.is_set():
            began.set()
            steps.append(allowance.current().checkpoint())
        return "long"

    began = threading.Event()

    async def test():
        task = start(admission, long)
        await seen(began)
        assert await start(admission, lambda: "short") == "short"
        assert not task.done()
        short_done.set()
        assert await task == "long"

    run(test())
    assert steps


def decode_large():
    allowance.current().check_recording(LARGE_BYTES, 1, 16000)


def resample_to_large():
    resample(np.zeros(LARGE_BYTES // 4 // 16 + 1, np.float32), 1000, 16000)


def answer_much():
    for _ in range(2):
        allowance.current().extend_answer(LARGE_BYTES // 2 + 1, "ask for less")


def large_until(release, begun, make=decode_large):
    """Work on a large recording that passes its turns on until it is let go."""

    def work():
        make()
        begun.append(1)
        while not release.is_set():
            allowance.current().checkpoint()
        return "large"

    return work


@pytest.mark.parametrize("make", [decode_large, resample_to_large, answer_much])
def test_as_many_large_recordings_at_once_as_slots(open_admission, make):
    """The others wait for room without a slot, and small ones pass them."""
    admission = open_admission(2, 20, turn_seconds=0)
    release, begun = threading.Event(), []

    async def test():
        tasks = [start(admission, large_until(release, begun, make)) for _ in range(6)]
        await until(lambda: len(begun) == 2)
        for _ in range(10):
            assert await start(admission, lambda: "small") == "small"
        assert len(begun) == 2
        release.set()
        assert await asyncio.gather(*tasks) == ["large"] * 6

    run(test())
    assert len(begun) == 6


def test_waiting_for_room_ends_with_the_client_and_with_the_deadline(open_admission):
    admission = open_admission(1, 2, turn_seconds=0)
    release, begun, ended = threading.Event(), [], []

    def second():
        begun.append(2)
        try:
            allowance.current().check_recording(LARGE_BYTES, 1, 16000)
        except Exception as error:
            ended.append(type(error))
            raise

    async def test():
        first = start(admission, large_until(release, begun))
        await until(lambda: begun == [1])
        leaving, late = start(admission, second), start(admission, second, Deadline(0.3))
        await until(lambda: begun == [1, 2, 2])
        leaving.cancel()
        await asyncio.gather(leaving, late, return_exceptions=True)
        await until(lambda: len(ended) == 2)
        assert set(ended) == {ClientGoneError, DeadlineError}
        await until(lambda: has_room(admission))
        assert not first.done()
        release.set()
        assert await first == "large"

    run(test())


def test_errors_of_the_work_arrive_and_free_the_slot(open_admission):
    admission = open_admission()

    async def test():
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await start(admission, lambda: 1 / 0)

    run(test())


@pytest.fixture
def no_collection():
    """What is freed within the test is freed because nothing refers to it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Array(np.ndarray):
    """One that can be referred to weakly."""


def refuse():
    try:
        raise ValueError("the reason")
    except ValueError:
        raise AudioError("no audio") from None


def go_on():
    while True:
        allowance.current().checkpoint()


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize(
    ("end", "seconds", "error"),
    [
        (refuse, 60, AudioError),
        (lambda: 1 / 0, 60, ZeroDivisionError),
        (go_on, 0.2, DeadlineError),
    ],
)
def test_a_request_that_failed_leaves_nothing_in_memory(open_admission, no_collection, leave, end, seconds, error):
    """Neither its body nor its recording, whether its client has gone or not."""
    admission, left, began, proceed = open_admission(), [], threading.Event(), threading.Event()

    def noted(size):
        array = np.ones(size).view(Array)
        left.append(weakref.ref(array))
        return array

    async def ask():
        body = noted(10)

        def work():
            recording = noted(body.size)
            began.set()
            proceed.wait(PATIENCE)
            end()
            return recording

        await admission.run(work, Deadline(seconds))

    async def test():
        task = asyncio.create_task(ask())
        await seen(began)
        if leave:
            task.cancel()
        else:
            proceed.set()
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError if leave else error)
        proceed.set()

    run(test())
    admission.close()
    assert [each() is None for each in left] == [True, True]


def test_every_slot_comes_back_after_a_storm(open_admission):
    admission = open_admission(3, 10, turn_seconds=0)
    random_ = random.Random(0)

    def work():
        for size in range(random_.randrange(5)):
            allowance.current().check_recording(size * LARGE_BYTES // 12, 1, 16000)
            allowance.current().checkpoint()

    async def client():
        await asyncio.sleep(random_.random() / 20)
        task = start(admission, work, Deadline(random_.random() / 20))
        if random_.random() < 0.5:
            await asyncio.sleep(random_.random() / 50)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def test():
        await asyncio.gather(*(client() for _ in range(500)))
        at_work = [Work() for _ in range(3)]
        tasks = []
        for work in at_work:
            await until(lambda: has_room(admission))
            tasks.append(start(admission, work))
        for work in at_work:
            await seen(work.began)
            work.end.set()
        await asyncio.gather(*tasks)

    run(test())


def test_closed(open_admission):
    admission = open_admission()
    admission.close()

    async def test():
        with pytest.raises(OverloadError, match="is stopping"):
            await start(admission, Work())

    run(test())


def test_closed_while_others_wait(open_admission):
    """Each of them is told, as soon as its turn would have come."""
    admission = open_admission(slots=1, queue=3)

    async def test():
        first = Work()
        at_work = start(admission, first)
        await seen(first.began)
        waiting = [start(admission, Work()) for _ in range(3)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(admission.close))
        await until(lambda: admission._pool._shutdown)
        first.end.set()
        assert await at_work == "done"
        for task in waiting:
            with pytest.raises(OverloadError, match="is stopping"):
                await task
        await closing

    run(test())


def test_no_thread_can_be_started(open_admission, monkeypatch):
    """The pool keeps what it has no thread for, and does it once it has one: nobody asks for it any more."""
    admission, done = open_admission(slots=1, queue=1), []

    def fail(_):
        raise RuntimeError("can't start new thread")

    async def test():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(OverloadError, match="no thread left"):
                await start(admission, lambda: done.append("kept"))
        for _ in range(3):
            await start(admission, lambda: done.append("later"))
        first, second = Work(), Work()
        tasks = [start(admission, work) for work in (first, second)]
        await seen(first.began)
        with pytest.raises(OverloadError):  # the slot and the place in the queue weren't given back twice
            admission.check_room()
        first.end.set()
        second.end.set()
        await asyncio.gather(*tasks)

    run(test())
    assert done == ["later"] * 3


def test_ticket_of_the_task(open_admission):
    async def test():
        hold_ticket(Ticket(open_admission(), Deadline()))
        assert await admitted(lambda: 7) == 7

    run(test())


def test_held_bytes():
    held = HeldBytes(10)
    held.take(6)
    with pytest.raises(OverloadError, match="all but 4 of the 10 bytes"):
        held.take(5)
    held.take(4)
    held.give_back(6)
    held.check_room(6)
