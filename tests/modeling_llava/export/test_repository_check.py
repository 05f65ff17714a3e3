"""What may not go up is named before anything leaves this machine."""

import json

import pytest
import yaml

from modeling_llava.export import repository_check
from modeling_llava.export.repository import check_repository, find_problems
from modeling_llava.export.repository_check import cut_paths, is_absolute_path
from tests.tiny import save_tiny_checkpoint

METADATA = {
    "license": "apache-2.0",
    "language": ["en"],
    "library_name": "transformers",
    "pipeline_tag": "image-text-to-text",
    "base_model": ["someone/vicuna"],
    "base_model_relation": "finetune",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_tiny_checkpoint(folder)
    write_card(folder)
    return folder


def write_card(folder, *, text: str = "# A model\n", **metadata) -> None:
    fields = {name: value for name, value in (METADATA | metadata).items() if value is not None}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n\n{text}")


def problems_of(folder, kind: str = "model") -> str:
    return "; ".join(find_problems(folder, kind))


def test_nothing_is_wrong_with_a_good_folder(good):
    check_repository(good, "model")


@pytest.mark.parametrize(
    "metadata, problem",
    [
        ({"license": "apache"}, "license is 'apache', which the Hub does not know"),
        ({"license": "other"}, "license is 'other' without license_name"),
        ({"base_model": None}, "base_model is missing"),
        ({"base_model": "runs/tiny/start"}, "base_model is 'runs/tiny/start', which is no id of the Hub"),
        ({"base_model_relation": "child"}, "base_model_relation is 'child'; it can be adapter, finetune"),
        ({"pipeline_tag": "vision-chat"}, "pipeline_tag is 'vision-chat', which the Hub does not know"),
        ({"library_name": None}, "library_name is missing"),
        ({"language": ["english"]}, "language is 'english', which is no code"),
        ({"datasets": ["my data"]}, "datasets is 'my data', which is no id of the Hub"),
        (
            {
                "model-index": [
                    {
                        "name": "x",
                        "results": [
                            {
                                "task": {"type": "vqa"},
                                "dataset": {"type": "pope", "name": "POPE"},
                                "metrics": [{"type": "f1", "value": 0.9}],
                            }
                        ],
                    }
                ]
            },
            "model-index has a figure of POPE without its source",
        ),
    ],
)
def test_metadata(good, metadata, problem):
    write_card(good, **metadata)
    try:
        assert problem in problems_of(good)
    finally:
        write_card(good)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("Weights from /home/somebody/runs/7b.", "README.md holds the path /home/somebody/runs/7b. of this machine"),
        ("`C:\\Users\\me\\model`", "README.md holds the path C:\\Users\\me\\model of this machine"),
        ("Weights: C:/Users/me/x", "README.md holds the path C:/Users/me/x of this machine"),
        ("See file:///home/me/x.", "README.md holds the path file:///home/me/x. of this machine"),
        (r"On \\server\share.", r"README.md holds the path \\server\share. of this machine"),
        ('revision="{{ sha }}"', "README.md holds '{{', which a template left behind"),
        ("Trained on {{ data }}.", "README.md holds '{{', which a template left behind"),
        ("{% if licence %}", "README.md holds '{%', which a template left behind"),
        ("[More Information Needed]", "README.md holds '[More Information Needed]'"),
        ("![loss](progress.png)", "README.md links progress.png, and there is no such file"),
    ],
)
def test_text(good, text, problem):
    write_card(good, text=text)
    try:
        assert problem in problems_of(good)
    finally:
        write_card(good)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/someone/model",
        "and/or",
        "1/2/3",
        "a `</s>` token",
        "<https://example.org/a/b>",
        "https://example.org/-/a/b?next=/c/d",
        "@misc{a,\n  title={{Visual} Instruction},\n  author = {{The LLaVA team}},\n}",
        "[x](config.json)",
    ],
)
def test_what_is_no_path(good, text):
    write_card(good, text=text)
    assert not problems_of(good)
    write_card(good)


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("weights.bin", b"\x80", "weights.bin can hold code that runs when it is loaded"),
        ("sub/.env", b"A=1", "sub/.env usually holds secrets"),
        ("notes.txt", b"hf_" + b"a" * 34, "notes.txt holds an access token"),
        ("extra.json", json.dumps({"a": [{"b": "/work/data/x.json"}]}).encode(), "the path /work/data/x.json of this"),
        ("run.json", b'{"command": "llava eval --model /home/me/x"}', "run.json holds the path /home/me/x of this"),
        ("big.txt", b"0" * 2000, "big.txt has 2,000 bytes, and the Hub takes at most 1,999 in one file"),
    ],
)
def test_files(good, name, content, problem, monkeypatch):
    if name == "big.txt":
        monkeypatch.setattr(repository_check, "MAX_FILE_BYTES", 1999)
    path = good / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        assert problem in problems_of(good)
    finally:
        path.unlink()


def test_missing_parts(tmp_path):
    assert problems_of(tmp_path) == "; ".join(
        f"{name} is missing"
        for name in (
            "model.safetensors",
            "config.json",
            "generation_config.json",
            "processor_config.json",
            "chat_template.jinja",
            "README.md",
        )
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "model-1.safetensors is missing" in problems_of(tmp_path)


def test_a_card_without_metadata(good):
    (good / "README.md").write_text("# A model\n")
    assert problems_of(good) == "README.md does not begin with metadata between two lines of ---"
    (good / "README.md").write_text("---\na: [\n---\n")
    assert "the metadata of README.md is not YAML" in problems_of(good)
    write_card(good)


def test_an_adapter_and_its_card_name_one_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/llama"}))
    write_card(tmp_path, base_model_relation="adapter")
    assert "base_model is ['someone/vicuna'], and adapter_config.json says 'someone/llama'" in problems_of(
        tmp_path, "adapter"
    )
    write_card(tmp_path)
    assert "base_model_relation is 'finetune' for an adapter" in problems_of(tmp_path, "adapter")


def test_spaces(tmp_path):
    metadata = {"sdk": "gradio", "sdk_version": "6.31.0", "app_file": "main.py", "colorFrom": "teal", "license": "mit"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n")
    assert problems_of(tmp_path, "space") == (
        "app_file is 'main.py', and there is no such file; "
        "colorFrom is 'teal'; it can be red, yellow, green, blue, indigo, purple, pink, gray"
    )


def test_datasets(tmp_path):
    files = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'license': 'mit', 'configs': files})}---\n")
    assert problems_of(tmp_path, "dataset") == "configs names data/train-*, and there is no such file"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("/home/me/x", "x"),
        ("/tmp/a b/c", "c"),
        ("C:\\models\\llava", "llava"),
        ("llava eval --model /home/me/x --data=/home/me/x/y/", "llava eval --model x --data=y"),
        ("see https://example.org/-/a/b", "see https://example.org/-/a/b"),
        ("a `</s>` token", "a `</s>` token"),
    ],
)
def test_paths_are_cut_to_their_last_part(text, expected):
    assert cut_paths(text) == expected


def test_the_limit_is_that_of_the_hub():
    """https://huggingface.co/docs/hub/storage-limits"""
    assert repository_check.MAX_FILE_BYTES == 500_000_000_000


@pytest.mark.parametrize("value", ["/home/me/x", "C:\\models\\llava", "/tmp/a b/c"])
def test_absolute_paths(value):
    assert is_absolute_path(value)


@pytest.mark.parametrize("value", ["someone/model", "runs/x", "/", "</s>", "/n", "https://example.org/a", "a\n/b/c"])
def test_other_texts(value):
    assert not is_absolute_path(value)
