"""Many clients at a time, and many requests one after the other: nothing is lost or mixed up, and memory stays.

    python -m pytest -s tests/clients_suite/test_load.py

Opt-in by `make test-clients`, for two minutes and for some more; it prints what it measures.
"""

import asyncio
import os
import random
import re
import statistics
import time
from pathlib import Path

import openai
import pytest

from tests.modeling_llava.serving.servers import EXAMPLES, KEY, OTHER_KEY, Server, ask, serve

pytestmark = pytest.mark.skipif("ANYLLAVA_CLIENTS" not in os.environ, reason="takes minutes: make test-clients")

NUM_CLIENTS = 64
SECONDS = 60
NUM_REQUESTS = 10_000
QUESTIONS = ["What is in the picture?", "Which color is it?", "Is it a fruit?"]
QUESTION_MESSAGES = [[ask(text, picture)] for picture in EXAMPLES for text in QUESTIONS] + [[ask("Hello")]]


def read_memory(server: Server) -> float:
    """Megabytes that the process holds."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000


async def answer(client: openai.AsyncOpenAI, messages: list, *, stream: bool) -> str:
    settings = {"model": "embedded", "messages": messages, "max_tokens": 16}
    if not stream:
        return (await client.chat.completions.create(**settings)).choices[0].message.content
    async with await client.chat.completions.create(**settings, stream=True) as events:
        return "".join([event.choices[0].delta.content or "" async for event in events])


async def find_expected(server: Server) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        return [await answer(client, messages, stream=False) for messages in QUESTION_MESSAGES]


def test_64_clients_for_a_minute(tmp_path):
    async def visit(number: int, expected: list[str], until: float, seconds: list[float]) -> None:
        rng = random.Random(number)
        key = (KEY, OTHER_KEY)[number % 2]
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120) as client:
            while time.monotonic() < until:
                chosen = rng.randrange(len(QUESTION_MESSAGES))
                if rng.random() < 0.05:
                    # One that leaves.
                    leaving = asyncio.create_task(answer(client, QUESTION_MESSAGES[chosen], stream=True))
                    await asyncio.sleep(rng.random() / 5)
                    leaving.cancel()
                    await asyncio.gather(leaving, return_exceptions=True)
                    continue
                started = time.monotonic()
                found = await answer(client, QUESTION_MESSAGES[chosen], stream=rng.random() < 0.5)
                seconds.append(time.monotonic() - started)
                assert found == expected[chosen]

    async def run() -> list[float]:
        expected, seconds = await find_expected(server), []
        until = time.monotonic() + SECONDS
        await asyncio.gather(*(visit(number, expected, until, seconds) for number in range(NUM_CLIENTS)))
        return seconds

    with serve(tmp_path, "--max-rows", "32", "--queue", "64") as server:
        seconds = asyncio.run(run())
        assert "Traceback" not in server.log.read_text()
    quantiles = statistics.quantiles(seconds, n=100)
    print(  # noqa: T201
        f"\n{NUM_CLIENTS} clients, {SECONDS} s: {len(seconds)} answers, {len(seconds) / SECONDS:.1f} a second, "
        f"median {statistics.median(seconds):.2f} s, p95 {quantiles[94]:.2f} s, p99 {quantiles[98]:.2f} s"
    )


def test_10000_requests_take_no_more_memory_than_1000(tmp_path):
    async def send(count: int, expected: list[str]) -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=120) as client:

            async def work(numbers) -> None:
                for number in numbers:
                    chosen = number % len(QUESTION_MESSAGES)
                    assert await answer(client, QUESTION_MESSAGES[chosen], stream=number % 2 == 0) == expected[chosen]

            numbers = iter(range(count))
            await asyncio.gather(*(work(numbers) for _ in range(16)))

    with serve(tmp_path, "--memory", "2GiB") as server:
        expected = asyncio.run(find_expected(server))
        asyncio.run(send(1000, expected))
        before = read_memory(server)
        asyncio.run(send(NUM_REQUESTS - 1000, expected))
        after = read_memory(server)
    print(f"\nafter 1,000 requests {before:.0f} MB, after {NUM_REQUESTS:,} {after:.0f} MB")  # noqa: T201
    assert after < before + 20
