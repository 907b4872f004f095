"""Slots, queue and turns, with work that waits until the test lets it go."""

import asyncio
import gc
import math
import random
import threading
import weakref

import numpy as np
import pytest

from avex_serve.errors import AudioError, ClientGoneError, DeadlineError, OverloadError
from avex_serve.scheduling.admission import Admission
from avex_serve.scheduling.request import Request, answering, current

PATIENCE = 20  # seconds until a test that hangs fails


@pytest.fixture
def open_admission():
    """Make one, closed at the end."""
    made = []

    def make(slots=1, queue=0, **arguments):
        made.append(Admission(slots, queue, **arguments))
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


def start(admission, work, seconds=math.inf, request=None):
    with answering(request or Request(seconds=seconds)):
        return asyncio.create_task(admission.run(work))


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
        requests = Request(), Request(), Request()
        running, waiting, leaving = (
            start(admission, work, request=request)
            for work, request in zip((first, second, Work()), requests, strict=True)
        )
        await seen(first.began)
        await asyncio.sleep(0.2)
        leaving.cancel()
        await asyncio.wait([leaving])
        first.end.set()
        second.end.set()
        await asyncio.gather(running, waiting)
        short, long, lost = (request.timings.totals()["queue"] for request in requests)
        assert short < long
        assert lost > 0.1
        assert {span.stage for request in requests for span in request.timings.spans} == {"queue"}

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
            current().checkpoint()
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
        two = start(admission, second, 0.01)
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
            current().checkpoint()

    async def test():
        with pytest.raises(DeadlineError):
            await start(admission, work, 0.05)
        await until(lambda: has_room(admission))

    run(test())


def test_short_request_beside_a_long_one_in_the_only_slot(open_admission):
    admission = open_admission(1, 1, turn_seconds=0)
    short_done, steps = threading.Event(), []

    def long():
        while not short_done.is_set():
            began.set()
            steps.append(current().checkpoint())
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


def test_waiting_for_the_next_turn_ends_with_the_client_and_with_the_deadline(open_admission):
    """The slot is another's meanwhile, and is not given back twice."""
    admission = open_admission(1, 2, turn_seconds=0)
    begun, ended, others = [], [], Work()

    def yielding():
        begun.append(1)
        try:
            while True:
                current().checkpoint()
        except Exception as error:
            ended.append(type(error))
            raise

    async def test():
        leaving, late = start(admission, yielding), start(admission, yielding, 0.5)
        await until(lambda: len(begun) == 2)
        other = start(admission, others)
        await seen(others.began)
        leaving.cancel()
        await asyncio.gather(leaving, late, return_exceptions=True)
        await until(lambda: len(ended) == 2)
        assert set(ended) == {ClientGoneError, DeadlineError}
        assert not other.done()
        others.end.set()
        assert await other == "done"
        with pytest.raises(ZeroDivisionError):
            await start(admission, lambda: 1 / 0)

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
        current().checkpoint()


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

        with answering(Request(seconds=seconds)):
            await admission.run(work)

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
        for _ in range(random_.randrange(5)):
            current().checkpoint()

    async def client():
        await asyncio.sleep(random_.random() / 20)
        task = start(admission, work, random_.random() / 20)
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
    admission = open_admission(slots=1, queue=1000)  # more than Python's recursion is deep

    async def test():
        first = Work()
        at_work = start(admission, first)
        await seen(first.began)
        waiting = [start(admission, Work()) for _ in range(1000)]
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
