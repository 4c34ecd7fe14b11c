"""How long to wait before the next try: capped exponential with jitter, pure."""


def backoff(attempt: int, minimum: float, maximum: float, random: float) -> float:
    """Return the seconds to wait after failure number `attempt` (0 = the first).

    random  drawn by the caller from [0, 1). The wait lies between `minimum` and a ceiling that starts at twice `minimum`
            and doubles with every failure up to `maximum`. All of that span is jitter, so that processes which lost the
            same server at the same moment do not come back in step; none of it is below `minimum`, so nobody spins.
    """
    ceiling = min(maximum, minimum * 2.0 ** min(attempt + 1, 60))
    return minimum + random * max(0.0, ceiling - minimum)
