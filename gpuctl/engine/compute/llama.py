"""Thin ctypes binding of the llama.cpp C API that the pinned `xllamacpp` wheel exports.

Owns: the struct layouts and prototypes of llama.cpp build 11549 (include/llama.h), and the checks that the library
loaded is that build. Struct layouts change between builds without any version in the ABI, so every default that
llama.cpp writes is compared with what this layout must read there; one difference and the library is refused.
Must not: know of sessions, batches of ours, or tiers (runner.py does).
"""

from __future__ import annotations

import collections
import ctypes
import importlib.metadata
import importlib.util
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint8, c_uint32
from ctypes import c_void_p as ptr
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from ..errors import BindingError

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"
# The largest number of sequences a context takes (LLAMA_MAX_SEQ in llama.cpp's src/llama-cparams.h).
MAX_SEQUENCES = 256

DECODE_OK = 0
DECODE_NO_ROOM = 1
DECODE_ABORTED = 2

FLASH_ATTENTION_ENABLED = 1


class ModelParams(ctypes.Structure):
    """struct llama_model_params."""

    _fields_: ClassVar = [
        ("devices", ptr),
        ("tensor_buft_overrides", ptr),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", ptr),
        ("progress_callback", ptr),
        ("progress_callback_user_data", ptr),
        ("kv_overrides", ptr),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class ContextParams(ctypes.Structure):
    """struct llama_context_params. The three pointers in `_hooks` are left as llama.cpp set them (all null)."""

    _fields_: ClassVar = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", ptr),
        ("cb_eval_user_data", ptr),
        ("type_k", c_int),
        ("type_v", c_int),
        ("_hooks", ptr * 3),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", ptr),
        ("n_samplers", c_size_t),
        ("ctx_other", ptr),
    ]


class Batch(ctypes.Structure):
    """struct llama_batch."""

    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


class SamplerChainParams(ctypes.Structure):
    """struct llama_sampler_chain_params."""

    _fields_: ClassVar = [("no_perf", c_bool)]


class LogitBias(ctypes.Structure):
    """struct llama_logit_bias."""

    _fields_: ClassVar = [("token", c_int32), ("bias", c_float)]


class TokenData(ctypes.Structure):
    """struct llama_token_data."""

    _fields_: ClassVar = [("id", c_int32), ("logit", c_float), ("p", c_float)]


class TokenDataArray(ctypes.Structure):
    """struct llama_token_data_array."""

    _fields_: ClassVar = [("data", POINTER(TokenData)), ("size", c_size_t), ("selected", c_int64), ("sorted", c_bool)]


LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int, c_char_p, ptr)

# name -> (result, arguments). Handles are void pointers: nothing of ours looks inside.
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [LOG_CALLBACK, ptr]),
    "llama_backend_init": (None, []),
    "llama_supports_gpu_offload": (c_bool, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_sampler_chain_default_params": (SamplerChainParams, []),
    "llama_model_load_from_file": (ptr, [c_char_p, ModelParams]),
    "llama_model_free": (None, [ptr]),
    "llama_model_get_vocab": (ptr, [ptr]),
    "llama_model_n_ctx_train": (c_int32, [ptr]),
    "llama_model_n_layer": (c_int32, [ptr]),
    "llama_model_n_embd": (c_int32, [ptr]),
    "llama_model_n_head": (c_int32, [ptr]),
    "llama_model_n_head_kv": (c_int32, [ptr]),
    "llama_model_n_params": (ctypes.c_uint64, [ptr]),
    "llama_model_is_recurrent": (c_bool, [ptr]),
    "llama_model_is_hybrid": (c_bool, [ptr]),
    "llama_model_has_encoder": (c_bool, [ptr]),
    "llama_model_n_swa": (c_int32, [ptr]),
    "llama_model_desc": (c_int32, [ptr, c_char_p, c_size_t]),
    "llama_model_meta_val_str": (c_int32, [ptr, c_char_p, c_char_p, c_size_t]),
    "llama_model_chat_template": (c_char_p, [ptr, c_char_p]),
    "llama_vocab_n_tokens": (c_int32, [ptr]),
    "llama_vocab_is_eog": (c_bool, [ptr, c_int32]),
    "llama_vocab_bos": (c_int32, [ptr]),
    "llama_vocab_eos": (c_int32, [ptr]),
    "llama_vocab_eot": (c_int32, [ptr]),
    "llama_vocab_get_add_bos": (c_bool, [ptr]),
    "llama_tokenize": (c_int32, [ptr, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [ptr, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_init_from_model": (ptr, [ptr, ContextParams]),
    "llama_free": (None, [ptr]),
    "llama_n_ctx": (c_uint32, [ptr]),
    "llama_n_ctx_seq": (c_uint32, [ptr]),
    "llama_n_batch": (c_uint32, [ptr]),
    "llama_n_seq_max": (c_uint32, [ptr]),
    "llama_n_threads": (c_int32, [ptr]),
    "llama_set_n_threads": (None, [ptr, c_int32, c_int32]),
    "llama_set_abort_callback": (None, [ptr, ptr, ptr]),
    "llama_synchronize": (None, [ptr]),
    "llama_get_memory": (ptr, [ptr]),
    "llama_memory_clear": (None, [ptr, c_bool]),
    "llama_memory_seq_rm": (c_bool, [ptr, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [ptr, c_int32, c_int32, c_int32, c_int32]),
    "llama_memory_seq_pos_min": (c_int32, [ptr, c_int32]),
    "llama_memory_seq_pos_max": (c_int32, [ptr, c_int32]),
    "llama_state_seq_get_size": (c_size_t, [ptr, c_int32]),
    "llama_state_seq_get_data": (c_size_t, [ptr, ptr, c_size_t, c_int32]),
    "llama_state_seq_set_data": (c_size_t, [ptr, ptr, c_size_t, c_int32]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [ptr, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [ptr, c_int32]),
    "llama_sampler_chain_init": (ptr, [SamplerChainParams]),
    "llama_sampler_chain_add": (None, [ptr, ptr]),
    "llama_sampler_init_greedy": (ptr, []),
    "llama_sampler_init_dist": (ptr, [c_uint32]),
    "llama_sampler_init_top_k": (ptr, [c_int32]),
    "llama_sampler_init_top_p": (ptr, [c_float, c_size_t]),
    "llama_sampler_init_min_p": (ptr, [c_float, c_size_t]),
    "llama_sampler_init_temp": (ptr, [c_float]),
    "llama_sampler_init_penalties": (ptr, [c_int32, c_int32, c_float, c_float, c_float]),
    "llama_sampler_init_logit_bias": (ptr, [c_int32, c_int32, POINTER(LogitBias)]),
    "llama_sampler_sample": (c_int32, [ptr, ptr, c_int32]),
    "llama_sampler_accept": (None, [ptr, c_int32]),
    "llama_sampler_apply": (None, [ptr, POINTER(TokenDataArray)]),
    "llama_sampler_free": (None, [ptr]),
}

# What build 11549 writes into the parameter structs. A field that moved reads as something else.
_MODEL_DEFAULTS: dict[str, object] = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
_CONTEXT_DEFAULTS: dict[str, object] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "samplers": None,
    "n_samplers": 0,
    "ctx_other": None,
}

# Kept for the life of the process: llama.cpp calls back into it.
_recent_log: collections.deque[str] = collections.deque(maxlen=20)
_LOG_LEVEL_ERROR = 4


def _keep_error(level: int, text: bytes | None, user_data: object) -> None:
    if text and level >= _LOG_LEVEL_ERROR:
        _recent_log.append(text.decode("utf-8", "replace").strip())


_on_log = LOG_CALLBACK(_keep_error)


def last_error() -> str:
    """The newest error line llama.cpp logged; empty where there is none."""
    return _recent_log[-1] if _recent_log else ""


def clear_errors() -> None:
    _recent_log.clear()


class Library:
    """The loaded llama.cpp: every name of `_PROTOTYPES` is an attribute. Get it from `library()`."""

    def __init__(self, path: Path) -> None:
        try:
            self._handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise BindingError(f"{path}: cannot be loaded: {error}") from None
        for name, (result, arguments) in _PROTOTYPES.items():
            try:
                function = getattr(self._handle, name)
            except AttributeError:
                raise BindingError(f"{path}: no symbol {name}: install {PACKAGE}=={VERSION}") from None
            function.restype = result
            function.argtypes = arguments
            setattr(self, name, function)
        _check_defaults(path, self.llama_model_default_params(), _MODEL_DEFAULTS)
        _check_defaults(path, self.llama_context_default_params(), _CONTEXT_DEFAULTS)
        self.llama_log_set(_on_log, None)
        self.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def optional(self, name: str, result: Any, arguments: list[Any]) -> Any:
        """A function that not every build exports; None where this one does not."""
        function = getattr(self._handle, name, None)
        if function is not None:
            function.restype, function.argtypes = result, arguments
        return function


def _check_defaults(path: Path, params: ctypes.Structure, expected: dict[str, object]) -> None:
    for field, value in expected.items():
        found = getattr(params, field)
        if found != value:
            raise BindingError(
                f"{path}: {type(params).__name__}.{field} defaults to {found!r}, not {value!r}: "
                f"another llama.cpp build; install {PACKAGE}=={VERSION}"
            )


@cache
def library() -> Library:
    """The one llama.cpp of this process. Raises BindingError where it is absent or another build."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BindingError(f"{PACKAGE} is not installed: `pip install 'equipoise[engine]'`")
    version = importlib.metadata.version(PACKAGE)
    if version.split("+")[0] != VERSION:  # a CUDA wheel carries a local suffix
        raise BindingError(f"{PACKAGE} {version} is installed: this binding mirrors {VERSION} only; install that one")
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).glob("xllamacpp*.so" if sys.platform == "linux" else "xllamacpp*.*d")):
            return Library(path)
    raise BindingError(f"{PACKAGE} {version}: no shared object in {spec.submodule_search_locations[0]}")


@cache
def abort_predicate() -> int:
    """Address of a C function fit as ggml's abort callback that never takes the interpreter's lock.

    libc's strlen: called with a pointer to our flag byte, it answers 0 (false) while the byte is 0 and 1 (true, in the
    low byte that a C bool is read from) once it is not. A Python callback would take the lock at every graph node.
    """
    libc = ctypes.CDLL(None)
    address = ctypes.cast(libc.strlen, ptr).value
    assert address is not None
    return address


class AbortFlag:
    """A byte other threads may raise to make llama_decode return DECODE_ABORTED at the next graph node."""

    def __init__(self) -> None:
        self._bytes = (c_uint8 * 8)()  # flag, then the terminating zeros strlen needs

    @property
    def address(self) -> int:
        return ctypes.addressof(self._bytes)

    def raise_(self) -> None:
        self._bytes[0] = 1

    def clear(self) -> None:
        self._bytes[0] = 0

    def raised(self) -> bool:
        return self._bytes[0] != 0


__all__ = [
    "DECODE_ABORTED",
    "DECODE_NO_ROOM",
    "DECODE_OK",
    "FLASH_ATTENTION_ENABLED",
    "MAX_SEQUENCES",
    "AbortFlag",
    "Batch",
    "ContextParams",
    "Library",
    "LogitBias",
    "TokenData",
    "TokenDataArray",
    "abort_predicate",
    "clear_errors",
    "last_error",
    "library",
]
