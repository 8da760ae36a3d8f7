/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What memory a tool call uses: pages of each address space, and their sum in the tool record.
 *
 * Usage of a tool call = private + shared, where
 *   private = anonymous pages of each address space, less what it inherited by fork and has not exec'd away (a fork
 *             copies the page table, not the pages; so fork+exec gives no false peak). What a child later writes of
 *             its inheritance is copied by the kernel without any counter moving: not seen here, seen by a memory cgroup.
 *   shared  = file and shared-memory pages, summed over address spaces but never more than the most one of them mapped:
 *             20 workers that map the same libraries or the same shared array hold them once.
 * Not in it: page tables and other kernel memory, unmapped page cache, huge pages of hugetlbfs, swapped pages.
 *
 * Every change swaps the counted value atomically and adds the difference, so concurrent threads telescope to the truth.
 */
#ifndef EQUIPOISE_CHARGE_H
#define EQUIPOISE_CHARGE_H

/* Pages held in per-CPU remainders of one counter: of this CPU, or of all of them. */
static __always_inline s64 rss_remainder(u64 counters, bool all_cpus)
{
	u32 first = bpf_get_smp_processor_id(), count = 1, cpu;
	s64 sum = 0;
	s32 value;

	if (!counters)
		return 0;
	if (all_cpus) {
		first = 0;
		count = tunables.cpu_count;
	}
	for (u32 i = 0; i < MAX_CPUS && i < count; i++) {
		cpu = first + i;
		if (cpu >= MAX_CPUS || !cpu_offsets[cpu])
			break;
		if (bpf_probe_read_kernel(&value, sizeof(value), (void *)(counters + cpu_offsets[cpu])))
			break;
		sum += value;
	}
	return sum;
}

/*
 * Pages in one counter. On small machines every reading sums all CPUs. On large ones it takes this CPU's remainder and
 * the correction found by the last full sum; `exact` asks for a new full sum.
 */
static __always_inline s64 rss_pages(struct mm_struct *mm, int member, s64 *correction, bool exact)
{
	s64 pages = rss_pages_approximate(mm, member);
	u64 counters = rss_percpu_pointer(mm, member);
	s64 cheap;

	if (tunables.cpu_count <= tunables.full_sum_cpus)
		return pages + rss_remainder(counters, true);
	cheap = pages + rss_remainder(counters, false);
	if (exact)
		*correction = pages + rss_remainder(counters, true) - cheap;
	return cheap + *correction;
}

static __always_inline void update_usage(struct tool_record *tool)
{
	s64 shared = tool->shared_bytes, largest = tool->shared_largest_bytes, usage;

	usage = tool->private_bytes + (shared < largest ? shared : largest);
	if (usage < 0)
		usage = 0;
	tool->usage_bytes = usage;
	if ((u64)usage > tool->peak_bytes)
		tool->peak_bytes = usage;
}

/* Count the anonymous pages of an address space; returns the change in pages. */
static __always_inline s64 count_private(struct tool_record *tool, struct mm_record *record, s64 pages)
{
	s64 inherited = record->inherited_pages, old;

	/* What a child frees of its inheritance stops being a discount for what it allocates afterwards. */
	if (pages < inherited)
		record->inherited_pages = inherited = pages < 0 ? 0 : pages;
	pages -= inherited;
	if (pages < 0)
		pages = 0;
	old = __sync_lock_test_and_set(&record->private_pages, pages);
	if (pages != old)
		__sync_fetch_and_add(&tool->private_bytes, (pages - old) << tunables.page_shift);
	return pages - old;
}

static __always_inline s64 count_shared(struct tool_record *tool, struct mm_record *record, s64 pages)
{
	s64 old;

	if (pages < 0)
		pages = 0;
	old = __sync_lock_test_and_set(&record->shared_pages, pages);
	if (pages != old)
		__sync_fetch_and_add(&tool->shared_bytes, (pages - old) << tunables.page_shift);
	if ((u64)pages << tunables.page_shift > tool->shared_largest_bytes)
		tool->shared_largest_bytes = (u64)pages << tunables.page_shift;
	return pages - old;
}

static __always_inline s64 read_private(struct mm_struct *mm, struct mm_record *record, bool exact)
{
	return rss_pages(mm, MM_ANONPAGES, &record->anon_correction_pages, exact);
}

/* One correction for two counters: the file counter carries it, the other is read without (see rss_pages). */
static __always_inline s64 read_shared(struct mm_struct *mm, struct mm_record *record, bool exact)
{
	s64 shmem_correction = 0;

	return rss_pages(mm, MM_FILEPAGES, &record->shared_correction_pages, exact) +
	       rss_pages(mm, MM_SHMEMPAGES, &shmem_correction, exact);
}

/* A process of the tool call uses this address space. `inherits`: it came by fork, its anonymous pages are not new. */
static __always_inline void join_mm(struct tool_record *tool, u64 tag, u32 slot, struct mm_struct *mm, bool inherits)
{
	struct mm_record fresh = { .tag = tag, .slot = slot, .users = 1 }, *record;
	u64 key = (u64)mm;

	if (!mm)
		return;
	record = bpf_map_lookup_elem(&mms, &key);
	if (record) {
		__sync_fetch_and_add(&record->users, 1);
		return;
	}
	if (inherits)
		fresh.inherited_pages = read_private(mm, &fresh, true);
	if (bpf_map_update_elem(&mms, &key, &fresh, BPF_NOEXIST)) {
		count_untracked(UNTRACKED_NO_MM);
		return;
	}
	record = bpf_map_lookup_elem(&mms, &key);
	if (!record)
		return;
	count_private(tool, record, read_private(mm, record, true));
	count_shared(tool, record, read_shared(mm, record, true));
	update_usage(tool);
}

/* A process stopped using it (exec or exit); with the last one its pages leave the tool call's sum. */
static __always_inline void leave_mm(u64 key)
{
	struct mm_record *record = bpf_map_lookup_elem(&mms, &key);
	struct tool_record *tool;

	if (!record || __sync_fetch_and_sub(&record->users, 1) != 1)
		return;
	tool = tool_of(record->tag, record->slot);
	if (tool) {
		record->inherited_pages = 0;
		count_private(tool, record, 0);
		count_shared(tool, record, 0);
		update_usage(tool);
	}
	bpf_map_delete_elem(&mms, &key);
}

/* What an address space holds is another tool call's from now on. `old` is NULL where that record is gone already. */
static __always_inline void move_mm(struct mm_record *record, struct tool_record *old, struct tool_record *tool,
				    u64 tag, u32 slot)
{
	s64 private_bytes = record->private_pages << tunables.page_shift;
	s64 shared_pages = record->shared_pages;

	if (old) {
		__sync_fetch_and_add(&old->private_bytes, -private_bytes);
		count_shared(old, record, 0);
		update_usage(old);
	}
	record->shared_pages = 0;
	record->tag = tag;
	record->slot = slot;
	__sync_fetch_and_add(&tool->private_bytes, private_bytes);
	count_shared(tool, record, shared_pages);
	update_usage(tool);
}

/* The tool call's own memory cgroup, if user space says it has one: the kernel's exact figure, page cache included. */
static __always_inline void sample_memory_cgroup(struct tool_record *tool, struct task_struct *task)
{
	struct page_counter *counter;

	if (!(tool->flags & TOOL_OWN_MEMCG))
		return;
	counter = memory_cgroup_counter(task);
	if (!counter)
		return;
	tool->memcg_bytes = (u64)BPF_CORE_READ(counter, usage.counter) << tunables.page_shift;
	tool->memcg_peak_bytes = (u64)BPF_CORE_READ(counter, watermark) << tunables.page_shift;
}

#endif
