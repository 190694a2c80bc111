"""A tiny tokenizer, trained here, and chat templates like those of well-known models."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from jaxtune.data.tokenizer import Tokenizer, load_tokenizer

SPECIAL = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>",
]  # fmt: skip

CORPUS = [
    "The cat sat on the mat and looked at the moon. What is the capital of France? Paris.",
    "user assistant system tool You are a helpful assistant. Hello there, how are you today?",
    "### Instruction:\n### Response:\n### Input:\n Once upon a time there was a little dog.",
] * 4

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] | trim + eos_token }}{% else %}{{ '[INST] ' + m['content'] | trim + "
    "' [/INST]' }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{{ '<start_of_turn>' + "
    "('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Ends the whole conversation, and only it, with one more token.
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}"
    "{{ eos_token }}{% endif %}"
)
# Writes an empty reasoning block into the last turn only, and drops it from earlier ones.
_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}{{ '\n<tool_call>\n' + "
    "c['function'] | tojson + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a reasoning block that finished turns do not have.
_OPENS_THINK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + m['content'] + eos_token }}{% else %}{{ '<|user|>' + m['content'] }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# The system prompt stands before the last user message, wherever that is.
_MOVES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}{% set ns = namespace(last=0) %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in rest %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}{{ '[INST]' + "
    "(system if loop.index0 == ns.last else '') + m['content'] + '[/INST]' }}{% endif %}"
    "{% endfor %}"
)
_NO_TERMINATOR = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# Closes the conversation with EOS, and the turns in it with nothing.
_EOS_AT_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ('' if loop.last else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\nassistant: ' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)

TEMPLATES = {
    "chatml": _CHATML,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "phi3": _PHI3,
    "thinking": _THINKING,
    "opens_think": _OPENS_THINK,
    "moves_system": _MOVES_SYSTEM,
    "no_terminator": _NO_TERMINATOR,
    "eos_at_end": _EOS_AT_END,
}


def write_tokenizer(directory: Path, *, add_bos: bool = True, pad: str | None = None) -> Path:
    """Trains a byte-level BPE of a few hundred tokens and saves it as a model directory has it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    if pad:
        config["pad_token"] = pad
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> Tokenizer:
    """Adds BOS, has no template."""
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def chat(tokenizer):
    """Returns the tokenizer with a template of `TEMPLATES`."""
    made = {name: tokenizer.with_template(text) for name, text in TEMPLATES.items()}
    return made.__getitem__


@pytest.fixture(scope="session")
def write_jsonl():
    """Returns a function that writes records as JSON lines and gives the source's name."""

    def write(path: Path, records) -> str:
        data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return f"jsonl:{path}"

    return write
