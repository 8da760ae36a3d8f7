/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Memory of a tool call while it runs: steps, soft and hard budget. Part of equipoise.bpf.c.
 *
 * The budget is held against usage_bytes (what the tool call's processes hold resident), not against its memory cgroup:
 * that counter includes page cache, which the kernel drops by itself, and a grep over a large tree would be stopped.
 */

static __always_inline void emit_memory(u32 kind, struct tool_record *tool, u32 slot, struct task_struct *task,
					u64 budget_bytes, bool enforced)
{
	struct memory_event *event;

	sample_memory_cgroup(tool, task);
	event = event_reserve(kind, sizeof(*event));
	if (!event)
		return;
	fill_header(&event->header, kind, sizeof(*event), tool, slot, task);
	event->usage_bytes = tool->usage_bytes;
	event->peak_bytes = tool->peak_bytes;
	event->budget_bytes = budget_bytes;
	event->memcg_bytes = tool->memcg_bytes;
	event->memcg_peak_bytes = tool->memcg_peak_bytes;
	event->processes = tool->processes;
	event->enforced = enforced;
	event_submit(event, kind != EVENT_MEMORY);
}

static __always_inline u64 step_of(u64 usage)
{
	u64 relative = usage >> tunables.step_shift;

	return relative > tunables.step_bytes ? relative : tunables.step_bytes;
}

static __always_inline void report_step(struct tool_record *tool, u32 slot, struct task_struct *task)
{
	u64 usage = tool->usage_bytes, reported = tool->reported_bytes;
	u64 moved = usage > reported ? usage - reported : reported - usage;

	if (moved < step_of(usage))
		return;
	/* Of the threads that see the same step, the one that moves the mark reports it. */
	if (__sync_val_compare_and_swap(&tool->reported_bytes, reported, usage) == reported)
		emit_memory(EVENT_MEMORY, tool, slot, task, 0, false);
}

/* Armed again when the budget changes (the mark is the budget it was sent for) or usage falls a step below it. */
static __always_inline void check_soft_budget(struct tool_record *tool, u32 slot, struct task_struct *task)
{
	u64 usage = tool->usage_bytes, soft = tool->soft_bytes, told = tool->soft_reported_bytes;

	if (!soft)
		return;
	if (usage > soft) {
		if (told != soft && __sync_val_compare_and_swap(&tool->soft_reported_bytes, told, soft) == told)
			emit_memory(EVENT_SOFT_BUDGET, tool, slot, task, soft, false);
	} else if (told && usage + step_of(usage) < soft) {
		tool->soft_reported_bytes = 0;
	}
}

static __always_inline bool somebody_listens(struct control *block)
{
	u64 beat = block->heartbeat_ns;

	return beat && bpf_ktime_get_ns() - beat < tunables.heartbeat_timeout_ns;
}

/*
 * Stop the charging process. It takes effect when it returns to user mode, one page after the budget; its siblings stop
 * at their own next page. A process inside one long system call that fills memory (read into a large buffer,
 * MAP_POPULATE, mlock) goes on to the end of that call: only a memory cgroup's limit is harder.
 *
 * stops_started .. stops_finished brackets the signal so that user space, which raises the budget and continues the
 * processes, can wait for a signal in flight (tool_memory.py, resume): the budget is read again inside the bracket.
 */
static __always_inline void enforce_hard_budget(struct tool_record *tool, u32 slot, struct task_struct *task)
{
	u64 hard = tool->hard_bytes, told = tool->hard_reported_bytes;
	struct control *block = control_block();
	bool listening, over;

	if (!block)
		return;
	listening = somebody_listens(block);
	if (listening) {
		__sync_fetch_and_add(&tool->stops_started, 1);
		hard = *(volatile u64 *)&tool->hard_bytes;
		over = hard && tool->usage_bytes > hard;
		if (over) {
			bpf_send_signal(SIGSTOP);
			if (!tool->stalled_since_ns)
				tool->stalled_since_ns = bpf_ktime_get_ns();
		}
		__sync_fetch_and_add(&tool->stops_finished, 1);
		if (!over)
			return;
	} else {
		__sync_fetch_and_add(&block->stops_withheld, 1);
	}
	if (told != hard && __sync_val_compare_and_swap(&tool->hard_reported_bytes, told, hard) == told)
		emit_memory(EVENT_HARD_BUDGET, tool, slot, task, hard, listening);
}

/* Count what this address space's member has moved by; the change in pages. */
static __always_inline s64 count_member(struct tool_record *tool, struct mm_record *record, struct mm_struct *mm,
					int member)
{
	s64 grown;

	if (member == MM_ANONPAGES)
		grown = count_private(tool, record, read_private(mm, record, false));
	else
		grown = count_shared(tool, record, read_shared(mm, record, false));
	if (grown)
		update_usage(tool);
	return grown;
}

/*
 * khugepaged fills holes of an address space with whole huge pages, kswapd takes pages away, both while their owner may
 * sleep for long. Who charges for another is never stopped for it: the owner is, at its own next page.
 */
static __always_inline void count_for_owner(struct mm_struct *mm, int member)
{
	struct mm_record *record;
	struct tool_record *tool;
	u64 key = (u64)mm;

	record = bpf_map_lookup_elem(&mms, &key);
	if (!record || member == MM_SWAPENTS)
		return;
	tool = tool_of(record->tag, record->slot);
	if (tool)
		count_member(tool, record, mm, member);
}

SEC("tp_btf/rss_stat")
int BPF_PROG(on_rss_stat, struct mm_struct *mm, int member)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct mm_record *record;
	struct tool_record *tool;
	struct task_tag *tag;
	u64 key = (u64)mm;
	s64 grown;

	if (!may_have_storage(task)) {
		if (task->flags & PF_KTHREAD)
			count_for_owner(mm, member);
		return 0;
	}
	/* Fork, exit and a task's own reclaim move other address spaces' counters too: their owner's next charge reads it. */
	if (task->mm != mm || member == MM_SWAPENTS)
		return 0;
	tag = bpf_task_storage_get(&task_tags, task, NULL, 0);
	if (!tag)
		return 0;
	record = bpf_map_lookup_elem(&mms, &key);
	if (!record)
		return 0;
	tool = tool_of(record->tag, record->slot);
	if (!tool)
		return 0;
	grown = count_member(tool, record, mm, member);
	if (!grown)
		return 0;
	if (tool->role != ROLE_TOOL) /* an agent's runtime is read, never reported nor stopped */
		return 0;
	report_step(tool, record->slot, task);
	check_soft_budget(tool, record->slot, task);
	if (grown > 0 && tool->hard_bytes && tool->usage_bytes > tool->hard_bytes)
		enforce_hard_budget(tool, record->slot, task);
	return 0;
}
