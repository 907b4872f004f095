"""Recordings and tensors made by formulas on integers, so that they are the same on every machine."""

import io

import numpy as np
import soundfile

from tests.bundles import DIM, WINDOW


def encoded(seconds, rate=16000, channels=1, container="WAV", seed=0, subtype=None):
    """A recording of something like noise.

    Ogg Vorbis must be short, since libsndfile crashes on long noise; MP3 mono, since its stereo is never the same.
    """
    index = np.arange(round(seconds * rate), dtype=np.int64)
    columns = [(index * index * (3 + seed) + index * (101 + 17 * each)) % 20011 - 10005 for each in range(channels)]
    return _written(np.stack(columns, axis=1).astype(np.int16), rate, container, subtype)


def silence(seconds, rate=16000, channels=1):
    """A long recording in a small file."""
    return _written(np.zeros((round(seconds * rate), channels), np.int16), rate, "FLAC", None)


def _written(samples, rate, container, subtype):
    if subtype in ("FLOAT", "DOUBLE"):  # libsndfile writes integers to them as they are
        samples = samples / np.float32(2**15)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def patched(data, start, new):
    """The data with other bytes from there on."""
    return data[:start] + new + data[start + len(new) :]


def windows(rows=2, samples=WINDOW):
    """Waveforms (rows, samples) in [-0.5, 0.5] that float32 holds exactly."""
    index = np.arange(rows * samples, dtype=np.int64)
    return ((index * index * 7 + index * 31) % 1021 - 510).reshape(rows, samples).astype(np.float32) / 1024


def mask(rows, samples):
    """Where clips are padded: each one shorter than the one before."""
    ends = samples // (np.arange(rows) + 1)
    return np.arange(samples) >= ends[:, None]


def embeddings(*shape):
    """Embeddings of that shape, by default two of the usual size."""
    shape = shape or (2, DIM)
    index = np.arange(int(np.prod(shape)), dtype=np.int64)
    return ((index * 37) % 19 - 9).reshape(shape).astype(np.float32) / 8


def element(data):
    """An element of BYTES as it travels in binary."""
    return len(data).to_bytes(4, "little") + data
