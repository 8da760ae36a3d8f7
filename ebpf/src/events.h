/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The ABI between our BPF programs and user space: ring-buffer events and the records both sides map.
 *
 * Fixed widths, explicit padding, every size asserted. User space mirrors nothing: ebpf/abi.py reads these layouts from
 * the compiled object's BTF. A new kind of event needs a name in enum event_kind, its record, and its line in union event;
 * ebpf/reader.py hands it on as the class of policies/events.py that is called like it (EVENT_PROCESS_STARTED:
 * ProcessStarted), field by field under the same names.
 *
 * Raise ABI_VERSION, here and in abi.py, where what is here already changes its meaning.
 *
 * Byte counts are bytes, times are CLOCK_MONOTONIC nanoseconds (bpf_ktime_get_ns), tgid is what user space calls a pid.
 */
#ifndef EQUIPOISE_EVENTS_H
#define EQUIPOISE_EVENTS_H

#define ABI_VERSION 3
#define COMM_BYTES 16
#define FILENAME_BYTES 128
#define ARGV_BYTES 1024
#define ADDRESS_BYTES 16

enum role {
	ROLE_AGENT = 1, /* the sandbox's runtime: the registered process, its threads, its forks that have not exec'd */
	ROLE_TOOL = 2,
};

enum event_kind {
	EVENT_TOOL_EXEC = 1,   /* an agent's fork exec'd: a tool call began */
	EVENT_CHILD_EXEC = 2,  /* the root process exec'd again; with tunables.report_child_execs any other inside as well */
	EVENT_MEMORY = 3,      /* usage moved by a step, up or down */
	EVENT_SOFT_BUDGET = 4, /* usage rose above soft_bytes */
	EVENT_HARD_BUDGET = 5, /* usage rose above hard_bytes; the charging process was stopped where `enforced` is 1 */
	EVENT_TOOL_EXIT = 6,   /* the root process of the tag exited; processes may have escaped */
	EVENT_TOOL_GONE = 7,   /* the last process of the tag exited */
	EVENT_CONNECTION = 8,  /* a TCP connection that an agent or a tool call opened is established */
	EVENT_TOOL_CALL_SIGNALLED = 9, /* a process was sent a signal that ends it unless it has a handler */
	EVENT_KIND_COUNT = 10, /* last */
};

/* Why a process or a tool call could not be followed; index into control.untracked */
enum untracked_reason {
	UNTRACKED_NO_SLOT = 0,    /* more tool calls alive, or not yet given back, than tool records */
	UNTRACKED_NO_STORAGE = 1, /* task storage refused (memory or contention) */
	UNTRACKED_NO_PROCESS = 2, /* map `processes` full */
	UNTRACKED_NO_MM = 3,      /* map `mms` full */
	UNTRACKED_REASON_COUNT = 4,
};

struct event_header {
	__u32 kind;
	__u32 size;
	__u64 time_ns;
	__u64 tag;
	__u64 agent_tag;
	__u64 sandbox_id; /* cgroup id under which user space registered the agent */
	__u64 cgroup_id;  /* v2 id of the cgroup the process is in now: that one or one below it */
	__u32 slot;
	__u32 role;
	__u32 tgid;
	__u32 parent_tgid;
	char comm[COMM_BYTES];
};
_Static_assert(sizeof(struct event_header) == 80, "event_header");

struct exec_event {
	struct event_header header;
	__u32 filename_bytes;   /* copied, without the terminating zero */
	__u32 argv_bytes;       /* copied: arguments separated by zeros */
	__u32 argv_total_bytes; /* what the process has; larger than argv_bytes when cut off */
	__u32 session_id;       /* sid and pgid in the first pid namespace, like tgid: equal to it where the process leads */
	__u32 group_id;
	__u32 input_stamp; /* see struct task_tag */
	char filename[FILENAME_BYTES];
	char argv[ARGV_BYTES];
};
_Static_assert(sizeof(struct exec_event) == 1256, "exec_event");

struct memory_event {
	struct event_header header;
	__u64 usage_bytes;
	__u64 peak_bytes;
	__u64 budget_bytes; /* the budget reached; 0 in EVENT_MEMORY */
	__u64 memcg_bytes;  /* of the tool call's own memory cgroup, else 0 */
	__u64 memcg_peak_bytes;
	__u32 processes;
	__u32 enforced; /* 1: SIGSTOP was sent; 0: nobody is listening (stale heartbeat), so nobody was stopped */
};
_Static_assert(sizeof(struct memory_event) == 128, "memory_event");

struct exit_event {
	struct event_header header;
	__u64 started_ns;
	__u64 usage_bytes; /* of the processes that are left */
	__u64 peak_bytes;
	__u64 memcg_bytes;
	__u64 memcg_peak_bytes;
	__u64 stops;
	__u32 exit_code;   /* 0..255 */
	__u32 exit_signal; /* 0: exited by itself */
	__u32 processes;   /* of this tag still alive */
	__u32 padding;
};
_Static_assert(sizeof(struct exit_event) == 144, "exit_event");

/* The header tells of the task that called connect(), as it was then; time_ns is when the other side had answered. */
struct connection_event {
	struct event_header header;
	__u32 family;            /* of the socket: AF_INET or AF_INET6 */
	__u32 network_namespace; /* its inode, as in /proc/PID/ns/net */
	__u8 local_address[ADDRESS_BYTES]; /* network order; an IPv4 address as ::ffff:a.b.c.d */
	__u8 remote_address[ADDRESS_BYTES];
	__u16 local_port; /* host order, both */
	__u16 remote_port;
	__u32 padding;
};
_Static_assert(sizeof(struct connection_event) == 128, "connection_event");

/* The header tells of the task that was sent the signal, but for cgroup_id: that is the sender's. */
struct signal_event {
	struct event_header header;
	__u32 signal;
	__u32 sender_pid; /* tgid of the task that ran; where by_kernel is 1 that need not be whose doing it was */
	__u32 by_kernel;  /* 1: an OOM kill, a fault of its own, a kernel thread (Ctrl-C on a terminal) */
	__u32 padding;
	char sender_comm[COMM_BYTES];
};
_Static_assert(sizeof(struct signal_event) == 112, "signal_event");

/* The record that comes with each kind of event: EVENT_TOOL_EXIT with member tool_exit */
union event {
	struct exec_event tool_exec, child_exec;
	struct memory_event memory, soft_budget, hard_budget;
	struct exit_event tool_exit, tool_gone;
	struct connection_event connection;
	struct signal_event tool_call_signalled;
};

/* Bits of tool_record.flags, written by user space */
enum tool_flag {
	TOOL_OWN_MEMCG = 1, /* its processes, and no others, are in one memory cgroup: report that counter too */
	/* It may still become the agent: what its processes exec gets a record of its own, which inherits this. */
	TOOL_STARTING = 2,
};

/*
 * One tool call (or one agent's runtime: role says which). An element of the mmapable array `tools`, so user space reads
 * usage and moves budgets with plain loads and stores. Who writes a field is said once: everything up to `soft_bytes` by
 * the kernel side alone once the record is in use, the rest by user space alone, which also may name another root.
 */
struct tool_record {
	__u64 tag; /* 0: the slot is free */
	__u64 agent_tag;
	__u64 sandbox_id;
	__u64 started_ns;
	__u64 usage_bytes; /* private + min(shared sum, largest shared of one process) */
	__u64 peak_bytes;
	__s64 private_bytes;        /* anonymous pages, without what a fork inherited */
	__s64 shared_bytes;         /* file and shared-memory pages, summed over processes */
	__u64 shared_largest_bytes; /* most that one process mapped so far */
	__u64 memcg_bytes;
	__u64 memcg_peak_bytes;
	__u64 reported_bytes;      /* usage in the last EVENT_MEMORY */
	__u64 soft_reported_bytes; /* the soft budget that EVENT_SOFT_BUDGET was sent for; 0: armed */
	__u64 hard_reported_bytes; /* likewise for the hard budget */
	__u64 stalled_since_ns;    /* first stop at the present hard budget; 0: not stopped */
	__u64 stops_started;       /* raised before a SIGSTOP is sent ... */
	__u64 stops_finished;      /* ... and after: equal means none is in flight */
	__u32 role;
	__u32 root_tgid;
	__u32 processes; /* alive */
	__u32 execs;
	/* from here on written by user space */
	__u64 soft_bytes; /* 0: no budget */
	__u64 hard_bytes; /* 0: no budget; never enforced on ROLE_AGENT */
	__u64 child_soft_bytes; /* budgets that a tool call found by an exec below this record starts with */
	__u64 child_hard_bytes;
	__u32 flags;
	__u32 padding;
	__u64 reserved[7];
};
_Static_assert(sizeof(struct tool_record) == 248, "tool_record");

/* Value of the task storage `task_tags`: who a task belongs to */
struct task_tag {
	__u64 tag;
	__u32 slot;
	__u32 role;
	__u32 input_stamp; /* of a fork of an agent: the agent's input then; another number once it got more. 0: not known */
	__u32 padding;
};
_Static_assert(sizeof(struct task_tag) == 24, "task_tag");

/* Value of `processes`, keyed by tgid: every living process of every tag, escapees included */
struct process_record {
	__u64 tag;
	__u64 mm; /* key into `mms` */
	__u64 started_ns;
	__u32 slot;
	__u32 role;
	__u32 parent_tgid;
	__u32 unrecorded; /* the process whose exec began a tool call for which there was no record; 0: none did */
};
_Static_assert(sizeof(struct process_record) == 40, "process_record");

/* Value of `mms`, keyed by the address of the mm_struct: vfork children share it with their parent */
struct mm_record {
	__u64 tag;
	__s64 private_pages;   /* counted in the tool record */
	__s64 shared_pages;    /* likewise */
	__s64 inherited_pages; /* anonymous pages that came with fork and are not counted */
	__s64 anon_correction_pages;   /* exact minus cheap reading at the last full sum, */
	__s64 shared_correction_pages; /* see charge.bpf.h */
	__u32 slot;
	__u32 users; /* processes */
};
_Static_assert(sizeof(struct mm_record) == 56, "mm_record");

/* Element 0 of the mmapable array `control` */
struct control {
	__u64 heartbeat_ns; /* user space writes "I am alive"; 0: never, so nobody is stopped */
	__u64 tool_counter;
	__u64 lost[EVENT_KIND_COUNT]; /* events that found the ring full, by kind */
	__u64 untracked[UNTRACKED_REASON_COUNT];
	__u64 stops_withheld;    /* charges above a hard budget while the heartbeat was stale */
	__u64 cpu_offsets_known; /* CPUs whose per-CPU offset was learned; 0: counters are approximate */
};
_Static_assert(sizeof(struct control) == 144, "control");

/* Element 0 of `retag_request`: the argument of the retag iterator */
struct retag_request {
	__u64 tag;
	__u32 slot;
	__u32 role;
	__u32 tgid;
	__u32 tagged_tasks; /* out: threads that carry the tag now, or processes buried; 0: no such process */
	__u32 failed_tasks; /* out */
	__u32 padding;
};
_Static_assert(sizeof(struct retag_request) == 32, "retag_request");

/* The one variable of .rodata, written before load */
struct tunables {
	__u32 abi_version;
	__u32 page_shift;
	__u32 cpu_count;
	__u32 full_sum_cpus; /* up to this many CPUs every charge sums all per-CPU remainders */
	__u64 step_bytes;    /* least change that EVENT_MEMORY reports ... */
	__u32 step_shift;    /* ... or usage >> step_shift, whichever is larger */
	__u32 tag_epoch;     /* high half of the tags made in the kernel: unique per load */
	__u64 heartbeat_timeout_ns;
	__u32 report_child_execs;
	__u32 padding;
};
_Static_assert(sizeof(struct tunables) == 48, "tunables");

#endif
