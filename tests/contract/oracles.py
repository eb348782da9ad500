"""Every algorithm once more, whole, in numpy, from its paper. Nothing here is shared with the strategies or with the toy loop.

Weights are one vector, the intercept last. A client is (X, y) with X carrying a column of ones; its loss is ||X w - y||^2 / (2 n).
`rounds` lists the clients of each round; `steps[k]` are client k's local steps; `lr` is its learning rate.
"""

from __future__ import annotations

import itertools

import numpy as np


class Clients:
    def __init__(self, xs, ys, steps, lr):
        self.X = [np.hstack([x, np.ones((len(x), 1))]) for x in xs]
        self.y, self.steps, self.lr = ys, steps, lr
        self.n = np.array([len(y) for y in ys], dtype=float)

    def grad(self, k, w):
        return self.X[k].T @ (self.X[k] @ w - self.y[k]) / self.n[k]

    def sgd(self, k, w, extra=lambda w: 0.0):
        for _ in range(self.steps[k]):
            w = w - self.lr * (self.grad(k, w) + extra(w))
        return w

    def weights(self, S):
        return self.n[S] / self.n[S].sum()


def fedavg(c, x, rounds):
    for S in rounds:
        x = sum(p * c.sgd(k, x) for k, p in zip(S, c.weights(S), strict=True))
    return x


def fedprox(c, x, rounds, mu):
    for S in rounds:
        local = [c.sgd(k, x, lambda w, x=x: mu * (w - x)) for k in S]
        x = sum(p * w for p, w in zip(c.weights(S), local, strict=True))
    return x


def mean_delta(c, x, S):
    return sum(p * (c.sgd(k, x) - x) for k, p in zip(S, c.weights(S), strict=True))


def fedavgm(c, x, rounds, server_lr, momentum):
    v = 0.0
    for S in rounds:
        v = momentum * v + mean_delta(c, x, S)
        x = x + server_lr * v
    return x


def adaptive(rule):
    def run(c, x, rounds, server_lr, beta1, tau, beta2=0.0, v0=None):
        m, v = np.zeros_like(x), np.full_like(x, tau**2 if v0 is None else v0)
        for S in rounds:
            d = mean_delta(c, x, S)
            m = beta1 * m + (1 - beta1) * d
            v = {
                "adagrad": v + d**2,
                "yogi": v - (1 - beta2) * d**2 * np.sign(v - d**2),
                "adam": beta2 * v + (1 - beta2) * d**2,
            }[rule]
            x = x + server_lr * m / (np.sqrt(v) + tau)
        return x

    return run


fedadagrad, fedyogi, fedadam = adaptive("adagrad"), adaptive("yogi"), adaptive("adam")


def scaffold(c, x, rounds, server_lr):
    N = len(c.n)
    control, own = np.zeros_like(x), [np.zeros_like(x) for _ in range(N)]
    for S in rounds:
        dy, dc = [], []
        for k in S:
            y = c.sgd(k, x, lambda w, k=k, control=control: control - own[k])
            new = own[k] - control + (x - y) / (c.steps[k] * c.lr)
            dy.append(y - x)
            dc.append(new - own[k])
            own[k] = new
        x = x + server_lr * np.mean(dy, axis=0)
        control = control + len(S) / N * np.mean(dc, axis=0)
    return x, control, own


def ditto(c, x, rounds, lam):
    personal = {}
    for S in rounds:
        for k in S:
            personal[k] = c.sgd(k, personal.get(k, x), lambda v, x=x: lam * (v - x))
        x = x + mean_delta(c, x, S)
    return x, personal


def deltas(c, x, S):
    return np.array([c.sgd(k, x) - x for k in sorted(S)])


def median(c, x, rounds):
    for S in rounds:
        s = np.sort(deltas(c, x, S), axis=0)
        x = x + (s[(len(S) - 1) // 2] + s[len(S) // 2]) / 2
    return x


def trimmed_mean(c, x, rounds, beta):
    for S in rounds:
        cut = int(beta * len(S) + 1e-9)
        x = x + np.sort(deltas(c, x, S), axis=0)[cut : len(S) - cut].mean(axis=0)
    return x


def krum_order(V, f):
    n = len(V)
    scores = [sum(sorted(((V[i] - V[j]) ** 2).sum() for j in range(n) if j != i)[: n - f - 2]) for i in range(n)]
    return sorted(range(n), key=lambda i: (scores[i], i))


def krum(c, x, rounds, byzantine):
    for S in rounds:
        V = deltas(c, x, S)
        x = x + V[krum_order(V, byzantine)[0]]
    return x


def multi_krum(c, x, rounds, byzantine, select=None):
    for S in rounds:
        V = deltas(c, x, S)
        best = krum_order(V, byzantine)[: len(S) - byzantine if select is None else select]
        x = x + V[best].mean(axis=0)
    return x


def krum_by_brute_force(V, f):
    """Krum's score as a minimum over all sets of n - f - 2 neighbours, for the selection's own test."""
    n = len(V)
    return [
        min(
            sum(float(((V[i] - V[j]) ** 2).sum()) for j in neighbours)
            for neighbours in itertools.combinations([j for j in range(n) if j != i], n - f - 2)
        )
        for i in range(n)
    ]
