"""Interventions and readings: what a model says when it is changed, and layer by layer."""
