"""The commands of the command line, one a file; heavy parts are imported inside, so that `nestc --help` is quick."""
