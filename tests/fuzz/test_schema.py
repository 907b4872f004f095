"""Requests that the OpenAPI document allows, and such that it doesn't, made up by schemathesis."""

import contextlib
import json
import warnings

import pytest
from hypothesis import given, seed
from hypothesis.errors import Unsatisfiable

from tests.fuzz.test_fuzz import SEED, fuzzed

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import schemathesis
    from schemathesis import GenerationMode

EXAMPLES = 20  # of each operation and mode


@pytest.mark.parametrize("mode", GenerationMode)
def test_requests_by_the_document(besieged, mode):
    # Schemathesis can't say what a body of that format is not: its bytes are of no type of JSON.
    document = json.loads(
        besieged.server.get("/docs.json").text,
        object_hook=lambda each: {
            name: value for name, value in each.items() if (name, value) != ("format", "binary")
        },
    )
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=besieged.server.url)
    sent = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @seed(SEED)
        @fuzzed(EXAMPLES)
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            nonlocal sent
            answer = case.call(timeout=30)
            assert answer.status_code < 500 or answer.status_code == 503, answer.text
            sent += 1

        with contextlib.suppress(Unsatisfiable):  # nothing about it can be wrong
            ask()
        assert besieged.fault() is None
    assert sent >= EXAMPLES
