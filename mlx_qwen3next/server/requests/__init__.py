"""Requests: the checks of their fields, and the way from their messages to a prompt."""
