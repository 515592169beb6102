"""For researchers: other papers' methods, tasks, families, verification, figures. Nothing but the commands imports it."""
