"""Bridges to other software."""
