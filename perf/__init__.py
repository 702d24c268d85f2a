"""Costs of a run, predicted and measured: FLOPs, memory, time, energy, money."""
