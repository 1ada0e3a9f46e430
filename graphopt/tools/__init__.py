"""Tools on the public API: the command line, explain, diff, and the journal of a compilation."""
