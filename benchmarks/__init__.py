"""How fast, and how much memory: kernels against their peers and the hardware's limits, and training end to end.

Runs from the checkout (`python -m benchmarks --help`); docs/measuring.md says how every number is made.
"""
