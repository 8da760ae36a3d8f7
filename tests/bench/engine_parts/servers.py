"""Servers to measure: our engine and, from the same wheel, llama.cpp's own, each as a process of its own on one core.

Owns: starting and stopping them. Both get the same model file, thread count and amount of KV.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from equipoise.gpuctl.engine.compute.model import resolve

# The peer serves until its parent closes its standard input; it must not outlive a bench that is killed.
_PEER = """
import os, sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel, params.n_ctx, params.cache_ram_mib = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
params.port, params.kv_unified = 0, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[5])
server = xllamacpp.Server(params)
print("listening", server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


def model_path() -> Path:
    return resolve("default", lambda line: print(line, file=sys.stderr))


@contextmanager
def engine(*options: str, threads: int = 1) -> Iterator[str]:
    """Our engine; yields its URL."""
    command = [sys.executable, "-m", "equipoise.gpuctl.engine", "--listen", "127.0.0.1:0"]
    command += ["--threads", str(threads), *options]
    with _process(command) as url:
        yield url


@contextmanager
def llama_server(*, slots: int, context_tokens: int, cache_mib: int, threads: int = 1) -> Iterator[str]:
    """llama.cpp's server: `slots` slots over one pool of `context_tokens`, `cache_mib` of host RAM for prompts."""
    numbers = [str(number) for number in (slots, context_tokens, cache_mib, threads)]
    with _process([sys.executable, "-c", _PEER, str(model_path()), *numbers]) as url:
        yield url


@contextmanager
def _process(command: list[str]) -> Iterator[str]:
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("listening "):
                    break
            else:
                raise RuntimeError(f"{command[:3]} did not start: exit code {process.wait()}")
            yield line.split()[1]
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
