"""Submissions to AlgoPerf's self-tuning ruleset."""
