"""A local page to play with a prompt: choose tokens, cut between them, see what the model loses."""
