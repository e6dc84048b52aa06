"""`headgate bench dispatch`: an expert layer on gloo ranks of this machine, beside rivals: numbers, bytes, steps.

gloo on one machine measures correctness and bytes, not the speed of a network.
"""
