"""Everything around the training loop: a run's folder, log, guards, health, resume."""
