"""Processing in DRAM, the run side: machine data, requests and their encodings, what they do and how long it takes."""
