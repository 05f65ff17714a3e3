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
    assert found == []


def describe(violation: dict) -> str:
    nodes = [node["html"][:200] for node in violation["nodes"]]
    return f"{violation['id']} ({violation['impact']}): {nodes}"
