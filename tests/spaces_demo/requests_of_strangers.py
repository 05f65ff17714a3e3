"""Raw requests: any header, body and end, as no browser and no client would send them."""

import http.client
import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

BOUNDARY = "b0undary"
JSON = {"Content-Type": "application/json"}
MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
SECONDS = 30


@dataclass
class Response:
    status: int
    """0 if the page hung up without an answer."""
    headers: dict[str, str]
    text: str


def part(data: bytes, *, name: str = "files", filename: str | None = "picture.png") -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=SECONDS)


def begin(url: str, method: str, path: str, headers: dict[str, str | None] | None = None) -> socket.socket:
    """A connection that has sent the head of a request; a header of None is left out."""
    lines = {"Host": urlsplit(url).netloc} | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    connection = connect(url)
    connection.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1"))
    return connection


def finish(connection: socket.socket, method: str = "GET") -> Response:
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
        deadline, body = time.monotonic() + SECONDS, b""
        while piece := response.read1(65_536):
            body += piece
            assert time.monotonic() < deadline, f"an answer without an end: {body[-1000:]!r}"
    except (http.client.HTTPException, OSError):
        return Response(0, {}, "")
    finally:
        connection.close()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Response(response.status, headers, body.decode("utf-8", "replace"))


def send(
    url: str, method: str, path: str, *, headers: dict[str, str | None] | None = None, body: bytes = b""
) -> Response:
    length = {"Content-Length": str(len(body))} if method != "GET" else {}
    connection = begin(url, method, path, length | (headers or {}))
    # The page may answer and hang up before the body is read.
    with suppress(OSError):
        connection.sendall(body)
    return finish(connection, method)


def call(url: str, name: str, data: list, **headers: str) -> Response:
    body = json.dumps({"data": data}).encode()
    return send(url, "POST", f"/gradio_api/call/{name}", headers=JSON | headers, body=body)


def send_in_chunks(url: str, path: str, *, headers: dict[str, str], num_bytes: int) -> tuple[Response, int]:
    """The answer to a body without a length, and how many bytes of it the page took."""
    connection = begin(url, "POST", path, headers | {"Transfer-Encoding": "chunked"})
    chunk, sent = b" " * 65_536, 0
    with suppress(OSError):
        while sent < num_bytes:
            connection.sendall(b"10000\r\n" + chunk + b"\r\n")
            sent += len(chunk)
        connection.sendall(b"0\r\n\r\n")
    return finish(connection, "POST"), sent
