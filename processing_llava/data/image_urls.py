"""UrlPolicy: which URLs an image may be fetched from, and at what cost.

A server that fetches whatever address it is sent can be made to reach hosts that the sender cannot: services of its
own machine and network. Names are no protection, since they can lead anywhere. So a host must be listed, every address
that its name has must be public, and the connection goes to an address that was checked instead of asking for the name
once more; the certificate is verified against the name all the same. A redirection is checked like the first URL.

Only the standard library is used.
"""

import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

_PORTS = {"https": 443, "http": 80}
_REDIRECTIONS = (301, 302, 303, 307, 308)
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close", "User-Agent": "anyllava"}
_BLOCK = 2**16
# The last 32 bits of such an address are one of IPv4, to which a translator passes everything on.
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
# What is given to hosts of the public internet in IPv6; elsewhere lie translators, tunnels and older private ranges.
_PUBLIC = ipaddress.ip_network("2000::/3")
# Tunnels to any address of IPv4, which not every Python counts as private.
_TUNNELS = ipaddress.ip_network("2002::/16")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, kw_only=True)
class UrlPolicy:
    """What may be fetched, for `load_image(urls=...)` and the image processors.

    Raises:
        ValueError: one host instead of a list, an unknown scheme, a network that is none, or no time at all.
    """

    hosts: Collection[str]
    """Names of hosts in lower case; "host:port" for other ports than the scheme's own."""
    schemes: Collection[str] = ("https",)
    """"https", and "http" where nobody in between can be a danger."""
    networks: Collection[str] = ()
    """Networks such as "10.1.0.0/16" whose addresses are allowed although they are not public."""
    max_seconds: float = 10.0
    """Longest time for everything together."""
    max_redirections: int = 3
    tls: ssl.SSLContext | None = None
    """Which certificates are trusted; those of the system by default."""

    def __post_init__(self) -> None:
        for name in ("hosts", "schemes", "networks"):
            if isinstance(getattr(self, name), str):
                # "a.org" would be found in "data.org".
                raise ValueError(f"got {name}={getattr(self, name)!r}; expected a list; put it into one")
        for scheme in self.schemes:
            if scheme not in _PORTS:
                raise ValueError(f"got scheme {scheme!r}; expected https or http; correct the policy")
        if not self.max_seconds > 0:
            raise ValueError(f"got max_seconds={self.max_seconds}; expected more than 0; correct the policy")
        for network in self.networks:
            ipaddress.ip_network(network)

    def fetch(self, url: str, *, max_bytes: int) -> bytes:
        """The image that a URL leads to, still encoded.

        Args:
            url: One with a listed host.
            max_bytes: Larger answers are refused; their rest is not read.

        Raises:
            ValueError: the URL or an address is not allowed, or the answer is late, too large, broken or no image.
        """
        deadline = time.monotonic() + self.max_seconds
        target = url
        try:
            for _ in range(self.max_redirections + 1):
                parts = self._check(target)
                with self._connect(parts, deadline) as connected:
                    response = _request(parts, _TimedSocket(connected, deadline))
                    if response.status not in _REDIRECTIONS:
                        return _read_image(response, max_bytes=max_bytes)
                    target = urljoin(target, response.getheader("Location", ""))
            raise ValueError(f"more than {self.max_redirections} redirections")
        except TimeoutError:
            reason = f"no whole answer within {self.max_seconds:g} seconds"
        except (OSError, http.client.HTTPException) as error:
            reason = f"{type(error).__name__}: {error}"
        except ValueError as error:
            reason = str(error)
        raise ValueError(
            f"got the URL {url.partition('?')[0][:80]!r} ({reason}); expected an image that the UrlPolicy allows; "
            "send the image itself, or change the policy"
        ) from None

    def _check(self, url: str) -> SplitResult:
        parts = urlsplit(url)
        if parts.scheme not in self.schemes:
            raise ValueError(f"scheme {parts.scheme!r}, where {', '.join(self.schemes)} is allowed")
        if "@" in parts.netloc:
            raise ValueError("a user name in front of the host")
        if _name_host(parts) not in self.hosts:
            raise ValueError(f"host {_name_host(parts)!r} is not in the list")
        return parts

    def _connect(self, parts: SplitResult, deadline: float) -> socket.socket:
        """Connected to an address that was checked."""
        found = _resolve(parts.hostname, parts.port or _PORTS[parts.scheme], deadline)
        for *_, place in found:
            address = ipaddress.ip_address(place[0].partition("%")[0])
            if not self._is_allowed(address):
                raise ValueError(f"host {parts.hostname!r} has the address {address}, which is not public")
        problem = OSError("no address")
        for number, (family, kind, protocol, _, place) in enumerate(found):
            try:
                # One that is silent leaves the others their share of the time.
                seconds = _remaining(deadline) / (len(found) - number)
                connected = _open_socket(family, kind, protocol, place, seconds)
            except OSError as error:
                problem = error
                continue
            try:
                if parts.scheme == "https":
                    connected.settimeout(_remaining(deadline))
                    tls = self.tls or ssl.create_default_context()
                    return tls.wrap_socket(connected, server_hostname=parts.hostname)
                return connected
            except OSError as error:
                connected.close()
                problem = error
        raise problem

    def _is_allowed(self, address: Address) -> bool:
        if any(address in ipaddress.ip_network(network) for network in self.networks):
            return True
        if address in _TRANSLATED:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.version == 6 and address not in _PUBLIC:
            return False
        return address.is_global and not address.is_multicast and address not in _TUNNELS


class _TimedSocket(io.RawIOBase):
    """The part of a socket that http.client uses, with one deadline for all of it."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self.connected = connected
        self.deadline = deadline

    def sendall(self, data: bytes) -> None:
        self.connected.settimeout(_remaining(self.deadline))
        self.connected.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self.connected.settimeout(_remaining(self.deadline))
        return self.connected.recv_into(buffer)


def _resolve(host: str, port: int, deadline: float) -> list[tuple]:
    """The addresses of a name, asked for in a thread: the system may take as long as it likes."""
    answers: queue.SimpleQueue[list[tuple] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_remaining(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _open_socket(family: int, kind: int, protocol: int, place: tuple, seconds: float) -> socket.socket:
    # Fails for a family that this machine lacks.
    connected = socket.socket(family, kind, protocol)
    try:
        connected.settimeout(seconds)
        connected.connect(place)
    except OSError:
        connected.close()
        raise
    return connected


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _name_host(parts: SplitResult) -> str:
    is_usual = parts.port in (None, _PORTS[parts.scheme])
    return f"{parts.hostname}" if is_usual else f"{parts.hostname}:{parts.port}"


def _request(parts: SplitResult, connected: _TimedSocket) -> http.client.HTTPResponse:
    """The answer, with its headers read."""
    connection = http.client.HTTPConnection(parts.hostname)
    connection.sock = connected
    path = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*") + (f"?{parts.query}" if parts.query else "")
    connection.request("GET", path, headers={"Host": _name_host(parts), **_HEADERS})
    response = http.client.HTTPResponse(connected, method="GET")
    response.begin()
    return response


def _read_image(response: http.client.HTTPResponse, *, max_bytes: int) -> bytes:
    if response.status != 200:
        raise ValueError(f"the answer {response.status} {response.reason}")
    kind = response.headers.get_content_type()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        raise ValueError(f"an answer of type {kind}")
    data = bytearray()
    while block := response.read(_BLOCK):
        data += block
        if len(data) > max_bytes:
            raise ValueError(f"more than {max_bytes} bytes")
    return bytes(data)
