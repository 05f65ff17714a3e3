"""A data manifest says what no program can find out, and says it completely."""

import pytest
import yaml

from modeling_llava.export.card_facts import CardFacts, read_facts
from modeling_llava.export.data_manifest import NOT_STATED, read_manifest

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
        ([SQUARES | {"size": 3}], "unexpected keyword argument 'size'"),
        ([SQUARES | {"rows": "many"}], "rows"),
        ([{"kind": "public"}], "name"),
        (["imagenet"], "got data 'imagenet' in .*; expected fields, or one of lcs_558k"),
        ([3], "got 3 in .*; expected the fields of a DataEntry"),
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
        ({"licence": "mit"}, "unexpected keyword argument 'licence'"),
        ({"language": "en"}, "language"),
    ],
)
def test_wrong_facts(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_facts(write(tmp_path, content))


def test_a_note_on_published_figures_holds_none():
    facts = CardFacts(figures=[{"source": "https://example.org", "note": "POPE is 85.9", "values": {}}])
    with pytest.raises(ValueError, match="got the figure '85.9' in the note of published figures"):
        facts.published_figures


def test_published_figures_need_an_address():
    facts = CardFacts(figures=[{"source": "a talk", "values": {"POPE": 85.9}}])
    with pytest.raises(ValueError, match="got source='a talk' of published figures; expected the address"):
        facts.published_figures
