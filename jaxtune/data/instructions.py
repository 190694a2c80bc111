"""What an instruction with an input becomes."""

from __future__ import annotations


def instruction_prompt(instruction: str, input: str) -> str:
    """Returns the Alpaca prompt that ends with `### Response:`; an empty input is left out."""
    middle = f"### Input:\n{input}\n\n" if input.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def instruction_question(instruction: str, input: str) -> str:
    """Returns what the user says in a chat, an input behind an empty line."""
    return f"{instruction}\n\n{input}" if input.strip() else instruction
