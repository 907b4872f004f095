import os
from pathlib import Path

import pytest

from avex_serve.errors import InputError
from avex_serve.service.gate import Gate
from avex_serve.service.settings import DEMO_BUNDLE, Settings


def test_defaults():
    settings = Settings.from_environment({"AVEX_BUNDLE": "", "AVEX_PORT_3000_TCP": "tcp://10.0.0.1:3000"})
    assert settings.bundle == (DEMO_BUNDLE,)
    assert settings.device == settings.precision == "auto"
    assert settings.grpc_address == "0.0.0.0:3001"
    assert (settings.reload_seconds, settings.model_control) == (10, "none")


def test_every_setting(tmp_path):
    settings = Settings.from_environment(
        {
            "AVEX_BUNDLE": f"{tmp_path}{os.pathsep}other",
            "AVEX_DEVICE": "cpu",
            "AVEX_PRECISION": "float32",
            "AVEX_GRPC_HOST": "::1",
            "AVEX_GRPC_PORT": "4001",
            "AVEX_RELOAD_SECONDS": "0.5",
            "AVEX_MODEL_CONTROL": "explicit",
        }
    )
    assert settings.bundle == (tmp_path, Path("other"))
    assert (settings.reload_seconds, settings.model_control) == (0.5, "explicit")
    assert (settings.device, settings.precision) == ("cpu", "float32")
    assert settings.grpc_address == "[::1]:4001"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AVEX_DEVICE", "tpu"),
        ("AVEX_RELOAD_SECONDS", "-1"),
        ("AVEX_RELOAD_SECONDS", "nan"),
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


def test_gate_of_the_settings():
    settings = Settings.from_environment({"AVEX_TIMEOUT_SECONDS": "20"})
    gate = Gate.from_settings(settings)
    assert 19 < gate.deadline(None).remaining <= 20
    assert 19 < gate.deadline(30).remaining <= 20
    assert gate.deadline(1).remaining <= 1
    gate.admission.close()
