"""The AiM target: matrix-vector products done inside the banks of a DRAM."""
