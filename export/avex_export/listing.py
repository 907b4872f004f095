"""What can be exported: probes, backbones and formats, and what each needs."""

from avex_export.recipes import find_recipe, variants
from avex_serve.configs import ProbeConfig
from avex_serve.models.files import find_local
from avex_serve.models.utils.registry import get_entry, list_models


def listing() -> str:
    """The variants, the registered backbones with what is missing of them, and which formats go with which."""
    return "\n\n".join(
        [
            _table("probes (--probe), or a YAML file, or a folder written by save_probe():", _probes()),
            _table("backbones (--model), or a YAML file:", _backbones()),
            _table("formats (--format, by default the first two):", _FORMATS),
            _NEEDED,
        ]
    )


_FORMATS = [
    ["onnx", "every probe on every backbone", "served on CPUs by onnxruntime"],
    ["torchscript", "every probe on every backbone", "served on CUDA, and on CPUs where there is no ONNX, by torch"],
    ["  --half", "BEATs, EAT, EfficientNet", "TorchScript in float16, half the size"],
    ["pt2", "every probe on every backbone", "not served: to be compiled ahead of time by torch (AOTInductor)"],
    [
        "onnx --quantize int8",
        "BEATs, EAT",
        "a second ONNX graph in int8, a third of the size, gated on held-out clips",
    ],
    ["--dynamic-length", "BEATs, EfficientNet, your own", "ONNX and TorchScript for clips of any length"],
    ["--padding-mask", "BEATs, EAT excluding padding", "a second input, true where a clip is padded"],
]
_NEEDED = (
    "A head needs weights: a folder written by save_probe(), or --weights with --labels; the ten variants have\n"
    "weights for the demo model, and --allow-untrained tries the others with random ones."
)


def _probes() -> list[list[str]]:
    return [[name, _reads(find_recipe(name).config), line] for name, line in variants().items()]


def _reads(config: ProbeConfig) -> str:
    layers = "all layers" if "all" in config.target_layers else "one layer"
    return f"{layers}, {'as sequences' if config.aggregation == 'none' else config.aggregation}"


def _backbones() -> list[list[str]]:
    rows = []
    for name in list_models():
        entry = get_entry(name)
        assert entry is not None
        audio = entry.spec.audio_config
        hears = "" if audio is None else f"{audio.target_length_seconds or '?'} s at {audio.sample_rate} Hz"
        rows.append([name, entry.spec.name, hears, _weights(entry.checkpoint_path)])
    return rows


def _weights(uri: str | None) -> str:
    if uri is None:
        return "random weights"
    if find_local(uri) is not None:
        return "weights are here"
    return "weights are downloaded" if "://" in uri else f"weights are missing: {uri}"


def _table(title: str, rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([title, *(line.rstrip() for line in lines)])
