"""A local HTTP server that serves bytes, with or without ranges, and may drop connections, change its mind or refuse."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


class Server:
    """Serves `files` by name; every answer ends after `drop_after` bytes of content, if given.

    `tags`: each file has an ETag, its content's hash, by which If-None-Match and If-Range are answered; a `careless` server has
    tags too but sends parts whatever If-Range says. Without `lengths` nobody is told how long a file is. What is not there
    is answered by `absent`, and every answer by a tar waits for `pause` seconds.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        drop_after: int | None = None,
        ranges: bool = True,
        *,
        tags: bool = False,
        careless: bool = False,
        lengths: bool = True,
        absent: int = 404,
        pause: float = 0.0,
    ) -> None:
        self.asked: list[tuple[str, str | None]] = []  # (name, Range header)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, wanted = self.path.lstrip("/"), self.headers.get("Range")
                outer.asked.append((name, wanted))
                self.close_connection = True
                if name not in files:
                    return self.send_error(absent)
                time.sleep(pause * name.endswith(".tar"))
                whole = files[name]
                tag = f'"{hashlib.md5(whole).hexdigest()}"' if tags or careless else ""
                if tag and self.headers.get("If-None-Match") == tag:
                    self.send_response(304)
                    return self.end_headers()
                same = careless or self.headers.get("If-Range", tag) == tag
                start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and ranges and same else 0
                if start >= len(whole) > 0:
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if tag:
                    self.send_header("ETag", tag)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
                if lengths:
                    self.send_header("Content-Length", str(len(whole) - start))
                self.end_headers()
                self.wfile.write(whole[start:][:drop_after])
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
