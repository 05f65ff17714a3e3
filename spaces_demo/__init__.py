"""The demo: example pictures with their questions."""
