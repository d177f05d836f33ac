"""Every optimizer on the embedded model, over learning rates, ranks, seeds and concepts: who converges how fast.

    python -m benchmarks.convergence run tuning    every learning rate on the tuning concepts
    python -m benchmarks.convergence run test      the same on the test concepts
    python -m benchmarks.convergence run curves    the best learning rate of the first, on the test concepts, step by
    python -m benchmarks.convergence run sweeps    one setting after the other varied on the tuning concepts
    python -m benchmarks.convergence run short     as tuning, planned for a third of the steps
    python -m benchmarks.convergence plots         draw and print what the JSON files of all that hold

`run` does what is missing and can be stopped at any time.

Many trainings share one forward and backward pass of the U-Net: their adapters lie side by side (`stacked`), the base
is the same for all. Adapters, starts, optimizers and schedule are the library's own, one optimizer for each training.
Prompts and noise of the scored pictures are the same for every training; what is drawn in training depends on concept
and seed alone.
"""
