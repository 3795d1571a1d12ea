"""Comparing pruning methods: every method and pattern pruned and measured in one run, one table and plots."""
