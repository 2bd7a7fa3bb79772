"""The benchmark: kernels timed through the dispatcher's choice against the roofline of the GPU."""
