"""Properties: laws that hold for every input, run on examples that Hypothesis draws."""
