"""What runs beside a compiled graph: the processes that share its weights."""
