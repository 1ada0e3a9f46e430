"""Tensor parallelism: how a graph is shared by ranks, decided by its data flow, and the graph of one rank."""
