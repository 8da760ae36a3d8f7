/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Who ended it: signals that end a process unless it has a handler, and who sent them. Part of equipoise.bpf.c.
 *
 * The exit says which signal it was, never whose. The tracepoint fires in the sender, for each process it reaches. One
 * program, not two as in lineage.bpf.c: a signal that is missed costs a line on the screen, one told twice would lie.
 */

enum { SI_FROMUSER_MAX = 0, SEND_SIG_PRIV = 1 }; /* uapi/asm-generic/siginfo.h, linux/sched/signal.h */
enum { TRACE_SIGNAL_DELIVERED = 0 }; /* trace/events/signal.h: not ignored, not pending already */

/* HUP INT QUIT ILL ABRT BUS FPE KILL SEGV TERM XCPU XFSZ SYS, by asm-generic/signal.h: SIGPIPE and timers are plain life */
#define ENDING_SIGNALS                                                                                                 \
	(1ULL << 1 | 1ULL << 2 | 1ULL << 3 | 1ULL << 4 | 1ULL << 6 | 1ULL << 7 | 1ULL << 8 | 1ULL << SIGKILL |          \
	 1ULL << 11 | 1ULL << 15 | 1ULL << 24 | 1ULL << 25 | 1ULL << 31)

struct kernel_siginfo {
	int si_code;
} CORE;

/* The kernel marks what it sends itself by a pointer that is none (SEND_SIG_PRIV), or by a code above 0. */
static __always_inline bool sent_by_kernel(const struct kernel_siginfo *info, struct task_struct *sender)
{
	if (sender->flags & PF_KTHREAD || (u64)info == SEND_SIG_PRIV)
		return true;
	return (u64)info > SEND_SIG_PRIV && BPF_CORE_READ(info, si_code) > SI_FROMUSER_MAX;
}

SEC("tp_btf/signal_generate")
int BPF_PROG(on_signal, int sig, const struct kernel_siginfo *info, struct task_struct *task, int group, int result)
{
	struct task_struct *sender = bpf_get_current_task_btf();
	struct signal_event *event;
	struct tool_record *tool;
	struct task_tag *tag;

	if (sig < 1 || sig > 31 || !(ENDING_SIGNALS >> sig & 1) || result != TRACE_SIGNAL_DELIVERED)
		return 0;
	tag = current_tag(task);
	if (!tag)
		return 0;
	tool = tool_of(tag->tag, tag->slot);
	if (!tool || tool->role != ROLE_TOOL)
		return 0;
	event = event_reserve(EVENT_TOOL_CALL_SIGNALLED, sizeof(*event));
	if (!event)
		return 0;
	fill_header(&event->header, EVENT_TOOL_CALL_SIGNALLED, sizeof(*event), tool, tag->slot, task);
	bpf_get_current_comm(event->sender_comm, sizeof(event->sender_comm));
	bpf_probe_read_kernel_str(event->header.comm, sizeof(event->header.comm), task->comm);
	event->signal = sig;
	event->sender_pid = sender->tgid;
	event->by_kernel = sent_by_kernel(info, sender);
	event->padding = 0;
	event_submit(event, false); /* the exit that follows wakes the reader */
	return 0;
}
