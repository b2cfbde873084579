"""Fair timing: engines run interleaved on the same cores with the same threads, and their outputs are compared."""

from nestc.measure.bench import bench
from nestc.measure.compare import Difference, difference
from nestc.measure.engines import PEERS, Engine, NestcEngine, OnnxRuntimeEngine, OpenVinoEngine, open_peer
from nestc.measure.machine import context, cpu_name, peak_rss_mb, pinned, usable_cores, versions
from nestc.measure.timing import Timing, interleave

__all__ = [
    "PEERS",
    "Difference",
    "Engine",
    "NestcEngine",
    "OnnxRuntimeEngine",
    "OpenVinoEngine",
    "Timing",
    "bench",
    "context",
    "cpu_name",
    "difference",
    "interleave",
    "open_peer",
    "peak_rss_mb",
    "pinned",
    "usable_cores",
    "versions",
]
