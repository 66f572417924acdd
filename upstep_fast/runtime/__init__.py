"""Devices, processes, signals, files and facts of the machine."""
