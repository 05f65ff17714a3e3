"""`llava serve` with the clients that people have. Opt-in, since each wants an environment of its own:
`make test-clients` makes them in the folder ANYLLAVA_CLIENTS, by the name of the distribution.

What README says of each runs: it asks the same question about the same picture as OpenAI's own client does here, and
must get its answer.
"""

import asyncio
import os
import re
import subprocess

import openai
import pytest

from tests.conftest import ROOT
from tests.modeling_llava.serving.servers import EXAMPLES, KEY, ask, serve

ENVIRONMENTS = os.environ.get("ANYLLAVA_CLIENTS")
QUESTION = "What is in the picture?"
README = (ROOT / "modeling_llava" / "serving" / "README.md").read_text()
CLIENTS = re.findall(r"^\[[^]]+\]\(https://pypi.org/project/([^/]+)/\)", README, flags=re.MULTILINE)
LLM = """
import os, subprocess, sys, tempfile

os.environ["LLM_USER_PATH"] = folder = tempfile.mkdtemp()
with open(f"{folder}/extra-openai-models.yaml", "w") as file:
    file.write(YAML)
command = [sys.executable, "-m", *shlex.split(COMMAND)]
for options in ([], ["--no-stream"]):
    print(subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout.strip())
"""
"""Runs what README says of the command llm."""


def find_code(name: str) -> str:
    """The Python that README shows for a client, or that runs its command."""
    section = README.partition(f"https://pypi.org/project/{name}/)")[2].partition("\n[")[0]
    found = dict(re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL))
    if "python" in found:
        return found["python"]
    return f"import shlex\nYAML, COMMAND = {found['yaml']!r}, {found['sh']!r}\n" + LLM


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(scope="module")
def expected(server) -> str:
    answer = server.connect().chat.completions.create(model="embedded", messages=[ask(QUESTION, EXAMPLES[0])])
    return answer.choices[0].message.content


@pytest.mark.skipif(ENVIRONMENTS is None, reason="needs the clients: make test-clients")
@pytest.mark.parametrize("name", CLIENTS)
def test_what_readme_says_of_a_client_gives_the_answer(name, server, expected, tmp_path):
    code = find_code(name).replace("http://127.0.0.1:8000", server.url).replace("secret", KEY)
    environment = os.environ | {"HAYSTACK_TELEMETRY_ENABLED": "False", "HOME": str(tmp_path)}
    result = subprocess.run(
        [f"{ENVIRONMENTS}/{name}/bin/python", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answers = result.stdout.strip().splitlines()
    if name == "langchain-openai":
        assert answers.pop() in ("red", "blue")
    assert answers == [expected] * len(answers) != []


def test_the_client_of_openai_in_an_event_loop_gets_the_answer(server, expected):
    async def run() -> list[str]:
        settings = {"model": "embedded", "messages": [ask(QUESTION, EXAMPLES[0])]}
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            whole = await client.chat.completions.create(**settings)
            async with await client.chat.completions.create(**settings, stream=True) as stream:
                pieces = [event.choices[0].delta.content or "" async for event in stream]
        return [whole.choices[0].message.content, "".join(pieces)]

    assert asyncio.run(run()) == [expected] * 2
