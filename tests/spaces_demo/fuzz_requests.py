"""Random requests to a page that runs: `python -m tests.spaces_demo.fuzz_requests [--seconds 60] [--seed 0]`.

Whatever comes, the page answers afterwards, within 5 seconds; it holds at most 300 MB more; nothing of what was sent
is in its log; no error of its own (status 500) is told; and nothing but clean pictures lies in its folder. The seed
and the number of a failure are printed with what was sent.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from spaces_demo.routes import HELD
from tests.spaces_demo.conftest import EXAMPLES, Demo, start_demo
from tests.spaces_demo.requests_of_strangers import JSON, MULTIPART, begin, finish, form, part, send

MAX_BYTES = 300 * 2**20
MAX_SECONDS = 5
MARK = "xyzzy"
PENGUIN = (EXAMPLES / "twemoji-penguin.png").read_bytes()
NAMES = ("ask", "answer", MARK, "", "..", "%0A", "%00", "v2/ask", "v2/" + MARK, "a" * 3000)
ROUTES = (
    "call",
    "run",
    "api",
    "queue/join",
    "queue/data",
    "cancel",
    "reset",
    "upload",
    "upload_progress",
    "heartbeat",
)
OTHERS = (
    "/login",
    "/config",
    "/",
    "/gradio_api/info",
    "/gradio_api/file=",
    "/gradio_api/file/",
    "/static/",
    "/assets/",
)
HOSTS = (None, "", "localhost", "127.0.0.1", "[::1]", "0.0.0.0", f"{MARK}.example", "a:b:c", "[", "127.0.0.1:999999")
ORIGINS = ("null", "", "http://localhost", f"https://{MARK}.example", "file://", "https://[")
FORWARDED = ("", "localhost", f"{MARK}.example", ",", "localhost, localhost")


def make_value(rng: random.Random, depth: int = 0):
    kinds = [
        lambda: MARK * rng.choice((0, 1, 100, 20_000)),
        lambda: rng.choice((0, -1, 2**70, 1e308, float("nan"), True, None)),
        lambda: {"text": MARK, "files": [make_value(rng, depth + 1) for _ in range(rng.randrange(3))]},
        lambda: {
            "path": rng.choice(("/etc/passwd", MARK, "http://127.0.0.1/x")),
            "meta": {"_type": "gradio.FileData"},
        },
    ]
    if depth < 3:
        kinds.append(lambda: [make_value(rng, depth + 1) for _ in range(rng.randrange(4))])
    return rng.choice(kinds)()


def make_body(rng: random.Random) -> bytes:
    kind = rng.randrange(6)
    if kind < 3:
        fields = {
            "data": [make_value(rng) for _ in range(rng.randrange(12))],
            "fn_index": rng.choice((None, *range(20), -1, 10**9, MARK)),
            "session_hash": rng.choice((None, "a", MARK, 5)),
            "event_data": make_value(rng),
            "event_id": rng.choice((None, MARK)),
            "trigger_id": rng.choice((None, 1, MARK)),
        }
        body = json.dumps({name: value for name, value in fields.items() if rng.random() < 0.7}).encode()
    elif kind == 3:
        pieces = rng.choice((PENGUIN, MARK.encode(), b"", PENGUIN[: rng.randrange(3000)], b"<svg>" + MARK.encode()))
        name, filename = rng.choice(("files", MARK)), rng.choice((None, "a.png", f"<b>{MARK}", "../" + MARK, ""))
        body = form(*[part(pieces, name=name, filename=filename)] * rng.choice((0, 1, 2, 9)))
    elif kind == 4:
        body = rng.randbytes(rng.choice((0, 10, 10_000)))
    else:
        body = f"username={MARK}&password={MARK}".encode()
    if rng.random() < 0.2:
        body = body[: rng.randrange(len(body) + 1)]
    return body


def make_request(rng: random.Random) -> tuple[str, str, dict[str, str | None], bytes]:
    path = f"/gradio_api/{rng.choice(ROUTES)}/{rng.choice(NAMES)}" if rng.random() < 0.7 else rng.choice(OTHERS) + MARK
    path = path.rstrip("/") or "/" if rng.random() < 0.5 else path
    types = (MARK, f"multipart/form-data; {MARK}", "multipart/form-data; boundary=")
    headers = dict(rng.choice((JSON, MULTIPART, {}, {"Content-Type": rng.choice(types)})))
    for name, values in (("Host", HOSTS), ("Origin", ORIGINS), ("X-Forwarded-Host", FORWARDED)):
        if rng.random() < 0.15:
            headers[name] = rng.choice(values)
    if rng.random() < 0.1:
        headers["Range"] = rng.choice(("bytes=1-2-3", "bytes=-", "bytes=9-1", MARK))
    method = rng.choices(("POST", "GET", "PUT", "HEAD", "OPTIONS", MARK.upper()), (12, 4, 1, 1, 1, 1))[0]
    return method, path, headers, make_body(rng)


def attack(demo: Demo, method: str, path: str, headers: dict[str, str | None], body: bytes, *, cut: bool) -> int:
    """The status of the answer, 0 if there is none; hangs up after a cut body, and where answers have no end."""
    is_held = method == "GET" and HELD.fullmatch(path)
    if not cut and not is_held:
        return send(demo.url, method, path, headers=headers, body=body).status
    connection = begin(demo.url, method, path, headers | {"Content-Length": str(len(body) + 1000 * cut)})
    with suppress(OSError):
        connection.sendall(body)
        connection.settimeout(0.02)
        connection.recv(100)
    connection.close()
    return 0


def read_memory(demo: Demo) -> int:
    return int(Path(f"/proc/{demo.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def find_failure(demo: Demo, path: str, status: int, before: int) -> str | None:
    started = time.monotonic()
    if finish(begin(demo.url, "GET", "/robots.txt")).status != 200 or time.monotonic() - started > MAX_SECONDS:
        return "the page does not answer"
    # Gradio 6.31 tells the reason of a refused call with this status at two of its routes (routes.py).
    if status >= 500 and status != 503 and not path.startswith(("/gradio_api/run/", "/gradio_api/api/")):
        return f"status {status}"
    if read_memory(demo) - before > MAX_BYTES:
        return "memory"
    log = demo.log.read_text()
    if MARK in log or MARK.upper() in log:
        return f"in the log: {log[-3000:]}"
    unclean = [path for path in demo.files.rglob("*") if path.is_file() and path.suffix not in (".png", ".jpg")]
    return f"left over: {unclean}" if unclean else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    statuses: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as folder, start_demo(Path(folder)) as demo:
        send(demo.url, "GET", "/")
        before, deadline, number = read_memory(demo), time.monotonic() + options.seconds, 0
        while time.monotonic() < deadline:
            rng = random.Random(f"{options.seed}-{number}")
            request = make_request(rng)
            status = attack(demo, *request, cut=rng.random() < 0.1)
            failure = find_failure(demo, request[1], status, before)
            if failure:
                method, path, headers, body = request
                sys.stdout.write(f"seed {options.seed}, request {number}: {failure}\n")
                sys.stdout.write(f"{method} {path[:200]} {headers} {body[:500]!r} ({len(body)} bytes)\n")
                return 1
            statuses[status] += 1
            number += 1
    sys.stdout.write(f"{number} requests, statuses {dict(sorted(statuses.items()))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
