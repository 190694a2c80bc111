"""A small server of the completions protocol, as vLLM speaks it, that serves a tiny model.

Its answers and refusals are those of vLLM 0.32; `tests/vllm` asks that one the same.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jaxtune.checkpoints.peft_files import load_adapter, read_method
from jaxtune.core.tree import flatten, unflatten
from jaxtune.generate.sampler import sample
from jaxtune.peft.method import Method

# (number of the request, its answer) → what is sent: JSON, or (status, headers, text).
Spoil = Callable[[int, Any], Any]


class TinyServer:
    """What a server holds, and what it was asked.

    Attributes:
        config, params: the base.
        adapters: {name: (method, params)} that were loaded.
        asked: (path, headers, body) of each request.
        spoil: makes faults.
    """

    def __init__(self, config: Any, params: Any):
        self.config, self.params = config, params
        self.adapters: dict[str, Any] = {"base": (Method(), params)}
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.spoil: Spoil = lambda number, answer: answer
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        """Returns what a server without faults says."""
        name = body.get("lora_name", "")
        if path == "/v1/load_lora_adapter":
            if name in self.adapters:
                return refusal(400, f"The lora adapter '{name}' has already been loaded.")
            method = read_method(body["lora_path"], self.config)
            held = load_adapter(body["lora_path"], self.config, method)
            whole = unflatten(flatten(self.params) | held)
            self.adapters[name] = method, whole
            return 200, {}, f"Success: LoRA adapter '{name}' added successfully."
        if path == "/v1/unload_lora_adapter":
            if name not in self.adapters:
                return refusal(404, f"The lora adapter '{name}' cannot be found.")
            del self.adapters[name]
            return 200, {}, f"Success: LoRA adapter '{name}' removed successfully."
        if body["model"] not in self.adapters:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        if body["temperature"] == 0 and body["n"] > 1:
            return refusal(400, f"n must be 1 when using greedy sampling, got {body['n']}.")
        method, params = self.adapters[body["model"]]
        (found,) = sample(
            self.config,
            method,
            params,
            [body["prompt"]],
            body["n"],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            seed=body["seed"],
            eos_ids=body["stop_token_ids"],
            slots=4,
        )
        choices = [
            {
                "index": index,
                "text": "words",
                "logprobs": {
                    "text_offset": [0] * len(one.ids),
                    "token_logprobs": one.logprobs,
                    "tokens": [f"token_id:{i}" for i in one.ids],
                    "top_logprobs": [{f"token_id:{i}": -1.0} for i in one.ids],
                },
                "finish_reason": "stop" if one.finished else "length",
                "stop_reason": one.ids[-1] if one.finished else None,
                "token_ids": one.ids,
                "prompt_logprobs": None,
                "prompt_token_ids": body["prompt"],
            }
            for index, one in enumerate(found)
        ]
        return {"object": "text_completion", "choices": choices[::-1]}


def refusal(status: int, message: str) -> tuple[int, dict[str, str], str]:
    """Returns how vLLM says no."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return status, {}, json.dumps({"error": error})


@contextlib.contextmanager
def serving(held: TinyServer) -> Iterator[str]:
    """Yields the URL of a running server."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with held.lock:
                held.asked.append((self.path, dict(self.headers), body))
                number = len(held.asked)
                answer = held.spoil(number, held.answer(self.path, body))
            if not isinstance(answer, tuple):
                answer = 200, {}, json.dumps(answer)
            status, headers, text = answer
            if status == 0:  # says nothing for a while
                time.sleep(float(text))
                return
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
