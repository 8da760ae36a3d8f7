"""The command line: `equipoise COMMAND`.

Owns: parsing and printing, one file a group of commands. Must not: do the work of a command, or be imported by any
other part.
"""
