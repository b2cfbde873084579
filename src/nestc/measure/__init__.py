"""Fair timing: engines run interleaved on the same cores with the same threads, and their outputs are compared."""

from nestc.measure.machine import context, cpu_name, peak_rss_mb, pinned, usable_cores, versions

__all__ = ["context", "cpu_name", "peak_rss_mb", "pinned", "usable_cores", "versions"]
