"""Scores of recordings as pandas data frames, in OpenSoundscape's shape or as a row for each detection."""

import os
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from avex_serve.audio.reader import Channel, open_audio
from avex_serve.audio.windows import FinalClip, hop_samples
from avex_serve.errors import DependencyError, InputError, NotFoundError
from avex_serve.inference import pipeline
from avex_serve.inference.backend import open_bundle
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import Query
from avex_serve.inference.results import calibrated, detect
from avex_serve.inference.scores import Threshold, activate

if TYPE_CHECKING:
    import pandas


def predict(
    files: Iterable[str | os.PathLike[str]],
    bundle: Engine | str | os.PathLike[str],
    *,
    form: Literal["windows", "detections"] = "windows",
    overlap: float = 0.0,
    final_clip: FinalClip = "remainder",
    channel: Channel = "mix",
    probe: str | None = None,
    threshold: Threshold = None,
    top_k: int | None = None,
) -> "pandas.DataFrame":
    """Score recordings.

    A file that can't be read is left out, with a warning. `frame.attrs["failed"]` has the reasons by file.

    Args:
        files: paths of recordings.
        bundle: an open bundle, or the path of one.
        form: ``windows``, OpenSoundscape's shape: a row for each window, indexed by file, start_time and end_time in
            seconds, and a column of scores for each label. ``detections``: a row for each label that passes, with
            the columns file, start_time, end_time, label and score, and probability if the head is calibrated.
        overlap: of neighbouring windows, in seconds.
        final_clip: what happens to an end shorter than a window; see `avex_serve.audio.windows`.
        channel: which channel to process, from 1; "mix": the mean of all.
        probe: name of the head to run; the bundle's first one by default.
        threshold: lowest score of a detection, or a mapping from labels to it.
        top_k: most detections of a window; see `avex_serve.inference.scores.Selection` for the defaults.

    Raises:
        DependencyError: pandas is not installed.
        InputError: another form, threshold, top_k or overlap that can't be used.
        NotFoundError: no such probe, or a threshold for a label that it doesn't have.
    """
    try:
        import pandas
    except ModuleNotFoundError:
        raise DependencyError("predict answers with a pandas data frame; pip install pandas") from None
    if form not in ("windows", "detections"):
        raise InputError(f"form {form!r}; expected windows or detections")
    failed: dict[str, str] = {}
    with nullcontext(bundle) if isinstance(bundle, Engine) else open_bundle(bundle) as engine:
        head = engine.probe(probe)
        labels = engine.labels(head.name)
        selection = pipeline.select(engine, head, threshold, top_k)
        calibrator = engine.calibrator(head.name)
        shown = ["label", "score"] if calibrator is None else ["label", "score", "probability"]
        spec = engine.audio_spec
        hop_samples(spec.window_samples, spec.sample_rate, overlap)  # raises for an overlap that can't be
        query = Query(overlap=overlap, final_clip=final_clip, channel=channel)
        parts: list[Any] = []
        for file in (str(Path(each)) for each in files):
            try:
                audio = partial(open_audio, Path(file))
                spans, outputs = pipeline.run_recording(engine, audio, query, [head.logits])
            except (InputError, NotFoundError) as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
                failed[file] = str(error)
                continue
            scores = activate(outputs[head.logits], head.activation)
            if form == "detections":
                each = calibrated(detect(spans, scores, labels, selection), calibrator)
                parts += [(file, one.start, one.end, *(getattr(one, name) for name in shown)) for one in each]
            else:
                parts.append((file, spans, scores))
    names = ["file", "start_time", "end_time"]
    if form == "detections":
        frame = pandas.DataFrame(parts, columns=[*names, *shown])
    else:
        index = [(file, start, end) for file, spans, _ in parts for start, end in spans.tolist()]
        rows = [scores for _, _, scores in parts] or [np.empty((0, len(labels)), np.float32)]
        frame = pandas.DataFrame(
            np.concatenate(rows), index=pandas.MultiIndex.from_tuples(index, names=names), columns=list(labels)
        )
    frame.attrs["failed"] = failed
    return frame
