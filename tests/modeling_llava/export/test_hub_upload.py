"""`llava push` through the real huggingface_hub, to a Hub in this process, and back.

huggingface_hub reads the address of its Hub when it is imported, so commands run in processes of their own: one that
pushes, two that load.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.cli import main
from modeling_llava.export.hub_upload import list_files
from tests import original_folders as folders
from tests.conftest import ROOT
from tests.fake_hub import FakeHub
from tests.modeling_llava.export.conftest import run_python
from tests.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.slow

FACTS = ["--license", "mit", "--base-model", "someone/vicuna"]
PUSH = """
import contextlib, io, json, os, sys, urllib.request

from modeling_llava.cli import main

for name, arguments, settings in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = settings.pop("token", "hf_test_token")
    data = json.dumps(settings).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/control", data)).read()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["push", *arguments])
    state = json.loads(urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/control").read())
    print(json.dumps({"name": name, "code": code, "out": out.getvalue(), "err": err.getvalue(), **state}))
"""
LOAD = """
import json
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoProcessor
from modeling_llava import AutoModelForVision2Seq
from processing_llava.data_sources import DataSource
from processing_llava.row_datasets import load_rows

model = AutoModelForVision2Seq.from_pretrained("alice/model")
adapter = AutoModelForVision2Seq.from_pretrained("alice/adapter")
processor = AutoProcessor.from_pretrained("alice/adapter")
ModelCard.load("alice/model").validate()
rows, _ = load_rows([DataSource(path="alice/rows")])
print(json.dumps({
    "model": type(model).__name__,
    "adapter": [name for name, _ in adapter.named_parameters() if "lora_A" in name][:1],
    "processor": type(processor).__name__,
    "snapshot": snapshot_download("alice/space", repo_type="space"),
    "rows": [len(rows), type(rows[0]["images"][0]).__name__, load_dataset("alice/rows", split="train")[0]["id"]],
}))
"""


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, workspace, trained, adapter) -> Path:
    """Exported folders of every kind."""
    folder = tmp_path_factory.mktemp("shelf")
    space = folder / "demo"
    space.mkdir()
    (space / "app.py").write_text("import gradio\n")
    metadata = {"title": "Demo", "sdk": "gradio", "sdk_version": "6.31.0", "app_file": "app.py", "license": "mit"}
    (space / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n\n# Demo\n")
    save_tiny_checkpoint(folder / "dinov2", vision="dinov2", projector_type="linear")
    save_tiny_checkpoint(folder / "public", seed=3)
    for source, name, facts in (
        (trained, "model", FACTS),
        (workspace / "rows.json", "rows", ["--license", "mit", "--image-folder", str(workspace)]),
        (folder / "dinov2", "ours", FACTS),
        (folder / "public", "open", FACTS),
    ):
        assert main(["export", str(source), "--out", str(folder / name), *facts]) == 0
    return folder


@pytest.fixture(scope="module")
def pushes(hub, shelf, adapter, workspace, tmp_path_factory) -> dict[str, dict]:
    """What each command printed, and what the Hub had received by then."""
    # A base that this package's adapters fit: in our own layout.
    base = ["--license", "mit", "--base-model", "someone/vicuna", "--layout", "any_llava"]
    over_base = ["--license", "mit", "--base-model", "alice/base"]
    model = str(shelf / "model")
    commands = [
        ("dry run", [model, "--repo-id", "alice/never", "--dry-run"], {}),
        ("wrong token", [model, "--repo-id", "alice/model"], {"token": "hf_wrong"}),
        ("somebody else's", [model, "--repo-id", "bob/model"], {}),
        ("too large", [model, "--repo-id", "alice/model"], {"max_file_bytes": 30_000}),
        ("broken", [model, "--repo-id", "alice/model"], {"uploads_until_break": 1}),
        ("resumed", [model, "--repo-id", "alice/model"], {}),
        ("again", [model, "--repo-id", "alice/model"], {}),
        ("proposed", [str(shelf / "open"), "--repo-id", "alice/model", "--pull-request"], {}),
        ("public", [str(shelf / "open"), "--repo-id", "alice/open", "--public"], {}),
        ("private to public", [model, "--repo-id", "alice/open"], {}),
        ("base", [str(workspace / "start"), "--repo-id", "alice/base", *base], {}),
        ("adapter", [str(adapter), "--repo-id", "alice/adapter", *over_base], {}),
        ("dataset", [str(shelf / "rows"), "--repo-id", "alice/rows"], {}),
        ("space", [str(shelf / "demo"), "--repo-id", "alice/space"], {}),
        ("code", [str(shelf / "ours"), "--repo-id", "alice/ours"], {}),
    ]
    cache = tmp_path_factory.mktemp("pushing")
    result = subprocess.run(
        [sys.executable, "-c", PUSH, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=os.environ | hub.environment(cache),
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


def test_a_dry_run_shows_what_would_go_up_and_sends_nothing(pushes, hub):
    printed = pushes["dry run"]["out"]
    assert pushes["dry run"]["code"] == 0
    assert "model.safetensors" in printed and printed.endswith("nothing was sent to alice/never\n")
    assert ("models", "alice/never") not in hub.repositories


@pytest.mark.parametrize(
    "name, message",
    [
        ("wrong token", "the Hub does not know this token; get one that may write"),
        ("somebody else's", "got 403 from the Hub for bob/model"),
        ("too large", "The file is larger than the limit"),
        ("broken", "run the same command again, which sends what is missing"),
        ("private to public", "got alice/open, which exists and is public; expected a private one: give --public"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(pushes, name, message):
    assert pushes[name]["code"] == 2
    assert message in pushes[name]["err"]
    assert "Traceback" not in pushes[name]["err"]


def test_an_interrupted_upload_goes_on_where_it_was(pushes, hub, shelf):
    assert len(pushes["broken"]["uploads"]) == 1
    sent = pushes["resumed"]["uploads"]
    assert pushes["resumed"]["code"] == 0
    assert sent[:1] == pushes["broken"]["uploads"]
    assert len(sent) == len(set(sent)) == 2  # weights and tokenizer, each once
    assert pushes["again"]["uploads"] == sent
    assert hub.files("alice/model") == {
        name: (shelf / "model" / name).read_bytes() for name in list_files(shelf / "model")
    }


def test_new_repositories_are_private_unless_asked(pushes, hub):
    assert pushes["public"]["code"] == 0
    private = {name: repository.private for (_, name), repository in hub.repositories.items()}
    assert private == {
        "alice/model": True,
        "alice/open": False,
        "alice/base": True,
        "alice/adapter": True,
        "alice/rows": True,
        "alice/space": True,
        "alice/ours": True,
    }


def test_a_pull_request_leaves_the_repository_as_it_is(pushes, hub):
    assert pushes["proposed"]["out"].strip().endswith("/alice/model/discussions/1")
    main_files, proposed = hub.files("alice/model"), hub.files("alice/model", revision="refs/pr/1")
    assert main_files["model.safetensors"] != proposed["model.safetensors"]


def test_each_kind_is_a_repository_of_its_type(pushes, hub):
    assert {name: pushes[name]["code"] for name in ("base", "adapter", "dataset", "space", "code")} == dict.fromkeys(
        ("base", "adapter", "dataset", "space", "code"), 0
    )
    assert {kind for kind, name in hub.repositories if name == "alice/rows"} == {"datasets"}
    assert hub.repositories["spaces", "alice/space"].sdk == "gradio"
    adapter = json.loads(hub.files("alice/adapter")["adapter_config.json"])
    assert adapter["base_model_name_or_path"] == "alice/base"


def test_everything_loads_back(pushes, hub, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", LOAD],
        capture_output=True,
        text=True,
        env=os.environ | hub.environment(tmp_path),
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert loaded["model"] == "LlavaForConditionalGeneration"
    assert loaded["processor"] == "AnyLlavaProcessor"
    assert loaded["adapter"]
    assert sorted(path.name for path in Path(loaded["snapshot"]).iterdir()) == ["README.md", "app.py"]
    assert loaded["rows"] == [6, "bytes", "red"]


def test_code_from_the_hub_computes_the_same(pushes, hub, shelf, tmp_path):
    model = AnyLlavaForConditionalGeneration.from_pretrained(shelf / "dinov2").eval()
    inputs = folders.example_inputs(model)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("alice/ours", trust_remote_code=True).eval()
AutoProcessor.from_pretrained("alice/ours", trust_remote_code=True)
with torch.no_grad():
    torch.save(model(**torch.load("inputs.pt")).logits, "logits.pt")
"""
    run_python(code, tmp_path, **hub.environment(tmp_path / "cache"))
    assert torch.equal(torch.load(tmp_path / "logits.pt"), folders.logits_of(model, inputs))
