"""The training loop and what stands around it: a run's folder, log, guards, health, resume."""
