"""Finds placements: METHODS by name, their searches, and their inner loops."""
