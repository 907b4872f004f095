"""Servers of others, such as a bucket or the hub, that tests run on this machine."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers requests, and prints nothing of them."""

    def log_message(self, *_):
        pass


class StandIn:
    """A server at `url` that answers with a class of handlers as long as it is `running`."""

    def __init__(self, handler):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextlib.contextmanager
    def running(self):
        with self.server:
            thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            yield self
            self.server.shutdown()
            thread.join()
