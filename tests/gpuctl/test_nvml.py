"""NVML facts: the real binding against a stand-in library that this test compiles, and against what this host has."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from equipoise.gpuctl.nvml import Nvml, NvmlAbsence, open_nvml

SOURCE = Path(__file__).parent.parent / "fixtures" / "nvml_standin.c"
ASK = """
import json
import os
from dataclasses import asdict
from equipoise.gpuctl.nvml import Nvml, memory, open_nvml
if "memory" in os.environ.get("ASK", ""):
    print(json.dumps(memory()))
    raise SystemExit
opened = open_nvml()
if isinstance(opened, Nvml):
    print(json.dumps({"driver": opened.driver_version, "gpus": [asdict(gpu) for gpu in opened.sample()]}))
    opened.close()
    opened.close()
else:
    print(json.dumps(asdict(opened)))
"""


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """Folder with a stand-in libnvidia-ml.so.1."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: apt install gcc")
    folder = tmp_path_factory.mktemp("nvml")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run((compiler, "-shared", "-fPIC", "-o", str(library), str(SOURCE)), check=True)
    return folder


def ask(folder, **environment):
    """What open_nvml() says in a process that finds the stand-in first."""
    variables = {**os.environ, "LD_LIBRARY_PATH": str(folder), **environment}
    done = subprocess.run((sys.executable, "-c", ASK), env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_every_figure_is_read_in_base_units(standin):
    answer = ask(standin)
    assert answer["driver"] == "stand-in 1.0"
    first, second = answer["gpus"]
    assert (first["index"], first["uuid"], first["name"]) == (0, "GPU-stand-in-0", "stand-in GPU 0")
    assert second["name"] == "stand-in GPU 1"
    assert first["memory_total_bytes"] == 80 << 30
    assert first["memory_used_bytes"] == 10 << 30, "without the driver's reservation"
    assert (first["busy_ratio"], first["memory_busy_ratio"]) == (0.75, 0.4)
    assert (first["power_watts"], first["energy_joules"]) == (412.5, 1234567.89)


def test_processes_carry_their_memory_or_none_where_it_is_not_told(standin):
    processes = ask(standin)["gpus"][0]["processes"]
    assert processes == [{"pid": 4321, "used_bytes": 9 << 30}, {"pid": 4322, "used_bytes": None}]


def test_memory_is_the_sum_over_all_gpus(standin):
    assert ask(standin, ASK="memory") == [160 << 30, 20 << 30]


def test_memory_that_no_gpu_tells_is_none(standin):
    assert ask(standin, ASK="memory", NVML_STANDIN_BARE="1") is None


def test_an_old_driver_is_asked_the_old_way(standin):
    assert ask(standin, NVML_STANDIN_OLD="1")["gpus"][0]["memory_used_bytes"] == 11 << 30


def test_a_gpu_that_offers_nothing_has_none_and_never_zero(standin):
    gpu = ask(standin, NVML_STANDIN_BARE="1", NVML_STANDIN_COUNT="1")["gpus"][0]
    assert gpu.pop("name") == "stand-in GPU 0" and gpu.pop("uuid") == "GPU-stand-in-0" and gpu.pop("index") == 0
    assert set(gpu.values()) == {None}


def test_a_gpu_that_is_lost_is_left_out(standin):
    assert [gpu["index"] for gpu in ask(standin, NVML_STANDIN_LOST="0")["gpus"]] == [1]


def test_a_driver_without_a_gpu_is_an_absence(standin):
    assert ask(standin, NVML_STANDIN_COUNT="0")["reason"] == "the driver is loaded and sees no GPU"


def test_a_library_without_its_driver_is_an_absence_with_a_remedy(standin):
    answer = ask(standin, NVML_STANDIN_NO_DRIVER="1")
    assert answer["reason"].startswith("NVML does not start")
    assert "modprobe nvidia" in answer["remedy"]


def test_this_host_answers_one_way_or_the_other():
    opened = open_nvml()
    if isinstance(opened, NvmlAbsence):
        assert opened.reason and opened.remedy
        return
    assert isinstance(opened, Nvml)
    assert all(gpu.uuid for gpu in opened.sample())
    opened.close()
    assert opened.sample() == ()
