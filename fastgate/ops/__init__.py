"""One file per operation: its plain-PyTorch meaning, its autograd Function, its dispatch."""
