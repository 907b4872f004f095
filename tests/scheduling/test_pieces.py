"""Answers in pieces: how far the work runs ahead of a client that doesn't read, and what ends it."""

import asyncio
import threading
from contextlib import aclosing, asynccontextmanager

import pytest

from avex_serve.errors import AudioError, ClientGoneError, DeadlineError, OverloadError
from avex_serve.scheduling.admission import UNSENT_BYTES, Admission
from avex_serve.scheduling.request import Limits, Memory, Request, answering, current
from tests.scheduling.test_admission import Work, run, seen, start, until

PIECE = bytes(UNSENT_BYTES // 4)
AHEAD = 5  # pieces that are more than `UNSENT_BYTES` together


@pytest.fixture
def admission():
    made = Admission(1, 1)
    yield made
    made.close()


class Making:
    """Makes pieces, and notes how many; `ended` is set at the end, however it comes."""

    def __init__(self, count, fault=None):
        self.count, self.fault = count, fault
        self.made, self.ended = 0, threading.Event()

    def __call__(self):
        try:
            for _ in range(self.count):
                current().extend_answer(len(PIECE), "")
                self.made += 1
                yield PIECE
            if self.fault is not None:
                raise self.fault
        finally:
            self.ended.set()


@asynccontextmanager
async def stream(admission, making, request=None):
    with answering(request or Request()):
        async with aclosing(admission.stream(making)) as pieces:
            yield pieces


async def read(pieces, got):
    async for some in pieces:
        got += some


def test_all_pieces_arrive_in_order(admission):
    async def test():
        numbers = [str(number).encode() for number in range(2000)]
        async with stream(admission, lambda: (each for each in numbers)) as pieces:
            assert [one async for some in pieces for one in some] == numbers

    run(test())


def test_work_waits_without_a_slot_for_a_client_that_does_not_read(admission):
    async def test():
        making = Making(20)
        request = Request(answers=Memory(AHEAD * len(PIECE)))  # more would raise OverloadError
        async with stream(admission, making, request) as pieces:
            read = len(await anext(pieces))
            await until(lambda: making.made - read == AHEAD)
            other = Work()
            other.end.set()
            assert await start(admission, other) == "done"
            assert making.made - read == AHEAD
            read += len([one async for some in pieces for one in some])
        assert read == making.made == 20

    run(test())


def test_work_that_waited_for_its_client_waits_for_a_slot_too(admission):
    async def test():
        making = Making(20)
        async with stream(admission, making) as pieces:
            read = len(await anext(pieces))
            await until(lambda: making.made - read == AHEAD)
            other = Work()
            task = start(admission, other)
            await seen(other.began)
            read += len(await anext(pieces))
            await asyncio.sleep(0.05)
            assert making.made <= read + 1, "the slot is taken"
            other.end.set()
            assert await task == "done"
            assert read + len([one async for some in pieces for one in some]) == 20

    run(test())


def test_closing_ends_the_work_and_frees_the_slot(admission):
    async def test():
        making = Making(20)
        request = Request(answers=(memory := Memory(2**30)))
        async with stream(admission, making, request) as pieces:
            await anext(pieces)
        await seen(making.ended)
        request.release_memory()
        assert making.made < 20
        assert memory._held == 0
        with pytest.raises(ClientGoneError):
            request.extend_answer(1, "")
        other = Work()
        other.end.set()
        await until(lambda: admission._places._inside == 0)
        assert await start(admission, other) == "done"

    run(test())


def test_errors_come_after_the_pieces_before_them(admission):
    async def test():
        got = []
        async with stream(admission, Making(2, AudioError("damaged"))) as pieces:
            with pytest.raises(AudioError, match="damaged"):
                await read(pieces, got)
        assert len(got) == 2

    run(test())


def test_an_answer_that_is_late_while_its_client_does_not_read(admission):
    async def test():
        making = Making(20)
        async with stream(admission, making, Request(seconds=0.2)) as pieces:
            got = list(await anext(pieces))
            await seen(making.ended)
            with pytest.raises(DeadlineError):
                await read(pieces, got)
        assert len(got) < 20

    run(test())


def test_no_place_for_a_stream(admission):
    async def test():
        at_work = [Work() for _ in range(2)]
        tasks = [start(admission, work) for work in at_work]
        await seen(at_work[0].began)
        async with stream(admission, Making(1)) as pieces:
            with pytest.raises(OverloadError):
                await anext(pieces)
        for work, task in zip(at_work, tasks, strict=True):
            work.end.set()
            assert await task == "done"

    run(test())


def test_what_was_sent_is_no_longer_counted():
    async def test():
        admission = Admission(1, 0)
        request = Request(limits=Limits(answer_bytes=2 * AHEAD * len(PIECE)))
        async with stream(admission, Making(100), request) as pieces:
            assert len([one async for some in pieces for one in some]) == 100
        await asyncio.to_thread(admission.close)

    run(test())
