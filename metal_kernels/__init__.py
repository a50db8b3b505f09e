"""Custom Metal kernels, one ``.metal`` file per operation family."""
