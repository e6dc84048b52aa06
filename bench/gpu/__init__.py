"""The GPU side of the benchmarks: ahead-of-time builds, the roofline, the report on a card, the sweep of tiles."""
