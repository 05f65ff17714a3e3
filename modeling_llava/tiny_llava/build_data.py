"""Build the pictures and conversations that train and measure the tiny LLaVA, from packages that are free to use.

    python -m modeling_llava.tiny_llava.build_data --out DIR [--cache DIR] [--clothing DIR] [--seed 0]

Writes images/, descriptions.json, train.json, heldout.json, tokenizer/ and sources.json. Pictures are
augmented here, once, so that training only decodes them. Drawings of twemoji and the official test splits go to
heldout.json and nowhere else; noto-v1 and emojione-v1 are not fetched at all, which leaves them for a judge.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .drawings import HELDOUT_ARTISTS, ICON_ARTISTS, TRAIN_ARTISTS, Artist
from .heldout import (
    write_clothing_rows,
    write_concept_rows,
    write_new_rows,
    write_scene_rows,
    write_unsure_rows,
)
from .packages import fetch_npm, fetch_wheel
from .photos import list_clothing, pad_photo, read_photos, write_clothing, write_easy_vqa
from .questions import TEXT_TURNS
from .scenes import NAMES, Row, SceneWriter, render_turns, write_described

SINGLES_PER_CONCEPT = 240
DESCRIBED_PER_CONCEPT = 70
NUM_PAIRS, NUM_COUNTS, NUM_UNSURE, NUM_TWO_IMAGES = 5000, 4000, 7000, 500
VOCABULARY = 1536
# Those of the conversation format phi_3: one id each, and nothing that a user can type.
CONTROL_TOKENS = ["<|end|>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
BACKGROUND_PHOTOS = ("grass.png", "gravel.png", "brick.png", "hubble_deep_field.jpg", "moon.png")
UNSURE_PHOTOS = ("grass.png", "gravel.png", "brick.png", "hubble_deep_field.jpg", "coins.png", "color.png")
UNSURE_HELDOUT_PHOTOS = (
    "retina.jpg",
    "ihc.png",
    "cell.png",
    "page.png",
    "phantom.png",
    "text.png",
    "microaneurysms.png",
)
# fmt: off
LICENCES = {
    "noto": "Apache-2.0", "openmoji": "CC-BY-SA-4.0", "fluent-emoji-flat": "MIT", "fluent-emoji": "MIT",
    "emojione": "CC-BY-4.0", "fxemoji": "Apache-2.0", "streamline-emojis": "CC-BY-4.0", "twemoji": "CC-BY-4.0",
    "game-icons": "CC-BY-3.0", "icon-park": "Apache-2.0", "mdi": "Apache-2.0", "ph": "MIT", "fa7-solid": "CC-BY-4.0",
}
# fmt: on


def write_tokenizer(rows: list[Row], english: list[str], out: Path) -> None:
    """Train and save a byte-level BPE tokenizer, for which no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=CONTROL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    spoken = [message["value"] for row in rows for message in row["conversations"]]
    tokenizer.train_from_iterator(spoken + english * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<pad>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out / "tokenizer")


def read_english(cache: Path) -> list[str]:
    """Return sentences of package descriptions and emoji names, so that words outside the questions stay short."""
    files = fetch_npm("unicode-emoji-json", "0.9.0", cache)
    names = [entry["name"] for entry in json.loads(files["data-by-emoji.json"]).values()]
    with fetch_wheel("easy-vqa", "1.0", cache) as easy, fetch_wheel("scikit-image", "0.26.0", cache) as scikit:
        pages = [
            wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")))
            for wheel in (easy, scikit)
        ]
    return [*names, *(page.decode() for page in pages), files["README.md"].decode()]


def describe_sources(rows: list[Row], has_clothing: bool) -> list[dict[str, object]]:
    """Return every source with its version, its licence and how many pictures came of it."""
    paths = {row["image"] for row in rows if isinstance(row.get("image"), str)}
    artists = TRAIN_ARTISTS | ICON_ARTISTS | HELDOUT_ARTISTS
    sources = []
    for name, version in artists.items():
        prefix = "images/heldout-" if name in HELDOUT_ARTISTS else f"images/{name}-"
        taken = [path for path in paths if path.startswith(prefix) and "clothing" not in path]
        # "fluent-emoji-flat" starts with "fluent-emoji".
        taken = [path for path in taken if name != "fluent-emoji" or not path.startswith("images/fluent-emoji-flat-")]
        sources.append(
            {
                "source": f"@iconify-json/{name}",
                "registry": "npm",
                "version": version,
                "licence": LICENCES[name],
                "images": len(taken),
            }
        )
    easy = sum(path.startswith("images/easy-vqa-") for path in paths)
    sources.append({"source": "easy-vqa", "registry": "PyPI", "version": "1.0", "licence": "MIT", "images": easy})
    sources.append(
        {
            "source": "scikit-image",
            "registry": "PyPI",
            "version": "0.26.0",
            "licence": "public domain or CC0 photographs",
            "images": len(set(BACKGROUND_PHOTOS + UNSURE_PHOTOS + UNSURE_HELDOUT_PHOTOS)),
        }
    )
    sources.append(
        {"source": "unicode-emoji-json", "registry": "npm", "version": "0.9.0", "licence": "MIT", "images": 0}
    )
    if has_clothing:
        clothing = sum("clothing-" in path for path in paths)
        sources.append(
            {
                "source": "clothing-dataset-small",
                "registry": "GitHub",
                "version": "main",
                "licence": "CC0-1.0",
                "images": clothing,
            }
        )
    return sources


def main() -> None:
    """Build everything that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("tiny_llava_cache"))
    parser.add_argument("--clothing", type=Path, help="a checkout of clothing-dataset-small")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, cache, rng = arguments.out, arguments.cache, random.Random(arguments.seed)
    (out / "images").mkdir(parents=True, exist_ok=True)

    scikit = fetch_wheel("scikit-image", "0.26.0", cache)
    easy = fetch_wheel("easy-vqa", "1.0", cache)
    artists = [Artist(name, version, cache) for name, version in (TRAIN_ARTISTS | ICON_ARTISTS).items()]
    photos, unsure_photos = read_photos(scikit, BACKGROUND_PHOTOS), read_photos(scikit, UNSURE_PHOTOS)
    writer = SceneWriter(artists, photos, unsure_photos, out, rng)
    pictures = [writer.write_single(name, index) for name in NAMES for index in range(SINGLES_PER_CONCEPT)]
    pictures += [writer.write_pair(index) for index in range(NUM_PAIRS)]
    pictures += [writer.write_count(index) for index in range(NUM_COUNTS)]
    pictures += [writer.write_unsure(index) for index in range(NUM_UNSURE)]
    train = [row for rows in pictures for row in rows]
    train += [writer.write_two_images(index) for index in range(NUM_TWO_IMAGES)]
    train += [
        {"id": f"text-{index}-{turn}", "conversations": render_turns([TEXT_TURNS[turn]], num_images=0)}
        for index in range(10)
        for turn in range(len(TEXT_TURNS))
    ]
    train += write_easy_vqa(easy, "train", out, rng)

    # A generator of its own, so that a change of the measurement leaves the training rows as they are.
    heldout_rng = random.Random(arguments.seed + 1)
    heldout_artist = Artist(*next(iter(HELDOUT_ARTISTS.items())), cache)
    heldout = write_concept_rows(heldout_artist, out, heldout_rng) + write_new_rows(heldout_artist, out, heldout_rng)
    heldout += write_scene_rows(heldout_artist, out, heldout_rng)
    heldout += write_unsure_rows(heldout_artist, read_photos(scikit, UNSURE_HELDOUT_PHOTOS), out, heldout_rng)
    heldout += write_easy_vqa(easy, "test", out, heldout_rng)
    if arguments.clothing:
        train += write_clothing(arguments.clothing, out, rng)
        photos = [
            (name, pad_photo(Image.open(path).convert("RGB"), (123, 117, 104)))
            for name, path in list_clothing(arguments.clothing, "test")
        ]
        heldout += write_clothing_rows(photos, out, heldout_rng)
    else:
        print("No --clothing folder: the rows about clothing photographs are left out.")

    described = [
        row for name in NAMES for index in range(DESCRIBED_PER_CONCEPT) for row in write_described(name, index, rng)
    ]
    rng.shuffle(described)
    rng.shuffle(train)
    (out / "descriptions.json").write_text(json.dumps(described, indent=0))
    (out / "train.json").write_text(json.dumps(train, indent=0))
    (out / "heldout.json").write_text(json.dumps(heldout, indent=0))
    sources = describe_sources(train + heldout, has_clothing=arguments.clothing is not None)
    (out / "sources.json").write_text(json.dumps(sources, indent=2))
    write_tokenizer(train, read_english(cache), out)
    print(f"{len(train)} training rows and {len(heldout)} held-out rows in {out}")


if __name__ == "__main__":
    main()
