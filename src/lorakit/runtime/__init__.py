"""The machine below training and inference: devices, processes, files, signals, and the events of a run."""
