"""Write the embedded model's card from its measured scores, the sources of its data and the record of its training.

python -m modeling_llava.tiny_llava.write_card --model DIR --scores SCORES.json --sources SOURCES.json --minutes N
"""

import argparse
import shutil
from pathlib import Path

from modeling_llava.records.figures import add_source, build_environment, read_sourced_json
from modeling_llava.records.training_record import RECORD_FILE

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
    """Render the card into the model folder, which holds the record, and put the scores beside it."""
    record = read_sourced_json(model / RECORD_FILE, root=model)
    described = read_sourced_json(sources, root=sources.parent)
    card = (
        build_environment()
        .get_template("tiny_llava.md.jinja")
        .render(
            scores=read_sourced_json(scores, root=scores.parent),
            asked=ASKED,
            sources=[source for source in described if source["source"] != HELDOUT_SOURCE],
            minutes=add_source(minutes, "make tiny-llava"),
            cpu=record["hardware"]["device"],
            num_names=add_source(len(CATEGORY_OF), "questions.py"),
        )
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
