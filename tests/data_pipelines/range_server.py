"""A web server on the loopback interface that answers byte ranges, and misbehaves when it is told to."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer:
    """Serves the files of a directory. `faults` are used up by GET requests, one each, from the front.

    "503" answers so, "drop" closes the connection within the data, "stall" sends nothing until the server ends.
    """

    def __init__(self, directory: Path, *, ranges: bool = True) -> None:
        self.requests: list[tuple[str, int, int]] = []  # path, first and last byte, of GETs
        self.faults: list[str] = []
        self.ranges = ranges
        self.stopping = threading.Event()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def _file(self) -> bytes | None:
                path = directory / self.path.lstrip("/")
                if path.is_file():
                    return path.read_bytes()
                self.send_error(404)
                return None

            def do_HEAD(self) -> None:
                content = self._file()
                if content is not None:
                    self._head(200, len(content))

            def _head(self, status: int, length: int, content_range: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.send_header("ETag", f'"{(directory / self.path.lstrip("/")).stat().st_mtime_ns}"')
                if server.ranges:
                    self.send_header("Accept-Ranges", "bytes")
                if content_range:
                    self.send_header("Content-Range", content_range)
                self.end_headers()

            def do_GET(self) -> None:
                content = self._file()
                if content is None:
                    return
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, len(content) - 1)
                with lock:
                    server.requests.append((self.path, first, last))
                    fault = server.faults.pop(0) if server.faults else ""
                if fault == "503":
                    self.send_error(503)
                    return
                if fault == "stall":
                    server.stopping.wait(20)
                    return
                if wanted and server.ranges:
                    data = content[first : last + 1]
                    self._head(206, len(data), f"bytes {first}-{first + len(data) - 1}/{len(content)}")
                else:
                    data = content
                    self._head(200, len(data))
                if fault == "drop":
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[RangeServer]:
        """The server, until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.stopping.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()
