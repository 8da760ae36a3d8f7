/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * One object of all programs: they share maps, and one translation unit needs no linker (bpftool gen object) to build.
 * build.py puts every other X.bpf.c behind this; what two of them need is in a header.
 */
#include "kernel_types.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "events.h"
#include "core_fixes.bpf.h"
#include "state.bpf.h"
#include "charge.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Local variables leave no type behind: this keeps the layouts in BTF, where user space reads them. */
union abi {
	union event event;
	enum event_kind kind;
	enum role role;
	enum untracked_reason reason;
	enum tool_flag flag;
};
const union abi *abi_layouts __attribute__((unused));
