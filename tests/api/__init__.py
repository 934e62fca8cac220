"""The public functions: arguments, messages, results."""
