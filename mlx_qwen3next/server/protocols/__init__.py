"""The forms in which answers are sent."""
