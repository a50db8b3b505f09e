"""From files to parameters: finding, checking, matching and loading weights."""
