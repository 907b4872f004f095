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

from avex_serve.audio.windows import plan_windows
from avex_serve.bundles.manifest import MANIFEST
from avex_serve.bundles.sealing import atomic_directory
from avex_serve.calibration.fit import TARGET
from avex_serve.calibration.scales import Calibration
from avex_serve.configs import ProbeConfig
from avex_serve.errors import AvexServeError, DependencyError, InputError, NotFoundError
from avex_serve.inference.backend import open_bundle
from avex_serve.models.base_model import ModelBase
from avex_serve.models.checkpoints import fingerprint
from avex_serve.models.probes import build_probe_from_config, load_probe_config, save_probe
from avex_serve.models.probes.base import Probe
from avex_serve.models.probes.storage import PROBE, load_head
from avex_serve.models.utils.load import find_entry, load_model
from avex_serve.training import report
from avex_serve.training.dataset import MIN_OVERLAP, Dataset, read_dataset, together
from avex_serve.training.embed import Windows, run_windows
from avex_serve.training.heads import Task, Trained, train
from avex_serve.training.noise import noise_logits
from avex_serve.training.report import Evaluation, Predictions
from avex_serve.training.split import Split, near_duplicates, split

Say = Callable[[str], None]
_PATIENCE: Final = 30.0  # seconds for the exporter to end


@dataclass(frozen=True)
class FitRequest:
    """The options of ``avex-serve fit``; see its ``--help``."""

    data: Path
    output: Path
    model: str = "avex_demo"
    probe: str = "linear_last"
    seed: int = 0
    negatives: tuple[str, ...] = ()
    fully_annotated: bool = False
    group_by: str | None = None
    label_column: str | None = None
    overlap: float = 0.0  # seconds
    min_overlap: float = MIN_OVERLAP  # seconds
    target_precision: float = TARGET
    cache: Path = Path("~/.cache/avex-serve")


def check(request: FitRequest) -> str:
    """What `fit` would train on: windows and recordings of each label in each part, and what is wrong.

    Recordings are opened for their length and content; nothing is embedded.

    Raises:
        AvexServeError: as of `fit`.
    """
    dataset = _dataset(request)
    windows = _planned(request, dataset)
    parts = _split(windows, request.seed)
    lines = [
        f"{len(dataset.recordings)} recordings, {len(windows.targets)} windows with labels, "
        f"{np.unique(windows.groups).size} groups; evaluation: {parts.how}"
    ]
    columns = {"all": np.ones(len(windows.targets), bool)}
    if not parts.trains_on_all:
        columns |= {"train": parts.parts[0][0], "test": parts.parts[0][1]}
    lines.append(f"{'':24}" + "".join(f"{f'{name}: windows/recordings/groups':>40}" for name in columns))
    for i, label in enumerate(dataset.labels):
        lines.append(f"{label[:24]:24}" + "".join(f"{_counted(windows, i, rows):>40}" for rows in columns.values()))
    without = ~(windows.targets == 1).any(axis=1)
    lines.append(f"{'(none of them)':24}{int(without.sum()):>24} windows")
    return "\n".join([*lines, *(f"problem: {problem}" for problem in dataset.problems)])


def fit(request: FitRequest, say: Say = print) -> Evaluation:
    """Train a head, evaluate it on recordings that chose nothing of it, and save it with its report.

    The folder ``request.output`` is a saved probe with ``calibration.json``, ``evaluation.json`` and
    ``evaluation.csv``, written whole or not at all.

    Args:
        request: what to do.
        say: is called with the progress.

    Raises:
        InputError: data, options or a probe that can't be used.
        NotFoundError: no such data, model or probe.
        DependencyError: the exporter is missing.
        AvexServeError: the embeddings bundle can't be made.
    """
    config = probe_config(request.probe)
    output = request.output
    if output.exists() and not (output.is_dir() and ((output / PROBE).is_file() or not any(output.iterdir()))):
        raise InputError(f"--output {output} exists and holds no {PROBE}: not replaced; choose another folder")
    dataset = _dataset(request)
    base = _load(request.model)
    cache = request.cache.expanduser()
    bundle = embeddings_bundle(config, request.model, base, cache / "bundles", say)
    with (
        open_bundle(bundle, "cpu", precision="float32") as engine,
        tempfile.TemporaryDirectory(prefix="avex-fit-") as scratch,
    ):
        outputs = [info.output for info in engine.manifest.embeddings]
        windows, lost = run_windows(
            engine,
            outputs,
            dataset,
            cache / "embeddings",
            Path(scratch),
            overlap=request.overlap,
            min_overlap=request.min_overlap,
            say=say,
        )
        windows, copies = _keep_copies_together(windows)
        parts = _split(windows, request.seed)
        task = Task(config, dataset.labels, windows.outputs, windows.targets, windows.groups)
        say(f"train on {len(windows.targets)} windows of {len(windows.recordings)} recordings: {parts.how}")
        predictions, heads, known = [], [], windows.targets.copy()
        for rows, held in parts.parts:
            # A label without a recording to train with can't be evaluated there.
            known[np.ix_(held, ~(windows.targets[rows] == 1).any(axis=0))] = -1
            trained = train(task, rows, request.seed, request.target_precision)
            left = np.flatnonzero(held)
            predictions.append(Predictions.of(left, trained.logits(task, left), trained.calibration))
            heads.append(trained)
        if parts.trains_on_all:
            trained = train(task, np.ones(len(windows.targets), bool), request.seed, request.target_precision)
        else:
            (trained,) = heads
        windows = replace(windows, targets=known)
        logits = noise_logits(engine, outputs, _head(task, trained), cache / "embeddings")
    evaluation = report.report(
        windows,
        dataset.labels,
        predictions,
        model=Path(request.model).stem if request.model.endswith((".yml", ".yaml")) else request.model,
        probe=Path(request.probe).stem,
        chosen=trained.chosen,
        evaluated=parts.how,
        calibration=trained.calibration,
        noise=logits,
        problems=[*dataset.problems, *lost, *copies],
        seed=request.seed,
    )
    probe = build_probe_from_config(config, len(dataset.labels), "cpu", base_model=base)
    load_head(probe, trained.state, "the trained head")
    _write(request, probe, trained.calibration, evaluation, dataset.labels)
    return evaluation


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


def _dataset(request: FitRequest) -> Dataset:
    return read_dataset(
        request.data,
        negatives=request.negatives,
        fully_annotated=request.fully_annotated,
        group_by=request.group_by,
        label_column=request.label_column,
    )


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


def _counted(windows: Windows, label: int, rows: np.ndarray) -> str:
    has = (windows.targets[:, label] == 1) & rows
    recordings, groups = np.unique(windows.recording[has]).size, np.unique(windows.groups[has]).size
    return f"{int(has.sum())} / {recordings} / {groups}"


def _keep_copies_together(windows: Windows) -> tuple[Windows, list[str]]:
    """The windows with near-duplicate recordings in one group, and a sentence for each pair."""
    found = near_duplicates(windows.outputs[0], windows.recording)
    recordings = windows.recordings
    sentences, pairs = [], []
    for copies in found:
        one, other = (recordings[i] for i in copies.recordings)
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


def _head(task: Task, trained: Trained) -> Callable[[list[np.ndarray]], np.ndarray]:
    """From the inputs of the head (N, ...) to its logits (N, C)."""

    def logits(inputs: list[np.ndarray]) -> np.ndarray:
        return trained.logits(replace(task, embeddings=inputs), np.arange(len(inputs[0])))

    return logits


def _write(
    request: FitRequest, probe: Probe, calibration: Calibration, evaluation: Evaluation, labels: Sequence[str]
) -> None:
    try:
        with atomic_directory(request.output, marker=PROBE) as folder:
            save_probe(probe, folder, labels=labels, model=request.model, activation="sigmoid")
            calibration.write(folder)
            evaluation.write(folder)
    except FileExistsError as error:
        raise InputError(f"--output {error}") from error
