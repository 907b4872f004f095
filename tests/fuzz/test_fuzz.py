"""Thousands of hostile inputs of each kind, to a service and to the functions that parse them."""

import os
import random

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from tritonclient.grpc import service_pb2

from avex_serve.errors import InputError
from avex_serve.scheduling.request import Limits, Request, answering
from avex_serve.service.grpc.messages import message, message_class, split
from avex_serve.service.oip import json
from tests.fuzz import bundles, documents, driver, messages, mutations

SEED = os.environ.get("AVEX_FUZZ_SEED", "0")
FACTOR = float(os.environ.get("AVEX_FUZZ_FACTOR", "1"))
# Over the network: together more than 20,000.
COUNTS = {
    "http": 5000, "targets": 2000, "recordings": 2500, "forms": 3000, "documents": 4000, "frames": 2500,
    "messages": 2500, "bundles": 200,
}  # fmt: skip
IN_PROCESS = round(2000 * FACTOR)


def fuzzed(examples):
    """Settings of hypothesis for so many examples, the same for a seed; none is kept or made smaller."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("name", COUNTS)
def test_hostile_inputs(besieged, name):
    besieged.send(name, driver.inputs(name, SEED, round(COUNTS[name] * FACTOR)))


@pytest.mark.parametrize("name", driver.KINDS)
def test_the_corpus(besieged, name):
    besieged.send(name, driver.corpus(name))


def hostile(test):
    """Random numbers for each input of a test."""
    return (random.Random(f"{SEED} {test} {number}") for number in range(IN_PROCESS))


def test_messages_are_read_as_protobuf_does(audio_bundle):
    """Whatever is accepted is accepted by protobuf too, with the same raw contents."""
    kind = message_class("ModelInferRequest")
    accepted = 0
    for source in hostile("messages"):
        data = messages.message(source)
        try:
            rest, raw = split(data)
            message(kind, rest)
        except InputError:
            continue
        accepted += 1
        theirs = service_pb2.ModelInferRequest.FromString(data)
        assert [bytes(each) for each in raw] == list(theirs.raw_input_contents)
        del theirs.raw_input_contents[:]
        assert kind.FromString(rest).SerializeToString(deterministic=True) == theirs.SerializeToString(
            deterministic=True
        )
    assert accepted > IN_PROCESS / 10


def test_documents_are_read_as_json():
    """Whatever is accepted holds the numbers that a parser of JSON finds."""
    accepted = 0
    for source in hostile("documents"):
        body = mutations.spoilt_json(source, documents.tensors(source))
        with answering(Request("", Limits(windows=100))):
            try:
                asked = json.parse_request(body, None).infer
            except InputError:
                continue
        accepted += 1
        for ours, theirs in zip(asked.inputs, msgspec.json.decode(body)["inputs"], strict=True):
            if ours.datatype == "FP32":
                with np.errstate(over="ignore"):
                    expected = np.array(theirs["data"]).astype(np.float32).ravel()
                assert np.array_equal(ours.data, expected)
    assert accepted > IN_PROCESS / 10


def test_damaged_bundles_are_refused_with_a_reason(tmp_path):
    for source in hostile("bundles"):
        bundles.write(tmp_path, bundles.damaged(source))
        bundles.read(tmp_path)
