"""The OpenAPI document passes what other programs read it with."""

import base64
import json
import shutil
import subprocess
from collections import Counter

import jsonschema
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


def test_answers_are_as_described(audio_server, document, wav):
    """Those whose form depends on the request, and where the names of the models are."""

    def check(answer, name):
        jsonschema.validate(answer.json(), {"$ref": f"#/components/schemas/{name}", **document})
        return answer.json()

    (model,) = check(audio_server.get("/"), "Home")["models"]
    tensor = {"name": "waveform", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(wav).decode()]}
    output = {"name": "scores", "parameters": {"classification": 1}}
    asked = {"inputs": [tensor], "outputs": [output], "parameters": {"overlap": 0, "channel": "mix"}}
    jsonschema.validate(asked, {"$ref": "#/components/schemas/InferRequest", **document})
    for body in (asked, {"inputs": [tensor]}):
        check(audio_server.post(f"/v2/models/{model['name']}/infer", json=body), "InferResponse")


def schemas(part):
    """All objects in a part of the document."""
    if isinstance(part, dict):
        yield part
    for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from schemas(each)


def test_generators_of_clients_understand_it(document):
    """What openapi-python-client takes for a file, and what stops it."""
    found = list(schemas(document))
    binary = [each for each in found if each.get("contentMediaType") == "application/octet-stream"]
    assert binary
    assert all(each["format"] == "binary" for each in binary)
    assert not [each for each in found if each.get("items") is False]
    assert next(iter(document["paths"]["/"]["get"]["responses"]["200"]["content"])) == "application/json"


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
