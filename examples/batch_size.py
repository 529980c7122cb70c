"""How high may the learning rate be, at which batch size? Predicted from curvature, and tried.

A small network learns digits for a while; then, from the same weights, the critical learning rate is predicted for
several batch sizes, and the rate at which runs really leave is searched by bisection. For SGD the critical rate grows
towards in proportion to the batch size while noise dominates, and saturates; for Adam the same noise model gives a
square root (arXiv 2006.09092).

    python examples/batch_size.py [--picture batch_size.png]
"""
