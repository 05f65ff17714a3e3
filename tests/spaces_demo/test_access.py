"""The page on a phone, with the keyboard, in light and dark, and for screen readers."""

import pytest

from tests.spaces_demo.conftest import EXAMPLES

pytestmark = pytest.mark.slow

PENGUIN = EXAMPLES / "twemoji-penguin.png"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def test_on_a_phone(visit):
    visitor = visit(**PHONE)
    visitor.shoot("phone-empty")
    visitor.page.locator("button.example").first.click()
    assert visitor.wait_for_answer(1) == "a penguin"
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    box = visitor.textbox.bounding_box()
    assert box["y"] + box["height"] <= 844, "the text box is below the fold"
    visitor.shoot("phone")
    visitor.choose("Compare with", "adapter")
    visitor.page.locator("#status b").get_by_text("adapter").wait_for()
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    visitor.shoot("phone-comparison")


def test_with_the_keyboard_alone(visit):
    visitor = visit()
    visitor.textbox.focus()
    for _ in range(20):
        visitor.page.keyboard.press("Shift+Tab")
        if visitor.page.evaluate("document.activeElement.matches('button.example')"):
            break
    focused = visitor.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert focused == "solid", "what has the focus is not to be seen"
    visitor.page.keyboard.press("Enter")
    visitor.wait_for_answer(1)


REACHED = """(selectors) => selectors.filter((selector) => document.activeElement.matches(selector))"""


def test_tab_reaches_what_can_be_done(visit):
    visitor = visit()
    visitor.ask("What is this?", PENGUIN)
    visitor.wait_for_answer(1)
    menus = ["[aria-label=Model]", "[aria-label='Compare with']"]
    assert find_unreached(visitor, ["#question .submit-button", "[aria-label=Edit]", *menus]) == set()
    visitor = visit()
    visitor.ask_for_an_endless_answer()
    assert find_unreached(visitor, ["#question .stop-button"]) == set()


def find_unreached(visitor, selectors: list[str]) -> set[str]:
    """Which of them the key never goes to."""
    left = set(selectors)
    for _ in range(60):
        visitor.page.keyboard.press("Tab")
        left -= set(visitor.page.evaluate(REACHED, list(left)))
        if not left:
            break
    return left


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_axe_finds_no_violations(visit, demo, theme, size):
    from axe_playwright_python.sync_playwright import Axe

    visitor = visit(f"{demo.url}?__theme={theme}", **(PHONE if size == "phone" else {}))
    assert visitor.page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    found = [describe(violation) for violation in Axe().run(visitor.page).response["violations"]]
    visitor.shoot(f"{theme}-{size}-empty")
    visitor.ask("What is this?", PENGUIN)
    visitor.wait_for_answer(1)
    visitor.page.get_by_role("button", name="Show for the last answer").click()
    visitor.page.locator("#view img").wait_for()
    visitor.open("Settings")
    visitor.page.wait_for_timeout(600)
    visitor.shoot(f"{theme}-{size}")
    found += [describe(violation) for violation in Axe().run(visitor.page).response["violations"]]
    visitor.choose("Compare with", "adapter")
    visitor.page.locator("#status b").get_by_text("adapter").wait_for()
    visitor.page.get_by_role("button", name="Edit").first.click()
    visitor.page.locator("textarea.edit-textarea").wait_for()
    visitor.textbox.press("Enter")
    visitor.page.get_by_test_id("toast-body").get_by_text("Type a question").wait_for()
    visitor.page.wait_for_timeout(600)
    visitor.shoot(f"{theme}-{size}-comparison-edit-toast")
    found += [describe(violation) for violation in Axe().run(visitor.page).response["violations"]]
    assert found == []


def describe(violation: dict) -> str:
    nodes = [node["html"][:200] for node in violation["nodes"]]
    return f"{violation['id']} ({violation['impact']}): {nodes}"
