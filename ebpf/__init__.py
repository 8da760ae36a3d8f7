"""eBPF: finds tool calls by exec lineage, counts their memory and stops them at their budget, in the kernel.

`Probes.load()` brings the programs in, `ToolMemory` is what the daemon talks to, `EventReader` turns the ring buffer
into `policies.events`. Where the machine cannot do it, one typed `ProbesUnavailable` says why and what would help.
Imports policies only; never daemon or gpuctl.
"""
