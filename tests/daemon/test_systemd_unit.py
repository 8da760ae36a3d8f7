"""The unit file: systemd accepts it, and it says what the daemon relies on."""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import equipoise
import pytest

UNIT = Path(equipoise.__file__).parent / "daemon" / "systemd" / "equipoised.service"
SANDBOXES = UNIT.with_name("equipoise-sandboxes.service")


def read(unit: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return parser


@pytest.fixture(scope="module")
def service():
    return read(UNIT)["Service"]


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt install systemd")
    copies = [tmp_path / unit.name for unit in (UNIT, SANDBOXES)]
    for unit, copy in zip((UNIT, SANDBOXES), copies, strict=True):
        copy.write_text(unit.read_text().replace("/usr/local/bin/equipoise", sys.executable))
    command = ("systemd-analyze", "verify", "--man=no", *map(str, copies))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "equipoise" in line]
    assert ours == [] and done.returncode == 0, done.stderr


def test_readiness_and_watchdog_are_what_notify_speaks(service):
    assert service["Type"] == "notify" and service["NotifyAccess"] == "main"
    assert 5 <= int(service["WatchdogSec"]) <= 60


def test_sandboxes_have_a_delegated_cgroup_that_the_daemon_does_not_take_along(service):
    sandboxes = read(SANDBOXES)["Service"]
    assert (sandboxes["Delegate"], sandboxes["KillMode"]) == ("yes", "control-group")
    assert "Delegate" not in service
    assert read(UNIT)["Unit"]["Requires"] == SANDBOXES.name
    for entry in ("ExecStart", "ExecStopPost"):
        words = shlex.split(service[entry])
        assert words[words.index("--cgroup-base") + 1] == f"{sandboxes['Slice']}/{SANDBOXES.name}"


def test_what_ebpf_and_cgroups_need_is_not_taken_away(service):
    capabilities = set(service["CapabilityBoundingSet"].split())
    assert {"CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_KILL"} <= capabilities
    forbidden = ("ProtectControlGroups", "ProtectKernelTunables", "ProtectProc", "PrivateDevices", "ProtectClock")
    assert not [name for name in forbidden if name in service]
    assert service["LimitMEMLOCK"] == "infinity"


def test_what_was_held_is_released_whatever_ended_the_daemon(service):
    assert shlex.split(service["ExecStopPost"])[:2] == ["-/usr/local/bin/equipoise", "release"]
    assert service["KillMode"] == "mixed"


@pytest.mark.parametrize("entry", ["ExecStart", "ExecStopPost"])
def test_every_option_in_the_unit_is_one_of_the_command(service, entry):
    words = [word for word in shlex.split(service[entry]) if not word.startswith("$")]
    argv = (sys.executable, "-m", "equipoise.daemon.cli", words[1], "--help")
    told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    for option in (word for word in words if word.startswith("--")):
        assert option in told


def test_its_folders_are_the_ones_the_paths_name(service):
    assert service["RuntimeDirectory"] == service["StateDirectory"] == service["CacheDirectory"] == "equipoise"
    assert set(re.findall(r"%[a-zA-Z]/(\S+?)/", service["ExecStart"])) == {"equipoise"}
    assert Path(shlex.split(service["ExecStart"])[3]).name == "equipoise.sock"
