"""Energy counters: RAPL on a tree of files, NVML through the compiled stand-in, and what this host has."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from equipoise.gpuctl.energy import (
    CpuEnergy,
    EnergyAbsence,
    EnergyMeter,
    cpu_energy,
    gpu_energy,
    open_meter,
)

SOURCE = Path(__file__).parent.parent / "fixtures" / "nvml_standin.c"
RANGE_UJ = 262_143_328_850


def domain(root: Path, folder: str, name: str, energy_uj: int, range_uj: int = RANGE_UJ) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path


def use(folder: Path, energy_uj: int) -> None:
    (folder / "energy_uj").write_text(f"{energy_uj}\n")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return domain(tmp_path, "intel-rapl:0", "package-0", 5_000_000)


def opened(root: Path) -> CpuEnergy:
    found = cpu_energy(root)
    assert isinstance(found, CpuEnergy)
    return found


def test_energy_is_what_the_counter_grew_in_joules(package, tmp_path):
    cpu = opened(tmp_path)
    assert cpu.joules() == 0.0
    use(package, 7_500_000)
    assert cpu.joules() == 2.5
    use(package, 7_500_001)
    assert cpu.joules() == 2.500001
    cpu.close()
    cpu.close()


def test_a_counter_that_wrapped_goes_on(package, tmp_path):
    use(package, RANGE_UJ - 999_999)
    cpu = opened(tmp_path)
    use(package, 2_000_000)
    assert cpu.joules() == 3.0
    use(package, RANGE_UJ)
    before = cpu.joules()
    assert before is not None
    use(package, 0)
    assert cpu.joules() == pytest.approx(before + 1e-6)
    cpu.close()


def test_packages_and_dram_are_added_and_what_is_part_of_them_is_not(package, tmp_path):
    others = [
        domain(tmp_path, folder, name, 0)
        for folder, name in (
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "uncore"),
            ("intel-rapl:2", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
        )
    ]
    counted = [domain(tmp_path, "intel-rapl:1", "package-1", 0), domain(tmp_path, "intel-rapl:1:0", "dram", 0)]
    cpu = opened(tmp_path)
    for folder in others:
        use(folder, 1_000_000_000)
    use(package, 6_000_000)
    use(counted[0], 10_000_000)
    use(counted[1], 100_000_000)
    assert cpu.joules() == 111.0
    cpu.close()


def test_no_rapl_is_an_absence_with_a_remedy(tmp_path):
    absence = cpu_energy(tmp_path / "missing")
    assert isinstance(absence, EnergyAbsence)
    assert "no RAPL package" in absence.reason and "modprobe" in absence.remedy


def test_a_counter_that_may_not_be_read_is_an_absence_that_says_so(package, tmp_path):
    domain(tmp_path, "intel-rapl:1", "package-1", 0)
    # Root reads files of mode 0: a folder in its place cannot be read by anybody.
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:1" / "energy_uj").mkdir()
    before = len([*Path("/proc/self/fd").iterdir()])
    absence = cpu_energy(tmp_path)
    assert isinstance(absence, EnergyAbsence)
    assert "energy_uj" in absence.reason and "root" in absence.remedy
    assert len([*Path("/proc/self/fd").iterdir()]) == before, "the package that could be read is closed again"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_without_root_the_counter_is_an_absence(package, tmp_path):
    (package / "energy_uj").chmod(0o000)
    assert isinstance(cpu_energy(tmp_path), EnergyAbsence)


def test_a_counter_of_nonsense_is_an_absence(package, tmp_path):
    (package / "energy_uj").write_text("much\n")
    assert isinstance(cpu_energy(tmp_path), EnergyAbsence)


def test_a_counter_that_fails_later_answers_none_is_said_once_and_comes_back(package, tmp_path, caplog):
    meter = open_meter(on_gpu=False, root=tmp_path)
    assert isinstance(meter, EnergyMeter)
    assert meter.names == ("cpu",)
    assert meter.joules() == 0.0
    (package / "energy_uj").write_text("")
    with caplog.at_level(logging.WARNING):
        assert meter.joules() is None
        assert meter.joules() is None
    assert [r.message for r in caplog.records] == ["energy_unreadable counter=cpu"]
    use(package, 6_000_000)
    assert meter.joules() == 1.0
    meter.close()


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """Folder with a stand-in libnvidia-ml.so.1."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: apt install gcc")
    folder = tmp_path_factory.mktemp("nvml")
    subprocess.run((compiler, "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)), check=True)
    return folder


def ask(standin: Path, root: Path, pid: int = 4321, **environment: str):
    """Names and four readings of the meter of a process on GPUs, or the absence, in a process with the stand-in."""
    script = f"""
import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path
from equipoise.gpuctl.energy import EnergyAbsence, open_meter
os.getpid = lambda: {pid}
meter = open_meter(on_gpu=True, root=Path({str(root)!r}))
if isinstance(meter, EnergyAbsence):
    print(json.dumps(asdict(meter)))
else:
    print(json.dumps([meter.names, [meter.joules() for _ in range(4)]]))
    meter.close()
    assert meter.joules() is None
"""
    variables = {**os.environ, "LD_LIBRARY_PATH": str(standin), **environment}
    done = subprocess.run((sys.executable, "-c", script), env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def growth(readings: list[float]) -> list[float]:
    return [round(later - sooner, 6) for sooner, later in itertools.pairwise(readings)]


def test_the_gpus_a_process_computes_on_are_added(standin, tmp_path):
    names, readings = ask(standin, tmp_path, NVML_STANDIN_ENERGY_STEP="250")
    assert names == ["gpu"]
    assert growth(readings) == [1.0, 1.0, 1.0]  # two GPUs, each asked once a reading: 2 x 2 x 250 mJ


def test_the_cpu_is_added_to_the_gpus_where_it_can_be_read(standin, package, tmp_path):
    assert ask(standin, tmp_path)[0] == ["gpu", "cpu"]


def test_with_several_gpus_and_none_that_shows_the_process_nothing_is_guessed(standin, package, tmp_path):
    assert "2 GPUs" in ask(standin, tmp_path, pid=1)["reason"]


def test_a_lone_gpu_is_ours_even_where_it_does_not_show_the_process(standin, tmp_path):
    assert ask(standin, tmp_path, pid=1, NVML_STANDIN_COUNT="1")[0] == ["gpu"]


def test_a_gpu_that_does_not_count_leaves_the_cpu_from_passing_for_the_whole(standin, package, tmp_path):
    answer = ask(standin, tmp_path, NVML_STANDIN_BARE="1", NVML_STANDIN_COUNT="1")
    assert answer["reason"] == "the GPU does not count its energy"


def test_a_gpu_lost_later_makes_its_readings_none(standin, tmp_path):
    # One reading is taken at the start, by the sample that finds the GPU.
    _, readings = ask(standin, tmp_path, NVML_STANDIN_COUNT="1", NVML_STANDIN_ENERGY_FAILS_AFTER="3")
    assert readings[:2] == [1234567.89, 1234567.89]
    assert readings[2:] == [None, None]


def test_this_host_answers_one_way_or_the_other():
    for found in (cpu_energy(), gpu_energy(os.getpid())):
        if isinstance(found, EnergyAbsence):
            assert found.reason and found.remedy
        else:
            joules = found.joules()
            assert joules is None or joules >= 0
            found.close()
