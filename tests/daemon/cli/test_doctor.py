"""The doctor: on fake trees, on broken things, and on this machine."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from equipoise.daemon.cli import doctor, doctor_checks
from equipoise.daemon.cli.doctor import examine, fit
from equipoise.daemon.cli.finding import Row, Status
from equipoise.tests.fixtures.daemon_server import DaemonServer
from rich.console import Console

STANDIN = Path(__file__).parents[2] / "fixtures" / "nvml_standin.c"


def only(rows):
    (row,) = rows
    return row


def fake_host(tmp_path, mounts):
    """A /proc with these cgroup mounts; (cgroup_root, proc_root)."""
    root = tmp_path / "cgroup"
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    lines: list[str] = []
    for folder, kind, options, files in mounts:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / folder / name).write_text(text)
        lines.append(f"30 20 0:{len(lines)} / {root / folder} rw - {kind} none rw,{options}")
    (proc / "self" / "mountinfo").write_text("\n".join(lines) + "\n")
    (proc / "self" / "cgroup").write_text("0::/\n")
    return root, proc


def test_a_check_that_throws_is_a_row_and_the_others_still_run():
    def broken():
        raise ZeroDivisionError("by design")

    def fine():
        yield Row("fine", Status.OK, "all is well")

    first, second = examine((("broken", broken), ("fine", fine)))
    assert first.status is Status.ABSENT and "ZeroDivisionError: by design" in first.detail
    assert second.name == "fine"


def test_only_a_required_absence_makes_a_host_unfit():
    assert fit([Row("GPU", Status.ABSENT, "none"), Row("cgroups", Status.DEGRADED, "hybrid", required=True)])
    assert not fit([Row("cgroups", Status.ABSENT, "none", required=True)])


def test_a_host_without_cgroup2_is_told_what_to_mount(tmp_path):
    root, proc = fake_host(tmp_path, [("memory", "cgroup", "memory", {})])
    row = only(doctor_checks.cgroups(root, proc))
    assert row.status is Status.ABSENT and "the daemon runs without" in row.remedy
    assert "mount -t cgroup2" in row.remedy


def test_files_that_a_cgroup_does_not_offer_are_named_and_nothing_is_left(tmp_path):
    root, proc = fake_host(tmp_path, [("", "cgroup2", "nsdelegate", {"cgroup.controllers": "cpu memory pids\n"})])
    before = sorted(root.iterdir())
    row = only(doctor_checks.cgroups(root, proc))
    assert row.status is Status.DEGRADED
    assert "v2 (memory: v2, cpu: v2, pids: v2)" in row.detail
    assert "memory.reclaim" in row.detail and "cgroup.kill" in row.detail
    assert sorted(root.iterdir()) == before


@pytest.mark.kernel
def test_this_host_makes_a_cgroup_and_leaves_none():
    if os.geteuid() != 0:
        pytest.skip("not root")
    row = only(doctor_checks.cgroups())
    assert row.status in (Status.OK, Status.DEGRADED), row
    assert not list(Path("/sys/fs/cgroup").glob(f"**/equipoise-doctor-{os.getpid()}"))


@pytest.mark.kernel
def test_this_kernel_answers_for_every_kind_of_program():
    if os.geteuid() != 0:
        pytest.skip("not root")
    rows = list(doctor_checks.program_kinds())
    assert len({row.name for row in rows}) == len(rows) > 0
    assert all(row.detail for row in rows)


def test_a_kernel_without_psi_is_told_to_boot_with_it(tmp_path):
    row = only(doctor_checks.pressure(tmp_path / "memory"))
    assert (row.status, row.remedy) == (Status.ABSENT, "boot with psi=1")


def test_no_swap_is_absent_and_swap_is_summed(tmp_path):
    header = "Filename Type Size Used Priority\n"
    (tmp_path / "swaps").write_text(header)
    assert only(doctor_checks.swap(tmp_path / "swaps")).status is Status.ABSENT
    (tmp_path / "swaps").write_text(header + "/dev/zram0 partition 2097152 0 100\n")
    assert "2048 MiB" in only(doctor_checks.swap(tmp_path / "swaps")).detail


def test_a_taken_port_is_named_with_the_option_that_moves_it(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        row = only(doctor_checks.ports(str(tmp_path / "none"), (("engine port", port, "--engine-listen"),)))
    assert row.status is Status.DEGRADED and "Address already in use" in row.detail
    assert row.remedy == "give --engine-listen 127.0.0.1:0 or another port"


def test_a_port_held_by_the_running_daemon_is_fine(tmp_path):
    with socket.socket() as taken, DaemonServer(tmp_path / "d.sock") as server:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server.status.engine_url = f"http://127.0.0.1:{port}"
        row = only(doctor_checks.ports(str(server.socket), (("engine port", port, "--engine-listen"),)))
    assert row.status is Status.OK and "held by the running daemon" in row.detail


def test_a_state_folder_is_written_and_left_as_it_was(tmp_path):
    row = only(doctor_checks.state_folder(tmp_path / "not" / "yet"))
    assert row.status is Status.OK and "will be made" in row.detail
    assert list(tmp_path.iterdir()) == []


def test_a_state_folder_that_refuses_is_required_and_absent(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    row = only(doctor_checks.state_folder(tmp_path / "file" / "state"))
    assert row.status is Status.ABSENT and row.required and "Not a directory" in row.detail


def test_a_state_folder_too_long_for_a_socket_is_refused(tmp_path):
    row = only(doctor_checks.state_folder(tmp_path / ("x" * 120)))
    assert row.status is Status.ABSENT and row.remedy == "give --state-dir a shorter path"


def test_a_model_that_is_no_gguf_is_one_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + b"x" * 100)
    row = only(doctor_checks.model_file(str(tmp_path / "model.gguf")))
    assert row.status is Status.ABSENT and "not a GGUF" in row.detail


def test_a_daemon_that_does_not_run_is_named_with_its_socket(tmp_path):
    row = only(doctor_checks.daemon(str(tmp_path / "none.sock")))
    assert row.status is Status.ABSENT and "none.sock" in row.detail


def test_a_running_daemon_says_what_it_lacks(tmp_path):
    with DaemonServer(tmp_path / "d.sock") as server:
        server.status.lacks.append("no GPU")
        row = only(doctor_checks.daemon(str(server.socket)))
    assert row.status is Status.DEGRADED and row.remedy == "no GPU"


def test_the_table_ends_with_the_verdict():
    text = io.StringIO()
    rows = [Row("cgroups", Status.ABSENT, "none [here]", "mount one", required=True), Row("GPU", Status.ABSENT, "none")]
    doctor.show(rows, Console(file=text, width=100))
    assert "none [here]" in text.getvalue()
    assert text.getvalue().strip().endswith("the daemon cannot run here: cgroups")


def run_doctor(*arguments, **environment):
    return subprocess.run(
        (sys.executable, "-m", "equipoise.daemon.cli", "doctor", *arguments),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.kernel
def test_the_command_tells_json_about_this_machine(tmp_path):
    done = run_doctor("--json", "--socket", str(tmp_path / "none.sock"))
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["fit"] else 1)
    names = {row["name"] for row in told["rows"]}
    assert {"host", "cgroups", "pressure (PSI)", "probes", "engine library", "model", "state folder", "daemon"} <= names
    joining = [row["status"] for row in told["rows"] if row["name"] == "joining sessions to sandboxes"]
    probed = next(row for row in told["rows"] if row["name"] == "probes")
    assert joining == ([] if probed["status"] == "absent" else ["absent" if "set_state" in probed["detail"] else "ok"])
    assert {row["status"] for row in told["rows"]} <= {"ok", "degraded", "absent"}
    assert not any("the check itself failed" in row["detail"] for row in told["rows"]), told


@pytest.mark.kernel
def test_a_gpu_is_shown_with_its_memory_and_a_stand_in_says_so(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: apt install gcc")
    subprocess.run((compiler, "-shared", "-fPIC", "-o", str(tmp_path / "libnvidia-ml.so.1"), str(STANDIN)), check=True)
    done = run_doctor("--json", LD_LIBRARY_PATH=str(tmp_path))
    gpus = [row for row in json.loads(done.stdout)["rows"] if row["name"].startswith("GPU")]
    assert [row["name"] for row in gpus] == ["GPU 0 (NVML)", "GPU 1 (NVML)"]
    assert gpus[0]["detail"] == "stand-in GPU 0, driver stand-in 1.0: 10.0 of 80.0 GiB used"
