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
from modeling_llava.export import dataset_repository, model_repository
from modeling_llava.export.repository import list_files
from tests import original_folders as folders
from tests.conftest import ROOT
from tests.fake_hub import READ_TOKEN, FakeHub, Repository
from tests.modeling_llava.export.conftest import run_python, train_tiny
from tests.modeling_llava.export.test_merged_adapter import save_wide_checkpoint
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
OWN_FILES = {"notes.md": b"mine", "onnx/model.safetensors": b"mine", "convert.py": b"mine"}
"""What somebody put into a repository by hand."""
LOAD = """
import json
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoProcessor
from modeling_llava import AutoModelForVision2Seq
from processing_llava.data.data_sources import DataSource
from processing_llava.data.row_datasets import load_rows

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
        hub.repositories["models", "bob/model"] = Repository(private=False)
        hub.repositories["models", "alice/to-one"] = Repository(private=True)
        hub.files("alice/to-one").update(OWN_FILES)
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
    rows = ["--license", "mit", "--image-folder", str(workspace)]

    def export(source: Path, name: str, facts: list[str]) -> None:
        arguments = ["--out", str(folder / name), "--repo-id", f"alice/{name}"]
        assert main(["export", str(source), *arguments, *facts]) == 0

    export(trained, "model", FACTS)
    export(workspace / "rows.json", "rows", rows)
    export(folder / "dinov2", "ours", FACTS)
    export(folder / "public", "open", FACTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_repository, "SHARD_SIZE", "30KB")
        export(workspace / "start", "to-shards", FACTS)
        export(workspace / "start", "to-one", FACTS)
        patch.setattr(dataset_repository, "SHARD_BYTES", 500)
        export(workspace / "rows.json", "fewer-rows", rows)
    return folder


@pytest.fixture(scope="module")
def pushes(hub, shelf, adapter, workspace, tmp_path_factory) -> dict[str, dict]:
    """What each command printed, and what the Hub had received by then."""
    # A base that this package's adapters fit: in our own layout.
    base = ["--license", "mit", "--base-model", "someone/vicuna", "--layout", "any_llava"]
    over_base = ["--license", "mit", "--base-model", "alice/base"]
    start, model, public = str(workspace / "start"), str(shelf / "model"), str(shelf / "open")
    rows = [str(workspace / "rows.json"), "--image-folder", str(workspace), "--license", "mit"]
    commands = [
        ("dry run", [start, "--repo-id", "alice/never", "--dry-run", *FACTS], {}),
        ("no token", [model, "--repo-id", "alice/model"], {"token": ""}),
        ("wrong token", [model, "--repo-id", "alice/model"], {"token": "hf_wrong"}),
        ("read token", [model, "--repo-id", "alice/model"], {"token": READ_TOKEN}),
        ("taken name", [start, "--repo-id", "bob/model", *FACTS], {}),
        ("too large", [model, "--repo-id", "alice/model"], {"max_file_bytes": 30_000}),
        ("broken", [model, "--repo-id", "alice/model"], {"uploads_until_break": 1}),
        ("resumed", [model, "--repo-id", "alice/model"], {}),
        ("again", [model, "--repo-id", "alice/model"], {}),
        ("bad card", [model, "--repo-id", "alice/model"], {"card_refusal": 400}),
        ("unprocessable card", [model, "--repo-id", "alice/model"], {"card_refusal": 422}),
        ("proposed", [str(shelf / "public"), "--repo-id", "alice/model", "--pull-request", *FACTS], {}),
        ("public", [public, "--repo-id", "alice/open", "--public"], {}),
        ("private to public", [public, "--repo-id", "alice/open"], {}),
        ("base", [start, "--repo-id", "alice/base", *base], {}),
        ("adapter", [str(adapter), "--repo-id", "alice/adapter", *over_base], {}),
        ("base of transformers", [start, "--repo-id", "alice/theirs", *FACTS], {}),
        ("adapter over it", [str(adapter), "--repo-id", "alice/no", *over_base[:3], "alice/theirs"], {}),
        ("one file with code", [start, "--repo-id", "alice/to-shards", *base], {}),
        ("then shards", [str(shelf / "to-shards"), "--repo-id", "alice/to-shards"], {}),
        ("shards", [str(shelf / "to-one"), "--repo-id", "alice/to-one"], {}),
        ("then one file", [start, "--repo-id", "alice/to-one", *FACTS], {}),
        ("files of rows", [str(shelf / "fewer-rows"), "--repo-id", "alice/fewer-rows"], {}),
        ("then one of rows", [*rows, "--repo-id", "alice/fewer-rows"], {}),
        ("dataset", [str(shelf / "rows"), "--repo-id", "alice/rows"], {}),
        ("space", [str(shelf / "demo"), "--repo-id", "alice/space"], {}),
        ("code", [str(shelf / "ours"), "--repo-id", "alice/ours"], {}),
    ]
    return push(hub, tmp_path_factory.mktemp("pushing"), commands)


def push(hub: FakeHub, cache: Path, commands: list[tuple[str, list[str], dict]]) -> dict[str, dict]:
    result = run_online(hub, cache, PUSH, json.dumps(commands))
    lines = [json.loads(line) for line in result.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


def run_online(hub: FakeHub, cache: Path, code: str, *arguments: str, **environment: str) -> str:
    """The output of Python code for which the fake Hub is the Hub."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | hub.environment(cache) | environment,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_dry_run_shows_what_would_go_up_and_sends_nothing(pushes, hub):
    printed = pushes["dry run"]["out"]
    assert pushes["dry run"]["code"] == 0
    assert "model.safetensors" in printed and printed.endswith("nothing was sent to alice/never\n")
    assert ("models", "alice/never") not in hub.repositories


@pytest.mark.parametrize(
    "name, message",
    [
        ("no token", "got no token of the Hub; expected one"),
        ("wrong token", "the Hub does not know this token; get one that may write"),
        ("read token", "got 403 from the Hub for alice/model"),
        (
            "taken name",
            "got bob/model, which belongs to bob; expected a repository of alice: choose another --repo-id",
        ),
        ("bad card", "- license is required): the Hub refuses this, most often for the card"),
        ("unprocessable card", "the Hub refuses this, most often for the card: correct the metadata at the top"),
        (
            "adapter over it",
            "got an adapter with a projector for alice/theirs, whose layout 'transformers' has another",
        ),
        ("too large", "The file is larger than the limit"),
        ("broken", "run the same command again, which sends what is missing"),
        ("private to public", "got alice/open, which exists and is public; expected a private one: give --public"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(pushes, name, message):
    assert pushes[name]["code"] == 2
    assert message in pushes[name]["err"]
    assert "Traceback" not in pushes[name]["err"]


@pytest.mark.parametrize("repo_id", ["model", "bad id/model", "alice/mo--del"])
def test_a_name_that_no_repository_may_have_is_refused_before_anything_is_read(repo_id, capsys):
    assert main(["push", "no-such-folder", "--repo-id", repo_id, "--dry-run"]) == 2
    assert repo_id in capsys.readouterr().err


def test_offline_is_said(hub, shelf, tmp_path):
    arguments = json.dumps([str(shelf / "model"), "--repo-id", "alice/model"])
    code = "import json, sys; from modeling_llava.cli import main; print(main(['push', *json.loads(sys.argv[1])]))"
    code = f"import contextlib, sys\nwith contextlib.redirect_stderr(sys.stdout):\n    {code}"
    printed = run_online(hub, tmp_path, code, arguments, HF_HUB_OFFLINE="1")
    assert "got HF_HUB_OFFLINE=1; expected to be online to push" in printed
    assert printed.endswith("2\n")


def test_an_update_takes_out_what_an_earlier_push_left(pushes, hub):
    updates = ("one file with code", "then shards", "shards", "then one file", "files of rows", "then one of rows")
    assert {name: pushes[name]["code"] for name in updates} == dict.fromkeys(updates, 0)
    weights = {
        name: sorted(path for path in hub.files(name) if "safetensors" in path and "/" not in path)
        for name in ("alice/to-shards", "alice/to-one")
    }
    assert weights["alice/to-one"] == ["model.safetensors"]
    assert "model.safetensors.index.json" in weights["alice/to-shards"]
    assert "model.safetensors" not in weights["alice/to-shards"]
    assert not [path for path in hub.files("alice/to-shards") if path.endswith(".py")]
    rows = [path for path in hub.files("alice/fewer-rows", kind="datasets") if path.startswith("data/")]
    assert rows == ["data/train-00000-of-00001.parquet"]


def test_an_update_leaves_what_somebody_put_there(pushes, hub):
    assert OWN_FILES.items() <= hub.files("alice/to-one").items()


def test_an_adapter_on_the_hub_is_merged_into_the_bits_of_its_record(hub, workspace, tmp_path):
    pytest.importorskip("bitsandbytes")
    start = save_wide_checkpoint(tmp_path / "start")
    adapter = train_tiny(
        workspace, "qlora", model=str(start), lora={"r": 4, "lora_alpha": 8}, output_dir=str(tmp_path / "adapter")
    )
    base = [str(start), "--repo-id", "alice/wide", *FACTS, "--layout", "any_llava"]
    facts = ["--license", "mit", "--base-model", "alice/wide"]
    commands = [("base", base, {}), ("adapter", [str(adapter), "--repo-id", "alice/qlora", *facts], {})]
    assert [line["code"] for line in push(hub, tmp_path / "cache", commands).values()] == [0, 0]
    code = "import sys; from modeling_llava.cli import main; sys.exit(main(['merge', 'alice/qlora', *sys.argv[1:]]))"
    printed = run_online(hub, tmp_path / "cache", code, "--out", str(tmp_path / "merged"))
    assert "4-bit base; logits before and after differ" in printed
    record = json.loads((tmp_path / "merged" / "training_record.json").read_text())
    assert (record["recipe"]["stage"], record["merged"]["base_bits"]) == ("qlora", 4)


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
    public = {name for (_, name), repository in hub.repositories.items() if not repository.private}
    assert public == {"alice/open", "bob/model"}


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
    loaded = json.loads(run_online(hub, tmp_path, LOAD).splitlines()[-1])
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
