"""The target ``vta``: quantized regions become tiles, instructions and micro-ops of the VTA accelerator."""
