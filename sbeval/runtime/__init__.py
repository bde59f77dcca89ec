"""The machine: devices, processes, progress, files and memory."""
