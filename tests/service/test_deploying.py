"""What is shipped: the bento, its Dockerfile and the manifests; without Docker or a cluster."""

import contextlib
import http.server
import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import venv
from pathlib import Path

import httpx
import kubernetes_validate
import numpy as np
import pytest
import tritonclient.grpc
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from avex_serve.service.settings import Settings
from tests.bundles import make_audio_bundle
from tests.service.conftest import BENTOML, free_ports, server_environment, stop

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
KUBERNETES = ("1.29", "1.33", "1.37")  # an old one, one between, a new one
START_SECONDS = 120


@pytest.fixture(scope="module", params=["bentofile.yaml", "bentofile.cuda.yaml"])
def any_bento(request, tmp_path_factory):
    """The folder of a built bento, and the file it was built from."""
    home = tmp_path_factory.mktemp("home")
    return build(home, ROOT, request.param), request.param


def build(home, context, file="bentofile.yaml"):
    done = subprocess.run(
        [str(BENTOML), "build", "--bentofile", file, "--output", "tag", str(context)],
        env=server_environment(home),
        cwd=context,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name, version = done.stdout.strip().splitlines()[-1].removeprefix("__tag__:").split(":")
    return home / "bentos" / name / version


def instructions(dockerfile):
    """(instruction, rest) of each line, continued lines joined."""
    lines = dockerfile.replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip() and not line.startswith("#")]


def test_dockerfile(any_bento):
    bento, _ = any_bento
    steps = instructions((bento / "env" / "docker" / "Dockerfile").read_text())
    users = [rest for name, rest in steps if name == "USER"]
    assert users[-1].isdecimal()
    assert int(users[-1]) != 0
    assert {rest for name, rest in steps if name == "EXPOSE"} == {"3000", "3001"}
    assert Settings.model_fields["grpc_port"].default == 3001
    assert ("ENV", "BENTOML_DO_NOT_TRACK=True") in steps
    assert ("ENV", "ORT_DISABLE_TELEMETRY=1") in steps
    # No layer of the image has a compiler, and uv doesn't look for one.
    assert not any("apt-get" in rest or "build-essential" in rest for _, rest in steps)
    assert steps.index(("ENV", "UV_NO_BUILD=1")) < min(
        index for index, (_, rest) in enumerate(steps) if "install.sh" in rest
    )
    (entrypoint,) = [json.loads(rest) for name, rest in steps if name == "ENTRYPOINT"]
    script = (bento / "env" / "docker" / Path(entrypoint[0]).name).read_text()
    assert "exec bentoml" in script  # so that SIGTERM reaches it
    # Packages are installed when the image is built, and never when it starts.
    installs = [index for index, (name, rest) in enumerate(steps) if name == "RUN" and "pip install" in rest]
    assert max(installs) < [name for name, _ in steps].index("ENTRYPOINT")
    assert "pip " not in script
    assert "uv " not in script


@pytest.mark.parametrize("status", [200, 503])
def test_healthcheck(any_bento, status, httpserver_of):
    bento, _ = any_bento
    steps = instructions((bento / "env" / "docker" / "Dockerfile").read_text())
    (check,) = [rest for name, rest in steps if name == "HEALTHCHECK"]
    command = json.loads(check.partition("CMD")[2])
    port, asked = httpserver_of(status)
    done = subprocess.run(
        [sys.executable, *command[1:]], env={**os.environ, "BENTOML_PORT": str(port)}, capture_output=True
    )
    assert (done.returncode == 0) == (status == 200)
    assert asked == ["/readyz"]


@pytest.fixture
def httpserver_of():
    """Starts a server that answers everything with a status; returns its port and the paths that it was asked."""
    with contextlib.ExitStack() as stack:

        def start(status):
            asked = []

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    asked.append(self.path)
                    self.send_response(status)
                    self.end_headers()

                def log_message(self, *_):
                    pass

            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server.server_port, asked

        yield start


def pins(path):
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def test_bento_of_cuda_differs_by_torch():
    plain, cuda = (yaml.safe_load((ROOT / file).read_text()) for file in ("bentofile.yaml", "bentofile.cuda.yaml"))
    served, with_torch = (pins(ROOT / each["python"].pop("requirements_txt")) for each in (plain, cuda))
    assert cuda == plain
    assert set(served) < set(with_torch)
    assert any(pin.startswith("torch==") for pin in set(with_torch) - set(served))


def test_requirements_of_the_image_are_locked(any_bento):
    """All of them at the versions that the tests run with, among them what the dependencies depend on."""
    bento, file = any_bento
    locked = dict(pin.split("==") for pin in pins(bento / "env" / "python" / "requirements.txt"))
    tested = set(pins(ROOT / "constraints.txt"))
    assert {f"{name}=={version}" for name, version in locked.items()} <= tested
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["tracing"], *(extras["cuda"] if "cuda" in file else ())]
    names = {canonicalize_name(name) for name in locked}
    assert ("torch" in names) == ("cuda" in file)
    missing = [each for each in map(Requirement, required) if canonicalize_name(each.name) not in names]
    for name in locked:
        missing += [
            each
            for each in map(Requirement, importlib.metadata.requires(name) or ())
            if (each.marker is None or each.marker.evaluate({"extra": ""}))
            and canonicalize_name(each.name) not in names
        ]
    # torch's own wheels pin what they bring of CUDA, of which the wheels for CPUs know nothing.
    assert [str(each) for each in missing if not each.name.startswith(("nvidia-", "cuda-", "triton"))] == []


def test_lock_is_as_its_script_writes_it():
    """If this fails, run `make lock`."""
    lock = runpy.run_path(str(ROOT / "scripts" / "lock.py"))["lock"]
    for path, text in lock().items():
        assert path.read_text() == text, f"run `make lock`: {path.name}"


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_schemas(path, version):
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


def pods():
    """The manifests' pods, by the name of their file."""
    for path in (*MANIFESTS, ROOT / "deploy" / "kserve" / "inference-service.yaml"):
        for document in documents(path):
            spec = document["spec"]
            if pod := spec.get("predictor") or spec.get("template", {}).get("spec"):
                yield pytest.param(pod, id=path.name)


@pytest.mark.parametrize("pod", list(pods()))
def test_pods_run_what_was_tried_and_write_what_was_allowed(pod):
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        # Kubernetes refuses the placeholder: nobody runs an image that they didn't choose.
        assert container["image"].endswith(":VERSION@sha256:DIGEST")
    for volume in pod["volumes"]:
        if "emptyDir" in volume:
            assert "sizeLimit" in volume["emptyDir"], volume["name"]


def test_schemas_refuse_what_is_wrong():
    (deployment,) = documents(ROOT / "deploy" / "kubernetes" / "deployment.yaml")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 45
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)


def test_manifests_fit_the_service():
    found = {document["kind"]: document for path in MANIFESTS for document in documents(path)}
    assert found.pop("Job")["spec"]["completionMode"] == "Indexed"  # see tests/archive/test_shards.py
    assert set(found) == {
        "Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"
    }  # fmt: skip
    template = found["Deployment"]["spec"]["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    settings = Settings.from_environment({each["name"]: each["value"] for each in container["env"]})
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause + settings.drain_seconds + 5
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 3000, "grpc": settings.grpc_port, "metrics": settings.metrics_port}
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(settings.metrics_port)
    mounts = {each["mountPath"] for each in container["volumeMounts"]}
    written = {each["value"] for each in container["env"] if each["name"] in ("TMPDIR", "BENTOML_HOME")}
    assert all(any(Path(path).is_relative_to(mount) for mount in mounts) for path in written)
    assert str(settings.api_keys_file.parent) in mounts
    assert settings.bundle == ("/bundles",)
    for each in (container, *pod["initContainers"]):
        assert each["securityContext"]["readOnlyRootFilesystem"]
    assert {port["targetPort"] for port in found["Service"]["spec"]["ports"]} == {"http", "grpc"}
    (monitor,) = documents(ROOT / "deploy" / "prometheus" / "pod-monitor.yaml")
    assert [each["port"] for each in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
    for selector in (
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        monitor["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= template["metadata"]["labels"].items()
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "avex-serve"
    known = {f"AVEX_{name.upper()}" for name in Settings.model_fields}
    assert {each["name"] for each in container["env"] if each["name"].startswith("AVEX_")} <= known


@pytest.mark.parametrize("namespace", ["default", "monitoring"])
def test_policy_keeps_the_metrics_from_all_but_prometheus(namespace):
    """As Kubernetes reads the rules: one that names no peers holds for all of them."""
    (policy,) = documents(ROOT / "deploy" / "kubernetes" / "network-policy.yaml")
    open_to = set()
    for rule in policy["spec"]["ingress"]:
        peers = [
            peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in rule.get("from", ())
        ]
        if not peers or namespace in peers:
            open_to |= {port["port"] for port in rule["ports"]}
    assert open_to == ({"http", "grpc", "metrics"} if namespace == "monitoring" else {"http", "grpc"})
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_probes_are_routes_and_leave_time_to_start(audio_server):
    (deployment,) = documents(ROOT / "deploy" / "kubernetes" / "deployment.yaml")
    (kserve,) = documents(ROOT / "deploy" / "kserve" / "inference-service.yaml")
    for pod in (deployment["spec"]["template"]["spec"], kserve["spec"]["predictor"]):
        (container,) = pod["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert audio_server.get(container[probe]["httpGet"]["path"]).status_code == 200
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= START_SECONDS
        assert "initialDelaySeconds" not in container["livenessProbe"]  # it begins when the startup probe has ended


def test_kserve_manifest():
    """KServe's own fields stand beside those of a pod, for which there are schemas."""
    (service,) = documents(ROOT / "deploy" / "kserve" / "inference-service.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = dict(service["spec"]["predictor"])
    assert predictor.pop("minReplicas") <= predictor.pop("maxReplicas")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "avex-serve"}, "spec": predictor}
    kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)
    (container,) = predictor["containers"]
    assert container["name"] == "kserve-container"
    assert container["securityContext"]["readOnlyRootFilesystem"]
    Settings.from_environment({each["name"]: each["value"] for each in container["env"]})
    mounts = {each["mountPath"] for each in container["volumeMounts"]}
    written = [each["value"] for each in container["env"] if each["name"] in ("TMPDIR", "BENTOML_HOME")]
    assert len(written) == 2
    assert all(any(Path(path).is_relative_to(mount) for mount in mounts) for path in written)


def is_ready(client):
    with contextlib.suppress(httpx.TransportError):
        return client.get("/readyz").status_code == 200


@pytest.mark.slow
def test_bento_on_a_bare_environment(tmp_path, predict, wav):
    """Built, installed from its own requirements, served from its own folder with a bundle that it carries."""
    context = tmp_path / "checkout"
    for name in ("avex_serve", "deploy"):
        shutil.copytree(ROOT / name, context / name)
    for name in ("bentofile.yaml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, context)
    make_audio_bundle(context / "bundles" / "tiny")
    bento = build(tmp_path / "home", context)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    requirements = bento / "env" / "python" / "requirements.txt"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    torch = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in torch.stderr
    http_port, grpc_port = free_ports(2)
    variables = {
        "AVEX_BUNDLE": str(bento / "src" / "bundles" / "tiny"),
        "AVEX_GRPC_HOST": "127.0.0.1",
        "AVEX_GRPC_PORT": str(grpc_port),
        "PYTHONPATH": "",
    }
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [environment / "bin" / "bentoml", "serve", bento, "--host", "127.0.0.1", "--port", str(http_port)],
            env=server_environment(tmp_path / "served", **variables),
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=30) as client:
            deadline = time.monotonic() + START_SECONDS
            while not is_ready(client):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            assert client.post("/predict", content=wav, params={"top_k": 1}).json() == predict(wav, top_k=1)
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}") as triton:
            recordings = tritonclient.grpc.InferInput("waveform", [1], "BYTES")
            recordings.set_data_from_numpy(np.array([wav], dtype=np.object_))
            assert triton.infer("tiny", [recordings]).as_numpy("scores").shape == (4, 3)
    finally:
        stop(process)
    assert str(ROOT) not in log.read_text()
