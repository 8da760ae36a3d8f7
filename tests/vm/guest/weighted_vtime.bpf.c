/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The smallest scheduler that keeps weights: one queue ordered by virtual time, which passes for each task at 100 / weight
 * of its run time, and slices in proportion to weight. A weight is cpu.weight of the task's own cgroup; what stands above
 * it is not looked at.
 *
 * The queue alone would not do: when the kernel asks for the next task, the one whose slice has just ended is not in the
 * queue yet, so that two tasks on a CPU take turns whatever their virtual times. Run time is measured by the clock, since
 * the consumed part of a slice ends at zero while the task runs on to the next tick, 4 ms away with HZ=250.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define QUEUE 0
#define DEFAULT_WEIGHT 100
/* Of the default weight; long against a tick, so that rounding up to ticks does not flatten the weights. */
#define SLICE_NS 20000000ULL
#define LONGEST_SLICE_NS (5 * SLICE_NS)
/* How far a sleeper may lag behind the others when it comes back. */
#define LAG_NS SLICE_NS

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, u64); /* cgroup id */
	__type(value, u32);
} weights SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64); /* when the task that runs on this CPU began to */
} started_ns SEC(".maps");

static u64 vtime_now;

static void insert(struct task_struct *p, u64 slice_ns, u64 vtime, u64 flags)
{
#ifdef INSERT_TAKES_A_STRUCT /* since 6.19; the form with five arguments is on its way out */
	struct scx_bpf_dsq_insert_vtime_args args = {
		.dsq_id = QUEUE, .slice = slice_ns, .vtime = vtime, .enq_flags = flags
	};

	__scx_bpf_dsq_insert_vtime(p, &args);
#else
	scx_bpf_dsq_insert_vtime(p, QUEUE, slice_ns, vtime, flags);
#endif
}

static u32 weight_of(struct task_struct *p)
{
	struct cgroup *cgroup = scx_bpf_task_cgroup(p);
	u32 *weight;
	u64 id;

	if (!cgroup)
		return DEFAULT_WEIGHT;
	id = cgroup->kn->id;
	bpf_cgroup_release(cgroup);
	weight = bpf_map_lookup_elem(&weights, &id);
	return weight && *weight ? *weight : DEFAULT_WEIGHT;
}

SEC("struct_ops.s/weighted_cgroup_init")
s32 BPF_PROG(weighted_cgroup_init, struct cgroup *cgroup, struct scx_cgroup_init_args *args)
{
	u64 id = cgroup->kn->id;
	u32 weight = args->weight;

	return bpf_map_update_elem(&weights, &id, &weight, BPF_ANY);
}

SEC("struct_ops/weighted_cgroup_exit")
void BPF_PROG(weighted_cgroup_exit, struct cgroup *cgroup)
{
	u64 id = cgroup->kn->id;

	bpf_map_delete_elem(&weights, &id);
}

SEC("struct_ops/weighted_cgroup_set_weight")
void BPF_PROG(weighted_cgroup_set_weight, struct cgroup *cgroup, u32 weight)
{
	u64 id = cgroup->kn->id;

	bpf_map_update_elem(&weights, &id, &weight, BPF_ANY);
}

SEC("struct_ops/weighted_enqueue")
void BPF_PROG(weighted_enqueue, struct task_struct *p, u64 flags)
{
	u64 slice_ns = SLICE_NS * weight_of(p) / DEFAULT_WEIGHT;
	u64 vtime = p->scx.dsq_vtime;

	if (slice_ns > LONGEST_SLICE_NS)
		slice_ns = LONGEST_SLICE_NS;
	if ((s64)(vtime - (vtime_now - LAG_NS)) < 0)
		vtime = vtime_now - LAG_NS;
	insert(p, slice_ns, vtime, flags);
}

SEC("struct_ops/weighted_dispatch")
void BPF_PROG(weighted_dispatch, s32 cpu, struct task_struct *prev)
{
	scx_bpf_dsq_move_to_local(QUEUE);
}

SEC("struct_ops/weighted_running")
void BPF_PROG(weighted_running, struct task_struct *p)
{
	u32 zero = 0;
	u64 *started = bpf_map_lookup_elem(&started_ns, &zero);

	if (started)
		*started = bpf_ktime_get_ns();
	if ((s64)(vtime_now - p->scx.dsq_vtime) < 0)
		vtime_now = p->scx.dsq_vtime;
}

SEC("struct_ops/weighted_stopping")
void BPF_PROG(weighted_stopping, struct task_struct *p, bool runnable)
{
	u32 zero = 0;
	u64 *started = bpf_map_lookup_elem(&started_ns, &zero);

	if (started)
		p->scx.dsq_vtime += (bpf_ktime_get_ns() - *started) * DEFAULT_WEIGHT / weight_of(p);
}

SEC("struct_ops/weighted_enable")
void BPF_PROG(weighted_enable, struct task_struct *p)
{
	p->scx.dsq_vtime = vtime_now;
}

SEC("struct_ops.s/weighted_init")
s32 BPF_PROG(weighted_init)
{
	return scx_bpf_create_dsq(QUEUE, -1);
}

SEC(".struct_ops.link")
struct sched_ext_ops weighted_vtime = {
	.cgroup_init = (void *)weighted_cgroup_init,
	.cgroup_exit = (void *)weighted_cgroup_exit,
	.cgroup_set_weight = (void *)weighted_cgroup_set_weight,
	.enqueue = (void *)weighted_enqueue,
	.dispatch = (void *)weighted_dispatch,
	.running = (void *)weighted_running,
	.stopping = (void *)weighted_stopping,
	.enable = (void *)weighted_enable,
	.init = (void *)weighted_init,
	/* A slow guest is no stall. */
	.timeout_ms = 30000,
	.name = "weighted_vtime",
};
