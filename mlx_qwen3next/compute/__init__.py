"""Pure functions of arrays: the equations, the operations, and which form of each runs."""
