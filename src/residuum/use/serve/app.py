"""The routes, and the frame around every answer: headers, counts, one sentence for whatever goes wrong."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from residuum import __version__
from residuum.evaluation.page import pages
from residuum.use.serve.answers import BODY, ERRORS, About, Explained, Health, Nothing, Options, Predictions, Top
from residuum.use.serve.limits import Refusal
from residuum.use.serve.service import Service

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
STATIC = {
    "/": ("serve/index.html", "text/html"),
    "/page.css": ("serve/page.css", "text/css"),
    "/page.js": ("serve/page.js", "text/javascript"),
    "/views.js": ("serve/views.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}


def make_app(service: Service) -> FastAPI:
    """The application of a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title=f"Residuum: {service.name}",
        version=__version__,
        description="Says what is on pictures, and why.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_pages(app)
    _add_routes(app, service)
    _add_sentences(app)
    app.add_middleware(_Frame, service=service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/predict", response_model=Predictions, response_model_exclude_none=True, responses=ERRORS, openapi_extra=BODY
    )
    async def predict(request: Request, options: Annotated[Options, Query()]) -> Response:
        """What is on one picture or several: classes, boxes or masks, by the model's task."""
        return JSONResponse(await service.predict(request, options.top, options.score))

    @app.post("/explain", response_model=Explained, responses=ERRORS, openapi_extra=BODY)
    async def explain(request: Request, options: Annotated[Top, Query()]) -> Response:
        """Where a classifier looked, what each block added, and what the answer would be without it, for one picture."""
        return JSONResponse(await service.explain(request, options.top))

    unknown: dict[int | str, dict[str, Any]] = {422: ERRORS[422]}

    @app.get("/healthz", response_model=Health, responses=unknown)
    async def healthz(_: Annotated[Nothing, Query()]) -> Response:
        """Whether the service is up."""
        return JSONResponse({"status": "ok"})

    @app.get("/model", response_model=About, responses=unknown)
    async def model(_: Annotated[Nothing, Query()]) -> Response:
        """The model, and the service's limits."""
        return JSONResponse(service.about())

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=text | unknown)
    async def metrics(_: Annotated[Nothing, Query()]) -> Response:
        """Counts and times, in Prometheus' text format."""
        return Response(service.counters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_pages(app: FastAPI) -> None:
    """The page and its parts, and the list of operations; all of them come from the package, and none from elsewhere."""
    for path, (name, kind) in STATIC.items():
        content = files("residuum").joinpath("pages", name).read_bytes()
        app.add_api_route(path, _static(content, kind), methods=["GET", "HEAD"], include_in_schema=False)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(pages().get_template("operations.html.j2").render(api=app.openapi()))


def _static(content: bytes, kind: str) -> Any:
    async def answer() -> Response:
        return Response(content, media_type=kind)

    return answer


def _add_sentences(app: FastAPI) -> None:
    """Whatever goes wrong becomes {"error": one sentence}."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> JSONResponse:
        headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
        if refusal.hang_up:
            headers["connection"] = "close"
        return JSONResponse({"error": refusal.sentence}, refusal.status, headers)

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = " ".join(str(part) for part in first["loc"])[:200]
        return JSONResponse({"error": f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}."}, 422)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: "there is nothing at this address; /docs lists what there is.",
                 405: f"{request.method} is not answered at this address; /docs lists what is."}  # fmt: skip
        sentence = words.get(error.status_code, str(error.detail))
        return JSONResponse({"error": sentence}, error.status_code, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> JSONResponse:
        return JSONResponse({"error": "the body was not sent to its end."}, 400)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:  # the traceback goes to the log
        return JSONResponse({"error": "the service failed; its log says why."}, 500, HEADERS)


class _Frame:
    """Puts the headers on every answer and counts it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._counters = app, service.counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            await self._app(scope, receive, framed)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._counters.requests.labels(path, str(status)).inc()
            self._counters.seconds.labels(path).observe(time.perf_counter() - began)
