"""The command line: parsing, wiring and rendering. Nothing below this package prints or exits."""
