"""Activations put in the place of others: patching between prompts, causal tracing."""
