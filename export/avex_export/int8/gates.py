"""Gates: whether the int8 graph answers enough like float32 to be shipped."""

import math

import numpy as np

from avex_export.progress import bar
from avex_serve.bundles.manifest import Activation, Agreement, Manifest
from avex_serve.errors import ExportError
from avex_serve.inference.backend import Backend

# Means over the held-out clips. The centred cosine is the hard one: a transformer's embeddings share most of their
# length, and clips differ in the rest only.
COSINE = 0.999
CENTRED_COSINE = 0.99
DECISIONS = 0.98
# Embeddings are equal if their distances to the mean are at most this part of its length, the precision of float32.
_SAME = 1e-5


def text(agreement: Agreement) -> str:
    """The figures with their gates, as text."""
    decisions = ""
    if agreement.decisions is not None:
        decisions = f", same decisions {agreement.decisions:.1%} (gate {DECISIONS:.0%})"
    return (
        f"int8 against float32 on {agreement.clips} clips held out: cosine {agreement.cosine:.4f} (gate {COSINE}), "
        f"centred cosine {agreement.centred_cosine:.4f} (gate {CENTRED_COSINE}), lowest of a clip "
        f"{agreement.lowest_centred_cosine:.4f}{decisions}"
    )


def check(agreement: Agreement) -> None:
    """Raise ExportError with the figures unless all gates are passed."""
    decisions = 1.0 if agreement.decisions is None else agreement.decisions
    figures = agreement.cosine, agreement.centred_cosine, decisions
    gates = COSINE, CENTRED_COSINE, DECISIONS
    # In this form NaN fails.
    if not all(figure >= gate for figure, gate in zip(figures, gates, strict=True)):
        raise ExportError(
            f"{text(agreement)}: this model can't be served in int8. Calibrate on recordings like those that you "
            "will run it on (--calibration DIR), or export without --quantize; nothing was written"
        )


def compare(exact: Backend, rounded: Backend, clips: np.ndarray, manifest: Manifest) -> Agreement:
    """Run both graphs on clips (M, S), one by one as the service does; the worst output counts.

    Raises:
        ExportError: all clips have the same embedding in float32.
    """
    runs = [(exact.run(clip[None]), rounded.run(clip[None])) for clip in bar(list(clips), "compare")]
    expected, found = (
        {name: np.concatenate([run[name] for run in answers]).astype(np.float64) for name in answers[0]}
        for answers in zip(*runs, strict=True)
    )
    cosines, centred = [], []
    for info in manifest.embeddings:
        embeddings = [outputs[info.output].reshape(len(clips), -1) for outputs in (expected, found)]
        mean = embeddings[0].mean(axis=0)
        if np.linalg.norm(embeddings[0] - mean, axis=1).max() <= _SAME * np.linalg.norm(mean):
            raise ExportError(
                f"all {len(clips)} clips held out have the same embedding, so they can't show whether int8 keeps "
                "clips apart. Calibrate on recordings that differ (--calibration DIR); nothing was written"
            )
        cosines.append(_cosines(*embeddings))
        centred.append(_cosines(*(embedding - mean for embedding in embeddings)))
    decided = [
        np.mean(_decisions(expected[p.logits], p.activation) == _decisions(found[p.logits], p.activation))
        for p in manifest.probes
    ]
    return Agreement(
        clips=len(clips),
        cosine=float(np.mean(cosines, axis=1).min()),
        centred_cosine=float(np.mean(centred, axis=1).min()),
        lowest_centred_cosine=float(np.min(centred)),
        decisions=float(min(decided)) if decided else None,
    )


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.where(norms > 0, (first * second).sum(axis=1) / np.maximum(norms, math.ulp(0.0)), 0.0)


def _decisions(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """The best label of each clip, or whether each label is detected: a score of 0.5, a logit of 0."""
    return logits.argmax(axis=-1) if activation == "softmax" else logits >= 0
