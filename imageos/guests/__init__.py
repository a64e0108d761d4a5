"""The guest: its files and programs, its identity, its boot loader."""
