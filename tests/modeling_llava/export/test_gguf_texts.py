"""Tokenizers and conversation formats in GGUF files, and in Ollama's Modelfile."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_llava.export.gguf_templates import adapt_template, translate_template
from processing_llava.prompts import render_prompt
from processing_llava.templates import TEMPLATE_FILES, load_template
from tests.modeling_llava.export.gguf_folders import export, gguf, read_exported, save
from tests.processing_llava.tokenizers_of_each_kind import load_sentencepiece
from tests.tiny import tiny_model, tiny_processor, tiny_tokenizer

pytestmark = pytest.mark.core


def test_pieces_of_sentencepiece_have_scores_and_kinds(tmp_path):
    processor = tiny_processor()
    processor.tokenizer = load_sentencepiece(legacy=False)
    model = tiny_model("llama", "siglip")
    model.resize_token_embeddings(32010)
    model.config.image_token_id = model._built_config.image_token_id = 32010
    model._built_config.text_config.vocab_size = 32010
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model") == 0
    (settings, _), _ = read_exported(tmp_path / "out")
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, settings["tokenizer.ggml.scores"]))
    kind_of = {token: gguf.TokenType(kind).name for token, kind in zip(tokens, kinds)}
    assert len(tokens) == len(kinds) == 32010 and tokens[32009] == "[PAD32009]"
    named = {"<unk>": "UNKNOWN", "<s>": "CONTROL", "<0x41>": "BYTE", "\u2581the": "NORMAL", "[PAD32009]": "UNUSED"}
    assert {token: kind_of[token] for token in named} == named
    assert scores["\u2581t"] > scores["\u2581the"] > scores["a"]
    assert settings["tokenizer.ggml.add_space_prefix"] is True and settings["tokenizer.ggml.add_bos_token"] is True


def save_with_tokenizer(folder, tokenizer):
    processor = tiny_processor()
    processor.tokenizer = tokenizer
    model = tiny_model("llama", "siglip")
    model.resize_token_embeddings(len(tokenizer))
    model._built_config.text_config.vocab_size = len(tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_of_pieces(*pieces):
    """A tokenizer of SentencePiece's kind, with these pieces and no merges."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *pieces]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def strip_behind_a_token():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], special_tokens=True)
    return tokenizer


def lower_letters():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def split_at_spaces():
    tokenizer = tiny_tokenizer()
    split = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
    words = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    return tokenizer


TOKENIZERS = {
    "model.vocab": lambda: build_of_pieces("</", "s>"),
    "model.merges": lambda: build_of_pieces("a", "b", "ab"),
    "rstrip": strip_behind_a_token,
    "normalizer": lower_letters,
    "pre_tokenizer": split_at_spaces,
}


@pytest.mark.parametrize("part", TOKENIZERS)
def test_a_tokenizer_of_other_ids_is_refused(part, tmp_path, capsys):
    save_with_tokenizer(tmp_path / "model", TOKENIZERS[part]())
    assert export(tmp_path / "model") == 2
    assert f"got a tokenizer with {part}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_ends_of_an_answer_than_gguf_has_are_refused(tmp_path, capsys):
    model = save(tmp_path / "model")
    for ends, code in (([2, 5, 6], 0), ([2, 5, 6, 7], 2)):
        model.generation_config.eos_token_id = ends
        model.generation_config.save_pretrained(tmp_path / "model")
        assert export(tmp_path / "model") == code
        if not code:
            (settings, _), _ = read_exported(tmp_path / "out")
            assert [settings[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == ends
            (tmp_path / "out").rename(tmp_path / "first")
    assert "got eos_token_id=[2, 5, 6, 7]" in capsys.readouterr().err


FORMATS = sorted(set(TEMPLATE_FILES.values()) - {"plain"})
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a<__media_x>__>b"}]}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("image", ["<image>", "<im_start><image><im_end>"])
def test_the_template_writes_a_text_with_marks_as_it_writes_pictures(name, image):
    """What llama.cpp gives it: one text, with marks where pictures are and no line breaks."""
    template = load_template(name, image=image)
    adapted = adapt_template(template)
    assert adapted != template
    mark, picture = "<__media_A1__>", {"type": "image"}
    for number, (items, text) in enumerate(
        [
            ([picture, "What?"], f"{mark}What?"),
            ([picture, picture, "What?"], f"{mark}{mark}What?"),
            (["See", picture, "there__>"], f"See{mark}there__>"),
            ([picture], mark),
            (["Hi"], "Hi"),
        ]
    ):
        content = [item if item is picture else {"type": "text", "text": item} for item in items]
        settings = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
        expected = render_prompt([{"role": "user", "content": content}], template, **settings)
        found = render_jinja(adapted, text)
        assert found.replace(mark, "<image>") == str(expected), number


def render_jinja(template: str, text: str) -> str:
    conversation = [{"role": "user", "content": text}]
    rendered, _ = render_jinja_template(
        [conversation], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    return rendered[0]


@pytest.mark.parametrize("name", FORMATS)
def test_ollama_writes_conversations_as_the_format_does(name):
    processor = tiny_processor(template=name)
    found = translate_template(processor)
    if name in ("llama_2", "llava_llama_2", "mistral_instruct"):
        assert found is None  # the system text stands inside of the first question
        return
    template, system, _ = found
    turns = [("One?", "1."), ("Two?", "2."), ("Three?", None)]
    for with_system in (None, "Be brief."):
        if with_system and "{{ .System }}" not in template:
            continue
        text = "".join(
            write_ollama_turn(template, with_system or system, *turn, is_first=not i) for i, turn in enumerate(turns)
        )
        messages = [{"role": "system", "content": with_system}] if with_system else []
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        expected = processor.render(messages, add_generation_prompt=True)
        # Answers begin with the space that the model writes.
        assert text == str(expected)


def write_ollama_turn(template: str, system: str, question: str, answer: str | None, *, is_first: bool) -> str:
    """What Ollama makes of a template: a system text in the first turn alone, and no end of the last answer."""
    start, end = "{{ if .System }}", "{{ end }}"
    if start in template:
        before, rest = template.split(start)
        inside, rest = rest.split(end)
        template = before + (inside.replace("{{ .System }}", system) if is_first and system else "") + rest
    before, after = template.replace("{{ .Prompt }}", question).split("{{ .Response }}")
    if answer is None:
        return before
    space = " " if before.endswith(":") else ""
    return f"{before}{space}{answer}{after}"
