"""The card of the embedded model is written from its measured scores, and passes the offline check."""

import json
from pathlib import Path

from modeling_llava.export.repository import find_problems
from modeling_llava.inference.loading import EMBEDDED_MODEL
from modeling_llava.tiny_llava.write_card import HELDOUT_SOURCE, write_card
from tests.tiny import save_tiny_checkpoint

SOURCES = [
    {"source": "drawings", "version": "1.2.9", "registry": "npm", "licence": "MIT", "images": 5811},
    {"source": HELDOUT_SOURCE, "version": "1.0.0", "registry": "npm", "licence": "MIT", "images": 9},
]


def test_the_card_of_the_embedded_model(tmp_path):
    (tmp_path / "sources.json").write_text(json.dumps(SOURCES))
    scores = Path(EMBEDDED_MODEL) / "heldout_scores.json"
    save_tiny_checkpoint(tmp_path / "model")
    record = {"hardware": {"device": "AMD EPYC", "threads": 1}}
    (tmp_path / "model" / "training_record.json").write_text(json.dumps(record))
    write_card(tmp_path / "model", scores=scores, sources=tmp_path / "sources.json", minutes=88)
    card = (tmp_path / "model" / "README.md").read_text()
    name = json.loads(scores.read_text())["name"]
    assert f"| `name` | the exact name of a thing in a drawing of Twemoji | {name['total']} | " in card
    assert f"| {name['accuracy']:.1%} |" in card
    assert "| drawings 1.2.9 | npm | MIT | 5,811 |" in card
    assert HELDOUT_SOURCE not in card
    assert "took 88 minutes on two cores of an AMD EPYC" in card
    assert not list(find_problems(tmp_path / "model", "model"))
