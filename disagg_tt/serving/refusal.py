"""What a client is told when it gets no answer: OpenAI's error object, and the HTTP status that goes with it."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from fastapi.responses import JSONResponse
from loguru import logger
from pydantic import ValidationError

from disagg_tt.errors import DisaggError, InputError, OverloadError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # else by the hundred


class Refusal(Exception):
    """A request that is refused. `code` is for programs, `param` the parameter at fault, if it is one's."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, which in a stream is an event of its own."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response; Retry-After in whole seconds, at least one."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.error, self.status, headers)


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of `error`; of one that nobody raised on purpose only that it happened."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, OverloadError):
        status, code = (503, "unavailable") if error.unavailable else (429, "overloaded")
        return Refusal(status, str(error), code, retry_after_s=error.retry_after_s)
    if isinstance(error, InputError):
        return Refusal(400, str(error), "invalid_value")
    if isinstance(error, DisaggError):
        logger.error("a generation failed: {}", error)
        return Refusal(500, str(error), "generation_failed")
    logger.opt(exception=error).error("a request failed")
    return Refusal(500, "the server failed on this request; its log says why", "internal_error")


def refusal_of_invalid(error: ValidationError) -> Refusal:
    """The first thing that a schema has against a request: which parameter, what it should be, what it is."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = _param(first["loc"])
    if first["type"] == "missing":
        return Refusal(400, f"Missing required parameter: '{param}'.", "missing_required_parameter", param)
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"Unknown parameter: '{param}'.", "unknown_parameter", param)
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    reason = first["msg"].removeprefix("Value error, ")
    return Refusal(
        400, f"Invalid '{param}': {reason}; it is {reprlib.repr(first['input'])}.", code, param or None
    )


def _param(place: tuple[int | str, ...]) -> str:
    """messages, 0, content, <text> -> messages[0].content; what stands in < > is a tag of api.py."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place if str(part)[:1] != "<"]
    return "".join(parts).removeprefix(".")[:200]
