"""What is trained of conversations under published chat templates, seen in the written text.

    python -m tests.goldens.templates --write     # rewrites templates.json
    python -m tests.goldens.templates             # compares with it

transformers writes the text. What is trained is found here in the plainest way: everything after
an assistant's header, up to and including the first terminator, stands in ⟦ ⟧. The templates
themselves are read from ../shared and are no part of the project.
"""

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.data.conftest import write_tokenizer

FILE = Path(__file__).with_name("templates.json")
FOLDER = Path(__file__).resolve().parents[3] / "shared/data/tokenizers/chat_templates"

# Template: what stands before each of the assistant's turns, and what ends it.
TURNS = {
    "alpaca": ("### Response:\n", "</s>"),
    "chatml": ("<|im_start|>assistant\n", "<|im_end|>"),
    "gemma-it": ("<start_of_turn>model\n", "<end_of_turn>"),
    "llama-2-chat": ("[/INST]", "</s>"),
    "llama-3-instruct": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral-instruct": ("[/INST]", "</s>"),
    "phi-3": ("<|assistant|>\n", "<|end|>"),
    "qwen2.5-instruct": ("<|im_start|>assistant\n", "<|im_end|>"),
    "qwen3": ("<|im_start|>assistant\n", "<|im_end|>"),
    "vicuna": ("ASSISTANT:", "</s>"),
    "zephyr": ("<|assistant|>\n", "</s>"),
}


def _call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "moon", "arguments": arguments}}


def _turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TOOLS = [{"type": "function", "function": {"name": "moon", "parameters": {"type": "object"}}}]
TALKS: dict[str, list[dict[str, Any]]] = {
    "single": [_turn("user", "What is the capital?"), _turn("assistant", "Paris.")],
    "multi": [
        _turn("user", "Hello"),
        _turn("assistant", "Hello"),
        _turn("user", "Paris.\n\nWhat is it?"),
        _turn("assistant", "The moon:\n\n- of course.\n"),
        _turn("user", "Hello"),
        _turn("assistant", "Hello"),
    ],
    "system": [
        _turn("system", "You are a cat."),
        _turn("user", "Hello"),
        _turn("assistant", "Meow"),
        _turn("user", "Again"),
        _turn("assistant", "Meow meow"),
    ],
}
# For the templates that know tools; the second for those that know thoughts.
TOOL_TALKS: dict[str, list[dict[str, Any]]] = {
    "tools": [
        _turn("system", "You are a cat."),
        _turn("user", "Look at it"),
        _turn("assistant", "", tool_calls=[_call(day=3)]),
        _turn("tool", "bright"),
        _turn("assistant", "It shines."),
        _turn("user", "And now?"),
        _turn("assistant", "Wait.", tool_calls=[_call(day=4), _call(day=5)]),
        _turn("tool", "dark"),
        _turn("tool", "dark"),
        _turn("assistant", "It is gone."),
    ],
}
THOUGHTS: dict[str, list[dict[str, Any]]] = {
    "thoughts": [
        _turn("user", "Look at it"),
        _turn("assistant", "", reasoning_content="Ask.", tool_calls=[_call(day=3)]),
        _turn("tool", "bright"),
        _turn("assistant", "", reasoning_content="Ask again.", tool_calls=[_call(day=4)]),
        _turn("tool", "dark"),
        _turn("assistant", "It is gone.", reasoning_content="Say so."),
        _turn("user", "And now?"),
        _turn("assistant", "", reasoning_content="Once more.", tool_calls=[_call(day=5)]),
        _turn("tool", "dark"),
        _turn("assistant", "Still gone.", reasoning_content="Hm.\n\nSay so."),
    ],
    "inline thoughts": [
        _turn("user", "Hello"),
        _turn("assistant", "<think>\nGreet.\n</think>\n\nHi."),
        _turn("user", "Again"),
        _turn("assistant", "<think>\nGreet again.\n</think>\n\nHi hi."),
    ],
}


def talks_of(name: str) -> dict[str, list[dict[str, Any]]]:
    """The conversations that are written under a template."""
    more = {"qwen2.5-instruct": TOOL_TALKS, "qwen3": TOOL_TALKS | THOUGHTS}
    return TALKS | more.get(name, {})


def tools_of(case: str) -> list[dict[str, Any]] | None:
    """The tools offered in a conversation."""
    return TOOLS if case in ("tools", "thoughts") else None


def template_of(folder: Path, name: str) -> str:
    """The text of a published template."""
    if name == "qwen3":
        config = json.loads((folder / "qwen3_tokenizer_config.json").read_text())
        return config["chat_template"]
    text = (folder / f"{name}.jinja").read_text()
    # Published with line breaks for reading; a template's own text has none between tags.
    return text if "{%-" in text else text.replace("    ", "").replace("\n", "")


def mark(text: str, name: str) -> str:
    """Puts ⟦ ⟧ around what is trained."""
    header, end = map(re.escape, TURNS[name])
    return re.sub(f"({header})(.*?{end})", r"\1⟦\2⟧", text, flags=re.DOTALL)


def compute(folder: Path = FOLDER) -> dict[str, dict[str, str]]:
    """The marked text of every conversation under every template."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as directory:
        hf = PreTrainedTokenizerFast.from_pretrained(write_tokenizer(Path(directory) / "t"))
    out: dict[str, dict[str, str]] = {}
    for name in TURNS:
        hf.chat_template = template_of(folder, name)
        out[name] = {
            case: mark(hf.apply_chat_template(messages, tools=tools_of(case), tokenize=False), name)
            for case, messages in talks_of(name).items()
        }
    return out


if __name__ == "__main__":
    values = compute()
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    elif values != json.loads(FILE.read_text()):
        sys.exit("templates.json is not what transformers writes")
