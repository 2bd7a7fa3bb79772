"""Tuning: the search for the fastest correct config of an operation, and the records it leaves; nothing else imports optuna."""
