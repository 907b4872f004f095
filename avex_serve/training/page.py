"""``report.html``: the figures of `evaluation.json` for people, as one page with charts, pictures and sounds.

Needs no torch, but the extra `plot`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from avex_serve.audio.reader import open_audio
from avex_serve.errors import AvexServeError
from avex_serve.seeing import clips, page, pictures
from avex_serve.training.noise import MOST_PER_HOUR
from avex_serve.training.report import HOW, NOTHING, Evaluation, LabelFigures, alarms, leaks

PAGE: Final = "report.html"
TEMPLATE: Final = Path(__file__).with_name("report.html.j2")
MOST_CHARTS: Final = 60  # labels, about 8 kB each: those with the lowest average precision
MOST_MISTAKES: Final = 15  # about 50 kB each
MOST_COLUMNS: Final = 20  # labels of a confusion that is shown as a table
MOST_CONFUSED: Final = 50  # pairs of labels of a larger one
_COLUMNS: Final = {
    "average precision": "average_precision",
    "AUROC": "auroc",
    "precision": "precision",
    "recall": "recall",
    "F1": "f1",
    "precision at threshold": "precision_at_threshold",
    "recall at threshold": "recall_at_threshold",
    "calibration error": "calibration_error",
}


def make_page(evaluation: Evaluation, recordings: Mapping[str, Path]) -> str:
    """The page of a report.

    Args:
        evaluation: the report.
        recordings: where the recordings are, by their names in the report.
    """
    return page.render(
        TEMPLATE,
        title=f"{evaluation.probe} on {evaluation.model}",
        headline=_headline(evaluation),
        how=f"Evaluated on {HOW.get(evaluation.evaluated, evaluation.evaluated)}; intervals are 95 % over groups.",
        leaks=leaks(evaluation),
        alarms=alarms(evaluation),
        most=f"{MOST_PER_HOUR:g}",
        noise=_noise(evaluation),
        columns=list(_COLUMNS),
        rows=[_row(name, figures) for name, figures in evaluation.labels.items()],
        mean=None if evaluation.macro is None else [str(getattr(evaluation.macro, f)) for f in _COLUMNS.values()],
        charts=_charts(evaluation),
        confusion=_confusion(evaluation),
        mistakes=[_mistake(each, recordings) for each in evaluation.worst[:MOST_MISTAKES]],
        problems=evaluation.problems,
        about=_about(evaluation),
    )


def _headline(evaluation: Evaluation) -> dict[str, str]:
    found = {}
    if evaluation.macro is not None:
        found = {
            "mean average precision": str(evaluation.macro.average_precision),
            "mean AUROC": str(evaluation.macro.auroc),
        }
    counts = {
        "labels": len(evaluation.labels),
        "windows": evaluation.windows,
        "recordings": evaluation.recordings,
        "groups": evaluation.groups,
    }
    return found | {name: str(count) for name, count in counts.items()}


def _noise(evaluation: Evaluation) -> list[dict[str, str]]:
    return [
        {
            "kind": kind,
            "seconds": f"{noise.seconds:.0f}",
            "labels": ", ".join(f"{label} {rate:.0f}" for label, rate in noise.per_hour.items()) or "none",
        }
        for kind, noise in evaluation.noise.items()
    ]


def _row(name: str, figures: LabelFigures) -> dict[str, Any]:
    return {
        "label": name,
        "windows": figures.average_precision.windows,
        "without": figures.windows_without,
        "recordings": figures.average_precision.recordings,
        "threshold": "–" if figures.threshold_score is None else f"{figures.threshold_score:.3f}",
        "figures": [str(getattr(figures, field)) for field in _COLUMNS.values()],
        "warning": figures.warning,
    }


def _charts(evaluation: Evaluation) -> dict[str, Any]:
    """Curves of the labels that have any, and how many more there are."""
    drawn = {name: figures for name, figures in evaluation.labels.items() if figures.precision_recall}
    chosen = sorted(drawn, key=lambda name: drawn[name].average_precision.value or 0.0)[:MOST_CHARTS]
    shown = [
        {"label": name, "caption": _caption(figures), "picture": _chart(figures)}
        for name, figures in drawn.items()
        if name in chosen
    ]
    return {"shown": shown, "more": len(drawn) - len(shown)}


def _chart(figures: LabelFigures) -> str:
    point = figures.precision_at_threshold.value, figures.recall_at_threshold.value
    picture = pictures.draw_curves(
        [(precision, recall) for _, precision, recall in figures.precision_recall],
        None if point[0] is None or point[1] is None else (point[0], point[1]),
        [(each["probability"], each["share"]) for each in figures.reliability],
    )
    return clips.data_uri("image/webp", picture)


def _caption(figures: LabelFigures) -> str:
    text = f"average precision {figures.average_precision!s}"
    if figures.calibration_error.value is not None:
        text += f", calibration error {figures.calibration_error!s}"
    return text


def _confusion(evaluation: Evaluation) -> dict[str, Any]:
    """The counts as a table, or the most frequent pairs if there are many labels."""
    names = [*evaluation.labels, NOTHING]
    counts = evaluation.confusion
    used = [each for each in names if each in counts or any(each in row for row in counts.values())]
    if len(used) <= MOST_COLUMNS:
        rows = [(true, [counts.get(true, {}).get(named, 0) for named in used]) for true in used if true in counts]
        return {"columns": used, "rows": rows, "pairs": []}
    pairs = [(true, named, n) for true, row in counts.items() for named, n in row.items() if true != named]
    pairs.sort(key=lambda pair: -pair[2])
    return {"columns": [], "rows": [], "pairs": pairs[:MOST_CONFUSED]}


def _mistake(mistake: Any, recordings: Mapping[str, Path]) -> dict[str, Any]:
    """A mistake with picture and sound, or the reason why there are none."""
    what = "missed" if mistake.kind == "missed" else "detected without the sound"
    shown = {
        "label": mistake.label,
        "caption": f"{mistake.label} {what}, score {mistake.score:.3f}, {mistake.start:.1f} to {mistake.end:.1f} s",
        "file": mistake.file,
        "reason": None,
    }
    path = recordings[mistake.file]
    try:
        with open_audio(path) as stream:
            frames = stream.frames
        return shown | page.illustrate(path, mistake.start, mistake.end, frames)
    except (OSError, AvexServeError) as error:
        return shown | {"reason": f"The recording can't be read: {error}"}


def _about(evaluation: Evaluation) -> dict[str, str]:
    rows = {"probe": evaluation.probe, "model": evaluation.model}
    rows |= {f"chosen: {name}": f"{value:g}" for name, value in evaluation.chosen.items()}
    if evaluation.target_precision is not None:
        rows["target precision of thresholds"] = f"{evaluation.target_precision:g}"
    return rows
