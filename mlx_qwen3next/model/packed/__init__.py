"""The model as it runs: weights stacked, few launches, steps traced."""
