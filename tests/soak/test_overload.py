import os

from tests.bundles import make_slow_bundle
from tests.clients import REFUSED, RIGHT
from tests.soak.overload import overload

SECONDS = float(os.environ.get("AVEX_SOAK_SECONDS", "5"))
MEMORY_GROWTH = 1.3


def test_ten_times_what_it_can_answer(tmp_path):
    """What is accepted is answered rightly, the rest refused, and nothing grows."""
    result = overload(tmp_path / "server", make_slow_bundle(tmp_path / "bundle"), SECONDS)
    assert not result.unexpected
    assert result.outcomes[RIGHT] >= 1
    assert result.outcomes[REFUSED] > result.outcomes[RIGHT]
    assert result.peak_memory <= MEMORY_GROWTH * result.idle_memory
