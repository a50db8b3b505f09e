"""HTTP: connections, who may use them, the paths, and what is told of them."""
