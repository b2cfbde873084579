"""The run side of the target ``vta``: its configuration, its instructions, and the machine that executes them."""
