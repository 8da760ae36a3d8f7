/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Who belongs to which tool call: tags in task storage, inherited at fork, made at an agent's exec, ended at exit.
 * Part of equipoise.bpf.c.
 *
 * The tag is in the task itself, so a new session (setsid), a double fork or a new parent (init) changes nothing.
 *
 * Each of the three hooks has two programs. The kernel skips a tracing program while another task's run of it is not
 * finished on the same CPU, and since tracepoints became preemptible (7.0) that happens to programs that are preempted:
 * in 2 % of the forks of a busy 7.3 guest. The second program then does the work; after a first that ran it finds it
 * done. bpftool counts the skipped runs as recursion_misses; what both missed of an exit is found by missed.py.
 */

/* A process of the tool call exists now. */
static __always_inline void add_process(struct tool_record *tool, u64 tag, u32 slot, u32 role,
					struct task_struct *task, u32 parent_tgid, u32 unrecorded, bool inherits)
{
	struct process_record process = {
		.tag = tag,
		.mm = (u64)task->mm,
		.started_ns = bpf_ktime_get_ns(),
		.slot = slot,
		.role = role,
		.parent_tgid = parent_tgid,
		.unrecorded = unrecorded,
	};
	u32 tgid = task->tgid;

	if (bpf_map_update_elem(&processes, &tgid, &process, BPF_ANY)) {
		count_untracked(UNTRACKED_NO_PROCESS);
		return;
	}
	__sync_fetch_and_add(&tool->processes, 1);
	join_mm(tool, tag, slot, task->mm, inherits);
}

static __always_inline int follow_fork(struct task_struct *parent, struct task_struct *child)
{
	struct task_tag *tag = current_tag(bpf_get_current_task_btf()), inherited;
	struct process_record *process;
	struct tool_record *tool;
	u32 parent_tgid = parent->tgid;

	if (!tag || bpf_task_storage_get(&task_tags, child, NULL, 0))
		return 0;
	inherited = *tag;
	tool = tool_of(inherited.tag, inherited.slot);
	/* What its own forks start later keeps the stamp: a subshell's programs are of the line that began it. */
	if (tool && inherited.role == ROLE_AGENT && parent->tgid == tool->root_tgid)
		inherited.input_stamp = input_stamp_of(parent);
	if (!bpf_task_storage_get(&task_tags, child, &inherited, BPF_LOCAL_STORAGE_GET_F_CREATE)) {
		count_untracked(UNTRACKED_NO_STORAGE);
		return 0;
	}
	if (child->pid != child->tgid) /* a thread */
		return 0;
	process = bpf_map_lookup_elem(&processes, &parent_tgid);
	if (tool)
		add_process(tool, inherited.tag, inherited.slot, inherited.role, child, parent_tgid,
			    process ? process->unrecorded : 0, true);
	return 0;
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(on_fork, struct task_struct *parent, struct task_struct *child)
{
	return follow_fork(parent, child);
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(on_fork_again, struct task_struct *parent, struct task_struct *child)
{
	return follow_fork(parent, child);
}

/* A record for a tool call that begins now, or NULL; *slot says where. */
static __always_inline struct tool_record *new_tool(struct tool_record *agent, u64 agent_tag, u32 tgid, u32 *slot)
{
	struct control *block = control_block();
	struct tool_record *tool;

	if (!block || bpf_map_pop_elem(&free_slots, slot)) {
		count_untracked(UNTRACKED_NO_SLOT);
		return NULL;
	}
	tool = bpf_map_lookup_elem(&tools, slot);
	if (!tool)
		return NULL;
	__builtin_memset(tool, 0, sizeof(*tool));
	tool->agent_tag = agent_tag;
	tool->sandbox_id = agent->sandbox_id;
	tool->started_ns = bpf_ktime_get_ns();
	tool->role = ROLE_TOOL;
	tool->root_tgid = tgid;
	tool->soft_bytes = agent->child_soft_bytes;
	tool->hard_bytes = agent->child_hard_bytes;
	tool->flags = agent->flags & TOOL_STARTING;
	tool->processes = 1;
	tool->tag = (u64)tunables.tag_epoch << 32 | (u32)(__sync_fetch_and_add(&block->tool_counter, 1) + 1);
	return tool;
}

static __always_inline void emit_exec(u32 kind, struct tool_record *tool, u32 slot, struct task_struct *task,
				      struct linux_binprm *bprm, u32 input_stamp)
{
	struct exec_event *event = event_reserve(kind, sizeof(*event));
	struct mm_struct *mm = task->mm;
	u64 start, size;
	long copied;

	if (!event)
		return;
	fill_header(&event->header, kind, sizeof(*event), tool, slot, task);
	event->session_id = session_of(task);
	event->group_id = group_of(task);
	event->input_stamp = input_stamp;
	copied = bpf_probe_read_kernel_str(event->filename, sizeof(event->filename), bprm->filename);
	event->filename_bytes = copied > 0 ? copied - 1 : 0;
	event->argv_bytes = event->argv_total_bytes = 0;
	if (mm) {
		start = mm->arg_start;
		size = mm->arg_end - start;
		event->argv_total_bytes = size;
		barrier_var(size); /* else the bound is checked on a copy and the verifier sees none on this one */
		if (size > ARGV_BYTES)
			size = ARGV_BYTES;
		if (!bpf_probe_read_user(event->argv, size, (void *)start))
			event->argv_bytes = size;
	}
	event_submit(event, kind == EVENT_TOOL_EXEC);
}

static __always_inline void emit_exit(u32 kind, struct tool_record *tool, u32 slot, struct task_struct *task,
				      u32 processes_left)
{
	struct exit_event *event = event_reserve(kind, sizeof(*event));
	u32 status = wait_status(task);

	if (!event)
		return;
	fill_header(&event->header, kind, sizeof(*event), tool, slot, task);
	event->started_ns = tool->started_ns;
	event->usage_bytes = tool->usage_bytes;
	event->peak_bytes = tool->peak_bytes;
	event->memcg_bytes = tool->memcg_bytes;
	event->memcg_peak_bytes = tool->memcg_peak_bytes;
	event->stops = tool->stops_finished;
	event->exit_code = status >> 8 & 0xff;
	event->exit_signal = status & 0x7f;
	event->processes = processes_left;
	event->padding = 0;
	event_submit(event, true);
}

/* A process left the tool call (or agent) without an exit that we saw; the last one's leaving ends it all the same. */
static __always_inline void remove_process(struct tool_record *tool, u32 slot, struct task_struct *task)
{
	if (__sync_fetch_and_sub(&tool->processes, 1) == 1)
		emit_exit(EVENT_TOOL_GONE, tool, slot, task, 0);
}

static __always_inline int follow_exec(struct task_struct *task, struct linux_binprm *bprm)
{
	struct process_record *process;
	struct tool_record *tool, *agent;
	struct task_tag *tag;
	u32 tgid = task->tgid, slot, agent_slot;

	process = bpf_map_lookup_elem(&processes, &tgid);
	if (!process || process->mm == (u64)task->mm) /* an exec always brings another address space: done already */
		return 0;
	tag = bpf_task_storage_get(&task_tags, task, NULL, 0);
	if (!tag)
		return 0;
	leave_mm(process->mm);
	process->mm = (u64)task->mm;
	slot = agent_slot = tag->slot;
	tool = tool_of(tag->tag, slot);
	if (!tool)
		return 0;

	/*
	 * The registered process may exec (a shell or env that becomes the agent): it stays the agent. Below what may still
	 * become the agent every exec gets a record of its own, as below the agent: which of them it is shows later.
	 */
	if ((tag->role == ROLE_AGENT || tool->flags & TOOL_STARTING) && tool->root_tgid != tgid) {
		agent = tool;
		/* Within a tool call that has no record an exec begins none. */
		tool = process->unrecorded ? NULL : new_tool(agent, tag->tag, tgid, &slot);
		if (!tool) {
			if (!process->unrecorded)
				process->unrecorded = tgid; /* user space makes up for it: resync.py */
			join_mm(agent, tag->tag, tag->slot, task->mm, false);
			return 0;
		}
		process->tag = tag->tag = tool->tag;
		process->slot = tag->slot = slot;
		process->role = tag->role = ROLE_TOOL;
		emit_exec(EVENT_TOOL_EXEC, tool, slot, task, bprm, tag->input_stamp);
		remove_process(agent, agent_slot, task);
	} else if (tunables.report_child_execs || (tool->role == ROLE_TOOL && tool->root_tgid == tgid)) {
		emit_exec(EVENT_CHILD_EXEC, tool, slot, task, bprm, 0);
	}
	__sync_fetch_and_add(&tool->execs, 1);
	join_mm(tool, tag->tag, slot, task->mm, false);
	return 0;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(on_exec, struct task_struct *task, int old_pid, struct linux_binprm *bprm)
{
	return follow_exec(task, bprm);
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(on_exec_again, struct task_struct *task, int old_pid, struct linux_binprm *bprm)
{
	return follow_exec(task, bprm);
}

static __always_inline int follow_exit(struct task_struct *task)
{
	struct process_record *found, process;
	struct tool_record *tool;
	u32 tgid = task->tgid, left;

	if (!last_thread_of_process(task))
		return 0;
	found = bpf_map_lookup_elem(&processes, &tgid);
	if (!found)
		return 0;
	process = *found;
	if (bpf_map_delete_elem(&processes, &tgid)) /* another thread was last, too: see core_fixes.bpf.h */
		return 0;
	tool = tool_of(process.tag, process.slot);
	if (tool)
		sample_memory_cgroup(tool, task);
	leave_mm(process.mm);
	if (!tool)
		return 0;
	left = __sync_fetch_and_sub(&tool->processes, 1) - 1;
	if (tool->root_tgid == tgid)
		emit_exit(EVENT_TOOL_EXIT, tool, process.slot, task, left);
	if (!left)
		emit_exit(EVENT_TOOL_GONE, tool, process.slot, task, left);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(on_exit, struct task_struct *task)
{
	return follow_exit(task);
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(on_exit_again, struct task_struct *task)
{
	return follow_exit(task);
}

/* Move a process that is already followed from one tool call (or the agent) to another. */
static __always_inline void move_process(struct process_record *process, struct tool_record *tool, u64 tag, u32 slot,
					 u32 role, struct task_struct *task)
{
	struct tool_record *old = tool_of(process->tag, process->slot);
	struct mm_record *record = bpf_map_lookup_elem(&mms, &process->mm);
	u32 old_slot = process->slot;

	__sync_fetch_and_add(&tool->processes, 1);
	process->tag = tag;
	process->slot = slot;
	process->role = role;
	process->unrecorded = 0;
	/* A vfork child's memory is still its parent's, until it execs. */
	if (record && record->users == 1)
		move_mm(record, old, tool, tag, slot);
	if (old)
		remove_process(old, old_slot, task);
}

/*
 * Tag a running process from user space: the request names a tgid and a record; reading the iterator does the work, for
 * every thread. In the kernel rather than by map updates, so that the books keep one writer and what the process already
 * holds is counted.
 */
SEC("iter/task")
int retag_process(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct retag_request *request;
	struct process_record *process;
	struct tool_record *tool;
	struct task_tag *tag, fresh = {};
	u32 zero = 0, tgid;

	request = bpf_map_lookup_elem(&retag, &zero);
	if (!task || !request)
		return 0;
	tgid = task->tgid;
	if (tgid != request->tgid)
		return 0;
	/* Dead, and nobody has waited for it yet: its exit has been counted, and no other would take it out of the books. */
	if (last_thread_of_process(task))
		return 0;
	tool = tool_of(request->tag, request->slot);
	if (!tool)
		return 0;
	fresh.tag = request->tag;
	fresh.slot = request->slot;
	fresh.role = request->role;
	tag = bpf_task_storage_get(&task_tags, task, &fresh, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!tag) {
		request->failed_tasks++;
		return 0;
	}
	*tag = fresh;
	request->tagged_tasks++;
	if (task->pid != task->tgid)
		return 0;
	process = bpf_map_lookup_elem(&processes, &tgid);
	if (!process)
		add_process(tool, fresh.tag, fresh.slot, fresh.role, task, task->real_parent->tgid, 0,
			    false);
	else if (process->tag != fresh.tag)
		move_process(process, tool, fresh.tag, fresh.slot, fresh.role, task);
	return 0;
}

/*
 * Take a process whose exit was missed out of the books: user space found it dead and names it. At the walk's end, where
 * there is no task any more. An exit that is seen after all finds the record gone, or this does: one of them counts it.
 */
SEC("iter/task")
int bury_process(struct bpf_iter__task *ctx)
{
	struct process_record *found, process;
	struct retag_request *request;
	struct tool_record *tool;
	u32 zero = 0, tgid;

	request = bpf_map_lookup_elem(&retag, &zero);
	if (ctx->task || !request)
		return 0;
	tgid = request->tgid;
	found = bpf_map_lookup_elem(&processes, &tgid);
	if (!found || found->tag != request->tag)
		return 0;
	process = *found;
	if (bpf_map_delete_elem(&processes, &tgid))
		return 0;
	request->tagged_tasks++;
	tool = tool_of(process.tag, process.slot);
	leave_mm(process.mm);
	if (tool)
		remove_process(tool, process.slot, bpf_get_current_task_btf());
	return 0;
}

/* Run once after load: see learn_cpu_offsets(). An iterator because user space can run one whenever it likes. */
SEC("iter/task")
int learn_cpus(struct bpf_iter__task *ctx)
{
	struct control *block = control_block();

	if (block)
		block->cpu_offsets_known = learn_cpu_offsets(tunables.cpu_count);
	return 0;
}
