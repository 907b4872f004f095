"""The OpenAPI document passes what other programs read it with."""

import json
import shutil
import subprocess
from collections import Counter

import pytest

from avex_serve.service.front import HEALTH


@pytest.fixture(scope="module")
def document(audio_server):
    return audio_server.get("/docs.json").json()


def operations(document):
    return [(path, each) for path, methods in document["paths"].items() for each in methods.values()]


def test_operations_have_names(document):
    names = Counter(each["operationId"] for _, each in operations(document))
    assert set(names.values()) == {1}
    assert {"postPredict", "getV2ModelsByNameReady", "getHome", "getDocsJson"} <= set(names)


def test_keys_are_described(document):
    (name,) = document["components"]["securitySchemes"]
    assert document["components"]["securitySchemes"][name]["scheme"] == "bearer"
    assert {name: []} in document["security"]
    assert {path for path, each in operations(document) if each.get("security") == []} == HEALTH & set(
        document["paths"]
    )


def test_it_is_valid(document):
    validator = pytest.importorskip("openapi_spec_validator", reason="pip install openapi-spec-validator")
    validator.validate(document)


def test_redocly_finds_nothing(document, tmp_path):
    """By its default rules."""
    npx = shutil.which("npx")
    redocly = [npx, "--no-install", "@redocly/cli"]
    if npx is None or subprocess.run([*redocly, "--version"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("redocly is not installed: npm install --global @redocly/cli")
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document))
    done = subprocess.run([*redocly, "lint", path.name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower().replace("deprecation warning", "")
