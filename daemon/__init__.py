"""The daemon: loop, cgroups, actuators, journal, servers and the command line."""
