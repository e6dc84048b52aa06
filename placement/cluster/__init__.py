"""The machines: nodes, GPUs and links, and the rows that dispatchers send over them."""
