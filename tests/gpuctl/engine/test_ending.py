"""A signal ends the engine at any moment of its start, and nothing half made stays behind.

Moments are told by what the process has done (its CPU time, what it says, which signals it catches), never by the
clock: beside other load they are the same ones.
"""

from __future__ import annotations

import select
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from equipoise.gpuctl.engine.compute.model import PREPARED_GGUF
from equipoise.tests.gpuctl.engine.processes import PROGRAM, start

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MOMENTS = 100
PYTHONS_MOMENTS = 15
"""Of the 100, those before or about our first line, when the interpreter starts: 3 on an idle machine."""
PROGRAMS = (PROGRAM, ("-m", "equipoise.daemon.cli", "engine"))
CODES = ((signal.SIGTERM, 0), (signal.SIGINT, 130))
PATIENCE_S = 30
"""A process that was not ended serves for ever."""


def options(folder: Path) -> tuple[str, ...]:
    return ("--listen", "127.0.0.1:0", "--disk-bytes", "1MiB", "--disk-folder", str(folder))


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    """CPU time of a living process, as clock_getcpuclockid(3) has it read."""
    return time.clock_gettime((~process.pid << 3) | 2)


def serves(process: subprocess.Popen[str], wait_s: float = 0.001) -> bool:
    """Whether it has said its first line."""
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], wait_s)[0])


def catches_interrupts(process: subprocess.Popen[str]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught & 1 << signal.SIGINT - 1)


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int | None, str]:
    """Exit code and stderr; no code where the signal did not end it."""
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[1]
    return process.returncode, errors


def cache_with_model(folder: Path, model: Path) -> dict[str, str]:
    """The environment that makes `folder` the cache: with the model in it, without a cost file."""
    folder.mkdir()
    (folder / PREPARED_GGUF).symlink_to(model)
    return {"EQUIPOISE_CACHE": str(folder)}


def test_a_signal_ends_a_process_at_each_of_100_moments_of_its_start(tmp_path, model):
    environment = cache_with_model(tmp_path / "cache", model.path)
    whole_s = {}
    for program in (PROGRAM, *PROGRAMS):  # the first one fits the costs
        process = start(*options(tmp_path / "first"), program=program, environment=environment)
        assert serves(process, wait_s=120)
        whole_s[program] = cpu_seconds(process)
        assert end(process, signal.SIGTERM)[0] == 0
    cached = set((tmp_path / "cache").iterdir())
    assert len(cached) == 2, "model and costs"

    def fault_at(moment: int) -> str:
        program, (number, code) = PROGRAMS[moment % 2], CODES[moment // 2 % 2]
        folder = tmp_path / f"moment-{moment}"
        process = start(*options(folder), program=program, environment=environment, in_background=True)
        while cpu_seconds(process) < whole_s[program] * moment / MOMENTS and not serves(process):
            pass
        if number is signal.SIGINT and moment < PYTHONS_MOMENTS:
            # As it was started the kernel throws it away until our first line is reached.
            while not catches_interrupts(process):
                time.sleep(0.001)
        found, errors = end(process, number)
        left = list(folder.iterdir()) if folder.exists() else []
        codes = {code, -number} if number is signal.SIGTERM and moment < PYTHONS_MOMENTS else {code}
        if found in codes and not left and not errors:
            return ""
        return f"{moment} {number.name} {program[1]}: code {found}, left {left}, said {errors[-500:]!r}"

    with ThreadPoolExecutor(2) as two:
        assert not [fault for fault in two.map(fault_at, range(MOMENTS)) if fault]
    assert set((tmp_path / "cache").iterdir()) == cached


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_while_it_prepares_the_model_leaves_no_half_of_it(tmp_path, model, number, code):
    process = start(*options(tmp_path / "swap"), environment={"EQUIPOISE_CACHE": str(tmp_path / "cache")})
    assert process.stderr is not None
    while " of " not in (line := process.stderr.readline()):
        assert line, "it went on without preparing"
    assert len(list((tmp_path / "cache").iterdir())) == 1
    found, errors = end(process, number)
    assert (found, list((tmp_path / "cache").iterdir())) == (code, []), errors


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_while_it_fits_the_costs_leaves_no_half_of_them(tmp_path, model, number, code):
    environment = cache_with_model(tmp_path / "cache", model.path)
    process = start(*options(tmp_path / "swap"), environment=environment)
    while not (tmp_path / "swap").exists() or not list((tmp_path / "swap").glob("engine-*/lock")):
        time.sleep(0.001)
    from_here_s = cpu_seconds(process)  # what remains is the fit: seconds of computing
    while cpu_seconds(process) < from_here_s + 0.5:
        time.sleep(0.001)
    found, errors = end(process, number)
    assert found == code, errors
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / PREPARED_GGUF]
    assert not list((tmp_path / "swap").iterdir())
