"""Every optimizer on the embedded model, over learning rates, ranks, seeds and concepts: who converges how fast.

    python -m benchmarks.convergence run      train and score what is missing, into one JSON
    python -m benchmarks.convergence plots    draw and print everything from that JSON

Many trainings share one forward and backward pass of the U-Net: their adapters lie side by side (`stacked`), the base
is the same for all. Adapters, starts, optimizers and schedule are the library's own, one optimizer for each training.
Prompts and noise of the scored pictures are the same for every training; what is drawn in training depends on concept
and seed alone.
"""
