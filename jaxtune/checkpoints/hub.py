"""`hub:ORG/NAME[@REVISION]` in place of a directory: fetched from the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jaxtune.core.errors import RequestError
from jaxtune.core.places import place

PREFIX = "hub:"
# Nothing that could be executed or unpickled is fetched.
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md")

# The same weights once more, as their makers' own code reads them; `*` means subfolders too.
OTHERS = ("*/*", "consolidated*")


def local_directory(path: str | os.PathLike[str], key: str | None = None) -> Path:
    """Returns the directory that `path` names; a `hub:` id is fetched into the Hub's cache.

    Args:
        path: a directory (of a run also in an object store), or "hub:ORG/NAME" with an optional
            "@REVISION" (branch, tag or commit).
        key: of the config, for messages.

    Raises:
        RequestError: an id that is not well formed, is not there, or cannot be reached.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return place(text, key)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", text.removeprefix(PREFIX))
    if match is None:
        raise RequestError(
            f"hub:ORG/NAME or hub:ORG/NAME@REVISION is wanted, not {text!r}", key=key
        )
    import huggingface_hub
    from huggingface_hub import errors

    name, revision = match.groups()
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(FILES), ignore_patterns=list(OTHERS)
        )
    except errors.GatedRepoError as error:
        raise RequestError(
            f"{text!r} asks for its terms to be accepted on huggingface.co, and for HF_TOKEN",
            key=key,
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise RequestError(f"there is no {text!r} on the Hub, or it is private", key=key) from error
    except errors.HfHubHTTPError as error:
        raise RequestError(f"{text!r} cannot be fetched: {first_line(error)}", key=key) from error
    except (errors.LocalEntryNotFoundError, OSError) as error:
        raise RequestError(
            f"{text!r} cannot be fetched and is not in the cache: is there a network? Copy the "
            "files to a directory and name that instead",
            key=key,
        ) from error
    return Path(found)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text."""
    return str(error).strip().split("\n")[0]
