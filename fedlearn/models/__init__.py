"""Models that can train under record-level privacy: no batch statistics, no state, no in-place operations, no tied weights.

Import a model from its module; this package imports nothing, so that it can be named without loading torch.
"""
