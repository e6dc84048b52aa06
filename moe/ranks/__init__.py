"""Modules over many ranks: sharded, kept equal, moved, saved under one fold and loaded under another."""
