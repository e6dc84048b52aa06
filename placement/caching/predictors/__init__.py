"""Kinds of predictors of placement/caching/predict.py: what each learns, and the compiled loops that serve it live."""
