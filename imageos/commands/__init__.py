"""One module per command: `main(arguments)` does it and gives the exit status."""
