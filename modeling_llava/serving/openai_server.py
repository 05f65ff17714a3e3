"""The server of `llava serve`: OpenAI's API over HTTP, for one machine.

Every route but /health needs a key, where keys are set. What one client computes speeds up no other: caches are kept
apart by key. Nothing that a client sends is written to the log.

What is surprising: without a key the server answers this machine alone, and there only requests that no web page can
send (`guard.py`).
"""

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from modeling_llava.commands.errors import one_line
from modeling_llava.inference.answer_requests import AnswerRequest, BatchedAnswer

from .engine_thread import AnswerPart, Busy, EngineThread
from .guard import Guard, log_error
from .model_menu import MemoryShort
from .openai_answers import ChatWriter, ResponseWriter, describe_error
from .openai_requests import Call, RequestError, RequestLimits, read_chat, read_json, read_responses
from .served_models import ServedModels

MAX_BODY = 32 * 2**20
MAX_READERS = 2
"""Bodies that are parsed at a time."""
RETRY_SECONDS = 2
OPEN_PATH = "/health"
LEFT = 499
"""Status of an answer that nobody waits for."""


def build_server(
    models: ServedModels,
    *,
    keys: list[str] = (),
    hosts: Callable[[], list[str]] | None = None,
    limits: RequestLimits | None = None,
    max_seconds: float = 600.0,
    max_body: int = MAX_BODY,
) -> Starlette:
    """The app.

    Args:
        models: What it serves.
        keys: Any of them opens every route; none leaves all of them open.
        hosts: As in `Guard`.
        limits: What one request may hold.
        max_seconds: Longest time until the end of an answer.
        max_body: Bytes of a request.
    """
    server = _Server(models, limits=limits or RequestLimits(), max_seconds=max_seconds)
    routes = [
        Route(OPEN_PATH, server.tell_health),
        Route("/metrics", server.tell_metrics),
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name:path}", server.tell_model),
        Route("/v1/chat/completions", server.complete_chat, methods=["POST"]),
        Route("/v1/responses", server.respond, methods=["POST"]),
    ]
    guard = Middleware(
        Guard,
        hosts=hosts,
        body_limits={"/v1/chat/completions": max_body, "/v1/responses": max_body},
        describe=lambda status, reason: describe_error(reason, status=status),
    )
    return Starlette(
        routes=routes,
        middleware=[guard, Middleware(Keys, keys=keys)],
        exception_handlers={404: _tell_unknown, 405: _tell_unknown},
        lifespan=server.live,
    )


class Keys:
    """ASGI middleware: a request has one of the keys, whose digest becomes its scope, or the path is open to all."""

    def __init__(self, app: ASGIApp, *, keys: list[str]) -> None:
        self.app = app
        self.digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scheme, _, key = Request(scope).headers.get("authorization", "").partition(" ")
            digest = _digest(key.strip())
            # All of them are compared, so that time tells nothing.
            found = [hmac.compare_digest(digest, known) for known in self.digests]
            is_known = scheme.lower() == "bearer" and any(found)
            if self.digests and not is_known and scope["path"] != OPEN_PATH:
                message = "got no key that this server knows; expected Authorization: Bearer KEY"
                answer = JSONResponse(
                    describe_error(message, status=401, code="invalid_api_key"),
                    status_code=401,
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await answer(scope, receive, send)
                return
            scope["user"] = digest if self.digests else b""
        await self.app(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class _Server:
    def __init__(self, models: ServedModels, *, limits: RequestLimits, max_seconds: float) -> None:
        self.models = models
        self.limits = limits
        self.max_seconds = max_seconds
        self.created = int(time.time())
        self.readers = asyncio.Semaphore(MAX_READERS)
        self.metrics = _Metrics(models)

    @asynccontextmanager
    async def live(self, app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await run_in_threadpool(self.models.close)

    async def tell_health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def tell_metrics(self, request: Request) -> Response:
        text = generate_latest(self.metrics.registry)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe(name) for name in self.models.names]})

    async def tell_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.models.names:
            return self._refuse(self._find_unknown(name))
        return JSONResponse(self._describe(name))

    async def complete_chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat, ChatWriter)

    async def respond(self, request: Request) -> Response:
        return await self._answer(request, read_responses, ResponseWriter)

    async def _answer(self, request: Request, read: Callable[..., Call], writer_class: type) -> Response:
        route = request.url.path
        try:
            async with self.readers:
                body = await run_in_threadpool(read_json, await request.body())
                call = await run_in_threadpool(read, body, scope=request.scope["user"], limits=self.limits)
                del body
            if call.model not in self.models.names:
                raise self._find_unknown(call.model)
            engine = await run_in_threadpool(self.models.load, call.model)
            writer = writer_class(call, engine.batch.processor.tokenizer)
            merged = self._merge(engine, call.requests)
            # Refusals have a status; so nothing is sent before the first part is there.
            response = await _unless_left(request, self._begin(writer, merged, stream=call.stream))
        except ClientDisconnect:
            response = Response(status_code=LEFT)
        except Exception as error:
            response = self._refuse(error)
        self.metrics.requests.labels(route, str(response.status_code)).inc()
        return response

    async def _begin(self, writer, merged: AsyncIterator[tuple[int, AnswerPart]], *, stream: bool) -> Response:
        if not stream:
            async with aclosing(merged):
                answers = {index: part.answer async for index, part in merged}
            return JSONResponse(writer.write_whole([answers[index] for index in sorted(answers)]))
        try:
            first = await anext(merged)
        except BaseException:
            await merged.aclose()
            raise
        return StreamingResponse(self._write_events(writer, first, merged), media_type="text/event-stream")

    async def _write_events(
        self, writer, first: tuple[int, AnswerPart], merged: AsyncIterator[tuple[int, AnswerPart]]
    ) -> AsyncIterator[str]:
        answers: dict[int, BatchedAnswer] = {}

        async def all_parts() -> AsyncIterator[tuple[int, AnswerPart]]:
            yield first
            async for item in merged:
                yield item

        async with aclosing(merged):
            for event in writer.begin():
                yield event
            try:
                async for index, part in all_parts():
                    if part.answer is not None:
                        answers[index] = part.answer
                    for event in writer.write_part(index, part):
                        yield event
                for event in writer.finish([answers[index] for index in sorted(answers)]):
                    yield event
            except Exception as error:
                status, told = self._describe_error(error)
                for event in writer.fail(told):
                    yield event

    async def _merge(
        self, engine: EngineThread, requests: list[AnswerRequest]
    ) -> AsyncIterator[tuple[int, AnswerPart]]:
        """The parts of all answers as they come, each with the index of its request."""
        parts: asyncio.Queue[tuple[int, AnswerPart] | Exception] = asyncio.Queue()
        started = time.monotonic()

        async def follow(index: int, request: AnswerRequest) -> None:
            try:
                async with aclosing(engine.answer(request)) as found:
                    async for part in found:
                        parts.put_nowait((index, part))
            except Exception as error:
                parts.put_nowait(error)

        tasks = [asyncio.create_task(follow(index, request)) for index, request in enumerate(requests)]
        try:
            num_left, is_first = len(requests), True
            while num_left:
                async with asyncio.timeout(max(0, started + self.max_seconds - time.monotonic())):
                    item = await parts.get()
                if isinstance(item, Exception):
                    raise item
                self.metrics.follow(item[1], started if is_first else None)
                is_first = False
                num_left -= item[1].answer is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _describe(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "anyllava"}

    def _find_unknown(self, name: str) -> RequestError:
        return RequestError(
            f"got the model {name[:100]!r}; expected one of {', '.join(self.models.names)}",
            param="model",
            status=404,
            code="model_not_found",
        )

    def _describe_error(self, error: Exception) -> tuple[int, dict[str, object]]:
        if isinstance(error, RequestError):
            status, code, param = error.status, error.code, error.param
        elif isinstance(error, Busy):
            status, code, param = 429, "too_many_requests", None
        elif isinstance(error, MemoryShort):
            status, code, param = 503, "memory_short", None
        elif isinstance(error, TimeoutError):
            return 504, describe_error(
                f"got an answer of more than {self.max_seconds:g} seconds; expected less: ask for fewer tokens",
                status=504,
                code="timeout",
            )
        elif isinstance(error, (ValueError, FileNotFoundError)):
            status, code, param = 400, None, None
        else:
            log_error(error)
            return 500, describe_error(
                f"got a request that this server cannot answer ({type(error).__name__}); try again", status=500
            )
        return status, describe_error(one_line(error), status=status, code=code, param=param)

    def _refuse(self, error: Exception) -> Response:
        status, told = self._describe_error(error)
        headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
        return JSONResponse(told, status_code=status, headers=headers)


class _Metrics:
    """What Prometheus reads."""

    def __init__(self, models: ServedModels) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "llava_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("llava_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.reused_tokens = Counter(
            "llava_reused_prompt_tokens", "Tokens of prompts that were known.", registry=self.registry
        )
        self.new_tokens = Counter("llava_generation_tokens", "Tokens of answers.", registry=self.registry)
        seconds = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
        self.first = Histogram(
            "llava_time_to_first_token_seconds", "Seconds to the first token.", buckets=seconds, registry=self.registry
        )
        for name, text, count in (
            ("running", "Requests being answered.", lambda: sum(e.num_running for e in models.engines.values())),
            ("open", "Requests being answered or waiting.", lambda: sum(e.num_open for e in models.engines.values())),
        ):
            Gauge(f"llava_requests_{name}", text, registry=self.registry).set_function(count)
        cache = Gauge("llava_cache_bytes", "Bytes of cached keys, values and features.", registry=self.registry)
        cache.set_function(models.count_cache_bytes)

    def follow(self, part: AnswerPart, started: float | None) -> None:
        """Count a part; `started` comes with the first one of a call."""
        if started is not None:
            self.first.observe(time.monotonic() - started)
        if part.answer is not None:
            self.prompt_tokens.inc(part.answer.num_prompt_tokens)
            self.reused_tokens.inc(part.answer.num_reused_tokens)
            self.new_tokens.inc(len(part.answer.ids))


async def _unless_left(request: Request, answer) -> Response:
    """The answer, unless the client leaves before it is there.

    Raises:
        ClientDisconnect: if it does.
    """

    async def wait_until_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.create_task(answer), asyncio.create_task(wait_until_left())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _tell_unknown(request: Request, error: Exception) -> Response:
    status = error.status_code
    message = "got a path that this server does not have" if status == 404 else "got another method than this path has"
    return JSONResponse(describe_error(f"{message}; see /v1/models", status=status), status_code=status)
