"""Jinja templates of model cards."""
