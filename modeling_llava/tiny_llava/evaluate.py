"""Ask a model the held-out questions and count exact answers.

    python -m modeling_llava.tiny_llava.evaluate QUESTIONS.json --model DIR [--out SCORES.json]

QUESTIONS.json is `heldout.json` of build_data, or `tests/heldout/questions.json`; image paths start beside it. Each
question is asked alone, answered greedily, and right if the answer is the expected one but for case and a full stop.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_llava.inference.loading import EMBEDDED_MODEL, load_for_inference
from processing_llava import AnyLlavaProcessor
from processing_llava.data.conversations import convert_record

BATCH_SIZE = 32
MAX_NEW_TOKENS = 24


def evaluate(model: PreTrainedModel, processor: AnyLlavaProcessor, questions: Path, *, limit: int | None = None):
    """Ask every question.

    Args:
        questions: JSON list of LLaVA records with `task` and `answer`.
        limit: At most so many questions of each task, sampled with a fixed seed.

    Returns:
        `{task: {"correct": ..., "total": ..., "accuracy": ...}}` and the records with `prediction` added.
    """
    records = _pick(json.loads(questions.read_text()), limit)
    for start in range(0, len(records), BATCH_SIZE):
        batch = records[start : start + BATCH_SIZE]
        for record, prediction in zip(batch, _answer(model, processor, batch, questions.parent)):
            record["prediction"] = prediction
    scores = defaultdict(lambda: {"correct": 0, "total": 0})
    for record in records:
        scores[record["task"]]["total"] += 1
        scores[record["task"]]["correct"] += normalise(record["prediction"]) == normalise(record["answer"])
    for score in scores.values():
        score["accuracy"] = score["correct"] / score["total"]
    return dict(scores), records


def normalise(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def _pick(records: list[dict], limit: int | None) -> list[dict]:
    if limit is None:
        return records
    random.Random(0).shuffle(records)
    kept, counts = [], defaultdict(int)
    for record in records:
        counts[record["task"]] += 1
        if counts[record["task"]] <= limit:
            kept.append(record)
    return kept


@torch.no_grad()
def _answer(
    model: PreTrainedModel, processor: AnyLlavaProcessor, records: list[dict], image_folder: Path
) -> list[str]:
    rows = [convert_record(record, index, image_folder=image_folder) for index, record in enumerate(records)]
    inputs = processor(
        text=[processor.render(row["messages"][:-1], add_generation_prompt=True) for row in rows],
        images=[row["images"] for row in rows],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--out", type=Path, help="JSON file for the scores")
    parser.add_argument("--predictions", type=Path, help="JSON file for the questions with their predictions")
    parser.add_argument("--limit", type=int, help="at most so many questions of each task")
    arguments = parser.parse_args()
    scores, records = evaluate(*load_for_inference(arguments.model), arguments.questions, limit=arguments.limit)
    for task, score in sorted(scores.items()):
        print(f"{task:24} {score['accuracy']:6.1%}  {score['correct']} of {score['total']}")
    if arguments.out:
        arguments.out.write_text(json.dumps(scores, indent=1) + "\n")
    if arguments.predictions:
        arguments.predictions.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
