"""The command line: parse, call one function, print. Heavy imports stand inside the commands, so that --help is quick."""
