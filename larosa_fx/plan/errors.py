"""What is raised where a plan cannot be used."""


class PlanError(ValueError):
    """A plan that cannot be used: not readable, not valid, or not this model's. The message names the mismatch."""
