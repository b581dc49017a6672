"""Primitives: the functions of a step that transforms rewrite."""
