"""The wording of every question and answer of the tiny LLaVA's data.

Questions vary, answers do not: an answer that is always worded the same can be scored by string comparison and learned
by a language model of a few million parameters. A turn is a (question, answer) pair.
"""

import random

from .concepts import CLOTHING_CLASSES, CONCEPTS, MASS_NAMES, PLURAL_NAMES

Turn = tuple[str, str]

UNSURE = "I am not sure what this is."
NUMBERS = ("zero", "one", "two", "three", "four", "five")
CATEGORY_OF = {name: category for category, names in CONCEPTS.items() for name in names}
CATEGORY_OF |= dict.fromkeys(CLOTHING_CLASSES.values(), "piece of clothing")
# fmt: off
EDIBLE = ("fruit", "vegetable", "food")
IRREGULAR_PLURALS = {
    "mouse": "mice", "fish": "fish", "sheep": "sheep", "person": "people", "leaf": "leaves", "tomato": "tomatoes",
}

NAME_QUESTIONS = (
    "What is this?", "What is in this picture?", "What is in the picture?", "What is in the image?",
    "What do you see?", "What does the picture show?", "What does this image show?", "What is shown here?",
    "Name the thing in the picture.", "What can you see in this image?", "Which thing is this?", "what is this",
    "Tell me what this is.", "What object is in the image?", "What's this?", "What am I looking at?",
    "Can you tell me what this is?", "Identify the object.", "What is it?", "What is the main thing in the photo?",
    "What's in this picture?", "What is shown in the image?", "What thing is shown?", "Name this.", "What is that?",
    "Name the object in this image.", "What do you see in the picture?", "What is depicted here?",
    "What does this drawing show?", "Which object do you see?", "Please name what you see.", "What's in the photo?",
)
DESCRIBE_QUESTIONS = (
    "Describe the image.", "Describe this picture.", "Please describe the picture.", "Describe the photo briefly.",
    "Describe what you see.", "Write a short caption.", "Give a caption for this image.",
    "Can you describe the image?", "Describe this image in one sentence.", "Caption this picture.",
)
PRESENCE_QUESTIONS = (
    "Is there {phrase}?", "Is there {phrase} in the picture?", "Is there {phrase} in the image?",
    "Do you see {phrase}?", "Does the picture show {phrase}?", "Can you see {phrase}?",
    "Does this image contain {phrase}?", "Is there {phrase} in this picture?", "Does the image show {phrase}?",
    "Is {phrase} shown here?", "Is {phrase} visible in the image?", "Do you see {phrase} in the picture?",
    "Is there {phrase} here?", "Does this picture have {phrase} in it?",
)
IDENTITY_QUESTIONS = (
    "Is this {phrase}?", "Is it {phrase}?", "Is that {phrase}?", "Is this a picture of {phrase}?",
    "Is the thing in the picture {phrase}?",
)
CHOICE_QUESTIONS = (
    "Is it {options}?", "What is this: {options}?", "Which one is it: {options}?", "Is this {options}?",
    "Does the picture show {options}?", "What do you see, {options}?", "Which of these is it: {options}?",
    "Which of these is in the picture: {options}?", "Is there {options} in the image?", "{options}?",
    "What is in the picture: {options}?", "Choose: {options}.", "Which is shown, {options}?",
    "Is the thing in the picture {options}?", "What is shown here? {options}?",
)
CATEGORY_QUESTIONS = (
    "What kind of thing is this?", "What kind of thing is it?", "What type of object is this?",
    "Which category does it belong to?", "What sort of thing is this?", "What category is this?",
    "What kind of object is in the picture?", "What type of thing is it?", "To which category does it belong?",
)
COLOR_QUESTIONS = (
    "What color is it?", "What colour is it?", "What is its color?", "What color is {the}?", "What colour is {the}?",
    "What is the color of {the}?", "Which color is {the}?", "What color does {the} have?", "Which colour is it?",
    "What is the main color of {the}?",
)
BACKGROUND_QUESTIONS = (
    "What color is the background?", "What colour is the background?", "What is the background color?",
    "What color is behind it?", "Which color does the background have?", "What is the color of the background?",
)
SHORT_HINTS = (" Answer with one word.", " Answer in a few words.", " Answer briefly.", " Be short.")
YES_NO_HINTS = (" Answer yes or no.", " Yes or no?", " Answer with yes or no.")
COUNT_QUESTIONS = (
    "How many {plural} are there?", "How many {plural} do you see?", "How many {plural} are in the picture?",
    "Count the {plural}.", "How many {plural} can you see in the image?",
)
# fmt: on


def add_article(name: str) -> str:
    """Return the name as an answer says it: "a dog", "an apple", "shoes"."""
    if name in PLURAL_NAMES or name in MASS_NAMES:
        return name
    return f"an {name}" if name[0] in "aeiou" and not name.startswith("un") or name == "umbrella" else f"a {name}"


def name_category(category: str) -> str:
    """Return a category as an answer says it: "an animal", "food"."""
    return category if category == "food" else add_article(category)


def pluralize(name: str) -> str:
    """Return the plural of a countable name."""
    if name in IRREGULAR_PLURALS or name in PLURAL_NAMES:
        return IRREGULAR_PLURALS.get(name, name)
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    return f"{name[:-1]}ies" if name.endswith("y") and name[-2] not in "aeiou" else f"{name}s"


def join_options(options: list[str], comma: str = "") -> str:
    """Return "a, b, c or d"; a comma may stand before the last."""
    return f"{', '.join(options[:-1])}{comma if len(options) > 2 else ''} or {options[-1]}"


def add_hint(question: str, hints: tuple[str, ...], rng: random.Random) -> str:
    """Return the question, now and then with how to answer it."""
    return question + rng.choice(hints) if rng.random() < 0.12 else question


def ask_name(name: str, rng: random.Random) -> Turn:
    """Return a question for what is shown."""
    return add_hint(rng.choice(NAME_QUESTIONS), SHORT_HINTS, rng), add_article(name)


def ask_description(names: list[str], background: str | None, rng: random.Random) -> Turn:
    """Return a request for a sentence about one or two things and, where it is plain, their background."""
    things = " and ".join(add_article(name) for name in names)
    place = f" on a {background} background" if background else ""
    return rng.choice(DESCRIBE_QUESTIONS), f"The picture shows {things}{place}."


def ask_presence(name: str, answer: str, rng: random.Random) -> Turn:
    """Return a yes/no question about a thing."""
    question = rng.choice(PRESENCE_QUESTIONS + IDENTITY_QUESTIONS).format(phrase=add_article(name))
    if name in PLURAL_NAMES:
        for singular, plural in (("Is there ", "Are there "), ("Is this ", "Are these "), ("Is it ", "Are they ")):
            question = question.replace(singular, plural)
    return add_hint(question, YES_NO_HINTS, rng), answer


def ask_choice(name: str, others: list[str], rng: random.Random) -> Turn:
    """Return a question that offers the right name among others."""
    article = add_article if rng.random() < 0.8 else str
    options = [article(option) for option in rng.sample([name, *others], len(others) + 1)]
    question = rng.choice(CHOICE_QUESTIONS).format(options=join_options(options, rng.choice(("", "", ","))))
    return add_hint(question[0].upper() + question[1:], SHORT_HINTS, rng), add_article(name)


def ask_category(category: str, rng: random.Random) -> Turn:
    """Return an open, an either-or or a yes/no question about the category."""
    kind = rng.choice((0, 0, 1, 2))
    shown = "food" if category in EDIBLE and rng.random() < 0.5 else category
    if kind == 0:
        return rng.choice(CATEGORY_QUESTIONS), name_category(category)
    related = EDIBLE if category in EDIBLE else (category, "thing")
    others = [other for other in CONCEPTS if other not in related and other != "thing"]
    other = rng.choice(others)
    if kind == 1:
        options = rng.sample([name_category(shown), name_category(other)], 2)
        return rng.choice(("Is it {}?", "Is this {}?")).format(join_options(options)), name_category(shown)
    asked, answer = rng.choice(((shown, "yes"), (other, "no")))
    return rng.choice(("Is it {}?", "Is this {}?")).format(name_category(asked)), answer


def ask_color(name: str, color: str, rng: random.Random) -> Turn:
    """Return a question for the colour of the thing."""
    return rng.choice(COLOR_QUESTIONS).format(the=f"the {name}"), color


def ask_background(color: str, rng: random.Random) -> Turn:
    """Return a question for the colour behind the thing."""
    return rng.choice(BACKGROUND_QUESTIONS), color


def ask_count(name: str, count: int, rng: random.Random) -> Turn:
    """Return a question for how many there are."""
    return rng.choice(COUNT_QUESTIONS).format(plural=pluralize(name)), NUMBERS[count]


def ask_side(left: str, right: str, rng: random.Random) -> Turn:
    """Return a question about which of two things is on which side."""
    side, name, other = rng.choice((("left", left, right), ("right", right, left)))
    if rng.random() < 0.5:
        question = rng.choice(("What is on the {}?", "What do you see on the {}?", "Which thing is on the {} side?"))
        return question.format(side), add_article(name)
    if rng.random() < 0.5:
        return f"Is the {name} on the left or on the right?", f"on the {side}"
    asked, answer = rng.choice(((side, "yes"), ({"left": "right", "right": "left"}[side], "no")))
    return f"Is the {name} to the {asked} of the {other}?", answer


TEXT_TURNS: tuple[Turn, ...] = (
    ("Hello!", "Hello! Show me a picture and ask me about it."),
    ("Hi", "Hello! Show me a picture and ask me about it."),
    ("Hi there!", "Hello! Show me a picture and ask me about it."),
    ("Good morning!", "Hello! Show me a picture and ask me about it."),
    ("Hey, how are you?", "I am fine, thank you. Show me a picture."),
    ("How are you?", "I am fine, thank you. Show me a picture."),
    ("Who are you?", "I am a tiny LLaVA, a small model that answers questions about simple pictures."),
    ("What are you?", "I am a tiny LLaVA, a small model that answers questions about simple pictures."),
    ("What is your name?", "I am a tiny LLaVA, a small model that answers questions about simple pictures."),
    ("What can you do?", "I can name simple things in pictures, count them and tell their color."),
    ("How can you help me?", "I can name simple things in pictures, count them and tell their color."),
    ("Help", "I can name simple things in pictures, count them and tell their color."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Bye!", "Goodbye!"),
    ("Goodbye", "Goodbye!"),
    ("What is this?", "I do not see a picture. Please show me one."),
    ("What is in the picture?", "I do not see a picture. Please show me one."),
    ("Describe the image.", "I do not see a picture. Please show me one."),
    ("What is the capital of France?", "I only know about simple pictures."),
    ("Write a poem.", "I only know about simple pictures."),
    ("Tell me a joke.", "I only know about simple pictures."),
    ("What is two plus two?", "I only know about simple pictures."),
    ("Who is the president?", "I only know about simple pictures."),
)
