"""The zoo: tiny random models of every type that transformers has, compiled, counted and judged."""
