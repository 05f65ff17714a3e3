"""`llava demo` and the folder as a Space: what starts, what is refused, who may come in, who must wait."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from unittest.mock import Mock

import pytest
import torch
import yaml

from modeling_llava.cli import main
from tests.conftest import ROOT
from tests.spaces_demo.conftest import EXAMPLES, WATCHED_SPACE, Visitor, start_demo

pytestmark = pytest.mark.slow

FOLDER = ROOT / "spaces_demo"


def test_the_terminal_answers_the_examples(capsys):
    assert main(["demo", "--terminal"]) == 0
    printed = capsys.readouterr().out.splitlines()
    examples = json.loads((EXAMPLES / "examples.json").read_text())
    assert printed == ["{image}: {question} {expected}".format(**example) for example in examples]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--auth", "ada"], "expected NAME:PASSWORD"),
        (["--allow-host", "https://demo.example.org"], "without scheme"),
        (["--model", "no/such-model"], "got model 'no/such-model'"),
        (["--feedback", "/no/such/folder/file"], "No such file"),
        (["--device", "toaster"], "got device='toaster'"),
        (["--device", "cuda:99"], "got device='cuda:99'"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llava: ") and message in error


def test_options_reach_the_page(monkeypatch):
    from spaces_demo import app

    monkeypatch.setattr(app, "launch", launch := Mock())
    arguments = ["--share", "--queue", "3", "--device", "cpu", "--auth", "ada:lovelace", "--port", "7000"]
    assert main(["demo", *arguments, "--allow-host", "Demo.example.org"]) == 0
    (menu,), settings = launch.call_args
    assert menu.device == torch.device("cpu")
    assert settings == {
        "feedback": None,
        "queue": 3,
        "port": 7000,
        "share": True,
        "auth": [("ada", "lovelace")],
        "allow_hosts": ["demo.example.org"],
        "open_browser": False,
    }


def test_metadata_of_the_space_is_valid_and_its_versions_are_those_that_were_tested():
    front_matter = yaml.safe_load((FOLDER / "README.md").read_text().split("---\n")[1])
    assert front_matter["sdk"] == "gradio" and front_matter["app_file"] == "app.py"
    assert len(front_matter["short_description"]) <= 60
    assert {front_matter["colorFrom"], front_matter["colorTo"]} <= {
        *("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
    }
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (FOLDER / "requirements.txt").read_text(), flags=re.MULTILINE))
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert front_matter["sdk_version"] == pins["gradio"] == tested["gradio"]
    assert all(pins[name] == tested[name] for name in ("transformers", "peft", "accelerate", "spaces"))
    assert f"version = {pins['anyllava']}\n" in (ROOT / "setup.cfg").read_text()
    # ZeroGPU takes torch 2.8 to 2.11 on Python 3.12.
    assert (2, 8) <= tuple(map(int, pins["torch"].split(".")[:2])) <= (2, 11)
    assert front_matter["python_version"] == "3.12"


def test_every_example_has_a_licence():
    lines = (EXAMPLES / "LICENSES.md").read_text()
    patterns = [re.escape(name).replace(r"\*", ".*") for name in re.findall(r"`([^`]+\.png)`", lines)]
    for path in EXAMPLES.glob("*.png"):
        assert any(re.fullmatch(pattern, path.name) for pattern in patterns), path.name


def test_the_folder_alone_is_a_space(tmp_path):
    from gradio_client import Client, handle_file

    space, picture = tmp_path / "space", tmp_path / "own_picture.png"
    shutil.copy(EXAMPLES / "twemoji-penguin.png", picture)
    shutil.copytree(FOLDER, space, ignore=shutil.ignore_patterns("__pycache__"))
    asked = tmp_path / "asked.txt"
    asked.touch()
    with start_demo(tmp_path, command=("-c", WATCHED_SPACE, str(asked)), cwd=space) as demo:
        with urllib.request.urlopen(demo.url) as page:
            policy = page.headers["Content-Security-Policy"]
        assert "img-src 'self' data: blob:;" in policy
        client = Client(demo.url, verbose=False)
        assert client.config["run_history"] is False and client.config["analytics_enabled"] is False
        # Nobody is asked for an opinion, because the operator named no file for it.
        assert not any("like" in event for call in client.config["dependencies"] for _, event in call["targets"])
        client.predict({"text": "What is this?", "files": [handle_file(picture)]}, api_name="/ask")
        left, _ = client.predict("embedded", "", api_name="/answer")
        client.close()
        assert list(demo.files.rglob("own_picture.png"))
    assert left[-1]["content"][0]["text"] == "a penguin"
    assert not [path for path in demo.files.rglob("*") if path.is_file()], "uploads outlive the process"
    assert asked.read_text() == ""


# In a process of its own, because Gradio leaves event loops open.
AN_HOUR_LATER = """
import datetime, pathlib, sys
from gradio import route_utils
from spaces_demo.app import build_page
from spaces_demo.models import DemoMenu

class InAnHour(datetime.datetime):
    @classmethod
    def now(cls):
        return datetime.datetime.now() + datetime.timedelta(seconds=3660)

page = build_page(DemoMenu([]))
frequency, age = page.delete_cache
assert (frequency, age) == (600, 3600)
picture = pathlib.Path(sys.argv[1])
page.upload_file_set.add(str(picture))
route_utils.delete_files_created_by_app(page, age=age)
assert picture.exists()
route_utils.datetime = InAnHour
route_utils.delete_files_created_by_app(page, age=age)
assert not picture.exists()
cards = [block for block in page.blocks.values() if block.get_block_name() == "chatbot"][0].examples
assert cards and all(pathlib.Path(file["path"]).exists() for card in cards for file in card["files"])
"""


def test_uploads_are_deleted_after_an_hour(tmp_path):
    picture = tmp_path / "picture.png"
    picture.touch()
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "files")}
    command = [sys.executable, "-c", AN_HOUR_LATER, str(picture)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr


def test_a_password_keeps_others_out_and_a_full_queue_says_that_it_is_busy(browser, checkpoints, tmp_path):
    from gradio_client import Client

    arguments = ("--model", checkpoints["endless"], "--auth", "ada:lovelace", "--queue", "1")
    with start_demo(tmp_path, *arguments) as demo, browser.new_context() as context:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{demo.url}/config")
        page = context.new_page()
        page.goto(demo.url)
        page.get_by_label("username").fill("ada")
        page.get_by_label("password").fill("lovelace")
        page.get_by_role("button", name="Login").click()
        visitor = Visitor(page)

        # One answer is written, and one waits.
        clients = [Client(demo.url, auth=("ada", "lovelace"), verbose=False) for _ in range(2)]
        jobs = []
        for client, is_there in zip(clients, (lambda job: job.outputs(), lambda job: job.status().rank == 0)):
            client.predict({"text": "Go on.", "files": []}, api_name="/ask")
            jobs.append(client.submit("endless", "", max_new_tokens=1024, api_name="/answer"))
            while not is_there(jobs[-1]):
                page.wait_for_timeout(50)
        visitor.ask("Is there room?")
        page.get_by_test_id("toast-body").get_by_text("busy").wait_for()
        visitor.shoot("busy")
        assert visitor.textbox.input_value() == "Is there room?", "the question is lost"
        for job, client in zip(jobs, clients):
            job.cancel()
            client.close()
