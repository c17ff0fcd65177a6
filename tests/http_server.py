"""A local HTTP server of files, with or without range requests, that can drop connections and refuse requests."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


class FileServer:
    """Serves `files` by name.

    Args:
        drop_after: bytes of content after which every answer ends.
        ranges: whether Range is honoured.
        etags: each file has an ETag, the hash of its content, used for If-None-Match and If-Range.
        ignore_if_range: it has ETags, but sends ranges whatever If-Range is.
        lengths: whether Content-Length is sent.
        missing_status: the status for files that do not exist.
        pause: seconds before every answer with a tar file.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        drop_after: int | None = None,
        ranges: bool = True,
        *,
        etags: bool = False,
        ignore_if_range: bool = False,
        lengths: bool = True,
        missing_status: int = 404,
        pause: float = 0.0,
    ) -> None:
        self.requests: list[tuple[str, str | None]] = []  # (name, Range header)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, range_header = self.path.lstrip("/"), self.headers.get("Range")
                outer.requests.append((name, range_header))
                self.close_connection = True
                if name not in files:
                    return self.send_error(missing_status)
                time.sleep(pause * name.endswith(".tar"))
                content = files[name]
                etag = f'"{hashlib.md5(content).hexdigest()}"' if etags or ignore_if_range else ""
                if etag and self.headers.get("If-None-Match") == etag:
                    self.send_response(304)
                    return self.end_headers()
                same = ignore_if_range or self.headers.get("If-Range", etag) == etag
                start = (
                    int(range_header.removeprefix("bytes=").split("-")[0]) if range_header and ranges and same else 0
                )
                if start >= len(content) > 0:
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if etag:
                    self.send_header("ETag", etag)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                if lengths:
                    self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start:][:drop_after])
                return None

            def log_message(self, *_: object) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def __enter__(self) -> FileServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
