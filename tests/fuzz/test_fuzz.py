"""Thousands of hostile requests: each is refused with a reason, and honest ones in between are answered rightly."""

import os
import random

import pytest

from tests.fuzz import attacks

COUNT = int(os.environ.get("AVEX_FUZZ_REQUESTS", "300"))  # of each kind
SEED = os.environ.get("AVEX_FUZZ_SEED", "0")


@pytest.mark.parametrize("attack", attacks.ATTACKS.values(), ids=attacks.ATTACKS)
def test_hostile_requests(besieged, question, attack):
    attacks.run(besieged, question, attack, random.Random(f"{SEED} {attack.__name__}"), COUNT)
