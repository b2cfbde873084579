"""The measured choice between several ways to compute a region on the CPU: store, measurement, search."""
