"""Runs that are killed, disks that fail, files that rot: short by default, long by `make faults`."""
