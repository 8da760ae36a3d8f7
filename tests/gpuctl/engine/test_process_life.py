"""How the engine's process starts and ends: signals, faults of ours, its command line, and what each bad start says."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from equipoise.tests.gpuctl.engine.processes import failing, running, start

pytestmark = pytest.mark.engine


ASK = [{"role": "user", "content": "Name three colours."}]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_process_under_load_cleanly(tmp_path, number, code):
    options = ("--kv-tokens", "512", "--slots", "2", "--disk-bytes", "1MiB", "--disk-folder", str(tmp_path))
    with running(*options) as engine:
        assert list(tmp_path.iterdir())
        body = {"messages": ASK, "max_tokens": 400, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{engine.url}/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine.process.send_signal(number)
            rest = list(lines)
            assert engine.process.wait(timeout=60) == code
        assert len(rest) < 400, "it ended before the turn did"
        assert "stopping" in rest[-2], "a stream that is cut says so"
    assert not list(tmp_path.iterdir())


# Stands for any fault of ours: the step loop meets an exception nobody foresaw.
FAULTY_ENGINE = """
import sys
from equipoise.gpuctl.engine.__main__ import main
from equipoise.gpuctl.engine.schedule.scheduler import Scheduler

produced, left = Scheduler.produced, 20

def faulty(scheduler, session_id):
    global left
    left -= 1
    produced(scheduler, session_id)
    if left < 0:
        raise ZeroDivisionError("a fault of ours")

Scheduler.produced = faulty
sys.exit(main())
"""


def test_a_fault_of_the_engine_ends_its_streams_with_an_error_and_the_process_with_code_1(tmp_path, model):
    options = ("--disk-bytes", "1MiB", "--disk-folder", str(tmp_path))
    with running(*options, program=("-c", FAULTY_ENGINE)) as engine:
        body = {"messages": ASK, "max_tokens": 400, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{engine.url}/v1/chat/completions", json=body) as answer:
            lines = list(answer.iter_lines())
        assert sum('"delta"' in line for line in lines) > 10
        assert "the engine has failed and ends: its log says why" in lines[-2]
        assert engine.process.wait(timeout=15) == 1
        assert engine.process.stderr is not None
        errors = engine.process.stderr.read()
    assert "engine_failed turns=1" in errors
    assert "ZeroDivisionError: a fault of ours" in errors
    assert not list(tmp_path.iterdir()), "its swap folder is gone"


def test_the_command_of_equipoise_shows_its_own_name_examples_and_defaults():
    command = [sys.executable, "-m", "equipoise.daemon.cli", "engine"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
    assert shown.startswith("usage: equipoise engine")
    assert "  equipoise engine --model" in shown
    options = re.findall(r"^  (--\S+).*(?:\n {4,}.*)*", shown, re.MULTILINE)
    for text in re.findall(r"^  --.*(?:\n {4,}.*)*", shown, re.MULTILINE):
        assert "default: " in " ".join(text.split()), text
    assert len(options) > 20
    wrong = subprocess.run([*command, "--kv-tokens", "none"], capture_output=True, text=True, timeout=30, check=False)
    assert wrong.returncode == 2
    assert "whole number above 0" in wrong.stderr


# Starts that must fail


def test_a_port_in_use_is_one_line_and_an_exit_code():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, errors = failing("--listen", f"127.0.0.1:{port}")
    assert code == 1
    assert errors.count("\n") == 1
    assert str(port) in errors
    assert "another port" in errors


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "no such model file"),
        (b"not a model at all, sorry", "not a GGUF"),
        (b"GGUF", "not a GGUF"),
        (b"GGUF\x63\x00\x00\x00" + bytes(16), "version 99"),
        (b"GGUF\x03\x00\x00\x00" + b"\x01" + bytes(7) + b"\x01" + bytes(7) + b"\xff" * 64, "cannot load it"),
    ],
)
def test_a_broken_model_file_is_one_line_and_an_exit_code(tmp_path, content, word):
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    code, errors = failing("--listen", "127.0.0.1:0", "--model", str(path))
    assert code == 1
    assert errors.count("\n") == 1
    assert word in errors
    assert str(path) in errors


def test_a_truncated_model_is_refused_before_it_serves(tmp_path, model):
    path = tmp_path / "half.gguf"
    with model.path.open("rb") as whole:
        path.write_bytes(whole.read(20_000_000))
    code, errors = failing("--listen", "127.0.0.1:0", "--model", str(path))
    assert code == 1
    assert "half.gguf" in errors
    assert errors.count("\n") == 1


def test_an_address_that_is_none_is_one_line():
    code, errors = failing("--listen", "nonsense")
    assert (code, errors.count("\n")) == (1, 1)
    assert "HOST:PORT" in errors


def test_keys_are_asked_for_where_given(model):
    with running("--kv-tokens", "512", "--slots", "2", "--api-key", "blue=secret") as engine:
        ask = {"messages": ASK, "max_tokens": 1}
        url = f"{engine.url}/v1/chat/completions"
        assert httpx.post(url, json=ask).status_code == 401
        assert httpx.post(url, json=ask, headers={"Authorization": "Bearer wrong"}).status_code == 401
        good = httpx.post(url, json=ask, headers={"Authorization": "Bearer secret"}, timeout=30)
        assert good.status_code == 200


def test_an_unknown_option_is_told_by_the_command_line():
    process = start("--nonsense")
    process.communicate(timeout=30)
    assert process.returncode == 2
