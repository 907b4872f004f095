"""Every setting of the service: one environment variable each, read at start."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, IPvAnyAddress, ValidationError

from avex_serve.errors import InputError

PREFIX: Final = "AVEX_"
DEMO_BUNDLE: Final = Path(__file__).parents[1] / "demo" / "bundle"


class Settings(BaseModel):
    """What `bentoml serve` reads: the field ``bundle`` is the variable ``AVEX_BUNDLE``, and so on.

    Other variables that begin with ``AVEX_`` are left alone: Kubernetes sets such ones for a Service named avex.
    """

    model_config = ConfigDict(frozen=True, validate_default=True)

    bundle: Path = Field(DEMO_BUNDLE, description="the folder to serve; by default the demo bundle of this package")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the model runs; auto: on CUDA where it works"
    )
    precision: Literal["auto", "float32", "int8"] = Field(
        "auto", description="which graph runs; auto: int8 on a CPU where the bundle has it"
    )
    # All interfaces, as BentoML's HTTP does by default.
    grpc_host: IPvAnyAddress = Field(default="0.0.0.0", description="IPv4 or IPv6 address that gRPC listens on")  # type: ignore[assignment]
    grpc_port: int = Field(3001, ge=1, le=65535, description="port that gRPC listens on")
    threads: int | None = Field(
        None,
        ge=1,
        description="threads that infer in each worker; by default the usable cores divided by the workers",
    )
    log_format: Literal["text", "json"] = Field("text", description="text as BentoML's, or a JSON document a line")
    drain_seconds: float = Field(
        30.0, gt=0, description="the most that running requests get after SIGTERM, in seconds"
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The settings; an empty variable counts as unset.

        Raises:
            InputError: a value that makes no sense.
        """
        names = {field: PREFIX + field.upper() for field in cls.model_fields}
        given = {field: environment[name] for field, name in names.items() if environment.get(name)}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            faults = [
                f"{names[str(fault['loc'][0])]} is {fault['input']!r}: {fault['msg']}" for fault in error.errors()
            ]
            raise InputError("; ".join(faults)) from None

    @property
    def grpc_address(self) -> str:
        """Host and port as gRPC writes them."""
        host = f"[{self.grpc_host}]" if self.grpc_host.version == 6 else str(self.grpc_host)
        return f"{host}:{self.grpc_port}"
