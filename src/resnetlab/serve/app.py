"""The routes, and what every answer gets: headers, a count, and one sentence for an error."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from importlib.resources import files
from ipaddress import ip_address
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resnetlab import __version__
from resnetlab.errors import unknown_name_error
from resnetlab.evaluation.page import load_templates
from resnetlab.serve.limits import RequestError, discard_body
from resnetlab.serve.schemas import (
    ERROR_ANSWERS,
    REQUEST_BODY,
    VALUES,
    EmptyQuery,
    ExplainAnswer,
    ExplainQuery,
    HealthAnswer,
    ModelAnswer,
    PredictAnswer,
    PredictQuery,
)
from resnetlab.serve.service import Service

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


def make_app(service: Service, hosts: Collection[str] = ()) -> FastAPI:
    """The ASGI application of a service.

    Args:
        hosts: names in the Host header that are answered, beside IP addresses and localhost; none answers all. A page of
            another site could otherwise read its visitor's service, under a name that it resolves to 127.0.0.1.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title=f"ResNetLab: {service.name}",
        version=__version__,
        description="Predictions for images, and their explanations.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        servers=[{"url": "."}],  # relative, as all addresses: a proxy may serve all of it below a path
        redirect_slashes=False,
    )
    app.router.route_class = _Route
    _add_routes(app, service)  # before the pages: routes are searched in order
    _add_pages(app)
    _add_error_handlers(app)
    for route in [route for route in app.routes if isinstance(route, APIRoute) and route.methods == {"GET"}]:
        app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
    app.add_middleware(_HeadersAndCounts, service=service, hosts=hosts)
    return app


class _Route(APIRoute):
    """A route whose endpoint gets the request and its query, which the query's model reads: FastAPI's own way gives the same,
    and takes half of all the time that FastAPI spends on a request.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if not self.dependant.query_params:
            return super().get_route_handler()
        (query,), endpoint = self.dependant.query_params, self.endpoint
        kind: Any = query.field_info.annotation  # the query's model, as the endpoint says
        without = kind()

        async def handle(request: Request) -> Response:
            values = request.query_params
            answer: Response = await endpoint(request, _read_query(kind, values) if values else without)
            return answer

        return handle


def _read_query(kind: type[BaseModel], values: QueryParams) -> BaseModel:
    """The parameters in a request's address; raises RequestError for unknown ones and wrong values."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first, known = error.errors()[0], kind.model_fields
    name = str(first["loc"][0])[:200]
    if name in known:
        sentence = f"{name} must be {VALUES[name]}, not {str(first['input'])[:200]!r}."
    elif known:
        sentence = str(unknown_name_error("query parameter", name, known))
    else:
        sentence = f"{name!r} is a query parameter, and this address takes none."
    raise RequestError(422, sentence)


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/predict",
        response_model=PredictAnswer,
        response_model_exclude_none=True,
        responses=ERROR_ANSWERS,
        openapi_extra=REQUEST_BODY,
    )
    async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
        """Classes, boxes or masks (by the model's task) of one image or several."""
        least = query.score if query.min_score is None else query.min_score
        return JSONResponse(await service.predict(request, query.top, least))

    @app.post("/explain", response_model=ExplainAnswer, responses=ERROR_ANSWERS, openapi_extra=REQUEST_BODY)
    async def explain(request: Request, query: Annotated[ExplainQuery, Query()]) -> Response:
        """Explains a classifier's prediction for one image: a heat map, and the effect of leaving out each block."""
        return JSONResponse(await service.explain(request, query.top))

    unknown: dict[int | str, dict[str, Any]] = {422: ERROR_ANSWERS[422]}

    @app.get("/health", include_in_schema=False)
    @app.get("/healthz", response_model=HealthAnswer, responses=unknown | {503: ERROR_ANSWERS[503]})
    async def healthz(_: Request, query: Annotated[EmptyQuery, Query()]) -> Response:
        """Whether the service is up, and its GPU computes."""
        await service.check_device()
        return JSONResponse({"status": "ok"})

    @app.get("/model", response_model=ModelAnswer, responses=unknown)
    async def model(_: Request, query: Annotated[EmptyQuery, Query()]) -> Response:
        """The model, and the service's limits."""
        return JSONResponse(service.describe())

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=text | unknown)
    async def metrics(_: Request, query: Annotated[EmptyQuery, Query()]) -> Response:
        """Counts and times in Prometheus' text format."""
        return Response(service.counters.to_text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_pages(app: FastAPI) -> None:
    """The page, its files and the list of operations; all are part of the package."""
    for path, (name, kind) in STATIC.items():
        content = files("resnetlab").joinpath("pages", name).read_bytes()
        app.add_api_route(path, _serve_static(content, kind), methods=["GET", "HEAD"], include_in_schema=False)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(load_templates().get_template("operations.html.j2").render(api=app.openapi()))


def _serve_static(content: bytes, kind: str) -> Any:
    async def endpoint() -> Response:
        return Response(content, media_type=kind)

    return endpoint


def _add_error_handlers(app: FastAPI) -> None:
    """Every error becomes {"error": one sentence}."""

    @app.exception_handler(RequestError)
    async def request_error(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse({"error": error.sentence}, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        sentences = {404: "there is nothing at this address; /docs lists all addresses.",
                     405: f"{request.method} is not supported at this address; /docs lists all operations."}  # fmt: skip
        sentence = sentences.get(error.status_code, str(error.detail))
        return JSONResponse({"error": sentence}, error.status_code, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def client_disconnected(_: Request, __: ClientDisconnect) -> JSONResponse:
        return JSONResponse({"error": "the body was not sent to its end."}, 400)  # nobody reads it

    @app.exception_handler(Exception)
    async def internal_error(_: Request, __: Exception) -> JSONResponse:  # the traceback is logged
        return JSONResponse({"error": "the service failed; its log says why."}, 500, HEADERS)


class _HeadersAndCounts:
    """Middleware that adds the headers to every answer and counts it, and reads bodies that no route has read."""

    def __init__(self, app: ASGIApp, service: Service, hosts: Collection[str]) -> None:
        self._app, self._counters, self._hosts = app, service.counters, {name.lower() for name in hosts}
        self._limits = service.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        unread = Headers(scope=scope).get("expect", "").lower() != "100-continue"  # that body is not on its way yet

        async def receive_and_note() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread and (b"connection", b"close") not in message.get("headers", ()):
                    await discard_body(receive, self._limits)
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            if self._hosts and (name := _host_name(scope)) not in self._hosts:
                sentence = f"this service is not called {name[:200]!r}; --allowed-host adds a name."
                await JSONResponse({"error": sentence}, 421)(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive_and_note, send_with_headers)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._counters.requests.labels(path, str(status)).inc()
            self._counters.seconds.labels(path).observe(time.perf_counter() - start)


def _host_name(scope: Scope) -> str:
    """The name in the Host header, without its port; "localhost" for IP addresses, and where there is no header."""
    value = Headers(scope=scope).get("host", "localhost").lower()
    name = value[1:].partition("]")[0] if value.startswith("[") else value.partition(":")[0].rstrip(".")
    try:
        ip_address(name)
    except ValueError:
        return name
    return "localhost"
