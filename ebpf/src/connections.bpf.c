/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Who opened a TCP connection: what the other end, which sees an address and a port, is told of its peer. Part of
 * equipoise.bpf.c.
 *
 * No single moment knows both. At SYN_SENT the running task is the one that called connect(), and the source port is not
 * chosen yet; at ESTABLISHED the port is known, and the running task is whoever the packet interrupted. So the event's
 * header is filled at the first, waits under the socket's address, and leaves at the second. A connection that fails is
 * dropped at CLOSE. Only connections that are opened count, not accepted ones.
 *
 * Two programs for the same reason as in lineage.bpf.c: what the first did, the second finds done.
 */

/* Connections on their way, by the address of the struct sock. A scan of many ports pushes out the oldest. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, u64);
	__type(value, struct event_header);
} connecting SEC(".maps");

static __always_inline void remember_caller(u64 key)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct event_header header = {};
	struct tool_record *tool;
	struct task_tag *tag;

	/* A socket's memory is used again: whatever waits under this address is of another connection. */
	bpf_map_delete_elem(&connecting, &key);
	if (!may_have_storage(task) && task->pid == task->tgid)
		return;
	tag = current_tag(task);
	if (!tag)
		return;
	tool = tool_of(tag->tag, tag->slot);
	if (!tool)
		return;
	fill_header(&header, EVENT_CONNECTION, sizeof(struct connection_event), tool, tag->slot, task);
	bpf_map_update_elem(&connecting, &key, &header, BPF_ANY);
}

static __always_inline void emit_connection(u64 key, const struct sock *sk)
{
	struct event_header *found = bpf_map_lookup_elem(&connecting, &key), header;
	struct connection_event *event;

	if (!found)
		return;
	header = *found;
	if (bpf_map_delete_elem(&connecting, &key)) /* the other program was faster */
		return;
	event = event_reserve(EVENT_CONNECTION, sizeof(*event));
	if (!event)
		return;
	event->header = header;
	event->header.time_ns = bpf_ktime_get_ns();
	event->family = BPF_CORE_READ(sk, __sk_common.skc_family);
	event->network_namespace = network_namespace_of(sk);
	read_address(event->local_address, sk, false);
	read_address(event->remote_address, sk, true);
	event->local_port = BPF_CORE_READ(sk, __sk_common.skc_num);
	event->remote_port = __builtin_bswap16(BPF_CORE_READ(sk, __sk_common.skc_dport));
	event->padding = 0;
	/* Wakes nobody, which would cost ten times the rest: who asks for a peer reads the ring first, and so does an exec. */
	event_submit(event, false);
}

static __always_inline int follow_connection(const struct sock *sk, int oldstate, int newstate)
{
	u64 key = (u64)sk;

	if (newstate == TCP_SYN_SENT) {
		if (BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP) /* SCTP and MPTCP name their states alike */
			remember_caller(key);
	} else if (oldstate == TCP_SYN_SENT || oldstate == TCP_SYN_RECV) { /* the latter: both ends opened at once */
		if (newstate == TCP_ESTABLISHED)
			emit_connection(key, sk);
		else if (newstate == TCP_CLOSE)
			bpf_map_delete_elem(&connecting, &key);
	}
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(on_connect, const struct sock *sk, int oldstate, int newstate)
{
	return follow_connection(sk, oldstate, newstate);
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(on_connect_again, const struct sock *sk, int oldstate, int newstate)
{
	return follow_connection(sk, oldstate, newstate);
}
