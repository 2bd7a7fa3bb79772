"""Several GPUs: a layer's work shared in every way, timed against one GPU and against the plain way; and the model."""
