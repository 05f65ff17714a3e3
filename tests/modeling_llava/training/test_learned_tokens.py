"""Tokens that somebody adds to a model, from `add_tokens` to an answer that holds one."""

import json

import pytest
import torch
from transformers import AutoProcessor

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.cli import main
from modeling_llava.inference.answer_requests import AnswerRequest
from modeling_llava.inference.batched_generation import generate_answers
from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train
from tests.modeling_llava.training.conftest import write_recipe

TOKEN = "<loc_1>"
QUESTION = [{"role": "user", "content": "Where?"}]


@pytest.fixture(scope="module")
def grown(workspace):
    """A model with one more token, and rows whose answers hold it."""
    processor = AutoProcessor.from_pretrained(workspace / "start")
    model = AutoModelForVision2Seq.from_pretrained(workspace / "start")
    processor.tokenizer.add_tokens([TOKEN], special_tokens=True)
    model.resize_token_embeddings(len(processor.tokenizer))
    for part in (model, processor):
        part.save_pretrained(workspace / "grown")
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": TOKEN}]
    (workspace / "places.json").write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(4)]))
    return workspace


def train_grown(folder, **fields):
    trainer = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_steps": 30, "disable_tqdm": True}
    data = [{"path": str(folder / "places.json")}]
    return train(read_recipe(write_recipe(folder, model=str(folder / "grown"), data=data, trainer=trainer, **fields)))


def test_the_row_of_a_learned_token_trains_and_answers(grown, caplog):
    out = train_grown(grown, stage="finetune", learn_tokens=[TOKEN], output_dir=str(grown / "learned"))
    model, processor = AutoModelForVision2Seq.from_pretrained(out), AutoProcessor.from_pretrained(out)
    before = AutoModelForVision2Seq.from_pretrained(grown / "grown")
    token = processor.tokenizer.convert_tokens_to_ids(TOKEN)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        rows = [getattr(each, part)().weight[token] for each in (before, model)]
        assert not torch.equal(*rows)
    assert processor.learn_tokens == [TOKEN] and "spelled" not in caplog.text
    session = ChatSession(model, processor)
    assert "".join(session.ask("Where?", max_new_tokens=3)) == TOKEN
    # The answer is in the next prompt as it was given.
    list(session.ask("Where?", max_new_tokens=3))
    assert session.statistics.num_reused_tokens > 10
    (answer,) = generate_answers(model, processor, [AnswerRequest(QUESTION, max_new_tokens=3)])
    assert answer.text == TOKEN


def test_rows_with_tokens_that_are_not_learned_are_reported(grown, caplog, capsys):
    train_grown(grown, output_dir=str(grown / "spelled"))
    assert "4 rows of data: special tokens spelled in characters" in caplog.text
    capsys.readouterr()
    command = ["check-data", str(grown / "places.json"), "--model", str(grown / "grown"), "--workers", "1"]
    assert main(command) == 0 and f"{TOKEN} 4" in capsys.readouterr().out
    assert main([*command, "--learn-token", TOKEN]) == 0 and TOKEN not in capsys.readouterr().out
    assert main([*command, "--learn-token", "<loc_2>"]) == 2 and "no token of" in capsys.readouterr().err
