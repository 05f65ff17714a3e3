"""Write the embedded model's card from its measured scores and the sources of its data.

python -m modeling_llava.tiny_llava.write_card --model DIR --scores SCORES.json --sources SOURCES.json --minutes N
"""

import argparse
import json
import shutil
from pathlib import Path

import jinja2

import hub_cards

from .questions import CATEGORY_OF

ASKED = {
    "easy_vqa": "official test split of Easy-VQA: shapes and colours, three quarters yes or no",
    "name": "the exact name of a thing in a drawing of Twemoji",
    "choice": "the right one of four names for a drawing of Twemoji",
    "presence": "yes or no: is it in the drawing of Twemoji?",
    "category": "what kind of thing is in a drawing of Twemoji",
    "color": "the colour of the thing or of the ground in a drawing of Twemoji",
    "side": "which of two drawings of Twemoji is on the left or right",
    "count": "how many copies of a drawing of Twemoji there are, one to five",
    "clothing": "the exact name of a piece of clothing in an official test photograph",
    "new_concept_category": "the kind of a thing in a drawing of Twemoji whose name was never trained",
    "unknown": 'answers "I am not sure what this is." to a picture far from its training',
}
HELDOUT_SOURCE = "@iconify-json/twemoji"


def write_card(model: Path, *, scores: Path, sources: Path, minutes: int) -> None:
    """Render the card into the model folder, and put the scores beside it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(hub_cards.__file__).parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    trained_on = [source for source in json.loads(sources.read_text()) if source["source"] != HELDOUT_SOURCE]
    card = environment.get_template("tiny_llava.md.jinja").render(
        scores=json.loads(scores.read_text()),
        asked=ASKED,
        sources=trained_on,
        minutes=minutes,
        num_names=len(CATEGORY_OF),
    )
    (model / "README.md").write_text(card)
    shutil.copy(scores, model / "heldout_scores.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--minutes", type=int, required=True, help="how long data, tower and training took")
    arguments = parser.parse_args()
    write_card(arguments.model, scores=arguments.scores, sources=arguments.sources, minutes=arguments.minutes)


if __name__ == "__main__":
    main()
