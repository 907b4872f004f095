"""The probes that ``--probe`` can name, and the text of ``--list``."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from avex_export.architectures import names
from avex_serve.bundles.manifest import PROBE
from avex_serve.configs import ProbeConfig
from avex_serve.errors import NotFoundError, quoted
from avex_serve.models.files import find_local
from avex_serve.models.probes import load_probe_config
from avex_serve.models.probes.storage import SavedProbe, read_saved
from avex_serve.models.utils.registry import get_entry, list_models

_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A probe by name: its configuration, and its folder if it was saved."""

    name: str
    config: ProbeConfig
    folder: Path | None = None
    saved: SavedProbe | None = None  # the content of the folder's probe.yml


def variants() -> dict[str, str]:
    """The ten named variants, each with a description of one line."""
    lines = {path.stem: path.read_text("utf-8").splitlines()[0] for path in sorted(_FOLDER.glob("*.yml"))}
    return {name: line.removeprefix("# ") for name, line in lines.items()}


def find_recipe(probe: str) -> Recipe:
    """The probe of that name.

    Args:
        probe: a variant such as ``linear_last``, the path of a YAML file, or a folder written by save_probe.

    Raises:
        NotFoundError: none of these.
        ValueError: a YAML file or folder that describes no probe.
    """
    path = Path(probe)
    if probe in variants():
        return Recipe(probe, load_probe_config(_FOLDER / f"{probe}.yml"))
    if path.is_dir() and (path / PROBE).is_file():
        saved = read_saved(path)
        return Recipe(path.resolve().name, saved.probe_config, path, saved)
    if path.is_file():
        if path.suffix.lower() not in (".yml", ".yaml"):
            raise ValueError(
                "this file is no YAML. If it holds the weights of a head, name its recipe too: --probe linear_last "
                f"--weights {quoted(path)}, with --labels and --activation"
            )
        return Recipe(path.stem, load_probe_config(path))
    close = difflib.get_close_matches(probe, variants(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise NotFoundError(
        f"no probe {probe!r}: {hint}expected one of {', '.join(variants())}, a YAML file, or a folder written by "
        "save_probe()"
    )


# -- the text of --list -------------------------------------------------------------------------------------------

_FORMATS = [
    ["onnx", "every probe on every backbone", "served on CPUs by onnxruntime"],
    ["torchscript", "every probe on every backbone", "served by torch on CUDA, and on CPUs without an ONNX graph"],
    ["  --half", names(lambda each: each.network), "TorchScript in float16, half the size"],
    ["pt2", "every probe on every backbone", "not served: for compilation by torch (AOTInductor)"],
    [
        "onnx --quantize int8",
        names(lambda each: each.blocks),
        "a second ONNX graph in int8, a third of the size, tested on other clips",
    ],
    ["--dynamic-length", "BEATs, EfficientNet, your own", "ONNX and TorchScript for clips of any length"],
    ["--padding-mask", "BEATs, EAT excluding padding", "a second input, true where a clip is padded"],
]
_NEEDED = (
    "A head needs weights: a folder written by save_probe(), or --weights with --labels and --activation. The\n"
    "ten variants have weights for the demo model; --allow-untrained exports the others with random ones."
)


def listing() -> str:
    """The variants, the registered backbones with the state of their weights, and the formats."""
    return "\n\n".join(
        [
            _table("probes (--probe), or a YAML file, or a folder written by save_probe():", _probes()),
            _table("backbones (--model), or a YAML file:", _backbones()),
            _table("formats (--format; default: onnx and torchscript):", _FORMATS),
            _NEEDED,
        ]
    )


def _probes() -> list[list[str]]:
    rows = []
    for name, line in variants().items():
        config = find_recipe(name).config
        layers = "all layers" if "all" in config.target_layers else "one layer"
        steps = "as sequences" if config.aggregation == "none" else config.aggregation
        rows.append([name, f"{layers}, {steps}", line])
    return rows


def _backbones() -> list[list[str]]:
    rows = []
    for name in list_models():
        entry = get_entry(name)
        assert entry is not None
        audio = entry.spec.audio_config
        clips = "" if audio is None else f"{audio.target_length_seconds or '?'} s at {audio.sample_rate} Hz"
        rows.append([name, entry.spec.name, clips, _weights(entry.checkpoint_path)])
    return rows


def _weights(uri: str | None) -> str:
    if uri is None:
        return "random weights"
    if find_local(uri) is not None:
        return "weights are on this machine"
    return "weights are downloaded" if "://" in uri else f"weights are missing: {uri}"


def _table(title: str, rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([title, *(line.rstrip() for line in lines)])
