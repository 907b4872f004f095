"""Tensors in JSON are read as numpy reads the same lists, and take little more memory than their numbers."""

import json
import random
import tracemalloc

import msgspec
import numpy as np
import pytest

from avex_serve.errors import ClientGoneError, InputError, OverloadError, TensorError, TooLargeError
from avex_serve.scheduling.request import Limits, Memory, Request, answering
from avex_serve.service.parsing import from_flags, from_numbers, from_texts


def raw(text):
    return msgspec.Raw(text if isinstance(text, bytes) else text.encode())


def regular(random, shape):
    return random.choice([1, -2.5, 1e-30, 0, 12345678]) if not shape else [regular(random, shape[1:])] * shape[0]


def nested(random, depth):
    if depth == 0:
        return random.choice([1, -2.5, 1e3, 0])
    inner = (
        depth - 1 if random.random() < 0.97 else random.randrange(3) for _ in range(random.choice([0, 1, 2, 2, 3]))
    )
    return [nested(random, each) for each in inner]


def test_as_numpy():
    r = random.Random(0)
    outcomes = set()
    for number in range(6000):
        regular_shape = [r.randrange(4) for _ in range(r.randrange(4))]
        data = nested(r, r.randrange(4)) if number % 2 else regular(r, regular_shape)
        text = json.dumps(data, indent=r.choice([None, 1]))
        try:
            expected = np.asarray(data).astype(np.float32)
        except ValueError:
            with pytest.raises(TensorError, match="ragged"):
                from_numbers("x", raw(text))
            outcomes.add("ragged")
        else:
            found = from_numbers("x", raw(text))
            assert (found.shape, found.dtype) == (expected.shape, np.float32), text
            np.testing.assert_array_equal(found, expected)
            outcomes.add(expected.ndim)
    assert {"ragged", 0, 1, 2, 3} <= outcomes


@pytest.mark.parametrize("size", [2**16 // 2 - 1, 2**16 // 2, 2**16 // 2 + 1, 10**6])
def test_many_numbers(size):
    data = [number % 10 for number in range(size)]
    np.testing.assert_array_equal(from_numbers("x", raw(json.dumps(data, separators=(",", ":")))), data)


def test_flags():
    np.testing.assert_array_equal(from_flags("m", raw("[[true, false], [false, true]]")), np.eye(2, dtype=bool))
    assert from_flags("m", raw("[]")).shape == (0,)


@pytest.mark.parametrize("text", ['["a"]', "[null]", "[true]", "[1, [2, true]]", "{}", '"1"', "[{}]"])
def test_other_values(text):
    with pytest.raises(TensorError, match="holds other values than numbers"):
        from_numbers("x", raw(text))


def test_number_beyond_all():
    with pytest.raises(InputError, match="x: number out of range"):
        from_numbers("x", raw("[1e999]"))
    assert np.isinf(from_numbers("x", raw("[1e99]"))).all()  # beyond float32: the engine refuses it


@pytest.mark.parametrize(
    ("element", "count"), [("1", 2**22), ("[1]", 2**21), ("1e1", 2**21), ('""', 2**20), ("[]", 2**20)]
)
def test_memory(element, count):
    """A document takes a few times its own size, whatever it holds. Python objects would take up to thirty times."""
    data = raw("[" + ",".join([element] * count) + "]")
    size = len(bytes(data))
    tracemalloc.start()
    try:
        with pytest.raises(TensorError) if element == '""' else answering(Request()):
            from_numbers("x", data)
        assert tracemalloc.get_traced_memory()[1] < 5 * size + 2**20
    finally:
        tracemalloc.stop()


def test_numbers_count_as_held():
    held = Memory(4 * 100)
    with answering(Request(bodies=held)):
        from_numbers("x", raw(json.dumps([0] * 60)))
        with pytest.raises(OverloadError):
            from_numbers("x", raw(json.dumps([0] * 60)))


def test_nobody_waits():
    request = Request()
    request.abandon()
    with answering(request), pytest.raises(ClientGoneError):
        from_numbers("x", raw("[1]"))


def test_number_of_recordings():
    with answering(Request(limits=Limits(windows=2))), pytest.raises(TooLargeError, match="3 recordings"):
        from_texts("x", raw('["", "", ""]'))
