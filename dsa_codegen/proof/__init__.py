"""Is a variant right, and how fast is it."""
