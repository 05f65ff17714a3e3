"""Answers of the engine as OpenAI's API has them: whole, and as events of a stream.

What is surprising: whoever reads these checks them strictly, so that fields without a meaning here are there all the
same (openai 3.54, types/chat/chat_completion.py and types/responses/response.py).
"""

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_llava.inference.answer_requests import BatchedAnswer, TokenLogprobs

from .engine_thread import AnswerPart
from .openai_requests import Call


def describe_error(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def write_event(value: dict[str, Any] | str, *, name: str | None = None) -> str:
    """A server-sent event."""
    data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return (f"event: {name}\n" if name else "") + f"data: {data}\n\n"


class ChatWriter:
    """Writes what `/v1/chat/completions` answers to one call."""

    def __init__(self, call: Call, tokenizer: PreTrainedTokenizerBase) -> None:
        self.call = call
        self.tokenizer = tokenizer
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def write_whole(self, answers: list[BatchedAnswer]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._write_logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._write_head("chat.completion"), "choices": choices, "usage": _count_tokens(answers)}

    def begin(self) -> Iterator[str]:
        """Events before the first part."""
        for index in range(len(self.call.requests)):
            yield self._write_chunk(index, {"role": "assistant", "content": ""})

    def write_part(self, index: int, part: AnswerPart) -> Iterator[str]:
        """Events of a part of the answer with this index."""
        if part.text or part.logprobs:
            yield self._write_chunk(index, {"content": part.text}, logprobs=part.logprobs)
        if part.answer is not None:
            yield self._write_chunk(index, {}, finish_reason=part.answer.finish_reason)

    def finish(self, answers: list[BatchedAnswer]) -> Iterator[str]:
        """Events after the last part."""
        if self.call.include_usage:
            head = self._write_head("chat.completion.chunk")
            yield write_event({**head, "choices": [], "usage": _count_tokens(answers)})
        yield write_event("[DONE]")

    def fail(self, error: dict[str, Any]) -> Iterator[str]:
        """Events after an error, behind which nothing comes."""
        yield write_event(error)

    def _write_head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.call.model}

    def _write_chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: list[TokenLogprobs] = (),
        finish_reason: str | None = None,
    ) -> str:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._write_logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self.call.include_usage else {}
        return write_event({**self._write_head("chat.completion.chunk"), "choices": [choice], **usage})

    def _write_logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        content = [
            {
                **self._write_token(part.token, part.logprob),
                "top_logprobs": [self._write_token(token, logprob) for token, logprob in part.alternatives],
            }
            for part in logprobs
        ]
        return {"content": content, "refusal": None}

    def _write_token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        # JSON has no infinity, which tokens have that cannot be said.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


class ResponseWriter:
    """Writes what `/v1/responses` answers to one call."""

    def __init__(self, call: Call, tokenizer: PreTrainedTokenizerBase) -> None:
        self.call = call
        self.id = f"resp_{secrets.token_hex(12)}"
        self.message_id = f"msg_{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.num_events = 0
        self.text = ""

    def write_whole(self, answers: list[BatchedAnswer]) -> dict[str, Any]:
        (answer,) = answers
        status = "completed" if answer.finish_reason == "stop" else "incomplete"
        usage = _count_tokens(answers)
        return self._write_response(
            status,
            output=[self._write_message(answer.text, status)],
            usage={
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        )

    def begin(self) -> Iterator[str]:
        response = self._write_response("in_progress")
        yield self._write_event("response.created", response=response)
        yield self._write_event("response.in_progress", response=response)
        message = {**self._write_message("", "in_progress"), "content": []}
        yield self._write_event("response.output_item.added", output_index=0, item=message)
        yield self._write_text_event("response.content_part.added", part=_write_text(""))

    def write_part(self, index: int, part: AnswerPart) -> Iterator[str]:
        if part.text:
            self.text += part.text
            yield self._write_text_event("response.output_text.delta", delta=part.text, logprobs=[])

    def finish(self, answers: list[BatchedAnswer]) -> Iterator[str]:
        response = self.write_whole(answers)
        yield self._write_text_event("response.output_text.done", text=self.text, logprobs=[])
        yield self._write_text_event("response.content_part.done", part=_write_text(self.text))
        yield self._write_event("response.output_item.done", output_index=0, item=response["output"][0])
        yield self._write_event(f"response.{response['status']}", response=response)

    def fail(self, error: dict[str, Any]) -> Iterator[str]:
        told = {"code": "server_error", "message": error["error"]["message"]}
        yield self._write_event("response.failed", response=self._write_response("failed") | {"error": told})

    def _write_event(self, kind: str, **fields: Any) -> str:
        self.num_events += 1
        return write_event({"type": kind, "sequence_number": self.num_events - 1, **fields}, name=kind)

    def _write_text_event(self, kind: str, **fields: Any) -> str:
        return self._write_event(kind, item_id=self.message_id, output_index=0, content_index=0, **fields)

    def _write_message(self, text: str, status: str) -> dict[str, Any]:
        content = [_write_text(text)]
        return {"type": "message", "id": self.message_id, "status": status, "role": "assistant", "content": content}

    def _write_response(
        self, status: str, *, output: list[dict[str, Any]] = (), usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        request = self.call.requests[0]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.call.instructions,
            "max_output_tokens": request.max_new_tokens,
            "model": self.call.model,
            "output": list(output),
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": usage,
            "metadata": {},
        }


def _write_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _count_tokens(answers: list[BatchedAnswer]) -> dict[str, Any]:
    """What answers to one prompt took."""
    num_prompt_tokens, num_new_tokens = answers[0].num_prompt_tokens, sum(len(answer.ids) for answer in answers)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
        "prompt_tokens_details": {"cached_tokens": max(answer.num_reused_tokens for answer in answers)},
    }
