"""The OpenAI-compatible HTTP endpoint, on Starlette and uvicorn.

Owns: routes, headers, limits, and the bridge between the engine's thread and asyncio. Must not: parse the OpenAI format
(wire.py) nor touch the engine's state except through submit and cancel. A client that goes away cancels its turn.
Long for its routes, which share the limits and the way to the engine.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ....policies.model import tenants_session
from ...peers import Peer, PeerIs, Peers
from .. import metrics
from ..compute.language_model import LanguageModel
from ..compute.tool_calls import ToolCall, ToolCallStream, tool_calls_in
from ..engine import Engine
from ..engine_thread import Deliveries
from ..errors import EngineError, RequestError
from ..schedule.sequence import (
    FinishReason,
    SessionId,
    Slo,
    TenantId,
    TextDelta,
    TokenLogprob,
    TurnAccepted,
    TurnEvent,
    TurnFinished,
    TurnId,
    TurnRefused,
    TurnRequest,
)
from . import wire

SESSION_HEADERS = ("x-equipoise-session", "x-dynamo-session-id", "x-session-id")
TENANT_HEADER = "x-equipoise-tenant"
AWAITS_TOOL_HEADER = "x-equipoise-awaits-tool"
TTFT_HEADER = "x-equipoise-ttft-ms"
DEADLINE_HEADER = "x-equipoise-deadline-ms"
TPOT_HEADER = "x-equipoise-tpot-ms"
DEFAULT_TENANT = TenantId("default")
_MAX_ID_CHARACTERS = 200
# JSON can spell half a UTF-16 pair, which no UTF-8 text contains and no tokenizer takes.
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class HttpConfig:
    max_body_bytes: int = 8 << 20
    api_keys: Mapping[str, TenantId] = field(default_factory=dict)
    """Key to tenant. Empty: no key is asked for. A client is then of its sandbox's tenant where the daemon knows that,
    else the tenant header is believed."""
    body_timeout_s: float = 30.0
    """A body that has not arrived whole after this is answered with 408."""


_Parse = Callable[[wire.Json, wire.Caller, LanguageModel], wire.Ask]


class TurnStream:
    """The events of one turn, carried from the engine's thread into this event loop."""

    def __init__(self, engine: Engine, deliveries: Deliveries) -> None:
        self._engine = engine
        self._deliveries = deliveries
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[TurnEvent] = asyncio.Queue()
        self._turn_id: TurnId | None = None
        self._ended = False

    async def open(self, request: TurnRequest) -> TurnAccepted:
        """Submit the turn. Raises RequestError where the engine refuses it."""
        self._turn_id = self._engine.submit(request, self._carry)
        try:
            first = await self._events.get()
        except asyncio.CancelledError:
            self.close()
            raise
        if isinstance(first, TurnRefused):
            self._ended = True
            raise first.error
        assert isinstance(first, TurnAccepted)
        return first

    @property
    def turn_id(self) -> str:
        """Once it is open."""
        return self._turn_id or ""

    def _carry(self, event: TurnEvent) -> None:
        self._deliveries.put(self._loop, partial(self._events.put_nowait, event))

    async def events(self) -> AsyncIterator[TextDelta | TurnFinished]:
        while not self._ended:
            event = await self._events.get()
            if isinstance(event, TurnFinished):
                self._ended = True
            assert isinstance(event, TextDelta | TurnFinished)
            yield event

    def close(self) -> None:
        """Cancel the turn unless it has ended."""
        if not self._ended and self._turn_id is not None:
            self._engine.cancel(self._turn_id)


class Endpoint:
    """The routes over one engine."""

    def __init__(self, engine: Engine, config: HttpConfig, peers: Peers | None = None) -> None:
        """`peers`: who the clients are, where a daemon may know."""
        self._engine = engine
        self._peers = peers
        self._deliveries = Deliveries(engine)
        self._config = config
        self._loaded_at = int(time.time())

    def application(self, on_startup: Any = None) -> Starlette:
        """The ASGI application. `on_startup`: an async context manager entered while it serves."""

        @asynccontextmanager
        async def nothing(app: Starlette) -> AsyncIterator[None]:
            yield

        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model}", self.model),
                Route("/metrics", self.metrics),
                Route("/healthz", self.health),
                Route("/health", self.health),
            ],
            exception_handlers={
                RequestError: _refuse,
                EngineError: _unavailable,
                404: _not_found,
                405: _not_found,
                500: _broken,
            },
            lifespan=on_startup or nothing,
        )

    # Routes

    async def chat(self, request: Request) -> Response:
        return await self._ask(request, wire.parse_chat)

    async def completions(self, request: Request) -> Response:
        return await self._ask(request, wire.parse_completion)

    async def _ask(self, request: Request, parse: _Parse) -> Response:
        body, caller = await self._read(request)
        # Rendering a long conversation or compiling a schema takes its time: not while others wait for their tokens.
        return await self._answer(request, await asyncio.to_thread(parse, body, caller, self._engine.model))

    async def models(self, request: Request) -> Response:
        await self._tenant(request)
        return JSONResponse(wire.models_json(self._engine.model, self._loaded_at, self._engine.longest_turn_tokens))

    async def model(self, request: Request) -> Response:
        await self._tenant(request)
        self._check_model(request.path_params["model"])
        listing = wire.models_json(self._engine.model, self._loaded_at, self._engine.longest_turn_tokens)
        return JSONResponse(listing["data"][0])

    async def metrics(self, request: Request) -> Response:
        books = await asyncio.to_thread(self._engine.books_now)
        return Response(metrics.page(*books), media_type=CONTENT_TYPE_LATEST)

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    # Reading

    async def _read(self, request: Request) -> tuple[wire.Json, wire.Caller]:
        tenant_id, proved = await self._tenant(request)
        peer = _peer(request)
        body = await self._body(request)
        if (model := body.get("model")) is not None:
            self._check_model(model)
        session = next((request.headers[h] for h in SESSION_HEADERS if h in request.headers), None)
        if session is not None and not 0 < len(session) <= _MAX_ID_CHARACTERS:
            raise RequestError(f"{SESSION_HEADERS[0]}: give 1 to {_MAX_ID_CHARACTERS} characters")
        session_id = SessionId(session) if session else None
        caller = wire.Caller(
            tenant_id=tenant_id,
            session_id=tenants_session(tenant_id, session_id) if session_id and proved else session_id,
            peer_port=peer.port if peer else None,
            peer_address=peer.address if peer else None,
            awaits_tool=request.headers.get(AWAITS_TOOL_HEADER, "").lower() in ("1", "true"),
            slo=Slo(
                ttft_ns=_milliseconds(request, TTFT_HEADER),
                deadline_ns=_milliseconds(request, DEADLINE_HEADER),
                tpot_ns=_milliseconds(request, TPOT_HEADER),
            ),
        )
        return body, caller

    async def _body(self, request: Request) -> wire.Json:
        limit = self._config.max_body_bytes
        data = bytearray()
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                async for part in request.stream():
                    data += part
                    if len(data) > limit:
                        raise RequestError(f"the body is larger than {limit} bytes", status=413, code="body_too_large")
        except TimeoutError:
            seconds = self._config.body_timeout_s
            raise RequestError(
                f"the body did not arrive within {seconds:g} s", status=408, code="request_timeout"
            ) from None
        except ClientDisconnect:
            raise RequestError("the client went away while sending", status=499) from None
        try:
            body = json.loads(data.decode("utf-8"))
            if _HALF_PAIR.search(data):
                json.dumps(body, ensure_ascii=False).encode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"the body is not UTF-8: byte {error.start}") from None
        except UnicodeEncodeError:
            raise RequestError("the body is not Unicode: half a surrogate pair stands alone") from None
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise RequestError("the body is not a JSON object")
        return body

    async def _tenant(self, request: Request) -> tuple[TenantId, bool]:
        """Whose the request is: its key's, else its sandbox's, else as it says; and whether that is proved."""
        named = request.headers.get(TENANT_HEADER)
        if not self._config.api_keys:
            if named is not None and not 0 < len(named) <= _MAX_ID_CHARACTERS:
                raise RequestError(f"{TENANT_HEADER}: give 1 to {_MAX_ID_CHARACTERS} characters")
            known = await self._known(request)
            if known is None:
                return TenantId(named) if named else DEFAULT_TENANT, False
            if named not in (None, known.tenant_id):
                raise RequestError(
                    f"{TENANT_HEADER}: {named!r}: this request is from sandbox {known.sandbox}: leave the header out",
                    status=403,
                    kind="permission_error",
                    code="another_tenant",
                )
            return known.tenant_id, True
        key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        for listed, tenant_id in self._config.api_keys.items():
            if hmac.compare_digest(listed.encode(), key.encode()):
                return tenant_id, True
        raise RequestError(
            "no such API key: send `Authorization: Bearer KEY`",
            status=401,
            kind="authentication_error",
            code="invalid_api_key",
        )

    async def _known(self, request: Request) -> PeerIs | None:
        peer = _peer(request)
        return await self._peers.who(peer) if peer is not None and self._peers is not None else None

    def _check_model(self, model: object) -> None:
        if model not in (self._engine.model.name, "default"):
            raise RequestError(
                f"model {model!r}: this engine serves {self._engine.model.name!r} (or `default`)",
                status=404,
                code="model_not_found",
                param="model",
            )

    # Answering

    async def _answer(self, request: Request, ask: wire.Ask) -> Response:
        stream = TurnStream(self._engine, self._deliveries)
        accepted = await stream.open(ask.turn)
        answer = wire.Answer(self._engine.model.name, ask, accepted.session_id, stream.turn_id)
        if ask.stream:
            return StreamingResponse(
                self._stream(stream, ask, answer),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache"},
            )
        return await self._whole(request, stream, ask, answer)

    async def _whole(self, request: Request, stream: TurnStream, ask: wire.Ask, answer: wire.Answer) -> Response:
        watcher = asyncio.create_task(_cancel_on_disconnect(request, stream))
        try:
            text: list[str] = []
            logprobs: list[TokenLogprob] = []
            async for event in stream.events():
                if isinstance(event, TextDelta):
                    text.append(event.text)
                    logprobs.extend(event.logprobs)
                    continue
                if event.reason is FinishReason.ERROR:
                    raise RequestError(event.error or "the step failed", status=500, kind="server_error")
                whole = "".join(text)
                calls: list[ToolCall] = []
                if ask.turn.may_call_tools:
                    whole, calls = tool_calls_in(whole)
                return JSONResponse(answer.whole(whole, calls, answer.logprobs(self._engine.model, logprobs), event))
        finally:
            watcher.cancel()
            stream.close()
        raise RequestError("the turn ended without a word", status=500, kind="server_error")

    async def _stream(self, stream: TurnStream, ask: wire.Ask, answer: wire.Answer) -> AsyncIterator[bytes]:
        try:
            if ask.chat:
                yield wire.sse(answer.opening())
            tools = ToolCallStream() if ask.turn.may_call_tools else None
            unsent: list[TokenLogprob] = []  # of text still held back
            async for event in stream.events():
                calls: list[ToolCall] = []
                if isinstance(event, TextDelta):
                    text = event.text
                    unsent.extend(event.logprobs)
                    if tools is not None:
                        text, calls = tools.push(text)
                elif event.reason is FinishReason.ERROR:
                    failure = RequestError(event.error or "the step failed", status=500, kind="server_error")
                    yield wire.sse(wire.error_json(failure))
                    return
                else:
                    text = tools.flush() if tools is not None else ""
                if text or (unsent and (tools is None or isinstance(event, TurnFinished))):
                    yield wire.sse(answer.piece(text, answer.logprobs(self._engine.model, unsent)))
                    unsent.clear()
                for chunk in answer.calls(calls):
                    yield wire.sse(chunk)
                if isinstance(event, TextDelta):
                    continue
                yield wire.sse(answer.closing(event))
                if ask.stream_usage:
                    yield wire.sse(answer.usage_chunk(event))
            yield wire.sse("[DONE]")
        finally:
            stream.close()


def _peer(request: Request) -> Peer | None:
    """The other end of the connection; None where there is no TCP connection."""
    peer: Peer | None = getattr(request.state, "peer", None)
    return peer


def _milliseconds(request: Request, header: str) -> int | None:
    """A wished time in nanoseconds; None where the header is absent."""
    text = request.headers.get(header)
    if text is None:
        return None
    if not text.isdigit() or not 0 < int(text) <= 86_400_000:
        raise RequestError(f"{header}: {text!r}: give whole milliseconds, up to a day")
    return int(text) * 1_000_000


async def _cancel_on_disconnect(request: Request, stream: TurnStream) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            stream.close()
            return


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(wire.error_json(error), status_code=error.status, headers=headers)


async def _unavailable(request: Request, error: Exception) -> Response:
    failure = RequestError(str(error), status=503, kind="server_error", retry_after_s=1)
    return await _refuse(request, failure)


async def _broken(request: Request, error: Exception) -> Response:
    """A fault of ours: uvicorn logs its stack, the client is told in the format it reads."""
    return await _refuse(request, RequestError("the engine failed: see its log", status=500, kind="server_error"))


async def _not_found(request: Request, error: Exception) -> Response:
    message = f"{request.method} {request.url.path}: no such route"
    status = getattr(error, "status_code", 404)
    return JSONResponse(wire.error_json(RequestError(message, status=status)), status_code=status)
