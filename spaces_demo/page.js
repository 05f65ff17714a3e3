// What Gradio's page lacks: questions that are edited as they were typed, and names for what a screen reader meets.

function typed(markdown) {
  // The inverse of `show_as_text` in safety.py.
  return markdown.replace(/&#32;/g, " ").replace(/&#9;/g, "\t").replace(/\\([!-/:-@[-`{-~])/g, "$1");
}

const REPAIRS = {
  "textarea.edit-textarea:not([data-typed])": (box) => {
    box.dataset.typed = "";
    box.ariaLabel = "Edited question";
    box.value = typed(box.value);
    box.dispatchEvent(new Event("input"));
  },
  // A label says nothing on an element without a role, and Gradio's would be read with its backslashes.
  "[data-testid=user]:not([aria-label=Question])": (message) => {
    message.role = "group";
    message.ariaLabel = "Question";
  },
  "[data-testid=bot]:not([aria-label=Answer])": (message) => {
    message.role = "group";
    message.ariaLabel = "Answer";
  },
  "#chats .image-container button:not([aria-label])": (button) => {
    button.ariaLabel = "Picture";
  },
  // A button that folds a message, around the button that closes it.
  ".toast-header[role=button]": (header) => {
    header.removeAttribute("role");
    header.removeAttribute("tabindex");
  },
  // A list without list items.
  "#chats .examples[role=list]": (examples) => examples.removeAttribute("role"),
};

function repair() {
  for (const [selector, change] of Object.entries(REPAIRS)) {
    document.querySelectorAll(selector).forEach(change);
  }
}

new MutationObserver(repair).observe(document, {
  childList: true,
  subtree: true,
  attributes: true,
  attributeFilter: ["aria-label", "role"],
});
