"""How many honest clients are in any sum that a server can open, whatever it says to whom: what noise in the sum may count on.

A client opens for the survivors that it is told, at least the threshold and the plan's minimum of them, each with a signature. Where the survivors are agreed
upon, everybody opens for one set, and the floor is its size less the colluders. Without agreement a server can tell clients different sets. Let n clients be
on the roster, a of them colluding, t the threshold, and every honest client be told at least m survivors. Then a client that is left out of the sum had
its key opened, by at least t - a honest clients that were told it is gone. Counting who was told that whom is alive, an opened sum with x
honest clients needs

    (n - a) (m - a)  <=  x (n - a) + (n - a - x) (n - t)         so         x  >=  (m - a) - (n - t) (n - m) / (t - a)

and, if t - a of the honest ones were told of s >= m survivors, x >= (s - a) - (n - t) (n - m) / (t - a). With nobody missing (s = n = m) that is
n - a; with many allowed to drop out it is far below m - a, which is what agreement (`Profile.MALICIOUS`) is for. On sparse graphs, where
survivors are always agreed upon, the floor holds as long as the honest survivors hang together: see `graph.sparse_parameters`.
"""

from __future__ import annotations

from fedlearn.errors import StudyError, UnsupportedError
from fedlearn.secagg.graph import COMPLETE_LIMIT, PPM, parameters
from fedlearn.secagg.plan import Profile


def colluding(clients: int, adversarial: float) -> int:
    """How many of so many clients may work with the server: at least one."""
    return max(1, clients * round(adversarial * PPM) // PPM)


def honest_floor(
    clients: int, minimum: int, adversarial: float, dropout: float, profile: Profile, survivors: int = 0
) -> int:
    """Honest clients in any sum that can be opened, on a roster of any size that the plan allows.

    Args:
        clients: the most on a roster.
        minimum: the fewest survivors that a client opens for.
        adversarial: the fraction that may collude with the server; one client at the least.
        dropout: the fraction that may vanish; it decides sparse graphs' thresholds.
        profile: whether the survivors are agreed upon. Above `COMPLETE_LIMIT` clients they always are.
        survivors: count on so many, because a threshold of clients were told of them; 0 for any sum at all.

    Raises:
        StudyError: nobody honest is sure to be in it.
    """
    rate, least = round(adversarial * PPM), max(minimum, survivors)
    floors = []
    for n in (*range(least, min(clients, COMPLETE_LIMIT) + 1), *([clients] if clients > COMPLETE_LIMIT else [])):
        against = colluding(n, adversarial)
        try:
            found = parameters(n, rate, round(dropout * PPM))
        except UnsupportedError:  # no attempt with such a roster begins
            continue
        told, t = max(minimum, found.threshold if found.complete else 0), found.threshold
        gap = 0
        if found.complete and profile is not Profile.MALICIOUS:
            gap = (n - t) * (n - told) // (t - against)
        floors.append(max(told, survivors) - against - gap)
    if not floors or min(floors) < 1:
        raise StudyError(
            f"distributed noise: of {clients} clients with at least {minimum} survivors, no honest one is sure to be in the sum",
            hint='raise the minimum, assume fewer adversarial clients, or take profile = "malicious"',
        )
    return min(floors)
