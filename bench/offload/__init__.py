"""`headgate bench offload`: caches, predictors and prefetch on a trace; generation with experts on disk.

command.py is the command. Nothing is imported here: jobs that measure memory are processes of files below.
"""
