"""The network and its state: config, layers, MTP head, caches, packing, division."""
