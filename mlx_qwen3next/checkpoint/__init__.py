"""Files to parameters: finding, checking, matching and loading a model's weights."""
