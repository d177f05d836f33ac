"""Scores of generated pictures: how much they look like the concept, and how well they follow the prompt.

    python -m eval score --generated DIR --reference DIR [--prompts FILE]

Every number is printed with its encoder, the hash of the weights, the preprocessing and the version of the metric,
because scores of different encoders or preprocessings must not share a table.
"""
