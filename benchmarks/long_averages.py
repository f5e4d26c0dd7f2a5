"""Error of float32 moving averages after a million steps, against float64.

The recursions of `moving_average_estimate` with one decay, in NumPy, on gradients with
mean one and a given standard deviation, in 64 coordinates.

    python -m benchmarks.long_averages

About a minute.
"""

import numpy as np

DECAYS = np.array([0.9999, 0.99999, 0.999999], np.float32)
DEVIATIONS = np.array([1.0, 1e-3])
STEPS, WIDTH = 1_000_000, 64


def main() -> None:
    """Run, print a table."""
    rng = np.random.default_rng(0)
    log_decay = np.log(DECAYS.astype(np.float64))[:, None, None]
    shape = (len(DECAYS), len(DEVIATIONS), WIDTH)
    m, s = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    exact_m, exact_s = np.zeros(shape), np.zeros(shape)
    for t in range(1, STEPS + 1):
        noise = rng.standard_normal((1, 1, WIDTH))
        g = (1 + DEVIATIONS[None, :, None] * noise).astype(np.float32)
        weight = np.expm1(log_decay) / np.expm1(t * log_decay)
        w = weight.astype(np.float32)
        if t == 1:
            m[:], exact_m[:] = g, g
            continue
        m = m + w * (g - m)
        rest = np.float32(1) - w
        s = rest * s + w / rest * np.square(g - m)
        exact_s = (1 - weight) * (exact_s + weight * np.square(g - exact_m))
        exact_m = exact_m + weight * (g - exact_m)
    print("| decay | σ/mean | error of m over σ, rms | relative error of s, rms |")
    print("|---|---|---|---|")
    for i, decay in enumerate(DECAYS):
        for j, deviation in enumerate(DEVIATIONS):
            mean = ((m - exact_m) / np.sqrt(exact_s))[i, j]
            variance = ((s - exact_s) / exact_s)[i, j]
            print(
                f"| {decay:.6g} | {deviation:g} | {np.sqrt(np.mean(mean**2)):.0e} "
                f"| {np.sqrt(np.mean(variance**2)):.0e} |"
            )


if __name__ == "__main__":
    main()
