"""vLLM's side of the suite: engines one after the other, as a file of jobs says. vLLM's Python runs it, not pytest."""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

ENGINE = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "limit_mm_per_prompt": {"image": 2}}
SAMPLING = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}


def ask(engine: LLM, requests: list[dict], **options) -> list[dict]:
    """Ids and greedy tokens of conversations, which are answered together."""
    adapters = sorted({request["lora"] for request in requests if "lora" in request})
    outputs = engine.chat(
        [request["messages"] for request in requests],
        [SamplingParams(**SAMPLING | request.get("sampling", {})) for request in requests],
        use_tqdm=False,
        **options,
        lora_request=[
            LoRARequest(request["lora"], adapters.index(request["lora"]) + 1, request["lora"])
            if "lora" in request
            else None
            for request in requests
        ],
    )
    return [{"ids": list(output.prompt_token_ids), "tokens": list(output.outputs[0].token_ids)} for output in outputs]


if __name__ == "__main__":
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), {}
    for job in jobs:
        engine = LLM(model=job["model"], **ENGINE | job["settings"])
        # The second round is answered from the caches of prefixes and images.
        results[job["name"]] = [ask(engine, job["requests"], **job.get("options", {})) for _ in range(2)]
        Path(sys.argv[2]).write_text(json.dumps(results))
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
