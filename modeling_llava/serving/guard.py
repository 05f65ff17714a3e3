"""Guard: the middleware between strangers and what this package serves over HTTP, a page and a server alike.

It knows nothing of the app behind it. It looks at names and origins, bounds bodies in bytes and seconds, makes failed
logins cost time, sets security headers, and logs errors without what a visitor sent.

What is surprising: any web page that a user opens can send requests to a page on the user's own machine. The browser
names that other page in `Origin`; where its name was made to lead here (DNS rebinding), only `Host` tells. And an app
that reads a body has no limit of its own, so the body is cut here, as it comes: the app learns that the sender left.
"""

import asyncio
import ipaddress
import json
import logging
import re
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 2**20
"""Bytes of a body, unless a path has its own limit."""
NUM_FRAMES = 8
"""Lines of code that the log names for an error: strangers can cause many."""
SECONDS_OF_SILENCE = 30
SECONDS_OF_A_BODY = 300
SECURITY_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin"}

_ADDRESS = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]{1,253})(?::([0-9]{1,5}))?")
"""A name and a port, as in `Host`."""
_ORIGIN = re.compile(r"https?://(.*)")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")

logger = logging.getLogger(__name__)


def log_error(error: Exception) -> None:
    """What went wrong and where; not the message, which may hold what a visitor sent."""
    frames = "".join(traceback.format_tb(error.__traceback__, limit=-NUM_FRAMES))
    logger.error("%s\n%s", type(error).__name__, frames)


class Guard:
    """ASGI middleware.

    Args:
        hosts: Gives the names by which it may be reached, beside those of this machine. None takes every name, for a
            server that everybody reaches anyway.
        origins: Names of other sites whose pages may send requests.
        headers: Headers of every answer, beside `SECURITY_HEADERS`.
        body_limits: Bytes of a body by the end of the path.
        login_path: End of the path whose refusals count as failed logins.
        attempts: What these cost.
        describe: The JSON of a refusal, by its status and reason.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Callable[[], Collection[str]] | None,
        origins: Collection[str] = (),
        headers: Mapping[str, str] | None = None,
        body_limits: Mapping[str, int] | None = None,
        login_path: str | None = None,
        attempts: "AttemptLimit | None" = None,
        describe: Callable[[int, str], object] = lambda status, reason: {"detail": reason},
    ) -> None:
        self.app = app
        self.describe = describe
        self.hosts = hosts
        self.origins = frozenset(origins)
        self.headers = SECURITY_HEADERS | dict(headers or {})
        self.body_limits = dict(body_limits or {})
        self.login_path = login_path
        self.attempts = attempts or AttemptLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            # Nothing here speaks over web sockets, whose origins browsers do not check.
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/")
        limits = (limit for end, limit in self.body_limits.items() if path.endswith(end))
        exchange = _Exchange(
            scope, receive, send, max_body=next(limits, MAX_BODY), headers=self.headers, describe=self.describe
        )
        refusal = self._find_refusal(scope, exchange)
        if refusal is not None:
            await exchange.refuse(*refusal)
            return
        is_login = self.login_path is not None and scope["method"] == "POST" and path.endswith(self.login_path)
        address = scope["client"][0] if scope.get("client") else ""
        if is_login:
            seconds = self.attempts.begin(address)
            if seconds:
                await exchange.refuse(
                    429,
                    f"got too many wrong passwords; try again in {seconds} s",
                    {"Retry-After": str(seconds)},
                )
                return
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.refusal is None and not exchange.is_left:
                log_error(error)
                exchange.refusal = 500, "got a request that cannot be answered; correct it"
        if exchange.refusal is not None and exchange.status is None:
            await exchange.refuse(*exchange.refusal)
        if is_login and exchange.status is not None and exchange.status < 400:
            self.attempts.succeed(address)

    def _find_refusal(self, scope: Scope, exchange: "_Exchange") -> tuple[int, str] | None:
        """Status and reason, if the app must not see the request."""
        if _CONTROLS.search(scope["path"]):
            # Some routers take a path with a line end for the one without (starlette 1.10, routing.py).
            return 400, "got a path with control characters; expected none"
        # Proxies send the second, and links to the page are made of it (Gradio 6.31, route_utils.py).
        named = [*exchange.request.getlist("host"), *exchange.request.getlist("x-forwarded-host")]
        addresses = [_read_address(name) for names in named for name in names.split(",")]
        for address in addresses:
            if address is None or not self._is_own_name(address[0], scope):
                return 403, (
                    f"got a request for the host {address[0] if address else '(malformed)'}; expected one of this "
                    "server; its operator can allow it (--allow-host NAME)"
                )
        if not exchange.request.getlist("host"):
            return 400, "got a request without Host; expected one"
        for origin in exchange.request.getlist("origin"):
            match = _ORIGIN.fullmatch(origin.lower())
            address = _read_address(match[1]) if match else None
            if address is None or not (address in addresses or address[0] in self._list_named()):
                return 403, (
                    "got a request from a page of another site; expected one of this server; where a proxy gives it "
                    "another name, its operator can allow that (--allow-host NAME)"
                )
        if exchange.length > exchange.max_body:
            return exchange.too_large
        return None

    def _list_named(self) -> Collection[str]:
        return self.origins | set(self.hosts() if self.hosts else ())

    def _is_own_name(self, name: str, scope: Scope) -> bool:
        if self.hosts is None or name == "localhost" or name.endswith(".localhost") or name in self._list_named():
            return True
        # Numbers need no name server, so none can be made to lead here. They are others' where only this machine is
        # listened to.
        return _is_of_this_machine(name) or (_is_number(name) and not _is_of_this_machine(_read_server(scope)))


def _read_server(scope: Scope) -> str:
    """The number by which the connection came in; this machine's where there is none, as with a Unix socket."""
    server = scope.get("server")
    return server[0] if server and server[1] is not None else "127.0.0.1"


def _read_address(text: str) -> tuple[str, str] | None:
    """(name, port) of a `Host`, the usual ports as ""; None if it is malformed."""
    match = _ADDRESS.fullmatch(text.strip().lower())
    if match is None:
        return None
    name, port = match[1].strip("[]").removesuffix("."), match[2] or ""
    return name, "" if port in ("80", "443") else port


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_of_this_machine(name: str) -> bool:
    if not _is_number(name):
        return False
    number = ipaddress.ip_address(name)
    return number.is_loopback or number.is_unspecified


class _Exchange:
    """A request that is read up to its limits, and an answer with headers: the app's, or a refusal."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        max_body: int,
        headers: Mapping[str, str],
        describe: Callable[[int, str], object],
    ) -> None:
        self.request = Headers(scope=scope)
        self.describe = describe
        self.max_body = max_body
        self.headers = headers
        length = self.request.get("content-length", "0")
        self.length = int(length) if length.isdecimal() else 0
        """What the sender says; more or less may come."""
        self.is_whole = not self.length and "transfer-encoding" not in self.request
        self.is_left = False
        """Whether the sender went away before the end of the body."""
        self.refusal: tuple[int, str] | None = None
        self.status: int | None = None
        self._receive = receive
        self._send = send
        self._num_bytes = 0
        self._deadline = time.monotonic() + SECONDS_OF_A_BODY
        self._is_refused = False

    @property
    def too_large(self) -> tuple[int, str]:
        return 413, f"got a request above {self.max_body} bytes; expected at most that; send less"

    async def receive(self) -> Message:
        if self.is_whole:
            return await self._receive()
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout(min(SECONDS_OF_SILENCE, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            self.refusal = 408, "got a request that came too slowly; send it again"
            return {"type": "http.disconnect"}
        if message["type"] == "http.disconnect":
            self.is_left = True
            return message
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self.max_body:
            self.refusal = self.too_large
            return {"type": "http.disconnect"}
        self.is_whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if self._is_refused:
            return
        if message["type"] == "http.response.start":
            if self.refusal is not None:
                # What the app says of a sender who left is not what happened.
                await self.refuse(*self.refusal)
                return
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(self.headers)
            if not self.is_whole:
                # Or the rest of the body would be read, to be thrown away (uvicorn 0.54, h11_impl.py).
                headers["Connection"] = "close"
        await self._send(message)

    async def refuse(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        self._is_refused = True
        self.status = status
        body = json.dumps(self.describe(status, reason)).encode()
        told = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **self.headers,
            **(headers or {}),
        }
        if not self.is_whole:
            told["Connection"] = "close"
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in told.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})


class AttemptLimit:
    """What wrong passwords cost: an address waits after some, twice as long each time; and all together wait too.

    Args:
        free: Attempts of an address without a wait.
        longest: Longest wait of an address in seconds, after which it is forgotten if nothing comes.
        per_minute: Failed attempts of all addresses together, so that many of them gain little.
        max_addresses: How many are remembered; the one that was silent longest is forgotten first.
        clock: Seconds.
    """

    def __init__(
        self,
        *,
        free: int = 5,
        longest: int = 300,
        per_minute: int = 100,
        max_addresses: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.free = free
        self.longest = longest
        self.max_addresses = max_addresses
        self.clock = clock
        self._waits: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """Number of attempts, and when the next one may come."""
        self._recent: deque[float] = deque(maxlen=per_minute)

    def begin(self, address: str) -> int:
        """Seconds to wait; 0 if the attempt may be made, which then counts as failed until it succeeds."""
        now, key = self.clock(), _find_network(address)
        num_attempts, free_at = self._waits.get(key, (0, now))
        if len(self._recent) == self._recent.maxlen:
            free_at = max(free_at, self._recent[0] + 60)
        if free_at > now:
            return int(free_at - now) + 1
        if now > free_at + self.longest:
            num_attempts = 0
        num_attempts += 1
        wait = min(2.0 ** min(num_attempts - self.free, 30), self.longest) if num_attempts >= self.free else 0
        self._waits[key] = num_attempts, now + wait
        self._waits.move_to_end(key)
        if len(self._waits) > self.max_addresses:
            self._waits.popitem(last=False)
        self._recent.append(now)
        return 0

    def succeed(self, address: str) -> None:
        """The attempt that was begun last had the right password."""
        self._waits.pop(_find_network(address), None)
        if self._recent:
            self._recent.pop()


def _find_network(address: str) -> str:
    """Of IPv6, everybody has as many addresses as they like, in one network of 64 bits."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    return str(ipaddress.ip_network((number, 64), strict=False)) if number.version == 6 else address
