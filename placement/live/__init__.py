"""Placements of a system that runs: a batch's replicas, migration in steps, and whether it pays."""
