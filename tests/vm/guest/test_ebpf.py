"""The project's BPF objects on the newer kernel: CO-RE from the kernel they were written on to this one.

Tests of tests/kernel/ebpf run here a second time: loading, lineage, memory per tool call and stopping at the budget. A
choice of them, since each starts interpreters, which is slow here; what is left out differs in user space only.
"""

import pytest

pytest.register_assert_rewrite(
    *(f"equipoise.tests.kernel.ebpf.test_{name}" for name in ("budget", "lineage", "loading", "memory"))
)

from equipoise.tests.kernel.ebpf.conftest import bench, make_bench, memory_cgroup  # noqa: E402, F401
from equipoise.tests.kernel.ebpf.test_budget import (  # noqa: E402, F401
    test_a_stale_heartbeat_stops_nobody_and_is_counted,
    test_a_tool_call_that_is_stopped_can_be_killed_alone,
    test_at_its_hard_budget_a_tool_call_stops_within_a_mebibyte_and_goes_on_when_granted,
    test_closing_the_probes_stops_nobody_afterwards,
    test_continuing_without_a_grant_stops_it_again,
    test_overshoot_stays_below_a_mebibyte_with_threads,
    test_siblings_stop_when_they_charge_next_and_all_continue_together,
    test_the_soft_budget_is_told_once_and_again_after_it_changed,
    test_what_was_lost_is_found_again,
)
from equipoise.tests.kernel.ebpf.test_lineage import (  # noqa: E402, F401
    test_a_killed_tool_call_reports_its_signal,
    test_a_process_handed_over_by_a_hook_becomes_a_tool_call,
    test_a_setsid_double_fork_keeps_the_tag_and_counts_as_escaped,
    test_an_agent_that_execs_itself_stays_the_agent,
    test_an_exec_under_an_agent_is_a_tool_call_with_its_command_line,
    test_each_exec_of_the_agent_is_a_tool_call_of_its_own,
    test_execs_inside_a_tool_call_belong_to_it,
)
from equipoise.tests.kernel.ebpf.test_loading import (  # noqa: E402, F401
    test_capabilities_are_found_by_trying,
    test_closing_leaves_no_program_behind,
    test_every_program_of_the_object_loads_and_attaches,
)
from equipoise.tests.kernel.ebpf.test_memory import (  # noqa: E402, F401
    eager_khugepaged,
    test_memory_given_back_is_counted_down,
    test_memory_that_the_kernel_adds_on_its_own_is_counted_though_the_process_stands_still,
    test_readings_on_a_machine_with_many_cpus_stay_within_five_percent,
    test_the_books_are_empty_when_everything_has_ended,
    test_the_peak_of_a_tree_is_what_its_memory_cgroup_counted,
    test_the_peak_of_one_process_is_what_the_kernel_calls_its_high_water_mark,
    test_threads_of_one_process_count_its_memory_once,
    test_workers_that_share_one_mapping_hold_it_once,
)

pytestmark = pytest.mark.vm


def test_every_tool_call_of_a_churn_of_processes_begins_and_ends_though_programs_are_preempted(bench):  # noqa: F811
    """Here tracepoints are preemptible, and the kernel skips a program in some 2 % of the forks: see lineage.bpf.c."""
    churn = "for n in $(seq 60); do (true | /bin/true; /bin/true &) ; done; wait"
    agent, _ = bench.agent(
        f"ts = [subprocess.Popen(['sh', '-c', {churn!r}]) for _ in range(4)]; [t.wait() for t in ts]"
    )
    bench.finish(agent)
    bench.wait(lambda: not bench.tools.tags(), "the last process", timeout_s=60)
    assert len(bench.started()) == 4
    assert bench.tools.processes(bench.started()[0].id) == ()
    assert bench.tools.losses().events_count == 0
