"""The options of the command, and the probes that they name, each read once."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import avex_serve
from avex_export.passes import SUMMARIES
from avex_export.recipes import Recipe, find_recipe
from avex_serve.bundles.labels import read_label_file
from avex_serve.bundles.manifest import LABELS, NAME_PATTERN, Activation
from avex_serve.configs import ProbeConfig
from avex_serve.errors import ExportError, InputError, NotFoundError
from avex_serve.models.probes.storage import WEIGHTS, SavedProbe, backbone_of, read_labels, read_saved
from avex_serve.models.utils.load import find_entry
from avex_serve.models.utils.registry import ModelEntry

_DEMO_MODEL = "avex_demo"
_DEMO_PROBES = Path(avex_serve.__file__).parent / "demo" / "probes"

# Options (the first element) that contradict another one (the second), and the reason.
_CONFLICTS = (
    (
        ("offline", "labels", "activation"),
        "embeddings",
        "is for heads, which --embeddings leaves out; give one of them",
    ),
    (
        ("clip_seconds", "dynamic_length", "padding_mask", "verify_audio"),
        "offline",
        "is for audio; with --offline clients send embeddings",
    ),
    (
        ("profile", "explain", "without"),
        "offline",
        "is for passes, which a head alone doesn't have; leave out --offline",
    ),
    (("half",), "offline", "is for backbones, which --offline leaves out; give one of them"),
)


@dataclass(frozen=True)
class ExportRequest:
    """The options of ``avex-export``, a field each under the option's name; see its ``--help``.

    Raises:
        InputError: options that contradict each other.
    """

    probe: tuple[str, ...] = ("linear_last",)  # on one backbone
    embeddings: bool = False
    model: str | None = None  # None: that of the saved probes, else the demo model
    weights: Path | None = None
    labels: Path | None = None
    allow_untrained: bool = False
    name: str | None = None
    bundle_version: str = "1"
    output: Path | None = None
    format: tuple[str, ...] = ("onnx", "torchscript")
    activation: Activation | None = None  # None: that of the saved probe
    half: bool = False
    quantize: str | None = None
    calibration: Path | None = None
    clip_seconds: float | None = None
    dynamic_length: bool = False
    padding_mask: bool = False
    offline: bool = False
    input_dim: tuple[int, ...] | None = None  # (D,) or (T, D)
    verify_audio: tuple[Path, ...] = ()
    without: tuple[str, ...] = ()
    profile: bool = False
    explain: bool = False

    def __post_init__(self) -> None:
        """Raise InputError for options that contradict each other."""
        for options, other, why in _CONFLICTS:
            for option in options:
                if getattr(self, other) and getattr(self, option):
                    raise InputError(f"--{option.replace('_', '-')} {why}")
        if self.input_dim is not None and not self.offline:
            raise InputError("--input-dim is for --offline; an audio bundle has the shapes of its backbone")
        if len(self.probe) > 1 and self.offline:
            raise InputError("--offline exports one head; give one --probe, or export the heads one by one")
        if len(self.probe) > 1 and self.weights is not None:
            raise InputError("--weights is for one probe; save each probe with save_probe() and give its folder")
        for option, given in {"name": self.name, "bundle-version": self.bundle_version}.items():
            if given is not None and not re.fullmatch(NAME_PATTERN, given):
                raise InputError(f"--{option} {given!r}: expected letters, digits, '.', '_' and '-', at most 128")
        if self.calibration is not None and self.quantize is None:
            raise InputError("--calibration is for --quantize int8; add it")
        if self.half and "torchscript" not in self.format:
            raise InputError(f"--half is for TorchScript, which --format {' '.join(self.format)} leaves out; add it")
        if self.dynamic_length and "pt2" in self.format:
            raise InputError(
                "--dynamic-length is for ONNX and TorchScript: a PT2 program has fixed lengths; leave it out"
            )
        for name in self.without:
            if name not in SUMMARIES:
                close = difflib.get_close_matches(name, SUMMARIES, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise InputError(f"--without {name}: no such pass; {hint}there are {', '.join(SUMMARIES)}")


@dataclass(frozen=True)
class ProbeSource:
    """A probe to export, from its configuration and its files."""

    name: str
    config: ProbeConfig
    labels: tuple[str, ...]
    activation: Activation | None  # None: unknown
    weights: Path | None  # of the head; None: random ones
    saved: SavedProbe | None  # the content of probe.yml, if the weights are a saved probe's
    model: str  # name of the backbone, or "unknown"
    backbone: ModelEntry | None  # None: unknown, for a head alone

    @property
    def fine_tuned(self) -> bool:
        """Whether its weights include a backbone that was trained together with the head."""
        return self.saved is not None and not self.config.freeze_backbone


def read_probes(request: ExportRequest) -> tuple[ProbeSource, ...]:
    """The probes of a request, all on one backbone.

    Raises:
        ExportError: weights, labels or the backbone are missing, don't fit, or differ between the probes.
        InputError: a probe or a file of labels that can't be read or used.
        NotFoundError: a file that doesn't exist.
    """
    asked = None if request.model is None else _find_model(request.model)
    recipes = [_recipe(name) for name in request.probe]
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--probe: two are called {twice[0]}; rename the folder or the file of one")
    any_saved = len(recipes) > 1 and any(recipe.saved is not None for recipe in recipes)
    if request.labels is not None and any_saved:
        raise InputError(
            "--labels would name the classes of every probe, and saved ones have their own; write the others with "
            "save_probe() and their labels too"
        )
    sources: list[ProbeSource] = []
    for recipe in recipes:
        try:
            sources.append(_read_probe(request, recipe, asked, any_saved))
        except (ValueError, FileNotFoundError) as error:  # of the saved probe
            raise InputError(f"--probe {recipe.name}: {error}") from error
    for source in sources[1:]:
        if source.model != sources[0].model:
            raise ExportError(
                f"{sources[0].name} belongs to the backbone {sources[0].model}, {source.name} to {source.model}; a "
                "bundle has one backbone: export them one by one"
            )
    return tuple(sources)


def bundle_name(request: ExportRequest, sources: Sequence[ProbeSource]) -> str:
    """The name of the bundle: the requested one, else the probe's, else one made from the backbone's."""
    if request.name is not None:
        return request.name
    if request.embeddings:
        return f"{sources[0].model}-embeddings"
    return sources[0].name if len(sources) == 1 else f"{sources[0].model}-probes"


def _recipe(probe: str) -> Recipe:
    try:
        recipe = find_recipe(probe)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"--probe {probe}: {error}") from error
    if not re.fullmatch(NAME_PATTERN, recipe.name):
        raise InputError(
            f"--probe {probe}: {recipe.name!r} can't be a name in URLs; rename it to letters, digits, '.', '_', '-'"
        )
    return recipe


def _read_probe(
    request: ExportRequest, recipe: Recipe, asked: tuple[str, ModelEntry] | None, any_saved: bool
) -> ProbeSource:
    """One probe; `asked` is the backbone of ``--model``, `any_saved` whether it is exported with saved probes."""
    path = _find_weights(request, recipe)
    saved = None
    if path is not None and path.is_dir():
        saved = recipe.saved if path == recipe.folder else read_saved(path)
        assert saved is not None
        if saved.probe_config.probe_type != recipe.config.probe_type:
            raise ExportError(
                f"{path} holds a {saved.probe_config.probe_type} probe, {recipe.name} is a "
                f"{recipe.config.probe_type} probe; export the folder itself (--probe FOLDER)"
            )
    if request.embeddings:
        labels: tuple[str, ...] | None = ("",)  # the head is not exported, so its number of classes doesn't matter
    elif request.labels is not None:
        labels = _label_file(request.labels)
    elif path is not None:
        labels = read_labels(path, saved.num_classes) if saved is not None else None
    else:  # a random head for the demo model gets the labels of the demo's probes
        demo = request.model in (None, _DEMO_MODEL)
        labels = read_label_file(_DEMO_PROBES / "linear_last" / LABELS) if demo else None
    if labels is None:
        raise ExportError(
            f"no labels for {recipe.name}, and --labels doesn't apply together with saved probes; write it with "
            "save_probe() and its labels and give that folder, or export it by itself"
            if any_saved
            else "no labels: give --labels FILE, such as text with one label on each line, in the order of the "
            "logits"
        )
    if not request.embeddings and saved is not None and len(labels) != saved.num_classes:
        raise ExportError(
            f"--labels {request.labels} has {len(labels)} labels, the probe {recipe.name} has {saved.num_classes} "
            "classes"
        )
    activation = request.activation or (None if saved is None else saved.activation)
    model, backbone = asked or _backbone(request, saved)
    weights = path if saved is None or path is None else path / WEIGHTS
    return ProbeSource(recipe.name, recipe.config, labels, activation, weights, saved, model, backbone)


def _find_weights(request: ExportRequest, recipe: Recipe) -> Path | None:
    """The file or folder with the head's weights, or None for random ones."""
    if request.weights is not None:
        if not request.weights.exists():
            raise NotFoundError(f"--weights {request.weights}: no such file or folder")
        return request.weights
    if recipe.folder is not None:
        return recipe.folder
    if request.allow_untrained:
        return None
    demo = _DEMO_PROBES / recipe.name
    if request.model in (None, _DEMO_MODEL) and demo.is_dir():
        return demo
    if request.embeddings:
        return None
    raise ExportError(
        f"no trained weights for {recipe.name} on {request.model or _DEMO_MODEL}. Train the probe and write it with "
        "save_probe(), then export that folder (--probe FOLDER); or give the head's state dict (--weights "
        "FILE.safetensors, with --labels and --activation); or try the export with random weights "
        "(--allow-untrained)"
    )


def _label_file(path: Path) -> tuple[str, ...]:
    try:
        return read_label_file(path)
    except (InputError, NotFoundError) as error:
        raise type(error)(f"--labels {error}") from None


def _backbone(request: ExportRequest, saved: SavedProbe | None) -> tuple[str, ModelEntry | None]:
    """Without ``--model``: the backbone of the saved probe, else the demo model."""
    if saved is not None and (known := backbone_of(saved)) is not None:
        return known
    if request.offline:  # the head may be for the embeddings of any backbone
        return "unknown", None
    if saved is not None:
        raise ExportError(
            "the saved probe doesn't name its backbone; give --model, or --offline to serve embeddings"
        )
    return _find_model(_DEMO_MODEL)


def _find_model(name: str) -> tuple[str, ModelEntry]:
    try:
        return Path(name).stem if name.endswith((".yml", ".yaml")) else name, find_entry(name)
    except (ValueError, FileNotFoundError) as error:
        raise NotFoundError(f"--model {name}: {error}") from error
