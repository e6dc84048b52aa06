"""The kinds of predictors of placement/caching/predict.py: what each learns, and the compiled loops that serve it live.

| file | holds |
|---|---|
| linear.py, fitting.py | a predictor that adds up tables; how the tables are learned |
| ngram.py | a predictor from token ids: what followed the same last words |
| curve.py | from a score to a probability: a rising curve for each layer |
| checks.py | what a predictor's file must hold before compiled code may index by it |
"""
