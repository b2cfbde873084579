"""``nestc demo``: a small trained classifier that ships with the package, compiled and run on its test images."""

from __future__ import annotations

from nestc.commands import common


def demo(
    target: common.Targets = None,
    threads: common.Threads = None,
    json: common.Json = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Compile a small trained network (Fashion-MNIST), run it on 500 test images, and show what was generated.

    Example: `nestc demo --threads 1`
    """
    from nestc.demo import describe, run

    with common.progress() as step:
        report = run(target or ["cpu"], threads, step)
    if json:
        common.print_json(report)
        return
    for line in describe(report):
        print(line)
