"""The checks of doctor: a module for each area, a function for each check."""
