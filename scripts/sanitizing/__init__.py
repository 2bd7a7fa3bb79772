"""What runs under compute-sanitizer, in which pieces, what its reports say, and what has ended clean for which kernel text."""
