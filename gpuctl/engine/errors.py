"""Errors of the embedded engine: each is one line that names the thing, its value and the remedy.

EngineError
├── BindingError      the llama.cpp library is absent, or is not the one the binding was written for
├── ModelError        a GGUF that is missing, broken or of a kind llama.cpp cannot run
├── ContextError      a context could not be made, or llama.cpp refused a step
├── ConstraintError   a schema or grammar cannot be held to, or can no longer be
├── SwapError         a stored copy of KV cannot be used: truncated, corrupt, or the disk is full
├── ListenError       an address cannot be had
├── HandoverError     a session cannot be handed over to another engine; carries the gRPC status that says why
└── RequestError      a request is refused; carries the HTTP status and the OpenAI error type
"""

from __future__ import annotations

STOPPING = "the engine is stopping"
"""Why a turn ends, or is refused, at shutdown."""
FAILED = "the engine has failed and ends: its log says why"
"""The same after a fault of ours in the step loop."""


class EngineError(Exception):
    """Base of everything the engine raises on purpose."""


class BindingError(EngineError):
    """The pinned llama.cpp library is missing or its layout differs from the one this binding mirrors."""


class ModelError(EngineError):
    """The model file cannot be used."""


class ContextError(EngineError):
    """llama.cpp refused a context or a step."""


class ConstraintError(EngineError):
    """llguidance refuses a schema or grammar, or gave up on one under way."""


class SwapError(EngineError):
    """A stored copy of a session's KV cannot be read back or written."""


class ListenError(EngineError):
    """The address to listen on is taken or not ours to bind."""


class HandoverError(EngineError):
    """A session is not handed over. `status` is the name of the gRPC status that tells the other side."""

    def __init__(self, message: str, *, status: str = "FAILED_PRECONDITION") -> None:
        super().__init__(message)
        self.status = status


class RequestError(EngineError):
    """A request the engine will not serve.

    `status` is the HTTP status, `kind` and `code` the fields of an OpenAI error object, `retry_after_s` the value of
    Retry-After where the client may try again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
