"""Array functions that are fast on CPU, GPU and TPU."""
