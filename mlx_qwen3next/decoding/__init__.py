"""From a prompt to tokens to text."""
