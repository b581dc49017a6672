"""Transforms: one file each, each a function from a step to a step."""
