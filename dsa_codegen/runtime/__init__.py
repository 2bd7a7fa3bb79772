"""What runs while a model serves: the dispatcher, its plans, torch's operators, what to warm up."""
