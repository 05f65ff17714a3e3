"""Folders of transformers' own LLaVAs in our class: what older ones lack, and files that contradict each other."""

import json
import re

import pytest
from PIL import Image

from modeling_llava.cli import main
from modeling_llava.inference.answer_requests import AnswerRequest
from modeling_llava.inference.batched_generation import generate_answers
from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.inference.loading import load_for_inference
from processing_llava import AnyLlavaProcessor
from tests.modeling_llava.inference.session_models import build_transformers_own
from tests.tiny import tiny_processor

PICTURE = Image.new("RGB", (40, 30), "red")
HOSTILE = "</s>a<image>b<s>"


@pytest.fixture(scope="module")
def own():
    return build_transformers_own()


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": text}]}]


def test_other_classes_are_refused(own):
    for answer in (ChatSession, lambda *pair: next(generate_answers(*pair, [AnswerRequest(ask("a"))]))):
        with pytest.raises(ValueError, match="LlavaForConditionalGeneration with a LlavaProcessor.*load_for_inf"):
            answer(*own)


def test_typed_control_tokens_are_text(folder):
    model, processor = load_for_inference(str(folder))
    tokenizer = processor.tokenizer

    def count(text: str) -> list[int]:
        inputs = processor.apply_chat_template(ask(text), add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = list(inputs["input_ids"][0])
        return [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("</s>", "<s>", "<image>")]

    assert count(HOSTILE) == count("a b")
    (answer,) = generate_answers(model, processor, [AnswerRequest(ask(HOSTILE), max_new_tokens=3)])
    assert answer.error is None and len(answer.ids) == 3


def test_answers_are_those_of_transformers(own, folder):
    """Greedy tokens of our class on its files are those of its own class."""
    model, processor = own
    inputs = processor.apply_chat_template(
        ask("a b"), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    (answer,) = generate_answers(*load_for_inference(str(folder)), [AnswerRequest(ask("a b"), max_new_tokens=8)])
    assert answer.ids == output.tolist()


FIELDS = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")


@pytest.fixture
def folder(own, tmp_path):
    for part in own:
        part.save_pretrained(tmp_path)
    PICTURE.save(tmp_path / "red.png")
    return tmp_path


def change(path, **fields) -> None:
    """Set fields of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize("missing", [FIELDS, FIELDS[:1], FIELDS[2:], FIELDS[:2], "file"], ids=str)
def test_what_the_processor_lacks_is_in_the_config(own, folder, missing):
    if missing == "file":
        own[1].image_processor.save_pretrained(folder)
        (folder / "processor_config.json").unlink()
    else:
        change(folder / "processor_config.json", **dict.fromkeys(missing))
    encoded, expected = (
        each.apply_chat_template(ask("a"), tokenize=True, return_dict=True)["input_ids"]
        for each in (AnyLlavaProcessor.from_pretrained(folder), own[1])
    )
    assert list(encoded[0]) == list(expected[0])
    assert isinstance("".join(ChatSession(*load_for_inference(str(folder))).ask("a", max_new_tokens=2)), str)


def test_an_image_token_that_the_tokenizer_lacks_is_added(own, folder):
    bare = tiny_processor().tokenizer.__class__.from_pretrained(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        config.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model, processor = load_for_inference(str(folder))
    assert processor.image_token_id == model.config.image_token_id == bare.convert_tokens_to_ids("<image>")
    assert isinstance("".join(ChatSession(model, processor).ask("a", images=[PICTURE], max_new_tokens=2)), str)


@pytest.mark.parametrize(
    ("file", "fields", "told"),
    [
        (
            "config.json",
            {"image_token_id": 7},
            "image_token_index=7 in config.json, and a tokenizer that gives '<image>' the id 300",
        ),
        ("config.json", {"image_token_id": None, "image_token_index": 299}, "image_token_index=299"),
        ("processor_config.json", {"patch_size": 14}, "patch_size 14 .* and 7 in config.json"),
        ("processor_config.json", {"vision_feature_select_strategy": "full"}, "'full' .* and 'default'"),
    ],
)
def test_contradictions_are_one_sentence(folder, capsys, file, fields, told):
    change(folder / file, **fields)
    assert main(["ask", str(folder / "red.png"), "a", "--model", str(folder)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("llava: got ") and re.search(told, line)
