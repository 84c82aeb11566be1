"""Runs about runs: several programs in a row, compared."""
