"""Probes in the kernel and their reader."""
