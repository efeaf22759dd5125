"""Sweeps: what is knocked out, who answers, and the rows of the table."""
