"""The whole story on built-in data: a world, a tokenizer, a base model, a tuned one."""

from jaxtune.recipes.quickstart.story import main

__all__ = ["main"]
