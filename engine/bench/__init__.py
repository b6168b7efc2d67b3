"""Measuring a bundle: problems, a judge, a race with a fair order, JSON lines, a report. Used by lace-bench.

The peers that are compared with live outside the package, in benchmarks/.
"""
