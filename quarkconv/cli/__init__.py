"""The command line: one file a command, without logic; one sink for output; rendering apart."""
