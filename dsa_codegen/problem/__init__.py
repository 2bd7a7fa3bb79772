"""What is asked: specs and sizes, the contract of an operation, models, cache layouts, inputs, checks, comparisons."""
