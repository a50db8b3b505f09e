"""Grammars that answers are held to."""
