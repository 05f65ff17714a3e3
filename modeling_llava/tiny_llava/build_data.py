"""Build the pictures and conversations that train and measure the tiny LLaVA, from packages that are free to use.

    python -m modeling_llava.tiny_llava.build_data --out DIR [--cache DIR] [--clothing DIR] [--seed 0]

Writes images/, train.json, heldout.json, tokenizer/ and sources.json. Pictures are augmented here, once, so that
training only decodes them. Drawings of twemoji and the official test splits go to heldout.json and nowhere else;
noto-v1 and emojione-v1 are not fetched at all, which leaves them for a judge.
"""

import argparse
import io
import json
import random
import zipfile
from pathlib import Path

from PIL import Image, ImageEnhance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .concepts import CLOTHING_CLASSES
from .drawings import HELDOUT_ARTISTS, SIZE, TRAIN_ARTISTS, Artist, encode_jpeg
from .heldout import make_row, write_clothing_rows, write_concept_rows, write_new_rows, write_unsure_rows
from .packages import fetch_npm, fetch_wheel
from .questions import TEXT_TURNS, ask_category, ask_choice, ask_name, ask_presence
from .scenes import NAMES, Row, SceneWriter, render_turns

SINGLES_PER_CONCEPT = 130
NUM_PAIRS, NUM_COUNTS, NUM_UNSURE, NUM_TWO_IMAGES = 5000, 2500, 1800, 300
EASY_VQA_VARIANTS, EASY_VQA_TURNS = 3, 6
CLOTHING_VARIANTS = 3
VOCABULARY = 1536
# Those of the conversation format phi_3: one id each, and nothing that a user can type.
CONTROL_TOKENS = ["<|end|>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
BACKGROUND_PHOTOS = ("grass.png", "gravel.png", "brick.png", "hubble_deep_field.jpg", "moon.png")
UNSURE_PHOTOS = ("retina.jpg", "ihc.png", "cell.png", "page.png", "phantom.png", "text.png", "microaneurysms.png")
# fmt: off
LICENCES = {
    "noto": "Apache-2.0", "openmoji": "CC-BY-SA-4.0", "fluent-emoji-flat": "MIT", "fluent-emoji": "MIT",
    "emojione": "CC-BY-4.0", "fxemoji": "Apache-2.0", "streamline-emojis": "CC-BY-4.0", "twemoji": "CC-BY-4.0",
}
# fmt: on


def read_photos(wheel: zipfile.ZipFile, names: tuple[str, ...]) -> list[Image.Image]:
    """Return photographs of scikit-image at 224 px."""
    images = [Image.open(io.BytesIO(wheel.read(f"skimage/data/{name}"))).convert("RGB") for name in names]
    return [image.resize((224, 224), Image.Resampling.LANCZOS) for image in images]


def write_easy_vqa(wheel: zipfile.ZipFile, split: str, out: Path, rng: random.Random) -> list[Row]:
    """Return Easy-VQA rows: turned variants with several questions for training, one question a row for the test."""
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, index in json.loads(wheel.read(f"easy_vqa/data/{split}/questions.json")):
        questions.setdefault(index, []).append((question, answer))
    rows = []
    for index, turns in questions.items():
        data = wheel.read(f"easy_vqa/data/{split}/images/{index}.png")
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for variant in range(EASY_VQA_VARIANTS if split == "train" else 1):
            path = f"images/easy-vqa-{split}-{index}-{variant}.jpg"
            turned = image if variant == 0 else image.transpose(rng.choice(list(Image.Transpose)))
            (out / path).write_bytes(encode_jpeg(turned))
            row_id = path.removeprefix("images/").removesuffix(".jpg")
            if split == "train":
                chosen = rng.sample(turns, min(EASY_VQA_TURNS, len(turns)))
                rows.append({"id": row_id, "image": path, "conversations": render_turns(chosen)})
            else:
                rows += [make_row(f"{row_id}-{number}", path, "easy_vqa", turn) for number, turn in enumerate(turns)]
    return rows


def pad_photo(photo: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Return the photo whole, centred on a square of the tower's size."""
    photo = photo.copy()
    photo.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE), color)
    square.paste(photo, ((SIZE - photo.width) // 2, (SIZE - photo.height) // 2))
    return square


def vary_photo(photo: Image.Image, rng: random.Random) -> Image.Image:
    """Return the photo padded, stretched or cropped to a square, mirrored and lit at random."""
    if rng.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    photo = photo.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=(123, 117, 104))
    width, height = (int(length * rng.uniform(0.8, 1.0)) for length in photo.size)
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    photo = photo.crop((left, top, left + width, top + height))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        photo = enhance(photo).enhance(rng.uniform(0.7, 1.3))
    if rng.random() < 0.5:
        return photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return pad_photo(photo, rng.choice(((123, 117, 104), (255, 255, 255), (0, 0, 0))))


def list_clothing(folder: Path, split: str) -> list[tuple[str, Path]]:
    """Return the name and the path of every photograph of a split, in a fixed order."""
    paths = [(name, path) for label, name in CLOTHING_CLASSES.items() for path in (folder / split / label).iterdir()]
    if not paths:
        raise ValueError(f"got no photographs in {folder / split}; expected class folders; check --clothing")
    return sorted(paths, key=lambda pair: str(pair[1]))


def write_clothing(folder: Path, out: Path, rng: random.Random) -> list[Row]:
    """Return training rows of the clothing photographs."""
    names = sorted(set(CLOTHING_CLASSES.values()))
    rows = []
    for number, (name, path) in enumerate(list_clothing(folder, "train")):
        photo = Image.open(path).convert("RGB")
        for variant in range(CLOTHING_VARIANTS):
            row_id = f"clothing-{number}-{variant}"
            (out / f"images/{row_id}.jpg").write_bytes(encode_jpeg(vary_photo(photo, rng)))
            others = [other for other in names if other != name]
            turns = [ask_choice(name, rng.sample(others, 3), rng), ask_presence(name, "yes", rng)]
            turns += [ask_presence(rng.choice(others + NAMES), "no", rng), ask_category("piece of clothing", rng)]
            turns = [ask_name(name, rng), *rng.sample(turns, rng.randint(1, 2))]
            rng.shuffle(turns)
            rows.append({"id": row_id, "image": f"images/{row_id}.jpg", "conversations": render_turns(turns)})
    return rows


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


def select_captions(rows: list[Row]) -> list[Row]:
    """Return the rows of one picture cut to the first turn that only the picture answers: no yes, no, or choice.

    A language model with random weights learns to look from these; yes and no are guessed right half of the time.
    """
    captions = []
    for row in rows:
        turns = list(zip(row["conversations"][::2], row["conversations"][1::2]))
        answered_by_picture = [
            (question, answer)
            for question, answer in turns
            if answer["value"] not in ("yes", "no") and " or " not in question["value"]
        ]
        if isinstance(row.get("image"), str) and answered_by_picture:
            question, answer = answered_by_picture[0]
            text = question["value"].removeprefix("<image>").strip()
            conversation = [{"from": "human", "value": f"<image>\n{text}"}, answer]
            captions.append({"id": row["id"], "image": row["image"], "conversations": conversation})
    return captions


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
    artists = TRAIN_ARTISTS | HELDOUT_ARTISTS
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
            "images": len(BACKGROUND_PHOTOS + UNSURE_PHOTOS),
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
    artists = [Artist(name, version, cache) for name, version in TRAIN_ARTISTS.items()]
    writer = SceneWriter(artists, read_photos(scikit, BACKGROUND_PHOTOS), out, rng)
    train = [writer.write_single(name, index) for name in NAMES for index in range(SINGLES_PER_CONCEPT)]
    train += [writer.write_pair(index) for index in range(NUM_PAIRS)]
    train += [writer.write_count(index) for index in range(NUM_COUNTS)]
    train += [writer.write_unsure(index) for index in range(NUM_UNSURE)]
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
    heldout += write_unsure_rows(heldout_artist, read_photos(scikit, UNSURE_PHOTOS), out, heldout_rng)
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

    rng.shuffle(train)
    (out / "train.json").write_text(json.dumps(train, indent=0))
    (out / "captions.json").write_text(json.dumps(select_captions(train), indent=0))
    (out / "heldout.json").write_text(json.dumps(heldout, indent=0))
    sources = describe_sources(train + heldout, has_clothing=arguments.clothing is not None)
    (out / "sources.json").write_text(json.dumps(sources, indent=2))
    write_tokenizer(train, read_english(cache), out)
    print(f"{len(train)} training rows and {len(heldout)} held-out rows in {out}")


if __name__ == "__main__":
    main()
