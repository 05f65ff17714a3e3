"""The ready cards of published models: complete, honest about licences, every figure one of its source."""

import re
from pathlib import Path

import pytest

import hub_cards
from modeling_llava.export.export_settings import read_published
from modeling_llava.export.model_card import ModelDescription, write_data_summary, write_model_card
from modeling_llava.export.repository import find_problems
from modeling_llava.records.figures import build_environment
from modeling_llava.records.training_record import RunFiles
from tests.conftest import ROOT

PUBLISHED = read_published()
REFERENCE = ROOT.parent / "shared" / "reference" / "original-llava.md"
TEMPLATES = sorted(Path(hub_cards.__file__).parent.glob("*.jinja"))


def describe(name: str) -> ModelDescription:
    facts = PUBLISHED[name]
    return ModelDescription(
        repo_id=f"someone/{name}",
        layout="transformers",
        facts=facts,
        run=RunFiles(stages=[], results=[], plot=None, emissions=None),
        base_models=facts.base_model,
        data=facts.data_entries,
        prompt="USER: <image>",
        features={},
    )


def test_every_family_has_a_card():
    for name in ("llava-13b-v0-science_qa", "llava-v1.5-7b", "llava-v1.6-34b", "llava-med-v1.5-mistral-7b"):
        assert name in PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_card_passes_the_offline_check(name, tmp_path):
    (tmp_path / "README.md").write_text(write_model_card(describe(name)))
    (tmp_path / "TRAINING_DATA_SUMMARY.md").write_text(write_data_summary(describe(name)))
    problems = [problem for problem in find_problems(tmp_path, "model") if not problem.endswith("json is missing")]
    assert not [
        problem for problem in problems if not problem.endswith((".safetensors is missing", ".jinja is missing"))
    ]


@pytest.fixture
def reference() -> str:
    """What the original authors published."""
    if not REFERENCE.is_file():
        pytest.skip("needs ../shared/reference/original-llava.md, which is not on this machine")
    return REFERENCE.read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_figure_stands_in_the_reference(name, reference):
    section = reference.split("## 7. Headline results")[1].split("\n## ")[0]
    found = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", section)}
    for figures in PUBLISHED[name].published_figures:
        assert {float(value) for value in figures.values.values()} <= found


def test_figures_of_the_models_without_a_row(reference):
    """Which benchmark has which figure, as the sentences of the reference say."""
    expected = {
        "llava-13b-v0-science_qa": (
            "LLaVA NAT 90.36 SOC 95.95 LAN 88.00 TXT 89.49 IMG 88.00 NO 90.66 G1-6 90.93 G7-12 90.90 **AVG 90.92**",
            {"NAT": 90.36, "SOC": 95.95, "LAN": 88.0, "TXT": 89.49, "IMG": 88.0, "NO": 90.66, "G1-6": 90.93}
            | {"G7-12": 90.9, "": 90.92, "with GPT-4 judge": 92.53},
        ),
        "llava-lcs558k-scienceqa-vicuna-13b-v1.3": ("(v1.3, LCS-558K) 91.09", {"": 91.09}),
        "llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3": (
            "64.3/55.9/81.7/70.1 (beam 5: 73.5)",
            {"conversation": 64.3, "detail": 55.9, "complex": 81.7, "": 70.1, "with five beams": 73.5},
        ),
        "llava-med-7b-delta": (
            "61.52/84.19, 83.08/85.34, 37.95/91.21",
            {"VQA-RAD open": 61.52, "VQA-RAD closed": 84.19, "SLAKE open": 83.08, "SLAKE closed": 85.34}
            | {"PathVQA open": 37.95, "PathVQA closed": 91.21},
        ),
    }
    for name, (sentence, figures) in expected.items():
        assert sentence in reference, name
        published = {}
        for part in PUBLISHED[name].published_figures:
            published |= part.values
        benchmark = re.compile(r"^(?:ScienceQA|LLaVA-Bench-Wild) ?")
        assert {benchmark.sub("", key): value for key, value in published.items()} == figures, name


def test_every_card_says_how_it_was_trained():
    for name, facts in PUBLISHED.items():
        assert facts.training, name


COLUMNS = {
    "VQAv2": ["VQAv2"],
    "GQA": ["GQA"],
    "VizWiz": ["VizWiz"],
    "SQA-I": ["ScienceQA (pictures)"],
    "TextVQA": ["TextVQA"],
    "POPE": ["POPE"],
    "MME": ["MME", "MME perception", "MME cognition"],
    "MMB": ["MMBench"],
    "MMB-CN": ["MMBench-CN"],
    "SEED": ["SEED-Bench", "SEED-Bench (pictures)"],
    "LLaVA-W": ["LLaVA-Bench-Wild"],
    "MM-Vet": ["MM-Vet"],
}
"""What the columns of the reference's table are called in the cards."""


def test_figures_of_one_model_are_those_of_its_row(reference):
    rows = {
        "llava-v1.5-7b": "1.5-7B",
        "llava-v1.5-13b": "1.5-13B",
        "llava-v1.5-7b-lora": "1.5-7B-lora",
        "llava-v1.5-13b-lora": "1.5-13B-lora",
        "llava-v1.6-vicuna-7b": "1.6-vicuna-7B",
        "llava-v1.6-vicuna-13b": "1.6-vicuna-13B",
        "llava-v1.6-mistral-7b": "1.6-mistral-7B",
        "llava-v1.6-34b": "1.6-34B",
    }
    (header,) = re.findall(r"^\| model \| VQAv2 \|.*$", reference, flags=re.MULTILINE)
    columns = [column.strip() for column in header.strip("|").split("|")][1:]
    assert columns == list(COLUMNS)
    for name, row in rows.items():
        (line,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", reference, flags=re.MULTILINE)
        (figures,) = PUBLISHED[name].published_figures
        for column, cell in zip(columns, line.split("|")):
            expected = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]
            found = [figures.values[benchmark] for benchmark in COLUMNS[column] if benchmark in figures.values]
            assert found == expected, (name, column)


def test_figures_stand_at_an_address_that_does_not_change():
    for name, facts in PUBLISHED.items():
        for figures in facts.published_figures:
            assert re.search(r"/blob/[0-9a-f]{7,40}/", figures.source), name


def test_a_note_on_figures_ends_as_a_sentence_does():
    text = write_model_card(describe("llava-med-7b-delta"))
    assert "accuracy on closed ones. Read by eye from a picture:\n\n| benchmark |" in text


def test_licences_that_do_not_fit_are_named():
    assert any(
        "LLaVA-Med instructions is under cc-by-nc-4.0" in line
        for line in describe("llava-med-v1.5-mistral-7b").conflicts
    )
    assert any("ScienceQA is under cc-by-nc-sa-4.0" in line for line in describe("llava-13b-v0-science_qa").conflicts)
    assert not any("vicuna-7b-v1.5" in line for line in describe("llava-v1.5-7b").conflicts)


def test_the_summary_of_training_data_follows_the_template():
    summary = write_data_summary(describe("llava-v1.5-7b"))
    headings = re.findall(r"^#{2,3} (.*)$", summary, flags=re.MULTILINE)
    assert headings == [
        "1. General information",
        "1.1 Provider",
        "1.2 Model",
        "1.3 Modalities, size, and other characteristics",
        "2. List of data sources",
        "Publicly available datasets",
        "Data licensed from rights holders",
        "Other private datasets of third parties",
        "Data crawled from the web",
        "Data of users",
        "Data made by models or programs",
        "Other data",
        "3. Data processing",
        "3.1 Reservations of rights for text and data mining",
        "3.2 Removal of unlawful content",
        "3.3 Licences that do not fit",
    ]
    assert "Personal data: conversations of people with ChatGPT, which can name anybody" in summary


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_are_whole(path):
    build_environment().get_template(path.name)
