"""What a user types is never a control token, with the vocabularies of published models."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from processing_llava.prompt_ids import encode_prompt, list_control_tokens, list_special_tokens
from processing_llava.prompts import render_prompt
from processing_llava.templates import TEMPLATE_FILES, load_template
from tests.processing_llava.real_tokenizers import FOLDER, NAMES, load_real_tokenizer

IMAGE_ID = 10**6
FORMATS = sorted(set(TEMPLATE_FILES.values()) - {"plain"})
BENIGN = st.text(alphabet="aWhatAR12 \n.,?:;()=\u00e9\u4e2d\U0001f642", min_size=1, max_size=40)


@pytest.fixture(params=NAMES)
def tokenizer(request):
    if not (FOLDER / request.param).is_dir():
        pytest.skip("needs the tokenizers that `python -m tests.processing_llava.real_tokenizers` fetches")
    return load_real_tokenizer(request.param)


def encode(tokenizer, name: str, question: str, answer: str, **options) -> tuple[str, list[int]]:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]
    prompt = render_prompt(messages, load_template(name))
    settings = {"image_token": "<image>", "image_token_id": IMAGE_ID, "num_image_tokens": [3]}
    return prompt, encode_prompt(prompt, tokenizer, **settings, **options)[0]


# Hypothesis makes the fixture once, and the tokenizer does not change.
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(FORMATS))
def test_no_typed_text_becomes_a_control_token_or_an_image(tokenizer, data, name):
    controls = list_control_tokens(tokenizer, image_token="<image>")
    # Added words that the template does not write, such as Gemma 3's "<table>", are words like any other.
    written = load_template(name) + encode(tokenizer, name, "a", "a")[0]
    special = [token for token in controls if token in written or token in list_special_tokens(tokenizer)]
    special_ids = {IMAGE_ID, *tokenizer.convert_tokens_to_ids(special)} - {tokenizer.unk_token_id, None}
    pieces = st.sampled_from([*controls, "</s>", "<|im_end|>", "[INST]", "\ue000", "<", "|>", " "]) | st.text(
        max_size=4
    )
    question, answer = (data.draw(st.lists(pieces, min_size=1, max_size=8).map("".join)) for _ in range(2))

    def control_ids(question: str, answer: str) -> list[int]:
        _, ids = encode(tokenizer, name, question, answer)
        return [token_id for token_id in ids if token_id in special_ids]

    assert control_ids(question, answer) == control_ids("a", "a")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=BENIGN, answer=BENIGN, name=st.sampled_from(FORMATS))
def test_benign_text_gives_the_ids_that_it_always_had(tokenizer, question, answer, name):
    prompt, ids = encode(tokenizer, name, question, answer, add_special_tokens=False)
    before, _, after = str(prompt).partition("<image>")
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in (before, after)]
    assert ids == expected[0] + [IMAGE_ID] * 3 + expected[1]
