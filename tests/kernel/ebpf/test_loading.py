"""Loading on the running kernel: what is reported, what is refused, what is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from equipoise.ebpf import build
from equipoise.ebpf.abi import ABI_VERSION
from equipoise.ebpf.capabilities import CapabilityState, probe_program_kinds
from equipoise.ebpf.errors import ProbesUnavailable
from equipoise.ebpf.probes import ProgramState, Tuning

pytestmark = pytest.mark.kernel


def program_descriptors():
    """This process's descriptors of BPF programs."""
    found = []
    for path in Path("/proc/self/fdinfo").iterdir():
        try:
            if "prog_type:" in path.read_text():
                found.append(path.name)
        except OSError:
            continue  # the descriptor of the walk itself
    return found


def test_every_program_of_the_object_loads_and_attaches(bench):
    report = bench.tools.report
    names = {"on_fork", "on_exec", "on_exit", "on_rss_stat", "retag_process", "learn_cpus"}
    names |= {"on_connect", "on_connect_again", "on_signal"}
    names |= {"on_fork_again", "on_exec_again", "on_exit_again", "bury_process"}
    assert {p.name for p in report.programs if p.state is ProgramState.ATTACHED} == names
    assert len(report.programs) == len(names)
    assert report.counts_memory
    assert report.sees_connections
    assert report.exact_counters


def test_closing_leaves_no_program_behind(make_bench):
    before = len(program_descriptors())
    bench = make_bench()
    assert len(program_descriptors()) > before
    bench.tools.close()
    assert len(program_descriptors()) == before


def test_two_loads_live_side_by_side(make_bench):
    one, two = make_bench(), make_bench()
    agent, tag = one.agent("run('pass')")
    one.finish(agent)
    two.tick()
    assert len(one.started()) == 1
    assert two.events == []
    assert two.tools.usage(tag) is None


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (f"#define ABI_VERSION {ABI_VERSION}", "#define ABI_VERSION 999", r"ABI 999, expected \d+"),
        ("sender_pid", "sender_tgid", "EVENT_TOOL_CALL_SIGNALLED: .* the second has no sender_pid"),
    ],
)
def test_an_object_of_another_abi_is_refused_with_the_remedy(bench, tmp_path, monkeypatch, before, after, said):
    sources = tmp_path / "src"
    sources.mkdir()
    for path in build.SOURCES.glob("*.[ch]"):
        (sources / path.name).write_text(path.read_text().replace(before, after))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "OBJECTS", tmp_path / "objects")
    loaded = len(program_descriptors())
    with pytest.raises(ProbesUnavailable, match=rf"{said}; rebuild it with `make ebpf`"):
        type(bench)(Tuning())
    assert len(program_descriptors()) == loaded


def test_a_program_the_kernel_refuses_is_reported_alone(bench, tmp_path, monkeypatch):
    sources = tmp_path / "src"
    sources.mkdir()
    for path in build.SOURCES.glob("*.[ch]"):
        text = path.read_text().replace('SEC("tp_btf/rss_stat")', 'SEC("tp_btf/no_such_tracepoint")')
        (sources / path.name).write_text(text)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "OBJECTS", tmp_path / "objects")
    partial = type(bench)(Tuning())
    try:
        report = partial.tools.report
        assert [p.name for p in report.programs if p.state is ProgramState.REFUSED] == ["on_rss_stat"]
        assert "no_such_tracepoint" in next(p.reason for p in report.programs if p.name == "on_rss_stat")
        assert not report.counts_memory
        agent, _ = partial.agent("run('pass')")
        partial.finish(agent)
        assert len(partial.started()) == 1, "lineage works without memory"
    finally:
        partial.close()


def test_capabilities_are_found_by_trying():
    found = {capability.kind: capability for capability in probe_program_kinds()}
    for kind in ("tp_btf", "rss_stat", "iter_task", "ring_buffer", "task_storage", "mmapable_array"):
        assert found[kind].usable, found[kind]
    for capability in found.values():
        assert capability.usable or capability.reason, f"{capability.kind}: a refusal says why"
        assert "\n" not in (capability.reason or "")
    assert found["memcg_bpf_ops"].state in (CapabilityState.ABSENT, CapabilityState.LOADED)


def test_without_privileges_the_process_gets_an_error_not_a_crash():
    code = (
        "import os\n"
        "from equipoise.ebpf.errors import ProbesUnavailable\n"
        "from equipoise.ebpf.probes import Probes\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "os.geteuid = lambda: 0\n"  # even when it believes that it may
        "try: Probes.load()\n"
        "except ProbesUnavailable as error: print('unavailable:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("unavailable:")
