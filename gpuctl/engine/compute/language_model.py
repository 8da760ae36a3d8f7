"""A loaded model: its vocabulary, its metadata, its chat template.

Owns: the llama_model handle. Must not: own a context (runner.py). Tokenizing is safe from any thread.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cached_property
from pathlib import Path

from ....policies.accounting import ModelShape
from ..errors import ModelError
from ..schedule.sequence import Token
from . import llama
from .constraint import Constraint, ConstraintCompiler
from .model import check_gguf
from .template import ChatTemplate

KV_ELEMENT_BYTES = 2  # F16, llama.cpp's default: runner.py asks for no other


class LanguageModel:
    def __init__(self, path: Path, *, gpu_layers: int = 0) -> None:
        """Load the GGUF at `path`. `gpu_layers`: layers to keep on the GPU; negative means all (CUDA wheel only).

        Raises ModelError where it is no GGUF or llama.cpp cannot run it.
        """
        check_gguf(path)
        self._lib = llama.library()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        llama.clear_errors()
        handle = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            reason = llama.last_error() or "no reason given"
            raise ModelError(f"{path}: llama.cpp cannot load it: {reason}: is the file complete?")
        self.handle: int = handle
        self.path = path
        self._vocab = self._lib.llama_model_get_vocab(handle)
        if self._lib.llama_model_is_recurrent(handle) or self._lib.llama_model_is_hybrid(handle):
            raise ModelError(f"{path}: a recurrent model: its state cannot be cut at a token, as this engine needs")
        if self._lib.llama_model_has_encoder(handle):
            raise ModelError(f"{path}: an encoder-decoder model: give a decoder-only one")
        if self._lib.llama_model_n_swa(handle) > 0:
            raise ModelError(f"{path}: a sliding-window model: its KV is not a plain prefix, as this engine needs")
        self.vocabulary_size: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.trained_context_tokens: int = self._lib.llama_model_n_ctx_train(handle)
        self.layer_count: int = self._lib.llama_model_n_layer(handle)
        self.parameter_count: int = self._lib.llama_model_n_params(handle)
        self._adds_bos: bool = self._lib.llama_vocab_get_add_bos(self._vocab)
        self._pieces: dict[tuple[Token, bool], bytes] = {}
        self._compiler: ConstraintCompiler | None = None
        self._compiler_lock = threading.Lock()

    def close(self) -> None:
        """Free the weights. Every context made from the model must be closed first. Safe to call twice."""
        if self.handle:
            self._lib.llama_model_free(self.handle)
            self.handle = 0

    @cached_property
    def name(self) -> str:
        return self.path.stem

    def metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(4096)
        length = self._lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length >= 0 else None

    @cached_property
    def shape(self) -> ModelShape:
        """What decides gamma. Head sizes as the GGUF names them, else the embedding's width over the heads."""
        width = self._lib.llama_model_n_embd(self.handle) // max(1, self._lib.llama_model_n_head(self.handle))
        return ModelShape(
            layer_count=self.layer_count,
            kv_head_count=self._lib.llama_model_n_head_kv(self.handle),
            key_dimension=self._number("attention.key_length") or width,
            value_dimension=self._number("attention.value_length") or width,
            kv_element_bytes=KV_ELEMENT_BYTES,
            parameter_count=self.parameter_count,
        )

    @cached_property
    def expert_count(self) -> int:
        """0: a dense model."""
        return self._number("expert_count")

    def _number(self, key: str) -> int:
        """A whole number of the metadata, below the architecture's name; 0 where there is none."""
        text = self.metadata(f"{self.metadata('general.architecture')}.{key}")
        return int(text) if text is not None and text.isdigit() else 0

    @cached_property
    def chat_template(self) -> ChatTemplate:
        source = self._lib.llama_model_chat_template(self.handle, None)
        return ChatTemplate(
            source.decode("utf-8") if source else None,
            bos=self._special_text(self._lib.llama_vocab_bos(self._vocab)),
            eos=self._special_text(self._lib.llama_vocab_eos(self._vocab)),
        )

    def _special_text(self, token: Token) -> str:
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def tokenize(self, text: str, *, first: bool = True) -> list[Token]:
        """Tokens of `text`, control tokens recognised. `first`: it begins the sequence (a model may want a BOS)."""
        data = text.encode("utf-8", "surrogatepass")
        capacity = len(data) + 8
        while True:
            buffer = (ctypes.c_int32 * capacity)()
            count = self._lib.llama_tokenize(
                self._vocab, data, len(data), buffer, capacity, first and self._adds_bos, True
            )
            if count >= 0:
                return list(buffer[:count])
            capacity = -count

    def piece(self, token: Token, *, special: bool = False) -> bytes:
        """The bytes of a token; a control token has none unless `special`."""
        key = (token, special)
        if (known := self._pieces.get(key)) is not None:
            return known
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if length >= 0:
                break
            size = -length
        self._pieces[key] = buffer.raw[:length]
        return self._pieces[key]

    def constraint(self, kind: str, text: str) -> Constraint:
        """What holds output to a "json_schema" or a "lark" grammar. The first takes about a second. From any thread.

        Raises ConstraintError.
        """
        with self._compiler_lock:
            if self._compiler is None:
                pieces = [self.piece(t) or _control(self.piece(t, special=True)) for t in range(self.vocabulary_size)]
                end_of_turn = self._lib.llama_vocab_eot(self._vocab)
                if end_of_turn < 0:
                    end_of_turn = self._lib.llama_vocab_eos(self._vocab)
                self._compiler = ConstraintCompiler(pieces, end_of_turn)
        return self._compiler.compile(kind, text)

    def ends_text(self, token: Token) -> bool:
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    @property
    def vocab_handle(self) -> int:
        return int(self._vocab)


def _control(piece: bytes) -> bytes:
    """llguidance's mark of a token that is no text."""
    return b"\xff" + piece if piece else b""
