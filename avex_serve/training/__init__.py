"""From labelled recordings to a probe with a report; serving never imports this package.

The names are loaded on first use; those that need torch are `fit_probe`, `fit_windows`, `train` and what they take.
docs/training.md has a table of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from avex_serve.training.compare import Comparison, compare_reports
    from avex_serve.training.dataset import Dataset, Recording, read_dataset
    from avex_serve.training.embed import Windows, run_windows
    from avex_serve.training.evaluate import EvaluationRequest, evaluate_bundle
    from avex_serve.training.fit import FitRequest, Fitted, check_data, fit_probe, fit_windows
    from avex_serve.training.heads import Task, Trained, train
    from avex_serve.training.metrics import auroc, average_precision, calibration_error, estimate
    from avex_serve.training.report import Evaluation, Predictions
    from avex_serve.training.scores import Scores, read_scores
    from avex_serve.training.split import Split, folds, near_duplicates

__all__ = [
    "Comparison",
    "Dataset",
    "Evaluation",
    "EvaluationRequest",
    "FitRequest",
    "Fitted",
    "Predictions",
    "Recording",
    "Scores",
    "Split",
    "Task",
    "Trained",
    "Windows",
    "auroc",
    "average_precision",
    "calibration_error",
    "check_data",
    "compare_reports",
    "estimate",
    "evaluate_bundle",
    "fit_probe",
    "fit_windows",
    "folds",
    "near_duplicates",
    "read_dataset",
    "read_scores",
    "run_windows",
    "train",
]

_MODULES: Final = {
    "compare": ("Comparison", "compare_reports"),
    "dataset": ("Dataset", "Recording", "read_dataset"),
    "embed": ("Windows", "run_windows"),
    "evaluate": ("EvaluationRequest", "evaluate_bundle"),
    "fit": ("FitRequest", "Fitted", "check_data", "fit_probe", "fit_windows"),
    "heads": ("Task", "Trained", "train"),
    "metrics": ("auroc", "average_precision", "calibration_error", "estimate"),
    "report": ("Evaluation", "Predictions"),
    "scores": ("Scores", "read_scores"),
    "split": ("Split", "folds", "near_duplicates"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
