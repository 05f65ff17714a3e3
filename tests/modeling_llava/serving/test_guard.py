"""The guard before an app of a few lines: what it lets through, and what it costs to try passwords."""

import asyncio

import pytest

from modeling_llava.serving import guard
from modeling_llava.serving.guard import AttemptLimit, Guard

pytestmark = pytest.mark.core


SECRET = "".join(["xy", "zzy"])


async def echo(scope, receive, send) -> None:
    """Answers with the body; fails at the path /fail, after the beginning of its answer at /fail/late."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError(SECRET)
        body, more = body + message.get("body", b""), message.get("more_body", False)
    if scope["path"] == "/fail":
        raise KeyError(SECRET)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/fail/late":
        raise KeyError(SECRET)
    await send({"type": "http.response.body", "body": body})


def ask(app, path: str = "/", *, method: str = "POST", headers=(), messages=(), server=("127.0.0.1", 80)):
    """(status, headers, body) of the answer; headers are added to a usual Host."""
    sent, left = [], list(messages)

    async def receive():
        if left:
            return left.pop(0)
        await asyncio.sleep(60)

    async def send(message) -> None:
        sent.append(message)

    names = {"host": "localhost"} | dict(headers)
    raw = [(name.encode(), value.encode()) for name, value in names.items()]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": raw,
        "server": server,
        "client": ("1.2.3.4", 1),
    }
    asyncio.run(app(scope, receive, send))
    start = sent[0] if sent else {"status": 0, "headers": []}
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return start["status"], {name.decode().lower(): value.decode() for name, value in start["headers"]}, body


def chunk(body: bytes, *, more: bool = False) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


CHUNKED = {"transfer-encoding": "chunked"}


def test_a_body_passes_up_to_the_limit_of_its_path():
    app = Guard(echo, hosts=tuple, body_limits={"/large": 2_000_000})
    for path, limit in (("/", guard.MAX_BODY), ("/large", 2_000_000), ("/large/", 2_000_000)):
        whole = [chunk(b"a" * (limit - 1), more=True), chunk(b"b")]
        status, headers, body = ask(app, path, headers=CHUNKED, messages=whole)
        assert status == 200 and len(body) == limit and "connection" not in headers
        status, headers, _ = ask(app, path, headers=CHUNKED, messages=[*whole[:1], chunk(b"bb", more=True)])
        assert status == 413 and headers["connection"] == "close"
        assert ask(app, path, headers={"content-length": str(limit + 1)})[0] == 413


def test_a_body_that_comes_too_slowly_is_given_up(monkeypatch):
    monkeypatch.setattr(guard, "SECONDS_OF_SILENCE", 0.05)
    status, _, body = ask(Guard(echo, hosts=tuple), headers=CHUNKED, messages=[chunk(b"a", more=True)])
    assert status == 408 and b"too slowly" in body


def test_an_error_is_told_and_logged_without_its_text(caplog):
    app = Guard(echo, hosts=tuple)
    status, headers, body = ask(app, "/fail", messages=[chunk(b"")])
    assert status == 500 and SECRET.encode() not in body and headers["x-content-type-options"] == "nosniff"
    ask(app, "/fail/late", messages=[chunk(b"")])
    assert [record.getMessage().split()[0] for record in caplog.records] == ["KeyError"] * 2
    assert SECRET not in caplog.text
    # Who left is not told, and no error.
    caplog.clear()
    assert ask(app, headers=CHUNKED, messages=[{"type": "http.disconnect"}]) == (0, {}, b"")
    assert caplog.text == ""


@pytest.mark.parametrize(
    "host, server, status",
    [
        ("192.168.1.5:7860", "192.168.1.5", 200),
        # Behind a port that is passed on, as with a container.
        ("192.168.1.5", "172.17.0.2", 200),
        ("192.168.1.5", "127.0.0.1", 403),
        ("box.example", "192.168.1.5", 403),
        ("[2001:db8::1]:7860", "2001:db8::1", 200),
        ("localhost", "192.168.1.5", 200),
    ],
)
def test_numbers_are_names_where_others_can_connect(host, server, status):
    app = Guard(echo, hosts=tuple)
    assert ask(app, headers={"host": host}, messages=[chunk(b"")], server=(server, 7860))[0] == status


def test_every_name_but_no_other_origin_where_everybody_can_connect():
    app = Guard(echo, hosts=None, origins={"hub.example"})
    for origin, status in (
        ("https://a.example", 200),
        ("https://hub.example", 200),
        ("https://b.example", 403),
        ("null", 403),
    ):
        headers = {"host": "a.example", "origin": origin}
        assert ask(app, headers=headers, messages=[chunk(b"")])[0] == status


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_wrong_passwords_wait_longer_each_time_and_a_right_one_ends_it():
    clock = Clock()
    limit = AttemptLimit(clock=clock)
    assert [limit.begin("a") for _ in range(5)] == [0] * 5
    waits = []
    for _ in range(12):
        waits.append(limit.begin("a"))
        clock.now += waits[-1]
        assert limit.begin("a") == 0
    assert waits == [2, 3, 5, 9, 17, 33, 65, 129, 257, 301, 301, 301]
    assert limit.begin("b") == 0
    limit.succeed("b")
    clock.now += 301
    assert limit.begin("a") == 0
    limit.succeed("a")
    assert [limit.begin("a") for _ in range(5)] == [0] * 5


def test_many_addresses_gain_little_and_cost_little():
    clock = Clock()
    limit = AttemptLimit(clock=clock, per_minute=100, max_addresses=50)
    assert sum(limit.begin(f"203.0.{number % 256}.{number // 256}") == 0 for number in range(5000)) == 100
    assert len(limit._waits) <= 50
    clock.now += 61
    assert limit.begin("198.51.100.1") == 0
    # A network of IPv6 is one address.
    clock.now += 61
    assert [limit.begin(f"2001:db8::{number:x}") for number in range(6)] == [0] * 5 + [2]
