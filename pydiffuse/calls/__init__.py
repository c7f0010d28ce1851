"""Between the public functions and the ops: arguments checked once, parameters in the kernels' order."""
