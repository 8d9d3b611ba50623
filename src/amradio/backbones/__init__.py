"""The backbone protocol, and `load`, which makes a backbone from a name."""
