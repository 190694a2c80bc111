"""Greedy tokens and their log-probabilities by vLLM; run by the Python that has vLLM.

    python tests/vllm/offline.py JOBS.json ANSWERS.jsonl

JOBS is a list of {"name", "model", "adapters", "prompts", "max_tokens", "max_model_len"}; a line of
ANSWERS has the name and, for the base ("") and each adapter, [ids, log-probabilities] of each
prompt, or the error. `VLLM_ENABLE_V1_MULTIPROCESSING=0` keeps an engine in this process.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """Returns {adapter or "": rows, or the error in words}."""
    greedy = SamplingParams(
        temperature=0.0,
        max_tokens=job["max_tokens"],
        logprobs=1,
        ignore_eos=True,
        detokenize=False,
    )
    engine = LLM(
        job["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        generation_config="vllm",
        max_model_len=job["max_model_len"],
        **({"enable_lora": True, "max_lora_rank": 64} if job["adapters"] else {}),
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    found: dict[str, Any] = {}
    for number, adapter in enumerate(["", *job["adapters"]]):
        request = LoRARequest(f"adapter-{number}", number, adapter) if adapter else None
        try:
            outputs = engine.generate(prompts, greedy, lora_request=request, use_tqdm=False)
        except Exception as error:
            found[adapter] = f"{type(error).__name__}: {error}"
            continue
        rows = [output.outputs[0] for output in outputs]
        found[adapter] = [
            [
                list(row.token_ids),
                [one[i].logprob for i, one in zip(row.token_ids, row.logprobs, strict=True)],
            ]
            for row in rows
        ]
    del engine
    return found


def main(jobs: str, out: str) -> None:
    """Answers each job, in a file that can be read while it grows."""
    with open(jobs) as file, open(out, "w") as written:
        for job in json.load(file):
            try:
                found = answers(job)
            except Exception as error:
                found = {"": f"{type(error).__name__}: {error}"}
            written.write(json.dumps({"name": job["name"], "found": found}) + "\n")
            written.flush()
            gc.collect()
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
