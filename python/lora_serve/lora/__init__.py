"""Adapter files, names, generations and memory.

Nothing is imported here: the HTTP server needs names and folders, not what brings weights to a device.
"""
