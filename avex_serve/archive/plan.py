"""What a run computes: passes over each recording, and the sets of results that they fill."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from avex_serve.bundles.manifest import Activation, EmbeddingInfo, ProbeInfo
from avex_serve.calibration.scales import Calibration, Calibrator
from avex_serve.errors import InputError, UnsupportedError
from avex_serve.evidence.first import Mode, open_checked
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import Query, links, with_overlap
from avex_serve.inference.scores import ScoreScale, activate, score_scale


class Probe(msgspec.Struct, frozen=True, omit_defaults=True):
    """A head as the store describes it."""

    name: str
    labels: tuple[str, ...]  # in the order of its logits
    scale: ScoreScale  # of its scores
    trained: bool
    calibration: Calibration | None = None  # of the bundle that ran last; probabilities are derived, not stored

    @property
    def activation(self) -> Activation:
        """What turned its logits into scores."""
        return "none" if self.scale == "logits" else self.scale

    @property
    def calibrator(self) -> Calibrator | None:
        """Its calibration, None if it has none."""
        return None if self.calibration is None else Calibrator.of(self.calibration, self.activation)


class Cut(msgspec.Struct, frozen=True):
    """How recordings are cut into windows, and what a window holds."""

    window: float  # seconds
    overlap: float  # seconds that neighbouring windows share
    bandwidth: float  # Hz: half the model's sample rate, the highest frequency that it receives


class ResultSet(msgspec.Struct, frozen=True, kw_only=True):
    """Results of one bundle with the same options, which may stand in one table. The content of ``set.json``."""

    layout: Literal[1] = 1
    kind: Literal["scores", "embeddings"]
    identity: dict[str, Any]  # everything that determines the numbers besides the recording
    bundle: str  # name of the bundle that computes them
    version: str  # of the bundle
    cut: Cut
    probes: tuple[Probe, ...] = ()  # of scores
    shape: tuple[int, ...] = ()  # of an embedding; -1: differs between recordings

    @property
    def name(self) -> str:
        """The name of its folder: a digest of the identity."""
        text = msgspec.json.encode([self.kind, self.identity], order="deterministic")
        return hashlib.sha256(text).hexdigest()[:16]


@dataclass
class Target:
    """A set of scores, and the engine whose heads make them."""

    results: ResultSet
    engine: Engine
    sources: dict[str, str]  # by probe: an output of the pass or a stored set, which its logits come from

    def scores(self, rows: dict[str, np.ndarray]) -> np.ndarray:
        """(B, C) float32, the scores of all heads side by side, from the rows of their sources, each (B, …)."""
        reads = self.engine.manifest.kind == "embedding"
        answers = {each: self.engine.infer(rows[each]) for each in set(self.sources.values())} if reads else {}
        parts = []
        for name, source in self.sources.items():
            head = self.engine.probe(name)
            parts.append(activate(answers[source][head.logits] if reads else rows[source], head.activation))
        return np.concatenate(parts, axis=1)


@dataclass
class Pass:
    """One pass of a backbone over a recording, and everything that is computed from it."""

    source: Engine
    query: Query
    targets: list[Target] = field(default_factory=list)
    embeddings: dict[str, ResultSet] = field(default_factory=dict)  # by output of the source
    keep_embeddings: bool = False

    @property
    def sets(self) -> list[ResultSet]:
        """The sets that a finished recording has results in."""
        kept = self.embeddings.values() if self.keep_embeddings else ()
        return [*(target.results for target in self.targets), *kept]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a run computes, in words that another process understands."""

    bundles: tuple[str, ...]  # absolute paths, or URLs
    device: str
    precision: str
    runtime: str = "auto"
    check: Mode  # of the first answers
    query: Query
    keep_embeddings: bool = False

    @contextmanager
    def opened(self, threads: int | None = None) -> Iterator[list[Pass]]:
        """Open the bundles and plan their passes; errors as of `open_checked` and `plan_passes`.

        Args:
            threads: that infer at the same time; None: one for each core that may be used.
        """
        with ExitStack() as stack:
            engines = [
                stack.enter_context(
                    open_checked(
                        bundle,
                        self.device,
                        precision=self.precision,
                        threads=threads,
                        runtime=self.runtime,
                        mode=self.check,
                    )
                )
                for bundle in self.bundles
            ]
            yield plan_passes(engines, self.query, keep_embeddings=self.keep_embeddings)


def plan_passes(engines: Sequence[Engine], query: Query, *, keep_embeddings: bool = False) -> list[Pass]:
    """The fewest passes that run all bundles: one for each audio bundle.

    A bundle that takes embeddings runs in the pass of an audio bundle with the fingerprint that its heads read.

    Args:
        engines: the open bundles.
        query: the options that change scores.
        keep_embeddings: store the embeddings of the audio bundles as well.

    Raises:
        InputError: an overlap or hop that a bundle can't have, or nothing to compute.
        UnsupportedError: a bundle that takes embeddings which no other bundle here makes.
    """
    passes = [_plan_pass(engine, query) for engine in engines if engine.manifest.kind == "audio"]
    for reader in engines:
        if reader.manifest.kind == "embedding":
            _add_reader(reader, passes)
    for each in passes:
        each.keep_embeddings = keep_embeddings
        if not each.sets:
            raise InputError(
                f"bundle {each.source.manifest.name} has no probe, and no other bundle here reads its embeddings; "
                "add one that does, or --embeddings to store them"
            )
    names = [target.results.name for each in passes for target in each.targets]
    for target in (target for each in passes for target in each.targets):
        if names.count(target.results.name) > 1:
            raise InputError(
                f"several bundles make the scores of {target.results.bundle}: they are copies, or differ in their "
                "calibration only; name one of them"
            )
    return passes


def read_stored(reader: Engine, sets: Sequence[ResultSet]) -> list[Target]:
    """What a bundle can compute from stored embeddings; the sources are the names of their sets.

    Raises:
        UnsupportedError: the bundle takes audio, or no set holds what its heads read.
    """
    kept = [each for each in sets if each.kind == "embeddings"]
    targets = []
    for each in kept if reader.manifest.kind == "embedding" else []:
        heads = [head for head in reader.manifest.probes if head.input_fingerprint == each.identity["embedding"]]
        if heads:
            targets.append(_reading(reader, [(head, each.name, each) for head in heads]))
    if not targets:
        reads = ", ".join(f"{head.name} reads {head.input_fingerprint}" for head in reader.manifest.probes)
        have = ", ".join(each.identity["embedding"] for each in kept) or "none"
        raise UnsupportedError(
            f"bundle {reader.manifest.name} can't be computed from the store, which has the embeddings {have} "
            f"({reads}); export the probe with --offline, and run the audio bundle of its backbone with --embeddings"
        )
    return targets


def scoring_options(query: Query) -> dict[str, Any]:
    """The options that change scores."""
    return {"overlap": float(query.overlap), "final_clip": query.final_clip, "channel": query.channel}


def _plan_pass(engine: Engine, query: Query) -> Pass:
    planned = Pass(engine, with_overlap(query, engine.audio_spec))
    planned.embeddings = {info.output: _embedding_set(planned, info) for info in engine.manifest.embeddings}
    if heads := engine.manifest.probes:
        identity = {"bundle": engine.bundle.scores_digest, **_running(planned)}
        results = _score_set(engine, identity, _cut(planned), heads)
        planned.targets.append(Target(results, engine, {head.name: head.logits for head in heads}))
    return planned


def _add_reader(reader: Engine, passes: Sequence[Pass]) -> None:
    for each in passes:
        if found := links(each.source.manifest, reader.manifest):
            each.targets.append(
                _reading(reader, [(head, output, each.embeddings[output]) for head, output in found])
            )
            return
    raise UnsupportedError(
        f"bundle {reader.manifest.name} takes embeddings, and no other bundle here makes those that it reads; add "
        "the audio bundle of its backbone, or use classify on stored embeddings"
    )


def _reading(reader: Engine, heads: Sequence[tuple[ProbeInfo, str, ResultSet]]) -> Target:
    """Heads on embeddings, each with its source and the set of embeddings that it is or would be stored in."""
    identity = {
        "bundle": reader.bundle.scores_digest,
        "runs": reader.backend.format,
        "embeddings": {head.name: embeddings.name for head, _, embeddings in heads},
    }
    results = _score_set(reader, identity, heads[0][2].cut, [head for head, _, _ in heads])
    return Target(results, reader, {head.name: source for head, source, _ in heads})


def _score_set(engine: Engine, identity: dict[str, Any], cut: Cut, heads: Sequence[ProbeInfo]) -> ResultSet:
    probes = tuple(
        Probe(head.name, engine.labels(head.name), score_scale(head.activation), head.trained, head.calibration)
        for head in heads
    )
    manifest = engine.manifest
    return ResultSet(
        kind="scores", identity=identity, bundle=manifest.name, version=manifest.version, cut=cut, probes=probes
    )


def _embedding_set(planned: Pass, info: EmbeddingInfo) -> ResultSet:
    # Bundles with one fingerprint make the same embeddings. Without a fingerprint, only the bundle itself does.
    source = planned.source
    fingerprint = info.fingerprint or f"{source.bundle.scores_digest}:{info.output}"
    return ResultSet(
        kind="embeddings",
        identity={"embedding": fingerprint, **_running(planned)},
        bundle=source.manifest.name,
        version=source.manifest.version,
        cut=_cut(planned),
        shape=source.manifest.output(info.output).shape[1:],
    )


def _running(planned: Pass) -> dict[str, Any]:
    """What determines the numbers of a pass besides the bundle: the graph that runs, and the options."""
    return {"runs": planned.source.backend.format, **scoring_options(planned.query)}


def _cut(planned: Pass) -> Cut:
    spec = planned.source.audio_spec
    return Cut(spec.window_samples / spec.sample_rate, planned.query.overlap, spec.sample_rate / 2)
