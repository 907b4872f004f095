"""The model card: the README.md of a bundle, with the front matter that the Hugging Face Hub reads.

Labels, file names, names of models and licences are the user's text. The template passes them through the filters
below, so that none of them can add a heading, a link or a field.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from msgspec.structs import replace

from avex_export.int8 import agreement_text
from avex_serve.bundles.manifest import ProbeInfo
from avex_serve.bundles.reading import Bundle
from avex_serve.configs import ProbeConfig
from avex_serve.evidence.cases import Record
from avex_serve.evidence.verify import table

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_KINDS = {
    "linear": "a linear",
    "mlp": "an MLP",
    "lstm": "an LSTM",
    "attention": "an attention",
    "transformer": "a transformer",
}
# What the Hub accepts as `license`, besides "other": https://huggingface.co/docs/hub/repositories-licenses
_HUB_LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research
isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl
ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib
"""
_METRIC = "average_precision"
_SHOWN = 100  # labels
# Text in which no character has a meaning in Markdown or HTML.
_PLAIN = re.compile(r"[^\W\d_][\w .,:/+()'-]*")


def model_card(bundle: Bundle, record: Record, embeddings: Mapping[str, str]) -> str:
    """Markdown: what the bundle is, how to serve and call it, and how closely its formats agree.

    Args:
        bundle: its manifest and labels; the manifest may lack the list of files.
        record: of the verification.
        embeddings: how each embedding is computed, by output; used for a bundle without heads.
    """
    manifest, audio = bundle.manifest, bundle.manifest.audio
    formats = {check.format for check in record.checks}
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
    )
    environment.filters |= {"code": _code, "text": _text, "fenced": _fenced}
    return environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        front_matter=yaml.safe_dump(_front_matter(bundle, formats), sort_keys=False, allow_unicode=True),
        manifest=manifest,
        audio=audio,
        heads=[_head(bundle, probe) for probe in manifest.probes],
        shown=_SHOWN,
        embeddings=embeddings,
        seconds=lambda samples: f"{samples / (1 if audio is None else audio.sample_rate):g}",
        served=formats != {"pt2"},
        formats=formats,
        example=lambda spec: tuple(2 if size == -1 else size for size in spec.shape),
        table=table(record.checks, record.skipped, full=formats == {"pt2"}),
        machine=record.machine.lines(),
        agreement=None if manifest.quantisation is None else agreement_text(manifest.quantisation.agreement),
    )


def _head(bundle: Bundle, probe: ProbeInfo) -> dict[str, Any]:
    config = ProbeConfig.model_validate(probe.config)
    of_output = {info.output: info.layers for info in bundle.manifest.embeddings}
    layers = config.target_layers if probe.embedding is None else of_output[probe.embedding]
    return {
        "info": probe,
        "kind": _KINDS[config.probe_type],
        "layers": [str(layer) for layer in layers],
        "labels": bundle.labels[probe.name],
        "worth": _worth(probe),
        "scale": "logits" if probe.activation == "none" else f"{probe.activation} scores",
        "activation_layer": None if probe.activation == "none" else json.dumps(probe.activation),
    }


def _worth(probe: ProbeInfo) -> list[str]:
    """Sentences about evaluation, calibration and training recordings, if there are any."""
    sentences = []
    if (found := probe.evaluation) is not None:
        interval = f" ({found.interval[0]:.2f} to {found.interval[1]:.2f})" if found.interval is not None else ""
        sentences.append(
            f"On {found.windows} windows of {found.recordings} recordings that did not train it "
            f"({_text(found.split)}), its mean average precision over labels is "
            f"{found.average_precision:.2f}{interval}."
        )
    if (calibration := probe.calibration) is not None:
        sentences.append(replace(calibration, source=_text(calibration.source)).describe())
    if probe.trained_on is not None:
        sentences.append(f"`{probe.trained_on}` has the SHA-256 of each recording that trained it.")
    return sentences


def _front_matter(bundle: Bundle, formats: set[str]) -> dict[str, Any]:
    """Fields of the Hub's model-card metadata, https://github.com/huggingface/hub-docs/blob/main/modelcard.md.

    The Hub knows no field for labels, and shows one that it doesn't know.
    """
    manifest = bundle.manifest
    labels = list(dict.fromkeys(label for probe in manifest.probes for label in bundle.labels[probe.name]))
    results = [_result(probe) for probe in manifest.probes if probe.evaluation is not None]
    source = re.match(r"hf://([^/@]+/[^/@]+)", manifest.checkpoint or "")
    return {
        **_licence(manifest.licence),
        "library_name": "avex-serve",
        "pipeline_tag": "audio-classification" if manifest.probes else "feature-extraction",
        "tags": ["avex", "bioacoustics", "audio", *sorted(formats & {"onnx", "torchscript"})],
        **({} if source is None else {"base_model": source[1]}),
        **({"labels": labels[:_SHOWN]} if labels else {}),
        **({"metrics": [_METRIC], "model-index": [{"name": manifest.name, "results": results}]} if results else {}),
    }


def _result(probe: ProbeInfo) -> dict[str, Any]:
    """The evaluation of a head, as the Hub's leaderboards read it."""
    found = probe.evaluation
    assert found is not None
    interval = (
        "" if found.interval is None else f", 95 % interval {found.interval[0]:.2f} to {found.interval[1]:.2f}"
    )
    return {
        "task": {"type": "audio-classification", "name": probe.name},
        "dataset": {
            "type": "recordings",
            "name": f"{found.windows} windows of {found.recordings} recordings that did not train it "
            f"({found.split})",
        },
        "metrics": [
            {
                "type": _METRIC,
                "name": f"mean average precision over labels{interval}",
                "value": round(found.average_precision, 4),
            }
        ],
    }


def _licence(licence: str) -> dict[str, str]:
    """The Hub's fields for a licence such as ``CC-BY-NC-SA-4.0, see https://…``."""
    known = licence.partition(",")[0].strip().lower()
    if known in _HUB_LICENCES.split():
        return {"license": known}
    link = re.search(r"https?://\S+", licence)
    name = re.sub(r"[^a-z0-9.]+", "-", known).strip("-.")
    return {
        "license": "other",
        "license_name": name or "other",
        **({} if link is None else {"license_link": link[0]}),
    }


def _text(value: str) -> str:
    """The text itself if it has no meaning in Markdown, else a code span."""
    return value if _PLAIN.fullmatch(value) else _code(value)


def _code(value: str) -> str:
    """A code span, in one line, which shows any text unchanged."""
    line = "".join(character if character.isprintable() else "�" for character in " ".join(value.split()))
    ticks = "`" * (_longest_run(line) + 1)
    space = " " if not line or "`" in (line[0], line[-1]) else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def _fenced(value: str) -> str:
    """A code block that no text can end."""
    fence = "`" * max(3, _longest_run(value) + 1)
    return f"{fence}\n{value}\n{fence}"


def _longest_run(value: str) -> int:
    return max(map(len, re.findall("`+", value)), default=0)
