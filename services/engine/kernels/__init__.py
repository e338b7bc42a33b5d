"""One operation a file, its plain PyTorch reference beside it."""
