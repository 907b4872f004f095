"""Every setting of the service: one environment variable each, read at start; `avex-serve settings` lists them."""

import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyAddress,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, to_jsonable_python

from avex_serve.bundles import bundle_cache
from avex_serve.errors import InputError

PREFIX: Final = "AVEX_"
DEMO_BUNDLE: Final = Path(__file__).parents[1] / "demo" / "bundle"
DEMO_WARNING: Final = (
    "this is the demo bundle, trained on synthetic sounds for trying the software; set AVEX_BUNDLE to serve yours"
)
_SOURCES: Final = Path(__file__).parents[2]  # of a bento, where it is one
CARRIED: Final = _SOURCES / "bundles"  # what a bento carries

# These keep strangers out. If one is set and empty, because its value was forgotten, the service must not be open.
GUARDS: Final = ("api_keys", "api_keys_file", "grpc_certificate", "grpc_key", "grpc_client_ca")

REDACTED: Final = "(set)"  # in place of a secret

# Variables of the project's tests and tools, which may be set in the shell that starts a service.
OF_TOOLS: Final = frozenset(
    {"AVEX_SHARED", "AVEX_FUZZ_FACTOR", "AVEX_FUZZ_SEED", "AVEX_SOAK_ANSWERS", "AVEX_SOAK_SECONDS"}
)
# What people look for among the settings, and BentoML has.
OF_BENTOML: Final = re.compile(r"AVEX_(?:HTTP_)?(HOST|PORT)")
# Kubernetes sets these for each Service whose name begins with avex. AVEX_PORT counts only with Kubernetes' value.
OF_KUBERNETES: Final = re.compile(
    r"AVEX_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)=.*"
    r"|AVEX_(\w+_)?PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)

_SEPARATOR: Final = re.escape(os.pathsep) + "(?!//)"  # s3://bucket is one
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) ?(?:(|[kmg]i?)b?)", re.IGNORECASE)
_SECONDS: Final = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?) ?(ms|s|m|min|h|d)", re.IGNORECASE)
_BOUNDS: Final = {
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def _bytes(value: object) -> object:
    """Bytes from a number with a unit; anything else unchanged."""
    if isinstance(value, str) and (found := _SIZE.fullmatch(value.strip())):
        return float(found[1]) * _UNITS[found[2].lower()]
    return value


def _seconds(value: object) -> object:
    """Seconds from a number with a unit; anything else unchanged."""
    if isinstance(value, str) and (found := _DURATION.fullmatch(value.strip())):
        return float(found[1]) * _SECONDS[found[2].lower()]
    return value


def _default_bundle() -> tuple[str, ...]:
    """The bundles that a bento carries, or else the demo bundle."""
    in_bento = (_SOURCES.parent / "bento.yaml").is_file()
    return (str(CARRIED if in_bento and CARRIED.is_dir() else DEMO_BUNDLE),)


Bytes = Annotated[int, BeforeValidator(_bytes)]  # 400000000, 400MB, 380MiB
Seconds = Annotated[float, BeforeValidator(_seconds)]  # 30, 30s, 500ms, 5min


class Settings(BaseModel):
    """What `bentoml serve` reads: the field ``bundle`` is the variable ``AVEX_BUNDLE``, and so on.

    Other variables that begin with ``AVEX_`` are refused, unless `OF_TOOLS` or `OF_KUBERNETES` knows them.
    """

    model_config = ConfigDict(frozen=True, validate_default=True)

    bundle: tuple[str, ...] = Field(
        default_factory=_default_bundle,
        min_length=1,
        description="the folders to serve, each a bundle or a folder of bundles, or the hf://, s3:// or gs:// URL "
        "of one, separated as in PATH; by default what a bento carries in bundles/, or else the demo bundle",
    )
    bundle_cache: Path = Field(
        default_factory=bundle_cache,
        description="where bundles of URLs are copied; by default within BENTOML_HOME",
    )
    start_empty: bool = Field(
        False, description="whether to start when there is no bundle yet (1), and serve those that come later"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the model runs; auto: on CUDA where it works"
    )
    precision: Literal["auto", "float32", "int8"] = Field(
        "auto", description="which graph runs; auto: int8 on a CPU where the bundle has it"
    )
    runtime: Literal["auto", "openvino"] = Field(
        "auto", description="openvino: float32 on the CPU by OpenVINO, which must be installed"
    )
    check: Literal["on", "warn", "off"] = Field(
        "on",
        description="whether a bundle whose first answer here differs from its evidence is refused (on), served "
        "with a warning (warn), or not compared (off)",
    )
    reload_seconds: Seconds = Field(
        10, ge=0, le=86_400, description="between two looks for new bundles on disk; 0: never"
    )
    model_control: Literal["none", "explicit"] = Field(
        "none", description="whether clients may load and unload models (explicit) or not (none)"
    )
    # All interfaces, as BentoML's HTTP does by default.
    grpc_host: IPvAnyAddress = Field(default="0.0.0.0", description="IPv4 or IPv6 address that gRPC listens on")  # type: ignore[assignment]
    grpc_port: int = Field(3001, ge=1, le=65535, description="port that gRPC listens on")
    metrics_host: IPvAnyAddress = Field(default="0.0.0.0", description="address that AVEX_METRICS_PORT listens on")  # type: ignore[assignment]
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="a port that answers /metrics alone, without a key; by default none"
    )
    workers: int = Field(1, ge=1, le=256, description="processes that serve; each opens all bundles")
    threads: int | None = Field(
        None,
        ge=1,
        description="threads that infer in each worker; by default the usable cores divided by the workers",
    )
    page: Literal["on", "off"] = Field(
        "on",
        description="whether / is a page for browsers, to which people drag recordings; JSON is there in any case",
    )
    log_format: Literal["text", "json"] = Field("text", description="text as BentoML's, or a JSON document a line")
    drain_seconds: Seconds = Field(30.0, gt=0, description="for running requests after SIGTERM, in seconds")

    concurrency: int | None = Field(
        None,
        ge=1,
        description="requests at work at once in a worker, over HTTP and gRPC together; by default one a thread",
    )
    queue: int | None = Field(
        None, ge=0, description="requests that wait for those at work; by default 16 times as many"
    )
    timeout_seconds: Seconds = Field(
        300, gt=0, le=86_400, description="from a request's arrival to its answer, in seconds"
    )
    read_timeout_seconds: Seconds = Field(
        60,
        gt=0,
        le=86_400,
        description="for a body to arrive, and between two pieces of it, in seconds; over HTTP one more for each "
        "8 KiB received",
    )
    max_body_bytes: Bytes = Field(128 * 2**20, ge=1, lt=2**31, description="of one HTTP body or gRPC message")
    max_held_bytes: Bytes = Field(2**30, ge=1, description="of all bodies that a worker holds at once")
    max_json_bytes: Bytes = Field(8 * 2**20, ge=1, description="of JSON in one body; binary tensors don't count")
    max_seconds: Seconds = Field(3600, gt=0, description="length of a recording, in seconds")
    max_clip_seconds: Seconds = Field(
        30, gt=0, description="length of a clip that is inferred in one piece, for bundles of clips of any length"
    )
    max_steps: int = Field(
        4096, ge=1, description="length of a sequence of embeddings, for heads that read sequences"
    )
    max_decoded_bytes: Bytes = Field(
        2 * 2**30, ge=1, description="of a recording once decoded: 4 for each sample of each channel"
    )
    max_channels: int = Field(64, ge=1, description="channels of a recording")
    max_windows: int = Field(10_000, ge=1, description="windows of a recording; more with more overlap")
    max_answer_bytes: Bytes = Field(
        256 * 2**20,
        ge=1,
        description="of memory for making an answer: 512 for each detection, 96 for each number as JSON, "
        "16 in binary",
    )

    api_keys: SecretStr | None = Field(None, description="keys that clients may send, separated by commas")
    api_keys_file: Path | None = Field(
        None, description="a file with such keys, one a line; read again when it changes"
    )
    grpc_certificate: Path | None = Field(
        None, description="gRPC over TLS: the server's certificate chain, PEM; read again when it changes"
    )
    grpc_key: Path | None = Field(None, description="the private key of that certificate, PEM")
    grpc_client_ca: Path | None = Field(
        None, description="gRPC over TLS: clients must show a certificate that these sign, PEM"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _choice_in_any_case(cls, value: object, info: ValidationInfo) -> object:
        named = get_origin(cls.model_fields[info.field_name or ""].annotation) is Literal
        return value.lower() if named and isinstance(value, str) else value

    @field_validator("bundle", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        # Its name may have the separator in it. `Path.is_dir` raises for a list that is too long for a path.
        if os.path.isdir(value):  # noqa: PTH112
            return [value]
        if folders := [part for part in re.split(_SEPARATOR, value) if part]:
            return folders
        raise PydanticCustomError("no_folder", "it names no folder; name one, or unset it to serve the demo bundle")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The settings; an empty variable counts as unset, but those of keys and TLS are refused.

        Raises:
            InputError: a value that can't be used, or a variable that is no setting.
        """
        names = {field: PREFIX + field.upper() for field in cls.model_fields}
        if unknown := _unknown(environment, names.values()):
            raise InputError("; ".join(unknown))
        given = {field: environment[name] for field, name in names.items() if environment.get(name)}
        if empty := [names[field] for field in GUARDS if environment.get(names[field]) == ""]:
            raise InputError(f"{', '.join(empty)} is set and empty; fill it in, or unset it to do without")
        try:
            settings = cls.model_validate(given)
        except ValidationError as error:
            faults = [
                f"{names[field]} is {given.get(field, fault['input'])!r}: {_reason(field, fault)}"
                for fault in error.errors()
                for field in [str(fault["loc"][0])]
            ]
            raise InputError("; ".join(faults)) from None
        if settings.max_held_bytes < settings.max_body_bytes:
            raise InputError(
                f"AVEX_MAX_HELD_BYTES is {settings.max_held_bytes}, less than AVEX_MAX_BODY_BYTES, "
                f"{settings.max_body_bytes}: a body between the two would be refused as busy for ever; raise the "
                f"first or lower the second"
            )
        return settings

    @property
    def grpc_address(self) -> str:
        """Host and port as gRPC writes them."""
        host = f"[{self.grpc_host}]" if self.grpc_host.version == 6 else str(self.grpc_host)
        return f"{host}:{self.grpc_port}"

    @property
    def serves_demo(self) -> bool:
        """Whether the demo bundle is served because no other was named."""
        return "bundle" not in self.model_fields_set and self.bundle == (str(DEMO_BUNDLE),)


def _unknown(environment: Mapping[str, str], known: Iterable[str]) -> list[str]:
    """A message for each variable that looks like a setting and is none."""
    known = list(known)
    messages = []
    for name, value in sorted(environment.items()):
        if not name.startswith(PREFIX) or name in known or name in OF_TOOLS:
            continue
        if OF_KUBERNETES.fullmatch(f"{name}={value}"):
            continue
        nearest = get_close_matches(name.upper(), known, 1)
        remedy = f"did you mean {nearest[0]}?" if nearest else "unset it."
        if option := OF_BENTOML.fullmatch(name.upper()):
            remedy = f"where HTTP listens is said by `bentoml serve --{option[1].lower()}`."
        messages.append(f"{name} is no setting; {remedy} `avex-serve settings` lists all settings")
    return messages


def _reason(field: str, fault: ErrorDetails) -> str:
    """What is expected in place of a value that can't be used."""
    kind, bounds = fault["type"], fault.get("ctx", {})
    if words := _BOUNDS.get(kind):
        (bound,) = bounds.values()
        return f"expected {words} {bound:.15g}{_units(field)}"
    if kind == "literal_error":
        return f"expected {bounds['expected']}"
    if kind == "bool_parsing":
        return "expected 1 or 0"
    if kind == "ip_any_address":
        return "expected an IPv4 or IPv6 address"
    if kind.startswith(("int_", "float_", "finite_")):
        return f"expected {_kind(field)}{_units(field)}"
    return fault["msg"]


def _kind(field: str) -> str:
    if field.endswith("_bytes"):
        return "a size in whole bytes"
    return "a number of seconds" if field.endswith("seconds") else "a whole number"


def _units(field: str) -> str:
    """How the units of a field are written."""
    if field.endswith("_bytes"):
        return " (400000000, 400MB or 380MiB)"
    return " (30, 30s, 500ms or 5min)" if field.endswith("seconds") else ""


class Setting(NamedTuple):
    """One setting; the values are JSON, and secrets say only whether they are set."""

    variable: str
    default: Any
    value: Any
    description: str


def list_settings(environment: Mapping[str, str] = os.environ, kind: type[Settings] = Settings) -> list[Setting]:
    """The settings with the values of the environment; InputError for a value that can't be used."""
    settings = kind.from_environment(environment)
    return [
        Setting(
            PREFIX + name.upper(),
            to_jsonable_python(_redacted(field.get_default(call_default_factory=True))),
            to_jsonable_python(_redacted(getattr(settings, name))),
            field.description or "",
        )
        for name, field in kind.model_fields.items()
    ]


WIDTH: Final = 100  # columns of a terminal


def table(settings: list[Setting]) -> str:
    """The settings for people: variable and value on a line, below it what it means and its default."""
    lines: list[str] = []
    for each in settings:
        value, default = _text(each.value), _text(each.default)
        lines += _wrapped(f"{each.variable}={value}", "", "  ")
        unset = "" if value == default else f" (default: {default})"
        lines += _wrapped(f"{each.description}{unset}", "    ", "    ")
    return "\n".join(lines)


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _redacted(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return REDACTED
    if isinstance(value, tuple | list | set | frozenset):
        return [_redacted(each) for each in value]
    return value


def _text(value: Any) -> str:
    if isinstance(value, list):  # as in the variable
        return os.pathsep.join(map(_text, value))
    if isinstance(value, bool | float):
        return f"{value:.15g}"  # True is 1
    return "none" if value is None else "the demo bundle" if value == str(DEMO_BUNDLE) else str(value)
