"""`llava serve` with the clients that people have. Opt-in, since each wants an environment of its own:
`make test-clients` makes them in the folder ANYLLAVA_CLIENTS, by the name of the distribution.

Each script asks the same question about the same picture as OpenAI's own client does here, and must get its answer.
"""

import asyncio
import json
import os
import subprocess

import openai
import pytest

from tests.modeling_llava.serving.servers import EXAMPLES, KEY, ask, serve

ENVIRONMENTS = os.environ.get("ANYLLAVA_CLIENTS")
PICTURE = str(EXAMPLES[0])
QUESTION = "What is in the picture?"
SCHEMA = {
    "title": "Answer",
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}
BEGIN = """
import json, sys
url, key, picture, question, schema = sys.argv[1:]
schema = json.loads(schema)
import base64
data = base64.b64encode(open(picture, "rb").read()).decode()
content = [
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    {"type": "text", "text": question},
]
"""
SCRIPTS = {
    "llama-index-llms-openai-like": """
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike

model = OpenAILike(model="embedded", api_base=url, api_key=key, is_chat_model=True, context_window=1024, timeout=60)
message = ChatMessage(role="user", blocks=[ImageBlock(path=picture), TextBlock(text=question)])
print(json.dumps([model.chat([message]).message.content, "".join(p.delta for p in model.stream_chat([message]))]))
""",
    "langchain-openai": """
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model="embedded", base_url=url, api_key=key, temperature=0)
messages = [{"role": "user", "content": content}]
whole, streamed = model.invoke(messages).content, "".join(part.content for part in model.stream(messages))
print(json.dumps([whole, streamed, model.with_structured_output(schema, method="json_schema").invoke(messages)]))
""",
    "litellm": """
import litellm

settings = {"model": "hosted_vllm/embedded", "api_base": url, "api_key": key}
settings["messages"] = [{"role": "user", "content": content}]
whole = litellm.completion(**settings).choices[0].message.content
streamed = "".join(part.choices[0].delta.content or "" for part in litellm.completion(**settings, stream=True))
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
formed = litellm.completion(**settings, response_format=form).choices[0].message.content
print(json.dumps([whole, streamed, json.loads(formed)]))
""",
    "haystack-ai": """
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, ImageContent
from haystack.utils import Secret

model = OpenAIChatGenerator(model="embedded", api_base_url=url, api_key=Secret.from_token(key))
message = ChatMessage.from_user(content_parts=[ImageContent.from_file_path(picture), question])
print(json.dumps([model.run(messages=[message])["replies"][0].text]))
""",
    "llm": """
import os, subprocess, tempfile

folder = tempfile.mkdtemp()
with open(f"{folder}/extra-openai-models.yaml", "w") as file:
    json.dump([{"model_id": "llava", "model_name": "embedded", "api_base": url, "vision": True,
                "supports_schema": True, "api_key_name": "llava"}], file)

def ask(*options):
    command = [sys.executable, "-m", "llm", "prompt", "-m", "llava", "--key", key, "-a", picture, question, *options]
    return subprocess.run(
        command, env=os.environ | {"LLM_USER_PATH": folder}, capture_output=True, text=True, check=True
    ).stdout.strip()

print(json.dumps([ask("--no-stream"), ask(), json.loads(ask("--schema", json.dumps(schema)))]))
""",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(scope="module")
def expected(server) -> str:
    answer = server.connect().chat.completions.create(model="embedded", messages=[ask(QUESTION, EXAMPLES[0])])
    return answer.choices[0].message.content


@pytest.mark.skipif(ENVIRONMENTS is None, reason="needs the clients: make test-clients")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_client_gets_the_answer(name, server, expected, tmp_path):
    command = [
        f"{ENVIRONMENTS}/{name}/bin/python",
        "-c",
        BEGIN + SCRIPTS[name],
        f"{server.url}/v1",
        KEY,
        PICTURE,
        QUESTION,
        json.dumps(SCHEMA),
    ]
    environment = os.environ | {"HAYSTACK_TELEMETRY_ENABLED": "False", "HOME": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    *answers, last = json.loads(result.stdout.strip().splitlines()[-1])
    if isinstance(last, dict):
        assert last["color"] in ("red", "blue")
    else:
        answers.append(last)
    assert answers == [expected] * len(answers)


def test_the_client_of_openai_in_an_event_loop_gets_the_answer(server, expected):
    async def run() -> list[str]:
        settings = {"model": "embedded", "messages": [ask(QUESTION, EXAMPLES[0])]}
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            whole = await client.chat.completions.create(**settings)
            async with await client.chat.completions.create(**settings, stream=True) as stream:
                pieces = [event.choices[0].delta.content or "" async for event in stream]
        return [whole.choices[0].message.content, "".join(pieces)]

    assert asyncio.run(run()) == [expected] * 2
