"""What strangers send to a page that runs: no browser, no client, real connections."""

import json
import resource
import stat
import time
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

from tests.spaces_demo.conftest import PENGUIN, PROXY, SECRET, Demo, list_pictures, upload
from tests.spaces_demo.requests_of_strangers import (
    JSON,
    MULTIPART,
    Response,
    begin,
    call,
    finish,
    form,
    part,
    send,
    send_in_chunks,
)

pytestmark = pytest.mark.usefixtures("nothing_is_logged")

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


# Hosts and origins


def read_port(demo: Demo) -> str:
    return demo.url.rsplit(":", 1)[1]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:{port}",
        "127.0.0.1",
        "127.8.9.1:{port}",
        "localhost:{port}",
        "LOCALHOST:{port}",
        "localhost.:{port}",
        "page.localhost:{port}",
        "[::1]:{port}",
        "0.0.0.0:{port}",
        PROXY,
        f"{PROXY}:443",
    ],
)
def test_a_name_of_this_page_is_answered(page, host):
    assert send(page.url, "GET", "/config", headers={"Host": host.format(port=read_port(page))}).status == 200


FOREIGN_HOSTS = [
    f"{SECRET}.example",
    f"{SECRET}.example:{{port}}",
    "127.0.0.1.example:{port}",
    "localhost.example",
    "notlocalhost",
    "10.1.2.3",
    "[fe80::1]",
    "2130706433",
    f"127.0.0.1:{{port}}@{SECRET}.example",
    f"{PROXY}.example",
    f"sub.{PROXY}",
    "",
    " ",
    "a b",
    "<b>",
]


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/assets/x.js"])
@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_another_name_is_refused(page, host, path):
    response = send(page.url, "GET", path, headers={"Host": host.format(port=read_port(page))})
    assert response.status in (400, 403) and "components" not in response.text


def test_the_name_that_a_proxy_tells_is_one_of_this_page(page):
    for name, status in ((PROXY, 200), (f"{SECRET}.example", 403), (f"{PROXY}, {SECRET}.example", 403)):
        assert send(page.url, "GET", "/config", headers={"X-Forwarded-Host": name}).status == status


def test_no_name_or_two_are_refused(page):
    assert send(page.url, "GET", "/config", headers={"Host": None}).status == 400
    twice = {"Host": f"{PROXY}\r\nHost: {SECRET}.example"}
    assert send(page.url, "GET", "/config", headers=twice).status in (400, 403)


FOREIGN_ORIGINS = [
    "null",
    f"https://{SECRET}.example",
    "http://127.0.0.1:1",
    "http://localhost:3000",
    f"https://{PROXY}.example",
    f"https://{SECRET}.example/{PROXY}",
    "file://",
    "chrome-extension://abcdefgh",
    f"http://127.0.0.1@{SECRET}.example",
]
REQUESTS = {
    "upload": ("POST", "/gradio_api/upload", MULTIPART, form(part(PENGUIN))),
    "call": ("POST", "/gradio_api/call/ask", JSON, b'{"data": [{"text": "What?", "files": []}]}'),
    "join": ("POST", "/gradio_api/queue/join", JSON, b'{"data": [], "fn_index": 0, "session_hash": "a"}'),
    "read": ("GET", "/config", {}, b""),
}


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_a_page_of_another_site_may_not_send(page, origin, kind):
    method, path, headers, body = REQUESTS[kind]
    before = list_pictures(page)
    response = send(page.url, method, path, headers=headers | {"Origin": origin}, body=body)
    assert response.status == 403
    assert list_pictures(page) == before


def test_this_page_may_send_under_each_of_its_names(page):
    own = {"Host": f"localhost:{read_port(page)}", "Origin": f"http://localhost:{read_port(page)}"}
    behind_proxy = {"Host": "127.0.0.1:80", "Origin": f"https://{PROXY}"}
    named_by_proxy = {"X-Forwarded-Host": PROXY, "Origin": f"https://{PROXY}"}
    for headers in (own, behind_proxy, named_by_proxy, {"Host": PROXY, "Origin": f"https://{PROXY}"}):
        assert upload(page, form(part(PENGUIN)), **headers).status == 200


# Headers


@pytest.mark.parametrize(
    "path", ["/", "/config", "/robots.txt", "/nothing", "/gradio_api/upload", "/gradio_api/file=/etc/passwd"]
)
def test_every_answer_has_the_headers(page, path):
    for headers in ({}, {"Host": "other.example"}):
        response = send(page.url, "GET", path, headers=headers)
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "same-origin"
        assert "frame-ancestors 'self'" in response.headers["content-security-policy"]


# Bodies


@pytest.mark.parametrize(
    "path", ["queue/join", "call/ask", "call/v2/ask", "run/ask", "api/ask", "cancel", "reset", f"call/{SECRET}"]
)
def test_a_large_body_is_cut_off(page, path):
    before = read_memory(page)
    told = send(page.url, "POST", f"/gradio_api/{path}", headers=JSON | {"Content-Length": "200000000"})
    assert told.status == 413
    response, sent = send_in_chunks(page.url, f"/gradio_api/{path}", headers=JSON, num_bytes=200_000_000)
    # An answer may be lost where the page hangs up on somebody who still sends.
    assert response.status in (0, 413)
    assert sent < 20_000_000, "it was read"
    assert read_memory(page) - before < 50_000_000


def read_memory(demo: Demo) -> int:
    """Bytes that the process holds."""
    pages = Path(f"/proc/{demo.process.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_a_large_form_is_cut_off(locked):
    response, sent = send_in_chunks(locked.url, "/login", headers=FORM, num_bytes=50_000_000)
    assert response.status in (0, 413) and sent < 20_000_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"data": 1}',
        b'{"data": "xyzzy"}',
        b'{"data": [' + b"[" * 100_000,
        b'{"data": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"data": [' + b"9" * 10_000 + b"]}",
        b'{"data": ["\\ud800xyzzy"]}',
        b"\xff\xfe\x00x",
        b'{"data": [], "session_hash": ["xyzzy"]}',
        b'{"data": [], "fn_index": 999}',
        b'{"data": [], "fn_index": "xyzzy"}',
        b'{"data": [], "fn_index": -1, "session_hash": "xyzzy"}',
    ],
)
@pytest.mark.parametrize("path", ["call/ask", "queue/join", "run/ask", "call/v2/ask"])
def test_a_malformed_body_is_refused(page, path, body):
    response = send(page.url, "POST", f"/gradio_api/{path}", headers=JSON, body=body)
    assert (
        400 <= response.status < 500
        or (response.status == 500 and "got a call" in response.text)
        or (response.status == 200 and "event_id" in response.text)
    )


# Texts


def ask(demo: Demo, name: str, data: list) -> str:
    """What a call ends with."""
    response = call(demo.url, name, data)
    assert response.status == 200, response
    return send(demo.url, "GET", f"/gradio_api/call/{name}/{json.loads(response.text)['event_id']}").text


SETTINGS = ["embedded", "", "as trained", "as trained", "", 0, 1, 16, 0]


def test_texts_have_a_length(page):
    assert "at most 20000" in ask(page, "ask", [{"text": SECRET + "a" * 20_000, "files": []}])
    # The state of a call without a session is a conversation without turns.
    assert "at most 20000" not in ask(page, "ask", [{"text": "a" * 20_000, "files": []}])
    nine = {"text": "a", "files": [stored(page)] * 9}
    assert "at most 20000 and 8" in ask(page, "ask", [nine])
    assert call(page.url, "answer", ["embedded", "", "as trained", "as trained", "a" * 5_000_000]).status == 413


def stored(demo: Demo) -> dict:
    (path,) = json.loads(
        send(demo.url, "POST", "/gradio_api/upload", headers=MULTIPART, body=form(part(PENGUIN))).text
    )
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def find_call(demo: Demo, event: str) -> dict:
    calls = json.loads(send(demo.url, "GET", "/config").text)["dependencies"]
    return next(call for call in calls if event in [name for _, name in call["targets"]])


def join(demo: Demo, session: str, function: dict | str, data: list, event: dict | None = None) -> str:
    """What the queue tells, as it tells the page."""
    calls = json.loads(send(demo.url, "GET", "/config").text)["dependencies"]
    if isinstance(function, str):
        function = next(call for call in calls if call["api_name"] == function)
    data = data + [None] * (len(function["inputs"]) - len(data))
    body = {"data": data, "fn_index": function["id"], "session_hash": session, "event_data": event}
    response = send(demo.url, "POST", "/gradio_api/queue/join", headers=JSON, body=json.dumps(body).encode())
    assert response.status == 200, response
    return send(demo.url, "GET", f"/gradio_api/queue/data?session_hash={session}").text


def test_what_ask_refuses_is_refused_as_edit_and_a_system_text_has_a_length(page):
    session = "s1"
    join(page, session, "ask", [{"text": "What?", "files": []}])
    long = [None, *SETTINGS]
    long[5] = SECRET * 100_000
    started = time.monotonic()
    assert "at most 4000" in join(page, session, "answer", long)
    assert time.monotonic() - started < 5
    assert "tokens" in join(page, session, "answer", [None, *SETTINGS])
    edit = find_call(page, "edit")
    for value, reason in ((SECRET * 10_000, "at most 20000"), ("  ", "Type a question")):
        assert reason in join(page, session, edit, [None], {"index": 0, "value": value, "previous_value": ""})
    assert "Who" in join(page, session, edit, [None], {"index": 0, "value": "Who?", "previous_value": ""})


def test_a_conversation_has_a_length(page):
    session = "s2"
    for _ in range(5):
        join(page, session, "ask", [{"text": "a " * 9_990, "files": []}])
        join(page, session, "answer", [None, *SETTINGS[:-2], 1, 0])
    assert "start a new conversation" in join(page, session, "ask", [{"text": "a " * 9_990, "files": []}])


@pytest.mark.parametrize(
    "place, value",
    [(2, SECRET), (5, float("nan")), (5, SECRET), (6, float("inf")), (6, -1), (7, 10**9), (7, -1), (8, 2**60)],
)
def test_settings_out_of_range_are_refused(page, place, value):
    settings = SETTINGS.copy()
    settings[place] = value
    session = f"s3-{place}-{value}"
    join(page, session, "ask", [{"text": "What?", "files": []}])
    told = join(page, session, "answer", [None, *settings])
    assert '"success":false' in told, told[-1000:]


# Names of calls


NAMES = [SECRET, f"../{SECRET}", quote(f"{SECRET}\n", safe=""), quote(f"<b>{SECRET}</b>", safe=""), SECRET * 500]


@pytest.mark.parametrize("route", ["call", "call/v2", "run", "api"])
@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_name_is_not_logged(page, route, name):
    for body in (b'{"data": ["xyzzy"]}', b'{"xyzzy": 1}', b'{"data": [], "session_hash": "xyzzy"}'):
        response = send(page.url, "POST", f"/gradio_api/{route}/{name}", headers=JSON, body=body)
        assert 400 <= response.status < 500


CLOSED = ["process_recording", "component_server", f"stream/{SECRET}", "vibe-edit", "vibe-code", "undo-vibe-edit", "x"]


@pytest.mark.parametrize("path", CLOSED)
def test_what_the_page_does_not_need_is_closed(page, path):
    for headers, body in ((JSON, b'{"code": "xyzzy"}'), (MULTIPART, form(part(PENGUIN)))):
        assert send(page.url, "POST", f"/gradio_api/{path}", headers=headers, body=body).status == 404


@pytest.mark.parametrize(
    "path", ["dev/reload", "proxy=https://x.hf.space/", "vibe-code", "stream/a/b/1/playlist.m3u8"]
)
def test_nothing_is_held_open_or_fetched_beside_it(page, path):
    assert send(page.url, "GET", f"/gradio_api/{path}").status == 404


# Logins and connections that stay


def log_in(demo: Demo, password: str, **headers: str) -> Response:
    body = urlencode({"username": "ada", "password": password}).encode()
    return send(demo.url, "POST", "/login", headers=FORM | headers, body=body)


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/config"),
        ("GET", "/gradio_api/info"),
        ("GET", f"/gradio_api/heartbeat/{SECRET}"),
        ("GET", "/gradio_api/queue/data?session_hash=a"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/call/ask"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/run/ask"),
        ("POST", "/gradio_api/cancel"),
    ],
)
def test_without_login_nothing_is_answered(locked, method, path):
    before = list_pictures(locked)
    headers, body = (MULTIPART, form(part(PENGUIN))) if path.endswith("upload") else (JSON, b'{"data": []}')
    response = send(locked.url, method, path, headers=headers, body=body)
    assert response.status in (401, 422)
    assert list_pictures(locked) == before


def test_wrong_passwords_cost_time(locked):
    assert log_in(locked, "lovelace").status == 200
    statuses = [log_in(locked, f"{SECRET}{number}").status for number in range(12)]
    assert statuses[0] == 400 and 429 in statuses
    assert statuses.count(400) <= 6
    # The right password has to wait too, and then comes in.
    waiting = log_in(locked, "lovelace")
    assert waiting.status == 429
    # Others do not wait: uvicorn takes the word of a proxy on this machine for where they are.
    assert log_in(locked, "lovelace", **{"X-Forwarded-For": "203.0.113.7"}).status == 200
    time.sleep(int(waiting.headers["retry-after"]))
    assert log_in(locked, "lovelace").status == 200


def test_connections_that_stay_are_counted(page):
    """Heartbeats, and answers that are waited for: a session whose calls have ended waits for ever."""
    held = [begin(page.url, "GET", f"/gradio_api/heartbeat/{number}") for number in range(400)]
    assert [connection.recv(12) for connection in held] == [b"HTTP/1.1 200"] * 400
    for path in ("heartbeat/a", "queue/data?session_hash=a", "call/a/b", "call/v2/a"):
        assert finish(begin(page.url, "GET", f"/gradio_api/{path}")).status == 503
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        connection = begin(page.url, "GET", "/gradio_api/heartbeat/a")
        status = connection.recv(12)
        connection.close()
        if status == b"HTTP/1.1 200":
            return
        time.sleep(0.1)
    pytest.fail("those who left are still counted")


def test_the_feedback_file_is_its_owners(page):
    assert stat.S_IMODE(page.feedback.stat().st_mode) == 0o600
