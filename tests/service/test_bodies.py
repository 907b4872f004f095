"""Bodies of requests, as their server hands them over."""

import asyncio

from avex_serve.scheduling.request import Request
from avex_serve.service.http.front import Body

CLOSED = "unable to perform operation on <TCPTransport closed=True reading=False>; the handler is closed"


def test_a_connection_that_closes_before_its_body_is_asked_for_is_a_client_that_has_gone():
    """The server first writes "100 Continue", which uvloop refuses."""

    async def receive():
        raise RuntimeError(CLOSED)

    async def ask():
        return await Body(Request(), receive, 100, 5.0).receive()

    assert asyncio.run(ask()) == {"type": "http.disconnect"}
