"""Serves the review application on this machine until Ctrl-C."""

import contextlib
import secrets
import socket
from collections.abc import Callable
from typing import Final

import uvicorn

from avex_serve.errors import InputError
from avex_serve.review.app import Material, make_app

HOST: Final = "127.0.0.1"
TOKEN_BYTES: Final = 24


def serve(material: Material, port: int, say: Callable[[str], None]) -> None:
    """Answer browsers of this machine.

    Args:
        material: what is reviewed.
        port: to listen on; 0: any that is free.
        say: is called with the address to open, once it is answered.

    Raises:
        InputError: the port is in use, or not allowed.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} can't be used: {error}; choose another by --port, or 0 for any") from None
        port = listener.getsockname()[1]
        token = secrets.token_urlsafe(TOKEN_BYTES)
        app = make_app(material, token, [f"{HOST}:{port}", f"localhost:{port}"])
        config = uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False, ws="none")
        listener.listen()
        say(f"http://{HOST}:{port}/?token={token}")
        try:
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listener])
        finally:
            material.retraining.cancel()
