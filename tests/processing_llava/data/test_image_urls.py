"""Fetching from real sockets on loopback: what a policy allows, and everything that a host may try."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from PIL import Image

from processing_llava.data.image_urls import UrlPolicy
from processing_llava.image_limits import ImageLimits
from processing_llava.image_loading import load_image
from tests.processing_llava.image_encoders import encode

PICTURE = encode(Image.new("RGB", (6, 4), "red"))
LOOPBACK = ("127.0.0.0/8", "::1/128")
Answer = Callable[[socket.socket], None]


def http_answer(body: bytes = PICTURE, *, status: str = "200 OK", kind: str = "image/png", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextmanager
def serve(answer: Answer | bytes, *, tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[bytes]]]:
    """A server that reads a request and answers; gives its port, and the requests that arrived."""
    requests: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def handle(connected: socket.socket) -> None:
        try:
            with connected if tls is None else tls.wrap_socket(connected, server_side=True) as peer:
                requests.append(peer.recv(65536))
                if isinstance(answer, bytes):
                    peer.sendall(answer)
                else:
                    answer(peer)
        except OSError:
            pass  # the client went away, as it should

    def accept() -> None:
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(connected,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def policy(*hosts: str, **changes) -> UrlPolicy:
    return UrlPolicy(**{"hosts": hosts, "schemes": ("http",), "networks": LOOPBACK, "max_seconds": 5.0} | changes)


def fetch(port: int, path: str = "/a.png", max_bytes: int = 10**6, **changes) -> bytes:
    url = f"http://localhost:{port}{path}"
    return policy(f"localhost:{port}", **changes).fetch(url, max_bytes=max_bytes)


@pytest.fixture
def resolve(monkeypatch):
    """Gives names other addresses; counts who asks."""
    addresses: dict[str, list[str]] = {}
    asked: list[str] = []
    original = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        asked.append(host)
        found = [original(address, port, *args, **kwargs) for address in addresses.get(host, [host])]
        return [entry for entries in found for entry in entries]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return addresses, asked


def test_an_image_is_fetched_and_loaded():
    with serve(http_answer()) as (port, requests):
        url = f"http://localhost:{port}/pictures/red circle.png?size=6"
        image = load_image(url.replace(" ", "%20"), urls=policy(f"localhost:{port}"))
        assert image.size == (6, 4)
        fetch(port, "/red circle.png")
    assert requests[0].startswith(b"GET /pictures/red%20circle.png?size=6 HTTP/1.1\r\n")
    assert f"Host: localhost:{port}\r\n".encode() in requests[0]
    assert requests[1].startswith(b"GET /red%20circle.png HTTP/1.1\r\n")


def test_loopback_is_refused_unless_the_policy_names_it():
    with serve(http_answer()) as (port, requests):
        with pytest.raises(ValueError, match="has the address (127.0.0.1|::1), which is not public"):
            fetch(port, networks=())
        assert requests == []


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1"),
        *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2001:db8::1", "2002:7f00:1::"),
        *("64:ff9b:1::7f00:1", "::127.0.0.1", "::ffff:0:7f00:1", "fec0::1", "4000::1"),
    ],
)
def test_addresses_that_are_not_public_are_refused(address, resolve):
    addresses, _ = resolve
    addresses["pictures.test"] = [address]
    with pytest.raises(ValueError, match="which is not public"):
        policy("pictures.test", networks=()).fetch("http://pictures.test/a.png", max_bytes=99)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101"])
def test_public_addresses_are_tried(address, resolve, monkeypatch):
    addresses, _ = resolve
    addresses["pictures.test"] = [address]
    tried = []

    def connect(self, place):
        tried.append(place[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(ValueError, match="ConnectionRefusedError"):
        policy("pictures.test", networks=()).fetch("http://pictures.test/a.png", max_bytes=99)
    assert tried == [address]


def test_every_address_of_a_name_must_be_public(resolve, monkeypatch):
    addresses, _ = resolve
    addresses["pictures.test"] = ["1.1.1.1", "10.0.0.1"]
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it connected"))
    with pytest.raises(ValueError, match="has the address 10.0.0.1, which is not public"):
        policy("pictures.test").fetch("http://pictures.test/a.png", max_bytes=99)


def test_the_second_address_is_used_where_the_first_does_not_answer(resolve):
    addresses, _ = resolve
    with serve(http_answer()) as (port, _):
        addresses["pictures.test"] = ["127.0.0.2", "127.0.0.1"]
        assert policy(f"pictures.test:{port}").fetch(f"http://pictures.test:{port}/", max_bytes=10**6) == PICTURE


def test_a_silent_first_address_leaves_time_for_the_second(resolve):
    addresses, _ = resolve
    with serve(http_answer()) as (port, _), socket.socket() as silent:
        # Whoever connects to a full queue gets no answer.
        silent.bind(("127.0.0.2", port))
        silent.listen(0)
        with ExitStack() as stack:
            for _ in range(3):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.2", port))
            addresses["pictures.test"] = ["127.0.0.2", "127.0.0.1"]
            urls = policy(f"pictures.test:{port}", max_seconds=2.0)
            assert urls.fetch(f"http://pictures.test:{port}/", max_bytes=10**6) == PICTURE


def test_an_address_of_a_family_that_this_machine_lacks_is_passed_over(resolve, monkeypatch):
    addresses, _ = resolve
    original = socket.socket

    def only_ipv4(family, *args, **kwargs):
        if family == socket.AF_INET6:
            raise OSError("Address family not supported by protocol")
        return original(family, *args, **kwargs)

    with serve(http_answer()) as (port, _):
        monkeypatch.setattr(socket, "socket", only_ipv4)
        addresses["pictures.test"] = ["::1", "127.0.0.1"]
        assert policy(f"pictures.test:{port}").fetch(f"http://pictures.test:{port}/", max_bytes=10**6) == PICTURE


def test_a_slow_answer_to_a_name_ends_in_time(monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.wait(5) and [])
    start = time.monotonic()
    with pytest.raises(ValueError, match="no whole answer within 0.3 seconds"):
        policy("pictures.test", max_seconds=0.3).fetch("http://pictures.test/a.png", max_bytes=99)
    assert time.monotonic() - start < 1.5
    asked.set()


def test_a_name_is_asked_for_once_so_that_it_cannot_change(resolve):
    addresses, asked = resolve
    addresses["pictures.test"] = ["127.0.0.1"]
    with serve(http_answer()) as (port, requests):
        policy(f"pictures.test:{port}").fetch(f"http://pictures.test:{port}/", max_bytes=10**6)
    assert asked == ["pictures.test"]
    assert f"Host: pictures.test:{port}".encode() in requests[0]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://localhost:{port}/", "scheme 'https', where http is allowed"),
        ("ftp://localhost:{port}/", "scheme 'ftp'"),
        ("file:///etc/hostname", "scheme 'file'"),
        ("http://127.0.0.1:{port}/", "host '127.0.0.1:.*' is not in the list"),
        ("http://localhost/", "host 'localhost' is not in the list"),
        ("http://localhost.evil.test:{port}/", "is not in the list"),
        ("http://localhost:{port}@evil.test/", "a user name in front of the host"),
        ("http://evil.test\\@localhost:{port}/", "a user name in front of the host"),
        ("http://localhost:99999/", "[Pp]ort"),
        ("http:///a.png", "is not in the list"),
    ],
)
def test_urls_that_are_not_listed_are_refused(url, message):
    with serve(http_answer()) as (port, requests):
        with pytest.raises(ValueError, match=message):
            policy(f"localhost:{port}").fetch(url.format(port=port), max_bytes=10**6)
        assert requests == []


def test_redirections_are_checked_like_the_first_url(resolve):
    addresses, _ = resolve
    addresses["internal.test"] = ["10.0.0.5"]
    for location, message in (
        ("http://10.0.0.5/", "host '10.0.0.5' is not in the list"),
        ("http://internal.test/", "has the address 10.0.0.5, which is not public"),
        ("file:///etc/hostname", "scheme 'file'"),
        ("", "more than 3 redirections"),
    ):
        answer = http_answer(b"", status="302 Found", Location=location)
        with serve(answer) as (port, _), pytest.raises(ValueError, match=message):
            fetch(port, hosts=(f"localhost:{port}", "internal.test"))


def test_a_redirection_that_is_allowed_is_followed():
    with ExitStack() as stack:
        port, requests = stack.enter_context(serve(http_answer()))
        moved = http_answer(b"", status="301 Moved", Location=f"http://localhost:{port}/b.png")
        first, _ = stack.enter_context(serve(moved))
        hosts = (f"localhost:{first}", f"localhost:{port}")
        assert fetch(first, hosts=hosts) == PICTURE
        with pytest.raises(ValueError, match="more than 0 redirections"):
            fetch(first, hosts=hosts, max_redirections=0)
    assert requests[0].startswith(b"GET /b.png ")


def drip(start: bytes) -> Answer:
    def answer(peer: socket.socket) -> None:
        for byte in start + b"a" * 1000:
            peer.sendall(bytes([byte]))
            time.sleep(0.02)

    return answer


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 100 Continue\r\n\r\n", http_answer(b"")])
def test_a_slow_answer_ends_in_time(start):
    with serve(drip(start)) as (port, _):
        begun = time.monotonic()
        with pytest.raises(ValueError, match="no whole answer within 0.5 seconds"):
            fetch(port, max_seconds=0.5)
        assert time.monotonic() - begun < 2


def test_silence_ends_in_time():
    with serve(lambda peer: time.sleep(3)) as (port, _):
        begun = time.monotonic()
        with pytest.raises(ValueError, match="no whole answer within 0.3 seconds"):
            fetch(port, max_seconds=0.3)
        assert time.monotonic() - begun < 1.5


def endless(peer: socket.socket) -> None:
    peer.sendall(http_answer(b""))
    while True:
        peer.sendall(bytes(65536))


@pytest.mark.parametrize("answer", [endless, http_answer(bytes(10**6))], ids=["endless", "large"])
def test_large_answers_are_not_read_to_their_end(answer):
    with serve(answer) as (port, _):
        begun = time.monotonic()
        with pytest.raises(ValueError, match="more than 100000 bytes"):
            fetch(port, max_bytes=100_000)
        with pytest.raises(ValueError, match="more than 200000 bytes"):
            load_image(
                f"http://localhost:{port}/",
                urls=policy(f"localhost:{port}"),
                limits=ImageLimits(max_bytes=200_000),
            )
        assert time.monotonic() - begun < 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (http_answer(b"<html>", kind="text/html"), "an answer of type text/html"),
        (http_answer(status="404 Not Found"), "the answer 404 Not Found"),
        (b"SSH-2.0-OpenSSH\r\n", "BadStatusLine"),
        (b"", "RemoteDisconnected"),
        (http_answer(b"5\r\nab", **{"Transfer-Encoding": "chunked"}), "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "got more than 100 headers"),
    ],
)
def test_answers_without_an_image_are_refused(answer, message):
    with serve(answer) as (port, _), pytest.raises(ValueError, match=message):
        fetch(port)


def test_a_renamed_answer_is_refused_by_its_content():
    with serve(http_answer(b"<svg/>")) as (port, _), pytest.raises(ValueError, match="got a file of SVG"):
        load_image(f"http://localhost:{port}/", urls=policy(f"localhost:{port}"))


def test_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ValueError, match="ConnectionRefusedError"):
        fetch(port)


def test_what_a_url_asks_for_is_not_in_the_error():
    with pytest.raises(ValueError, match="is not in the list") as caught:
        policy("a.test").fetch("http://b.test/a.png?signature=secret", max_bytes=9)
    assert "secret" not in str(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of the host localhost, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    files = ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return server, ssl.create_default_context(cafile=folder / "certificate.pem")


def test_certificates_are_verified_against_the_name(certificate, resolve):
    addresses, _ = resolve
    addresses["pictures.test"] = ["127.0.0.1"]
    server, trusting = certificate
    with serve(http_answer(), tls=server) as (port, requests):
        secure = {"schemes": ("https",), "hosts": (f"localhost:{port}", f"pictures.test:{port}")}
        local, other = f"https://localhost:{port}/", f"https://pictures.test:{port}/"
        assert policy(tls=trusting, **secure).fetch(local, max_bytes=10**6) == PICTURE
        assert len(requests) == 1
        with pytest.raises(ValueError, match="self-signed certificate"):
            policy(**secure).fetch(local, max_bytes=10**6)
        with pytest.raises(ValueError, match="Hostname mismatch"):
            policy(tls=trusting, **secure).fetch(other, max_bytes=10**6)
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hosts": "example.org"}, "hosts='example.org'; expected a list"),
        ({"schemes": "https"}, "schemes='https'; expected a list"),
        ({"schemes": ("ftp",)}, "scheme 'ftp'; expected https or http"),
        ({"networks": ("10.0.0.1/8",)}, "has host bits set"),
        ({"max_seconds": 0}, "max_seconds=0; expected more than 0"),
    ],
)
def test_policies_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UrlPolicy(**{"hosts": ["example.org"], **fields})


def test_https_alone_is_the_default():
    assert UrlPolicy(hosts=["example.org"]).schemes == ("https",)
    with pytest.raises(ValueError, match="scheme 'http', where https is allowed"):
        load_image("http://example.org/a.png", urls=UrlPolicy(hosts=["example.org"]))
