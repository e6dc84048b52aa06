"""Experts larger than the device: they stand in a lower tier, and those in use in a fixed number of slots."""
