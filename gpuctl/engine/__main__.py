"""`python -m equipoise.gpuctl.engine`: the embedded engine as a process of its own.

Owns: the command line, the listening socket, signals, and the order in which parts start and stop.
Prints `listening http://HOST:PORT` once it serves. Every failure to start is one line on stderr and exit code 1.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and "hand-over" not in sys.argv:  # which is no success when it is cut short
    from .ending import ending

    ending()  # before the imports: they take a second, or many beside other load

import argparse
import asyncio
import errno
import logging
import os
import re
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from uvicorn import Config, Server

from ..energy import EnergyAbsence, open_meter
from ..peers import Peers
from .compute import llama
from .compute.language_model import LanguageModel
from .compute.model import cache_folder, content_fingerprint, remove_scratch, resolve
from .compute.runner import ContextMode, LlamaRunner
from .cost import gamma_of_gpus, load_or_fit
from .ending import Ending, ending
from .engine import Engine, EngineConfig
from .engine_thread import threadsafe
from .errors import EngineError, ListenError
from .openai.connection import connection_of
from .openai.http import Endpoint, HttpConfig
from .peer import command as hand_over
from .peer.service import PeerService
from .schedule.scheduler import SchedulerConfig
from .schedule.sequence import IdlePolicy, TenantId
from .tiers import table

_log = logging.getLogger(__name__)
_MOST_FILES = 65536
_OWN_FILES = 128
_FAILURE_CHECK_S = 0.2
_SEND_BUFFER_BYTES = 128 << 10
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


_EXAMPLES = """examples:
  %(prog)s                                    the default model on 127.0.0.1:8080
  %(prog)s --model qwen.gguf --kv-tokens 65536 --host-bytes 8GiB
  %(prog)s --disk-bytes 20GiB --disk-folder /var/cache/kv
  %(prog)s --api-key gold=SECRET1 --api-key bronze=SECRET2
  %(prog)s --attach unix:/run/equipoise/equipoise.sock

Ask it as you would ask OpenAI: OPENAI_BASE_URL=http://127.0.0.1:8080/v1
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _with_options(argparse.ArgumentParser(prog="python -m equipoise.gpuctl.engine")).parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """`equipoise engine`."""
    _with_options(commands.add_parser("engine", help="serve a model without the daemon"))


def _run(options: argparse.Namespace) -> int:
    """Serve until told to stop."""
    told = ending()
    logging.basicConfig(level=options.log_level, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        with _listen(options.listen) as listener:
            try:
                return _serve(options, listener, told)
            finally:
                if options.listen.startswith("unix:"):
                    Path(options.listen.removeprefix("unix:")).unlink(missing_ok=True)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _with_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.description = "Serve a model over OpenAI's HTTP API, with the KV of many conversations kept in three tiers."
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=_run)
    hand_over.add_parser(parser.add_subparsers(title="commands", metavar="COMMAND"))
    shown = " (default: %(default)s)"
    add = parser.add_argument_group("model").add_argument
    add("--model", default="default", metavar="GGUF", help="a file, or `default`: SmolLM2-135M" + shown)
    add("--threads", type=_positive, default=max(1, min(4, (os.cpu_count() or 2) // 2)), metavar="COUNT",
        help="compute threads; more than there are free cores is ruinous" + shown)  # fmt: skip
    add("--gpu-layers", type=int, default=0, metavar="COUNT", help="layers on the GPU, with the CUDA wheel; negative: "
        "all" + shown)  # fmt: skip

    add = parser.add_argument_group("serving").add_argument
    add("--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="or unix:PATH; port 0 takes a free one" + shown)
    add("--api-key", action="append", default=[], metavar="TENANT=KEY", help="may be given again (default: no key is "
        "asked for, and tenants name themselves)")  # fmt: skip
    add("--max-queued", type=_positive, default=256, metavar="TURNS", help="turns that may wait; one more is refused "
        "with 429" + shown)  # fmt: skip
    add("--client-timeout-s", type=_seconds, default=30.0, metavar="SECONDS", help="longest a client may take to send "
        "its request, or may leave its answer unread" + shown)  # fmt: skip
    add("--attach", metavar="unix:PATH", help="the daemon to attach to (default: none; the engine goes by its own "
        "rules)")  # fmt: skip
    add("--peer", metavar="unix:PATH", help="a socket to hand sessions over to and from other engines of this host "
        "(default: none)")  # fmt: skip
    add("--ready-fd", type=int, metavar="FD", help="a descriptor the address is written to as well (default: none)")
    add("--log-level", default="WARNING", choices=["DEBUG", "INFO", "WARNING", "ERROR"], help="default: %(default)s")

    add = parser.add_argument_group("KV memory").add_argument
    add("--kv-tokens", type=_positive, default=16384, metavar="TOKENS", help="on the device, over all sessions" + shown)
    table.add_options(add, _bytes)
    add("--slots", type=_positive, default=32, metavar="COUNT", help="conversations on the device at once" + shown)
    add("--slot-tokens", type=_positive, metavar="TOKENS", help="most tokens of one conversation (default: what the "
        "model and --kv-tokens allow)")  # fmt: skip
    add("--ctx-mode", choices=[mode.value for mode in ContextMode], default=ContextMode.UNIFIED.value, help="unified: "
        "one pool, shared prefixes; split: even parts, bit-exact resume" + shown)  # fmt: skip
    add("--share-prefix-tokens", type=_count, default=32, metavar="TOKENS", help="share prefixes so long or longer; 0: "
        "never" + shown)  # fmt: skip
    add("--anonymous", choices=["keep", "drop"], default="keep", help="KV of turns that name no session: "
        "for the prompt that continues it, or dropped at the turn's end" + shown)  # fmt: skip
    add("--default-policy", choices=[policy.value for policy in IdlePolicy], default=IdlePolicy.RETAIN.value,
        help="what becomes of KV after a turn, unless directed" + shown)  # fmt: skip
    add("--retain-s", type=_seconds, default=30.0, metavar="SECONDS", help="how long `retain` keeps it" + shown)

    add = parser.add_argument_group("batching").add_argument
    add("--max-running", type=_positive, default=16, metavar="TURNS", help="computed together" + shown)
    add("--step-tokens", type=_positive, default=256, metavar="TOKENS", help="most of one step" + shown)
    add("--ubatch-tokens", type=_positive, default=128, metavar="TOKENS", help="computed at once: the most an "
        "interrupt wastes" + shown)  # fmt: skip
    add("--mixed-prefill-tokens", type=_positive, default=64, metavar="TOKENS", help="most prompt tokens of a step "
        "that also decodes" + shown)  # fmt: skip
    return parser


def _serve(options: argparse.Namespace, listener: socket.socket, told: Ending) -> int:
    cache = cache_folder()
    told.cleaning(lambda: remove_scratch(cache))
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
    tiers = table.open_tiers(options, cache, f"{path} {path.stat().st_size} {llama.VERSION}", told.cleaning)
    meter = open_meter(on_gpu=options.gpu_layers != 0 and llama.library().llama_supports_gpu_offload())
    if isinstance(meter, EnergyAbsence):
        _log.info("energy_not_measured reason=%r remedy=%r", meter.reason, meter.remedy)
    engine = Engine(
        model,
        runner,
        EngineConfig(
            kv_tokens=options.kv_tokens,
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
        tiers,
        gamma=gamma_of_gpus(model, options.gpu_layers),
        meter=None if isinstance(meter, EnergyAbsence) else meter,
    )
    engine.cost = load_or_fit(runner, path, options.threads, cache, table.folder_of_disk(tiers))
    engine.start()
    try:
        asyncio.run(_serve_http(options, engine, listener, told))
    finally:
        told.leaving(None)
        engine.stop()
        if not isinstance(meter, EnergyAbsence):
            meter.close()
        runner.close()
        model.close()
    return told.code


class _Server(Server):
    """uvicorn's server without its signal handlers: ending.py has the signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve_http(options: argparse.Namespace, engine: Engine, listener: socket.socket, told: Ending) -> None:
    server: Server

    @asynccontextmanager
    async def while_serving(app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def leave() -> None:
            # Ending the turns first lets open streams close at once instead of at the shutdown's timeout.
            server.should_exit = True
            loop.run_in_executor(None, engine.stop)

        told.leaving(lambda: threadsafe(loop, leave))
        tasks = [asyncio.create_task(_leave_when_failed(engine, server, told))]
        if options.attach:
            tasks.append(asyncio.create_task(_attach(options.attach, engine, peers)))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    handing_over = None
    if options.peer:
        handing_over = PeerService(engine, f"{llama.VERSION} {content_fingerprint(engine.model.path)}")
        await handing_over.start(options.peer)
    keys = dict(_key(entry) for entry in options.api_key)
    timeout_s = options.client_timeout_s
    peers = Peers()
    endpoint = Endpoint(engine, HttpConfig(api_keys=keys, body_timeout_s=timeout_s), peers)
    config = Config(
        endpoint.application(while_serving),
        http=connection_of(timeout_s),
        limit_concurrency=_connections_allowed(),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
        lifespan="on",
        proxy_headers=False,  # who a client is, its socket says and no header
    )
    server = _Server(config)
    listening = _listening(listener)
    engine.listen_addresses = (listening,)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        _announce(listening if listening.startswith("unix:") else f"http://{listening}", options.ready_fd)
    await serving
    if handing_over is not None:
        await handing_over.stop()


async def _leave_when_failed(engine: Engine, server: Server, told: Ending) -> None:
    """Who started us can start another one; a server without an engine is of no use to anybody."""
    while not engine.failed:
        await asyncio.sleep(_FAILURE_CHECK_S)
    told.code = 1
    server.should_exit = True


async def _attach(address: str, engine: Engine, peers: Peers) -> None:
    from ..client import attach

    await attach(address, engine, peers)


def _announce(url: str, ready_fd: int | None) -> None:
    print(f"listening {url}", flush=True)
    if ready_fd is not None:
        os.write(ready_fd, f"{url}\n".encode())
        os.close(ready_fd)


def _listening(listener: socket.socket) -> str:
    """HOST:PORT or unix:PATH."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen_at_path(path: str) -> socket.socket:
    """A unix socket, for its owner and group. One that a dead engine left gives way."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                Path(path).unlink()
            except FileNotFoundError:
                pass
            else:
                raise OSError(errno.EADDRINUSE, "another engine listens there")
        listener.bind(path)
        Path(path).chmod(0o660)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ListenError(f"--listen unix:{path}: {error.strerror or error}: give another path") from None
    return listener


def _listen(address: str) -> socket.socket:
    if address.startswith("unix:"):
        return _listen_at_path(address.removeprefix("unix:"))
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise ListenError(f"--listen {address}: give HOST:PORT, for example 127.0.0.1:8080")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Else the kernel keeps megabytes for each client that does not read, and it takes as long to find out.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    try:
        listener.bind((host.strip("[]") or "127.0.0.1", int(port)))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ListenError(
            f"--listen {address}: {error.strerror}: stop what listens there or give another port"
        ) from None
    return listener


def _connections_allowed() -> int:
    """Raise the limit of open files as far as we may, and leave room in it for files of our own.

    Past it requests are refused with 503, and connections wait to be accepted.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(16, wanted - _OWN_FILES)


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


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds, 0 or more")
    return seconds


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
