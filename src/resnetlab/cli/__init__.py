"""The command line: parse, call one function, print. Heavy imports are inside the commands, so that --help is quick."""
