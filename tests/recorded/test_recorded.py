"""The service answers as it was recorded; see `record` for how to record again."""

import pytest

from .comparing import differences
from .record import RECORDING, answers, compare, read
from .requests import TABLE


@pytest.mark.parametrize("server", TABLE)
def test_answers_are_as_recorded(server, tmp_path):
    records, _ = answers(server, tmp_path)
    different = compare(server, records, read(RECORDING)[server])
    assert not different, "\n".join(different)


@pytest.mark.parametrize("server", TABLE)
def test_requests_have_names_of_their_own(server):
    names = [request.name for request in TABLE[server]]
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


JSON = '{"a": [0.25, 1], "b": "0.250000:1:robin"}'


@pytest.mark.parametrize(
    ("text", "same", "same_strictly"),
    [
        (JSON, True, True),
        ('{"a": [0.2500001, 1], "b": "0.250001:1:robin"}', True, False),
        ('{"a":[0.25,1],"b":"0.250000:1:robin"}', True, False),
        ('{"a": [0.2501, 1], "b": "0.250000:1:robin"}', False, False),
        ('{"a": [0.25, 1.0], "b": "0.250000:1:robin"}', False, False),
        ('{"a": [0.25, 1], "b": "0.250000:2:robin"}', False, False),
        ('{"b": "0.250000:1:robin", "a": [0.25, 1]}', False, False),
        ('{"a": [0.25, 1, 1], "b": "0.250000:1:robin"}', False, False),
    ],
)
def test_what_counts_as_the_same(text, same, same_strictly):
    recorded, got = ({"status": 200, "json": each} for each in (JSON, text))
    assert bool(differences(recorded, got)) is not same
    assert bool(differences(recorded, got, strict=True)) is not same_strictly
    assert differences(recorded, {**got, "status": 400})
