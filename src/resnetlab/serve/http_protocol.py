"""HTTP/1.1 on one connection: uvicorn's protocol, and what RFC 9112 asks for that httptools leaves to its caller."""

from __future__ import annotations

import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from resnetlab.serve.limits import append_part

MAX_HEAD = 65_536  # bytes of a request's line and headers, and of what a chunked body has between its bytes
READ_AHEAD = 2**18  # bytes of a body that wait for the service before no more are read: as many as one read takes


def make_answer(status: bytes, sentence: str) -> bytes:
    """An answer to a request that is not read, after which the connection is closed."""
    body = json.dumps({"error": sentence}).encode()
    again = b"retry-after: 1\r\n" if status.startswith((b"408", b"503")) else b""
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\n%sconnection: close\r\n" % (status, again)
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


INVALID = make_answer(b"400 Bad Request", "this is not a valid HTTP request.")
TOO_LONG = make_answer(b"431 Request Header Fields Too Large", f"the headers have more than {MAX_HEAD:,} bytes.")


class HttpProtocol(HttpToolsProtocol):
    """Refuses long heads, and requests without one Host; reads the body of a request that offers another protocol."""

    unparsed = 0  # bytes since the last that were a body's, or ended a head or a body: the parser keeps them
    refusal: bytes | None = None  # is sent once the requests before have their answers

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self.refusal:  # what comes after a refused request
            return
        self._unset_keepalive_if_required()
        self.unparsed += len(data)
        rest = memoryview(data)
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    # Java's client offers HTTP/2 with each request; what follows is no other protocol, since none is taken
                    rest = rest[upgrade.args[0] :]
                    self.parser.feed_data(self.head_without_upgrade())
        except httptools.HttpParserError:  # of the parser, or in what it calls below
            self.refuse(INVALID)
        if self.unparsed > MAX_HEAD:
            self.refuse(TOO_LONG)

    def head_without_upgrade(self) -> bytes:
        """The head that was read last, without the header for which the parser reads no body."""
        lines = [b": ".join(header) for header in self.headers if header[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        return b"%s %s HTTP/%s\r\n%s\r\n\r\n" % (self.parser.get_method(), self.url, version, b"\r\n".join(lines))

    def on_headers_complete(self) -> None:
        """Raises ValueError for a head that is refused."""
        self.unparsed = 0
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD:
            self.refuse(TOO_LONG)
            raise ValueError
        hosts = sum(name == b"host" for name, _ in self.headers)
        coded = any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() != "1.0") or coded:
            raise ValueError
        if self.parser.get_method() == b"CONNECT":
            raise ValueError
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.headers = []  # which trailers go to: they are not the request's headers

    def on_body(self, body: bytes) -> None:
        self.unparsed = 0
        cycle: Any = self.cycle
        if cycle.response_complete:
            return
        cycle.body = append_part(cycle.body, body)
        if len(cycle.body) > READ_AHEAD:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        self.unparsed = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        last = not self.pipeline
        super().on_response_complete()
        if last and self.refusal:
            self.end_with(self.refusal)

    def refuse(self, answer: bytes) -> None:
        """Answers and hangs up, after the answers to the requests before; where this one's has begun, it hangs up only."""
        if self.refusal:
            return
        cycle: Any = self.cycle
        in_progress = cycle is not None and not cycle.response_complete
        if in_progress and cycle.more_body:  # its body is what is refused
            cycle.disconnected = True  # the service sends no answer of its own
            cycle.message_event.set()
            if not self.pipeline:
                self.end_with(b"" if cycle.response_started else answer)
                return
            self.pipeline.popleft()
        if in_progress:
            self.refusal = answer
        else:
            self.end_with(answer)

    def end_with(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()
