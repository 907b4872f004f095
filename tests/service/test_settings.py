import asyncio
import json
import os
import subprocess
import sys
import threading

import pytest
from pydantic import Field, SecretStr

from avex_serve.cli import main
from avex_serve.errors import InputError, OverloadError
from avex_serve.service import AvexService
from avex_serve.service.settings import DEMO_BUNDLE, GUARDS, Settings, list_settings, table


def test_defaults():
    settings = Settings.from_environment({"AVEX_BUNDLE": "", "AVEX_PORT_3000_TCP": "tcp://10.0.0.1:3000"})
    assert settings.bundle == (str(DEMO_BUNDLE),)
    assert settings.serves_demo
    assert settings.device == settings.precision == settings.runtime == "auto"
    assert settings.grpc_address == "0.0.0.0:3001"
    assert (settings.reload_seconds, settings.model_control) == (10, "none")


def test_more_bundles_than_a_path_has_room_for():
    folders = [f"/srv/bundles/{number:03}-{'x' * 40}" for number in range(100)]
    assert Settings.from_environment({"AVEX_BUNDLE": os.pathsep.join(folders)}).bundle == tuple(folders)


def test_every_setting(tmp_path):
    settings = Settings.from_environment(
        {
            "AVEX_BUNDLE": f"{tmp_path}{os.pathsep}other",
            "AVEX_DEVICE": "cpu",
            "AVEX_PRECISION": "float32",
            "AVEX_RUNTIME": "openvino",
            "AVEX_GRPC_HOST": "::1",
            "AVEX_GRPC_PORT": "4001",
            "AVEX_RELOAD_SECONDS": "0.5",
            "AVEX_MODEL_CONTROL": "explicit",
        }
    )
    assert settings.bundle == (str(tmp_path), "other")
    assert not settings.serves_demo
    assert (settings.reload_seconds, settings.model_control) == (0.5, "explicit")
    assert (settings.device, settings.precision, settings.runtime) == ("cpu", "float32", "openvino")
    assert settings.grpc_address == "[::1]:4001"


@pytest.mark.parametrize(
    ("name", "value"),
    [("DEVICE", "CPU"), ("PRECISION", "Float32"), ("RUNTIME", "OpenVINO"), ("CHECK", "Warn"),
     ("MODEL_CONTROL", "Explicit"), ("PAGE", "OFF"), ("LOG_FORMAT", "JSON")],
)  # fmt: skip
def test_a_choice_is_taken_in_any_case(name, value):
    assert getattr(Settings.from_environment({f"AVEX_{name}": value}), name.lower()) == value.lower()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AVEX_DEVICE", "tpu"),
        ("AVEX_RUNTIME", "tensorrt"),
        ("AVEX_RELOAD_SECONDS", "-1"),
        ("AVEX_RELOAD_SECONDS", "nan"),
        ("AVEX_RELOAD_SECONDS", "inf"),
        ("AVEX_RELOAD_SECONDS", "1e20"),
        ("AVEX_MODEL_CONTROL", "all"),
        ("AVEX_GRPC_HOST", "localhost"),
        ("AVEX_GRPC_PORT", "tcp://10.0.0.1:3001"),
        ("AVEX_GRPC_PORT", "0"),
        ("AVEX_GRPC_PORT", "65536"),
        ("AVEX_CONCURRENCY", "0"),
        ("AVEX_QUEUE", "-1"),
        ("AVEX_TIMEOUT_SECONDS", "0"),
        ("AVEX_TIMEOUT_SECONDS", "inf"),
        ("AVEX_READ_TIMEOUT_SECONDS", "nan"),
        ("AVEX_MAX_BODY_BYTES", "0"),
        ("AVEX_MAX_BODY_BYTES", "2147483648"),
        ("AVEX_MAX_SECONDS", "-1"),
    ],
)
def test_bad_value_is_named(name, value):
    with pytest.raises(InputError, match=f"^{name} is '{value}': "):
        Settings.from_environment({name: value})


@pytest.mark.parametrize(
    ("value", "expected"),
    [("400000000", 400_000_000), ("400MB", 400_000_000), ("400 mb", 400_000_000), ("380MiB", 380 * 2**20),
     ("1.5 GiB", 3 * 2**29), ("64k", 64_000), ("64Ki", 2**16), ("12B", 12)],
)  # fmt: skip
def test_sizes_have_units(value, expected):
    settings = Settings.from_environment({"AVEX_MAX_BODY_BYTES": value, "AVEX_MAX_HELD_BYTES": "2GiB"})
    assert settings.max_body_bytes == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("30", 30), ("30s", 30), ("500ms", 0.5), ("5 min", 300), ("2m", 120), ("1.5h", 5400)]
)
def test_durations_have_units(value, expected):
    for field in ("drain_seconds", "max_seconds", "timeout_seconds"):
        assert getattr(Settings.from_environment({f"AVEX_{field.upper()}": value}), field) == expected


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [("AVEX_MAX_BODY_BYTES", "400 lines", "400MB"), ("AVEX_MAX_BODY_BYTES", "3GB", "2147483648"),
     ("AVEX_MAX_BODY_BYTES", "1.5", "400MB"), ("AVEX_DRAIN_SECONDS", "30 parsecs", "30s"),
     ("AVEX_DRAIN_SECONDS", "-3s", "30s")],
)  # fmt: skip
def test_a_value_in_another_unit_is_named(name, value, remedy):
    with pytest.raises(InputError, match=f"^{name} is '{value}': .*{remedy}"):
        Settings.from_environment({name: value})


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("GRPC_PORT=https", "a whole number"),
        ("GRPC_PORT=0", "at least 1"),
        ("WORKERS=1.5", "a whole number"),
        ("WORKERS=1000", "at most 256"),
        (f"THREADS={'9' * 5000}", "a whole number"),
        ("GRPC_HOST=localhost", "an IPv4 or IPv6 address"),
        ("DEVICE=tpu", "'auto', 'cpu' or 'cuda'"),
        ("START_EMPTY=maybe", "1 or 0"),
        ("MAX_BODY_BYTES=large", "a size in whole bytes (400000000, 400MB or 380MiB)"),
        ("MAX_BODY_BYTES=1.5", "a size in whole bytes (400000000, 400MB or 380MiB)"),
        (f"MAX_BODY_BYTES={'9' * 400}k", "a size in whole bytes (400000000, 400MB or 380MiB)"),
        ("MAX_BODY_BYTES=3GB", "less than 2147483648 (400000000, 400MB or 380MiB)"),
        ("DRAIN_SECONDS=soon", "a number of seconds (30, 30s, 500ms or 5min)"),
        ("DRAIN_SECONDS=0", "more than 0 (30, 30s, 500ms or 5min)"),
    ],
)
def test_what_is_expected_is_said(variable, expected, monkeypatch, capsys):
    name, value = f"AVEX_{variable}".split("=")
    monkeypatch.setenv(name, value)
    assert main(["settings"]) == 2
    assert capsys.readouterr().err == f"avex-serve: {name} is {value!r}: expected {expected}\n"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("AVEX_API_KEY", "AVEX_API_KEYS"), ("AVEX_BUNDLES", "AVEX_BUNDLE"), ("AVEX_Bundle", "AVEX_BUNDLE"),
     ("AVEX_MAX_BODY_SIZE", "AVEX_MAX_BODY_BYTES")],
)  # fmt: skip
def test_a_variable_that_is_no_setting_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(InputError, match=rf"^{name} is no setting; did you mean {nearest}\?"):
        Settings.from_environment({name: "8080"})


@pytest.mark.parametrize(("name", "option"), [("AVEX_PORT", "--port"), ("AVEX_HTTP_HOST", "--host")])
def test_where_http_listens_is_no_setting(name, option):
    with pytest.raises(InputError, match=rf"^{name} is no setting; .* `bentoml serve {option}`"):
        Settings.from_environment({name: "8080"})


def test_variables_of_kubernetes_and_of_the_tests_are_no_settings():
    address = "tcp://10.0.0.1:3000"
    for service in ("AVEX", "AVEX_SERVE"):
        Settings.from_environment(
            {
                f"{service}_SERVICE_HOST": "10.0.0.1",
                f"{service}_SERVICE_PORT": "3000",
                f"{service}_SERVICE_PORT_HTTP": "3000",
                f"{service}_PORT": address,
                f"{service}_PORT_3000_TCP": address,
                f"{service}_PORT_3000_TCP_ADDR": "10.0.0.1",
                "AVEX_SHARED": "/data",
            }
        )


def test_a_bento_serves_what_it_carries(tmp_path, monkeypatch):
    bento = tmp_path / "bento"
    carried = bento / "src" / "bundles"
    monkeypatch.setattr("avex_serve.service.settings._SOURCES", carried.parent)
    monkeypatch.setattr("avex_serve.service.settings.CARRIED", carried)
    carried.mkdir(parents=True)
    assert Settings.from_environment({}).serves_demo, "this is no bento"
    (bento / "bento.yaml").touch()
    settings = Settings.from_environment({})
    assert settings.bundle == (str(carried),)
    assert not settings.serves_demo
    carried.rmdir()
    assert Settings.from_environment({}).serves_demo


def test_separators_without_folders():
    with pytest.raises(InputError, match=r"^AVEX_BUNDLE is ':': it names no folder; name one, or unset it"):
        Settings.from_environment({"AVEX_BUNDLE": os.pathsep})


@pytest.fixture
def asked(monkeypatch, capsys):
    """`avex-serve settings` with these variables; returns what it printed."""

    def ask(*arguments, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert main(["settings", *arguments]) == 0
        return capsys.readouterr().out

    return ask


def test_command_prints_every_setting(asked, tmp_path):
    settings = json.loads(asked("--json", AVEX_BUNDLE=str(tmp_path), AVEX_THREADS="3"))
    listed = {setting["variable"]: setting for setting in settings}
    assert set(listed) == {f"AVEX_{name.upper()}" for name in Settings.model_fields}
    assert all(setting["description"] for setting in settings)
    assert (listed["AVEX_BUNDLE"]["value"], listed["AVEX_BUNDLE"]["default"]) == (
        [str(tmp_path)],
        [str(DEMO_BUNDLE)],
    )
    assert (listed["AVEX_THREADS"]["value"], listed["AVEX_THREADS"]["default"]) == (3, None)
    table = asked()
    words = " ".join(table.split())
    assert all(name in table and setting["description"] in words for name, setting in listed.items())
    assert "\nAVEX_THREADS=3\n" in table
    assert "\nAVEX_START_EMPTY=0\n" in table
    assert f"\nAVEX_BUNDLE={tmp_path}\n" in f"\n{table}"
    assert words.count("(default: ") == 2
    assert max(len(line) for line in table.splitlines()) <= 100


def test_command_names_a_bad_value(monkeypatch, capsys):
    monkeypatch.setenv("AVEX_DRAIN_SECONDS", "soon")
    assert main(["settings"]) == 2
    assert "AVEX_DRAIN_SECONDS is 'soon'" in capsys.readouterr().err


def test_secrets_are_not_shown():
    class Secretive(Settings):
        token: SecretStr | None = Field(None, description="a key")

    shown = {each.variable: each for each in list_settings({"AVEX_TOKEN": "hush"}, Secretive)}
    assert shown["AVEX_TOKEN"].value == "(set)"
    assert shown["AVEX_TOKEN"].default is None
    assert "hush" not in table(list(shown.values()))


def test_command_imports_no_server():
    heavy = {"bentoml", "grpc", "numpy", "onnxruntime", "soundfile", "starlette"}
    code = f"import sys, avex_serve.cli as cli; cli.main(['settings']); sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("field", GUARDS)
def test_an_empty_variable_does_not_open_the_service(field):
    variable = f"AVEX_{field.upper()}"
    with pytest.raises(InputError, match=f"{variable} is set and empty; fill it in, or unset it"):
        Settings.from_environment({variable: ""})


def test_as_many_requests_are_at_work_as_threads_infer(monkeypatch, audio_bundle):
    for name, value in {"AVEX_BUNDLE": str(audio_bundle), "AVEX_THREADS": "2", "AVEX_QUEUE": "0"}.items():
        monkeypatch.setenv(name, value)
    front = AvexService().front

    async def test():
        done = threading.Event()
        working = [asyncio.create_task(front.admission.run(done.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadError, match="2 requests at work and 0 waiting"):
            front.admission.check_room()
        done.set()
        assert await asyncio.gather(*working) == [True, True]

    asyncio.run(test())
    front.admission.close()
    front.repository.close()
