"""Backups: the stream of export, and what import reads besides."""
