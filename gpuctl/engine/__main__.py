"""`python -m equipoise.gpuctl.engine`: the embedded engine as a process of its own.

Owns: the command line, the listening socket, signals, and the order in which parts start and stop.
Prints `listening http://HOST:PORT` once it serves. Every failure to start is one line on stderr and exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from uvicorn import Config, Server

from ..energy import EnergyAbsence, open_meter
from . import hand_over, llama
from .cost import gamma_of_gpus, load_or_fit
from .disk_tier import DiskTier
from .engine import Engine, EngineConfig
from .errors import EngineError, ListenError
from .http import Endpoint, HttpConfig
from .language_model import LanguageModel
from .model import cache_folder, content_fingerprint, resolve
from .peer import PeerService
from .runner import ContextMode, LlamaRunner
from .scheduler import SchedulerConfig
from .sequence import IdlePolicy, TenantId

_log = logging.getLogger(__name__)
_SERVES = "The embedded engine as a process of its own."
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m equipoise.gpuctl.engine", description=__doc__.splitlines()[0])
    _add_options(parser)
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """`equipoise engine`: the same command line."""
    _add_options(commands.add_parser("engine", help="serve a model without the daemon", description=_SERVES))


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop."""
    logging.basicConfig(level=options.log_level, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        with _listen(options.listen) as listener:
            return _serve(options, listener)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    hand_over.add_parser(parser.add_subparsers(metavar="COMMAND"))
    add = parser.add_argument
    add("--model", default="default", help="`default` (SmolLM2-135M) or the path of a GGUF")
    add("--listen", default="127.0.0.1:8080", help="HOST:PORT; port 0 takes a free one")
    add(
        "--attach", metavar="unix:PATH", help="the daemon to attach to; without one the engine runs by its own defaults"
    )
    add("--peer", metavar="unix:PATH", help="a socket to hand sessions over to and from other engines of this host")
    add("--kv-tokens", type=_positive, default=16384, help="device KV over all sessions, in tokens")
    add("--host-bytes", type=_bytes, default=256 << 20, help="host RAM for swapped KV, e.g. 512MiB")
    add("--disk-bytes", type=_bytes, default=0, help="disk for swapped KV, e.g. 4GiB; 0: no disk tier")
    add("--disk-folder", type=Path, help="where it lives; by default a folder of the cache")
    add("--slots", type=_positive, default=32, help="conversations that may hold device KV at once")
    add("--slot-tokens", type=_positive, help="most tokens of one conversation")
    add("--threads", type=_positive, default=max(1, min(4, (os.cpu_count() or 2) // 2)), help="compute threads")
    add("--ctx-mode", choices=[mode.value for mode in ContextMode], default=ContextMode.UNIFIED.value)
    add(
        "--anonymous",
        choices=["keep", "drop"],
        default="keep",
        help="KV of turns that name no session: keep it for the prompt that continues it, or drop it at the turn's end",
    )
    add("--default-policy", choices=[policy.value for policy in IdlePolicy], default=IdlePolicy.RETAIN.value)
    add("--retain-s", type=float, default=30.0, help="own retention after a turn, seconds")
    add("--max-running", type=_positive, default=16, help="turns computed together")
    add("--step-tokens", type=_positive, default=256, help="most tokens of one step")
    add("--ubatch-tokens", type=_positive, default=128, help="computed at once: the most an interrupt wastes")
    add("--mixed-prefill-tokens", type=_positive, default=64, help="most prompt tokens of a step that also decodes")
    add("--share-prefix-tokens", type=int, default=32, help="share prefixes so long (unified context); 0: never")
    add("--gpu-layers", type=int, default=0, help="layers on the GPU (CUDA wheel); negative: all")
    add("--api-key", action="append", default=[], metavar="TENANT=KEY", help="may be given again; none: no key asked")
    add("--max-queued", type=_positive, default=256, help="turns that may wait before 429")
    add("--ready-fd", type=int, help="a descriptor the address is written to as well")
    add("--log-level", default="WARNING")


def _serve(options: argparse.Namespace, listener: socket.socket) -> int:
    path = resolve(options.model, lambda line: print(line, file=sys.stderr, flush=True))
    model = LanguageModel(path, gpu_layers=options.gpu_layers)
    runner = LlamaRunner(
        model,
        kv_tokens=options.kv_tokens,
        slot_count=options.slots,
        mode=ContextMode(options.ctx_mode),
        threads=options.threads,
        step_tokens=options.step_tokens,
        ubatch_tokens=options.ubatch_tokens,
        slot_tokens=options.slot_tokens,
    )
    shared = options.share_prefix_tokens if runner.mode is ContextMode.UNIFIED else 0
    disk = None
    if options.disk_bytes:
        disk = DiskTier(options.disk_folder or cache_folder() / "kv", f"{path} {path.stat().st_size} {llama.VERSION}")
    meter = open_meter(on_gpu=options.gpu_layers != 0 and llama.library().llama_supports_gpu_offload())
    if isinstance(meter, EnergyAbsence):
        _log.info("energy_not_measured reason=%r remedy=%r", meter.reason, meter.remedy)
    engine = Engine(
        model,
        runner,
        EngineConfig(
            kv_tokens=options.kv_tokens,
            host_bytes=options.host_bytes,
            disk_bytes=options.disk_bytes,
            max_queued_turns=options.max_queued,
            keep_anonymous=options.anonymous == "keep",
            scheduler=SchedulerConfig(
                step_tokens=options.step_tokens,
                mixed_prefill_tokens=options.mixed_prefill_tokens,
                max_running=min(options.max_running, runner.slot_count),
                share_prefix_tokens=shared if shared > 0 else None,
                idle_policy=IdlePolicy(options.default_policy),
                retain_ns=int(options.retain_s * 1e9),
            ),
        ),
        disk,
        gamma=gamma_of_gpus(model, options.gpu_layers),
        meter=None if isinstance(meter, EnergyAbsence) else meter,
    )
    engine.cost = load_or_fit(runner, path, options.threads, cache_folder(), disk.folder if disk else None)
    engine.start()
    try:
        asyncio.run(_serve_http(options, engine, listener))
    finally:
        engine.stop()
        if not isinstance(meter, EnergyAbsence):
            meter.close()
        runner.close()
        model.close()
    return 0


async def _serve_http(options: argparse.Namespace, engine: Engine, listener: socket.socket) -> None:
    server: Server

    @asynccontextmanager
    async def while_serving(app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def leave() -> None:
            # Ending the turns first lets open streams close at once instead of at the shutdown's timeout.
            server.should_exit = True
            loop.run_in_executor(None, engine.stop)

        # After uvicorn set its own: ours do not raise the signal again once everything is closed.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, leave)
        attached = asyncio.create_task(_attach(options.attach, engine)) if options.attach else None
        yield
        if attached is not None:
            attached.cancel()
            await asyncio.gather(attached, return_exceptions=True)

    peers = None
    if options.peer:
        peers = PeerService(engine, f"{llama.VERSION} {content_fingerprint(engine.model.path)}")
        await peers.start(options.peer)
    keys = dict(_key(entry) for entry in options.api_key)
    endpoint = Endpoint(engine, HttpConfig(api_keys=keys))
    config = Config(
        endpoint.application(while_serving),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
        lifespan="on",
    )
    server = Server(config)
    host, port = listener.getsockname()[:2]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        _announce(f"http://{host}:{port}", options.ready_fd)
    await serving
    if peers is not None:
        await peers.stop()


async def _attach(address: str, engine: Engine) -> None:
    from ..client import attach

    await attach(address, engine)


def _announce(url: str, ready_fd: int | None) -> None:
    print(f"listening {url}", flush=True)
    if ready_fd is not None:
        os.write(ready_fd, f"{url}\n".encode())
        os.close(ready_fd)


def _listen(address: str) -> socket.socket:
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise ListenError(f"--listen {address}: give HOST:PORT, for example 127.0.0.1:8080")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]") or "127.0.0.1", int(port)))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ListenError(
            f"--listen {address}: {error.strerror}: stop what listens there or give another port"
        ) from None
    return listener


def _key(entry: str) -> tuple[str, TenantId]:
    tenant, separator, key = entry.partition("=")
    if not separator or not tenant or not key:
        raise ListenError("--api-key: give TENANT=KEY")
    return key, TenantId(tenant)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}: give bytes, or a quantity such as 512MiB")
    return int(match[1]) * _UNITS[match[2]]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
