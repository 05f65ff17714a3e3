"""`llava export`: what a folder of each kind holds, and what may not go up."""

import csv
import json
import re
import shutil
from pathlib import Path

import PIL.Image
import PIL.PngImagePlugin
import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard, EvalResultEntry, ModelCard, SpaceCard, parse_eval_result_entries
from transformers import AutoTokenizer

from modeling_llava.cli import main
from modeling_llava.export import model_repository, repository
from modeling_llava.export.repository import find_kind, find_problems, list_files
from modeling_llava.records.training_record import read_run_files
from tests import original_folders as folders
from tests.conftest import GOLDENS, ROOT
from tests.modeling_llava.export.conftest import MANIFEST
from tests.tiny import save_tiny_checkpoint

BASE = ["--license", "apache-2.0", "--base-model", "someone/vicuna"]
RESULTS = {
    "seed": 3,
    "commit": "0123abc",
    "command": "llava eval pope",
    "results": [
        {"benchmark": "POPE", "dataset": "lmms-lab/POPE", "split": "test", "metric": "f1", "value": 0.859, "n": 9000}
    ],
}


def export(capsys, *arguments: str) -> str:
    assert main(["export", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture
def finished(trained):
    """The trained folder with results and emissions, as later commands leave them."""
    (trained / "results").mkdir(exist_ok=True)
    (trained / "results" / "pope.json").write_text(json.dumps(RESULTS))
    line = {
        "emissions": 0.0125,
        "energy_consumed": 0.5,
        "country_name": "Norway",
        "gpu_model": "",
        "cpu_model": "a small one",
        "longitude": 10.7,
        "latitude": 59.9,
    }
    write_emissions(trained, [line])
    return trained


def write_emissions(folder: Path, lines: list[dict]) -> None:
    with (folder / "emissions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def test_a_trained_model(finished, tmp_path, capsys):
    printed = export(capsys, str(finished), "--out", str(tmp_path / "out"), "--repo-id", "someone/squares", *BASE)
    out = tmp_path / "out"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found >= {
        "LICENSE",
        "README.md",
        "TRAINING_DATA_SUMMARY.md",
        "chat_template.jinja",
        "config.json",
        "emissions.csv",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "progress.csv",
        "progress.png",
        "results/pope.json",
        "tokenizer.json",
        "training_record.json",
    }
    assert "model, layout transformers: " in printed
    assert "note: data three coloured squares is under cc-by-nc-4.0, which forbids commercial use" in printed
    assert not list(find_problems(out, "model"))


def test_the_card_of_a_trained_model(finished, tmp_path, capsys):
    export(capsys, str(finished), "--out", str(tmp_path / "out"), "--repo-id", "someone/squares", *BASE)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": ["someone/vicuna"],
        "base_model_relation": "finetune",
        "metrics": ["f1"],
        "tags": ["llava", "vision"],
        "co2_eq_emissions": {
            "emissions": 12.5,
            "source": "codecarbon, emissions.csv",
            "training_type": "fine-tuning",
            "geographical_location": "Norway",
            "hardware_used": "a small one",
        },
        "model-index": [
            {
                "name": "squares",
                "results": [
                    {
                        "task": {"type": "image-text-to-text"},
                        "dataset": {
                            "name": "POPE",
                            "type": "lmms-lab/POPE",
                            "config": "POPE, results/pope.json",
                            "split": "test",
                        },
                        "metrics": [{"type": "f1", "value": 0.859}],
                        "source": {
                            "name": "results/pope.json",
                            "url": "https://huggingface.co/someone/squares/blob/main/results/pope.json",
                        },
                    }
                ],
            }
        ],
    }
    record = json.loads((finished / "training_record.json").read_text())
    text = card.text
    for expected in (
        "| POPE | test | f1 | 0.859 | 9,000 | 3 | `0123abc` | [results/pope.json](results/pope.json) |",
        "| three coloured squares | synthetic | 6 | 3 | cc-by-nc-4.0 | not stated | none | nobody@example.org |",
        "| `learning_rate` | 0.003 |",
        "| `seed` | 42 |",
        "| longest row | 400 tokens; longer rows: `drop` |",
        "| `projector_learning_rate` | 0.0001 |",
        "| steps | 2 |",
        "rows of `rows.json`: sha256 `" + record["data"][0]["sha256"],
        "![Loss and throughput over the steps](progress.png)",
        "0.5 kWh and 0.0125 kg of CO2 equivalent",
        "USER: <image>\nWhat is in this picture? ASSISTANT: A cat.</s>",
        "an end token ends the prompt\nthere, and `<image>` is taken for a picture",
        record["hardware"]["device"],
    ):
        assert expected in text, expected
    summary = (tmp_path / "out" / "TRAINING_DATA_SUMMARY.md").read_text()
    assert re.search(r"### Data made by models or programs\n+#### three coloured squares", summary)
    assert "Images: less than 1 million" in summary
    assert "### Data crawled from the web\n\nNone." in summary


def test_figures_of_two_files_keep_their_sources(finished, tmp_path, capsys):
    """The figures are of one dataset and split, and differ in name or seed."""
    (result,) = RESULTS["results"]
    results = finished / "results"
    (results / "easy.json").write_text(json.dumps(RESULTS | {"results": [result | {"benchmark": "POPE, easy"}]}))
    (results / "again.json").write_text(json.dumps(RESULTS | {"seed": 4}))
    try:
        export(capsys, str(finished), "--out", str(tmp_path / "out"), *BASE)
    finally:
        (results / "easy.json").unlink()
        (results / "again.json").unlink()
    found = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert sorted((figure.dataset_name, figure.source_name) for figure in found) == [
        ("POPE", "results/again.json"),
        ("POPE", "results/pope.json"),
        ("POPE, easy", "results/easy.json"),
    ]


def test_of_the_emissions_only_what_the_card_says_goes_up(finished, tmp_path, capsys):
    export(capsys, str(finished), "--out", str(tmp_path / "out"), *BASE)
    header = (tmp_path / "out" / "emissions.csv").read_text().splitlines()[0]
    assert header == "emissions,energy_consumed,country_name,gpu_model,cpu_model"


def test_emissions_of_a_run_that_was_resumed_are_summed(tmp_path):
    line = {"emissions": 0.25, "energy_consumed": 0.5, "country_name": "Norway", "gpu_model": "", "cpu_model": "x"}
    write_emissions(tmp_path, [line, line | {"emissions": 0.5, "cpu_model": "y"}])
    emissions = read_run_files(tmp_path).emissions
    assert (emissions["emissions"], emissions["energy_consumed"]) == (0.75, 1.0)
    assert (emissions["country_name"], emissions["cpu_model"]) == ("Norway", "x, y")
    assert emissions["emissions"].source == "emissions.csv"


def test_results_of_a_benchmark_of_the_hub_are_where_it_reads_them(finished, tmp_path, capsys):
    """After eval_results.yaml of huggingface/hub-docs; a benchmark that is not registered there has no task."""
    (result,) = RESULTS["results"]
    tasks = [result | {"dataset": "someone/pope", "task_id": "pope"}, result]
    (finished / "results" / "pope.json").write_text(json.dumps(RESULTS | {"results": tasks}))
    export(capsys, str(finished), "--out", str(tmp_path / "out"), "--repo-id", "someone/squares", *BASE)
    (path,) = (tmp_path / "out" / ".eval_results").glob("*.yaml")
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert entry == EvalResultEntry(
        dataset_id="someone/pope",
        task_id="pope",
        value=0.859,
        source_url="https://huggingface.co/someone/squares/blob/main/results/pope.json",
        source_name="results/pope.json",
        notes="f1 on test, n=9000, seed 3, commit 0123abc",
    )
    assert ".eval_results/anyllava.yaml" in list_files(tmp_path / "out")
    assert len(ModelCard.load(tmp_path / "out" / "README.md").data.eval_results) == 2


def test_paths_of_this_machine_stay_here(finished, workspace, tmp_path, capsys):
    command = {"command": f"llava eval pope --model {finished}"}
    (finished / "results" / "pope.json").write_text(json.dumps(RESULTS | command))
    export(capsys, str(finished), "--out", str(tmp_path / "out"), *BASE)
    kept = json.loads((tmp_path / "out" / "results" / "pope.json").read_text())
    assert kept["command"] == "llava eval pope --model finetune"
    for path in filter(Path.is_file, (tmp_path / "out").rglob("*")):
        assert str(workspace).encode() not in path.read_bytes(), path.name


def test_of_pictures_their_pixels_go_up(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    note = PIL.PngImagePlugin.PngInfo()
    note.add_text("Comment", "hf_" + "a" * 34)
    pixels = PIL.Image.open(run / "progress.png").convert("RGB")
    pixels.save(run / "progress.png", pnginfo=note)
    export(capsys, str(run), "--out", str(tmp_path / "out"), "--repo-id", "someone/squares", *BASE)
    plot = PIL.Image.open(tmp_path / "out" / "progress.png")
    assert plot.info == {} and plot.tobytes() == pixels.tobytes()
    pixels.save(tmp_path / "out" / "progress.png", pnginfo=note)
    assert any("progress.png holds more than pixels" in line for line in find_problems(tmp_path / "out", "model"))


def test_an_adapter(adapter, tmp_path, capsys):
    printed = export(capsys, str(adapter), "--out", str(tmp_path / "out"), *BASE)
    assert "adapter: " in printed
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.base_model_relation) == (
        "peft",
        ["someone/vicuna"],
        "adapter",
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/vicuna"
    assert "| rank | 4 |" in card.text
    assert "| dropout | 0.05 |" in card.text
    assert "| LoRA `lora_alpha` | 8 |" in card.text
    assert "| trained as a whole | `mm_projector` |" in card.text
    assert not list(find_problems(tmp_path / "out", "adapter"))


def test_an_adapter_of_a_folder_needs_its_base_on_the_hub(adapter, tmp_path, capsys):
    assert main(["export", str(adapter), "--out", str(tmp_path / "out"), "--license", "mit"]) == 2
    assert "push the base model and give its id as --base-model" in capsys.readouterr().err


def test_a_dataset(workspace, tmp_path, capsys):
    arguments = [str(workspace / "rows.json"), "--image-folder", str(workspace), "--license", "cc-by-4.0"]
    printed = export(
        capsys, *arguments, "--out", str(tmp_path / "out"), "--data-manifest", str(workspace / "manifest.yaml")
    )
    assert "which forbids commercial use" in printed
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.size_categories == ["n<1K"]
    assert "6 rows, 6 pictures." in card.text
    assert "- Contact: nobody@example.org" in card.text
    (workspace / "red.png").rename(workspace / "moved.png")
    try:
        rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
        assert len(rows) == 6
        assert rows[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)
        assert rows[0]["messages"][1]["content"][0]["text"] == "red."
    finally:
        (workspace / "moved.png").rename(workspace / "red.png")


def test_a_space_keeps_its_card_or_gets_one(tmp_path, capsys):
    space = tmp_path / "space"
    (space / "__pycache__").mkdir(parents=True)
    (space / "__pycache__" / "app.cpython-311.pyc").write_bytes(b"")
    (space / "app.py").write_text("import gradio\n")
    (space / "requirements.txt").write_text("gradio==6.31.0\nanyllava\n")
    export(capsys, str(space), "--out", str(tmp_path / "written"), *BASE)
    card = SpaceCard.load(tmp_path / "written" / "README.md")
    assert (card.data.sdk, card.data.sdk_version, card.data.app_file) == ("gradio", "6.31.0", "app.py")
    assert not (tmp_path / "written" / "__pycache__").exists()
    metadata = {"title": "Mine", "sdk": "gradio", "sdk_version": "6.31.0", "license": "mit"}
    (space / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n\n# Mine\n")
    export(capsys, str(space), "--out", str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "README.md").read_text() == (space / "README.md").read_text()


def test_the_demo_is_a_space(tmp_path, capsys):
    printed = export(capsys, str(ROOT / "spaces_demo"), "--out", str(tmp_path / "out"))
    assert "space: " in printed
    assert (tmp_path / "out" / "README.md").read_text() == (ROOT / "spaces_demo" / "README.md").read_text()
    assert not list((tmp_path / "out").rglob("__pycache__"))


def test_weights_that_do_not_fit_one_file(workspace, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model_repository, "SHARD_SIZE", "30KB")
    export(capsys, str(workspace / "start"), "--out", str(tmp_path / "out"), *BASE)
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert not list(find_problems(tmp_path / "out", "model"))
    shards[0].unlink()
    assert list(find_problems(tmp_path / "out", "model")) == [f"{shards[0].name} is missing"]


def test_a_prepared_folder_goes_where_its_card_says(workspace, tmp_path, capsys):
    out = str(tmp_path / "model")
    export(capsys, str(workspace / "start"), "--out", out, *BASE)
    assert main(["push", out, "--repo-id", "alice/model", "--dry-run"]) == 2
    assert "whose card was written for 'model'; expected 'alice/model': export it again" in capsys.readouterr().err


def test_a_dry_run_checks_a_prepared_folder(workspace, tmp_path, capsys):
    out = tmp_path / "model"
    export(capsys, str(workspace / "start"), "--out", str(out), "--repo-id", "alice/model", *BASE)
    push = ["push", str(out), "--repo-id", "alice/model", "--dry-run"]
    assert main(push) == 0
    (out / "weights.bin").write_bytes(b"")
    assert main(push) == 2
    assert "weights.bin can hold code that runs when it is loaded" in capsys.readouterr().err


def test_a_push_checks_a_folder_once(workspace, tmp_path, monkeypatch):
    checked = []

    def find_and_count(folder: Path, kind: str):
        checked.append(kind)
        return find_problems(folder, kind)

    monkeypatch.setattr(repository, "find_problems", find_and_count)
    export = ["export", str(workspace / "start"), "--out", str(tmp_path / "out"), "--repo-id", "alice/model", *BASE]
    assert main(export) == 0
    for source, facts in ((workspace / "start", BASE), (tmp_path / "out", [])):
        checked.clear()
        # Without a network it ends where it would begin to send.
        assert main(["push", str(source), "--repo-id", "alice/model", *facts]) == 2
        assert checked == ["model"]


def test_an_original_folder_goes_up_in_the_layout_of_transformers(tmp_path, capsys):
    folders.write_v15(tmp_path)
    printed = export(capsys, str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out"), "--card", "llava-v1.5-7b")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava"
    # SentencePiece: the text after a picture begins with another piece there.
    assert "note: transformers' processor gives the text after a picture other ids" in printed
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "It also tokenises the text after a picture differently" in card.text
    assert "| POPE | 85.9 |" in card.text


def test_the_sentencepiece_file_goes_along(tmp_path, capsys):
    """llama.cpp's converter reads it; transformers goes on reading tokenizer.json, which has the image token."""
    folders.write_v15(tmp_path)
    export(capsys, str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out"), "--card", "llava-v1.5-7b")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (GOLDENS / "tokenizer.model").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()["<image>"] == folders.SPM_VOCAB_SIZE


def test_pieces_of_a_tokenizer_are_no_paths(workspace, tmp_path, capsys):
    pieces = json.loads((workspace / "start" / "tokenizer.json").read_text())
    source = tmp_path / "start"
    shutil.copytree(workspace / "start", source)
    pieces["added_tokens"].append(pieces["added_tokens"][-1] | {"id": 301, "content": "/usr/local/lib"})
    (source / "tokenizer.json").write_text(json.dumps(pieces))
    export(capsys, str(source), "--out", str(tmp_path / "out"), *BASE)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()["/usr/local/lib"] == 301


def test_a_card_that_somebody_wrote_is_kept(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "model")
    metadata = {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "someone/vicuna",
        "base_model_relation": "finetune",
    }
    (tmp_path / "model" / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n\n# By hand\n")
    printed = export(capsys, str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--keep-card")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.text.rstrip().endswith("# By hand")
    assert card.data.base_model == "someone/vicuna"
    assert "note: data three coloured squares is under cc-by-nc-4.0, which forbids commercial use" in printed
    assert "three coloured squares" in (tmp_path / "out" / "TRAINING_DATA_SUMMARY.md").read_text()
    assert "Apache License" in (tmp_path / "out" / "LICENSE").read_text()


@pytest.mark.parametrize(
    "metadata, message",
    [
        ("license: mit", "README.md without license or base_model; expected both"),
        ("license: [mit]\nbase_model: someone/vicuna", "README.md; expected str"),
    ],
)
def test_a_card_to_keep_says_licence_and_base(tmp_path, capsys, metadata, message):
    save_tiny_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(f"---\n{metadata}\n---\n\n# By hand\n")
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--keep-card"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--base-model", "someone/vicuna"], "got no licence; expected one: give --license"),
        (["--license", "apache-2.0"], "got no base model on the Hub"),
        (
            ["--license", "apache 2", "--base-model", "a/b"],
            "got license='apache 2'; expected an identifier",
        ),
        ([*BASE, "--layout", "hf"], "got layout='hf'; expected one of any_llava, original, transformers"),
        ([*BASE, "--with-code"], "got code for the layout 'transformers'"),
        ([*BASE, "--card", "llava-v9"], "got card 'llava-v9'; expected a YAML file or one of llava-13b-v0-science_qa"),
        ([*BASE, "--data-manifest", "nowhere.yaml"], "got 'nowhere.yaml'; expected a YAML file"),
        (["--keep-card"], "to keep; expected one"),
    ],
)
def test_what_a_user_can_get_wrong(workspace, tmp_path, capsys, arguments, message):
    assert main(["export", str(workspace / "start"), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_not_written_into(workspace, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", str(workspace / "start"), "--out", str(tmp_path), *BASE]) == 2
    assert "which holds files; expected a new or empty folder" in capsys.readouterr().err


def test_what_is_no_folder_of_any_kind(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    with pytest.raises(ValueError, match=r"expected a model \(config.json\), an adapter"):
        find_kind(tmp_path)
    with pytest.raises(ValueError, match="there is none at this path"):
        find_kind(tmp_path / "nowhere")


def test_the_manifest_of_a_run_reaches_its_card(trained):
    entry = json.loads((trained / "training_record.json").read_text())["data_manifest"][0]
    assert {name: entry[name] for name in MANIFEST[0]} == MANIFEST[0]
