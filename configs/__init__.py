"""Recipes as data: read by path, never imported."""
