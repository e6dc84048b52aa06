"""`headgate bench overlap`: how much of the rows' travel is hidden behind computation, on gloo ranks of this machine.

The link is declared: each transfer of n rows sleeps n times the same time, on both ways and in both passes. So the
share that is hidden is a measurement, and the link is not.
"""
