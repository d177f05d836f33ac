"""Language models: the second task of the one trainer. Nothing here knows pictures."""
