"""A data manifest says what no program can find out, and says it completely."""

import pytest
import yaml

from modeling_llava.export.export_settings import CardFacts, read_facts
from modeling_llava.records.training_record import NOT_STATED, read_manifest

SQUARES = {"name": "squares", "kind": "public"}


def write(folder, content) -> str:
    (folder / "manifest.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "manifest.yaml")


def test_what_nobody_said_is_not_stated(tmp_path):
    (entry,) = read_manifest(write(tmp_path, [SQUARES | {"rows": 12}]))
    assert (entry.license, entry.images, entry.personal_data, entry.contact) == (None, None, NOT_STATED, NOT_STATED)
    assert entry.rows == 12 and entry.rows.source == "manifest.yaml"


def test_datasets_of_published_models_are_known_by_name(tmp_path):
    entries = read_manifest(write(tmp_path, ["lcs_558k", SQUARES]))
    assert [entry.name for entry in entries] == ["LCS-558K (LLaVA-Pretrain)", "squares"]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"name": "squares"}, "expected a list of"),
        ([SQUARES | {"kind": "found"}], "got kind='found' for data squares; expected one of public, licensed"),
        ([SQUARES | {"license": "CC-BY"}], "got license='CC-BY' for data squares; expected an identifier"),
        ([SQUARES | {"kind": "synthetic"}], "got synthetic data squares without made_by"),
        ([SQUARES | {"kind": "crawled"}], "got crawled data squares without domains"),
        ([SQUARES | {"note": "94% are red"}], "got the figure '94%' in data squares; expected figures in files"),
        ([SQUARES | {"size": 3}], "got size in .*; expected fields of DataEntry, such as name, kind"),
        ([SQUARES | {"rows": "many"}], "got rows='many' in .*; expected int"),
        ([{"kind": "public"}], "without name; expected name, kind"),
        (["imagenet"], "got data 'imagenet' in .*; expected fields, or one of lcs_558k"),
        ([3], "got 3 as .*; expected a mapping"),
    ],
)
def test_wrong_entries(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_manifest(write(tmp_path, content))


def test_a_file_that_is_not_there_or_not_yaml(tmp_path):
    with pytest.raises(ValueError, match="there is none at this path"):
        read_manifest(tmp_path / "nowhere.yaml")
    (tmp_path / "wrong.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="which is not YAML"):
        read_manifest(tmp_path / "wrong.yaml")


def test_facts_of_a_card(tmp_path):
    path = write(tmp_path, {"title": "Squares", "license": "mit", "limits": ["Sees squares only."]})
    facts = read_facts(path)
    assert (facts.title, facts.license, facts.language) == ("Squares", "mit", ["en"])
    assert read_facts(None) == CardFacts()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"summary": "Right in 94% of cases."}, "got the figure '94%' in summary"),
        ({"limits": ["Wrong in 6% of cases."]}, "got the figure '6%' in limits"),
        ({"licence": "mit"}, "got licence in .*; expected fields of CardFacts, such as title"),
        ({"language": "en"}, "got language='en' in"),
    ],
)
def test_wrong_facts(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_facts(write(tmp_path, content))


def test_words_and_dates_of_a_card_are_text(tmp_path):
    """YAML 1.1 takes the code of Norwegian for false, and has a type for days."""
    (tmp_path / "facts.yaml").write_text("language: [en, no]\nreleased: 2024-01-01")
    facts = read_facts(str(tmp_path / "facts.yaml"))
    assert (facts.language, facts.released) == (["en", "no"], "2024-01-01")


def test_a_fact_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "facts.yaml").write_text("license: mit\ntitle: Squares\nlicense: apache-2.0")
    with pytest.raises(ValueError, match=r"facts.yaml, which is not YAML(.|\n)*got 'license' twice(.|\n)* line 3,"):
        read_facts(str(tmp_path / "facts.yaml"))


def test_a_note_on_published_figures_holds_none():
    facts = CardFacts(figures=[{"source": "https://example.org", "note": "POPE is 85.9", "values": {}}])
    with pytest.raises(ValueError, match="got the figure '85.9' in the note of published figures"):
        facts.published_figures


def test_published_figures_need_an_address():
    facts = CardFacts(figures=[{"source": "a talk", "values": {"POPE": 85.9}}])
    with pytest.raises(ValueError, match="got source='a talk' of published figures; expected the address"):
        facts.published_figures
