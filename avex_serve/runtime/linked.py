"""Bundles that take embeddings, asked about recordings: an audio bundle that is served makes the embeddings.

Which one may do that is said by the manifests: the fingerprint of what the head reads is that of what makes one of
the audio bundle's embeddings, and the one's shape is the other's.
"""

from typing import NamedTuple

import numpy as np

from avex_serve.bundle import Manifest, ProbeInfo
from avex_serve.errors import UnsupportedError
from avex_serve.runtime.engine import Engine, Heard
from avex_serve.runtime.repository import Repository
from avex_serve.runtime.results import Prediction, Predictions, Selection, score_scale


class _Link(NamedTuple):
    """A head and the output of an audio bundle that it reads."""

    engine: Engine
    head: ProbeInfo
    output: str


def predict(
    repository: Repository,
    wave: np.ndarray,
    sample_rate: int,
    *,
    model: str | None = None,
    version: str | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    overlap: float = 0.0,
    probe: str | None = None,
) -> Prediction:
    """Name the sounds in a recording, by a bundle of either kind.

    Args:
        repository: what is served.
        wave: see `Engine.predict`, as for the arguments below that are not named here.
        sample_rate: of the wave, in Hz.
        model: see `Repository.lease`.
        version: see `Repository.lease`.
        threshold: lowest score to report.
        top_k: report at most this many labels a window.
        overlap: of neighbouring windows, in seconds.
        probe: name of the head to ask.

    Raises:
        AvexServeError: as `Repository.lease` and `Engine.predict`.
        UnsupportedError: the bundle takes embeddings that no audio bundle makes which is served.
    """
    with repository.lease(model, version) as engine:
        if engine.manifest.kind == "audio":
            return engine.predict(wave, sample_rate, threshold=threshold, top_k=top_k, overlap=overlap, probe=probe)
        head = engine.probe(probe)
        selection = _selection(head, threshold, top_k)
        heard, embeddings = _hear(repository, engine.manifest, head, wave, sample_rate, overlap)
        return engine.prediction(head, heard, engine.infer(embeddings)[head.logits], selection)


def infer_recording(
    repository: Repository,
    engine: Engine,
    wave: np.ndarray,
    sample_rate: int,
    *,
    overlap: float = 0.0,
    probe: str | None = None,
) -> dict[str, np.ndarray]:
    """The raw outputs of a bundle of either kind for a recording, (N, …) with one row a window.

    Args:
        repository: what is served.
        engine: the bundle, leased from there.
        wave: see `predict`, as for the arguments below.
        sample_rate: of the wave, in Hz.
        overlap: of neighbouring windows, in seconds.
        probe: name of the head whose embeddings a bundle that takes some is given.

    Raises:
        AvexServeError: as `predict`.
    """
    if engine.manifest.kind == "audio":
        return engine.infer_recording(wave, sample_rate, overlap=overlap)
    _, embeddings = _hear(repository, engine.manifest, engine.probe(probe), wave, sample_rate, overlap)
    return engine.infer(embeddings)


def predict_all(
    repository: Repository,
    wave: np.ndarray,
    sample_rate: int,
    *,
    model: str | None = None,
    version: str | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    overlap: float = 0.0,
) -> Predictions:
    """Ask the heads of an audio bundle and those that read its embeddings, in one pass of its backbone.

    Of a model that takes embeddings the newest version that fits is asked. Without the name of a model, the only
    one that takes audio is meant; arguments and errors otherwise as in `predict`.
    """
    names = {manifest.name for manifest in repository.manifests() if manifest.kind == "audio"}
    if not model and len(names) == 1:
        (model,) = names
    with (
        repository.lease(model, version) as audio,
        repository.lease_those(lambda reader: bool(_heads(audio.manifest, reader))) as readers,
    ):
        newest: dict[str, Engine] = {}
        for reader in readers:
            newest.setdefault(reader.manifest.name, reader)
        links = [
            _Link(reader, head, output)
            for _, reader in sorted(newest.items())
            for head, output in _heads(audio.manifest, reader.manifest)
        ]
        own = audio.manifest.probes
        if not own and not links:
            audio.probe(None)  # says why there is none
        selections = [_selection(head, threshold, top_k) for head in (*own, *(link.head for link in links))]
        wanted = dict.fromkeys([head.logits for head in own] + [link.output for link in links])
        heard = audio.hear(wave, sample_rate, list(wanted), overlap=overlap)
        answers = [(audio, head, heard.outputs[head.logits]) for head in own]
        for reader, head, output in links:
            answers.append((reader, head, reader.infer(heard.outputs[output])[head.logits]))
        return Predictions(
            predictions=[
                engine.prediction(head, heard, logits, selection)
                for (engine, head, logits), selection in zip(answers, selections, strict=True)
            ]
        )


def _hear(
    repository: Repository, reader: Manifest, head: ProbeInfo, wave: np.ndarray, sample_rate: int, overlap: float
) -> tuple[Heard, np.ndarray]:
    """The embeddings of a recording (N, …) that a head reads, by an audio bundle that makes them."""
    with repository.lease_those(lambda audio: _output(audio, reader, head) is not None) as sources:
        if not sources:
            raise UnsupportedError(_why_none(repository, reader, head))
        output = _output(sources[0].manifest, reader, head)
        assert output is not None
        heard = sources[0].hear(wave, sample_rate, [output], overlap=overlap)
    return heard, heard.outputs[output]


def _selection(head: ProbeInfo, threshold: float | None, top_k: int | None) -> Selection:
    return Selection.of(score_scale(head.activation), threshold, top_k)


def _heads(audio: Manifest, reader: Manifest) -> list[tuple[ProbeInfo, str]]:
    """The heads that read an embedding of the audio bundle, each with the name of that output."""
    pairs = [(head, _output(audio, reader, head)) for head in reader.probes]
    return [(head, output) for head, output in pairs if output is not None]


def _output(audio: Manifest, reader: Manifest, head: ProbeInfo) -> str | None:
    """The output of the audio bundle that the head of the other one reads."""
    if reader.kind == "embedding" and head.reads is not None:
        for info in audio.embeddings:
            if info.fingerprint == head.reads and _fits(audio.output(info.output).shape, reader.inputs[0].shape):
                return info.output
    return None


def _fits(made: tuple[int, ...], taken: tuple[int, ...]) -> bool:
    return len(made) == len(taken) and all(size in (-1, got) for got, size in zip(made, taken, strict=True))


def _why_none(repository: Repository, reader: Manifest, head: ProbeInfo) -> str:
    takes = f"bundle {reader.name} takes embeddings, not audio"
    if head.reads is None:
        return (
            f"{takes}, and doesn't know which backbone makes those that its probe {head.name} reads; use classify, "
            "or export the probe with its backbone"
        )
    made = [
        f"{audio.name} makes {(info.fingerprint or 'unknown')[:12]} {list(audio.output(info.output).shape)}"
        for audio in repository.manifests()
        for info in audio.embeddings
    ]
    return (
        f"{takes}, and no audio bundle here makes those that its probe {head.name} reads, with the fingerprint "
        f"{head.reads[:12]} {list(reader.inputs[0].shape)}: {', '.join(made) or 'there is none'}; "
        "use classify, or serve an audio bundle of the same backbone and layers"
    )
