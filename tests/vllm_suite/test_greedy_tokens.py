"""vLLM answers with the same greedy tokens. Opt-in, since vLLM wants an environment of its own: `make test-vllm`."""

from pathlib import Path

import pytest

from modeling_llava.cli import main
from modeling_llava.inference import EMBEDDED_MODEL

from .conftest import answer_here, run_vllm, write_messages
from .layouts import LAYOUTS, save_layout

OURS = {"tokenizer_mode": "any_llava"}
REQUESTS = [
    *({"messages": write_messages("What is this?", number)} for number in range(4)),
    {"messages": write_messages("How do they differ?", 1, 2)},
    {"messages": write_messages("Say hello.")},
]
EXPORTED = "exported in transformers' layout"
NAMES = ["embedded model", *LAYOUTS, EXPORTED]


def export(folder: Path, out: Path, layout: str) -> None:
    facts = ["--license", "mit", "--base-model", "someone/vicuna", "--layout", layout]
    assert main(["export", str(folder), "--out", str(out), *facts]) == 0


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Folders by name, and what vLLM says of each. One of them is as it lies on the Hub, with its code."""
    folder = tmp_path_factory.mktemp("greedy")
    folders = {"embedded model": Path(EMBEDDED_MODEL)}
    for name in LAYOUTS:
        folders[name] = folder / name.replace(" ", "_")
        save_layout(name, folders[name])
    export(folders["dinov2 qwen3"], folder / "with_code", "any_llava")
    folders["dinov2 qwen3"] = folder / "with_code"
    export(folders["clip llama spatial_unpad"], folder / "theirs", "transformers")
    folders[EXPORTED] = folder / "theirs"
    jobs = [
        {
            "name": name,
            "model": str(path),
            "requests": REQUESTS,
            "settings": OURS,
        }
        for name, path in folders.items()
    ]
    # vLLM's own renderer begins a chat with BOS only if the template writes it, or somebody asks for it.
    jobs[-1] |= {"settings": {}, "options": {"tokenization_kwargs": {"add_special_tokens": True}}}
    return folders, run_vllm(jobs, folder)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_ids_and_greedy_tokens(name, answers):
    folders, results = answers
    expected = answer_here(folders[name], REQUESTS)
    for found in results[name]:
        assert [answer["tokens"] for answer in found] == [answer["tokens"] for answer in expected]
        assert [answer["ids"] for answer in found] == [answer["ids"] for answer in expected]
    assert len({tuple(answer["tokens"]) for answer in expected}) > 2
