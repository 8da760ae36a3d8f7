/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Kernel drift, all of it. Each function names the change it hides; the programs see one kernel.
 */
#ifndef EQUIPOISE_CORE_FIXES_H
#define EQUIPOISE_CORE_FIXES_H

/*
 * f1a7941243c1 ("mm: convert mm's rss stats into percpu_counter", 6.2) turned atomic counters into per-CPU ones. The
 * three-underscore flavours below are what the structures were before; libbpf drops the suffix when it matches names.
 * The tracepoint lost its third argument (count) in the same release; we take only the first two, which did not move.
 */
struct mm_rss_stat {
	atomic_long_t count[NR_MM_COUNTERS];
} CORE;

struct mm_struct___before_6_2 {
	struct mm_rss_stat rss_stat;
} CORE;

static __always_inline bool rss_is_percpu(void)
{
	return !bpf_core_type_exists(struct mm_rss_stat);
}

/* Pages in one counter as the kernel's own cheap reading gives them; off by up to a batch per CPU since 6.2. */
static __always_inline s64 rss_pages_approximate(struct mm_struct *mm, int member)
{
	if (!rss_is_percpu()) {
		struct mm_struct___before_6_2 *old = (void *)mm;

		return BPF_CORE_READ(old, rss_stat.count[member].counter);
	}
	switch (member) { /* constants, so that each is one relocated load */
	case MM_FILEPAGES:
		return mm->rss_stat[MM_FILEPAGES].count;
	case MM_ANONPAGES:
		return mm->rss_stat[MM_ANONPAGES].count;
	default:
		return mm->rss_stat[MM_SHMEMPAGES].count;
	}
}

/* The per-CPU pointer of one counter, or 0 where the kernel has none. */
static __always_inline u64 rss_percpu_pointer(struct mm_struct *mm, int member)
{
	if (!rss_is_percpu())
		return 0;
	switch (member) {
	case MM_FILEPAGES:
		return (u64)mm->rss_stat[MM_FILEPAGES].counters;
	case MM_ANONPAGES:
		return (u64)mm->rss_stat[MM_ANONPAGES].counters;
	default:
		return (u64)mm->rss_stat[MM_SHMEMPAGES].counters;
	}
}

/*
 * Reading a per-CPU counter takes each CPU's offset. The kernel's table of them (__per_cpu_offset) is not in kallsyms
 * without CONFIG_KALLSYMS_ALL, and an extern of that name gets no BTF from clang 14. So the offsets are learned: of one
 * per-CPU map element both the per-CPU pointer and every CPU's address can be had, and the difference is the offset.
 */
#define MAX_CPUS 512
u64 cpu_offsets[MAX_CPUS];

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} cpu_anchor SEC(".maps");

/* A pointer as a number: the verifier allows it to be copied out of the stack, not to be added to. */
static __always_inline u64 pointer_value(void *pointer)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), &pointer);
	return value;
}

/* Returns how many CPUs' counters can be read: all of them where the kernel's counters are not per CPU. */
static __always_inline u32 learn_cpu_offsets(u32 cpu_count)
{
	u64 array = pointer_value(&cpu_anchor), percpu = 0;
	u32 zero = 0, cpu;
	void *element;

	if (!rss_is_percpu())
		return cpu_count;
	array += bpf_core_field_offset(struct bpf_array, pptrs);
	if (bpf_probe_read_kernel(&percpu, sizeof(percpu), (void *)array) || !percpu)
		return 0;
	for (cpu = 0; cpu < MAX_CPUS && cpu < cpu_count; cpu++) {
		element = bpf_map_lookup_percpu_elem(&cpu_anchor, &zero, cpu);
		if (!element)
			break;
		cpu_offsets[cpu] = pointer_value(element) - percpu;
	}
	return cpu;
}

/*
 * A task that carries no storage of anybody's carries no tag. This spares most page faults of the machine the helper's
 * call (20 of 30 ns); where the field is gone the helper alone decides.
 */
static __always_inline bool may_have_storage(struct task_struct *task)
{
	return !bpf_core_field_exists(task->bpf_storage) || task->bpf_storage;
}

/*
 * "exit: move and extend sched_process_exit() tracepoint" (6.16) fires it before exit_mm() instead of after, and adds
 * the argument group_dead. Reading signal->live works on both sides of that change, since do_exit() lowers it first.
 * Before 6.16 two threads that leave together may both read 0, so callers let the deletion of a record choose one.
 */
static __always_inline bool last_thread_of_process(struct task_struct *task)
{
	return task->signal->live.counter == 0;
}

/* What wait(2) will report, by the rule of wait_task_zombie(): the leader's code unless the whole group was ended. */
static __always_inline u32 wait_status(struct task_struct *task)
{
	struct signal_struct *signal = task->signal;

	if (signal->flags & SIGNAL_GROUP_EXIT)
		return signal->group_exit_code;
	return task->group_leader->exit_code;
}

/*
 * Session and process group, as numbers of the first pid namespace. "signal: Use the same pids array for a process's ids"
 * (2c4704756cab, 4.19) moved them from the task to its signal_struct; older kernels have no task storage anyway.
 */
static __always_inline u32 session_of(struct task_struct *task)
{
	return BPF_CORE_READ(task, signal, pids[PIDTYPE_SID], numbers[0].nr);
}

static __always_inline u32 group_of(struct task_struct *task)
{
	return BPF_CORE_READ(task, signal, pids[PIDTYPE_PGID], numbers[0].nr);
}

/*
 * A number that changes when a shell that is fed line by line is given its next line, and not while it runs one. Of a
 * pipe that is `head`, which counts what was put in when there was no room left to append to: whatever is written while
 * the shell waits for input moves it. "pipe: Use head and tail pointers" (8cefc107ca54, 5.5) brought it. Of anything else
 * (a socket, a terminal) it is how much the shell has read, which a command substitution moves too. Never 0.
 */
static __always_inline u32 input_stamp_of(struct task_struct *task)
{
	struct file **files = BPF_CORE_READ(task, files, fdt, fd), *input = NULL;
	struct inode *inode;

	if (!bpf_probe_read_kernel(&input, sizeof(input), files) && input) {
		inode = BPF_CORE_READ(input, f_inode);
		if (bpf_core_field_exists(((struct pipe_inode_info *)0)->head) &&
		    (BPF_CORE_READ(inode, i_mode) & S_IFMT) == S_IFIFO)
			return BPF_CORE_READ(inode, i_pipe, head) | 1u << 31;
	}
	if (bpf_core_field_exists(task->ioac.rchar))
		return (u32)BPF_CORE_READ(task, ioac.rchar) | 1u << 31;
	return 1;
}

/* Inode of the socket's network namespace; 0 where the kernel has no such namespaces. */
static __always_inline u32 network_namespace_of(const struct sock *sk)
{
	if (!bpf_core_field_exists(sk->__sk_common.skc_net.net))
		return 0;
	return BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
}

/* One end of a socket as an IPv6 address; without CONFIG_IPV6 there are no such fields, and no socket that needs them. */
static __always_inline void read_address(u8 *to, const struct sock *sk, bool remote)
{
	u32 v4;

	if (bpf_core_field_exists(sk->__sk_common.skc_v6_daddr) && BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET6) {
		if (remote)
			BPF_CORE_READ_INTO((u8(*)[16])to, sk, __sk_common.skc_v6_daddr.in6_u.u6_addr8);
		else
			BPF_CORE_READ_INTO((u8(*)[16])to, sk, __sk_common.skc_v6_rcv_saddr.in6_u.u6_addr8);
		return;
	}
	v4 = remote ? BPF_CORE_READ(sk, __sk_common.skc_daddr) : BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr);
	__builtin_memset(to, 0, 10);
	to[10] = to[11] = 0xff;
	__builtin_memcpy(to + 12, &v4, sizeof(v4));
}

/*
 * The task's memory cgroup counter (v1 and v2 alike), or NULL. memory_cgrp_id depends on which controllers the kernel
 * was built with, hence an enum relocation; struct cgroup_subsys_state is the first member of struct mem_cgroup.
 */
static __always_inline struct page_counter *memory_cgroup_counter(struct task_struct *task)
{
	struct css_set *set = task->cgroups;
	struct mem_cgroup *memcg = NULL;
	u32 index = bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);

	if (!bpf_core_enum_value_exists(enum cgroup_subsys_id, memory_cgrp_id))
		return NULL;
	if (bpf_probe_read_kernel(&memcg, sizeof(memcg), (void *)&set->subsys + index * sizeof(void *)) || !memcg)
		return NULL;
	return &memcg->memory;
}

#endif
