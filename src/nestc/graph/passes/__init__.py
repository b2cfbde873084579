"""L1 passes, one a file; `nestc.graph.pipeline` holds their order and says why."""
