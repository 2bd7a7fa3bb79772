"""What the command line calls, and how it shows what came of it."""
