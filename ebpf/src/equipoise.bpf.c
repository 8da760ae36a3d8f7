/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * One object of all programs: they share maps, and one translation unit needs no linker (bpftool gen object) to build.
 */
#include "kernel_types.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "events.h"
#include "core_fixes.bpf.h"
#include "state.bpf.h"
#include "charge.bpf.h"
#include "lineage.bpf.c"
#include "memory.bpf.c"
#include "connections.bpf.c"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Local variables leave no type behind: this keeps the layouts in BTF, where the ABI test reads them. */
union abi {
	struct exec_event exec;
	struct memory_event memory;
	struct exit_event exit;
	struct connection_event connection;
	enum event_kind kind;
	enum role role;
	enum untracked_reason reason;
};
const union abi *abi_layouts __attribute__((unused));
