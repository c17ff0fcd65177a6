"""A local HTTP server that serves bytes, with or without ranges, and may drop connections."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


class Server:
    """Serves `files` by name; every answer ends after `drop_after` bytes of content, if given."""

    def __init__(self, files: dict[str, bytes], drop_after: int | None = None, ranges: bool = True) -> None:
        self.asked: list[tuple[str, str | None]] = []  # (name, Range header)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, wanted = self.path.lstrip("/"), self.headers.get("Range")
                outer.asked.append((name, wanted))
                if name not in files:
                    return self.send_error(404)
                start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and ranges else 0
                content = files[name][start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:drop_after])
                self.close_connection = True
                return None

            def log_message(self, *_: object) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
