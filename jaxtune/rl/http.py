"""JSON over HTTP to a server that may be busy, slow or wrong."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from jaxtune.core.errors import RunFailure

# What passes when one waits: too many requests, and the server's own troubles.
BUSY = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT = 60.0  # seconds


class ServerError(RunFailure):
    """A server did not give what was asked for; one line with its URL."""


class _Refusing(urllib.request.HTTPRedirectHandler):
    """Does not follow: the key would go to wherever the answer points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class Server:
    """A server, and how patient we are with it.

    Attributes:
        url: of its root, such as `http://127.0.0.1:8000`.
        timeout: seconds in which the server must send something.
        attempts: how often a request is sent before it counts as failed.
        wait: seconds before the second attempt, doubled for each further one; a `Retry-After` of
            the server's counts if it is longer.
        key_variable: name of the environment variable that holds the API key, if it is set. The
            key is read when a request is sent, and kept nowhere.
    """

    url: str
    timeout: float = 600.0
    attempts: int = 5
    wait: float = 1.0
    key_variable: str = "OPENAI_API_KEY"

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Sends JSON to `url` + `path` and returns the JSON of the answer, None for other text.

        Raises:
            ServerError: no answer, or a refusal, after the last attempt.
        """
        url = self.url.rstrip("/") + path
        for attempt in range(1, self.attempts + 1):
            answer, trouble, pause = self._once(url, json.dumps(body).encode())
            if trouble is None:
                return answer
            if pause is None or attempt == self.attempts:
                break
            time.sleep(min(max(pause, self.wait * 2 ** (attempt - 1)), LONGEST_WAIT))
        tried = f" ({attempt} attempts)" if attempt > 1 else ""
        raise ServerError(f"{url}: {self._without_key(trouble)}{tried}")

    def _once(self, url: str, data: bytes) -> tuple[Any, str | None, float | None]:
        """Returns (answer, what is wrong, the least seconds to wait; None: no use in waiting)."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, data, headers, method="POST")
        try:
            with urllib.request.build_opener(_Refusing).open(request, timeout=self.timeout) as got:
                return parsed(got.read()), None, None
        except urllib.error.HTTPError as error:
            said = told(error.read())
            trouble = f"HTTP {error.code} {error.reason}" + (f": {said}" if said else "")
            return None, trouble, seconds(error.headers) if error.code in BUSY else None
        except TimeoutError:
            return None, f"no answer within {self.timeout:g} s", 0.0
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                return None, f"no answer within {self.timeout:g} s", 0.0
            return None, f"cannot be reached: {error.reason}", 0.0
        except (http.client.HTTPException, ConnectionError) as error:
            return None, f"broke off: {type(error).__name__}", 0.0

    def _without_key(self, text: str) -> str:
        """Returns the text without the key, which a server may repeat in what it refuses."""
        key = os.environ.get(self.key_variable)
        return text.replace(key, "…") if key else text


def parsed(body: bytes) -> Any:
    """Returns the JSON of a body, or None if it is none."""
    try:
        return json.loads(body)
    except ValueError:
        return None


def told(body: bytes) -> str:
    """Returns the first words of what a server says is wrong, on one line."""
    found = parsed(body)
    if isinstance(found, dict):
        found = found.get("error", found)
        found = found.get("message", found) if isinstance(found, dict) else found
    text = body.decode("utf-8", "replace") if found is None else str(found)
    return " ".join(text.split())[:200]


def seconds(headers: Mapping[str, str]) -> float:
    """Returns the seconds of a `Retry-After`, 0 if there is none or it is a date."""
    text = headers.get("Retry-After", "")
    return float(text) if text.isdigit() else 0.0
