"""`headgate bench offload`: caches, predictors and prefetch on a trace; generation with experts on disk."""
