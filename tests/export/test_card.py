"""The model card: the metadata that the Hugging Face Hub reads, and text of the user's that stays text."""

import re

import msgspec
import pytest
import yaml
from huggingface_hub import ModelCard

from avex_export.card import model_card
from avex_serve.bundles.manifest import EvaluationInfo
from avex_serve.bundles.reading import read_manifest
from avex_serve.evidence.cases import read_evidence
from avex_serve.service.settings import DEMO_BUNDLE

HOSTILE = "bat\n\n---\nlicense: mit\n---\n# x | y\n```\n<script>`` [a](b) **b** |"


@pytest.fixture(scope="module")
def card():
    """Render the card of the demo bundle with other fields of its manifest, other labels or other names of cases."""
    bundle = read_manifest(DEMO_BUNDLE)
    record, _ = read_evidence(bundle)

    def render(labels=None, case=None, **changes):
        other = bundle._replace(
            manifest=msgspec.structs.replace(bundle.manifest, **changes),
            labels=bundle.labels if labels is None else {"linear_last": labels},
        )
        checks = [msgspec.structs.replace(check, input=case or check.input) for check in record.checks]
        embeddings = {"embedding": "aggregated by mean"}
        return model_card(other, msgspec.structs.replace(record, checks=tuple(checks)), embeddings)

    return render


def metadata(text):
    _, front_matter, _ = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front_matter)


def test_the_demo_bundle_has_the_card_that_the_exporter_writes(card):
    assert (DEMO_BUNDLE / "README.md").read_text("utf-8") == card()


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", {"license": "mit"}),
        ("CC-BY-NC-SA-4.0, see https://huggingface.co/owner/model", {"license": "cc-by-nc-sa-4.0"}),
        ("unknown", {"license": "unknown"}),
        (
            "My Licence 2.0, see https://example.org/licence",
            {
                "license": "other",
                "license_name": "my-licence-2.0",
                "license_link": "https://example.org/licence",
            },
        ),
        ("MIT but not for bats", {"license": "other", "license_name": "mit-but-not-for-bats"}),
        ("", {"license": "other", "license_name": "other"}),
        ("夜鶯", {"license": "other", "license_name": "other"}),
    ],
)
def test_the_hub_reads_the_licence(card, licence, expected):
    found = metadata(card(licence=licence))
    assert {name: value for name, value in found.items() if name.startswith("license")} == expected


def test_the_hub_reads_what_the_bundle_is(card):
    known = {"library_name": "avex-serve", "tags": ["avex", "bioacoustics", "audio", "onnx"], "license": "mit"}
    checkpoint = "hf://EarthSpeciesProject/esp-aves2-sl-beats-all/model.safetensors@0123"
    assert metadata(card(checkpoint=checkpoint)) == {
        **known,
        "pipeline_tag": "audio-classification",
        "base_model": "EarthSpeciesProject/esp-aves2-sl-beats-all",
        "labels": list(read_manifest(DEMO_BUNDLE).labels["linear_last"]),
    }
    assert metadata(card(probes=(), checkpoint="weights.pt")) == {**known, "pipeline_tag": "feature-extraction"}


def test_the_hub_reads_the_evaluation(card):
    (probe,) = read_manifest(DEMO_BUNDLE).manifest.probes
    evaluation = EvaluationInfo(
        average_precision=0.87654, interval=(0.8, 0.93), windows=120, recordings=12, split="hold-out"
    )
    found = ModelCard(card(probes=(msgspec.structs.replace(probe, evaluation=evaluation),))).data
    assert found.metrics == ["average_precision"]
    assert found.model_name == "linear_last"
    (result,) = found.eval_results
    assert (result.task_type, result.task_name) == ("audio-classification", "linear_last")
    assert result.dataset_name == "120 windows of 12 recordings that did not train it (hold-out)"
    assert (result.metric_type, result.metric_value) == ("average_precision", 0.8765)
    assert result.metric_name == "mean average precision over labels, 95 % interval 0.80 to 0.93"


def without_code(text):
    """The card without code blocks and code spans, as CommonMark finds them."""
    text = re.sub(r"^(`{3,})[^`\n]*\n.*?^\1`*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": (HOSTILE, *"abcdefghi")},
        {"labels": ("1. one", "- two", "a & b", "``", *"abcdef")},
        {"licence": HOSTILE},
        {"model": HOSTILE},
        {"case": HOSTILE},
    ],
    ids=["labels", "odd labels", "licence", "model", "file name"],
)
def test_text_of_the_user_stays_text(card, changes):
    text, usual = card(**changes), card()
    labels = list(changes.get("labels", metadata(usual)["labels"]))
    if "licence" not in changes:
        assert metadata(text) == metadata(usual) | {"labels": labels}
    else:
        assert metadata(text)["license"] == "other"
    ModelCard(text)  # the hub's own reading of it
    _, _, text = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    outside = without_code(text)
    for part in ("<script>", "[a](b)", "**b**", "# x", "1. one", "- two", "license: mit\n---\n# x", "| y"):
        assert part not in outside
    headings = re.findall(r"^#.*$", without_code(usual), re.MULTILINE)
    assert re.findall(r"^#.*$", outside, re.MULTILINE) == headings


def test_softmax_scores_name_a_label_everywhere(card):
    (probe,) = read_manifest(DEMO_BUNDLE).manifest.probes
    sentence = "So a window without any of these sounds gets a label too"
    assert sentence in card(probes=(msgspec.structs.replace(probe, activation="softmax"),))
    assert sentence not in card()


def test_many_labels_are_left_to_their_file(card):
    text = card(labels=tuple(f"label {i}" for i in range(101)))
    assert "The first 100 of 101; `labels.json` has all: label 0, label 1," in text
    assert "label 100" not in text
