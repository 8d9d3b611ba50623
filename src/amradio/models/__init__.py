"""The networks. They know tensors and modules, and nothing about files."""
