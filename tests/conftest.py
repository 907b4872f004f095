"""Fixtures that every part uses."""

import os
import warnings

import pytest

from tests.bundles import make_audio_bundle, make_embedding_bundle

# Tests run side by side, a process for each core: threads inside of one would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

with warnings.catch_warnings():
    # BentoML itself uses what pydantic and pathspec call deprecated, when it is imported and a service is defined.
    warnings.simplefilter("ignore", DeprecationWarning)
    import avex_serve.service.worker  # noqa: F401


@pytest.fixture(scope="session")
def audio_bundle(tmp_path_factory):
    """Folder of a tiny bundle that takes audio."""
    return make_audio_bundle(tmp_path_factory.mktemp("bundles") / "audio")


@pytest.fixture(scope="session")
def embedding_bundle(tmp_path_factory):
    """Folder of a tiny bundle that takes embeddings."""
    return make_embedding_bundle(tmp_path_factory.mktemp("bundles") / "embedding")
