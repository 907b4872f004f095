"""From labelled recordings to a saved probe with its report; see docs/decisions/training.md."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np
import yaml

from avex_serve.archive.store import Store
from avex_serve.audio.windows import plan_windows
from avex_serve.bundles.manifest import MANIFEST, PROBE, TRAINED_ON
from avex_serve.bundles.trained import write_trained_on
from avex_serve.calibration.fit import TARGET
from avex_serve.configs import ProbeConfig
from avex_serve.errors import AvexServeError, DependencyError, InputError, NotFoundError
from avex_serve.evidence.first import open_checked
from avex_serve.models.base_model import ModelBase
from avex_serve.models.checkpoints import fingerprint
from avex_serve.models.probes import build_probe_from_config, load_probe_config, save_probe
from avex_serve.models.probes.storage import load_head
from avex_serve.models.utils.load import find_entry, load_model
from avex_serve.training import report
from avex_serve.training.copies import MOST, find_copies
from avex_serve.training.dataset import Dataset, LabelOptions, together
from avex_serve.training.embed import Windows, known_outputs, run_windows
from avex_serve.training.files import can_make_page, write_report
from avex_serve.training.heads import Task, Trained, train
from avex_serve.training.noise import noise_logits
from avex_serve.training.report import Evaluation, Predictions
from avex_serve.training.split import Split, near_duplicates, split
from avex_serve.writing import new_folder

Say = Callable[[str], None]
_WITHOUT: Final = "add recordings without the sound, such as a folder noise, or decisions that are absent"
_PATIENCE: Final = 30.0  # seconds for the exporter to end


@dataclass(frozen=True)
class FitRequest(LabelOptions):
    """The options of ``avex-serve fit``; see its ``--help``."""

    data: Path | tuple[Path, ...]  # several are joined
    output: Path | None = None  # `check_data` needs none
    model: str = "avex_demo"
    probe: str = "linear_last"
    seed: int = 0
    overlap: float = 0.0  # seconds
    target_precision: float = TARGET
    cache: Path = Path("~/.cache/avex-serve")
    store: Path | None = None  # of a run, whose embeddings are used


def check_data(request: FitRequest) -> str:
    """What `fit_probe` would train on: windows, recordings and groups of each label in each part, and what is wrong.

    Recordings are opened for their length and content, and those of one length are compared; nothing is embedded.

    Raises:
        AvexServeError: as of `fit_probe`.
    """
    _check_options(request)
    dataset = request.read(request.data)
    windows = _planned(request, dataset)
    parts = _split(windows, request.seed)
    lines = [
        f"{len(dataset.recordings)} recordings, {len(windows.targets)} windows with labels, "
        f"{np.unique(windows.groups).size} groups; evaluation: {parts.how}"
    ]
    columns = {"all": np.ones(len(windows.targets), bool)}
    if parts.trains_on_all:
        columns |= {f"fold {i}": held for i, (_, held) in enumerate(parts.parts, 1)}
    else:
        columns |= {"train": parts.parts[0][0], "test": parts.parts[0][1]}
    lines.append("windows/recordings/groups")
    lines.append(f"{'':24}" + "".join(f"{name:>16}" for name in columns))
    for i, label in enumerate(dataset.labels):
        has = windows.targets[:, i] == 1
        lines.append(
            f"{label[:24]:24}" + "".join(f"{_counted(windows, has & rows):>16}" for rows in columns.values())
        )
    without = ~(windows.targets == 1).any(axis=1)
    lines.append(
        f"{'(none of them)':24}" + "".join(f"{_counted(windows, without & r):>16}" for r in columns.values())
    )
    problems = [*dataset.problems, *_empty_parts(dataset, windows, parts), *_sound_copies(windows, parts)]
    return "\n".join([*lines, *(f"problem: {problem}" for problem in problems)])


def fit_probe(request: FitRequest, say: Say = print) -> Evaluation:
    """Train a head, evaluate it on recordings that chose nothing of it, and save it with its report.

    The folder ``request.output`` is a saved probe with ``calibration.json``, ``trained_on.txt`` and the files of
    `write_report`, written whole or not at all.

    Args:
        request: what to do.
        say: is called with the progress.

    Raises:
        InputError: data, options or a probe that can't be used.
        NotFoundError: no such data, model or probe.
        DependencyError: the exporter is missing.
        UnsupportedError: `store` has no embeddings that the probe reads.
        AvexServeError: the embeddings bundle can't be made, or answers otherwise than its evidence.
    """
    config = _check_options(request)
    output = request.output
    if output is None:
        raise InputError("--output is missing: the folder to write the probe and its report to")
    page = can_make_page(say)
    dataset = request.read(request.data)
    base = _load(request.model)
    cache = request.cache.expanduser()
    bundle = embeddings_bundle(config, request.model, base, cache / "bundles", say)
    with (
        open_checked(bundle, "cpu", precision="float32") as engine,
        tempfile.TemporaryDirectory(prefix="avex-fit-") as scratch,
    ):
        outputs = [info.output for info in engine.manifest.embeddings]
        store = None if request.store is None else Store(request.store)
        known = None if store is None else known_outputs(store, engine, outputs, request.overlap)
        windows, lost = run_windows(
            engine,
            outputs,
            dataset,
            cache / "embeddings",
            Path(scratch),
            overlap=request.overlap,
            min_overlap=request.min_overlap,
            known=known,
            say=say,
        )
        fitted = fit_windows(config, dataset.labels, windows, request.seed, request.target_precision, say)
        noise = noise_logits(engine, outputs, fitted.noise_logits, cache / "embeddings")
    evaluation = report.report(
        fitted.windows,
        dataset.labels,
        fitted.predictions,
        model=Path(request.model).stem if request.model.endswith((".yml", ".yaml")) else request.model,
        probe=Path(request.probe).stem,
        chosen=fitted.head.chosen,
        evaluated=fitted.how,
        calibration=fitted.head.calibration,
        noise=noise,
        problems=[*dataset.problems, *lost, *fitted.problems],
        seed=request.seed,
    )
    probe = build_probe_from_config(config, len(dataset.labels), "cpu", base_model=base)
    load_head(probe, fitted.head.state, "the trained head")
    with new_folder(output, PROBE) as folder:
        save_probe(probe, folder, labels=dataset.labels, model=request.model, activation="sigmoid")
        fitted.head.calibration.write(folder)
        write_trained_on(fitted.trained_on, folder / TRAINED_ON)
        write_report(folder, evaluation, fitted.windows, fitted.predictions, page=page)
    return evaluation


@dataclass(frozen=True)
class Fitted:
    """A head that was trained on windows, and what it says about windows that chose nothing of it."""

    task: Task
    head: Trained
    how: str  # see `Split`
    windows: Windows  # with the targets that can be evaluated
    predictions: list[Predictions]  # for parts of the windows; none: nothing could be evaluated
    trained_on: frozenset[str]  # SHA-256 of each recording that trained the head
    problems: list[str]

    def noise_logits(self, inputs: list[np.ndarray]) -> np.ndarray:
        """From the inputs of the head (N, ...) to its logits (N, C)."""
        return self.head.logits(replace(self.task, embeddings=inputs), np.arange(len(inputs[0])))


def fit_windows(
    config: ProbeConfig,
    labels: Sequence[str],
    windows: Windows,
    seed: int,
    target_precision: float = TARGET,
    say: Say = print,
) -> Fitted:
    """Train a head on embedded windows, and others on parts of them for its evaluation.

    Args:
        config: of the probe.
        labels: C names.
        windows: with the inputs of the head as outputs.
        seed: of all random choices.
        target_precision: of the thresholds.
        say: is called with the progress.

    Raises:
        InputError: no label has windows with it and windows without it.
    """
    if not ((windows.targets == 1).any(axis=0) & (windows.targets == 0).any(axis=0)).any():
        raise InputError(f"no label has both windows with it and windows without it; {_WITHOUT}")
    windows, copies = _keep_copies_together(windows)
    parts = _split(windows, seed)
    task = Task(config, tuple(labels), windows.outputs, windows.targets, windows.groups)
    say(f"train on {len(windows.targets)} windows of {len(windows.recordings)} recordings: {parts.how}")
    predictions, heads, known = [], [], windows.targets.copy()
    for rows, held in parts.parts:
        # A label without a recording to train with can't be evaluated there.
        known[np.ix_(held, ~(windows.targets[rows] == 1).any(axis=0))] = -1
        trained = train(task, rows, seed, target_precision)
        left = np.flatnonzero(held)
        predictions.append(Predictions.of(left, trained.logits(task, left), trained.calibration))
        heads.append(trained)
        if len(parts.parts) > 1:
            say(f"evaluated {len(heads)} of {len(parts.parts)} folds")
    rows = np.ones(len(windows.targets), bool) if parts.trains_on_all else parts.parts[0][0]
    head = train(task, rows, seed, target_precision) if parts.trains_on_all else heads[0]
    digests = frozenset(windows.recordings[i].digest for i in np.unique(windows.recording[rows]))
    return Fitted(task, head, parts.how, replace(windows, targets=known), predictions, digests, copies)


def probe_config(name: str) -> ProbeConfig:
    """The configuration of a probe: a variant such as ``linear_last``, or a YAML file.

    Raises:
        NotFoundError: neither of these.
        InputError: a file that describes no probe, or a probe whose backbone is trained too.
    """
    path = Path(name)
    if not path.is_file():
        path = _recipes() / f"{name}.yml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in _recipes().glob("*.yml")))
        raise NotFoundError(f"no probe {name!r}; expected one of {known}, or a YAML file")
    try:
        config = load_probe_config(path)
    except ValueError as error:
        raise InputError(f"--probe {name}: {error}") from error
    if not config.freeze_backbone:
        raise InputError(f"--probe {name}: fit trains heads on a frozen backbone; set freeze_backbone: true")
    return config


def embeddings_bundle(config: ProbeConfig, model: str, base: ModelBase, folder: Path, say: Say = print) -> Path:
    """A bundle whose outputs are the inputs of a probe's head, exported once for a backbone and its layers.

    Layers that a head merges by trained weights are outputs of their own.

    Args:
        config: of the probe.
        model: the backbone, a registered name or a YAML file.
        base: the same, loaded.
        folder: where such bundles are kept.
        say: is called before an export.

    Raises:
        DependencyError: the exporter is missing.
        AvexServeError: the export failed.
    """
    layers = base.resolve_layers(config.target_layers)
    options = config.model_dump(exclude_unset=True, mode="json")
    each = [[layer] for layer in layers] if config.aggregation == "none" else [layers]
    configs = [{**options, "target_layers": tapped} for tapped in each]
    key = sha256(json.dumps([fingerprint(base), configs]).encode()).hexdigest()[:32]
    bundle = folder / key
    if (bundle / MANIFEST).is_file():
        return bundle
    say(f"export the embeddings of {model} (once for these layers)")
    with tempfile.TemporaryDirectory(prefix="avex-fit-") as scratch:
        command = ["--embeddings", "--model", model, "--format", "onnx", "--output", str(bundle)]
        for i, fields in enumerate(configs):
            path = Path(scratch) / f"layer_{i:03}.yml"
            path.write_text(yaml.safe_dump(fields), "utf-8")
            command += ["--probe", str(path)]
        run_exporter(command)
    return bundle


def run_exporter(arguments: Sequence[str]) -> str:
    """Run ``avex-export`` as a process of its own, which ends with this call; its output.

    Raises:
        AvexServeError: it fails.
    """
    _recipes()
    command = [sys.executable, "-m", "avex_export", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as exporter:
        try:
            output, errors = exporter.communicate()
        except BaseException:  # Ctrl-C or SIGTERM: it removes what it has not finished
            exporter.terminate()
            try:
                exporter.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                exporter.kill()
            raise
    if exporter.returncode:
        raise AvexServeError(f"the export failed: {(errors.strip() or output.strip())[-2000:]}")
    return output


def _recipes() -> Path:
    """The folder of the exporter's named variants; the library never imports the exporter."""
    found = importlib.util.find_spec("avex_export")
    if found is None or found.origin is None:
        raise DependencyError("fit needs the exporter, which is not installed; pip install 'avex-serve[export]'")
    return Path(found.origin).parent / "recipes"


# -- parts of a fit -----------------------------------------------------------------------------------------------


def _check_options(request: FitRequest) -> ProbeConfig:
    """The configuration of the probe; InputError also for an output that can't be replaced."""
    config = probe_config(request.probe)
    output = request.output
    if (
        output is not None
        and output.exists()
        and not (output.is_dir() and ((output / PROBE).is_file() or not any(output.iterdir())))
    ):
        raise InputError(f"--output {output} exists and holds no {PROBE}: not replaced; choose another folder")
    return config


def _load(model: str) -> ModelBase:
    try:
        return load_model(model, return_features_only=True)
    except (FileNotFoundError, ValueError) as error:
        raise NotFoundError(f"--model {model}: {error}") from error


def _planned(request: FitRequest, dataset: Dataset) -> Windows:
    """The windows with a known label as headers promise them, without outputs."""
    try:
        audio = find_entry(request.model).spec.audio_config
    except (FileNotFoundError, ValueError) as error:
        raise NotFoundError(f"--model {request.model}: {error}") from error
    if audio is None or audio.target_length_seconds is None:
        base = _load(request.model)
        assert base.audio_config is not None
        rate, length = base.audio_config.sample_rate, base.clip_samples
    else:
        rate, length = audio.sample_rate, audio.sample_rate * audio.target_length_seconds
    if not dataset.recordings:
        raise InputError("; ".join(("no recording can be read", *dataset.problems)))
    targets, spans, member = [], [], []
    for i, recording in enumerate(dataset.recordings):
        total = max(1, round(recording.seconds * rate))
        span = plan_windows(total, length, rate, request.overlap).spans
        found = dataset.targets(recording, span, request.min_overlap)
        kept = (found >= 0).any(axis=1)
        targets.append(found[kept])
        spans.append(span[kept])
        member.append(np.full(int(kept.sum()), i))
    return Windows([], np.concatenate(targets), np.concatenate(spans), np.concatenate(member), dataset.recordings)


def _split(windows: Windows, seed: int) -> Split:
    return split(windows.targets, windows.groups, windows.splits, seed)


def _counted(windows: Windows, rows: np.ndarray) -> str:
    recordings, groups = np.unique(windows.recording[rows]).size, np.unique(windows.groups[rows]).size
    return f"{int(rows.sum())}/{recordings}/{groups}"


def _empty_parts(dataset: Dataset, windows: Windows, parts: Split) -> list[str]:
    """A sentence for each label that can't be trained or evaluated."""
    found = []
    for i, label in enumerate(dataset.labels):
        has = windows.targets[:, i] == 1
        if not has.any():
            found.append(f"{label}: no window shares enough with an annotation; see --min-overlap")
        elif not (windows.targets[:, i] == 0).any():
            found.append(f"{label}: no window is without it, so nothing can be learned; {_WITHOUT}")
        elif not parts.trains_on_all:
            train, test = parts.parts[0]
            found += [
                f"{label}: no window to {what} with"
                for what, rows in (("train", train), ("test", test))
                if not (has & rows).any()
            ]
    return found


def _sound_copies(windows: Windows, parts: Split) -> list[str]:
    """A sentence for each pair of recordings across the split that sound the same."""
    part = np.full(len(windows.recordings), -1)
    for i, (_, held) in enumerate(parts.parts):
        part[np.unique(windows.recording[held])] = i
    used = np.unique(windows.recording)  # others have no window
    recordings = [windows.recordings[i] for i in used]
    copies = find_copies(recordings, part[used].tolist())
    if copies is None:
        return [
            f"near-duplicates were not looked for in more than {MOST} recordings of one length; fit looks for them"
        ]
    return [
        f"near-duplicates across the split: {recordings[copy.first].name} and {recordings[copy.second].name} sound "
        f"the same (correlation {copy.correlation:.2f}); if these are copies, remove one or put both into one group"
        for copy in copies
    ]


def _keep_copies_together(windows: Windows) -> tuple[Windows, list[str]]:
    """The windows with near-duplicate recordings in one group, and a sentence for each pair."""
    found = near_duplicates(windows.outputs[0], windows.recording)
    recordings = windows.recordings
    sentences, pairs = [], []
    for copies in found:
        one, other = (recordings[i] for i in copies.recordings)
        if one.digest == other.digest:  # which reading the data has reported
            continue
        starts = windows.spans[list(copies.windows), 0]
        then = "in the other split, so the figures are too good; remove one"
        if one.split == other.split:
            then = "they stay together"
            pairs.append((one.group, other.group))
        sentences.append(
            f"{one.name} is a near-duplicate of {other.name} (cosine {copies.cosine:.4f} at {starts[0]:.1f} and "
            f"{starts[1]:.1f} s); {then}"
        )
    return replace(windows, recordings=together(recordings, pairs)), sentences
