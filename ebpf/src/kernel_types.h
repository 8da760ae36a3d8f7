/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The few kernel types our programs read, kept by hand instead of a generated vmlinux.h (135,000 lines).
 *
 * Only the fields named here are used. preserve_access_index makes each access a CO-RE relocation, so the layout below
 * is irrelevant and the running kernel's BTF decides; a field that is gone makes the program's load fail with its name.
 */
#ifndef EQUIPOISE_KERNEL_TYPES_H
#define EQUIPOISE_KERNEL_TYPES_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;
typedef __u8 u8;
typedef __u16 u16;
typedef __u64 u64;
typedef __s64 s64;
typedef __u32 u32;
typedef __s32 s32;
typedef _Bool bool;
enum { false = 0, true = 1 };

#define NULL ((void *)0)
#define CORE __attribute__((preserve_access_index))

/* uapi/linux/bpf.h: stable numbers, spelled out so that no kernel header is needed to build */
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_QUEUE = 22,
	BPF_MAP_TYPE_RINGBUF = 27,
	BPF_MAP_TYPE_TASK_STORAGE = 29,
	BPF_MAP_TYPE_CGRP_STORAGE = 32,
};

enum { BPF_ANY = 0, BPF_NOEXIST = 1 };
enum { BPF_F_NO_PREALLOC = 1, BPF_F_MMAPABLE = 1024 };
enum { BPF_LOCAL_STORAGE_GET_F_CREATE = 1 };
enum { BPF_RB_NO_WAKEUP = 1, BPF_RB_FORCE_WAKEUP = 2, BPF_RB_AVAIL_DATA = 0 };

/* linux/mm_types_task.h; the same numbers since 4.5 */
enum { MM_FILEPAGES = 0, MM_ANONPAGES = 1, MM_SWAPENTS = 2, MM_SHMEMPAGES = 3, NR_MM_COUNTERS = 4 };

enum { SIGNAL_GROUP_EXIT = 0x4 }; /* linux/sched/signal.h */
enum { SIGKILL = 9, SIGSTOP = 19 }; /* asm-generic/signal.h */
enum { PF_KTHREAD = 0x00200000 }; /* linux/sched.h: task_struct.flags */

enum { S_IFMT = 00170000, S_IFIFO = 0010000 }; /* linux/stat.h */
enum { PIDTYPE_PGID = 2, PIDTYPE_SID = 3, PIDTYPE_MAX = 4 }; /* linux/pid_types.h; the same numbers since 4.19 */
enum { AF_INET = 2, AF_INET6 = 10, IPPROTO_TCP = 6 }; /* linux/socket.h, linux/in.h */
enum { TCP_ESTABLISHED = 1, TCP_SYN_SENT = 2, TCP_SYN_RECV = 3, TCP_CLOSE = 7 }; /* net/tcp_states.h */

enum cgroup_subsys_id { memory_cgrp_id = 4 }; /* relocated: the number depends on the kernel's configuration */

typedef struct {
	int counter;
} CORE atomic_t;

typedef struct {
	long counter;
} CORE atomic_long_t;

struct percpu_counter {
	s64 count;
	s32 *counters; /* per-CPU pointer */
} CORE;

struct mm_struct {
	unsigned long arg_start;
	unsigned long arg_end;
	struct percpu_counter rss_stat[NR_MM_COUNTERS]; /* see core_fixes.bpf.h for kernels before 6.2 */
} CORE;

struct upid {
	int nr;
} CORE;

struct pid {
	struct upid numbers[1]; /* an array of open length in the kernel; [0] is the first pid namespace */
} CORE;

struct signal_struct {
	atomic_t live;
	struct pid *pids[PIDTYPE_MAX];
	int group_exit_code;
	unsigned int flags;
} CORE;

struct cgroup_subsys_state;

struct css_set {
	struct cgroup_subsys_state *subsys[1];
} CORE;

struct page_counter {
	atomic_long_t usage;
	unsigned long watermark;
} CORE;

struct mem_cgroup {
	struct page_counter memory;
} CORE;

struct pipe_inode_info {
	unsigned int head;
} CORE;

struct inode {
	unsigned short i_mode;
	struct pipe_inode_info *i_pipe;
} CORE;

struct file {
	struct inode *f_inode;
} CORE;

struct fdtable {
	struct file **fd;
} CORE;

struct files_struct {
	struct fdtable *fdt;
} CORE;

struct task_io_accounting {
	u64 rchar;
} CORE;

struct task_struct {
	unsigned int flags;
	int pid;
	int tgid;
	int exit_code;
	char comm[16];
	struct mm_struct *mm;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	struct signal_struct *signal;
	struct css_set *cgroups;
	struct files_struct *files;
	struct task_io_accounting ioac;
	struct bpf_local_storage *bpf_storage;
} CORE;

struct bpf_array {
	void *pptrs[1]; /* per-CPU pointer of element 0; an array of open length in the kernel */
} CORE;

struct linux_binprm {
	const char *filename;
} CORE;

struct ns_common {
	unsigned int inum;
} CORE;

struct net {
	struct ns_common ns;
} CORE;

typedef struct {
	struct net *net;
} CORE possible_net_t;

struct in6_addr {
	union {
		__u8 u6_addr8[16];
	} in6_u;
} CORE;

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
} CORE;

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
} CORE;

struct bpf_iter__task {
	struct task_struct *task;
} CORE;

struct pt_regs; /* named by bpf_tracing.h */

#endif
