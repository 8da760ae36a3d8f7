"""Draws the next token: llama.cpp's own samplers in a chain, behind what the output is held to.

Owns: making a chain, and bringing a new one to where another was. Must not: see logits (runner.py) or know what a
constraint says (constraint.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

from ..errors import ConstraintError, RequestError
from ..schedule.sequence import SamplingParams, Token
from . import llama


class Sampler(Protocol):
    def close(self) -> None: ...


# Tokens a penalty looks back: beyond any output this engine serves, and what llama.cpp allocates for it.
_PENALTY_WINDOW_TOKENS = 32768


class ChainSampler:
    """llama.cpp's own samplers in a chain; plain greedy needs none and is taken with argmax. What the output is held to
    is applied before the chain."""

    def __init__(self, lib: llama.Library, vocab: int, params: SamplingParams, drawn: Sequence[Token] = ()) -> None:
        """`drawn`: tokens a sampler of these params has drawn already, perhaps in another process: this one goes on.

        Raises RequestError where what the output is held to cannot have drawn these tokens.
        """
        self._lib = lib
        self.chain: int = 0
        self.matcher = params.constraint.matcher() if params.constraint is not None else None
        penalized = params.frequency_penalty != 0 or params.presence_penalty != 0
        dist = 0
        if params.temperature > 0 or params.logit_bias or penalized:
            dist = self._make_chain(params, vocab, penalized=penalized)
        self._replay(drawn, dist)

    def _make_chain(self, params: SamplingParams, vocab: int, *, penalized: bool) -> int:
        """The chain's sampler that draws at random, 0 for greedy."""
        lib = self._lib
        self.chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if params.logit_bias:
            biases = (llama.LogitBias * len(params.logit_bias))(*(llama.LogitBias(t, b) for t, b in params.logit_bias))
            self._add(lib.llama_sampler_init_logit_bias(lib.llama_vocab_n_tokens(vocab), len(biases), biases))
        if penalized:
            wished = (params.frequency_penalty, params.presence_penalty)
            tokens = lib.llama_vocab_n_tokens(vocab)
            self._add(lib.llama_sampler_init_penalties(tokens, _PENALTY_WINDOW_TOKENS, 1.0, *wished))
        if params.temperature <= 0:
            self._add(lib.llama_sampler_init_greedy())
            return 0
        if params.top_k > 0:
            self._add(lib.llama_sampler_init_top_k(params.top_k))
        if params.top_p < 1:
            self._add(lib.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            self._add(lib.llama_sampler_init_min_p(params.min_p, 1))
        self._add(lib.llama_sampler_init_temp(params.temperature))
        dist = int(lib.llama_sampler_init_dist(params.seeded().seed))
        self._add(dist)
        return dist

    def _replay(self, drawn: Sequence[Token], dist: int) -> None:
        """Bring the sampler to where it is after drawing `drawn`. llama.cpp has no saved form of it.

        Each draw takes one number from dist's generator however many candidates there were (build 11549; a test holds
        it), so a draw among two stands for any.
        """
        for token in drawn:
            try:
                if self.matcher is not None:
                    self.matcher.accept(token)
            except ConstraintError as error:
                self.close()
                raise RequestError(f"it cannot have drawn token {token}: {error}", param="grammar") from None
            if dist:
                two = (llama.TokenData * 2)(llama.TokenData(0, 0.0, 0.0), llama.TokenData(1, 0.0, 0.0))
                candidates = llama.TokenDataArray(two, 2, -1, False)
                self._lib.llama_sampler_apply(dist, ctypes.byref(candidates))
            if self.chain:
                self._lib.llama_sampler_accept(self.chain, token)

    def _add(self, sampler: int) -> None:
        self._lib.llama_sampler_chain_add(self.chain, sampler)  # the chain owns it from here on

    def close(self) -> None:
        if self.chain:
            self._lib.llama_sampler_free(self.chain)
            self.chain = 0
