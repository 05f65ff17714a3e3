"""The page: what lies where, and which handler each event calls. Run as a script, it is a Hugging Face Space."""

import inspect
import json
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

from spaces_demo import telemetry  # noqa: F401

# isort: split
import gradio as gr

from processing_llava.image_processing_llava import IMAGE_ASPECT_RATIOS
from processing_llava.templates import TEMPLATE_FILES
from spaces_demo.attention_view import LAYERS
from spaces_demo.conversation import Conversation
from spaces_demo.feedback import OPTIONS, FeedbackFile
from spaces_demo.handlers import Handlers
from spaces_demo.models import AS_TRAINED, DemoMenu
from spaces_demo.routes import build_middleware
from spaces_demo.safety import MAX_CHARACTERS, MAX_PICTURE_BYTES, MAX_SYSTEM_CHARACTERS, PrivatePage
from spaces_demo.theme import build_theme

try:
    import spaces

    on_gpu = spaces.GPU
except ModuleNotFoundError:

    def on_gpu(function):
        return function


FOLDER = Path(__file__).parent
EXAMPLES = FOLDER / "examples"
NO_HISTORY = {"run_history": False} if "run_history" in inspect.signature(gr.Blocks.launch).parameters else {}
"""Gradio 6.20 keeps no history of calls, and has no word for that."""
NUM_CARDS = 6
HOUR = 3600
HEADER = """
<header id="masthead">
  <svg viewBox="0 0 32 32" aria-hidden="true"><path d="M3 27 12 10h8l9 17Z"/><path class="lava" d="M12 10h8l1.6 3-2.1
  3.4-2-2.2-2.2 5.6-2.3-4.6-2.4 1.6Z"/><circle class="lava" cx="16" cy="5" r="2"/></svg>
  <h1>AnyLLaVA</h1>
  <p>Talk to a LLaVA about pictures, and see what it looks at.</p>
</header>
"""
PRIVACY = (
    "Pictures lose their metadata on arrival and are deleted after an hour. Nothing you write or show is logged, and "
    "this page asks no other host for anything."
)
STORED = " If you rate an answer, your question, the answer and your rating are stored."


def build_page(menu: DemoMenu, *, feedback: FeedbackFile | None = None) -> PrivatePage:
    """The page, ready for `launch`."""
    examples = json.loads((EXAMPLES / "examples.json").read_text())
    examples = [example | {"image": str(EXAMPLES / example["image"])} for example in examples[:NUM_CARDS]]
    handlers = Handlers(menu, examples=examples, feedback=feedback, on_gpu=on_gpu)
    first = menu.labels[0]

    with PrivatePage(
        title="AnyLLaVA", analytics_enabled=False, delete_cache=(HOUR // 6, HOUR), fill_height=True, fill_width=True
    ) as page:
        conversation = gr.State(Conversation(), time_to_live=HOUR)
        current = gr.State((first, ""))
        looked = gr.State(None, time_to_live=HOUR)
        gr.HTML(HEADER)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=7, elem_id="talk"):
                with gr.Row(elem_id="chats"):
                    left = _build_chat(first, examples=examples, editable="user")
                    # Or they would be deleted after an hour, like any other file (Gradio 6.31, route_utils.py).
                    left.keep_in_cache |= {file["path"] for card in left.examples for file in card["files"]}
                    right = _build_chat("", visible=False)
                textbox = gr.MultimodalTextbox(
                    elem_id="question",
                    show_label=False,
                    label="Question",
                    placeholder="Ask about a picture",
                    file_types=["image"],
                    file_count="multiple",
                    max_plain_text_length=MAX_CHARACTERS,
                    autofocus=True,
                )
                with gr.Accordion("Camera", open=False, elem_id="camera"):
                    camera = gr.Image(
                        sources=["webcam"], type="filepath", show_label=False, label="Camera", height=280
                    )
            with gr.Column(scale=3, min_width=300, elem_id="side"):
                with gr.Column(elem_id="models"):
                    left_menu = gr.Dropdown(menu.labels, value=first, label="Model", interactive=True)
                    right_menu = gr.Dropdown(
                        [("no other model", ""), *menu.labels], value="", label="Compare with", interactive=True
                    )
                    status = gr.HTML(elem_id="status", padding=True)
                with gr.Accordion("What it looks at", open=True, elem_id="look"):
                    gr.Markdown("Where the attention was while the model wrote a word.")
                    side = gr.Radio(["left", "right"], value="left", label="Answer", visible=False)
                    look = gr.Button("Show for the last answer", variant="secondary")
                    words = gr.Radio([], label="Word", visible=False, elem_id="words")
                    view = gr.HTML(elem_id="view")
                    layers = gr.Dropdown(list(LAYERS), value="all", label="Layers", visible=False)
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    settings = _build_settings()
                gr.Markdown(PRIVACY + (STORED if feedback else ""), elem_id="privacy")

        turn = [conversation, left, right, textbox]
        begun = [
            textbox.submit(handlers.ask, [textbox, conversation], turn, **QUEUED | PUBLIC),
            left.example_select(handlers.ask_example, conversation, turn, **QUEUED),
            left.retry(handlers.retry, conversation, turn, **QUEUED),
            left.edit(handlers.edit, conversation, turn, **QUEUED),
        ]
        inputs = [conversation, left_menu, right_menu, *settings]
        answers = [
            event.success(handlers.answer, inputs, [conversation, left, right], **ON_MODEL | visibility)
            for event, visibility in zip(begun, (PUBLIC, {}, {}, {}))
        ]
        for event in answers:
            event.then(handlers.finish, conversation, turn, **AT_ONCE)
        textbox.stop(None, cancels=answers, api_visibility="private")
        left.undo(handlers.undo, conversation, turn, **QUEUED)
        camera.change(handlers.take_picture, [camera, textbox], [camera, textbox], **AT_ONCE)

        gr.on(
            [page.load, left_menu.select, right_menu.select],
            handlers.choose_models,
            [left_menu, right_menu, current],
            [left_menu, right_menu, current, status, left, right],
            **ON_MODEL | {"show_progress": "full", "show_progress_on": status},
        ).then(lambda right: gr.update(visible=bool(right)), right_menu, side, **AT_ONCE)

        seen = [looked, words, layers]
        look.click(handlers.look, [conversation, side], [looked, words, layers], **ON_MODEL).success(
            handlers.show_word, seen, view, **QUEUED
        )
        gr.on([words.input, layers.input], handlers.show_word, seen, view, **QUEUED)
        emptied = [*turn, looked, words, layers, view]
        cleared = gr.on([left.clear, right.clear], handlers.forget, None, emptied, cancels=answers, **AT_ONCE)
        # An answer that is cancelled calls `finish` at the same time, which may show it once more.
        cleared.then(handlers.forget_again, conversation, emptied, **AT_ONCE)
        if feedback is not None:
            for column, chat in enumerate((left, right)):
                chat.like(handlers.rate, [conversation, gr.State(column)], None, **QUEUED)
    return page


AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""For handlers that must run even when the queue is full."""
QUEUED = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""For handlers that have something to tell: only queued events show messages (Gradio 6.31, helpers.py)."""
ON_MODEL = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal", "api_visibility": "private"}
"""For handlers that need a model: one at a time, the others wait."""
PUBLIC = {"api_visibility": "public"}
"""For programs, with gradio_client: `ask` puts a question, `answer` gives the conversation with its answer."""


def _build_chat(label: str, *, examples: list[dict[str, str]] | None = None, **choices) -> gr.Chatbot:
    cards = [{"text": example["question"], "files": [example["image"]]} for example in examples or []]
    return gr.Chatbot(
        label=label,
        show_label=False,
        height="100%",
        layout="bubble",
        buttons=["copy"],
        allow_file_downloads=False,
        # In one bubble, a question with a picture cannot be edited: Gradio 6.31 edits the picture's text.
        group_consecutive_messages=False,
        # Neither formulas nor tags: what a visitor types is shown as typed.
        latex_delimiters=[],
        allow_tags=False,
        feedback_options=OPTIONS,
        placeholder="## Show it a picture\nPaste, drop or choose one below, or try one of these." if cards else None,
        examples=cards or None,
        **choices,
    )


def _build_settings() -> list[gr.components.Component]:
    """In the order of `Handlers.answer`."""
    return [
        gr.Dropdown([AS_TRAINED, *TEMPLATE_FILES], value=AS_TRAINED, label="Conversation format"),
        gr.Dropdown([AS_TRAINED, *IMAGE_ASPECT_RATIOS], value=AS_TRAINED, label="Tile mode"),
        gr.Textbox("", label="System text", placeholder="as trained", max_length=MAX_SYSTEM_CHARACTERS),
        gr.Slider(0, 2, value=0, step=0.1, label="Temperature", info="0 answers greedily"),
        gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p"),
        gr.Slider(1, 1024, value=256, step=1, label="Longest answer in tokens"),
        gr.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed"),
    ]


def launch(
    menu: DemoMenu,
    *,
    feedback: FeedbackFile | None = None,
    queue: int = 32,
    port: int | None = None,
    share: bool = False,
    auth: list[tuple[str, str]] | None = None,
    allow_hosts: list[str] | None = None,
    open_browser: bool = False,
) -> None:
    """Serve the page until the process ends.

    Args:
        queue: How many questions may wait; others are told that the page is busy.
        port: The first free one from 7860 on by default.
        auth: Names and passwords; everybody may come in by default.
        allow_hosts: Names by which visitors reach the page, beside this machine's and the one of `share`.
    """
    # ZeroGPU takes what is loaded before the launch; elsewhere only the first model is certain to be wanted.
    for label in menu.labels if os.environ.get("SPACES_ZERO_GPU") else menu.labels[:1]:
        menu.load(label)
    # Gradio cleans up when it is interrupted (Gradio 6.31, blocks.py), so that is what terminating it does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Uploads lie where no other user of the machine can read them, and go when the process goes.
    with TemporaryDirectory(prefix="llava_demo_", dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(menu, feedback=feedback).queue(max_size=queue, default_concurrency_limit=1)
        page.launch(
            theme=build_theme(),
            css_paths=FOLDER / "style.css",
            head=f"<script>{(FOLDER / 'page.js').read_text()}</script>",
            app_kwargs={"middleware": build_middleware(page, Path(folder), allow_hosts=allow_hosts or [])},
            allowed_paths=[str(EXAMPLES)],
            max_file_size=MAX_PICTURE_BYTES,
            **NO_HISTORY,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            footer_links=[],
            server_port=port,
            share=share,
            auth=auth,
            inbrowser=open_browser,
        )


if __name__ == "__main__":
    launch(DemoMenu(os.environ.get("LLAVA_MODELS", "").split()))
