"""The protocols that the server speaks, each a thin translation.

A protocol translates a request's body into that of OpenAI's chat completions (or completions),
which is checked for all of them alike, and the events of the answer into objects of its own.
"""
