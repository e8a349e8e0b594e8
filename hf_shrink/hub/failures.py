"""What goes wrong on the way to the Hub, told apart: what has to be changed, and what another try may mend."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hf_shrink.errors import HubError, PushInterrupted

Result = TypeVar("Result")
# The base of every failed request: of httpx below huggingface_hub 2, of httpx2 from there on.
RequestFailed: type[Exception] = HfHubHTTPError.__bases__[0]
# All that huggingface_hub lets through: refused and lost requests, transfers (RuntimeError), contents (ValueError).
FAILURES = (RequestFailed, ConnectionError, TimeoutError, RuntimeError, ValueError)
PASSES = frozenset({408, 409, 412, 429, 500, 502, 503, 504})  # answers that another try may not get
WAITS = (2.0, 8.0, 30.0)  # seconds before each further try; huggingface_hub has tried uploads by itself before
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def asking(repo_id: str, go_on: Callable[[], str] = str) -> Iterator[None]:
    """Around requests to the Hub. `go_on`: a sentence for the end of the message, made when it is needed.

    Raises:
        HubError: the answer is no, and stays so until something is changed.
        PushInterrupted: there was no answer, or it got lost.
        KeyboardInterrupt: it was stopped; with the same sentence.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        said = go_on()
        if not said:
            raise
        raise type(error)(f"the push to {repo_id} was stopped{said}") from error
    except LocalTokenNotFoundError as error:
        raise HubError(f"pushing to {repo_id} needs a token of the Hub, and there is none; {LOGIN}") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"nothing can be pushed to {repo_id} while HF_HUB_OFFLINE is set; unset it") from error
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository ({reason(error)}); give OWNER/NAME") from error
    except FAILURES as error:
        said = " / ".join(dict.fromkeys(map(reason, _chain(error))))
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise HubError(f"what is to be pushed to {repo_id} cannot be: {said}{go_on()}") from error
        refused = next((e for e in _chain(error) if isinstance(e, HfHubHTTPError) and not may_pass(e)), None)
        if refused is not None:
            raise HubError(f"{_refusal(repo_id, refused)}{go_on()}") from error
        raise PushInterrupted(f"the Hub did not answer for {repo_id}: {said}{go_on() or '; try again'}") from error


def persist(call: Callable[[], Result]) -> Result:
    """What `call` gives, which can be made again; it is, after a while, when it failed in a way that may pass."""
    for wait in WAITS:
        try:
            return call()
        except FAILURES as error:
            if not may_pass(error):
                raise
            time.sleep(wait)
    return call()


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed another time: the connection was lost, or the server has too much to do."""
    for cause in _chain(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in PASSES
    # An error of a transfer says no more than its text.
    return not isinstance(error, ValueError | OfflineModeIsEnabled)


def reason(error: BaseException) -> str:
    """An error of huggingface_hub in one line, without the signatures that storage addresses carry."""
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    line = " ".join(str(said).split())
    return re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1", line)[:300]


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the Hub does not accept the token for {repo_id} ({reason(error)}); {LOGIN}"
    if status in (402, 403):
        return f"the token may not write to {repo_id} ({reason(error)}); give it write access, or push elsewhere"
    if status == 404:
        return f"there is no such thing as {repo_id}, or the token may not see it ({reason(error)})"
    return f"the Hub refuses what is to be pushed to {repo_id} ({reason(error)})"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it comes from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__
