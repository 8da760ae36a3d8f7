"""The host and its sandboxes: what is sampled of them, the policy in force, and pressure on the tool-memory pool.

Owns `host`, `sandboxes`, `policy`, the covariance of memory and KV, and since when rules of the ladder press. What is
done about pressure is for the ladder; a sandbox that goes leaves its calls as they are: their ends are told apart.
"""

from __future__ import annotations

from dataclasses import replace

from ..events import EventsLost, HostSampled, PolicyApplied, SandboxRegistered, SandboxRemoved, SandboxSampled
from ..model import Host
from .joins import sandbox_changed
from .picture import Picture, arm


def _policy_applied(picture: Picture, event: PolicyApplied) -> None:
    picture.policy = event.policy


def _sandbox_registered(picture: Picture, event: SandboxRegistered) -> None:
    picture.sandboxes[event.sandbox.cgroup_id] = event.sandbox
    picture._left_behind.discard(event.sandbox.session)
    sandbox_changed(picture, event.sandbox.cgroup_id)


def _sandbox_removed(picture: Picture, event: SandboxRemoved) -> None:
    removed = picture.sandboxes.pop(event.cgroup_id, None)
    if removed and all(s.session != removed.session for s in picture.sandboxes.values()):
        picture._left_behind.add(removed.session)
    picture.processes = {key: p for key, p in picture.processes.items() if p.sandbox != event.cgroup_id}
    picture._intents = {key: i for key, i in picture._intents.items() if key[0] != event.cgroup_id}
    sandbox_changed(picture, event.cgroup_id)


def _sandbox_sampled(picture: Picture, event: SandboxSampled) -> None:
    sandbox = picture.sandboxes.get(event.cgroup_id)
    if sandbox is None:
        picture.late_count += 1
        return
    peak_bytes = max(sandbox.peak_bytes, event.peak_bytes, event.memory_bytes)
    picture.sandboxes[event.cgroup_id] = replace(
        sandbox, memory_bytes=event.memory_bytes, peak_bytes=peak_bytes, cpu_ns=event.cpu_ns
    )


def _host_sampled(picture: Picture, event: HostSampled) -> None:
    picture.host = Host(
        memory_total_bytes=event.memory_total_bytes,
        memory_available_bytes=event.memory_available_bytes,
        psi_some_ratio=event.psi_some_ratio,
        psi_full_ratio=event.psi_full_ratio,
        gpu_total_bytes=event.gpu_total_bytes,
        gpu_used_bytes=event.gpu_used_bytes,
        observed_ns=event.at_ns,
    )
    kv = sum(e.device_used_tokens * e.bytes_per_token for e in picture.engines.values())
    picture.covariance = picture.covariance.observe(float(_tool_used_bytes(picture)), float(kv))


def _events_lost(picture: Picture, event: EventsLost) -> None:
    picture.lost_count += event.count


def watch_pressure(picture: Picture, now_ns: int) -> None:
    """A rule of the ladder presses from above its upper mark until its measure is below the lower one."""
    pool, used = picture.policy.memory.pool_bytes(picture.host.memory_total_bytes), _tool_used_bytes(picture)
    pressed = {}
    for rule in picture.policy.memory.ladder:
        since_ns = picture._pressed.get(rule)
        mark = rule.above_ratio if since_ns is None else rule.below_ratio
        measured = rule.measure.of(used, pool, picture.host)
        if measured is not None and measured >= mark:
            pressed[rule] = now_ns if since_ns is None else since_ns
    picture._pressed = pressed


def _tool_used_bytes(picture: Picture) -> int:
    return sum(c.used_bytes for c in picture.tool_calls.values() if c.gone_ns is None)


ARMS = (
    arm(PolicyApplied, _policy_applied),
    arm(SandboxRegistered, _sandbox_registered),
    arm(SandboxRemoved, _sandbox_removed),
    arm(SandboxSampled, _sandbox_sampled),
    arm(HostSampled, _host_sampled),
    arm(EventsLost, _events_lost),
)
