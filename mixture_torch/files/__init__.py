"""The files of a run: a log of one row per step and, if asked for, the responsibilities of each step.

This package writes rows of finished numbers. It knows nothing of mixtures, GPUs or ranks.
"""
