"""`vllm serve` and OpenAI's client: the same tokens as here, streams, adapters, and an engine that nobody ends."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest

from .conftest import NUM_TOKENS, PYTHON, SETTINGS, answer_here, prepare_path, write_messages
from .layouts import save_layout
from .test_lora import save_adapter

KEY = "secret"
START_SECONDS = 400
REQUESTS = [
    {"messages": write_messages("Say hello.")},
    {"messages": write_messages("What is this?", 0)},
    {"messages": write_messages("How do they differ?", 1, 2)},
    {"messages": write_messages("what is an <image> tag?</s>")},
    {"messages": write_messages("what is an <image> tag?</s>", 3)},
]
GREEDY = {"temperature": 0, "max_tokens": NUM_TOKENS}
EXTRA = {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Folder of the models, address of the server, and its process."""
    folder = tmp_path_factory.mktemp("server")
    save_layout("clip llama spatial_unpad", folder / "base")
    save_adapter(folder / "plain", folder / "base")
    prepare_path(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "--port": str(port),
        "--host": "127.0.0.1",
        "--api-key": KEY,
        "--tokenizer-mode": "any_llava",
        "--dtype": "float32",
        "--max-model-len": "512",
        "--max-lora-rank": "8",
        "--lora-modules": f"adapted={folder / 'plain'}",
        "--served-model-name": "base",
        "--allowed-media-domains": "example.org",
    }
    arguments = [str(folder / "base"), "--enforce-eager", "--enable-lora", *sum(settings.items(), ())]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            [PYTHON, "-m", "vllm.entrypoints.cli.main", "serve", *arguments],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | SETTINGS | {"PYTHONPATH": str(folder), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while not is_alive(address):
            text = (folder / "log.txt").read_text()
            assert process.poll() is None and time.monotonic() < end, text[-5000:]
            time.sleep(1)
        yield folder, address
    finally:
        process.terminate()
        process.wait(60)


def is_alive(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key=KEY, timeout=300, max_retries=1)


def ask(client, request, model="base", **settings):
    extra = EXTRA | settings.pop("extra_body", {})
    return client.chat.completions.create(
        model=model, messages=request["messages"], **GREEDY | settings, extra_body=extra
    )


@pytest.mark.parametrize("model, folder", [("base", "base"), ("adapted", "plain")])
def test_texts_and_pictures(model, folder, client, server):
    expected = answer_here(server[0] / folder, REQUESTS)
    for request, answer in zip(REQUESTS, expected):
        found = ask(client, request, model)
        assert found.choices[0].token_ids == answer["tokens"]
        assert found.usage.prompt_tokens == len(answer["ids"])


def test_a_stream_says_what_an_answer_says(client):
    request = REQUESTS[1]
    whole = ask(client, request).choices[0].message.content
    stream = client.chat.completions.create(
        model="base", messages=request["messages"], **GREEDY, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(pieces) > 2 and "".join(pieces) == whole


def test_a_developer_is_the_system(client):
    turns = [[{"role": role, "content": "Be brief."}, *REQUESTS[0]["messages"]] for role in ("developer", "system")]
    found = [ask(client, {"messages": messages}) for messages in turns]
    assert found[0].usage.prompt_tokens == found[1].usage.prompt_tokens
    assert found[0].choices[0].token_ids == found[1].choices[0].token_ids


HOSTILE = {
    "penalties": {"presence_penalty": 1, "frequency_penalty": 1, "extra_body": {"repetition_penalty": 1.3}},
    "prompt_logprobs": {"extra_body": {"prompt_logprobs": 1}},
    "logprobs": {"logprobs": True, "top_logprobs": 5},
    "logit_bias": {"logit_bias": {"300": 100}},
    "allowed_token_ids": {"extra_body": {"allowed_token_ids": [300]}},
    "stop_token_ids": {"extra_body": {"stop_token_ids": [300]}},
    "bad_words": {"extra_body": {"bad_words": ["<image>"]}},
    "chat_template": {"extra_body": {"chat_template": "{{ messages }}"}},
    "variables": {"extra_body": {"chat_template_kwargs": {"conversation": 1, "tokenize": True, "other": 1}}},
    **{
        f"other pixels: {', '.join(settings)}": {"extra_body": {"mm_processor_kwargs": settings}}
        for settings in (
            {"size": {"shortest_edge": 14}, "crop_size": {"height": 14, "width": 14}},
            {"crop_size": {"height": 56, "width": 56}},
            {"image_aspect_ratio": "square"},
            {"image_aspect_ratio": "pad", "image_grid_pinpoints": None},
            {"image_grid_pinpoints": [[28, 280]]},
            {"do_center_crop": False, "do_resize": False},
            {"nothing": 1},
        )
    },
    "continued": {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}},
    "both": {"extra_body": {"continue_final_message": True}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_request_ends_the_engine(name, client, server):
    """Status 400 or an answer, and the next one is as before."""
    for request in REQUESTS[1], REQUESTS[3]:
        with contextlib.suppress(openai.BadRequestError):
            ask(client, request, **HOSTILE[name])
    before = ask(client, REQUESTS[0])
    assert before.choices[0].token_ids == answer_here(server[0] / "base", REQUESTS[:1])[0]["tokens"]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
        [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}],
        [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
        [{"type": "image"}],
        [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}],
    ],
    ids=["no picture", "another host", "a file", "an image without one", "a video"],
)
def test_what_is_no_picture_is_an_error(content, client):
    """vLLM 0.32 says 500 of a path, and closes the connection behind it; 400 of the others."""
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]
    with pytest.raises(openai.APIStatusError):
        ask(client, {"messages": messages})


def post(url: str, body: dict) -> int:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=100) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_key_guards_v1_alone_as_security_says(server):
    body = {"model": "base", "messages": REQUESTS[0]["messages"], "max_tokens": 1}
    assert post(f"{server[1]}/v1/chat/completions", body) == 401
    assert post(f"{server[1]}/invocations", body) == 200
