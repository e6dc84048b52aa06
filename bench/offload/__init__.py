"""Offload caches measured: what predictors, policies and prefetching reach on a trace."""
