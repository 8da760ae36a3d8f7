/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * One harmless program of each kind and one map of each type we use or would use. capabilities.py loads them one by one:
 * what a kernel accepts is found by trying, since the lists it shows (the LSM list, the BTF) promise more than it allows.
 */
#include "kernel_types.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} ring_buffer SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, u64);
} task_storage SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_CGRP_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, u64);
} cgroup_storage SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} mmapable_array SEC(".maps");

/* clang-format off */
#define PROBE(name, section) SEC(section) int name(void *context) { return 0; }
/* clang-format on */

PROBE(tp_btf, "tp_btf/sched_process_exit")
PROBE(rss_stat, "tp_btf/rss_stat")
PROBE(raw_tp, "raw_tp/sched_process_exit")
PROBE(tracepoint, "tracepoint/sched/sched_process_exit")
PROBE(iter_task, "iter/task")
PROBE(iter_cgroup, "iter/cgroup")
PROBE(cpu_sampling, "perf_event")
PROBE(kprobe, "kprobe/vfs_fsync")
PROBE(fentry, "fentry/vfs_fsync")
PROBE(fmod_ret, "fmod_ret/security_vm_enough_memory_mm")
PROBE(lsm, "lsm/vm_enough_memory")

/* A filter: 1 lets the packet pass. Loaded only, never attached. */
SEC("cgroup_skb/egress")
int cgroup_skb(void *context)
{
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
