"""What the daemon says of itself: the status rpc, the figures of its metrics, the line for systemctl."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .. import __version__
from ..gpuctl.hook import EngineHook
from ..policies.state import State
from .api.v1 import policy_pb2
from .engine_process import EngineProcess
from .loop import Loop
from .observe.history import History
from .observe.journal import Journal
from .observe.kernel import KernelEvents
from .observe.metrics import MetricsFacts
from .observe.sources import Source
from .observe.tallies import Tallies
from .policy import PolicyKeeper


@dataclass(slots=True)
class Host:
    """What was found on this host when the daemon started."""

    cgroup_layout: str = "none"
    probe_backend: str = "none"
    metrics_url: str = ""
    lacks: list[str] = field(default_factory=list)
    """What it does not offer, one line each."""
    adopted: str = ""
    """What was taken up again of an earlier run, in one line."""


@dataclass(slots=True)
class Status:
    """Reads the other parts; changes none."""

    host: Host
    state: State
    loop: Loop
    kernel: KernelEvents
    history: History
    tallies: Tallies
    journal: Journal
    journal_path: Path
    hook: EngineHook
    policy: PolicyKeeper
    started_ns: int
    sources: list[Source] = field(default_factory=list)
    engine: EngineProcess | None = None

    def answer(self) -> policy_pb2.GetStatusResponse:
        failure = self.engine.failure if self.engine else None
        return policy_pb2.GetStatusResponse(
            version=__version__,
            probe_backend=self.host.probe_backend,
            cgroup_layout=self.host.cgroup_layout,
            policy_name=self.state.policy.name,
            engine_url=(self.engine.url if self.engine else None) or "",
            metrics_url=self.host.metrics_url,
            ring_drop_count=self.kernel.lost_count,
            late_event_count=self.late_count,
            failed_action_count=self.history.failed_action_count,
            lacks=self.host.lacks + ([f"engine: {failure}"] if failure else []),
            losses=self.kernel.losses(),
            unrecorded_call_count=self.kernel.unrecorded_count,
            started_ns=self.started_ns,
            journal_path=str(self.journal_path),
            adopted=self.host.adopted,
            policy_mode=self.state.policy.mode.value,
            policy_refused=self.policy.in_force.refused,
        )

    def metrics(self) -> MetricsFacts:
        return MetricsFacts(
            snapshot=self.loop.snapshot,
            counts=self.tallies.read(),
            version=__version__,
            policy=self.state.policy.name,
            mode=self.state.policy.mode.value,
            policy_refused=bool(self.policy.in_force.refused),
            ring_drop_count=self.kernel.lost_count,
            unrecorded_call_count=self.kernel.unrecorded_count,
            late_event_count=self.late_count,
            failed_action_count=self.history.failed_action_count,
            source_failure_count=sum(source.failure_count for source in self.sources),
            journal_lost_rows_count=self.journal.lost_rows_count,
        )

    def summary(self) -> str:
        """One line for systemctl status."""
        engine = self.engine.url if self.engine and self.engine.url else f"{len(self.hook.attached)} engines"
        return (
            f"policy {self.state.policy.name} ({self._policy_words()}); {len(self.state.sandboxes)} sandboxes; engine "
            f"{engine}; probes {self.host.probe_backend.split(':', 1)[0]}; cgroups {self.host.cgroup_layout}"
        )

    def _policy_words(self) -> str:
        refused = self.policy.in_force.refused
        return self.state.policy.mode.value + (
            ", its files are refused: see `equipoise policy show`" if refused else ""
        )

    @property
    def late_count(self) -> int:
        return self.state.late_count + self.loop.dropped_count
