"""Random damage: whatever arrives, the answer is right or an error with a name."""
