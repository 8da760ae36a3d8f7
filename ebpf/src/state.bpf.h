/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The maps, the tunables and how an event leaves. Owns no policy and follows no process.
 */
#ifndef EQUIPOISE_STATE_H
#define EQUIPOISE_STATE_H

const volatile struct tunables tunables = { .abi_version = ABI_VERSION };

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} events SEC(".maps");

/* An array, not a hash: found by the slot in the task's tag without hashing, and mapped by user space. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 8192);
	__type(key, u32);
	__type(value, struct tool_record);
} tools SEC(".maps");

/* User space puts slots in, when it has read the last of a tool call; the kernel takes one per tool call it finds. */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 8192);
	__type(value, u32);
} free_slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct control);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct task_tag);
} task_tags SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, u32);
	__type(value, struct process_record);
} processes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, u64);
	__type(value, struct mm_record);
} mms SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct retag_request);
} retag SEC(".maps");

static __always_inline struct control *control_block(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline void count_untracked(u32 reason)
{
	struct control *block = control_block();

	if (block && reason < UNTRACKED_REASON_COUNT)
		__sync_fetch_and_add(&block->untracked[reason], 1);
}

/* The record a tag names, or NULL where the slot has been given to another tool call since. */
static __always_inline struct tool_record *tool_of(u64 tag, u32 slot)
{
	struct tool_record *tool = bpf_map_lookup_elem(&tools, &slot);

	return tool && tool->tag == tag ? tool : NULL;
}

/*
 * The tag of the running task, or NULL. A thread that was missed (its process was tagged from outside while the thread
 * started) is tagged now by its process.
 */
static __always_inline struct task_tag *current_tag(struct task_struct *task)
{
	struct task_tag *tag = bpf_task_storage_get(&task_tags, task, NULL, 0), late = {};
	struct process_record *process;
	u32 tgid = task->tgid;

	if (tag || task->pid == task->tgid)
		return tag;
	process = bpf_map_lookup_elem(&processes, &tgid);
	if (!process)
		return NULL;
	late.tag = process->tag;
	late.slot = process->slot;
	late.role = process->role;
	return bpf_task_storage_get(&task_tags, task, &late, BPF_LOCAL_STORAGE_GET_F_CREATE);
}

/* Room for one event, or NULL after counting the loss. */
static __always_inline void *event_reserve(u32 kind, u64 size)
{
	void *event = bpf_ringbuf_reserve(&events, size, 0);
	struct control *block;

	if (event)
		return event;
	block = control_block();
	if (block && kind < EVENT_KIND_COUNT)
		__sync_fetch_and_add(&block->lost[kind], 1);
	return NULL;
}

/*
 * Memory steps and connections are many and none is urgent: they wake nobody until 256 KiB wait. What a person or the
 * policy waits for (a tool call began, reached its budget, ended) wakes the reader at once.
 */
static __always_inline void event_submit(void *event, bool urgent)
{
	u64 flags = BPF_RB_FORCE_WAKEUP;

	if (!urgent && bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) < (1 << 18))
		flags = BPF_RB_NO_WAKEUP;
	bpf_ringbuf_submit(event, flags);
}

static __always_inline void fill_header(struct event_header *header, u32 kind, u32 size, struct tool_record *tool,
					u32 slot, struct task_struct *task)
{
	header->kind = kind;
	header->size = size;
	header->time_ns = bpf_ktime_get_ns();
	header->tag = tool->tag;
	header->agent_tag = tool->agent_tag;
	header->sandbox_id = tool->sandbox_id;
	header->cgroup_id = bpf_get_current_cgroup_id();
	header->slot = slot;
	header->role = tool->role;
	header->tgid = task->tgid;
	header->parent_tgid = task->real_parent->tgid;
	bpf_get_current_comm(header->comm, sizeof(header->comm));
}

#endif
