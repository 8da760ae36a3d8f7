"""Holds a turn's output to a JSON Schema or a grammar, by llguidance as compiled into the pinned llama.cpp wheel.

Owns: the ctypes binding of llguidance's C API (parser/llguidance.h of guidance-ai/llguidance), its view of a model's
vocabulary, compiled constraints and the matchers that follow a turn. Must not: know of OpenAI's format (wire.py).

llama.cpp's own adapter (common/llguidance.cpp) goes on without the constraint when llguidance meets one of its limits;
here the turn fails with the reason instead. What llguidance does not understand of a schema it refuses by name, save
annotations and keywords JSON Schema does not know; it does not enforce that properties beyond the listed ones are
unique, and it fixes the order of the listed ones.
"""

from __future__ import annotations

import ctypes
import re
import weakref
from ctypes import c_bool, c_char_p, c_int32, c_size_t, c_uint32, c_uint64
from ctypes import c_void_p as ptr
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import ConstraintError
from . import llama

# Bounds what one schema may cost: building at this size takes about 150 ms, on the request's own thread.
_MAX_GRAMMAR_SYMBOLS = 50_000
_MAX_ERROR_CHARACTERS = 300

_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "llg_new_tokenizer": (ptr, [ptr, c_char_p, c_size_t]),
    "llg_free_tokenizer": (None, [ptr]),
    "llg_constraint_init_set_defaults": (None, [ptr, ptr]),
    "llg_new_matcher": (ptr, [ptr, c_char_p, c_char_p]),
    "llg_clone_matcher": (ptr, [ptr]),
    "llg_free_matcher": (None, [ptr]),
    "llg_matcher_get_error": (c_char_p, [ptr]),
    "llg_matcher_is_stopped": (c_bool, [ptr]),
    "llg_matcher_compute_mask_into": (c_int32, [ptr, ptr, c_size_t]),
    "llg_matcher_consume_token": (c_int32, [ptr, c_uint32]),
}


class _TokenizerInit(ctypes.Structure):
    """struct LlgTokenizerInit. Zeroed room follows: fields a later version appends read as their default."""

    _fields_: ClassVar = [
        ("vocab_size", c_uint32),
        ("tok_eos", c_uint32),
        ("token_lens", ptr),
        ("token_bytes", ptr),
        ("tokenizer_json", c_char_p),
        ("tokenize_assumes_string", c_bool),
        ("tokenize_fn", ptr),
        ("use_approximate_greedy_tokenize_fn", c_bool),
        ("tokenize_user_data", ptr),
        ("slices", ptr),
        ("_later", ptr * 8),
    ]


class _ConstraintInit(ctypes.Structure):
    """struct LlgConstraintInit with its LlgParserLimits."""

    _fields_: ClassVar = [
        ("tokenizer", ptr),
        ("log_buffer_level", c_uint32),
        ("log_stderr_level", c_uint32),
        ("ff_tokens_ok", c_bool),
        ("backtrack_ok", c_bool),
        ("max_items_in_row", c_size_t),
        ("initial_lexer_fuel", c_uint64),
        ("step_lexer_fuel", c_uint64),
        ("step_max_items", c_size_t),
        ("max_lexer_states", c_size_t),
        ("max_grammar_size", c_size_t),
        ("precompute_large_lexemes", c_bool),
        ("_later", ptr * 8),
    ]


# What llg_constraint_init_set_defaults writes. A field that moved reads as something else.
_DEFAULTS = {
    "ff_tokens_ok": False,
    "backtrack_ok": False,
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 250_000,
    "max_grammar_size": 500_000,
    "precompute_large_lexemes": True,
}


class ConstraintCompiler:
    """Compiles constraints for one vocabulary. Safe from any thread; made on first use, in about 0.5 s."""

    def __init__(self, pieces: list[bytes], end_of_turn: int) -> None:
        """`pieces`: the bytes of every token in order, those of a control token behind a 0xff byte.

        Raises ConstraintError where this llama.cpp was built without llguidance, or with another version of it.
        """
        self._functions = _Functions()
        init = _TokenizerInit(vocab_size=len(pieces), tok_eos=end_of_turn, use_approximate_greedy_tokenize_fn=True)
        lengths = np.array([len(piece) for piece in pieces], np.uint32)
        data = np.frombuffer(b"".join(pieces), np.uint8)
        init.token_lens, init.token_bytes = lengths.ctypes.data, data.ctypes.data
        reason = ctypes.create_string_buffer(1024)
        self._tokenizer = self._functions.llg_new_tokenizer(ctypes.byref(init), reason, len(reason))
        if not self._tokenizer:
            raise ConstraintError(f"llguidance does not take this vocabulary: {reason.value.decode(errors='replace')}")
        weakref.finalize(self, self._functions.llg_free_tokenizer, self._tokenizer)
        self._mask_words = -(-len(pieces) // 32)

    def compile(self, kind: str, text: str) -> Constraint:
        """`kind`: "json_schema" or "lark". Raises ConstraintError with llguidance's reason."""
        init = _ConstraintInit()
        self._functions.llg_constraint_init_set_defaults(ctypes.byref(init), self._tokenizer)
        for field, value in _DEFAULTS.items():
            if (found := getattr(init, field)) != value:
                raise ConstraintError(f"another llguidance: {field} defaults to {found!r}, not {value!r}")
        init.log_stderr_level = init.log_buffer_level = 0
        init.max_grammar_size = _MAX_GRAMMAR_SYMBOLS
        matcher = self._functions.llg_new_matcher(ctypes.byref(init), kind.encode(), text.encode())
        constraint = Constraint(kind, text, self, self._functions, matcher, self._mask_words)
        if reason := self._functions.llg_matcher_get_error(matcher):
            raise ConstraintError(_one_line(reason))
        return constraint


class Constraint:
    """One compiled constraint; every turn that follows it gets a matcher of its own."""

    def __init__(
        self,
        kind: str,
        text: str,
        compiler: ConstraintCompiler,
        functions: _Functions,
        matcher: int,
        mask_words: int,
    ) -> None:
        self.kind = kind
        self.text = text
        """`kind` and `text`: what it was compiled from, and can be compiled from again elsewhere."""
        self._compiler = compiler  # keeps the tokenizer alive
        self._functions = functions
        self._matcher = matcher
        self._mask_words = mask_words
        weakref.finalize(self, functions.llg_free_matcher, matcher)

    def matcher(self) -> Matcher:
        return Matcher(self, self._functions, self._functions.llg_clone_matcher(self._matcher), self._mask_words)


class Matcher:
    """Follows the output of one turn. One thread at a time."""

    def __init__(self, constraint: Constraint, functions: _Functions, matcher: int, mask_words: int) -> None:
        self._constraint = constraint
        self._functions = functions
        self._matcher = matcher
        self._mask = np.zeros(mask_words, np.uint32)
        weakref.finalize(self, functions.llg_free_matcher, matcher)

    def restrict(self, logits: npt.NDArray[np.float32]) -> None:
        """Set the logit of every token that may not come next to -inf; at the end only the end of the turn may.

        Raises ConstraintError where llguidance gives up (its limits on time and memory).
        """
        mask = self._mask
        if self._functions.llg_matcher_compute_mask_into(self._matcher, mask.ctypes.data, mask.nbytes):
            raise ConstraintError(self._reason())
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: logits.size]
        logits[allowed == 0] = -np.inf

    def accept(self, token: int) -> None:
        """The output goes on with `token`. Raises ConstraintError where it may not."""
        if self._functions.llg_matcher_is_stopped(self._matcher):
            return  # complete: the token is the end of the turn
        if self._functions.llg_matcher_consume_token(self._matcher, token):
            raise ConstraintError(self._reason())

    def _reason(self) -> str:
        reason = self._functions.llg_matcher_get_error(self._matcher) or b"no reason given"
        return f"the output cannot go on within its grammar: {_one_line(reason)}"


class _Functions:
    """llguidance's functions in the loaded library: every name of `_PROTOTYPES` is an attribute."""

    def __init__(self) -> None:
        library = llama.library()
        for name, (result, arguments) in _PROTOTYPES.items():
            function = library.optional(name, result, arguments)
            if function is None:
                raise ConstraintError(f"no symbol {name}: this llama.cpp was built without llguidance")
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _one_line(reason: bytes) -> str:
    # After the reason come the parser's state or, where it panicked, the call stack.
    said = re.split(r"<state>|\n +0: ", reason.decode("utf-8", "replace"), maxsplit=1)[0]
    text = " ".join(said.split())
    return text if len(text) <= _MAX_ERROR_CHARACTERS else text[:_MAX_ERROR_CHARACTERS] + "..."
