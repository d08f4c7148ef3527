"""cnnlab: from an idea about convolutional networks to a table that a paper could print."""

__version__ = "0.1.0"
