"""Many clients, models and exchanges of a bundle at once, and no wrong answer."""

import itertools
import os
import time

import pytest

from avex_serve import open_bundle
from tests.bundles import make_audio_bundle
from tests.clients import RIGHT, Question, Worker, load
from tests.service.conftest import RECORDINGS, running_server

ANSWERS = int(os.environ.get("AVEX_SOAK_ANSWERS", "10000"))
CLIENTS = 8
EXCHANGE_SECONDS = 0.5


class Questions:
    """Several questions, asked in turn."""

    def __init__(self, questions):
        self._turns = itertools.cycle(questions)

    def over_http(self, client):
        return next(self._turns).over_http(client)

    def over_grpc(self, channel):
        return next(self._turns).over_grpc(channel)


@pytest.mark.nightly
def test_no_wrong_answer_in_ten_thousand(tmp_path):
    """Over HTTP and gRPC, of three models, one of which is exchanged twice a second."""
    served = tmp_path / "served"
    served.mkdir()
    steady = [make_audio_bundle(served / name, name, name) for name in ("sigmoid", "softmax")]
    changing = [make_audio_bundle(tmp_path / name, "changing", name) for name in ("none", "softmax")]
    opened = [open_bundle(bundle) for bundle in [*steady, *changing]]
    engines = [opened[:1], opened[1:2], opened[2:]]
    questions = [Question(audio, *those) for audio in RECORDINGS.values() for those in engines]
    for engine in opened:
        engine.close()
    releases = itertools.cycle(changing)
    exchange(served / "changing", next(releases))
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(served), AVEX_RELOAD_SECONDS="0.1") as server:
        worker = Worker(server)
        exchanges = 0
        with load(server, Questions(questions), CLIENTS) as result:
            while result.total < ANSWERS:
                time.sleep(EXCHANGE_SECONDS)
                exchange(served / "changing", next(releases))
                exchanges += 1
        assert set(result.outcomes) == {RIGHT}, result.outcomes
        assert result.total >= ANSWERS
        assert server.log.count("serving bundle changing") > min(exchanges, 10) / 2
        assert Worker(server).process == worker.process


def exchange(link, release):
    """Let the link lead to another release at once."""
    new = link.with_name(".new")
    new.symlink_to(release)
    new.replace(link)
