"""Comparisons of StaQ with other algorithms: suites of training runs, and reports from their results."""
