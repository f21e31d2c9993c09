"""Operations, one file each: the PyTorch reference, the autograd Function and the dispatch."""
