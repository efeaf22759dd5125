"""Features: what they carry, which are chosen, what each costs, what operators they are."""
