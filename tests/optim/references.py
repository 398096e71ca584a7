"""Update rules in float64 NumPy, written from the papers: direction of one leaf from its gradients."""

import numpy as np


def adam(gradients, params, b1=0.9, b2=0.95, epsilon=1e-8):
    """Kingma and Ba, 2015, algorithm 1."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        yield (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon)


def lion(gradients, params, b1=0.9, b2=0.99):
    """Chen et al., 2023, algorithm 2."""
    m = 0.0
    for g in gradients:
        direction = np.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
        yield direction


def sgd(gradients, params, momentum=0.9):
    """Sutskever et al., 2013, with the trace."""
    m = 0.0
    for g in gradients:
        m = momentum * m + g
        yield m


def nesterov(gradients, params, momentum=0.9):
    m = 0.0
    for g in gradients:
        m = momentum * m + g
        yield g + momentum * m


def adafactor(gradients, params, decay_rate=0.8, factored=True):
    """Shazeer and Stern, 2018, algorithm 4 (matrices) and 5 (others) on one matrix or vector."""
    r = c = v = 0.0
    for t, g in enumerate(gradients, 1):
        beta = 1 - t**-decay_rate
        square = g**2 + 1e-30
        if factored and g.ndim == 2:
            r = beta * r + (1 - beta) * square.sum(1)
            c = beta * c + (1 - beta) * square.sum(0)
            v = np.outer(r, c) / r.sum()
        else:
            v = beta * v + (1 - beta) * square
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u**2)))
        params = yield u * max(1e-3, np.sqrt(np.mean(params**2)))


def newton_schulz(x, num_iterations=5):
    """Jordan et al., 2024: the odd quintic 3.4445 x - 4.7750 x^3 + 2.0315 x^5 on the singular values."""
    x = x / np.linalg.norm(x)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon(gradients, params, momentum=0.95, consistent_rms=0.2):
    """Jordan et al., 2024, with bias-corrected Nesterov momentum as optax; scale of Liu et al., 2025."""
    m = 0.0
    for t, g in enumerate(gradients, 1):
        m = momentum * m + (1 - momentum) * g
        ahead = momentum * m / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
        yield newton_schulz(ahead) * consistent_rms * np.sqrt(max(g.shape))
