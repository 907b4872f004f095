"""An archive of recordings, and the command that runs bundles on it."""

import json

import numpy as np
import pytest
import soundfile

from avex_serve.cli import main
from tests.bundles import (
    FINGERPRINT,
    make_audio_bundle,
    make_backbone_bundle,
    make_embedding_bundle,
    make_probes_bundle,
)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Tiny bundles by name; all but "plain" share the fingerprint of their embeddings."""
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "plain": make_audio_bundle(folder / "plain"),
        "probes": make_probes_bundle(folder / "probes"),
        "backbone": make_backbone_bundle(folder / "backbone"),
        "head": make_embedding_bundle(folder / "head", reads=FINGERPRINT),
    }


@pytest.fixture
def archive(tmp_path):
    """A folder of recordings of several rates and lengths; one is silent, one broken and one a copy."""
    folder = tmp_path / "archive"
    (folder / "site b").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, seconds, rate in (
        ("dawn.wav", 0.42, 44100),
        ("dusk.flac", 0.317, 16000),
        ("site b/nächtens.wav", 1.05, 22050),
    ):
        soundfile.write(folder / name, random.uniform(-1, 1, int(seconds * rate)), rate)
    soundfile.write(folder / "silent.wav", np.zeros(8000), 16000)
    (folder / "site b" / "copy.wav").write_bytes((folder / "dawn.wav").read_bytes())
    (folder / "broken.wav").write_bytes(b"RIFF\xff\xff\xff\x7fWAVE")
    return folder


@pytest.fixture
def command(capsys):
    """Run a command; its exit code and the lines that it prints."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def status(command):
    """The status of a store."""
    return lambda store: json.loads(command("status", store, "--json")[1][0])
