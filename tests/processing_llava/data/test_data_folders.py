"""A folder of data reads its own files and nothing else, whatever its cards and tables name."""

import json
import socket

import datasets
import pytest
import yaml
from datasets import Dataset, DatasetDict

from processing_llava.data.data_sources import DataSource, open_records
from processing_llava.data.row_datasets import load_rows

ROW = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "secret"}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`data` with rows, beside a file that it may not read. Nothing may ask the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    datasets.disable_progress_bars()
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    (tmp_path / "data-outside").mkdir()
    for path in (folder / "rows.jsonl", folder / "more" / "rows.jsonl", tmp_path / "data-outside" / "secret.jsonl"):
        path.write_text(json.dumps(ROW) + "\n")
    return folder


def assert_refused(folder, message: str, **fields) -> None:
    for read in (lambda source: list(open_records(source)[1]), lambda source: list(load_rows([source])[0])):
        with pytest.raises(ValueError, match=message) as caught:
            read(DataSource(path=str(folder), **fields))
        assert len(str(caught.value)) < 1500


NAMES = [
    "{outside}/secret.jsonl",
    "../data-outside/*.jsonl",
    "more/../../data-outside/secret.jsonl",
    "file://{outside}/secret.jsonl",
    "http://127.0.0.1:9/rows.jsonl",
    "https://example.com/rows.jsonl",
    "hf://datasets/a/b/rows.jsonl",
    "zip://rows.jsonl::https://example.com/a.zip",
    "zip://rows.jsonl::{outside}/a.zip",
]
FORMS = {
    "one": lambda name: {"data_files": name},
    "list": lambda name: {"data_files": ["rows.jsonl", name]},
    "split": lambda name: {"data_files": [{"split": "train", "path": name}]},
    "splits": lambda name: {"data_files": [{"split": "train", "path": ["rows.jsonl", name]}]},
    "folder": lambda name: {"data_dir": name},
}


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_card_names_no_data_elsewhere(folder, name, form, card):
    config = {"config_name": "default"} | FORMS[form](name.format(outside=folder.parent / "data-outside"))
    configs = [{"config_name": "first", "data_files": "rows.jsonl"}, config]
    text = yaml.safe_dump({"configs": configs})
    (folder / card).write_text(f"---\n{text}---\n# Data\n" if card == "README.md" else text)
    assert_refused(folder, f"got .*{card}, which names the data", name="default")


def test_a_card_names_data_inside(folder):
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": "more/*.jsonl"}]}]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n# Data\n")
    assert len(load_rows([DataSource(path=str(folder))])[0]) == 1
    (folder / "README.md").write_text("No fields.\n")
    assert len(load_rows([DataSource(path=str(folder))])[0]) == 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_lead_out_only_where_that_was_said(folder, kind):
    outside = folder.parent / "data-outside"
    (folder / "link.jsonl").symlink_to(outside / "secret.jsonl")
    if kind == "folder":
        (folder / "link.jsonl").unlink()
        (folder / "more" / "rows.jsonl").unlink()
        (folder / "more").rmdir()
        (folder / "more").symlink_to(outside)
        (folder / "README.md").write_text("---\nconfigs: [{config_name: a, data_files: more/secret.jsonl}]\n---\n")
    assert_refused(folder, "which names the data .* expected files inside of its folder: .*follow_links")
    rows, _ = load_rows([DataSource(path=str(folder), follow_links=True)])
    assert len(rows) == (3 if kind == "file" else 1)


@pytest.mark.parametrize("way", ["absolute", "relative", "link", "split"])
def test_a_saved_dataset_names_tables_inside(folder, way):
    outside, saved = folder.parent / "data-outside" / "saved", folder / "saved"
    Dataset.from_list([ROW]).save_to_disk(outside)
    DatasetDict({"train": Dataset.from_list([ROW])}).save_to_disk(saved)
    assert len(load_rows([DataSource(path=str(saved))])[0]) == 1
    table = next(outside.glob("data-*.arrow"))
    if way == "split":
        (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["../../data-outside/saved"]}))
    elif way == "link":
        own = next(saved.rglob("data-*.arrow"))
        own.unlink()
        own.symlink_to(table)
    else:
        names = {"absolute": str(table), "relative": f"../../../data-outside/saved/{table.name}"}
        state = json.loads((saved / "train" / "state.json").read_text())
        state["_data_files"] = [{"filename": names[way]}]
        (saved / "train" / "state.json").write_text(json.dumps(state))
    assert_refused(saved, "which names the data .* expected files inside of its folder")


def test_a_dataset_of_the_hub_names_no_file_of_this_machine(folder, monkeypatch):
    class Builder:
        class config:
            data_files = {"train": [str(folder / "rows.jsonl")]}

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: Builder)
    assert_refused("someone/rows", "got the dataset 'someone/rows', whose card names the data")


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{former}'] * 9)}]\n" for former, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "fields", [ALIASES + "configs: *i", "[" * 50_000, "configs: " + "x" * 200_000, "configs: {", "a: &a [*a]"]
)
def test_a_card_that_is_a_bomb_is_one_line(folder, fields):
    (folder / "README.md").write_text(f"---\n{fields}\n---\n# Data\n")
    assert_refused(folder, r"got .*README\.md.*; expected")
