"""From measurements to a plan: costs of head counts, the budget, the groups."""
