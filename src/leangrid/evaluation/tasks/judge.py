"""A model that rates answers, behind any endpoint of OpenAI's chat completions API. The key comes from the environment
and is sent to that endpoint only.

Errors that may be temporary are retried: HTTP 408, 409, 425, 429 and 5xx, a time-out, a broken connection, an answer
that is not JSON or holds no text."""

import ipaddress
import json
import os
import random
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from leangrid.errors import TaskError

KEYS = ("LEANGRID_JUDGE_KEY", "OPENAI_API_KEY")
ATTEMPTS, LONGEST_WAIT = 6, 60.0  # seconds; the waits before are 1, 2, 4, 8, 16 and up to half of that more
_TEMPORARY = {408, 409, 425, 429, *range(500, 600)}
# The published pattern, and its fallback with single brackets (FastChat, llm_judge/common.py).
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


class Unrated(TaskError):
    """A judgement without a rating from 1 to 10; the other judgements of the task are still asked for."""


class _Temporary(Exception):
    """One attempt failed in a way that may not repeat; ``wait`` is how many seconds the endpoint asks to wait."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        self.why, self.wait = why, wait
        super().__init__(why)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would send the key to another address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def read_rating(judgement: str) -> float:
    """The number in [[...]] (or [...]) of a judgement; Unrated where there is none from 1 to 10."""
    for pattern in _RATINGS:
        found = pattern.search(judgement)
        if found:
            value = float(found[1])
            if 1 <= value <= 10:
                return value
            raise Unrated(f"the judgement rates {found[1]}, not 1 to 10", "judge")
    start = " ".join(judgement.split())[:80]
    raise Unrated(f"the judgement holds no [[rating]]: '{start}'", "judge", "The same command asks for it again")


@dataclass(frozen=True)
class Judge:
    """An endpoint and the model that it serves.

    Attributes:
        url: of the API, such as https://api.openai.com/v1.
        model: name of the model.
        key: for the Authorization header; "" sends none. Not part of repr.
        timeout: seconds for one answer.
        sleep: waits so many seconds between attempts.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    @classmethod
    def open(cls, url: str | None, model: str) -> "Judge":
        """The endpoint with the key from the environment; TaskError where it cannot be used, or nobody listens
        there."""
        if not url:
            raise TaskError("the task needs a judge", "mt_bench", "Give one: --judge-url https://api.openai.com/v1")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise TaskError(
                "this is no address of an API", "--judge-url", "Write one such as https://api.openai.com/v1"
            )
        key = next((os.environ[name].strip() for name in KEYS if os.environ.get(name, "").strip()), "")
        here = _is_local(parts.hostname)
        if not key and not here:
            raise TaskError(
                "there is no key for the judge", parts.hostname, f"Put it into the environment: {' or '.join(KEYS)}"
            )
        if key and parts.scheme == "http" and not here:
            raise TaskError(
                "the judge's key would travel unencrypted", url, "Use https, or unset the key if it needs none"
            )
        _listening(parts)
        return cls(url.rstrip("/"), model, key)

    def ask(self, system: str, prompt: str, max_tokens: int = 2048) -> str:
        """The model's reply at temperature 0; TaskError after ATTEMPTS temporary errors, or at once for an error that
        would repeat."""
        body = {"model": self.model, "temperature": 0, "max_tokens": max_tokens,
                "messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt}]}  # fmt: skip
        why = ""
        for attempt in range(ATTEMPTS):
            try:
                return self._once(body)
            except _Temporary as failure:
                why = failure.why
                if attempt + 1 < ATTEMPTS:
                    longer = 2.0**attempt * random.uniform(1, 1.5)  # noqa: S311
                    self.sleep(min(LONGEST_WAIT, max(failure.wait, longer)))
        raise TaskError(
            f"the judge gave no answer in {ATTEMPTS} attempts: {why}",
            self.url,
            "Run the same command later: it goes on",
        )

    def _once(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)  # noqa: S310
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                text = response.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, HTTPException) as error:
            raise _Temporary(self._clean(str(getattr(error, "reason", "") or error) or type(error).__name__)) from None
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _Temporary(f"its answer is no chat completion: '{self._clean(text)}'") from None
        if not isinstance(content, str) or not content.strip():
            raise _Temporary("its answer holds no text")
        return content.replace(self.key, "***") if self.key else content

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        with error:
            try:
                said = self._clean(error.read(4096).decode("utf-8", "replace"))
            except (OSError, HTTPException):
                said = ""
        if error.code in _TEMPORARY:
            after = error.headers.get("Retry-After", "")
            return _Temporary(f"HTTP {error.code} {said}".strip(), float(after) if after.isdigit() else 0.0)
        if error.code in (401, 403):  # what it says may hold the key
            return TaskError(
                f"the judge refuses the key (HTTP {error.code})", self.url, f"Look at {' and '.join(KEYS)}"
            )
        return TaskError(
            f"the judge refuses the request (HTTP {error.code}): {said}",
            self.url,
            "Look at --judge-url and --judge-model",
        )

    def _clean(self, text: str) -> str:
        """The start of what a server said, on one line and without the key."""
        return " ".join((text.replace(self.key, "***") if self.key else text).split())[:200]


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(parts: urllib.parse.SplitResult) -> None:
    """TaskError now rather than after hours of answers; behind a proxy only the first question can tell."""
    if parts.scheme in urllib.request.getproxies():
        return
    host = parts.hostname or ""
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise TaskError(
            f"the judge cannot be reached: {error}", f"{parts.scheme}://{parts.netloc}", "Look at --judge-url"
        ) from error
