"""Bundles that take embeddings, asked about recordings: an audio bundle that is served makes the embeddings.

Which one may do that is said by the manifests: the fingerprint of what the head reads is that of what makes one of
the audio bundle's embeddings, and the one's shape is the other's.

A recording is decoded last, when model, head and options are known to be right: an hour of audio takes seconds.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from avex_serve.audio.waveform import Recording
from avex_serve.bundles.manifest import Manifest, ProbeInfo
from avex_serve.errors import UnsupportedError
from avex_serve.inference.engine import Engine, Heard
from avex_serve.inference.repository import Repository
from avex_serve.inference.results import Embedding, Prediction, Predictions, Selection, score_scale


class _Link(NamedTuple):
    """A head and the output of an audio bundle that it reads."""

    engine: Engine
    head: ProbeInfo
    output: str


def predict(
    repository: Repository,
    recording: Callable[[], Recording],
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
        recording: decodes it; called once all else that was asked for is known to be right.
        model: see `Repository.lease`.
        version: see `Repository.lease`.
        threshold: lowest score to report.
        top_k: report at most this many labels a window.
        overlap: see `Engine.predict`.
        probe: name of the head to ask.

    Raises:
        AvexServeError: as `Repository.lease` and `Engine.predict`.
        UnsupportedError: the bundle takes embeddings that no audio bundle makes which is served.
    """
    with repository.lease(model, version) as engine:
        head = engine.probe(probe)
        selection = _selection(head, threshold, top_k)
        if engine.manifest.kind == "audio":
            heard = _hear(engine, recording, [head.logits], overlap)
            logits = heard.outputs[head.logits]
        else:
            heard, embeddings = _hear_for(repository, engine.manifest, head, recording, overlap)
            logits = engine.infer(embeddings)[head.logits]
        return engine.prediction(head, heard, logits, selection)


def infer_recording(
    repository: Repository,
    engine: Engine,
    recording: Callable[[], Recording],
    *,
    overlap: float = 0.0,
    probe: str | None = None,
) -> dict[str, np.ndarray]:
    """The raw outputs of a bundle of either kind for a recording, (N, …) with one row a window.

    Args:
        repository: what is served.
        engine: the bundle, leased from there.
        recording: see `predict`, as for the arguments below.
        overlap: of neighbouring windows, in seconds.
        probe: name of the head whose embeddings a bundle that takes some is given.

    Raises:
        AvexServeError: as `predict`.
    """
    if engine.manifest.kind == "audio":
        engine.check_overlap(overlap)
        return engine.infer_recording(*recording(), overlap=overlap)
    _, embeddings = _hear_for(repository, engine.manifest, engine.probe(probe), recording, overlap)
    return engine.infer(embeddings)


def predict_all(
    repository: Repository,
    recording: Callable[[], Recording],
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
        heard = _hear(audio, recording, list(wanted), overlap)
        answers = [(audio, head, heard.outputs[head.logits]) for head in own]
        for reader, head, output in links:
            answers.append((reader, head, reader.infer(heard.outputs[output])[head.logits]))
        return Predictions(
            predictions=[
                engine.prediction(head, heard, logits, selection)
                for (engine, head, logits), selection in zip(answers, selections, strict=True)
            ]
        )


def embed(
    repository: Repository,
    recording: Callable[[], Recording],
    *,
    model: str | None = None,
    version: str | None = None,
    overlap: float = 0.0,
    output: str | None = None,
) -> Embedding:
    """The embeddings of a recording by an audio bundle; see `predict`, and `Engine.embed` for the output."""
    with repository.lease(model, version) as engine:
        engine.embedding(output)
        engine.check_overlap(overlap)
        return engine.embedding_document(*recording(), overlap=overlap, output=output)


def _hear(audio: Engine, recording: Callable[[], Recording], outputs: list[str], overlap: float) -> Heard:
    audio.check_overlap(overlap)
    return audio.hear(*recording(), outputs, overlap=overlap)


def _hear_for(
    repository: Repository,
    reader: Manifest,
    head: ProbeInfo,
    recording: Callable[[], Recording],
    overlap: float,
) -> tuple[Heard, np.ndarray]:
    """The embeddings of a recording (N, …) that a head reads, by an audio bundle that makes them."""
    with repository.lease_those(lambda audio: _output(audio, reader, head) is not None) as sources:
        if not sources:
            raise UnsupportedError(_why_none(repository, reader, head))
        output = _output(sources[0].manifest, reader, head)
        assert output is not None
        heard = _hear(sources[0], recording, [output], overlap)
    return heard, heard.outputs[output]


def _selection(head: ProbeInfo, threshold: float | None, top_k: int | None) -> Selection:
    return Selection.of(score_scale(head.activation), threshold, top_k)


def _heads(audio: Manifest, reader: Manifest) -> list[tuple[ProbeInfo, str]]:
    """The heads that read an embedding of the audio bundle, each with the name of that output."""
    pairs = [(head, _output(audio, reader, head)) for head in reader.probes]
    return [(head, output) for head, output in pairs if output is not None]


def _output(audio: Manifest, reader: Manifest, head: ProbeInfo) -> str | None:
    """The output of the audio bundle that the head of the other one reads."""
    if reader.kind == "embedding" and head.input_fingerprint is not None:
        for info in audio.embeddings:
            if info.fingerprint == head.input_fingerprint and _fits(
                audio.output(info.output).shape, reader.inputs[0].shape
            ):
                return info.output
    return None


def _fits(made: tuple[int, ...], taken: tuple[int, ...]) -> bool:
    return len(made) == len(taken) and all(size in (-1, got) for got, size in zip(made, taken, strict=True))


def _why_none(repository: Repository, reader: Manifest, head: ProbeInfo) -> str:
    takes = f"bundle {reader.name} takes embeddings, not audio"
    if head.input_fingerprint is None:
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
        f"{head.input_fingerprint[:12]} {list(reader.inputs[0].shape)}: {', '.join(made) or 'there is none'}; "
        "use classify, or serve an audio bundle of the same backbone and layers"
    )
