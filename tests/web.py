"""A web server for tests: serves a folder by ranges, counts, and fails when it is told to."""

import contextlib
import http.server
import pathlib
import re
import threading
from collections.abc import Iterator


class Server(http.server.ThreadingHTTPServer):
    """What was asked for, and how to fail."""

    daemon_threads = True
    folder: pathlib.Path
    url: str
    n_bytes = 0  # sent in bodies
    n_requests = 0
    # Of the next requests: "503", "cut" (half of the body), "silent" (no answer), "" (none).
    faults: list[str]
    is_over: threading.Event
    knows_ranges = True


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.n_requests += 1
        fault = server.faults.pop(0) if server.faults else ""
        path = server.folder / self.path.lstrip("/")
        if fault == "silent":
            server.is_over.wait()
            return None
        if fault == "503":
            return self._answer(503, b"")
        if not path.is_file():
            return self._answer(404, b"")
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and server.knows_ranges:
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
            if start >= len(data):
                return self._answer(416, b"")
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            return self._answer(206, data[start:stop], headers, cut=fault == "cut")
        return self._answer(200, data, cut=fault == "cut")

    def _answer(self, status, body, headers=None, cut=False):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: len(body) // 2] if cut else body
        self.server.n_bytes += len(body)
        self.wfile.write(body)
        self.close_connection = self.close_connection or cut

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[Server]:
    """A server of the files below a folder, while the block runs."""
    with Server(("127.0.0.1", 0), _Handler) as server:
        server.folder, server.faults, server.is_over = folder, [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.is_over.set()
            server.shutdown()
            thread.join()
