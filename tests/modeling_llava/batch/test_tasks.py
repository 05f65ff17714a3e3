"""What becomes of answers: alternative texts and tags meet their conditions, whatever a model wrote."""

import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llava.batch.tasks import (
    MOST_ALT_CHARACTERS,
    MOST_TAG_CHARACTERS,
    MOST_TAGS,
    TASKS,
    Order,
    finish_alt_text,
    finish_caption,
    finish_tags,
)

ARTICLES = ("A ", "The ", "This ", "An ", "a ", "")
KINDS = ("", "close-up ", "black and white ", "high-quality ", "colorful ")
MEDIA = ("image", "picture", "photo", "photograph")
STARTS = ("This is", "Here is")
VERBS = ("of", "shows", "showing", "depicts", "features", "is of", "contains", "captures", "is showing")
OPENINGS = [
    *(f"{article}{kind}{medium} {verb} " for article, kind, medium, verb in product(ARTICLES, KINDS, MEDIA, VERBS)),
    *(
        f"{start} the {medium}, {seen} "
        for start, medium, seen in product(("In", "On"), MEDIA, ("we see", "there is"))
    ),
    *(f"{start} {article} {medium} of " for start, article, medium in product(STARTS, ("a", "the"), MEDIA)),
    *("Alt text: ", "Image: ", "Caption: ", "**Alternative text:** ", '"An image of ', "A striking image of "),
    *("The picture shows an image of ", "An image of a picture of "),
]
WORDS = st.lists(
    st.sampled_from(
        ("a", "dog", "image", "of", "picture", "with", "the", "photo", "shows", "of.", "blue", "An", "\n", "x" * 30)
    )
    | st.text(max_size=6),
    max_size=60,
).map(" ".join)


def test_openings_that_say_it_is_a_picture_go():
    for opening in OPENINGS:
        assert finish_alt_text(f"{opening}two dogs on a red sofa.") == "Two dogs on a red sofa.", opening


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The image of a saint hangs on a wall.", "A saint hangs on a wall."),
        ("A man with an image of a dog.", "A man with a picture of a dog."),
        ("A man holding a picture of a dog.", "A man holding a picture of a dog."),
        ("A photographer with a camera.", "A photographer with a camera."),
        ("Picture frames on a wall.", "Picture frames on a wall."),
        ("A guitar", "A guitar"),
        ('"A sign that says "stop""', 'A sign that says "stop"'),
        ('The photo shows a sign that says "stop"', 'A sign that says "stop"'),
        ("It's raining.", "It's raining."),
        ("word " * 60, "Word" + " word" * 24),
        (
            f"{'A dog runs over the grass. ' * 2}{'word ' * 60}",
            "A dog runs over the grass. A dog runs over the grass.",
        ),
        ("y" * 300, "Y" + "y" * 124),
    ],
)
def test_alt_texts_are_short_and_whole(text, expected):
    assert finish_alt_text(text) == expected


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["", *OPENINGS]), WORDS)
def test_every_alt_text_meets_its_condition(opening, words):
    try:
        text = finish_alt_text(opening + words)
    except ValueError as error:
        assert "expected text" in str(error)
        return
    assert 0 < len(text) <= MOST_ALT_CHARACTERS
    assert "\n" not in text and text == text.strip()
    assert not re.search(r"\bimages? of\b", text, flags=re.IGNORECASE)
    assert not re.match(r"(an?|the|this) (picture|photo|photograph) (of|shows) ", text, flags=re.IGNORECASE)
    assert text[0] == text[0].upper() or len(text[0].upper()) > 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dog, cat,  Dog, red   sofa.", ["dog", "cat", "red sofa"]),
        ("1. Dog\n2. Cat\n- sofa\n* lamp", ["dog", "cat", "sofa", "lamp"]),
        ("Tags: #beach, #sea, and sand", ["beach", "sea", "sand"]),
        (", ".join(f"tag {number}" for number in range(30)), [f"tag {number}" for number in range(10)]),
    ],
)
def test_tags_are_a_list(text, expected):
    assert finish_tags(text) == expected


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=st.sampled_from("aB1 ,;.\n-#*'\"") | st.characters(), max_size=200))
def test_every_list_of_tags_meets_its_condition(text):
    try:
        tags = finish_tags(text)
    except ValueError as error:
        assert "expected tags" in str(error)
        return
    assert 0 < len(tags) <= MOST_TAGS and len(set(tags)) == len(tags)
    assert all(0 < len(tag) <= MOST_TAG_CHARACTERS and tag == tag.lower().strip() for tag in tags)


@pytest.mark.parametrize(
    ("finish", "texts"),
    [(finish_caption, ["", " \n"]), (finish_tags, ["", "...", "-"]), (finish_alt_text, ["", "...", "An image of"])],
)
def test_answers_of_nothing_are_errors(finish, texts):
    for text in texts:
        with pytest.raises(ValueError, match="expected"):
            finish(text)


def test_an_order_has_one_form():
    with pytest.raises(ValueError, match="got the task 'story'; expected one of caption, alt-text, tags"):
        Order(model="m", task="story")
    with pytest.raises(ValueError, match="a task and a schema"):
        Order(model="m", task="tags", schema={})
    with pytest.raises(ValueError, match="a question twice"):
        Order(model="m", questions=("a", "a"))
    assert Order(model="m").asked == (None,)
    assert Order(model="m", task="tags").asked == (TASKS["tags"].question,)
    assert Order(model="m", task="tags", questions=("Name it.",)).asked == ("Name it.",)
