"""Which experts stand in slots: one compiled core for simulator and live model, policies, predictors, prefetch."""
